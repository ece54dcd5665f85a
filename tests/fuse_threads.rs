//! Many threads on few names: nothing hangs, no file is lost, and no answer is stale.
//!
//! Each file holds its id. A thread that wants to take a name away, or give one, does it by way of a
//! name of its own: so it knows which file it was, and at the end every id must be found under exactly as
//! many names as were given to it and not taken.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod suite;
    pub mod union_mount;
}

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{CWD, FileType, Mode, RenameFlags, XattrFlags, makedev};
use rustix::io::Errno;
use stratafs::LayerFormat;
use support::suite;
use support::union_mount::{Branches, Engine, Rng, UnionMount, asked_seed, full};

const THREADS: u64 = 8;
const DIRS: &[&str] = &["left", "right", "left/moved", "right/moved", "new"];
const NAMES: &[&str] = &["a", "b", "c", "d", "e"];

fn main() {
    support::union_mount::enter_own_mount_namespace();
    let engine = Engine::under_test();
    let mut trials = Vec::new();
    let formats = match engine {
        Engine::Own => {
            &[LayerFormat::OverlayTrusted, LayerFormat::OverlayUser, LayerFormat::Aufs][..]
        }
        _ => &[LayerFormat::OverlayTrusted][..],
    };
    for &format in formats {
        for (name, replacing) in
            [("no_file_is_lost", Replacing::No), ("names_are_replaced", Replacing::Yes)]
        {
            let engine = engine.clone();
            trials.push(suite::trial(format!("{name}::{format}"), engine.hindrance(), move || {
                run(&engine, format, replacing);
            }));
        }
    }
    suite::run_one_by_one(trials);
}

/// Whether there are also renames that take a name from they know not whom.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Replacing {
    No,
    Yes,
}

/// How many names each id has been given and not been taken, as far as the threads know.
type Links = Mutex<BTreeMap<String, i64>>;

struct Worker<'a> {
    root: &'a Path,
    number: u64,
    rng: Rng,
    made: u64,
    links: &'a Links,
    replacing: Replacing,
}

fn run(engine: &Engine, format: LayerFormat, replacing: Replacing) {
    let steps = if full() { 20_000 } else { 1000 };
    let seed = asked_seed().unwrap_or(0x7452_6561_6453);
    let temp = suite::temp();
    let dir = temp.path();
    let links = Links::default();
    let lowers = layers(dir, format, &links);
    let (upper, work) = (dir.join("upper"), dir.join("work"));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    let branches = Branches::new(lowers, Some((upper, work)), format);
    let mount = UnionMount::new(engine, &branches, &dir.join("mount"));
    fs::create_dir(mount.path().join("new")).unwrap();
    {
        let _watchdog = mount.watchdog();
        std::thread::scope(|scope| {
            for number in 0..THREADS {
                let mut worker = Worker {
                    root: mount.path(),
                    number,
                    rng: Rng(seed + number),
                    made: 0,
                    links: &links,
                    replacing,
                };
                scope.spawn(move || {
                    for _ in 0..steps {
                        worker.step();
                    }
                });
            }
        });
    }
    let seen = Seen::of(mount.path());
    let links = links.into_inner().unwrap();
    seen.check(&links, replacing);
    mount.unmount().unwrap();
    let mount = UnionMount::new(engine, &branches, &dir.join("mount"));
    let after = Seen::of(mount.path());
    assert_eq!(after.ids, seen.ids, "the names after a remount");
    assert_eq!(after.dirs, seen.dirs, "the directories after a remount");
}

/// Two layers: files in both, some hidden by the upper of the two, and one that nobody touches.
fn layers(dir: &Path, format: LayerFormat, links: &Links) -> Vec<PathBuf> {
    let mut ids = links.lock().unwrap();
    let (bottom, top) = (dir.join("bottom"), dir.join("top"));
    for dir in ["left/moved", "right"] {
        fs::create_dir_all(bottom.join(dir)).unwrap();
        for name in NAMES {
            fs::write(bottom.join(dir).join(name), format!("bottom {dir} {name}")).unwrap();
            ids.insert(format!("bottom {dir} {name}"), 1);
        }
    }
    for dir in ["left", "right"] {
        fs::create_dir_all(top.join(dir)).unwrap();
        fs::write(top.join(dir).join("untouched"), "untouched").unwrap();
    }
    for name in ["a", "b"] {
        whiteout(&top.join("right").join(name), format);
        ids.remove(&format!("bottom right {name}")).unwrap();
    }
    fs::write(top.join("right/c"), "top right c").unwrap();
    ids.remove("bottom right c").unwrap();
    ids.insert("top right c".into(), 1);
    vec![top, bottom]
}

