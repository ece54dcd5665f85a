//! Copy-up: a file or directory of a lower layer gets a copy in the upper, before it is changed.
//!
//! The copy is made in the work directory with everything the original has (data and holes, xattrs,
//! owner, mode, times), put on disk if the policy says so, and then renamed to its place: all or
//! nothing. Where attributes alone are to be changed, the data may stay below: see `metacopy`. While data are
//! copied only that file's copy-up is locked. When it is done the file may have been renamed or unlinked: the
//! copy goes where the file is then, or is held open without a name.
//!
//! A directory is copied without what is in it. The directories above come first.
//!
//! # When to wait for the disk
//!
//! The default is `strict`, one fsync for each copy of data. Who appends a byte to a file that was on disk for
//! years, and never asks for an fsync, may lose that byte in a power cut, but not the file; yet a copy whose
//! name reaches the disk before its data is just that, an empty file in the place of the old one. The kernel's
//! overlayfs waits for the same reason. What else was considered: to trust the file system (only ext4 writes
//! data before a rename, and only if that replaces a file, which a copy never does); and to wait for many at
//! once (whoever asked is to be told that his file is there before he goes on). A metadata-only copy, which has
//! no data that could be late, waits for nothing, and neither do names and marks: ext4 and XFS put them on the
//! disk in the order in which they were made. Btrfs does not, so there what hides something waits as well
//! ([`UpperBranch::keep_order`]).
//!
//! `volatile` never waits, for what is thrown away after a crash anyway, such as the layers of a build.
//!
//! # Copying by blocks (a design, not built)
//!
//! Where blocks cannot be shared, the first byte written to a large file costs a copy of all of it: on ext4
//! 370 ms for 1 GiB that is cached, 880 ms with an fsync. It could cost one block instead, with the rest
//! copied behind. A prototype, on the same disk: 0.1 ms to begin, then 0.08 ms for each block of 64 KiB, and
//! 410 ms to fill up the rest; with the syncs below 3.6 ms, 8 ms a block, 870 ms. With blocks of 4 KiB filling
//! up takes 4 times as long, with 1 MiB a block takes 0.7 ms: so 64 KiB, for files from 64 MiB on.
//!
//! - **On disk**: the copy is as long as the original and a hole but for its blocks. `<prefix>redirect` is as
//!   on a metadata-only copy; `<prefix>metacopy` has a value of one byte, which no kernel's overlayfs takes:
//!   whatever it is told to follow, it refuses the file with EIO. Which blocks are there says a map in `state`,
//!   to which records are only ever appended, each with its own checksum: a block with the checksum of its
//!   data, a block that is written again, a cut.
//! - **Writing**: a block that is not there is read from the original, changed, written to the copy, and then
//!   recorded; if the policy is to wait for the disk, the data are synced before the record is written, and
//!   the record before the write is answered to an fsync. A block that is there is recorded as written again,
//!   once a mount, and changed in place. Writes to one block wait for each other, those to others do not.
//! - **Reading**: from the copy what the map has, from the original the rest, up to the lowest cut.
//! - **Cutting off**: the cut is recorded, then made. What is beyond never comes from the original again, so
//!   that a file that is cut and extended reads as zeros there. Cutting to nothing ends it: the rest is the
//!   file.
//! - **Filling up**: one thread, at rest while anybody writes, copies what is missing in order. When the map is
//!   full: sync, remove `metacopy`, then `redirect`, then the map. Settling does the same at once.
//! - **After a power cut**: a record whose checksum is wrong ends the map. A block whose data do not have
//!   their checksum, and that was not recorded as written again, never reached the disk: it is taken from the
//!   original. One that was written again may have either of what was written, as in any file, unless it is a
//!   hole: that was a block whose first data were lost with its record of them intact, and is taken from the
//!   original, too.
//! - **Bounds**: a bit for each block in memory (2 KiB for 1 GiB), 24 bytes a record on disk; a map is
//!   written anew when it has more records than twice the blocks.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Union;
use super::UpperBranch;
use super::backing::open_whole;
use super::descriptors::OpenFile;
use super::links::{self, Linked};
use super::metacopy::Below;
use super::node::{LinkList, LowerPlace, Node, Place, Real};
use super::spec::SyncPolicy;
use super::xattr::copied;
use crate::layer::LayerFormat;
use crate::path::{Name, RelPath};
use crate::sys::dir::{Dir, Node as Special, OnExisting};
use crate::sys::errno::{self, Code};
use crate::sys::file::{self, Access, SetTime};
use crate::sys::stat::{FileType, Stat};
use crate::sys::umask;
use crate::sys::xattr;

