//! Entries out of an archive: how a header, the extended headers before it and its sparse map
//! combine.
//!
//! Strict where readers differ:
//! - **Sizes.** Both the header and PAX may tell the size, and readers that ignore one of them take
//!   content for headers (TARmageddon). They must agree, unless the size needs more than eleven octal
//!   digits: then the header's field is 0 (GNU tar, Go, Python) or all sevens. So a PAX size that the
//!   header could have held, over a field of 0, is refused as well: no known writer does it, and it
//!   is what the attack looks like.
//! - **Bodies.** Only files have content. Other types with a size are refused: Go and Python's tarfile
//!   take no content there, GNU tar and libarchive sometimes do, depending on the type and on who
//!   wrote the archive. Old tars gave hard links their file's size with no content, `pax` and cpio
//!   converters give size and content; nobody can tell which.
//! - **Extended headers.** At most one of a kind before an entry, and none at the end. GNU's long name
//!   and PAX's path must be the same if both are there. v7 has none: the crate tar takes them for files.
//! - **Trailing slashes** are for directories. The v7 type NUL with one, in the header itself, is a
//!   directory; with a longer name beside it, it is refused (Go goes by the longer name, Python by the
//!   header's). Type `0` with one is refused (GNU tar makes a directory, Go a file).
//! - **Long link targets** are for links: libarchive makes a link of other files too, where it cannot
//!   convert the target to its own character set.
//! - **The end** is two zero blocks, or the end of input at a block's boundary with at most one zero
//!   block before it, or right behind the last entry's content, without its padding. A lone zero block
//!   with more behind it is refused (GNU tar stops, Go fails).
//!   What follows the two blocks is not looked at.
//! - Unknown types, volume labels, multi-volume parts and dump directories are refused.
//!
//! The reader takes no byte from its source ahead of need, so that the caller can count, hash or
//! copy them; it reads in blocks of 512 and so wants a buffered source.

use std::ffi::OsStr;
use std::io::{self, BufRead, Read};
use std::os::unix::ffi::OsStrExt;

use super::header::{self, BLOCK, Block, Dialect, Header, MAX_OCTAL_11};
use super::pax::{self, Pax};
use super::sparse::{self, ContentMap, MapPlace};
use super::{
    Entry, EntryKind, EntryLimits, Extent, Parsed, Reason, Timestamp, normalise, over_path_limit,
    refused,
};
use crate::error::{Error, ErrorKind, Result};
use crate::path::RelPath;

/// Reads the entries of one archive, in order.
#[derive(Debug)]
pub(crate) struct EntryReader<R> {
    source: R,
    limits: EntryLimits,
    state: State,
    headers: u64,
    /// Content of the current entry that is still in the source, and the padding behind it.
    remaining: u64,
    padding: u64,
    /// The first byte of the padding that was read last.
    pad: u8,
    /// The name in the last header, for messages.
    name: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Ended,
    Failed,
}

/// What extended headers said about the entry to come.
#[derive(Debug, Default)]
struct Pending {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Option<Pax>,
}

impl<R: Read> EntryReader<R> {
    pub(crate) fn new(source: R, limits: EntryLimits) -> Self {
        EntryReader {
            source,
            limits,
            state: State::Open,
            headers: 0,
            remaining: 0,
            padding: 0,
            pad: 0,
            name: Vec::new(),
        }
    }

