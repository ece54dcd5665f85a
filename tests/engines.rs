//! Two engines on one snapshot, in turns: what the one writes the other shows, and the layer says.
//!
//! The kernel's overlayfs needs root; without it these tests are reported as ignored.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/suite.rs"]
#[allow(dead_code, reason = "each suite uses its part")]
mod suite;
#[path = "support/tree.rs"]
mod tree;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;
use stratafs::{
    ApplyOptions, CommitOptions, DriverChoice, Durability, ErrorKind, ExportOptions, Guard, Labels,
    LayerFormat, MountOptions, Store, StoreOptions, ignore_progress,
};

const FORMATS: [LayerFormat; 2] = [LayerFormat::OverlayTrusted, LayerFormat::OverlayUser];

fn main() {
    let hindrance = suite::needs_root()
        .or_else(|| (!Path::new("/dev/fuse").exists()).then(|| "needs /dev/fuse".to_owned()));
    let mut trials = Vec::new();
    for format in FORMATS {
        for (name, test) in [
            ("what_one_engine_writes_the_other_shows", in_turns as fn(LayerFormat)),
            ("a_renamed_directory_is_whole_for_the_other_engine", renamed),
            ("a_renamed_directory_is_whole_in_what_is_committed", renamed_and_committed),
            ("a_renamed_directory_is_whole_in_what_is_compared", renamed_and_compared),
            ("a_renamed_directory_in_a_live_mount_is_not_committed", renamed_and_mounted),
            ("changed_attributes_are_whole_files_for_the_other_engine", attributes),
            ("changed_attributes_are_whole_files_in_what_is_committed", attributes_committed),
            ("changed_attributes_in_a_live_mount_are_compared_and_committed", attributes_mounted),
        ] {
            let name = format!("{name}::{format}");
            trials.push(suite::trial(name, hindrance.clone(), move || test(format)));
        }
    }
    suite::run_one_by_one(trials);
}

struct Stage {
    overlay: Store,
    fuse: Store,
    tmp: tempfile::TempDir,
}

impl Stage {
    /// A store with the committed `base` and the active `a` on it, opened for each engine.
    fn new(format: LayerFormat) -> Stage {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir(tmp.path().join("mnt")).unwrap();
        let open = |driver| {
            let mut options = StoreOptions::new();
            options.format = Some(format);
            options.driver = driver;
            options.durability = Durability::None;
            Store::open(tmp.path().join("store"), options).unwrap()
        };
        let (overlay, fuse) = (open(DriverChoice::Overlay), open(DriverChoice::Fuse));
        let stage = Stage { overlay, fuse, tmp };
        stage.overlay.prepare("base-active", None, Labels::new()).unwrap();
        stage.mounted(&stage.overlay, "base-active", |root| {
            for path in ["keep", "edit", "gone", "d/a", "d/sub/b", "e/x", "f/x/y", "g/1/2/3"] {
                write(&root.join(path), path);
            }
            fs::hard_link(root.join("d/a"), root.join("d/linked")).unwrap();
            symlink("keep", root.join("link")).unwrap();
            fs::set_permissions(root.join("keep"), Permissions::from_mode(0o4755)).unwrap();
            std::os::unix::fs::chown(root.join("edit"), Some(7), Some(8)).unwrap();
        });
        stage.overlay.commit("base", "base-active", CommitOptions::new()).unwrap();
        stage.overlay.prepare("a", Some("base"), Labels::new()).unwrap();
        stage
    }

    fn mount(&self, store: &Store, key: &str) -> (Guard, PathBuf) {
        let target = self.tmp.path().join("mnt");
        (store.activate(key, &target, &MountOptions::default()).unwrap(), target)
    }

    fn mounted<T>(&self, store: &Store, key: &str, see: impl FnOnce(&Path) -> T) -> T {
        let (mut guard, root) = self.mount(store, key);
        let seen = see(&root);
        guard.unmount().unwrap();
        seen
    }

    /// What both engines show, which must be the same.
    fn shown(&self, key: &str) -> Vec<String> {
        let by_fuse = self.mounted(&self.fuse, key, lines);
        let by_overlay = self.mounted(&self.overlay, key, lines);
        same(&by_fuse, &by_overlay);
        by_fuse
    }

    /// A committed snapshot shows this.
    #[track_caller]
    fn shows(&self, name: &str, lines: &[String]) {
        let view = format!("view-of-{name}");
        self.overlay.view(&view, Some(name), Labels::new()).unwrap();
        same(&self.shown(&view), lines);
    }

    fn exported(&self, key: &str) -> Vec<u8> {
        let mut tar = Vec::new();
        let options = ExportOptions::default();
        self.overlay.export(key, &mut tar, &options, &mut ignore_progress).unwrap();
        tar
    }

    /// A layer, unpacked onto the base, shows this.
    #[track_caller]
    fn shows_unpacked(&self, mut tar: &[u8], lines: &[String]) {
        let (options, labels) = (ApplyOptions::default(), Labels::new());
        let stop = &mut ignore_progress;
        self.overlay.apply("unpacked", Some("base"), &mut tar, &options, labels, stop).unwrap();
        self.shows("unpacked", lines);
    }

