//! What a record holds, as bytes: pure functions over any `Read` and `Write`.
//!
//! Numbers are LEB128 in their shortest form, or fixed and little-endian where said. One thing can be
//! written in one way alone, so what is read gives the same bytes when it is written again.
//!
//! | operation | followed by |
//! |---|---|
//! | 0, the end | |
//! | 1, literal | length (1 to [`MAX_LITERAL`]), the bytes |
//! | 2, zeros | how many |
//! | 3, content | path, length (from 1), CRC-32 (4 bytes) |
//! | 4, content of extents | path, count (from 1), gap and length of each, CRC-32 of all (4 bytes) |
//!
//! A path is how many bytes it shares with the one before, and the length and bytes of the rest.
//! Contents are numbered from 0. A kept content is the distance of its number from the one before
//! (from 1; the first from -1), and then 1, a length and the bytes, or 2 and a path; distance 0 is the
//! end.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;

use crate::archive::entry::Extent;
use crate::error::{Error, ErrorKind, Result};
use crate::path::RelPath;

/// The longest literal, in bytes.
pub(super) const MAX_LITERAL: usize = 64 * 1024;
/// The longest path, in bytes. Those of files behind symlinks may be longer than the archive's own.
pub(super) const MAX_PATH: usize = 64 * 1024;
/// The most extents of one file: they are held in memory.
pub(super) const MAX_EXTENTS: usize = 1 << 20;

/// One step of giving an archive back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// These bytes; of [`OpReader`] they are in its buffer.
    Literal(Vec<u8>),
    Zeros(u64),
    Content(Content),
    End,
}

/// The content of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) path: RelPath,
    pub(super) part: FilePart,
    pub(super) crc: u32,
}

/// How much of a file is in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FilePart {
    /// All of it, which is as many bytes.
    Whole(u64),
    /// These extents.
    Extents(Vec<Extent>),
}

impl FilePart {
    /// The bytes that are in the archive.
    pub(super) fn stored(&self) -> u64 {
        match self {
            FilePart::Whole(len) => *len,
            FilePart::Extents(extents) => {
                extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.len))
            }
        }
    }
}

/// Where a content is that is not at its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// Here: so many bytes follow.
    Bytes(u64),
    /// In another file of the layer.
    At(RelPath),
}

pub(super) fn damaged(what: &'static str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "the record is damaged ({what}): import the layer again, or export it in the canonical form"
        ),
    )
}

/// A failure to read the record: the disk's, or that its compressed stream is damaged.
fn failed(e: io::Error) -> Error {
    match e.downcast::<Error>() {
        Ok(own) if own.kind() == ErrorKind::InvalidArchive => {
            damaged("its stream").with_source(own)
        }
        Ok(own) => own,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
        Err(e) => Error::new(ErrorKind::Io, "cannot read the record").with_source(e),
    }
}

/// Writes operations.
#[derive(Debug)]
pub(super) struct OpWriter<W> {
    out: W,
    paths: Paths,
}

impl<W: Write> OpWriter<W> {
    pub(super) fn new(out: W) -> Self {
        OpWriter { out, paths: Paths::default() }
    }

    /// Writes bytes, at most [`MAX_LITERAL`].
    pub(super) fn literal(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(&[1])?;
        number(&mut self.out, bytes.len() as u64)?;
        self.out.write_all(bytes)
    }

    pub(super) fn zeros(&mut self, count: u64) -> io::Result<()> {
        self.out.write_all(&[2])?;
        number(&mut self.out, count)
    }

    pub(super) fn content(&mut self, path: &[u8], part: &FilePart, crc: u32) -> io::Result<()> {
        match part {
            FilePart::Whole(len) => {
                self.out.write_all(&[3])?;
                self.paths.write(&mut self.out, path)?;
                number(&mut self.out, *len)?;
            }
            FilePart::Extents(extents) => {
                self.out.write_all(&[4])?;
                self.paths.write(&mut self.out, path)?;
                number(&mut self.out, extents.len() as u64)?;
                let mut end = 0;
                for extent in extents {
                    number(&mut self.out, extent.offset.saturating_sub(end))?;
                    number(&mut self.out, extent.len)?;
                    end = extent.offset.saturating_add(extent.len);
                }
            }
        }
        self.out.write_all(&crc.to_le_bytes())
    }

