//! Snapshots used as copies: with and without the right to mount, from one engine to the other, killed
//! in the middle, on full disks, and with blocks shared.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod disk;
    pub mod imported;
    pub mod model;
    pub mod script;
    pub mod suite;
}

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stratafs::{
    ApplyOptions, CommitOptions, DriverChoice, Durability, DurablePointHook, ErrorKind, Guard,
    Labels, LayerFormat, Mount, MountOptions, Owners, Progress, RelPath, Shown, Store,
    StoreOptions, Usage, ignore_progress,
};
use support::disk::{self, Kind, Mounted};
use support::model;
use support::suite;

fn main() {
    if let Some(arguments) = suite::child_arguments() {
        return child(&arguments);
    }
    disk::enter_own_mount_namespace();
    let root = suite::needs_root;
    let mut trials = vec![
        suite::trial("a_use_in_place_outlives_its_guard_only_if_left", None, held_in_place),
        suite::trial("a_use_in_place_outlives_its_process", None, process_dies),
        suite::trial("nothing_can_be_forbidden_in_place", None, restrictions),
        suite::trial("a_chosen_overlay_has_no_place", None, overlay_in_place),
        suite::trial("an_ordinary_user_is_told_of_copies", root(), ordinary_user),
        suite::trial("what_its_owner_cannot_read_is_copied_too", root(), unreadable),
        suite::trial("settling_keeps_the_copy_and_committing_drops_it", None, settle_and_commit),
        suite::trial("usage_of_a_copy_is_that_of_its_layer", None, usage_is_of_the_layer),
        suite::trial("provenance_and_export_see_the_copy", None, content),
        suite::trial("a_copy_can_be_made_beforehand_and_given_up", None, made_beforehand),
        suite::trial("what_is_in_use_is_busy_whatever_its_work_directory_holds", None, busy),
        suite::trial("an_edit_made_while_it_is_committed_is_not_in_the_layer", None, live_commit),
        suite::trial("each_engine_sees_what_was_edited_with_the_other", root(), engines),
        suite::trial("what_others_have_mounted_is_not_taken_away", root(), mounted_by_others),
        suite::trial("mounts_are_binds_of_the_copy", None, mounts_are_binds),
        suite::trial("without_a_choice_copies_are_for_what_overlay_never_can", root(), automatic),
        suite::trial("a_damaged_stamp_costs_time_alone", None, damaged_stamp),
        suite::trial("killed_at_any_report_and_wait", None, killed),
        suite::trial("a_disk_that_is_full_loses_no_edit", root(), full_disk),
    ];
    for kind in Kind::ALL {
        let name = format!("blocks_are_shared_where_they_can_be_on_{}", kind.name());
        trials.push(suite::trial(name, kind.hindrance(), move || sharing(kind)));
    }
    suite::run_one_by_one(trials);
}

fn options(driver: DriverChoice) -> StoreOptions {
    let mut options = model::options(Durability::None);
    options.driver = driver;
    options
}

fn open(root: &Path, driver: DriverChoice) -> Store {
    Store::open(root, options(driver)).unwrap()
}

fn in_place(store: &Store, key: &str) -> Guard {
    store.activate_in_place(key, &MountOptions::default()).unwrap()
}

/// Edits a snapshot in place.
fn edit(store: &Store, key: &str, edit: impl FnOnce(&Path)) {
    let mut guard = in_place(store, key);
    edit(guard.target());
    guard.unmount().unwrap();
}

/// A store with the committed `base` (a directory `d` of files, and a file `f`) and the active `a` on it.
fn store_with_base(root: &Path) -> Store {
    let store = open(root, DriverChoice::Copy);
    store.prepare("base-active", None, Labels::new()).unwrap();
    edit(&store, "base-active", |tree| {
        fs::create_dir(tree.join("d")).unwrap();
        for i in 0..20 {
            fs::write(tree.join(format!("d/{i}")), format!("base {i}")).unwrap();
        }
        fs::write(tree.join("f"), "base").unwrap();
    });
    store.commit("base", "base-active", CommitOptions::new()).unwrap();
    store.prepare("a", Some("base"), Labels::new()).unwrap();
    store
}

