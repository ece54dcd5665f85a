//! How many requests the kernel sends for what a program does: those that are saved are the speed of a
//! FUSE mount, and unlike times their number is the same on every machine.
//!
//! Each case has a mount of its own that this process serves, over a lower with a directory of files that
//! nobody has looked at. Needs /dev/fuse, and root or fusermount3.
//!
//! What no server can save (Linux 6.18), since nothing it answers prevents it:
//! - GETATTR of a directory after each change in it: the kernel drops all that it knew of it, and needs
//!   its mode to let anybody pass;
//! - GETATTR of a file or directory that was read from: its access time is not known any more; and of a
//!   file that was closed, with writeback: how many blocks it has is not;
//! - LOOKUP before CREATE, unless the name is known not to be there, and after a removal;
//! - an empty READDIRPLUS at the end of a list;
//! - GETXATTR before the first write, which asks for capabilities that a write takes away;
//! - READ of the page that a write begins or ends in;
//! - SETATTR, by which the kernel tells a time it has set: at close if a tick of the clock has passed since
//!   the file's last change, and at once after a removal, a rename or a new link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod suite;
}

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use stratafs::{FuseLayer, FuseMount, FuseMountOptions, LayerFormat, UpperDir};
use support::suite;
use tempfile::TempDir;

fn main() {
    let cases: [(&str, Case, Kind); 20] = [
        ("reading_again_without_writeback", read_again_without_writeback, Kind::WithoutWriteback),
        ("reading_again_without_an_upper", read_again_without_an_upper, Kind::WithoutUpper),
        ("opening_and_reading_again", read_again, Kind::Usual),
        ("opening_and_reading_after_a_listing", read_listed, Kind::Usual),
        ("opening_and_reading_for_the_first_time", read_first, Kind::Usual),
        ("listing_again", list_again, Kind::Usual),
        ("listing_after_a_change", list_after_a_change, Kind::Usual),
        ("a_name_that_is_not_there", absent, Kind::Usual),
        ("attributes_and_links_again", look_again, Kind::Usual),
        ("creating_an_empty_file", create_empty, Kind::Usual),
        ("creating_and_writing", create_and_write, Kind::Usual),
        ("creating_in_a_listed_directory", create_listed, Kind::Usual),
        ("small_writes", write_small, Kind::Usual),
        ("writing_to_what_is_hot", append_hot, Kind::Usual),
        ("writing_to_what_a_lower_has", append_to_lower, Kind::Usual),
        ("overwriting", overwrite, Kind::Usual),
        ("removing", remove, Kind::Usual),
        ("renaming", rename, Kind::Usual),
        ("changing_attributes", change_attributes, Kind::Usual),
        ("directories", directories, Kind::Usual),
    ];
    let run = |case: Case, kind| move || case(&Tree::new(kind));
    let trials = cases.map(|(name, case, kind)| suite::trial(name, hindrance(), run(case, kind)));
    suite::run_one_by_one(trials.into());
}

type Case = fn(&Tree);

/// Of mounts.
#[derive(Clone, Copy)]
enum Kind {
    Usual,
    WithoutWriteback,
    WithoutUpper,
}

fn hindrance() -> Option<String> {
    if OpenOptions::new().read(true).write(true).open("/dev/fuse").is_err() {
        return Some("needs /dev/fuse".to_owned());
    }
    let missing = Command::new("fusermount3").arg("--version").output().is_err();
    (suite::needs_root().is_some() && missing).then(|| "needs root, or fusermount3".to_owned())
}

/// A mount, and what it is made of.
struct Tree {
    mount: FuseMount,
    dir: TempDir,
}

