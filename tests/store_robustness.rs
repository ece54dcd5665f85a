//! The store after accidents, and beside others that work on the same files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::ffi::CString;
use std::fs;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use stratafs::{
    CommitOptions, DurablePointHook, ErrorKind, ExportOptions, Labels, LayerFormat, Owners, Store,
    StoreOptions, ignore_progress,
};

fn store(root: &Path) -> Store {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    // What is looked at and changed here is the files' own.
    options.owners = Some(Owners::OfFiles);
    Store::open(root, options).unwrap()
}

fn temp() -> tempfile::TempDir {
    // Not in /tmp, which may be a tmpfs without user xattrs.
    tempfile::tempdir_in("/var/tmp").unwrap()
}

fn set_xattr(path: &Path, key: &str) {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    let key = CString::new(key).unwrap();
    // SAFETY: both are C strings, and the value is of the length given.
    let set = unsafe { libc::setxattr(path.as_ptr(), key.as_ptr(), c"x".as_ptr().cast(), 1, 0) };
    assert_eq!(set, 0);
}

#[test]
fn a_row_of_a_mount_that_a_power_cut_tore_does_not_keep_the_store_shut() {
    let tmp = temp();
    store(tmp.path()).prepare("a", None, Labels::new()).unwrap();
    let rows = tmp.path().join("run/mounts");
    fs::create_dir_all(&rows).unwrap();
    // The name is there, the data is not: nobody syncs a row.
    let torn = "1-00000000-0000-4000-8000-000000000000-0123456789abcdef";
    for name in [torn.to_owned(), format!(".{torn}")] {
        fs::write(rows.join(name), "").unwrap();
    }
    let store = store(tmp.path());
    store.remove("a").unwrap();
    store.gc(&mut ignore_progress).unwrap();
    assert_eq!(fs::read_dir(rows).unwrap().count(), 0);
}

#[test]
fn contents_in_lower_layers_are_never_shown_or_packed_as_if_they_were_here() {
    for (mark, file) in [("user.overlay.metacopy", "fs/f"), ("user.overlay.redirect", "fs/d")] {
        let tmp = temp();
        let store = store(tmp.path());
        store.prepare("a", None, Labels::new()).unwrap();
        let layer = tmp.path().join("snapshots/1");
        fs::create_dir(layer.join("fs/d")).unwrap();
        fs::write(layer.join("fs/f"), "").unwrap();
        set_xattr(&layer.join(file), mark);
        let mut out = Vec::new();
        let exported = store.export("a", &mut out, &ExportOptions::default(), &mut ignore_progress);
        let changes = store.changes("a", &mut ignore_progress);
        for e in [exported.unwrap_err(), changes.unwrap_err()] {
            assert_eq!(e.kind(), ErrorKind::FailedPrecondition, "{e}");
            assert!(e.to_string().contains("lower layer"), "{e}");
        }
        assert!(out.is_empty());
    }
}

#[test]
fn a_child_of_a_read_only_root_with_xattrs_can_be_prepared() {
    let tmp = temp();
    let store = store(tmp.path());
    store.prepare("a", None, Labels::new()).unwrap();
    let root = tmp.path().join("snapshots/1/fs");
    set_xattr(&root, "user.note");
    // An ordinary user may set no xattr of his own directory that he may not write to.
    fs::set_permissions(&root, fs::Permissions::from_mode(0o555)).unwrap();
    store.commit("base", "a", CommitOptions::new()).unwrap();
    store.prepare("b", Some("base"), Labels::new()).unwrap();
    let child = fs::metadata(tmp.path().join("snapshots/2/fs")).unwrap();
    assert_eq!(child.permissions().mode() & 0o7777, 0o555);
    store.remove("b").unwrap();
    store.remove("base").unwrap();
    assert_eq!(fs::read_dir(tmp.path().join("trash")).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_removed_keeps_neither_the_store_shut_nor_the_rest_from_removal() {
    let tmp = temp();
    drop(store(tmp.path()));
    // A mount point below, say, or a file of somebody else; here a file that may not be changed.
    let stuck = tmp.path().join("staging/0000000000000001/fs");
    fs::create_dir_all(&stuck).unwrap();
    fs::write(stuck.join("f"), "").unwrap();
    if !set_immutable(&stuck.join("f"), true) {
        // The file system or the caller's rights do not allow it.
        return;
    }
    let store = std::panic::catch_unwind(|| store(tmp.path()));
    for n in 2..40 {
        fs::create_dir(tmp.path().join(format!("trash/{n:016x}"))).unwrap();
    }
    let e = store.as_ref().map(|store| store.gc(&mut ignore_progress).unwrap_err().to_string());
    let stuck: Vec<_> = fs::read_dir(tmp.path().join("trash")).unwrap().collect();
    for entry in &stuck {
        set_immutable(&entry.as_ref().unwrap().path().join("fs/f"), false);
    }
    assert!(e.unwrap().contains("remove from the trash"));
    assert_eq!(stuck.len(), 1);
    store.unwrap().gc(&mut ignore_progress).unwrap();
}

/// As `chattr +i`; whether that is possible here.
fn set_immutable(path: &Path, immutable: bool) -> bool {
    let Ok(file) = fs::File::open(path) else { return false };
    let flags: libc::c_int = if immutable { 0x10 } else { 0 };
    // SAFETY: FS_IOC_SETFLAGS reads an int.
    unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &flags) == 0 }
}

#[test]
fn a_layer_stays_while_nobody_knows_whether_its_row_is_on_disk() {
    let tmp = temp();
    store(tmp.path()).prepare("a", None, Labels::new()).unwrap();
    let (root, other) = (tmp.path().to_owned(), store(tmp.path()));
    let mut options = StoreOptions::new();
    options.on_durable_point = Some(DurablePointHook(Arc::new(move |at| {
        if at.name == "transaction" && !at.done {
            // So that nothing is served from memory; then the disk fails.
            other.update("a", Labels::new(), &[]).unwrap();
            spoil_log(&root.join("metadata.db-wal"));
        }
    })));
    let failing = Store::open(tmp.path(), options).unwrap();
    let e = failing.prepare("b", None, Labels::new()).unwrap_err();
    assert_eq!(failing.stat("a").unwrap_err().kind(), ErrorKind::Poisoned, "{e}");
    assert_eq!(fs::read_dir(tmp.path().join("snapshots")).unwrap().count(), 2, "{e}");
}

/// Overwrites the pages in SQLite's log, but not the headers of log and frames.
fn spoil_log(path: &Path) {
    let mut log = fs::read(path).unwrap();
    for frame in log[32..].chunks_mut(24 + 4096) {
        frame[24..].fill(0xff);
    }
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all(&log).unwrap();
}

#[test]
fn what_is_removed_during_a_check_is_no_damage() {
    let tmp = temp();
    let store = store(tmp.path());
    store.prepare("a", None, Labels::new()).unwrap();
    for name in ["f", "g", "h"] {
        fs::write(tmp.path().join("snapshots/1/fs").join(name), "").unwrap();
    }
    store.commit("layer", "a", CommitOptions::new()).unwrap();
    let mut removed = false;
    let report = store.check(&mut |_| {
        if !removed {
            store.remove("layer").unwrap();
            removed = true;
        }
        ControlFlow::Continue(())
    });
    assert_eq!(report.unwrap().problems, []);
    assert!(removed);
}
