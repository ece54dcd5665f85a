//! From a layer directory to a layer archive.
//!
//! The same layer gives the same bytes: directories before their contents, in each the opaque mark,
//! then whiteouts, then the rest, all in byte order; no clock, no names of users. A layer that cannot
//! be written (a file whose name reads as a whiteout, a whiteout whose name is too long) is refused
//! before the first byte.
//!
//! A mark is dropped only where the parents are given and have nothing there to hide.
//!
//! Source: OCI image specification, `layer.md`.

use std::collections::HashMap;
use std::io::{self, BufWriter, Read, Write};

use super::capability;
use super::entry::{Entry, EntryKind, EntryWriter, Timestamp};
use crate::digest::{DiffId, Hashing};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::LayerFormat;
use crate::layer::marks::{self, Mark, OPAQUE_NAME, WHITEOUT_PREFIX};
use crate::layer::stack::{Branch, LayerStack, MergedDir};
use crate::layer::walk::{Descend, Visit, walk};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::stat::{FileType, Stat, fstat};
use crate::sys::xattr::{self, Of};

/// What is gathered before it is written, in bytes.
const BUFFER: usize = 128 * 1024;

/// How a layer is packed.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ExportOptions {
    /// Seconds since 1970 that no modification time in the archive exceeds: later ones become this,
    /// as `SOURCE_DATE_EPOCH` asks. The default, none, keeps all times, to the nanosecond.
    pub source_date_epoch: Option<i64>,
}

impl ExportOptions {
    /// The defaults.
    pub fn new() -> Self {
        ExportOptions::default()
    }
}

/// What was packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exported {
    /// The digest of the archive.
    pub diff_id: DiffId,
    /// The size of the archive, in bytes.
    pub bytes: u64,
    /// Entries in it, marks included.
    pub entries: u64,
    /// Sockets, which archives cannot hold and which were left out.
    pub sockets: u64,
}

/// Writes `layer` to `out` as an uncompressed archive.
pub(crate) fn export(
    layer: &Branch,
    parents: Option<&LayerStack>,
    out: &mut dyn Write,
    options: &ExportOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<Exported> {
    check_names(layer)?;
    let mut export = Export {
        format: layer.format,
        out: EntryWriter::new(Hashing::new(BufWriter::with_capacity(BUFFER, out))),
        options,
        links: HashMap::new(),
        below: match parents {
            Some(stack) => Some(Below { stack, open: vec![(RelPath::ROOT, Some(stack.root()?))] }),
            None => None,
        },
        sockets: 0,
        done: Progress::new(Phase::Export),
    };
    let stat = layer.dir.stat().at("look at", "the layer's root")?;
    let root = export.entry(&RelPath::ROOT, &stat, Of::dir(&layer.dir), EntryKind::Directory)?;
    export.append(&root, &mut io::empty(), progress)?;
    if marks::is_opaque(layer.format, &layer.dir).at("read the marks of", "the layer's root")? {
        export.opaque(&RelPath::ROOT, progress)?;
    }
    walk(&layer.dir, &mut |visit| {
        export.visit(visit, progress)?;
        Ok(Descend::Into)
    })?;
    let (entries, sockets) = (export.done.entries, export.sockets);
    let (mut out, digest, bytes) = export.out.finish()?.finish();
    out.flush().at("write the end of", "the archive")?;
    drop(out);
    Ok(Exported { diff_id: DiffId::from(digest), bytes, entries, sockets })
}

/// Refuses what no archive can say.
fn check_names(layer: &Branch) -> Result<()> {
    walk(&layer.dir, &mut |visit| {
        let refuse = |why: &'static str| {
            Err(Error::new(ErrorKind::FailedPrecondition, why).with_path(visit.path))
        };
        match marks::decode(layer.format, visit.name, visit.stat) {
            Mark::None if visit.name.as_bytes().starts_with(WHITEOUT_PREFIX) => refuse(
                "cannot pack a file whose name begins with \".wh.\": in an archive it would delete \
                 another; rename it",
            ),
            Mark::Whiteout(name) if marks::whiteout_name(&name).is_none() => refuse(
                "cannot pack the deletion of this name: the name of its whiteout would be longer \
                 than 255 bytes, or read as another mark",
            ),
            _ => Ok(Descend::Into),
        }
    })
}

