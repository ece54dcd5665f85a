//! Metadata-only copies: what is on disk, what is shown, how they get their data, and what a kill leaves.

use std::io::Write as _;

use super::super::copyup::Data;
use super::*;
use crate::sys::xattr::{self, Of};

const SIZE: usize = 300_000;

/// A lower file of some size.
fn big(f: &Fixture, path: &str) -> Vec<u8> {
    f.file(path);
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    fs::write(f.path(path), &bytes).unwrap();
    bytes
}

fn mode(mode: u32) -> SetAttr {
    SetAttr { mode: Some(mode), ..SetAttr::nothing() }
}

fn chmod(u: &Union, path: &str, bits: u32) {
    u.set_attr(&u.walk(path).unwrap(), &mode(bits)).unwrap();
}

/// The marks on a file of the upper.
fn marks_of(f: &Fixture, path: &str) -> Vec<String> {
    let file = fs::File::open(f.path("upper").join(path)).unwrap();
    let keys = xattr::list(Of::Fd(std::os::fd::AsFd::as_fd(&file))).unwrap();
    let keys = keys.into_iter().map(|key| String::from_utf8(key).unwrap());
    let keys = keys.filter_map(|key| key.strip_prefix("user.overlay.").map(str::to_owned));
    keys.filter(|key| key != "stratafs.origin").collect()
}

fn blocks(f: &Fixture, path: &str) -> u64 {
    fs::metadata(f.path(path)).unwrap().blocks()
}

fn contents(u: &Union, path: &str) -> Vec<u8> {
    u.bytes(&u.walk(path).unwrap(), 0, SIZE * 2)
}

const PARTIAL: [&str; 2] = ["metacopy", "redirect"];

#[test]
fn attributes_are_changed_without_a_copy_of_the_data() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let bytes = big(&f, "bottom/d/f");
    let u = f.open();
    let before = u.attr(&u.walk("d/f").unwrap()).unwrap();
    chmod(&u, "d/f", 0o640);
    u.set_xattr(&u.walk("d/f").unwrap(), b"user.x", b"1", OnPresence::Any, Caller::ROOT).unwrap();
    let expect = |u: &Union, path: &str| {
        let attr = u.attr(&u.walk(path).unwrap()).unwrap();
        assert_eq!(attr.mode, 0o640);
        assert_eq!(
            (attr.ino, attr.size, attr.blocks, attr.mtime, attr.nlink),
            (before.ino, before.size, before.blocks, before.mtime, 1),
        );
        assert!(contents(u, path) == bytes);
        assert_eq!(u.xattrs(&u.walk(path).unwrap()).unwrap(), [b"user.x"]);
    };
    expect(&u, "d/f");
    assert!(blocks(&f, "upper/d/f") < 32, "data were copied");
    assert_eq!(marks_of(&f, "d/f"), PARTIAL);
    u.mv("d/f", "moved", RenameMode::Replace).unwrap();
    expect(&u, "moved");
    assert!(blocks(&f, "upper/moved") < 32, "data were copied");
    // As the next union sees it.
    drop(u);
    expect(&f.open(), "moved");
    assert!(f.path("work/state/metacopy").exists());
}

#[test]
fn a_write_completes_it_where_it_stands() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let mut bytes = big(&f, "bottom/f");
    let u = f.open();
    chmod(&u, "f", 0o600);
    let (root, node) = (Arc::clone(u.root()), u.walk("f").unwrap());
    u.link(&node, &root, &name("g")).unwrap();
    let ino = fs::metadata(f.path("upper/f")).unwrap().ino();
    u.write(&node, 5, b"written", None, false).unwrap();
    bytes[5..12].copy_from_slice(b"written");
    for path in ["f", "g"] {
        assert!(contents(&u, path) == bytes, "{path}");
        assert_eq!(marks_of(&f, path), [""; 0]);
        let meta = fs::metadata(f.path("upper").join(path)).unwrap();
        assert_eq!((meta.ino(), meta.nlink(), meta.mode() & 0o7777), (ino, 2, 0o600));
        assert!(fs::read(f.path("upper").join(path)).unwrap() == bytes);
    }
    assert_eq!(names(&f.path("work/temp")), [""; 0]);
}

