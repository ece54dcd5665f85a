//! From a layer directory, or from two trees ([`diff`]), to a layer archive.
//!
//! The same layer gives the same bytes: directories before their contents, in each the opaque mark,
//! then whiteouts, then the rest, all in byte order; no clock, no names of users. A layer that cannot
//! be written (a file whose name reads as a whiteout, a whiteout whose name is too long) is refused
//! before the first byte.
//!
//! What an entry is made of:
//! - The root is the first entry, `./`: its mode, owner and time come back on import.
//! - A mark has mode, owner and time 0. It is dropped only where the parents are given and have
//!   nothing there to hide.
//! - Of an inode with several names the first in order is the file, the others are hard links.
//! - All xattrs that the caller may read, POSIX ACLs as `system.posix_acl_*` among them, but for those
//!   of unions, for those that only mean something on this machine ([`SecurityLabels`]; `security.ima`
//!   and `security.evm`, which sign an inode of it), and with file capabilities as version 2.
//! - Sparse files are written in full, as OCI asks; sockets are left out and counted, and what
//!   they hide in the parents is deleted.
//!
//! A layer that refers to the layers below it (redirect, metacopy) is refused: it must be settled
//! first. A file that is exchanged or changes its size meanwhile is an error too. By then bytes may be
//! out: a writer must not publish them before [`export`] has returned.
//!
//! Two walks: the first, for the names alone, lists directories and looks at nothing but what may be a
//! mark. The second opens a file without looking at it first: open, stat, xattrs, read, close. What is
//! read goes into blocks that are digested and written as they are ([`output`](super::output)).
//!
//! Memory is that of the directories on the way down, of the hard links whose other names are still to
//! come, and of the blocks.
//!
//! Source: OCI image specification, `layer.md`.

mod diff;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::thread::Scope;

use super::capability;
use super::entry::{Entry, EntryKind, EntryWriter, Timestamp};
use super::output::Output;
use crate::digest::DiffId;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::LayerFormat;
use crate::layer::cursor::Cursor;
use crate::layer::marks::{self, Mark, OPAQUE_NAME, WHITEOUT_PREFIX};
use crate::layer::stack::{Branch, LayerStack};
use crate::layer::walk::{Descend, Listed, Visit, walk_listed};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::errno;
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, Of};

pub(crate) use diff::export_trees;
pub use diff::{diff_trees, export_diff};

/// How a layer is packed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExportOptions {
    /// Seconds since 1970 that no modification time in the archive exceeds: later ones become this,
    /// as `SOURCE_DATE_EPOCH` asks. The default, none, keeps all times, to the nanosecond.
    pub source_date_epoch: Option<i64>,
    /// Whether SELinux labels are packed. The default is to leave them out.
    pub labels: SecurityLabels,
    /// Whether a layer that was unpacked from an archive is to give that one back. The default is that
    /// it does, where it can; with one of the options above it is packed anew all the same, as they
    /// ask.
    pub form: ArchiveForm,
    /// How many threads work on it at most; the archive is the same. The caller's is one, and alone
    /// writes and calls the progress callback; 0 and 1 are that one alone. With 2 or more another
    /// digests the archive, if it is not small. Default: 2.
    pub threads: usize,
}

/// Which archive of a layer is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ArchiveForm {
    /// The one that the layer was unpacked from, byte for byte, if the store has a record of it (see
    /// [`RecordState`](crate::RecordState)); else the canonical one.
    #[default]
    AsImported,
    /// The one that depends on nothing but what is in the layer.
    Canonical,
}

/// What becomes of `security.selinux` when a layer is packed: labels belong to the policy of a
/// machine, and another machine gives a container its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SecurityLabels {
    /// They are left out.
    #[default]
    Drop,
    /// They are packed as any other xattr.
    Keep,
}

impl Default for ExportOptions {
    fn default() -> Self {
        ExportOptions {
            source_date_epoch: None,
            labels: SecurityLabels::default(),
            form: ArchiveForm::default(),
            threads: 2,
        }
    }
}

impl ExportOptions {
    /// The defaults.
    pub fn new() -> Self {
        ExportOptions::default()
    }

