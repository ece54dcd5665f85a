//! One suite for every driver: what a mounted snapshot shows, and what its layer says afterwards.
//!
//! Each case runs in each layer format that the driver mounts, and by copies both mounted and used
//! where they are. A case that cannot run here is listed as ignored, with the reason in its name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/tree.rs"]
mod tree;

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use tree::Times;

use libtest_mimic::{Arguments, Failed, Trial};
use stratafs::{
    ApplyOptions, Change, ChangeKind, CommitOptions, DriverChoice, Durability, ErrorKind,
    ExportOptions, Guard, Labels, LayerFormat, MountOptions, RelPath, Store, StoreOptions,
    ignore_progress,
};

/// How snapshots are shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Overlay,
    Fuse,
    CopyMounted,
    CopyInPlace,
}

#[cfg(feature = "fuse")]
fn by_fuse() -> DriverChoice {
    DriverChoice::Fuse
}

#[cfg(not(feature = "fuse"))]
fn by_fuse() -> DriverChoice {
    panic!("built without FUSE")
}

/// A store in a directory of its own, with helpers that fail the case loudly.
struct Fixture {
    store: Store,
    way: Way,
    tmp: tempfile::TempDir,
}

impl Fixture {
    fn new(way: Way, format: LayerFormat) -> Self {
        // Not in /tmp, which may be a file system without the xattrs.
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut options = StoreOptions::new();
        options.format = Some(format);
        options.driver = match way {
            Way::Overlay => DriverChoice::Overlay,
            Way::Fuse => by_fuse(),
            Way::CopyMounted | Way::CopyInPlace => DriverChoice::Copy,
        };
        if matches!(way, Way::CopyMounted | Way::CopyInPlace) {
            // Two waits for the disk a copy, which other suites count and cut.
            options.durability = Durability::None;
        }
        let store = Store::open(tmp.path().join("store"), options).unwrap();
        Fixture { store, way, tmp }
    }

    /// Mounts and gives the guard with the mount point.
    fn mount(&self, key: &str) -> (Guard, PathBuf) {
        if self.way == Way::CopyInPlace {
            let guard = self.store.activate_in_place(key, &MountOptions::default()).unwrap();
            let target = guard.target().to_owned();
            return (guard, target);
        }
        let target = self.tmp.path().join(format!("mnt-{key}"));
        fs::create_dir_all(&target).unwrap();
        (self.store.activate(key, &target, &MountOptions::default()).unwrap(), target)
    }

    /// Makes the committed snapshot `name` by editing a mount of `parent`.
    fn layer(&self, name: &str, parent: Option<&str>, edit: impl FnOnce(&Path)) {
        let key = format!("{name}-active");
        self.store.prepare(&key, parent, Labels::new()).unwrap();
        let (mut guard, root) = self.mount(&key);
        edit(&root);
        guard.unmount().unwrap();
        self.store.commit(name, &key, CommitOptions::new()).unwrap();
    }

    /// Looks at a view of the committed snapshot `name`.
    fn look<T>(&self, name: &str, look: impl FnOnce(&Path) -> T) -> T {
        let key = format!("{name}-view");
        self.store.view(&key, Some(name), Labels::new()).unwrap();
        let (mut guard, root) = self.mount(&key);
        let seen = look(&root);
        guard.unmount().unwrap();
        self.store.remove(&key).unwrap();
        seen
    }

    fn changes(&self, key: &str) -> Vec<String> {
        let changes = self.store.changes(key, &mut ignore_progress).unwrap();
        // The two unions say the same, but for directories that were made again as they were.
        let parent = self.store.stat(key).unwrap().parent;
        let between = self.store.changes_between(key, parent.as_deref(), &mut ignore_progress);
        let between = between.unwrap();
        let hidden = |change: &&Change| !between.contains(change);
        assert!(changes.iter().filter(hidden).all(|c| c.kind == ChangeKind::Modified));
        assert!(between.iter().all(|c| changes.contains(c)), "{changes:?} {between:?}");
        changes.iter().map(ToString::to_string).collect()
    }

    fn export(&self, name: &str) -> Vec<u8> {
        let mut tar = Vec::new();
        let options = ExportOptions::default();
        self.store.export(name, &mut tar, &options, &mut ignore_progress).unwrap();
        tar
    }

