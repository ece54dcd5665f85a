//! An archive from its record and the layer that it was unpacked into.
//!
//! Each content is read from the one file that it is in, found name by name without following
//! anything, and held to its CRC-32; the whole is held to the archive's digest, which is worked out on
//! another thread, while this one reads and writes. By the time that something is found wrong bytes
//! are out: a writer must not publish them before [`replay()`] has returned.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use super::codec::{Content, FilePart, Kept, KeptReader, Op, OpReader};
use super::ends::{FOOTER, Footer, HEAD, check_head};
use crate::archive::entry::{Extent, Sink as _};
use crate::archive::output::Output;
use crate::compression::Decompressor;
use crate::digest::DiffId;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::descent::{Descent, Purpose};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::dir::Dir;

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
        let mut replay = Replay {
            walk: Descent::new(root, Purpose::Look).at("open", "the layer")?,
            operations: OpReader::new(stream(record, HEAD as u64, footer.operations)?),
            kept,
            next_kept,
            out: Output::new(out, (threads > 1).then_some(scope)),
            total: footer.bytes,
            left: footer.bytes,
            done,
            progress,
        };
        replay.run()?;
        replay.out.finish()
    })?;
    let found = DiffId::from(found);
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
struct Replay<'a, 'scope, 'env, 'p> {
    walk: Descent<()>,
    operations: OpReader<Stream<'a>>,
    kept: KeptReader<Stream<'a>>,
    /// The next content that is not at its path.
    next_kept: Option<(u64, Kept)>,
    out: Output<'scope, 'env, 'a>,
    /// Bytes of the archive, and those still to come.
    total: u64,
    left: u64,
    done: Progress,
    progress: &'a mut ProgressFn<'p>,
}

impl Replay<'_, '_, '_, '_> {
    fn run(&mut self) -> Result<()> {
        let mut literal = Vec::new();
        let mut contents = 0;
        loop {
            match self.operations.next(&mut literal)? {
                Op::Literal(_) => {
                    self.count(literal.len() as u64)?;
                    self.write(&literal)?;
                }
                Op::Zeros(count) => {
                    self.count(count)?;
                    copy(&mut self.out, &mut io::repeat(0), count)
                        .map_err(|e| failed("write", "the archive", e))?;
                }
                Op::Content(content) => {
                    self.count(content.part.stored())?;
                    self.content(contents, &content)?;
                    contents += 1;
                    self.done.entries = contents;
                    self.done.bytes = self.total.saturating_sub(self.left);
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

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| failed("write", "the archive", e))
    }

    fn copy_kept(&mut self, len: u64, content: &Content) -> Result<u32> {
        let path = &content.path;
        let mut kept = Summed::new(&mut self.kept);
        let copied = len == content.part.stored() && {
            let copied = copy(&mut self.out, &mut kept, len);
            copied.map_err(|e| failed("copy what the record has of", path, e))?
        };
        if copied { Ok(kept.crc.sum()) } else { Err(changed(path)) }
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
            let mut stretch = Summed { inner: Part { file: &file, at: *offset, left: *len }, crc };
            let copied = copy(&mut self.out, &mut stretch, *len);
            if !copied.map_err(|e| failed("copy to the archive", path, e))? {
                return Err(changed(path));
            }
            crc = stretch.crc;
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

/// What is read through it is added to the checksum.
struct Summed<R> {
    inner: R,
    crc: flate2::Crc,
}

impl<R> Summed<R> {
    fn new(inner: R) -> Self {
        Summed { inner, crc: flate2::Crc::new() }
    }
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.crc.update(buf.get(..n).unwrap_or_default());
        Ok(n)
    }
}

/// Copies `len` bytes of `content`; false if there are not so many.
fn copy(out: &mut Output<'_, '_, '_>, content: &mut dyn Read, len: u64) -> io::Result<bool> {
    let mut left = len;
    while left > 0 {
        match out.take_from(content, left) {
            Ok((0, _)) => return Ok(false),
            Ok((n, _)) => left = left.saturating_sub(n as u64),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// This crate's own error as it is.
fn failed(op: &'static str, path: impl AsRef<Path>, e: io::Error) -> Error {
    e.downcast::<Error>().unwrap_or_else(|e| Error::io(op, path, e))
}
