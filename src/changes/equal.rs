//! Whether two files are the same to a user of the tree.

use std::collections::BTreeMap;
use std::io::{self, Read};

use crate::error::{IoContext, Result};
use crate::layer::marks;
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, Of};

/// A file by its directory and name, with its attributes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side<'a> {
    pub(super) dir: &'a Dir,
    pub(super) name: &'a Name,
    pub(super) stat: &'a Stat,
}

/// Whether `a` and `b` are equal by the rules of the [module](super); `path` is for messages.
pub(super) fn equal(a: Side<'_>, b: Side<'_>, path: &RelPath) -> Result<bool> {
    if a.stat.same_inode(b.stat) {
        return Ok(true);
    }
    let attributes = |s: &Stat| (s.file_type, s.mode, s.uid, s.gid);
    if attributes(a.stat) != attributes(b.stat) {
        return Ok(false);
    }
    let same = match a.stat.file_type {
        FileType::Directory | FileType::Fifo | FileType::Socket | FileType::Unknown => true,
        FileType::CharDevice | FileType::BlockDevice => a.stat.rdev == b.stat.rdev,
        FileType::Symlink => {
            let read = |side: Side<'_>| side.dir.read_link(side.name).at("read link", path);
            read(a)? == read(b)?
        }
        FileType::Regular => {
            a.stat.size == b.stat.size
                && (same_precise_mtime(a.stat, b.stat)
                    || same_contents(a, b).at("compare", path)?)
        }
    };
    Ok(same
        && xattrs(a).at("read the xattrs of", path)? == xattrs(b).at("read the xattrs of", path)?)
}

/// Whole seconds come from archives and say little.
fn same_precise_mtime(a: &Stat, b: &Stat) -> bool {
    a.mtime == b.mtime && a.mtime.nanos != 0
}

fn xattrs(side: Side<'_>) -> io::Result<BTreeMap<Vec<u8>, Option<Vec<u8>>>> {
    let of = Of::Child(side.dir, side.name);
    xattr::list(of)?
        .into_iter()
        .filter(|key| !marks::is_union_xattr(key))
        .map(|key| Ok((key.clone(), xattr::get(of, &key)?)))
        .collect()
}

fn same_contents(a: Side<'_>, b: Side<'_>) -> io::Result<bool> {
    let (mut a, mut b) = (a.dir.open_file(a.name)?, b.dir.open_file(b.name)?);
    let mut buffers = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        let (n, m) = (read_full(&mut a, &mut buffers.0)?, read_full(&mut b, &mut buffers.1)?);
        if buffers.0.get(..n) != buffers.1.get(..m) {
            return Ok(false);
        }
        if n == 0 {
            return Ok(true);
        }
    }
}

fn read_full(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..)
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
