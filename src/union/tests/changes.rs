//! Every kind of change, and what it leaves in the upper.

use super::*;

#[test]
fn a_file_is_copied_up_when_written_and_keeps_its_number() {
    for format in FORMATS {
        let f = Fixture::new(format);
        f.file("bottom/d/a");
        fs::set_permissions(f.path("bottom/d"), fs::Permissions::from_mode(0o750)).unwrap();
        let old = fs::metadata(f.path("bottom/d")).unwrap();
        let u = f.open();
        let node = u.walk("d/a").unwrap();
        let before = u.attr(&node).unwrap();
        u.write(&node, 0, b"BOTTOM", None, false).unwrap();
        assert_eq!(u.text("d/a").unwrap(), "BOTTOM/d/a");
        assert_eq!(fs::read_to_string(f.path("bottom/d/a")).unwrap(), "bottom/d/a");
        assert_eq!(fs::read_to_string(f.path("upper/d/a")).unwrap(), "BOTTOM/d/a");
        let now = u.attr(&u.walk("d/a").unwrap()).unwrap();
        assert_eq!(now.ino, before.ino, "{format}");
        let new = fs::metadata(f.path("upper/d")).unwrap();
        assert_eq!((new.mode(), new.mtime_nsec()), (old.mode(), old.mtime_nsec()));
        // Forgotten and looked up again, and in a new union.
        let root = u.root().id;
        assert_eq!(root, 1);
        drop(node);
        for id in [now.ino, u.attr(&u.walk("d").unwrap()).unwrap().ino] {
            u.forget(id, 100);
        }
        assert_eq!(u.attr(&u.walk("d/a").unwrap()).unwrap().ino, before.ino, "{format}");
        u.close().unwrap();
        assert!(names(&f.path("work/temp")).is_empty());
        if format == LayerFormat::OverlayUser {
            let u = f.open();
            assert_eq!(u.attr(&u.walk("d/a").unwrap()).unwrap().ino, before.ino);
        }
    }
}

#[test]
fn whiteouts_are_left_only_where_they_hide_something() {
    for format in FORMATS {
        let f = Fixture::new(format);
        f.file("bottom/d/a");
        let u = f.open();
        u.rm("d/a").unwrap();
        assert_eq!((u.ls("d"), u.text("d/a")), (vec![], None));
        assert_eq!(f.upper_names("d").len(), 1, "{format}");
        u.put("d/b", NewFile::Regular).unwrap();
        u.rm("d/b").unwrap();
        assert_eq!(f.upper_names("d").len(), 1, "{format}");
        u.put("d/a", NewFile::Regular).unwrap();
        assert_eq!(u.text("d/a").unwrap(), "");
        assert_eq!(f.upper_names("d"), ["a"]);
        u.rm("d/a").unwrap();
        u.rm_dir("d").unwrap();
        assert!(u.walk("d").is_none());
        // Deleted and made anew: nothing comes back, in a new union neither.
        u.put("d", NewFile::Directory).unwrap();
        assert!(u.ls("d").is_empty());
        drop(u);
        let u = f.open();
        assert!(u.ls("d").is_empty(), "{format}");
        assert!(u.text("d/a").is_none());
        u.rm_dir("d").unwrap();
        drop(u);
        assert!(f.open().walk("d").is_none());
        assert!(names(&f.path("work/temp")).is_empty());
    }
}

#[test]
fn a_lower_directory_is_renamed_by_a_redirect() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/sub/a");
    f.file("top/d/sub/b");
    f.file("bottom/d/c");
    let u = f.open();
    let sub = u.walk("d/sub").unwrap();
    u.mv("d", "e", RenameMode::Replace).unwrap();
    assert!(u.walk("d").is_none());
    assert_eq!(
        (u.ls("e"), u.ls("e/sub")),
        (vec!["c".into(), "sub".into()], vec!["a".into(), "b".into()])
    );
    // Known before, and reached by its new path.
    assert_eq!(u.walk("e/sub").unwrap().id, sub.id);
    u.write(&u.walk("e/sub/a").unwrap(), 0, b"X", None, false).unwrap();
    u.mv("e/sub", "s", RenameMode::Replace).unwrap();
    u.mv("e", "s/e", RenameMode::Replace).unwrap();
    assert_eq!(u.text("s/a").unwrap(), "Xottom/d/sub/a");
    drop((u, sub));
    let u = f.open();
    assert_eq!(
        (u.ls("s"), u.ls("s/e")),
        (vec!["a".into(), "b".into(), "e".into()], vec!["c".to_owned()])
    );
    assert_eq!(u.text("s/a").unwrap(), "Xottom/d/sub/a");
    assert_eq!(u.ls(""), ["s"]);
    assert!(f.path("work/state/redirected").exists());
}

