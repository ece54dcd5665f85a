//! Which mount is which: mount ids, mount namespaces, and whether a mount still exists.
//!
//! A mount has two ids. The one in /proc/PID/mountinfo is used again once the mount is gone; the
//! unique one (Linux 6.8) is not, until the next boot.
//!
//! Sources: statx(2), statmount(2), proc_pid_mountinfo(5), namespaces(7).

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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

/// A directory by its file system, whatever it is mounted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Major and minor, as mountinfo has them.
    device: Vec<u8>,
    path: PathBuf,
}

/// Where a directory is in its file system; none where the kernel does not tell.
pub(crate) fn place_of(dir: impl AsFd) -> io::Result<Option<Place>> {
    let id = ids(&dir)?.id;
    let Some(path) = super::mount::where_is(&dir) else { return Ok(None) };
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    let line = table.split(|b| *b == b'\n').filter_map(parse_line).find(|line| line.id == id);
    Ok(line.and_then(|line| {
        let below = path.strip_prefix(&line.mount_point).ok()?;
        Some(Place { device: line.device, path: line.root.join(below) })
    }))
}

/// Whether `place` or something below it is mounted somewhere, or is the upper directory, named by the
/// path `upper`, of an overlay mount: in any mount namespace of a process that the caller may look at.
pub(crate) fn is_in_use(place: &Place, upper: &Path) -> io::Result<bool> {
    let mut option = b"upperdir=".to_vec();
    option.extend_from_slice(upper.as_os_str().as_bytes());
    let mut seen = std::collections::HashSet::new();
    for process in std::fs::read_dir("/proc")?.flatten() {
        if !process.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let path = process.path();
        // A namespace that cannot be told from others is looked at once more.
        if let Ok(namespace) = std::fs::read_link(path.join("ns/mnt"))
            && !seen.insert(namespace)
        {
            continue;
        }
        // It has ended, or is somebody else's.
        let Ok(table) = std::fs::read(path.join("mountinfo")) else { continue };
        if uses(&table, place, &option) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn uses(table: &[u8], place: &Place, upper: &[u8]) -> bool {
    table.split(|b| *b == b'\n').any(|text| {
        let Some(line) = parse_line(text) else { return false };
        let is_bind = line.device == place.device && line.root.starts_with(&place.path);
        let mut options =
            text.rsplit(|b| *b == b' ').next().unwrap_or_default().split(|b| *b == b',');
        is_bind || options.any(|option| unescape(option) == upper)
    })
}

/// What is used of a line of mountinfo.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    id: u64,
    device: Vec<u8>,
    root: PathBuf,
    mount_point: PathBuf,
}

fn parse_line(line: &[u8]) -> Option<Line> {
    let mut fields = line.split(|b| *b == b' ');
    let path = |field| PathBuf::from(OsString::from_vec(unescape(field)));
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    // Between them: the parent's id.
    let device = fields.nth(1)?.to_vec();
    let root = path(fields.next()?);
    Some(Line { id, device, root, mount_point: path(fields.next()?) })
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
    fn a_directory_in_use_is_found_by_its_place_or_as_an_upper() {
        let place = Place { device: b"8:1".to_vec(), path: "/store/snapshots/7/tree".into() };
        let upper = b"upperdir=/a b/7/fs";
        let used = |line: &[u8]| uses(line, &place, upper);
        assert!(used(b"1 2 8:1 /store/snapshots/7/tree /mnt rw - ext4 /dev/sda rw"));
        assert!(used(b"\n1 2 8:1 /store/snapshots/7/tree/etc /mnt rw - ext4 /dev/sda rw\n"));
        assert!(!used(b"1 2 8:1 /store/snapshots/7/trees /mnt rw - ext4 /dev/sda rw"));
        assert!(!used(b"1 2 8:2 /store/snapshots/7/tree /mnt rw - ext4 /dev/sda rw"));
        assert!(used(b"1 2 0:9 / /mnt rw - overlay overlay rw,lowerdir=/l,upperdir=/a\\040b/7/fs"));
        assert!(!used(b"1 2 0:9 / /mnt rw - overlay overlay rw,upperdir=/a\\040b/7/fs2"));
    }

    #[test]
    fn a_directory_is_found_in_its_file_system() {
        let tmp = tempfile::tempdir().unwrap();
        let place = place_of(std::fs::File::open(tmp.path()).unwrap()).unwrap().unwrap();
        assert!(place.path.ends_with(tmp.path().file_name().unwrap()));
        assert!(!is_in_use(&place, Path::new("/none")).unwrap());
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
