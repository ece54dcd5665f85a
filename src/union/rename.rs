//! Renames.
//!
//! What is renamed is copied up first. Then one rename in the upper does it, which leaves a whiteout at
//! the old name if a lower layer would show through there. A directory with parts in lower layers gets
//! a redirect before, which says under which path those are found: at the old name it says nothing new,
//! so a kill between the two steps changes nothing. A directory without such parts is made opaque
//! before, if it would meet some at the new name.
//!
//! A directory that is replaced is empty in the union but may hold whiteouts: an empty one takes its
//! place first.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use super::create::check_name;
use super::lookup::{Found, View};
use super::node::{Node, State};
use super::remove::{lock_names, take_out_dir};
use super::workdir::Marker;
use super::xattr::{ZERO_DEVICE_FILE, copied};
use super::{Union, UpperBranch};
use crate::layer::marks;
use crate::path::{Name, RelPath};
use crate::sys::dir::{Dir, OnExisting, set_times};
use crate::sys::errno::Code;
use crate::sys::file::{self, Place, SetTime};
use crate::sys::umask;
use crate::sys::xattr;

/// The longest redirect that the kernel reads, in bytes.
pub(super) const REDIRECT_MAX: usize = 256;

/// What a rename does besides renaming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RenameMode {
    Replace,
    /// Fails with EEXIST if the new name is there.
    NoReplace,
    /// Both change names.
    Exchange,
    /// Leaves a character device 0:0 at the old name, for an overlay on top of this one.
    Whiteout,
}

/// One side of a rename.
struct Side<'a> {
    parent: &'a Arc<Node>,
    name: &'a Name,
    view: View,
    dir: Arc<Dir>,
}

/// Where a file system cannot do it in one step. What may not be possible is done before anything moves.
fn rename_then_whiteout(
    upper: &UpperBranch,
    old: (&Dir, &Name),
    new: (&Dir, &Name),
) -> io::Result<()> {
    let temp = upper.work.new_name()?;
    let work = upper.work.temp();
    marks::make_whiteout(upper.format, work, &temp)?;
    let renamed = old
        .0
        .rename(old.1, new.0, new.1, OnExisting::Replace)
        .and_then(|()| work.rename(&temp, old.0, old.1, OnExisting::Fail));
    if renamed.is_err() {
        upper.work.discard(&temp);
    }
    renamed
}

impl Union {
    /// Renames `name` in `parent` to `new_name` in `new_parent`.
    ///
    /// # Errors
    /// Those of rename(2); EXDEV for a directory that has parts in lower layers, if the format or the
    /// options have no redirects, or if its path is longer than 256 bytes.
    pub(crate) fn rename(
        &self,
        parent: &Arc<Node>,
        name: &Name,
        new_parent: &Arc<Node>,
        new_name: &Name,
        mode: RenameMode,
    ) -> io::Result<()> {
        let upper = self.writable()?;
        check_name(upper.format, new_name)?;
        let node = self.resolve(parent, name)?.ok_or(Code::NoEntry)?;
        let target = self.resolve(new_parent, new_name)?;
        match (&target, mode) {
            (Some(_), RenameMode::NoReplace) => return Err(Code::Exists.into()),
            (None, RenameMode::Exchange) => return Err(Code::NoEntry.into()),
            (Some(target), RenameMode::Replace | RenameMode::Whiteout) => {
                if target.id == node.id {
                    // Two names of one file: nothing to do, says POSIX.
                    return Ok(());
                }
                match (node.is_dir(), target.is_dir()) {
                    (true, false) => return Err(Code::NotDirectory.into()),
                    (false, true) => return Err(Code::IsDirectory.into()),
                    _ => {}
                }
            }
            _ => {}
        }
        // What takes long comes before anything is locked.
        self.copy_up_for_names(&node)?;
        if let Some(target) = &target {
            self.place_names(target)?;
        }
        if let (Some(target), RenameMode::Exchange) = (&target, mode) {
            self.copy_up_for_names(target)?;
        }
        let _moving = self.moving.read();
        let mut locked = vec![parent, new_parent];
        locked.extend(target.as_ref().filter(|target| target.is_dir()));
        let names = lock_names(&locked);
        let (from, found) = self.side(upper, parent, name)?;
        let found = found.ok_or(Code::NoEntry)?;
        let (to, found_target) = self.side(upper, new_parent, new_name)?;
        let same = |known: Option<Arc<Node>>, node: Option<&Arc<Node>>| {
            known.map(|known| known.id) == node.map(|node| node.id)
        };
        let target_now = match &found_target {
            None => None,
            Some(found) => self.known(new_parent, found)?,
        };
        if !same(self.known(parent, &found)?, Some(&node)) || !same(target_now, target.as_ref()) {
            // Somebody changed the layers beside the union.
            return Err(Code::Stale.into());
        }
        // Before: a step that fails after it moved something has moved it.
        if [Some(&node), target.as_ref()]
            .into_iter()
            .flatten()
            .any(|node| node.may_have_data_below())
        {
            self.moved.fetch_add(1, Ordering::SeqCst);
        }
        if found.upper.is_none() {
            self.name_in_upper(&node, &from)?;
        }
        let gone = match (mode, &target, &found_target) {
            (RenameMode::Exchange, Some(target), Some(found_target)) => {
                if found_target.upper.is_none() {
                    self.name_in_upper(target, &to)?;
                }
                self.exchange(upper, (&from, &node), (&to, target))?;
                Vec::new()
            }
            _ => {
                let victim = match (&target, &found_target) {
                    (Some(target), Some(found)) => Some((target, found)),
                    _ => None,
                };
                self.replace(upper, (&from, &node), &to, victim, mode)?
            }
        };
        drop(names);
        drop(gone);
        Ok(())
    }