    fn apply(&self, name: &str, parent: Option<&str>, tar: &[u8]) {
        let options = match rustix::process::geteuid().is_root() {
            true => ApplyOptions::default(),
            false => ApplyOptions::unprivileged(),
        };
        let labels = Labels::new();
        self.store.apply(name, parent, &mut &*tar, &options, labels, &mut ignore_progress).unwrap();
    }
}

fn tree(root: &Path) -> Vec<String> {
    tree::lines(root, Times::All)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn an_empty_snapshot_is_empty_and_has_a_plain_root(f: &Fixture) {
    f.layer("base", None, |root| {
        assert_eq!(names(root), Vec::<String>::new());
        assert_eq!(fs::metadata(root).unwrap().mode() & 0o7777, 0o755);
    });
    f.look("base", |root| assert_eq!(names(root), Vec::<String>::new()));
}

fn a_child_sees_its_parent_and_its_root(f: &Fixture) {
    f.layer("base", None, |root| {
        write(&root.join("d/file"), "one");
        fs::set_permissions(root.join("d/file"), Permissions::from_mode(0o4755)).unwrap();
        fs::set_permissions(root.join("d"), Permissions::from_mode(0o1777)).unwrap();
        fs::set_permissions(root, Permissions::from_mode(0o711)).unwrap();
        std::os::unix::fs::chown(root, Some(7), Some(8)).unwrap();
    });
    f.store.prepare("child", Some("base"), Labels::new()).unwrap();
    let (mut guard, root) = f.mount("child");
    let meta = fs::metadata(&root).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o711, 7, 8));
    assert_eq!(fs::read(root.join("d/file")).unwrap(), b"one");
    assert_eq!(fs::metadata(root.join("d/file")).unwrap().mode() & 0o7777, 0o4755);
    assert_eq!(fs::metadata(root.join("d")).unwrap().mode() & 0o7777, 0o1777);
    guard.unmount().unwrap();
    assert_eq!(f.changes("child"), Vec::<String>::new());
}

fn changes_are_exact(f: &Fixture) {
    f.layer("base", None, |root| {
        for path in ["keep", "edit", "gone", "mode", "touch", "d/a", "d/b", "e/x", "f/x/y"] {
            write(&root.join(path), path);
        }
        symlink("keep", root.join("link")).unwrap();
    });
    f.store.prepare("child", Some("base"), Labels::new()).unwrap();
    let (mut guard, root) = f.mount("child");
    write(&root.join("edit"), "different");
    fs::remove_file(root.join("gone")).unwrap();
    fs::set_permissions(root.join("mode"), Permissions::from_mode(0o600)).unwrap();
    fs::File::options().append(true).open(root.join("touch")).unwrap();
    filetime(&root.join("touch"));
    write(&root.join("new/file"), "new");
    fs::remove_dir_all(root.join("d")).unwrap();
    fs::create_dir(root.join("d")).unwrap();
    write(&root.join("d/c"), "c");
    fs::remove_dir_all(root.join("e")).unwrap();
    fs::remove_dir_all(root.join("f")).unwrap();
    write(&root.join("f"), "a file now");
    fs::remove_file(root.join("link")).unwrap();
    symlink("edit", root.join("link")).unwrap();
    // Made and deleted in the same layer: no change.
    write(&root.join("brief"), "");
    fs::remove_file(root.join("brief")).unwrap();
    guard.unmount().unwrap();
    let expected = [
        "M /d",
        "D /d/a",
        "D /d/b",
        "A /d/c",
        "M /edit",
        "D /e",
        "M /f",
        "D /gone",
        "M /link",
        "M /mode",
        "A /new",
        "A /new/file",
    ];
    let mut expected = expected.map(str::to_owned).to_vec();
    if matches!(f.way, Way::CopyMounted | Way::CopyInPlace) {
        // Two trees do not tell that a directory was made anew with the attributes that it had.
        expected.retain(|line| line != "M /d");
    }
    expected.sort_by_key(|line| line[2..].replace('/', "\0"));
    assert_eq!(f.changes("child"), expected);
}

