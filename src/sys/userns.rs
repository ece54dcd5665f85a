//! Which user namespace the caller is in.

use std::io;
use std::os::unix::fs::MetadataExt;

/// `PROC_USER_INIT_INO` of the kernel's `include/uapi/linux/nsfs.h`: fixed for ever.
const INITIAL: u64 = 0xEFFF_FFFD;

/// Whether the calling thread is in the initial user namespace, the only one in which `trusted.*`
/// xattrs can be read (user_namespaces(7), xattr(7)).
pub(crate) fn is_initial() -> io::Result<bool> {
    match std::fs::metadata("/proc/thread-self/ns/user") {
        Ok(meta) => Ok(meta.ino() == INITIAL),
        // A kernel built without user namespaces has only the initial one.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e),
    }
}
