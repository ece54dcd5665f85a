//! Marks in archives: what they delete, in a layer and in a plain tree.
//!
//! A mark refers to what lower layers have, never to entries of its own archive, wherever it stands
//! among them. So the same entries give the same result in any order:
//!
//! | the archive has | in a layer | in a plain tree |
//! |---|---|---|
//! | `.wh.x` | the mark | `x` is removed |
//! | and `x`, a directory | `x` is opaque | what was in `x` before is removed |
//! | and `x`, anything else | `x`, which hides what is below | `x` alone |
//! | and `x/.wh.y` or `x/.wh..wh..opq` | the mark of `x`: with it all in it is gone | `x` is removed |
//! | `.wh..wh..opq` and `.wh.y` | opaque; `.wh.y` says nothing more | all from before is removed |
//!
//! A whiteout where nothing can show from below is left out, for the kernel lists such a device in a
//! directory that it does not merge. All others are written, whether or not there is anything to
//! hide: what lies below is not known yet.

use std::io;

use super::placed::Found;
use super::target::{Inode, Missing, Reached};
use super::{Unpack, refuse, time};
use crate::archive::entry::{Entry, EntryKind};
use crate::error::{IoContext, Result};
use crate::layer::LayerFormat;
use crate::layer::marks::{self, DotWh, Mark};
use crate::path::{Name, RelPath};
use crate::sys::dir::DirEntry;
use crate::sys::remove::remove_tree;
use crate::sys::stat::{FileType, Stat};

