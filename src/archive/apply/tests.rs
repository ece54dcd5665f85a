//! Tests of what is made: attributes, replacement, links, holes, bounds, damage.

use std::fs;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::test_archive::*;
use super::*;
use crate::compression::{Compression, Compressor};
use crate::digest::Digest;
use crate::progress::ignore_progress;
use crate::sys::xattr::{self, Of};

fn unpack_with(bytes: &[u8], root: &Path, options: &ApplyOptions) -> Result<Applied> {
    apply_layer(bytes, root, LayerTarget::Tree, options, &mut ignore_progress)
}

fn mode(path: impl AsRef<Path>) -> u32 {
    path.as_ref().symlink_metadata().unwrap().mode() & 0o7777
}

#[test]
fn every_kind_gets_what_its_entry_says() {
    let tmp = scratch();
    let p = tmp.path();
    let mut layer = Archive::new();
    if is_root() {
        layer.ids = (12345, 54321);
    }
    layer.mode = 0o6777;
    layer.pax("mtime", b"-5.25").pax("atime", b"99.5").pax("SCHILY.xattr.user.k", b"v\0v");
    layer.file("file", b"content");
    layer.pax("mtime", b"7.125").symlink("link", "nowhere");
    layer.mode = 0o622;
    layer.header("fifo", b'6', 0, "");
    layer.pax("SCHILY.xattr.user.d", b"").dir_mode("dir/", 0o1757);
    if is_root() {
        layer.header_with_device("null", b'3', 0, "", (1, 3));
        layer.header_with_device("block", b'4', 0, "", (300, 70000));
    }
    unpack(&layer.finish(), p, LayerTarget::Tree).unwrap();

    let dir = Dir::open(p).unwrap();
    let stat = |name: &str| dir.stat_at(&Name::new(name).unwrap()).unwrap();
    let file = stat("file");
    assert_eq!(fs::read(p.join("file")).unwrap(), b"content");
    assert_eq!(file.mode, 0o6777);
    assert_eq!((file.mtime.secs, file.mtime.nanos), (-6, 750_000_000));
    assert_eq!((file.atime.secs, file.atime.nanos), (99, 500_000_000));
    let key = Name::new("file").unwrap();
    assert_eq!(xattr::get(Of::Child(&dir, &key), b"user.k").unwrap(), Some(b"v\0v".to_vec()));
    assert_eq!((stat("link").mtime.secs, stat("link").mtime.nanos), (7, 125_000_000));
    assert_eq!(stat("fifo").mode, 0o622);
    assert_eq!(stat("dir").mode, 0o1757);
    assert_eq!(stat("dir").mtime.secs, 1_000_000_000);
    let key = Name::new("dir").unwrap();
    assert_eq!(xattr::get(Of::Child(&dir, &key), b"user.d").unwrap(), Some(Vec::new()));
    if is_root() {
        for name in ["file", "link", "fifo", "dir", "null"] {
            assert_eq!((stat(name).uid, stat(name).gid), (12345, 54321), "{name}");
        }
        assert_eq!((stat("null").rdev, stat("block").rdev), ((1, 3), (300, 70000)));
    }
}

#[test]
fn directories_keep_their_times_and_modes_whatever_goes_into_them_later() {
    let tmp = scratch();
    let p = tmp.path();
    let mut layer = Archive::new();
    layer.mtime = 5;
    layer.dir_mode("a", 0o555).dir_mode("a/b", 0).dir("c").dir_mode("./", 0o500);
    layer.mtime = 9;
    layer.file("c/f", b"").file("a/b/f", b"").file("a/f", b"").link("c/g", "a/b/f");
    layer.file("top", b"");
    unpack(&layer.finish(), p, LayerTarget::Tree).unwrap();
    assert_eq!((mode(p.join("a/b")), mode(p.join("a")), mode(p)), (0, 0o555, 0o500));
    fs::set_permissions(p, PermissionsExt::from_mode(0o700)).unwrap();
    for path in ["", "a", "a/b", "c"] {
        assert_eq!(p.join(path).metadata().unwrap().mtime(), 5, "{path}");
    }
    assert_eq!(p.join("c/f").metadata().unwrap().mtime(), 9);
    assert_eq!(p.join("c/g").metadata().unwrap().nlink(), 2);

    // Another archive adds to it, and what it has no entry for stays as it is.
    let mut more = Archive::new();
    more.file("a/b/more", b"").file("c/f", b"");
    unpack(&more.finish(), p, LayerTarget::Tree).unwrap();
    assert_eq!(mode(p.join("a/b")), 0);
    assert_eq!(p.join("c").metadata().unwrap().mtime(), 5);
    for path in ["a", "a/b"] {
        fs::set_permissions(p.join(path), PermissionsExt::from_mode(0o700)).unwrap();
    }
    assert!(p.join("a/b/more").exists());
}