fn whiteout(path: &Path, format: LayerFormat) {
    if format == LayerFormat::Aufs {
        let name = format!(".wh.{}", path.file_name().unwrap().to_str().unwrap());
        fs::write(path.with_file_name(name), "").unwrap();
    } else {
        let mode = Mode::empty();
        rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(0, 0)).unwrap();
    }
}

/// What a race may end in: somebody else was there first.
fn lost_the_race(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::EXIST | Errno::NOTEMPTY)
}

impl Worker<'_> {
    fn any(&mut self) -> PathBuf {
        self.root.join(self.rng.pick(DIRS)).join(self.rng.pick(NAMES))
    }

    /// A name that no other thread uses.
    fn own(&mut self) -> PathBuf {
        self.root.join(self.rng.pick(DIRS)).join(format!("own{}", self.number))
    }

    fn step(&mut self) {
        let result = match self.rng.below(20) {
            0..3 => self.create(),
            3..5 => self.take(),
            5..8 => self.link(),
            8..11 => self.rename(RenameFlags::NOREPLACE),
            11..13 => self.rename(RenameFlags::EXCHANGE),
            13 => self.move_dir(),
            14 => self.remove_dir(),
            15 if self.replacing == Replacing::Yes => self.rename(RenameFlags::empty()),
            16 => self.touch(),
            17 => self.list(),
            _ => self.read(),
        };
        match result {
            Ok(()) => {}
            Err(errno) if lost_the_race(errno) => {}
            Err(errno) => panic!("thread {}: {errno}", self.number),
        }
    }

    fn counts(&self, id: &str, by: i64) {
        *self.links.lock().unwrap().entry(id.to_owned()).or_default() += by;
    }

    /// The own name becomes that of others, or is taken back.
    fn publish(&mut self, own: &Path, id: &str) -> rustix::io::Result<()> {
        let to = self.any();
        // Nobody may meet a name that is not counted yet.
        self.counts(id, 1);
        let given = rustix::fs::renameat_with(CWD, own, CWD, &to, RenameFlags::NOREPLACE);
        if given.is_err() {
            self.counts(id, -1);
            self.unlink_own(own)?;
        }
        given
    }

    /// The directory may have been moved away under the name in the meantime.
    fn unlink_own(&self, own: &Path) -> rustix::io::Result<()> {
        let name = own.file_name().unwrap();
        let unlinked = rustix::fs::unlink(own);
        if unlinked == Err(Errno::NOENT) {
            for _ in 0..100 {
                for dir in DIRS {
                    if rustix::fs::unlink(self.root.join(dir).join(name)).is_ok() {
                        return Ok(());
                    }
                }
            }
            panic!("{own:?} is lost");
        }
        unlinked
    }

    fn create(&mut self) -> rustix::io::Result<()> {
        let (own, id) = (self.own(), format!("made {} {}", self.number, self.made));
        self.made += 1;
        let file = fs::File::create_new(&own);
        let mut file = file.map_err(|e| Errno::from_io_error(&e).unwrap())?;
        file.write_all(id.as_bytes()).unwrap();
        drop(file);
        self.publish(&own, &id)
    }

    fn take(&mut self) -> rustix::io::Result<()> {
        let (from, own) = (self.any(), self.own());
        rustix::fs::renameat_with(CWD, &from, CWD, &own, RenameFlags::NOREPLACE)?;
        match fs::read_to_string(&own) {
            Ok(id) => self.counts(&id, -1),
            // Its directory was moved: it is found by its name.
            Err(_) => {
                let id = self.find_own(own.file_name().unwrap().as_ref());
                self.counts(&id, -1);
            }
        }
        self.unlink_own(&own)
    }

    fn find_own(&self, name: &Path) -> String {
        for _ in 0..100 {
            for dir in DIRS {
                if let Ok(id) = fs::read_to_string(self.root.join(dir).join(name)) {
                    return id;
                }
            }
        }
        panic!("{name:?} is lost");
    }

    fn link(&mut self) -> rustix::io::Result<()> {
        let (from, own) = (self.any(), self.own());
        rustix::fs::link(&from, &own)?;
        let id = fs::read_to_string(&own).unwrap_or_else(|_| {
            let name: &Path = own.file_name().unwrap().as_ref();
            self.find_own(name)
        });
        self.publish(&own, &id)
    }

    fn rename(&mut self, flags: RenameFlags) -> rustix::io::Result<()> {
        let (from, to) = (self.any(), self.any());
        rustix::fs::renameat_with(CWD, &from, CWD, &to, flags)
    }

    /// Only one of the two is there most of the time.
    fn move_dir(&mut self) -> rustix::io::Result<()> {
        let mut places = ["left/moved", "right/moved"];
        if self.rng.one_in(2) {
            places.reverse();
        }
        let [from, to] = places.map(|place| self.root.join(place));
        match rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE) {
            // Where there are no redirects.
            Err(Errno::XDEV) => Ok(()),
            other => other,
        }
    }

    fn remove_dir(&mut self) -> rustix::io::Result<()> {
        let dir = self.root.join(self.rng.pick(&["left/moved", "right/moved", "new/dir"]));
        match self.rng.below(3) {
            0 => rustix::fs::rmdir(&dir),
            _ => rustix::fs::mkdir(&dir, Mode::from_raw_mode(0o755)),
        }
    }

    /// A change of attributes, which copies up.
    fn touch(&mut self) -> rustix::io::Result<()> {
        let path = self.any();
        if self.rng.one_in(2) {
            rustix::fs::chmod(&path, Mode::from_raw_mode(0o640))
        } else {
            rustix::fs::setxattr(&path, "user.touched", b"y", XattrFlags::empty())
        }
    }

    fn list(&mut self) -> rustix::io::Result<()> {
        let dir = self.root.join(self.rng.pick(&["left", "right"]));
        let entries = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
        let untouched = entries.filter(|name| name == "untouched").count();
        assert_eq!(untouched, 1, "a name that nobody touches, in {dir:?}");
        Ok(())
    }

    /// What is found is a whole file.
    fn read(&mut self) -> rustix::io::Result<()> {
        let path = self.any();
        match fs::read_to_string(&path) {
            Ok(id) => {
                let whole = ["made ", "bottom ", "top "].iter().any(|start| id.starts_with(start));
                assert!(whole, "{path:?} holds {id:?}");
                Ok(())
            }
            Err(e) => Err(Errno::from_io_error(&e).unwrap()),
        }
    }
}

