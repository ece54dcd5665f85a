//! An owned directory descriptor, and the `*at` calls on it.
//!
//! Every call takes one [`Name`] and never follows a symlink in it. What is opened is opened with
//! O_CLOEXEC. Calls that set attributes of a child do so without opening it, so that a fifo or a
//! device is never touched. A directory knows where its tree keeps [owners](super::owners), and so does what is
//! opened by it.

mod ownership;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, RenameFlags, Timespec, Timestamps};
use rustix::io::Errno;

pub(super) use ownership::link_target;

use super::file::Place;
use super::owners::Owners;
use super::stat::{self, FileType, Stat, Time};
use super::xattr::Of;
use crate::path::Name;

/// An open directory.
#[derive(Debug)]
pub(crate) struct Dir {
    fd: OwnedFd,
    owners: Owners,
}

/// One line of a listing. The type may be [`FileType::Unknown`].
#[derive(Clone, Debug)]
pub(crate) struct DirEntry {
    pub(crate) name: Name,
    pub(crate) file_type: FileType,
}

/// What a rename does where the new name exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnExisting {
    /// Replaces it, as rename(2).
    Replace,
    /// Fails with EEXIST.
    Fail,
}

/// What [`Dir::make_node`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    Fifo,
    Socket,
    Char { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Dir> for OwnedFd {
    fn from(dir: Dir) -> OwnedFd {
        dir.fd
    }
}

impl TryFrom<OwnedFd> for Dir {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Dir> {
        Dir::of(fd, Owners::OfFiles)
    }
}

const DIR_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOCTTY);

impl Dir {
    /// Opens a directory by an ordinary path, following symlinks: for roots that the caller names.
    pub(crate) fn open(path: impl AsRef<Path>) -> io::Result<Dir> {
        Dir::open_with(path, Owners::OfFiles)
    }

    /// As [`Dir::open`], of a tree that keeps owners so.
    pub(crate) fn open_with(path: impl AsRef<Path>, owners: Owners) -> io::Result<Dir> {
        Ok(Dir { fd: rustix::fs::open(path.as_ref(), DIR_FLAGS, Mode::empty())?, owners })
    }

    /// A descriptor that must be a directory's, of a tree that keeps owners so.
    pub(crate) fn of(fd: OwnedFd, owners: Owners) -> io::Result<Dir> {
        match stat::fstat(&fd)?.is_dir() {
            true => Ok(Dir { fd, owners }),
            false => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// Whether an xattr makes it hand its group down to what is made in it.
    pub(crate) fn hands_group_down(&self) -> io::Result<bool> {
        match self.owners.xattr() {
            None => Ok(false),
            Some(xattr) => Ok(xattr.group_handed_down(self)?.is_some()),
        }
    }

    /// Whether a child is shown as a symlink and is one.
    pub(crate) fn is_symlink_itself(&self, name: &Name) -> io::Result<bool> {
        Ok(self.own_stat_at(name)?.file_type == FileType::Symlink)
    }

    /// A file or child of the same tree.
    pub(crate) fn place<'a>(&self, of: Of<'a>) -> Place<'a> {
        match of {
            Of::Fd(fd) => Place::Open(fd, self.owners),
            Of::Child(dir, name) => Place::Child(dir, name),
        }
    }

    /// Where its tree keeps owners.
    pub(crate) fn owners(&self) -> Owners {
        self.owners
    }

    /// The same directory, of a tree that keeps owners so.
    pub(crate) fn with_owners(self, owners: Owners) -> Dir {
        Dir { owners, ..self }
    }

    /// Of the same tree.
    fn like(&self, fd: OwnedFd) -> Dir {
        Dir { fd, owners: self.owners }
    }

    /// Opens the same directory once more: a descriptor with a position and locks of its own.
    pub(crate) fn reopen(&self) -> io::Result<Dir> {
        Ok(self.like(rustix::fs::openat(&self.fd, c".", DIR_FLAGS, Mode::empty())?))
    }

    /// A second descriptor of the same open directory, which shares its position and locks.
    pub(crate) fn try_clone(&self) -> io::Result<Dir> {
        Ok(self.like(self.fd.try_clone()?))
    }

    /// Its own attributes.
    pub(crate) fn stat(&self) -> io::Result<Stat> {
        self.stat_of(self)
    }

    /// Attributes of an open file of the same tree.
    pub(crate) fn stat_of(&self, file: impl AsFd) -> io::Result<Stat> {
        let own = stat::fstat(&file)?;
        match self.owners.xattr() {
            None => Ok(own),
            Some(xattr) => xattr.shown(Of::Fd(file.as_fd()), own),
        }
    }

