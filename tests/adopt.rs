//! Adopting foreign layer directories that are made by hand: every mark, and what is refused.
//!
//! What trusted xattrs or devices are needed for is ignored without root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[allow(dead_code)]
#[path = "support/foreign.rs"]
mod foreign;
#[allow(dead_code)]
#[path = "support/suite.rs"]
mod suite;
#[allow(dead_code)]
#[path = "support/tree.rs"]
mod tree;

use std::ffi::OsStr;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use foreign::{Bench, Layer};
use rustix::fs::{CWD, FileType, Mode};
use stratafs::{
    AdoptOptions, ErrorKind, ForeignFormat, Labels, LayerFormat, OtherMarks, OverrideStats,
    ignore_progress,
};
use suite::{fails, needs_root, trial};

fn main() {
    let anyone: [(&str, fn()); 19] = [
        ("everything_is_copied_exactly", copied_exactly),
        ("whiteouts_and_opaque_directories_become_the_stores_own", marks_become_own),
        ("whiteouts_that_are_files_with_an_xattr", xattr_whiteouts),
        ("marks_where_nothing_shows_are_left_out", void_marks),
        ("aufs_files_become_the_stores_marks", aufs),
        ("aufs_pseudo_links_are_hard_links", pseudo_links),
        ("fuse_overlayfs_marks_of_all_kinds", fuse_overlayfs),
        ("marks_in_an_aufs_store", into_aufs),
        ("owners_in_xattrs_are_refused_ignored_or_honoured", override_stats),
        ("malformed_owners_in_xattrs", malformed_override_stats),
        ("marks_of_other_formats_are_refused_or_plain", other_marks),
        ("what_is_not_understood_is_named", not_understood),
        ("wrong_directories", wrong_directories),
        ("links_out_of_the_directory_are_copied_not_followed", hostile_links),
        ("what_changes_meanwhile_is_an_error", changing),
        ("stopping_leaves_nothing", stopping),
        ("depth_is_no_limit", depth),
        ("files_cut_from_their_data_get_it_back", metacopies),
        ("the_directory_is_not_changed", unchanged),
    ];
    let rooted: [(&str, fn()); 5] = [
        ("renamed_directories_get_their_contents", redirects),
        ("redirects_lead_through_renamed_directories", nested_redirects),
        ("redirects_are_found_in_the_parents", redirects_in_parents),
        ("escaped_marks_stay_escaped", escaped),
        ("devices_and_trusted_xattrs_are_kept", devices),
    ];
    let not_for_root = needs_root().is_none().then(|| "not for root".to_owned());
    let unprivileged =
        trial("without_privilege_trusted_marks_are_refused", not_for_root, needs_privilege);
    let trials = anyone.into_iter().map(|(name, test)| trial(name, None, test));
    let rooted = rooted.into_iter().map(|(name, test)| trial(name, needs_root(), test));
    suite::run(trials.chain(rooted).chain([unprivileged]).collect());
}

use ForeignFormat::{Aufs, FuseOverlayfs, Overlay, OverlayUser};