/// Two snapshots of which neither is below the other, as a layer on top of the one.
fn the_difference_of_any_two_makes_one_from_the_other(f: &Fixture) {
    f.layer("base", None, |root| {
        for path in ["keep", "edit", "gone", "d/a", "d/b", "e/x"] {
            write(&root.join(path), path);
        }
        fs::hard_link(root.join("d/a"), root.join("link")).unwrap();
    });
    f.layer("left", Some("base"), |root| {
        write(&root.join("left/only"), "left");
        write(&root.join("edit"), "left");
        fs::remove_dir_all(root.join("e")).unwrap();
        fs::set_permissions(root.join("d"), Permissions::from_mode(0o1777)).unwrap();
    });
    f.layer("right", Some("base"), |root| {
        write(&root.join("edit"), "right");
        fs::remove_file(root.join("gone")).unwrap();
        fs::remove_dir_all(root.join("d")).unwrap();
        write(&root.join("d"), "a file now");
        filetime(&root.join("keep"));
    });
    let changes = f.store.changes_between("right", Some("left"), &mut ignore_progress).unwrap();
    let lines: Vec<String> = changes.iter().map(ToString::to_string).collect();
    assert_eq!(lines, ["M /d", "A /e", "A /e/x", "M /edit", "D /gone", "D /left"]);
    let mut tar = Vec::new();
    let options = ExportOptions::default();
    f.store
        .export_between("right", Some("left"), &mut tar, &options, &mut ignore_progress)
        .unwrap();
    f.apply("right-again", Some("left"), &tar);
    let expected = f.look("right", tree);
    assert_eq!(f.look("right-again", tree), expected);
    let changes = f.store.changes_between("right", Some("right-again"), &mut ignore_progress);
    assert_eq!(changes.unwrap(), []);
}

/// Another mtime and nothing else.
fn filetime(path: &Path) {
    let file = fs::File::open(path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
}

/// A directory ten levels deep, cut off at every level and made again.
fn cutting_and_mending_at_each_depth(f: &Fixture) {
    let path = |depth: usize| -> PathBuf { (0..depth).map(|i| format!("d{i}")).collect() };
    f.layer("base", None, |root| write(&root.join(path(10)).join("file"), "deep"));
    for depth in 1..=10 {
        let cut = format!("cut{depth}");
        f.layer(&cut, Some("base"), |root| fs::remove_dir_all(root.join(path(depth))).unwrap());
        assert_eq!(f.changes(&cut), [format!("D /{}", path(depth).display())]);
        let mend = format!("mend{depth}");
        f.layer(&mend, Some(&cut), |root| {
            assert!(!root.join(path(depth)).exists());
            fs::create_dir_all(root.join(path(depth))).unwrap();
        });
        assert_eq!(f.changes(&mend), [format!("A /{}", path(depth).display())]);
        f.look(&mend, |root| assert_eq!(names(&root.join(path(depth))), Vec::<String>::new()));
    }
}

fn an_export_applied_elsewhere_gives_the_same_tree(f: &Fixture) {
    f.layer("base", None, |root| {
        for path in ["keep", "gone", "d/a", "e/x", "sub/deep/file"] {
            write(&root.join(path), path);
        }
    });
    f.layer("top", Some("base"), |root| {
        fs::remove_file(root.join("gone")).unwrap();
        fs::remove_dir_all(root.join("d")).unwrap();
        write(&root.join("d/b"), "b");
        fs::remove_dir_all(root.join("e")).unwrap();
        write(&root.join("e"), "file");
        write(&root.join("one"), "linked");
        fs::hard_link(root.join("one"), root.join("two")).unwrap();
        symlink("/nowhere", root.join("link")).unwrap();
        let odd = OsStr::from_bytes(b"odd \xff\n'\"");
        write(&root.join(odd), "odd");
        // A whiteout of this format takes four bytes of a name.
        let is_dot_wh = f.way == Way::Fuse && f.store.format() == LayerFormat::Aufs;
        let longest = if is_dot_wh { 251 } else { 255 };
        write(&root.join("n".repeat(200)).join("m".repeat(longest)), "long");
        fs::set_permissions(root.join("one"), Permissions::from_mode(0o6751)).unwrap();
        std::os::unix::fs::chown(root.join("keep"), Some(70_000), Some(4_000_000_000)).unwrap();
    });
    f.apply("base2", None, &f.export("base"));
    f.apply("top2", Some("base2"), &f.export("top"));
    assert_eq!(f.look("top2", tree), f.look("top", tree));
    assert_eq!(f.export("top2"), f.export("top"), "the same layer gives the same bytes");
    assert_eq!(f.changes("top2"), f.changes("top"));
}

fn layers_applied_apart_and_rebased_keep_their_deletions(f: &Fixture) {
    f.layer("base", None, |root| {
        write(&root.join("gone"), "x");
        write(&root.join("d/old"), "x");
    });
    f.layer("top", Some("base"), |root| {
        fs::remove_file(root.join("gone")).unwrap();
        fs::remove_dir_all(root.join("d")).unwrap();
        write(&root.join("d/new"), "x");
    });
    // Without its parent, as parallel unpacking does, then put on top of it.
    f.apply("apart", None, &f.export("top"));
    assert_eq!(f.look("apart", names), ["d"], "marks are not to be seen");
    f.apply("second", Some("base"), &f.export("top"));
    f.look("second", |root| {
        assert_eq!(names(root), ["d"]);
        assert_eq!(names(&root.join("d")), ["new"]);
    });
}

fn directories_that_a_layer_does_not_describe_stay_as_they_are(f: &Fixture) {
    f.layer("base", None, |root| {
        write(&root.join("home/user/file"), "x");
        fs::set_permissions(root.join("home/user"), Permissions::from_mode(0o2750)).unwrap();
        std::os::unix::fs::chown(root.join("home/user"), Some(1000), Some(1001)).unwrap();
        fs::set_permissions(root.join("home/user"), Permissions::from_mode(0o2750)).unwrap();
    });
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.set_mode(0o644);
    tar.append_data(&mut header, "home/user/new", &b"y"[..]).unwrap();
    f.apply("top", Some("base"), &tar.into_inner().unwrap());
    f.look("top", |root| {
        let meta = fs::metadata(root.join("home/user")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o2750, 1000, 1001));
        assert_eq!(names(&root.join("home/user")), ["file", "new"]);
    });
    assert_eq!(f.changes("top"), ["A /home/user/new"]);
}

