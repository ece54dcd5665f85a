//! Making what one entry describes, in the directory that was found for it.
//!
//! What is in the way is removed first, but for a directory where a directory is to be. A new file
//! costs open, write, stat, utimes and close, and nothing looks whether it is there before: O_EXCL
//! tells. The one stat tells whether owner and mode came out right, which depends on the umask and on
//! the directory, and what the file takes on disk. In a layer, a directory that takes the place of anything that was no directory is
//! opaque: what lies below was hidden, and must not come back.

use std::fs::File;
use std::io::{self, BufRead};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::parents::{self, MadeUp};
use super::plnk::Stashed;
use super::target::{Missing, Reached};
use super::{Devices, Ownership, Unpack, refuse, time};
use crate::archive::entry::{Entry, EntryKind, Extent};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::marks::{self, DotWh};
use crate::path::{Name, RelPath};
use crate::sys::dir::{Dir, Node};
use crate::sys::stat::Time;
use crate::sys::xattr::Of;

/// The mode of a missing parent directory.
const PARENT_MODE: u32 = 0o755;
/// What nobody else may use while it is being made.
const PRIVATE_DIR: u32 = 0o700;
const PRIVATE_FILE: u32 = 0o600;
/// Files of more bytes may hold more blocks while they are open than afterwards (XFS).
const LARGE: u64 = 64 * 1024;

