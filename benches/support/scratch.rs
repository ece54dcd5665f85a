//! Where benches write: a file system in memory, so that they measure programs and not disks.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use tempfile::TempDir;

const SHARED_MEMORY: &str = "/dev/shm";

/// A new directory, below `STRATAFS_BENCH_SCRATCH` if that is set, else in /dev/shm if that is a tmpfs,
/// else where temporary files go. Says which. It is removed when dropped.
pub fn scratch() -> TempDir {
    let base = match std::env::var_os("STRATAFS_BENCH_SCRATCH") {
        Some(base) => base.into(),
        None if is_tmpfs(SHARED_MEMORY) => SHARED_MEMORY.into(),
        None => std::env::temp_dir(),
    };
    let dir = tempfile::Builder::new().prefix("stratafs-bench-").tempdir_in(&base);
    println!("scratch directory in {base:?}");
    dir.expect("a scratch directory")
}

/// By the kernel's list of mounts: device, directory, type.
fn is_tmpfs(dir: &str) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let last = mounts.lines().rev().find(|line| line.split(' ').nth(1) == Some(dir));
    last.and_then(|line| line.split(' ').nth(2)) == Some("tmpfs")
}

/// Whether this is root, by whose files it makes.
pub fn is_root() -> bool {
    tempfile::tempfile().and_then(|file| file.metadata()).is_ok_and(|new| new.uid() == 0)
}

/// Removes a directory that may not be there.
pub fn clear(dir: &Path) {
    // What cannot be removed is in the way of the next round, which says so.
    drop(fs::remove_dir_all(dir));
}

/// As [`clear`], and makes it anew.
pub fn empty(dir: &Path) {
    clear(dir);
    fs::create_dir_all(dir).expect("a new directory");
}
