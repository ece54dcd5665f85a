//! Trees made of layers, and layers made of trees: what goes in comes out.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::error::{ErrorKind, Result};
use crate::layer::LayerFormat;
use crate::layer::marks;
use crate::layer::stack::{Branch, LayerStack};
use crate::path::Name;
use crate::progress::ignore_progress;
use crate::sys::dir::{self, Dir, Node};
use crate::sys::remove::remove_tree;
use crate::sys::stat::Time;
use crate::sys::xattr::{self, Of};

const FORMATS: [LayerFormat; 2] = [LayerFormat::OverlayUser, LayerFormat::Aufs];

/// Two layers, a tree, and a delta, in directories.
struct Room {
    tmp: tempfile::TempDir,
    format: LayerFormat,
}

impl Room {
    fn new(format: LayerFormat) -> Self {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        for dir in ["upper", "lower", "tree", "delta", "again"] {
            fs::create_dir(tmp.path().join(dir)).unwrap();
        }
        Room { tmp, format }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.tmp.path().join(path)
    }

    fn dir(&self, path: &str) -> Dir {
        Dir::open(self.path(path)).unwrap()
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn branch(&self, path: &str) -> Branch {
        Branch { dir: Arc::new(self.dir(path)), format: self.format }
    }

    fn stack(&self, layers: &[&str]) -> LayerStack {
        LayerStack::new(layers.iter().map(|layer| self.branch(layer)).collect())
    }

    fn materialise(&self, layers: &[&str], into: &str) {
        let into = self.dir(into);
        materialise(&self.stack(layers), self.format, &into, &mut ignore_progress).unwrap();
    }

    fn try_delta(&self, below: &[&str], since: Option<Time>) -> Result<()> {
        let (tree, below) = (self.branch("tree"), self.stack(below));
        write_delta(&tree, &below, since, &self.dir("delta"), &mut ignore_progress)
    }

    /// The delta of the tree, put back on what it was made from, shows the tree.
    #[track_caller]
    fn round_trip(&self, below: &[&str]) {
        self.try_delta(below, None).unwrap();
        let mut layers = vec!["delta"];
        layers.extend(below);
        self.materialise(&layers, "again");
        assert_eq!(describe(&self.path("again")), describe(&self.path("tree")), "{}", self.format);
    }
}

/// A line for each path, with all that must be the same.
fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(path) = dirs.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let (parent, name) = (path.parent().unwrap(), path.file_name().unwrap());
        let (parent, name) = (Dir::open(parent).unwrap(), Name::new(name.as_bytes()).unwrap());
        let content = if meta.is_dir() {
            dirs.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            String::new()
        } else if meta.is_file() {
            // Whatever its mode is.
            let mut contents = Vec::new();
            let mut file = parent.open_file_of_mode(&name, meta.mode() & 0o7777).unwrap();
            std::io::Read::read_to_end(&mut file, &mut contents).unwrap();
            format!("{contents:?}")
        } else if meta.is_symlink() {
            format!("{:?}", fs::read_link(&path).unwrap())
        } else {
            String::new()
        };
        let of = Of::Child(&parent, &name);
        let xattrs: Vec<_> = xattr::list(of)
            .unwrap()
            .into_iter()
            .map(|key| (String::from_utf8(key.clone()).unwrap(), xattr::get(of, &key).unwrap()))
            .collect();
        let relative = path.strip_prefix(root).unwrap();
        lines.push(format!(
            "{relative:?} {:o} {}:{} {:x} {} {}.{:09} {content} {xattrs:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.rdev(),
            if meta.is_dir() { 0 } else { meta.nlink() },
            meta.mtime(),
            meta.mtime_nsec(),
        ));
    }
    lines.sort();
    lines
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn set_mtime(path: &Path, secs: i64, nanos: u32) {
    let time = Time { secs, nanos };
    dir::set_times(File::open(path).unwrap(), time, time).unwrap();
}

