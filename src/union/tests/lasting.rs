//! What lasts: files that are copied, forgotten, removed while open.

use super::*;

#[test]
fn all_else_goes_on_while_a_file_is_copied() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/big");
    f.file("bottom/d/other");
    let u = f.open();
    u.hooks.hold();
    let big = u.walk("d/big").unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| u.write(&big, 0, b"B", None, false).unwrap());
        while !u.hooks.held.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        assert_eq!(u.text("d/big").unwrap(), "bottom/d/big");
        assert_eq!(u.attr(&u.walk("d/big").unwrap()).unwrap().size, 12);
        assert_eq!(u.ls("d"), ["big", "other"]);
        u.put("d/new", NewFile::Regular).unwrap();
        u.rm("d/other").unwrap();
        u.mv("d/new", "d/newer", RenameMode::Replace).unwrap();
        u.mv("d", "e", RenameMode::Replace).unwrap();
        // Even its own name.
        u.rm("e/big").unwrap();
        assert_eq!(u.ls("e"), ["newer"]);
        u.hooks.release();
        writer.join().unwrap();
        assert_eq!(u.bytes(&big, 0, 3), b"Bot");
        assert_eq!(u.attr(&big).unwrap().nlink, 0);
    });
    assert_eq!(u.ls("e"), ["newer"]);
    assert!(names(&f.path("work/temp")).is_empty());
}

#[test]
fn what_is_forgotten_is_freed_however_deep() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let u = f.open();
    let mut node = Arc::clone(u.root());
    let mut ids = Vec::new();
    let own = u.attr(&node).unwrap();
    for _ in 0..3000 {
        let make =
            Make { file: NewFile::Directory, mode: 0o700, umask: 0, uid: own.uid, gid: own.gid };
        node = u.make(&node, &name("d"), &make).unwrap().node;
        ids.push(node.id);
    }
    assert_eq!(u.table.len(), 3001);
    drop(node);
    ids.iter().for_each(|id| u.forget(*id, 1));
    assert_eq!(u.table.len(), 1);
    // Found again, step by step.
    let mut node = Arc::clone(u.root());
    for id in &ids {
        let entry = u.lookup(&node, &name("d")).unwrap().unwrap();
        assert_eq!(entry.attr.ino, *id);
        u.forget(node.id, 1);
        node = entry.node;
    }
    drop((u, node));
    // Not left to the standard library, which holds a descriptor for each level.
    let upper = Dir::open(f.path("upper")).unwrap();
    crate::sys::remove::remove_tree(&upper, &name("d"), &mut || Ok(())).unwrap();
}

#[test]
fn names_and_targets_are_bytes() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    let u = f.open();
    let odd = Name::new(&b"\xff\n\x01"[..]).unwrap();
    let own = u.attr(u.root()).unwrap();
    let file = NewFile::Symlink(b"\xfe/../x".to_vec());
    let make = Make { file, mode: 0o777, umask: 0, uid: own.uid, gid: own.gid };
    let link = u.make(u.root(), &odd, &make).unwrap().node;
    assert_eq!(u.read_link(&link).unwrap(), b"\xfe/../x");
    assert_eq!(
        fs::read_dir(f.path("upper")).unwrap().next().unwrap().unwrap().file_name().as_bytes(),
        odd.as_bytes()
    );
}

#[test]
fn without_an_upper_nothing_changes() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/a");
    let dir = Dir::open(f.path("bottom")).unwrap();
    let u = Union::open(UnionSpec {
        lowers: vec![Lower { dir: Arc::new(dir), format: f.format, dot_wh: false }],
        upper: None,
        options: UnionOptions::default(),
    })
    .unwrap();
    let a = u.walk("a").unwrap();
    let read_only = |e: io::Error| assert_eq!(e.raw_os_error(), Some(30));
    read_only(u.write(&a, 0, b"x", None, false).unwrap_err());
    read_only(u.rm("a").unwrap_err());
    read_only(u.put("b", NewFile::Regular).unwrap_err());
    read_only(u.mv("a", "b", RenameMode::Replace).unwrap_err());
    read_only(u.set_attr(&a, &SetAttr { mode: Some(0), ..SetAttr::nothing() }).unwrap_err());
    assert_eq!(u.text("a").unwrap(), "bottom/a");
    u.close().unwrap();
}

