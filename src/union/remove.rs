//! Removal: a name goes from the upper, and a whiteout comes where a lower layer would show through.
//!
//! A whiteout is left only where it hides something. A file that is removed but may still be open is
//! held by a descriptor until nobody knows it any more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use super::lookup::{Found, View};
use super::node::{Node, Place, Real, State};
use super::{Union, UpperBranch, links};
use crate::layer::marks;
use crate::path::Name;
use crate::sys::dir::{Dir, OnExisting};
use crate::sys::errno::Code;
use crate::sys::file;

/// What a removal has to know of a name.
pub(super) struct Victim {
    pub(super) node: Option<Arc<Node>>,
    pub(super) real: Real,
    nlink: u64,
    pub(super) in_upper: bool,
}

impl Victim {
    /// Looks again, under the lock of its state, at what was found in a lower layer: it may have been copied
    /// up to that name meanwhile.
    pub(super) fn look_again(
        &mut self,
        state: Option<&State>,
        upper: &UpperBranch,
        dir: &Dir,
        name: &Name,
    ) -> io::Result<()> {
        if !self.in_upper
            && state.is_some_and(State::is_upper)
            && let Some(stat) = dir.try_stat_at(name)?
            && marks::decode(upper.format, name, &stat) == marks::Mark::None
        {
            (self.in_upper, self.real, self.nlink) = (true, Real::from(&stat), stat.nlink);
        }
        Ok(())
    }
}

impl Union {
    /// Removes a name of what is no directory.
    ///
    /// # Errors
    /// ENOENT, EISDIR; ENAMETOOLONG where the format has no whiteout for so long a name.
    pub(crate) fn unlink(&self, parent: &Arc<Node>, name: &Name) -> io::Result<()> {
        let upper = self.writable()?;
        let names = parent.names.lock();
        let (mut view, found) = self.existing(parent, name)?;
        if found.stat.is_dir() {
            return Err(Code::IsDirectory.into());
        }
        let mut victim = self.victim(parent, &found)?;
        if let Some(node) = &victim.node
            && node.unplaced.load(Ordering::Relaxed)
        {
            // Else this could be the only name of what was written through another. It may be placed itself.
            self.place_names(node)?;
            let found;
            (view, found) = self.existing(parent, name)?;
            victim = self.victim(parent, &found)?;
        }
        let whiteout = !victim.in_upper || self.shown_below(&view, name)?.is_some();
        if whiteout {
            self.copy_up_dirs(upper, parent)?;
        }
        let dir = self.upper_dir(parent)?;
        let node = victim.node.clone();
        let mut state = node.as_ref().map(|node| node.state.lock());
        victim.look_again(state.as_deref(), upper, &dir, name)?;
        self.hold(&victim, state.as_deref_mut(), &dir, name)?;
        if whiteout {
            put_whiteout(upper, &dir, name, victim.in_upper)?;
        } else {
            dir.unlink(name)?;
        }
        let gone = self.lost_name(&victim, state, parent, name);
        self.unlisted(parent, name);
        drop(names);
        drop(gone);
        Ok(())
    }

    /// Removes a directory in which the union shows nothing.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ENOTEMPTY.
    pub(crate) fn rmdir(&self, parent: &Arc<Node>, name: &Name) -> io::Result<()> {
        let upper = self.writable()?;
        let node = self.resolve(parent, name)?.ok_or(Code::NoEntry)?;
        if !node.is_dir() {
            return Err(Code::NotDirectory.into());
        }
        let names = lock_names(&[parent, &node]);
        let (view, found) = self.existing(parent, name)?;
        if self.known(parent, &found)?.is_none_or(|known| known.id != node.id) {
            return Err(Code::NoEntry.into());
        }
        if !self.is_empty_dir(&node)? {
            return Err(Code::NotEmpty.into());
        }
        let whiteout = self.shown_below(&view, name)?.is_some();
        if whiteout {
            self.copy_up_dirs(upper, parent)?;
        }
        let dir = self.upper_dir(parent)?;
        let in_upper = found.upper.is_some();
        let left = if in_upper { Some(self.upper_dir(&node)?) } else { None };
        if in_upper {
            take_out_dir(upper, &dir, name, whiteout)?;
        } else {
            put_whiteout(upper, &dir, name, false)?;
        }
        let gone = self.directory_gone(&node, parent, name, left);
        self.unlisted(parent, name);
        drop(names);
        drop(gone);
        Ok(())
    }

    /// What the union shows under a name of a directory whose names are locked.
    pub(super) fn existing(&self, parent: &Arc<Node>, name: &Name) -> io::Result<(View, Found)> {
        let view = self.view(parent)?;
        let found = self.find(&view, name)?.ok_or(Code::NoEntry)?;
        Ok((view, found))
    }

    pub(super) fn victim(&self, parent: &Arc<Node>, found: &Found) -> io::Result<Victim> {
        let node = self.known(parent, found)?;
        let hidden = match &node {
            Some(node) if found.upper.is_some() => node.hidden_names(),
            _ => 0,
        };
        Ok(Victim {
            node,
            real: Real::from(&found.stat),
            nlink: found.stat.nlink.saturating_sub(hidden),
            in_upper: found.upper.is_some(),
        })
    }

    /// Before a file loses a name: holds it by a descriptor if that is the last one known.
    pub(super) fn hold(
        &self,
        victim: &Victim,
        state: Option<&mut State>,
        dir: &Dir,
        name: &Name,
    ) -> io::Result<()> {
        if let Some(state) = state
            && matches!(state.place, Place::Upper)
            && victim.in_upper
            && state.links.len() <= 1
        {
            let pin = || file::Place::Child(dir, name).pin();
            // Others may be closed for it: nothing of this node is opened by that.
            let fd = self.table.descriptors.opening(pin)?;
            state.place = Place::Pinned(Arc::new(fd));
            state.touch();
        }
        Ok(())
    }

