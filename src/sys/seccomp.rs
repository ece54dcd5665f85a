//! A filter of system calls against two requests by which a program could type into the terminal that it
//! shares with whoever started it: TIOCSTI, and TIOCLINUX, which pastes.
//!
//! Sources: seccomp(2), ioctl_tty(2), the kernel's `include/uapi/linux/filter.h`.

use std::io;

/// Loads a word of `struct seccomp_data`.
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Offsets in `struct seccomp_data`: the call's number, and the low word of its second argument, all the
/// kernel looks at of a request.
const NUMBER: u32 = 0;
const REQUEST: u32 = if cfg!(target_endian = "little") { 24 } else { 28 };

/// The numbers of ioctl(2): of this architecture; of x32; of 32-bit programs on x86 and Arm. Where one of
/// these is another call, that call would have to have such a second argument.
const IOCTL: [u32; 3] = [libc::SYS_ioctl as u32, 0x4000_0000 | 514, 54];
const REQUESTS: [u32; 2] = [libc::TIOCSTI as u32, libc::TIOCLINUX as u32];

/// Refuses the two requests, with EPERM, to this process and all that it starts. It must have given up new
/// privileges, or administer its user namespace. Where the kernel has no filters, there is none.
pub(crate) fn keep_off_terminals() -> io::Result<()> {
    const fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code, jt, jf, k }
    }
    let mut filter = [
        step(LOAD, 0, 0, NUMBER),
        step(IF_EQUAL, 3, 0, IOCTL[0]),
        step(IF_EQUAL, 2, 0, IOCTL[1]),
        step(IF_EQUAL, 1, 0, IOCTL[2]),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(LOAD, 0, 0, REQUEST),
        step(IF_EQUAL, 2, 0, REQUESTS[0]),
        step(IF_EQUAL, 1, 0, REQUESTS[1]),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program is live, and as long as it says; the kernel copies it.
    let done = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER as libc::c_ulong,
            std::ptr::from_ref(&program),
        )
    };
    match done {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            e => Err(e),
        },
    }
}