    /// The next entry, after what was left unread of the one before; none at the archive's end.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArchive`] for what the module's head tells, [`ErrorKind::LimitExceeded`],
    /// and the source's own. No entry can be read after an error.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>> {
        match self.state {
            State::Open => {}
            State::Ended => return Ok(None),
            State::Failed => {
                return Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    "the archive failed to read before: nothing behind that point can be trusted",
                ));
            }
        }
        let entry = self.advance();
        self.state = match entry {
            Ok(Some(_)) => State::Open,
            Ok(None) => State::Ended,
            Err(_) => State::Failed,
        };
        entry
    }

    /// The content of the current entry: what is stored, the extents alone of a sparse file. An
    /// archive that ends inside it is an error, never an early end.
    pub(crate) fn content(&mut self) -> Content<'_, R> {
        Content { reader: self }
    }

    /// The source, standing behind the archive's trailer if [`EntryReader::next`] gave none.
    pub(crate) fn into_inner(self) -> R {
        self.source
    }

    fn advance(&mut self) -> Result<Option<Entry>> {
        self.skip_content()?;
        let mut pending = Pending::default();
        let mut block = [0; BLOCK];
        loop {
            if !self.read_header(&mut block)? {
                return if pending.is_empty() {
                    Ok(None)
                } else {
                    Err(self.refuse("it ends the archive, but only describes an entry to come"))
                };
            }
            self.headers = self.headers.saturating_add(1);
            if self.headers > self.limits.max_entries {
                return Err(Error::new(
                    ErrorKind::LimitExceeded,
                    format!(
                        "the archive has more than {} entries, the limit",
                        self.limits.max_entries
                    ),
                ));
            }
            self.name = Header::name_of(&block).to_vec();
            let header = Header::decode(&block).map_err(|reason| self.refuse(reason))?;
            self.name.clone_from(&header.name);
            if header.dialect == Dialect::V7 && matches!(header.typeflag, b'x' | b'g' | b'L' | b'K')
            {
                return Err(self.refuse("it is an extended header, in a dialect that has none"));
            }
            match header.typeflag {
                b'x' => {
                    let body = self.extended(&header, self.limits.max_pax_bytes)?;
                    let pax = Pax::decode(&body).map_err(|reason| self.refuse(reason))?;
                    self.keep_one(pending.pax.replace(pax).is_some())?;
                }
                b'g' => {
                    if !pending.is_empty() {
                        return Err(
                            self.refuse("a global header stands between an entry and its own")
                        );
                    }
                    let body = self.extended(&header, self.limits.max_pax_bytes)?;
                    pax::check_global(&body).map_err(|reason| self.refuse(reason))?;
                }
                b'L' => {
                    let name = self.long_name(&header)?;
                    self.keep_one(pending.long_name.replace(name).is_some())?;
                }
                b'K' => {
                    let link = self.long_name(&header)?;
                    self.keep_one(pending.long_link.replace(link).is_some())?;
                }
                _ => return self.entry(&header, &block, pending).map(Some),
            }
        }
    }

    fn keep_one(&self, had_one: bool) -> Result<()> {
        if had_one {
            return Err(self.refuse("two extended headers of one kind stand before an entry"));
        }
        Ok(())
    }

    /// Reads the body of an extended header, within the limit.
    fn extended(&mut self, header: &Header, max: u64) -> Result<Vec<u8>> {
        if header.size > max {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("an extended header of {} bytes is over the limit of {max}", header.size),
            )
            .with_path(OsStr::from_bytes(&header.name)));
        }
        self.expect_content(header.size)?;
        let mut body = Vec::new();
        self.content().read_to_end(&mut body).map_err(|e| self.failed(e))?;
        self.skip_content()?;
        Ok(body)
    }

    /// Reads GNU's long name or link: a string that ends in a NUL, or right before one: GNU tar takes
    /// all up to a NUL, whatever the size.
    fn long_name(&mut self, header: &Header) -> Result<Vec<u8>> {
        let max = u64::try_from(self.limits.max_path).unwrap_or(u64::MAX);
        let mut name = self.extended(header, max.saturating_add(1))?;
        if name.last() == Some(&0) {
            name.pop();
        } else if self.pad != 0 {
            return Err(self.refuse("its long name goes on behind its end"));
        }
        if name.is_empty() || name.contains(&0) {
            return Err(self.refuse("its long name is empty or has a NUL byte"));
        }
        Ok(name)
    }

    /// Puts an entry together.
    fn entry(&mut self, header: &Header, block: &Block, pending: Pending) -> Result<Entry> {
        let mut pax = pending.pax.unwrap_or_default();
        let gnu_name = pending.long_name.clone();
        let long = either(pending.long_name, pax.path.take());
        let long = long.map_err(|reason| self.refuse(reason))?;
        let link = either(pending.long_link, pax.linkpath.take());
        let link = link.map_err(|reason| self.refuse(reason))?;
        if link.is_some() && !matches!(header.typeflag, b'1' | b'2') {
            return Err(self.refuse("it has a long link target, but is not a link"));
        }

        let size = match pax.size {
            None => header.size,
            Some(size) if size == header.size => size,
            Some(size) if size > MAX_OCTAL_11 && matches!(header.size, 0 | MAX_OCTAL_11) => size,
            Some(size) => {
                return Err(self.refuse(format!(
                    "its size is {} in the header and {size} in the PAX record, and readers differ on which to take",
                    header.size
                )));
            }
        };
        let pax_sparse =
            std::mem::take(&mut pax.sparse).resolve().map_err(|reason| self.refuse(reason))?;
        if let Some(name) = pax_sparse.as_ref().and_then(|sparse| sparse.name.as_ref())
            && gnu_name.is_some_and(|gnu| gnu != *name)
        {
            return Err(self.refuse("its GNU long name and that of the sparse file differ"));
        }
        let extended_name = long.is_some();
        let mut raw = long.unwrap_or_else(|| header.name.clone());
        if let Some(name) = pax_sparse.as_ref().and_then(|sparse| sparse.name.clone()) {
            raw = name;
        }
        self.name.clone_from(&raw);
        if pax_sparse.is_some() && !matches!(header.typeflag, b'0' | 0) {
            return Err(self.refuse("it has sparse records, but is not a regular file"));
        }
        if header.typeflag == b'S' && header.dialect != Dialect::Gnu {
            return Err(self.refuse("its type is that of GNU's sparse files, its dialect another"));
        }

        let slashed = raw.ends_with(b"/") || raw.ends_with(b"/.") || raw == b".";
        let is_dir = match header.typeflag {
            b'5' => true,
            0 if header.name.ends_with(b"/") => {
                if header.name.iter().all(|b| *b == b'/') {
                    return Err(
                        self.refuse("its name is a slash alone, which GNU tar takes for a file's")
                    );
                }
                if extended_name || pax_sparse.is_some() {
                    return Err(
                        self.refuse("its header has the name of a directory beside another")
                    );
                }
                true
            }
            _ if slashed => {
                return Err(self.refuse("its name ends in a slash, but it is not a directory"));
            }
            _ => false,
        };
        let path = normalise(&raw, self.limits.max_path)?;
        let kind = if is_dir {
            EntryKind::Directory
        } else {
            let link = link.unwrap_or_else(|| header.link.clone());
            self.kind(header, block, &pax, &link)?
        };
        if !matches!(kind, EntryKind::File { .. }) && size != 0 {
            return Err(self.refuse("it has content, but is not a regular file"));
        }

        self.expect_content(size)?;
        let kind = match (header.typeflag, pax_sparse) {
            (b'S', _) => self.old_sparse(block, size)?,
            (_, Some(sparse)) => {
                let extents = match sparse.map {
                    MapPlace::Records(extents) => extents,
                    MapPlace::Content => self.map_in_content()?,
                };
                sparse_file(extents, sparse.size, self.remaining)
                    .map_err(|reason| self.refuse(reason))?
            }
            (_, None) => match kind {
                EntryKind::File { .. } => EntryKind::File { size, sparse: None },
                other => other,
            },
        };
        let id = |id: u64| {
            u32::try_from(id).map_err(|_| self.refuse("its owner or group is beyond 32 bits"))
        };
        let entry = Entry {
            path,
            kind,
            mode: u32::try_from(header.mode & 0o7777).unwrap_or(0),
            uid: id(pax.uid.unwrap_or(header.uid))?,
            gid: id(pax.gid.unwrap_or(header.gid))?,
            mtime: pax.mtime.unwrap_or(Timestamp { secs: header.mtime, nanos: 0 }),
            atime: pax.atime,
            xattrs: pax.xattrs,
            acl_access: pax.acl_access,
            acl_default: pax.acl_default,
        };
        entry.check().map_err(|reason| self.refuse(reason))?;
        Ok(entry)
    }

    /// What the type flag says; a file's size and map are filled in later.
    fn kind(&self, header: &Header, block: &Block, pax: &Pax, link: &[u8]) -> Result<EntryKind> {
        Ok(match header.typeflag {
            // POSIX: "contiguous" is a regular file where there is no such thing.
            b'0' | 0 | b'7' | b'S' => EntryKind::File { size: 0, sparse: None },
            b'1' => EntryKind::HardLink { target: self.hard_link_target(link)? },
            b'2' => {
                if link.len() > self.limits.max_path {
                    return Err(over_path_limit(link.len(), self.limits.max_path)
                        .with_path(OsStr::from_bytes(&self.name)));
                }
                EntryKind::Symlink { target: link.to_vec() }
            }
            b'3' => {
                let (major, minor) = self.device(header, block, pax)?;
                EntryKind::CharDevice { major, minor }
            }
            b'4' => {
                let (major, minor) = self.device(header, block, pax)?;
                EntryKind::BlockDevice { major, minor }
            }
            b'6' => EntryKind::Fifo,
            other => {
                return Err(self.refuse(format!(
                    "its type {:?} is of no kind that a layer may hold",
                    char::from(other)
                )));
            }
        })
    }

    fn hard_link_target(&self, link: &[u8]) -> Result<RelPath> {
        if link.is_empty() {
            return Err(self.refuse("it is a hard link without a target"));
        }
        normalise(link, self.limits.max_path).map_err(|e| {
            Error::new(e.kind(), "refused the target of the hard link")
                .with_path(OsStr::from_bytes(&self.name))
                .with_source(e)
        })
    }

    fn device(&self, header: &Header, block: &Block, pax: &Pax) -> Result<(u32, u32)> {
        if header.dialect == Dialect::V7 {
            return Err(self.refuse("it is a device, which this dialect has no numbers for"));
        }
        let (major, minor) = Header::device(block).map_err(|reason| self.refuse(reason))?;
        if pax.devmajor.is_some_and(|m| m != major) || pax.devminor.is_some_and(|m| m != minor) {
            return Err(self.refuse("its device number is another in the PAX record"));
        }
        match (u32::try_from(major), u32::try_from(minor)) {
            (Ok(major), Ok(minor)) => Ok((major, minor)),
            _ => Err(self.refuse("its device number is beyond 32 bits")),
        }
    }

    /// Reads an old GNU sparse map: in the header, then in blocks that no size counts.
    fn old_sparse(&mut self, block: &Block, stored: u64) -> Result<EntryKind> {
        let (slots, mut more, size) =
            Header::gnu_sparse(block).map_err(|reason| self.refuse(reason))?;
        let mut extents = Vec::new();
        let open = sparse::old_slots(slots, &mut extents).map_err(|reason| self.refuse(reason))?;
        if more && !open {
            return Err(self.refuse("its sparse map goes on behind its end"));
        }
        let mut bytes = 0;
        let mut next = [0; BLOCK];
        while more {
            self.count_map_block(&mut bytes)?;
            if !self.read_block(&mut next)? {
                return Err(self.truncated());
            }
            more = sparse::old_block(&next, &mut extents).map_err(|reason| self.refuse(reason))?;
        }
        sparse_file(extents, size, stored).map_err(|reason| self.refuse(reason))
    }

    /// Reads a sparse map from the front of the content.
    fn map_in_content(&mut self) -> Result<Vec<Extent>> {
        let mut map = ContentMap::default();
        let mut bytes = 0;
        let mut block = [0; BLOCK];
        loop {
            self.count_map_block(&mut bytes)?;
            if self.remaining < BLOCK as u64 {
                return Err(self.refuse("its sparse map is longer than its content"));
            }
            self.content().read_exact(&mut block).map_err(|e| self.failed(e))?;
            if let Some(extents) = map.feed(&block).map_err(|reason| self.refuse(reason))? {
                return Ok(extents);
            }
        }
    }

    fn count_map_block(&self, bytes: &mut u64) -> Result<()> {
        *bytes += BLOCK as u64;
        if *bytes > self.limits.max_pax_bytes {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("a sparse map is over the limit of {} bytes", self.limits.max_pax_bytes),
            )
            .with_path(OsStr::from_bytes(&self.name)));
        }
        Ok(())
    }

    /// Reads the next header into `block`; false at the archive's end.
    fn read_header(&mut self, block: &mut Block) -> Result<bool> {
        if !self.read_block(block)? {
            return Ok(false);
        }
        if !header::is_zero(block) {
            return Ok(true);
        }
        if self.read_block(block)? && !header::is_zero(block) {
            return Err(Error::new(
                ErrorKind::InvalidArchive,
                "the archive goes on behind a single zero block, where some readers stop; the last entry is",
            )
            .with_path(OsStr::from_bytes(&self.name)));
        }
        Ok(false)
    }

    /// Fills `block`; false if the input ends right before it.
    fn read_block(&mut self, block: &mut Block) -> Result<bool> {
        let mut filled = 0;
        while let Some(space @ [_, ..]) = block.get_mut(filled..) {
            match self.source.read(space) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(self.truncated()),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(true)
    }

    fn expect_content(&mut self, size: u64) -> Result<()> {
        if size > super::MAX_FILE {
            return Err(self.refuse("its size is beyond that of any file"));
        }
        self.remaining = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    fn skip_content(&mut self) -> Result<()> {
        io::copy(&mut self.content(), &mut io::sink()).map(drop).map_err(|e| self.failed(e))?;
        let mut padding = [0; BLOCK];
        self.pad = 0;
        let mut first = true;
        while self.padding > 0 {
            let most = usize::try_from(self.padding).unwrap_or(BLOCK).min(BLOCK);
            match self.source.read(padding.get_mut(..most).unwrap_or_default()) {
                // The last entry is whole without it; some writers leave it out.
                Ok(0) => self.padding = 0,
                Ok(n) => {
                    if std::mem::take(&mut first) {
                        self.pad = padding.first().copied().unwrap_or(0);
                    }
                    self.padding = self.padding.saturating_sub(n as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }

    fn refuse(&self, reason: impl Into<Reason>) -> Error {
        refused(OsStr::from_bytes(&self.name), reason.into())
    }

    fn truncated(&self) -> Error {
        Error::new(ErrorKind::InvalidArchive, "the archive ends in the middle of the entry")
            .with_path(OsStr::from_bytes(&self.name))
    }

    /// The source's error; one of ours that came through `Content` is handed on as it is.
    fn failed(&self, e: io::Error) -> Error {
        match e.downcast::<Error>() {
            Ok(own) => own,
            Err(e) => Error::io("read the archive at the entry", OsStr::from_bytes(&self.name), e),
        }
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.long_name.is_none() && self.long_link.is_none() && self.pax.is_none()
    }
}

/// GNU's and PAX's word on the same thing.
fn either(gnu: Option<Vec<u8>>, pax: Option<Vec<u8>>) -> Parsed<Option<Vec<u8>>> {
    match (gnu, pax) {
        (Some(gnu), Some(pax)) if gnu != pax => {
            Err("its GNU long name and its PAX path differ".into())
        }
        (gnu, pax) => Ok(gnu.or(pax)),
    }
}

fn sparse_file(extents: Vec<Extent>, size: u64, stored: u64) -> Parsed<EntryKind> {
    Ok(EntryKind::File { size, sparse: Some(sparse::checked(extents, size, stored)?) })
}

/// The content of one entry.
#[derive(Debug)]
pub(crate) struct Content<'a, R> {
    reader: &'a mut EntryReader<R>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let reader = &mut *self.reader;
        let want = usize::try_from(reader.remaining).map_or(buf.len(), |n| n.min(buf.len()));
        let Some(space @ [_, ..]) = buf.get_mut(..want) else {
            return Ok(0);
        };
        let n = reader.source.read(space)?;
        if n == 0 {
            return Err(reader.truncated().into());
        }
        reader.remaining = reader.remaining.saturating_sub(u64::try_from(n).unwrap_or(u64::MAX));
        Ok(n)
    }
}

/// What the source has in its buffer, without a copy.
impl<R: BufRead> BufRead for Content<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.reader.remaining == 0 {
            return Ok(&[]);
        }
        // Looked at twice, since the error cannot be made while the buffer is borrowed.
        if self.reader.source.fill_buf()?.is_empty() {
            return Err(self.reader.truncated().into());
        }
        let buffer = self.reader.source.fill_buf()?;
        let most = usize::try_from(self.reader.remaining).unwrap_or(usize::MAX);
        Ok(buffer.get(..most.min(buffer.len())).unwrap_or_default())
    }

    fn consume(&mut self, n: usize) {
        self.reader.source.consume(n);
        self.reader.remaining =
            self.reader.remaining.saturating_sub(u64::try_from(n).unwrap_or(u64::MAX));
    }
}
