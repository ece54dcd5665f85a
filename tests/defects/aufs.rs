//! Uppers in the format of AUFS: marks are files, and names that look like them are refused.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::path::Path;

use rustix::fs::{FileType, RenameFlags};
use rustix::io::Errno;

use crate::support::calls::{self, names, read, write};
use crate::support::fuse_union::{Stage, mode};
use crate::support::whole_tree;

pub const TESTS: &[(&str, fn())] = &[
    ("whiteouts_and_opaque_marks_are_files", marks),
    ("marks_of_a_lower_are_honoured_and_hidden", lower_marks),
    ("names_like_marks_are_refused", refused),
    ("names_have_251_bytes_or_255_where_nothing_is_hidden", limits),
    ("renames_onto_whiteouts_stay", rename_onto_whiteout),
    ("recreated_directories_are_empty", recreated),
    ("lower_directories_are_copied_not_renamed", renamed_directories),
    ("attributes_survive", attributes),
    ("overlay_marks_are_xattrs_and_devices", overlay_marks),
    ("exchange_and_noreplace", rename_flags),
];

/// Whether there is a whiteout of this name in the upper, as AUFS has it.
fn whited_out(dir: &Path, name: &str) -> bool {
    let mark = dir.join(format!(".wh.{name}"));
    mark.symlink_metadata().is_ok_and(|meta| meta.is_file() && meta.len() == 0)
}

/// No mark of overlayfs is in an AUFS upper.
#[track_caller]
fn has_no_overlay_marks(stage: &Stage) {
    for entry in walkdir::WalkDir::new(stage.upper("")) {
        let entry = entry.unwrap();
        assert!(!entry.file_type().is_char_device(), "{}", entry.path().display());
        let xattrs = whole_tree::xattrs(entry.path());
        assert!(!xattrs.iter().any(|xattr| xattr.starts_with("trusted.overlay")), "{xattrs:?}");
    }
}

fn marks() {
    let stage = Stage::aufs(1);
    fs::create_dir_all(stage.lower("d/sub")).unwrap();
    for name in ["f", "d/f", "d/sub/f"] {
        write(&stage.lower(name), "low");
    }
    let union = stage.mount();
    fs::remove_file(union.join("f")).unwrap();
    fs::remove_dir_all(union.join("d/sub")).unwrap();
    fs::create_dir(union.join("d/sub")).unwrap();
    write(&union.join("d/sub/new"), "new");
    fs::remove_file(union.join("d/f")).unwrap();
    assert!(whited_out(&stage.upper(""), "f"));
    assert!(whited_out(&stage.upper("d"), "f"));
    assert!(stage.upper("d/sub/.wh..wh..opq").is_file());
    assert_eq!(names(union.path()), ["d"]);
    assert_eq!(names(&union.join("d")), ["sub"]);
    assert_eq!(names(&union.join("d/sub")), ["new"]);
    stage.survives(union);
    has_no_overlay_marks(&stage);
    let union = stage.mount();
    write(&union.join("f"), "again");
    assert!(!whited_out(&stage.upper(""), "f"));
    stage.survives(union);
}

fn lower_marks() {
    let stage = Stage::aufs(2);
    let bottom = &stage.lowers[1];
    for dir in ["opaque/sub", "gone/sub"] {
        fs::create_dir_all(bottom.join(dir)).unwrap();
        write(&bottom.join(dir).join("f"), "low");
    }
    for name in ["a", "b", "opaque/hidden"] {
        write(&bottom.join(name), "low");
    }
    fs::create_dir_all(stage.lower("opaque/sub")).unwrap();
    for mark in [".wh.a", ".wh.gone", "opaque/.wh..wh..opq", ".wh..wh.aufs"] {
        write(&stage.lower(mark), "");
    }
    fs::create_dir(stage.lower(".wh..wh.plnk")).unwrap();
    let union = stage.mount();
    assert_eq!(names(union.path()), ["b", "opaque"]);
    assert_eq!(names(&union.join("opaque")), ["sub"]);
    assert_eq!(names(&union.join("opaque/sub")), [""; 0]);
    for name in ["a", ".wh.a", "opaque/.wh..wh..opq", "opaque/hidden", ".wh..wh.plnk", "gone/sub"] {
        let stat = rustix::fs::lstat(union.join(name)).map(drop);
        assert_eq!(stat, Err(Errno::NOENT), "{name}");
    }
    write(&union.join("a"), "again");
    fs::create_dir(union.join("gone")).unwrap();
    assert_eq!(names(&union.join("gone")), [""; 0]);
    stage.survives(union);
}