#[test]
fn a_removed_directory_that_is_open_can_be_changed() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    for dir in ["bottom/low", "bottom/up"] {
        fs::create_dir(f.path(dir)).unwrap();
        fs::set_permissions(f.path(dir), fs::Permissions::from_mode(0o555)).unwrap();
    }
    let u = f.open();
    let (low, up) = (u.walk("low").unwrap(), u.walk("up").unwrap());
    let set = |mode| SetAttr { mode: Some(mode), ..SetAttr::nothing() };
    u.set_attr(&up, &set(0o511)).unwrap();
    u.rm_dir("low").unwrap();
    u.rm_dir("up").unwrap();
    let mode = |node| u.attr(node).map(|attr| (attr.mode, attr.nlink)).unwrap();
    assert_eq!((mode(&low), mode(&up)), ((0o555, 0), (0o511, 0)));
    for node in [&low, &up] {
        u.set_attr(node, &set(0o1700)).unwrap();
        u.set_xattr(node, b"user.k", b"v", OnPresence::Any, Caller::ROOT).unwrap();
        assert_eq!(mode(node), (0o1700, 0));
        assert!(u.lookup(node, &name("x")).is_err());
    }
    assert_eq!(u.ls(""), Vec::<String>::new());
}

#[test]
fn what_was_held_back_is_written_at_the_time_that_was_set() {
    let fixture = Fixture::new(LayerFormat::OverlayUser);
    let old = fs::File::create(fixture.path("bottom/a")).unwrap();
    old.set_modified(std::time::UNIX_EPOCH).unwrap();
    fs::write(fixture.path("bottom/new"), "a").unwrap();
    let u = fixture.open();
    u.times_will_be_told();
    let a = u.walk("a").unwrap();
    let time = |secs| SetTime::To(Time { secs, nanos: 5 });
    let set = |mtime| SetAttr { mtime, ctime: true, ..SetAttr::nothing() };
    let modified = || u.attr(&a).unwrap().mtime.secs;
    u.write(&a, 0, b"x", None, true).unwrap();
    assert!(modified() > 1_000_000_000, "the copy of a lower file, until its time is told");
    u.set_attr(&a, &set(time(1000))).unwrap();
    u.write(&a, 1, b"y", None, true).unwrap();
    assert_eq!(modified(), 1000);
    u.write(&a, 2, b"z", None, false).unwrap();
    assert!(modified() > 1_000_000_000, "what is written now");

    let new = u.walk("new").unwrap();
    let before = u.attr(&new).unwrap().mtime;
    u.write(&new, 0, b"x", None, true).unwrap();
    assert_eq!(u.attr(&new).unwrap().mtime, before, "the kernel has no other time to tell");
    u.allocate(&new, 0, 0, 100, Caller::ROOT).unwrap();
    u.copy_range((&a, 0), (&new, 0), 3, Caller::ROOT).unwrap();
    assert_eq!(u.attr(&new).unwrap().mtime, before);
}

#[test]
fn what_was_written_through_one_hard_link_survives_the_others() {
    for (written, removed) in [("x", "y"), ("y", "x"), ("x", "x")] {
        for format in FORMATS {
            let f = Fixture::new(format);
            f.file("bottom/d/x");
            fs::hard_link(f.path("bottom/d/x"), f.path("bottom/d/y")).unwrap();
            let u = f.open();
            let nodes = ["d/x", "d/y"].map(|path| u.walk(path).unwrap());
            assert_eq!(nodes[0].id, nodes[1].id);
            u.write(&u.walk(&format!("d/{written}")).unwrap(), 0, b"BOTTOM", None, false).unwrap();
            u.rm(&format!("d/{removed}")).unwrap();
            u.close().unwrap();
            drop((u, nodes));
            let u = f.open();
            let left = if removed == "x" { "y" } else { "x" };
            assert_eq!(u.text(&format!("d/{left}")).unwrap(), "BOTTOM/d/x", "{written} {removed}");
            assert_eq!(u.attr(&u.walk(&format!("d/{left}")).unwrap()).unwrap().nlink, 1);
        }
    }
}