/// Every kind of file that this process can make, with every attribute.
fn furnish(root: &Path) {
    let at = |path: &str| root.join(path);
    fs::create_dir_all(at("d/sub")).unwrap();
    fs::write(at("d/file"), "contents").unwrap();
    fs::hard_link(at("d/file"), at("d/sub/second")).unwrap();
    fs::hard_link(at("d/file"), at("third")).unwrap();
    symlink("../nowhere", at("d/link")).unwrap();
    let odd = OsStr::from_bytes(b"odd \xff\n'\"\\");
    fs::write(at("d").join(odd), "odd").unwrap();
    fs::write(at(&"n".repeat(255)), "long").unwrap();
    File::create(at("hole")).unwrap().set_len(256 << 10).unwrap();
    let dir = Dir::open(root).unwrap();
    let name = |text: &str| Name::new(text).unwrap();
    dir.make_node(&name("fifo"), Node::Fifo, 0o640).unwrap();
    dir.hard_link(&name("fifo"), &dir, &name("same-fifo")).unwrap();
    dir.make_node(&name("socket"), Node::Socket, 0o600).unwrap();
    let set = |path: &str, key: &str, value: &[u8]| {
        xattr::set(Of::Child(&dir, &name(path)), key.as_bytes(), value).unwrap();
    };
    set("third", "user.key", &[0, 255, 7]);
    // user::rw-, user:0:rw-, group::r--, mask::rw-, other::---
    let acl = [
        &[2, 0, 0, 0][..],
        &[1, 0, 6, 0, 255, 255, 255, 255],
        &[2, 0, 6, 0, 0, 0, 0, 0],
        &[4, 0, 4, 0, 255, 255, 255, 255],
        &[16, 0, 6, 0, 255, 255, 255, 255],
        &[32, 0, 0, 0, 255, 255, 255, 255],
    ]
    .concat();
    set("third", "system.posix_acl_access", &acl);
    set("d", "system.posix_acl_default", &acl);
    if is_root() {
        dir.make_node(&name("null"), Node::Char { major: 1, minor: 3 }, 0o666).unwrap();
        dir.make_node(&name("loop"), Node::Block { major: 7, minor: 0 }, 0o660).unwrap();
        for (path, owner) in [("third", 1000), ("d/link", 70_000), ("d", 4_000_000_000)] {
            std::os::unix::fs::lchown(at(path), Some(owner), Some(owner + 1)).unwrap();
        }
        fs::write(at("capable"), "x").unwrap();
        // Version 2, CAP_NET_RAW permitted and effective.
        let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        set("capable", "security.capability", &capability);
        set("capable", "trusted.key", b"y");
        dir.set_times_at(&name("null"), Time { secs: -1, nanos: 5 }, Time { secs: -1, nanos: 5 })
            .unwrap();
    }
    fs::set_permissions(at("third"), Permissions::from_mode(0o6751)).unwrap();
    fs::set_permissions(at("d/sub"), Permissions::from_mode(0o3511)).unwrap();
    fs::set_permissions(at("hole"), Permissions::from_mode(0o000)).unwrap();
    set_mtime(&at("third"), 1_000_000_000, 123_456_789);
    set_mtime(&at("d/sub"), 5, 1);
    set_mtime(&at("d"), 6, 2);
    set_mtime(root, 7, 3);
}

/// Modes are opened again, so that the directory can be removed.
fn unlock(room: &Room) {
    for path in ["lower/d/sub", "tree/d/sub", "delta/d/sub", "again/d/sub"] {
        if let Ok(meta) = fs::metadata(room.path(path)) {
            let mode = meta.permissions().mode() | 0o700;
            fs::set_permissions(room.path(path), Permissions::from_mode(mode)).unwrap();
        }
    }
}

#[test]
fn a_copy_has_everything_of_the_original() {
    for format in FORMATS {
        let room = Room::new(format);
        furnish(&room.path("lower"));
        room.materialise(&["lower"], "tree");
        assert_eq!(describe(&room.path("tree")), describe(&room.path("lower")), "{format}");
        let inode = |path: &str| fs::symlink_metadata(room.path(path)).unwrap().ino();
        assert_eq!(inode("tree/third"), inode("tree/d/sub/second"));
        assert_ne!(inode("tree/third"), inode("lower/third"));
        assert!(fs::metadata(room.path("tree/socket")).unwrap().file_type().is_socket());
        assert!(fs::symlink_metadata(room.path("tree/hole")).unwrap().blocks() < 64);
        unlock(&room);
    }
}

#[test]
fn a_tree_that_was_not_edited_says_nothing_beyond_its_layers() {
    for format in FORMATS {
        let room = Room::new(format);
        furnish(&room.path("lower"));
        room.materialise(&["lower"], "tree");
        room.try_delta(&["lower"], None).unwrap();
        assert_eq!(fs::read_dir(room.path("delta")).unwrap().count(), 0, "{format}");
        let counted =
            count_delta(&room.branch("tree"), &room.stack(&["lower"]), None, &mut ignore_progress);
        assert_eq!(counted.unwrap().inodes, 1);
        unlock(&room);
    }
}

