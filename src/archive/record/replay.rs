//! An archive from its record and the layer that it was unpacked into.
//!
//! Each content is read from the one file that it is in, found name by name without following
//! anything, and held to its CRC-32; the whole is held to the archive's digest, which is worked out on
//! another thread, while this one reads and writes. By the time that something is found wrong bytes
//! are out: a writer must not publish them before [`replay()`] has returned.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, ScopedJoinHandle};

use super::codec::{Content, FilePart, Kept, KeptReader, Op, OpReader};
use super::ends::{FOOTER, Footer, HEAD, check_head};
use crate::archive::entry::Extent;
use crate::compression::Decompressor;
use crate::digest::{DiffId, Hashing};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::descent::{Descent, Purpose};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::dir::Dir;

/// The unit in which bytes are read, written and digested.
const CHUNK: usize = 256 * 1024;
/// How many chunks are under way between the two threads.
const CHUNKS: usize = 4;
/// From which size on, in bytes, an archive is worth a thread.
const THREAD_FROM: u64 = 1 << 20;
/// The unit in which the record is read, in bytes.
const BUFFER: usize = 64 * 1024;

/// What was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replayed {
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
}

/// Writes the archive of digest `diff_id` to `out`; with two threads or more it is digested on one of
/// its own.
///
/// # Errors
/// - [`ErrorKind::Corrupt`], [`ErrorKind::Incompatible`]: of the record.
/// - [`ErrorKind::DigestMismatch`]: a file of the layer is not what it was, and the error names it;
///   or the record is another archive's.
/// - [`ErrorKind::Cancelled`], and those of the file system and of `out`.
pub(crate) fn replay(
    record: &File,
    layer: &Dir,
    diff_id: DiffId,
    out: &mut dyn Write,
    threads: usize,
    progress: &mut ProgressFn<'_>,
) -> Result<Replayed> {
    let footer = ends(record)?;
    if footer.diff_id != diff_id {
        return Err(Error::new(
            ErrorKind::DigestMismatch,
            format!(
                "the record is that of the archive {}, not {diff_id}: import the layer again, or \
                 export it in the canonical form",
                footer.diff_id
            ),
        ));
    }
    let root = layer.reopen().at("open", "the layer")?;
    let mut done = Progress::new(Phase::Export);
    done.total_bytes = Some(footer.bytes);
    let kept_at = (HEAD as u64).saturating_add(footer.operations);
    let mut kept = KeptReader::new(stream(record, kept_at, footer.kept)?);
    let next_kept = kept.next()?;
    let (found, bytes) = thread::scope(|scope| {
        let hasher = if threads < 2 || footer.bytes < THREAD_FROM {
            Hasher::Here(Hashing::new(io::sink()))
        } else {
            Hasher::start(scope)
        };
        let mut replay = Replay {
            walk: Descent::new(root, Purpose::Look).at("open", "the layer")?,
            operations: OpReader::new(stream(record, HEAD as u64, footer.operations)?),
            kept,
            next_kept,
            out: Chunks { out, hasher, chunk: vec![0; CHUNK], filled: 0, written: 0 },
            left: footer.bytes,
            done,
            progress,
        };
        replay.run()?;
        replay.out.finish()
    })?;
    if found != diff_id || bytes != footer.bytes {
        return Err(Error::new(
            ErrorKind::DigestMismatch,
            format!(
                "record and layer give an archive with the digest {found}, not {diff_id}: import \
                 the layer again, or export it in the canonical form"
            ),
        ));
    }
    Ok(Replayed { bytes, entries: footer.entries })
}

/// Reads the two ends of a record.
fn ends(record: &File) -> Result<Footer> {
    let corrupt = |e: io::Error| {
        if e.kind() == io::ErrorKind::UnexpectedEof {
            return Error::new(
                ErrorKind::Corrupt,
                "the record is cut short: import the layer again, or export it in the canonical form",
            );
        }
        Error::new(ErrorKind::Io, "cannot read the record").with_source(e)
    };
    let mut head = [0; HEAD];
    record.read_exact_at(&mut head, 0).map_err(corrupt)?;
    check_head(&head)?;
    let size = record.metadata().map_err(corrupt)?.len();
    let at = size.saturating_sub(FOOTER as u64).max(HEAD as u64);
    let mut footer = [0; FOOTER];
    record.read_exact_at(&mut footer, at).map_err(corrupt)?;
    let footer = Footer::decode(&footer)?;
    let end = footer.operations.checked_add(footer.kept).and_then(|n| n.checked_add(HEAD as u64));
    if end != Some(at) {
        return Err(corrupt(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(footer)
}

/// A part of a file, read without its cursor.
#[derive(Debug)]
struct Part<'f> {
    file: &'f File,
    at: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let n = self.file.read_at(buf.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at = self.at.saturating_add(n as u64);
        self.left = self.left.saturating_sub(n as u64);
        Ok(n)
    }
}

type Stream<'f> = BufReader<Decompressor<Part<'f>>>;

fn stream(file: &File, at: u64, left: u64) -> Result<Stream<'_>> {
    let stream = Decompressor::new(Part { file, at, left })?;
    Ok(BufReader::with_capacity(BUFFER, stream))
}

/// An archive being given back.
struct Replay<'a, 's, 'p> {
    walk: Descent<()>,
    operations: OpReader<Stream<'a>>,
    kept: KeptReader<Stream<'a>>,
    /// The next content that is not at its path.
    next_kept: Option<(u64, Kept)>,
    out: Chunks<'a, 's>,
    /// Bytes of the archive that are still to come.
    left: u64,
    done: Progress,
    progress: &'a mut ProgressFn<'p>,
}

