//! Settled layers: whole, alone, and the same wherever settling ended meanwhile.

use std::ops::ControlFlow;

use super::*;

#[test]
fn a_settled_upper_stands_on_its_own() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    for file in ["bottom/d/sub/a", "top/d/sub/b", "bottom/d/c", "bottom/d/gone", "bottom/e/hidden"]
    {
        f.file(file);
    }
    f.file("bottom/d/sub/c2");
    let u = f.open();
    u.rm("d/gone").unwrap();
    u.mv("d/sub", "d/moved", RenameMode::Replace).unwrap();
    u.write(&u.walk("d/moved/a").unwrap(), 0, b"X", None, false).unwrap();
    u.mv("d", "f", RenameMode::Replace).unwrap();
    u.rm("e/hidden").unwrap();
    u.rm_dir("e").unwrap();
    u.mv("f/moved", "e", RenameMode::Replace).unwrap();
    let mtime = |u: &Union, path: &str| u.attr(&u.walk(path).unwrap()).unwrap().mtime;
    let times = (mtime(&u, "e"), mtime(&u, "f"), mtime(&u, "e/b"));
    let expect = |u: &Union| {
        assert_eq!(
            (u.ls(""), u.ls("e"), u.ls("f")),
            (
                vec!["e".to_owned(), "f".to_owned()],
                vec!["a".to_owned(), "b".to_owned(), "c2".to_owned()],
                vec!["c".to_owned()],
            )
        );
        assert_eq!(u.text("e/a").unwrap(), "Xottom/d/sub/a");
        assert_eq!(u.text("e/b").unwrap(), "top/d/sub/b");
        assert_eq!((mtime(u, "e"), mtime(u, "f"), mtime(u, "e/b")), times);
    };
    expect(&u);
    drop(u);
    assert!(f.path("work/state/redirected").exists());
    // Stopped at every point, and taken up again.
    let mut points = 0;
    loop {
        let mut left = points;
        let stopped = settle(f.spec(), &mut |_| {
            left -= 1;
            if left < 0 {
                std::ops::ControlFlow::Break(())
            } else {
                std::ops::ControlFlow::Continue(())
            }
        });
        expect(&f.open());
        match stopped {
            Err(e) => assert_eq!(e.kind(), ErrorKind::Cancelled),
            Ok(_) => break,
        }
        points += 1;
    }
    assert!(points > 5, "{points}");
    assert!(!f.path("work/state/redirected").exists());
    // Without redirects it is the same: every mark that is left says what is deleted.
    let marks = |path: &str| xattr_keys(&f.path("upper").join(path));
    assert!(marks("f").iter().all(|key| !key.ends_with(b"redirect") && !key.ends_with(b"opaque")));
    assert!(marks("e").iter().any(|key| key.ends_with(b"opaque")), "it hides the lower e");
    assert_eq!(f.upper_names("f"), ["c"]);
    assert_eq!(f.upper_names("e"), ["a", "b", "c2"]);
}

#[test]
fn a_name_in_a_renamed_directory_stays_one_file_with_those_elsewhere() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/x");
    fs::create_dir(f.path("bottom/e")).unwrap();
    fs::hard_link(f.path("bottom/d/x"), f.path("bottom/e/y")).unwrap();
    let u = f.open();
    u.mv("d", "f", RenameMode::Replace).unwrap();
    u.close().unwrap();
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    let stat = |name: &str| {
        let meta = fs::metadata(f.path("upper").join(name)).unwrap();
        (meta.ino(), meta.nlink())
    };
    assert_eq!(stat("f/x"), stat("e/y"));
    assert_eq!(stat("f/x").1, 2);
}

