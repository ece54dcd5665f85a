//! What makes one tree from another, packed and unpacked again.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::archive::entry::{EntryLimits, EntryReader};
use crate::archive::{ApplyOptions, LayerTarget, XattrPolicy, apply_layer};
use crate::layer::LayerFormat;
use crate::layer::stack::Branch;
use crate::sys::dir::Node;
use crate::sys::stat::Time;
use crate::sys::xattr;

/// Two trees, `old` and `new`.
struct Pair(tempfile::TempDir);

impl Pair {
    fn new() -> Self {
        // Not /tmp: a tmpfs may have no user xattrs.
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir(tmp.path().join("old")).unwrap();
        Pair(tmp)
    }

    fn old(&self) -> PathBuf {
        self.0.path().join("old")
    }

    fn new_tree(&self) -> PathBuf {
        self.0.path().join("new")
    }

    /// Makes the new tree a copy of the old one.
    fn copy(&self) {
        let copied = Command::new("cp").arg("-a").args([self.old(), self.new_tree()]).status();
        assert!(copied.unwrap().success());
    }

    fn try_export(&self) -> (Vec<u8>, Result<Exported>) {
        let mut out = Vec::new();
        let options = ExportOptions::new();
        let done =
            export_diff(self.old(), self.new_tree(), &mut out, &options, &mut ignore_progress);
        (out, done)
    }

    /// The archive, once it was seen that unpacking it over the old tree gives the new one.
    fn export(&self) -> Vec<u8> {
        let (out, done) = self.try_export();
        assert_eq!(done.unwrap().bytes, out.len() as u64);
        let expected = whole(&self.new_tree());
        let target = LayerTarget::Tree;
        apply_layer(&out[..], self.old(), target, &options(), &mut ignore_progress).unwrap();
        let got = whole(&self.old());
        for (path, line) in &expected {
            assert_eq!(got.get(path), Some(line), "{path:?} in {:?}", self.0.path());
        }
        assert_eq!(got.len(), expected.len(), "{:?}", got.keys());
        out
    }

    /// Unpacks the archive as a layer, and looks through it at the old tree.
    fn layer_shows_the_new_tree(&self) {
        let (out, done) = self.try_export();
        done.unwrap();
        for format in [LayerFormat::OverlayUser, LayerFormat::Aufs] {
            let layer = self.0.path().join(format.as_str());
            fs::create_dir(&layer).unwrap();
            let mut options = options();
            options.parents = vec![self.old()];
            let target = LayerTarget::Layer(format);
            apply_layer(&out[..], &layer, target, &options, &mut ignore_progress).unwrap();
            let branch = |path: &Path| Branch { dir: Arc::new(Dir::open(path).unwrap()), format };
            let union = LayerStack::new(vec![branch(&layer), branch(&self.old())]);
            let new = plain(&self.new_tree()).unwrap();
            changes::trees(&new, &union, Mtimes::Count, &mut ignore_progress, &mut |found| {
                assert_eq!(found.kind, None, "{:?} in {:?}", found.path, self.0.path());
                Ok(())
            })
            .unwrap();
        }
    }

    fn refused(&self, path: &str) {
        let (out, done) = self.try_export();
        let e = done.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition, "{e}");
        assert_eq!((out.len(), e.path()), (0, Some(Path::new(path))));
    }
}

/// Whether owners and devices can be made; in a container maybe not, so that is tried.
fn privileged() -> bool {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = tmp.path().join("f");
    fs::write(&file, "").unwrap();
    std::os::unix::fs::chown(&file, Some(1), Some(1)).is_ok()
        && Dir::open(tmp.path()).unwrap().make_node(&name("n"), NULL, 0o600).is_ok()
}

fn options() -> ApplyOptions {
    let privileged = privileged();
    let base = if privileged { ApplyOptions::default() } else { ApplyOptions::unprivileged() };
    ApplyOptions { xattrs: XattrPolicy::Exact, ..base }
}

const NULL: Node = Node::Char { major: 1, minor: 3 };

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn parent(path: &Path) -> (Dir, Name) {
    let name = Name::new(path.file_name().unwrap().as_bytes()).unwrap();
    (Dir::open(path.parent().unwrap()).unwrap(), name)
}

fn set_time(path: &Path, time: Time) {
    let (dir, name) = parent(path);
    dir.set_times_at(&name, time, time).unwrap();
}