#[test]
fn a_file_without_its_data_is_no_file_of_zeros() {
    use crate::sys::xattr::{self, Of};
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("top/a");
    let top = Dir::open(f.path("top")).unwrap();
    xattr::set(Of::Child(&top, &name("a")), b"user.overlay.metacopy", b"").unwrap();
    let u = f.open();
    let a = u.walk("a").unwrap();
    for e in
        [u.read(&a, 0, &mut [0; 1]).unwrap_err(), u.write(&a, 0, b"x", None, false).unwrap_err()]
    {
        assert_eq!(e.raw_os_error(), Some(5), "EIO");
    }
    u.rm("a").unwrap();
    // For others it is an attribute like any other.
    let f = Fixture { format: LayerFormat::Aufs, ..f };
    fs::remove_dir_all(f.path("upper")).unwrap();
    fs::create_dir(f.path("upper")).unwrap();
    assert_eq!(f.open().text("a").unwrap(), "top/a");
}

#[test]
fn what_is_closed_to_its_owner_can_be_used_nevertheless() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/sub/a");
    f.file("bottom/closed");
    fs::write(f.path("bottom/empty"), "").unwrap();
    let close = |path: &str, mode| {
        fs::set_permissions(f.path(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    for (path, mode) in [("bottom/empty", 0), ("bottom/closed", 0o200), ("bottom/d", 0o555)] {
        close(path, mode);
    }
    let u = f.open();
    let mode = |u: &Union, path: &str| u.attr(&u.walk(path).unwrap()).unwrap().mode;
    let set = |mode| SetAttr { mode: Some(mode), ..SetAttr::nothing() };
    u.set_attr(&u.walk("closed").unwrap(), &set(0)).unwrap();
    u.set_attr(&u.walk("empty").unwrap(), &set(0o100)).unwrap();
    u.mv("d", "e", RenameMode::Replace).unwrap();
    u.rm("e/sub/a").unwrap();
    let (root, own) = (Arc::clone(u.root()), u.attr(u.root()).unwrap());
    let file = NewFile::Directory;
    let make = Make { file, mode: 0o555, umask: 0, uid: own.uid, gid: own.gid };
    u.make(&root, &name("d"), &make).unwrap();
    drop((u, root));
    let u = f.open();
    assert_eq!(u.ls(""), ["closed", "d", "e", "empty"]);
    assert_eq!((u.ls("d"), u.ls("e"), u.ls("e/sub")), (vec![], vec!["sub".to_owned()], vec![]));
    assert_eq!((mode(&u, "closed"), mode(&u, "empty")), (0, 0o100));
    assert_eq!((mode(&u, "d"), mode(&u, "e")), (0o555, 0o555));
    u.rm_dir("d").unwrap();
    u.rm_dir("e/sub").unwrap_or_else(|e| assert_eq!(e.raw_os_error(), Some(13)));
    drop(u);
    // So that it can be removed.
    for path in ["bottom/d", "upper/e"] {
        close(path, 0o755);
    }
}

/// Two names of one file in different directories of a lower layer, and a third in one that is hidden.
fn linked(f: &Fixture) {
    f.file("bottom/d/a");
    f.file("bottom/e/x");
    for path in ["bottom/e/b", "bottom/gone"] {
        fs::hard_link(f.path("bottom/d/a"), f.path(path)).unwrap();
    }
}

fn number_and_links(u: &Union, path: &str) -> (u64, u64) {
    let attr = u.attr(&u.walk(path).unwrap()).unwrap();
    (attr.ino, attr.nlink)
}

#[test]
fn hard_links_stay_together_when_it_is_opened_again() {
    for format in FORMATS {
        let f = Fixture::new(format);
        linked(&f);
        let u = f.open();
        let _known = u.walk("d/a").unwrap();
        u.rm("gone").unwrap();
        u.write(&u.walk("d/a").unwrap(), 0, b"A", None, false).unwrap();
        let (ino, nlink) = number_and_links(&u, "d/a");
        assert_eq!(nlink, 2);
        u.close().unwrap();
        drop(u);
        assert_eq!(f.upper_names("d"), ["a"]);
        assert!(!f.path("upper/e/b").exists(), "only what is known is placed");
        for _ in 0..2 {
            let u = f.open();
            for path in ["e/b", "d/a"] {
                assert_eq!(u.text(path).unwrap(), "Aottom/d/a", "{format} {path}");
                assert_eq!(number_and_links(&u, path).1, 2);
            }
            let (b, a) = (u.walk("e/b").unwrap(), u.walk("d/a").unwrap());
            assert_eq!(a.id(), b.id());
            if format != LayerFormat::Aufs {
                assert_eq!(a.id(), ino);
            }
        }
        let u = f.open();
        u.write(&u.walk("e/b").unwrap(), 1, b"B", None, false).unwrap();
        drop(u);
        // As if killed: and from now on it has all its names in the upper.
        let u = f.open();
        assert_eq!(u.text("d/a").unwrap(), "ABttom/d/a");
        let meta = |path: &str| fs::metadata(f.path("upper").join(path)).unwrap();
        assert_eq!((meta("d/a").ino(), meta("d/a").nlink()), (meta("e/b").ino(), 2));
        assert_eq!(names(&f.path("work/links")), [""; 0]);
        assert_eq!(number_and_links(&u, "e/b").1, 2);
    }
}

#[test]
fn the_number_of_names_is_kept() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    linked(&f);
    let u = f.open();
    u.write(&u.walk("d/a").unwrap(), 0, b"A", None, false).unwrap();
    let (root, node) = (Arc::clone(u.root()), u.walk("d/a").unwrap());
    u.link(&node, &root, &name("new")).unwrap();
    drop((u, node, root));
    let u = f.open();
    assert_eq!(number_and_links(&u, "new").1, 4);
    u.rm("gone").unwrap();
    u.rm("d/a").unwrap();
    drop(u);
    let u = f.open();
    assert_eq!(number_and_links(&u, "e/b").1, 2);
    u.rm("e/b").unwrap();
    u.rm("new").unwrap();
    u.close().unwrap();
    assert_eq!(names(&f.path("work/links")), [""; 0]);
    assert!(!f.path("work/state/linked").exists());
}

#[test]
fn a_name_that_is_found_after_the_copy_can_be_removed() {
    for format in FORMATS {
        let f = Fixture::new(format);
        linked(&f);
        let u = f.open();
        u.write(&u.walk("d/a").unwrap(), 0, b"A", None, false).unwrap();
        u.walk("gone").unwrap();
        u.rm("gone").unwrap();
        assert_eq!((u.text("gone"), number_and_links(&u, "d/a").1), (None, 2));
        drop(u);
        assert_eq!(f.open().text("gone"), None);
    }
}

#[test]
fn settling_finds_all_names() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    linked(&f);
    let u = f.open();
    u.mv("e", "renamed", RenameMode::Replace).unwrap();
    u.set_attr(&u.walk("d/a").unwrap(), &SetAttr { mode: Some(0o600), ..SetAttr::nothing() })
        .unwrap();
    u.close().unwrap();
    drop(u);
    assert!(f.path("work/state/linked").exists());
    settle(f.spec(), &mut crate::ignore_progress).unwrap();
    let meta = |path: &str| fs::metadata(f.path("upper").join(path)).unwrap();
    for path in ["d/a", "renamed/b", "gone"] {
        assert_eq!((meta(path).ino(), meta(path).nlink()), (meta("d/a").ino(), 3), "{path}");
        assert_eq!(meta(path).mode() & 0o777, 0o600);
        assert_eq!(fs::read(f.path("upper").join(path)).unwrap(), b"bottom/d/a");
    }
    assert_eq!(names(&f.path("work/links")), [""; 0]);
    assert_eq!(names(&f.path("work/state")), [""; 0]);
}

