//! What changed from one tree to another, as a layer archive: unpacked over the lower tree it gives
//! the upper one, modification times included.
//!
//! So it has more than what [`changes`](crate::changes) lists: files and directories whose mtime
//! alone differs; the directories above whatever it has, with their attributes; and files that did
//! not change but have a name more, or are one file no longer. A hard link needs its target in the
//! same archive: if one name of a file is in it, all are, the first in order as the file. (But for
//! names in a layer's directory that both trees share, which are not looked at: if the upper tree shows
//! a further name of such a file that the lower one hides, that is packed as a file of its own.)
//!
//! Two walks: one of both trees, which finds what to pack and refuses what no archive can say before
//! the first byte, and one over what it found. Between them memory holds the paths that differ, a new
//! directory as one, and all that have hard links. Opaque marks are never needed.
//!
//! What an archive cannot hold is a socket: it is left out, what it replaced is deleted.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::{Export, ExportOptions, Exported, NAME_OF_MARK, NO_WHITEOUT, changed, reads_as_mark};
use crate::archive::entry::EntryKind;
use crate::changes::{self, Change, ChangeKind, Difference, Mtimes};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::cursor::Cursor;
use crate::layer::marks;
use crate::layer::stack::{LayerStack, Visible};
use crate::layer::walk::Visit;
use crate::path::{Name, RelPath};
use crate::progress::{ProgressFn, ignore_progress};
use crate::sys::dir::Dir;
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::Of;

