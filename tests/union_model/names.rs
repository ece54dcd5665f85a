//! The model's names: how paths are resolved, what makes and takes them, and how they move.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::io::Errno;
use stratafs::LayerFormat;

use super::model::{Attempt, Id, Inode, Model, Open, ROOT, Stop, What, ZeroDevices};
use super::ops::{At, Move, is_long};

const NAME_MAX: usize = 255;
const S_ISGID: u32 = 0o2000;

impl Model {
    /// The directory that a path's last component is in, and that component.
    pub(super) fn parent(&self, path: &Path) -> Attempt<(Id, OsString)> {
        let mut left: Vec<OsString> = path.iter().rev().map(OsStr::to_owned).collect();
        let (mut at, mut links) = (ROOT, 0);
        while left.len() > 1 {
            let name = left.pop().unwrap();
            if name == "." {
                continue;
            }
            at = match &self.inode(self.child(at, &name)?).what {
                What::Dir(_) => self.child(at, &name)?,
                What::Symlink(target) => {
                    links += 1;
                    if links > 40 {
                        return Err(Errno::LOOP.into());
                    }
                    left.extend(Path::new(target).iter().rev().map(OsStr::to_owned));
                    at
                }
                _ => return Err(Errno::NOTDIR.into()),
            };
        }
        Ok((at, left.pop().unwrap()))
    }

