//! Which user namespace the caller is in, and what it may do there.

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

/// Whether the calling thread has CAP_SYS_ADMIN in its user namespace, without which nothing can be
/// mounted (capabilities(7)).
pub(crate) fn may_administer() -> io::Result<bool> {
    let capabilities = rustix::thread::capabilities(None)?;
    Ok(capabilities.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN))
}
