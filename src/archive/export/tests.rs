//! Layers made in each format, packed, and read back.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::archive::entry::{EntryLimits, EntryReader};
use crate::digest::Digest;
use crate::progress::ignore_progress;
use crate::sys::dir::Dir;

const FORMATS: [LayerFormat; 2] = [LayerFormat::OverlayUser, LayerFormat::Aufs];

/// A layer directory that is removed at the end.
struct Layer {
    tmp: tempfile::TempDir,
    format: LayerFormat,
}

impl Layer {
    fn new(format: LayerFormat) -> Self {
        // Not /tmp: a tmpfs may have no user xattrs.
        Layer { tmp: tempfile::tempdir_in("/var/tmp").unwrap(), format }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.tmp.path().join(path)
    }

    fn file(&self, path: &str, content: &[u8]) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn dir(&self, path: &str) -> Dir {
        fs::create_dir_all(self.path(path)).unwrap();
        Dir::open(self.path(path)).unwrap()
    }

    fn whiteout(&self, dir: &str, name: &str) {
        let name = Name::new(name).unwrap();
        marks::make_whiteout(self.format, &self.dir(dir), &name).unwrap();
    }

    fn opaque(&self, dir: &str) {
        marks::make_opaque(self.format, &self.dir(dir)).unwrap();
    }

    fn xattr(&self, path: &str, key: &str, value: &[u8]) {
        let path = Path::new(path);
        let dir = self.dir(path.parent().unwrap().to_str().unwrap());
        let name = Name::new(path.file_name().unwrap().as_encoded_bytes()).unwrap();
        xattr::set(Of::Child(&dir, &name), key.as_bytes(), value).unwrap();
    }

    fn branch(&self) -> Branch {
        Branch { dir: Arc::new(Dir::open(self.tmp.path()).unwrap()), format: self.format }
    }

    fn try_export(&self, options: &ExportOptions) -> (Vec<u8>, Result<Exported>) {
        let mut out = Vec::new();
        let done = export(&self.branch(), None, &mut out, options, &mut ignore_progress);
        (out, done)
    }

    fn export(&self) -> Vec<u8> {
        let (out, done) = self.try_export(&ExportOptions::new());
        let done = done.unwrap();
        assert_eq!(done.bytes, out.len() as u64);
        assert_eq!(done.diff_id, DiffId::from(Digest::of(&out)));
        assert_eq!(done.entries, entries(&out).len() as u64);
        out
    }

    fn export_over(&self, parents: &[&Layer]) -> Vec<String> {
        let stack = LayerStack::new(parents.iter().map(|l| l.branch()).collect());
        let mut out = Vec::new();
        let options = ExportOptions::new();
        export(&self.branch(), Some(&stack), &mut out, &options, &mut ignore_progress).unwrap();
        paths(&out)
    }
}

fn entries(archive: &[u8]) -> Vec<(Entry, Vec<u8>)> {
    let mut reader = EntryReader::new(archive, EntryLimits::default());
    let mut entries = Vec::new();
    while let Some(entry) = reader.next().unwrap() {
        let mut content = Vec::new();
        reader.content().read_to_end(&mut content).unwrap();
        entries.push((entry, content));
    }
    entries
}

fn paths(archive: &[u8]) -> Vec<String> {
    let text = |path: &RelPath| String::from_utf8(path.as_bytes().to_vec()).unwrap();
    entries(archive).iter().map(|(entry, _)| text(&entry.path)).collect()
}

fn find(archive: &[u8], path: &str) -> (Entry, Vec<u8>) {
    let found = entries(archive).into_iter().find(|(e, _)| e.path.as_bytes() == path.as_bytes());
    found.unwrap_or_else(|| panic!("no {path} in {:?}", paths(archive)))
}

fn refused(layer: &Layer) -> (Vec<u8>, Error) {
    let (out, done) = layer.try_export(&ExportOptions::new());
    let e = done.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition, "{e}");
    (out, e)
}

/// The same layer in either format.
fn sample(format: LayerFormat) -> Layer {
    let layer = Layer::new(format);
    layer.file("b/file", b"content");
    layer.file("a.b", b"");
    layer.file("a/z", b"");
    layer.whiteout("", "zz-gone");
    layer.whiteout("", "gone");
    layer.whiteout("b", "x");
    layer.opaque("b");
    layer.opaque("a/new");
    std::os::unix::fs::symlink("../b", layer.path("a/link")).unwrap();
    layer
}

#[test]
fn marks_then_entries_in_byte_order_whatever_the_format() {
    let options = ExportOptions { source_date_epoch: Some(1), ..ExportOptions::new() };
    let [overlay, aufs] = FORMATS.map(|format| {
        let (out, done) = sample(format).try_export(&options);
        done.unwrap();
        out
    });
    assert_eq!(
        paths(&overlay),
        [
            "",
            ".wh.gone",
            ".wh.zz-gone",
            "a",
            "a/link",
            "a/new",
            "a/new/.wh..wh..opq",
            "a/z",
            "a.b",
            "b",
            "b/.wh..wh..opq",
            "b/.wh.x",
            "b/file",
        ]
    );
    assert!(overlay == aufs, "formats differ: {:?}", paths(&aufs));
    let (mark, content) = find(&overlay, ".wh.gone");
    assert_eq!((mark.mode, mark.uid, mark.gid, content), (0, 0, 0, Vec::new()));
    assert_eq!(mark.mtime, Timestamp::default());
    let (link, _) = find(&overlay, "a/link");
    assert_eq!(link.kind, EntryKind::Symlink { target: b"../b".to_vec() });
}

