//! Entries into an archive, always the same bytes for the same entries.
//!
//! An entry is a plain ustar header where everything fits one, else a PAX header goes before it with
//! what does not fit: long names, large ids and sizes, times beyond seconds or before 1970, xattrs.
//! Names are written as the bytes they are; where one that is not UTF-8 goes into PAX, which means
//! UTF-8, `hdrcharset=BINARY` says so. No user or group names are written: they are this machine's.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use super::header::{self, BLOCK, Dialect, Header, MAX_OCTAL_7, MAX_OCTAL_11};
use super::pax;
use super::{Entry, EntryKind};
use crate::error::{Error, ErrorKind, Result};
use crate::path::RelPath;

/// The directory part of a PAX header's own name; GNU tar has the process's id for 0.
const PAX_DIR: &[u8] = b"PaxHeaders.0/";

/// Where an archive is written to.
pub(crate) trait Sink: Write {
    /// Appends what one read of `content` gives, at most `most` bytes; returns how many there were, and
    /// how many it was asked for.
    fn take_from(&mut self, content: &mut dyn Read, most: u64) -> io::Result<(usize, usize)>;
}

impl Sink for Vec<u8> {
    fn take_from(&mut self, content: &mut dyn Read, most: u64) -> io::Result<(usize, usize)> {
        let mut buffer = [0; BLOCK];
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(BLOCK);
        let n = content.read(buffer.get_mut(..most).unwrap_or_default())?;
        self.extend_from_slice(buffer.get(..n).unwrap_or_default());
        Ok((n, most))
    }
}

/// Writes an archive, entry by entry.
#[derive(Debug)]
pub(crate) struct EntryWriter<W> {
    out: W,
    /// An entry failed half-way: what is written is no archive.
    broken: bool,
}

impl<W: Sink> EntryWriter<W> {
    pub(crate) fn new(out: W) -> Self {
        EntryWriter { out, broken: false }
    }

    /// Writes an entry and its content, which must have exactly the entry's size; entries other than
    /// files have none.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for what no archive can hold: nothing is written then.
    /// [`ErrorKind::FailedPrecondition`] if the content is shorter or longer than the entry says.
    /// After this and any failure to read or write, the archive cannot be finished.
    pub(crate) fn append(&mut self, entry: &Entry, content: &mut dyn Read) -> Result<()> {
        self.usable()?;
        let headers = encode(entry)?;
        self.broken = true;
        self.out.write_all(&headers).and_then(|()| self.copy(entry, content)).map_err(|e| {
            match e.downcast::<Error>() {
                Ok(own) => own,
                Err(e) => Error::io("write the archive entry", &entry.path, e),
            }
        })?;
        self.broken = false;
        Ok(())
    }

    /// Ends the archive with two zero blocks.
    pub(crate) fn finish(mut self) -> Result<W> {
        self.usable()?;
        self.out
            .write_all(&[0; 2 * BLOCK])
            .map_err(|e| Error::io("write the end of", "the archive", e))?;
        Ok(self.out)
    }

    fn usable(&self) -> Result<()> {
        if self.broken {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                "the archive was broken off in the middle of an entry: write it anew",
            ));
        }
        Ok(())
    }

    fn copy(&mut self, entry: &Entry, content: &mut dyn Read) -> io::Result<()> {
        let size = entry.stored_size();
        let changed = |how: &str| {
            Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "the file {how} while it was archived: archive it when nobody writes to it"
                ),
            )
            .with_path(&entry.path)
        };
        let mut left = size;
        // One byte more is asked for than there should be: a file that grew has it, and so has one whose
        // size was read wrong. A read that gives less than asked is the end, as it is of files.
        loop {
            let (n, asked) = match self.out.take_from(content, left.saturating_add(1)) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                took => took?,
            };
            let n = n as u64;
            if n > left {
                return Err(changed("became longer").into());
            }
            if n == 0 && left > 0 {
                return Err(changed("became shorter").into());
            }
            left -= n;
            if left == 0 && n < asked as u64 {
                break;
            }
        }
        let padding = size.next_multiple_of(BLOCK as u64) - size;
        let padding = usize::try_from(padding).unwrap_or(BLOCK);
        self.out.write_all([0; BLOCK].get(..padding).unwrap_or_default())
    }
}

