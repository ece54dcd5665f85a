//! What a program does to become a server in the background. Never the library by itself: all of this is
//! the process's own.

use std::io;

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
