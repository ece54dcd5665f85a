//! Between the types of requests and those of the union. Pure.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType as Kind, INodeNo, Request, TimeOrNow};

use crate::path::{NAME_MAX, Name};
use crate::sys::errno::Code;
use crate::sys::file::SetTime;
use crate::sys::stat::{FileType, Time};
use crate::union::{Attr, Caller};

/// The bits of a mode that tell the file type, as in `st_mode`.
const TYPE_MASK: u32 = 0o170_000;

/// A name of a request.
///
/// # Errors
/// ENAMETOOLONG, or EINVAL for what the kernel never sends.
pub(super) fn name(name: &OsStr) -> io::Result<Name> {
    let bytes = name.as_bytes();
    if bytes.len() > NAME_MAX {
        return Err(Code::NameTooLong.into());
    }
    Name::new(bytes).map_err(|_| Code::Invalid.into())
}

/// Attributes as a reply has them.
pub(super) fn attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: kind(attr.kind),
        // Twelve bits.
        perm: u16::try_from(attr.mode & 0o7777).unwrap_or(0),
        nlink: u32::try_from(attr.nlink).unwrap_or(u32::MAX),
        uid: attr.uid,
        gid: attr.gid,
        rdev: encode_device(attr.rdev),
        blksize: attr.block_size,
        flags: 0,
    }
}

/// The attributes that say, in the reply to a lookup, that there is nothing.
pub(super) fn no_attr() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: Kind::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

fn kind(kind: FileType) -> Kind {
    match kind {
        FileType::Regular | FileType::Unknown => Kind::RegularFile,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::CharDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Fifo => Kind::NamedPipe,
        FileType::Socket => Kind::Socket,
    }
}

/// The file type in the mode of a request that makes a file.
pub(super) fn type_of_mode(mode: u32) -> FileType {
    match mode & TYPE_MASK {
        0o010_000 => FileType::Fifo,
        0o020_000 => FileType::CharDevice,
        0o040_000 => FileType::Directory,
        0o060_000 => FileType::BlockDevice,
        // Without a type mknod(2) makes a file, too.
        0o100_000 | 0 => FileType::Regular,
        0o120_000 => FileType::Symlink,
        0o140_000 => FileType::Socket,
        _ => FileType::Unknown,
    }
}

/// A device number as the protocol has it: 12 bits major, 20 bits minor, in the kernel's order.
fn encode_device((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// The reverse: major and minor.
pub(super) fn decode_device(device: u32) -> (u32, u32) {
    ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00))
}

/// A time for a reply. fuser takes it back apart into seconds, negative ones too, and nanoseconds.
fn system_time(time: Time) -> SystemTime {
    let nanos = Duration::from_nanos(time.nanos.into());
    let secs = Duration::from_secs(time.secs.unsigned_abs());
    let whole =
        if time.secs < 0 { UNIX_EPOCH.checked_sub(secs) } else { UNIX_EPOCH.checked_add(secs) };
    whole.and_then(|whole| whole.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// A time of a request. For times before 1970 fuser takes the nanoseconds off instead of adding them:
/// that is undone here.
fn time(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Time {
            secs: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nanos: after.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            let secs = i64::try_from(before.as_secs()).map_or(i64::MIN, |secs| -secs);
            Time { secs, nanos: before.subsec_nanos() }
        }
    }
}

/// A time that a request sets.
pub(super) fn set_time(wanted: Option<TimeOrNow>) -> SetTime {
    match wanted {
        None => SetTime::Keep,
        Some(TimeOrNow::Now) => SetTime::Now,
        Some(TimeOrNow::SpecificTime(wanted)) => SetTime::To(time(wanted)),
    }
}

/// Who asks.
pub(super) fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for device in [(0, 0), (1, 3), (4095, 0xf_ffff), (8, 256), (259, 70_000)] {
            assert_eq!(decode_device(encode_device(device)), device);
        }
        // As stat(2) of /dev/null, and of a disk with many partitions.
        assert_eq!(encode_device((1, 3)), 0x103);
        assert_eq!(encode_device((8, 256)), 0x0010_0800);
    }

    #[test]
    fn times_before_1970_are_shown_and_taken() {
        // What fuser makes of the seconds and nanoseconds of a request.
        let from_request = |secs: i64, nanos: u32| {
            if secs >= 0 {
                UNIX_EPOCH + Duration::new(secs.unsigned_abs(), nanos)
            } else {
                UNIX_EPOCH - Duration::new(secs.unsigned_abs(), nanos)
            }
        };
        for (secs, nanos) in
            [(0, 0), (5, 7), (-1, 0), (-1, 999_999_999), (-86_400, 5), (1 << 40, 1)]
        {
            assert_eq!(time(from_request(secs, nanos)), Time { secs, nanos }, "{secs} {nanos}");
        }
        assert_eq!(
            system_time(Time { secs: -2, nanos: 800_000_000 }),
            UNIX_EPOCH - Duration::new(1, 200_000_000)
        );
        // Beyond what there is.
        let _ = system_time(Time { secs: i64::MIN, nanos: 0 });
        let _ = system_time(Time { secs: i64::MAX, nanos: 999_999_999 });
    }

    #[test]
    fn names_are_bytes_up_to_the_limit() {
        assert_eq!(name(OsStr::from_bytes(b"\xff\n")).unwrap().as_bytes(), b"\xff\n");
        assert!(name(OsStr::new(&"n".repeat(255))).is_ok());
        assert!(Code::NameTooLong.is(&name(OsStr::new(&"n".repeat(256))).unwrap_err()));
    }
}