fn an_opaque_root_hides_all_that_is_below(f: &Fixture) {
    f.layer("base", None, |root| write(&root.join("d/old"), "x"));
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in [(".wh..wh..opq", ""), ("d/new", "y")] {
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    f.apply("middle", Some("base"), &tar.into_inner().unwrap());
    f.layer("top", Some("middle"), |root| {
        assert_eq!(names(&root.join("d")), ["new"]);
        write(&root.join("e"), "z");
    });
    f.look("top", |root| {
        assert_eq!(names(root), ["d", "e"]);
        assert_eq!(names(&root.join("d")), ["new"]);
    });
    f.look("middle", |root| assert_eq!(names(&root.join("d")), ["new"]));
}

fn many_layers(f: &Fixture) {
    f.layer("l0", None, |root| write(&root.join("f0"), "0"));
    let tar = f.export("l0");
    for i in 1..500 {
        f.apply(&format!("l{i}"), Some(&format!("l{}", i - 1)), &tar);
    }
    f.look("l499", |root| assert_eq!(fs::read(root.join("f0")).unwrap(), b"0"));
    f.apply("l500", Some("l499"), &tar);
    f.store.view("v", Some("l500"), Labels::new()).unwrap();
    let target = f.tmp.path().join("t");
    fs::create_dir(&target).unwrap();
    let e = f.store.activate("v", &target, &MountOptions::default()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::LimitExceeded, "{e}");
    assert!(e.to_string().contains("501") && e.to_string().contains("500"), "{e}");
}

fn views_cannot_be_written(f: &Fixture) {
    f.layer("one", None, |root| write(&root.join("file"), "x"));
    f.layer("two", Some("one"), |root| fs::remove_file(root.join("file")).unwrap());
    for name in ["one", "two"] {
        f.look(name, |root| {
            let e = fs::write(root.join("new"), "").unwrap_err();
            assert_eq!(e.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{name}");
        });
    }
    // A single layer that bears a mark: the mark is no file.
    f.apply("marks", None, &f.export("two"));
    assert_eq!(f.look("marks", names), Vec::<String>::new());
}

fn what_is_mounted_is_held(f: &Fixture) {
    f.layer("base", None, |root| write(&root.join("file"), "x"));
    f.store.prepare("key", Some("base"), Labels::new()).unwrap();
    let (guard, root) = f.mount("key");
    let busy = |what: &str| {
        let other = f.tmp.path().join("other");
        fs::create_dir_all(&other).unwrap();
        let again = f.store.activate("key", &other, &MountOptions::default());
        assert_eq!(again.unwrap_err().kind(), ErrorKind::Busy, "{what}");
        assert_eq!(f.store.remove("key").unwrap_err().kind(), ErrorKind::Busy, "{what}");
    };
    busy("mounted");
    assert_eq!(fs::read(root.join("file")).unwrap(), b"x");
    drop(guard);
    assert_eq!(names(&root), Vec::<String>::new(), "a dropped guard unmounts");
    let (mut guard, root) = f.mount("key");
    let open = fs::File::open(root.join("file")).unwrap();
    assert_eq!(guard.unmount().unwrap_err().kind(), ErrorKind::Busy);
    busy("in use");
    drop(open);
    guard.unmount().unwrap();
    f.store.remove("key").unwrap();
}

fn what_is_left_is_held(f: &Fixture) {
    f.layer("base", None, |root| write(&root.join("file"), "x"));
    f.store.prepare("key", Some("base"), Labels::new()).unwrap();
    let (guard, root) = f.mount("key");
    guard.leave().unwrap();
    assert_eq!(fs::read(root.join("file")).unwrap(), b"x");
    let other = f.tmp.path().join("other");
    fs::create_dir_all(&other).unwrap();
    let again = f.store.activate("key", &other, &MountOptions::default());
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(f.store.remove("key").unwrap_err().kind(), ErrorKind::Busy);
    let none = f.store.deactivate(f.tmp.path()).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::NotFound);
    f.store.deactivate(&root).unwrap();
    assert_eq!(names(&root), Vec::<String>::new());
    f.store.remove("key").unwrap();
}

fn commit_with_a_live_mount(f: &Fixture) {
    f.layer("base", None, |root| write(&root.join("file"), "x"));
    f.store.prepare("key", Some("base"), Labels::new()).unwrap();
    let (mut guard, root) = f.mount("key");
    // Left open: what is written may still be with the kernel.
    let mut file = fs::File::create(root.join("new")).unwrap();
    std::io::Write::write_all(&mut file, &[b'y'; 100_000]).unwrap();
    f.store.commit("name", "key", CommitOptions::new()).unwrap();
    let exported = f.export("name");
    assert!(exported.len() > 100_000 && exported.contains(&b'y'), "all that was written");
    drop(file);
    assert_eq!(fs::read(root.join("new")).unwrap().len(), 100_000);
    assert_eq!(f.store.remove("name").unwrap_err().kind(), ErrorKind::Busy);
    guard.unmount().unwrap();
    f.look("name", |root| assert_eq!(names(root), ["file", "new"]));
    f.store.gc(&mut ignore_progress).unwrap();
    assert_eq!(f.store.check(&mut ignore_progress).unwrap().problems, []);
}

fn settling_is_forgotten_when_it_is_mounted_again(f: &Fixture) {
    f.store.prepare("key", None, Labels::new()).unwrap();
    let before = f.store.settle("key", &mut ignore_progress).unwrap();
    let (mut guard, root) = f.mount("key");
    write(&root.join("file"), "x");
    guard.unmount().unwrap();
    f.store.commit("name", "key", CommitOptions::new()).unwrap();
    assert_eq!(f.store.usage("name").unwrap().inodes, before.inodes + 1);
}

fn provenance_names_the_layer(f: &Fixture) {
    f.layer("base", None, |root| {
        write(&root.join("a"), "1");
        write(&root.join("b"), "1");
    });
    f.layer("top", Some("base"), |root| {
        write(&root.join("b"), "2");
        fs::remove_file(root.join("a")).unwrap();
    });
    let from =
        |key: &str, path: &str| f.store.provenance(key, &RelPath::new(path).unwrap()).unwrap();
    assert_eq!(from("top", "b").as_deref(), Some("top"));
    assert_eq!(from("base", "b").as_deref(), Some("base"));
    assert_eq!(from("top", "a"), None);
}

fn foreign_marks_are_plain(f: &Fixture) {
    f.layer("base", None, |root| write(&root.join("d/file"), "x"));
    f.layer("top", Some("base"), |root| write(&root.join(".wh.d"), "mine"));
    f.look("top", |root| assert_eq!(names(root), [".wh.d", "d"]));
    let mut out = Vec::new();
    let exported = f.store.export("top", &mut out, &ExportOptions::default(), &mut ignore_progress);
    let e = exported.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition, "{e}");
    assert!(e.to_string().contains(".wh.d"), "{e}");
    assert!(out.is_empty(), "not a byte is written");
}

