//! Which mount is which: mount ids, mount namespaces, and whether a mount still exists.
//!
//! A mount has two ids. The one in /proc/PID/mountinfo is used again once the mount is gone; the
//! unique one (Linux 6.8) is not, until the next boot.
//!
//! Sources: statx(2), statmount(2), proc_pid_mountinfo(5), namespaces(7).

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::{AtFlags, StatxFlags};

/// `STATX_MNT_ID_UNIQUE`, which rustix does not name.
const STATX_MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// `STATMOUNT_MNT_BASIC`.
const STATMOUNT_MNT_BASIC: u64 = 2;

/// New system calls have the same distance from each other on every architecture.
const SYS_STATMOUNT: libc::c_long = libc::SYS_mount_setattr - 442 + 457;

/// The ids of one mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MountIds {
    /// As in mountinfo.
    pub(crate) id: u64,
    /// Where the kernel has it.
    pub(crate) unique: Option<u64>,
}

/// The ids of the mount that a descriptor was opened through. Linux 5.8. Asks no server of a network
/// or FUSE file system.
pub(crate) fn ids(fd: impl AsFd) -> io::Result<MountIds> {
    let ask = |mask: StatxFlags| -> io::Result<Option<u64>> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(&fd, "", flags, mask)?;
        Ok((stat.stx_mask & mask.bits() != 0).then_some(stat.stx_mnt_id))
    };
    let id = ask(StatxFlags::MNT_ID)?.ok_or(io::ErrorKind::Unsupported)?;
    let unique = ask(STATX_MNT_ID_UNIQUE)?;
    Ok(MountIds { id, unique })
}

/// Whether the mount of this unique id is in the caller's mount namespace.
///
/// # Errors
/// ENOSYS before Linux 6.8; EPERM where a filter forbids the call, or the mount lies outside the
/// caller's root directory.
pub(crate) fn exists(unique: u64) -> io::Result<bool> {
    /// The kernel's `struct mnt_id_req`, first version.
    #[repr(C)]
    struct Request {
        size: u32,
        spare: u32,
        mnt_id: u64,
        param: u64,
    }
    let request = Request { size: 24, spare: 0, mnt_id: unique, param: STATMOUNT_MNT_BASIC };
    // Holds a `struct statmount`: 512 bytes.
    let mut answer = [0_u64; 128];
    // SAFETY: `request` is a live structure of the size it states; `answer` is writable, aligned for
    // 64-bit fields, and of the size given.
    let done = unsafe {
        libc::syscall(
            SYS_STATMOUNT,
            std::ptr::from_ref(&request),
            answer.as_mut_ptr(),
            size_of_val(&answer),
            0,
        )
    };
    if done == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        e => Err(e),
    }
}

/// Where the mount with this id of mountinfo is mounted, if the caller can see it.
pub(crate) fn mount_point(id: u64) -> io::Result<Option<PathBuf>> {
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(table
        .split(|b| *b == b'\n')
        .filter_map(parse_line)
        .find(|line| line.id == id)
        .map(|line| line.mount_point))
}

/// What is used of a line of mountinfo.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    id: u64,
    mount_point: PathBuf,
}

fn parse_line(line: &[u8]) -> Option<Line> {
    let mut fields = line.split(|b| *b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    // Between them: the parent's id, the device, the root.
    let mount_point = PathBuf::from(OsString::from_vec(unescape(fields.nth(3)?)));
    Some(Line { id, mount_point })
}

/// Undoes the kernel's `\ooo` for space, tab, newline, `#` and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

/// The device and inode numbers that name the calling thread's mount namespace.
pub(crate) fn mount_namespace() -> io::Result<(u64, u64)> {
    let meta = std::fs::metadata("/proc/thread-self/ns/mnt")?;
    Ok((meta.dev(), meta.ino()))
}

/// The kernel's random name of this boot.
pub(crate) fn boot_id() -> io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn lines_of_mountinfo_give_id_and_unescaped_mount_point() {
        let line =
            br"36 35 98:0 /mnt1 /mnt\040two\134\012x rw,noatime master:1 - ext3 /dev/root rw";
        let line = parse_line(line).unwrap();
        assert_eq!(line.id, 36);
        assert_eq!(line.mount_point, Path::new("/mnt two\\\nx"));
        assert_eq!(parse_line(b""), None);
        assert_eq!(parse_line(b"x 35"), None);
    }

    #[test]
    fn the_root_is_a_mount_of_this_namespace() {
        let root = std::fs::File::open("/").unwrap();
        let ids = ids(&root).unwrap();
        assert_eq!(mount_point(ids.id).unwrap().as_deref(), Some(Path::new("/")));
        if let Some(unique) = ids.unique {
            // ENOSYS on a kernel between the two calls, EPERM under a filter.
            if let Ok(there) = exists(unique) {
                assert!(there);
                assert!(!exists(u64::MAX).unwrap());
            }
        }
    }
}
