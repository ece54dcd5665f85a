//! Random edits over random trees, written down as layers in each format and as plain trees: the
//! upper alone, two unions and two plain trees must tell the same changes.
//!
//! The seeds are fixed; `STRATAFS_FULL` in the environment asks for many more.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::{Change, between, upper};
use crate::layer::LayerFormat;
use crate::layer::marks;
use crate::layer::stack::{Branch, LayerStack};
use crate::path::{Name, RelPath};
use crate::progress::ignore_progress;
use crate::sys::dir::{self, Dir};
use crate::sys::stat::Time;
use crate::sys::xattr::{self, Of};

const EDITED: &[u8] = b"user.edited";

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn one_of<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }

    /// A path of one to three of a few names.
    fn path(&mut self) -> PathBuf {
        (0..=self.below(3)).map(|_| self.one_of(&["a", "b", "a.b", "-"])).collect()
    }
}

/// Layers that grow by edits as a mount would make them, and the tree that they show.
struct Sim {
    tmp: tempfile::TempDir,
    format: LayerFormat,
    /// How many layers there are; the last is edited.
    layers: usize,
    clock: i64,
    /// Whether a directory made again has the attributes that it had.
    recreate_equal: bool,
}

impl Sim {
    fn new(format: LayerFormat) -> Self {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut sim = Sim { tmp, format, layers: 0, clock: 1_000, recreate_equal: false };
        fs::create_dir(sim.tmp.path().join("plain")).unwrap();
        sim.next_layer();
        sim
    }

    /// Keeps the plain tree as it is, and begins a layer.
    fn next_layer(&mut self) {
        if self.layers > 0 {
            let copied = Command::new("cp")
                .arg("-a")
                .args([self.plain(), self.tmp.path().join("plain.before")])
                .status();
            assert!(copied.unwrap().success());
        }
        fs::create_dir(self.layer(self.layers)).unwrap();
        self.layers += 1;
    }

    fn plain(&self) -> PathBuf {
        self.tmp.path().join("plain")
    }

    fn layer(&self, index: usize) -> PathBuf {
        self.tmp.path().join(index.to_string())
    }

    fn top(&self, path: &Path) -> PathBuf {
        self.layer(self.layers - 1).join(path)
    }

    fn branch(&self, index: usize) -> Branch {
        Branch { dir: Arc::new(Dir::open(self.layer(index)).unwrap()), format: self.format }
    }

    /// The lowest `count` layers.
    fn stack(&self, count: usize) -> LayerStack {
        LayerStack::new((0..count).rev().map(|index| self.branch(index)).collect())
    }

    /// Where the union has what it shows at `path`.
    fn shown(&self, path: &Path) -> Option<PathBuf> {
        let path = RelPath::new(path).unwrap();
        let found = self.stack(self.layers).lookup(&path).unwrap()?;
        Some(self.layer(self.layers - 1 - found.layer).join(path.as_path()))
    }

    fn shows_dir(&self, path: &Path) -> bool {
        path.as_os_str().is_empty()
            || self.shown(path).is_some_and(|at| at.symlink_metadata().unwrap().is_dir())
    }

    fn now(&mut self, precise: bool) -> Time {
        self.clock += 1;
        Time { secs: self.clock, nanos: u32::from(precise) * 5 }
    }

    fn in_parent<T>(path: &Path, act: impl FnOnce(&Dir, &Name) -> T) -> T {
        let name = Name::new(path.file_name().unwrap().as_encoded_bytes()).unwrap();
        act(&Dir::open(path.parent().unwrap()).unwrap(), &name)
    }