fn refused() {
    let stage = Stage::aufs(1);
    for name in ["foo", "bar"] {
        write(&stage.lower(name), "low");
    }
    let union = stage.mount();
    for name in [".wh.foo", ".wh..wh..opq", ".wh.new", ".wh."] {
        let path = union.join(name);
        let results = [
            ("create", calls::open(&path, rustix::fs::OFlags::CREATE).map(drop)),
            ("mkdir", calls::mkdir(&path, 0o755)),
            ("symlink", rustix::fs::symlink("x", &path)),
            ("mknod", calls::mknod(&path, FileType::Fifo, 0o600, 0)),
            ("link", rustix::fs::link(union.join("bar"), &path)),
            ("rename", calls::rename(&union.join("bar"), &path, RenameFlags::empty())),
        ];
        for (what, result) in results {
            assert!(
                matches!(result, Err(Errno::PERM | Errno::INVAL | Errno::ACCESS)),
                "{what} {name}: {result:?}"
            );
        }
        assert_eq!(rustix::fs::lstat(&path).map(drop), Err(Errno::NOENT), "{name}");
    }
    assert_eq!(names(union.path()), ["bar", "foo"]);
    stage.survives(union);
}

fn limits() {
    let stage = Stage::aufs(1);
    let low = "l".repeat(251);
    write(&stage.lower(&low), "low");
    let union = stage.mount();
    fs::remove_file(union.join(&low)).unwrap();
    assert!(whited_out(&stage.upper(""), &low));
    write(&union.join("n".repeat(251)), "new");
    // One that could not be hidden later is refused now, or kept; it is not lost.
    for length in [252, 255] {
        let path = union.join("n".repeat(length));
        match calls::open(&path, rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY) {
            Ok(_) => assert_eq!(read(&path), ""),
            Err(e) => assert_eq!(e, Errno::NAMETOOLONG, "{length}"),
        }
    }
    let long = calls::mkdir(&union.join("n".repeat(256)), 0o755);
    assert_eq!(long, Err(Errno::NAMETOOLONG));
    stage.survives(union);
}

fn rename_onto_whiteout() {
    let stage = Stage::aufs(1);
    for name in ["a", "b", "c"] {
        write(&stage.lower(name), format!("low {name}"));
    }
    let union = stage.mount();
    fs::remove_file(union.join("a")).unwrap();
    write(&union.join("new"), "new");
    fs::rename(union.join("new"), union.join("a")).unwrap();
    fs::remove_file(union.join("b")).unwrap();
    fs::rename(union.join("c"), union.join("b")).unwrap();
    stage.survives(union);
    let union = stage.mount();
    assert_eq!(names(union.path()), ["a", "b"]);
    assert_eq!((read(&union.join("a")), read(&union.join("b"))), ("new".into(), "low c".into()));
    fs::remove_file(union.join("a")).unwrap();
    assert_eq!(names(union.path()), ["b"]);
    stage.survives(union);
    assert_eq!(names(stage.mount().path()), ["b"]);
}

fn recreated() {
    let stage = Stage::aufs(1);
    for dir in ["d/sub", "p/d/sub", "x"] {
        fs::create_dir_all(stage.lower(dir)).unwrap();
        write(&stage.lower(dir).join("old"), "old");
    }
    let union = stage.mount();
    fs::remove_dir_all(union.join("d")).unwrap();
    fs::create_dir(union.join("d")).unwrap();
    fs::remove_dir_all(union.join("p/d")).unwrap();
    fs::create_dir_all(union.join("p/d/sub")).unwrap();
    fs::remove_dir_all(union.join("x")).unwrap();
    write(&union.join("x"), "a file");
    fs::remove_file(union.join("x")).unwrap();
    fs::create_dir(union.join("made")).unwrap();
    fs::rename(union.join("made"), union.join("x")).unwrap();
    let check = |at: &Path| {
        assert_eq!(names(&at.join("d")), [""; 0]);
        assert_eq!(names(&at.join("p/d/sub")), [""; 0]);
        assert_eq!(names(&at.join("x")), [""; 0]);
    };
    check(union.path());
    stage.survives(union);
    check(stage.mount().path());
    has_no_overlay_marks(&stage);
}