#[test]
fn truncation_copies_what_is_left() {
    for size in [0, 7, 200_000, 400_000_u64] {
        let f = Fixture::new(LayerFormat::OverlayUser);
        let mut bytes = big(&f, "bottom/f");
        let u = f.open();
        chmod(&u, "f", 0o600);
        let set = SetAttr { size: Some(size), ..SetAttr::nothing() };
        let attr = u.set_attr(&u.walk("f").unwrap(), &set).unwrap();
        assert_eq!((attr.size, attr.mode), (size, 0o600));
        bytes.resize(usize::try_from(size).unwrap(), 0);
        assert!(contents(&u, "f") == bytes, "{size}");
        assert!(fs::read(f.path("upper/f")).unwrap() == bytes, "{size}");
        assert_eq!(marks_of(&f, "f"), [""; 0]);
    }
}

#[test]
fn completion_keeps_times_and_setuid() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f");
    let u = f.open();
    chmod(&u, "f", 0o4755);
    let before = u.attr(&u.walk("f").unwrap()).unwrap();
    u.complete(&u.walk("f").unwrap(), Data::All).unwrap();
    assert_eq!(marks_of(&f, "f"), [""; 0]);
    let after = u.attr(&u.walk("f").unwrap()).unwrap();
    assert_eq!((after.mode, after.atime, after.mtime), (0o4755, before.atime, before.mtime));
}

#[test]
fn what_has_no_data_or_no_marks_is_copied_whole() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/empty");
    fs::write(f.path("bottom/empty"), "").unwrap();
    let u = f.open();
    chmod(&u, "empty", 0o600);
    assert_eq!(marks_of(&f, "empty"), [""; 0]);
    for (format, options) in [
        (LayerFormat::Aufs, UnionOptions::default()),
        (LayerFormat::OverlayUser, UnionOptions { no_metacopy: true, ..UnionOptions::default() }),
        (LayerFormat::OverlayUser, UnionOptions { no_redirects: true, ..UnionOptions::default() }),
    ] {
        let mut f = Fixture::new(format);
        f.options = options;
        let bytes = big(&f, "bottom/f");
        let u = f.open();
        chmod(&u, "f", 0o600);
        assert!(fs::read(f.path("upper/f")).unwrap() == bytes);
        assert!(!f.path("work/state/metacopy").exists());
    }
}

#[test]
fn a_path_that_no_redirect_can_hold_is_copied_whole() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    // With the slash before it, 256 bytes and 257.
    let dirs = format!("{}/{}", "a".repeat(150), "b".repeat(100));
    let (fits, is_longer) = (format!("{dirs}/ccc"), format!("{dirs}/cccc"));
    assert_eq!(fits.len() + 1, 256);
    big(&f, &format!("bottom/{fits}"));
    big(&f, &format!("bottom/{is_longer}"));
    let u = f.open();
    chmod(&u, &fits, 0o600);
    chmod(&u, &is_longer, 0o600);
    assert_eq!(marks_of(&f, &fits), PARTIAL);
    assert_eq!(marks_of(&f, &is_longer), [""; 0]);
    drop(u);
    assert_eq!(contents(&f.open(), &fits), contents(&f.open(), &is_longer));
}

#[test]
fn data_are_found_from_renamed_directories_and_hidden_names() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let bytes = big(&f, "bottom/d/sub/f");
    f.file("top/d/other");
    let u = f.open();
    u.mv("d", "e", RenameMode::Replace).unwrap();
    chmod(&u, "e/sub/f", 0o600);
    u.mv("e/sub/f", "f", RenameMode::Replace).unwrap();
    u.put("d", NewFile::Directory).unwrap();
    drop(u);
    let u = f.open();
    assert_eq!(marks_of(&f, "f"), PARTIAL);
    assert!(contents(&u, "f") == bytes);
    assert_eq!(u.ls("e/sub"), [""; 0]);
}