    /// Writes the end, and gives the output back.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0])?;
        Ok(self.out)
    }
}

/// Reads operations.
#[derive(Debug)]
pub(super) struct OpReader<R> {
    input: R,
    paths: Paths,
}

impl<R: Read> OpReader<R> {
    pub(super) fn new(input: R) -> Self {
        OpReader { input, paths: Paths::default() }
    }

    /// The next operation. A literal's bytes are put into `literal`, and the operation has none.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], and those of the input.
    pub(super) fn next(&mut self, literal: &mut Vec<u8>) -> Result<Op> {
        let input = &mut self.input;
        Ok(match byte(input)? {
            0 => {
                at_end(input)?;
                Op::End
            }
            1 => {
                let len = bounded(read_number(input)?, MAX_LITERAL)?;
                literal.resize(len, 0);
                input.read_exact(literal).map_err(failed)?;
                Op::Literal(Vec::new())
            }
            2 => Op::Zeros(at_least_one(read_number(input)?)?),
            3 => {
                let path = self.paths.read(input)?;
                let part = FilePart::Whole(at_least_one(read_number(input)?)?);
                Op::Content(Content { path, part, crc: read_crc(input)? })
            }
            4 => {
                let path = self.paths.read(input)?;
                let count = bounded(read_number(input)?, MAX_EXTENTS)?;
                // Grows with what is there, not with what is claimed.
                let mut extents = Vec::new();
                let mut end = 0u64;
                for _ in 0..count {
                    let gap = read_number(input)?;
                    let len = at_least_one(read_number(input)?)?;
                    let offset = end.checked_add(gap).ok_or_else(overflow)?;
                    end = offset.checked_add(len).ok_or_else(overflow)?;
                    extents.push(Extent { offset, len });
                }
                let part = FilePart::Extents(extents);
                Op::Content(Content { path, part, crc: read_crc(input)? })
            }
            _ => return Err(damaged("an unknown operation")),
        })
    }
}

/// Writes kept contents, in the order of their numbers.
#[derive(Debug)]
pub(super) struct KeptWriter<W> {
    out: W,
    next: u64,
}

impl<W: Write> KeptWriter<W> {
    pub(super) fn new(out: W) -> Self {
        KeptWriter { out, next: 0 }
    }

    /// Writes where the content of that number is; bytes are to follow.
    pub(super) fn put(&mut self, index: u64, kept: &Kept) -> io::Result<()> {
        number(&mut self.out, index.saturating_sub(self.next).saturating_add(1))?;
        self.next = index.saturating_add(1);
        match kept {
            Kept::Bytes(len) => {
                self.out.write_all(&[1])?;
                number(&mut self.out, *len)
            }
            Kept::At(path) => {
                self.out.write_all(&[2])?;
                number(&mut self.out, path.as_bytes().len() as u64)?;
                self.out.write_all(path.as_bytes())
            }
        }
    }

    /// The bytes of what was put last.
    pub(super) fn bytes(&mut self) -> &mut W {
        &mut self.out
    }

    /// Writes the end, and gives the output back.
    pub(super) fn finish(mut self) -> io::Result<W> {
        number(&mut self.out, 0)?;
        Ok(self.out)
    }
}

/// Reads kept contents.
#[derive(Debug)]
pub(super) struct KeptReader<R> {
    input: R,
    next: u64,
    ended: bool,
}

impl<R: Read> KeptReader<R> {
    pub(super) fn new(input: R) -> Self {
        KeptReader { input, next: 0, ended: false }
    }

    /// The next one and its number; none at the end. All bytes of the one before must have been read.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], and those of the input.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Kept)>> {
        if self.ended {
            return Ok(None);
        }
        let distance = read_number(&mut self.input)?;
        let Some(distance) = distance.checked_sub(1) else {
            at_end(&mut self.input)?;
            self.ended = true;
            return Ok(None);
        };
        let index = self.next.checked_add(distance).ok_or_else(overflow)?;
        self.next = index.checked_add(1).ok_or_else(overflow)?;
        let kept = match byte(&mut self.input)? {
            1 => Kept::Bytes(at_least_one(read_number(&mut self.input)?)?),
            2 => {
                let len = bounded(read_number(&mut self.input)?, MAX_PATH)?;
                let mut path = vec![0; len];
                self.input.read_exact(&mut path).map_err(failed)?;
                Kept::At(file_path(&path)?)
            }
            _ => return Err(damaged("a kept content of an unknown kind")),
        };
        Ok(Some((index, kept)))
    }
}

