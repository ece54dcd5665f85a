//! Tests of whiteouts and opaque directories: every order of the same entries gives the same.

use std::collections::BTreeMap;

use super::test_archive::*;
use super::*;

fn expected(lines: Lines<'_>) -> BTreeMap<String, String> {
    lines.iter().map(|(path, what)| ((*path).to_owned(), (*what).to_owned())).collect()
}

/// Paths, and what is there.
type Lines<'a> = &'a [(&'a str, &'a str)];

/// Entries whose order must not matter, and the layer they make.
const LAYERS: &[(&[&str], Lines<'_>)] = &[
    (&[".wh.x"], &[("x", "deleted")]),
    (&["d/.wh.x"], &[("d", "dir"), ("d/x", "deleted")]),
    (&["d/", "d/.wh.x"], &[("d", "dir"), ("d/x", "deleted")]),
    (&[".wh.x", "x"], &[("x", "x")]),
    (&[".wh.x", "x -> y"], &[("x", "-> y")]),
    (&[".wh.x", "x/"], &[("x", "opaque")]),
    (&[".wh.x", "x/", "x/f"], &[("x", "opaque"), ("x/f", "x/f")]),
    (&[".wh.x", "x/f"], &[("x", "opaque"), ("x/f", "x/f")]),
    (&[".wh.x", "x/.wh.y"], &[("x", "deleted")]),
    (&[".wh.x", "x/.wh..wh..opq"], &[("x", "deleted")]),
    (&[".wh.x", "x/.wh..wh..opq", "x/y/.wh.z"], &[("x", "deleted")]),
    (&[".wh.x", "x/.wh.y", "x/f"], &[("x", "opaque"), ("x/f", "x/f")]),
    (&["d/.wh..wh..opq"], &[("d", "opaque")]),
    (&["d/.wh..wh..opq", "d/", "d/f"], &[("d", "opaque"), ("d/f", "d/f")]),
    (&["d/.wh..wh..opq", "d/.wh.f", "d/f"], &[("d", "opaque"), ("d/f", "d/f")]),
    (&["d/.wh..wh..opq", "d/.wh.g", "d/"], &[("d", "opaque")]),
    (&["d/.wh..wh..opq", "d/e/.wh.g", "d/"], &[("d", "opaque")]),
    (&["d/.wh..wh..opq", "d/e/.wh.g", "d/e/", "d/"], &[("d", "opaque"), ("d/e", "dir")]),
    (&["d/.wh..wh..opq", "d/e/.wh..wh..opq", "d/"], &[("d", "opaque")]),
    // A mark through a symlink of this layer.
    (&["l -> d", "d/", "d/.wh.x"], &[("l", "-> d"), ("d", "dir"), ("d/x", "deleted")]),
];

#[test]
fn marks_mean_lower_layers_only_in_any_order() {
    for format in formats() {
        for (entries, layer) in LAYERS {
            for order in orders(entries) {
                let tmp = scratch();
                let target = LayerTarget::Layer(format);
                let applied = unpack(&archive(&order), tmp.path(), target).unwrap();
                let found = tree(tmp.path(), Some(format));
                assert_eq!(found, expected(layer), "{format} {order:?}");
                let marks = layer.iter().any(|(_, what)| matches!(*what, "deleted" | "opaque"));
                assert!(applied.has_marks || !marks, "{format} {order:?}");
            }
        }
    }
}

/// Entries in their order, and the layer they make.
const SEQUENCES: &[(&[&str], Lines<'_>)] = &[
    (&["x", "x/"], &[("x", "opaque")]),
    (&["x -> y", "x/"], &[("x", "opaque")]),
    (&["x/", "x/f", "x", "x/"], &[("x", "opaque")]),
    (&["x/", "x/f", "x"], &[("x", "x")]),
    (&["x/", "x/f", "x/"], &[("x", "dir"), ("x/f", "x/f")]),
    (&["x/", "x/f", "x -> /"], &[("x", "-> /")]),
    (&["x", "x"], &[("x", "x")]),
    (&["d/.wh..wh..opq", "d", "d/"], &[("d", "opaque")]),
    (&["x", "x/.wh.y"], &[("x", "x")]),
    (&["l -> d", "d/", "l/.wh.x"], &[("l", "-> d"), ("d", "dir"), ("d/x", "deleted")]),
    // Nothing of this layer is at the end of the link: it is made, as for any entry.
    (&["l -> d/e", "l/f"], &[("l", "-> d/e"), ("d", "dir"), ("d/e", "dir"), ("d/e/f", "l/f")]),
    (&["l -> gone/../d", "l/f"], &[("l", "-> gone/../d"), ("d", "dir"), ("d/f", "l/f")]),
    // The link that led here is the directory itself now.
    (&["b -> .", "b/b/", "b/b/b/"], &[("b", "opaque"), ("b/b", "dir"), ("b/b/b", "dir")]),
    // What was missing on the way is there now, and leads elsewhere.
    (
        &["l -> gone/..", "l/gone -> a/b", "l/f"],
        &[("l", "-> gone/.."), ("gone", "-> a/b"), ("a", "dir"), ("a/f", "l/f")],
    ),
];

#[test]
fn what_takes_the_place_of_something_else_hides_what_that_hid() {
    for format in formats() {
        for (entries, layer) in SEQUENCES {
            let tmp = scratch();
            unpack(&archive(entries), tmp.path(), LayerTarget::Layer(format)).unwrap();
            assert_eq!(tree(tmp.path(), Some(format)), expected(layer), "{format} {entries:?}");
        }
    }
}

#[test]
fn an_opaque_root_is_marked() {
    for format in formats() {
        let tmp = scratch();
        let layer = archive(&[".wh.x", ".wh..wh..opq", "f"]);
        unpack(&layer, tmp.path(), LayerTarget::Layer(format)).unwrap();
        assert!(marks::is_opaque(format, &Dir::open(tmp.path()).unwrap()).unwrap());
        assert_eq!(tree(tmp.path(), Some(format)), expected(&[("f", "f")]));
    }
}

/// What is there, entries whose order must not matter, and the tree they leave.
type Case<'a> = (&'a [&'a str], &'a [&'a str], Lines<'a>);

const TREES: &[Case<'_>] = &[
    (&["x", "y"], &[".wh.x"], &[("y", "y")]),
    (&["x/", "x/y", "z"], &[".wh.x"], &[("z", "z")]),
    (&["x -> y", "y"], &[".wh.x"], &[("y", "y")]),
    (&["y"], &[".wh.x", "gone/.wh.x", "y/.wh.z"], &[("y", "y")]),
    (&["x/", "x/old"], &[".wh.x", "x/", "x/new"], &[("x", "dir"), ("x/new", "x/new")]),
    (&["x/", "x/old"], &[".wh.x", "x/new"], &[("x", "dir"), ("x/new", "x/new")]),
    (&["x/", "x/old"], &[".wh.x", "x"], &[("x", "x")]),
    (&["x/", "x/a", "x/b"], &["x/.wh.a"], &[("x", "dir"), ("x/b", "x/b")]),
    (&["x/", "x/a"], &["x/.wh.a", ".wh.x"], &[]),
    (
        &["d/", "d/a", "d/e/", "d/e/old", "d/e/f/", "d/l -> a"],
        &["d/.wh..wh..opq", "d/new", "d/e/new"],
        &[("d", "dir"), ("d/new", "d/new"), ("d/e", "dir"), ("d/e/new", "d/e/new")],
    ),
    (
        &["d -> e", "e/", "e/old"],
        &["d/.wh..wh..opq", "e/new"],
        &[("d", "-> e"), ("e", "dir"), ("e/new", "e/new")],
    ),
    (&["a", "d/", "d/b"], &[".wh..wh..opq", "c"], &[("c", "c")]),
    (&["c/a/a"], &["c/a/", ".wh.c"], &[("c", "dir"), ("c/a", "dir")]),
    (&["c/a/a", "c/c/a"], &["c/a/", ".wh.c"], &[("c", "dir"), ("c/a", "dir")]),
];

#[test]
fn in_a_tree_whiteouts_delete_what_was_there_before() {
    for (before, entries, after) in TREES {
        for order in orders(entries) {
            let tmp = scratch();
            unpack(&archive(before), tmp.path(), LayerTarget::Tree).unwrap();
            unpack(&archive(&order), tmp.path(), LayerTarget::Tree).unwrap();
            assert_eq!(tree(tmp.path(), None), expected(after), "{before:?} {order:?}");
        }
    }
}

#[test]
fn a_tree_remade_around_its_new_content_has_nothing_of_the_old() {
    for order in orders(&[".wh.x", "x/new"]) {
        let tmp = scratch();
        let mut old = Archive::new();
        old.dir_mode("x", 0o2700).file("x/old", b"");
        unpack(&old.finish(), tmp.path(), LayerTarget::Tree).unwrap();
        unpack(&archive(&order), tmp.path(), LayerTarget::Tree).unwrap();
        let stat = Dir::open(tmp.path().join("x")).unwrap().stat().unwrap();
        assert_eq!((stat.mode, stat.mtime.secs), (0o755, 1_000_000_000), "{order:?}");
    }
}

#[test]
fn marks_of_nothing_and_marks_with_content_are_invalid() {
    let mut with_content = Archive::new();
    with_content.file(".wh.x", b"content");
    let mut as_dir = Archive::new();
    as_dir.dir(".wh.x");
    let mut as_link = Archive::new();
    as_link.symlink("d/.wh..wh..opq", "x");
    let mut zero = Archive::new();
    zero.header_with_device("x", b'3', 0, "", (0, 0));
    let mut all: Vec<Vec<u8>> =
        [with_content, as_dir, as_link, zero].iter().map(Archive::finish).collect();
    for entry in [".wh.", ".wh..", ".wh...", "d/.wh.", ".wh.x/y", ".wh..wh..opq/y", "l = .wh.x"] {
        all.push(archive(&[".wh.x", "l -> .wh.x", entry]));
    }
    all.push(archive(&["l -> .wh.x", "l/f"]));
    for bytes in all {
        let mut targets = vec![LayerTarget::Tree];
        targets.extend(formats().into_iter().map(LayerTarget::Layer));
        for target in targets {
            let tmp = scratch();
            let e = unpack(&bytes, tmp.path(), target).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{target:?}: {e}");
            assert!(e.path().is_some(), "{e}");
        }
    }
}

#[test]
fn whiteouts_may_be_hard_links_as_aufs_wrote_them() {
    for format in formats() {
        let tmp = scratch();
        let mut layer = Archive::new();
        layer.file(".wh..wh.aufs", b"").link(".wh.x", ".wh..wh.aufs");
        layer.dir(".wh..wh.orph").file(".wh..wh.orph/f", b"f");
        unpack(&layer.finish(), tmp.path(), LayerTarget::Layer(format)).unwrap();
        assert_eq!(tree(tmp.path(), Some(format)), expected(&[("x", "deleted")]), "{format}");
    }
}

#[test]
fn links_into_the_hidden_directory_of_aufs_are_served_and_it_is_gone() {
    let mut targets = vec![LayerTarget::Tree];
    targets.extend(formats().into_iter().map(LayerTarget::Layer));
    for target in targets {
        let tmp = scratch();
        let mut layer = Archive::new();
        layer.dir(".wh..wh.plnk").file(".wh..wh.plnk/7.5", b"linked");
        layer.file(".wh..wh.plnk/8.5", b"never linked");
        layer.entry(".wh..wh..opq").link("d/a", ".wh..wh.plnk/7.5").link("b", "/.wh..wh.plnk/7.5");
        layer.dir("./");
        unpack(&layer.finish(), tmp.path(), target).unwrap();
        let names: Vec<_> = std::fs::read_dir(tmp.path()).unwrap().collect();
        assert!(names.len() <= 3, "{names:?}");
        let stat = |path: &str| {
            use std::os::unix::fs::MetadataExt;
            let m = tmp.path().join(path).metadata().unwrap();
            (m.ino(), m.nlink(), m.mtime())
        };
        assert_eq!(stat("d/a"), stat("b"));
        assert_eq!(stat("b").1, 2);
        assert_eq!(std::fs::read(tmp.path().join("b")).unwrap(), b"linked");
        assert_eq!(stat("").2, 1_000_000_000);

        let e = unpack(&archive(&["a = .wh..wh.plnk/9.9"]), tmp.path(), target).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArchive);

        // One that is called as a mark is none there.
        let tmp = scratch();
        let entries = [".wh.x", ".wh..wh.plnk/.wh.k", ".wh..wh..opq", "a = .wh..wh.plnk/.wh.k"];
        unpack(&archive(&entries), tmp.path(), target).unwrap();
        assert!(tmp.path().join("a").exists(), "{target:?}");
    }
}