    /// Whether an archive is to be given back rather than packed.
    pub(crate) fn wants_as_imported(&self) -> bool {
        self.form == ArchiveForm::AsImported
            && self.source_date_epoch.is_none()
            && self.labels == SecurityLabels::Drop
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
    /// Which archive it is.
    pub form: ArchiveForm,
}

/// Writes `layer` to `out` as an uncompressed archive.
///
/// # Errors
/// [`ErrorKind::FailedPrecondition`] for a layer that cannot be packed, or that is being written to;
/// [`ErrorKind::Cancelled`] by `progress`.
pub(crate) fn export(
    layer: &Branch,
    parents: Option<&LayerStack>,
    out: &mut dyn Write,
    options: &ExportOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<Exported> {
    check_names(layer)?;
    std::thread::scope(|scope| {
        let mut export = Export {
            format: Some(layer.format),
            below: parents.map(Cursor::new),
            ..Export::new(out, options, scope)
        };
        let stat = layer.dir.stat().at("look at", "the layer's root")?;
        let root =
            export.entry(&RelPath::ROOT, &stat, Of::dir(&layer.dir), EntryKind::Directory)?;
        export.append(&root, progress)?;
        if marks::is_opaque(layer.format, &layer.dir).at("read the marks of", "the layer's root")? {
            export.opaque(&RelPath::ROOT, progress)?;
        }
        walk_listed(&layer.dir, &mut |listed| export.visit(listed, progress))?;
        export.finish()
    })
}

const NAME_OF_MARK: &str = "cannot pack a file whose name begins with \".wh.\": in an archive it would \
                            delete another; rename it";
const NO_WHITEOUT: &str = "cannot pack the deletion of this name: the name of its whiteout would be \
                           longer than 255 bytes, or read as another mark";

fn reads_as_mark(name: &Name) -> bool {
    name.as_bytes().starts_with(WHITEOUT_PREFIX)
}

/// Refuses what no archive can say.
fn check_names(layer: &Branch) -> Result<()> {
    walk_listed(&layer.dir, &mut |listed| {
        if !reads_as_mark(listed.name) && marks::whiteout_name(listed.name).is_some() {
            // Whatever it is, it can be said.
            return Ok(Descend::Into);
        }
        let refuse = |why: &'static str| {
            Err(Error::new(ErrorKind::FailedPrecondition, why).with_path(listed.path))
        };
        let Some(stat) = listed.stat()? else {
            return Ok(Descend::Past);
        };
        match marks::decode(layer.format, listed.name, &stat) {
            Mark::None if reads_as_mark(listed.name) => refuse(NAME_OF_MARK),
            Mark::Whiteout(name) if marks::whiteout_name(&name).is_none() => refuse(NO_WHITEOUT),
            Mark::None => Ok(Descend::Into),
            Mark::Whiteout(_) | Mark::Opaque | Mark::Internal => Ok(Descend::Past),
        }
    })
}

struct Export<'scope, 'env, 'a> {
    /// Whose marks there may be; none where nothing that is packed is a mark.
    format: Option<LayerFormat>,
    out: EntryWriter<Output<'scope, 'env, 'a>>,
    options: &'a ExportOptions,
    /// The first path of every file that has several names, and how many of them are still to come.
    links: HashMap<(u64, u64), (RelPath, u64)>,
    /// Where the walk is in the parents.
    below: Option<Cursor<'a>>,
    sockets: u64,
    done: Progress,
}

impl<'scope, 'env, 'a> Export<'scope, 'env, 'a> {
    /// To `out`; without marks or parents.
    fn new(
        out: &'a mut dyn Write,
        options: &'a ExportOptions,
        scope: &'scope Scope<'scope, 'env>,
    ) -> Self {
        Export {
            format: None,
            out: EntryWriter::new(Output::new(out, (options.threads > 1).then_some(scope))),
            options,
            links: HashMap::new(),
            below: None,
            sockets: 0,
            done: Progress::new(Phase::Export),
        }
    }