#[test]
fn all_that_is_new_is_in_the_delta_with_everything() {
    for format in FORMATS {
        let room = Room::new(format);
        furnish(&room.path("tree"));
        room.round_trip(&["lower"]);
        unlock(&room);
    }
}

#[test]
fn marks_of_layers_are_carried_out_and_not_copied() {
    for format in FORMATS {
        let room = Room::new(format);
        for path in ["gone", "d/gone", "opaque/old", "replaced/x", "kept"] {
            room.file(&format!("lower/{path}"), "lower");
        }
        room.file("upper/opaque/new", "upper");
        room.file("upper/d/new", "upper");
        room.file("upper/replaced", "upper");
        marks::make_opaque(format, &room.dir("upper/opaque")).unwrap();
        for (dir, name) in [("upper", "gone"), ("upper/d", "gone")] {
            marks::make_whiteout(format, &room.dir(dir), &Name::new(name).unwrap()).unwrap();
        }
        room.materialise(&["upper", "lower"], "tree");
        let mut names: Vec<_> = describe(&room.path("tree"))
            .into_iter()
            .map(|line| line.split('"').nth(1).unwrap().to_owned())
            .collect();
        names.sort();
        assert_eq!(names, ["", "d", "d/new", "kept", "opaque", "opaque/new", "replaced"]);
        assert!(xattr::list(Of::dir(&room.dir("tree/opaque"))).unwrap().is_empty());
    }
}

#[test]
fn edits_of_every_kind_come_back() {
    for format in FORMATS {
        let room = Room::new(format);
        for path in ["edit", "mode", "touch", "gone", "d/a", "d/b", "e/x", "f/x/y", "g", "same/s"] {
            room.file(&format!("lower/{path}"), path);
        }
        room.materialise(&["lower"], "tree");
        let at = |path: &str| room.path("tree").join(path);
        fs::write(at("edit"), "edited").unwrap();
        fs::set_permissions(at("mode"), Permissions::from_mode(0o600)).unwrap();
        set_mtime(&at("touch"), 9, 0);
        fs::remove_file(at("gone")).unwrap();
        fs::remove_dir_all(at("d")).unwrap();
        fs::create_dir(at("d")).unwrap();
        fs::write(at("d/c"), "c").unwrap();
        fs::remove_dir_all(at("e")).unwrap();
        fs::remove_dir_all(at("f")).unwrap();
        fs::write(at("f"), "file").unwrap();
        fs::remove_file(at("g")).unwrap();
        fs::create_dir(at("g")).unwrap();
        fs::write(at("g/in"), "in").unwrap();
        fs::set_permissions(room.path("tree"), Permissions::from_mode(0o711)).unwrap();
        room.round_trip(&["lower"]);
        assert!(marks::is_opaque(format, &room.dir("delta/g")).unwrap(), "it was a file");
        assert!(!room.path("delta/same").exists(), "nothing in it has changed");
    }
}

#[test]
fn an_unchanged_name_of_a_changed_file_stays_the_same_file() {
    for format in FORMATS {
        let room = Room::new(format);
        room.file("lower/d/one", "x");
        room.file("lower/apart", "x");
        room.materialise(&["lower"], "tree");
        fs::hard_link(room.path("tree/d/one"), room.path("tree/two")).unwrap();
        room.round_trip(&["lower"]);
        let inode = |path: &str| fs::metadata(room.path(path)).unwrap().ino();
        assert_eq!(inode("delta/d/one"), inode("delta/two"));
        assert!(!room.path("delta/apart").exists());
    }
}

#[test]
fn what_a_layer_would_take_for_a_mark_is_refused() {
    if is_root() {
        let room = Room::new(LayerFormat::OverlayUser);
        let zero = Node::Char { major: 0, minor: 0 };
        room.dir("tree").make_node(&Name::new("zero").unwrap(), zero, 0).unwrap();
        let e = room.try_delta(&["lower"], None).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition, "{e}");
        assert!(e.to_string().contains("zero"), "{e}");
    }
    let room = Room::new(LayerFormat::Aufs);
    room.file("tree/.wh.x", "");
    let e = room.try_delta(&["lower"], None).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition, "{e}");
    // An xattr of the format's is dropped; another's is an xattr.
    let room = Room::new(LayerFormat::OverlayUser);
    room.file("tree/d/x", "");
    let set = |key: &[u8]| xattr::set(Of::dir(&room.dir("tree/d")), key, b"y").unwrap();
    set(b"user.overlay.opaque");
    set(b"user.fuseoverlayfs.opaque");
    room.try_delta(&["lower"], None).unwrap();
    let keys = xattr::list(Of::dir(&room.dir("delta/d"))).unwrap();
    assert_eq!(keys, [b"user.fuseoverlayfs.opaque".to_vec()]);
}

