//! What an archive says, as plain data: the door by which tests hold the reader against others.

use std::cell::Cell;
use std::io::Read;

use super::{Entry, EntryKind, EntryLimits, EntryReader};
use crate::error::{Error, IoContext, Result};

/// One entry, as plain data.
#[doc(hidden)]
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListedEntry {
    /// Normalised; empty for the root.
    pub path: Vec<u8>,
    /// The type flag of POSIX; all regular files are `0`.
    pub kind: char,
    /// Permissions, set-id and sticky bits.
    pub mode: u32,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// Seconds since 1970, and nanoseconds after that.
    pub mtime: (i64, u32),
    /// The size with all holes; 0 of what is no file.
    pub size: u64,
    /// The target of a link, that of a hard link normalised.
    pub link: Vec<u8>,
    /// Major and minor number.
    pub device: (u32, u32),
    /// Offset and length of what is no hole; none if the file is not sparse.
    pub extents: Option<Vec<(u64, u64)>>,
    /// Where the content begins in the archive.
    pub offset: u64,
    /// What is stored of it.
    pub content: Vec<u8>,
}

/// Lists an uncompressed archive.
///
/// # Errors
/// As applying it, for what is wrong with the archive itself.
#[doc(hidden)]
pub fn list_archive(archive: &[u8]) -> Result<Vec<ListedEntry>> {
    let read = Cell::new(0);
    let source = Counted { source: archive, read: &read };
    let mut reader = EntryReader::new(source, EntryLimits::default());
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        let offset = read.get();
        let mut content = Vec::new();
        match reader.content().read_to_end(&mut content).map_err(|e| e.downcast::<Error>()) {
            Ok(_) => {}
            Err(Ok(own)) => return Err(own),
            Err(Err(e)) => return Err(e).at("read the archive", &entry.path),
        }
        entries.push(listed(entry, offset, content));
    }
    Ok(entries)
}

fn listed(entry: Entry, offset: u64, content: Vec<u8>) -> ListedEntry {
    let mut listed = ListedEntry {
        path: entry.path.as_bytes().to_vec(),
        kind: '0',
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: (entry.mtime.secs, entry.mtime.nanos),
        size: 0,
        link: Vec::new(),
        device: (0, 0),
        extents: None,
        offset,
        content,
    };
    listed.kind = match entry.kind {
        EntryKind::File { size, sparse } => {
            listed.size = size;
            listed.extents =
                sparse.map(|extents| extents.iter().map(|e| (e.offset, e.len)).collect());
            '0'
        }
        EntryKind::HardLink { target } => {
            listed.link = target.as_bytes().to_vec();
            '1'
        }
        EntryKind::Symlink { target } => {
            listed.link = target;
            '2'
        }
        EntryKind::CharDevice { major, minor } => {
            listed.device = (major, minor);
            '3'
        }
        EntryKind::BlockDevice { major, minor } => {
            listed.device = (major, minor);
            '4'
        }
        EntryKind::Directory => '5',
        EntryKind::Fifo => '6',
    };
    listed
}

/// Counts what is read.
struct Counted<'a> {
    source: &'a [u8],
    read: &'a Cell<u64>,
}

impl Read for Counted<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.source.read(buf)?;
        self.read.set(self.read.get().saturating_add(n as u64));
        Ok(n)
    }
}