    fn finish(self) -> Result<Exported> {
        let (digest, bytes) = self.out.finish()?.finish()?;
        let (entries, sockets) = (self.done.entries, self.sockets);
        let form = ArchiveForm::Canonical;
        Ok(Exported { diff_id: DiffId::from(digest), bytes, entries, sockets, form })
    }

    /// Packs what a listing has; what has vanished is passed over.
    fn visit(&mut self, listed: Listed<'_>, progress: &mut ProgressFn<'_>) -> Result<Descend> {
        let Listed { path, dir, name, file_type } = listed;
        let may_be_mark =
            self.format.is_some_and(|format| marks::may_be_mark(format, name, file_type));
        if file_type == FileType::Regular && !may_be_mark {
            return match dir.open_file_stat(name) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Descend::Past),
                opened => self.file(path, opened, progress),
            };
        }
        match listed.stat()? {
            Some(stat) => self.seen(&Visit { path, dir, name, stat: &stat }, progress),
            None => Ok(Descend::Past),
        }
    }

    /// Packs what was looked at.
    fn seen(&mut self, visit: &Visit<'_>, progress: &mut ProgressFn<'_>) -> Result<Descend> {
        let mark = self.format.map(|format| marks::decode(format, visit.name, visit.stat));
        match mark.unwrap_or(Mark::None) {
            Mark::None => {}
            Mark::Whiteout(name) => {
                let parent = visit.path.parent().unwrap_or_default();
                self.whiteout(&parent, &name, progress)?;
                return Ok(Descend::Past);
            }
            // The opaque mark is written with its directory.
            Mark::Opaque | Mark::Internal => return Ok(Descend::Past),
        }
        let (path, stat) = (visit.path, visit.stat);
        let (major, minor) = stat.rdev;
        let kind = match stat.file_type {
            FileType::Socket | FileType::Unknown => {
                tracing::debug!(?path, "socket left out of the archive");
                self.sockets = self.sockets.saturating_add(1);
                if self.below.is_some() {
                    let parent = path.parent().unwrap_or_default();
                    self.whiteout(&parent, visit.name, progress)?;
                }
                return Ok(Descend::Past);
            }
            FileType::Regular => {
                let opened = visit.dir.open_file_stat(visit.name);
                if opened.as_ref().is_ok_and(|(_, now)| !now.same_inode(stat)) {
                    return Err(changed(path));
                }
                return self.file(path, opened, progress);
            }
            _ if self.linked(path, stat, progress)? => return Ok(Descend::Past),
            FileType::Directory => EntryKind::Directory,
            FileType::Symlink => {
                let target = visit.dir.read_link(visit.name).at("read link", path)?;
                EntryKind::Symlink { target }
            }
            FileType::CharDevice => EntryKind::CharDevice { major, minor },
            FileType::BlockDevice => EntryKind::BlockDevice { major, minor },
            FileType::Fifo => EntryKind::Fifo,
        };
        let entry = self.entry(path, stat, Of::Child(visit.dir, visit.name), kind)?;
        self.append(&entry, progress)?;
        if !stat.is_dir() {
            return Ok(Descend::Past);
        }
        if self.is_opaque(visit)? {
            self.opaque(path, progress)?;
        }
        Ok(Descend::Into)
    }

    /// Packs another name of what was packed already; false for the first name, which is remembered.
    fn linked(
        &mut self,
        path: &RelPath,
        stat: &Stat,
        progress: &mut ProgressFn<'_>,
    ) -> Result<bool> {
        if stat.nlink <= 1 || stat.is_dir() {
            return Ok(false);
        }
        let inode = (stat.dev, stat.ino);
        let Some((target, left)) = self.links.get_mut(&inode) else {
            self.links.insert(inode, (path.clone(), stat.nlink.saturating_sub(1)));
            return Ok(false);
        };
        *left = left.saturating_sub(1);
        let kind = EntryKind::HardLink { target: target.clone() };
        if *left == 0 {
            self.links.remove(&inode);
        }
        let link = self.bare(path, stat, kind);
        self.append(&link, progress)?;
        Ok(true)
    }

    /// Whether nothing below shows in a directory: it says so, or (AUFS) has a whiteout beside it.
    fn is_opaque(&self, visit: &Visit<'_>) -> Result<bool> {
        let (dir, name, path) = (visit.dir, visit.name, visit.path);
        let Some(format) = self.format else { return Ok(false) };
        if let Some(mark) = marks::separate_whiteout(format, name)
            && dir.try_stat_at(&mark).at("look for the whiteout of", path)?.is_some()
        {
            return Ok(true);
        }
        let dir = dir.open_dir(name).at("open directory", path)?;
        marks::is_opaque(format, &dir).at("read the marks of", path)
    }

    /// Packs a regular file that was opened, or says why it was not.
    fn file(
        &mut self,
        path: &RelPath,
        opened: io::Result<(File, Stat)>,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Descend> {
        let (file, stat) = match opened {
            // No regular file any more.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput || errno::is_loop(&e) => {
                return Err(changed(path));
            }
            opened => opened.at("open", path)?,
        };
        if self.linked(path, &stat, progress)? {
            return Ok(Descend::Past);
        }
        let kind = EntryKind::File { size: stat.size, sparse: None };
        let entry = self.entry(path, &stat, Of::Fd(file.as_fd()), kind)?;
        let mut content = Content { file, done: &mut self.done, progress };
        self.out.append(&entry, &mut content)?;
        self.done.entries = self.done.entries.saturating_add(1);
        report(progress, self.done)?;
        Ok(Descend::Past)
    }

    /// Appends an entry without content.
    fn append(&mut self, entry: &Entry, progress: &mut ProgressFn<'_>) -> Result<()> {
        self.out.append(entry, &mut io::empty())?;
        self.done.entries = self.done.entries.saturating_add(1);
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
            xattrs: BTreeMap::new(),
            acl_access: None,
            acl_default: None,
        };
        self.append(&entry, progress)
    }

    /// An entry with its xattrs.
    fn entry(&self, path: &RelPath, stat: &Stat, of: Of<'_>, kind: EntryKind) -> Result<Entry> {
        let mut entry = self.bare(path, stat, kind);
        let keys = xattr::list(of).at("list the xattrs of", path)?;
        if let Some(format) = self.format
            && keys.iter().any(|key| marks::is_union_xattr(key))
            && marks::refers_below(format, of).at("read the marks of", path)?
        {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                "cannot pack a layer that refers to the layers below it: settle it first; it does at",
            )
            .with_path(path));
        }
        for key in keys {
            if self.is_packed(&key)
                && let Some(value) = xattr::get(of, &key).at("read an xattr of", path)?
            {
                let value = match key.as_slice() {
                    b"security.capability" => capability::to_version_2(value),
                    _ => value,
                };
                entry.xattrs.insert(key, value);
            }
        }
        Ok(entry)
    }

    /// An entry without xattrs.
    fn bare(&self, path: &RelPath, stat: &Stat, kind: EntryKind) -> Entry {
        let mtime = Timestamp { secs: stat.mtime.secs, nanos: stat.mtime.nanos };
        let latest = self.options.source_date_epoch.map(|secs| Timestamp { secs, nanos: 0 });
        Entry {
            path: path.clone(),
            kind,
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            mtime: latest.map_or(mtime, |latest| mtime.min(latest)),
            atime: None,
            xattrs: BTreeMap::new(),
            acl_access: None,
            acl_default: None,
        }
    }

    /// Whether an xattr goes into the archive; the module's head has the rule.
    fn is_packed(&self, key: &[u8]) -> bool {
        match key {
            b"security.selinux" => self.options.labels == SecurityLabels::Keep,
            b"security.ima" | b"security.evm" => false,
            _ => !marks::is_union_xattr(key),
        }
    }
}

fn changed(path: &RelPath) -> Error {
    Error::new(
        ErrorKind::FailedPrecondition,
        "file was changed while it was being packed: something is writing to the layer",
    )
    .with_path(path)
}

/// A file's content, counted as it is read. That it has the size it had is the writer's to check.
struct Content<'a, 'p> {
    file: File,
    done: &'a mut Progress,
    progress: &'a mut ProgressFn<'p>,
}

impl Read for Content<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buf)?;
        self.done.bytes = self.done.bytes.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
        report(self.progress, *self.done)?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