#[test]
fn the_last_entry_of_a_name_wins() {
    let kinds = ["x", "x/", "x -> y", "x = other"];
    for first in kinds {
        for second in kinds {
            let tmp = scratch();
            let mut layer = Archive::new();
            layer.entry("other").entry("y/").entry("y/keep").entry(first);
            if first == "x/" {
                layer.entry("x/inside");
            }
            layer.entry(second);
            unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
            let mut found = tree(tmp.path(), None);
            let inside = found.remove("x/inside").is_some();
            assert_eq!(inside, first == "x/" && second == "x/", "{first} {second}");
            let x = match second {
                "x" => "x",
                "x/" => "dir",
                "x -> y" => "-> y",
                _ => "other",
            };
            assert_eq!(found.remove("x").unwrap(), x, "{first} {second}");
            // Written through nothing, and removed nothing behind a link.
            assert_eq!(found.len(), 3, "{found:?}");
            assert_eq!(found["other"], "other");
        }
    }
}

#[test]
fn hard_links_are_to_files_of_the_root_and_never_through_the_last_link() {
    let tmp = scratch();
    let p = tmp.path();
    let mut layer = Archive::new();
    for entry in ["d/f", "l -> d", "s -> d/f", "a = l/f", "b = s", "a = a", "d/f = a"] {
        layer.entry(entry);
    }
    unpack(&layer.finish(), p, LayerTarget::Tree).unwrap();
    let ino = |path: &str| p.join(path).symlink_metadata().unwrap().ino();
    assert_eq!(ino("a"), ino("d/f"));
    assert_eq!(ino("b"), ino("s"));
    for bad in ["x = gone", "x = d", "x = d/f/g", "x = gone/f", "d = d/f", "x = x"] {
        let e = unpack(&archive(&["d/", "d/f", bad]), p, LayerTarget::Tree).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{bad}: {e}");
        let (name, target) = bad.split_once(" = ").unwrap();
        let said = e.to_string();
        assert!(said.contains(&format!("{name:?}")), "{said}");
        assert!(said.contains(&format!("{target:?}")), "{said}");
    }
}

#[test]
fn what_goes_into_a_file_is_invalid() {
    let tmp = scratch();
    for entries in [
        &["l -> gone/..", "l/gone", "l/f"][..],
        &["f", "f/g"],
        &["f", "l -> f", "l/g"],
        &["l -> l", "l/g"],
    ] {
        let e = unpack(&archive(entries), tmp.path(), LayerTarget::Tree).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{entries:?}: {e}");
    }
}

#[test]
fn holes_stay_holes() {
    let tmp = scratch();
    let mut layer = Archive::new();
    layer.pax("GNU.sparse.size", b"1073741824");
    layer.pax("GNU.sparse.map", b"0,4,536870912,3,1073741824,0");
    layer.pax("GNU.sparse.numblocks", b"3").pax("GNU.sparse.name", b"holes");
    layer.file("anything", b"headmid");
    unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
    let path = tmp.path().join("holes");
    let m = path.metadata().unwrap();
    assert_eq!(m.len(), 1 << 30);
    assert!(m.blocks() < 1000, "{} blocks", m.blocks());
    use std::os::unix::fs::FileExt;
    let mut part = [1; 6];
    fs::File::open(&path).unwrap().read_exact_at(&mut part, (1 << 29) - 2).unwrap();
    assert_eq!(&part, b"\0\0mid\0");
}

#[test]
fn xattrs_of_union_file_systems_are_never_set() {
    let tmp = scratch();
    let mut layer = Archive::new();
    for key in [
        "trusted.overlay.opaque",
        "user.overlay.redirect",
        "user.containers.override_stat",
        "security.fuseoverlayfs.override_stat",
    ] {
        layer.pax(&format!("SCHILY.xattr.{key}"), b"y");
    }
    layer.pax("SCHILY.xattr.user.fine", b"y").dir("d");
    let layer = layer.finish();
    let applied = unpack(&layer, tmp.path(), LayerTarget::Tree).unwrap();
    assert_eq!((applied.stripped_xattrs, applied.skipped_xattrs), (4, 0));
    let dir = Dir::open(tmp.path().join("d")).unwrap();
    assert_eq!(xattr::list(Of::dir(&dir)).unwrap(), [b"user.fine".to_vec()]);

    let options = ApplyOptions { union_xattrs: UnionXattrs::Refuse, ..options() };
    let e = unpack_with(&layer, tmp.path(), &options).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArchive);
    assert!(e.to_string().contains("overlay"), "{e}");
}