/// The bytes of the one read last, of which there must be as many as it says: the input's end is an
/// error.
impl<R: Read> Read for KeptReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.input.read(buf) {
            Ok(0) if !buf.is_empty() => Err(failed(io::ErrorKind::UnexpectedEof.into()).into()),
            Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(failed(e).into()),
            read => read,
        }
    }
}

/// The path before, which the next one shares a part with.
#[derive(Debug, Default)]
struct Paths(Vec<u8>);

impl Paths {
    fn write(&mut self, out: &mut impl Write, path: &[u8]) -> io::Result<()> {
        let shared = self.0.iter().zip(path).take_while(|(a, b)| a == b).count();
        let rest = path.get(shared..).unwrap_or_default();
        number(out, shared as u64)?;
        number(out, rest.len() as u64)?;
        out.write_all(rest)?;
        self.0.truncate(shared);
        self.0.extend_from_slice(rest);
        Ok(())
    }

    fn read(&mut self, input: &mut impl Read) -> Result<RelPath> {
        let shared = usize::try_from(read_number(input)?).unwrap_or(usize::MAX);
        let rest = usize::try_from(read_number(input)?).unwrap_or(usize::MAX);
        if shared > self.0.len() || shared.saturating_add(rest) > MAX_PATH {
            return Err(damaged("a path"));
        }
        let follows = self.0.get(shared).copied();
        self.0.resize(shared.saturating_add(rest), 0);
        let space = self.0.get_mut(shared..).unwrap_or_default();
        input.read_exact(space).map_err(failed)?;
        if follows.is_some() && space.first().copied() == follows {
            return Err(damaged("a path that shares more than it says"));
        }
        file_path(&self.0)
    }
}

/// The path of a file: not the root's.
fn file_path(bytes: &[u8]) -> Result<RelPath> {
    match RelPath::new(OsStr::from_bytes(bytes)) {
        Ok(path) if !path.is_root() => Ok(path),
        Ok(_) => Err(damaged("a path")),
        Err(e) => Err(damaged("a path").with_source(e)),
    }
}

fn number(out: &mut impl Write, mut n: u64) -> io::Result<()> {
    let mut bytes = [0; 10];
    let mut len = 0;
    for byte in &mut bytes {
        len += 1;
        *byte = (n & 0x7f) as u8;
        n >>= 7;
        if n == 0 {
            break;
        }
        *byte |= 0x80;
    }
    out.write_all(bytes.get(..len).unwrap_or_default())
}

fn byte(input: &mut impl Read) -> Result<u8> {
    let mut byte = [0];
    input.read_exact(&mut byte).map_err(failed)?;
    let [byte] = byte;
    Ok(byte)
}

fn read_number(input: &mut impl Read) -> Result<u64> {
    let mut n = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = byte(input)?;
        let bits = u64::from(byte & 0x7f);
        if shift > 0 && byte == 0 || bits << shift >> shift != bits {
            return Err(damaged("a number"));
        }
        n |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(n);
        }
    }
    Err(damaged("a number"))
}

fn read_crc(input: &mut impl Read) -> Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes).map_err(failed)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Holds a length to 1 and `max`.
fn bounded(n: u64, max: usize) -> Result<usize> {
    match usize::try_from(n) {
        Ok(n @ 1..) if n <= max => Ok(n),
        _ => Err(damaged("a length")),
    }
}

fn at_least_one(n: u64) -> Result<u64> {
    if n == 0 { Err(damaged("a length of 0")) } else { Ok(n) }
}

fn overflow() -> Error {
    damaged("numbers beyond any file")
}

/// Nothing may follow the end, and the stream's own checksum comes after it.
fn at_end(input: &mut impl Read) -> Result<()> {
    match input.read(&mut [0]).map_err(failed)? {
        0 => Ok(()),
        _ => Err(damaged("it goes on behind its end")),
    }
}

