//! Metadata-only copies and linked files where others interfere: the kernel's copies, other layers, taken
//! numbers, kills, files that are closed to their owner.

use std::os::fd::AsFd;

use super::super::copyup::Data;
use super::*;
use crate::sys::xattr::{self, Of};

const SIZE: usize = 300_000;

/// A lower file of some size, of other bytes for each `k`.
fn big(f: &Fixture, path: &str, k: usize) -> Vec<u8> {
    f.file(path);
    let bytes: Vec<u8> = (0..SIZE).map(|i| ((i + k) % 251) as u8).collect();
    fs::write(f.path(path), &bytes).unwrap();
    bytes
}

fn chmod(u: &Union, path: &str, bits: u32) -> io::Result<Attr> {
    u.set_attr(&u.walk(path).unwrap(), &SetAttr { mode: Some(bits), ..SetAttr::nothing() })
}

fn contents(u: &Union, path: &str) -> Vec<u8> {
    u.bytes(&u.walk(path).unwrap(), 0, SIZE * 2)
}

#[test]
fn a_copy_of_the_kernels_keeps_its_data_when_it_is_renamed() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let a = big(&f, "bottom/a", 0);
    let _b = big(&f, "bottom/b", 7);
    let file = fs::File::create(f.path("upper/a")).unwrap();
    file.set_len(SIZE as u64).unwrap();
    xattr::set(Of::Fd(file.as_fd()), b"user.overlay.metacopy", b"").unwrap();
    let u = f.open();
    assert!(contents(&u, "a") == a);
    u.mv("a", "b", RenameMode::Replace).unwrap();
    assert!(contents(&u, "b") == a);
    drop(u);
    let u = f.open();
    assert!(contents(&u, "b") == a);
}

/// Two names of a lower file, of which `a` was written through and removed: what `b` shows is under no name
/// but the union's own.
fn b_by_its_link_alone(f: &Fixture) {
    f.file("bottom/a");
    fs::hard_link(f.path("bottom/a"), f.path("bottom/b")).unwrap();
    let u = f.open();
    u.write(&u.walk("a").unwrap(), 0, b"NEW", None, false).unwrap();
    u.rm("a").unwrap();
    u.close().unwrap();
    drop(u);
}

#[test]
fn a_mount_without_a_layer_loses_no_linked_file() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    b_by_its_link_alone(&f);
    let u = f.open();
    assert_eq!(&u.text("b").unwrap()[..3], "NEW");
    u.close().unwrap();
    drop(u);
    let mut spec = f.spec();
    spec.lowers.pop();
    drop(Union::open(spec).unwrap());
    let u = f.open();
    assert_eq!(&u.text("b").unwrap()[..3], "NEW");
}

#[test]
fn a_layer_that_is_another_can_be_opened() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/a");
    fs::hard_link(f.path("bottom/d/a"), f.path("bottom/b")).unwrap();
    let u = f.open();
    u.write(&u.walk("d/a").unwrap(), 0, b"NEW", None, false).unwrap();
    u.close().unwrap();
    drop(u);
    fs::remove_dir_all(f.path("bottom/d")).unwrap();
    fs::write(f.path("bottom/d"), "").unwrap();
    Union::open(f.spec()).expect("CANNOT OPEN");
}

#[test]
fn settling_removes_void_marks_from_files() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f", 0);
    let u = f.open();
    chmod(&u, "f", 0o640).unwrap();
    u.complete(&u.walk("f").unwrap(), Data::All).unwrap();
    drop(u);
    let file = fs::File::open(f.path("upper/f")).unwrap();
    let of = Of::Fd(file.as_fd());
    // Killed right after the note was unlinked.
    xattr::set(of, b"user.overlay.redirect", b"/f").unwrap();
    xattr::set(of, b"user.overlay.stratafs.completing", &[7; 40]).unwrap();
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    assert!(!marks::refers_below(f.format, of).unwrap());
}

#[test]
fn a_copy_whose_number_is_taken_is_one_file() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f", 0);
    let ino = fs::metadata(f.path("bottom/f")).unwrap().ino();
    fs::write(f.path("upper/u"), "u").unwrap();
    let fsid = file::file_system_stat(Dir::open(f.path("upper")).unwrap()).unwrap().id;
    let file = fs::File::open(f.path("upper/u")).unwrap();
    let v = [fsid.to_le_bytes(), ino.to_le_bytes()].concat();
    xattr::set(Of::Fd(file.as_fd()), b"user.overlay.stratafs.origin", &v).unwrap();
    let u = f.open();
    let _u = u.walk("u").unwrap();
    let n = u.walk("f").unwrap();
    u.set_attr(&n, &SetAttr { mode: Some(0o600), ..SetAttr::nothing() }).unwrap();
    let m = u.walk("f").unwrap();
    assert_eq!(n.id(), m.id());
    u.write(&m, 0, b"MMMM", None, false).unwrap();
    assert_eq!(u.bytes(&n, 0, 4), b"MMMM");
    u.write(&n, 100, b"N", None, false).unwrap();
    let got = fs::read(f.path("upper/f")).unwrap();
    assert_eq!(&got[..4], b"MMMM");
}

#[test]
fn what_was_found_during_completion_is_not_shown() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f", 0);
    let u = f.open();
    chmod(&u, "f", 0o640).unwrap();
    let node = u.walk("f").unwrap();
    let before = u.attr(&node).unwrap();
    u.hooks.hold();
    let upper = Dir::open(f.path("upper")).unwrap();
    let stat = std::thread::scope(|scope| {
        let c = scope.spawn(|| u.complete(&node, Data::All));
        while !u.hooks.held.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let stat = upper.stat_at(&name("f")).unwrap();
        u.hooks.release();
        c.join().unwrap().unwrap();
        stat
    });
    let attr = u.attr_as_found(&node, &stat).unwrap();
    assert_eq!(Attr { ctime: before.ctime, blocks: before.blocks, ..attr }, before);
}