#[test]
fn all_names_of_a_hard_linked_file_change_together() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let mut bytes = big(&f, "bottom/a");
    fs::hard_link(f.path("bottom/a"), f.path("bottom/b")).unwrap();
    let u = f.open();
    chmod(&u, "a", 0o600);
    let (a, b) = (u.walk("a").unwrap(), u.walk("b").unwrap());
    assert_eq!(a.id(), b.id());
    assert!(contents(&u, "b") == bytes);
    assert_eq!(u.attr(&b).unwrap().nlink, 2);
    u.write(&b, 0, b"X", None, false).unwrap();
    bytes[0] = b'X';
    for path in ["a", "b"] {
        assert!(contents(&u, path) == bytes, "{path}");
        assert_eq!(u.attr(&u.walk(path).unwrap()).unwrap().nlink, 2);
    }
}

#[test]
fn an_unlinked_file_is_completed_too() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let mut bytes = big(&f, "bottom/f");
    let u = f.open();
    chmod(&u, "f", 0o600);
    let node = u.walk("f").unwrap();
    u.rm("f").unwrap();
    assert!(u.bytes(&node, 0, SIZE) == bytes);
    u.write(&node, 0, b"X", None, false).unwrap();
    bytes[0] = b'X';
    assert!(u.bytes(&node, 0, SIZE) == bytes);
    assert_eq!(u.attr(&node).unwrap().nlink, 0);
    assert_eq!(names(&f.path("work/temp")), [""; 0]);
}

/// While the data are copied the file shows what it showed, and takes no change of attributes; others do.
#[test]
fn nothing_shows_while_it_is_completed() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f");
    f.file("bottom/other");
    let u = f.open();
    chmod(&u, "f", 0o640);
    let node = u.walk("f").unwrap();
    let before = u.attr(&node).unwrap();
    u.hooks.hold();
    std::thread::scope(|scope| {
        let completing = scope.spawn(|| u.write(&u.walk("f").unwrap(), 0, b"X", None, false));
        while !u.hooks.held.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let shown = u.attr(&node).unwrap();
        assert_eq!(Attr { ctime: before.ctime, ..shown }, before);
        assert_eq!(u.bytes(&node, 0, 3), [0, 1, 2]);
        chmod(&u, "other", 0o600);
        u.mv("f", "g", RenameMode::Replace).unwrap();
        let changing = scope.spawn(|| chmod(&u, "g", 0o604));
        u.hooks.release();
        completing.join().unwrap().unwrap();
        changing.join().unwrap();
    });
    let attr = u.attr(&u.walk("g").unwrap()).unwrap();
    assert_eq!((attr.mode, attr.nlink), (0o604, 1));
    assert_eq!(&contents(&u, "g")[..3], b"X\x01\x02");
    assert_eq!(marks_of(&f, "g"), [""; 0]);
}

/// What a kill leaves at each point of a completion: the next union has the old file, or the new one.
#[test]
fn a_killed_completion_is_undone_or_done() {
    for copied in [1, 100_000, SIZE as u64] {
        let f = Fixture::new(LayerFormat::OverlayUser);
        let bytes = big(&f, "bottom/f");
        let u = f.open();
        chmod(&u, "f", 0o640);
        let before = u.attr(&u.walk("f").unwrap()).unwrap();
        let wrote = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            u.hooks.die_copying();
            u.complete(&u.walk("f").unwrap(), Data::First(copied))
        }));
        assert!(wrote.is_err(), "it was to be killed");
        let left = names(&f.path("work/temp"));
        assert_eq!(left.len(), 1, "{left:?}");
        drop(u);
        // What may be there by then.
        let mut file = fs::File::options().write(true).open(f.path("upper/f")).unwrap();
        file.write_all(b"half of it").unwrap();
        file.set_len(copied.max(10)).unwrap();
        let u = f.open();
        let attr = u.attr(&u.walk("f").unwrap()).unwrap();
        assert_eq!(Attr { ctime: before.ctime, generation: before.generation, ..attr }, before);
        assert!(contents(&u, "f") == bytes);
        assert!(blocks(&f, "upper/f") < 32, "data are left");
        assert_eq!(marks_of(&f, "f"), PARTIAL);
        assert_eq!(names(&f.path("work/temp")), [""; 0]);
    }
    // Killed after the step by which it counts.
    let f = Fixture::new(LayerFormat::OverlayUser);
    let bytes = big(&f, "bottom/f");
    let u = f.open();
    chmod(&u, "f", 0o640);
    u.complete(&u.walk("f").unwrap(), Data::All).unwrap();
    drop(u);
    let file = fs::File::open(f.path("upper/f")).unwrap();
    let of = Of::Fd(std::os::fd::AsFd::as_fd(&file));
    xattr::set(of, b"user.overlay.redirect", b"/f").unwrap();
    xattr::set(of, b"user.overlay.stratafs.completing", &[7; 40]).unwrap();
    fs::hard_link(f.path("upper/f"), f.path("work/temp/0")).unwrap();
    let u = f.open();
    assert!(contents(&u, "f") == bytes);
    assert_eq!(marks_of(&f, "f"), [""; 0]);
    assert_eq!(u.attr(&u.walk("f").unwrap()).unwrap().nlink, 1);
}

