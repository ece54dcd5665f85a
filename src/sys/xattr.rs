//! Extended attributes, of open files and of children that must not be opened or followed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::dir::{Dir, proc_path};
use super::xattr_at as at;
use crate::path::Name;

/// Whose attributes: an open file's (a bare descriptor, O_PATH, will do), or a directory's child's, which
/// may be a link, fifo or device as well.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Of<'a> {
    Fd(BorrowedFd<'a>),
    Child(&'a Dir, &'a Name),
}

/// What setting one does where there is one of that name, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnPresence {
    Any,
    /// EEXIST if it is there.
    Create,
    /// ENODATA if it is not.
    Replace,
}

impl OnPresence {
    /// From the flags of setxattr(2).
    pub(crate) fn from_raw(flags: i32) -> Option<OnPresence> {
        match flags {
            0 => Some(OnPresence::Any),
            libc::XATTR_CREATE => Some(OnPresence::Create),
            libc::XATTR_REPLACE => Some(OnPresence::Replace),
            _ => None,
        }
    }
}

impl<'a> Of<'a> {
    pub(crate) fn dir(dir: &'a Dir) -> Self {
        Of::Fd(dir.as_fd())
    }
}

/// The value, or none where there is no such attribute or the file system knows none.
pub(crate) fn get(of: Of<'_>, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; 256];
    loop {
        let read = match of {
            Of::Fd(fd) => match rustix::fs::fgetxattr(fd, key, value.as_mut_slice()) {
                Err(Errno::BADF) => {
                    rustix::fs::getxattr(proc_path(fd, None), key, value.as_mut_slice())
                }
                read => read,
            },
            Of::Child(dir, name) => at::get(dir, name, key, &mut value),
        };
        match read {
            Ok(len) => {
                value.truncate(len);
                return Ok(Some(value));
            }
            Err(Errno::RANGE) => value.resize(value.len().saturating_mul(4).min(1 << 20), 0),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

/// The keys, sorted; none where the file system knows none.
pub(crate) fn list(of: Of<'_>) -> io::Result<Vec<Vec<u8>>> {
    let mut buffer = vec![0; 1024];
    loop {
        let read = match of {
            Of::Fd(fd) => match rustix::fs::flistxattr(fd, buffer.as_mut_slice()) {
                Err(Errno::BADF) => {
                    rustix::fs::listxattr(proc_path(fd, None), buffer.as_mut_slice())
                }
                read => read,
            },
            Of::Child(dir, name) => at::list(dir, name, &mut buffer),
        };
        match read {
            Ok(len) => {
                buffer.truncate(len);
                let mut keys: Vec<Vec<u8>> = buffer
                    .split(|b| *b == 0)
                    .filter(|k| !k.is_empty())
                    .map(<[u8]>::to_vec)
                    .collect();
                keys.sort_unstable();
                return Ok(keys);
            }
            Err(Errno::RANGE) => buffer.resize(buffer.len().saturating_mul(4).min(1 << 20), 0),
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Sets or replaces.
pub(crate) fn set(of: Of<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    set_if(of, key, value, OnPresence::Any)
}

/// Sets, on a condition.
pub(crate) fn set_if(of: Of<'_>, key: &[u8], value: &[u8], presence: OnPresence) -> io::Result<()> {
    let flags = match presence {
        OnPresence::Any => XattrFlags::empty(),
        OnPresence::Create => XattrFlags::CREATE,
        OnPresence::Replace => XattrFlags::REPLACE,
    };
    let set = match of {
        Of::Fd(fd) => match rustix::fs::fsetxattr(fd, key, value, flags) {
            Err(Errno::BADF) => rustix::fs::setxattr(proc_path(fd, None), key, value, flags),
            set => set,
        },
        Of::Child(dir, name) => at::set(dir, name, key, value, flags),
    };
    Ok(set?)
}

/// Removes; one that is not there is removed already.
pub(crate) fn remove(of: Of<'_>, key: &[u8]) -> io::Result<()> {
    match remove_existing(of, key) {
        Err(e) if e.raw_os_error() == Some(libc::ENODATA) => Ok(()),
        done => done,
    }
}

/// Removes; ENODATA for one that is not there.
pub(crate) fn remove_existing(of: Of<'_>, key: &[u8]) -> io::Result<()> {
    Ok(match of {
        Of::Fd(fd) => match rustix::fs::fremovexattr(fd, key) {
            Err(Errno::BADF) => rustix::fs::removexattr(proc_path(fd, None), key),
            removed => removed,
        },
        Of::Child(dir, name) => at::remove(dir, name, key),
    }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_reads_lists_and_removes() {
        sets_and_removes();
        at::tests::ABSENT.set(true);
        sets_and_removes();
        at::tests::ABSENT.set(false);
    }

    fn sets_and_removes() {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        let name = Name::new("f").unwrap();
        dir.create_file(&name, 0o600).unwrap();
        let child = Of::Child(&dir, &name);
        let long = vec![7; 2000];
        set(child, b"user.b", &long).unwrap();
        set(child, b"user.a", b"").unwrap();
        assert_eq!(get(child, b"user.b").unwrap(), Some(long));
        assert_eq!(get(child, b"user.a").unwrap(), Some(Vec::new()));
        assert_eq!(get(child, b"user.c").unwrap(), None);
        let keys = list(child).unwrap();
        assert!(keys.contains(&b"user.a".to_vec()) && keys.contains(&b"user.b".to_vec()));
        remove(child, b"user.a").unwrap();
        remove(child, b"user.a").unwrap();
        assert!(!list(child).unwrap().contains(&b"user.a".to_vec()));
    }
}