#[test]
fn a_file_closed_to_its_owner_is_found_again() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f", 0);
    let u = f.open();
    chmod(&u, "f", 0o000).unwrap();
    drop(u);
    let u = f.open();
    u.lookup(u.root(), &name("f")).expect("LOOKUP");
}

#[test]
fn a_file_closed_to_its_owner_is_recovered() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f", 0);
    let u = f.open();
    let n = u.walk("f").unwrap();
    u.set_attr(&n, &SetAttr { mode: Some(0), ..SetAttr::nothing() }).unwrap();
    let wrote = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        u.hooks.die_copying();
        u.complete(&n, Data::All)
    }));
    assert!(wrote.is_err());
    drop((u, n));
    Union::open(f.spec()).expect("OPEN");
}

#[test]
fn links_count_as_moves() {
    // A link and an unlink are a move that `moved` does not count.
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f", 0);
    let u = f.open();
    chmod(&u, "f", 0o600).unwrap();
    let before = u.moved.load(Ordering::SeqCst);
    u.link(&u.walk("f").unwrap(), u.root(), &name("g")).unwrap();
    u.rm("f").unwrap();
    assert_ne!(u.moved.load(Ordering::SeqCst), before);
}

#[test]
fn a_copy_of_another_length_than_its_data_is_an_error() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f", 0);
    let u = f.open();
    chmod(&u, "f", 0o600).unwrap();
    drop(u);
    fs::File::options().write(true).open(f.path("upper/f")).unwrap().set_len(7).unwrap();
    let u = f.open();
    assert!(u.lookup(u.root(), &name("f")).is_err());
}

#[test]
fn capabilities_stay_while_a_file_is_completed() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/f", 0);
    let cap = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let file = fs::File::open(f.path("bottom/f")).unwrap();
    if xattr::set(Of::Fd(file.as_fd()), b"security.capability", &cap).is_err() {
        // Only root may give capabilities.
        return;
    }
    let u = f.open();
    chmod(&u, "f", 0o755).unwrap();
    let node = u.walk("f").unwrap();
    assert!(u.xattr(&node, b"security.capability").unwrap().is_some());
    u.hooks.hold();
    std::thread::scope(|scope| {
        let c = scope.spawn(|| u.complete(&node, Data::All));
        while !u.hooks.held.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let shown = scope.spawn(|| u.xattr(&node, b"security.capability").unwrap());
        let removed =
            scope.spawn(|| u.remove_xattr(&node, b"security.capability", Caller::ROOT).unwrap());
        u.hooks.release();
        c.join().unwrap().unwrap();
        shown.join().unwrap();
        removed.join().unwrap();
    });
    assert_eq!(u.xattr(&node, b"security.capability").unwrap(), None);
}

#[test]
fn a_mark_of_an_unknown_kind_is_an_error() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let bytes = big(&f, "bottom/f", 0);
    for (mark, good) in [
        (&b""[..], true),
        (&[0, 4, 0, 0], true),
        (&[0, 36, 0, 1, 7, 7], true),
        (&[1], false),
        (&[1, 4, 0, 0], false),
        (&[0, 4], false),
    ] {
        let file = fs::File::create(f.path("upper/f")).unwrap();
        file.set_len(SIZE as u64).unwrap();
        xattr::set(Of::Fd(file.as_fd()), b"user.overlay.metacopy", mark).unwrap();
        let u = f.open();
        match good {
            true => assert!(contents(&u, "f") == bytes, "{mark:?}"),
            false => assert!(u.lookup(u.root(), &name("f")).is_err(), "{mark:?}"),
        }
        fs::remove_file(f.path("upper/f")).unwrap();
    }
}

/// Once a layer was taken as it is, nothing that comes later refers to lower layers.
#[test]
fn a_layer_that_was_taken_stays_whole() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    big(&f, "bottom/d/f", 0);
    f.file("bottom/linked");
    fs::hard_link(f.path("bottom/linked"), f.path("bottom/d/other")).unwrap();
    let u = f.open();
    u.complete_all().unwrap();
    let e = u.mv("d", "e", RenameMode::Replace).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::CrossesDevices);
    chmod(&u, "d/f", 0o600).unwrap();
    chmod(&u, "linked", 0o600).unwrap();
    assert_eq!(fs::metadata(f.path("upper/d/f")).unwrap().mode() & 0o777, 0o600);
    let meta = |path: &str| fs::metadata(f.path("upper").join(path)).unwrap();
    assert_eq!(meta("linked").ino(), meta("d/other").ino());
    assert!(!f.path("work/state/metacopy").exists());
    assert!(!f.path("work/state/redirected").exists());
}

#[test]
fn settling_on_other_layers_is_refused() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    b_by_its_link_alone(&f);
    let mut spec = f.spec();
    spec.lowers.pop();
    let e = settle(spec, &mut crate::ignore_progress).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
    assert!(f.path("work/state/linked").exists());
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    assert_eq!(fs::read(f.path("upper/b")).unwrap(), b"NEWtom/a");
}

#[test]
fn marks_that_go_while_they_are_read_are_no_error() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    fs::write(f.path("upper/f"), "has its data").unwrap();
    let u = f.open();
    let upper = Dir::open(f.path("upper")).unwrap();
    let f_name = name("f");
    let seen = [&b"user.overlay.metacopy"[..], b"user.overlay.redirect"].map(<[u8]>::to_vec);
    let place = file::Place::Child(&upper, &f_name);
    let below = u.data_below(f.format, (u.root(), &f_name), place, &seen);
    assert!(below.unwrap().is_none());
}
