//! A union by the paths of its directories, and the mount that shows it: what can be told to another
//! process.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::busy_poll::BUSY_POLL;
use super::session::{Session, SessionOptions, Transport};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::idmap::IdMap;
use crate::layer::LayerFormat;
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::lock::{self, Flock, Sharing, try_lock};
use crate::sys::mount::Attributes;
use crate::sys::mountinfo;
use crate::sys::owners::Owners;
use crate::union::{Lower, SyncPolicy, Union, UnionOptions, UnionSpec, Upper};

/// What /proc/mounts shows as the source of such mounts.
const SOURCE: &str = "stratafs";

/// The writable layer of a [`View`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ViewUpper {
    pub(crate) dir: PathBuf,
    /// An engine's work directory, on the same mount as `dir`.
    pub(crate) work: PathBuf,
    /// The name, in `work`, of the directory that is the union's own; it is made if it is not there.
    pub(crate) own: Name,
}

/// What is to be seen, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// The read-only layers, the topmost first.
    pub(crate) lowers: Vec<PathBuf>,
    pub(crate) upper: Option<ViewUpper>,
    pub(crate) format: LayerFormat,
    /// Where all layers keep owners.
    pub(crate) owners: Owners,
    pub(crate) uids: IdMap,
    pub(crate) gids: IdMap,
    /// Never waits for the disk.
    pub(crate) volatile: bool,
    pub(crate) attributes: Attributes,
    pub(crate) transport: Transport,
}

impl View {
    /// What the union is made of.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the work directory is on another mount than the upper;
    /// [`ErrorKind::Busy`] if another union uses it; those of opening the directories.
    pub(crate) fn spec(&self) -> Result<UnionSpec> {
        let open = |path: &PathBuf| Dir::open_with(path, self.owners).at("open layer", path);
        let mut lowers = Vec::with_capacity(self.lowers.len());
        for path in &self.lowers {
            lowers.push(Lower { dir: Arc::new(open(path)?), format: self.format, dot_wh: false });
        }
        let upper = match &self.upper {
            None => None,
            Some(upper) => {
                let dir = open(&upper.dir)?;
                let work = own_work(upper, &dir)?;
                let lock = Some(lock_work(&work, &upper.dir)?);
                Some(Upper { dir: Arc::new(dir), format: self.format, work, lock })
            }
        };
        let sync = if self.volatile { SyncPolicy::Volatile } else { SyncPolicy::Strict };
        let options = UnionOptions {
            sync,
            uids: self.uids.clone(),
            gids: self.gids.clone(),
            ..UnionOptions::default()
        };
        Ok(UnionSpec { lowers, upper, options })
    }

    /// Mounts it on the directory `target`, of which `dir` is an open descriptor, and serves it.
    /// `until_end` is closed when nothing is served any more.
    ///
    /// # Errors
    /// Those of [`View::spec`] and [`Session::mount`].
    pub(crate) fn mount(
        &self,
        dir: &OwnedFd,
        target: &Path,
        until_end: Option<OwnedFd>,
    ) -> Result<Session> {
        let union = Arc::new(Union::open(self.spec()?)?);
        let options = SessionOptions {
            source: OsString::from(SOURCE),
            attributes: self.attributes,
            // As with other mounts the modes of the files decide; but fusermount3 would have to be
            // configured for it.
            allow_other: self.transport == Transport::Direct,
            kernel_options: Vec::new(),
            writeback: true,
            // Nobody else changes the layers.
            timeout: None,
            threads: None,
            busy_poll: BUSY_POLL,
            auto_unmount: false,
            transport: self.transport,
        };
        Session::mount_until(union, dir, target, &options, until_end)
    }
}

/// The union's own directory.
fn own_work(upper: &ViewUpper, dir: &Dir) -> Result<Dir> {
    let work = Dir::open_with(&upper.work, dir.owners());
    let work = work.at("open work directory", &upper.work)?;
    let place = |dir: &Dir, path: &Path| mountinfo::ids(dir).at("identify the mount of", path);
    if place(dir, &upper.dir)? != place(&work, &upper.work)? {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "the upper directory {:?} and its work directory must be on the same mount:",
                upper.dir
            ),
        )
        .with_path(&upper.work));
    }
    let own = &upper.own;
    match work.make_dir(own, 0o700) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        made => made.at("make in the work directory", own)?,
    }
    work.open_dir(own).at("open in the work directory", own)
}

/// Locks the union's own directory for one union, for as long as that may write to the upper.
///
/// # Errors
/// [`ErrorKind::Busy`] if another union has it.
pub(crate) fn lock_work(own: &Dir, upper: &Path) -> Result<Flock> {
    let name = Name::new("lock")?;
    let file = own.open_or_create(&name, 0o600).at("make the lock for", upper)?;
    match try_lock(file.into(), Sharing::Exclusive).at("lock", upper)? {
        Ok(lock) => {
            // The one before may have said more of itself.
            lock::set_mode(&lock, 0o600).at("set the mode of the lock for", upper)?;
            Ok(lock)
        }
        Err(_) => Err(Error::new(
            ErrorKind::Busy,
            "another mount that is served writes to this upper; unmount that first:",
        )
        .with_path(upper)),
    }
}
