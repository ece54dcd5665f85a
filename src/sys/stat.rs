//! Attributes of files, in one shape on every architecture.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType as RawType};

/// The type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FileType {
    Regular,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
    /// What the file system did not say (a listing without types).
    Unknown,
}

impl From<RawType> for FileType {
    fn from(t: RawType) -> Self {
        match t {
            RawType::RegularFile => FileType::Regular,
            RawType::Directory => FileType::Directory,
            RawType::Symlink => FileType::Symlink,
            RawType::CharacterDevice => FileType::CharDevice,
            RawType::BlockDevice => FileType::BlockDevice,
            RawType::Fifo => FileType::Fifo,
            RawType::Socket => FileType::Socket,
            RawType::Unknown => FileType::Unknown,
        }
    }
}

/// A point in time: seconds since 1970, which may be negative, and nanoseconds below 10^9.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Time {
    pub(crate) secs: i64,
    pub(crate) nanos: u32,
}

impl Time {
    /// What the clock says.
    pub(crate) fn now() -> Time {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        Time { secs: now.tv_sec, nanos: u32::try_from(now.tv_nsec).unwrap_or(0) }
    }
}

/// What `stat(2)` tells of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) file_type: FileType,
    /// Permission bits with setuid, setgid and sticky: `0o7777`.
    pub(crate) mode: u32,
    pub(crate) nlink: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Major and minor of the device that a device file stands for.
    pub(crate) rdev: (u32, u32),
    /// Bytes.
    pub(crate) size: u64,
    /// Units of 512 bytes.
    pub(crate) blocks: u64,
    /// Bytes, the best size for reading and writing.
    pub(crate) block_size: u32,
    pub(crate) atime: Time,
    pub(crate) mtime: Time,
    pub(crate) ctime: Time,
}

impl Stat {
    pub(crate) fn is_dir(&self) -> bool {
        self.file_type == FileType::Directory
    }

    pub(crate) fn is_file(&self) -> bool {
        self.file_type == FileType::Regular
    }

    /// Whether both are the same file.
    pub(crate) fn same_inode(&self, other: &Stat) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }
}

// The fields' types differ between architectures.
#[allow(clippy::unnecessary_cast, clippy::cast_lossless)]
impl From<rustix::fs::Stat> for Stat {
    fn from(s: rustix::fs::Stat) -> Self {
        let mode = s.st_mode as u32;
        let rdev = s.st_rdev as u64;
        let time = |secs: i64, nanos: u32| Time { secs, nanos };
        Stat {
            dev: s.st_dev as u64,
            ino: s.st_ino as u64,
            file_type: RawType::from_raw_mode(mode).into(),
            mode: mode & 0o7777,
            nlink: s.st_nlink as u64,
            uid: s.st_uid as u32,
            gid: s.st_gid as u32,
            rdev: (rustix::fs::major(rdev), rustix::fs::minor(rdev)),
            size: s.st_size as u64,
            blocks: s.st_blocks as u64,
            block_size: s.st_blksize as u32,
            atime: time(s.st_atime as i64, s.st_atime_nsec as u32),
            mtime: time(s.st_mtime as i64, s.st_mtime_nsec as u32),
            ctime: time(s.st_ctime as i64, s.st_ctime_nsec as u32),
        }
    }
}

/// `fstat(2)`.
pub(crate) fn fstat(fd: impl AsFd) -> io::Result<Stat> {
    Ok(rustix::fs::fstat(fd)?.into())
}

/// `fstatat(2)` that does not follow a final symlink.
pub(crate) fn stat_at(dir: impl AsFd, name: &[u8]) -> io::Result<Stat> {
    Ok(rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.into())
}