fn copied_exactly() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    layer.file("dir/file", "content").xattr("dir/file", "user.mime", "text");
    layer.xattr("dir", "user.empty", "");
    layer.hard_link("dir/file", "other/name");
    fs::write(layer.0.join(OsStr::from_bytes(b"not \xff\n utf8")), "x").unwrap();
    fs::write(layer.path(&"n".repeat(255)), "long").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", layer.path("dir/link")).unwrap();
    rustix::fs::mknodat(CWD, layer.path("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    drop(UnixListener::bind(layer.path("s")).unwrap());
    let sparse = fs::File::create(layer.path("sparse")).unwrap();
    sparse.write_all_at(b"end", 20 << 20).unwrap();
    for (path, mode) in [("dir/file", 0o4751), ("dir", 0o3577), ("other", 0o700)] {
        fs::set_permissions(layer.path(path), PermissionsExt::from_mode(mode)).unwrap();
    }
    let time = |secs| fs::FileTimes::new().set_modified(secs);
    let past = std::time::UNIX_EPOCH - std::time::Duration::new(5, 7);
    for path in ["dir/file", "dir", "sparse", ""] {
        fs::File::open(layer.path(path)).unwrap().set_times(time(past)).unwrap();
    }
    // The socket is left out.
    fs::remove_file(layer.path("s")).unwrap();
    let expected = tree::lines(&layer.0, tree::Times::All);
    drop(UnixListener::bind(layer.path("s")).unwrap());
    fs::File::open(&layer.0).unwrap().set_times(time(past)).unwrap();

    let adopted = bench.adopt("a", &layer, OverlayUser);
    let copy = bench.last();
    assert_eq!(tree::lines(&copy.0, tree::Times::All), expected);
    assert_eq!(foreign::xattrs(&copy.0), foreign::xattrs(&layer.0));
    assert_eq!(fs::metadata(&copy.0).unwrap().modified().unwrap(), past);
    assert!(fs::metadata(copy.path("sparse")).unwrap().blocks() < 1000);
    assert_eq!((adopted.report.sockets.count, adopted.has_marks), (1, false));
    assert_eq!(adopted.report.sockets.paths[0].as_bytes(), b"s");
    // The root and its eight names, one more in each of two directories; one inode has two names.
    assert_eq!((adopted.entries, adopted.usage.inodes), (10, 9));
    assert_eq!(bench.store.usage("a").unwrap(), adopted.usage);
}

fn marks_become_own() {
    for store in [LayerFormat::OverlayUser, LayerFormat::Aufs] {
        let bench = Bench::new(store);
        let base = bench.layer("base");
        base.file("gone", "").file("d/old", "").file("keep/gone", "");
        bench.adopt("base", &base, OverlayUser);
        let layer = bench.layer("foreign");
        layer.whiteout("gone").whiteout("keep/gone").file("d/new", "");
        layer.xattr("d", "user.overlay.opaque", "y");
        layer.xattr("keep", "user.overlay.impure", "y");
        let options = AdoptOptions::new(OverlayUser);
        let adopted = bench.adopt_with("top", Some("base"), &layer, &options).unwrap();
        let report = &adopted.report;
        assert_eq!((report.whiteouts.count, report.opaque_directories.count), (2, 1));
        assert_eq!(report.dropped_xattrs["user.overlay.impure"].count, 1);
        assert!(adopted.has_marks);
        let changes = bench.store.changes("top", &mut ignore_progress).unwrap();
        let lines: Vec<String> = changes.iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["M /d", "A /d/new", "D /d/old", "D /gone", "D /keep/gone"], "{store}");
        assert_eq!(bench.store.check(&mut ignore_progress).unwrap().problems, []);
    }
}

fn xattr_whiteouts() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    layer.file("d/gone", "").file("d/empty", "").file("d/full", "x").dir("d/sub");
    layer.xattr("d", "user.overlay.opaque", "x");
    layer.xattr("d/gone", "user.overlay.whiteout", "");
    let adopted = bench.adopt("a", &layer, OverlayUser);
    let copy = bench.last();
    assert!(copy.is_whiteout("d/gone"));
    assert_eq!((copy.read("d/empty"), copy.read("d/full")), (String::new(), "x".to_owned()));
    assert_eq!(copy.get("d", "user.overlay.opaque"), None);
    assert_eq!(adopted.report.xattr_whiteouts.count, 1);
    assert_eq!(adopted.report.xattr_whiteouts.paths[0].as_bytes(), b"d/gone");

    // A name that is listed but cannot be looked up: nobody can say what that shows.
    layer.file("e/gone", "").xattr("e/gone", "user.overlay.whiteout", "");
    let options = AdoptOptions::new(OverlayUser);
    let result = bench.adopt_with("b", None, &layer, &options);
    fails(result, ErrorKind::FailedPrecondition, "e/gone");
}

fn void_marks() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    layer.whiteout("d/sub/gone").dir("d/deep").xattr("d", "user.overlay.opaque", "y");
    layer.xattr("d/deep", "user.overlay.opaque", "y");
    let adopted = bench.adopt("a", &layer, OverlayUser);
    let copy = bench.last();
    assert!(!copy.exists("d/sub/gone") && copy.exists("d/sub"));
    assert_eq!(copy.get("d/deep", "user.overlay.opaque"), None);
    assert_eq!(adopted.report.void_marks.count, 2);

    // The kernel never looks whether a root is opaque.
    let layer = bench.layer("root");
    layer.xattr("", "user.overlay.opaque", "y").whiteout("gone");
    let adopted = bench.adopt("b", &layer, OverlayUser);
    assert!(bench.last().is_whiteout("gone"));
    assert_eq!(bench.last().get("", "user.overlay.opaque"), None);
    assert_eq!(adopted.report.opaque_directories.count, 0);
    assert_eq!(adopted.report.dropped_xattrs["user.overlay.opaque"].count, 1);
}