#[test]
fn names_are_found_while_it_is_in_use() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    linked(&f);
    let u = f.open();
    u.write(&u.walk("d/a").unwrap(), 0, b"A", None, false).unwrap();
    u.complete_all().unwrap();
    for path in ["d/a", "e/b", "gone"] {
        assert_eq!(fs::read(f.path("upper").join(path)).unwrap(), b"Aottom/d/a");
    }
    assert!(!f.path("work/state/linked").exists());
    u.write(&u.walk("gone").unwrap(), 0, b"G", None, false).unwrap();
    assert_eq!(u.text("e/b").unwrap(), "Gottom/d/a");
    u.close().unwrap();
    assert_eq!(names(&f.path("work/links")), [""; 0]);
}

#[test]
fn a_link_without_its_original_stands_for_nothing_but_is_kept() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    linked(&f);
    let u = f.open();
    u.write(&u.walk("d/a").unwrap(), 0, b"A", None, false).unwrap();
    drop(u);
    // The layer is another one, and what is in the work directory was cut off.
    fs::remove_file(f.path("bottom/d/a")).unwrap();
    fs::write(f.path("work/links/77.from"), "half").unwrap();
    fs::write(f.path("work/links/78"), "alone").unwrap();
    // And what was never the union's.
    fs::write(f.path("work/links/.from"), "").unwrap();
    fs::write(f.path("work/links").join("x".repeat(255)), "").unwrap();
    fs::create_dir_all(f.path("work/links/79.from/deep")).unwrap();
    let u = f.open();
    assert_eq!(u.text("d/a").unwrap(), "Aottom/d/a");
    assert_eq!(u.text("e/b").unwrap(), "bottom/d/a");
    u.close().unwrap();
    // It is kept, since the right layers may come back; the rest is nothing.
    let kept = names(&f.path("work/links"));
    assert!(kept.len() == 2 && kept[1] == format!("{}.from", kept[0]), "{kept:?}");
    assert!(f.path("work/state/linked").exists());
}