    fn changes(&self, key: &str) -> Vec<String> {
        let changes = self.fuse.changes(key, &mut ignore_progress).unwrap();
        changes.iter().map(ToString::to_string).collect()
    }
}

/// Only the lines that differ are worth reading.
#[track_caller]
fn same(one: &[String], other: &[String]) {
    let short = |line: &&String| line.chars().take(200).collect::<String>();
    let only = |of: &[String], not: &[String]| -> Vec<String> {
        of.iter().filter(|line| !not.contains(line)).map(|line| short(&line)).collect()
    };
    assert!(one == other, "{:#?}\nand not\n{:#?}", only(one, other), only(other, one));
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// The tree, with all xattrs that users see.
fn lines(root: &Path) -> Vec<String> {
    let mut lines = tree::lines(root, tree::Times::All);
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let mut names = vec![0; 4096];
        let n = rustix::fs::llistxattr(entry.path(), &mut names).unwrap();
        let mut names: Vec<_> = names[..n].split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
        names.sort();
        for name in names {
            let name = std::str::from_utf8(name).unwrap();
            let mut value = vec![0; 4096];
            let n = rustix::fs::lgetxattr(entry.path(), name, &mut value).unwrap();
            let path = entry.path().strip_prefix(root).unwrap();
            lines.push(format!("{path:?} {name} {:?}", &value[..n]));
        }
    }
    lines
}

