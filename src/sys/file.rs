//! Files and directories wherever they are reached from: by a name in an open directory, or by an open
//! descriptor alone, when they have no name any more.
//!
//! Nothing here follows a symlink or opens a device. A bare descriptor (O_PATH) is enough for all but
//! data, since calls that refuse such reach the file through `/proc/self/fd`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::dir::{Dir, link_target, proc_path};
use super::owners::Owners;
use super::stat::{self, FileType, Stat, Time};
use super::xattr::Of;
use crate::path::Name;

/// Where a file is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    /// A name in a directory.
    Child(&'a Dir, &'a Name),
    /// An open descriptor, bare or not, of a tree that keeps owners so.
    Open(BorrowedFd<'a>, Owners),
}

/// How data is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    ReadWrite,
}

impl Access {
    fn flags(self) -> OFlags {
        let access = match self {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC
    }
}

/// A time to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SetTime {
    Keep,
    Now,
    To(Time),
}

impl SetTime {
    fn spec(self) -> Timespec {
        match self {
            SetTime::Keep => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
            SetTime::Now => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
            SetTime::To(t) => Timespec { tv_sec: t.secs, tv_nsec: t.nanos.into() },
        }
    }
}

/// When the contents of an open file were last changed.
pub(crate) fn modified(file: &File) -> io::Result<Time> {
    Ok(stat::fstat(file)?.mtime)
}

/// Sets when the contents of an open file were last changed.
pub(crate) fn set_modified(file: &File, mtime: Time) -> io::Result<()> {
    let times = Timestamps {
        last_access: SetTime::Keep.spec(),
        last_modification: SetTime::To(mtime).spec(),
    };
    Ok(rustix::fs::futimens(file, &times)?)
}

impl<'a> Place<'a> {
    /// A directory itself.
    pub(crate) fn dir(dir: &'a Dir) -> Place<'a> {
        Place::Open(dir.as_fd(), dir.owners())
    }

    pub(crate) fn stat(self) -> io::Result<Stat> {
        match self {
            Place::Child(dir, name) => dir.stat_at(name),
            Place::Open(fd, owners) => {
                let own = stat::fstat(fd)?;
                owners.xattr().map_or(Ok(own), |xattr| xattr.shown(Of::Fd(fd), own))
            }
        }
    }

    /// For the calls of [`xattr`](super::xattr).
    pub(crate) fn xattrs(&self) -> Of<'_> {
        match self {
            Place::Child(dir, name) => Of::Child(dir, name),
            Place::Open(fd, _) => Of::Fd(*fd),
        }
    }

    /// Sets the mode of what is not a symlink.
    pub(crate) fn chmod(self, mode: u32) -> io::Result<()> {
        match self {
            Place::Child(dir, name) => dir.chmod_at(name, mode),
            Place::Open(fd, owners) => match owners.xattr() {
                Some(xattr) => xattr.chmod(Of::Fd(fd), stat::fstat(fd)?, mode),
                None => Ok(rustix::fs::chmod(proc_path(fd, None), Mode::from_raw_mode(mode))?),
            },
        }
    }

    /// Sets owner and group, or one of them. Clears setuid and setgid of files.
    pub(crate) fn chown(self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        match self {
            Place::Child(dir, name) => dir.change_owner_at(name, uid, gid),
            Place::Open(fd, owners) => match owners.xattr() {
                Some(xattr) => xattr.chown(Of::Fd(fd), stat::fstat(fd)?, uid, gid),
                None => {
                    let uid = uid.map(rustix::fs::Uid::from_raw);
                    let gid = gid.map(rustix::fs::Gid::from_raw);
                    Ok(rustix::fs::chownat(fd, "", uid, gid, AtFlags::EMPTY_PATH)?)
                }
            },
        }
    }

    /// Sets owner, group and mode of what is no symlink.
    pub(crate) fn assign(self, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
        let owners = match self {
            Place::Child(dir, _) => dir.owners(),
            Place::Open(_, owners) => owners,
        };
        let Some(xattr) = owners.xattr() else {
            return self.chown(Some(uid), Some(gid)).and_then(|()| self.chmod(mode));
        };
        let own = match self {
            Place::Child(dir, name) => dir.own_stat_at(name)?,
            Place::Open(fd, _) => stat::fstat(fd)?,
        };
        xattr.assign(self.xattrs(), own, (uid, gid, mode))
    }