/// How much of a file's data is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Data {
    All,
    /// As many bytes from the start: the rest is about to be cut off.
    First(u64),
    /// None, if the copy can do without: they may stay where they are.
    Below,
}

/// A file of a lower layer.
pub(super) struct Source<'a> {
    pub(super) dir: &'a Dir,
    pub(super) name: &'a Name,
    pub(super) format: LayerFormat,
    pub(super) stat: Stat,
}

impl Union {
    /// Sees to it that a node is in the upper.
    ///
    /// # Errors
    /// EROFS without an upper; otherwise those of copying: then nothing has changed.
    pub(super) fn copy_up(&self, node: &Arc<Node>, data: Data) -> io::Result<()> {
        let (is_upper, is_partial) = {
            let state = node.state.lock();
            (state.is_upper(), state.below.is_some())
        };
        if is_upper {
            self.place_names(node)?;
            if !is_partial || (data == Data::Below && !*self.metacopies_end.read()) {
                return Ok(());
            }
            return self.complete(node, data);
        }
        let upper = self.writable()?;
        if node.is_dir() {
            let dead = node.state.lock().is_dead();
            return if dead {
                self.copy_up_dead_dir(upper, node)
            } else {
                self.copy_up_dirs(upper, node)
            };
        }
        if let Some((above, _)) = node.link() {
            self.copy_up_dirs(upper, &above)?;
        }
        let copying = node.copying.lock();
        let lower = match &node.state.lock().place {
            Place::Lower(Some(place)) => Some(place.clone()),
            Place::Lower(None) => return Err(Code::Io.into()),
            _ => None,
        };
        let Some(place) = lower else {
            // Somebody else has done it, perhaps without the data.
            drop(copying);
            return self.copy_up(node, data);
        };
        let lower_dir = self.lower_dir(&place.dir)?;
        let source = self.source(&place, &lower_dir)?;
        let ended = self.metacopies_end.read();
        let path_below = match data {
            Data::Below if !*ended => self.path_below(upper, node, &source),
            _ => None,
        };
        // Whoever ends them waits for those that are being made, but not for the data of others.
        let made_while_allowed = path_below.is_some().then_some(ended);
        umask::set_on_this_thread(0)?;
        let make = |path_below: Option<&RelPath>| {
            let temp = upper.work.new_name()?;
            let made = self.make_copy(upper, &source, &temp, data, path_below).and_then(|copy| {
                let below = path_below.map(|_| Below::at(place.clone(), &source.stat, true));
                self.publish_file(upper, node, &source, (&temp, copy), (below, &place))
            });
            if made.is_err() {
                upper.work.discard(&temp);
            }
            made
        };
        match make(path_below.as_ref()) {
            // Whole it needs fewer marks.
            Err(e) if path_below.is_some() && errno::has_no_room_for_xattrs(&e) => make(None)?,
            made => made?,
        }
        drop((made_while_allowed, copying));
        self.place_names(node)?;
        if source.stat.nlink > 1 && *self.metacopies_end.read() {
            // Nobody settles it any more.
            self.place_all_names(&mut || ControlFlow::Continue(()))?;
        }
        Ok(())
    }

    /// Gives the copy of a file with several names in a lower layer all those of its names that are known:
    /// by any of them it may have been changed, and any may be removed.
    pub(super) fn place_names(&self, node: &Arc<Node>) -> io::Result<()> {
        if !node.unplaced.load(Ordering::Relaxed) {
            return Ok(());
        }
        let upper = self.writable()?;
        if !matches!(node.state.lock().place, Place::Linked(_)) {
            // Not copied yet, or being copied: with that it gets its names.
            return Ok(());
        }
        // Who comes second relies on what the first has done.
        let _copying = node.copying.lock();
        loop {
            let links = {
                let state = node.state.lock();
                let linked = matches!(state.place, Place::Linked(_));
                if linked { state.links.clone() } else { LinkList::new() }
            };
            for (above, name) in &links {
                let dir = match self.copy_up_dirs(upper, above).and_then(|()| self.upper_dir(above))
                {
                    // It has gone, and with it the name.
                    Err(_) if !node.state.lock().has_link(above, name) => continue,
                    dir => dir?,
                };
                let state = node.state.lock();
                let Place::Linked(kept) = &state.place else { break };
                if !state.has_link(above, name) || dir.try_stat_at(name)?.is_some() {
                    continue;
                }
                let before = dir.stat()?;
                file::Place::dir(&dir)
                    .despite_its_mode(|| upper.work.links().hard_link(kept, &dir, name))?;
                restore_times(&dir, &before);
            }
            let state = node.state.lock();
            let more = matches!(state.place, Place::Linked(_))
                && state
                    .links
                    .iter()
                    .any(|(dir, name)| !links.iter().any(|(d, n)| d.id == dir.id && n == name));
            if !more {
                node.unplaced.store(false, Ordering::Relaxed);
                return Ok(());
            }
        }
    }

