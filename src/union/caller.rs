//! Who asks, and what a change by him takes away from a file: setuid, setgid and capabilities go when
//! somebody changes a file who may not keep them.
//!
//! Who may open what is the kernel's to check. Here is only what it leaves to a server: the kernel says
//! that privileges are to go, and not whether whoever asks could have written.

use std::io;
use std::sync::Arc;

use super::Union;
use super::acl;
use super::attr::{Attr, SETGID, SETUID};
use super::node::Node;
use crate::sys::groups;
use crate::sys::stat::FileType;
use crate::sys::xattr;

/// The key under which the kernel keeps file capabilities.
pub(super) const CAPABILITY: &[u8] = b"security.capability";
const GROUP_EXECUTE: u32 = 0o010;
const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITE: u32 = 0o020;
const OWNER_WRITE: u32 = 0o200;

/// Who asks, by the ids that the union shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The process, for its further groups; 0 if there is none.
    pub(crate) pid: u32,
}

impl Caller {
    /// Who may do everything.
    #[cfg(test)]
    pub(crate) const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 0 };

    /// Whether he keeps setuid bits on what he changes (CAP_FSETID): taken to be root's alone.
    pub(crate) fn is_privileged(self) -> bool {
        self.uid == 0
    }

    pub(crate) fn is_in_group(self, gid: u32) -> bool {
        // Who has ended meanwhile, or is in another pid namespace, is in no further one.
        self.gid == gid || groups::supplementary(self.pid).is_ok_and(|all| all.contains(&gid))
    }

    /// The bits of a file's mode that go when he changes it. As `setattr_should_drop_suidgid` of the
    /// kernel's `fs/attr.c`.
    fn takes_away(self, attr: &Attr) -> u32 {
        if self.is_privileged() {
            return 0;
        }
        let setgid = attr.mode & SETGID;
        let stays = setgid != 0 && attr.mode & GROUP_EXECUTE == 0 && self.is_in_group(attr.gid);
        (attr.mode & SETUID) | if stays { 0 } else { setgid }
    }
}

impl Union {
    /// Takes capabilities away from a file that `caller` changes, and of setuid and setgid what he may not
    /// keep.
    pub(super) fn drop_privileges(&self, node: &Arc<Node>, caller: Caller) -> io::Result<()> {
        if node.kind != FileType::Regular {
            return Ok(());
        }
        let attr = self.attr(node)?;
        let _capable = node.capable.lock();
        let capable = {
            let _complete = self.when_complete(node);
            self.at(node, |place, _, _| Ok(xattr::get(place.xattrs(), CAPABILITY)?.is_some()))?
        };
        let clear = caller.takes_away(&attr);
        if !capable && clear == 0 {
            return Ok(());
        }
        let _data_stay = self.copy_up_attributes(node)?;
        self.at(node, |place, _, _| {
            if capable {
                xattr::remove(place.xattrs(), CAPABILITY)?;
            }
            if clear != 0 { place.chmod(attr.mode & !clear) } else { Ok(()) }
        })
    }

    /// The same where the kernel does not say why: before a write by other means, but also for a change
    /// of owner that changes nothing, which anybody may ask for. So only if he could write.
    pub(super) fn drop_privileges_if_he_may(
        &self,
        node: &Arc<Node>,
        caller: Caller,
    ) -> io::Result<()> {
        if self.could_write(node, caller)? { self.drop_privileges(node, caller) } else { Ok(()) }
    }

    pub(super) fn could_write(&self, node: &Arc<Node>, caller: Caller) -> io::Result<bool> {
        let attr = self.attr(node)?;
        if caller.is_privileged() || caller.uid == attr.uid {
            return Ok(true);
        }
        if !self.options.no_acl
            && let Some(list) = self.xattr(node, acl::ACCESS)?
        {
            return Ok(acl::grants_write(&list, attr.gid, caller.uid, &|gid| {
                caller.is_in_group(gid)
            }));
        }
        let bit = match caller.is_in_group(attr.gid) {
            _ if caller.uid == attr.uid => OWNER_WRITE,
            true => GROUP_WRITE,
            false => OTHERS_WRITE,
        };
        Ok(attr.mode & bit != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::stat::Time;

    #[test]
    fn setgid_without_group_execute_stays_for_members() {
        let attr = |mode| Attr {
            ino: 2,
            generation: 1,
            kind: FileType::Regular,
            mode,
            nlink: 1,
            uid: 5,
            gid: 7,
            rdev: (0, 0),
            size: 0,
            blocks: 0,
            block_size: 4096,
            atime: Time::default(),
            mtime: Time::default(),
            ctime: Time::default(),
        };
        let member = Caller { uid: 9, gid: 7, pid: 0 };
        let other = Caller { uid: 9, gid: 9, pid: 0 };
        for (caller, mode, goes) in [
            (Caller::ROOT, 0o6755, 0),
            (member, 0o6755, 0o6000),
            (member, 0o6745, 0o4000),
            (other, 0o6745, 0o6000),
            (other, 0o755, 0),
        ] {
            assert_eq!(caller.takes_away(&attr(mode)), goes, "{caller:?} {mode:o}");
        }
    }
}