impl Unpack<'_> {
    /// Makes what an entry that is no mark describes.
    pub(super) fn place(&mut self, entry: &Entry, content: &mut dyn BufRead) -> Result<()> {
        let path = &entry.path;
        let Some(name) = path.file_name() else {
            // The root: it is there, and gets its attributes.
            self.reach(&RelPath::ROOT, Missing::Stop, path)?;
            self.drop_old_xattrs()?;
            self.describes_root = true;
            return self.directory_attributes(entry, None);
        };
        match &entry.kind {
            EntryKind::CharDevice { major: 0, minor: 0 } => {
                return Err(refuse(path, "it is the character device 0:0, a whiteout"));
            }
            EntryKind::CharDevice { .. } | EntryKind::BlockDevice { .. }
                if self.options.devices == Devices::Skip =>
            {
                self.counts.skipped_devices += 1;
                return Ok(());
            }
            EntryKind::HardLink { target } => return self.hard_link(entry, &name, target),
            _ => {}
        }
        self.reach_parent(path, time(entry.mtime))?;
        match &entry.kind {
            // Stands in the directory afterwards.
            EntryKind::Directory => return self.directory(entry, &name),
            EntryKind::File { size, sparse } => {
                self.check_file_size(path, *size)?;
                let dir = self.target.dir();
                let mode = self.first_mode(entry);
                let file =
                    self.make(&name, path, "create file", |dir| dir.create_file(&name, mode))?;
                self.capture_content(self.at(&name), entry);
                self.fill(&file, *size, sparse.as_deref(), content, path)?;
                let mut made = self.attributes(Of::Fd(file.as_fd()), &dir, &name, entry)?;
                if *size > LARGE {
                    drop(file);
                    made = dir.stat_at(&name).at("read attributes of", path)?;
                }
                self.target.tally.add(&made);
            }
            EntryKind::Symlink { target } => {
                self.make(&name, path, "make symlink", |dir| dir.symlink(target, &name))?;
                let dir = self.target.dir();
                let made = self.attributes(Of::Child(&dir, &name), &dir, &name, entry)?;
                self.target.tally.add(&made);
            }
            EntryKind::CharDevice { major, minor } => {
                let (major, minor) = (*major, *minor);
                self.node(entry, &name, Node::Char { major, minor })?;
            }
            EntryKind::BlockDevice { major, minor } => {
                let (major, minor) = (*major, *minor);
                self.node(entry, &name, Node::Block { major, minor })?;
            }
            EntryKind::Fifo => self.node(entry, &name, Node::Fifo)?,
            // Handled above.
            EntryKind::HardLink { .. } => {}
        }
        self.own(&name);
        Ok(())
    }

    /// The mode that a file is made with: its own where nothing that comes later depends on what it is
    /// till then, and where it will have its owner from the start. What it then has is looked at.
    fn first_mode(&self, entry: &Entry) -> u32 {
        let owned = match self.options.ownership {
            Ownership::AsRecorded | Ownership::InXattrs => {
                self.newcomer == Some((entry.uid, entry.gid))
            }
            Ownership::Ignore => true,
        };
        let simple = entry.mode & 0o7000 == 0 && entry.mode & PRIVATE_FILE == PRIVATE_FILE;
        if owned && simple && !entry.has_xattrs() && !self.inherits_acls {
            entry.mode & 0o777
        } else {
            PRIVATE_FILE
        }
    }

    /// Goes to the directory of an entry that is no mark, making what is missing.
    fn reach_parent(&mut self, path: &RelPath, time: Time) -> Result<()> {
        let parent = path.parent().unwrap_or_default();
        match self.reach(&parent, Missing::Make(time), path)? {
            Reached::Directory => {}
            Reached::Nothing | Reached::Hidden => {
                return Err(refuse(path, "its parent cannot be made"));
            }
        }
        if let Some(name) = path.file_name() {
            self.check_path(path, &name)?;
        }
        self.note_real();
        Ok(())
    }

    /// Holds the path of a name in the current directory, all links followed, to the bound on paths:
    /// what is deeper could not be archived again, and every entry there would cost the way.
    fn check_path(&self, entry: &RelPath, name: &Name) -> Result<()> {
        let max = self.options.limits.max_path_bytes;
        // Links add what the entry's own path does not have; it is within the bound.
        if self.target.path_bytes().saturating_add(name.as_bytes().len()) > max {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("symlinks lead the entry to a path over the limit max_path_bytes of {max}"),
            )
            .with_path(entry));
        }
        Ok(())
    }

    pub(super) fn check_file_size(&self, path: &RelPath, size: u64) -> Result<()> {
        let max = self.options.limits.max_unpacked_bytes;
        if size > max {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("a file of {size} bytes is over the limit max_unpacked_bytes of {max}"),
            )
            .with_path(path));
        }
        Ok(())
    }

    /// Makes a name in the current directory by `create`, which must fail where it exists; then what
    /// is there is removed, and it is made again.
    fn make<T>(
        &mut self,
        name: &Name,
        path: &RelPath,
        what: &'static str,
        create: impl Fn(&Dir) -> io::Result<T>,
    ) -> Result<T> {
        let dir = self.target.dir();
        self.target.touch();
        let made = match create(&dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                self.clear(name, path)?;
                create(&dir)
            }
            made => made,
        };
        let made = made.at(what, path)?;
        if self.has_separate_whiteout(name)? {
            self.remove_whiteout(name)?;
        }
        Ok(made)
    }

    /// Removes what is in the way of an entry.
    fn clear(&mut self, name: &Name, path: &RelPath) -> Result<()> {
        self.target.touch();
        // It may have been a symlink or directory on the way that we came.
        self.target.forget_written();
        self.remove_below(name).at("remove what is in the way of", path)
    }

    fn directory(&mut self, entry: &Entry, name: &Name) -> Result<()> {
        let path = &entry.path;
        let dir = self.target.dir();
        self.target.touch();
        let mut opaque = false;
        let mut made = true;
        let mut cleared = false;
        match dir.make_dir(name, PRIVATE_DIR) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let stat = dir.stat_at(name).at("read attributes of", path)?;
                if stat.is_dir() {
                    made = false;
                } else {
                    // A whiteout, or what this layer had there before.
                    (opaque, cleared) = (true, true);
                    self.clear(name, path)?;
                    dir.make_dir(name, PRIVATE_DIR).at("create directory", path)?;
                }
            }
            Err(e) => return Err(e).at("create directory", path),
        }
        if self.has_separate_whiteout(name)? {
            self.remove_whiteout(name)?;
            opaque = true;
        }
        self.target.enter(name)?;
        let owner = self.target.owner();
        if made {
            self.note_made();
        } else {
            self.made_up.forget(self.target.inode());
            self.drop_old_xattrs()?;
        }
        self.own_directory();
        self.note_real();
        if opaque {
            self.make_opaque()?;
        }
        self.directory_attributes(entry, Some(owner))?;
        if !cleared {
            // Else it may have taken the place of a symlink that the path itself goes through.
            self.target.set_written(path);
        }
        Ok(())
    }

    /// Gives the current directory, whose owner may be known, the attributes of its entry; times, and a mode that would lock
    /// us out, when it is left.
    fn directory_attributes(&mut self, entry: &Entry, owner: Option<(u32, u32)>) -> Result<()> {
        let dir = self.target.dir();
        let of = Of::dir(&dir);
        if owner != Some((entry.uid, entry.gid)) {
            self.set_owner(&dir, entry)?;
        }
        self.set_xattrs(of, entry)?;
        let mode = entry.mode & 0o7777;
        dir.chmod(mode | PRIVATE_DIR).at("set mode of", &entry.path)?;
        self.set_acls(of, entry)?;
        let mut later = (mode & PRIVATE_DIR != PRIVATE_DIR).then_some(mode);
        if entry.has_acls() {
            // A list says what the owner may do, too.
            let listed = dir.stat().at("read attributes of", &entry.path)?.mode;
            if listed & PRIVATE_DIR != PRIVATE_DIR {
                dir.chmod(listed | PRIVATE_DIR).at("set mode of", &entry.path)?;
                later = later.or(Some(listed));
            }
        }
        let (atime, mtime) = super::times(entry);
        self.target.leave_with(atime, mtime, later);
        Ok(())
    }

    /// Makes a directory that the archive has no entry for, or not yet, and goes into it.
    pub(super) fn make_parent(
        &mut self,
        name: &Name,
        time: Time,
        opaque: bool,
        entry: &RelPath,
    ) -> Result<()> {
        self.count_parent()?;
        self.check_path(entry, name)?;
        let path = self.target.path().join(name);
        self.target.touch();
        self.target.dir().make_dir(name, PRIVATE_DIR).at("create missing directory", &path)?;
        self.target.enter(name)?;
        self.note_made();
        if self.inherits_acls {
            self.drop_old_xattrs()?;
        }
        if opaque {
            self.make_opaque()?;
            // The one below was deleted: this is another.
            return self.default_attributes(time);
        }
        self.default_attributes(time)?;
        self.note_made_up()
    }

    /// Notes that the current directory is to have the attributes that it has below.
    fn note_made_up(&mut self) -> Result<()> {
        if !self.options.has_parents() {
            return Ok(());
        }
        let names: Vec<Name> = self.target.names().cloned().collect();
        let mut path = RelPath::ROOT;
        names.iter().for_each(|name| path.push(name));
        self.made_up.note(self.target.inode(), path);
        if self.made_up.is_full() {
            // With what is on the way here closed, so that nothing of it is set afterwards.
            while !self.target.at_root() {
                self.target.leave()?;
            }
            let settled = parents::settle(&self.target.dir(), &self.made_up, self.options)?;
            self.counts.skipped_xattrs += settled.skipped_xattrs;
            self.target.tally.grow(settled.bytes);
            self.inherits_acls |= settled.has_default_acl;
            self.made_up = MadeUp::new(self.format);
            for name in &names {
                self.target.enter(name)?;
            }
        }
        Ok(())
    }

    /// Gives the current directory the attributes of one that nobody described.
    pub(super) fn default_attributes(&mut self, time: Time) -> Result<()> {
        self.made_up.forget(self.target.inode());
        let dir = self.target.dir();
        self.chown(&dir, 0, 0).at("set owner of", self.target.path())?;
        dir.chmod(PARENT_MODE).at("set mode of", self.target.path())?;
        self.target.leave_with(time, time, None);
        Ok(())
    }

    /// Makes a device or fifo, which is never opened.
    fn node(&mut self, entry: &Entry, name: &Name, node: Node) -> Result<()> {
        let made = self.make(name, &entry.path, "make special file", |dir| {
            dir.make_node(name, node, PRIVATE_FILE)
        });
        made.map_err(|e| {
            if e.kind() == ErrorKind::PermissionDenied && node != Node::Fifo {
                e.context("devices need CAP_MKNOD: run with it, or unpack with Devices::Skip")
            } else {
                e
            }
        })?;
        let dir = self.target.dir();
        let made = self.attributes(Of::Child(&dir, name), &dir, name, entry)?;
        self.target.tally.add(&made);
        Ok(())
    }

    /// Makes another name of a file. Its attributes are those of its target, whatever the entry says.
    fn hard_link(&mut self, entry: &Entry, name: &Name, target: &RelPath) -> Result<()> {
        let path = &entry.path;
        let bad = |reason: &str| {
            let target = target.as_path();
            refuse(path, format!("it is a hard link to {target:?}, {reason}"))
        };
        let mut stashed = false;
        let (old_dir, old) = match self.stashed(target)? {
            Stashed::Here(dir, name) => {
                stashed = true;
                (dir, name)
            }
            Stashed::Missing => return Err(bad("which is not in the archive before it")),
            Stashed::Elsewhere => {
                let parent = target.parent().unwrap_or_default();
                if self.reach(&parent, Missing::Stop, path)? != Reached::Directory {
                    return Err(bad("which does not exist"));
                }
                let old = target.file_name().ok_or_else(|| bad("which is the root"))?;
                if marks::decode_name(&old) != DotWh::Plain {
                    return Err(bad("which is a mark"));
                }
                (self.target.dir(), old)
            }
        };
        let stat = old_dir.try_stat_at(&old).at("read link target of", path)?;
        let stat = match stat {
            Some(stat) if stat.is_dir() => return Err(bad("which is a directory")),
            Some(stat) if !self.is_whiteout(&stat) => stat,
            _ => return Err(bad("which does not exist")),
        };
        self.reach_parent(path, time(entry.mtime))?;
        let dir = self.target.dir();
        let there = dir.try_stat_at(name).at("read attributes of", path)?;
        if !there.is_some_and(|there| there.same_inode(&stat)) {
            self.make(name, path, "make hard link", |dir| link_from(&old_dir, &old, dir, name))
                .map_err(|e| match e.kind() {
                    ErrorKind::NotFound => bad("which it replaces"),
                    _ => e,
                })?;
            if stashed {
                self.tell_capture(|capture| capture.found_at(target, &self.at(name)));
            }
        }
        self.own(name);
        Ok(())
    }

    /// Writes a file's content: all of it, or the extents that are no holes.
    pub(super) fn fill(
        &mut self,
        file: &File,
        size: u64,
        sparse: Option<&[Extent]>,
        content: &mut dyn BufRead,
        path: &RelPath,
    ) -> Result<()> {
        match sparse {
            None => self.write_extent(file, 0, size, content, path),
            Some(extents) => {
                for extent in extents {
                    self.write_extent(file, extent.offset, extent.len, content, path)?;
                }
                file.set_len(size).at("set size of", path)
            }
        }
    }

    fn write_extent(
        &mut self,
        file: &File,
        mut offset: u64,
        mut left: u64,
        content: &mut dyn BufRead,
        path: &RelPath,
    ) -> Result<()> {
        while left > 0 {
            let part = content.fill_buf().at("read content of", path)?;
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(part.len());
            let Some(part @ [_, ..]) = part.get(..want) else {
                return Err(refuse(path, "its content is cut short"));
            };
            let n = part.len();
            file.write_all_at(part, offset).at("write", path)?;
            content.consume(n);
            offset += n as u64;
            left -= n as u64;
            self.watch.moved()?;
        }
        Ok(())
    }
}

/// Makes a hard link, from a directory that may be closed to its owner by now.
fn link_from(old_dir: &Dir, old: &Name, dir: &Dir, name: &Name) -> io::Result<()> {
    match old_dir.hard_link(old, dir, name) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            let mode = old_dir.stat()?.mode;
            if mode & PRIVATE_DIR == PRIVATE_DIR {
                return Err(e);
            }
            old_dir.chmod(mode | PRIVATE_DIR)?;
            let linked = old_dir.hard_link(old, dir, name);
            old_dir.chmod(mode)?;
            linked
        }
        linked => linked,
    }
}