#[test]
fn other_xattrs_follow_the_policy() {
    let mut layer = Archive::new();
    layer.pax("SCHILY.xattr.trusted.k", b"v").pax("SCHILY.xattr.security.selinux", b"label");
    layer
        .pax("SCHILY.xattr.user.k", b"v")
        .pax("SCHILY.acl.access", b"user:lisa:r--")
        .file("f", b"");
    let layer = layer.finish();
    for (xattrs, skipped) in
        [(XattrPolicy::Lenient, Some(3)), (XattrPolicy::Skip, Some(4)), (XattrPolicy::Exact, None)]
    {
        let tmp = scratch();
        let options = ApplyOptions { xattrs, ..options() };
        let applied = unpack_with(&layer, tmp.path(), &options);
        assert_eq!(applied.ok().map(|applied| applied.skipped_xattrs), skipped, "{xattrs:?}");
    }
}

#[test]
fn capabilities_outlive_the_change_of_owner_or_are_counted() {
    let tmp = scratch();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut layer = Archive::new();
    layer.ids = (1000, 1000);
    layer.pax("SCHILY.xattr.security.capability", &capability).file("ping", b"x");
    let applied = unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
    let dir = Dir::open(tmp.path()).unwrap();
    let name = Name::new("ping").unwrap();
    let found = xattr::get(Of::Child(&dir, &name), b"security.capability").unwrap();
    if is_root() {
        assert_eq!(found.as_deref(), Some(&capability[..]));
    } else {
        assert_eq!((found, applied.skipped_xattrs), (None, 1));
    }
}

#[test]
fn access_control_lists_are_set_and_not_inherited() {
    let tmp = scratch();
    let mut layer = Archive::new();
    layer.pax("SCHILY.acl.default", b"user::rwx,group::---,other::---,user:7:rwx,mask::rwx");
    layer.dir("d").dir("d/sub").file("d/plain", b"");
    layer.mode = 0o640;
    layer
        .pax("SCHILY.acl.access", b"user::rw-\nuser:1000:r--\ngroup::---\nmask::r--\nother::---\n");
    layer.file("d/listed", b"");
    unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
    let dir = Dir::open(tmp.path().join("d")).unwrap();
    let get = |name: &str, which: &str| {
        let key = format!("system.posix_acl_{which}");
        xattr::get(Of::Child(&dir, &Name::new(name).unwrap()), key.as_bytes()).unwrap()
    };
    assert!(xattr::get(Of::dir(&dir), b"system.posix_acl_default").unwrap().is_some());
    assert_eq!(
        (get("plain", "access"), get("sub", "access"), get("sub", "default")),
        (None, None, None)
    );
    assert_eq!(get("listed", "access").unwrap().len(), 4 + 5 * 8);
    assert_eq!(mode(tmp.path().join("d/listed")), 0o640);
    assert_eq!(mode(tmp.path().join("d/plain")), 0o644);
}

#[test]
fn a_list_that_closes_a_directory_to_its_owner_does_not_close_it_to_its_content() {
    let tmp = scratch();
    let mut layer = Archive::new();
    layer.pax("SCHILY.acl.access", b"user::r-x,user:7:r-x,group::r-x,mask::r-x,other::r-x");
    layer.dir_mode("d", 0o555).file("d/f", b"").file("top", b"").file("d/g", b"");
    unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
    assert_eq!(mode(tmp.path().join("d")), 0o555);
    let dir = Dir::open(tmp.path().join("d")).unwrap();
    let list = xattr::get(Of::dir(&dir), b"system.posix_acl_access").unwrap();
    assert_eq!(list.unwrap().len(), 4 + 5 * 8);
    fs::set_permissions(tmp.path().join("d"), PermissionsExt::from_mode(0o700)).unwrap();
}