fn snapshot_dirs(root: &Path) -> Vec<PathBuf> {
    fs::read_dir(root.join("snapshots")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn trees(root: &Path) -> usize {
    snapshot_dirs(root).iter().filter(|dir| dir.join("tree").exists()).count()
}

fn changes(store: &Store, key: &str) -> Vec<String> {
    let changes = store.changes(key, &mut ignore_progress).unwrap();
    changes.iter().map(ToString::to_string).collect()
}

fn look(store: &Store, name: &str, path: &str) -> Option<String> {
    store.view("look", Some(name), Labels::new()).unwrap();
    let mut guard = in_place(store, "look");
    let seen = fs::read_to_string(guard.target().join(path)).ok();
    guard.unmount().unwrap();
    store.remove("look").unwrap();
    seen
}

fn held_in_place() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    let mut guard = in_place(&store, "a");
    let tree = guard.target().to_owned();
    let again = store.activate_in_place("a", &MountOptions::default());
    suite::fails(again, ErrorKind::Busy, "\"a\"");
    suite::fails(store.remove("a"), ErrorKind::Busy, "\"a\"");
    guard.unmount().unwrap();
    drop(in_place(&store, "a"));
    let identity = in_place(&store, "a").leave().unwrap();
    assert!(identity.is_in_place());
    let other = open(dir.path(), DriverChoice::Auto);
    suite::fails(other.remove("a"), ErrorKind::Busy, tree.to_str().unwrap());
    other.deactivate(&tree).unwrap();
    suite::fails(other.deactivate(&tree), ErrorKind::NotFound, "");
    assert!(fs::read_dir(dir.path().join("run/mounts")).unwrap().next().is_none());
    other.remove("a").unwrap();
    model::assert_no_leftovers(&other, "after removal");
}

fn process_dies() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    let mut child = suite::child("use-and-die", &[dir.path().to_str().unwrap()]);
    assert!(suite::was_killed(child.wait().unwrap()));
    // As with a mount of the kernel's: something else may be using it.
    suite::fails(store.remove("a"), ErrorKind::Busy, "unmount");
    let row = fs::read_dir(dir.path().join("run/mounts")).unwrap().next().unwrap().unwrap();
    assert!(row.metadata().unwrap().len() > 0);
    let tree = snapshot_dirs(dir.path()).into_iter().find(|d| d.join("tree").exists()).unwrap();
    store.deactivate(&tree.join("tree")).unwrap();
    assert_eq!(changes(&store, "a"), ["A /from-the-dead"]);
}

fn restrictions() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    let mut options = MountOptions::default();
    options.restrictions.nosuid = true;
    suite::fails(store.activate_in_place("a", &options), ErrorKind::Unsupported, "forbid");
    assert_eq!(trees(dir.path()), 0, "found out before anything is copied");
}

fn overlay_in_place() {
    let dir = suite::temp();
    store_with_base(dir.path());
    let store = open(dir.path(), DriverChoice::Overlay);
    let refused = store.activate_in_place("a", &MountOptions::default());
    suite::fails(refused, ErrorKind::Unsupported, "driver copy");
}

fn ordinary_user() {
    let dir = suite::temp();
    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    chmod(dir.path(), 0o755);
    rustix::fs::chown(&home, Some(nobody().0), Some(nobody().1)).unwrap();
    let mut child = suite::child("ordinary-user", &[home.to_str().unwrap()]);
    assert!(!suite::was_killed(child.wait().unwrap()));
}

fn unreadable() {
    let dir = suite::temp();
    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    chmod(dir.path(), 0o755);
    rustix::fs::chown(&home, Some(nobody().0), Some(nobody().1)).unwrap();
    let mut child = suite::child("unreadable", &[home.to_str().unwrap()]);
    assert!(!suite::was_killed(child.wait().unwrap()));
}

