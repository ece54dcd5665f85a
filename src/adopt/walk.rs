//! The way through a foreign directory: directories before their contents, names in byte order.
//!
//! As long as no directory on the way was opaque or renamed, the walk is of the foreign directory
//! alone, and its marks say what is hidden from below ([`Scope::Delta`]). In an opaque or renamed
//! directory nothing shows from below, so that marks say nothing more; and in a renamed one the walk is
//! of the union that it shows ([`Scope::Whole`]).
//!
//! Depth is bounded by nothing: the topmost directories on the way are closed when there are too many
//! descriptors, and opened again on the way back, where they must still be the same.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::attributes::Attributes;
use super::report::Finding;
use super::union::{DirMarks, Listing, Part, changed, refuse};
use super::{Adoption, refuse_layer_home};
use crate::error::{Error, IoContext, Result};
use crate::layer::{foreign, marks};
use crate::path::{Name, RelPath};
use crate::progress::report;
use crate::sys::dir::Dir;
use crate::sys::file::Place;
use crate::sys::stat::Stat;
use crate::sys::xattr::Of;

/// How many foreign directories are held open, the one that is worked in not counted.
const HELD: usize = 64;

/// What shows through a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Lower layers.
    Delta,
    /// Nothing.
    Whole,
}

/// A directory on the way.
#[derive(Debug)]
pub(super) struct Frame {
    /// The foreign directories that merge in it: one, but where it was renamed.
    pub(super) parts: Vec<Part>,
    pub(super) scope: Scope,
    attributes: Attributes,
    /// What is left to do: each name with the index of the part that has it.
    entries: std::vec::IntoIter<(Name, usize)>,
}