/// What there is when all is quiet.
struct Seen {
    /// The names of each id.
    ids: BTreeMap<String, BTreeSet<PathBuf>>,
    dirs: BTreeSet<PathBuf>,
}

impl Seen {
    /// All ways of asking must say the same.
    fn of(root: &Path) -> Seen {
        let mut seen = Seen { ids: BTreeMap::new(), dirs: BTreeSet::new() };
        let mut dirs = vec![root.to_owned()];
        while let Some(dir) = dirs.pop() {
            let mut names = BTreeSet::new();
            for entry in fs::read_dir(&dir).unwrap() {
                let entry = entry.unwrap();
                let path = entry.path();
                assert!(names.insert(entry.file_name()), "{path:?} is listed twice");
                let meta = fs::symlink_metadata(&path)
                    .unwrap_or_else(|e| panic!("{path:?} is listed, and stat says: {e}"));
                assert_eq!(entry.file_type().unwrap().is_dir(), meta.is_dir(), "{path:?}");
                assert!(!meta.file_type().is_char_device(), "{path:?} is a whiteout");
                let below = path.strip_prefix(root).unwrap().to_owned();
                if meta.is_dir() {
                    seen.dirs.insert(below);
                    dirs.push(path);
                } else {
                    let id = fs::read_to_string(&path)
                        .unwrap_or_else(|e| panic!("{path:?} is listed, and open says: {e}"));
                    seen.ids.entry(id).or_default().insert(below);
                }
            }
            for name in
                NAMES.iter().filter(|&&name| !names.contains(name.as_ref() as &std::ffi::OsStr))
            {
                let path = dir.join(name);
                assert!(
                    fs::symlink_metadata(&path).is_err() && fs::File::open(&path).is_err(),
                    "{path:?} is not listed, and is there"
                );
            }
        }
        for (id, names) in seen.ids.iter().filter(|(id, _)| *id != "untouched") {
            let metas = names.iter().map(|name| fs::symlink_metadata(root.join(name)).unwrap());
            let inodes: BTreeSet<_> = metas.map(|meta| (meta.ino(), meta.nlink())).collect();
            let same = inodes.len() == 1 && inodes.first().unwrap().1 == names.len() as u64;
            assert!(same, "{id:?} is named {names:?}, which have (number, links) {inodes:?}");
        }
        seen
    }

    fn check(&self, links: &BTreeMap<String, i64>, replacing: Replacing) {
        let mut ids: BTreeSet<&String> = links.keys().chain(self.ids.keys()).collect();
        assert_eq!(self.ids["untouched"].len(), 2);
        ids.retain(|id| *id != "untouched");
        for id in ids {
            let known = links.get(id).copied().unwrap_or_default();
            let names = self.ids.get(id).cloned().unwrap_or_default();
            let found = i64::try_from(names.len()).unwrap();
            let right = match replacing {
                Replacing::No => found == known,
                Replacing::Yes => found <= known,
            };
            assert!(right, "{id:?} was given {known} names, and has {names:?}");
        }
    }
}
