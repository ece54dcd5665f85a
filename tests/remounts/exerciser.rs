//! Random operations on what files hold, on their names and on their attributes, beside images of what they
//! must hold: an fsx of several files, some of which begin in a lower layer, that goes on when the union is
//! mounted again.
//!
//! After a kill each byte of a file that was not synced is that of one of its images since it was; all else is
//! as it was, to the byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::fs::{FallocateFlags, RenameFlags};
use rustix::io::Errno;

use crate::support::calls::{self, Mapping};
use crate::support::union_mount::Rng;

/// The longest that a file gets.
const LENGTH: u64 = 200_000;
/// The most that one operation reads or writes.
const MOST: u64 = 40_000;
const NOTE: &str = "user.note";

/// A file, by whatever names.
#[derive(Clone, Debug)]
struct Image {
    /// What it held since it was synced, and last what it holds.
    versions: Vec<Vec<u8>>,
    mode: u32,
    note: Option<Vec<u8>>,
    /// Whether it is in a lower layer and nothing of it was changed.
    below: bool,
    /// How many of its names were removed while it was so. When the union is mounted again, nobody knows of
    /// them any more but the lower layer, which counts them: a known difference.
    removed_below: u64,
}

impl Image {
    fn new(versions: Vec<Vec<u8>>, mode: u32, below: bool) -> Image {
        Image { versions, mode, note: None, below, removed_below: 0 }
    }

    fn content(&self) -> &Vec<u8> {
        self.versions.last().unwrap()
    }

    fn change(&mut self, change: impl FnOnce(&mut Vec<u8>)) {
        self.below = false;
        let mut content = self.content().clone();
        change(&mut content);
        self.versions.push(content);
    }

    fn synced(&mut self) {
        self.versions.drain(..self.versions.len() - 1);
    }

    /// Whether each byte is that of a version, or zero where one has ended before.
    fn may_be(&self, bytes: &[u8]) -> bool {
        let versions = &self.versions;
        versions.iter().any(|version| bytes.len() <= version.len())
            && versions.iter().any(|version| bytes.len() >= version.len())
            && bytes.iter().enumerate().all(|(i, byte)| {
                versions.iter().any(|version| version.get(i).unwrap_or(&0) == byte)
            })
    }
}

/// Descriptors by which files are used. What was written is handed over when they are closed.
pub type Open = BTreeMap<usize, File>;

/// The files, their names, and what was done.
#[derive(Debug)]
pub struct Exerciser {
    rng: Rng,
    images: Vec<Image>,
    /// The image of each path.
    names: BTreeMap<String, usize>,
    dirs: BTreeSet<String>,
    /// Whether directories of lower layers can be renamed.
    renames_dirs: bool,
    made: u64,
    /// For who must find out what went wrong.
    pub told: Vec<String>,
}

impl Exerciser {
    /// Makes the lower layers, the topmost first.
    pub fn new(seed: u64, renames_dirs: bool, lowers: &[&Path]) -> Exerciser {
        let mut exerciser = Exerciser {
            rng: Rng(seed),
            images: Vec::new(),
            names: BTreeMap::new(),
            dirs: ["d0", "d1", "d2"].map(str::to_owned).into(),
            renames_dirs,
            made: 0,
            told: Vec::new(),
        };
        for lower in lowers {
            for dir in &exerciser.dirs {
                fs::create_dir(lower.join(dir)).unwrap();
            }
        }
        for (n, (length, sparse, twice)) in [
            (70_000, false, false),
            (LENGTH, true, false),
            (100, false, false),
            (0, false, false),
            (30_000, false, true),
            (5_000, false, false),
            (100_000, true, true),
            (4096, false, false),
        ]
        .into_iter()
        .enumerate()
        {
            let lower = lowers[n % lowers.len()];
            let name = format!("d{}/lower{n}", n % 3);
            let content = if sparse { exerciser.sparse(length) } else { exerciser.bytes(length) };
            let file = File::create_new(lower.join(&name)).unwrap();
            file.set_len(content.len() as u64).unwrap();
            for (at, page) in content.chunks(4096).enumerate() {
                if page.iter().any(|byte| *byte != 0) {
                    file.write_all_at(page, at as u64 * 4096).unwrap();
                }
            }
            file.set_permissions(fs::Permissions::from_mode(0o644)).unwrap();
            let image = exerciser.images.len();
            exerciser.images.push(Image::new(vec![content], 0o644, true));
            if twice {
                let other = format!("d{}/twice{n}", (n + 1) % 3);
                fs::hard_link(lower.join(&name), lower.join(&other)).unwrap();
                exerciser.names.insert(other, image);
            }
            exerciser.names.insert(name, image);
        }
        exerciser
    }

