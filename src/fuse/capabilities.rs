//! What is asked of the kernel when a mount begins, and what it grants.
//!
//! Each feature is asked for by itself, since fuser refuses a set of which one is missing. Never asked
//! for: ATOMIC_O_TRUNC (without opens nobody would tell us to cut the file off), HANDLE_KILLPRIV in its
//! first version (a GETXATTR for each write), PASSTHROUGH.
//!
//! # Why no passthrough
//!
//! With FUSE_PASSTHROUGH (Linux 6.9) the kernel reads and writes a backing file itself. It must be told of
//! that file at each open, and refuses to combine it with writeback; so a mount has either that, or opens
//! that cost nothing and small writes that are collected. fuse-overlayfs 2.0, which has it, shows what is
//! won and lost (times against the kernel's overlayfs on a tmpfs, this file system's in brackets): a first
//! sequential read 1.0 (3.8), a sequential write 1.3 (2.3); but an open of a file that is cached 12 (0.9),
//! reading a whole tree again 10 (0.9), writes of 512 bytes 29 (0.9). Only a process with CAP_SYS_ADMIN
//! in the initial user namespace may ask for it, and that one can mount the kernel's overlayfs, which is
//! better at all of these.

use fuser::{InitFlags, KernelConfig};
use parking_lot::Mutex;

use super::filesystem::MAX_WRITE;
use crate::union::Union;

/// The features, by their names in `linux/fuse.h`.
const FEATURES: [(&str, InitFlags); 10] = [
    ("FUSE_NO_OPEN_SUPPORT", InitFlags::FUSE_NO_OPEN_SUPPORT),
    ("FUSE_HANDLE_KILLPRIV_V2", InitFlags::FUSE_HANDLE_KILLPRIV_V2),
    ("FUSE_DO_READDIRPLUS", InitFlags::FUSE_DO_READDIRPLUS),
    ("FUSE_PARALLEL_DIROPS", InitFlags::FUSE_PARALLEL_DIROPS),
    ("FUSE_CACHE_SYMLINKS", InitFlags::FUSE_CACHE_SYMLINKS),
    ("FUSE_ASYNC_READ", InitFlags::FUSE_ASYNC_READ),
    ("FUSE_ASYNC_DIO", InitFlags::FUSE_ASYNC_DIO),
    ("FUSE_MAX_PAGES", InitFlags::FUSE_MAX_PAGES),
    ("FUSE_DONT_MASK", InitFlags::FUSE_DONT_MASK),
    ("FUSE_HAS_IOCTL_DIR", InitFlags::FUSE_HAS_IOCTL_DIR),
];
/// Where there are such lists: else the kernel would ask for them, and refuse what it cannot find out.
const POSIX_ACL: (&str, InitFlags) = ("FUSE_POSIX_ACL", InitFlags::FUSE_POSIX_ACL);
/// Where nobody else changes the layers.
const NO_OPENDIR: (&str, InitFlags) =
    ("FUSE_NO_OPENDIR_SUPPORT", InitFlags::FUSE_NO_OPENDIR_SUPPORT);
/// Where others may: what the kernel keeps of a file goes when its time or size is another.
const AUTO_INVAL: (&str, InitFlags) = ("FUSE_AUTO_INVAL_DATA", InitFlags::FUSE_AUTO_INVAL_DATA);
const WRITEBACK: (&str, InitFlags) = ("FUSE_WRITEBACK_CACHE", InitFlags::FUSE_WRITEBACK_CACHE);

/// What was asked for, and whether it was granted.
#[derive(Debug, Default)]
pub(super) struct Granted {
    features: Mutex<Vec<(&'static str, bool)>>,
}

impl Granted {
    /// Asks for everything that is of use; `live` if others may change the layers.
    pub(super) fn negotiate(
        &self,
        config: &mut KernelConfig,
        union: &Union,
        writeback: bool,
        live: bool,
    ) {
        let by_life = if live { &AUTO_INVAL } else { &NO_OPENDIR };
        let acl = union.has_acls().then_some(&POSIX_ACL);
        let wanted = FEATURES.iter().chain([by_life]).chain(acl);
        let wanted = wanted.chain(writeback.then_some(&WRITEBACK));
        let asked =
            wanted.map(|(name, flag)| (*name, config.add_capabilities(*flag).is_ok())).collect();
        *self.features.lock() = asked;
        // The kernel may allow less, and says how much.
        if let Err(most) = config.set_max_write(MAX_WRITE) {
            let _ = config.set_max_write(most);
        }
        if let Err(most) = config.set_max_readahead(MAX_WRITE) {
            let _ = config.set_max_readahead(most);
        }
    }

    pub(super) fn features(&self) -> Vec<(&'static str, bool)> {
        self.features.lock().clone()
    }
}
