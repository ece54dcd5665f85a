//! A tree as lines of text, with all that must survive a remount and a change of engine.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash as _, Hasher as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

/// A line for each path: its mode, owner, device, size, modification time, contents and xattrs. Link
/// counts are left out, since lower hard links may come apart at a remount.
pub fn lines(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let name = entry.path().strip_prefix(root).unwrap().as_os_str().as_bytes().escape_ascii();
        lines.push(format!("/{name} {}", line(entry.path())));
    }
    lines
}

/// The same of one path, without its name.
#[track_caller]
pub fn line(path: &Path) -> String {
    line_with(path, |_| true)
}

/// The same with some of its xattrs.
#[track_caller]
pub fn line_with(path: &Path, counts: impl Fn(&str) -> bool) -> String {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let kind = meta.file_type();
    let content = if kind.is_file() {
        let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(bytes.len() as u64, meta.len(), "{}: what is read", path.display());
        match bytes.len() {
            0..64 => bytes.escape_ascii().to_string(),
            length => {
                let mut hasher = DefaultHasher::new();
                bytes.hash(&mut hasher);
                format!("{length} bytes {:x}", hasher.finish())
            }
        }
    } else if kind.is_symlink() {
        fs::read_link(path).unwrap().as_os_str().as_bytes().escape_ascii().to_string()
    } else {
        String::new()
    };
    let device = if kind.is_char_device() || kind.is_block_device() { meta.rdev() } else { 0 };
    format!(
        "{:o} {}:{} {device:x} {}.{:09} {content:?} {}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec(),
        xattrs(path).into_iter().filter(|xattr| counts(xattr)).collect::<Vec<_>>().join(" "),
    )
}

/// All xattrs, sorted, as `name=value`.
pub fn xattrs(path: &Path) -> Vec<String> {
    let mut list = vec![0_u8; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut all: Vec<_> = names
        .map(|name| {
            let mut value = vec![0_u8; 64 << 10];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..])
                .unwrap_or_else(|e| panic!("{}: {}: {e}", path.display(), name.escape_ascii()));
            format!("{}={}", name.escape_ascii(), value[..length].escape_ascii())
        })
        .collect();
    all.sort();
    all
}

/// Asserts equality, and shows only what differs.
#[track_caller]
pub fn assert_same(when: &str, expected: &[String], shown: &[String]) {
    let missing: Vec<_> = expected.iter().filter(|line| !shown.contains(line)).collect();
    let added: Vec<_> = shown.iter().filter(|line| !expected.contains(line)).collect();
    assert!(
        missing.is_empty() && added.is_empty(),
        "{when}:\n expected {missing:#?}\n shown {added:#?}"
    );
}
