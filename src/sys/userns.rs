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

/// The effective user.
pub(crate) fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Whether the calling thread may give files to whom it likes: with CAP_CHOWN, where the user namespace has all
/// ids that images use.
pub(crate) fn may_give_files_away() -> io::Result<bool> {
    let capabilities = rustix::thread::capabilities(None)?;
    Ok(capabilities.effective.contains(rustix::thread::CapabilitySet::CHOWN) && has_all_ids()?)
}

/// Whether the calling thread's user namespace has all ids that images use.
pub(crate) fn has_all_ids() -> io::Result<bool> {
    for map in ["/proc/thread-self/uid_map", "/proc/thread-self/gid_map"] {
        match std::fs::read_to_string(map) {
            Ok(text) if maps_all(&text) => {}
            Ok(_) => return Ok(false),
            // A kernel built without user namespaces.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// Whether the ranges of a map (user_namespaces(7)) have all ids up to 65535, but perhaps the one that stands for
/// nobody.
fn maps_all(text: &str) -> bool {
    let mut ranges: Vec<(u64, u64)> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let first = words.next()?.parse().ok()?;
            Some((first, words.nth(1)?.parse().ok()?))
        })
        .collect();
    ranges.sort_unstable();
    let mut end = 0;
    for (first, len) in ranges {
        if first > end {
            break;
        }
        end = end.max(first.saturating_add(len));
    }
    end >= 65_534
}

/// Whether the calling thread has CAP_SYS_ADMIN in its user namespace, without which nothing can be
/// mounted (capabilities(7)).
pub(crate) fn may_administer() -> io::Result<bool> {
    let capabilities = rustix::thread::capabilities(None)?;
    Ok(capabilities.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_all_ids_or_not() {
        for (text, all) in [
            ("         0          0 4294967295\n", true),
            ("0 1000 1\n1 100000 65536\n", true),
            ("1 100000 65536\n0 1000 1\n", true),
            ("0 1000 1\n", false),
            ("0 1000 1\n2 100000 65536\n", false),
            ("", false),
            ("x", false),
        ] {
            assert_eq!(maps_all(text), all, "{text:?}");
        }
    }
}