/// Everything about a tree, a line for each path; of the names of one file all tell the first.
fn whole(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut lines = BTreeMap::new();
    let mut files = HashMap::new();
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let (dir, name) = parent(entry.path());
        let stat = dir.stat_at(&name).unwrap();
        let path = entry.path().strip_prefix(root).unwrap().to_owned();
        let first = files.entry((stat.dev, stat.ino)).or_insert_with(|| path.clone()).clone();
        let content = match stat.file_type {
            FileType::Regular => fs::read(entry.path()).unwrap(),
            FileType::Symlink => dir.read_link(&name).unwrap(),
            _ => Vec::new(),
        };
        let of = Of::Child(&dir, &name);
        let xattrs: Vec<_> = xattr::list(of)
            .unwrap()
            .into_iter()
            .map(|key| (key.escape_ascii().to_string(), xattr::get(of, &key).unwrap()))
            .collect();
        let (ids, mtime) = ((stat.uid, stat.gid), (stat.mtime.secs, stat.mtime.nanos));
        let line = format!(
            "{:?} {:o} {ids:?} {:?} {mtime:?} {xattrs:?} {first:?} {}",
            stat.file_type,
            stat.mode,
            stat.rdev,
            content.escape_ascii(),
        );
        lines.insert(path, line);
    }
    lines
}

fn paths(archive: &[u8]) -> Vec<String> {
    let mut reader = EntryReader::new(archive, EntryLimits::default());
    let mut paths = Vec::new();
    while let Some(entry) = reader.next().unwrap() {
        let link = match &entry.kind {
            EntryKind::HardLink { target } => format!(" => {}", target.as_path().display()),
            _ => String::new(),
        };
        paths.push(format!("{}{link}", entry.path.as_path().display()));
    }
    paths
}

#[test]
fn parents_come_before_children_and_nothing_else_comes_along() {
    let pair = Pair::new();
    for path in ["a/b/c", "a/other", "gone/deep", "same/x"] {
        fs::create_dir_all(pair.old().join(path)).unwrap();
        fs::write(pair.old().join(path).join("f"), "text").unwrap();
    }
    pair.copy();
    fs::write(pair.new_tree().join("a/b/c/f"), "other text").unwrap();
    fs::remove_dir_all(pair.new_tree().join("gone")).unwrap();
    fs::create_dir_all(pair.new_tree().join("a/new/sub")).unwrap();
    let time = Time { secs: 9, nanos: 9 };
    set_time(&pair.new_tree().join("a/b"), time);
    let expected = ["", ".wh.gone", "a", "a/b", "a/b/c", "a/b/c/f", "a/new", "a/new/sub"];
    assert_eq!(paths(&pair.export()), expected);
}

#[test]
fn attributes_and_times_alone_are_packed_too() {
    let pair = Pair::new();
    for path in ["mode", "time", "xattr", "same"] {
        fs::create_dir(pair.old().join(path)).unwrap();
        fs::write(pair.old().join(path).join("f"), "text").unwrap();
    }
    fs::write(pair.old().join("touched"), "text").unwrap();
    pair.copy();
    fs::set_permissions(pair.new_tree().join("mode"), Permissions::from_mode(0o1711)).unwrap();
    let time = Time { secs: -9, nanos: 9 };
    set_time(&pair.new_tree().join("time"), time);
    set_time(&pair.new_tree().join("touched"), time);
    let (dir, f) = parent(&pair.new_tree().join("xattr"));
    xattr::set(Of::Child(&dir, &f), b"user.k", b"v").unwrap();
    let listed = diff_trees(pair.old(), pair.new_tree(), &mut ignore_progress).unwrap();
    assert_eq!(listed.iter().map(Change::to_string).collect::<Vec<_>>(), ["M /mode", "M /xattr"]);
    assert_eq!(paths(&pair.export()), ["", "mode", "time", "touched", "xattr"]);
}

#[test]
fn one_type_takes_the_place_of_another_without_a_mark() {
    let pair = Pair::new();
    fs::create_dir_all(pair.old().join("dir/sub")).unwrap();
    fs::create_dir_all(pair.old().join("link/sub")).unwrap();
    fs::write(pair.old().join("file"), "text").unwrap();
    symlink("dir", pair.old().join("was-link")).unwrap();
    fs::create_dir_all(pair.new_tree().join("file/sub")).unwrap();
    fs::create_dir_all(pair.new_tree().join("was-link/sub")).unwrap();
    fs::write(pair.new_tree().join("dir"), "text").unwrap();
    symlink("file", pair.new_tree().join("link")).unwrap();
    let expected = ["", "dir", "file", "file/sub", "link", "was-link", "was-link/sub"];
    assert_eq!(paths(&pair.export()), expected);
}

#[test]
fn marks_are_not_led_astray_by_symlinks() {
    let pair = Pair::new();
    fs::create_dir_all(pair.old().join("real/d")).unwrap();
    fs::write(pair.old().join("real/f"), "text").unwrap();
    fs::create_dir(pair.old().join("was-dir")).unwrap();
    fs::write(pair.old().join("was-dir/f"), "text").unwrap();
    symlink("real", pair.old().join("link")).unwrap();
    pair.copy();
    // What was below it is gone with it; a mark there would go through the link.
    fs::remove_dir_all(pair.new_tree().join("was-dir")).unwrap();
    symlink("real", pair.new_tree().join("was-dir")).unwrap();
    fs::remove_file(pair.new_tree().join("link")).unwrap();
    assert_eq!(paths(&pair.export()), ["", ".wh.link", "was-dir"]);
    assert!(pair.old().join("real/f").exists());
}