    /// After a file lost a name. What comes back is to be dropped when nothing is locked.
    #[must_use]
    pub(super) fn lost_name(
        &self,
        victim: &Victim,
        state: Option<MutexGuard<'_, State>>,
        parent: &Arc<Node>,
        name: &Name,
    ) -> Option<super::node::Link> {
        let mut link = None;
        // A copy is gone with its last name; the original is only hidden.
        if victim.in_upper && victim.nlink <= 1 {
            self.table.forget_other_id(victim.real);
        }
        let linked = self.links.of(victim.real);
        if let Some(mut state) = state {
            if matches!(state.place, Place::Lower(_)) {
                state.unlinked = state.unlinked.saturating_add(1);
            }
            link = state.remove_link(parent, name);
            state.touch();
            if let Some(linked) = linked {
                match linked.remove_name() {
                    0 => self.drop_linked(&linked, Some(&mut state)),
                    _ => self.note_fewer_names(&linked),
                }
            }
        } else if let Some(linked) = linked {
            match linked.remove_name() {
                0 => self.drop_linked(&linked, None),
                _ => self.note_fewer_names(&linked),
            }
        }
        link
    }

    /// A file with a name among the union's links has lost its last other one.
    fn drop_linked(&self, linked: &super::links::Linked, state: Option<&mut State>) {
        let Ok(upper) = self.writable() else { return };
        let dir = upper.work.links();
        if let Some(state) = state {
            match self.table.descriptors.opening(|| file::Place::Child(dir, &linked.name).pin()) {
                Ok(fd) => state.place = Place::Pinned(Arc::new(fd)),
                Err(e) => {
                    // It stays where it is until the union is closed.
                    tracing::warn!(error = %e, "cannot hold an unlinked file open");
                    return;
                }
            }
        }
        self.links.remove(linked);
        if let Err(e) = links::discard(dir, &linked.name) {
            tracing::warn!(error = %e, "cannot remove the further link of an unlinked file");
        }
    }

    /// A directory was removed. What comes back is to be dropped when nothing is locked.
    #[must_use]
    pub(super) fn directory_gone(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        name: &Name,
        left: Option<Arc<Dir>>,
    ) -> Option<super::node::Link> {
        if let Some(real) = node.upper() {
            self.table.forget_other_id(real);
        }
        let mut state = node.state.lock();
        let link = state.remove_link(parent, name);
        state.touch();
        if let Some(directory) = state.directory.as_mut() {
            directory.dead = Some(left);
            directory.listing = None;
        }
        link
    }
}

/// Locks the names of several directories, always in the same order.
pub(super) fn lock_names<'a>(nodes: &[&'a Arc<Node>]) -> Vec<MutexGuard<'a, ()>> {
    let mut nodes = nodes.to_vec();
    nodes.sort_unstable_by_key(|node| node.id);
    nodes.dedup_by_key(|node| node.id);
    nodes.into_iter().map(|node| node.names.lock()).collect()
}

/// Hides what lower layers show under a name; what the upper has there goes, in the same step where
/// the format allows it.
pub(super) fn put_whiteout(
    upper: &UpperBranch,
    dir: &Dir,
    name: &Name,
    in_upper: bool,
) -> io::Result<()> {
    if marks::separate_whiteout(upper.format, name).is_some() || !in_upper {
        if !in_upper {
            return marks::make_whiteout(upper.format, dir, name);
        }
        put_whiteout_beside(upper, dir, name)?;
        return dir.unlink(name);
    }
    if upper.format.xattr_prefix().is_none() {
        // A name that can have no whiteout.
        return Err(Code::NameTooLong.into());
    }
    let temp = upper.work.new_name()?;
    marks::make_whiteout(upper.format, upper.work.temp(), &temp)?;
    let renamed = upper.work.temp().rename(&temp, dir, name, OnExisting::Replace);
    if renamed.is_err() {
        upper.work.discard(&temp);
    }
    renamed.inspect(|()| upper.keep_order_afterwards(dir))
}

/// Puts the whiteout of a name beside what is to go from there, in a format that has it in a file of its own.
/// It comes first on the disk, too, or a power cut would bring back what a lower layer has.
pub(super) fn put_whiteout_beside(upper: &UpperBranch, dir: &Dir, name: &Name) -> io::Result<()> {
    marks::make_whiteout(upper.format, dir, name)?;
    upper.keep_order(dir)
}

/// Removes a directory from the upper, in which there may be whiteouts; one comes in its place if
/// lower layers would show something.
pub(super) fn take_out_dir(
    upper: &UpperBranch,
    dir: &Dir,
    name: &Name,
    whiteout: bool,
) -> io::Result<()> {
    let work = upper.work.temp();
    if whiteout && upper.format.xattr_prefix().is_some() {
        let temp = upper.work.new_name()?;
        marks::make_whiteout(upper.format, work, &temp)?;
        if let Err(e) = file::moving(dir, name, || work.exchange(&temp, dir, name)) {
            upper.work.discard(&temp);
            return Err(e);
        }
        upper.work.discard_dir(&temp);
        upper.keep_order_afterwards(dir);
        return Ok(());
    }
    if whiteout {
        put_whiteout_beside(upper, dir, name)?;
    }
    match dir.remove_dir(name) {
        Err(e) if Code::NotEmpty.is(&e) => {
            let temp = upper.work.new_name()?;
            file::moving(dir, name, || dir.rename(name, work, &temp, OnExisting::Fail))?;
            upper.work.discard_dir(&temp);
            Ok(())
        }
        removed => removed,
    }
}
