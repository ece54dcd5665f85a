//! An umask of a thread's own.
//!
//! The umask belongs to a process's file system context (root, working directory, umask). A thread that
//! takes a context of its own by `unshare(CLONE_FS)` can set its umask without any effect on the
//! process; no privilege is needed. Source: unshare(2).

use std::cell::Cell;
use std::io;

use rustix::fs::Mode;
use rustix::thread::UnshareFlags;

thread_local! {
    /// The umask of this thread, once it has one of its own.
    static OWN: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Gives the calling thread an umask of its own. Only for threads that are ours.
pub(crate) fn set_on_this_thread(mask: u32) -> io::Result<()> {
    let mask = mask & 0o777;
    if OWN.get() == Some(mask) {
        return Ok(());
    }
    if OWN.get().is_none() {
        // SAFETY: only root, working directory and umask of this very thread become its own.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    }
    rustix::process::umask(Mode::from_raw_mode(mask));
    OWN.set(Some(mask));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

    #[test]
    fn other_threads_keep_their_umask() {
        let tmp = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            let path = tmp.path().join(name);
            std::fs::File::options().write(true).create_new(true).mode(0o777).open(&path).unwrap();
            std::fs::metadata(path).unwrap().permissions().mode() & 0o777
        };
        let before = mode("before");
        std::thread::scope(|scope| {
            let own = scope.spawn(|| {
                set_on_this_thread(0).unwrap();
                let open = mode("open");
                set_on_this_thread(0o27).unwrap();
                (open, mode("masked"))
            });
            assert_eq!(own.join().unwrap(), (0o777, 0o750));
        });
        assert_eq!(mode("after"), before);
    }
}
