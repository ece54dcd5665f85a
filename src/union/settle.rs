//! Settling: the upper is made to stand on its own, so that every engine reads it alike and it alone is
//! the difference to the layers below.
//!
//! A file whose data are in a lower layer gets them: see `metacopy`.
//!
//! A directory that was renamed has a redirect, and what was not changed in it is still in the lower
//! layers. It is completed in three steps, each of which shows the same tree as before:
//!
//! 1. Everything below it that is in a lower layer is copied up: directories, files, and every name of
//!    a hard-linked file. Redirected directories inside are completed along with it.
//! 2. It is made opaque, which makes its redirect void.
//! 3. Below it marks have become meaningless, and are removed: of each directory first its redirect,
//!    which an opaque directory above does not make void, then the whiteouts in it. At last its own
//!    redirect goes, and the opaque mark, too, where there is nothing below to hide.
//!
//! A kill at any moment leaves a tree that can be used and settled again. What was copied stays copied
//! when it is cancelled. A directory that has a redirect though it is opaque is one at which an earlier
//! settling came to its third step: that is taken up again. Times of directories stay as they were, but
//! for that of one whose names were just being changed at a kill.

use std::ffi::OsStr;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::copyup::Data;
use super::node::Node;
use super::workdir::Marker;
use super::{Listed, Union, UnionSpec, UpperBranch, complete};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::descent::{Descent, Purpose};
use crate::layer::{LayerFormat, marks};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn, on_another_thread, report};
use crate::sys::dir::{Dir, set_times};
use crate::sys::file::Place;
use crate::sys::stat::FileType;
use crate::sys::xattr::{self, Of};

/// What settling a layer did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Settled {
    /// Renamed directories that were completed, those inside of others not counted.
    pub directories: u64,
    /// Files of which only attributes were in the layer, and that got their data.
    pub files: u64,
    /// Files and directories that were copied into the layer.
    pub copied: u64,
    /// The size of all those files, in bytes.
    pub bytes: u64,
}

/// Settles an upper. Nobody else may use it or its work directory meanwhile.
///
/// # Errors
/// Those of copying; [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled). The tree is as it was, and
/// may be settled again.
pub(crate) fn settle(spec: UnionSpec, progress: &mut ProgressFn<'_>) -> Result<Settled> {
    // It sets the umask, and the caller's thread is the caller's.
    on_another_thread(|progress| settle_here(spec, progress), progress)
}