    /// Gives `path`, and what is above it, an entry in the top layer, as it is.
    fn copy_up(&self, path: &Path) {
        if path.as_os_str().is_empty() || self.top(path).symlink_metadata().is_ok() {
            return;
        }
        self.copy_up(path.parent().unwrap());
        let (from, to) = (self.shown(path).unwrap(), self.top(path));
        let meta = from.symlink_metadata().unwrap();
        if !meta.is_dir() {
            let copied =
                Command::new("cp").args(["-a", "--no-preserve=links"]).args([&from, &to]).status();
            assert!(copied.unwrap().success());
            return;
        }
        // Only the directory itself, without marks.
        fs::create_dir(&to).unwrap();
        fs::set_permissions(&to, meta.permissions()).unwrap();
        let (from, to) = (Dir::open(from).unwrap(), Dir::open(to).unwrap());
        if let Some(value) = xattr::get(Of::dir(&from), EDITED).unwrap() {
            xattr::set(Of::dir(&to), EDITED, &value).unwrap();
        }
        let mtime = from.stat().unwrap().mtime;
        dir::set_times(&to, mtime, mtime).unwrap();
    }

    fn edit(&mut self, random: &mut Random) {
        let path = random.path();
        let parent = path.parent().unwrap().to_owned();
        if !self.shows_dir(&parent) {
            return;
        }
        let precise = random.below(2) == 0;
        let exists = self.shown(&path).is_some();
        match random.below(if exists { 8 } else { 4 }) {
            0 | 1 if !self.shows_dir(&path) => {
                let text = random.one_of(&["", "one", "two", "more"]);
                let time = self.now(precise);
                self.replace(&path, |at| {
                    fs::write(at, text).unwrap();
                    Self::in_parent(at, |d, n| d.set_times_at(n, time, time)).unwrap();
                });
            }
            2 if !self.shows_dir(&path) => {
                let target = random.one_of(&["a", "/b"]);
                let time = self.now(precise);
                self.replace(&path, |at| {
                    std::os::unix::fs::symlink(target, at).unwrap();
                    Self::in_parent(at, |d, n| d.set_times_at(n, time, time)).unwrap();
                });
            }
            3 if !exists => self.make_dir(&path),
            4 => {
                self.delete(&path);
                if random.below(3) == 0 {
                    self.make_dir(&path);
                }
            }
            5 if !self.shown(&path).unwrap().is_symlink() => {
                let mode = 0o700 + u32::try_from(random.below(8)).unwrap();
                self.copy_up(&path);
                for at in [self.top(&path), self.plain().join(&path)] {
                    fs::set_permissions(at, Permissions::from_mode(mode)).unwrap();
                }
            }
            6 if !self.shown(&path).unwrap().is_symlink() => {
                self.copy_up(&path);
                for at in [self.top(&path), self.plain().join(&path)] {
                    Self::in_parent(&at, |d, n| {
                        xattr::set(Of::Child(d, n), EDITED, b"1").unwrap();
                    });
                }
            }
            _ if exists => {
                let time = self.now(precise);
                self.copy_up(&path);
                for at in [self.top(&path), self.plain().join(&path)] {
                    Self::in_parent(&at, |d, n| d.set_times_at(n, time, time)).unwrap();
                }
            }
            _ => {}
        }
    }

    /// Puts what `make` makes in place of whatever is there but a directory.
    fn replace(&mut self, path: &Path, make: impl Fn(&Path)) {
        self.remove_from_top(path);
        make(&self.top(path));
        let plain = self.plain().join(path);
        if plain.symlink_metadata().is_ok() {
            fs::remove_file(&plain).unwrap();
        }
        make(&plain);
    }