    pub(super) fn source<'a>(&self, place: &'a LowerPlace, dir: &'a Dir) -> io::Result<Source<'a>> {
        let format = self.lower(place.dir.layer)?.format;
        Ok(Source { dir, name: &place.name, format, stat: dir.stat_at(&place.name)? })
    }

    /// Makes the copy of what is no directory. If that has its data, they are open.
    fn make_copy(
        &self,
        upper: &UpperBranch,
        source: &Source<'_>,
        temp: &Name,
        data: Data,
        path_below: Option<&RelPath>,
    ) -> io::Result<(Real, Option<File>)> {
        let dir = upper.work.temp();
        let stat = &source.stat;
        let special = |node: Special| dir.make_node(temp, node, 0o600);
        let (major, minor) = stat.rdev;
        let mut file = None;
        match stat.file_type {
            FileType::Regular => file = Some(dir.create_file(temp, 0o600)?),
            FileType::Symlink => dir.symlink(&source.dir.read_link(source.name)?, temp)?,
            FileType::CharDevice => special(Special::Char { major, minor })?,
            FileType::BlockDevice => special(Special::Block { major, minor })?,
            FileType::Fifo => special(Special::Fifo)?,
            FileType::Socket => special(Special::Socket)?,
            FileType::Directory | FileType::Unknown => return Err(Code::Io.into()),
        }
        match (&file, path_below) {
            (Some(file), Some(path)) => self.leave_data(upper, file, stat.size, path)?,
            (Some(file), None) => self.copy_data(source, file, data)?,
            (None, _) => {}
        }
        let place = file::Place::Child(dir, temp);
        let from = file::Place::Child(source.dir, source.name);
        self.copy_attributes(source, from, upper.format, place)?;
        if matches!(data, Data::First(most) if most < stat.size) {
            // It is what somebody truncates, for a kill may come before he has it.
            place.set_times(SetTime::Keep, SetTime::Now)?;
        }
        // Attributes are as safe as the name that the copy gets.
        if let Some(file) = &file
            && self.options.sync == SyncPolicy::Strict
            && (path_below.is_none() || upper.needs_order)
        {
            file.sync_all()?;
        }
        if stat.file_type == FileType::Symlink && self.options.sync == SyncPolicy::Strict {
            dir.sync_link_at(temp)?;
        }
        let real = Real::from(&dir.stat_at(temp)?);
        Ok((real, file.filter(|_| path_below.is_none())))
    }

    /// Copies the data of a file, or some, to one that has none.
    pub(super) fn copy_data(&self, source: &Source<'_>, to: &File, data: Data) -> io::Result<()> {
        let size = match data {
            Data::All | Data::Below => source.stat.size,
            Data::First(most) => most.min(source.stat.size),
        };
        if size == 0 {
            return Ok(());
        }
        let place = file::Place::Child(source.dir, source.name);
        let from = open_whole(place, source.format, Access::Read)?;
        let mut copier = self.copiers.lock().pop().unwrap_or_default();
        let copied = copier.copy(&from, source.stat.dev, size, to, &mut |_| {
            #[cfg(test)]
            self.hooks.copying();
            Ok(())
        });
        self.copiers.lock().push(copier);
        copied?;
        if size < source.stat.size {
            // Shared blocks are those of the whole file.
            to.set_len(size)?;
        }
        Ok(())
    }

