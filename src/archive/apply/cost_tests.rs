//! Archives that ask for more work than they have bytes: what was done once is not done again, and
//! no path leads on for ever. Work is told by what it does to a name that appears meanwhile, since
//! clocks tell nothing.

use std::fs;
use std::ops::ControlFlow;

use super::test_archive::*;
use super::*;

/// Unpacks, and makes a file when the reader comes to the entry with this number.
fn with_intruder(entries: &[&str], root: &Path, target: LayerTarget, at: u64, intruder: &str) {
    let path = root.join(intruder);
    let mut made = false;
    apply_layer(&archive(entries)[..], root, target, &options(), &mut |report| {
        if report.phase == Phase::Apply && report.entries == at && !made {
            fs::write(&path, "").unwrap();
            made = true;
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(path.exists(), "{target:?}: {entries:?}");
}

#[test]
fn a_directory_of_a_tree_is_emptied_once_however_many_marks_it_has() {
    for marks in [
        ["d/.wh..wh..opq", "d/.wh..wh..opq"],
        ["d/.wh..wh..opq", "d/e/.wh..wh..opq"],
        ["d/.wh..wh..opq", "d/.wh.e"],
        ["d/e/.wh..wh..opq", "d/.wh..wh..opq"],
        [".wh.d", ".wh.d"],
        [".wh.d", "d/.wh..wh..opq"],
        [".wh..wh..opq", ".wh.d"],
    ] {
        let tmp = scratch();
        unpack(&archive(&["d/e/old", "d/old"]), tmp.path(), LayerTarget::Tree).unwrap();
        let entries = ["d/e/new", marks[0], marks[1]];
        with_intruder(&entries, tmp.path(), LayerTarget::Tree, 3, "d/e/intruder");
        assert!(!tmp.path().join("d/e/old").exists(), "{marks:?}");
    }
}

#[test]
fn a_directory_of_a_layer_is_swept_once_however_many_marks_it_has() {
    for marks in [
        ["d/.wh..wh..opq", "d/e/.wh..wh..opq"],
        ["d/e/.wh..wh..opq", "d/.wh..wh..opq"],
        ["d/.wh..wh..opq", ".wh.d"],
        [".wh..wh..opq", "d/.wh..wh..opq"],
    ] {
        let tmp = scratch();
        let target = LayerTarget::Layer(LayerFormat::Aufs);
        with_intruder(&["d/e/new", marks[0], marks[1]], tmp.path(), target, 3, "d/e/.wh.intruder");
    }
}

#[test]
fn links_cannot_make_a_tree_deeper_than_paths_are_long() {
    let mut layer = Archive::new();
    let deep = vec!["d"; 1000].join("/");
    layer.pax("linkpath", deep.as_bytes()).symlink("l", "x");
    // Each leads a thousand further down.
    let mut path = "l".to_owned();
    for _ in 0..3 {
        let link = format!("{path}/l");
        layer.pax("linkpath", deep.as_bytes()).symlink(&link, "x");
        path = link;
    }
    layer.file(&format!("{path}/f"), b"");
    for target in [LayerTarget::Tree, LayerTarget::Layer(LayerFormat::Aufs)] {
        let tmp = scratch();
        let e = unpack(&layer.finish(), tmp.path(), target).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded, "{e}");
        assert!(e.to_string().contains("max_path_bytes"), "{e}");
        let root = Dir::open(tmp.path()).unwrap();
        let name = Name::new("d").unwrap();
        crate::sys::remove::remove_tree(&root, &name, &mut || Ok(())).unwrap();
    }
}

#[test]
fn links_that_go_to_and_fro_are_walked_only_so_far() {
    let mut layer = Archive::new();
    layer.dir("d").symlink("d/0", "..");
    layer.pax("linkpath", "d/../".repeat(680).as_bytes()).symlink("l", "x");
    let hops = |n: usize| vec!["l"; n].join("/");
    layer.file(&format!("{}/near", hops(2)), b"");
    let mut far = layer.clone();
    far.file(&format!("{}/far", hops(30)), b"");
    let tmp = scratch();
    unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
    assert!(tmp.path().join("near").exists());
    let e = unpack(&far.finish(), tmp.path(), LayerTarget::Tree).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{e}");
}