impl Unpack<'_> {
    /// Does what an entry says whose name is a whiteout or the opaque mark.
    pub(super) fn mark(&mut self, entry: &Entry, mark: &DotWh) -> Result<()> {
        let path = &entry.path;
        match entry.kind {
            // moby's AUFS driver wrote them as links to `.wh..wh.aufs`.
            EntryKind::File { size: 0, .. } | EntryKind::HardLink { .. } => {}
            _ => {
                return Err(refuse(path, "a whiteout can only be an empty file or a hard link"));
            }
        }
        let parent = path.parent().unwrap_or_default();
        let missing = match self.format {
            Some(_) => Missing::MakeForMark(time(entry.mtime)),
            None => Missing::Stop,
        };
        if self.reach(&parent, missing, path)? != Reached::Directory {
            // Whatever it hides is hidden already, or was never there.
            return Ok(());
        }
        match (self.format, mark) {
            (Some(format), DotWh::Whiteout(name)) => self.whiteout_in_layer(format, name, path),
            (Some(_), _) => self.make_opaque(),
            (None, DotWh::Whiteout(name)) => self.delete_older(name, entry),
            (None, _) => self.delete_older_inside(entry),
        }
    }

    fn whiteout_in_layer(
        &mut self,
        format: LayerFormat,
        name: &Name,
        path: &RelPath,
    ) -> Result<()> {
        if self.below_opaque() {
            return Ok(());
        }
        let dir = self.target.dir();
        match dir.try_stat_at(name).at("read attributes beside", path)? {
            None => {}
            Some(stat) if stat.is_dir() => {
                if !self.only_for_marks.contains(&(stat.dev, stat.ino)) {
                    self.target.enter(name)?;
                    self.make_opaque()?;
                    return self.target.leave();
                }
                // It is there for marks alone, and they are void with this one.
                self.target.forget_written();
                self.remove_below(name).at("remove void marks beside", path)?;
            }
            Some(_) => return Ok(()),
        }
        self.target.touch();
        self.has_marks = true;
        marks::make_whiteout(format, &dir, name).at("make whiteout for", path)?;
        match format {
            LayerFormat::Aufs => self.target.tally.give_up(),
            LayerFormat::OverlayTrusted | LayerFormat::OverlayUser => {
                let made = dir.stat_at(name).at("read attributes of whiteout for", path)?;
                self.target.tally.add(&made);
            }
        }
        Ok(())
    }

    /// Makes the current directory opaque, and removes from it the marks that say nothing then.
    pub(super) fn make_opaque(&mut self) -> Result<()> {
        let Some(format) = self.format else {
            return Ok(());
        };
        let swept = self.below_opaque();
        if !self.opaque.insert(self.target.inode()) {
            return Ok(());
        }
        self.target.touch();
        let made = marks::make_opaque(format, &self.target.dir());
        made.at("make opaque", self.target.path())?;
        if format == LayerFormat::Aufs {
            // It is a file, which may have been there.
            self.target.tally.give_up();
        }
        // No mark is made below an opaque directory, once it was swept.
        if self.has_marks && !swept {
            self.sweep(format)?;
        }
        self.has_marks = true;
        Ok(())
    }

    /// Removes whiteouts, and directories that are there for marks alone, below the current one.
    fn sweep(&mut self, format: LayerFormat) -> Result<()> {
        let mut listings = vec![self.list()?];
        while let Some(listing) = listings.last_mut() {
            let Some(DirEntry { name, .. }) = listing.pop() else {
                listings.pop();
                if !listings.is_empty() {
                    self.target.leave()?;
                }
                continue;
            };
            if self.is_stash(&name) {
                continue;
            }
            let dir = self.target.dir();
            let at = self.target.path().join(&name);
            let Some(stat) = dir.try_stat_at(&name).at("read attributes of", &at)? else {
                continue;
            };
            if stat.is_dir() {
                if self.only_for_marks.contains(&(stat.dev, stat.ino)) {
                    self.target.touch();
                    self.remove_below(&name).at("remove void marks", &at)?;
                } else if self.opaque.contains(&(stat.dev, stat.ino)) {
                    // Swept when it became so.
                } else {
                    self.target.enter(&name)?;
                    listings.push(self.list()?);
                }
            } else if matches!(marks::decode(format, &name, &stat), Mark::Whiteout(_)) {
                self.target.touch();
                self.target.tally.give_up();
                dir.unlink(&name).at("remove void mark", &at)?;
            }
        }
        Ok(())
    }

    /// Removes `name` from the tree, but for what this archive put there.
    fn delete_older(&mut self, name: &Name, entry: &Entry) -> Result<()> {
        let dir = self.target.dir();
        let stat = dir.try_stat_at(name).at("read attributes beside", &entry.path)?;
        let found = match &stat {
            None => return Ok(()),
            Some(stat) => self.placed.find(self.target.inode(), name, directory(stat)),
        };
        match found {
            Found::Before => {
                self.target.touch();
                self.target.forget_written();
                return self.remove_below(name).at("delete by", &entry.path);
            }
            Found::OnTheWay | Found::Own if stat.is_some_and(|stat| stat.is_dir()) => {}
            Found::OnTheWay | Found::Own => return Ok(()),
        }
        self.target.enter(name)?;
        if found == Found::OnTheWay {
            // The one from before is deleted; this one is there for what is in it.
            self.default_attributes(time(entry.mtime))?;
            self.drop_old_xattrs()?;
        }
        self.delete_older_inside(entry)?;
        self.target.leave()
    }

    /// Empties the current directory, but for what this archive put there.
    fn delete_older_inside(&mut self, entry: &Entry) -> Result<()> {
        if self.placed.is_cleared(self.target.inodes()) {
            return Ok(());
        }
        let mut listings = vec![self.list()?];
        while let Some(listing) = listings.last_mut() {
            let Some(DirEntry { name, file_type }) = listing.pop() else {
                self.placed.clear(self.target.inode());
                listings.pop();
                if !listings.is_empty() {
                    self.target.leave()?;
                }
                continue;
            };
            if self.is_stash(&name) {
                continue;
            }
            let at = self.target.path().join(&name);
            let inode = match file_type {
                FileType::Directory | FileType::Unknown => {
                    let stat = self.target.dir().stat_at(&name).at("read attributes of", &at)?;
                    directory(&stat)
                }
                _ => None,
            };
            match self.placed.find(self.target.inode(), &name, inode) {
                Found::Before => {
                    self.target.touch();
                    self.target.forget_written();
                    self.remove_below(&name).at("delete", &at)?;
                }
                found if inode.is_some() => {
                    self.target.enter(&name)?;
                    if found == Found::OnTheWay {
                        self.default_attributes(time(entry.mtime))?;
                        self.drop_old_xattrs()?;
                    }
                    let cleared = self.placed.is_cleared(self.target.inodes());
                    listings.push(if cleared { Vec::new() } else { self.list()? });
                }
                Found::OnTheWay | Found::Own => {}
            }
        }
        Ok(())
    }

    pub(super) fn list(&self) -> Result<Vec<DirEntry>> {
        let entries = self.target.dir().entries();
        entries.at("list directory", self.target.path())
    }

    /// Whether attributes are those of a whiteout of this layer that stands in the name's own place.
    pub(super) fn is_whiteout(&self, stat: &Stat) -> bool {
        match self.format {
            Some(LayerFormat::OverlayTrusted | LayerFormat::OverlayUser) => {
                marks::is_zero_device(stat)
            }
            Some(LayerFormat::Aufs) | None => false,
        }
    }

    /// Whether the current directory has a whiteout for `name` that stands beside it.
    pub(super) fn has_separate_whiteout(&self, name: &Name) -> Result<bool> {
        let Some(format) = self.format.filter(|_| self.has_marks) else {
            return Ok(false);
        };
        let Some(mark) = marks::separate_whiteout(format, name) else {
            return Ok(false);
        };
        let stat = self.target.dir().try_stat_at(&mark);
        let stat = stat.at("read attributes of", self.target.path().join(&mark))?;
        Ok(stat.is_some())
    }

    /// Removes the whiteout for `name`, which is there.
    pub(super) fn remove_whiteout(&mut self, name: &Name) -> Result<()> {
        let mark = self.format.and_then(|format| marks::separate_whiteout(format, name));
        self.target.touch();
        self.target.tally.give_up();
        let at = self.target.path().join(name);
        let removed = self.target.dir().unlink(mark.as_ref().unwrap_or(name));
        removed.at("remove whiteout of", at)
    }

    /// Whether the current directory or one above it is opaque: nothing from below shows here.
    pub(super) fn below_opaque(&self) -> bool {
        !self.opaque.is_empty() && self.target.inodes().any(|i| self.opaque.contains(&i))
    }

    /// Notes that the current directory, just entered, is new, whoever had its inode number before.
    pub(super) fn note_made(&mut self) {
        let inode = self.target.inode();
        self.target.count_directory();
        if self.format.is_none() {
            self.placed.made(inode);
        }
        self.opaque.remove(&inode);
        self.only_for_marks.remove(&inode);
        self.made_up.forget(inode);
    }

    /// Notes that the current directory was made in order to hold marks.
    pub(super) fn note_only_for_marks(&mut self) {
        self.only_for_marks.insert(self.target.inode());
    }

    /// Notes that the current directory, and so all above it, have entries that are no marks.
    pub(super) fn note_real(&mut self) {
        if !self.only_for_marks.is_empty() {
            for inode in self.target.inodes() {
                self.only_for_marks.remove(&inode);
            }
        }
    }

    /// Notes that this archive made `name`, which is no directory, in the current one; only a plain
    /// tree asks.
    pub(super) fn own(&mut self, name: &Name) {
        if self.format.is_none() {
            self.placed.name(self.target.inode(), name);
            self.own_below();
        }
    }

    /// Notes that the current directory has an entry; only a plain tree asks.
    pub(super) fn own_directory(&mut self) {
        if self.format.is_none() {
            self.placed.own(self.target.inode());
            self.own_below();
        }
    }

    fn own_below(&mut self) {
        if self.placed.way(self.target.inode()) {
            for inode in self.target.inodes() {
                self.placed.way(inode);
            }
        }
    }

    /// Removes `name` in the current directory with all below it.
    pub(super) fn remove_below(&mut self, name: &Name) -> io::Result<()> {
        self.capture_losses(name)?;
        self.target.tally.give_up();
        let dir = self.target.dir();
        remove_tree(&dir, name, &mut || self.watch.moved().map_err(io::Error::from))
    }
}

/// The inode of a directory.
fn directory(stat: &Stat) -> Option<Inode> {
    stat.is_dir().then_some((stat.dev, stat.ino))
}
