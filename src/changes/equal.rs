//! Whether two files are the same to a user of the tree.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use crate::error::{IoContext, Result};
use crate::layer::marks;
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, Of};

/// What is read of a file at once, in bytes: both files' shares stay in a core's cache.
const BUFFER: usize = 64 * 1024;

/// A file by its directory and name, with its attributes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side<'a> {
    pub(super) dir: &'a Dir,
    pub(super) name: &'a Name,
    pub(super) stat: &'a Stat,
}

/// What a difference in the modification time alone is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mtimes {
    /// No change, by the rules of the [module](super).
    Ignore,
    /// A change, of a directory too: for whoever makes one tree from the other.
    Count,
}

/// Compares files, one pair after the other.
#[derive(Debug)]
pub(super) struct Comparison {
    mtimes: Mtimes,
    buffers: [Vec<u8>; 2],
}

impl Comparison {
    pub(super) fn new(mtimes: Mtimes) -> Self {
        Comparison { mtimes, buffers: [Vec::new(), Vec::new()] }
    }

    /// Whether `a` and `b` are equal by the rules of the [module](super); `path` is for messages.
    pub(super) fn equal(&mut self, a: Side<'_>, b: Side<'_>, path: &RelPath) -> Result<bool> {
        if a.stat.same_inode(b.stat) {
            return Ok(true);
        }
        let attributes = |s: &Stat| (s.file_type, s.mode, s.uid, s.gid);
        if attributes(a.stat) != attributes(b.stat) {
            return Ok(false);
        }
        if self.mtimes == Mtimes::Count && a.stat.mtime != b.stat.mtime {
            return Ok(false);
        }
        let same = match a.stat.file_type {
            FileType::Directory | FileType::Fifo | FileType::Socket | FileType::Unknown => true,
            FileType::CharDevice | FileType::BlockDevice => a.stat.rdev == b.stat.rdev,
            FileType::Symlink => {
                let read = |side: Side<'_>| side.dir.read_link(side.name).at("read link", path);
                a.stat.size == b.stat.size && read(a)? == read(b)?
            }
            FileType::Regular if a.stat.size != b.stat.size => false,
            FileType::Regular if a.stat.size > 0 && !same_precise_mtime(a.stat, b.stat) => {
                return self.equal_open(a, b, path);
            }
            FileType::Regular => true,
        };
        let of = |side: Side<'_>| xattrs(Of::Child(side.dir, side.name));
        Ok(same && of(a).and_then(|x| Ok(x == of(b)?)).at("read the xattrs of", path)?)
    }

    /// The same of files that must be read.
    fn equal_open(&mut self, a: Side<'_>, b: Side<'_>, path: &RelPath) -> Result<bool> {
        let open =
            |side: Side<'_>| side.dir.open_file_of_mode(side.name, side.stat.mode).at("open", path);
        let files = (open(a)?, open(b)?);
        let of = |file: &File| xattrs(Of::Fd(file.as_fd()));
        let same = of(&files.0).and_then(|x| Ok(x == of(&files.1)?));
        Ok(same.at("read the xattrs of", path)?
            && self.same_contents(files, a.stat.size).at("compare", path)?)
    }

    /// Whether both begin with the same `size` bytes, or with the same bytes to their ends.
    fn same_contents(&mut self, (mut a, mut b): (File, File), size: u64) -> io::Result<bool> {
        for buffer in &mut self.buffers {
            buffer.resize(BUFFER, 0);
        }
        let [left, right] = &mut self.buffers;
        let mut rest = size;
        while rest > 0 {
            let want = usize::try_from(rest).unwrap_or(BUFFER).min(BUFFER);
            let (n, m) = (read_full(&mut a, left, want)?, read_full(&mut b, right, want)?);
            if left.get(..n) != right.get(..m) {
                return Ok(false);
            }
            if n < want {
                break;
            }
            rest = rest.saturating_sub(want as u64);
        }
        Ok(true)
    }
}

/// Whole seconds come from archives and say little.
fn same_precise_mtime(a: &Stat, b: &Stat) -> bool {
    a.mtime == b.mtime && a.mtime.nanos != 0
}

/// All but those of unions.
fn xattrs(of: Of<'_>) -> io::Result<BTreeMap<Vec<u8>, Option<Vec<u8>>>> {
    xattr::list(of)?
        .into_iter()
        .filter(|key| !marks::is_union_xattr(key))
        .map(|key| {
            let value = xattr::get(of, &key)?;
            Ok((key, value))
        })
        .collect()
}

/// Reads `want` bytes, or to the end.
fn read_full(from: &mut impl Read, buffer: &mut [u8], want: usize) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..want)
        && !rest.is_empty()
    {
        match from.read(rest) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}
