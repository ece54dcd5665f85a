//! Attributes: what is shown, and how they are changed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Union;
use super::caller::Caller;
use super::copyup::{Data, restore_times};
use super::node::{Node, Place, Real, State};
use super::spec::SyncPolicy;
use super::xattr::ZERO_DEVICE_FILE;
use crate::idmap::IdMap;
use crate::layer::LayerFormat;
use crate::sys::dir::OnExisting;
use crate::sys::errno::Code;
use crate::sys::file::{self, FileSystemStat, SetTime};
use crate::sys::owners::Owners;
use crate::sys::stat::{FileType, Stat, Time};
use crate::sys::xattr::{self, Of};

pub(super) const SETUID: u32 = 0o4000;
pub(super) const SETGID: u32 = 0o2000;

/// Attributes as the union shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attr {
    pub(crate) ino: u64,
    pub(crate) generation: u64,
    pub(crate) kind: FileType,
    /// Permissions with setuid, setgid and sticky bit.
    pub(crate) mode: u32,
    pub(crate) nlink: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Major and minor.
    pub(crate) rdev: (u32, u32),
    /// Bytes.
    pub(crate) size: u64,
    /// Units of 512 bytes.
    pub(crate) blocks: u64,
    /// Bytes.
    pub(crate) block_size: u32,
    pub(crate) atime: Time,
    pub(crate) mtime: Time,
    pub(crate) ctime: Time,
}

/// Attributes to be changed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SetAttr {
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    /// Bytes.
    pub(crate) size: Option<u64>,
    pub(crate) atime: SetTime,
    pub(crate) mtime: SetTime,
    /// The change time is set along with it: it is the kernel that writes back what it has kept.
    pub(crate) ctime: bool,
    /// Who asks.
    pub(crate) caller: Caller,
}

impl SetAttr {
    /// Changes nothing.
    #[cfg(test)]
    pub(crate) fn nothing() -> SetAttr {
        SetAttr {
            mode: None,
            uid: None,
            gid: None,
            size: None,
            atime: SetTime::Keep,
            mtime: SetTime::Keep,
            ctime: false,
            caller: Caller::ROOT,
        }
    }

    fn is_nothing(&self) -> bool {
        self.mode.is_none()
            && self.uid.is_none()
            && self.gid.is_none()
            && self.size.is_none()
            && self.atime == SetTime::Keep
            && self.mtime == SetTime::Keep
    }
}

impl Union {
    /// A node's attributes.
    pub(crate) fn attr(&self, node: &Arc<Node>) -> io::Result<Attr> {
        self.at(node, |place, format, state| {
            let stat = place.stat()?;
            self.shown(node, state, place, format, &stat)
        })
    }

    /// As [`Union::attr`], of a node that was just found with these attributes: they are not asked for
    /// again if they are still those of its file.
    pub(super) fn attr_as_found(&self, node: &Arc<Node>, found: &Stat) -> io::Result<Attr> {
        let may_be_marked = found.mode == ZERO_DEVICE_FILE && found.is_file();
        // Of a file that was just being completed it was found what is not to be shown.
        if !may_be_marked && !node.partial.load(Ordering::Relaxed) {
            let real = Some(Real::from(found));
            let state = node.state.lock();
            let holds = match &state.place {
                Place::Lower(_) => node.lower == real,
                Place::Upper => node.upper() == real,
                Place::Pinned(_) | Place::Linked(_) => false,
            };
            if holds {
                return Ok(self.attr_of(node, &state, found));
            }
        }
        self.attr(node)
    }

    /// What is shown of a file with these attributes.
    fn shown(
        &self,
        node: &Node,
        state: &State,
        place: file::Place<'_>,
        format: Option<LayerFormat>,
        stat: &Stat,
    ) -> io::Result<Attr> {
        let mut attr = self.attr_of(node, state, stat);
        if let Some(mode) = Self::zero_device_mode(place, format, stat)? {
            attr.kind = FileType::CharDevice;
            attr.mode = mode;
        }
        Ok(attr)
    }