    fn bytes(&mut self, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < length {
            bytes.extend(self.rng.next().to_le_bytes().map(|byte| byte | 1));
        }
        bytes.truncate(usize::try_from(length).unwrap());
        bytes
    }

    fn sparse(&mut self, length: u64) -> Vec<u8> {
        let mut content = self.bytes(length);
        for (n, page) in content.chunks_mut(4096).enumerate() {
            if n % 3 != 1 {
                page.fill(0);
            }
        }
        content
    }

    /// Does `count` operations under `root`, on few files, so that each is met often. The first of them do not
    /// touch what is in the files.
    #[track_caller]
    pub fn work(&mut self, root: &Path, count: u64, open: &mut Open) {
        let some: Vec<usize> = (0..3).map(|_| self.any_image()).collect();
        for n in 0..count {
            let image = self.rng.pick(&some);
            if n < 4 {
                self.change_outside(root, image);
            } else {
                self.step(root, image, open);
            }
        }
    }

    fn any_image(&mut self) -> usize {
        let known: Vec<_> = self.names.values().copied().collect();
        self.rng.pick(&known)
    }

    fn name_of(&mut self, image: usize) -> String {
        let names: Vec<_> = self.names.iter().filter(|(_, of)| **of == image).collect();
        let name = usize::try_from(self.rng.below(names.len() as u64)).unwrap();
        names[name].0.clone()
    }

    fn new_name(&mut self) -> String {
        self.made += 1;
        let dirs: Vec<_> = self.dirs.iter().cloned().collect();
        let dir = usize::try_from(self.rng.below(dirs.len() as u64)).unwrap();
        format!("{}/n{}", dirs[dir], self.made)
    }

    fn tell(&mut self, what: String) {
        self.told.push(what);
    }

    /// Somewhere in a file, or a little behind its end.
    fn range(&mut self, content: u64) -> (u64, u64) {
        let at = self.rng.below((content + 5_000).min(LENGTH));
        let length = 1 + self.rng.below(MOST.min(LENGTH - at));
        (at, length)
    }

    /// A change of names or attributes.
    #[track_caller]
    fn change_outside(&mut self, root: &Path, image: usize) {
        let name = self.name_of(image);
        let path = root.join(&name);
        let op = self.rng.below(9);
        self.images[image].below &= op == 6 || op == 8;
        match op {
            0 => {
                let mode = self.rng.pick(&[0o600, 0o644, 0o640, 0o444]);
                self.tell(format!("chmod {mode:o} {name}"));
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                self.images[image].mode = mode;
            }
            1 => {
                self.tell(format!("utimes {name}"));
                calls::set_mtime(&path, 1_000, 5);
            }
            2 => {
                let value = self.bytes(9);
                self.tell(format!("setxattr {name}"));
                calls::set_xattr(&path, NOTE, &value).unwrap();
                self.images[image].note = Some(value);
            }
            3 | 4 => {
                let to = self.new_name();
                self.tell(format!("rename {name} {to}"));
                fs::rename(&path, root.join(&to)).unwrap();
                self.names.remove(&name);
                self.names.insert(to, image);
            }
            5 => {
                let to = self.new_name();
                self.tell(format!("link {name} {to}"));
                fs::hard_link(&path, root.join(&to)).unwrap();
                self.names.insert(to, image);
            }
            6 => {
                if self.names.values().filter(|of| **of == image).count() > 1 {
                    self.tell(format!("unlink {name}"));
                    fs::remove_file(&path).unwrap();
                    self.names.remove(&name);
                    let state = &mut self.images[image];
                    state.removed_below += u64::from(state.below);
                }
            }
            7 => {
                let with = self.any_image();
                let other = self.name_of(with);
                if other != name {
                    self.images[with].below = false;
                    self.tell(format!("exchange {name} {other}"));
                    calls::rename(&path, &root.join(&other), RenameFlags::EXCHANGE).unwrap();
                    self.names.insert(name, with);
                    self.names.insert(other, image);
                }
            }
            _ => self.rename_dir(root),
        }
    }

    #[track_caller]
    fn rename_dir(&mut self, root: &Path) {
        if !self.renames_dirs {
            return;
        }
        let from = self.dirs.pop_first().unwrap();
        self.made += 1;
        let to = format!("r{}", self.made);
        self.tell(format!("rename {from} {to}"));
        fs::rename(root.join(&from), root.join(&to)).unwrap();
        self.dirs.insert(to.clone());
        let moved = |name: String| match name.strip_prefix(&format!("{from}/")) {
            Some(rest) => format!("{to}/{rest}"),
            None => name,
        };
        self.names =
            std::mem::take(&mut self.names).into_iter().map(|(n, of)| (moved(n), of)).collect();
    }

