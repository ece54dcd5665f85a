//! The attributes of directories that an archive has no entry for.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::test_archive::*;
use super::*;
use crate::progress::ignore_progress;
use crate::sys::xattr::{self, Of};

fn unpack_with(bytes: &[u8], root: &Path, options: &ApplyOptions) -> Result<Applied> {
    apply_layer(bytes, root, LayerTarget::Tree, options, &mut ignore_progress)
}

fn mode(path: impl AsRef<Path>) -> u32 {
    path.as_ref().symlink_metadata().unwrap().mode() & 0o7777
}

#[test]
fn missing_parents_take_after_the_first_directory_that_has_them() {
    let below = [scratch(), scratch()];
    for (dir, mtime, modes) in [(&below[0], 3, [0o750, 0o500]), (&below[1], 4, [0o711, 0o711])] {
        let mut layer = Archive::new();
        layer.mtime = mtime;
        layer.pax("SCHILY.xattr.user.k", b"v").dir_mode("a", modes[0]);
        if mtime == 4 {
            layer.dir_mode("a/b", modes[1]).dir_mode("a/b/c", modes[1]);
        } else {
            layer.dir_mode("only", modes[1]);
        }
        unpack(&layer.finish(), dir.path(), LayerTarget::Tree).unwrap();
    }
    let tmp = scratch();
    let p = tmp.path();
    let mut options = options();
    options.parents = below.iter().map(|dir| dir.path().to_owned()).collect();
    unpack_with(&archive(&["a/b/c/d/file", "only/file"]), p, &options).unwrap();
    for (path, mtime, bits) in [
        ("a", 3, 0o750),
        ("a/b", 4, 0o711),
        ("a/b/c", 4, 0o711),
        ("a/b/c/d", 1_000_000_000, 0o755),
        ("only", 3, 0o500),
    ] {
        let m = p.join(path).metadata().unwrap();
        assert_eq!((m.mtime(), m.mode() & 0o7777), (mtime, bits), "{path}");
    }
    let dir = Dir::open(p).unwrap();
    let a = Name::new("a").unwrap();
    assert_eq!(xattr::get(Of::Child(&dir, &a), b"user.k").unwrap(), Some(b"v".to_vec()));
}

#[test]
fn what_the_parents_hide_lends_no_attributes() {
    for format in formats() {
        let (base, top) = (scratch(), scratch());
        let target = LayerTarget::Layer(format);
        let mut lower = Archive::new();
        for path in ["opaque", "opaque/hidden", "again", "again/hidden", "deleted"] {
            lower.dir_mode(path, 0o711);
        }
        unpack(&lower.finish(), base.path(), target).unwrap();
        let mut upper = Archive::new();
        upper.dir_mode("opaque", 0o700).entry("opaque/.wh..wh..opq");
        upper.dir_mode("again", 0o700).entry(".wh.again").entry(".wh.deleted");
        unpack(&upper.finish(), top.path(), target).unwrap();
        let mut options = options();
        options.parents = vec![top.path().to_owned(), base.path().to_owned()];
        let tmp = scratch();
        let layer = archive(&["opaque/hidden/f", "again/hidden/f", "deleted/f"]);
        apply_layer(&layer[..], tmp.path(), target, &options, &mut ignore_progress).unwrap();
        let modes = ["opaque", "opaque/hidden", "again", "again/hidden", "deleted"]
            .map(|path| mode(tmp.path().join(path)));
        assert_eq!(modes, [0o700, 0o755, 0o700, 0o755, 0o755], "{format}");
    }
}

#[test]
fn more_missing_parents_than_are_noted_get_their_attributes_on_the_way() {
    let below = scratch();
    let mut lower = Archive::new();
    for n in 0..200 {
        lower.dir_mode(&format!("d{n}"), 0o711).dir_mode(&format!("d{n}/e"), 0o500);
    }
    unpack(&lower.finish(), below.path(), LayerTarget::Tree).unwrap();
    let mut layer = Archive::new();
    for n in 0..200 {
        layer.file(&format!("d{n}/e/f"), b"").file(&format!("d{n}/new/g"), b"");
    }
    layer.dir_mode("d0", 0o700).dir_mode("d199", 0o700).file("d1/e/later", b"");
    let layer = layer.finish();
    let mut early = options();
    early.parents = vec![below.path().to_owned()];
    let mut late = options();
    let promise = Below::default();
    promise.are(vec![below.path().to_owned()]);
    late.below = Some(promise);
    let mut trees = Vec::new();
    for options in [early, late] {
        let tmp = scratch();
        unpack_with(&layer, tmp.path(), &options).unwrap();
        let modes = |name: &str| -> Vec<u32> {
            (0..200).map(|n| mode(tmp.path().join(format!("d{n}/{name}")))).collect()
        };
        assert_eq!(modes("e"), [0o500; 200]);
        assert_eq!(modes("new"), [0o755; 200]);
        let own = modes("");
        assert_eq!((own[0], &own[1..199], own[199]), (0o700, &[0o711; 198][..], 0o700));
        for n in 0..200 {
            let e = |root: &Path| fs::metadata(root.join(format!("d{n}/e"))).unwrap().mtime();
            assert_eq!(e(tmp.path()), e(below.path()));
        }
        trees.push(tree(tmp.path(), None));
    }
    assert_eq!(trees[0], trees[1]);
}

#[test]
fn missing_parents_inherit_no_access_control_list() {
    let below = scratch();
    unpack(&archive(&["d/known/"]), below.path(), LayerTarget::Tree).unwrap();
    let tmp = scratch();
    let mut layer = Archive::new();
    layer.pax("SCHILY.acl.default", b"user::rwx,group::---,other::---,user:7:rwx,mask::rwx");
    layer.dir("d").file("d/missing/f", b"").file("d/known/f", b"");
    let mut options = options();
    options.parents = vec![below.path().to_owned()];
    unpack_with(&layer.finish(), tmp.path(), &options).unwrap();
    for path in ["d/missing", "d/known"] {
        let dir = Dir::open(tmp.path().join(path)).unwrap();
        assert_eq!(xattr::list(Of::dir(&dir)).unwrap(), Vec::<Vec<u8>>::new(), "{path}");
        assert_eq!(mode(tmp.path().join(path)), 0o755, "{path}");
    }
}

#[test]
fn parents_are_not_looked_for_through_a_loop_of_links() {
    let below = scratch();
    unpack(&archive(&["d -> d"]), below.path(), LayerTarget::Tree).unwrap();
    let tmp = scratch();
    let mut options = options();
    options.parents = vec![below.path().to_owned()];
    unpack_with(&archive(&["d/f"]), tmp.path(), &options).unwrap();
    assert_eq!(mode(tmp.path().join("d")), 0o755);
}