/// What a case takes beside a driver.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// The right to give files away.
    Chown,
    /// A mount, and not only a directory.
    Mount,
    /// The kernel's limits.
    Overlay,
    /// A mount that outlives its guard.
    Leave,
    /// Other marks than names.
    OverlayFormat,
}

type Case = (&'static str, fn(&Fixture), &'static [Need]);

macro_rules! case {
    ($name:ident, $needs:expr) => {
        (stringify!($name), $name as fn(&Fixture), $needs as &[Need])
    };
}

const CASES: &[Case] = &[
    case!(an_empty_snapshot_is_empty_and_has_a_plain_root, &[]),
    case!(a_child_sees_its_parent_and_its_root, &[Need::Chown]),
    case!(changes_are_exact, &[]),
    case!(the_difference_of_any_two_makes_one_from_the_other, &[]),
    case!(cutting_and_mending_at_each_depth, &[]),
    case!(an_export_applied_elsewhere_gives_the_same_tree, &[Need::Chown]),
    case!(layers_applied_apart_and_rebased_keep_their_deletions, &[]),
    case!(directories_that_a_layer_does_not_describe_stay_as_they_are, &[Need::Chown]),
    case!(an_opaque_root_hides_all_that_is_below, &[]),
    case!(many_layers, &[Need::Overlay]),
    case!(views_cannot_be_written, &[Need::Mount]),
    case!(what_is_mounted_is_held, &[Need::Mount]),
    case!(what_is_left_is_held, &[Need::Mount, Need::Leave]),
    case!(commit_with_a_live_mount, &[]),
    case!(settling_is_forgotten_when_it_is_mounted_again, &[]),
    case!(provenance_names_the_layer, &[]),
    case!(foreign_marks_are_plain, &[Need::OverlayFormat]),
];

