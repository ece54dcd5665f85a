//! What a process and its helper say to each other: messages of a stated length over a socket.
//!
//! ```text
//! length   u32      of what follows, at most MAX_MESSAGE
//! version  u16
//! kind     u8
//! fields            numbers are little-endian; bytes are a u32 length and that many; an option or a
//!                   choice is a u8; a list is a u32 count and its members
//! ```
//!
//! The codec is pure and bounded: nothing is set aside for what has not come. A message has one encoding:
//! whatever is decoded is, encoded again, the same bytes.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::{Transport, View, ViewUpper};
use crate::idmap::{IdMap, IdRange};
use crate::layer::LayerFormat;
use crate::path::Name;
use crate::sys::mount::Attributes;
use crate::sys::mountinfo::MountIds;
use crate::sys::owners::Owners;

/// Raised with each change: a process talks to helpers of its own version alone.
pub(crate) const VERSION: u16 = 2;
/// The most that a message may take, in bytes, its length not counted.
pub(crate) const MAX_MESSAGE: u32 = 4 << 20;

/// A message, either way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Show this on that directory. A descriptor comes along if it is to be kept open until nothing is
    /// served any more: a lock.
    Mount { view: View, target: PathBuf },
    /// Unmount; with `detach` also if files are in use.
    Unmount { detach: bool },
    /// It is mounted, and answers.
    Ready { mount: MountIds, features: Vec<(String, bool)> },
    /// It is unmounted.
    Unmounted,
    /// What was asked for could not be done.
    Failed { kind: ErrorKind, text: String },
}

/// The numbers of the kinds, which are never given to others.
const KINDS: [(u8, ErrorKind); 18] = [
    (0, ErrorKind::Io),
    (1, ErrorKind::NotFound),
    (2, ErrorKind::AlreadyExists),
    (3, ErrorKind::InvalidArgument),
    (4, ErrorKind::FailedPrecondition),
    (5, ErrorKind::Busy),
    (6, ErrorKind::Unsupported),
    (7, ErrorKind::PermissionDenied),
    (8, ErrorKind::InvalidArchive),
    (9, ErrorKind::InvalidImage),
    (10, ErrorKind::DigestMismatch),
    (11, ErrorKind::LimitExceeded),
    (12, ErrorKind::NoSpace),
    (13, ErrorKind::ReadOnly),
    (14, ErrorKind::Corrupt),
    (15, ErrorKind::Incompatible),
    (16, ErrorKind::Cancelled),
    (17, ErrorKind::Poisoned),
];
const FORMATS: [(u8, LayerFormat); 3] =
    [(0, LayerFormat::OverlayTrusted), (1, LayerFormat::OverlayUser), (2, LayerFormat::Aufs)];
const OWNERS: [(u8, Owners); 3] =
    [(0, Owners::OfFiles), (1, Owners::InXattrs), (2, Owners::InSecurityXattrs)];
const TRANSPORTS: [(u8, Transport); 2] = [(0, Transport::Direct), (1, Transport::Fusermount)];

/// The message as bytes, its length first.
///
/// # Errors
/// [`ErrorKind::LimitExceeded`] if it is too long.
pub(crate) fn encode(message: &Message) -> Result<Vec<u8>> {
    let mut out = Writer(vec![0; 4]);
    out.0.extend_from_slice(&VERSION.to_le_bytes());
    match message {
        Message::Mount { view, target } => {
            out.u8(1);
            out.view(view);
            out.bytes(target.as_os_str().as_bytes());
        }
        Message::Unmount { detach } => {
            out.u8(2);
            out.u8((*detach).into());
        }
        Message::Ready { mount, features } => {
            out.u8(3);
            out.u64(mount.id);
            out.u8(mount.unique.is_some().into());
            out.0.extend(mount.unique.iter().flat_map(|id| id.to_le_bytes()));
            out.count(features.len());
            for (name, granted) in features {
                out.bytes(name.as_bytes());
                out.u8((*granted).into());
            }
        }
        Message::Unmounted => out.u8(4),
        Message::Failed { kind, text } => {
            out.u8(5);
            out.u8(KINDS.iter().find(|(_, k)| k == kind).map_or(0, |(number, _)| *number));
            out.bytes(text.as_bytes());
        }
    }
    let length = u32::try_from(out.0.len().saturating_sub(4)).unwrap_or(u32::MAX);
    if length > MAX_MESSAGE {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!("the paths of the layers are too long for a helper: over {MAX_MESSAGE} bytes"),
        ));
    }
    if let Some(room) = out.0.get_mut(..4) {
        room.copy_from_slice(&length.to_le_bytes());
    }
    Ok(out.0)
}

