//! Namespaces, for processes of this crate's own that begin so: helpers, which have one thread. The one
//! exception is [`children_in_new_pid_namespace`], for a thread that only starts one child and waits.
//!
//! Sources: unshare(2), user_namespaces(7), pid_namespaces(7), mount_namespaces(7), pivot_root(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::thread::{Gid, Uid, UnshareFlags};

/// A new user namespace for this process, which must have one thread.
pub(crate) fn enter_user() -> io::Result<()> {
    unshare(UnshareFlags::NEWUSER)
}

/// A new mount namespace for this process.
pub(crate) fn enter_mount() -> io::Result<()> {
    unshare(UnshareFlags::NEWNS)
}

/// New namespaces of a container but for that of its pids, in which it was born.
pub(crate) fn enter_container() -> io::Result<()> {
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)
}

/// The next child of the calling thread is the first process of a new pid namespace. The thread can start
/// no more threads; nothing changes for the others.
pub(crate) fn children_in_new_pid_namespace() -> io::Result<()> {
    unshare(UnshareFlags::NEWPID)
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: none of the flags takes descriptors apart, of which others could not know.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Makes this process the root of its user namespace, in which the caller's ids have become 0 if they are
/// mapped to that.
pub(crate) fn become_root() -> io::Result<()> {
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    Ok(rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?)
}

/// The effective user and group.
pub(crate) fn ids() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// The name of a user, as the system's databases have it.
pub(crate) fn user_name(uid: u32) -> io::Result<Option<String>> {
    Ok(nix::unistd::User::from_uid(uid.into())?.map(|user| user.name))
}

/// What a mount is passed on to and receives, for all mounts below `/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Propagation {
    /// Receives what its origin gets, and passes nothing on.
    Slave,
    Private,
}

pub(crate) fn set_propagation(of_all: Propagation) -> io::Result<()> {
    let flags = match of_all {
        Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
        Propagation::Private => MountPropagationFlags::PRIVATE,
    };
    Ok(rustix::mount::mount_change("/", flags | MountPropagationFlags::REC)?)
}

/// Makes the root of a mount the root of this mount namespace and process, and takes the old one away.
/// Nothing by path leads back.
pub(crate) fn change_root(root: impl AsFd) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    // The old root comes to lie on the new one.
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

/// Leaves the keys of whoever started this process: keyctl(2), session-keyring(7). Where the kernel has none,
/// or forbids it, there is nothing to leave.
pub(crate) fn leave_keys() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a plain system call; no name is given.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0) };
}

pub(crate) fn set_host_name(name: &[u8]) -> io::Result<()> {
    Ok(rustix::system::sethostname(name)?)
}

/// Makes a copy of this process, which must have one thread: none in the copy, else its pid.
pub(crate) fn fork() -> io::Result<Option<u32>> {
    // SAFETY: of a process with one thread, the copy is whole.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => Ok(None),
        nix::unistd::ForkResult::Parent { child } => Ok(Some(child.as_raw().unsigned_abs())),
    }
}

/// The process that started this one; 0 if that is outside of this pid namespace.
pub(crate) fn parent() -> u32 {
    rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs())
}

/// Ends this process now: nothing that was copied by a fork is flushed or dropped.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: never returns, and touches no memory.
    unsafe { libc::_exit(code) }
}

/// Waits for the end of a child.
pub(crate) fn wait_for(child: u32) -> io::Result<()> {
    let pid = i32::try_from(child).ok().and_then(Pid::from_raw);
    loop {
        match rustix::process::waitpid(pid, WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            done => return Ok(done.map(drop)?),
        }
    }
}

/// Has the kernel kill this process when the thread that started it ends.
pub(crate) fn die_with_starter() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// All descriptors but the first three will be closed by exec.
pub(crate) fn close_others_on_exec() -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: a plain system call, which closes nothing now.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 as libc::c_uint,
            libc::c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes all descriptors but the first three and `number`, and gives that one.
///
/// To be called first in `main`, while this process has no descriptors but those it was started with.
pub(crate) fn keep_only(number: i32) -> io::Result<OwnedFd> {
    let Ok(kept @ 3..) = libc::c_uint::try_from(number) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: a plain system call. Nothing in this process has opened a descriptor yet.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above, so that nobody owns those that are closed.
    unsafe {
        if kept > 3 {
            libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, kept - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, kept + 1, libc::c_uint::MAX, 0);
    }
    // SAFETY: it is open, and handed to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Lets a command that will be started inherit a descriptor, under the same number.
pub(crate) fn inherit(command: &mut std::process::Command, fd: BorrowedFd<'_>) {
    use std::os::unix::process::CommandExt as _;
    let number = fd.as_raw_fd();
    // SAFETY: between fork and exec one system call is made, and nothing is allocated.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
}