    fn side<'a>(
        &self,
        upper: &UpperBranch,
        parent: &'a Arc<Node>,
        name: &'a Name,
    ) -> io::Result<(Side<'a>, Option<Found>)> {
        let (view, dir) = self.parent_dir(upper, parent)?;
        let found = self.find(&view, name)?;
        Ok((Side { parent, name, view, dir }, found))
    }

    /// Gives a file that is in the upper already the name that it has in a lower layer: one of several,
    /// another of which was copied up.
    fn name_in_upper(&self, node: &Arc<Node>, side: &Side<'_>) -> io::Result<()> {
        self.at(node, |place, _, _| place.link(&side.dir, side.name))
    }

    /// Renames, over what is there or not.
    fn replace(
        &self,
        upper: &UpperBranch,
        (from, node): (&Side<'_>, &Arc<Node>),
        to: &Side<'_>,
        victim: Option<(&Arc<Node>, &Found)>,
        mode: RenameMode,
    ) -> io::Result<Vec<Option<super::node::Link>>> {
        let whiteout = self.shown_below(&from.view, from.name)?.is_some();
        if let Some((victim, _)) = victim
            && victim.is_dir()
            && !self.is_empty_dir(victim)?
        {
            return Err(Code::NotEmpty.into());
        }
        if node.is_dir() {
            self.prepare_dir(upper, node, to)?;
        }
        // What is left of a directory that is replaced, for who still has it open.
        let mut left = None;
        if let Some((victim, found)) = victim
            && victim.is_dir()
            && found.upper.is_some()
        {
            left = Some(self.upper_dir(victim)?);
            self.clear_dir(upper, to, victim)?;
        }
        let marker = match mode {
            RenameMode::Whiteout => Some(self.zero_device(upper)?),
            _ => None,
        };
        let tree = node.is_dir().then(|| self.tree.write());
        let mut victim_node = match victim {
            Some((_, found)) => Some(self.victim(to.parent, found)?),
            None => None,
        };
        let other = victim.map(|(node, _)| node);
        let (mut state, mut victim_state) = lock_states(node, other);
        if let Some(victim) = &mut victim_node {
            victim.look_again(victim_state.as_deref(), upper, &to.dir, to.name)?;
        }
        if let Some(victim) = victim_node.as_ref().filter(|_| !node.is_dir()) {
            self.hold(victim, victim_state.as_deref_mut(), &to.dir, to.name)?;
        }
        self.move_entry(upper, node.is_dir(), from, to, whiteout)?;
        let old = state.remove_link(from.parent, from.name);
        state.add_link(to.parent, to.name);
        state.touch();
        drop(state);
        let mut gone = vec![old];
        match (&victim_node, victim) {
            (Some(_), Some((victim, _))) if victim.is_dir() => {
                drop(victim_state);
                gone.push(self.directory_gone(victim, to.parent, to.name, left));
            }
            (Some(victim), Some(_)) => {
                gone.push(self.lost_name(victim, victim_state, to.parent, to.name));
            }
            _ => drop(victim_state),
        }
        drop(tree);
        self.unlisted(from.parent, from.name);
        self.unlisted(to.parent, to.name);
        self.listed(to.parent, to.name);
        if let Some(marker) = marker {
            upper.work.temp().rename(&marker, &from.dir, from.name, OnExisting::Replace)?;
            self.listed(from.parent, from.name);
        }
        Ok(gone)
    }

    /// The one step in the upper.
    fn move_entry(
        &self,
        upper: &UpperBranch,
        is_dir: bool,
        from: &Side<'_>,
        to: &Side<'_>,
        whiteout: bool,
    ) -> io::Result<()> {
        let (old, new) = ((&*from.dir, from.name), (&*to.dir, to.name));
        if upper.format.xattr_prefix().is_none() {
            if whiteout {
                marks::make_whiteout(upper.format, old.0, old.1)?;
            }
            old.0.rename(old.1, new.0, new.1, OnExisting::Replace)?;
            if whiteout {
                upper.keep_order_afterwards(old.0);
            }
            // The new name may have been deleted before.
            return match marks::separate_whiteout(upper.format, new.1) {
                Some(mark) if new.0.try_stat_at(&mark)?.is_some() => new.0.unlink(&mark),
                _ => Ok(()),
            };
        }
        let there = new.0.try_stat_at(new.1)?;
        if is_dir && there.is_some_and(|stat| !stat.is_dir()) {
            // A whiteout, which a directory cannot replace. It is wanted at the old name, or goes.
            old.0.exchange(old.1, new.0, new.1)?;
            return if whiteout { Ok(()) } else { old.0.unlink(old.1) };
        }
        if !whiteout {
            return old.0.rename(old.1, new.0, new.1, OnExisting::Replace);
        }
        let renamed = match file::rename_leaving_whiteout(old.0, old.1, new.0, new.1) {
            // A file system that cannot: then in two steps.
            Err(e) if Code::Invalid.is(&e) => rename_then_whiteout(upper, old, new),
            renamed => renamed,
        };
        renamed.inspect(|()| upper.keep_order_afterwards(old.0))
    }

    /// Exchanges two names.
    fn exchange(
        &self,
        upper: &UpperBranch,
        (from, node): (&Side<'_>, &Arc<Node>),
        (to, target): (&Side<'_>, &Arc<Node>),
    ) -> io::Result<()> {
        if node.id == target.id {
            return Ok(());
        }
        if node.is_dir() {
            self.prepare_dir(upper, node, to)?;
        }
        if target.is_dir() {
            self.prepare_dir(upper, target, from)?;
        }
        let tree = (node.is_dir() || target.is_dir()).then(|| self.tree.write());
        let (mut state, mut target_state) = lock_states(node, Some(target));
        from.dir.exchange(from.name, &to.dir, to.name)?;
        let old = state.remove_link(from.parent, from.name);
        state.add_link(to.parent, to.name);
        let old_target = target_state.as_mut().and_then(|target_state| {
            let old = target_state.remove_link(to.parent, to.name);
            target_state.add_link(from.parent, from.name);
            old
        });
        drop((state, target_state, tree));
        drop((old, old_target));
        Ok(())
    }

    /// Marks a directory before it gets another place, so that it shows there what it shows here.
    fn prepare_dir(&self, upper: &UpperBranch, node: &Arc<Node>, to: &Side<'_>) -> io::Result<()> {
        let (lowers, below) = {
            let state = node.state.lock();
            let below = state.directory.as_ref().map(|d| Arc::clone(&d.below));
            (state.lowers(), below.unwrap_or_default())
        };
        let dir = self.upper_dir(node)?;
        if lowers.is_empty() {
            let meets = self.shown_below(&to.view, to.name)?.is_some_and(|stat| stat.is_dir());
            if meets {
                // AUFS's mark is a file in it, which nobody is to notice.
                let before = dir.stat()?;
                let place = Place::dir(&dir);
                place.despite_its_mode(|| marks::make_opaque(upper.format, &dir))?;
                set_times(&*dir, before.atime, before.mtime)?;
                upper.keep_order(&dir)?;
            }
            return Ok(());
        }
        // Once somebody has taken the layer as it is, nobody settles it any more.
        if self.options.no_redirects || *self.metacopies_end.read() {
            return Err(Code::CrossDevice.into());
        }
        self.redirect(upper, &dir, &below)
    }

    /// Has a directory say under which path its lower parts are.
    fn redirect(&self, upper: &UpperBranch, dir: &Dir, below: &RelPath) -> io::Result<()> {
        let Some(prefix) = upper.format.xattr_prefix() else {
            return Err(Code::CrossDevice.into());
        };
        let value = [b"/", below.as_bytes()].concat();
        if value.len() > REDIRECT_MAX {
            return Err(Code::CrossDevice.into());
        }
        let key = format!("{prefix}redirect");
        if xattr::get(xattr::Of::dir(dir), key.as_bytes())?.as_deref() == Some(&*value) {
            return Ok(());
        }
        upper.work.note(Marker::Redirected)?;
        Place::dir(dir)
            .despite_its_mode(|| xattr::set(xattr::Of::dir(dir), key.as_bytes(), &value))?;
        upper.keep_order(dir)
    }

    /// Puts an empty directory in the place of one that the union shows as empty.
    fn clear_dir(&self, upper: &UpperBranch, side: &Side<'_>, node: &Arc<Node>) -> io::Result<()> {
        if side.dir.open_dir(side.name)?.is_empty()? {
            return Ok(());
        }
        if upper.format.xattr_prefix().is_none() {
            // An opaque directory is never empty there: it goes, and is deleted for the moment.
            let whiteout = self.shown_below(&side.view, side.name)?.is_some();
            return take_out_dir(upper, &side.dir, side.name, whiteout);
        }
        umask::set_on_this_thread(0)?;
        let work = upper.work.temp();
        let temp = upper.work.new_name()?;
        let made = (|| {
            work.make_dir(&temp, 0o700)?;
            let empty = work.open_dir(&temp)?;
            let stat = side.dir.stat_at(side.name)?;
            marks::make_opaque(upper.format, &empty)?;
            let place = Place::Child(work, &temp);
            place.chown(Some(stat.uid), Some(stat.gid))?;
            // A kill may come before it is replaced: it is what it was.
            let old = xattr::Of::Child(&side.dir, side.name);
            for key in xattr::list(old)? {
                if copied(Some(upper.format), Some(upper.format), &key).is_some()
                    && let Some(value) = xattr::get(old, &key)?
                {
                    xattr::set(place.xattrs(), &key, &value)?;
                }
            }
            place.chmod(stat.mode)?;
            place.set_times(SetTime::To(stat.atime), SetTime::To(stat.mtime))?;
            upper.keep_order(&empty)?;
            let exchange = || work.exchange(&temp, &side.dir, side.name);
            file::moving(&side.dir, side.name, || file::moving(work, &temp, exchange))
        })();
        upper.work.discard_dir(&temp);
        made?;
        // Its descriptor is of the one that was taken out.
        self.table.descriptors.drop_node(node.generation);
        Ok(())
    }

    /// Makes a file in the work directory that is shown as a character device 0:0.
    fn zero_device(&self, upper: &UpperBranch) -> io::Result<Name> {
        umask::set_on_this_thread(0)?;
        let work = upper.work.temp();
        let temp = upper.work.new_name()?;
        if upper.format.xattr_prefix().is_none() {
            work.make_node(&temp, crate::sys::dir::Node::Char { major: 0, minor: 0 }, 0)?;
            return Ok(temp);
        }
        drop(work.create_file(&temp, 0o600)?);
        let place = Place::Child(work, &temp);
        let marked = place
            .chmod(ZERO_DEVICE_FILE)
            .and_then(|()| Self::set_zero_device_mode(place, Some(upper.format), 0));
        match marked {
            Ok(()) => Ok(temp),
            Err(e) => {
                upper.work.discard(&temp);
                Err(e)
            }
        }
    }
}

/// Locks the states of two nodes, always in the same order.
fn lock_states<'a>(
    node: &'a Arc<Node>,
    other: Option<&'a Arc<Node>>,
) -> (MutexGuard<'a, State>, Option<MutexGuard<'a, State>>) {
    match other {
        Some(other) if other.id < node.id => {
            let other = other.state.lock();
            (node.state.lock(), Some(other))
        }
        other => (node.state.lock(), other.map(|other| other.state.lock())),
    }
}