fn nobody() -> (rustix::fs::Uid, rustix::fs::Gid) {
    (rustix::fs::Uid::from_raw(65534), rustix::fs::Gid::from_raw(65534))
}

fn become_nobody() {
    nix::unistd::setgroups(&[]).unwrap();
    nix::unistd::setgid(65534.into()).unwrap();
    nix::unistd::setuid(65534.into()).unwrap();
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

fn as_ordinary_user(home: &Path) {
    become_nobody();
    let (root, target) = (home.join("store"), home.join("target"));
    fs::create_dir(&target).unwrap();
    let store = store_with_base(&root);
    for driver in [DriverChoice::Copy, DriverChoice::Auto] {
        let store = open(&root, driver);
        if driver == DriverChoice::Auto
            && let Ok(mut guard) = store.activate("a", &target, &MountOptions::default())
        {
            // By FUSE, which ordinary users may have.
            assert_eq!(fs::read(target.join("f")).unwrap(), b"base");
            guard.unmount().unwrap();
            assert_eq!(trees(&root), 0, "a mount needs no copy");
            continue;
        }
        let refused = store.activate("a", &target, &MountOptions::default());
        suite::fails(refused, ErrorKind::PermissionDenied, "in place");
        assert_eq!(trees(&root), 0, "nothing is copied for a mount that cannot be made");
        suite::fails(
            store.make_ready("a", Shown::Mounted, &mut ignore_progress).and_then(|()| {
                // Overlay has nothing to make ready.
                store.activate("a", &target, &MountOptions::default())
            }),
            ErrorKind::PermissionDenied,
            "in place",
        );
    }
    // Asked for, it is there, whatever the driver would be.
    edit(&open(&root, DriverChoice::Auto), "a", |tree| fs::write(tree.join("f"), "mine").unwrap());
    assert_eq!(changes(&store, "a"), ["M /f"]);
    store.commit("edited", "a", CommitOptions::new()).unwrap();
    assert_eq!(look(&store, "edited", "f").as_deref(), Some("mine"));
}

/// As images have them: a shadow file without any right, a program that may only be executed.
fn with_unreadable_files(home: &Path) {
    become_nobody();
    let mut options = options(DriverChoice::Copy);
    // Else files have modes that let their owner read them.
    options.owners = Some(Owners::OfFiles);
    let store = Store::open(home.join("store"), options).unwrap();
    store.prepare("base-active", None, Labels::new()).unwrap();
    edit(&store, "base-active", |tree| {
        for (name, mode) in [("shadow", 0o000), ("sudo", 0o4111)] {
            fs::write(tree.join(name), name).unwrap();
            let file = fs::File::open(tree.join(name)).unwrap();
            file.set_modified(std::time::UNIX_EPOCH).unwrap();
            chmod(&tree.join(name), mode);
        }
    });
    store.commit("base", "base-active", CommitOptions::new()).unwrap();
    store.prepare("a", Some("base"), Labels::new()).unwrap();
    edit(&store, "a", |tree| {
        let mode = |name: &str| fs::metadata(tree.join(name)).unwrap().mode() & 0o7777;
        assert_eq!((mode("shadow"), mode("sudo")), (0o000, 0o4111));
        // Its ctime says that it may have changed.
        chmod(&tree.join("shadow"), 0o600);
        assert_eq!(fs::read(tree.join("shadow")).unwrap(), b"shadow");
        chmod(&tree.join("shadow"), 0o000);
        fs::write(tree.join("new"), "").unwrap();
    });
    assert_eq!(changes(&store, "a"), ["A /new"]);
    store.commit("edited", "a", CommitOptions::new()).unwrap();
}

fn busy() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    let guard = in_place(&store, "a");
    for snapshot in snapshot_dirs(dir.path()) {
        // Where the union over FUSE has its lock, by which others would ask for its server.
        fs::create_dir_all(snapshot.join("work/stratafs/lock")).unwrap();
    }
    suite::fails(store.remove("a"), ErrorKind::Busy, "\"a\"");
    drop(guard);
    store.remove("a").unwrap();
}

