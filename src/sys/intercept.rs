//! Interception of system calls in tests: before each call of a piece of code that changes a file system, the
//! test is asked whether it goes on or fails, and with what.
//!
//! The code runs on a thread of its own under a seccomp filter that hands those calls to the test
//! (SECCOMP_RET_USER_NOTIF); threads that it starts are under the filter too. Nothing in the code knows of it,
//! and no privilege is needed. Sources: seccomp(2), seccomp_unotify(2).

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;

use rustix::event::{PollFd, PollFlags};

/// A call that is about to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call(pub(crate) &'static str);

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Proceeds,
    /// Nothing is done, and this is answered.
    Fails(Failure),
}

/// What file systems fail with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    NoSpace,
    Quota,
    Disk,
}

impl Failure {
    pub(crate) const ALL: [Failure; 3] = [Failure::NoSpace, Failure::Disk, Failure::Quota];

    /// As [`io::Error::raw_os_error`] gives it.
    pub(crate) fn number(self) -> i32 {
        match self {
            Failure::NoSpace => libc::ENOSPC,
            Failure::Quota => libc::EDQUOT,
            Failure::Disk => libc::EIO,
        }
    }
}

/// All calls that change what a file system holds, or write it out.
const CALLS: &[(libc::c_long, &str)] = &[
    (libc::SYS_write, "write"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_pwritev, "pwritev"),
    (libc::SYS_pwritev2, "pwritev2"),
    (libc::SYS_copy_file_range, "copy_file_range"),
    (libc::SYS_sendfile, "sendfile"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_truncate, "truncate"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_syncfs, "syncfs"),
    (libc::SYS_sync_file_range, "sync_file_range"),
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_linkat, "linkat"),
    (libc::SYS_symlinkat, "symlinkat"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_mknodat, "mknodat"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_fchmodat, "fchmodat"),
    (452, "fchmodat2"),
    (libc::SYS_fchown, "fchown"),
    (libc::SYS_fchownat, "fchownat"),
    (libc::SYS_utimensat, "utimensat"),
    (libc::SYS_setxattr, "setxattr"),
    (libc::SYS_lsetxattr, "lsetxattr"),
    (libc::SYS_fsetxattr, "fsetxattr"),
    (463, "setxattrat"),
    (libc::SYS_removexattr, "removexattr"),
    (libc::SYS_lremovexattr, "lremovexattr"),
    (libc::SYS_fremovexattr, "fremovexattr"),
    (466, "removexattrat"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rename, "rename"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_link, "link"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_symlink, "symlink"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, "unlink"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mkdir, "mkdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rmdir, "rmdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mknod, "mknod"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chmod, "chmod"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chown, "chown"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_lchown, "lchown"),
];

/// `openat` is asked about only if it makes a file.
const OPEN: libc::c_long = libc::SYS_openat;
const MAKES: u32 = (libc::O_CREAT | (libc::O_TMPFILE & !libc::O_DIRECTORY)).cast_unsigned();

/// Runs `work`, and asks `decide` before each call by which it would change a file system. What goes to
/// standard output and error is let pass.
pub(crate) fn intercept<R: Send>(
    work: impl FnOnce() -> R + Send,
    mut decide: impl FnMut(Call) -> Verdict,
) -> R {
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let worker = scope.spawn(move || {
            let installed = install();
            let ready = installed.is_ok();
            sender.send(installed).expect("the supervisor is there");
            ready.then(work)
        });
        let listener = receiver.recv().expect("the worker is there").expect("cannot filter calls");
        supervise(&listener, &mut decide).expect("cannot supervise calls");
        match worker.join() {
            Ok(done) => done.expect("the filter is there"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Answers until no thread is left that could ask.
fn supervise(listener: &OwnedFd, decide: &mut dyn FnMut(Call) -> Verdict) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        if !fds[0].revents().contains(PollFlags::IN) {
            return Ok(());
        }
        // SAFETY: all zeros is what the kernel wants to find, and a valid value.
        let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one such struct.
        let got = unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut asked) };
        if got != 0 {
            match io::Error::last_os_error() {
                // The thread is gone, or a signal came.
                e if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => continue,
                e => return Err(e),
            }
        }
        let number = libc::c_long::from(asked.data.nr);
        let of = CALLS.iter().find(|(n, _)| *n == number);
        let call = Call(of.map_or("openat", |(_, name)| name));
        let to_terminal = matches!(call.0, "write" | "writev") && asked.data.args[0] <= 2;
        let verdict = if to_terminal { Verdict::Proceeds } else { decide(call) };
        let (error, flags) = match verdict {
            Verdict::Proceeds => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE),
            Verdict::Fails(failure) => (-failure.number(), 0),
        };
        let answer = libc::seccomp_notif_resp {
            id: asked.id,
            val: 0,
            error,
            flags: u32::try_from(flags).expect("a bit"),
        };
        // SAFETY: the kernel reads one such struct.
        let sent = unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw const answer) };
        if sent != 0 {
            match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ENOENT) => {}
                e => return Err(e),
            }
        }
    }
}

