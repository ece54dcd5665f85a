//! File systems in files: made, mounted over loop devices, and cloned as a power cut would leave them.
//!
//! The mounts are in a mount namespace of the test process alone: they and their loop devices go when
//! it ends, however it ends.
//!
//! A clone is made with FICLONE, which is atomic: it has every write that the file system had
//! submitted to its device at one moment, and none that came later. A copy would mix the two, since
//! journals are written in the background.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::suite;

/// A kind of file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Ext4, Kind::Xfs, Kind::Btrfs];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
            Kind::Btrfs => "btrfs",
        }
    }

    /// The least that its mkfs takes, or a little more, in MiB.
    fn size(self) -> u64 {
        match self {
            Kind::Ext4 => 64,
            Kind::Xfs => 320,
            Kind::Btrfs => 128,
        }
    }

    fn mkfs(self) -> Command {
        let mut command = Command::new(format!("mkfs.{}", self.name()));
        command.arg("-q");
        if self == Kind::Ext4 {
            // No blocks kept back for root, who runs these tests.
            command.args(["-m", "0"]);
        }
        command
    }

    /// Why there can be no such file system here, if there cannot.
    pub fn hindrance(self) -> Option<String> {
        let mkfs = format!("mkfs.{}", self.name());
        loop_mounts_hindrance().or_else(|| suite::needs_program(&mkfs))
    }
}

/// Why nothing can be mounted over a loop device here, if so.
pub fn loop_mounts_hindrance() -> Option<String> {
    suite::needs_root().or_else(|| {
        let control = File::options().read(true).write(true).open("/dev/loop-control");
        control.is_err().then(|| "needs loop devices".to_owned())
    })
}

/// Puts this process into a mount namespace of its own. Call it first in `main`: it holds for threads
/// that come later.
pub fn enter_own_mount_namespace() {
    if suite::needs_root().is_none() {
        // Root in a container may lack the right; then mounting fails too, and says so.
        if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_ok() {
            let flags = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
            rustix::mount::mount_change("/", flags).unwrap();
        }
    }
}

/// Makes a file system in a new file.
pub fn make_image(kind: Kind, image: &Path) {
    make_image_of(kind, image, kind.size());
}

fn make_image_of(kind: Kind, image: &Path, mib: u64) {
    File::create_new(image).unwrap().set_len(mib << 20).unwrap();
    succeeds(kind.mkfs().arg(image));
}

/// A clone of `image` as it is at this moment; both are on the host file system of [`Host`].
pub fn clone_image(image: &Path, to: &Path) {
    let (from, to) = (File::open(image).unwrap(), File::create_new(to).unwrap());
    rustix::fs::ioctl_ficlone(&to, &from).unwrap();
}

/// A mounted file system, unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
}

impl Mounted {
    pub fn image(kind: Kind, image: &Path, at: &Path) -> Mounted {
        Mounted::image_with(kind, image, at, "loop")
    }

    pub fn read_only_image(kind: Kind, image: &Path, at: &Path) -> Mounted {
        Mounted::image_with(kind, image, at, "loop,ro")
    }

    fn image_with(kind: Kind, image: &Path, at: &Path, options: &str) -> Mounted {
        if kind == Kind::Btrfs {
            // It remembers the newest of the devices that share an id, and refuses older clones.
            // There may be nothing to forget.
            Command::new("btrfs").args(["device", "scan", "--forget"]).output().unwrap();
        }
        std::fs::create_dir_all(at).unwrap();
        succeeds(Command::new("mount").args(["-t", kind.name(), "-o", options]).arg(image).arg(at));
        Mounted { at: at.to_owned() }
    }

    pub fn tmpfs(at: &Path, size: &str) -> Mounted {
        std::fs::create_dir_all(at).unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        rustix::mount::mount("stratafs-test", at, "tmpfs", MountFlags::empty(), &*options).unwrap();
        Mounted { at: at.to_owned() }
    }

    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if rustix::mount::unmount(&self.at, UnmountFlags::empty()).is_err() {
            // A panicking test may have files open in it.
            let detached = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
            assert!(std::thread::panicking(), "{} is in use ({detached:?})", self.at.display());
        }
    }
}

/// A file system that can clone files, for images and their clones.
#[derive(Debug)]
pub struct Host {
    mounted: Mounted,
    _dir: tempfile::TempDir,
}

impl Host {
    /// The kinds that can clone.
    const KINDS: [Kind; 2] = [Kind::Xfs, Kind::Btrfs];

    pub fn hindrance() -> Option<String> {
        let hindrances = Self::KINDS.map(Kind::hindrance);
        if hindrances.iter().any(Option::is_none) {
            return None;
        }
        hindrances.into_iter().flatten().next()
    }

    pub fn new() -> Host {
        let kind = Self::KINDS.into_iter().find(|kind| kind.hindrance().is_none()).unwrap();
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let image = dir.path().join("host.img");
        make_image_of(kind, &image, 8 << 10);
        let mounted = Mounted::image(kind, &image, &dir.path().join("host"));
        Host { mounted, _dir: dir }
    }

    pub fn path(&self) -> &Path {
        self.mounted.path()
    }
}

/// Makes a file so large that not one byte more has room.
pub fn fill(path: &Path) {
    use std::io::{ErrorKind, Write as _};
    let mut file = File::create_new(path).unwrap();
    let (mut length, mut step) = (0_u64, 64_u64 << 20);
    while step > 0 {
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&file, flags, length, step) {
            Ok(()) => length += step,
            Err(rustix::io::Errno::NOSPC) => step /= 2,
            Err(e) => panic!("{e}"),
        }
    }
    // Where room for metadata and for data are apart, some is left.
    let mut rest = vec![0x5a_u8; 1 << 20];
    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).unwrap();
    while !rest.is_empty() {
        match file.write(&rest) {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::StorageFull => rest.truncate(rest.len() / 2),
            Err(e) => panic!("{e}"),
        }
    }
    // Blocks are found late, and some that were counted on turn out to be needed for metadata.
    file.sync_all().ok();
}

#[track_caller]
fn succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
}