fn aufs() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    layer.file(".wh..wh.aufs", "").dir(".wh..wh.plnk").file(".wh..wh.orph/1", "lost");
    // As AUFS makes them: hard links of one empty file.
    layer.hard_link(".wh..wh.aufs", ".wh.gone").hard_link(".wh..wh.aufs", "d/.wh..wh..opq");
    layer.file("d/new", "n").file("e/.wh.x", "").file("e/y", "");
    let adopted = bench.adopt("a", &layer, Aufs);
    let copy = bench.last();
    assert!(copy.is_whiteout("gone") && copy.is_whiteout("e/x"));
    assert_eq!(copy.get("d", "user.overlay.opaque").unwrap(), b"y");
    let mut names: Vec<_> =
        fs::read_dir(&copy.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["d", "e", "gone"]);
    let report = adopted.report;
    assert_eq!((report.whiteouts.count, report.opaque_directories.count), (2, 1));
    assert_eq!(report.internal.count, 3);

    for (path, content) in [
        ("d/.wh..wh.plnk", ""),
        (".wh..wh.dr.1", ""),
        (".wh..", ""),
        ("e/.wh.full", "x"),
        ("e/.wh.y", ""),
    ] {
        layer.file(path, content);
        let options = AdoptOptions::new(Aufs);
        let naming = path.trim_start_matches("e/.wh.");
        fails(bench.adopt_with("b", None, &layer, &options), ErrorKind::FailedPrecondition, naming);
        fs::remove_file(layer.path(path)).unwrap();
    }
    bench.has_only(1);
}

fn pseudo_links() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    layer.file(".wh..wh.plnk/12.34", "both").hard_link(".wh..wh.plnk/12.34", "a");
    layer.hard_link(".wh..wh.plnk/12.34", "sub/b");
    layer.file(".wh..wh.plnk/13.35", "one").hard_link(".wh..wh.plnk/13.35", "c");
    let adopted = bench.adopt("a", &layer, Aufs);
    let copy = bench.last();
    let inode = |path: &str| fs::metadata(copy.path(path)).unwrap().ino();
    assert_eq!(inode("a"), inode("sub/b"));
    assert_eq!((copy.read("a"), copy.read("c")), ("both".to_owned(), "one".to_owned()));
    assert_eq!(fs::metadata(copy.path("a")).unwrap().nlink(), 2);
    assert_eq!(adopted.report.pseudo_links.count, 3);
    assert_eq!(adopted.report.open_pseudo_links.paths[0].as_bytes(), b".wh..wh.plnk/13.35");

    layer.file(".wh..wh.plnk/x.y", "");
    let options = AdoptOptions::new(Aufs);
    fails(bench.adopt_with("b", None, &layer, &options), ErrorKind::FailedPrecondition, "x.y");
}

fn fuse_overlayfs() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    layer.whiteout("device").file(".wh.named", "").file("a/.wh..wh..opq", "");
    layer.dir("b").xattr("b", "user.overlay.opaque", "y");
    layer.dir("c").xattr("c", "user.fuseoverlayfs.opaque", "y");
    layer.file("f", "x").xattr("f", "user.fuseoverlayfs.origin", "f");
    let adopted = bench.adopt("a", &layer, FuseOverlayfs);
    let copy = bench.last();
    assert!(copy.is_whiteout("device") && copy.is_whiteout("named"));
    for dir in ["a", "b", "c"] {
        assert_eq!(copy.get(dir, "user.overlay.opaque").unwrap(), b"y", "{dir}");
        assert_eq!(copy.get(dir, "user.fuseoverlayfs.opaque"), None);
        assert_eq!(fs::read_dir(copy.path(dir)).unwrap().count(), 0);
    }
    assert_eq!(copy.get("f", "user.fuseoverlayfs.origin"), None);
    let report = adopted.report;
    assert_eq!((report.whiteouts.count, report.opaque_directories.count), (2, 3));
    assert_eq!(report.dropped_xattrs["user.fuseoverlayfs.origin"].count, 1);

    let root = bench.layer("root");
    root.file(".wh..wh..opq", "");
    assert_eq!(bench.adopt("root", &root, FuseOverlayfs).report.opaque_directories.count, 1);
    assert_eq!(bench.last().get("", "user.overlay.opaque").unwrap(), b"y");

    // It does not understand redirects, so that what it shows is not what the layer says.
    layer.xattr("b", "user.overlay.redirect", "a");
    let options = AdoptOptions::new(FuseOverlayfs);
    let result = bench.adopt_with("b", None, &layer, &options);
    fails(result, ErrorKind::FailedPrecondition, "redirect");
}

fn into_aufs() {
    let bench = Bench::new(LayerFormat::Aufs);
    let layer = bench.layer("foreign");
    layer.whiteout("gone").file("d/x", "").xattr("d", "user.overlay.opaque", "y");
    bench.adopt("a", &layer, OverlayUser);
    let copy = bench.last();
    assert!(copy.exists(".wh.gone") && copy.exists("d/.wh..wh..opq") && !copy.exists("gone"));

    layer.whiteout(&"n".repeat(252));
    let options = AdoptOptions::new(OverlayUser);
    assert!(bench.adopt_with("b", None, &layer, &options).is_err());
    fs::remove_file(layer.path(&"n".repeat(252))).unwrap();
    // A plain file to overlayfs, and a mark to such a store.
    layer.file("e/.wh.plain", "");
    let mut options = AdoptOptions::new(OverlayUser);
    options.other_marks = OtherMarks::Plain;
    let result = bench.adopt_with("b", None, &layer, &options);
    fails(result, ErrorKind::FailedPrecondition, ".wh.plain");
    bench.has_only(1);
}

