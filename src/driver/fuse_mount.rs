//! A union of plain directories over FUSE, outside of any store: what the program `stratafs-fuse` mounts.
//!
//! Whoever writes through it holds the lock `WORK/stratafs/lock` for as long as it is served, so that an
//! upper never has two writers. In `WORK/stratafs` is all that the union keeps; the rest of the work
//! directory is left to the kernel's overlayfs, which may use it at other times.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::target::Target;
use super::union::find_transport;
use super::{Restrictions, UpperDir, own_work};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::fuse::unseen::MAY_BE_ASKED;
use crate::fuse::{BUSY_POLL, Mounted, Session, SessionOptions, Transport, lock_work};
use crate::idmap::{IdMap, IdRange};
use crate::layer::LayerFormat;
use crate::sys::dir::Dir;
use crate::sys::lock::{self, Flock};
use crate::sys::mount as sys;
use crate::sys::mountinfo;
use crate::sys::owners::Owners;
use crate::sys::xattr::{self, Of};
use crate::union::{Lower, SyncPolicy, Union, UnionOptions, UnionSpec, Upper};

/// A layer directory that is only read, and the format of its marks.
///
/// In a layer of containers/storage (a directory `diff` beside a file `link`) the marks of AUFS, `.wh.NAME` and
/// `.wh..wh..opq`, are marks as well, whatever the format: for a program that mounts in the kernel's place
/// podman and buildah unpack images with those.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FuseLayer {
    /// The directory.
    pub dir: PathBuf,
    /// How it says what is deleted.
    pub format: LayerFormat,
}

/// What a [`FuseMount`] shows, and how. [`FuseMountOptions::new`] has a container's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FuseMountOptions {
    /// Layers that are only read, the topmost first.
    pub lowers: Vec<FuseLayer>,
    /// The layer that takes all changes, and the work directory for it; without one all is read-only.
    pub upper: Option<UpperDir>,
    /// The format of the upper.
    pub format: LayerFormat,
    /// Where all layers keep owners. The default is where file systems do.
    pub owners: Owners,
    /// User ids; without any range they are as the files have them. Ids in no range are shown as 65534,
    /// and cannot be given to a file.
    pub uids: Vec<IdRange>,
    /// Group ids, likewise.
    pub gids: Vec<IdRange>,
    /// All files are shown with this owner.
    pub squash_uid: Option<u32>,
    /// All files are shown with this group.
    pub squash_gid: Option<u32>,
    /// Never waits for the disk, not even in fsync(2): after a crash of the machine the upper is lost.
    pub volatile: bool,
    /// POSIX ACLs are neither shown nor taken.
    pub no_acl: bool,
    /// Every file is shown with one link.
    pub static_nlink: bool,
    /// Directories of lower layers can be renamed, which leaves a redirect in the upper until it is
    /// settled. Otherwise that fails with EXDEV. The format AUFS has no redirects.
    pub redirects: bool,
    /// A file of a lower layer of which only attributes or names are changed gets a copy without data
    /// (`metacopy`, as the kernel's overlayfs writes it), until it is written to or settled. Otherwise it is
    /// copied whole, as without [`redirects`](Self::redirects), and in the format AUFS.
    pub metacopy: bool,
    /// The kernel collects small writes. Errors of a full disk then show at close(2) and fsync(2), not
    /// at write(2).
    pub writeback: bool,
    /// How long the kernel may rely on what it was told of names and attributes; for ever, if none. With
    /// a finite time, changes that others make in the layers show when it has passed.
    pub timeout: Option<Duration>,
    /// How many threads serve it; by the number of processors, if none.
    pub threads: Option<NonZeroUsize>,
    /// While requests follow each other: for how long a thread that has answered one asks for the next
    /// before it sleeps. What asks is woken sooner, at the cost of that much processor time at the end of
    /// each row of requests; zero never does. Without effect on a single processor.
    pub busy_poll: Duration,
    /// Others than the user who mounts it may use it; the modes of the files decide as elsewhere.
    pub allow_other: bool,
    /// Without the right to mount: fusermount3 unmounts it when this process ends, however it does.
    pub auto_unmount: bool,
    /// What the mount forbids.
    pub restrictions: Restrictions,
    /// Further options for the kernel, such as `context=...`.
    pub kernel_options: Vec<OsString>,
    /// What /proc/mounts shows as the source.
    pub source: OsString,
    /// This process is nothing but its server, and takes SIGUSR1 for the question whether anybody sees the mount.
    #[doc(hidden)]
    pub may_be_asked: bool,
}

