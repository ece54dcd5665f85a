//! Entries that are no directories: files with their data, links, devices and the rest.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use super::attributes::Attributes;
use super::union::{Part, changed, refuse};
use super::walk::Scope;
use super::{Adoption, Inode, verity};
use crate::archive::Devices;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::descent::{Descent, Purpose};
use crate::path::{Name, RelPath};
use crate::progress;
use crate::sys::dir::{Dir, Node};
use crate::sys::file::Place;
use crate::sys::stat::{FileType, Stat, fstat};
use crate::sys::xattr::Of;

impl Adoption<'_> {
    /// Takes the entry `name` of the part of this index over; whether it is a directory, which is only
    /// begun.
    pub(super) fn entry(&mut self, name: &Name, index: usize) -> Result<bool> {
        let part = self.frames.last().and_then(|frame| frame.parts.get(index));
        let part = part.ok_or_else(|| changed(&self.path))?.clone();
        let dir = Arc::clone(part.dir()?);
        let shown = self.stack.shown(part.layer, &part.path.join(name));
        let stat = match dir.try_stat_at(name) {
            Ok(Some(stat)) => stat,
            Ok(None) => return Err(changed(shown)),
            Err(e) => return Err(Error::io("look at", shown, e)),
        };
        self.refuse_mark(name, &stat)?;
        if stat.is_dir() {
            return self.enter(name, index).map(|()| true);
        }
        if stat.dev != part.before.dev {
            let message =
                "another file is mounted there, which is no part of the layer: unmount it";
            return Err(refuse(message).with_path(shown));
        }
        if !self.link(name, &stat)? {
            if stat.is_file() {
                self.file(name, &part, &dir, &stat)?;
            } else {
                self.special(name, &part, &dir, &stat)?;
            }
        }
        Ok(false)
    }

    /// Makes another name of a file that was taken over already; whether it was.
    fn link(&mut self, name: &Name, stat: &Stat) -> Result<bool> {
        if stat.nlink < 2 {
            return Ok(false);
        }
        let inode: Inode = (stat.dev, stat.ino);
        if let Some((_, count)) = self.pseudo_links.get_mut(&inode) {
            *count += 1;
            self.report.pseudo_links.add(&self.path, self.options.report_paths);
        }
        let Some(first) = self.links.get(&inode) else {
            return Ok(false);
        };
        let here = self.target.dir();
        let (Some(parent), Some(old)) = (first.parent(), first.file_name()) else {
            return Err(changed(&self.path));
        };
        if Some(&parent) == self.path.parent().as_ref() {
            here.hard_link(&old, here, name).at("make a hard link", &self.path)?;
        } else {
            let root = self.layer.reopen().at("open", "the new layer")?;
            // Directories that were left may be closed to their own owner.
            let mut walk: Descent<()> =
                Descent::new(root, Purpose::Look).at("open", "the new layer")?;
            for name in parent.components() {
                walk.enter(&name).at("open the directory of", first)?;
            }
            walk.dir().hard_link(&old, here, name).at("make a hard link", &self.path)?;
            while walk.depth() > 0 {
                walk.leave().at("leave the directory of", first)?;
            }
        }
        self.count()?;
        Ok(true)
    }

    /// Remembers where a file with several names is.
    fn note_link(&mut self, stat: &Stat) {
        if stat.nlink > 1 {
            self.links.insert((stat.dev, stat.ino), self.path.clone());
        }
    }

    /// A regular file, as far as the foreign file system goes: it may stand for something else.
    fn file(&mut self, name: &Name, part: &Part, dir: &Dir, listed: &Stat) -> Result<()> {
        let path = part.path.join(name);
        let shown = self.stack.shown(part.layer, &path);
        let from = open(dir, name, &shown)?;
        let stat = dir.stat_of(&from).map_err(|e| Error::io("look at", &shown, e))?;
        if !stat.same_inode(listed) {
            return Err(changed(shown));
        }
        let attributes = self.read_attributes(Of::Fd(from.as_fd()), stat, part.layer, &path)?;
        self.refuse_mark(name, &attributes.stat)?;
        if !attributes.stat.is_file() {
            self.unchanged(&from, &stat, &shown)?;
            return self.make(name, &attributes, dir);
        }
        let here = Arc::clone(self.target.dir());
        let to = here.create_file(name, 0o600).at("create file", &self.path)?;
        if attributes.metacopy.is_some() {
            self.fetch_data(&to, part, &path, &attributes)?;
        } else {
            self.copy(&from, &to, &stat, &shown)?;
        }
        self.unchanged(&from, &stat, &shown)?;
        self.give(&attributes, here.place(Of::Fd(to.as_fd())))?;
        self.counter.add(&fstat(&to).at("look at", &self.path)?);
        self.note_link(&stat);
        self.count()
    }

    fn copy(&mut self, from: &File, to: &File, stat: &Stat, shown: &Path) -> Result<()> {
        let (done, callback) = (&mut self.done, &mut *self.progress);
        let copied = self.copier.copy(from, stat.dev, stat.size, to, &mut |bytes| {
            done.bytes = done.bytes.saturating_add(bytes);
            progress::report(callback, *done).map_err(io::Error::from)
        });
        copied.map(drop).map_err(|e| Error::io("copy", shown, e))
    }

    /// Fails if the file was written to or its attributes changed since it was looked at.
    fn unchanged(&self, file: &File, before: &Stat, shown: &Path) -> Result<()> {
        let now = fstat(file).map_err(|e| Error::io("look at", shown, e))?;
        if is_same(before, &now) { Ok(()) } else { Err(changed(shown)) }
    }

    /// Copies the data of a metacopy from the layer that has it.
    fn fetch_data(
        &mut self,
        to: &File,
        part: &Part,
        path: &RelPath,
        attributes: &Attributes,
    ) -> Result<()> {
        let frame = self.frames.last().ok_or_else(|| changed(path))?;
        let rest = match frame.scope {
            Scope::Delta => self.below(part)?,
            Scope::Whole => {
                frame.parts.iter().filter(|below| below.layer > part.layer).cloned().collect()
            }
        };
        let redirect = attributes.redirect.clone();
        let (dir, name, layer, data_path) = self.stack.data_of(part.layer, path, redirect, rest)?;
        let shown = self.stack.shown(layer, &data_path);
        let mut from = open(&dir, &name, &shown)?;
        let stat = fstat(&from).map_err(|e| Error::io("look at", &shown, e))?;
        let wanted = attributes.stat.size;
        if stat.size != wanted {
            let message = format!(
                "its data should be this lower file, which has {} bytes and not {wanted}: it is not the \
                 layer that it was mounted on",
                stat.size
            );
            return Err(Error::new(ErrorKind::DigestMismatch, message).with_path(&shown));
        }
        self.copy(&from, to, &stat, &shown)?;
        if let Some(Some(digest)) = &attributes.metacopy {
            let fail = |e| Error::io("read", &shown, e);
            from.seek(SeekFrom::Start(0)).map_err(fail)?;
            let reader = io::BufReader::with_capacity(256 << 10, &from);
            if !verity::has_digest(reader, stat.size, digest).map_err(fail)? {
                let message = "it does not have the fs-verity digest (for blocks of 4096 bytes, \
                               without salt) that the file above it names";
                return Err(Error::new(ErrorKind::DigestMismatch, message).with_path(&shown));
            }
            self.report.verified.add(&self.path, self.options.report_paths);
        }
        self.unchanged(&from, &stat, &shown)?;
        self.report.metacopies.add(&self.path, self.options.report_paths);
        Ok(())
    }

    /// A symlink, device, fifo or socket.
    fn special(&mut self, name: &Name, part: &Part, dir: &Dir, stat: &Stat) -> Result<()> {
        let path = part.path.join(name);
        let shown = self.stack.shown(part.layer, &path);
        let attributes = self.read_attributes(Of::Child(dir, name), *stat, part.layer, &path)?;
        self.refuse_mark(name, &attributes.stat)?;
        self.make(name, &attributes, dir)?;
        match dir.try_stat_at(name) {
            Ok(Some(now)) if is_same(stat, &now) => Ok(()),
            Ok(_) => Err(changed(shown)),
            Err(e) => Err(Error::io("look at", shown, e)),
        }
    }

    /// Makes what has no data; `dir` is the foreign directory.
    fn make(&mut self, name: &Name, attributes: &Attributes, dir: &Dir) -> Result<()> {
        let stat = &attributes.stat;
        let keep = self.options.report_paths;
        let here = Arc::clone(self.target.dir());
        let (major, minor) = stat.rdev;
        let made = match stat.file_type {
            FileType::Symlink => {
                let target = dir.read_link(name).at("read the symlink", &self.path)?;
                here.symlink(&target, name)
            }
            FileType::Fifo => here.make_node(name, Node::Fifo, 0o600),
            FileType::CharDevice | FileType::BlockDevice
                if self.options.devices == Devices::Skip =>
            {
                self.report.skipped_devices.add(&self.path, keep);
                return Ok(());
            }
            FileType::CharDevice => here.make_node(name, Node::Char { major, minor }, 0o600),
            FileType::BlockDevice => here.make_node(name, Node::Block { major, minor }, 0o600),
            FileType::Socket => {
                self.report.sockets.add(&self.path, keep);
                return Ok(());
            }
            FileType::Regular | FileType::Directory | FileType::Unknown => {
                return Err(changed(&self.path));
            }
        };
        made.at("make", &self.path).map_err(|e| match e.kind() {
            ErrorKind::PermissionDenied => e.context(
                "devices need CAP_MKNOD in the initial user namespace: run with it, or adopt with \
                 Devices::Skip",
            ),
            _ => e,
        })?;
        self.give(attributes, Place::Child(&here, name))?;
        self.counter.add(&here.stat_at(name).at("look at", &self.path)?);
        self.note_link(&attributes.stat);
        self.count()
    }

    /// Notes which files AUFS kept pseudo-links to.
    pub(super) fn note_pseudo_links(&mut self, part: &Part, name: &Name) -> Result<()> {
        let (links, _) = self.stack.child(part, name)?;
        let dir = links.dir()?;
        let shown = self.stack.shown(part.layer, &links.path);
        for entry in dir.entries().map_err(|e| Error::io("list", &shown, e))? {
            let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
            let numbers = entry.name.as_bytes().splitn(2, |b| *b == b'.');
            let stat = dir.stat_at(&entry.name).map_err(|e| Error::io("look at", &shown, e))?;
            if numbers.filter(|n| is_number(n)).count() != 2 || stat.is_dir() {
                let message =
                    "aufs has no such pseudo-link: they are two numbers, and no directories";
                return Err(refuse(message).with_path(shown.join(&entry.name)));
            }
            self.pseudo_links.insert((stat.dev, stat.ino), (entry.name, 0));
        }
        Ok(())
    }
}

fn open(dir: &Dir, name: &Name, shown: &Path) -> Result<File> {
    dir.open_file(name).map_err(|e| match e.kind() {
        // It was a file when it was listed.
        io::ErrorKind::NotFound | io::ErrorKind::InvalidInput => changed(shown),
        _ => Error::io("open", shown, e),
    })
}

/// Whether nothing happened to a file but that it was read.
fn is_same(before: &Stat, now: &Stat) -> bool {
    before.same_inode(now)
        && (before.size, before.mtime, before.ctime) == (now.size, now.mtime, now.ctime)
}