fn settle_and_commit() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    edit(&store, "a", |tree| fs::remove_file(tree.join("f")).unwrap());
    let settled = store.settle("a", &mut ignore_progress).unwrap();
    assert_eq!((settled, trees(dir.path())), (store.usage("a").unwrap(), 1));
    assert_eq!(changes(&store, "a"), ["D /f"]);
    // What comes later counts, though it was settled.
    edit(&store, "a", |tree| fs::remove_file(tree.join("d/0")).unwrap());
    assert_eq!(changes(&store, "a"), ["D /d/0", "D /f"]);
    store.commit("edited", "a", CommitOptions::new()).unwrap();
    assert_eq!(trees(dir.path()), 0);
    assert_eq!(changes(&store, "edited"), ["D /d/0", "D /f"]);
    // The root, `d` and two whiteouts.
    assert_eq!(store.usage("edited").unwrap().inodes, 4);
    model::assert_sound(&store, "committed");
    model::assert_no_leftovers(&store, "committed");
}

fn usage_is_of_the_layer() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    edit(&store, "a", |_| ());
    assert_eq!(store.usage("a").unwrap().inodes, 1);
    edit(&store, "a", |tree| {
        fs::write(tree.join("d/new"), vec![7; 100_000]).unwrap();
        fs::hard_link(tree.join("d/new"), tree.join("second")).unwrap();
        fs::remove_file(tree.join("f")).unwrap();
    });
    let before = store.usage("a").unwrap();
    store.commit("edited", "a", CommitOptions::new()).unwrap();
    let Usage { bytes, inodes, .. } = store.usage("edited").unwrap();
    // The root, `d`, one file, one whiteout.
    assert_eq!((before.inodes, inodes), (4, 4));
    assert!(before.bytes >= 100_000 && bytes >= 100_000, "{before:?} {bytes}");
}

fn content() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    edit(&store, "a", |tree| {
        fs::write(tree.join("d/0"), "edited").unwrap();
        fs::remove_file(tree.join("f")).unwrap();
        fs::write(tree.join("new"), "new").unwrap();
    });
    let from = |path: &str| store.provenance("a", &RelPath::new(path).unwrap()).unwrap();
    assert_eq!(from("d/0").as_deref(), Some("a"));
    assert_eq!(from("d/1").as_deref(), Some("base"));
    assert_eq!(from("f"), None);
    let changed = store.changes_between("a", None, &mut ignore_progress).unwrap();
    let changed: Vec<_> = changed.iter().map(ToString::to_string).collect();
    assert!(changed.contains(&"A /new".to_owned()) && !changed.contains(&"A /f".to_owned()));
    let export = |key: &str| {
        let mut tar = Vec::new();
        store.export(key, &mut tar, &Default::default(), &mut ignore_progress).unwrap();
        tar
    };
    let active = export("a");
    assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
    store.commit("edited", "a", CommitOptions::new()).unwrap();
    assert_eq!(active, export("edited"));
    let names: Vec<_> = tar::Archive::new(&*active)
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().into_owned())
        .collect();
    assert!(names.contains(&PathBuf::from(".wh.f")) && names.contains(&PathBuf::from("d/0")));
    assert!(!names.contains(&PathBuf::from("d/1")), "{names:?}");
}