/// The format has no redirects: who renames is told to copy.
fn renamed_directories() {
    let stage = Stage::aufs(1);
    fs::create_dir_all(stage.lower("d/sub")).unwrap();
    write(&stage.lower("d/f"), "low");
    let union = stage.mount();
    let moved = fs::rename(union.join("d"), union.join("e"));
    assert_eq!(moved.unwrap_err().raw_os_error(), Some(18));
    assert_eq!(names(union.path()), ["d"]);
    let status =
        std::process::Command::new("mv").args([union.join("d"), union.join("e")]).status().unwrap();
    assert!(status.success());
    assert_eq!((names(union.path()), read(&union.join("e/f"))), (vec!["e".into()], "low".into()));
    // One of the upper alone is renamed.
    fs::create_dir(union.join("new")).unwrap();
    write(&union.join("new/f"), "f");
    fs::rename(union.join("new"), union.join("newer")).unwrap();
    stage.survives(union);
    has_no_overlay_marks(&stage);
}

fn attributes() {
    let stage = Stage::aufs(1);
    fs::create_dir(stage.lower("d")).unwrap();
    write(&stage.lower("d/f"), "low");
    symlink("target", stage.lower("link")).unwrap();
    mode(&stage.lower("d"), 0o2750);
    mode(&stage.lower("d/f"), 0o4711);
    for path in ["d", "d/f"] {
        calls::set_xattr(&stage.lower(path), "user.k", b"v").unwrap();
        calls::set_xattr(&stage.lower(path), calls::ACCESS, &calls::acl(7, 5, 4, 5, 5, 0)).unwrap();
        calls::set_mtime(&stage.lower(path), -5, 5);
    }
    let union = stage.mount();
    let before = whole_tree::lines(union.path());
    calls::set_mtime(&union.join("d/f"), -5, 5);
    calls::set_mtime(&union.join("d"), -5, 5);
    whole_tree::assert_same("copied up", &before, &whole_tree::lines(union.path()));
    calls::chown(&union.join("link"), 5, 5);
    calls::mknod(&union.join("null"), FileType::CharacterDevice, 0o666, rustix::fs::makedev(1, 3))
        .unwrap();
    let mut file = File::options().append(true).open(union.join("d/f")).unwrap();
    file.write_all(b" and more").unwrap();
    drop(file);
    stage.survives(union);
}

fn overlay_marks() {
    let stage = Stage::aufs(2);
    fs::create_dir(stage.lower("d")).unwrap();
    fs::create_dir(stage.lowers[1].join("d")).unwrap();
    write(&stage.lowers[1].join("d/f"), "low");
    let opaque = "trusted.overlay.opaque";
    calls::set_xattr(&stage.lower("d"), opaque, b"y").unwrap();
    let union = stage.mount();
    assert_eq!(names(&union.join("d")), ["f"]);
    assert_eq!(calls::get_xattr(&union.join("d"), opaque).unwrap(), b"y");
    calls::set_xattr(&union.join("d"), opaque, b"x").unwrap();
    calls::set_xattr(&union.join("d/f"), "trusted.overlay.redirect", b"/x").unwrap();
    assert_eq!(calls::get_xattr(&union.join("d"), opaque).unwrap(), b"x");
    stage.survives(union);
    assert_eq!(names(&stage.mount().join("d")), ["f"]);
}

fn rename_flags() {
    let stage = Stage::aufs(1);
    for name in ["a", "b", "gone"] {
        write(&stage.lower(name), format!("low {name}"));
    }
    let union = stage.mount();
    let [a, b, gone] = ["a", "b", "gone"].map(|name| union.join(name));
    fs::remove_file(&gone).unwrap();
    calls::rename(&a, &b, RenameFlags::EXCHANGE).unwrap();
    assert_eq!((read(&a), read(&b)), ("low b".into(), "low a".into()));
    assert_eq!(calls::rename(&a, &b, RenameFlags::NOREPLACE), Err(Errno::EXIST));
    calls::rename(&a, &gone, RenameFlags::NOREPLACE).unwrap();
    assert_eq!(names(union.path()), ["b", "gone"]);
    stage.survives(union);
    let union = stage.mount();
    assert_eq!(names(union.path()), ["b", "gone"]);
    assert_eq!(read(&union.join("gone")), "low b");
}