/// The parents' directories down to where the walk is.
struct Below<'a> {
    stack: &'a LayerStack,
    open: Vec<(RelPath, Option<MergedDir>)>,
}

impl Below<'_> {
    /// The directory `path` of the parents, if they have it. Paths come in the order of the walk.
    fn directory(&mut self, path: &RelPath) -> Result<Option<&MergedDir>> {
        while self.open.last().is_some_and(|(open, _)| !path.starts_with(open)) {
            self.open.pop();
        }
        while let Some((open, dir)) = self.open.last()
            && open != path
        {
            let depth = open.components().count();
            let Some(name) = path.components().nth(depth) else { break };
            let next = match dir {
                Some(dir) => dir.enter(self.stack, &name)?,
                None => None,
            };
            self.open.push((open.join(&name), next));
        }
        Ok(self.open.last().and_then(|(_, dir)| dir.as_ref()))
    }
}

struct Export<'a> {
    format: LayerFormat,
    out: EntryWriter<Hashing<BufWriter<&'a mut dyn Write>>>,
    options: &'a ExportOptions,
    /// The first path of every file that has several names.
    links: HashMap<(u64, u64), RelPath>,
    below: Option<Below<'a>>,
    sockets: u64,
    done: Progress,
}

impl Export<'_> {
    fn visit(&mut self, visit: Visit<'_>, progress: &mut ProgressFn<'_>) -> Result<()> {
        let parent = visit.path.parent().unwrap_or_default();
        match marks::decode(self.format, visit.name, visit.stat) {
            Mark::None => {}
            Mark::Whiteout(name) => return self.whiteout(&parent, &name, progress),
            // Written with the directory.
            Mark::Opaque | Mark::Internal => return Ok(()),
        }
        let of = Of::Child(visit.dir, visit.name);
        let (path, stat) = (visit.path, visit.stat);
        if stat.nlink > 1 && !stat.is_dir() {
            let inode = (stat.dev, stat.ino);
            if let Some(target) = self.links.get(&inode) {
                let kind = EntryKind::HardLink { target: target.clone() };
                let link =
                    Entry { xattrs: Default::default(), ..self.entry(path, stat, of, kind)? };
                return self.append(&link, &mut io::empty(), progress);
            }
            self.links.insert(inode, path.clone());
        }
        let kind = match stat.file_type {
            FileType::Regular => return self.file(&visit, progress),
            FileType::Directory => EntryKind::Directory,
            FileType::Symlink => {
                let target = visit.dir.read_link(visit.name).at("read link", path)?;
                EntryKind::Symlink { target }
            }
            FileType::CharDevice => {
                EntryKind::CharDevice { major: stat.rdev.0, minor: stat.rdev.1 }
            }
            FileType::BlockDevice => {
                EntryKind::BlockDevice { major: stat.rdev.0, minor: stat.rdev.1 }
            }
            FileType::Fifo => EntryKind::Fifo,
            FileType::Socket | FileType::Unknown => {
                tracing::debug!(?path, "socket left out of the archive");
                self.sockets = self.sockets.saturating_add(1);
                return Ok(());
            }
        };
        let entry = self.entry(path, stat, of, kind)?;
        self.append(&entry, &mut io::empty(), progress)?;
        if stat.is_dir() {
            let dir = visit.dir.open_dir(visit.name).at("open directory", path)?;
            let hidden = match marks::separate_whiteout(self.format, visit.name) {
                Some(mark) => visit.dir.try_stat_at(&mark).at("look at", path)?.is_some(),
                None => false,
            };
            if hidden || marks::is_opaque(self.format, &dir).at("read the marks of", path)? {
                self.opaque(path, progress)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, visit: &Visit<'_>, progress: &mut ProgressFn<'_>) -> Result<()> {
        let path = visit.path;
        let mut file = visit.dir.open_file(visit.name).at("open", path)?;
        let stat = fstat(&file).at("look at", path)?;
        if !stat.same_inode(visit.stat) {
            return Err(changed(path));
        }
        let kind = EntryKind::File { size: stat.size, sparse: None };
        let entry = self.entry(path, &stat, Of::Fd(std::os::fd::AsFd::as_fd(&file)), kind)?;
        let mut exact = Exact { file: &mut file, left: stat.size, path };
        self.append(&entry, &mut exact, progress)
    }

    fn append(
        &mut self,
        entry: &Entry,
        content: &mut dyn Read,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        self.out.append(entry, content)?;
        self.done.entries = self.done.entries.saturating_add(1);
        self.done.bytes = self.done.bytes.saturating_add(entry.stored_size());
        report(progress, self.done)
    }

    /// The mark that deletes `name`, unless there is nothing to delete.
    fn whiteout(
        &mut self,
        parent: &RelPath,
        name: &Name,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        if let Some(below) = &mut self.below {
            let hides = match below.directory(parent)? {
                Some(dir) => dir.lookup(name)?.is_some(),
                None => false,
            };
            if !hides {
                return Ok(());
            }
        }
        match marks::whiteout_name(name) {
            Some(mark) => self.mark(parent.join(&mark), progress),
            None => Err(changed(&parent.join(name))),
        }
    }

    /// The mark that makes a directory opaque, unless there is nothing to hide.
    fn opaque(&mut self, path: &RelPath, progress: &mut ProgressFn<'_>) -> Result<()> {
        if let Some(below) = &mut self.below
            && below.directory(path)?.is_none()
        {
            return Ok(());
        }
        self.mark(path.join(&Name::new(OPAQUE_NAME)?), progress)
    }

    fn mark(&mut self, path: RelPath, progress: &mut ProgressFn<'_>) -> Result<()> {
        let entry = Entry {
            path,
            kind: EntryKind::File { size: 0, sparse: None },
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            atime: None,
            xattrs: Default::default(),
            acl_access: None,
            acl_default: None,
        };
        self.append(&entry, &mut io::empty(), progress)
    }

    fn entry(&self, path: &RelPath, stat: &Stat, of: Of<'_>, kind: EntryKind) -> Result<Entry> {
        let mut mtime = Timestamp { secs: stat.mtime.secs, nanos: stat.mtime.nanos };
        if let Some(epoch) = self.options.source_date_epoch {
            mtime = mtime.min(Timestamp { secs: epoch, nanos: 0 });
        }
        let mut xattrs = std::collections::BTreeMap::new();
        for key in xattr::list(of).at("list the xattrs of", path)? {
            if !is_packed(&key) {
                continue;
            }
            if let Some(value) = xattr::get(of, &key).at("read an xattr of", path)? {
                let value = match key.as_slice() {
                    b"security.capability" => capability::to_version_2(value),
                    _ => value,
                };
                xattrs.insert(key, value);
            }
        }
        Ok(Entry {
            path: path.clone(),
            kind,
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            mtime,
            atime: None,
            xattrs,
            acl_access: None,
            acl_default: None,
        })
    }
}

/// Whether an xattr goes into the archive: not the unions' own, not the labels of this machine's
/// security policy, and no integrity data, which is of the file and not of the tree.
fn is_packed(key: &[u8]) -> bool {
    const MACHINE: [&[u8]; 3] = [b"security.selinux", b"security.ima", b"security.evm"];
    !marks::is_union_xattr(key) && !MACHINE.contains(&key)
}

fn changed(path: &RelPath) -> Error {
    Error::new(
        ErrorKind::FailedPrecondition,
        "file was changed while it was being packed: something is writing to the layer",
    )
    .with_path(path)
}

/// A file that must have just the size it had.
struct Exact<'a> {
    file: &'a mut std::fs::File,
    left: u64,
    path: &'a RelPath,
}

impl Read for Exact<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buf)?;
        let short = n == 0 && self.left > 0 && !buf.is_empty();
        match self.left.checked_sub(n as u64) {
            Some(left) if !short => self.left = left,
            _ => return Err(changed(self.path).into()),
        }
        Ok(n)
    }
}
