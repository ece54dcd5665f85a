//! Writing a record while an archive is unpacked.
//!
//! [`Tapped`] stands between the archive and its reader, and hands on every byte that passes. Since
//! the reader of entries takes none ahead of need, whoever unpacks an entry can say right before its
//! content where that goes ([`Capture::content_at`]); all other bytes are taken as they are.
//!
//! Invariants:
//! - What is not said to go anywhere is in the record literally: forgetting a case costs room.
//! - A file's content never changes once it is there; it can only be lost with its name, and before a
//!   name goes, [`Capture::lose`] is called. So at the end the layer has every content at its path,
//!   or it was kept.
//! - Memory: a hash of the path and a number for each content (at most 59 bytes while the table
//!   grows), 16 bytes more for each sparse file and 32 for each that was kept; all else is in a file
//!   without a name.
//! - Beyond a bound, or where something cannot be said, everything is given up at once and the reason
//!   kept. That never makes the unpacking fail; a failure of the disk does.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};
use std::io::{self, BufRead, BufWriter, IntoInnerError, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::RecordOptions;
use super::codec::{FilePart, Kept, KeptWriter, MAX_EXTENTS, MAX_LITERAL, MAX_PATH, OpWriter};
use super::ends::{self, Footer, HEAD};
use super::spool::{BUFFER, Bounded, Spool};
use crate::archive::entry::Extent;
use crate::compression::Compressor;
use crate::digest::DiffId;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;

/// The stretch in which zeros are looked for, in bytes: a header is mostly zeros.
const STRETCH: usize = 32;
/// How much is gathered before it is written as a literal, in bytes.
const GATHERED: usize = MAX_LITERAL / 2;

/// Whether there is a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Captured {
    Record,
    /// There is none, and why.
    Nothing(String),
}

/// Operations are small, and gathered before they are compressed.
type Stream = BufWriter<Compressor<Bounded>>;

/// A record being written.
#[derive(Debug)]
pub(crate) struct Capture {
    dir: Dir,
    name: Name,
    options: RecordOptions,
    state: State,
}

#[derive(Debug)]
enum State {
    Writing(Box<Writing>),
    GivenUp(String),
    Failed(io::Error),
}

#[derive(Debug)]
struct Writing {
    out: OpWriter<Stream>,
    /// What is not written yet: a literal, and then zeros.
    literal: Vec<u8>,
    zeros: u64,
    /// The content that is passing.
    content: Option<Passing>,
    /// How many contents there were.
    contents: u32,
    /// By the hash of a path, the number of the content that is there.
    places: HashMap<u64, u32, BuildHasherDefault<Hashed>>,
    hasher: RandomState,
    /// The sparse ones: number, and where in the spool how many extents are.
    sparse: Vec<(u32, u32, u64)>,
    spool: Spool,
    kept: Vec<KeptAt>,
    /// Bytes that the layer does not have.
    inline: u64,
    /// Whether the archive's last entry has passed.
    trailing: bool,
}

#[derive(Debug)]
struct Passing {
    path: RelPath,
    part: FilePart,
    left: u64,
    crc: flate2::Crc,
}

/// A content that is not at its path, or will not be: in the spool are its bytes, or a path.
#[derive(Clone, Copy, Debug)]
struct KeptAt {
    content: u32,
    what: Spooled,
    at: u64,
    len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spooled {
    Bytes,
    Path,
}

/// Why a record is not written on.
enum Stop {
    GiveUp(String),
    Fail(io::Error),
}

impl From<io::Error> for Stop {
    /// The file's own bound is no failure.
    fn from(e: io::Error) -> Self {
        match e.downcast::<Error>() {
            Ok(own) if own.kind() == ErrorKind::LimitExceeded => Stop::GiveUp(own.to_string()),
            Ok(own) => Stop::Fail(own.into()),
            Err(e) => Stop::Fail(e),
        }
    }
}

type Step<T = ()> = std::result::Result<T, Stop>;

impl Capture {
    /// Begins a record, the file `name` in `dir`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn new(dir: &Dir, name: Name, options: RecordOptions) -> Result<Self> {
        let dir = dir.try_clone().at("open directory of record", &name)?;
        if options.max_bytes == 0 {
            let state = State::GivenUp("none was to be written: max_bytes is 0".into());
            return Ok(Capture { dir, name, options, state });
        }
        let begin = || -> io::Result<OpWriter<Stream>> {
            let file = dir.create_file(&name, 0o600)?;
            let mut file = Bounded { file: BufWriter::new(file), written: 0, max: u64::MAX };
            ends::write_head(&mut file)?;
            file.max = options.max_bytes;
            Ok(OpWriter::new(BufWriter::with_capacity(BUFFER, Compressor::fastest(file)?)))
        };
        let writing = Writing {
            out: begin().at("create record", &name)?,
            literal: Vec::with_capacity(MAX_LITERAL),
            zeros: 0,
            content: None,
            contents: 0,
            places: HashMap::default(),
            hasher: RandomState::new(),
            sparse: Vec::new(),
            spool: Spool::default(),
            kept: Vec::new(),
            inline: 0,
            trailing: false,
        };
        Ok(Capture { dir, name, options, state: State::Writing(Box::new(writing)) })
    }