fn made_beforehand() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    let stop = store.make_ready("a", Shown::InPlace, &mut |_| ControlFlow::Break(()));
    suite::fails(stop, ErrorKind::Cancelled, "");
    assert_eq!(trees(dir.path()), 0);
    assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
    let mut last = None;
    let mut note = |progress: Progress| {
        last = Some(progress);
        ControlFlow::Continue(())
    };
    store.make_ready("a", Shown::InPlace, &mut note).unwrap();
    // Twenty files of six or seven bytes, and `f`.
    assert_eq!(last.map(|p| (p.entries, p.bytes)), Some((22, 134)));
    assert_eq!(trees(dir.path()), 1);
    let before = in_place(&store, "a").target().metadata().unwrap().ino();
    assert_eq!(in_place(&store, "a").target().metadata().unwrap().ino(), before, "made once");
}

fn live_commit() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    let mut guard = in_place(&store, "a");
    fs::write(guard.target().join("f"), "early").unwrap();
    store.commit("edited", "a", CommitOptions::new()).unwrap();
    fs::write(guard.target().join("f"), "late").unwrap();
    assert_eq!(look(&store, "edited", "f").as_deref(), Some("early"));
    assert_eq!(store.gc(&mut ignore_progress).unwrap().trees, 0, "it is in use");
    guard.unmount().unwrap();
    assert_eq!(store.gc(&mut ignore_progress).unwrap().trees, 1);
    assert_eq!(look(&store, "edited", "f").as_deref(), Some("early"));
}

fn engines() {
    let dir = suite::temp();
    let (root, target) = (dir.path().join("store"), dir.path().join("target"));
    fs::create_dir(&target).unwrap();
    let copy = store_with_base(&root);
    let overlay = open(&root, DriverChoice::Overlay);
    let through = |store: &Store, edit: &dyn Fn(&Path)| {
        let mut guard = store.activate("a", &target, &MountOptions::default()).unwrap();
        edit(&target);
        guard.unmount().unwrap();
    };
    through(&overlay, &|at| {
        fs::write(at.join("f"), "overlay").unwrap();
        fs::remove_dir_all(at.join("d")).unwrap();
        fs::create_dir(at.join("d")).unwrap();
    });
    through(&copy, &|at| {
        assert_eq!(fs::read(at.join("f")).unwrap(), b"overlay");
        assert_eq!(fs::read_dir(at.join("d")).unwrap().count(), 0);
        fs::write(at.join("d/copy"), "copy").unwrap();
        fs::write(at.join("f"), "copy").unwrap();
    });
    assert_eq!(trees(&root), 1);
    through(&overlay, &|at| {
        assert_eq!(fs::read(at.join("f")).unwrap(), b"copy");
        assert_eq!(fs::read_dir(at.join("d")).unwrap().count(), 1);
        fs::remove_file(at.join("d/copy")).unwrap();
    });
    assert_eq!(trees(&root), 0, "the layer has all that the tree had");
    through(&copy, &|at| {
        assert_eq!(fs::read_dir(at.join("d")).unwrap().count(), 0, "a fresh copy");
        fs::write(at.join("last"), "").unwrap();
    });
    // Without a choice it stays the copy that it is.
    through(&open(&root, DriverChoice::Auto), &|at| fs::write(at.join("very-last"), "").unwrap());
    assert_eq!(trees(&root), 1);
    let mut expected: Vec<String> = (0..20).map(|i| format!("D /d/{i}")).collect();
    expected.extend(["M /f", "A /last", "A /very-last"].map(str::to_owned));
    expected.sort_by_key(|line| line[2..].replace('/', "\0"));
    copy.commit("edited", "a", CommitOptions::new()).unwrap();
    assert_eq!(changes(&copy, "edited"), expected);
    model::assert_sound(&copy, "edited by both");
}

