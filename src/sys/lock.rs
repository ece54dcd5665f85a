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

/// A held lock; dropping it releases, at once: a child that another thread is just starting has copies
/// of all descriptors until it executes, and they would keep the lock. Dropped in a child after fork it
/// does nothing, since the lock is the parent's.
#[derive(Debug)]
pub(crate) struct Flock {
    fd: OwnedFd,
    process: u32,
}

impl Flock {
    fn of(fd: OwnedFd) -> Flock {
        Flock { fd, process: std::process::id() }
    }
}

impl Flock {
    /// Lets another process have it, which has the descriptor: then it is released by that one's end.
    pub(crate) fn hand_over(mut self) {
        // No process has this id, and so nobody unlocks.
        self.process = 0;
    }
}

impl Drop for Flock {
    fn drop(&mut self) {
        if self.process == std::process::id()
            && let Err(e) = rustix::fs::flock(&self.fd, FlockOperation::Unlock)
        {
            tracing::warn!(error = %e, "a lock is released when its descriptor is closed, not before");
        }
    }
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
        Ok(()) => Ok(Ok(Flock::of(fd))),
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
            Ok(()) => return Ok(Flock::of(fd)),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Sets the mode of the file of a lock, by which its holder can say something without any room on the disk.
pub(crate) fn set_mode(lock: impl AsFd, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::fchmod(lock, rustix::fs::Mode::from_raw_mode(mode))?)
}

/// The process that holds an exclusive lock of a file, by its number here; none if that is in another process
/// namespace, or nobody does. On file systems of which stat(2) does not tell the kernel's device number, nobody is
/// found.
pub(crate) fn holder(file: impl AsFd) -> io::Result<Option<u32>> {
    let stat = rustix::fs::fstat(file)?;
    let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let locks = std::fs::read_to_string("/proc/locks")?;
    Ok(locks.lines().find_map(|line| exclusive_holder(line, device, stat.st_ino)))
}

/// As a line of `/proc/locks` has it: `1: FLOCK ADVISORY WRITE 4242 fe:00:1234 0 EOF` (proc(5)).
fn exclusive_holder(line: &str, device: (u32, u32), inode: u64) -> Option<u32> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, "FLOCK", _, "WRITE", pid, place, ..] = *words else { return None };
    let mut place = place.split(':');
    let (major, minor) = (place.next()?, place.next()?);
    let number = |hexadecimal| u32::from_str_radix(hexadecimal, 16).ok();
    let here = (number(major)?, number(minor)?) == device;
    (here && place.next()?.parse() == Ok(inode)).then(|| pid.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_found() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        assert_eq!(holder(file.as_file()).unwrap(), None);
        let held = try_lock(file.reopen().unwrap().into(), Sharing::Exclusive).unwrap().unwrap();
        assert_eq!(holder(file.as_file()).unwrap(), Some(std::process::id()));
        drop(held);
        assert_eq!(holder(file.as_file()).unwrap(), None);
        let line = "12: FLOCK  ADVISORY  WRITE 4242 fe:0a:1234 0 EOF";
        assert_eq!(exclusive_holder(line, (0xfe, 0x0a), 1234), Some(4242));
        assert_eq!(exclusive_holder(line, (0xfe, 0x0a), 1235), None);
        // One who waits.
        assert_eq!(exclusive_holder(&line.replace("FLOCK", "-> FLOCK"), (0xfe, 0x0a), 1234), None);
        assert_eq!(exclusive_holder(&line.replace("WRITE", "READ"), (0xfe, 0x0a), 1234), None);
    }

    #[test]
    fn a_released_lock_is_free_though_a_descriptor_was_copied_by_a_fork() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OwnedFd::from(file.reopen().unwrap());
        let held = try_lock(open(), Sharing::Exclusive).unwrap().unwrap();
        // As fork copies it: the same open file.
        let copied = held.as_fd().try_clone_to_owned().unwrap();
        drop(held);
        assert!(try_lock(open(), Sharing::Exclusive).unwrap().is_ok());
        drop(copied);
    }

    #[test]
    fn a_lock_that_was_handed_over_ends_with_the_other_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OwnedFd::from(file.reopen().unwrap());
        let held = try_lock(open(), Sharing::Exclusive).unwrap().unwrap();
        let other = held.as_fd().try_clone_to_owned().unwrap();
        held.hand_over();
        assert!(try_lock(open(), Sharing::Shared).unwrap().is_err());
        drop(other);
        assert!(try_lock(open(), Sharing::Exclusive).unwrap().is_ok());
    }

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