/// How many bytes follow the four that state the length.
///
/// # Errors
/// [`ErrorKind::Incompatible`] if that is more than any message has.
pub(crate) fn length(bytes: [u8; 4]) -> Result<usize> {
    match u32::from_le_bytes(bytes) {
        length @ 3..=MAX_MESSAGE => Ok(length as usize),
        _ => Err(malformed()),
    }
}

/// A message without its length.
///
/// # Errors
/// [`ErrorKind::Incompatible`] for another version, and for what is no message.
pub(crate) fn decode(bytes: &[u8]) -> Result<Message> {
    let mut from = Reader(bytes);
    let version = u16::from_le_bytes(from.array().ok_or_else(malformed)?);
    if version != VERSION {
        return Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "the helper speaks version {version} of the protocol, and this is version {VERSION}: \
                 use a program built with the same version of this crate"
            ),
        ));
    }
    from.message().filter(|_| from.0.is_empty()).ok_or_else(malformed)
}

fn malformed() -> Error {
    Error::new(ErrorKind::Incompatible, "what the other process said is no message of the protocol")
}

struct Writer(Vec<u8>);

impl Writer {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// What does not fit makes the message too long.
    fn count(&mut self, count: usize) {
        self.0.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend_from_slice(bytes);
    }

    fn path(&mut self, path: &Path) {
        self.bytes(path.as_os_str().as_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn ids(&mut self, map: &IdMap) {
        let (ranges, squash) = map.parts();
        self.count(ranges.len());
        for IdRange { host, shown, len } in ranges {
            for number in [*host, *shown, *len] {
                self.u32(number);
            }
        }
        self.u8(squash.is_some().into());
        squash.into_iter().for_each(|id| self.u32(id));
    }

    fn view(&mut self, view: &View) {
        self.count(view.lowers.len());
        for lower in &view.lowers {
            self.path(lower);
        }
        self.u8(view.upper.is_some().into());
        if let Some(upper) = &view.upper {
            self.path(&upper.dir);
            self.path(&upper.work);
            self.bytes(upper.own.as_bytes());
        }
        self.u8(FORMATS.iter().find(|(_, f)| *f == view.format).map_or(0, |(n, _)| *n));
        self.u8(OWNERS.iter().find(|(_, o)| *o == view.owners).map_or(0, |(n, _)| *n));
        self.ids(&view.uids);
        self.ids(&view.gids);
        self.u8(view.volatile.into());
        let Attributes { read_only, nosuid, nodev, noexec } = view.attributes;
        for flag in [read_only, nosuid, nodev, noexec] {
            self.u8(flag.into());
        }
        self.u8(TRANSPORTS.iter().find(|(_, t)| *t == view.transport).map_or(0, |(n, _)| *n));
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn count(&mut self) -> Option<usize> {
        usize::try_from(u32::from_le_bytes(self.array()?)).ok()
    }

    fn bytes(&mut self) -> Option<Vec<u8>> {
        let length = self.count()?;
        let (first, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(first.to_vec())
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?).ok()
    }

    fn path(&mut self) -> Option<PathBuf> {
        Some(PathBuf::from(OsString::from_vec(self.bytes()?)))
    }

    fn one_of<T: Copy>(&mut self, all: &[(u8, T)]) -> Option<T> {
        let number = self.u8()?;
        all.iter().find(|(n, _)| *n == number).map(|(_, value)| *value)
    }

    /// Members of a list; it grows with what has come, not with what is stated.
    fn list<T>(&mut self, mut member: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut list = Vec::new();
        for _ in 0..self.count()? {
            list.push(member(self)?);
        }
        Some(list)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn ids(&mut self) -> Option<IdMap> {
        let ranges = self.list(|from| {
            Some(IdRange { host: from.u32()?, shown: from.u32()?, len: from.u32()? })
        })?;
        let squash = if self.flag()? { Some(self.u32()?) } else { None };
        Some(IdMap::new(ranges, squash))
    }

    fn view(&mut self) -> Option<View> {
        let lowers = self.list(Reader::path)?;
        let upper = match self.flag()? {
            false => None,
            true => Some(ViewUpper {
                dir: self.path()?,
                work: self.path()?,
                own: Name::new(self.bytes()?).ok()?,
            }),
        };
        let format = self.one_of(&FORMATS)?;
        let owners = self.one_of(&OWNERS)?;
        let (uids, gids) = (self.ids()?, self.ids()?);
        let volatile = self.flag()?;
        let attributes = Attributes {
            read_only: self.flag()?,
            nosuid: self.flag()?,
            nodev: self.flag()?,
            noexec: self.flag()?,
        };
        let transport = self.one_of(&TRANSPORTS)?;
        Some(View { lowers, upper, format, owners, uids, gids, volatile, attributes, transport })
    }

    fn message(&mut self) -> Option<Message> {
        Some(match self.u8()? {
            1 => Message::Mount { view: self.view()?, target: self.path()? },
            2 => Message::Unmount { detach: self.flag()? },
            3 => {
                let id = u64::from_le_bytes(self.array()?);
                let unique = match self.flag()? {
                    true => Some(u64::from_le_bytes(self.array()?)),
                    false => None,
                };
                let features = self.list(|from| Some((from.text()?, from.flag()?)))?;
                Message::Ready { mount: MountIds { id, unique }, features }
            }
            4 => Message::Unmounted,
            5 => Message::Failed { kind: self.one_of(&KINDS)?, text: self.text()? },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        let view = View {
            lowers: vec!["/a".into(), OsString::from_vec(b"/b\xff".to_vec()).into()],
            upper: Some(ViewUpper {
                dir: "/u".into(),
                work: "/w".into(),
                own: Name::new("stratafs").unwrap(),
            }),
            format: LayerFormat::Aufs,
            owners: Owners::InXattrs,
            uids: IdMap::new(vec![IdRange { host: 0, shown: 1000, len: 1 }], Some(1000)),
            gids: IdMap::default(),
            volatile: true,
            attributes: Attributes { nodev: true, ..Attributes::default() },
            transport: Transport::Fusermount,
        };
        let bare = View { lowers: Vec::new(), upper: None, ..view.clone() };
        let mount = MountIds { id: 7, unique: Some(1 << 40) };
        vec![
            Message::Mount { view, target: "/mnt".into() },
            Message::Mount { view: bare, target: "".into() },
            Message::Unmount { detach: true },
            Message::Ready { mount, features: vec![("FUSE_X".into(), true)] },
            Message::Ready { mount: MountIds { id: 1, unique: None }, features: Vec::new() },
            Message::Unmounted,
            Message::Failed { kind: ErrorKind::Busy, text: "in use".into() },
        ]
    }

    #[test]
    fn messages_come_back_and_nothing_else_does() {
        for message in messages() {
            let bytes = encode(&message).unwrap();
            let (head, body) = bytes.split_first_chunk::<4>().unwrap();
            assert_eq!(length(*head).unwrap(), body.len());
            assert_eq!(decode(body).unwrap(), message);
            for cut in 0..body.len() {
                assert!(decode(&body[..cut]).is_err(), "{message:?} cut at {cut}");
            }
            assert!(decode(&[body, b"x"].concat()).is_err());
        }
        assert!(length((MAX_MESSAGE + 1).to_le_bytes()).is_err());
        assert!(length([0; 4]).is_err());
    }

    #[test]
    fn each_kind_has_a_number() {
        for (number, kind) in KINDS {
            let bytes = encode(&Message::Failed { kind, text: String::new() }).unwrap();
            assert_eq!(bytes[7], number);
            assert_eq!(decode(&bytes[4..]).unwrap(), Message::Failed { kind, text: String::new() });
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = encode(&Message::Unmounted).unwrap();
        bytes[4] = 9;
        let e = decode(&bytes[4..]).unwrap_err();
        assert!(e.to_string().contains("version 9"), "{e}");
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let text = "x".repeat(MAX_MESSAGE as usize);
        let e = encode(&Message::Failed { kind: ErrorKind::Io, text }).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded);
    }
}
