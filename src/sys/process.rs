//! Processes: a question to another one by a signal, and who else is in this one's mount namespace.
//!
//! Sources: proc(5), pidfd_open(2), ioctl_ns(2), ptrace(2) ("Ptrace access mode checking").

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::process::{Pid, PidfdFlags, Signal};

use super::{stat, userns};

/// Sends SIGUSR1 to a process, if it takes that signal (it would end any other), and if it is still the one that is
/// meant once it cannot become another any more. Whether it was sent.
pub(crate) fn ask_by_signal(
    pid: u32,
    is_still_meant: impl FnOnce() -> io::Result<bool>,
) -> io::Result<bool> {
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(false) };
    let process = match rustix::process::pidfd_open(number, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        opened => opened?,
    };
    let status = match fs::read_to_string(format!("/proc/{pid}/status")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        status => status?,
    };
    if !takes(&status, libc::SIGUSR1) || !is_still_meant()? {
        return Ok(false);
    }
    match rustix::process::pidfd_send_signal(process, Signal::USR1) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Whether a process has a handler for a signal, or waits for it, by its `/proc/PID/status`.
fn takes(status: &str, signal: i32) -> bool {
    let Some(bit) = u32::try_from(signal).ok().and_then(|signal| signal.checked_sub(1)) else {
        return false;
    };
    ["SigCgt:", "SigBlk:"].into_iter().any(|set| {
        let mask = status.lines().find_map(|line| line.strip_prefix(set));
        let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        mask.is_some_and(|mask| mask >> bit & 1 == 1)
    })
}

/// Whether no other process is in the mount namespace of this one, so that nobody else sees what is mounted there.
/// What cannot be found out counts as somebody.
pub(crate) fn is_alone_with_its_mounts() -> io::Result<bool> {
    let namespace = fs::metadata("/proc/self/ns/mnt")?.ino();
    // Who is in a namespace that belongs to this user namespace can be looked at from there.
    let sees_all = userns::may_administer()? && owns(&File::open("/proc/self/ns/mnt")?)?;
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid == std::process::id() {
            continue;
        }
        match fs::metadata(entry.path().join("ns/mnt")) {
            Ok(meta) if meta.ino() == namespace => return Ok(false),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied && sees_all => {}
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Ok(false),
            // It has ended meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// Whether a namespace belongs to this process's user namespace.
fn owns(namespace: &File) -> io::Result<bool> {
    /// Of `linux/nsfs.h`.
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: no pointer is passed.
    let owner = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) };
    if owner < 0 {
        let e = io::Error::last_os_error();
        // One above this.
        return if e.raw_os_error() == Some(libc::EPERM) { Ok(false) } else { Err(e) };
    }
    // SAFETY: it is new and nobody else's.
    let owner = unsafe { OwnedFd::from_raw_fd(owner) };
    Ok(stat::fstat(&owner)?.ino == fs::metadata("/proc/self/ns/user")?.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_alone_says_so() {
        // Whoever has started the tests is here, too.
        assert!(!is_alone_with_its_mounts().unwrap());
    }

    #[test]
    fn who_does_not_take_the_signal_is_not_ended_by_it() {
        // It would end these tests.
        assert!(!ask_by_signal(std::process::id(), || Ok(true)).unwrap());
        assert!(!ask_by_signal(u32::MAX, || Ok(true)).unwrap());
        let status = "Name:\tx\nSigIgn:\t0000000000000000\nSigCgt:\t0000000000000200\n";
        assert!(takes(status, libc::SIGUSR1) && !takes(status, libc::SIGUSR2));
        assert!(takes("SigBlk:\t0000000000000200\nSigCgt:\t0000000000000000\n", libc::SIGUSR1));
        assert!(!takes("", libc::SIGUSR1));
    }
}
