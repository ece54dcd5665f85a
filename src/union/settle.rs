//! Settling: the upper is made to stand on its own, so that every engine reads it alike and it alone is
//! the difference to the layers below.
//!
//! A directory that was renamed has a redirect, and what was not changed in it is still in the lower
//! layers. It is completed in three steps, each of which shows the same tree as before:
//!
//! 1. Everything below it that is in a lower layer is copied up: directories, files, and every name of
//!    a hard-linked file. Redirected directories inside are completed along with it.
//! 2. It is made opaque, which makes its redirect void.
//! 3. Below it, whiteouts hide nothing any more and are removed, as are redirects. At last its own
//!    redirect goes, and the opaque mark, too, where there is nothing below to hide.
//!
//! A kill at any moment leaves a tree that can be used and settled again. What was copied stays copied
//! when it is cancelled. Times of directories stay as they were.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::copyup::Data;
use super::node::Node;
use super::{Listed, Union, UnionSpec, UpperBranch};
use crate::error::{Error, IoContext, Result};
use crate::layer::{LayerFormat, marks};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::dir::{Dir, set_times};
use crate::sys::resolve::open_beneath;
use crate::sys::xattr::{self, Of};

/// What settling did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settled {
    /// Renamed directories that were completed.
    pub(crate) directories: u64,
    /// Files and directories that were copied.
    pub(crate) copied: u64,
}

/// Settles an upper. Nobody else may use it or its work directory meanwhile.
///
/// # Errors
/// Those of copying; [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled). The tree is as it was, and
/// may be settled again.
pub(crate) fn settle(spec: UnionSpec, progress: &mut ProgressFn<'_>) -> Result<Settled> {
    let union = Union::open(spec)?;
    let Some(upper) = &union.upper else { return Ok(Settled::default()) };
    let mut walk = Walk {
        union: &union,
        upper,
        progress,
        told: Progress::new(Phase::Walk),
        settled: Settled::default(),
    };
    walk.run()?;
    let settled = walk.settled;
    union.close().at("write to disk", "the settled layer")?;
    upper.work.no_redirects().at("note that it is settled in", "the work directory")?;
    Ok(settled)
}

struct Walk<'a, 'p> {
    union: &'a Union,
    upper: &'a UpperBranch,
    progress: &'a mut ProgressFn<'p>,
    told: Progress,
    settled: Settled,
}

/// A directory on the way down.
struct Frame {
    node: Arc<Node>,
    path: RelPath,
    names: std::vec::IntoIter<Arc<Name>>,
    /// Its contents are to be complete.
    complete: bool,
    /// It is the topmost such: where marks change.
    top: bool,
}

impl Walk<'_, '_> {
    fn run(&mut self) -> Result<()> {
        let root = Arc::clone(self.union.root());
        let mut way = vec![self.frame(root, RelPath::ROOT, false)?];
        while let Some(frame) = way.last_mut() {
            let Some(name) = frame.names.next() else {
                if let Some(frame) = way.pop()
                    && frame.top
                {
                    let above = way.last().map(|above| Arc::clone(&above.node));
                    self.finish(above.as_ref(), &frame)
                        .map_err(|e| failed("settle", &frame.path, e))?;
                    self.settled.directories = self.settled.directories.saturating_add(1);
                }
                continue;
            };
            let (node, complete) = (Arc::clone(&frame.node), frame.complete);
            let path = frame.path.join(&name);
            self.told.entries = self.told.entries.saturating_add(1);
            report(self.progress, self.told)?;
            let below = self
                .step(&node, &name, complete)
                .map_err(|e| failed("copy into the layer", &path, e))?;
            if let Some(child) = below {
                let next = self.frame(child, path, complete)?;
                way.push(next);
            }
        }
        Ok(())
    }

    fn frame(&self, node: Arc<Node>, path: RelPath, inside: bool) -> Result<Frame> {
        let look = || -> io::Result<_> {
            let (dir, _) = self.union.own_dir(&node)?;
            let redirected = node.state.lock().is_upper() && has_redirect(self.upper.format, &dir)?;
            let mut names = Vec::new();
            self.union.list(&node, 0, |_, entry| {
                if let Listed::Name(name) = entry {
                    names.push(name);
                }
                Ok(true)
            })?;
            Ok((redirected, names.into_iter()))
        };
        let (redirected, names) = look().map_err(|e| failed("look through", &path, e))?;
        let (complete, top) = (inside || redirected, redirected && !inside);
        Ok(Frame { node, path, names, complete, top })
    }

