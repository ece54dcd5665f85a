//! Commit and settle of snapshots that are mounted, or given out for mounting, at that very moment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use stratafs::{
    CommitOptions, DurablePointHook, Labels, LayerFormat, MountOptions, Store, StoreOptions,
    ignore_progress,
};

fn main() {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let mounting: [(&str, fn()); 3] = [
        ("a_left_mount_can_be_written_to_after_commit", left_and_committed),
        ("settling_under_a_left_mount_is_not_noted", left_and_settled),
        ("a_mount_whose_maker_died_before_it_was_noted_is_held", died_while_mounting),
    ];
    let mut trials: Vec<Trial> = mounting
        .into_iter()
        .map(|(name, test)| {
            let reason = if root { "" } else { " (needs root: kernel overlayfs)" };
            trial(&format!("{name}{reason}"), test).with_ignored_flag(!root)
        })
        .collect();
    trials.push(trial("a_workdir_given_out_during_commit_stays", given_out_during_commit));
    trials.push(trial("settling_what_is_given_out_meanwhile_is_not_noted", given_out_and_settled));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trial(name: &str, test: fn()) -> Trial {
    Trial::test(name, move || {
        test();
        Ok::<(), Failed>(())
    })
}

fn temp() -> tempfile::TempDir {
    // Not in /tmp, which may be a tmpfs without user xattrs.
    tempfile::tempdir_in("/var/tmp").unwrap()
}

fn options() -> StoreOptions {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    options
}

/// The directory of the snapshot made last.
fn newest(root: &Path) -> PathBuf {
    let dirs = fs::read_dir(root.join("snapshots")).unwrap().map(|entry| entry.unwrap().path());
    dirs.max_by_key(|dir| dir.file_name().unwrap().to_str().unwrap().parse::<u64>().unwrap())
        .unwrap()
}

/// An active snapshot `a` on the committed `base`, which has a file `f`.
fn fill(store: &Store) {
    store.prepare("b", None, Labels::new()).unwrap();
    fs::write(newest(store.root()).join("fs/f"), "below").unwrap();
    store.commit("base", "b", CommitOptions::new()).unwrap();
    store.prepare("a", Some("base"), Labels::new()).unwrap();
}

fn mount_and_leave(store: &Store, dir: &Path) -> PathBuf {
    let target = dir.join("mnt");
    fs::create_dir(&target).unwrap();
    store.activate("a", &target, &MountOptions::default()).unwrap().leave().unwrap();
    target
}

fn left_and_committed() {
    let tmp = temp();
    let store = Store::open(tmp.path().join("store"), options()).unwrap();
    fill(&store);
    let target = mount_and_leave(&store, tmp.path());
    store.commit("c", "a", CommitOptions::new()).unwrap();
    // Copies the file up, by the work directory.
    let written = fs::OpenOptions::new()
        .append(true)
        .open(target.join("f"))
        .and_then(|mut file| file.write_all(b" and above"));
    store.deactivate(&target).unwrap();
    written.unwrap();
    assert_eq!(store.gc(&mut ignore_progress).unwrap().workdirs, 1);
}

fn left_and_settled() {
    let tmp = temp();
    let store = Store::open(tmp.path().join("store"), options()).unwrap();
    fill(&store);
    let target = mount_and_leave(&store, tmp.path());
    store.settle("a", &mut ignore_progress).unwrap();
    fs::write(target.join("g"), "new").unwrap();
    store.deactivate(&target).unwrap();
    assert_eq!(store.commit("c", "a", CommitOptions::new()).unwrap().usage.unwrap().inodes, 2);
}

/// A store that gives the mounts of `a` to somebody at the durable point of that name.
fn giving_out_at(root: &Path, point: &'static str) -> Store {
    fill(&Store::open(root, options()).unwrap());
    let other = Store::open(root, options()).unwrap();
    let mut watched = options();
    watched.on_durable_point = Some(DurablePointHook(Arc::new(move |at| {
        if at.name == point && !at.done {
            // After the first time it may be committed.
            let _mounts = other.mounts("a", &MountOptions::default());
        }
    })));
    Store::open(root, watched).unwrap()
}

fn given_out_during_commit() {
    let tmp = temp();
    let store = giving_out_at(tmp.path(), "sync of the file system");
    store.commit("c", "a", CommitOptions::new()).unwrap();
    store.gc(&mut ignore_progress).unwrap();
    assert!(newest(tmp.path()).join("work").exists());
}

fn given_out_and_settled() {
    let tmp = temp();
    let store = giving_out_at(tmp.path(), "transaction");
    store.settle("a", &mut ignore_progress).unwrap();
    fs::write(newest(tmp.path()).join("fs/g"), "new").unwrap();
    assert_eq!(store.commit("c", "a", CommitOptions::new()).unwrap().usage.unwrap().inodes, 2);
}

fn died_while_mounting() {
    let tmp = temp();
    let store = Store::open(tmp.path().join("store"), options()).unwrap();
    fill(&store);
    let mount = mount_and_leave(&store, tmp.path());
    // What is on disk between the mount and the note of which mount it is.
    let rows = tmp.path().join("store/run/mounts");
    let row = fs::read_dir(&rows).unwrap().next().unwrap().unwrap().path();
    let mut note: serde_json::Value = serde_json::from_slice(&fs::read(&row).unwrap()).unwrap();
    note["identity"] = serde_json::Value::Null;
    fs::write(&row, note.to_string()).unwrap();
    let busy = |e: stratafs::Error| assert_eq!(e.kind(), stratafs::ErrorKind::Busy, "{e}");
    store.gc(&mut ignore_progress).unwrap();
    busy(store.remove("a").unwrap_err());
    let other = tmp.path().join("other");
    fs::create_dir(&other).unwrap();
    busy(store.activate("a", &other, &MountOptions::default()).unwrap_err());
    store.deactivate(&mount).unwrap();
    assert_eq!(fs::read_dir(&rows).unwrap().count(), 0);
    store.remove("a").unwrap();
}