    pub(super) fn child(&self, dir: Id, name: &OsStr) -> Attempt<Id> {
        if name.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG.into());
        }
        Ok(*self.dir(dir).entries.get(name).ok_or(Errno::NOENT)?)
    }

    pub(super) fn lookup(&self, path: &Path) -> Attempt<Id> {
        let (dir, name) = self.parent(path)?;
        self.child(dir, &name)
    }

    /// Where a new name can be.
    pub(super) fn free(&self, path: &Path) -> Attempt<(Id, OsString)> {
        let (dir, name) = self.parent(path)?;
        match self.child(dir, &name) {
            Ok(_) => return Err(Errno::EXIST.into()),
            Err(Stop::Errno(Errno::NOENT)) => {}
            Err(stop) => return Err(stop),
        }
        self.may_be_named(&name)?;
        Ok((dir, name))
    }

    pub(super) fn may_be_named(&self, name: &OsStr) -> Attempt<()> {
        if self.rules.format == LayerFormat::Aufs && name.as_bytes().starts_with(b".wh.") {
            return Err(Errno::INVAL.into());
        }
        Ok(())
    }

    pub(super) fn slot(&self, slot: usize) -> Attempt<Open> {
        self.open[slot].ok_or(Stop::Skip)
    }

    pub(super) fn at(&self, at: &At) -> Attempt<Id> {
        match at {
            At::Path(path) => self.lookup(path),
            At::Slot(slot) => Ok(self.slot(*slot)?.id),
        }
    }

    pub(super) fn at_with_xattrs(&self, at: &At, name: &str) -> Attempt<Id> {
        let id = self.at(at)?;
        if name.starts_with("user.") && !matches!(self.inode(id).kind(), 'f' | 'd') {
            return Err(Errno::PERM.into());
        }
        Ok(id)
    }

    pub(super) fn is_dir(&self, id: Id) -> bool {
        self.inode(id).kind() == 'd'
    }

    pub(super) fn is_file(&self, id: Id) -> bool {
        self.inode(id).kind() == 'f'
    }

    pub(super) fn make(&mut self, path: &Path, what: What, mode: u32) -> Attempt<Id> {
        let (parent, name) = self.free(path)?;
        Ok(self.make_at(parent, &name, what, mode))
    }

    pub(super) fn make_at(&mut self, parent: Id, name: &OsStr, what: What, mode: u32) -> Id {
        let inode = self.inode(parent);
        let mut new = Inode::new(what, mode, (0, 0));
        if inode.mode & S_ISGID != 0 {
            new.owner.1 = inode.owner.1;
            if new.kind() == 'd' {
                new.mode |= S_ISGID;
            }
        }
        self.inode_mut(parent).mtime = None;
        self.put(parent, name, new)
    }

    /// Whether the device that means that nothing is there can be made.
    pub(super) fn make_zero_device(&self, path: &Path) -> Attempt<()> {
        match self.rules.zero_devices {
            ZeroDevices::Made => Ok(()),
            ZeroDevices::Untried => Err(Stop::Skip),
            ZeroDevices::Refused => {
                self.free(path)?;
                Err(Errno::PERM.into())
            }
        }
    }

    pub(super) fn link(&mut self, from: &Path, to: &Path) -> Attempt<()> {
        let id = self.lookup(from)?;
        let (parent, name) = self.free(to).map_err(|stop| match stop {
            // The kernel finds this before it asks for a name that it cannot use.
            Stop::Errno(Errno::INVAL) if self.is_dir(id) => Errno::PERM.into(),
            stop => stop,
        })?;
        if self.is_dir(id) {
            return Err(Errno::PERM.into());
        }
        self.inode_mut(id).nlink += 1;
        self.inode_mut(parent).mtime = None;
        self.dir_mut(parent).entries.insert(name, id);
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path, how: Move) -> Attempt<()> {
        let (old_parent, old_name) = self.parent(from)?;
        let (new_parent, new_name) = self.parent(to)?;
        let old = self.child(old_parent, &old_name)?;
        let new = match self.child(new_parent, &new_name) {
            Ok(id) => Some(id),
            Err(Stop::Errno(Errno::NOENT)) => None,
            Err(stop) => return Err(stop),
        };
        match (how, new) {
            (Move::NoReplace, Some(_)) => return Err(Errno::EXIST.into()),
            (Move::Exchange, None) => return Err(Errno::NOENT.into()),
            _ => {}
        }
        if self.is_within(new_parent, old) {
            return Err(Errno::INVAL.into());
        }
        if let Some(new) = new
            && self.is_within(old_parent, new)
        {
            let exchange = how == Move::Exchange;
            return Err(if exchange { Errno::INVAL } else { Errno::NOTEMPTY }.into());
        }
        if new == Some(old) {
            return Ok(());
        }
        let merged = |id: Id| self.is_dir(id) && self.dir(id).merged;
        let too_long = |id, name: &OsStr| merged(id) && is_long(name);
        if too_long(old, &new_name) || new.is_some_and(|new| too_long(new, &old_name)) {
            // What its own name is, is in the redirect if it is moved once more.
            return Err(Stop::Skip);
        }
        let mut errors = Vec::new();
        if let Some(new) = new
            && how != Move::Exchange
        {
            match (self.is_dir(old), self.is_dir(new)) {
                (true, false) => return Err(Errno::NOTDIR.into()),
                (false, true) => return Err(Errno::ISDIR.into()),
                (true, true) if !self.dir(new).entries.is_empty() => errors.push(Errno::NOTEMPTY),
                _ => {}
            }
        }
        if self.cannot_move(old)
            || how == Move::Exchange && new.is_some_and(|n| self.cannot_move(n))
        {
            errors.push(Errno::XDEV);
        }
        if new.is_none()
            && let Err(Stop::Errno(errno)) = self.may_be_named(&new_name)
        {
            errors.push(errno);
        }
        if !errors.is_empty() {
            return Err(Stop::OneOf(errors));
        }
        if how == Move::Exchange {
            let new = new.unwrap();
            self.dir_mut(old_parent).entries.insert(old_name, new);
            self.set_parent(new, old_parent);
        } else {
            if new.is_some() {
                self.take(new_parent, &new_name);
            }
            self.dir_mut(old_parent).entries.remove(&old_name);
        }
        self.dir_mut(new_parent).entries.insert(new_name, old);
        self.set_parent(old, new_parent);
        self.inode_mut(old_parent).mtime = None;
        self.inode_mut(new_parent).mtime = None;
        Ok(())
    }

    pub(super) fn cannot_move(&self, id: Id) -> bool {
        !self.rules.redirects && self.is_dir(id) && self.dir(id).merged
    }

    pub(super) fn set_parent(&mut self, id: Id, parent: Id) {
        if let What::Dir(dir) = &mut self.inode_mut(id).what {
            dir.parent = Some(parent);
        }
    }

    /// Whether `dir` is `top` or below it.
    pub(super) fn is_within(&self, dir: Id, top: Id) -> bool {
        let mut at = Some(dir);
        while let Some(id) = at {
            if id == top {
                return true;
            }
            at = self.dir(id).parent;
        }
        false
    }

    /// Takes a name away.
    pub(super) fn take(&mut self, parent: Id, name: &OsStr) {
        self.inode_mut(parent).mtime = None;
        self.remove(parent, name);
    }

    /// One name of it is gone.
    pub(super) fn discard(&mut self, id: Id) {
        let inode = self.inode_mut(id);
        inode.nlink -= 1;
        if let What::Dir(dir) = &mut inode.what {
            dir.parent = None;
            inode.mtime = None;
            for child in std::mem::take(&mut dir.entries).into_values() {
                self.discard(child);
            }
        }
        self.forget(id);
    }

    /// Frees what nobody can reach any more.
    pub(super) fn forget(&mut self, id: Id) {
        let open = self.open.iter().flatten().any(|open| open.id == id);
        if self.inode(id).nlink == 0 && !open {
            self.inodes.remove(&id);
        }
    }
}
