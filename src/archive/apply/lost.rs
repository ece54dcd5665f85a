//! What the record of the archive is told: where content goes, and what is about to be lost.
//!
//! An archive may replace or delete what it brought itself. The record then needs the bytes, which
//! are read before the file goes, however it goes: alone, or with a directory above it.

use std::fs::File;
use std::io;
use std::sync::Mutex;

use super::{Ownership, Unpack};
use crate::archive::entry::{Entry, EntryKind};
use crate::archive::record::{Capture, locked};
use crate::error::{IoContext, Result};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;

/// The right of a file's owner to read it.
const OWNER_READS: u32 = 0o400;

impl Unpack<'_> {
    /// The path of a name in the current directory.
    pub(super) fn at(&self, name: &Name) -> RelPath {
        let mut path = RelPath::ROOT;
        self.target.names().chain([name]).for_each(|name| path.push(name));
        path
    }

    /// Tells the record something, if there is one.
    pub(super) fn tell_capture(&self, tell: impl FnOnce(&mut Capture)) {
        if let Some(capture) = self.capture {
            tell(&mut locked(capture));
        }
    }

    /// Says that the content of a file entry, which is read next, goes to `path`.
    pub(super) fn capture_content(&self, path: RelPath, entry: &Entry) {
        let EntryKind::File { size, sparse } = &entry.kind else {
            return;
        };
        self.tell_capture(|capture| {
            // Nobody but root could read it again.
            if entry.mode & OWNER_READS == 0 && self.options.ownership == Ownership::Ignore {
                capture.inline(entry.stored_size());
            } else {
                capture.content_at(path, *size, sparse.as_deref());
            }
        });
    }

    /// Whether the record wants to know of what is removed.
    pub(super) fn captures_losses(&self) -> bool {
        self.capture.is_some_and(|capture| locked(capture).has_content())
    }

    /// Tells the record that the file `name` in `dir` goes, which it knows as `path`.
    pub(super) fn capture_loss(&self, path: &RelPath, dir: &Dir, name: &Name) -> Result<()> {
        match self.capture {
            Some(capture) => lose(capture, path, dir, name),
            None => Ok(()),
        }
    }

    /// Tells the record that `name` in the current directory goes, with all below it.
    pub(super) fn capture_losses(&mut self, name: &Name) -> Result<()> {
        if !self.captures_losses() {
            return Ok(());
        }
        let dir = self.target.dir();
        let stat = dir.try_stat_at(name).at("read attributes of", self.at(name))?;
        match stat {
            Some(stat) if stat.is_dir() => {}
            Some(stat) if stat.is_file() => return self.capture_loss(&self.at(name), &dir, name),
            _ => return Ok(()),
        }
        self.target.enter(name)?;
        let mut listings = vec![self.list()?];
        while let Some(listing) = listings.last_mut() {
            let Some(entry) = listing.pop() else {
                listings.pop();
                self.target.leave()?;
                continue;
            };
            self.watch.moved()?;
            let (dir, path) = (self.target.dir(), self.at(&entry.name));
            match dir.try_stat_at(&entry.name).at("read attributes of", &path)? {
                Some(stat) if stat.is_dir() => {
                    self.target.enter(&entry.name)?;
                    listings.push(self.list()?);
                }
                Some(stat) if stat.is_file() => self.capture_loss(&path, &dir, &entry.name)?,
                _ => {}
            }
        }
        Ok(())
    }
}

fn lose(capture: &Mutex<Capture>, path: &RelPath, dir: &Dir, name: &Name) -> Result<()> {
    let open = || -> io::Result<File> {
        match dir.open_file(name) {
            // An owner may be closed out; another name of it may stay, so the mode comes back.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                let mode = dir.stat_at(name)?.mode;
                dir.chmod_at(name, mode | OWNER_READS)?;
                let opened = dir.open_file(name);
                dir.chmod_at(name, mode)?;
                opened
            }
            opened => opened,
        }
    };
    locked(capture).lose(path, open)
}