impl FuseMountOptions {
    /// A union without layers, whose upper is to be of this format.
    pub fn new(format: LayerFormat) -> Self {
        FuseMountOptions {
            lowers: Vec::new(),
            upper: None,
            format,
            owners: Owners::OfFiles,
            uids: Vec::new(),
            gids: Vec::new(),
            squash_uid: None,
            squash_gid: None,
            volatile: false,
            no_acl: false,
            static_nlink: false,
            redirects: true,
            metacopy: true,
            writeback: true,
            timeout: None,
            threads: None,
            busy_poll: BUSY_POLL,
            allow_other: false,
            auto_unmount: false,
            restrictions: Restrictions::default(),
            kernel_options: Vec::new(),
            source: "stratafs".into(),
            may_be_asked: false,
        }
    }
}

/// A union mounted over FUSE, which this process serves. Dropped, it unmounts, and logs what goes wrong.
///
/// ```no_run
/// use stratafs::{FuseLayer, FuseMount, FuseMountOptions, LayerFormat, UpperDir};
///
/// let format = LayerFormat::OverlayUser;
/// let mut options = FuseMountOptions::new(format);
/// options.lowers = vec![FuseLayer { dir: "/layers/1".into(), format }];
/// options.upper = Some(UpperDir { dir: "/upper".into(), work: "/work".into() });
/// let mut mount = FuseMount::new("/mnt".as_ref(), &options)?;
/// std::fs::write("/mnt/hello", "written to /upper").unwrap();
/// mount.unmount(false)?;
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Debug)]
pub struct FuseMount {
    session: Session,
    target: PathBuf,
}

/// Unmounts a [`FuseMount`] from another thread than the one that waits for it.
#[derive(Clone, Debug)]
pub struct FuseUnmounter(Mounted);

impl FuseUnmounter {
    /// As [`FuseMount::unmount`], without waiting.
    ///
    /// # Errors
    /// As there.
    pub fn unmount(&self, detach: bool) -> Result<()> {
        self.0.unmount(detach)?
    }
}

impl FuseMount {
    /// Mounts on the directory `target`, and serves it. When this returns, the mount answers.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`]: a directory is missing.
    /// - [`ErrorKind::InvalidArgument`]: no layer; a work directory on another mount than the upper, or
    ///   one inside the other; a layer that is given twice; a target inside or above a layer.
    /// - [`ErrorKind::Busy`]: another such mount writes to the upper.
    /// - [`ErrorKind::PermissionDenied`]: no right to mount, or to read the marks of a format.
    /// - [`ErrorKind::Unsupported`]: no FUSE, or no fusermount3 where it is needed.
    pub fn new(target: &Path, options: &FuseMountOptions) -> Result<FuseMount> {
        let path = target.canonicalize().at("find the mount point", target)?;
        let target = Target::open(&path)?;
        let spec = open(options, Some(&target))?;
        let transport = find_transport()?;
        let session_options = SessionOptions {
            source: options.source.clone(),
            attributes: Restrictions {
                // Else what is written would be lost when the kernel cannot write it back.
                read_only: options.restrictions.read_only || options.upper.is_none(),
                ..options.restrictions
            }
            .attributes(),
            allow_other: options.allow_other,
            kernel_options: options.kernel_options.clone(),
            writeback: options.writeback,
            timeout: options.timeout,
            threads: options.threads,
            busy_poll: options.busy_poll,
            auto_unmount: options.auto_unmount && transport == Transport::Fusermount,
            transport,
        };
        let union = Arc::new(Union::open(spec)?);
        let dir = target.dir().try_clone_to_owned().at("keep open", &path)?;
        let session = Session::mount(union, &dir, &path, &session_options)?;
        Ok(FuseMount { session, target: path })
    }