/// What makes the directory `upper` from the directory `lower`, sorted by path.
///
/// Files are equal if they are the same inode, or if type, mode, owner, device number, link target,
/// xattrs and size are and, where modification times differ or are on a whole second, contents. A
/// directory that differs only in times is no change. Of a deleted directory only itself is told.
///
/// # Errors
/// Those of the file system, and [`ErrorKind::Cancelled`] by `progress`.
pub fn diff_trees(
    lower: impl AsRef<Path>,
    upper: impl AsRef<Path>,
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<Change>> {
    changes::between(&plain(upper.as_ref())?, &plain(lower.as_ref())?, progress)
}

/// Writes what makes the directory `upper` from the directory `lower` as an uncompressed layer archive:
/// unpacked over `lower` it gives `upper`. Neither needs to be a layer; every name and xattr is just
/// that.
///
/// ```
/// use stratafs::{ApplyOptions, ExportOptions, LayerTarget, apply_layer, export_diff, ignore_progress};
/// # let tmp = tempfile::tempdir()?;
/// # let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
/// # std::fs::create_dir_all(&old)?;
/// # std::fs::create_dir_all(&new)?;
/// # std::fs::write(old.join("gone"), "")?;
/// # std::fs::write(new.join("here"), "")?;
/// let mut layer = Vec::new();
/// export_diff(&old, &new, &mut layer, &ExportOptions::new(), &mut ignore_progress)?;
/// let options = ApplyOptions::unprivileged();
/// apply_layer(&layer[..], &old, LayerTarget::Tree, &options, &mut ignore_progress)?;
/// assert!(old.join("here").exists() && !old.join("gone").exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// - [`ErrorKind::FailedPrecondition`]: something differs that no archive can say: a file whose name
///   reads as a whiteout, the deletion of a name too long for one, the character device 0:0. Nothing
///   is written then. Or `upper` was changed while it was read.
/// - [`ErrorKind::Cancelled`] by `progress`, and those of the file system and of `out`.
pub fn export_diff(
    lower: impl AsRef<Path>,
    upper: impl AsRef<Path>,
    out: &mut dyn Write,
    options: &ExportOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<Exported> {
    let (lower, upper) = (plain(lower.as_ref())?, plain(upper.as_ref())?);
    export_trees(&upper, &lower, out, options, progress)
}

fn plain(path: &Path) -> Result<LayerStack> {
    let dir = Dir::open(path).at("open directory", path)?;
    Ok(LayerStack::plain(Arc::new(dir)))
}

/// As [`export_diff`], of any two trees without redirects.
pub(crate) fn export_trees(
    upper: &LayerStack,
    lower: &LayerStack,
    out: &mut dyn Write,
    options: &ExportOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<Exported> {
    let mut plan = Plan::default();
    changes::trees(upper, lower, Mtimes::Count, progress, &mut |found| plan.note(found))?;
    let steps = plan.finish();
    std::thread::scope(|scope| {
        let mut export = Export::new(out, options, scope);
        if let Some(dir) = upper.root()?.own() {
            let stat = dir.stat().at("look at", "the root directory")?;
            let root = export.entry(&RelPath::ROOT, &stat, Of::dir(dir), EntryKind::Directory)?;
            export.append(&root, progress)?;
        }
        let mut cursor = Cursor::new(upper);
        for Step { path, pack } in &steps {
            if *pack == Pack::Whiteout {
                let (parent, name) = split(path)?;
                let mark = marks::whiteout_name(&name).ok_or_else(|| changed(path))?;
                export.mark(parent.join(&mark), progress)?;
                continue;
            }
            let (parent, name) = split(path)?;
            let found = match cursor.directory(&parent)? {
                Some(dir) => dir.lookup(&name)?,
                None => None,
            };
            let found = found.ok_or_else(|| changed(path))?;
            export.found(path, &found, progress)?;
            if *pack == Pack::AllBelow {
                changes::added(upper, path, &mut ignore_progress, &mut |below| {
                    let found = below.upper.ok_or_else(|| changed(below.path))?;
                    export.found(below.path, found, progress)
                })?;
            }
        }
        export.finish()
    })
}

impl Export<'_, '_, '_> {
    fn found(
        &mut self,
        path: &RelPath,
        found: &Visible,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        // The plan was made of what has such a name; one that has it now came in between.
        check(path, found)?;
        let visit = Visit { path, dir: &found.dir, name: &found.name, stat: &found.stat };
        self.seen(&visit, progress).map(drop)
    }
}

/// Refuses what no archive can say.
fn check(path: &RelPath, found: &Visible) -> Result<()> {
    let why = if reads_as_mark(&found.name) {
        NAME_OF_MARK
    } else if marks::is_zero_device(&found.stat) {
        "cannot pack the character device 0:0: to overlayfs it is a whiteout"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::FailedPrecondition, why).with_path(path))
}

fn split(path: &RelPath) -> Result<(RelPath, Name)> {
    path.parent().zip(path.file_name()).ok_or_else(|| changed(path))
}

/// One thing to pack.
#[derive(Debug)]
struct Step {
    path: RelPath,
    pack: Pack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pack {
    /// The mark that deletes it.
    Whiteout,
    /// A directory that is new, with all below it.
    AllBelow,
    /// What is there; of a directory only itself.
    Entry,
}

/// Device and inode number.
type Inode = (u64, u64);

/// A name, among several of its file in either tree, that did not change.
#[derive(Debug)]
struct Linked {
    path: RelPath,
    upper: Inode,
    lower: Inode,
}

/// What is to be packed, as the walk finds it.
#[derive(Debug, Default)]
struct Plan {
    steps: Vec<Step>,
    /// The directory that is packed as a whole, while the walk is below it.
    whole: Option<RelPath>,
    /// The last directory that was noted for what is in it; those above it were too.
    noted: Option<RelPath>,
    linked: Vec<Linked>,
    /// The files of the upper tree with a name that is packed.
    packed: HashSet<Inode>,
}

impl Plan {
    fn note(&mut self, found: &Difference<'_>) -> Result<()> {
        let path = found.path;
        let Some(new) = found.upper else {
            let (_, name) = split(path)?;
            if marks::whiteout_name(&name).is_none() {
                return Err(Error::new(ErrorKind::FailedPrecondition, NO_WHITEOUT).with_path(path));
            }
            self.step(path, Pack::Whiteout);
            return Ok(());
        };
        let stat = &new.stat;
        let Some(kind) = found.kind else {
            self.note_unchanged(path, stat, found.lower);
            return Ok(());
        };
        check(path, new)?;
        if stat.nlink > 1 && !stat.is_dir() {
            self.packed.insert(inode(stat));
        }
        if self.whole.as_ref().is_some_and(|top| path.starts_with(top)) {
            return Ok(());
        }
        let unpackable = matches!(stat.file_type, FileType::Socket | FileType::Unknown);
        if unpackable && kind == ChangeKind::Modified {
            self.step(path, Pack::Whiteout);
        }
        if stat.is_dir() && !found.lower.is_some_and(|old| old.stat.is_dir()) {
            self.whole = Some(path.clone());
            self.step(path, Pack::AllBelow);
        } else {
            self.step(path, Pack::Entry);
        }
        Ok(())
    }

    fn note_unchanged(&mut self, path: &RelPath, stat: &Stat, lower: Option<&Visible>) {
        if let Some(old) = lower
            && !stat.is_dir()
            && stat.nlink.max(old.stat.nlink) > 1
        {
            let (upper, lower) = (inode(stat), inode(&old.stat));
            self.linked.push(Linked { path: path.clone(), upper, lower });
        }
    }

    /// Packs `path`, and before it the directories above.
    fn step(&mut self, path: &RelPath, pack: Pack) {
        let mut above = path.parent();
        while let Some(dir) = above
            && !dir.is_root()
            && !self.noted.as_ref().is_some_and(|noted| noted.starts_with(&dir))
        {
            above = dir.parent();
            self.steps.push(Step { path: dir, pack: Pack::Entry });
        }
        self.noted = path.parent();
        self.steps.push(Step { path: path.clone(), pack });
    }

    /// What to pack, in the order of archives.
    fn finish(mut self) -> Vec<Step> {
        self.part_links();
        for Linked { path, upper, .. } in std::mem::take(&mut self.linked) {
            if self.packed.contains(&upper) {
                self.step(&path, Pack::Entry);
            }
        }
        let mut steps = self.steps;
        steps.sort_by(order);
        steps.dedup_by(|later, first| order(later, first) == Ordering::Equal);
        steps
    }

    /// Notes for packing whatever is one file in one tree and several in the other.
    fn part_links(&mut self) {
        let (mut lowers, mut uppers) = (HashMap::new(), HashMap::new());
        for Linked { upper, lower, .. } in &self.linked {
            if lowers.entry(upper).or_insert(lower) != &lower {
                self.packed.insert(*upper);
            }
            let first = uppers.entry(lower).or_insert(upper);
            if first != &upper {
                self.packed.extend([*upper, **first]);
            }
        }
    }
}

fn inode(stat: &Stat) -> Inode {
    (stat.dev, stat.ino)
}

/// The order of archives: a directory, in it the whiteouts, then the rest.
fn order(a: &Step, b: &Step) -> Ordering {
    let (mut left, mut right) = (names(a).peekable(), names(b).peekable());
    loop {
        return match (left.next(), right.next()) {
            (None, None) => Ordering::Equal,
            (None, Some(_)) => Ordering::Less,
            (Some(_), None) => Ordering::Greater,
            (Some(x), Some(y)) if x == y => continue,
            (Some(x), Some(y)) => x.cmp(&y),
        };
    }
}

/// The names of a path, each with 0 before it if it is a whiteout's.
fn names(step: &Step) -> impl Iterator<Item = (u8, &[u8])> {
    let mut names = step.path.as_bytes().split(|b| *b == b'/').peekable();
    std::iter::from_fn(move || {
        let name = names.next()?;
        let is_mark = names.peek().is_none() && step.pack == Pack::Whiteout;
        Some((u8::from(!is_mark), name))
    })
}

#[cfg(test)]
mod tests;