impl Adoption<'_> {
    /// All of it.
    pub(super) fn run(&mut self) -> Result<()> {
        let (root, marks) = self.stack.root(0)?;
        let shown = self.stack.shown(0, &RelPath::ROOT);
        refuse_layer_home(&**root.dir()?, &shown)?;
        self.begin(vec![root], Scope::Delta, &marks)?;
        while let Some(frame) = self.frames.last_mut() {
            match frame.entries.next() {
                Some((name, part)) => {
                    self.path.push(&name);
                    if !self.entry(&name, part)? {
                        self.path.pop();
                    }
                }
                None => self.leave()?,
            }
        }
        let mut open: Vec<Name> = std::mem::take(&mut self.pseudo_links)
            .into_values()
            .filter_map(|(name, count)| (count < 2).then_some(name))
            .collect();
        open.sort_unstable();
        let dir = RelPath::from(Name::new(foreign::PSEUDO_LINKS)?);
        for name in open {
            self.report.open_pseudo_links.add(&dir.join(&name), self.options.report_paths);
        }
        Ok(())
    }

    /// Starts on the directory in which the target stands.
    fn begin(&mut self, parts: Vec<Part>, scope: Scope, marks: &DirMarks) -> Result<()> {
        let Some(top) = parts.first() else {
            return Err(changed(&self.path));
        };
        let dir = Arc::clone(top.dir()?);
        let (layer, path, stat) = (top.layer, top.path.clone(), top.before);
        let attributes = self.read_attributes(Of::dir(&dir), stat, layer, &path)?;
        let keep = self.options.report_paths;
        let scope = match scope {
            Scope::Delta if marks.opaque || parts.len() > 1 => {
                let of = if parts.len() > 1 {
                    &mut self.report.redirects
                } else {
                    &mut self.report.opaque_directories
                };
                of.add(&self.path, keep);
                let dir = Arc::clone(self.target.dir());
                marks::make_opaque(self.format, &dir).at("make opaque", &self.path)?;
                if self.format.xattr_prefix().is_none() {
                    self.count_mark(&dir, &Name::new(marks::OPAQUE_NAME)?)?;
                }
                self.has_marks = true;
                Scope::Whole
            }
            Scope::Whole if marks.opaque => {
                self.report.void_marks.add(&self.path, keep);
                Scope::Whole
            }
            same => same,
        };
        let mut seen: BTreeMap<Name, Option<usize>> = BTreeMap::new();
        let one = parts.len() == 1;
        let mut entries = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let listing = self.stack.list(part)?;
            if part.layer == 0 {
                self.take_marks(part, &listing, scope)?;
            }
            for name in &listing.plain_marks {
                self.report.plain_marks.add(&self.path.join(name), keep);
            }
            if one {
                entries = listing.names.into_iter().map(|name| (name, 0)).collect();
                break;
            }
            for name in listing.names {
                seen.entry(name).or_insert(Some(index));
            }
            for name in listing.whiteouts.into_keys() {
                seen.entry(name).or_insert(None);
            }
        }
        if !one {
            entries = seen.into_iter().filter_map(|(name, part)| Some((name, part?))).collect();
        }
        let entries = entries.into_iter();
        self.frames.push(Frame { parts, scope, attributes, entries });
        self.close_some();
        Ok(())
    }

    /// Does what the marks in a part of the foreign directory itself say.
    fn take_marks(&mut self, part: &Part, listing: &Listing, scope: Scope) -> Result<()> {
        let keep = self.options.report_paths;
        for (name, by_xattr) in &listing.whiteouts {
            let path = self.path.join(name);
            if scope == Scope::Whole {
                self.report.void_marks.add(&path, keep);
                continue;
            }
            let dir = Arc::clone(self.target.dir());
            let made = marks::make_whiteout(self.format, &dir, name);
            made.at("make a whiteout for", &path)?;
            let beside = marks::separate_whiteout(self.format, name);
            self.count_mark(&dir, beside.as_ref().unwrap_or(name))?;
            self.has_marks = true;
            let of: &mut Finding = if *by_xattr {
                &mut self.report.xattr_whiteouts
            } else {
                &mut self.report.whiteouts
            };
            of.add(&path, keep);
        }
        for name in &listing.internal {
            self.report.internal.add(&self.path.join(name), keep);
        }
        if let Some(name) = &listing.pseudo_links {
            self.report.internal.add(&self.path.join(name), keep);
            self.note_pseudo_links(part, name)?;
        }
        Ok(())
    }

    /// Goes into the directory `name`, which the part of this index has.
    pub(super) fn enter(&mut self, name: &Name, index: usize) -> Result<()> {
        let Some(frame) = self.frames.last() else {
            return Err(changed(&self.path));
        };
        let part = frame.parts.get(index).ok_or_else(|| changed(&self.path))?;
        let scope = frame.scope;
        let (child, mut marks) = self.stack.child(part, name)?;
        let parts = match scope {
            // The layers below are asked only for what is not here.
            Scope::Delta if marks.redirect.is_none() || marks.opaque => vec![child],
            Scope::Delta => {
                let rest = self.below(part)?;
                let redirect = marks.redirect.take();
                self.stack.merge(child, DirMarks { opaque: false, redirect }, name, &rest)?
            }
            Scope::Whole => {
                let rest = frame.parts.get(index.saturating_add(1)..).unwrap_or_default();
                let opaque = marks.opaque;
                let parts = self.stack.merge(child, std::mem::take(&mut marks), name, rest)?;
                marks.opaque = opaque;
                parts
            }
        };
        let dir = self.target.dir();
        dir.make_dir(name, 0o700).at("make directory", &self.path)?;
        self.target.enter(name).at("open directory", &self.path)?;
        self.begin(parts, scope, &marks)
    }

    /// The same directory in the layers below, through which a part in [`Scope::Delta`] is seen.
    pub(super) fn below(&self, part: &Part) -> Result<Vec<Part>> {
        if self.stack.has_below(part.layer) {
            self.stack.directory(part.layer.saturating_add(1), &part.path)
        } else {
            Ok(Vec::new())
        }
    }

    /// Leaves the directory: it gets its attributes, and what it was read from must be what it was.
    fn leave(&mut self) -> Result<()> {
        let Some(frame) = self.frames.pop() else {
            return Ok(());
        };
        for part in &frame.parts {
            let shown = self.stack.shown(part.layer, &part.path);
            let now = part.dir()?.stat().map_err(|e| Error::io("look at", &shown, e))?;
            if (now.mtime, now.ctime) != (part.before.mtime, part.before.ctime) {
                return Err(changed(shown));
            }
        }
        let dir = Arc::clone(self.target.dir());
        self.give(&frame.attributes, Place::dir(&dir))?;
        self.counter.add(&dir.stat().at("look at", &self.path)?);
        drop(dir);
        self.count()?;
        self.target.leave().at("leave directory", &self.path)?;
        self.path.pop();
        self.open_again(&frame)
    }

    /// One entry more.
    pub(super) fn count(&mut self) -> Result<()> {
        self.done.entries = self.done.entries.saturating_add(1);
        report(self.progress, self.done)
    }

    /// A mark that is a file takes room too.
    fn count_mark(&mut self, dir: &Dir, mark: &Name) -> Result<()> {
        self.counter.add(&dir.stat_at(mark).at("look at the mark", self.path.join(mark))?);
        Ok(())
    }

    /// Closes the topmost directories on the way while there are too many, but for the last.
    fn close_some(&mut self) {
        let Some((_, above)) = self.frames.split_last_mut() else {
            return;
        };
        let mut held: usize =
            above.iter().flat_map(|f| &f.parts).filter(|p| p.dir.is_some()).count();
        for part in above.iter_mut().flat_map(|frame| &mut frame.parts) {
            if held <= HELD {
                break;
            }
            if part.dir.take().is_some() {
                held = held.saturating_sub(1);
            }
        }
    }

    /// Opens the directory above again, if it was closed: through the one that was left where that leads
    /// to it, else from its layer's root.
    fn open_again(&mut self, left: &Frame) -> Result<()> {
        let Some(frame) = self.frames.last_mut() else {
            return Ok(());
        };
        for part in frame.parts.iter_mut().filter(|part| part.dir.is_none()) {
            let shown = self.stack.shown(part.layer, &part.path);
            let fail = |e: io::Error| Error::io("open again", &shown, e);
            let mut found = None;
            for below in left.parts.iter().filter(|below| below.layer == part.layer) {
                let dir = below.dir()?.open_parent().map_err(fail)?;
                if dir.stat().map_err(fail)?.same_inode(&part.before) {
                    found = Some(dir);
                }
            }
            let dir = match found {
                Some(dir) => dir,
                None => {
                    let mut dir = self.stack.branch(part.layer)?.dir.reopen().map_err(fail)?;
                    for name in part.path.components() {
                        dir = dir.open_dir(&name).map_err(fail)?;
                    }
                    dir
                }
            };
            if !dir.stat().map_err(fail)?.same_inode(&part.before) {
                return Err(changed(&shown));
            }
            part.dir = Some(Arc::new(dir));
        }
        Ok(())
    }

    /// Refuses what the new layer's format would take for a mark.
    pub(super) fn refuse_mark(&self, name: &Name, stat: &Stat) -> Result<()> {
        if marks::decode(self.format, name, stat) == marks::Mark::None {
            return Ok(());
        }
        let message = format!(
            "in a store of format {} it would be a mark: it cannot be kept there",
            self.format
        );
        Err(refuse(message).with_path(&self.path))
    }
}