#[test]
fn the_callers_umask_stays() {
    use std::os::unix::fs::OpenOptionsExt;
    let f = Fixture::new(LayerFormat::OverlayUser);
    // A thread that has been in the union passes its umask on to those that it begins.
    std::thread::scope(|scope| scope.spawn(|| nested(&f)).join().unwrap());
    let mode = |name: &str| {
        let file = fs::File::options().write(true).create_new(true).mode(0o777).open(f.path(name));
        file.unwrap().metadata().unwrap().mode()
    };
    let before = mode("before");
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    assert_eq!(mode("after"), before);
}

#[test]
fn settling_keeps_hard_links_together() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/a");
    fs::hard_link(f.path("bottom/d/a"), f.path("bottom/d/b")).unwrap();
    let u = f.open();
    u.mv("d", "e", RenameMode::Replace).unwrap();
    drop(u);
    let settled = settle(f.spec(), &mut crate::ignore_progress).unwrap();
    assert_eq!(settled, settle::Settled { directories: 1, files: 0, copied: 1, bytes: 10 });
    let meta = |path: &str| fs::metadata(f.path("upper").join(path)).unwrap();
    assert_eq!((meta("e/a").ino(), meta("e/a").nlink()), (meta("e/b").ino(), 2));
}

fn xattr_keys(path: &Path) -> Vec<Vec<u8>> {
    use crate::sys::xattr::{self, Of};
    xattr::list(Of::dir(&Dir::open(path).unwrap())).unwrap()
}

/// The paths in the upper that have a redirect, an opaque mark or are a whiteout, with which.
fn all_marks(f: &Fixture) -> Vec<String> {
    let mut found = Vec::new();
    let upper = f.path("upper");
    for entry in walkdir::WalkDir::new(&upper).sort_by_file_name() {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(&upper).unwrap().display().to_string();
        let meta = fs::symlink_metadata(entry.path()).unwrap();
        if meta.is_dir() {
            for mark in [&b"redirect"[..], b"opaque"] {
                if xattr_keys(entry.path()).iter().any(|key| key.ends_with(mark)) {
                    found.push(format!("{path} {}", String::from_utf8_lossy(mark)));
                }
            }
        } else if meta.rdev() == 0 && !meta.is_file() && !meta.is_symlink() {
            found.push(format!("{path} whiteout"));
        }
    }
    found
}

/// Every path that the union shows, with the contents of files and the times of all.
fn shown(u: &Union) -> Vec<String> {
    let mut lines = Vec::new();
    let mut left = vec![String::new()];
    while let Some(dir) = left.pop() {
        for name in u.ls(&dir) {
            let path = format!("{dir}/{name}");
            let node = u.walk(&path).unwrap();
            let mtime = u.attr(&node).unwrap().mtime;
            if node.is_dir() {
                left.push(path.clone());
                lines.push(format!("{path}/ {mtime:?}"));
            } else {
                lines.push(format!("{path} {mtime:?} {:?}", u.text(&path)));
            }
        }
    }
    lines.sort();
    lines
}

/// Renamed directories in each other, in each of which something was deleted.
fn nested(f: &Fixture) {
    for file in [
        "bottom/d/keep",
        "bottom/d/gone",
        "bottom/d/sub/keep",
        "bottom/d/sub/gone",
        "top/x/keep",
        "top/x/gone",
        "bottom/x/low",
        "bottom/x/deep/gone",
        "bottom/x/deep/keep",
        "bottom/e/hidden",
    ] {
        f.file(file);
    }
    let u = f.open();
    u.mv("x", "d/inner", RenameMode::Replace).unwrap();
    u.mv("d/sub", "d/inner/sub", RenameMode::Replace).unwrap();
    for path in ["d/gone", "d/inner/gone", "d/inner/sub/gone", "d/inner/deep/gone"] {
        u.rm(path).unwrap();
    }
    u.mv("d", "f", RenameMode::Replace).unwrap();
    u.close().unwrap();
}