impl Replay<'_, '_, '_> {
    fn run(&mut self) -> Result<()> {
        let mut literal = Vec::new();
        let mut contents = 0;
        loop {
            match self.operations.next(&mut literal)? {
                Op::Literal(_) => {
                    self.count(literal.len() as u64)?;
                    self.out.put(&literal)?;
                }
                Op::Zeros(count) => {
                    self.count(count)?;
                    self.out.zeros(count)?;
                }
                Op::Content(content) => {
                    self.count(content.part.stored())?;
                    self.content(contents, &content)?;
                    contents += 1;
                    self.done.entries = contents;
                    self.done.bytes = self.out.written;
                    report(self.progress, self.done)?;
                }
                Op::End => break,
            }
        }
        if self.next_kept.is_some() || self.left > 0 {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the record is damaged (its parts do not fit): import the layer again, or export \
                 it in the canonical form",
            ));
        }
        Ok(())
    }

    /// Sees to it that no more comes out than the archive had, whatever lengths a record claims.
    fn count(&mut self, bytes: u64) -> Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                "the record is damaged (it gives more than the archive had): import the layer \
                 again, or export it in the canonical form",
            )
        })?;
        Ok(())
    }

    fn content(&mut self, index: u64, content: &Content) -> Result<()> {
        let crc = match self.next_kept.take_if(|(next, _)| *next == index) {
            None => self.copy_file(&content.path, &content.part)?,
            Some((_, kept)) => {
                let crc = match kept {
                    Kept::At(path) => self.copy_file(&path, &content.part)?,
                    Kept::Bytes(len) => self.copy_kept(len, content)?,
                };
                self.next_kept = self.kept.next()?;
                crc
            }
        };
        if crc == content.crc { Ok(()) } else { Err(changed(&content.path)) }
    }

    fn copy_kept(&mut self, len: u64, content: &Content) -> Result<u32> {
        if len != content.part.stored() {
            return Err(changed(&content.path));
        }
        let (kept, mut crc) = (&mut self.kept, flate2::Crc::new());
        self.out.fill(len, &mut crc, |space| {
            kept.read_exact(space)?;
            Ok(space.len())
        })?;
        Ok(crc.sum())
    }

    /// Reads a file of the layer; what keeps it from being there and a file means that it was changed.
    fn copy_file(&mut self, path: &RelPath, part: &FilePart) -> Result<u32> {
        let gone = |e: io::Error| {
            // The latter is what an open gives that finds something else.
            let other = e.kind() == io::ErrorKind::InvalidInput;
            let e = Error::io("open", path, e);
            match e.kind() {
                ErrorKind::NotFound | ErrorKind::InvalidArgument => changed(path).with_source(e),
                _ if other => changed(path).with_source(e),
                _ => e,
            }
        };
        let Some(name) = path.file_name() else {
            return Err(changed(path));
        };
        self.go_to(&path.parent().unwrap_or_default()).map_err(gone)?;
        let file = self.walk.dir().open_file(&name).map_err(gone)?;
        let extents: &[Extent] = match part {
            FilePart::Extents(extents) => extents,
            FilePart::Whole(len) => {
                if file.metadata().at("look at", path)?.len() != *len {
                    return Err(changed(path));
                }
                &[Extent { offset: 0, len: *len }]
            }
        };
        let mut crc = flate2::Crc::new();
        for Extent { offset, len } in extents {
            let mut at = *offset;
            self.out.fill(*len, &mut crc, |space| {
                loop {
                    match file.read_at(space, at) {
                        Ok(0) => return Err(changed(path)),
                        Ok(n) => {
                            at = at.saturating_add(n as u64);
                            return Ok(n);
                        }
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) => return Err(Error::io("read", path, e)),
                    }
                }
            })?;
        }
        Ok(crc.sum())
    }

    /// Goes to the directory `path`; no symlink leads there.
    fn go_to(&mut self, path: &RelPath) -> io::Result<()> {
        let names: Vec<Name> = path.components().collect();
        let common = self.walk.names().zip(&names).take_while(|(a, b)| a == b).count();
        while self.walk.depth() > common {
            self.walk.leave()?;
        }
        for name in names.iter().skip(common) {
            self.walk.enter(name)?;
        }
        Ok(())
    }
}

/// The error for a file that is not what was unpacked.
fn changed(path: &RelPath) -> Error {
    Error::new(
        ErrorKind::DigestMismatch,
        "the layer was changed after it was unpacked: import it again, or export it in the canonical \
         form; what differs is",
    )
    .with_path(path)
}