    /// Where it is mounted, as an absolute path.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The features of the kernel that were asked for, by their names in `linux/fuse.h`, and whether
    /// they were granted.
    pub fn granted(&self) -> Vec<(&'static str, bool)> {
        self.session.granted()
    }

    /// How many requests the kernel has sent, of each kind of which there was one, by its name in
    /// `linux/fuse.h` (`lookup`, `read`, ...). What the kernel's caches answer is no request.
    pub fn requests(&self) -> Vec<(&'static str, u64)> {
        self.session.requests()
    }

    /// What unmounts it while [`FuseMount::wait`] waits.
    pub fn unmounter(&self) -> FuseUnmounter {
        FuseUnmounter(self.session.mounted().clone())
    }

    /// Waits until somebody has unmounted it, and all that was written is on disk.
    ///
    /// # Errors
    /// What ended the service other than an unmount, or kept data from the disk.
    pub fn wait(&mut self) -> Result<()> {
        self.session.wait()
    }

    /// Unmounts, and waits until all that was written is on disk. With `detach` a mount that is in use
    /// leaves the tree at once, and ends with the last file in it: [`FuseMount::wait`] waits for that.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if it is in use; what keeps data from the disk.
    pub fn unmount(&mut self, detach: bool) -> Result<()> {
        self.session.unmount(detach)
    }
}

/// Opens all that the union is made of, and makes sure that it goes together, and with where it is to be
/// mounted.
pub(super) fn open(options: &FuseMountOptions, target: Option<&Target>) -> Result<UnionSpec> {
    let mut seen: Vec<(u64, u64)> = Vec::new();
    let mut layer = |path: &Path, format: LayerFormat| -> Result<Dir> {
        super::union::marks_can_be_read(format)?;
        let dir = Dir::open_with(path, options.owners).at("open layer", path)?;
        if let Some(target) = target {
            target.keep_apart(&dir, path)?;
        }
        let stat = dir.stat().at("look at layer", path)?;
        if seen.contains(&(stat.dev, stat.ino)) {
            let message = "the directory is given twice, and can be one layer only:";
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(path));
        }
        seen.push((stat.dev, stat.ino));
        Ok(dir)
    };
    let upper = match &options.upper {
        None => None,
        Some(upper) => Some((upper, layer(&upper.dir, options.format)?)),
    };
    let mut lowers = Vec::with_capacity(options.lowers.len());
    for FuseLayer { dir, format } in &options.lowers {
        let dot_wh = is_of_containers_storage(dir);
        lowers.push(Lower { dir: Arc::new(layer(dir, *format)?), format: *format, dot_wh });
    }
    let upper = match upper {
        None => None,
        Some((paths, dir)) => {
            let (work, lock) = open_work(paths, &dir)?;
            if options.may_be_asked {
                let says = lock::set_mode(&lock, MAY_BE_ASKED);
                says.at("set the mode of the lock in", &paths.work)?;
            }
            let (dir, lock) = (Arc::new(dir), Some(lock));
            Some(Upper { dir, format: options.format, work, lock })
        }
    };
    let map = |ranges: &[IdRange], squash| IdMap::new(ranges.to_vec(), squash);
    let sync = if options.volatile { SyncPolicy::Volatile } else { SyncPolicy::Strict };
    let options = UnionOptions {
        uids: map(&options.uids, options.squash_uid),
        gids: map(&options.gids, options.squash_gid),
        sync,
        no_acl: options.no_acl,
        static_nlink: options.static_nlink,
        // podman prepares containers as root of the host, who need not be in their map.
        root_makes_for_nobody: true,
        no_redirects: !options.redirects,
        no_metacopy: !options.metacopy,
        live: options.timeout.is_some(),
    };
    Ok(UnionSpec { lowers, upper, options })
}