/// One of the edits that engines make in turns.
fn edit(turn: usize, root: &Path) {
    let at = |name: &str| root.join(name);
    match turn {
        0 => {
            fs::write(at("edit"), "by turn 0").unwrap();
            fs::remove_file(at("gone")).unwrap();
            fs::remove_dir_all(at("e")).unwrap();
            fs::create_dir(at("e")).unwrap();
            write(&at("e/new"), "turn 0");
            rustix::fs::setxattr(at("keep"), "user.mine", b"0", XattrFlags::empty()).unwrap();
        }
        1 => {
            fs::write(at("gone"), "again").unwrap();
            fs::remove_dir_all(at("f")).unwrap();
            fs::write(at("f"), "a file now").unwrap();
            fs::hard_link(at("keep"), at("kept")).unwrap();
            fs::rename(at("edit"), at("e/edited")).unwrap();
            std::os::unix::fs::chown(at("e"), Some(70_000), Some(4_000_000_000)).unwrap();
        }
        2 => {
            fs::remove_file(at("f")).unwrap();
            write(&at("f/x/z"), "a directory again");
            fs::remove_file(at("e/new")).unwrap();
            let holes = File::create(at("holes")).unwrap();
            holes.write_all_at(b"end", 1 << 20).unwrap();
            rustix::fs::setxattr(at("g"), "user.dir", b"2", XattrFlags::empty()).unwrap();
            fs::set_permissions(at("g"), Permissions::from_mode(0o2750)).unwrap();
        }
        _ => {
            fs::remove_file(at("link")).unwrap();
            symlink("e/edited", at("link")).unwrap();
            File::open(at("d/sub/b")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
            fs::write(at("e/edited"), "at last").unwrap();
            fs::remove_dir_all(at("g")).unwrap();
        }
    }
}

fn in_turns(format: LayerFormat) {
    // By both in turns, and the other way round: the same comes out, but for times and inode counts.
    let mut seen = Vec::new();
    for first in [0, 1] {
        let stage = Stage::new(format);
        for turn in 0..4 {
            let store = if (turn + first) % 2 == 0 { &stage.overlay } else { &stage.fuse };
            let after = stage.mounted(store, "a", |root| {
                edit(turn, root);
                lines(root)
            });
            same(&stage.shown("a"), &after);
        }
        seen.push(stage.changes("a"));
        stage.fuse.commit("b", "a", CommitOptions::new()).unwrap();
        stage.fuse.view("v", Some("b"), Labels::new()).unwrap();
        stage.shown("v");
        assert_eq!(stage.fuse.check(&mut ignore_progress).unwrap().problems, []);
    }
    assert_eq!(seen[0], seen[1]);
}

fn rename_directories(root: &Path) {
    fs::rename(root.join("d"), root.join("renamed")).unwrap();
    fs::rename(root.join("g/1"), root.join("renamed/inside")).unwrap();
    write(&root.join("renamed/new"), "new");
}

fn renamed(format: LayerFormat) {
    let stage = Stage::new(format);
    let before = stage.mounted(&stage.fuse, "a", |root| {
        rename_directories(root);
        lines(root)
    });
    same(&stage.mounted(&stage.fuse, "a", lines), &before);
    same(&stage.mounted(&stage.overlay, "a", lines), &before);
    same(&stage.shown("a"), &before);
}

fn renamed_and_committed(format: LayerFormat) {
    let stage = Stage::new(format);
    let before = stage.mounted(&stage.fuse, "a", |root| {
        rename_directories(root);
        lines(root)
    });
    stage.overlay.commit("b", "a", CommitOptions::new()).unwrap();
    stage.shows("b", &before);
    stage.shows_unpacked(&stage.exported("b"), &before);
}

fn renamed_and_compared(format: LayerFormat) {
    let stage = Stage::new(format);
    let before = stage.mounted(&stage.fuse, "a", |root| {
        rename_directories(root);
        lines(root)
    });
    let usage = stage.fuse.usage("a").unwrap();
    let changes = stage.changes("a");
    for line in ["D /d", "A /renamed/sub/b", "A /renamed/inside/2/3", "D /g/1", "A /renamed/new"] {
        assert!(changes.iter().any(|change| change == line), "{line}: {changes:?}");
    }
    assert_eq!(stage.fuse.settle("a", &mut ignore_progress).unwrap(), usage);
    same(&stage.shown("a"), &before);
}

fn renamed_and_mounted(format: LayerFormat) {
    let stage = Stage::new(format);
    let (mut guard, root) = stage.mount(&stage.fuse, "a");
    rename_directories(&root);
    let e = stage.fuse.commit("b", "a", CommitOptions::new()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
    assert!(e.to_string().contains("unmount"), "{e}");
    let e = stage.overlay.changes("a", &mut ignore_progress).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
    let before = lines(&root);
    guard.unmount().unwrap();
    stage.fuse.commit("b", "a", CommitOptions::new()).unwrap();
    stage.fuse.view("v", Some("b"), Labels::new()).unwrap();
    same(&stage.shown("v"), &before);
}

/// Changes attributes and names of files, and no data.
fn change_attributes(root: &Path) {
    // One of two names of a file, of which nobody has asked for the other.
    fs::set_permissions(root.join("d/a"), Permissions::from_mode(0o604)).unwrap();
    fs::set_permissions(root.join("f/x/y"), Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(root.join("keep"), Some(11), None).unwrap();
    fs::rename(root.join("edit"), root.join("e/edited")).unwrap();
    fs::hard_link(root.join("gone"), root.join("f/gone")).unwrap();
    let set = |path: &str| {
        rustix::fs::setxattr(root.join(path), "user.k", b"v", XattrFlags::empty()).unwrap();
    };
    set("d/sub/b");
}

/// How many files of a snapshot's layer have their data in a lower one.
fn without_data(stage: &Stage, format: LayerFormat) -> usize {
    let snapshots = stage.tmp.path().join("store/snapshots");
    let key = match format {
        LayerFormat::OverlayTrusted => "trusted.overlay.metacopy",
        _ => "user.overlay.metacopy",
    };
    walkdir::WalkDir::new(snapshots)
        .into_iter()
        .map(Result::unwrap)
        .filter(|entry| {
            entry.file_type().is_file()
                && rustix::fs::lgetxattr(entry.path(), key, &mut [0; 8][..]).is_ok()
        })
        .count()
}

fn attributes(format: LayerFormat) {
    let stage = Stage::new(format);
    let before = stage.mounted(&stage.fuse, "a", |root| {
        change_attributes(root);
        lines(root)
    });
    assert!(without_data(&stage, format) >= 5);
    same(&stage.mounted(&stage.fuse, "a", lines), &before);
    same(&stage.mounted(&stage.overlay, "a", lines), &before);
    assert_eq!(without_data(&stage, format), 0);
    same(&stage.shown("a"), &before);
}

fn attributes_committed(format: LayerFormat) {
    let stage = Stage::new(format);
    let before = stage.mounted(&stage.fuse, "a", |root| {
        change_attributes(root);
        lines(root)
    });
    // Counting copies nothing.
    stage.fuse.usage("a").unwrap();
    assert!(without_data(&stage, format) >= 5);
    stage.overlay.commit("b", "a", CommitOptions::new()).unwrap();
    assert_eq!(without_data(&stage, format), 0);
    stage.shows("b", &before);
    stage.shows_unpacked(&stage.exported("b"), &before);
}

fn attributes_mounted(format: LayerFormat) {
    let stage = Stage::new(format);
    let (mut guard, root) = stage.mount(&stage.fuse, "a");
    change_attributes(&root);
    assert!(without_data(&stage, format) >= 5);
    let before = lines(&root);
    let changes = stage.changes("a");
    for line in [
        "M /d/a",
        "M /d/linked",
        "M /f/x/y",
        "D /edit",
        "A /e/edited",
        "A /f/gone",
        "M /keep",
        "M /d/sub/b",
    ] {
        assert!(changes.iter().any(|change| change == line), "{line}: {changes:?}");
    }
    assert_eq!(without_data(&stage, format), 0);
    let tar = stage.exported("a");
    same(&lines(&root), &before);
    stage.overlay.commit("b", "a", CommitOptions::new()).unwrap();
    // It is the layer's from now on, with its data.
    fs::set_permissions(root.join("e/x"), Permissions::from_mode(0o604)).unwrap();
    assert_eq!(without_data(&stage, format), 0);
    let after = lines(&root);
    guard.unmount().unwrap();
    stage.shows("b", &after);
    stage.shows_unpacked(&tar, &before);
}