#[test]
fn nothing_comes_back_wherever_settling_ends() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    nested(&f);
    let before = shown(&f.open());
    assert!(all_marks(&f).iter().filter(|mark| mark.ends_with("redirect")).count() == 3);
    for last in 0.. {
        // Anew each time, so that it ends there once.
        let f = Fixture::new(LayerFormat::OverlayUser);
        nested(&f);
        let mut left = last;
        let ended = settle(f.spec(), &mut |_| {
            left -= 1;
            if left < 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let without_times = |lines: Vec<String>| -> Vec<String> {
            lines.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
        };
        let (now, before) = (shown(&f.open()), before.clone());
        assert_eq!(without_times(now.clone()), without_times(before), "ended at {last}");
        let done = ended.is_ok();
        settle(f.spec(), &mut crate::ignore_progress).unwrap();
        assert_eq!(shown(&f.open()), now, "ended at {last}, and settled");
        assert_eq!(all_marks(&f), ["d whiteout", "x whiteout"], "ended at {last}");
        if done {
            assert!(last > 15, "{last}");
            return;
        }
    }
}

#[test]
fn a_void_redirect_is_removed_with_the_marks_below_it() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    nested(&f);
    let before = shown(&f.open());
    // As if killed when all was copied, and nothing removed yet.
    let copied = settle(f.spec(), &mut {
        let dir = Dir::open(f.path("upper")).unwrap();
        let format = f.format;
        move |_| match marks::is_opaque(format, &dir.open_dir(&name("f")).unwrap()).unwrap() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    assert_eq!(copied.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(all_marks(&f).contains(&"f opaque".to_owned()));
    assert!(f.path("work/state/redirected").exists());
    assert_eq!(shown(&f.open()), before);
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    assert_eq!(shown(&f.open()), before);
    assert_eq!(all_marks(&f), ["d whiteout", "x whiteout"]);
}

#[test]
fn a_redirected_directory_that_is_closed_to_its_owner_is_settled() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    nested(&f);
    let u = f.open();
    for path in ["f/inner", "f"] {
        let attr = SetAttr { mode: Some(0o555), ..SetAttr::nothing() };
        u.set_attr(&u.walk(path).unwrap(), &attr).unwrap();
    }
    u.close().unwrap();
    let before = shown(&f.open());
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    assert_eq!(shown(&f.open()), before);
    assert_eq!(all_marks(&f), ["d whiteout", "x whiteout"]);
    for path in ["upper/f/inner", "upper/f"] {
        assert_eq!(fs::metadata(f.path(path)).unwrap().mode() & 0o777, 0o555, "{path}");
        // To be removed.
        fs::set_permissions(f.path(path), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn settling_that_stopped_at_an_opaque_directory_is_taken_up_again() {
    use crate::sys::xattr::{self, Of};
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/sub/a");
    f.file("bottom/d/sub/gone");
    let u = f.open();
    u.mv("d/sub", "d/moved", RenameMode::Replace).unwrap();
    u.rm("d/moved/gone").unwrap();
    u.mv("d", "e", RenameMode::Replace).unwrap();
    drop(u);
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    // As it is when everything is copied, and no mark removed yet.
    let set = |path: &str, key: &str, value: &[u8]| {
        let dir = Dir::open(f.path("upper").join(path)).unwrap();
        xattr::set(Of::dir(&dir), format!("user.overlay.{key}").as_bytes(), value).unwrap();
        dir
    };
    set("e", "redirect", b"/d");
    set("e", "opaque", b"y");
    let moved = set("e/moved", "redirect", b"/d/sub");
    if marks::make_whiteout(f.format, &moved, &name("gone")).is_err() {
        // No such device for this user.
        return;
    }
    assert_eq!(f.open().ls("e/moved"), ["a"]);
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    assert_eq!(f.open().ls("e/moved"), ["a"]);
    for path in ["e", "e/moved"] {
        let keys = xattr_keys(&f.path("upper").join(path));
        assert!(keys.iter().all(|key| !key.ends_with(b"redirect")), "{path}: {keys:?}");
    }
    assert_eq!(f.upper_names("e/moved"), ["a"]);
}