    /// Any operation.
    #[track_caller]
    fn step(&mut self, root: &Path, image: usize, open: &mut Open) {
        let name = self.name_of(image);
        let path = root.join(&name);
        let file = open.entry(image).or_insert_with(|| {
            let opened = File::options().read(true).write(true).open(&path);
            opened.unwrap_or_else(|e| panic!("{name}: {e}"))
        });
        let length = self.images[image].content().len() as u64;
        match self.rng.below(26) {
            0..=3 => self.read(file, image, &name),
            4..=8 => {
                let (at, count) = self.range(length);
                let bytes = self.bytes(count);
                self.told.push(format!("write {name} {at} {count}"));
                file.write_all_at(&bytes, at).unwrap();
                self.images[image].change(|content| put(content, at, &bytes));
            }
            9 => {
                let to = self.rng.below(LENGTH);
                self.told.push(format!("truncate {name} {to}"));
                file.set_len(to).unwrap();
                let to = usize::try_from(to).unwrap();
                self.images[image].change(|content| content.resize(to, 0));
            }
            10 => {
                self.told.push(format!("open with O_TRUNC {name}"));
                File::options().write(true).truncate(true).open(&path).unwrap();
                self.images[image].change(Vec::clear);
            }
            11 | 12 => self.allocate(file, image, &name),
            13 => self.copy_range(file, image, &name),
            14..=16 => self.map(file, image, &name),
            17 => {
                self.told.push(format!("fsync {name}"));
                if self.rng.one_in(2) { file.sync_all() } else { file.sync_data() }.unwrap();
                self.images[image].synced();
            }
            18 => {
                self.told.push(format!("close {name}"));
                open.remove(&image);
            }
            19 => {
                let new = self.new_name();
                let bytes = self.bytes(self.made % 7 * 1_000);
                self.told.push(format!("create {new} {}", bytes.len()));
                let file = File::create_new(root.join(&new)).unwrap();
                file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
                file.write_all_at(&bytes, 0).unwrap();
                self.names.insert(new, self.images.len());
                self.images.push(Image::new(vec![Vec::new(), bytes], 0o600, false));
            }
            _ => self.change_outside(root, image),
        }
    }

    #[track_caller]
    fn read(&mut self, file: &File, image: usize, name: &str) {
        let content = self.images[image].content().clone();
        let (at, count) = self.range(content.len() as u64);
        let mut bytes = vec![0; usize::try_from(count).unwrap()];
        let mut got = 0;
        loop {
            match file.read_at(&mut bytes[got..], at + got as u64).unwrap() {
                0 => break,
                more => got += more,
            }
        }
        let start = content.len().min(usize::try_from(at).unwrap());
        let end = content.len().min(usize::try_from(at + count).unwrap());
        assert!(bytes[..got] == content[start..end], "{name}: read {at} {count}");
    }

    #[track_caller]
    fn allocate(&mut self, file: &File, image: usize, name: &str) {
        let length = self.images[image].content().len() as u64;
        let (at, count) = self.range(length);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let flags = self.rng.pick(&[
            FallocateFlags::empty(),
            FallocateFlags::KEEP_SIZE,
            punch,
            punch,
            FallocateFlags::ZERO_RANGE,
        ]);
        self.told.push(format!("fallocate {flags:?} {name} {at} {count}"));
        match rustix::fs::fallocate(file, flags, at, count) {
            // Not every file system can.
            Err(Errno::OPNOTSUPP) => return,
            done => done.unwrap(),
        }
        let end = usize::try_from(at + count).unwrap();
        let zeroes = flags.contains(FallocateFlags::PUNCH_HOLE)
            || flags.contains(FallocateFlags::ZERO_RANGE);
        self.images[image].change(|content| {
            if !flags.contains(FallocateFlags::KEEP_SIZE) && end > content.len() {
                content.resize(end, 0);
            }
            if zeroes {
                let end = content.len().min(end);
                let start = end.min(usize::try_from(at).unwrap());
                content[start..end].fill(0);
            }
        });
    }

    /// From one place of a file to another.
    #[track_caller]
    fn copy_range(&mut self, file: &File, image: usize, name: &str) {
        let content = self.images[image].content().clone();
        let half = content.len() / 2;
        if half == 0 {
            return;
        }
        let count = 1 + usize::try_from(self.rng.below(half as u64)).unwrap();
        self.told.push(format!("copy_file_range {name} 0 {half} {count}"));
        let (mut from, mut to) = (0, half as u64);
        let count = count.min(half);
        let mut left = count;
        while left > 0 {
            let copied =
                rustix::fs::copy_file_range(file, Some(&mut from), file, Some(&mut to), left)
                    .unwrap();
            assert_ne!(copied, 0, "{name}");
            left -= copied;
        }
        self.images[image].change(|new| put(new, half as u64, &content[..count]));
    }

