//! The union by itself, without a mount: what unprivileged tests and those of locks can show. The rest
//! is tested through mounts.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::*;
use crate::path::Name;
use crate::sys::file::SetTime;
use crate::sys::stat::Time;
use crate::sys::xattr::OnPresence;

/// Where tests stop the union.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    /// Set: copying waits until it is reset.
    hold: Mutex<bool>,
    free: Condvar,
    held: AtomicBool,
}

impl Hooks {
    pub(super) fn copying(&self) {
        let mut hold = self.hold.lock();
        while *hold {
            self.held.store(true, Ordering::SeqCst);
            self.free.wait(&mut hold);
        }
    }

    fn hold(&self) {
        *self.hold.lock() = true;
    }

    fn release(&self) {
        *self.hold.lock() = false;
        self.free.notify_all();
    }
}

/// Two lower layers and an upper, in directories.
struct Fixture {
    tmp: tempfile::TempDir,
    format: LayerFormat,
    options: UnionOptions,
}

const FORMATS: [LayerFormat; 2] = [LayerFormat::OverlayUser, LayerFormat::Aufs];

impl Fixture {
    fn new(format: LayerFormat) -> Fixture {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        for dir in ["top", "bottom", "upper", "work"] {
            fs::create_dir(tmp.path().join(dir)).unwrap();
        }
        Fixture { tmp, format, options: UnionOptions::default() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.tmp.path().join(path)
    }

    /// A file of a layer, whose contents are its path.
    fn file(&self, path: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), path).unwrap();
    }

    fn open(&self) -> Union {
        Union::open(self.spec()).unwrap()
    }

    fn spec(&self) -> UnionSpec {
        let dir = |name: &str| Dir::open(self.path(name)).unwrap();
        let lower = |name: &str| Lower { dir: Arc::new(dir(name)), format: self.format };
        UnionSpec {
            lowers: vec![lower("top"), lower("bottom")],
            upper: Some(Upper {
                dir: Arc::new(dir("upper")),
                format: self.format,
                work: dir("work"),
                lock: None,
            }),
            options: self.options.clone(),
        }
    }

    fn upper_names(&self, dir: &str) -> Vec<String> {
        names(&self.path("upper").join(dir))
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn name(s: &str) -> Name {
    Name::new(s).unwrap()
}

impl Union {
    fn walk(&self, path: &str) -> Option<Arc<Node>> {
        let mut node = Arc::clone(self.root());
        for part in path.split('/').filter(|part| !part.is_empty()) {
            node = self.lookup(&node, &name(part)).unwrap()?.node;
        }
        Some(node)
    }

    fn parent_of<'a>(&self, path: &'a str) -> (Arc<Node>, Name) {
        let (dir, last): (&'a str, &'a str) = path.rsplit_once('/').unwrap_or(("", path));
        (self.walk(dir).unwrap(), name(last))
    }

    fn text(&self, path: &str) -> Option<String> {
        let node = self.walk(path)?;
        Some(String::from_utf8(self.read(&node, 0, 4096).unwrap()).unwrap())
    }

    fn put(&self, path: &str, file: NewFile) -> io::Result<Arc<Node>> {
        let (parent, name) = self.parent_of(path);
        // As whoever runs the test.
        let own = self.attr(self.root()).unwrap();
        let make = Make { file, mode: 0o755, umask: 0o022, uid: own.uid, gid: own.gid };
        Ok(self.make(&parent, &name, &make)?.node)
    }

    fn rm(&self, path: &str) -> io::Result<()> {
        let (parent, name) = self.parent_of(path);
        self.unlink(&parent, &name)
    }

    fn rm_dir(&self, path: &str) -> io::Result<()> {
        let (parent, name) = self.parent_of(path);
        self.rmdir(&parent, &name)
    }

    fn mv(&self, from: &str, to: &str, mode: RenameMode) -> io::Result<()> {
        let ((parent, name), (new_parent, new_name)) = (self.parent_of(from), self.parent_of(to));
        self.rename(&parent, &name, &new_parent, &new_name, mode)
    }

    fn ls(&self, path: &str) -> Vec<String> {
        let mut names = Vec::new();
        let dir = self.walk(path).unwrap();
        self.list(&dir, 0, |_, entry| {
            if let Listed::Name(name) = entry {
                names.push(name.as_os_str().to_str().unwrap().to_owned());
            }
            Ok(true)
        })
        .unwrap();
        names.sort();
        names
    }
}

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
        u.write(&node, 0, b"BOTTOM", false, false).unwrap();
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
    u.write(&u.walk("e/sub/a").unwrap(), 0, b"X", false, false).unwrap();
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
            u.write(node, 0, b"text", false, false).unwrap();
            assert_eq!(u.read(node, 0, 4).unwrap(), b"text");
            let set = SetAttr { size: Some(2), mode: Some(0o600), ..SetAttr::nothing() };
            let attr = u.set_attr(node, &set).unwrap();
            assert_eq!((attr.size, attr.mode, attr.nlink), (2, 0o600, 0));
            u.set_xattr(node, b"user.k", b"v", OnPresence::Create, true).unwrap();
            assert_eq!(u.xattr(node, b"user.k").unwrap().unwrap(), b"v");
            assert!(u.link(node, u.root(), &name("again")).is_err());
        }
        assert_eq!(fs::read_to_string(f.path("bottom/low")).unwrap(), "bottom/low");
        u.put("low", NewFile::Regular).unwrap();
        assert_ne!(u.walk("low").unwrap().id, low.id);
        assert_eq!(u.read(&low, 0, 4).unwrap(), b"te");
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
        u.write(&x, 0, b"BOTTOM", false, false).unwrap();
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
        assert_eq!(u.read(&w, 0, 6).unwrap(), b"BOTTOM");
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
    assert_eq!(u.read(&a, 8, 99).unwrap(), [7, 7, 0, 0]);
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
        u.set_xattr(&d, acl::DEFAULT, &acl, OnPresence::Any, true).unwrap();
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
fn all_else_goes_on_while_a_file_is_copied() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/big");
    f.file("bottom/d/other");
    let u = f.open();
    u.hooks.hold();
    let big = u.walk("d/big").unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| u.write(&big, 0, b"B", false, false).unwrap());
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
        assert_eq!(u.read(&big, 0, 3).unwrap(), b"Bot");
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
        lowers: vec![Lower { dir: Arc::new(dir), format: f.format }],
        upper: None,
        options: UnionOptions::default(),
    })
    .unwrap();
    let a = u.walk("a").unwrap();
    let read_only = |e: io::Error| assert_eq!(e.raw_os_error(), Some(30));
    read_only(u.write(&a, 0, b"x", false, false).unwrap_err());
    read_only(u.rm("a").unwrap_err());
    read_only(u.put("b", NewFile::Regular).unwrap_err());
    read_only(u.mv("a", "b", RenameMode::Replace).unwrap_err());
    read_only(u.set_attr(&a, &SetAttr { mode: Some(0), ..SetAttr::nothing() }).unwrap_err());
    assert_eq!(u.text("a").unwrap(), "bottom/a");
    u.close().unwrap();
}

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
    u.write(&u.walk("d/moved/a").unwrap(), 0, b"X", false, false).unwrap();
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
fn settling_keeps_hard_links_together() {
    let f = Fixture::new(LayerFormat::OverlayUser);
    f.file("bottom/d/a");
    fs::hard_link(f.path("bottom/d/a"), f.path("bottom/d/b")).unwrap();
    let u = f.open();
    u.mv("d", "e", RenameMode::Replace).unwrap();
    drop(u);
    let settled = settle(f.spec(), &mut crate::ignore_progress).unwrap();
    assert_eq!(settled, settle::Settled { directories: 1, copied: 1 });
    let meta = |path: &str| fs::metadata(f.path("upper").join(path)).unwrap();
    assert_eq!((meta("e/a").ino(), meta("e/a").nlink()), (meta("e/b").ino(), 2));
}