fn override_stats() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    let me = fs::metadata(&layer.0).unwrap().uid();
    layer.file("f", "x").dir("d").file("pipe", "").file("socket", "");
    let key = "user.containers.override_stat";
    let group = fs::metadata(&layer.0).unwrap().gid();
    layer.xattr("f", key, format!("{me}:{group}:4711:file"));
    layer.xattr("d", "user.fuseoverlayfs.override_stat", format!("{me}:{group}:40711"));
    layer.xattr("pipe", key, format!("{me}:{group}:0600:pipe"));
    layer.xattr("socket", key, format!("{me}:{group}:0600:socket"));
    let mut options = AdoptOptions::new(FuseOverlayfs);
    let result = bench.adopt_with("a", None, &layer, &options);
    fails(result, ErrorKind::FailedPrecondition, "override_stat");
    bench.has_only(0);

    let mode = |path: &str| fs::symlink_metadata(bench.last().path(path)).unwrap().mode();
    options.override_stats = OverrideStats::Ignore;
    let report = bench.adopt_with("a", None, &layer, &options).unwrap().report;
    assert_eq!((report.override_stats.count, report.honoured_override_stats.count), (4, 0));
    assert_eq!(report.dropped_xattrs[key].count, 3);
    assert_eq!(mode("f"), fs::metadata(layer.path("f")).unwrap().mode());
    assert_eq!(bench.last().get("f", key), None);

    options.override_stats = OverrideStats::Honour;
    let report = bench.adopt_with("b", None, &layer, &options).unwrap().report;
    assert_eq!((report.override_stats.count, report.honoured_override_stats.count), (4, 4));
    assert_eq!((mode("f"), mode("d")), (0o104_711, 0o040_711));
    let pipe = fs::symlink_metadata(bench.last().path("pipe")).unwrap();
    assert!(pipe.file_type().is_fifo());
    assert_eq!((report.sockets.count, bench.last().get("f", key)), (1, None));
}

fn malformed_override_stats() {
    let key = "user.containers.override_stat";
    let bench = Bench::new(LayerFormat::OverlayUser);
    for (number, value) in
        ["0:0", "x", "0:0:0644:symlink", "0:0:0755:dir", "0:0:0644:char-0-0"].iter().enumerate()
    {
        let layer = bench.layer(&number.to_string());
        layer.file("f", "").xattr("f", key, value);
        let mut options = AdoptOptions::new(FuseOverlayfs);
        options.override_stats = OverrideStats::Honour;
        fails(bench.adopt_with("a", None, &layer, &options), ErrorKind::FailedPrecondition, "f\"");
        options.override_stats = OverrideStats::Ignore;
        bench.adopt_with(value, None, &layer, &options).unwrap();
    }
    let layer = bench.layer("two");
    layer.file("f", "").xattr("f", key, "0:0:0644:file");
    layer.xattr("f", "user.fuseoverlayfs.override_stat", "1:1:644");
    let mut options = AdoptOptions::new(FuseOverlayfs);
    options.override_stats = OverrideStats::Honour;
    fails(bench.adopt_with("a", None, &layer, &options), ErrorKind::FailedPrecondition, "two");
}

/// Writes something into a layer.
type Make = fn(&Layer) -> &Layer;

fn other_marks() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let make: [(ForeignFormat, Make, &str); 6] = [
        (OverlayUser, |l| l.file(".wh.x", ""), ".wh.x"),
        (OverlayUser, |l| l.file("d/.wh..wh..opq", ""), ".wh..wh..opq"),
        (OverlayUser, |l| l.file("f", "").xattr("f", "user.fuseoverlayfs.origin", ""), "f\""),
        (Aufs, |l| l.dir("d").xattr("d", "user.overlay.opaque", "y"), "user.overlay.opaque"),
        (Aufs, |l| l.dir("d").xattr("d", "user.overlay.origin", "y"), "another union"),
        (Aufs, |l| l.whiteout("d/x"), "d/x"),
    ];
    for (number, (format, make, naming)) in make.into_iter().enumerate() {
        let layer = bench.layer(&number.to_string());
        make(&layer);
        let mut options = AdoptOptions::new(format);
        let result = bench.adopt_with("a", None, &layer, &options);
        fails(result, ErrorKind::FailedPrecondition, naming);
        options.other_marks = OtherMarks::Plain;
        let plain = bench.adopt_with(&number.to_string(), None, &layer, &options);
        if number == 5 {
            // A device 0:0 is a whiteout in this store, and cannot be anything else.
            fails(plain, ErrorKind::FailedPrecondition, "d/x");
            continue;
        }
        let report = plain.unwrap().report;
        assert_eq!(report.plain_marks.count, u64::from(number < 2));
        assert_eq!(report.dropped_xattrs.len(), usize::from(number >= 2));
        if number == 0 {
            assert!(bench.last().exists(".wh.x"));
        }
    }
}