    /// Whether anything would be lost with a file: nothing is if there is no content yet, or the
    /// record was given up.
    pub(crate) fn has_content(&self) -> bool {
        matches!(&self.state, State::Writing(writing) if !writing.places.is_empty())
    }

    fn step(&mut self, step: impl FnOnce(&mut Writing, &RecordOptions, &Dir) -> Step) {
        if let State::Writing(writing) = &mut self.state {
            match step(writing, &self.options, &self.dir) {
                Ok(()) => {}
                Err(Stop::GiveUp(reason)) => {
                    tracing::debug!(reason, "no record of the archive");
                    self.state = State::GivenUp(reason);
                }
                Err(Stop::Fail(e)) => self.state = State::Failed(e),
            }
        }
    }

    /// Takes the next bytes of the archive.
    fn pass(&mut self, bytes: &[u8]) {
        self.step(|writing, options, _| writing.pass(bytes, options));
    }

    /// Says that the content that comes next goes to the file `path`: all of the file, or these
    /// extents of it.
    pub(crate) fn content_at(&mut self, path: RelPath, size: u64, extents: Option<&[Extent]>) {
        self.step(|writing, _, dir| writing.content_at(path, size, extents, dir));
    }

    /// Says that so many bytes of content come next that the layer will not have.
    pub(crate) fn inline(&mut self, bytes: u64) {
        self.step(|writing, options, _| writing.charge(bytes, options));
    }

    /// Says that the file `from` is the same as `to`, where its content is found from now on.
    pub(crate) fn found_at(&mut self, from: &RelPath, to: &RelPath) {
        self.step(|writing, _, dir| writing.found_at(from, to, dir));
    }

    /// Keeps the content of the file `path`, whose name is about to go, if it is one of the archive.
    ///
    /// # Errors
    /// Those of `open` and of reading.
    pub(crate) fn lose(
        &mut self,
        path: &RelPath,
        open: impl FnOnce() -> io::Result<File>,
    ) -> Result<()> {
        let mut read = Ok(());
        self.step(|writing, options, dir| {
            let Some(content) = writing.places.remove(&writing.hash(path)) else {
                return Ok(());
            };
            match open() {
                Ok(file) => writing.keep(content, &file, options, dir),
                Err(e) => {
                    read = Err(e);
                    Ok(())
                }
            }
        });
        read.at("keep the content of", path)
    }

    /// Says that the last entry has passed.
    pub(crate) fn entries_ended(&mut self) {
        self.step(|writing, _, _| {
            writing.trailing = true;
            Ok(())
        });
    }

    /// Finishes the record of an archive that was read to its end.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn finish(mut self, diff_id: DiffId, bytes: u64, entries: u64) -> Result<Captured> {
        let ended = match std::mem::replace(&mut self.state, State::GivenUp(String::new())) {
            State::Writing(writing) => writing.finish(diff_id, bytes, entries),
            State::GivenUp(reason) => Err(Stop::GiveUp(reason)),
            State::Failed(e) => Err(Stop::Fail(e)),
        };
        match ended {
            Ok(()) => Ok(Captured::Record),
            Err(Stop::Fail(e)) => Err(e).at("write record", &self.name),
            Err(Stop::GiveUp(reason)) => {
                match self.dir.unlink(&self.name) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    done => done.at("remove unfinished record", &self.name)?,
                }
                Ok(Captured::Nothing(reason))
            }
        }
    }
}

impl Writing {
    fn hash(&self, path: &RelPath) -> u64 {
        self.hasher.hash_one(path.as_bytes())
    }

