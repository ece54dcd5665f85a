//! A mount compared with the model, from the root to the last byte.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::hands::{self, Hands};
use super::model::{Id, Model, ROOT, What, forget_unpromised};
use super::ops::{self, Op, Outcome};

/// The inode numbers that were seen: a file keeps its own, whatever is done to it.
#[derive(Debug, Default)]
pub struct Numbers(BTreeMap<Id, u64>);

impl Numbers {
    /// When the kernel has forgotten the files, only some have a mark by which their numbers are found.
    pub fn keep(&mut self, model: &Model, kept: impl Fn(char) -> bool) {
        self.0.retain(|&id, _| model.has(id) && kept(model.inode(id).kind()));
    }
}

/// Which files keep their numbers for as long as they are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbered {
    All,
    FilesAndDirs,
}

/// All that is otherwise than it should be.
pub fn differences(
    mount: &Path,
    model: &Model,
    numbers: &mut Numbers,
    numbered: Numbered,
) -> Vec<String> {
    let mut walk =
        Walk { mount, model, numbers, numbered, found: Vec::new(), seen: BTreeMap::new() };
    walk.dir(Path::new(""), ROOT);
    walk.found
}

struct Walk<'a> {
    mount: &'a Path,
    model: &'a Model,
    numbers: &'a mut Numbers,
    numbered: Numbered,
    found: Vec<String>,
    /// By inode number.
    seen: BTreeMap<u64, Id>,
}

impl Walk<'_> {
    fn dir(&mut self, path: &Path, id: Id) {
        self.file(path, id);
        let expected = &self.model.dir(id).entries;
        let op = Op::List { path: path.to_owned() };
        let names = match Hands::new(self.mount).carry_out(&op) {
            Outcome::Names(names) => names,
            other => return self.found.push(format!("{path:?} is not listed: {other:?}")),
        };
        let all: BTreeSet<_> = names.keys().chain(expected.keys()).collect();
        for name in all {
            let child_path = path.join(name);
            let Some(&child) = expected.get(name) else {
                self.found.push(format!("{child_path:?} is there and should not be"));
                continue;
            };
            let kind = self.model.inode(child).kind();
            match names.get(name) {
                None => self.found.push(format!("{child_path:?} is not listed")),
                Some(&listed) if listed != kind => {
                    self.found.push(format!("{child_path:?} is listed as {listed}, not {kind}"));
                }
                Some(_) => {}
            }
            match self.model.inode(child).what {
                What::Dir(_) => self.dir(&child_path, child),
                _ => self.file(&child_path, child),
            }
        }
    }

    fn file(&mut self, path: &Path, id: Id) {
        let full =
            if path == Path::new("") { self.mount.to_owned() } else { self.mount.join(path) };
        let stat = match rustix::fs::lstat(&full) {
            Ok(stat) => stat,
            Err(e) => return self.found.push(format!("{path:?}: stat: {e:?}")),
        };
        let inode = self.model.inode(id);
        if self.numbered == Numbered::All || matches!(inode.kind(), 'f' | 'd') {
            self.number(path, id, stat.st_ino);
        }
        let expected = inode.stat();
        let mut seen = ops::stat_of(&stat);
        forget_unpromised(&mut seen, &expected);
        if seen != expected {
            self.found.push(format!("{path:?} is\n      {seen:?}, not\n      {expected:?}"));
            if seen.kind != expected.kind {
                return;
            }
        }
        match hands::xattrs_of(&full) {
            Ok(xattrs) if xattrs == inode.xattrs => {}
            other => {
                let expected = &inode.xattrs;
                self.found.push(format!("{path:?} has xattrs {other:?}, not {expected:?}"));
            }
        }
        match &inode.what {
            What::File(bytes) => match std::fs::read(&full) {
                Ok(seen) if seen == *bytes => {}
                Ok(seen) => {
                    let (seen, expected) = (ops::runs(&seen), ops::runs(bytes));
                    self.found.push(format!("{path:?} holds {seen}, not {expected}"));
                }
                Err(e) => self.found.push(format!("{path:?}: read: {e}")),
            },
            What::Symlink(target) => match std::fs::read_link(&full) {
                Ok(seen) if seen.as_os_str() == target => {}
                other => self.found.push(format!("{path:?} leads to {other:?}, not {target:?}")),
            },
            What::Dir(_) | What::Fifo | What::Char(..) => {}
        }
    }

    /// Names of one file have one number, names of two have two.
    fn number(&mut self, path: &Path, id: Id, number: u64) {
        let before = *self.numbers.0.entry(id).or_insert(number);
        if before != number {
            self.found.push(format!("{path:?} had inode number {before} and now has {number}"));
        }
        let other = *self.seen.entry(number).or_insert(id);
        if other != id {
            self.found.push(format!("{path:?} shares its inode number {number} with another file"));
        }
    }
}

/// What is in a work directory that should be empty between mounts: names of files that were begun.
/// Of `work` and `index` the kernel, and of `stratafs` the union, are the masters; what they keep in
/// `state` survives.
pub fn leftovers(work: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in walkdir::WalkDir::new(work).min_depth(1) {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(work).unwrap();
        let inside_temp = path.iter().any(|name| name == OsStr::from_bytes(b"temp"))
            && path.file_name() != Some(OsStr::new("temp"));
        if inside_temp {
            found.push(path.to_owned());
        }
    }
    found
}
