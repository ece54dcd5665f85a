//! Advisory locks (`flock(2)`): they belong to the open file, and go with the last descriptor of it,
//! when the process dies too.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// Who else may hold the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    Shared,
    Exclusive,
}

/// A held lock; dropping it releases.
#[derive(Debug)]
pub(crate) struct Flock {
    fd: OwnedFd,
}

impl AsFd for Flock {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Takes the lock if nobody holds it in a way that excludes it; else gives the descriptor back.
pub(crate) fn try_lock(fd: OwnedFd, sharing: Sharing) -> io::Result<Result<Flock, OwnedFd>> {
    let operation = match sharing {
        Sharing::Shared => FlockOperation::NonBlockingLockShared,
        Sharing::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::fs::flock(&fd, operation) {
        Ok(()) => Ok(Ok(Flock { fd })),
        Err(Errno::WOULDBLOCK) => Ok(Err(fd)),
        Err(e) => Err(e.into()),
    }
}

/// Waits for the lock.
pub(crate) fn lock(fd: OwnedFd, sharing: Sharing) -> io::Result<Flock> {
    let operation = match sharing {
        Sharing::Shared => FlockOperation::LockShared,
        Sharing::Exclusive => FlockOperation::LockExclusive,
    };
    loop {
        match rustix::fs::flock(&fd, operation) {
            Ok(()) => return Ok(Flock { fd }),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exclusive_lock_excludes_and_ends_with_its_guard() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OwnedFd::from(file.reopen().unwrap());
        let held = try_lock(open(), Sharing::Exclusive).unwrap().unwrap();
        assert!(try_lock(open(), Sharing::Shared).unwrap().is_err());
        drop(held);
        let first = try_lock(open(), Sharing::Shared).unwrap().unwrap();
        let second = lock(open(), Sharing::Shared).unwrap();
        assert!(try_lock(open(), Sharing::Exclusive).unwrap().is_err());
        drop((first, second));
        assert!(try_lock(open(), Sharing::Exclusive).unwrap().is_ok());
    }
}