fn not_understood() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let make: [(Make, ErrorKind, &str); 7] = [
        (|l| l.file("f", "").xattr("f", "user.overlay.news", ""), PRECONDITION, "news"),
        (|l| l.dir("d").xattr("d", "user.overlay.opaque", "z"), PRECONDITION, "\"z\""),
        (|l| l.dir("d").xattr("d", "user.overlay.redirect", "e"), PRECONDITION, "userxattr"),
        (|l| l.dir("d").xattr("d", "user.overlay.metacopy", ""), PRECONDITION, "metacopy"),
        (
            |l| l.file("f", "").xattr("f", "user.overlay.metacopy", "abcd"),
            ErrorKind::Corrupt,
            "malformed",
        ),
        (
            |l| {
                l.file("f", "").xattr("f", "user.overlay.metacopy", "");
                l.xattr("f", "user.overlay.redirect", "a/b")
            },
            ErrorKind::Corrupt,
            "a/b",
        ),
        (|l| l.file("f", "x").xattr("f", "user.overlay.whiteout", ""), PRECONDITION, "f\""),
    ];
    for (number, (make, kind, naming)) in make.into_iter().enumerate() {
        let layer = bench.layer(&number.to_string());
        make(&layer);
        let options = AdoptOptions::new(OverlayUser);
        fails(bench.adopt_with("a", None, &layer, &options), kind, naming);
    }
    bench.has_only(0);
}

const PRECONDITION: ErrorKind = ErrorKind::FailedPrecondition;

fn wrong_directories() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let options = AdoptOptions::new(OverlayUser);
    let adopt = |dir: PathBuf, options: &AdoptOptions| {
        bench.store.adopt("a", None, dir, options, Labels::new(), &mut ignore_progress)
    };
    let layer = bench.layer("foreign");
    layer.file("f", "");
    fails(adopt(layer.path("missing"), &options), ErrorKind::NotFound, "missing");
    fails(adopt(layer.path("f"), &options), ErrorKind::InvalidArgument, "f\"");
    let root = bench.store.root().to_owned();
    for inside in [root.clone(), root.join("staging"), root.join("snapshots")] {
        fails(adopt(inside, &options), ErrorKind::InvalidArgument, "store itself");
    }
    // The store is in it.
    fails(adopt(bench.tmp.path().to_owned(), &options), ErrorKind::InvalidArgument, "store itself");
    let home = bench.layer("docker");
    home.file("diff/x", "").file("link", "A".repeat(26)).dir("work");
    fails(adopt(home.0.clone(), &options), PRECONDITION, "diff");

    let mut options = AdoptOptions::new(Aufs);
    options.lowers.push(home.0.clone());
    fails(adopt(layer.0.clone(), &options), ErrorKind::InvalidArgument, "docker");
    let mut options = AdoptOptions::new(OverlayUser);
    options.lowers.push(layer.path("missing"));
    fails(adopt(layer.0.clone(), &options), ErrorKind::NotFound, "missing");
    let options = AdoptOptions::new(OverlayUser);
    let result = bench.adopt_with("a", Some("none"), &layer, &options);
    fails(result, ErrorKind::NotFound, "none");
    bench.adopt("a", &layer, OverlayUser);
    fails(adopt(layer.0.clone(), &options), ErrorKind::AlreadyExists, "\"a\"");
    bench.has_only(1);
}

fn hostile_links() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let outside = bench.layer("outside");
    outside.file("secret", "secret");
    let layer = bench.layer("foreign");
    std::os::unix::fs::symlink(&outside.0, layer.path("dir")).unwrap();
    std::os::unix::fs::symlink(outside.path("secret"), layer.path("file")).unwrap();
    std::os::unix::fs::symlink("/proc/self/root", layer.path("magic")).unwrap();
    // The data of this one is said to be behind a link.
    let lower = bench.layer("lower");
    std::os::unix::fs::symlink(&outside.0, lower.path("way")).unwrap();
    std::os::unix::fs::symlink(outside.path("secret"), lower.path("m")).unwrap();
    bench.adopt("a", &layer, OverlayUser);
    let copy = bench.last();
    assert_eq!(fs::read_link(copy.path("dir")).unwrap(), outside.0);
    assert!(fs::symlink_metadata(copy.path("file")).unwrap().is_symlink());

    let mut options = AdoptOptions::new(OverlayUser);
    options.lowers.push(lower.0.clone());
    for redirect in ["/way/secret", "/m", "m"] {
        let name = redirect.replace('/', "-");
        let layer = bench.layer(&format!("meta{name}"));
        layer.file("f", "").xattr("f", "user.overlay.metacopy", "");
        layer.xattr("f", "user.overlay.redirect", redirect);
        fs::File::options().write(true).open(layer.path("f")).unwrap().set_len(6).unwrap();
        fails(bench.adopt_with("b", None, &layer, &options), PRECONDITION, "data");
    }
}