/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND` of `linux/seccomp.h`.
const RECEIVE: libc::Ioctl = read_write(0, size_of::<libc::seccomp_notif>());
const SEND: libc::Ioctl = read_write(1, size_of::<libc::seccomp_notif_resp>());

#[allow(clippy::cast_possible_truncation, reason = "sizes below 2^14")]
const fn read_write(number: u32, size: usize) -> libc::Ioctl {
    (3_u32 << 30 | (size as u32) << 16 | (b'!' as u32) << 8 | number) as libc::Ioctl
}

/// Puts the calling thread under the filter; gives what the calls are heard on.
fn install() -> io::Result<OwnedFd> {
    let program = program();
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).expect("a short program"),
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: no pointer is passed.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel copies the program, which lives until then; it changes this very thread alone.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const filter,
        )
    };
    let fd = i32::try_from(fd).expect("a descriptor");
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The filter, in the kernel's classic BPF.
fn program() -> Vec<libc::sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    const ANSWER: u32 = libc::BPF_RET | libc::BPF_K;
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).expect("16 bits"),
        jt,
        jf,
        k,
    };
    let number = |n: libc::c_long| u32::try_from(n).expect("a number of a call");
    // The low half of the third argument, the flags.
    let flags = if cfg!(target_endian = "little") { 16 + 2 * 8 } else { 16 + 2 * 8 + 4 };
    let mut program = vec![
        op(LOAD, 0, 0, 0),
        op(EQUAL, 0, 3, number(OPEN)),
        op(LOAD, 0, 0, flags),
        op(ANY_BIT, 0, 1, MAKES),
        op(ANSWER, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        // What was loaded may be flags, of no call's number below: an openat that makes nothing goes on.
        op(LOAD, 0, 0, 0),
    ];
    for (n, _) in CALLS {
        program.push(op(EQUAL, 0, 1, number(*n)));
        program.push(op(ANSWER, 0, 0, libc::SECCOMP_RET_USER_NOTIF));
    }
    program.push(op(ANSWER, 0, 0, libc::SECCOMP_RET_ALLOW));
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn calls_are_heard_and_failed() {
        let tmp = tempfile::tempdir().unwrap();
        let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
        let work = || -> Vec<io::Result<()>> {
            let made = fs::write(&a, "text");
            let read = fs::read(&a).map(drop);
            // A thread of its own.
            let renamed = thread::scope(|s| s.spawn(|| fs::rename(&a, &b)).join().unwrap());
            vec![made, read, renamed]
        };
        let mut calls = Vec::new();
        let done = intercept(work, |call| {
            calls.push(call.0);
            match call.0.starts_with("rename") {
                true => Verdict::Fails(Failure::Disk),
                false => Verdict::Proceeds,
            }
        });
        assert_eq!(calls, ["openat", "write", "rename"]);
        assert!(done[0].is_ok() && done[1].is_ok());
        assert_eq!(done[2].as_ref().unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(fs::read(&a).unwrap(), b"text");
    }
}
