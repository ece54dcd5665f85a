//! Mounts that show other ids than files have, and who may make files in them.
//!
//! The kernel takes the mapping from a user namespace, which must be there for that moment only. Nobody of
//! this process enters it: a child is born into it, is given its maps, and is killed. The child shares this
//! process's table of descriptors instead of having a copy, so that it keeps nothing open, and makes no call
//! but plain ones: other threads may hold any lock at its birth.
//!
//! Sources: mount_setattr(2), user_namespaces(7), clone(2), setfsuid(2), capabilities(7).

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use nix::sched::CloneFlags;
use nix::unistd::{setfsgid, setfsuid};
use rustix::mount::MountPropagationFlags;
use rustix::process::DumpableBehavior;
use rustix::thread::UnshareFlags;

/// The child calls one function of this file.
const STACK: usize = 64 * 1024;

/// A user namespace in which nobody is, with maps in the form of /proc/PID/uid_map; one that is empty gives
/// all ids as they are.
pub(crate) fn user_namespace(users: &str, groups: &str) -> io::Result<OwnedFd> {
    let child = Child::born_in_user_namespace()?;
    let of_child = |what: &str| format!("/proc/{}/{what}", child.0);
    for (map, text, own) in [
        ("uid_map", users, "/proc/thread-self/uid_map"),
        ("gid_map", groups, "/proc/thread-self/gid_map"),
    ] {
        let text = match text.is_empty() {
            true => as_they_are(&std::fs::read_to_string(own)?),
            false => text.to_owned(),
        };
        // The kernel takes a map by one write alone.
        OpenOptions::new().write(true).open(of_child(map))?.write_all(text.as_bytes())?;
    }
    Ok(File::open(of_child("ns/user"))?.into())
}

/// The map that changes none of the ids that the namespace with this map has.
fn as_they_are(own: &str) -> String {
    let lines = own.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (first, len) = (words.next()?, words.nth(1)?);
        Some(format!("{first} {first} {len}\n"))
    });
    lines.collect()
}

/// A process that does nothing, killed when this is dropped.
struct Child(libc::pid_t);

impl Child {
    fn born_in_user_namespace() -> io::Result<Child> {
        let mut stack = vec![0; STACK];
        let starter = rustix::process::getpid().as_raw_nonzero().get();
        // What is sent to the group of this process must not run the handlers of its other copy.
        let _blocked = Blocked::all()?;
        let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_FILES;
        // SAFETY: the child has a copy of all memory, its stack among it, and makes plain system calls alone.
        // It ends without a signal: whoever waits for any child does not see it.
        let child = unsafe {
            nix::sched::clone(Box::new(move || wait_for_death(starter)), &mut stack, flags, None)
        }?;
        Ok(Child(child.as_raw()))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: plain system calls. The pid is the child's until it is waited for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            while libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL) < 0
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
        }
    }
}

/// The life of the child. It ends with the thread that started it, if not before.
fn wait_for_death(starter: libc::pid_t) -> isize {
    // SAFETY: plain system calls, which touch no memory.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        while libc::syscall(libc::SYS_getppid) == libc::c_long::from(starter) {
            libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
        }
        libc::_exit(0)
    }
}

/// All signals are blocked in the calling thread while this is there.
struct Blocked(libc::sigset_t);

impl Blocked {
    fn all() -> io::Result<Blocked> {
        // SAFETY: the one set is made by the first call; the other is filled by the second.
        unsafe {
            let (mut all, mut old) = (MaybeUninit::uninit(), MaybeUninit::uninit());
            libc::sigfillset(all.as_mut_ptr());
            match libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr()) {
                0 => Ok(Blocked(old.assume_init())),
                number => Err(io::Error::from_raw_os_error(number)),
            }
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set is a live one of this thread's.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// Runs `work` in a thread of its own that makes files as this user and group, with all the rights of the
/// calling thread.
pub(crate) fn in_thread_as<T: Send>(
    owner: Option<(u32, u32)>,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("stratafs-mount".to_owned())
            .spawn_scoped(scope, || {
                if let Some((user, group)) = owner {
                    make_files_as(user, group)?;
                }
                Ok(work())
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

fn make_files_as(user: u32, group: u32) -> io::Result<()> {
    let rights = rustix::thread::capabilities(None)?;
    let dumpable = rustix::process::dumpable_behavior()?;
    // Unlike the other ids these are a thread's own. No call tells whether it did anything but the next.
    setfsgid(group.into());
    setfsuid(user.into());
    if (setfsuid(user.into()), setfsgid(group.into())) != (user.into(), group.into()) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // Who stops making files as root loses root's rights to files.
    rustix::thread::set_capabilities(None, rights)?;
    // The kernel forbids to look into a process of which a thread did so, as if it had become another user.
    if dumpable == DumpableBehavior::Dumpable {
        rustix::process::set_dumpable_behavior(dumpable)?;
    }
    Ok(())
}

/// Gives the calling thread a mount namespace of its own: what it mounts from now on is seen by nobody else,
/// and ends with it.
pub(crate) fn enter_own_mount_namespace() -> io::Result<()> {
    // SAFETY: the thread gets a copy of the namespace, and with it its own working directory, root and umask;
    // descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change("/", flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_that_changes_nothing_has_all_that_there_is() {
        assert_eq!(as_they_are("         0          0 4294967295\n"), "0 0 4294967295\n");
        assert_eq!(as_they_are("0 1000 1\n1 100000 65536\n"), "0 0 1\n1 1 65536\n");
    }
}
