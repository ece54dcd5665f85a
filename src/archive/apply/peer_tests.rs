//! What went wrong in others, row by row: the corner cases of whiteouts, the holes that had numbers,
//! and containerd's applier. Rows that no archive can bring about (exports, mounts, races between
//! processes) are not here. "breakout", "marks", "tests" and "cost" are the modules beside this one;
//! "smuggle" is that of the reader; what has no module is below.
//!
//! | case | test |
//! |---|---|
//! | `.wh.x`, `.wh..wh..opq`, in any order; `.wh.foo` with `foo/.wh.bar` | marks: `marks_mean_lower_layers_only_in_any_order` |
//! | the same into a plain tree (containerd's naive applier) | marks: `in_a_tree_whiteouts_delete_what_was_there_before` |
//! | a directory becomes a file, and the other way round | `a_file_takes_the_place_of_a_tree`; marks: `what_takes_the_place_of_something_else_hides_what_that_hid` |
//! | `.wh.`, `.wh..`, `.wh...`; marks that are no empty files; char 0:0 | marks: `marks_of_nothing_and_marks_with_content_are_invalid` |
//! | block 0:0, which is no whiteout | `the_block_device_0_0_is_a_device` |
//! | `.wh..wh.aufs`, `.wh..wh.orph` | marks: `whiteouts_may_be_hard_links_as_aufs_wrote_them` |
//! | `.wh..wh.plnk` | marks: `links_into_the_hidden_directory_of_aufs_are_served_and_it_is_gone` |
//! | redirect, metacopy, whiteout and escaped xattrs from outside | `no_xattr_makes_a_mark`; tests: `xattrs_of_union_file_systems_are_never_set` |
//! | owners of whiteouts that do not exist here (container-libs 1170) | `whiteouts_need_no_owner_and_no_mode` |
//! | names of 251 bytes and more (fuse-overlayfs 351) | `names_of_any_length_are_deleted_or_made` |
//! | an opaque mark lost (moby 9690), or applied to its own layer (moby 25086) | marks: `marks_mean_lower_layers_only_in_any_order` |
//! | CVE-2014-6407, 9356, CVE-2018-20990, RUSTSEC-2021-0080: links lead out | breakout: `symlinks_lead_nowhere_outside`, `a_directory_replaced_by_a_link_is_not_remembered` |
//! | CVE-2014-9357: xz, decompressed by a program of the host | `xz_is_refused_by_name` |
//! | CVE-2014-9358, names that climb | breakout: `names_that_climb_are_refused`, `absolute_names_are_inside` |
//! | CVE-2021-41089: the directory above the root is changed | breakout: all, which look at it |
//! | CVE-2021-32760, CVE-2026-33056: chmod and chown through links | breakout: `attributes_of_links_are_the_links_own` |
//! | CVE-2021-20291: malformed compression | tests: `what_is_cut_short_or_garbage_is_invalid` |
//! | CVE-2022-23471, CVE-2023-25153: unbounded reads | tests: `every_bound_stops_and_names_itself`; cost |
//! | CVE-2025-62518, RUSTSEC-2026-0068, 0112, 0113: smuggled entries | smuggle; `tests/differential.rs` |
//! | CVE-2023-2640: capabilities and setuid bits by xattrs of the union | `no_xattr_makes_a_mark` |
//! | containerd: missing parents take after those below | tests: `missing_parents_take_after_the_first_directory_that_has_them` |
//! | containerd: times of directories last | tests: `directories_keep_their_times_and_modes_whatever_goes_into_them_later` |
//! | containerd: times bounded to what file systems hold | `times_beyond_the_file_system_are_no_error` |
//! | containerd: `user.*` on special files, ENOTSUP, trusted | `xattrs_that_a_kind_cannot_have_are_counted`; tests: `other_xattrs_follow_the_policy` |
//! | containerd: devices without the right to make them | tests: `devices_can_be_left_out` |
//! | containerd: the last link of a hard link's target is not followed | tests: `hard_links_are_to_files_of_the_root_and_never_through_the_last_link` |
//! | containerd: an entry for the root itself | `the_root_is_described_by_its_entry_and_never_replaced` |
//! | containerd: the blob is read behind the trailer | tests: `the_input_is_read_and_digested_to_its_end_however_it_is_compressed` |
//! | GNU: chains of links, links before their target, to themselves, to directories | `links_of_links` |

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use super::test_archive::*;
use super::*;
use crate::sys::xattr::{self, Of};

