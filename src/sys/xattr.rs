//! Extended attributes, of open files and of children that must not be opened or followed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::dir::{Dir, proc_path};
use crate::path::Name;

/// Whose attributes: an open file's, or a child's (the child of a directory is reached through
/// `/proc/self/fd`, its own name not followed, so that links, fifos and devices work).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Of<'a> {
    Fd(BorrowedFd<'a>),
    Child(&'a Dir, &'a Name),
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
            Of::Fd(fd) => rustix::fs::fgetxattr(fd, key, value.as_mut_slice()),
            Of::Child(dir, name) => {
                rustix::fs::lgetxattr(proc_path(dir, Some(name)), key, value.as_mut_slice())
            }
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
            Of::Fd(fd) => rustix::fs::flistxattr(fd, buffer.as_mut_slice()),
            Of::Child(dir, name) => {
                rustix::fs::llistxattr(proc_path(dir, Some(name)), buffer.as_mut_slice())
            }
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
    let flags = XattrFlags::empty();
    let set = match of {
        Of::Fd(fd) => rustix::fs::fsetxattr(fd, key, value, flags),
        Of::Child(dir, name) => {
            rustix::fs::lsetxattr(proc_path(dir, Some(name)), key, value, flags)
        }
    };
    Ok(set?)
}

/// Removes; one that is not there is removed already.
pub(crate) fn remove(of: Of<'_>, key: &[u8]) -> io::Result<()> {
    let removed = match of {
        Of::Fd(fd) => rustix::fs::fremovexattr(fd, key),
        Of::Child(dir, name) => rustix::fs::lremovexattr(proc_path(dir, Some(name)), key),
    };
    match removed {
        Err(Errno::NODATA) => Ok(()),
        done => Ok(done?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_reads_lists_and_removes() {
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