    /// Leaves nothing of `path` in the top layer, marks among it.
    fn remove_from_top(&self, path: &Path) {
        self.copy_up(path.parent().unwrap());
        let top = self.top(path);
        let name = Name::new(path.file_name().unwrap().as_encoded_bytes()).unwrap();
        let mark = match marks::separate_whiteout(self.format, &name) {
            Some(mark) => top.with_file_name(mark.as_os_str()),
            None => top.clone(),
        };
        if mark != top && mark.symlink_metadata().is_ok() {
            fs::remove_file(&mark).unwrap();
        }
        match top.symlink_metadata() {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&top).unwrap(),
            Ok(_) => fs::remove_file(&top).unwrap(),
            Err(_) => {}
        }
    }

    fn make_dir(&mut self, path: &Path) {
        self.remove_from_top(path);
        let hides = self.shown(path);
        let old = self.stack(self.layers - 1).lookup(&RelPath::new(path).unwrap()).unwrap();
        // By default unlike any other, so that it can be seen that it is another.
        let mode = match old {
            Some(old) if self.recreate_equal && old.stat.is_dir() => old.stat.mode,
            _ => 0o1700 | u32::try_from(self.clock % 64).unwrap(),
        };
        self.clock += 1;
        let plain = self.plain().join(path);
        for at in [&self.top(path), &plain] {
            fs::create_dir(at).unwrap();
            fs::set_permissions(at, Permissions::from_mode(mode)).unwrap();
        }
        if hides.is_some() {
            marks::make_opaque(self.format, &Dir::open(self.top(path)).unwrap()).unwrap();
        }
    }

    fn delete(&mut self, path: &Path) {
        self.remove_from_top(path);
        if self.shown(path).is_some() {
            Self::in_parent(&self.top(path), |d, n| marks::make_whiteout(self.format, d, n))
                .unwrap();
        }
        let plain = self.plain().join(path);
        if plain.symlink_metadata().unwrap().is_dir() {
            fs::remove_dir_all(plain).unwrap();
        } else {
            fs::remove_file(plain).unwrap();
        }
    }

    fn told_by_the_upper(&self) -> Vec<Change> {
        let (top, below) = (self.branch(self.layers - 1), self.stack(self.layers - 1));
        upper(&top, &below, &mut ignore_progress).unwrap()
    }

    fn told_by_two_unions(&self) -> Vec<Change> {
        let (new, old) = (self.stack(self.layers), self.stack(self.layers - 1));
        between(&new, &old, &mut ignore_progress).unwrap()
    }

    fn told_by_two_trees(&self) -> Vec<Change> {
        let plain = |name: &str| {
            let dir = Dir::open(self.tmp.path().join(name)).unwrap();
            LayerStack::plain(Arc::new(dir))
        };
        between(&plain("plain"), &plain("plain.before"), &mut ignore_progress).unwrap()
    }
}

fn text(changes: &[Change]) -> Vec<String> {
    changes.iter().map(Change::to_string).collect()
}

fn cases() -> u64 {
    if std::env::var_os("STRATAFS_FULL").is_some() { 1_000 } else { 40 }
}

#[test]
fn the_upper_two_unions_and_two_trees_tell_the_same() {
    let mut told = 0;
    for seed in 1..=cases() {
        for format in [LayerFormat::OverlayUser, LayerFormat::Aufs] {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut sim = Sim::new(format);
            for _ in 0..2 {
                (0..25).for_each(|_| sim.edit(&mut random));
                fs::remove_dir_all(sim.tmp.path().join("plain.before")).ok();
                sim.next_layer();
            }
            (0..12).for_each(|_| sim.edit(&mut random));
            let expected = text(&sim.told_by_the_upper());
            told += expected.len();
            let context = format!("{format}, seed {seed}, {:?}", sim.tmp.path());
            assert_eq!(text(&sim.told_by_two_unions()), expected, "two unions, {context}");
            assert_eq!(text(&sim.told_by_two_trees()), expected, "two trees, {context}");
        }
    }
    assert!(told > 200, "few changes: {told}");
}

#[test]
fn a_directory_made_again_as_it_was_is_seen_from_the_upper_alone() {
    for format in [LayerFormat::OverlayUser, LayerFormat::Aufs] {
        let mut sim = Sim::new(format);
        sim.make_dir(Path::new("d"));
        let time = sim.now(true);
        sim.replace(Path::new("d/x"), |at| {
            fs::write(at, "x").unwrap();
            dir::set_times(fs::File::open(at).unwrap(), time, time).unwrap();
        });
        sim.next_layer();
        sim.recreate_equal = true;
        sim.delete(Path::new("d"));
        sim.make_dir(Path::new("d"));
        assert_eq!(text(&sim.told_by_the_upper()), ["M /d", "D /d/x"], "{format}");
        assert_eq!(text(&sim.told_by_two_unions()), ["D /d/x"], "{format}");
        assert_eq!(text(&sim.told_by_two_trees()), ["D /d/x"], "{format}");
    }
}