fn main() {
    let mut arguments = Arguments::from_args();
    // Mounts and big trees: one after the other.
    arguments.test_threads = Some(1);
    let root = rustix::process::geteuid().is_root();
    let (trusted, user, aufs) =
        (LayerFormat::OverlayTrusted, LayerFormat::OverlayUser, LayerFormat::Aufs);
    let fusermount = std::process::Command::new("fusermount3").arg("--version").output();
    let no_fusermount = fusermount.is_err();
    let mut trials = Vec::new();
    for (way, prefix, formats) in [
        (Way::Overlay, "overlay", &[trusted, user][..]),
        (Way::Fuse, "fuse", &[trusted, user, aufs]),
        (Way::CopyMounted, "copy", &[trusted, user, aufs]),
        (Way::CopyInPlace, "copy-in-place", &[trusted, user, aufs]),
    ] {
        for format in formats.iter().copied() {
            for (name, case, needs) in CASES {
                let fits = |need: &Need| match need {
                    Need::Chown => true,
                    Need::Mount => way != Way::CopyInPlace,
                    Need::Overlay => way == Way::Overlay,
                    Need::Leave => way != Way::Fuse,
                    Need::OverlayFormat => format != aufs,
                };
                if !needs.iter().all(fits) {
                    continue;
                }
                let hindrance = match way {
                    Way::Fuse if cfg!(not(feature = "fuse")) => " (needs the feature fuse)",
                    Way::Fuse if !Path::new("/dev/fuse").exists() => " (needs /dev/fuse)",
                    _ if root => "",
                    Way::Fuse if format == trusted => " (needs root: trusted xattrs)",
                    Way::Fuse if needs.contains(&Need::Chown) => " (needs root: chown)",
                    Way::Fuse if no_fusermount => " (needs root, or fusermount3)",
                    Way::Fuse => "",
                    Way::Overlay => " (needs root: kernel overlayfs)",
                    Way::CopyMounted => " (needs root: mounts)",
                    Way::CopyInPlace if format == trusted => " (needs root: trusted xattrs)",
                    Way::CopyInPlace if needs.contains(&Need::Chown) => " (needs root: chown)",
                    Way::CopyInPlace => "",
                };
                let case = *case;
                let trial =
                    Trial::test(format!("{prefix}::{format}::{name}{hindrance}"), move || {
                        run(way, format, case)
                    });
                trials.push(trial.with_ignored_flag(!hindrance.is_empty()));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn run(way: Way, format: LayerFormat, case: fn(&Fixture)) -> Result<(), Failed> {
    let fixture = Fixture::new(way, format);
    case(&fixture);
    let problems = fixture.store.check(&mut ignore_progress)?.problems;
    if problems.is_empty() { Ok(()) } else { Err(format!("{problems:?}").into()) }
}