impl Tree {
    fn new(kind: Kind) -> Tree {
        let dir = suite::temp();
        let at = |name: &str| dir.path().join(name);
        for name in ["lower", "lower/d", "lower/d/sub", "lower/e", "upper", "work", "mnt"] {
            fs::create_dir(at(name)).unwrap();
        }
        for n in 0..10 {
            fs::write(at(&format!("lower/d/file{n}")), vec![b'l'; 10_000]).unwrap();
        }
        std::os::unix::fs::symlink("file0", at("lower/d/link")).unwrap();
        let format = match suite::needs_root() {
            None => LayerFormat::OverlayTrusted,
            Some(_) => LayerFormat::OverlayUser,
        };
        let mut options = FuseMountOptions::new(format);
        options.lowers = vec![FuseLayer { dir: at("lower"), format }];
        options.upper = Some(UpperDir { dir: at("upper"), work: at("work") });
        match kind {
            Kind::Usual => {}
            Kind::WithoutWriteback => options.writeback = false,
            Kind::WithoutUpper => options.upper = None,
        }
        let mount = FuseMount::new(&at("mnt"), &options).unwrap();
        Tree { mount, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("mnt").join(name)
    }

    /// The requests of `work` are these: each kind with how many there are, if not one, or between which
    /// numbers. That the kernel has forgotten something is told later, whenever it likes.
    #[track_caller]
    fn takes<T>(&self, expected: &[&str], work: impl FnOnce() -> io::Result<T>) -> T {
        let before: BTreeMap<_, _> = self.mount.requests().into_iter().collect();
        let done = work().unwrap();
        let after = self.mount.requests().into_iter();
        let requests: BTreeMap<_, _> = after
            .filter(|(kind, _)| *kind != "forget")
            .map(|(kind, n)| (kind, n - before.get(kind).unwrap_or(&0)))
            .filter(|(_, n)| *n > 0)
            .collect();
        let expected: BTreeMap<_, _> = expected.iter().map(|request| range(request)).collect();
        let none_else = requests.keys().all(|kind| expected.contains_key(kind));
        let as_many =
            expected.iter().all(|(kind, range)| range.contains(requests.get(kind).unwrap_or(&0)));
        assert!(none_else && as_many, "{requests:?}, and not {expected:?}");
        done
    }
}

/// Of `lookup`, `lookup 2` and `lookup 0-2`.
fn range(request: &str) -> (&str, RangeInclusive<u64>) {
    let (kind, numbers) = request.split_once(' ').unwrap_or((request, "1"));
    let (least, most) = numbers.split_once('-').unwrap_or((numbers, numbers));
    (kind, least.parse().unwrap()..=most.parse().unwrap())
}

fn list(dir: &Path) -> io::Result<usize> {
    let mut n = 0;
    for entry in fs::read_dir(dir)? {
        entry?.metadata()?;
        n += 1;
    }
    Ok(n)
}

fn append(path: &Path, data: &[u8]) -> io::Result<()> {
    OpenOptions::new().append(true).open(path)?.write_all(data)
}

fn read_first(tree: &Tree) {
    fs::metadata(tree.path("d")).unwrap();
    tree.takes(&["lookup", "read"], || fs::read(tree.path("d/file1")));
    tree.takes(&["lookup", "read"], || fs::read(tree.path("d/file2")));
}

fn read_listed(tree: &Tree) {
    assert_eq!(tree.takes(&["readdirplus 2"], || list(&tree.path("d"))), 12);
    tree.takes(&["read"], || fs::read(tree.path("d/file1")));
    tree.takes(&["read"], || fs::read(tree.path("d/file2")));
}

fn read_again(tree: &Tree) {
    let read = || {
        let mut file = File::open(tree.path("d/file1"))?;
        file.read_exact_at(&mut [0; 100], 9_000)?;
        let mut content = [0; 10_000];
        file.read_exact(&mut content)?;
        Ok(content)
    };
    read().unwrap();
    for _ in 0..100 {
        assert!(tree.takes(&[], read) == [b'l'; 10_000]);
    }
    // Who asks for attributes, too.
    for _ in 0..100 {
        tree.takes(&["getattr"], || fs::read(tree.path("d/file1")));
    }
}

fn read_again_without_writeback(tree: &Tree) {
    fs::read(tree.path("d/file1")).unwrap();
    fs::metadata(tree.path("d/file1")).unwrap();
    for _ in 0..100 {
        assert!(tree.takes(&[], || fs::read(tree.path("d/file1"))) == [b'l'; 10_000]);
    }
}

fn read_again_without_an_upper(tree: &Tree) {
    fs::read(tree.path("d/file1")).unwrap();
    for _ in 0..100 {
        assert!(tree.takes(&[], || fs::read(tree.path("d/file1"))) == [b'l'; 10_000]);
    }
}

fn list_again(tree: &Tree) {
    assert_eq!(list(&tree.path("d")).unwrap(), 12);
    tree.takes(&["getattr"], || fs::metadata(tree.path("d")));
    for _ in 0..100 {
        assert_eq!(tree.takes(&[], || list(&tree.path("d"))), 12);
    }
}

fn list_after_a_change(tree: &Tree) {
    assert_eq!(list(&tree.path("d")).unwrap(), 12);
    File::create(tree.path("d/new")).unwrap();
    assert_eq!(tree.takes(&["getattr", "readdirplus 2"], || list(&tree.path("d"))), 13);
    tree.takes(&["getattr"], || fs::metadata(tree.path("d")));
    assert_eq!(tree.takes(&[], || list(&tree.path("d"))), 13);
}

fn absent(tree: &Tree) {
    tree.takes(&["lookup"], || there(tree, "absent", false));
    for _ in 0..100 {
        tree.takes(&[], || there(tree, "absent", false));
    }
    tree.takes(&["create"], || File::create(tree.path("absent")));
}

fn there(tree: &Tree, name: &str, expected: bool) -> io::Result<()> {
    assert_eq!(fs::exists(tree.path(name))?, expected, "{name}");
    Ok(())
}

fn look_again(tree: &Tree) {
    fs::metadata(tree.path("d")).unwrap();
    tree.takes(&["lookup", "readlink"], || fs::read_link(tree.path("d/link")));
    tree.takes(&["lookup"], || fs::metadata(tree.path("d/link")));
    for _ in 0..100 {
        tree.takes(&[], || fs::read_link(tree.path("d/link")));
        tree.takes(&[], || fs::metadata(tree.path("d/link")));
    }
}

fn create_empty(tree: &Tree) {
    fs::create_dir(tree.path("new")).unwrap();
    tree.takes(&["lookup", "create", "getattr"], || File::create(tree.path("new/1")));
    tree.takes(&["lookup", "create", "getattr"], || File::create(tree.path("new/2")));
}

fn create_and_write(tree: &Tree) {
    fs::create_dir(tree.path("new")).unwrap();
    // The directory has just been changed, and then looked at again.
    for (name, getattr) in [("new/1", "getattr"), ("new/2", "getattr 0")] {
        tree.takes(&["lookup", "create", getattr, "getxattr", "write", "setattr 0-1"], || {
            fs::write(tree.path(name), [b'n'; 4096])
        });
        tree.takes(&["getattr 2"], || fs::metadata(tree.path(name)));
        assert!(tree.takes(&[], || fs::read(tree.path(name))) == [b'n'; 4096]);
    }
}

fn create_listed(tree: &Tree) {
    list(&tree.path("d")).unwrap();
    tree.takes(&["lookup", "create"], || File::create(tree.path("d/new")));
}

fn write_small(tree: &Tree) {
    let mut file = File::create(tree.path("new")).unwrap();
    // One write reaches us for a great many, when the kernel holds back as much as it likes to.
    tree.takes(&["getxattr", "write 0-4"], || {
        (0..1000).try_for_each(|_| file.write_all(&[b'n'; 512]))
    });
    tree.takes(&["write 0-4", "fsync", "setattr 0-1"], || file.sync_all());
    tree.takes(&["write 0-4"], || (0..1000).try_for_each(|_| file.write_all(&[b'n'; 512])));
}

fn append_hot(tree: &Tree) {
    fs::write(tree.path("new"), "new").unwrap();
    append(&tree.path("new"), b"more").unwrap();
    for _ in 0..10 {
        tree.takes(&["write", "setattr 0-1"], || append(&tree.path("new"), b"more"));
    }
    assert_eq!(tree.takes(&["getattr"], || fs::read(tree.path("new"))).len(), 47);
}

fn append_to_lower(tree: &Tree) {
    fs::metadata(tree.path("d")).unwrap();
    tree.takes(&["lookup", "getxattr", "read", "write", "setattr 0-1"], || {
        append(&tree.path("d/file1"), b"more")
    });
    tree.takes(&["write", "setattr 0-1"], || append(&tree.path("d/file1"), b"more"));
}

fn overwrite(tree: &Tree) {
    fs::metadata(tree.path("d")).unwrap();
    tree.takes(&["lookup", "getxattr 2", "write", "setattr 1-2"], || {
        fs::write(tree.path("d/file1"), "cut off")
    });
    tree.takes(&["getxattr", "write", "setattr 1-2"], || {
        fs::write(tree.path("d/file1"), "cut off again")
    });
}

fn remove(tree: &Tree) {
    fs::write(tree.path("new"), "new").unwrap();
    tree.takes(&["getattr", "unlink", "setattr"], || fs::remove_file(tree.path("new")));
    tree.takes(&["lookup", "getattr"], || there(tree, "new", false));
    tree.takes(&[], || there(tree, "new", false));
    list(&tree.path("d")).unwrap();
    tree.takes(&["unlink", "setattr"], || fs::remove_file(tree.path("d/file1")));
    tree.takes(&["lookup", "getattr"], || there(tree, "d/file1", false));
}

fn rename(tree: &Tree) {
    fs::write(tree.path("new"), "new").unwrap();
    tree.takes(&["lookup", "getattr", "rename", "setattr"], || {
        fs::rename(tree.path("new"), tree.path("other"))
    });
    tree.takes(&["getattr 2"], || fs::metadata(tree.path("other")));
    assert_eq!(tree.takes(&[], || fs::read(tree.path("other"))), b"new");
    // A directory of a lower, with all that is in it.
    list(&tree.path("d")).unwrap();
    tree.takes(&["lookup", "rename"], || fs::rename(tree.path("d"), tree.path("moved")));
    tree.takes(&["getattr 2"], || fs::metadata(tree.path("moved")));
    tree.takes(&[], || fs::metadata(tree.path("moved/file1")));
}

fn change_attributes(tree: &Tree) {
    list(&tree.path("d")).unwrap();
    let mode = fs::Permissions::from_mode(0o640);
    tree.takes(&["setattr"], || fs::set_permissions(tree.path("d/file1"), mode));
    tree.takes(&[], || fs::metadata(tree.path("d/file1")));
    tree.takes(&["read"], || fs::read(tree.path("d/file1")));
}

fn directories(tree: &Tree) {
    tree.takes(&["lookup", "mkdir"], || fs::create_dir(tree.path("made")));
    tree.takes(&["getattr", "readdirplus 2"], || list(&tree.path("made")));
    tree.takes(&["rmdir"], || fs::remove_dir(tree.path("made")));
}