    /// As [`Union::shown`], of what is no marked file.
    fn attr_of(&self, node: &Node, state: &State, stat: &Stat) -> Attr {
        let mut attr = Attr {
            ino: node.id,
            generation: node.generation,
            kind: stat.file_type,
            mode: stat.mode,
            nlink: self.link_count(node, state, stat),
            uid: self.options.uids.shown(stat.uid),
            gid: self.options.gids.shown(stat.gid),
            rdev: stat.rdev,
            size: stat.size,
            blocks: stat.blocks,
            block_size: stat.block_size,
            atime: stat.atime,
            mtime: stat.mtime,
            ctime: stat.ctime,
        };
        state.shown_instead(&mut attr);
        attr
    }

    fn link_count(&self, node: &Node, state: &State, stat: &Stat) -> u64 {
        if node.is_dir() {
            let parts = state.lowers().len().saturating_add(usize::from(state.is_upper()));
            return match parts {
                _ if state.is_dead() => 0,
                1 => stat.nlink,
                // How many directories are in it is not known without a look at all layers. By this
                // number programs see that they cannot tell from it.
                _ => 1,
            };
        }
        let count = match &state.place {
            Place::Lower(_) => stat.nlink.saturating_sub(state.unlinked.into()),
            Place::Linked(_) => match node.lower.and_then(|lower| self.links.of(lower)) {
                Some(linked) => linked.names(),
                None => stat.nlink.saturating_sub(1),
            },
            Place::Upper | Place::Pinned(_) => stat.nlink.saturating_sub(state.hidden_names()),
        };
        if self.options.static_nlink { count.min(1) } else { count }
    }

    /// Changes attributes, and tells what they are then.
    ///
    /// # Errors
    /// EROFS without an upper; EINVAL for an owner that no file can have here; what a copy-up can
    /// fail with.
    pub(crate) fn set_attr(&self, node: &Arc<Node>, set: &SetAttr) -> io::Result<Attr> {
        if set.is_nothing() {
            // The kernel's way to say that a write took away setuid and the like.
            if !set.ctime {
                self.drop_privileges_if_he_may(node, set.caller)?;
            }
            return self.attr(node);
        }
        self.writable()?;
        if let Some(attr) = self.unchanged(node, set)? {
            let in_upper = node.state.lock().is_upper();
            *node.time_is_set.lock() |= in_upper;
            return Ok(attr);
        }
        let owner = |map: &IdMap, id: Option<u32>| match id {
            None => Ok(None),
            // It is shown as his whatever it has, and stays what it is.
            Some(id) if map.squashes_to(id) => Ok(None),
            Some(id) => map.host(id).map(Some).ok_or(Code::Invalid),
        };
        let (uid, gid) = (owner(&self.options.uids, set.uid)?, owner(&self.options.gids, set.gid)?);
        if let Some(size) = set.size {
            self.truncate(node, size)?;
            self.drop_privileges(node, set.caller)?;
        }
        let mut time_is_set = node.time_is_set.lock();
        *time_is_set |= set.mtime != SetTime::Keep;
        let data_stay = self.copy_up_attributes(node)?;
        let given_away = self.give_symlink_away(node, uid, gid)?;
        self.at(node, |place, format, _| {
            if (uid.is_some() || gid.is_some()) && !given_away {
                place.chown(uid, gid)?;
                let stat = place.stat()?;
                if let Some(mode) = Self::zero_device_mode(place, format, &stat)? {
                    // As the kernel does with files.
                    let kept = mode & !(SETUID | if mode & 0o010 == 0 { 0 } else { SETGID });
                    Self::set_zero_device_mode(place, format, kept)?;
                }
            }
            Ok(())
        })?;
        drop(data_stay);
        if uid.is_some() || gid.is_some() {
            self.drop_privileges(node, set.caller)?;
        }
        let data_stay = self.copy_up_attributes(node)?;
        self.at(node, |place, format, _| {
            if let Some(mode) = set.mode {
                let stat = place.stat()?;
                match Self::zero_device_mode(place, format, &stat)? {
                    Some(_) => Self::set_zero_device_mode(place, format, mode)?,
                    None => place.chmod(mode)?,
                }
            }
            if set.atime != SetTime::Keep || set.mtime != SetTime::Keep {
                place.set_times(set.atime, set.mtime)?;
            }
            Ok(())
        })?;
        drop(data_stay);
        drop(time_is_set);
        self.attr(node)
    }