#[test]
fn a_link_to_an_unmodified_file_brings_all_its_names() {
    let pair = Pair::new();
    fs::create_dir(pair.old().join("d")).unwrap();
    for (file, link) in [("d/f", "z"), ("other", "another")] {
        fs::write(pair.old().join(file), "text").unwrap();
        fs::hard_link(pair.old().join(file), pair.old().join(link)).unwrap();
    }
    pair.copy();
    fs::hard_link(pair.new_tree().join("z"), pair.new_tree().join("m")).unwrap();
    assert_eq!(paths(&pair.export()), ["", "d", "d/f", "m => d/f", "z => d/f"]);
}

#[test]
fn a_modified_file_brings_all_its_names() {
    let pair = Pair::new();
    fs::create_dir(pair.old().join("d")).unwrap();
    fs::write(pair.old().join("d/f"), "text").unwrap();
    fs::hard_link(pair.old().join("d/f"), pair.old().join("z")).unwrap();
    pair.copy();
    fs::write(pair.new_tree().join("z"), "more text").unwrap();
    let listed = diff_trees(pair.old(), pair.new_tree(), &mut ignore_progress).unwrap();
    assert_eq!(listed.iter().map(Change::to_string).collect::<Vec<_>>(), ["M /d/f", "M /z"]);
    assert_eq!(paths(&pair.export()), ["", "d", "d/f", "z => d/f"]);
}

#[test]
fn links_that_were_parted_and_joined_are_so_again() {
    let pair = Pair::new();
    let time = Time { secs: 5, nanos: 5 };
    for root in [pair.old(), pair.new_tree()] {
        fs::create_dir_all(&root).unwrap();
        for path in ["a", "c", "x", "z"] {
            fs::write(root.join(path), "text").unwrap();
            set_time(&root.join(path), time);
        }
    }
    fs::hard_link(pair.old().join("a"), pair.old().join("b")).unwrap();
    fs::write(pair.new_tree().join("b"), "text").unwrap();
    set_time(&pair.new_tree().join("b"), time);
    fs::write(pair.old().join("y"), "text").unwrap();
    set_time(&pair.old().join("y"), time);
    fs::hard_link(pair.new_tree().join("x"), pair.new_tree().join("y")).unwrap();
    assert_eq!(diff_trees(pair.old(), pair.new_tree(), &mut ignore_progress).unwrap(), []);
    assert_eq!(paths(&pair.export()), ["", "a", "b", "x", "y => x"]);
}

#[test]
fn sockets_are_left_out_and_what_they_replaced_is_deleted() {
    let pair = Pair::new();
    fs::write(pair.old().join("s"), "text").unwrap();
    fs::create_dir(pair.new_tree()).unwrap();
    for path in ["s", "t"] {
        std::os::unix::net::UnixListener::bind(pair.new_tree().join(path)).unwrap();
    }
    let (out, done) = pair.try_export();
    assert_eq!((paths(&out), done.unwrap().sockets), (vec!["".into(), ".wh.s".into()], 2));
}

#[test]
fn what_no_archive_can_say_is_refused_before_a_byte() {
    let long = "n".repeat(252);
    for (old, new, at) in [
        ("", "d/.wh.f", "d/.wh.f"),
        ("", "d/.wh.d/f", "d/.wh.d"),
        (".wh.f", "", ".wh.f"),
        (&long[..], "", &long[..]),
    ] {
        let pair = Pair::new();
        for (root, path) in [(pair.old(), old), (pair.new_tree(), new)] {
            fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            if path.is_empty() {
                fs::create_dir_all(root).unwrap();
            } else {
                fs::write(root.join(path), "text").unwrap();
            }
        }
        pair.refused(at);
    }
    // What is the same in both is not packed, whatever its name.
    let pair = Pair::new();
    fs::write(pair.old().join(".wh.f"), "text").unwrap();
    fs::write(pair.old().join(&long), "text").unwrap();
    pair.copy();
    let (out, done) = pair.try_export();
    done.unwrap();
    assert_eq!(paths(&out), [""]);
}