fn changing() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let changes: [fn(&Layer); 5] = [
        |l| {
            l.file("d/late", "");
        },
        |l| fs::remove_file(l.path("d/last")).unwrap(),
        |l| fs::rename(l.path("d"), l.path("e")).unwrap(),
        |l| {
            fs::remove_file(l.path("d/last")).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", l.path("d/last")).unwrap();
        },
        |l| {
            fs::rename(l.path("d"), l.path("e")).unwrap();
            std::os::unix::fs::symlink("/etc", l.path("d")).unwrap();
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let layer = bench.layer(&number.to_string());
        layer.file("d/first", "x").file("d/last", "x").file("z/z", "");
        let mut changed = false;
        let mut progress = |_| {
            if !changed {
                changed = true;
                change(&layer);
            }
            ControlFlow::Continue(())
        };
        let options = AdoptOptions::new(OverlayUser);
        let result = bench.store.adopt("a", None, &layer.0, &options, Labels::new(), &mut progress);
        fails(result, ErrorKind::Busy, &format!("/{number}"));
    }
    bench.has_only(0);
}

fn stopping() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    for name in ["a", "b", "c"] {
        layer.file(name, vec![1; 100_000]);
    }
    let mut calls = 0;
    let mut progress = |_| {
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let options = AdoptOptions::new(OverlayUser);
    let result = bench.store.adopt("a", None, &layer.0, &options, Labels::new(), &mut progress);
    fails(result, ErrorKind::Cancelled, "stopped");
    bench.has_only(0);
    bench.adopt("a", &layer, OverlayUser);
}

fn depth() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    let open = |dir: &std::os::fd::OwnedFd, name: &str| {
        rustix::fs::openat(dir, name, rustix::fs::OFlags::RDONLY, Mode::empty()).unwrap()
    };
    let mut dir: std::os::fd::OwnedFd = fs::File::open(&layer.0).unwrap().into();
    for _ in 0..2000 {
        rustix::fs::mkdirat(&dir, "d", Mode::RWXU).unwrap();
        rustix::fs::mkdirat(&dir, "e", Mode::RWXU).unwrap();
        dir = open(&dir, "d");
    }
    let adopted = bench.adopt("a", &layer, OverlayUser);
    assert_eq!(adopted.entries, 4001);
}

fn metacopies() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let (top, bottom) = (bench.layer("top"), bench.layer("bottom"));
    bottom.file("d/data", "the data").file("m", "of the same name").file("gone", "gone");
    // The one in the middle has no data either.
    top.file("d/moved", "").xattr("d/moved", "user.overlay.metacopy", "");
    top.xattr("d/moved", "user.overlay.redirect", "data").whiteout("gone");
    let layer = bench.layer("foreign");
    layer.file("d/named", "").file("m", "").file("full", "own").file("gone", "");
    let sizes = |path: &str, size: u64| {
        let file = fs::File::options().write(true).open(layer.path(path)).unwrap();
        file.set_len(size).unwrap();
    };
    sizes("d/named", 8);
    sizes("m", 16);
    let digest = |value: [u8; 32]| [&[0, 36, 0, 1][..], &value].concat();
    layer.xattr("d/named", "user.overlay.metacopy", "");
    layer.xattr("d/named", "user.overlay.redirect", "/d/moved");
    layer.xattr("m", "user.overlay.metacopy", [0, 4, 0, 0]).hard_link("m", "n");
    layer.xattr("full", "user.overlay.redirect", "/d/moved");
    fs::File::options().write(true).open(top.path("d/moved")).unwrap().set_len(8).unwrap();
    fs::set_permissions(layer.path("m"), PermissionsExt::from_mode(0o600)).unwrap();

    let mut options = AdoptOptions::new(OverlayUser);
    fails(bench.adopt_with("a", None, &layer, &options), PRECONDITION, "named");
    options.lowers = vec![top.0.clone(), bottom.0.clone()];
    let report = bench.adopt_with("a", None, &layer, &options).unwrap().report;
    let copy = bench.last();
    assert_eq!((copy.read("d/named"), copy.read("full")), ("the data".into(), "own".into()));
    assert_eq!(copy.read("n"), "of the same name");
    let meta = fs::metadata(copy.path("m")).unwrap();
    assert_eq!((meta.nlink(), meta.mode()), (2, 0o100_600));
    assert_eq!((report.metacopies.count, report.verified.count), (2, 0));

    // A digest is verified, the size too; what a layer between deletes is not found.
    layer.xattr("m", "user.overlay.metacopy", digest([7; 32]));
    fails(bench.adopt_with("b", None, &layer, &options), ErrorKind::DigestMismatch, "bottom/m");
    // Of 16 bytes "of the same name", by fs-verity's documentation.
    let right = verity_of_one_block(b"of the same name");
    layer.xattr("m", "user.overlay.metacopy", digest(right));
    let report = bench.adopt_with("b", None, &layer, &options).unwrap().report;
    assert_eq!(report.verified.paths[0].as_bytes(), b"m");
    sizes("m", 15);
    fails(bench.adopt_with("c", None, &layer, &options), ErrorKind::DigestMismatch, "16 bytes");
    sizes("m", 16);
    layer.xattr("gone", "user.overlay.metacopy", "");
    fails(bench.adopt_with("c", None, &layer, &options), PRECONDITION, "gone");
}