    /// Deals with a name; a directory to go down into comes back.
    fn step(
        &mut self,
        parent: &Arc<Node>,
        name: &Name,
        complete: bool,
    ) -> io::Result<Option<Arc<Node>>> {
        let Some(node) = self.union.resolve(parent, name)? else { return Ok(None) };
        let in_upper = node.state.lock().is_upper();
        if node.is_dir() {
            if complete && !in_upper {
                self.union.copy_up(&node, Data::All)?;
                self.settled.copied = self.settled.copied.saturating_add(1);
            }
            // What is in lower layers alone has no redirects of the upper.
            return Ok((complete || in_upper).then_some(node));
        }
        if !complete {
            return Ok(None);
        }
        if !in_upper {
            self.union.copy_up(&node, Data::All)?;
            self.settled.copied = self.settled.copied.saturating_add(1);
        }
        // One of several names, of which another was copied up.
        let dir = self.union.upper_dir(parent)?;
        if dir.try_stat_at(name)?.is_none() {
            let before = dir.stat()?;
            self.union.at(&node, |place, _, _| place.link(&dir, name))?;
            set_times(&*dir, before.atime, before.mtime)?;
        }
        Ok(None)
    }

    /// Everything below a redirected directory is in the upper: it stands on its own.
    fn finish(&self, above: Option<&Arc<Node>>, frame: &Frame) -> io::Result<()> {
        let format = self.upper.format;
        let dir = self.union.upper_dir(&frame.node)?;
        // What was copied is on disk before anything relies on it.
        self.upper.dir.sync_file_system()?;
        let before = dir.stat()?;
        marks::make_opaque(format, &dir)?;
        remove_marks(format, &dir)?;
        remove_redirect(format, &dir)?;
        let hides = match (above, frame.path.file_name()) {
            (Some(above), Some(name)) => {
                let view = self.union.view(above)?;
                self.union.shown_below(&view, &name)?.is_some_and(|stat| stat.is_dir())
            }
            _ => true,
        };
        if !hides {
            remove_opaque(format, &dir)?;
        }
        set_times(&*dir, before.atime, before.mtime)
    }
}

/// A directory that is opaque and has a redirect nevertheless is one at which an earlier settling stopped in
/// its third step.
fn has_redirect(format: LayerFormat, dir: &Dir) -> io::Result<bool> {
    Ok(marks::redirect(format, dir)?.is_some())
}

fn remove_redirect(format: LayerFormat, dir: &Dir) -> io::Result<()> {
    match format.xattr_prefix() {
        Some(prefix) => xattr::remove(Of::dir(dir), format!("{prefix}redirect").as_bytes()),
        None => Ok(()),
    }
}

fn remove_opaque(format: LayerFormat, dir: &Dir) -> io::Result<()> {
    match format.xattr_prefix() {
        Some(prefix) => xattr::remove(Of::dir(dir), format!("{prefix}opaque").as_bytes()),
        None => Ok(()),
    }
}

/// Removes whiteouts, opaque marks and redirects below an opaque directory, where they mean nothing.
fn remove_marks(format: LayerFormat, top: &Dir) -> io::Result<()> {
    // By path, so that width and depth cost no descriptors.
    let mut left = vec![RelPath::ROOT];
    while let Some(path) = left.pop() {
        let dir = open_beneath(top, &path)?;
        let before = dir.stat()?;
        if !path.is_root() {
            // Before the whiteouts: an opaque directory above does not make it void, and without them it
            // would show what was deleted.
            remove_redirect(format, &dir)?;
        }
        let mut changed = false;
        for entry in dir.entries()? {
            let stat = dir.stat_at(&entry.name)?;
            if marks::decode(format, &entry.name, &stat) != marks::Mark::None {
                dir.unlink(&entry.name)?;
                changed = true;
            } else if stat.is_dir() {
                left.push(path.join(&entry.name));
            }
        }
        if changed {
            set_times(&dir, before.atime, before.mtime)?;
        }
        if !path.is_root() {
            remove_opaque(format, &dir)?;
        }
    }
    Ok(())
}

fn failed(what: &'static str, path: &RelPath, e: io::Error) -> Error {
    Error::io(what, OsStr::from_bytes(path.as_bytes()), e)
}
