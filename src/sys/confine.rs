//! What a container's command is left of rights, and its start: for a copy of a process with one thread, in
//! which nothing is allocated any more.
//!
//! Sources: capabilities(7), no_new_privs(2const), credentials(7), execve(2), seccomp(2).

use std::ffi::{CStr, CString};
use std::io;

use rustix::process::Signal;
use rustix::thread::{CapabilitySet, CapabilitySets, Gid, Uid};

/// As Docker and podman leave them to the root of a container.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// What a command is to be, made up before the copy.
#[derive(Debug)]
pub(crate) struct Start {
    /// The files to try, in turn.
    pub(crate) programs: Vec<CString>,
    pub(crate) arguments: Vec<CString>,
    pub(crate) environment: Vec<CString>,
    pub(crate) directory: CString,
    pub(crate) user: u32,
    pub(crate) group: u32,
    /// None if they cannot be set in this user namespace.
    pub(crate) groups: Option<Vec<u32>>,
}

/// At what a start failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Rights = 1,
    User,
    Directory,
    Filter,
    Program,
}

impl Step {
    pub(crate) fn from_number(number: u8) -> Option<Step> {
        [Step::Rights, Step::User, Step::Directory, Step::Filter, Step::Program]
            .into_iter()
            .find(|step| *step as u8 == number)
    }
}

/// Pointers to strings, with a null at the end, as execve(2) takes them.
#[derive(Debug)]
pub(crate) struct Pointers<'a> {
    pointers: Vec<*const libc::c_char>,
    _of: std::marker::PhantomData<&'a CStr>,
}

impl<'a> Pointers<'a> {
    pub(crate) fn to(strings: &'a [CString]) -> Pointers<'a> {
        let pointers = strings.iter().map(|string| string.as_ptr());
        Pointers {
            pointers: pointers.chain([std::ptr::null()]).collect(),
            _of: std::marker::PhantomData,
        }
    }
}

/// Becomes the command. Comes back only if that failed.
pub(crate) fn become_command(
    start: &Start,
    arguments: &Pointers<'_>,
    environment: &Pointers<'_>,
) -> (Step, io::Error) {
    if let Err(e) = limit_rights() {
        return (Step::Rights, e);
    }
    // Before the user is another, who may enter less: as Docker does.
    if let Err(e) = rustix::process::chdir(start.directory.as_c_str()) {
        return (Step::Directory, e.into());
    }
    if let Err(e) = become_user(start) {
        return (Step::User, e);
    }
    if let Err(e) = super::seccomp::keep_off_terminals() {
        return (Step::Filter, e);
    }
    if let Err(e) = take_default_signals() {
        return (Step::Rights, e);
    }
    let mut refused = io::Error::from_raw_os_error(libc::ENOENT);
    for program in &start.programs {
        // SAFETY: all are NUL-terminated strings that live, and both lists end in a null.
        unsafe {
            libc::execve(
                program.as_ptr(),
                arguments.pointers.as_ptr(),
                environment.pointers.as_ptr(),
            )
        };
        let e = io::Error::last_os_error();
        // Another may be in a further directory; that one may not be entered, or run, is told if none is.
        match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => {}
            Some(libc::EACCES) => refused = e,
            _ => return (Step::Program, e),
        }
    }
    (Step::Program, refused)
}

/// Nothing that the command starts gets more than what is kept.
fn limit_rights() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let has = rustix::thread::capabilities(None)?;
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if KEPT.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel knows no more.
            Err(rustix::io::Errno::INVAL) => break,
            done => done?,
        }
    }
    let kept = has.permitted & KEPT;
    let sets =
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

fn become_user(start: &Start) -> io::Result<()> {
    if let Some(groups) = &start.groups {
        // SAFETY: the pointer and the length are of a live slice of the kernel's type.
        let done = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let (user, group) = (Uid::from_raw(start.user), Gid::from_raw(start.group));
    rustix::thread::set_thread_res_gid(group, group, group)?;
    Ok(rustix::thread::set_thread_res_uid(user, user, user)?)
}

/// As every program may expect: no signal blocked, and SIGPIPE, which this language's programs ignore, as
/// by default.
fn take_default_signals() -> io::Result<()> {
    // SAFETY: plain system calls on a set that is made by the first.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        if libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) != 0
            || libc::signal(Signal::PIPE.as_raw(), libc::SIG_DFL) == libc::SIG_ERR
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
