//! What a program does to become a server in the background. Never the library by itself: all of this is
//! the process's own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// Takes leave of whoever started this process: its session and terminal, its working directory, and
/// its standard input, output and error output, which become /dev/null.
pub(crate) fn leave() -> io::Result<()> {
    match rustix::process::setsid() {
        // It leads a session already.
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    rustix::process::chdir("/")?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let null = rustix::fs::open("/dev/null", flags, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// Takes standard input for its own, and [leaves](leave). All descriptors that the starter has let through
/// are closed.
///
/// To be called first in `main`, while this process has no descriptors but those it was started with.
pub(crate) fn leave_with_input() -> io::Result<OwnedFd> {
    // SAFETY: a plain system call. Nothing in this process has opened a descriptor yet, so that nobody
    // owns those that are closed.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    leave()?;
    Ok(input)
}