#[test]
fn without_redirects_a_lower_directory_stays() {
    let f = Fixture::new(LayerFormat::Aufs);
    f.file("bottom/d/a");
    let u = f.open();
    let e = u.mv("d", "e", RenameMode::Replace).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(18), "EXDEV");
    assert_eq!(u.ls("d"), ["a"]);
    u.put("n", NewFile::Directory).unwrap();
    u.mv("n", "m", RenameMode::Replace).unwrap();
    assert_eq!(u.ls(""), ["d", "m"]);
    let own = |name: &str| u.put(name, NewFile::Regular).unwrap_err().raw_os_error();
    assert_eq!(own(".wh.x"), Some(22));
    assert_eq!(own(&"n".repeat(252)), Some(36));
    u.put(&"n".repeat(251), NewFile::Regular).unwrap();
}

#[test]
fn renames_replace_exchange_and_refuse_to() {
    for format in FORMATS {
        let f = Fixture::new(format);
        for file in ["bottom/a", "bottom/b", "top/empty/x", "bottom/full/y"] {
            f.file(file);
        }
        let u = f.open();
        let text = |path: &str| u.text(path);
        let code = |e: io::Error| e.raw_os_error().unwrap();
        assert_eq!(code(u.mv("a", "b", RenameMode::NoReplace).unwrap_err()), 17);
        assert_eq!(code(u.mv("a", "no", RenameMode::Exchange).unwrap_err()), 2);
        u.mv("a", "b", RenameMode::Exchange).unwrap();
        assert_eq!(
            (text("a").unwrap(), text("b").unwrap()),
            ("bottom/b".into(), "bottom/a".into())
        );
        u.mv("a", "b", RenameMode::Replace).unwrap();
        assert_eq!((text("a"), text("b").unwrap()), (None, "bottom/b".into()));
        // Onto a name that was deleted.
        u.mv("b", "a", RenameMode::NoReplace).unwrap();
        assert_eq!((text("b"), text("a").unwrap()), (None, "bottom/b".into()));
        // A directory over one that only looks empty, and over one that is not.
        u.rm("empty/x").unwrap();
        u.put("dir", NewFile::Directory).unwrap();
        u.put("dir/in", NewFile::Regular).unwrap();
        assert_eq!(code(u.mv("dir", "full", RenameMode::Replace).unwrap_err()), 39);
        assert_eq!(code(u.mv("dir", "a", RenameMode::Replace).unwrap_err()), 20);
        assert_eq!(code(u.mv("a", "dir", RenameMode::Replace).unwrap_err()), 21);
        u.mv("dir", "empty", RenameMode::Replace).unwrap();
        assert_eq!(u.ls("empty"), ["in"]);
        let all = ["a", "empty", "full"];
        assert_eq!(u.ls(""), all, "{format}");
        drop(u);
        let u = f.open();
        assert_eq!(u.ls(""), all, "{format}");
        assert_eq!(u.ls("empty"), ["in"]);
        assert_eq!(u.text("a").unwrap(), "bottom/b");
    }
}

#[test]
fn a_rename_that_leaves_a_whiteout_leaves_a_device() {
    for format in FORMATS {
        let f = Fixture::new(format);
        f.file("bottom/a");
        let u = f.open();
        match u.mv("a", "b", RenameMode::Whiteout) {
            // AUFS has a real device, which takes privilege.
            Err(e) if format == LayerFormat::Aufs => {
                assert_eq!(e.raw_os_error(), Some(1));
                continue;
            }
            renamed => renamed.unwrap(),
        }
        for u in [u, f.open()] {
            let attr = u.attr(&u.walk("a").unwrap()).unwrap();
            assert_eq!((attr.kind, attr.rdev), (FileType::CharDevice, (0, 0)), "{format}");
            assert_eq!(u.text("b").unwrap(), "bottom/a");
            drop(u);
        }
    }
}