/// All header blocks of an entry.
fn encode(entry: &Entry) -> Result<Vec<u8>> {
    let invalid = |reason: String| {
        Error::new(ErrorKind::InvalidArgument, "cannot archive")
            .with_path(&entry.path)
            .with_source(reason)
    };
    entry.check().map_err(|reason| invalid(reason.into_owned()))?;
    let (typeflag, link, device) = match &entry.kind {
        EntryKind::File { sparse: Some(_), .. } => {
            return Err(invalid("layers hold no sparse entries (OCI): give the whole file".into()));
        }
        EntryKind::File { sparse: None, .. } => (b'0', &[][..], (0, 0)),
        EntryKind::HardLink { target } => (b'1', target.as_bytes(), (0, 0)),
        EntryKind::Symlink { target } => (b'2', target.as_slice(), (0, 0)),
        EntryKind::CharDevice { major, minor } => (b'3', &[][..], (*major, *minor)),
        EntryKind::BlockDevice { major, minor } => (b'4', &[][..], (*major, *minor)),
        EntryKind::Directory => (b'5', &[][..], (0, 0)),
        EntryKind::Fifo => (b'6', &[][..], (0, 0)),
    };
    let header = Header {
        dialect: Dialect::Ustar,
        name: name_of(entry),
        link: link.to_vec(),
        typeflag,
        mode: u64::from(entry.mode & 0o7777),
        uid: u64::from(entry.uid),
        gid: u64::from(entry.gid),
        size: entry.stored_size(),
        mtime: entry.mtime.secs,
    };
    let body = pax::encode(&records(entry, &header));
    let mut blocks = Vec::new();
    if !body.is_empty() {
        let size = u64::try_from(body.len()).unwrap_or(u64::MAX);
        let pax_header = Header {
            dialect: Dialect::Ustar,
            name: pax_name(&entry.path),
            link: Vec::new(),
            typeflag: b'x',
            mode: 0o644,
            uid: 0,
            gid: 0,
            size,
            mtime: 0,
        };
        blocks.extend_from_slice(&pax_header.encode((0, 0)));
        blocks.extend_from_slice(&body);
        blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
    }
    blocks.extend_from_slice(&header.encode(device));
    Ok(blocks)
}

/// A directory's name ends in a slash, and the root is `./`.
fn name_of(entry: &Entry) -> Vec<u8> {
    let mut name = entry.path.as_bytes().to_vec();
    if entry.path.is_root() {
        name.push(b'.');
    }
    if entry.kind == EntryKind::Directory {
        name.push(b'/');
    }
    name
}

/// What the header has no room for.
fn records(entry: &Entry, header: &Header) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut records = BTreeMap::new();
    let mut add = |key: &str, value: Vec<u8>| records.insert(key.as_bytes().to_vec(), value);
    let mut binary = false;
    if header::split_name(&header.name).is_none() {
        binary |= std::str::from_utf8(&header.name).is_err();
        add("path", header.name.clone());
    }
    if !header::link_fits(&header.link) {
        binary |= std::str::from_utf8(&header.link).is_err();
        add("linkpath", header.link.clone());
    }
    if binary {
        add("hdrcharset", b"BINARY".to_vec());
    }
    if header.size > MAX_OCTAL_11 {
        add("size", header.size.to_string().into_bytes());
    }
    if header.uid > MAX_OCTAL_7 {
        add("uid", header.uid.to_string().into_bytes());
    }
    if header.gid > MAX_OCTAL_7 {
        add("gid", header.gid.to_string().into_bytes());
    }
    let in_octal = u64::try_from(entry.mtime.secs).is_ok_and(|secs| secs <= MAX_OCTAL_11);
    if !in_octal || entry.mtime.nanos != 0 {
        add("mtime", pax::time_text(entry.mtime).into_bytes());
    }
    if let Some(atime) = entry.atime {
        add("atime", pax::time_text(atime).into_bytes());
    }
    if let Some(acl) = &entry.acl_access {
        add("SCHILY.acl.access", acl.clone());
    }
    if let Some(acl) = &entry.acl_default {
        add("SCHILY.acl.default", acl.clone());
    }
    records.extend(entry.xattrs.iter().map(|(name, value)| pax::xattr_record(name, value)));
    records
}

fn pax_name(path: &RelPath) -> Vec<u8> {
    let mut name = PAX_DIR.to_vec();
    match path.file_name() {
        Some(base) => name.extend_from_slice(base.as_bytes()),
        None => name.push(b'.'),
    }
    name.truncate(100);
    name
}