#[test]
fn depth_is_no_limit() {
    let room = Room::new(LayerFormat::Aufs);
    let name = Name::new("d").unwrap();
    let mut dir = room.dir("lower");
    for _ in 0..300 {
        dir.make_dir(&name, 0o700).unwrap();
        dir = dir.open_dir(&name).unwrap();
    }
    dir.create_file(&Name::new("f").unwrap(), 0o600).unwrap();
    dir.hard_link(&Name::new("f").unwrap(), &room.dir("lower"), &Name::new("top").unwrap())
        .unwrap();
    room.materialise(&["lower"], "tree");
    let mut dir = room.dir("tree");
    for _ in 0..300 {
        dir = dir.open_dir(&name).unwrap();
    }
    assert_eq!(dir.stat_at(&Name::new("f").unwrap()).unwrap().nlink, 2);
    room.try_delta(&[], None).unwrap();
    for top in ["lower", "tree", "delta"] {
        remove_tree(&room.dir(top), &name, &mut || Ok(())).unwrap();
    }
}

#[test]
fn what_has_not_changed_since_the_stamp_is_not_read() {
    let room = Room::new(LayerFormat::OverlayUser);
    for path in ["a/one", "b/one", "c/sub/one"] {
        room.file(&format!("lower/{path}"), "1");
        set_mtime(&room.path("lower").join(path), 5, 0);
    }
    room.materialise(&["lower"], "tree");
    let since = room.dir("tree").stat().unwrap().ctime;
    let later = || {
        // The clock has moved on when a change gets a later time.
        while {
            fs::set_permissions(room.path("again"), Permissions::from_mode(0o755)).unwrap();
            room.dir("again").stat().unwrap().ctime <= since
        } {}
    };
    later();
    // The same size and mtime, and other contents: by an edit, by directories that changed places, and
    // by one that a directory further up brought with it.
    fs::write(room.path("tree/a/one"), "2").unwrap();
    set_mtime(&room.path("tree/a/one"), 5, 0);
    fs::write(room.path("lower/b/one"), "3").unwrap();
    set_mtime(&room.path("lower/b/one"), 5, 0);
    fs::create_dir_all(room.path("tree/new/sub")).unwrap();
    fs::write(room.path("tree/new/sub/one"), "4").unwrap();
    set_mtime(&room.path("tree/new/sub/one"), 5, 0);
    fs::rename(room.path("tree/c"), room.path("tree/old")).unwrap();
    fs::rename(room.path("tree/new"), room.path("tree/c")).unwrap();
    room.try_delta(&["lower"], Some(since)).unwrap();
    assert_eq!(fs::read(room.path("delta/a/one")).unwrap(), b"2");
    assert_eq!(fs::read(room.path("delta/c/sub/one")).unwrap(), b"4");
    assert_eq!(fs::read(room.path("delta/old/sub/one")).unwrap(), b"1");
    // Which shows that it was not read: nobody edits a layer.
    assert!(!room.path("delta/b/one").exists());
}

#[test]
fn a_callback_stops_both_ways() {
    let room = Room::new(LayerFormat::Aufs);
    for i in 0..10 {
        room.file(&format!("lower/{i}"), "x");
        room.file(&format!("tree/{i}"), "y");
    }
    for k in 0..10 {
        let mut reports = 0;
        let mut stop = |_| {
            reports += 1;
            if reports > k { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let into = room.dir("again");
        let e = materialise(&room.stack(&["lower"]), room.format, &into, &mut stop).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Cancelled, "{e}");
        fs::remove_dir_all(room.path("again")).unwrap();
        fs::create_dir(room.path("again")).unwrap();
    }
    let stop = &mut |_| ControlFlow::Break(());
    let below = room.stack(&["lower"]);
    let e = write_delta(&room.branch("tree"), &below, None, &room.dir("delta"), stop).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Cancelled, "{e}");
}
