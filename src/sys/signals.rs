//! Signals: as the first process of a pid namespace takes them, and as a program passes them on.
//!
//! Who types Ctrl-C at a terminal interrupts all processes of the group in front, a container's command
//! among them: then the signal is the kernel's, and is not passed on once more. One that a process sent
//! (kill(2)) is meant for the command.
//!
//! Sources: sigwaitinfo(2), sigaction(2), signal-safety(7), pid_namespaces(7).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};

/// What a program passes on: all that are sent to end, or to tell something to, a program.
pub(crate) const PASSED_ON: [i32; 8] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGWINCH,
];

/// Blocks all signals: they wait for [`next`].
pub(crate) fn block_all() -> io::Result<()> {
    // SAFETY: the set is made by the first call, and read by the second.
    let done = unsafe {
        let mut all = MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Blocks SIGUSR1 in this thread and those that it starts: it waits for [`be_asked`].
pub(crate) fn block_questions() -> io::Result<()> {
    // SAFETY: the set is made by the first two calls, and read by the third.
    let done = unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(done)) }
}

/// Waits for SIGUSR1.
pub(crate) fn be_asked() -> io::Result<()> {
    // SAFETY: the set is made by the first two calls, and read by the third, which fills the number.
    let done = unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGUSR1);
        let mut signal = 0;
        libc::sigwait(set.as_ptr(), &raw mut signal)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(done)) }
}

/// Waits for a signal: which it is, and whether a process sent it.
pub(crate) fn next() -> io::Result<(i32, bool)> {
    loop {
        // SAFETY: the set is made by the first call; `info` is filled by the second if it does not fail.
        let (signal, code) = unsafe {
            let mut all = MaybeUninit::uninit();
            libc::sigfillset(all.as_mut_ptr());
            let mut info: MaybeUninit<libc::siginfo_t> = MaybeUninit::zeroed();
            let signal = libc::sigwaitinfo(all.as_ptr(), info.as_mut_ptr());
            (signal, info.assume_init().si_code)
        };
        match signal {
            1.. => return Ok((signal, code <= 0)),
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

/// A child that has ended, and its code: 128 and the signal if that ended it. None if no other has; an error
/// if there is no child.
pub(crate) fn reap(wait: bool) -> io::Result<Option<(u32, i32)>> {
    let options = if wait { WaitOptions::empty() } else { WaitOptions::NOHANG };
    loop {
        match rustix::process::wait(options) {
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(None) => return Ok(None),
            Ok(Some((pid, status))) => {
                let signal = status.terminating_signal().map(|signal| 128 + signal);
                let Some(code) = status.exit_status().or(signal) else { continue };
                return Ok(Some((pid.as_raw_nonzero().get().unsigned_abs(), code)));
            }
        }
    }
}

/// Sends a signal to a process.
pub(crate) fn send(pid: u32, signal: i32) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a plain system call.
    if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Kills all other processes of this pid namespace, for its first process alone.
pub(crate) fn kill_all_others() -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: a plain system call.
    let done = unsafe { libc::kill(-1, libc::SIGKILL) };
    match io::Error::last_os_error() {
        _ if done == 0 => Ok(()),
        e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        e => Err(e),
    }
}

/// A process, whatever becomes of its number.
pub(crate) fn open_process(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Sends a signal to an open process.
pub(crate) fn send_to(process: &OwnedFd, signal: i32) -> io::Result<()> {
    let signal = Signal::from_named_raw(signal).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_send_signal(process, signal)?)
}

/// Where the handler writes the numbers of the signals that came; -1 for nowhere.
static PIPE: AtomicI32 = AtomicI32::new(-1);

/// Signals that are taken over. Dropped, whoever had them before has them again.
#[derive(Debug)]
pub(crate) struct Taken {
    before: Vec<(i32, libc::sigaction)>,
    _pipe: OwnedFd,
}

/// Takes [`PASSED_ON`] over, but for those that are ignored: those that processes send can be read, a byte
/// each, from the other end, which ends when this is dropped. For programs, and only once at a time.
pub(crate) fn take_over() -> io::Result<(Taken, io::PipeReader)> {
    let (reader, writer) = io::pipe()?;
    let writer = OwnedFd::from(writer);
    rustix::io::ioctl_fionbio(&writer, true)?;
    if PIPE.compare_exchange(-1, writer.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst).is_err() {
        return Err(io::Error::other("signals are taken over already"));
    }
    let mut taken = Taken { before: Vec::new(), _pipe: writer };
    for signal in PASSED_ON {
        // SAFETY: the structures are live, and zeroed but for what is set; the handler does only what
        // signal-safety(7) allows.
        let before = unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            let mut action: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, std::ptr::null(), &mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            if before.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigfillset(&mut action.sa_mask);
            if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            before
        };
        taken.before.push((signal, before));
    }
    Ok((taken, reader))
}

extern "C" fn handle(signal: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: the kernel gives a live structure to handlers with SA_SIGINFO; errno is this thread's own.
    unsafe {
        if info.as_ref().is_some_and(|info| info.si_code <= 0) {
            let errno = libc::__errno_location();
            let before = *errno;
            let byte = signal as u8;
            libc::write(PIPE.load(Ordering::SeqCst), std::ptr::from_ref(&byte).cast(), 1);
            *errno = before;
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        for (signal, before) in &self.before {
            // SAFETY: the structure is what the kernel gave.
            unsafe { libc::sigaction(*signal, before, std::ptr::null_mut()) };
        }
        PIPE.store(-1, Ordering::SeqCst);
    }
}

/// A terminal in whose foreground this process's group was, to be put there again.
#[derive(Debug)]
pub(crate) struct Foreground(OwnedFd);

impl Foreground {
    /// None without such a terminal.
    pub(crate) fn now() -> Option<Foreground> {
        let flags =
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NOCTTY;
        let terminal = rustix::fs::open("/dev/tty", flags, rustix::fs::Mode::empty()).ok()?;
        let in_front = rustix::termios::tcgetpgrp(&terminal).ok()?;
        (in_front == rustix::process::getpgrp()).then_some(Foreground(terminal))
    }

    /// A command that moved itself to the foreground is gone, and nobody is there now.
    pub(crate) fn take_again(&self) -> io::Result<()> {
        let own = rustix::process::getpgrp();
        if rustix::termios::tcgetpgrp(&self.0).is_ok_and(|in_front| in_front == own) {
            return Ok(());
        }
        // Else this process would be stopped for being in the background.
        // SAFETY: the sets are made by the calls that fill them; only this thread's mask changes.
        unsafe {
            let (mut one, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigemptyset(&mut one);
            libc::sigaddset(&mut one, libc::SIGTTOU);
            libc::pthread_sigmask(libc::SIG_BLOCK, &one, &mut before);
            let done = rustix::termios::tcsetpgrp(&self.0, own);
            libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
            Ok(done?)
        }
    }
}