    /// Attributes of a child.
    pub(crate) fn stat_at(&self, name: &Name) -> io::Result<Stat> {
        let own = self.own_stat_at(name)?;
        match self.owners.xattr() {
            None => Ok(own),
            Some(xattr) => xattr.shown(Of::Child(self, name), own),
        }
    }

    /// The same, as the file itself has them.
    pub(super) fn own_stat_at(&self, name: &Name) -> io::Result<Stat> {
        stat::stat_at(&self.fd, name.as_bytes())
    }

    /// Attributes of a child, or none if there is none of that name.
    pub(crate) fn try_stat_at(&self, name: &Name) -> io::Result<Option<Stat>> {
        match self.stat_at(name) {
            Ok(stat) => Ok(Some(stat)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            // Longer than this file system's names can be: then it is not there.
            Err(e) if e.raw_os_error() == Some(libc::ENAMETOOLONG) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Opens a child directory.
    pub(crate) fn open_dir(&self, name: &Name) -> io::Result<Dir> {
        let flags = DIR_FLAGS | OFlags::NOFOLLOW;
        Ok(self.like(rustix::fs::openat(&self.fd, name.as_bytes(), flags, Mode::empty())?))
    }

    /// Opens the directory above. Whoever calls it must know that it is not the root of a layer.
    pub(crate) fn open_parent(&self) -> io::Result<Dir> {
        Ok(self.like(rustix::fs::openat(&self.fd, c"..", DIR_FLAGS, Mode::empty())?))
    }

    /// Opens a regular file for reading; anything else is refused without blocking on it.
    pub(crate) fn open_file(&self, name: &Name) -> io::Result<File> {
        Ok(self.open_regular(name, OFlags::RDONLY)?.0)
    }

    /// The same, with the file's attributes.
    pub(crate) fn open_file_stat(&self, name: &Name) -> io::Result<(File, Stat)> {
        self.open_regular(name, OFlags::RDONLY)
    }

    /// Opens a regular file of this mode for reading. One that its owner has closed to himself is open
    /// to him for that one moment.
    pub(crate) fn open_file_of_mode(&self, name: &Name, mode: u32) -> io::Result<File> {
        match self.open_file(name) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                // Where owners are in xattrs, `mode` is not the file's own.
                let in_xattrs = self.owners.are_in_xattrs();
                let own = if in_xattrs { self.own_stat_at(name)?.mode } else { mode };
                self.chmod_itself_at(name, own | 0o400)?;
                let opened = self.open_file(name);
                self.chmod_itself_at(name, own)?;
                opened
            }
            opened => opened,
        }
    }

    /// Opens a regular file for reading and writing.
    pub(crate) fn open_file_rw(&self, name: &Name) -> io::Result<File> {
        Ok(self.open_regular(name, OFlags::RDWR)?.0)
    }

    fn open_regular(&self, name: &Name, access: OFlags) -> io::Result<(File, Stat)> {
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name.as_bytes(), flags, Mode::empty())?;
        let stat = self.stat_of(&fd)?;
        if stat.is_file() {
            Ok((File::from(fd), stat))
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
        }
    }

    /// Creates a regular file that must not exist, open for reading and writing. The process's umask
    /// applies to `mode`.
    pub(crate) fn create_file(&self, name: &Name, mode: u32) -> io::Result<File> {
        let file = self.create_itself(name, self.own_mode(mode, false))?;
        let done = self.made(Of::Fd(file.as_fd()), || stat::fstat(&file), mode);
        self.or_unlink(name, done)?;
        Ok(file)
    }