    /// Puts a file that says who owns it in the place of a symlink that cannot; whether that had to be done.
    fn give_symlink_away(
        &self,
        node: &Arc<Node>,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> io::Result<bool> {
        let to = (uid.unwrap_or(0), gid.unwrap_or(0));
        if node.kind != FileType::Symlink || self.owners() == Owners::OfFiles || to == (0, 0) {
            return Ok(false);
        }
        let upper = self.writable()?;
        let work = upper.work.temp();
        let temp = upper.work.new_name()?;
        self.at(node, |place, _, _| {
            let file::Place::Child(dir, name) = place else { return Err(Code::Perm.into()) };
            if !dir.is_symlink_itself(name)? {
                return Ok(false);
            }
            let stat = dir.stat_at(name)?;
            if stat.nlink > 1 {
                // Its other names would stay behind.
                return Err(Code::Perm.into());
            }
            let before = dir.stat()?;
            let copy_xattrs = || {
                let (from, to) = (Of::Child(dir, name), Of::Child(work, &temp));
                xattr::list(from)?.iter().try_for_each(|key| match xattr::get(from, key)? {
                    Some(value) => xattr::set(to, key, &value),
                    None => Ok(()),
                })
            };
            let made = work
                .symlink(&dir.read_link(name)?, &temp)
                .and_then(|()| copy_xattrs())
                .and_then(|()| work.set_times_at(&temp, stat.atime, stat.mtime))
                .and_then(|()| work.chown_at(&temp, to.0, to.1))
                .and_then(|()| match self.options.sync {
                    SyncPolicy::Strict => work.sync_link_at(&temp),
                    SyncPolicy::Volatile => Ok(()),
                })
                .and_then(|()| work.rename(&temp, dir, name, OnExisting::Replace));
            made.inspect_err(|_| upper.work.discard(&temp))?;
            let real = Real::from(&dir.stat_at(name)?);
            self.table.forget_other_id(Real::from(&stat));
            self.table.note_other_id(real, node.id);
            node.set_upper(real);
            restore_times(dir, &before);
            Ok(true)
        })
    }

    /// The attributes, if only times are to be set to what they are: the kernel writes back those it has
    /// cached whenever a file is unlinked or renamed, and that is no reason to copy it.
    fn unchanged(&self, node: &Arc<Node>, set: &SetAttr) -> io::Result<Option<Attr>> {
        let SetTime::To(mtime) = set.mtime else { return Ok(None) };
        let only_times = set.mode.is_none()
            && set.uid.is_none()
            && set.gid.is_none()
            && set.size.is_none()
            && set.atime == SetTime::Keep
            && set.ctime;
        let attr = if only_times { Some(self.attr(node)?) } else { None };
        Ok(attr.filter(|attr| attr.mtime == mtime))
    }

    /// Sets a file's size.
    pub(super) fn truncate(&self, node: &Arc<Node>, size: u64) -> io::Result<()> {
        if node.kind != FileType::Regular {
            return Err(if node.is_dir() { Code::IsDirectory } else { Code::Invalid }.into());
        }
        self.copy_up(node, Data::First(size))?;
        self.data(node)?.file.set_len(size)
    }

    /// Where a symlink points.
    ///
    /// # Errors
    /// EINVAL for what is none.
    pub(crate) fn read_link(&self, node: &Arc<Node>) -> io::Result<Vec<u8>> {
        self.at(node, |place, _, _| place.read_link())
    }

    /// What statfs(2) tells: of the file system that takes what is written.
    pub(crate) fn file_system(&self) -> io::Result<FileSystemStat> {
        let (dir, format) = self.own_dir(&self.root)?;
        let mut stat = file::file_system_stat(dir.as_ref())?;
        if format == Some(LayerFormat::Aufs) {
            stat.name_max = stat.name_max.saturating_sub(4);
        }
        Ok(stat)
    }
}