fn mounted_by_others() {
    let dir = suite::temp();
    let (root, target) = (dir.path().join("store"), dir.path().join("target"));
    fs::create_dir(&target).unwrap();
    let copy = store_with_base(&root);
    let overlay = open(&root, DriverChoice::Overlay);
    let mount = |store: &Store| {
        let mounts = store.mounts("a", &MountOptions::default()).unwrap();
        let text = mounts[0].options().join(std::ffi::OsStr::new(","));
        let mut command = std::process::Command::new("mount");
        let made = command
            .args(["-t", mounts[0].fstype(), "-o"])
            .arg(text)
            .args([mounts[0].source(), target.as_path()])
            .status();
        assert!(made.unwrap().success());
    };
    let unmount = || rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
    mount(&overlay);
    fs::write(target.join("f"), "overlay").unwrap();
    let refused = copy.activate_in_place("a", &MountOptions::default());
    suite::fails(refused, ErrorKind::Busy, "\"a\"");
    unmount();
    mount(&copy);
    assert_eq!(fs::read(target.join("f")).unwrap(), b"overlay");
    fs::write(target.join("f"), "copy").unwrap();
    suite::fails(overlay.mounts("a", &MountOptions::default()), ErrorKind::Busy, "\"a\"");
    copy.commit("edited", "a", CommitOptions::new()).unwrap();
    assert_eq!(fs::read(target.join("f")).unwrap(), b"copy", "still there");
    assert_eq!(copy.gc(&mut ignore_progress).unwrap().trees, 0);
    unmount();
    assert_eq!(copy.gc(&mut ignore_progress).unwrap().trees, 1);
    assert_eq!(look(&copy, "edited", "f").as_deref(), Some("copy"));
}

fn mounts_are_binds() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    // With a mark, so that the layer alone will not do.
    edit(&store, "a", |tree| fs::remove_file(tree.join("f")).unwrap());
    store.commit("edited", "a", CommitOptions::new()).unwrap();
    store.view("v", Some("edited"), Labels::new()).unwrap();
    store.view("plain", Some("base"), Labels::new()).unwrap();
    store.prepare("b", Some("edited"), Labels::new()).unwrap();
    let mount = |key: &str| store.mounts(key, &MountOptions::default()).unwrap().remove(0);
    for (key, read_only, last) in [("v", true, "tree"), ("b", false, "tree"), ("plain", true, "fs")]
    {
        let Mount::Bind { source, restrictions, .. } = mount(key) else { panic!("{key}") };
        assert_eq!(restrictions.read_only, read_only, "{key}");
        assert!(source.ends_with(last) && source.join("d/1").exists(), "{key}: {source:?}");
        assert_eq!(source.join("f").exists(), key == "plain");
        assert_eq!(mount(key).source(), source, "the same for every call");
    }
}

fn automatic() {
    let dir = suite::temp();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    // Overlayfs does not read such layers; where there is FUSE the union does.
    let by = if Path::new("/dev/fuse").exists() { "fuse.stratafs-fuse" } else { "bind" };
    let mut options = options(DriverChoice::Auto);
    options.format = Some(LayerFormat::Aufs);
    let store = Store::open(dir.path().join("aufs"), options).unwrap();
    store.prepare("a", None, Labels::new()).unwrap();
    edit(&store, "a", |tree| fs::write(tree.join("f"), "x").unwrap());
    store.commit("base", "a", CommitOptions::new()).unwrap();
    store.prepare("b", Some("base"), Labels::new()).unwrap();
    assert_eq!(store.mounts("b", &MountOptions::default()).unwrap()[0].fstype(), by);
    let mut guard = store.activate("b", &target, &MountOptions::default()).unwrap();
    assert_eq!(fs::read(target.join("f")).unwrap(), b"x");
    guard.unmount().unwrap();
    // Such as it does read it mounts.
    let root = dir.path().join("overlay");
    store_with_base(&root);
    let store = open(&root, DriverChoice::Auto);
    assert_eq!(store.mounts("a", &MountOptions::default()).unwrap()[0].fstype(), "overlay");
    store.activate("a", &target, &MountOptions::default()).unwrap().unmount().unwrap();
    assert_eq!(trees(&root), 0);
}