    /// Gives a copy what the original has beside its data.
    fn copy_attributes(
        &self,
        source: &Source<'_>,
        from: file::Place<'_>,
        format: LayerFormat,
        to: file::Place<'_>,
    ) -> io::Result<()> {
        let stat = &source.stat;
        let own = to.stat()?;
        if (own.uid, own.gid) != (stat.uid, stat.gid) {
            to.chown(Some(stat.uid), Some(stat.gid))?;
        }
        // After the owner, for a change of that takes capabilities away.
        let inherited = xattr::list(to.xattrs())?;
        let wanted = xattr::list(from.xattrs())?;
        for key in inherited.iter().filter(|key| super::acl::is_key(key)) {
            if !wanted.contains(key) {
                xattr::remove(to.xattrs(), key)?;
            }
        }
        for key in wanted {
            let Some(key_there) = copied(Some(source.format), Some(format), &key) else { continue };
            if let Some(value) = xattr::get(from.xattrs(), &key)? {
                xattr::set(to.xattrs(), &key_there, &value)?;
            }
        }
        if let Some(mode) = Self::zero_device_mode(from, Some(source.format), stat)? {
            Self::set_zero_device_mode(to, Some(format), mode)?;
        }
        let keeps_number = match stat.file_type {
            FileType::Directory => true,
            FileType::Regular => stat.nlink == 1,
            _ => false,
        };
        if keeps_number {
            self.write_origin(format, to.xattrs(), Real::from(stat))?;
        }
        if stat.file_type != FileType::Symlink {
            to.chmod(stat.mode)?;
        }
        to.set_times(SetTime::To(stat.atime), SetTime::To(stat.mtime))
    }

    /// Puts the copy of a file in its place.
    fn publish_file(
        &self,
        upper: &UpperBranch,
        node: &Arc<Node>,
        source: &Source<'_>,
        (temp, (real, mut file)): (&Name, (Real, Option<File>)),
        (below, place): (Option<Arc<Below>>, &LowerPlace),
    ) -> io::Result<()> {
        let linked = source.stat.nlink > 1;
        // From the note on; perhaps it is held already.
        let _noted = linked.then(|| self.metacopies_end.read_recursive());
        if linked {
            self.moved.fetch_add(1, Ordering::SeqCst);
            let unlinked = node.state.lock().unlinked;
            let names = source.stat.nlink.saturating_sub(unlinked.into());
            if let Err(e) = self.note_link_of(upper, temp, (place, &source.stat), names) {
                discard_link(upper, temp);
                return Err(e);
            }
        }
        let published = self.publish_at_its_name(upper, node, temp, |state| {
            node.partial.fetch_or(below.is_some(), Ordering::Relaxed);
            state.below = below;
            if linked {
                state.place = Place::Linked(temp.clone());
                node.unplaced.store(state.links.len() > 1, Ordering::Relaxed);
            }
            let names = source.stat.nlink.saturating_sub(state.unlinked.into());
            if linked {
                let lower = Real::from(&source.stat);
                self.links.insert(Linked::new(temp.clone(), node.id, lower, real, names));
            } else if Self::own_key(upper.format, "origin").is_none()
                || source.stat.file_type != FileType::Regular
                || self.table.direct_id(Real::from(&source.stat)) != Some(node.id)
            {
                self.table.note_other_id(real, node.id);
            }
            node.set_upper(real);
            // A descriptor of the original must not be used any more.
            self.table.descriptors.drop_file(node.generation);
            if let Some(file) = file.take().filter(|_| node.kind == FileType::Regular) {
                // Whoever has it copied is about to write.
                let open = Arc::new(OpenFile { file, writable: true });
                node.cached.store(true, Ordering::Relaxed);
                self.table.descriptors.keep_file(node.generation, &open);
            }
        });
        if published.is_ok()
            && let Some(linked) = self.links.of(real)
        {
            // Some may have gone since.
            self.note_fewer_names(&linked);
        }
        if published.is_err() && linked {
            discard_link(upper, temp);
        }
        published
    }

    /// Renames a copy from the work directory to the node's name, whatever that is by now, and has
    /// `note` note that.
    fn publish_at_its_name(
        &self,
        upper: &UpperBranch,
        node: &Arc<Node>,
        temp: &Name,
        note: impl FnOnce(&mut super::node::State),
    ) -> io::Result<()> {
        loop {
            let (link, version) = {
                let state = node.state.lock();
                (state.links.first().cloned(), state.version)
            };
            let above = match &link {
                None => None,
                Some((above, name)) => {
                    self.copy_up_dirs(upper, above)?;
                    Some((self.upper_dir(above)?, name))
                }
            };
            let mut state = node.state.lock();
            if state.version != version {
                continue;
            }
            match above {
                None if node.is_dir() => return Err(Code::NoEntry.into()),
                None => {
                    let place = file::Place::Child(upper.work.temp(), temp);
                    state.place = Place::Pinned(Arc::new(place.pin()?));
                    upper.work.temp().unlink(temp)?;
                }
                Some((dir, name)) => {
                    let before = dir.stat()?;
                    let work = upper.work.temp();
                    let publish = || work.rename(temp, &dir, name, OnExisting::Fail);
                    // Who may change the file need not be allowed to change the directory it is in.
                    file::Place::dir(&dir)
                        .despite_its_mode(|| file::moving(work, temp, publish))?;
                    // The directory shows nothing that it did not show before.
                    restore_times(&dir, &before);
                    state.place = Place::Upper;
                }
            }
            self.published.fetch_add(1, Ordering::AcqRel);
            state.touch();
            note(&mut state);
            return Ok(());
        }
    }