    fn pass(&mut self, mut bytes: &[u8], options: &RecordOptions) -> Step {
        if let Some(content) = &mut self.content {
            let most = usize::try_from(content.left).unwrap_or(usize::MAX).min(bytes.len());
            let (part, rest) = bytes.split_at_checked(most).unwrap_or((bytes, &[]));
            content.crc.update(part);
            content.left -= part.len() as u64;
            bytes = rest;
            if content.left == 0 {
                self.content_passed()?;
            }
        }
        if self.trailing {
            let literal = bytes.chunks(STRETCH).filter(|part| !is_zero(part));
            self.charge(literal.map(|part| part.len() as u64).sum(), options)?;
        }
        for part in bytes.chunks(STRETCH) {
            if is_zero(part) {
                self.zeros += part.len() as u64;
                continue;
            }
            if self.zeros > 0 {
                self.write_zeros()?;
            }
            if self.literal.len() >= GATHERED {
                self.write_literal()?;
            }
            self.literal.extend_from_slice(part);
        }
        Ok(())
    }

    /// Writes zeros that something follows; a few are literal.
    fn write_zeros(&mut self) -> Step {
        let zeros = std::mem::take(&mut self.zeros);
        if zeros < STRETCH as u64 {
            let len = self.literal.len() + usize::try_from(zeros).unwrap_or(0);
            self.literal.resize(len, 0);
        } else {
            self.write_literal()?;
            self.out.zeros(zeros)?;
        }
        Ok(())
    }

    fn write_literal(&mut self) -> Step {
        if !self.literal.is_empty() {
            self.out.literal(&self.literal)?;
            self.literal.clear();
        }
        Ok(())
    }

    fn content_at(
        &mut self,
        path: RelPath,
        size: u64,
        extents: Option<&[Extent]>,
        dir: &Dir,
    ) -> Step {
        let part = match extents {
            None => FilePart::Whole(size),
            Some(extents) => FilePart::Extents(extents.to_vec()),
        };
        let left = part.stored();
        if left == 0 {
            return Ok(());
        }
        let give_up = |what: &str| {
            let path = path.as_path();
            Err(Stop::GiveUp(format!("the file {path:?} {what}")))
        };
        if path.as_bytes().len() > MAX_PATH {
            return give_up("has a path of more than 64 KiB");
        }
        if let FilePart::Extents(extents) = &part {
            if extents.len() > MAX_EXTENTS {
                return give_up("has more than 1048576 extents");
            }
            let at = self.spool.end();
            for extent in extents {
                self.spool.append(dir, &extent.offset.to_le_bytes())?;
                self.spool.append(dir, &extent.len.to_le_bytes())?;
            }
            let count = u32::try_from(extents.len()).unwrap_or(u32::MAX);
            self.sparse.push((self.contents, count, at));
        }
        // Whatever was there before has gone, and was kept.
        if self.places.insert(self.hash(&path), self.contents).is_some() {
            return give_up("has the content of two entries");
        }
        let Some(contents) = self.contents.checked_add(1) else {
            return give_up("is one of more than 2^32");
        };
        self.contents = contents;
        self.content = Some(Passing { path, part, left, crc: flate2::Crc::new() });
        Ok(())
    }

    fn content_passed(&mut self) -> Step {
        self.write_zeros()?;
        self.write_literal()?;
        if let Some(Passing { path, part, crc, .. }) = self.content.take() {
            self.out.content(path.as_bytes(), &part, crc.sum())?;
        }
        Ok(())
    }

    fn charge(&mut self, bytes: u64, options: &RecordOptions) -> Step {
        self.inline = self.inline.saturating_add(bytes);
        let max = options.max_inline_bytes;
        if self.inline > max {
            return Err(Stop::GiveUp(format!(
                "the archive has more than {max} bytes that the layer does not have (files that it \
                 replaces or deletes itself, data behind its end): the bound max_inline_bytes"
            )));
        }
        Ok(())
    }

    fn found_at(&mut self, from: &RelPath, to: &RelPath, dir: &Dir) -> Step {
        let Some(content) = self.places.remove(&self.hash(from)) else {
            return Ok(());
        };
        if to.as_bytes().len() > MAX_PATH {
            let to = to.as_path();
            return Err(Stop::GiveUp(format!("the file {to:?} has a path of more than 64 KiB")));
        }
        self.places.insert(self.hash(to), content);
        let at = self.spool.append(dir, to.as_bytes())?;
        let len = to.as_bytes().len() as u64;
        self.kept.push(KeptAt { content, what: Spooled::Path, at, len });
        Ok(())
    }