fn damaged_stamp() {
    let dir = suite::temp();
    let store = store_with_base(dir.path());
    edit(&store, "a", |tree| fs::write(tree.join("f"), "edited").unwrap());
    let snapshot = snapshot_dirs(dir.path()).into_iter().find(|d| d.join("tree").exists()).unwrap();
    for text in ["", "99999999999.00000000", "0.000000000\n", "\0\0\0"] {
        fs::write(snapshot.join("tree.stamp"), text).unwrap();
        assert_eq!(changes(&store, "a"), ["M /f"], "{text:?}");
    }
    fs::remove_file(snapshot.join("tree.stamp")).unwrap();
    assert_eq!(changes(&store, "a"), ["M /f"]);
}

/// What a child does until it is killed, and the edits that must be there afterwards, whenever it was.
const DUTIES: [(&str, &[&str]); 3] =
    [("copy", &[]), ("settle", &["A /d/new", "M /f"]), ("commit", &["A /d/new", "M /f"])];

fn killed() {
    for (duty, expected) in DUTIES {
        for k in 0.. {
            let dir = suite::temp();
            let store = store_with_base(dir.path());
            if duty != "copy" {
                edit(&store, "a", |tree| {
                    fs::write(tree.join("d/new"), vec![1; 70_000]).unwrap();
                    fs::write(tree.join("f"), "edited").unwrap();
                });
            }
            drop(store);
            let arguments = [dir.path().to_str().unwrap(), &k.to_string()];
            let killed = suite::was_killed(suite::child(duty, &arguments).wait().unwrap());
            let moment = format!("{duty}, killed at {k}");
            let store = open(dir.path(), DriverChoice::Copy);
            model::assert_sound(&store, &moment);
            let committed = store.stat("edited").is_ok();
            let key = if committed { "edited" } else { "a" };
            assert_eq!(changes(&store, key), expected, "{moment}");
            if !committed {
                let mut guard = in_place(&store, "a");
                let f = fs::read_to_string(guard.target().join("f")).unwrap();
                assert_eq!(f, if duty == "copy" { "base" } else { "edited" }, "{moment}");
                assert!(guard.target().join("d/19").exists(), "{moment}: a half tree");
                guard.unmount().unwrap();
                store.commit("edited", "a", CommitOptions::new()).unwrap();
            }
            model::assert_no_leftovers(&store, &moment);
            assert_eq!(changes(&store, "edited"), expected, "{moment}");
            model::assert_sound(&store, &moment);
            assert_eq!(trees(dir.path()), 0, "{moment}");
            if !killed {
                assert!(k > 3, "{duty}: no moments to be killed at");
                break;
            }
        }
    }
}

fn full_disk() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let mounted = Mounted::tmpfs(&dir.path().join("mount"), "12m");
    let (root, filler) = (mounted.path().join("store"), mounted.path().join("filler"));
    let store = open(&root, DriverChoice::Copy);
    store.prepare("base-active", None, Labels::new()).unwrap();
    edit(&store, "base-active", |tree| {
        for i in 0..4 {
            fs::write(tree.join(format!("{i}")), vec![7; 512 << 10]).unwrap();
        }
    });
    store.commit("base", "base-active", CommitOptions::new()).unwrap();
    store.prepare("a", Some("base"), Labels::new()).unwrap();
    store.prepare("b", Some("base"), Labels::new()).unwrap();
    edit(&store, "a", |tree| fs::write(tree.join("0"), vec![8; 512 << 10]).unwrap());
    disk::fill(&filler);
    let refused = store.activate_in_place("b", &MountOptions::default());
    suite::fails(refused, ErrorKind::NoSpace, "");
    suite::fails(store.settle("a", &mut ignore_progress), ErrorKind::NoSpace, "");
    suite::fails(store.commit("edited", "a", CommitOptions::new()), ErrorKind::NoSpace, "");
    assert_eq!(fs::read_dir(root.join("staging")).unwrap().count(), 0);
    assert_eq!(trees(&root), 1);
    store.remove("b").unwrap();
    fs::remove_file(&filler).unwrap();
    assert_eq!(changes(&store, "a"), ["M /0"]);
    store.commit("edited", "a", CommitOptions::new()).unwrap();
    store.view("v", Some("edited"), Labels::new()).unwrap();
    let guard = in_place(&store, "v");
    assert_eq!(fs::read(guard.target().join("0")).unwrap(), vec![8; 512 << 10]);
    drop(guard);
    drop(store);
}

