//! The xattr in which unprivileged implementations keep the owner, mode and type that a file should
//! have: `uid:gid:mode[:type]`.
//!
//! fuse-overlayfs writes three fields, containers/storage (`force_mask`) four: `file`, `dir`,
//! `symlink`, `pipe`, `socket`, `block-MAJOR-MINOR`, `char-MAJOR-MINOR`. Ids are decimal, the mode is
//! octal, and may have the bits of the type above its own twelve.
//!
//! Whoever may write to a file may set it on it: it is worth as much as the file's writers are.
//! Honouring it hands out files of root and setuid bits.

use super::stat::FileType;

/// The key under which this crate writes it.
pub(crate) const KEY: &[u8] = b"user.containers.override_stat";

/// That of fuse-overlayfs for who has CAP_SYS_ADMIN.
pub(crate) const SECURITY_KEY: &[u8] = b"security.fuseoverlayfs.override_stat";

/// The keys under which it is found.
pub(crate) const KEYS: [&[u8]; 3] = [KEY, b"user.fuseoverlayfs.override_stat", SECURITY_KEY];

/// What a file should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OverrideStat {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// `0o7777`.
    pub(crate) mode: u32,
    /// None where the value does not tell: then that of the file.
    pub(crate) file_type: Option<FileType>,
    /// Of devices; 0:0 for all else.
    pub(crate) rdev: (u32, u32),
}

/// The bits of `st_mode` that are the type.
const TYPE_BITS: u32 = 0o170_000;

/// The value that containers/storage would write.
pub(crate) fn encode(wanted: &OverrideStat) -> Vec<u8> {
    let OverrideStat { uid, gid, mode, file_type, rdev: (major, minor) } = wanted;
    let mut text = format!("{uid}:{gid}:{mode:04o}");
    match file_type {
        None | Some(FileType::Unknown) => {}
        Some(FileType::Regular) => text.push_str(":file"),
        Some(FileType::Directory) => text.push_str(":dir"),
        Some(FileType::Symlink) => text.push_str(":symlink"),
        Some(FileType::Fifo) => text.push_str(":pipe"),
        Some(FileType::Socket) => text.push_str(":socket"),
        Some(FileType::CharDevice) => text.push_str(&format!(":char-{major}-{minor}")),
        Some(FileType::BlockDevice) => text.push_str(&format!(":block-{major}-{minor}")),
    }
    text.into_bytes()
}

/// Reads a value; none if it is malformed.
pub(crate) fn decode(value: &[u8]) -> Option<OverrideStat> {
    let text = std::str::from_utf8(value).ok()?;
    let mut fields = text.split(':');
    let (uid, gid) = (id(fields.next()?)?, id(fields.next()?)?);
    let mode = fields.next().filter(|m| m.bytes().all(|b| b.is_ascii_digit()))?;
    let mode = u32::from_str_radix(mode, 8).ok()?;
    if mode & !(TYPE_BITS | 0o7777) != 0 {
        return None;
    }
    let (mut file_type, mut rdev) = (type_of_bits(mode & TYPE_BITS)?, (0, 0));
    if let Some(word) = fields.next() {
        let (named, device) = type_of_word(word)?;
        if file_type.is_some_and(|bits| bits != named) {
            return None;
        }
        (file_type, rdev) = (Some(named), device);
    }
    let device = matches!(file_type, Some(FileType::CharDevice | FileType::BlockDevice));
    // A device whose number is not told, or more fields than there are.
    if fields.next().is_some() || (device && !text.contains('-')) {
        return None;
    }
    Some(OverrideStat { uid, gid, mode: mode & 0o7777, file_type, rdev })
}

/// An id or a device number: digits alone, and not the one that means "none".
fn id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|id| digits && *id != u32::MAX)
}

/// None at all if the bits are no type; inner none if they say nothing.
fn type_of_bits(bits: u32) -> Option<Option<FileType>> {
    Some(match bits {
        0 => None,
        0o100_000 => Some(FileType::Regular),
        0o040_000 => Some(FileType::Directory),
        0o120_000 => Some(FileType::Symlink),
        0o010_000 => Some(FileType::Fifo),
        0o140_000 => Some(FileType::Socket),
        0o060_000 => Some(FileType::BlockDevice),
        0o020_000 => Some(FileType::CharDevice),
        _ => return None,
    })
}

fn type_of_word(word: &str) -> Option<(FileType, (u32, u32))> {
    let plain = match word {
        "file" => FileType::Regular,
        "dir" => FileType::Directory,
        "symlink" => FileType::Symlink,
        "pipe" => FileType::Fifo,
        "socket" => FileType::Socket,
        _ => {
            let (kind, numbers) = word.split_once('-')?;
            let (major, minor) = numbers.split_once('-')?;
            let file_type = match kind {
                "block" => FileType::BlockDevice,
                "char" => FileType::CharDevice,
                _ => return None,
            };
            return Some((file_type, (id(major)?, id(minor)?)));
        }
    };
    Some((plain, (0, 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_implementations_write() {
        let file = |uid, gid, mode, file_type, rdev| {
            Some(OverrideStat { uid, gid, mode, file_type, rdev })
        };
        for (text, expected) in [
            ("0:0:755", file(0, 0, 0o755, None, (0, 0))),
            ("1:2:100644", file(1, 2, 0o644, Some(FileType::Regular), (0, 0))),
            ("1:2:4755:file", file(1, 2, 0o4755, Some(FileType::Regular), (0, 0))),
            ("0:0:0755:dir", file(0, 0, 0o755, Some(FileType::Directory), (0, 0))),
            ("0:0:0600:block-8-1", file(0, 0, 0o600, Some(FileType::BlockDevice), (8, 1))),
            ("0:0:20600:char-1-3", file(0, 0, 0o600, Some(FileType::CharDevice), (1, 3))),
        ] {
            assert_eq!(decode(text.as_bytes()), expected, "{text}");
            assert_eq!(expected.and_then(|file| decode(&encode(&file))), expected, "{text}");
        }
    }

    #[test]
    fn what_is_none() {
        for text in [
            "",
            "0:0",
            "0:0:",
            "0:0:999",
            "-1:0:755",
            "+1:0:755",
            "0:0:+755",
            "4294967295:0:755",
            "4294967296:0:755",
            "0:0:755:",
            "0:0:755:file:",
            "0:0:755:door",
            "0:0:755:char-1",
            "0:0:755:char-1-",
            "0:0:755:char--1-3",
            "0:0:40755:file",
            "0:0:20644",
            "0:0:1000755",
            "0:0:170644",
            " 0:0:755",
            "0:0:755\0",
        ] {
            assert_eq!(decode(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(decode(b"0:0:\xff"), None);
    }
}