    /// Makes a file that has no name, and inherits from the directory what its files do.
    ///
    /// # Errors
    /// EOPNOTSUPP where the file system has no such files; EISDIR from a kernel that has not.
    pub(crate) fn create_nameless(&self, mode: u32) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let own_mode = Mode::from_raw_mode(self.own_mode(mode, false));
        let file = File::from(rustix::fs::openat(&self.fd, ".", flags, own_mode)?);
        self.made(Of::Fd(file.as_fd()), || stat::fstat(&file), mode)?;
        Ok(file)
    }

    /// Opens a file for reading and writing, making it if it is not there.
    pub(crate) fn open_or_create(&self, name: &Name, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        Ok(File::from(rustix::fs::openat(&self.fd, name.as_bytes(), flags, mode)?))
    }

    /// Makes a directory. The process's umask applies to `mode`.
    pub(crate) fn make_dir(&self, name: &Name, mode: u32) -> io::Result<()> {
        let own_mode = Mode::from_raw_mode(self.own_mode(mode, true));
        rustix::fs::mkdirat(&self.fd, name.as_bytes(), own_mode)?;
        let done = self.made(Of::Child(self, name), || self.own_stat_at(name), mode);
        done.inspect_err(|_| {
            if let Err(e) = self.remove_dir(name) {
                tracing::warn!(?name, error = %e, "cannot remove a directory that could not be completed");
            }
        })
    }

    /// Makes a fifo, socket or device. The process's umask applies to `mode`.
    pub(crate) fn make_node(&self, name: &Name, node: Node, mode: u32) -> io::Result<()> {
        if let Some(xattr) = self.owners.xattr()
            && node != (Node::Char { major: 0, minor: 0 })
        {
            let file = self.create_itself(name, self.own_mode(mode, false))?;
            let of = Of::Fd(file.as_fd());
            let done =
                stat::fstat(&file).and_then(|own| xattr.made_special(of, own, self, node, mode));
            return self.or_unlink(name, done);
        }
        let (file_type, device) = match node {
            Node::Fifo => (rustix::fs::FileType::Fifo, 0),
            Node::Socket => (rustix::fs::FileType::Socket, 0),
            Node::Char { major, minor } => {
                (rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(major, minor))
            }
            Node::Block { major, minor } => {
                (rustix::fs::FileType::BlockDevice, rustix::fs::makedev(major, minor))
            }
        };
        let mode = Mode::from_raw_mode(mode);
        Ok(rustix::fs::mknodat(&self.fd, name.as_bytes(), file_type, mode, device)?)
    }

    /// Makes a symlink.
    pub(crate) fn symlink(&self, target: &[u8], name: &Name) -> io::Result<()> {
        rustix::fs::symlinkat(target, &self.fd, name.as_bytes())?;
        let Some(xattr) = self.owners.xattr() else { return Ok(()) };
        let done = xattr.group_handed_down(self).and_then(|group| match group {
            None => Ok(()),
            Some(gid) => self.chown_at(name, 0, gid),
        });
        self.or_unlink(name, done)
    }

    /// Makes `new` in `new_dir` another name of the file `old` here; a symlink is linked itself.
    pub(crate) fn hard_link(&self, old: &Name, new_dir: &Dir, new: &Name) -> io::Result<()> {
        let (old, new) = (old.as_bytes(), new.as_bytes());
        Ok(rustix::fs::linkat(&self.fd, old, &new_dir.fd, new, AtFlags::empty())?)
    }

    /// Where a symlink points.
    pub(crate) fn read_link(&self, name: &Name) -> io::Result<Vec<u8>> {
        match rustix::fs::readlinkat(&self.fd, name.as_bytes(), Vec::new()) {
            Err(Errno::INVAL) if self.owners.are_in_xattrs() => {
                if self.stat_at(name)?.file_type != FileType::Symlink {
                    return Err(Errno::INVAL.into());
                }
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&self.fd, name.as_bytes(), flags, Mode::empty())?;
                link_target(File::from(fd))
            }
            read => Ok(read?.into_bytes()),
        }
    }

    /// Removes a name that is not a directory's.
    pub(crate) fn unlink(&self, name: &Name) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name.as_bytes(), AtFlags::empty())?)
    }

    /// Removes an empty directory.
    pub(crate) fn remove_dir(&self, name: &Name) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name.as_bytes(), AtFlags::REMOVEDIR)?)
    }

    /// Renames, within one file system.
    pub(crate) fn rename(
        &self,
        old: &Name,
        new_dir: &Dir,
        new: &Name,
        existing: OnExisting,
    ) -> io::Result<()> {
        let flags = match existing {
            OnExisting::Replace => RenameFlags::empty(),
            OnExisting::Fail => RenameFlags::NOREPLACE,
        };
        let (old, new) = (old.as_bytes(), new.as_bytes());
        Ok(rustix::fs::renameat_with(&self.fd, old, &new_dir.fd, new, flags)?)
    }

    /// Exchanges two names, within one file system.
    pub(crate) fn exchange(&self, name: &Name, other_dir: &Dir, other: &Name) -> io::Result<()> {
        let (name, other) = (name.as_bytes(), other.as_bytes());
        let flags = RenameFlags::EXCHANGE;
        Ok(rustix::fs::renameat_with(&self.fd, name, &other_dir.fd, other, flags)?)
    }

    /// Its entries but `.` and `..`, in no order; none if it has been removed. Reads on a descriptor of
    /// its own, from the start.
    pub(crate) fn entries(&self) -> io::Result<Vec<DirEntry>> {
        self.reopen()?.entries_once()
    }

    /// The same, on this very descriptor and from where it stands: the start, if nobody has read from
    /// it yet.
    pub(crate) fn entries_once(&self) -> io::Result<Vec<DirEntry>> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 32 * 1024];
        let mut listing = RawDir::new(&self.fd, &mut buffer);
        let mut entries = Vec::new();
        while let Some(entry) = listing.next() {
            let entry = match entry {
                // What getdents(2) answers for a directory that was removed.
                Err(rustix::io::Errno::NOENT) => break,
                entry => entry?,
            };
            let bytes = entry.file_name().to_bytes();
            if bytes == b"." || bytes == b".." {
                continue;
            }
            let name =
                Name::new(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            let file_type = match (self.owners.are_in_xattrs(), entry.file_type().into()) {
                // It may stand for something else.
                (true, FileType::Regular) => FileType::Unknown,
                (_, file_type) => file_type,
            };
            entries.push(DirEntry { name, file_type });
        }
        Ok(entries)
    }

    /// Whether it has no entries.
    pub(crate) fn is_empty(&self) -> io::Result<bool> {
        Ok(self.entries()?.is_empty())
    }

    /// Sets the times of a child, symlinks themselves included.
    pub(crate) fn set_times_at(&self, name: &Name, atime: Time, mtime: Time) -> io::Result<()> {
        let times = timestamps(atime, mtime);
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::utimensat(&self.fd, name.as_bytes(), &times, flags)?)
    }

    /// Waits until the directory itself (its names) is on disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    /// Waits until the whole file system that holds it is on disk.
    pub(crate) fn sync_file_system(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.fd)?)
    }
}

