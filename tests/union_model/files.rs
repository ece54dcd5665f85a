//! The model's open files, data and owners.

use std::path::Path;

use rustix::io::Errno;

use super::model::{Attempt, Id, Model, Open, Stop, What};
use super::ops::{At, Bits, How, Space};
use crate::support::union_mount::UMASK;

const S_ISGID: u32 = 0o2000;
const S_ISUID: u32 = 0o4000;

impl Model {
    pub(super) fn close(&mut self, slot: usize) {
        if let Some(open) = self.open[slot].take() {
            self.forget(open.id);
        }
    }

    pub(super) fn open_path(&mut self, path: &Path, how: How, mode: Bits) -> Attempt<Id> {
        let (parent, name) = self.parent(path)?;
        let id = match self.child(parent, &name) {
            Ok(id) => id,
            Err(Stop::Errno(Errno::NOENT)) if how.creates() => {
                self.may_be_named(&name)?;
                let what = What::File(Vec::new());
                return Ok(self.make_at(parent, &name, what, mode.0 & !UMASK));
            }
            Err(stop) => return Err(stop),
        };
        if how == How::CreateNew {
            return Err(Errno::EXIST.into());
        }
        match self.inode(id).kind() {
            'l' => return Err(Errno::LOOP.into()),
            'd' if how.writes() => return Err(Errno::ISDIR.into()),
            'd' | 'f' => {}
            // A pipe would wait for its other end.
            _ => return Err(Stop::Skip),
        }
        if how == How::Truncate {
            self.set_len(id, 0);
        }
        Ok(id)
    }

    pub(super) fn read(&self, open: Open, offset: u64, len: usize) -> Attempt<Vec<u8>> {
        if !open.how.reads() {
            return Err(Errno::BADF.into());
        }
        let What::File(bytes) = &self.inode(open.id).what else {
            return Err(Errno::ISDIR.into());
        };
        let start = usize::try_from(offset).unwrap().min(bytes.len());
        let end = start.saturating_add(len).min(bytes.len());
        Ok(bytes[start..end].to_vec())
    }

    pub(super) fn write(&mut self, open: Open, offset: u64, bytes: &[u8]) -> Attempt<()> {
        if !open.how.writes() {
            return Err(Errno::BADF.into());
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let inode = self.inode_mut(open.id);
        let data = inode.data();
        let start = match open.how {
            How::Append => data.len(),
            _ => usize::try_from(offset).unwrap(),
        };
        let end = start + bytes.len();
        if data.len() < end {
            data.resize(end, 0);
        }
        data[start..end].copy_from_slice(bytes);
        inode.mtime = None;
        Ok(())
    }

    pub(super) fn truncate(&mut self, at: &At, len: u64) -> Attempt<()> {
        let id = self.at(at)?;
        match at {
            At::Path(_) => match self.inode(id).kind() {
                'f' => {}
                'd' => return Err(Errno::ISDIR.into()),
                'l' => return Err(Stop::Skip),
                _ => return Err(Errno::INVAL.into()),
            },
            At::Slot(slot) => {
                if !self.slot(*slot)?.how.writes() {
                    return Err(Errno::INVAL.into());
                }
            }
        }
        self.set_len(id, usize::try_from(len).unwrap());
        Ok(())
    }

    pub(super) fn set_len(&mut self, id: Id, len: usize) {
        let inode = self.inode_mut(id);
        inode.data().resize(len, 0);
        inode.mtime = None;
    }

    pub(super) fn allocate(
        &mut self,
        open: Open,
        space: Space,
        offset: u64,
        len: u64,
    ) -> Attempt<()> {
        if !open.how.writes() {
            return Err(Errno::BADF.into());
        }
        let (start, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
        let inode = self.inode_mut(open.id);
        inode.mtime = None;
        let data = inode.data();
        match space {
            Space::Extend if data.len() < start + len => data.resize(start + len, 0),
            Space::Punch => {
                let (start, end) = (start.min(data.len()), (start + len).min(data.len()));
                data[start..end].fill(0);
            }
            Space::Extend | Space::KeepSize => {}
        }
        Ok(())
    }

    pub(super) fn chown(&mut self, id: Id, uid: Option<u32>, gid: Option<u32>) {
        let inode = self.inode_mut(id);
        inode.owner = (uid.unwrap_or(inode.owner.0), gid.unwrap_or(inode.owner.1));
        if inode.kind() != 'd' {
            inode.mode &= !S_ISUID;
            // Without the right to execute, this bit meant mandatory locking once.
            if inode.mode & 0o010 != 0 {
                inode.mode &= !S_ISGID;
            }
        }
    }
}