fn verity_of_one_block(data: &[u8]) -> [u8; 32] {
    use sha2::Digest as _;
    let mut block = data.to_vec();
    block.resize(4096, 0);
    let mut descriptor = vec![1, 1, 12, 0, 0, 0, 0, 0];
    descriptor.extend((data.len() as u64).to_le_bytes());
    descriptor.extend(sha2::Sha256::digest(&block));
    descriptor.resize(256, 0);
    sha2::Sha256::digest(&descriptor).into()
}

fn unchanged() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    layer.file("d/f", "x").whiteout("d/gone").xattr("d", "user.overlay.impure", "y");
    let ctimes = |path: &str| {
        let meta = fs::symlink_metadata(layer.path(path)).unwrap();
        (meta.ctime(), meta.ctime_nsec(), meta.mtime(), meta.mtime_nsec())
    };
    let before = ["", "d", "d/f", "d/gone"].map(ctimes);
    bench.adopt("a", &layer, OverlayUser);
    assert_eq!(["", "d", "d/f", "d/gone"].map(ctimes), before);
    assert_eq!(layer.get("d", "user.overlay.impure").unwrap(), b"y");
}

// --- with trusted xattrs -----------------------------------------------------------------------

fn redirects() {
    let bench = Bench::new(LayerFormat::OverlayTrusted);
    let (top, bottom) = (bench.layer("top"), bench.layer("bottom"));
    bottom.file("p/old/a", "a").file("p/old/b", "b").file("p/old/sub/c", "c").file("far/x", "x");
    top.file("p/old/b", "newer").whiteout("p/old/a");
    let layer = bench.layer("foreign");
    layer.whiteout("p/old").file("p/new/own", "own").whiteout("p/new/sub");
    layer.xattr("p/new", "trusted.overlay.redirect", "old");
    layer.dir("near").xattr("near", "trusted.overlay.redirect", "/far").whiteout("far");
    let mut options = AdoptOptions::new(Overlay);
    fails(bench.adopt_with("a", None, &layer, &options), PRECONDITION, "lower");
    options.lowers = vec![top.0.clone()];
    fails(bench.adopt_with("a", None, &layer, &options), PRECONDITION, "near");
    options.lowers = vec![top.0.clone(), bottom.0.clone()];
    let report = bench.adopt_with("a", None, &layer, &options).unwrap().report;
    let copy = bench.last();
    let names = |path: &str| {
        let mut names: Vec<_> =
            fs::read_dir(copy.path(path)).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names("p"), ["new", "old"]);
    assert_eq!(names("p/new"), ["b", "own"]);
    assert_eq!((copy.read("p/new/b"), copy.read("near/x")), ("newer".into(), "x".into()));
    assert!(copy.is_whiteout("p/old") && copy.is_whiteout("far"));
    for dir in ["p/new", "near"] {
        assert_eq!(copy.get(dir, "trusted.overlay.opaque").unwrap(), b"y");
        assert_eq!(copy.get(dir, "trusted.overlay.redirect"), None);
    }
    assert_eq!((report.redirects.count, report.whiteouts.count), (2, 2));
    assert_eq!((report.void_marks.count, report.opaque_directories.count), (1, 0));
}