#[test]
fn the_same_layer_gives_the_same_bytes() {
    let layer = sample(LayerFormat::OverlayUser);
    assert!(layer.export() == layer.export());
}

#[test]
fn attributes_and_content_are_kept_and_times_bounded_on_request() {
    let layer = Layer::new(LayerFormat::OverlayUser);
    layer.file("f", b"");
    let file = fs::OpenOptions::new().write(true).open(layer.path("f")).unwrap();
    file.write_all_at(b"end", 100_000).unwrap();
    fs::set_permissions(layer.path("f"), fs::Permissions::from_mode(0o4751)).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 123_456_789);
    file.set_modified(time).unwrap();
    layer.xattr("f", "user.kept", b"\0v");
    layer.xattr("f", "user.overlay.origin", b"x");
    layer.xattr("f", "user.fuseoverlayfs.opaque", b"y");
    layer.xattr("f", "user.containers.override_stat", b"0:0:0755");

    let (entry, content) = find(&layer.export(), "f");
    assert_eq!(content, [vec![0; 100_000], b"end".to_vec()].concat());
    assert_eq!(entry.kind, EntryKind::File { size: 100_003, sparse: None });
    assert_eq!(entry.mode, 0o4751);
    assert_eq!(entry.mtime, Timestamp { secs: 1_000_000, nanos: 123_456_789 });
    let keys: Vec<_> = entry.xattrs.keys().filter(|k| k.starts_with(b"user.")).collect();
    assert_eq!(keys, [b"user.kept"]);
    assert_eq!(entry.xattrs[&b"user.kept"[..]], b"\0v");

    for (epoch, expected) in [
        (1_000_000, Timestamp { secs: 1_000_000, nanos: 0 }),
        (-1, Timestamp { secs: -1, nanos: 0 }),
        (1_000_001, entry.mtime),
    ] {
        let options = ExportOptions { source_date_epoch: Some(epoch), ..ExportOptions::new() };
        assert_eq!(find(&layer.try_export(&options).0, "f").0.mtime, expected);
    }
}

#[test]
fn names_that_read_as_marks_are_refused_before_a_byte() {
    let long = "n".repeat(252);
    let overlay = || Layer::new(LayerFormat::OverlayUser);
    let named = overlay();
    named.file("d/.wh.foo", b"");
    let directory = overlay();
    directory.file("d/.wh.dir/x", b"");
    let opaque = overlay();
    opaque.file("d/.wh..wh..opq", b"");
    let whiteout = overlay();
    whiteout.whiteout("d", &long);
    let of_mark = overlay();
    of_mark.whiteout("d", ".wh.x");
    for (layer, name) in [
        (named, "d/.wh.foo"),
        (directory, "d/.wh.dir"),
        (opaque, "d/.wh..wh..opq"),
        (whiteout, &format!("d/{long}")),
        (of_mark, "d/.wh.x"),
    ] {
        let (out, e) = refused(&layer);
        assert_eq!((out.len(), e.path()), (0, Some(Path::new(name))));
    }
    let longest = overlay();
    longest.whiteout("", &long[..251]);
    assert_eq!(paths(&longest.export()), [String::new(), format!(".wh.{}", &long[..251])]);
}

#[test]
fn marks_are_dropped_only_where_the_parents_have_nothing_to_hide() {
    for format in FORMATS {
        let [top, middle, bottom] = [(); 3].map(|()| Layer::new(format));
        bottom.file("d/old", b"");
        bottom.file("d/gone", b"");
        bottom.file("e/old", b"");
        bottom.file("f", b"");
        middle.whiteout("d", "gone");
        top.whiteout("d", "old");
        top.whiteout("d", "gone");
        top.whiteout("d", "never");
        top.whiteout("new", "x");
        top.opaque("e");
        top.opaque("e/new");
        top.opaque("f");
        let over = top.export_over(&[&middle, &bottom]);
        let expected = ["", "d", "d/.wh.old", "e", "e/.wh..wh..opq", "e/new", "f", "new"];
        assert_eq!(over, expected, "{format}");
        let all = top.export_over(&[]);
        assert_eq!(all, ["", "d", "e", "e/new", "f", "new"], "{format}");
        assert_eq!(paths(&top.export()).len(), 6 + 7, "{format}");
    }
}