    pub(crate) fn set_times(self, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        let times = Timestamps { last_access: atime.spec(), last_modification: mtime.spec() };
        match self {
            Place::Child(dir, name) => {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(dir, name.as_bytes(), &times, flags)?;
            }
            Place::Open(fd, _) => {
                rustix::fs::utimensat(CWD, proc_path(fd, None), &times, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    /// Where a symlink points.
    pub(crate) fn read_link(self) -> io::Result<Vec<u8>> {
        match self {
            Place::Child(dir, name) => dir.read_link(name),
            Place::Open(fd, owners) => match rustix::fs::readlinkat(fd, "", Vec::new()) {
                // Of what is no symlink the kernel says that there is none, since the path is empty.
                Err(Errno::INVAL | Errno::NOENT)
                    if owners.are_in_xattrs() && self.stat()?.file_type == FileType::Symlink =>
                {
                    link_target(self.try_open_data(Access::Read)?)
                }
                read => Ok(read?.into_bytes()),
            },
        }
    }

    /// Does what the owner may do whatever the mode, once more with all rights if the mode forbids it: an
    /// xattr of a file that is not writable is not to be set by an owner without privilege.
    pub(crate) fn despite_its_mode<R>(self, work: impl Fn() -> io::Result<R>) -> io::Result<R> {
        match work() {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                let mode = self.stat()?.mode;
                self.chmod(mode | 0o700)?;
                let done = work();
                // Unless somebody has changed it meanwhile.
                if self.stat().is_ok_and(|stat| stat.mode == mode | 0o700) {
                    self.chmod(mode)?;
                }
                done
            }
            done => done,
        }
    }

    /// Opens a regular file's data. One that its owner has closed to himself is opened all the same, if
    /// this process may change its mode for a moment.
    pub(crate) fn open_data(self, access: Access) -> io::Result<File> {
        match self.try_open_data(access) {
            Err(Errno::ACCESS) => {
                let mode = self.stat()?.mode;
                self.chmod(mode | 0o600)?;
                let opened = self.try_open_data(access);
                self.chmod(mode)?;
                Ok(opened?)
            }
            opened => Ok(opened?),
        }
    }

    fn try_open_data(self, access: Access) -> Result<File, Errno> {
        let flags = access.flags();
        let fd = match self {
            Place::Child(dir, name) => {
                let flags = flags | OFlags::NOFOLLOW;
                rustix::fs::openat(dir, name.as_bytes(), flags, Mode::empty())?
            }
            Place::Open(fd, _) => rustix::fs::open(proc_path(fd, None), flags, Mode::empty())?,
        };
        Ok(File::from(fd))
    }

    /// A bare descriptor, which keeps the file when its names go.
    pub(crate) fn pin(self) -> io::Result<OwnedFd> {
        match self {
            Place::Child(dir, name) => {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                Ok(rustix::fs::openat(dir, name.as_bytes(), flags, Mode::empty())?)
            }
            Place::Open(fd, _) => fd.try_clone_to_owned(),
        }
    }

    /// Gives the file another name, in a directory on the same mount.
    pub(crate) fn link(self, new_dir: &Dir, new: &Name) -> io::Result<()> {
        match self {
            Place::Child(dir, name) => dir.hard_link(name, new_dir, new),
            Place::Open(fd, _) => {
                let (old, flags) = (proc_path(fd, None), AtFlags::SYMLINK_FOLLOW);
                Ok(rustix::fs::linkat(CWD, old, new_dir, new.as_bytes(), flags)?)
            }
        }
    }
}

/// Moves a directory that is `name` in `dir` by `work`: to another directory only who may write to it can
/// move it, since its `..` changes, so an owner without privilege gives himself that right for the moment.
pub(crate) fn moving<R>(dir: &Dir, name: &Name, work: impl Fn() -> io::Result<R>) -> io::Result<R> {
    match work() {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            let moved = Place::Child(dir, name).pin()?;
            Place::Open(moved.as_fd(), dir.owners()).despite_its_mode(work)
        }
        done => done,
    }
}

/// Renames and leaves a whiteout, the character device 0:0, at the old name.
pub(crate) fn rename_leaving_whiteout(
    dir: &Dir,
    old: &Name,
    new_dir: &Dir,
    new: &Name,
) -> io::Result<()> {
    let (old, new) = (old.as_bytes(), new.as_bytes());
    Ok(rustix::fs::renameat_with(dir, old, new_dir, new, RenameFlags::WHITEOUT)?)
}

/// fallocate(2), with its mode as a number.
pub(crate) fn allocate(file: &File, mode: u32, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
    Ok(rustix::fs::fallocate(file, mode, offset, len)?)
}

/// Makes a hole of so many bytes from `offset` on; the file stays as long as it is.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, mode, offset, len)?)
}

/// copy_file_range(2); how many bytes were copied.
pub(crate) fn copy_range(
    from: &File,
    from_offset: u64,
    to: &File,
    to_offset: u64,
    len: usize,
) -> io::Result<usize> {
    let (mut read_at, mut write_at) = (from_offset, to_offset);
    Ok(rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), len)?)
}

/// What lseek(2) looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seek {
    Data,
    Hole,
}

impl Seek {
    /// From the number in a request; none for those that need no file system.
    pub(crate) fn from_raw(whence: i32) -> Option<Seek> {
        match whence {
            libc::SEEK_DATA => Some(Seek::Data),
            libc::SEEK_HOLE => Some(Seek::Hole),
            _ => None,
        }
    }
}

/// The next data or hole from `offset` on.
pub(crate) fn seek(file: &File, what: Seek, offset: u64) -> io::Result<u64> {
    let from = match what {
        Seek::Data => rustix::fs::SeekFrom::Data(offset),
        Seek::Hole => rustix::fs::SeekFrom::Hole(offset),
    };
    Ok(rustix::fs::seek(file, from)?)
}

/// What statfs(2) tells of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileSystemStat {
    /// In units of `fragment_size`.
    pub(crate) blocks: u64,
    pub(crate) blocks_free: u64,
    pub(crate) blocks_available: u64,
    pub(crate) files: u64,
    pub(crate) files_free: u64,
    /// Bytes.
    pub(crate) block_size: u64,
    /// Bytes.
    pub(crate) name_max: u64,
    /// Bytes.
    pub(crate) fragment_size: u64,
    /// What tells it from others, across reboots on most file systems.
    pub(crate) id: u64,
}

pub(crate) fn file_system_stat(fd: impl AsFd) -> io::Result<FileSystemStat> {
    let s = rustix::fs::fstatvfs(fd)?;
    Ok(FileSystemStat {
        blocks: s.f_blocks,
        blocks_free: s.f_bfree,
        blocks_available: s.f_bavail,
        files: s.f_files,
        files_free: s.f_ffree,
        block_size: s.f_bsize,
        name_max: s.f_namemax,
        fragment_size: s.f_frsize,
        id: s.f_fsid,
    })
}

/// How many descriptors this process may have open.
pub(crate) fn descriptor_limit() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// As many descriptors as this process may have: the tests beside one another in it need many.
#[cfg(test)]
pub(crate) fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
}