    /// Sees to it that a directory and all above it are in the upper.
    pub(super) fn copy_up_dirs(&self, upper: &UpperBranch, node: &Arc<Node>) -> io::Result<()> {
        let mut missing = Vec::new();
        let mut at = Arc::clone(node);
        loop {
            let above = {
                let state = at.state.lock();
                if state.is_upper() {
                    break;
                }
                if state.is_dead() {
                    return Err(Code::NoEntry.into());
                }
                state.links.first().cloned()
            };
            let (above, _) = above.ok_or(Code::NoEntry)?;
            missing.push(std::mem::replace(&mut at, above));
        }
        missing.iter().rev().try_for_each(|node| self.copy_up_dir(upper, node))
    }

    /// Copies a directory up; the one above is in the upper.
    fn copy_up_dir(&self, upper: &UpperBranch, node: &Arc<Node>) -> io::Result<()> {
        let _copying = node.copying.lock();
        if node.state.lock().is_upper() {
            return Ok(());
        }
        let temp = upper.work.new_name()?;
        let made = (|| {
            let real = self.make_dir_copy(upper, node, &temp)?;
            let by_origin = node.lower.and_then(|lower| self.table.direct_id(lower));
            let number =
                Self::own_key(upper.format, "origin").is_none() || by_origin != Some(node.id);
            self.publish_at_its_name(upper, node, &temp, |_| {
                node.set_upper(real);
                if number {
                    self.table.note_other_id(real, node.id);
                }
            })
        })();
        if made.is_err() {
            upper.work.discard(&temp);
        }
        made
    }

    /// Makes the copy of a directory, without what is in it.
    fn make_dir_copy(
        &self,
        upper: &UpperBranch,
        node: &Arc<Node>,
        temp: &Name,
    ) -> io::Result<Real> {
        let part = node.state.lock().lowers().first().cloned().ok_or(Code::NoEntry)?;
        let (dir, format) = (self.lower_dir(&part)?, self.lower(part.layer)?.format);
        umask::set_on_this_thread(0)?;
        let work = upper.work.temp();
        work.make_dir(temp, 0o700)?;
        // The name is not used: a directory is reached by its descriptor.
        let source = Source { dir: &dir, name: temp, format, stat: dir.stat()? };
        let from = file::Place::dir(&dir);
        self.copy_attributes(&source, from, upper.format, file::Place::Child(work, temp))?;
        if upper.needs_order {
            let copy = || work.open_dir(temp);
            upper.keep_order(&file::Place::Child(work, temp).despite_its_mode(copy)?)?;
        }
        Ok(Real::from(&work.stat_at(temp)?))
    }

    /// Gives a directory that was removed, and is still open, a copy without a name.
    fn copy_up_dead_dir(&self, upper: &UpperBranch, node: &Arc<Node>) -> io::Result<()> {
        let _copying = node.copying.lock();
        if node.state.lock().is_upper() {
            return Ok(());
        }
        let temp = upper.work.new_name()?;
        let made = self.make_dir_copy(upper, node, &temp).and_then(|real| {
            let dir = upper.work.temp().open_dir(&temp)?;
            upper.work.temp().remove_dir(&temp)?;
            Ok((real, dir))
        });
        let (real, dir) = match made {
            Ok(made) => made,
            Err(e) => {
                upper.work.discard(&temp);
                return Err(e);
            }
        };
        let mut state = node.state.lock();
        state.place = Place::Upper;
        if let Some(directory) = state.directory.as_mut() {
            directory.dead = Some(Some(Arc::new(dir)));
        }
        state.touch();
        node.set_upper(real);
        Ok(())
    }
}

/// Gives back its times to a directory that got a name which it showed before.
pub(super) fn restore_times(dir: &Dir, before: &Stat) {
    if let Err(e) = crate::sys::dir::set_times(dir, before.atime, before.mtime) {
        // What was done is done.
        tracing::warn!(error = %e, "a directory looks as if it had changed since something in it was copied");
    }
}

/// Removes the further link of a copy that is not published.
fn discard_link(upper: &UpperBranch, name: &Name) {
    if let Err(e) = links::discard(upper.work.links(), name) {
        // It stands for what it is a copy of, so that it does no harm.
        tracing::warn!(error = %e, "cannot remove the further link of a copy that failed");
    }
}