#[test]
fn an_unlinked_file_goes_on_while_it_is_known() {
    for format in FORMATS {
        let f = Fixture::new(format);
        f.file("bottom/low");
        let u = f.open();
        let new = u.put("new", NewFile::Regular).unwrap();
        let low = u.walk("low").unwrap();
        u.rm("new").unwrap();
        u.rm("low").unwrap();
        for node in [&new, &low] {
            assert_eq!(u.attr(node).unwrap().nlink, 0, "{format}");
            u.write(node, 0, b"text", None, false).unwrap();
            assert_eq!(u.bytes(node, 0, 4), b"text");
            let set = SetAttr { size: Some(2), mode: Some(0o600), ..SetAttr::nothing() };
            let attr = u.set_attr(node, &set).unwrap();
            assert_eq!((attr.size, attr.mode, attr.nlink), (2, 0o600, 0));
            u.set_xattr(node, b"user.k", b"v", OnPresence::Create, Caller::ROOT).unwrap();
            assert_eq!(u.xattr(node, b"user.k").unwrap().unwrap(), b"v");
            assert!(u.link(node, u.root(), &name("again")).is_err());
        }
        assert_eq!(fs::read_to_string(f.path("bottom/low")).unwrap(), "bottom/low");
        u.put("low", NewFile::Regular).unwrap();
        assert_ne!(u.walk("low").unwrap().id, low.id);
        assert_eq!(u.bytes(&low, 0, 4), b"te");
    }
}

#[test]
fn hard_links_of_a_lower_file_stay_one_file() {
    for format in FORMATS {
        let f = Fixture::new(format);
        f.file("bottom/x");
        fs::hard_link(f.path("bottom/x"), f.path("bottom/y")).unwrap();
        fs::hard_link(f.path("bottom/x"), f.path("bottom/z")).unwrap();
        let u = f.open();
        let x = u.walk("x").unwrap();
        assert_eq!(u.attr(&x).unwrap().nlink, 3);
        u.write(&x, 0, b"BOTTOM", None, false).unwrap();
        let again = |u: &Union| {
            for path in ["x", "y", "z"] {
                if let Some(node) = u.walk(path) {
                    assert_eq!(node.id, x.id, "{path}");
                    assert_eq!(u.text(path).unwrap(), "BOTTOM/x");
                }
            }
        };
        again(&u);
        // The name that was written through goes, and the file is forgotten.
        u.rm("x").unwrap();
        assert_eq!(u.attr(&x).unwrap().nlink, 2);
        u.forget(x.id, 100);
        again(&u);
        u.mv("y", "w", RenameMode::Replace).unwrap();
        let w = u.walk("w").unwrap();
        assert_eq!((w.id, u.attr(&w).unwrap().nlink), (x.id, 2));
        u.link(&w, u.root(), &name("v")).unwrap();
        assert_eq!(u.attr(&w).unwrap().nlink, 3);
        for path in ["w", "v", "z"] {
            u.rm(path).unwrap();
        }
        assert_eq!(u.attr(&w).unwrap().nlink, 0);
        assert_eq!(u.bytes(&w, 0, 6), b"BOTTOM");
        assert!(u.ls("").is_empty());
        assert!(names(&f.path("work/links")).is_empty());
    }
}

#[test]
fn cutting_a_file_off_copies_no_more_than_is_left() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    fs::write(f.path("bottom/a"), vec![7; 1 << 20]).unwrap();
    let u = f.open();
    let a = u.walk("a").unwrap();
    let cut = |size| SetAttr { size: Some(size), ..SetAttr::nothing() };
    assert_eq!(u.set_attr(&a, &cut(10)).unwrap().size, 10);
    assert_eq!(fs::read(f.path("upper/a")).unwrap(), [7; 10]);
    assert_eq!(u.set_attr(&a, &cut(12)).unwrap().size, 12);
    assert_eq!(u.bytes(&a, 8, 99), [7, 7, 0, 0]);
}