    #[track_caller]
    fn map(&mut self, file: &File, image: usize, name: &str) {
        let content = self.images[image].content().clone();
        if content.is_empty() {
            return;
        }
        let mut mapping = Mapping::new(file, content.len(), true).unwrap();
        let at = usize::try_from(self.rng.below(content.len() as u64)).unwrap();
        let most = (content.len() - at).min(10_000) as u64;
        let count = 1 + usize::try_from(self.rng.below(most)).unwrap();
        if self.rng.one_in(3) {
            assert!(mapping.read(at, count) == content[at..at + count], "{name}: mapped");
            return;
        }
        let bytes = self.bytes(count as u64);
        self.told.push(format!("write mapped {name} {at} {count}"));
        mapping.write(at, &bytes);
        self.images[image].change(|content| put(content, at as u64, &bytes));
        if self.rng.one_in(4) {
            self.told.push(format!("msync {name}"));
            mapping.sync().unwrap();
            // It is the whole file.
            self.images[image].synced();
        }
    }

    /// Has everything handed over.
    #[track_caller]
    pub fn sync(&mut self, root: &Path) {
        self.tell("sync all".to_owned());
        let synced: BTreeMap<_, _> = self.names.iter().map(|(name, of)| (*of, name)).collect();
        for (image, name) in synced {
            File::open(root.join(name)).unwrap().sync_all().unwrap();
            self.images[image].synced();
        }
    }

    /// It was unmounted, which hands over everything.
    pub fn handed_over(&mut self) {
        for image in &mut self.images {
            image.synced();
        }
    }

    /// What is otherwise than it must be; what was left open is known from now on.
    pub fn check(&mut self, root: &Path) -> Vec<String> {
        let mut found = Vec::new();
        for (image, state) in self.images.iter_mut().enumerate() {
            let names: Vec<_> =
                self.names.iter().filter(|(_, of)| **of == image).map(|(name, _)| name).collect();
            let mut inodes = BTreeSet::new();
            let mut known = None;
            for name in &names {
                let path = root.join(name);
                let mut bytes = Vec::new();
                if let Err(e) = File::open(&path).and_then(|mut file| file.read_to_end(&mut bytes))
                {
                    found.push(format!("{name}: {e}"));
                    continue;
                }
                if !state.may_be(&bytes) {
                    let at = state.content().iter().zip(&bytes).position(|(a, b)| a != b);
                    found.push(format!(
                        "{name} of {} bytes, must be {}, differs from {at:?} on; of {} images it is none",
                        bytes.len(),
                        state.content().len(),
                        state.versions.len(),
                    ));
                }
                if known.get_or_insert_with(|| bytes.clone()) != &bytes {
                    found.push(format!("{name} holds other than under another name"));
                }
                let meta = fs::symlink_metadata(&path).unwrap();
                inodes.insert(meta.ino());
                let links = names.len() as u64;
                let counted = links..=links + state.removed_below;
                if meta.mode() & 0o7777 != state.mode || !counted.contains(&meta.nlink()) {
                    found.push(format!(
                        "{name} has mode {:o} and {} links, must have {:o} and {links}",
                        meta.mode(),
                        meta.nlink(),
                        state.mode
                    ));
                }
                let note = calls::get_xattr(&path, NOTE).ok();
                if note != state.note {
                    found.push(format!("{name} has the note {note:?}, must have {:?}", state.note));
                }
            }
            if inodes.len() > 1 {
                found.push(format!("{names:?} are several files"));
            }
            if let Some(known) = known {
                state.versions = vec![known];
            }
        }
        for dir in &self.dirs {
            let prefix = format!("{dir}/");
            let expected: Vec<_> =
                self.names.keys().filter_map(|name| name.strip_prefix(&prefix)).collect();
            let shown = calls::names(&root.join(dir));
            let mut sorted = expected.clone();
            sorted.sort_unstable();
            if shown != sorted {
                found.push(format!("{dir} has {shown:?}, must have {sorted:?}"));
            }
        }
        found
    }
}

/// Writes into an image as into a file.
fn put(content: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).unwrap();
    if content.len() < at + bytes.len() {
        content.resize(at + bytes.len(), 0);
    }
    content[at..at + bytes.len()].copy_from_slice(bytes);
}