#[test]
fn a_directory_has_the_xattrs_of_its_last_entry_alone() {
    let old = |layer: &mut Archive| {
        layer.pax("SCHILY.xattr.user.old", b"v").pax("SCHILY.xattr.user.both", b"old");
        layer.pax("SCHILY.acl.access", b"user::rwx,user:7:rwx,group::r-x,mask::rwx,other::r-x");
        layer.pax("SCHILY.acl.default", b"user::rwx,user:7:rwx,group::r-x,mask::rwx,other::r-x");
        layer.dir("d").file("d/old", b"");
    };
    let new = |layer: &mut Archive| {
        layer.pax("SCHILY.xattr.user.both", b"new").dir("d").file("d/new", b"");
    };
    let keys = |root: &Path| xattr::list(Of::dir(&Dir::open(root.join("d")).unwrap())).unwrap();
    // In one archive, and in one over a tree.
    let mut targets = vec![LayerTarget::Tree];
    targets.extend(formats().into_iter().map(LayerTarget::Layer));
    for target in targets {
        let tmp = scratch();
        let mut both = Archive::new();
        old(&mut both);
        new(&mut both);
        unpack(&both.finish(), tmp.path(), target).unwrap();
        assert_eq!(keys(tmp.path()), [b"user.both".to_vec()], "{target:?}");
    }
    type Case<'a> = (&'a dyn Fn(&mut Archive), &'a [&'a [u8]]);
    let cases: [Case<'_>; 3] = [
        (&new, &[b"user.both"]),
        // Deleted, and made again for what is in it.
        (&|layer| _ = layer.entry("d/new").entry(".wh.d"), &[]),
        (&|layer| _ = layer.entry(".wh.d").entry("d/new"), &[]),
    ];
    for (n, (layer, expected)) in cases.iter().enumerate() {
        let tmp = scratch();
        let mut archive = Archive::new();
        old(&mut archive);
        unpack(&archive.finish(), tmp.path(), LayerTarget::Tree).unwrap();
        let mut archive = Archive::new();
        layer(&mut archive);
        unpack(&archive.finish(), tmp.path(), LayerTarget::Tree).unwrap();
        assert_eq!(keys(tmp.path()), *expected, "{n}");
        assert!(tmp.path().join("d/new").exists());
    }
}

#[test]
fn marks_of_a_layer_outlive_another_entry_of_their_directory() {
    for format in formats() {
        let tmp = scratch();
        let layer = archive(&["d/.wh..wh..opq", "d/", "d/f", "d/"]);
        unpack(&layer, tmp.path(), LayerTarget::Layer(format)).unwrap();
        assert_eq!(tree(tmp.path(), Some(format))["d"], "opaque", "{format}");
    }
}

#[test]
fn devices_can_be_left_out() {
    let tmp = scratch();
    let mut layer = Archive::new();
    layer.header_with_device("null", b'3', 0, "", (1, 3)).header("fifo", b'6', 0, "");
    let options = ApplyOptions { devices: Devices::Skip, ..options() };
    let applied = unpack_with(&layer.finish(), tmp.path(), &options).unwrap();
    assert_eq!(applied.skipped_devices, 1);
    assert_eq!(tree(tmp.path(), None).len(), 1);
}

fn compressed(bytes: &[u8], compression: Compression) -> Vec<u8> {
    let mut out = Compressor::new(Vec::new(), compression).unwrap();
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

#[test]
fn the_input_is_read_and_digested_to_its_end_however_it_is_compressed() {
    let mut bytes = archive(&["d/", "d/f"]);
    bytes.extend_from_slice(b"behind the trailer");
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        if cfg!(not(feature = "zstd")) && compression == Compression::Zstd {
            continue;
        }
        let tmp = scratch();
        let blob = compressed(&bytes, compression);
        let applied = unpack(&blob, tmp.path(), LayerTarget::Tree).unwrap();
        assert_eq!(applied.diff_id, DiffId::from(Digest::of(&bytes)), "{compression}");
        assert_eq!(applied.unpacked_bytes, bytes.len() as u64);
        assert_eq!((applied.blob, applied.blob_bytes), (Digest::of(&blob), blob.len() as u64));
        assert_eq!((applied.entries, applied.usage.inodes), (2, 3));
    }
}