fn xattr_keys(path: &Path) -> Vec<Vec<u8>> {
    use crate::sys::xattr::{self, Of};
    xattr::list(Of::dir(&Dir::open(path).unwrap())).unwrap()
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
        u.set_xattr(node, b"user.k", b"v", OnPresence::Any, true).unwrap();
        assert_eq!(mode(node), (0o1700, 0));
        assert!(u.lookup(node, &name("x")).is_err());
    }
    assert_eq!(u.ls(""), Vec::<String>::new());
}

#[test]
fn what_was_held_back_is_written_at_the_time_that_was_set() {
    let fixture = Fixture::new(LayerFormat::OverlayUser);
    fs::write(fixture.path("bottom/a"), "a").unwrap();
    let u = fixture.open();
    let a = u.walk("a").unwrap();
    let time = |secs| SetTime::To(Time { secs, nanos: 5 });
    let set = |mtime| SetAttr { mtime, ctime: true, ..SetAttr::nothing() };
    let modified = || u.attr(&a).unwrap().mtime.secs;
    u.write(&a, 0, b"x", false, true).unwrap();
    assert!(modified() > 1_000_000_000, "the copy of a lower file, until its time is told");
    u.set_attr(&a, &set(time(1000))).unwrap();
    u.write(&a, 1, b"y", false, true).unwrap();
    assert_eq!(modified(), 1000);
    u.write(&a, 2, b"z", false, false).unwrap();
    assert!(modified() > 1_000_000_000, "what is written now");
}
