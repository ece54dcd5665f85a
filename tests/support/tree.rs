//! A tree as lines of text, to compare what two programs made of the same layers.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Which modification times count; a root's never does.
#[derive(Clone, Copy, PartialEq, Eq)]
#[allow(dead_code)]
pub enum Times {
    /// All, to the nanosecond.
    All,
    /// Those of files, to the second: what most unpackers keep.
    OfFilesInSeconds,
}

/// A line for each path, with everything about it that must survive.
pub fn lines(root: &Path, times: Times) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let meta = fs::symlink_metadata(entry.path()).unwrap();
        let content = if meta.is_file() {
            format!("{:?}", fs::read(entry.path()).unwrap())
        } else if meta.is_symlink() {
            format!("{:?}", fs::read_link(entry.path()).unwrap())
        } else {
            String::new()
        };
        let mtime = match times {
            _ if entry.depth() == 0 => String::new(),
            Times::All => format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()),
            Times::OfFilesInSeconds if meta.is_file() => meta.mtime().to_string(),
            Times::OfFilesInSeconds => String::new(),
        };
        let links = if meta.is_dir() { 0 } else { meta.nlink() };
        lines.push(format!(
            "{:?} {:o} {}:{} {:x} {links} {mtime} {content}",
            entry.path().strip_prefix(root).unwrap(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.rdev(),
        ));
    }
    lines
}