/// Reads operations or kept contents, and writes them again; none if they are damaged.
#[cfg(any(test, fuzzing))]
pub(crate) fn recoded(bytes: &[u8], kept: bool) -> Option<Vec<u8>> {
    let recode = || -> Result<Vec<u8>> {
        let written = |e| Error::io("write", "a vector", e);
        if kept {
            let (mut reader, mut writer) = (KeptReader::new(bytes), KeptWriter::new(Vec::new()));
            while let Some((index, kept)) = reader.next()? {
                writer.put(index, &kept).map_err(written)?;
                if let Kept::Bytes(len) = kept {
                    let mut content = vec![0; bounded(len, bytes.len())?];
                    reader.read_exact(&mut content).map_err(failed)?;
                    writer.bytes().extend_from_slice(&content);
                }
            }
            return writer.finish().map_err(written);
        }
        let (mut reader, mut writer) = (OpReader::new(bytes), OpWriter::new(Vec::new()));
        let mut literal = Vec::new();
        loop {
            match reader.next(&mut literal)? {
                Op::Literal(_) => writer.literal(&literal),
                Op::Zeros(n) => writer.zeros(n),
                Op::Content(c) => writer.content(c.path.as_bytes(), &c.part, c.crc),
                Op::End => return writer.finish().map_err(written),
            }
            .map_err(written)?;
        }
    };
    match recode() {
        Ok(again) => Some(again),
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operations() -> Vec<u8> {
        let mut out = OpWriter::new(Vec::new());
        let extents = [(0, 1), (1, 300), (1 << 40, 7)].map(|(offset, len)| Extent { offset, len });
        out.literal(&[7; 200]).unwrap();
        out.zeros(1 << 50).unwrap();
        out.content(b"usr/bin/a", &FilePart::Whole(1), 1).unwrap();
        out.content(b"usr/bin/\xff", &FilePart::Extents(extents.into()), u32::MAX).unwrap();
        out.content(b"usr/bin", &FilePart::Whole(u64::MAX), 0).unwrap();
        out.finish().unwrap()
    }

    fn kept() -> Vec<u8> {
        let mut out = KeptWriter::new(Vec::new());
        out.put(0, &Kept::Bytes(3)).unwrap();
        out.bytes().extend_from_slice(b"abc");
        out.put(1, &Kept::At(RelPath::new("a/b").unwrap())).unwrap();
        out.put(1 << 32, &Kept::Bytes(1)).unwrap();
        out.bytes().push(0);
        out.finish().unwrap()
    }

    #[test]
    fn what_is_written_reads_back_as_the_same() {
        assert_eq!(recoded(&operations(), false).unwrap(), operations());
        assert_eq!(recoded(&kept(), true).unwrap(), kept());
    }

    #[test]
    fn what_is_cut_or_goes_on_is_damaged() {
        for (bytes, is_kept) in [(operations(), false), (kept(), true)] {
            for end in 0..bytes.len() {
                assert_eq!(recoded(&bytes[..end], is_kept), None, "{end}");
            }
            assert_eq!(recoded(&[&bytes[..], &[0]].concat(), is_kept), None);
        }
    }

    #[test]
    fn one_thing_is_written_in_one_way() {
        for (bad, what) in [
            (&[5][..], "an unknown operation"),
            (&[1, 0, 0], "an empty literal"),
            (&[2, 0x80, 0, 0], "a number that is longer than need be"),
            (&[2, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2, 0], "a number beyond 64 bits"),
            (&[2, 0, 0], "no zeros"),
            (&[3, 0, 0, 1, 0, 0, 0, 0, 0], "the root"),
            (&[3, 1, 1, b'a', 1, 0, 0, 0, 0, 0], "a path that shares what is not there"),
            (&[3, 0, 2, b'.', b'.', 1, 0, 0, 0, 0, 0], "a path that leaves"),
            (&[3, 0, 2, b'/', b'a', 1, 0, 0, 0, 0, 0], "an absolute path"),
            (
                &[3, 0, 1, b'a', 1, 0, 0, 0, 0, 3, 0, 1, b'a', 1, 0, 0, 0, 0, 0],
                "a path that shares more than it says",
            ),
            (&[4, 0, 1, b'a', 0, 0, 0, 0, 0, 0], "no extents"),
            (&[4, 0, 1, b'a', 1, 0, 0, 0, 0, 0, 0, 0], "an empty extent"),
        ] {
            assert_eq!(recoded(bad, false), None, "{what}");
        }
    }
}
