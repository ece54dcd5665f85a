//! The file that is opened once after mounting, so that the kernel learns that it need not ask about
//! opens.
//!
//! Only then does it leave out RELEASE, too, for files that are created. The file is there for no longer
//! than that takes, under a name that nobody else asks for.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{FileAttr, INodeNo};

use super::convert::no_attr;
use crate::sys::fuse::user_and_group;

/// No node has this number.
const NUMBER: INodeNo = INodeNo(u64::MAX - 1);

/// The file's being there.
#[derive(Debug)]
pub(super) struct Latch {
    name: String,
    there: AtomicBool,
}

impl Latch {
    pub(super) fn new() -> Latch {
        use std::hash::{BuildHasher, Hasher};
        // Seeded by the system: nobody else guesses the name.
        let random = std::hash::RandomState::new().build_hasher().finish();
        Latch { name: format!(".stratafs-{random:016x}"), there: AtomicBool::new(true) }
    }

    pub(super) fn name(&self) -> &OsStr {
        OsStr::new(&self.name)
    }

    /// It is not there any more.
    pub(super) fn remove(&self) {
        self.there.store(false, Ordering::Relaxed);
    }

    pub(super) fn is_asked_for(&self, parent: INodeNo, name: &OsStr) -> bool {
        parent == INodeNo::ROOT && self.there.load(Ordering::Relaxed) && name == self.name()
    }

    pub(super) fn is(ino: INodeNo) -> bool {
        ino == NUMBER
    }

    /// It belongs to whoever mounts: of others' files the kernel would ask for access lists, too.
    pub(super) fn attr() -> FileAttr {
        let (uid, gid) = user_and_group();
        FileAttr { ino: NUMBER, perm: 0o444, nlink: 1, uid, gid, blksize: 4096, ..no_attr() }
    }
}
