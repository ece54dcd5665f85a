//! The files that a record is written to: its own, which has a bound, and one without a name for what
//! is put in order only at the end.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use crate::error::{Error, ErrorKind};
use crate::path::Name;
use crate::sys::dir::Dir;

/// The unit in which contents are copied, in bytes.
pub(super) const BUFFER: usize = 64 * 1024;

/// The record's file, which refuses what is beyond its bound.
#[derive(Debug)]
pub(super) struct Bounded {
    pub(super) file: BufWriter<File>,
    /// How much was, in bytes, and how much may be.
    pub(super) written: u64,
    pub(super) max: u64,
}

impl Write for Bounded {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.written.saturating_add(buf.len() as u64);
        if written > self.max {
            let text = format!("it would be larger than {} bytes, the bound max_bytes", self.max);
            return Err(Error::new(ErrorKind::LimitExceeded, text).into());
        }
        let n = self.file.write(buf)?;
        self.written = self.written.saturating_add(n as u64);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A file without a name, made when it is needed.
#[derive(Debug, Default)]
pub(super) struct Spool {
    file: Option<File>,
    end: u64,
}

impl Spool {
    /// Where what is added next will be.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Adds bytes; gives where they are.
    pub(super) fn append(&mut self, dir: &Dir, bytes: &[u8]) -> io::Result<u64> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let name = Name::new("record.spool").map_err(io::Error::from)?;
                let file = dir.create_file(&name, 0o600)?;
                dir.unlink(&name)?;
                none.insert(file)
            }
        };
        file.write_all_at(bytes, self.end)?;
        let at = self.end;
        self.end = self.end.saturating_add(bytes.len() as u64);
        Ok(at)
    }

    /// Reads bytes from where they are.
    pub(super) fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        match &self.file {
            Some(file) => file.read_exact_at(buf, at),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Copies bytes from where they are.
    pub(super) fn copy(&self, at: u64, len: u64, out: &mut impl Write) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut reader = BufReader::with_capacity(BUFFER, file);
        reader.seek(SeekFrom::Start(at))?;
        if io::copy(&mut reader.take(len), out)? == len {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}