#[test]
fn a_whiteout_device_in_a_plain_tree_is_refused() {
    let pair = Pair::new();
    fs::create_dir(pair.new_tree()).unwrap();
    let zero = Node::Char { major: 0, minor: 0 };
    Dir::open(pair.new_tree()).unwrap().make_node(&name("f"), zero, 0o600).unwrap();
    pair.refused("f");
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn one_of<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }

    fn path(&mut self, root: &Path) -> PathBuf {
        let long: &[u8] = &[b'l'; 251];
        let names = [b"a", &b"b"[..], b"a.b", b"\xff\n ", b".wh", b"-", long];
        let depth = self.below(3);
        let path: PathBuf = (0..=depth).map(|_| OsStr::from_bytes(self.one_of(&names))).collect();
        root.join(path)
    }

    fn time(&mut self) -> Time {
        let nanos = *self.one_of(&[&0, &0, &1, &999_999_999]);
        let secs = *self.one_of(&[&-5, &0, &1_000_000, &1_000_001, &8_000_000_000]);
        Time { secs, nanos }
    }

    fn attributes(&mut self, path: &Path, privileged: bool) {
        let (dir, name) = parent(path);
        let stat = dir.stat_at(&name).unwrap();
        let plain = matches!(stat.file_type, FileType::Regular | FileType::Directory);
        // A directory that its owner may not search is for root alone to edit.
        let odd = if stat.is_dir() && !privileged { 0o711 } else { 0o640 };
        if privileged && self.below(3) == 0 {
            let id = u32::try_from(self.below(3)).unwrap() * 70_000;
            dir.chown_at(&name, id, id + 1).unwrap();
        }
        if stat.file_type != FileType::Symlink && self.below(2) == 0 {
            dir.chmod_at(&name, *self.one_of(&[&0o700, &0o4711, &0o1777, &odd])).unwrap();
        }
        if plain && self.below(3) == 0 {
            let key = self.one_of(&["user.a", "user.b"]);
            let value = self.one_of(&[&b""[..], b"\0\xff=\n", b"1"]);
            // A mode may be without write permission.
            xattr::set(Of::Child(&dir, &name), key.as_bytes(), value).ok();
        }
        dir.set_times_at(&name, self.time(), self.time()).unwrap();
    }

    /// Adds, changes or deletes something.
    fn edit(&mut self, root: &Path, privileged: bool) {
        let path = self.path(root);
        if !path.parent().unwrap().symlink_metadata().is_ok_and(|m| m.is_dir()) {
            return;
        }
        let found = path.symlink_metadata().ok();
        if found.is_some() && self.below(3) == 0 {
            self.attributes(&path, privileged);
            return;
        }
        match &found {
            Some(meta) if meta.is_dir() && self.below(3) > 0 => return,
            Some(meta) if meta.is_dir() => fs::remove_dir_all(&path).unwrap(),
            // Written into, under all its names.
            Some(meta) if meta.is_file() && self.below(2) == 0 => {
                fs::write(&path, self.one_of(&["", "one", "two", "three"])).unwrap();
                set_time(&path, self.time());
                return;
            }
            Some(_) => fs::remove_file(&path).unwrap(),
            None => {}
        }
        let (dir, name) = parent(&path);
        match self.below(10) {
            0 | 1 => return,
            2..=4 => fs::create_dir(&path).unwrap(),
            5 | 6 => fs::write(&path, self.one_of(&["", "one", "two", "three"])).unwrap(),
            7 => symlink(self.one_of(&["a", "../b", "\n"]), &path).unwrap(),
            8 => {
                let other = self.path(root);
                match other.symlink_metadata() {
                    Ok(meta) if !meta.is_dir() => fs::hard_link(&other, &path).unwrap(),
                    _ => return,
                }
            }
            _ if privileged && self.below(2) == 0 => dir.make_node(&name, NULL, 0o600).unwrap(),
            _ => dir.make_node(&name, Node::Fifo, 0o600).unwrap(),
        }
        self.attributes(&path, privileged);
    }
}

fn cases() -> u64 {
    if std::env::var_os("STRATAFS_FULL").is_some() { 1_500 } else { 80 }
}

#[test]
fn the_difference_of_random_trees_makes_one_from_the_other() {
    let privileged = privileged();
    let mut packed = 0;
    for seed in 1..=cases() {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let pair = Pair::new();
        (0..40).for_each(|_| random.edit(&pair.old(), privileged));
        if random.below(3) == 0 {
            fs::create_dir(pair.new_tree()).unwrap();
            (0..40).for_each(|_| random.edit(&pair.new_tree(), privileged));
        } else {
            pair.copy();
            (0..15).for_each(|_| random.edit(&pair.new_tree(), privileged));
        }
        for root in [pair.old(), pair.new_tree()] {
            random.attributes(&root, privileged);
        }
        pair.layer_shows_the_new_tree();
        packed += paths(&pair.export()).len();
        assert_eq!(diff_trees(pair.old(), pair.new_tree(), &mut ignore_progress).unwrap(), []);
    }
    assert!(packed > 500, "little to do: {packed}");
}