/// Whether a directory is a layer of containers/storage (podman, buildah): it is called `diff`, beside a file
/// `link` with the layer's short name. One that this program mounts for it has the marks of AUFS, too, as it was
/// unpacked.
#[doc(hidden)]
pub fn is_of_containers_storage(layer: &Path) -> bool {
    let Ok(layer) = layer.canonicalize() else { return false };
    let link = layer.parent().map(|parent| parent.join("link"));
    layer.file_name() == Some("diff".as_ref())
        && link.is_some_and(|link| link.symlink_metadata().is_ok_and(|meta| meta.is_file()))
}

/// Rather now than at the first file that is made.
fn may_keep_owners(work: &Dir, path: &Path) -> Result<()> {
    use std::io::ErrorKind::{PermissionDenied, Unsupported};

    const TRIED: &[u8] = b"security.fuseoverlayfs.tried";
    let of = Of::dir(work);
    match xattr::set(of, TRIED, b"").and_then(|()| xattr::remove(of, TRIED)) {
        Err(e) if matches!(e.kind(), PermissionDenied | Unsupported) => Err(Error::new(
            ErrorKind::Unsupported,
            "cannot keep owners in security.* xattrs, which takes CAP_SYS_ADMIN outside of user namespaces and \
             a file system that has them (user.* xattrs, xattr_permissions=2, take no right), in work directory",
        )
        .with_path(path)
        .with_source(e)),
        done => done.at("set an xattr of", path),
    }
}

/// Opens the union's own directory in a work directory, and locks it.
fn open_work(paths: &UpperDir, upper: &Dir) -> Result<(Dir, Flock)> {
    let work = Dir::open_with(&paths.work, upper.owners());
    let work = work.at("open work directory", &paths.work)?;
    let refuse = |message: String| {
        Err(Error::new(ErrorKind::InvalidArgument, message).with_path(&paths.work))
    };
    let mount = |dir: &Dir, path: &Path| mountinfo::ids(dir).at("identify the mount of", path);
    if mount(upper, &paths.dir)? != mount(&work, &paths.work)? {
        return refuse(format!(
            "the upper directory {:?} and its work directory must be on the same mount:",
            paths.dir
        ));
    }
    if upper.owners() == Owners::InSecurityXattrs {
        may_keep_owners(&work, &paths.work)?;
    }
    let place = |dir: &Dir| sys::where_is(dir.as_fd());
    if let (Some(upper_at), Some(work_at)) = (place(upper), place(&work))
        && (upper_at.starts_with(&work_at) || work_at.starts_with(&upper_at))
    {
        return refuse(format!(
            "the upper directory {:?} and its work directory must not be one inside the other:",
            paths.dir
        ));
    }
    let own = own_work()?;
    match work.make_dir(&own, 0o700) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        made => made.at("make in the work directory", &paths.work)?,
    }
    let own = work.open_dir(&own).at("open the union's own directory in", &paths.work)?;
    let lock = lock_work(&own, &paths.dir)?;
    Ok((own, lock))
}

/// For the program `stratafs-fuse`: takes leave of the terminal and the standard streams.
#[doc(hidden)]
pub fn leave_terminal() -> Result<()> {
    crate::sys::daemon::leave().at("go to the background, by", "/dev/null")
}

/// For the program `stratafs-fuse`: whether this process can read `trusted.*` xattrs, and whether it is
/// root in its user namespace.
#[doc(hidden)]
pub fn fuse_privileges() -> Result<(bool, bool)> {
    let reads = super::union::marks_can_be_read(LayerFormat::OverlayTrusted);
    let root = crate::sys::fuse::user_and_group().0 == 0;
    match reads {
        Ok(()) => Ok((true, root)),
        Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::Incompatible) => {
            Ok((false, root))
        }
        Err(e) => Err(e),
    }
}