/// How many bytes of a file system are in use, everything written.
fn used(at: &Path) -> u64 {
    rustix::fs::syncfs(fs::File::open(at).unwrap()).unwrap();
    let stat = rustix::fs::statvfs(at).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

fn sharing(kind: Kind) {
    const FILE: usize = 12 << 20;
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = dir.path().join("image");
    disk::make_image(kind, &image);
    let mounted = Mounted::image(kind, &image, &dir.path().join("mount"));
    let at = mounted.path();
    let store = open(&at.join("store"), DriverChoice::Copy);
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o755);
    header.set_size(FILE as u64);
    let contents: Vec<u8> = (0..FILE).map(|i| (i % 251) as u8).collect();
    tar.append_data(&mut header, "large", &*contents).unwrap();
    let tar = tar.into_inner().unwrap();
    let options = ApplyOptions::unprivileged();
    let stop = &mut ignore_progress;
    store.apply("base", None, &mut &*tar, &options, Labels::new(), stop).unwrap();
    store.prepare("a", Some("base"), Labels::new()).unwrap();
    let before = used(at);
    edit(&store, "a", |tree| {
        // All of it is new to the layer, and none of it to the disk.
        chmod(&tree.join("large"), 0o700);
        assert!(fs::read(tree.join("large")).unwrap() == contents);
    });
    let copied = used(at).saturating_sub(before);
    store.settle("a", &mut ignore_progress).unwrap();
    let settled = used(at).saturating_sub(before);
    if kind == Kind::Ext4 {
        assert!(copied > FILE as u64 && settled > 2 * FILE as u64, "{copied} {settled}");
    } else {
        assert!(copied < FILE as u64 / 3 && settled < FILE as u64 / 3, "{copied} {settled}");
    }
    store.commit("edited", "a", CommitOptions::new()).unwrap();
    store.view("v", Some("edited"), Labels::new()).unwrap();
    let guard = in_place(&store, "v");
    assert!(fs::read(guard.target().join("large")).unwrap() == contents);
    drop(guard);
    drop(store);
}

fn child(arguments: &[String]) {
    let root = Path::new(&arguments[1]);
    match arguments[0].as_str() {
        "use-and-die" => {
            let store = open(root, DriverChoice::Copy);
            let guard = in_place(&store, "a");
            fs::write(guard.target().join("from-the-dead"), "").unwrap();
            suite::kill_myself();
        }
        "ordinary-user" => as_ordinary_user(root),
        "unreadable" => with_unreadable_files(root),
        duty => {
            let last: usize = arguments[2].parse().unwrap();
            let moments = Arc::new(AtomicUsize::new(0));
            let hooked = Arc::clone(&moments);
            let pass = move |moments: &AtomicUsize| {
                if moments.fetch_add(1, Ordering::Relaxed) == last {
                    suite::kill_myself();
                }
            };
            let mut options = options(DriverChoice::Copy);
            options.durability = Durability::Full;
            options.on_durable_point = Some(DurablePointHook(Arc::new(move |_| pass(&hooked))));
            let store = Store::open(root, options).unwrap();
            let mut report = |_| {
                pass(&moments);
                ControlFlow::Continue(())
            };
            match duty {
                "copy" => store.make_ready("a", Shown::InPlace, &mut report).unwrap(),
                "settle" => drop(store.settle("a", &mut report).unwrap()),
                _ => drop(store.commit("edited", "a", CommitOptions::new()).unwrap()),
            }
        }
    }
}