/// What comes out, in chunks: each is written, and then digested.
struct Chunks<'a, 's> {
    out: &'a mut dyn Write,
    hasher: Hasher<'s>,
    chunk: Vec<u8>,
    filled: usize,
    /// Bytes so far.
    written: u64,
}

impl Chunks<'_, '_> {
    /// Puts in `len` bytes that `read` gives, some of them a call, and adds them to `crc`.
    fn fill(
        &mut self,
        len: u64,
        crc: &mut flate2::Crc,
        mut read: impl FnMut(&mut [u8]) -> Result<usize>,
    ) -> Result<()> {
        let mut left = len;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX);
            let space = self.space(most)?;
            let n = read(space)?;
            crc.update(space.get(..n).unwrap_or_default());
            self.filled += n;
            left = left.saturating_sub(n as u64);
        }
        Ok(())
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let space = self.space(bytes.len())?;
            let (part, rest) = bytes.split_at_checked(space.len()).unwrap_or((bytes, &[]));
            space.copy_from_slice(part);
            self.filled += part.len();
            bytes = rest;
        }
        Ok(())
    }

    fn zeros(&mut self, mut count: u64) -> Result<()> {
        while count > 0 {
            let space = self.space(usize::try_from(count).unwrap_or(usize::MAX))?;
            space.fill(0);
            let n = space.len();
            self.filled += n;
            count = count.saturating_sub(n as u64);
        }
        Ok(())
    }

    /// Room in the chunk, at most `most` bytes and at least one.
    fn space(&mut self, most: usize) -> Result<&mut [u8]> {
        if self.filled == self.chunk.len() {
            self.flush()?;
        }
        let end = self.filled.saturating_add(most).min(self.chunk.len());
        Ok(self.chunk.get_mut(self.filled..end).unwrap_or_default())
    }

    fn flush(&mut self) -> Result<()> {
        let bytes = self.chunk.get(..self.filled).unwrap_or_default();
        self.out.write_all(bytes).at("write", "the archive")?;
        self.written = self.written.saturating_add(self.filled as u64);
        self.hasher.take(&mut self.chunk, self.filled)?;
        self.filled = 0;
        Ok(())
    }

    /// Writes the rest; gives the digest and the size of all.
    fn finish(mut self) -> Result<(DiffId, u64)> {
        self.flush()?;
        self.out.flush().at("write the end of", "the archive")?;
        self.hasher.finish()
    }
}

/// Digests chunks: here, or on a thread of its own.
enum Hasher<'s> {
    Here(Hashing<io::Sink>),
    There(There<'s>),
}

struct There<'s> {
    full: SyncSender<(Vec<u8>, usize)>,
    empty: Receiver<Vec<u8>>,
    /// Chunks that there are, beside the one being filled.
    chunks: usize,
    thread: ScopedJoinHandle<'s, io::Result<Hashing<io::Sink>>>,
}

impl<'s> Hasher<'s> {
    fn start(scope: &'s thread::Scope<'s, '_>) -> Self {
        let (full, to_digest) = sync_channel::<(Vec<u8>, usize)>(CHUNKS);
        let (done, empty) = sync_channel(CHUNKS);
        let digest = move || {
            let mut hashing = Hashing::new(io::sink());
            for (chunk, filled) in to_digest {
                hashing.write_all(chunk.get(..filled).unwrap_or_default())?;
                // Nobody wants it back any more: these are the last.
                if done.send(chunk).is_err() {}
            }
            Ok(hashing)
        };
        let thread = thread::Builder::new().name("stratafs-digest".into());
        match thread.spawn_scoped(scope, digest) {
            Ok(thread) => Hasher::There(There { full, empty, chunks: 0, thread }),
            Err(e) => {
                tracing::debug!(error = %e, "digesting without a thread of its own");
                Hasher::Here(Hashing::new(io::sink()))
            }
        }
    }

    /// Digests the bytes of a chunk, and puts another in its place.
    fn take(&mut self, chunk: &mut Vec<u8>, filled: usize) -> Result<()> {
        match self {
            Hasher::Here(hashing) => {
                let bytes = chunk.get(..filled).unwrap_or_default();
                hashing.write_all(bytes).at("digest", "the archive")
            }
            Hasher::There(there) => {
                let next = if there.chunks < CHUNKS {
                    there.chunks += 1;
                    vec![0; CHUNK]
                } else {
                    there.empty.recv().map_err(|_| ended())?
                };
                let full = std::mem::replace(chunk, next);
                there.full.send((full, filled)).map_err(|_| ended())
            }
        }
    }

    fn finish(self) -> Result<(DiffId, u64)> {
        let hashing = match self {
            Hasher::Here(hashing) => hashing,
            Hasher::There(There { full, empty, thread, .. }) => {
                drop((full, empty));
                thread.join().map_err(|_| ended())?.at("digest", "the archive")?
            }
        };
        let (_, digest, bytes) = hashing.finish();
        Ok((DiffId::from(digest), bytes))
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Io, "the thread that digests the archive has ended")
}
