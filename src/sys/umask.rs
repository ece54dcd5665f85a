//! A thread that creates files with exactly the modes it asks for.
//!
//! The umask belongs to a process's file system context (root, working directory, umask). A thread that
//! takes a context of its own by `unshare(CLONE_FS)` can set its umask to 0 without any effect on the
//! process; no privilege is needed. Source: unshare(2).

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;

use rustix::fs::Mode;
use rustix::thread::UnshareFlags;

/// Proof that the calling thread has an umask of 0. It stays on its thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoUmask(PhantomData<*const ()>);

thread_local! {
    static DONE: Cell<bool> = const { Cell::new(false) };
}

/// Gives the calling thread a context of its own, once. Only for threads that are ours.
pub(crate) fn none_on_this_thread() -> io::Result<NoUmask> {
    if !DONE.get() {
        // SAFETY: only root, working directory and umask of this very thread become its own.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        rustix::process::umask(Mode::empty());
        DONE.set(true);
    }
    Ok(NoUmask(PhantomData))
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
                none_on_this_thread().unwrap();
                mode("own")
            });
            assert_eq!(own.join().unwrap(), 0o777);
        });
        assert_eq!(mode("after"), before);
    }
}