fn timestamps(atime: Time, mtime: Time) -> Timestamps {
    let spec = |t: Time| Timespec { tv_sec: t.secs, tv_nsec: t.nanos.into() };
    Timestamps { last_access: spec(atime), last_modification: spec(mtime) }
}

/// Sets access and modification time through an open descriptor, which must not be an O_PATH one.
pub(crate) fn set_times(fd: impl AsFd, atime: Time, mtime: Time) -> io::Result<()> {
    Ok(rustix::fs::futimens(fd, &timestamps(atime, mtime))?)
}

/// The path by which other processes' tools see an open file, for messages and for calls that take
/// only paths.
pub(crate) fn proc_path(fd: impl AsFd, name: Option<&Name>) -> std::path::PathBuf {
    let mut path = std::path::PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
    if let Some(name) = name {
        path.push(OsStr::from_bytes(name.as_bytes()));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(s: &str) -> Name {
        Name::new(s).unwrap()
    }

    #[test]
    fn attributes_of_a_link_are_its_own() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("file"), "x").unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        dir.symlink(b"file", &name("link")).unwrap();
        let before = dir.stat_at(&name("file")).unwrap();
        let time = Time { secs: -5, nanos: 7 };
        dir.set_times_at(&name("link"), time, time).unwrap();
        assert!(dir.chmod_at(&name("link"), 0o777).is_err());
        assert_eq!(dir.stat_at(&name("link")).unwrap().mtime, time);
        assert_eq!(dir.stat_at(&name("file")).unwrap().mtime, before.mtime);
        assert_eq!(dir.stat_at(&name("file")).unwrap().mode, before.mode);
        dir.chmod_at(&name("file"), 0o4711).unwrap();
        assert_eq!(dir.stat_at(&name("file")).unwrap().mode, 0o4711);
    }

    #[test]
    fn a_fifo_or_link_is_not_opened_as_a_file() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        dir.make_node(&name("fifo"), Node::Fifo, 0o600).unwrap();
        dir.symlink(b"/etc/passwd", &name("link")).unwrap();
        assert!(dir.open_file(&name("fifo")).is_err());
        assert!(dir.open_file(&name("link")).is_err());
        assert!(dir.open_dir(&name("link")).is_err());
    }

    #[test]
    fn lists_again_from_the_start() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        for i in 0..1000 {
            dir.create_file(&name(&format!("f{i}")), 0o600).unwrap();
        }
        assert_eq!(dir.entries().unwrap().len(), 1000);
        assert_eq!(dir.entries().unwrap().len(), 1000);
    }

    #[test]
    fn a_removed_directory_has_no_entries() {
        let tmp = tempfile::tempdir().unwrap();
        let gone = tmp.path().join("gone");
        std::fs::create_dir(&gone).unwrap();
        let dir = Dir::open(&gone).unwrap();
        std::fs::remove_dir(&gone).unwrap();
        assert!(dir.is_empty().unwrap());
    }
}