#[test]
fn parents_are_followed_through_deep_trees_with_few_descriptors() {
    let [top, bottom] = [(); 2].map(|()| Layer::new(LayerFormat::Aufs));
    let (d, e) = (Name::new("d").unwrap(), Name::new("e").unwrap());
    let depth = 400;
    for layer in [&top, &bottom] {
        let mut dir = layer.dir("");
        for _ in 0..depth {
            for name in [&d, &e] {
                dir.make_dir(name, 0o700).unwrap();
                let dir = dir.open_dir(name).unwrap();
                marks::make_opaque(LayerFormat::Aufs, &dir).unwrap();
            }
            dir = dir.open_dir(&d).unwrap();
        }
    }
    let over = top.export_over(&[&bottom]);
    assert_eq!(over.len(), 1 + 4 * depth);
}

#[test]
fn the_first_name_of_an_inode_is_the_file() {
    let layer = Layer::new(LayerFormat::OverlayUser);
    layer.file("b", b"content");
    fs::hard_link(layer.path("b"), layer.path("c")).unwrap();
    layer.dir("a");
    fs::hard_link(layer.path("b"), layer.path("a/d")).unwrap();
    let archive = layer.export();
    assert_eq!(paths(&archive), ["", "a", "a/d", "b", "c"]);
    assert_eq!(find(&archive, "a/d").1, b"content");
    for link in ["b", "c"] {
        let kind = EntryKind::HardLink { target: RelPath::new("a/d").unwrap() };
        assert_eq!(find(&archive, link).0.kind, kind);
    }
}

#[test]
fn sockets_are_counted_and_left_out_under_every_name() {
    let layer = Layer::new(LayerFormat::OverlayUser);
    let _listener = UnixListener::bind(layer.path("socket")).unwrap();
    fs::hard_link(layer.path("socket"), layer.path("z")).unwrap();
    let (out, done) = layer.try_export(&ExportOptions::new());
    assert_eq!((paths(&out), done.unwrap().sockets), (vec![String::new()], 2));
}

#[test]
fn what_a_socket_hides_is_deleted() {
    let (layer, below) =
        (Layer::new(LayerFormat::OverlayUser), Layer::new(LayerFormat::OverlayUser));
    fs::create_dir(layer.path("d")).unwrap();
    for path in ["d/new", "d/old"] {
        drop(UnixListener::bind(layer.path(path)).unwrap());
    }
    below.file("d/old", b"");
    assert_eq!(layer.export_over(&[&below]), ["", "d", "d/.wh.old"]);
}

#[test]
fn aufs_own_files_are_left_out_with_all_below() {
    let layer = Layer::new(LayerFormat::Aufs);
    layer.file(".wh..wh.plnk/1.2", b"");
    layer.file(".wh..wh.aufs", b"");
    layer.file("f", b"");
    assert_eq!(paths(&layer.export()), ["", "f"]);
}

#[test]
fn layers_that_refer_below_are_refused() {
    for (key, value) in [("user.overlay.redirect", &b"old"[..]), ("user.overlay.metacopy", b"")] {
        let layer = Layer::new(LayerFormat::OverlayUser);
        layer.dir("d");
        layer.xattr("d", key, value);
        let (_, e) = refused(&layer);
        assert_eq!(e.path(), Some(Path::new("d")));
    }
    // Those of another format are plain xattrs of a union, and stripped.
    let layer = Layer::new(LayerFormat::Aufs);
    layer.dir("d");
    layer.xattr("d", "user.overlay.redirect", b"old");
    assert_eq!(paths(&layer.export()), ["", "d"]);
}

#[test]
fn a_file_that_changes_size_meanwhile_is_an_error() {
    for size in [1_200_000, 10] {
        let layer = Layer::new(LayerFormat::OverlayUser);
        layer.file("f", &[b'x'; 600_000]);
        let file = fs::OpenOptions::new().write(true).open(layer.path("f")).unwrap();
        let mut resize = |progress: Progress| {
            if progress.bytes > 0 {
                file.set_len(size).unwrap();
            }
            ControlFlow::Continue(())
        };
        let options = ExportOptions::new();
        let done = export(&layer.branch(), None, &mut io::sink(), &options, &mut resize);
        let e = done.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
        assert_eq!(e.path(), Some(Path::new("f")));
    }
}

#[test]
fn threads_change_nothing() {
    let layer = Layer::new(LayerFormat::OverlayUser);
    layer.file("a", &[b'x'; 1_000_000]);
    layer.file("b", b"");
    layer.file("c", &[b'y'; 300_000]);
    let exports = [0, 1, 2, 9].map(|threads| {
        let options = ExportOptions { threads, ..ExportOptions::new() };
        let (out, done) = layer.try_export(&options);
        let done = done.unwrap();
        assert_eq!(done.diff_id, DiffId::from(crate::digest::Digest::of(&out)));
        assert_eq!(done.bytes, out.len() as u64);
        out
    });
    assert!(exports.iter().all(|out| *out == exports[0]));
}

#[test]
fn stops_when_asked_within_a_file_too() {
    let layer = Layer::new(LayerFormat::OverlayUser);
    layer.file("f", &[b'x'; 100_000]);
    let mut stop = |progress: Progress| match progress.bytes {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    };
    let options = ExportOptions::new();
    let done = export(&layer.branch(), None, &mut io::sink(), &options, &mut stop);
    assert_eq!(done.unwrap_err().kind(), ErrorKind::Cancelled);
}
