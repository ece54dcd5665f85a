//! Open descriptors of the layers' files and directories, as many as the process can afford.
//!
//! Those not used for the longest time are closed first; when the process has none left, all that are
//! not in use are closed. A directory that was opened stays right when it is renamed; what a file's
//! descriptors are worth after a copy-up is the caller's business ([`Descriptors::drop_file`]).

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::node::Part;
use crate::sys::dir::Dir;
use crate::sys::errno;

/// Which directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum DirKey {
    /// The upper's part of the node of this generation.
    Upper(u64),
    Lower(Part),
}

/// A file's data, open.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    /// It is the upper's, and may be written.
    pub(super) writable: bool,
}

/// The descriptors that are open.
#[derive(Debug)]
pub(super) struct Descriptors {
    dirs: Mutex<LruCache<DirKey, Arc<Dir>>>,
    files: Mutex<LruCache<u64, Arc<OpenFile>>>,
}

/// How many descriptors of each kind are kept at most.
const MOST: u64 = 2048;

impl Descriptors {
    /// For a process that may have `limit` descriptors.
    pub(super) fn new(limit: u64) -> Descriptors {
        // An eighth each: there are others in the process, and files that are held open since they
        // have no name.
        let each = usize::try_from((limit / 8).clamp(8, MOST)).unwrap_or(8);
        let each = NonZeroUsize::new(each).unwrap_or(NonZeroUsize::MIN);
        Descriptors {
            dirs: Mutex::new(LruCache::new(each)),
            files: Mutex::new(LruCache::new(each)),
        }
    }

    pub(super) fn dir(&self, key: &DirKey) -> Option<Arc<Dir>> {
        self.dirs.lock().get(key).cloned()
    }

    pub(super) fn keep_dir(&self, key: DirKey, dir: &Arc<Dir>) {
        // Closed when no lock is held.
        let evicted = self.dirs.lock().push(key, Arc::clone(dir));
        drop(evicted);
    }

    pub(super) fn file(&self, generation: u64) -> Option<Arc<OpenFile>> {
        self.files.lock().get(&generation).cloned()
    }

    pub(super) fn keep_file(&self, generation: u64, file: &Arc<OpenFile>) {
        let evicted = self.files.lock().push(generation, Arc::clone(file));
        drop(evicted);
    }

    pub(super) fn drop_file(&self, generation: u64) {
        let file = self.files.lock().pop(&generation);
        drop(file);
    }

    /// The node of this generation is no more.
    pub(super) fn drop_node(&self, generation: u64) {
        let dir = self.dirs.lock().pop(&DirKey::Upper(generation));
        drop(dir);
        self.drop_file(generation);
    }

    fn clear(&self) {
        let dirs: Vec<_> = std::iter::from_fn(|| self.dirs.lock().pop_lru()).collect();
        let files: Vec<_> = std::iter::from_fn(|| self.files.lock().pop_lru()).collect();
        drop((dirs, files));
    }

    /// Does what opens descriptors, and does it again with all others closed if there are none left.
    pub(super) fn opening<T>(&self, mut open: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        match open() {
            Err(e) if errno::is_out_of_descriptors(&e) => {
                self.clear();
                open()
            }
            opened => opened,
        }
    }
}