#[test]
fn a_file_takes_the_place_of_a_tree() {
    for entry in ["x", "x -> y", "x = y"] {
        let tmp = scratch();
        unpack(&archive(&["x/d/old", "y"]), tmp.path(), LayerTarget::Tree).unwrap();
        unpack(&archive(&[entry]), tmp.path(), LayerTarget::Tree).unwrap();
        assert!(!tmp.path().join("x").symlink_metadata().unwrap().is_dir(), "{entry}");
        unpack(&archive(&["x/"]), tmp.path(), LayerTarget::Tree).unwrap();
        assert!(Dir::open(tmp.path().join("x")).unwrap().is_empty().unwrap(), "{entry}");
        assert!(tmp.path().join("y").is_file(), "{entry}");
    }
}

#[test]
fn the_block_device_0_0_is_a_device() {
    if !is_root() {
        return;
    }
    for format in formats() {
        let tmp = scratch();
        let mut layer = Archive::new();
        layer.header_with_device("b", b'4', 0, "", (0, 0));
        unpack(&layer.finish(), tmp.path(), LayerTarget::Layer(format)).unwrap();
        let m = tmp.path().join("b").symlink_metadata().unwrap();
        assert!(m.file_type().is_block_device());
        let found = tree(tmp.path(), Some(format));
        assert_eq!(found["b"], "BlockDevice", "{format}");
    }
}

#[test]
fn no_xattr_makes_a_mark() {
    const NAMES: [&str; 7] =
        ["opaque", "redirect", "metacopy", "whiteout", "origin", "nlink", "overlay.opaque"];
    for format in formats() {
        let tmp = scratch();
        let mut layer = Archive::new();
        for kind in [b'0', b'5'] {
            for prefix in ["trusted.overlay.", "user.overlay."] {
                for name in NAMES {
                    layer.pax(&format!("SCHILY.xattr.{prefix}{name}"), b"y");
                }
            }
            layer.pax("SCHILY.xattr.user.containers.override_stat", b"0:0:4777");
            // libarchive's form of the same.
            layer.pax("LIBARCHIVE.xattr.user.fuseoverlayfs.opaque", b"eQ");
            layer.header(if kind == b'0' { "f" } else { "d" }, kind, 0, "");
        }
        let done = unpack(&layer.finish(), tmp.path(), LayerTarget::Layer(format)).unwrap();
        assert_eq!(done.stripped_xattrs, 2 * (2 * 7 + 2), "{format}");
        assert!(!done.has_marks);
        let dir = Dir::open(tmp.path()).unwrap();
        for name in ["f", "d"] {
            let name = Name::new(name).unwrap();
            assert_eq!(xattr::list(Of::Child(&dir, &name)).unwrap(), Vec::<Vec<u8>>::new());
        }
    }
}

#[test]
fn whiteouts_need_no_owner_and_no_mode() {
    for format in formats() {
        let tmp = scratch();
        let mut layer = Archive::new();
        layer.mode = 0o7777;
        layer.pax("uid", b"4294967294").pax("gid", b"4294967294").pax("mtime", b"-5");
        layer.pax("SCHILY.xattr.user.k", b"v").pax("SCHILY.xattr.security.capability", b"x");
        layer.file(".wh.x", b"");
        // Who unpacks need not have the right to give files away.
        let done = apply_layer(
            &layer.finish()[..],
            tmp.path(),
            LayerTarget::Layer(format),
            &ApplyOptions::default(),
            &mut crate::progress::ignore_progress,
        );
        assert_eq!(done.unwrap().skipped_xattrs, 0, "{format}");
        assert_eq!(tree(tmp.path(), Some(format))["x"], "deleted", "{format}");
        let mark = fs::read_dir(tmp.path()).unwrap().next().unwrap().unwrap();
        let m = mark.path().symlink_metadata().unwrap();
        assert_eq!(m.uid(), tmp.path().metadata().unwrap().uid());
        assert_eq!(m.mode() & 0o7022, 0, "{format}");
    }
}

#[test]
fn names_of_any_length_are_deleted_or_made() {
    let (longest, deleted) = ("n".repeat(255), "w".repeat(251));
    for format in formats() {
        let tmp = scratch();
        let mut layer = Archive::new();
        for path in [longest.clone(), format!(".wh.{deleted}")] {
            layer.pax("path", path.as_bytes()).file("short", b"");
        }
        layer.pax("path", format!("d/{longest}").as_bytes()).dir("short");
        unpack(&layer.finish(), tmp.path(), LayerTarget::Layer(format)).unwrap();
        let found = tree(tmp.path(), Some(format));
        assert_eq!(found[&deleted], "deleted", "{format}");
        assert_eq!(
            (&found[&longest], &found[&format!("d/{longest}")]),
            (&String::new(), &"dir".to_owned())
        );
    }
    // A whiteout of a longer one is itself too long a name.
    let mut layer = Archive::new();
    layer.pax("path", format!(".wh.{deleted}w").as_bytes()).file("short", b"");
    let e = unpack(&layer.finish(), scratch().path(), LayerTarget::Tree).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArchive);
}