#[test]
fn every_bound_stops_and_names_itself() {
    let mut xattrs = Archive::new();
    xattrs.pax("SCHILY.xattr.user.k", &[b'v'; 5000]).file("f", b"");
    let deep = archive(&[&format!("{}f", "d/".repeat(40))]);
    let mut holes = Archive::new();
    holes.pax("GNU.sparse.size", b"9000000000000000000").pax("GNU.sparse.map", b"");
    holes.pax("GNU.sparse.numblocks", b"0").pax("GNU.sparse.name", b"holes").file("f", b"");
    type Set = fn(&mut ApplyLimits);
    let cases: [(&str, Vec<u8>, Set); 6] = [
        ("limit", archive(&["a", "b", "c"]), |l| l.max_entries = 2),
        ("max_entries", deep, |l| l.max_entries = 30),
        ("limit", archive(&["a-long-name"]), |l| l.max_path_bytes = 5),
        ("max_xattr_bytes", xattrs.finish(), |l| l.max_xattr_bytes = 4096),
        ("max_unpacked_bytes", archive(&["a", "b"]), |l| l.max_unpacked_bytes = 1024),
        ("max_unpacked_bytes", holes.finish(), |_| {}),
    ];
    for (says, bytes, set) in cases {
        let tmp = scratch();
        let mut options = options();
        set(&mut options.limits);
        let e = unpack_with(&bytes, tmp.path(), &options).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded, "{says}: {e}");
        assert!(e.to_string().contains(says), "{says}: {e}");
    }
}

#[test]
fn what_is_cut_short_or_garbage_is_invalid() {
    let mut layer = Archive::new();
    layer.dir("d").file("d/f", &[b'f'; 2000]).pax("mtime", b"1.5").file("g", &[b'g'; 600]);
    let whole = layer.finish();
    // Between entries an archive may end: neither padding nor trailer is required.
    let entries_end = whole.len() - 1024;
    let (f, g) = (512 + 512 + 2000..=512 + 512 + 2048, entries_end - 424..=entries_end);
    let may_end = |len: usize| [0, 512].contains(&len) || f.contains(&len) || g.contains(&len);
    for len in (0..entries_end).step_by(128) {
        let tmp = scratch();
        let done = unpack(&whole[..len], tmp.path(), LayerTarget::Tree);
        match done {
            Ok(_) => assert!(may_end(len), "{len}"),
            Err(e) => assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{len}: {e}"),
        }
    }
    let gzip = compressed(&whole, Compression::Gzip);
    for len in [1, 20, gzip.len() / 2, gzip.len() - 1] {
        let e = unpack(&gzip[..len], scratch().path(), LayerTarget::Tree).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{len}: {e}");
    }
    let mut damaged = gzip.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x55;
    for garbage in [damaged, vec![b'x'; 4096], vec![0xff; 513], b"<html>".to_vec()] {
        let e = unpack(&garbage, scratch().path(), LayerTarget::Tree).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{e}");
    }
}

#[test]
fn stops_when_asked_at_an_entry_and_inside_of_one() {
    let mut layer = Archive::new();
    layer.file("a", b"").file("big", &vec![1; 5 << 20]);
    let layer = layer.finish();
    for stop_at in 0..6 {
        let tmp = scratch();
        let mut calls = 0;
        let mut last = 0;
        let e = apply_layer(&layer[..], tmp.path(), LayerTarget::Tree, &options(), &mut |report| {
            assert!(report.bytes >= last);
            last = report.bytes;
            calls += 1;
            if calls > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Cancelled);
        assert_eq!(calls, stop_at + 1);
    }
}

#[test]
fn rights_that_are_missing_are_named_with_their_remedy() {
    let mut owned = Archive::new();
    owned.ids = (12345, 0);
    owned.file("f", b"");
    let mut device = Archive::new();
    device.header_with_device("null", b'3', 0, "", (1, 3));
    let ignore = ApplyOptions { ownership: Ownership::Ignore, ..ApplyOptions::default() };
    for (layer, options, remedy) in
        [(owned, ApplyOptions::default(), "Ownership::Ignore"), (device, ignore, "Devices::Skip")]
    {
        let done = unpack_with(&layer.finish(), scratch().path(), &options);
        if is_root() {
            assert_eq!(done.unwrap().entries, 1);
        } else {
            let e = done.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::PermissionDenied);
            assert!(e.to_string().contains(remedy), "{e}");
        }
    }
}

#[test]
fn depth_is_bounded_by_the_path_alone() {
    let tmp = scratch();
    let mut layer = Archive::new();
    let deep = "d/".repeat(1500);
    layer.pax("path", format!("{deep}f").as_bytes()).file("f", b"deep");
    layer.pax("path", format!("{deep}g").as_bytes()).file("g", b"deep").file("top", b"");
    layer.pax("linkpath", format!("{deep}f").as_bytes()).link("linked", "x");
    let applied = unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
    assert_eq!(applied.usage.inodes, 1 + 1500 + 3);
    assert_eq!(fs::read(tmp.path().join("linked")).unwrap(), b"deep");
    let root = Dir::open(tmp.path()).unwrap();
    let name = Name::new("d").unwrap();
    crate::sys::remove::remove_tree(&root, &name, &mut || Ok(())).unwrap();
}