#[test]
fn settling_completes_files() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let bytes = big(&f, "bottom/d/f");
    big(&f, "bottom/e/g");
    let u = f.open();
    chmod(&u, "d/f", 0o600);
    chmod(&u, "e/g", 0o600);
    u.mv("e", "h", RenameMode::Replace).unwrap();
    u.mv("d/f", "f", RenameMode::Replace).unwrap();
    drop(u);
    let settled = settle(f.spec(), &mut crate::ignore_progress).unwrap();
    let bytes_copied = 2 * SIZE as u64;
    let expected = Settled { directories: 1, files: 2, copied: 0, bytes: bytes_copied };
    assert_eq!(settled, expected);
    for path in ["f", "h/g"] {
        assert!(fs::read(f.path("upper").join(path)).unwrap() == bytes);
        assert_eq!(marks_of(&f, path), [""; 0]);
        assert_eq!(fs::metadata(f.path("upper").join(path)).unwrap().mode() & 0o777, 0o600);
    }
    assert!(!f.path("work/state/metacopy").exists());
    assert_eq!(settle(f.spec(), &mut crate::ignore_progress).unwrap(), Settled::default());
}

#[test]
fn all_are_completed_while_it_is_in_use() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let bytes = big(&f, "bottom/d/f");
    big(&f, "bottom/g");
    let u = f.open();
    chmod(&u, "d/f", 0o600);
    u.mv("d", "e", RenameMode::Replace).unwrap();
    u.complete_all().unwrap();
    assert!(fs::read(f.path("upper/e/f")).unwrap() == bytes);
    assert!(!f.path("work/state/metacopy").exists());
    // And no more are made.
    chmod(&u, "g", 0o600);
    assert!(fs::read(f.path("upper/g")).unwrap() == bytes);
    assert!(contents(&u, "e/f") == bytes);
}

/// What the kernel's overlayfs made without a redirect, and what it made of a renamed file.
#[test]
fn the_kernels_copies_are_read() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let bytes = big(&f, "bottom/d/f");
    f.file("top/d/x");
    for (path, redirect) in [("d/f", None), ("d/renamed", Some("f")), ("far", Some("/d/f"))] {
        let at = f.path("upper").join(path);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        let file = fs::File::create(&at).unwrap();
        file.set_len(SIZE as u64).unwrap();
        let of = Of::Fd(std::os::fd::AsFd::as_fd(&file));
        xattr::set(of, b"user.overlay.metacopy", b"").unwrap();
        if let Some(redirect) = redirect {
            xattr::set(of, b"user.overlay.redirect", redirect.as_bytes()).unwrap();
        }
    }
    let u = f.open();
    for path in ["d/f", "d/renamed", "far"] {
        assert!(contents(&u, path) == bytes, "{path}");
    }
    // One whose data are not there is an error, not zeros.
    fs::remove_file(f.path("bottom/d/f")).unwrap();
    drop(u);
    let u = f.open();
    assert!(u.lookup(u.root(), &name("far")).is_err());
}