fn nested_redirects() {
    let bench = Bench::new(LayerFormat::OverlayTrusted);
    let (top, bottom) = (bench.layer("top"), bench.layer("bottom"));
    bottom.file("first/in/a", "a").file("first/in/deep/b", "b").file("aside/c", "c");
    // Renamed there already, and a directory in it from elsewhere.
    top.dir("second/in").xattr("second", "trusted.overlay.redirect", "first").whiteout("first");
    top.dir("second/in/from").xattr("second/in/from", "trusted.overlay.redirect", "/aside");
    let layer = bench.layer("foreign");
    layer.dir("third/out").xattr("third", "trusted.overlay.redirect", "/second");
    layer.xattr("third/out", "trusted.overlay.redirect", "in").whiteout("second");
    layer.whiteout("third/in").whiteout("aside");
    let mut options = AdoptOptions::new(Overlay);
    options.lowers = vec![top.0.clone(), bottom.0.clone()];
    bench.adopt_with("a", None, &layer, &options).unwrap();
    let copy = bench.last();
    assert_eq!((copy.read("third/out/a"), copy.read("third/out/deep/b")), ("a".into(), "b".into()));
    assert_eq!(copy.read("third/out/from/c"), "c");
    assert!(!copy.exists("third/in"));
    assert_eq!(copy.get("third/out", "trusted.overlay.opaque"), None);
}

fn redirects_in_parents() {
    let bench = Bench::new(LayerFormat::OverlayTrusted);
    let (base, middle) = (bench.layer("base"), bench.layer("middle"));
    base.file("old/a", "a").file("old/b", "b").file("m", "data");
    bench.adopt("base", &base, Overlay);
    middle.whiteout("old/b");
    let options = AdoptOptions::new(Overlay);
    bench.adopt_with("middle", Some("base"), &middle, &options).unwrap();
    let layer = bench.layer("foreign");
    layer.dir("new").xattr("new", "trusted.overlay.redirect", "old").whiteout("old");
    layer.file("m", "1234").xattr("m", "trusted.overlay.metacopy", "");
    bench.adopt_with("top", Some("middle"), &layer, &options).unwrap();
    let copy = bench.last();
    assert_eq!((copy.read("new/a"), copy.read("m")), ("a".into(), "data".into()));
    assert!(!copy.exists("new/b"));
    assert_eq!(bench.store.check(&mut ignore_progress).unwrap().problems, []);
}

fn needs_privilege() {
    let bench = Bench::new(LayerFormat::OverlayUser);
    let layer = bench.layer("foreign");
    let options = AdoptOptions::new(Overlay);
    let result = bench.adopt_with("a", None, &layer, &options);
    fails(result, ErrorKind::PermissionDenied, "overlay-user");
    bench.has_only(0);
}

fn escaped() {
    let key = "trusted.overlay.overlay.opaque";
    for (format, kept) in [(LayerFormat::OverlayTrusted, true), (LayerFormat::OverlayUser, false)] {
        let bench = Bench::new(format);
        let layer = bench.layer("foreign");
        layer.dir("d").xattr("d", key, "y").xattr("d", "trusted.own", "1");
        let report = bench.adopt("a", &layer, Overlay).report;
        assert_eq!(bench.last().get("d", key).is_some(), kept);
        assert_eq!(report.dropped_xattrs.contains_key(key), !kept);
        assert_eq!(bench.last().get("d", "trusted.own").unwrap(), b"1");
        assert_eq!(bench.store.check(&mut ignore_progress).unwrap().problems, []);
    }
}

fn devices() {
    let bench = Bench::new(LayerFormat::OverlayTrusted);
    let layer = bench.layer("foreign");
    let null = rustix::fs::makedev(1, 3);
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, layer.path("null"), FileType::CharacterDevice, mode, null).unwrap();
    layer.file("f", "x").xattr("f", "trusted.own", "1");
    // cap_net_raw+ep, version 2.
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    layer.xattr("f", "security.capability", capability);
    std::os::unix::fs::chown(layer.path("f"), Some(1000), Some(1001)).unwrap();
    fs::set_permissions(layer.path("f"), PermissionsExt::from_mode(0o6755)).unwrap();
    layer.xattr("f", "security.capability", capability);
    // Read, write and search for all but the user 7.
    let list = [2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 0, 0, 7, 0, 0, 0, 4, 0, 5, 0];
    let rest =
        [255, 255, 255, 255, 16, 0, 7, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255, 255, 255, 255];
    let list = [&list[..], &rest[..]].concat();
    layer.dir("d").xattr("d", "system.posix_acl_default", &list);
    layer.file("d/inherits", "").file("e/g", "");
    layer.xattr("e/g", "system.posix_acl_access", &list);
    let expected = tree::lines(&layer.0, tree::Times::All);
    bench.adopt("a", &layer, Overlay);
    assert_eq!(tree::lines(&bench.last().0, tree::Times::All), expected);
    assert_eq!(foreign::xattrs(&bench.last().0), foreign::xattrs(&layer.0));

    let mut options = AdoptOptions::unprivileged(Overlay);
    options.report_paths = 0;
    let report = bench.adopt_with("b", None, &layer, &options).unwrap().report;
    assert_eq!((report.skipped_devices.count, report.skipped_devices.paths.len()), (1, 0));
    assert!(!bench.last().exists("null"));
    assert_eq!(fs::metadata(bench.last().path("f")).unwrap().uid(), 0);
}