#[test]
fn a_listed_name_is_looked_for_from_its_layer_on_and_shows_what_is_there_now() {
    for format in FORMATS {
        let f = Fixture::new(format);
        for path in ["top/d/both", "top/d/top", "bottom/d/both", "bottom/d/low", "upper/d/up"] {
            f.file(path);
        }
        let u = f.open();
        let dir = u.walk("d").unwrap();
        let mut listed = Vec::new();
        u.list(&dir, 0, |_, entry| {
            if let Listed::Name(placed) = entry {
                listed.push(placed);
            }
            Ok(true)
        })
        .unwrap();
        listed.sort_by_key(|placed| placed.name.as_bytes().to_vec());
        let layers: Vec<usize> = listed.iter().map(|placed| placed.layer).collect();
        assert_eq!(layers, [0, 1, 0, 0]);
        let text = |at: usize| {
            let entry = u.lookup_listed(&dir, &listed[at]).unwrap()?;
            Some(String::from_utf8(u.bytes(&entry.node, 0, 4096)).unwrap())
        };
        let [both, low, top, up] = [0, 1, 2, 3];
        assert_eq!(text(both).unwrap(), "top/d/both");
        assert_eq!(text(low).unwrap(), "bottom/d/low");
        assert_eq!(text(up).unwrap(), "upper/d/up");
        // Whatever has become of it.
        u.write(&u.walk("d/low").unwrap(), 0, b"B", None, false).unwrap();
        assert_eq!(text(low).unwrap(), "Bottom/d/low");
        u.mv("d/top", "d/low", RenameMode::Replace).unwrap();
        assert_eq!((text(low).unwrap().as_str(), text(top)), ("top/d/top", None));
        u.rm("d/low").unwrap();
        assert_eq!(text(low), None);
        u.put("d/low", NewFile::Directory).unwrap();
        assert!(u.lookup_listed(&dir, &listed[low]).unwrap().unwrap().node.is_dir());
        // What is listed anew may be anywhere.
        assert_eq!(u.ls("d").len(), 3);
    }
}