#[test]
fn times_written_back_unchanged_copy_nothing() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/a");
    let u = f.open();
    let a = u.walk("a").unwrap();
    let mtime = u.attr(&a).unwrap().mtime;
    let set = SetAttr { mtime: SetTime::To(mtime), ctime: true, ..SetAttr::nothing() };
    u.set_attr(&a, &set).unwrap();
    assert!(f.upper_names("").is_empty());
    let past = Time { secs: -5, nanos: 7 };
    let set = SetAttr { mtime: SetTime::To(past), atime: SetTime::Now, ..SetAttr::nothing() };
    assert_eq!(u.set_attr(&a, &set).unwrap().mtime, past);
    assert_eq!(f.upper_names(""), ["a"]);
}

#[test]
fn a_new_file_obeys_the_umask_and_default_access_rights() {
    for over_a_whiteout in [false, true] {
        let f = Fixture::new(LayerFormat::OverlayUser);
        if over_a_whiteout {
            f.file("bottom/d/a");
        } else {
            fs::create_dir(f.path("bottom/d")).unwrap();
        }
        let u = f.open();
        if over_a_whiteout {
            u.rm("d/a").unwrap();
        }
        let node = u.put("d/a", NewFile::Directory).unwrap();
        assert_eq!(u.attr(&node).unwrap().mode, 0o755);
        u.rm_dir("d/a").unwrap();
        // user::rwx group::rwx mask::rwx other::---
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, perm) in [(1_u16, 7_u16), (4, 7), (0x10, 7), (0x20, 0)] {
            acl.extend_from_slice(&tag.to_le_bytes());
            acl.extend_from_slice(&perm.to_le_bytes());
            acl.extend_from_slice(&u32::MAX.to_le_bytes());
        }
        let d = u.walk("d").unwrap();
        u.set_xattr(&d, acl::DEFAULT, &acl, OnPresence::Any, Caller::ROOT).unwrap();
        let node = u.put("d/a", NewFile::Directory).unwrap();
        assert_eq!(u.attr(&node).unwrap().mode, 0o750, "the umask does not count");
        assert_eq!(u.xattr(&node, acl::DEFAULT).unwrap().unwrap(), acl);
        let set = SetAttr { mode: Some(0o2775), ..SetAttr::nothing() };
        u.set_attr(&d, &set).unwrap();
        u.rm_dir("d/a").unwrap();
        let node = u.put("d/a", NewFile::Directory).unwrap();
        assert_eq!(u.attr(&node).unwrap().mode & 0o2000, 0o2000, "{over_a_whiteout}");
    }
}

#[test]
fn a_device_that_would_be_a_whiteout_is_a_device_to_users() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let u = f.open();
    let node = u.put("null", NewFile::Char { major: 0, minor: 0 }).unwrap();
    let shown = |u: &Union| {
        let attr = u.attr(&u.walk("null").unwrap()).unwrap();
        (attr.kind, attr.rdev, attr.mode)
    };
    assert_eq!(shown(&u), (FileType::CharDevice, (0, 0), 0o755));
    let set = SetAttr { mode: Some(0o6711), ..SetAttr::nothing() };
    u.set_attr(&node, &set).unwrap();
    let own = u.attr(u.root()).unwrap();
    u.set_attr(&node, &SetAttr { uid: Some(own.uid), ..SetAttr::nothing() }).unwrap();
    assert_eq!(shown(&u).2, 0o711, "a change of owner takes setuid and setgid");
    drop((u, node));
    assert_eq!(shown(&f.open()), (FileType::CharDevice, (0, 0), 0o711));
}

#[test]
fn a_renamed_directory_keeps_its_time() {
    for format in FORMATS {
        let f = Fixture::new(format);
        fs::create_dir_all(f.path("bottom/c/d")).unwrap();
        let u = f.open();
        let new = u.put("new", NewFile::Directory).unwrap();
        let past = Time { secs: -5, nanos: 7 };
        u.set_attr(&new, &SetAttr { mtime: SetTime::To(past), ..SetAttr::nothing() }).unwrap();
        u.mv("new", "c/d", RenameMode::Replace).unwrap();
        assert_eq!(u.attr(&u.walk("c/d").unwrap()).unwrap().mtime, past, "{format}");
    }
}