    /// Copies a content into the spool.
    fn keep(&mut self, content: u32, file: &File, options: &RecordOptions, dir: &Dir) -> Step {
        let extents = match self.sparse.binary_search_by_key(&content, |(index, ..)| *index) {
            Ok(found) => self.extents(found)?,
            Err(_) => vec![Extent { offset: 0, len: file.metadata()?.len() }],
        };
        let len = extents.iter().fold(0, |sum: u64, e| sum.saturating_add(e.len));
        self.charge(len, options)?;
        let at = self.spool.end();
        let mut buffer = vec![0; BUFFER];
        for Extent { mut offset, len } in extents {
            let mut left = len;
            while left > 0 {
                let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                let part = buffer.get_mut(..most).unwrap_or_default();
                file.read_exact_at(part, offset)?;
                self.spool.append(dir, part)?;
                offset += part.len() as u64;
                left -= part.len() as u64;
            }
        }
        self.kept.push(KeptAt { content, what: Spooled::Bytes, at, len });
        Ok(())
    }

    /// The extents of a sparse content.
    fn extents(&self, found: usize) -> io::Result<Vec<Extent>> {
        let Some((_, count, at)) = self.sparse.get(found) else {
            return Ok(Vec::new());
        };
        let mut bytes = vec![0; usize::try_from(*count).unwrap_or(0) * 16];
        self.spool.read(&mut bytes, *at)?;
        let (pairs, _) = bytes.as_chunks::<16>();
        let number = |half: &[u8]| half.as_chunks().0.first().map_or(0, |n| u64::from_le_bytes(*n));
        Ok(pairs
            .iter()
            .map(|pair| pair.split_at(8))
            .map(|(offset, len)| Extent { offset: number(offset), len: number(len) })
            .collect())
    }

    fn finish(mut self, diff_id: DiffId, bytes: u64, entries: u64) -> Step {
        if let Some(content) = &self.content {
            let path = content.path.as_path();
            return Err(Stop::GiveUp(format!("the content of {path:?} was not read to its end")));
        }
        self.write_literal()?;
        if self.zeros > 0 {
            self.out.zeros(self.zeros)?;
        }
        let out = self.out.finish()?.into_inner().map_err(IntoInnerError::into_error)?;
        let file = out.finish()?;
        let operations = file.written.saturating_sub(HEAD as u64);
        let mut out = KeptWriter::new(Compressor::fastest(file).map_err(io::Error::from)?);
        // The last that was said of a content counts.
        self.kept.sort_by_key(|kept| kept.content);
        for (n, kept) in self.kept.iter().enumerate() {
            let next = self.kept.get(n + 1).map(|next| next.content);
            if next == Some(kept.content) {
                continue;
            }
            let index = u64::from(kept.content);
            match kept.what {
                Spooled::Bytes => {
                    out.put(index, &Kept::Bytes(kept.len))?;
                    self.spool.copy(kept.at, kept.len, out.bytes())?;
                }
                Spooled::Path => {
                    let mut path = Vec::new();
                    self.spool.copy(kept.at, kept.len, &mut path)?;
                    let path = RelPath::new(OsStr::from_bytes(&path)).map_err(io::Error::from)?;
                    out.put(index, &Kept::At(path))?;
                }
            }
        }
        let mut file = out.finish()?.finish()?;
        let kept = file.written.saturating_sub(operations).saturating_sub(HEAD as u64);
        let footer = Footer { operations, kept, bytes, entries, diff_id };
        file.write_all(&footer.encode())?;
        file.flush()?;
        Ok(())
    }
}

/// The hash of what is a hash already.
#[derive(Debug, Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// Whether these bytes, a stretch at most, are all zero.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}

/// Both [`Tapped`] and whoever reads through it have a capture: on one thread, so nobody waits.
pub(crate) fn locked(capture: &Mutex<Capture>) -> MutexGuard<'_, Capture> {
    capture.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An archive on its way to its reader.
#[derive(Debug)]
pub(crate) struct Tapped<'c, R> {
    inner: R,
    capture: Option<&'c Mutex<Capture>>,
}

impl<'c, R> Tapped<'c, R> {
    pub(crate) fn new(inner: R, capture: Option<&'c Mutex<Capture>>) -> Self {
        Tapped { inner, capture }
    }
}

impl<R: Read> Read for Tapped<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        if let Some(capture) = self.capture {
            locked(capture).pass(buf.get(..n).unwrap_or_default());
        }
        Ok(n)
    }
}

impl<R: BufRead> BufRead for Tapped<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        if let Some(capture) = self.capture
            && let Ok(bytes) = self.inner.fill_buf()
        {
            locked(capture).pass(bytes.get(..amount).unwrap_or_default());
        }
        self.inner.consume(amount);
    }
}