#[test]
fn xz_is_refused_by_name() {
    let mut bytes = b"\xfd7zXZ\0".to_vec();
    bytes.resize(2048, 0);
    let e = unpack(&bytes, scratch().path(), LayerTarget::Tree).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("xz"), "{e}");
}

#[test]
fn times_beyond_the_file_system_are_no_error() {
    let tmp = scratch();
    let mut layer = Archive::new();
    let times = ["-9223372036854775808", "-62135596800.5", "9223372036854775807", "99999999999"];
    for (n, time) in times.iter().enumerate() {
        layer.pax("mtime", time.as_bytes()).pax("atime", time.as_bytes()).dir(&format!("d{n}"));
        layer.pax("mtime", time.as_bytes()).file(&format!("d{n}/f"), b"");
        layer.pax("mtime", time.as_bytes()).symlink(&format!("d{n}/l"), "f");
    }
    let done = unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
    assert_eq!(done.usage.inodes, 1 + 3 * 4);
}

#[test]
fn xattrs_that_a_kind_cannot_have_are_counted() {
    let tmp = scratch();
    let mut layer = Archive::new();
    let mut add = |name: &str, kind: u8| {
        layer.pax("SCHILY.xattr.user.k", b"v").header(name, kind, 0, "target");
    };
    add("fifo", b'6');
    add("link", b'2');
    add("file", b'0');
    let done = unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
    assert_eq!((done.entries, done.skipped_xattrs), (3, 2));
    let exact = ApplyOptions { xattrs: XattrPolicy::Exact, ..options() };
    let mut progress = crate::progress::ignore_progress;
    let again = layer.finish();
    let done = apply_layer(&again[..], scratch().path(), LayerTarget::Tree, &exact, &mut progress);
    assert_eq!(done.unwrap_err().kind(), ErrorKind::PermissionDenied);
}

#[test]
fn the_root_is_described_by_its_entry_and_never_replaced() {
    for name in ["./", ".", "/", "./."] {
        let tmp = scratch();
        let before = tmp.path().metadata().unwrap();
        let mut layer = Archive::new();
        layer.mtime = 77;
        layer.file("f", b"").dir_mode(name, 0o2751).file("g", b"");
        unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap();
        let after = tmp.path().metadata().unwrap();
        assert_eq!(before.ino(), after.ino());
        assert_eq!((after.mode() & 0o7777, after.mtime()), (0o2751, 77), "{name}");
        for kind in *b"01236" {
            let mut layer = Archive::new();
            layer.header_with_device(name, kind, 0, "f", (1, 3));
            let e = unpack(&layer.finish(), tmp.path(), LayerTarget::Tree).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{name} {kind}");
        }
        fs::set_permissions(tmp.path(), PermissionsExt::from_mode(0o700)).unwrap();
    }
}

#[test]
fn links_of_links() {
    let mut targets = vec![LayerTarget::Tree];
    targets.extend(formats().into_iter().map(LayerTarget::Layer));
    for target in targets {
        let tmp = scratch();
        let chain = ["a", "b = a", "c = b", "s -> a", "t = s", "a = c", "b = b"];
        unpack(&archive(&chain), tmp.path(), target).unwrap();
        let ino = |name: &str| tmp.path().join(name).symlink_metadata().unwrap().ino();
        assert_eq!((ino("a"), ino("b")), (ino("c"), ino("c")), "{target:?}");
        assert_eq!(ino("s"), ino("t"), "{target:?}");
        assert_eq!(tmp.path().join("a").metadata().unwrap().nlink(), 3);
        // A later entry of a name takes it from the chain and leaves the others.
        unpack(&archive(&["b"]), tmp.path(), LayerTarget::Tree).unwrap();
        assert_ne!(ino("b"), ino("a"));
        assert_eq!(fs::read(tmp.path().join("c")).unwrap(), b"a");
        for bad in [&["b2 = a2", "a2"][..], &["h = h"], &["d/", "h = d"], &["d/f", "h = d/"]] {
            let tmp = scratch();
            let e = unpack(&archive(bad), tmp.path(), target).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{target:?} {bad:?}");
        }
    }
}