fn settle_here(spec: UnionSpec, progress: &mut ProgressFn<'_>) -> Result<Settled> {
    let union = Union::open(spec)?;
    let Some(upper) = &union.upper else { return Ok(Settled::default()) };
    let mut walk = Walk {
        union: &union,
        upper,
        progress,
        told: Progress::new(Phase::Copy),
        settled: Settled::default(),
    };
    if union.links.lacks_originals() {
        return Err(Error::new(
            ErrorKind::FailedPrecondition,
            "files that had several names in a lower layer are not there: these are not the layers that \
             the upper was made on; settle it with those",
        ));
    }
    walk.place_names()?;
    walk.run()?;
    // Of files in renamed directories, which were copied only now.
    walk.place_names()?;
    let settled = walk.settled;
    union.close().at("write to disk", "the settled layer")?;
    // Every name is in the upper.
    union.forget_links().at("forget the links in", "the work directory")?;
    for marker in Marker::ALL {
        upper.work.clear(marker).at("note that it is settled in", "the work directory")?;
    }
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
    names: std::vec::IntoIter<Name>,
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
                    self.finish(above.as_ref(), &frame)?;
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

    /// Gives copies of files with several names in a lower layer all of them.
    fn place_names(&mut self) -> Result<()> {
        if !self.union.lacks_names().at("look at the links in", "the work directory")? {
            return Ok(());
        }
        let mut reported = Ok(());
        let mut step = || {
            self.told.entries = self.told.entries.saturating_add(1);
            reported = report(self.progress, self.told);
            if reported.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        self.union
            .place_all_names(&mut step)
            .at("place the names of hard links in", "the layer")?;
        reported
    }

    fn frame(&self, node: Arc<Node>, path: RelPath, inside: bool) -> Result<Frame> {
        let look = || -> io::Result<_> {
            let (dir, _) = self.union.own_dir(&node)?;
            let redirected = node.state.lock().is_upper() && has_redirect(self.upper.format, &dir)?;
            let mut names = Vec::new();
            self.union.list(&node, 0, |_, entry| {
                if let Listed::Name(placed) = entry {
                    names.push(placed.name);
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
        let data_below = node.state.lock().below.is_some();
        if in_upper && !data_below && node.kind == FileType::Regular {
            let dir = self.union.upper_dir(parent)?;
            if dir.try_stat_at(name)?.is_some() {
                complete::strip_void_marks(self.upper.format, &dir, name)?;
            }
        }
        if data_below {
            self.union.complete(&node, Data::All)?;
            self.settled.files = self.settled.files.saturating_add(1);
            self.count_bytes(&node)?;
        }
        if !complete {
            return Ok(None);
        }
        if !in_upper {
            self.union.copy_up(&node, Data::All)?;
            self.settled.copied = self.settled.copied.saturating_add(1);
            self.count_bytes(&node)?;
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

    /// Adds what was copied of a file.
    fn count_bytes(&mut self, node: &Arc<Node>) -> io::Result<()> {
        let stat = self.union.at(node, |place, _, _| place.stat())?;
        if stat.is_file() {
            self.settled.bytes = self.settled.bytes.saturating_add(stat.size);
            self.told.bytes = self.settled.bytes;
        }
        Ok(())
    }

    /// Everything below a redirected directory is in the upper: it stands on its own.
    fn finish(&mut self, above: Option<&Arc<Node>>, frame: &Frame) -> Result<()> {
        let format = self.upper.format;
        let failed = |what| move |e| failed(what, &frame.path, e);
        let dir = self.union.upper_dir(&frame.node).map_err(failed("open"))?;
        // What was copied is on disk before anything relies on it.
        self.upper.dir.sync_file_system().at("write to disk", "the layer")?;
        despite_mode(&dir, || marks::make_opaque(format, &dir)).map_err(failed("make opaque"))?;
        self.remove_marks(&dir, &frame.path)?;
        report(self.progress, self.told)?;
        remove_mark(format, &dir, "redirect").map_err(failed("remove the redirect of"))?;
        let hides = match (above, frame.path.file_name()) {
            (Some(above), Some(name)) => {
                let look = || {
                    let view = self.union.view(above)?;
                    self.union.shown_below(&view, &name)
                };
                look().map_err(failed("look below"))?.is_some_and(|stat| stat.is_dir())
            }
            _ => true,
        };
        // A kill right here leaves a mark that hides nothing.
        if !hides {
            remove_mark(format, &dir, "opaque").map_err(failed("remove the opaque mark of"))?;
        }
        Ok(())
    }

    /// Removes all marks below an opaque directory, and the whiteouts in it.
    fn remove_marks(&mut self, top: &Dir, path: &RelPath) -> Result<()> {
        let format = self.upper.format;
        let mut path = path.clone();
        let open = || Descent::<Vec<Name>>::new(top.reopen()?, Purpose::Look);
        let mut walk = open().map_err(|e| failed("open", &path, e))?;
        loop {
            report(self.progress, self.told)?;
            let below = remove_whiteouts(format, walk.dir())
                .map_err(|e| failed("remove whiteouts in", &path, e))?;
            walk.level_mut().data = below;
            let name = loop {
                if let Some(name) = walk.level_mut().data.pop() {
                    break name;
                }
                let at_top = walk.depth() == 0;
                walk.leave().map_err(|e| failed("leave directory", &path, e))?;
                if at_top {
                    return Ok(());
                }
                path.pop();
            };
            path.push(&name);
            report(self.progress, self.told)?;
            walk.enter(&name).map_err(|e| failed("open directory", &path, e))?;
            let dir = walk.dir();
            // As long as it had its redirect, the whiteouts in it had a meaning.
            remove_mark(format, dir, "redirect")
                .and_then(|()| remove_mark(format, dir, "opaque"))
                .map_err(|e| failed("remove the marks of", &path, e))?;
        }
    }
}

/// Whether a directory has a redirect, void or not.
fn has_redirect(format: LayerFormat, dir: &Dir) -> io::Result<bool> {
    let Some(prefix) = format.xattr_prefix() else { return Ok(false) };
    Ok(xattr::get(Of::dir(dir), format!("{prefix}redirect").as_bytes())?.is_some())
}

/// Removes a mark that a directory may have.
fn remove_mark(format: LayerFormat, dir: &Dir, mark: &str) -> io::Result<()> {
    let Some(prefix) = format.xattr_prefix() else { return Ok(()) };
    let key = format!("{prefix}{mark}");
    despite_mode(dir, || xattr::remove(Of::dir(dir), key.as_bytes()))
}

/// Removes the whiteouts in a directory, whose times stay as they are; gives the directories in it.
fn remove_whiteouts(format: LayerFormat, dir: &Dir) -> io::Result<Vec<Name>> {
    let mut below = Vec::new();
    let mut whiteouts = Vec::new();
    for entry in dir.entries()? {
        let stat = dir.stat_at(&entry.name)?;
        if marks::decode(format, &entry.name, &stat) != marks::Mark::None {
            whiteouts.push(entry.name);
        } else if stat.is_dir() {
            below.push(entry.name);
        }
    }
    if !whiteouts.is_empty() {
        let before = dir.stat()?;
        whiteouts.iter().try_for_each(|name| despite_mode(dir, || dir.unlink(name)))?;
        set_times(dir, before.atime, before.mtime)?;
    }
    Ok(below)
}

fn despite_mode(dir: &Dir, work: impl Fn() -> io::Result<()>) -> io::Result<()> {
    Place::dir(dir).despite_its_mode(work)
}

fn failed(what: &'static str, path: &RelPath, e: io::Error) -> Error {
    Error::io(what, OsStr::from_bytes(path.as_bytes()), e)
}
