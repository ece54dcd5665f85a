//! What unpacking must leave behind, kept in memory: an archive from any bytes is unpacked into a
//! real directory and into this model, and the two are compared, errors among them. For tests and
//! the fuzz target `apply_model`.
//!
//! The model has no descriptors, no cache of where the last entry led, no order of system calls: a
//! tree of names, and the rules of [`super::whiteout`] and [`super::target`] in their plainest form.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use super::{ApplyOptions, LayerTarget, apply_layer};
use crate::archive::entry::{Entry, EntryKind, EntryWriter, Timestamp};
use crate::layer::LayerFormat;
use crate::layer::marks::{self, Mark};
use crate::path::RelPath;
use crate::progress::ignore_progress;
use crate::sys::dir::Dir;

const ROOT: usize = 0;
const NAMES: [&str; 3] = ["a", "b", "c"];
const TARGETS: [&str; 12] =
    ["a", "b", "c", "..", ".", "/", "../a", "/b", "b/c", "gone/..", "gone/../a", "a/b/../c"];

/// What one entry of the script is.
#[derive(Clone, Debug)]
enum Act {
    File(u8),
    Dir,
    Symlink(&'static str),
    HardLink(Vec<&'static str>),
    Fifo,
    Whiteout,
    Opaque,
}

#[derive(Clone, Debug)]
struct Step {
    path: Vec<&'static str>,
    act: Act,
    mode: u32,
    mtime: i64,
}

/// A file, or a directory.
#[derive(Clone, Debug)]
enum Kind {
    File(u8),
    Symlink(&'static str),
    Fifo,
    Whiteout,
    Dir(BTreeMap<&'static str, Edge>),
}

#[derive(Clone, Debug)]
struct Node {
    kind: Kind,
    mode: u32,
    /// None where no rule says it.
    mtime: Option<i64>,
    opaque: bool,
    only_for_marks: bool,
}

/// A name.
#[derive(Clone, Copy, Debug)]
struct Edge {
    node: usize,
    /// From before this archive.
    older: bool,
    /// An entry of this archive asked for it.
    own: bool,
}

/// The archive was refused.
#[derive(Debug)]
struct Refused;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    MakeForMark,
    Stop,
}

/// The directories on the way from the root, or none: hidden, or not there.
type Reached = Option<Vec<usize>>;

struct Model {
    nodes: Vec<Node>,
    layer: bool,
}

impl Model {
    fn new(layer: bool) -> Self {
        let mut model = Model { nodes: Vec::new(), layer };
        model.add(Kind::Dir(BTreeMap::new()), 0, None);
        model
    }

    fn add(&mut self, kind: Kind, mode: u32, mtime: Option<i64>) -> usize {
        let node = Node { kind, mode, mtime, opaque: false, only_for_marks: false };
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn names(&mut self, dir: usize) -> &mut BTreeMap<&'static str, Edge> {
        match &mut self.nodes[dir].kind {
            Kind::Dir(names) => names,
            other => panic!("{other:?} is no directory"),
        }
    }

    fn is_dir(&self, node: usize) -> bool {
        matches!(self.nodes[node].kind, Kind::Dir(_))
    }

    fn below_opaque(&self, way: &[usize]) -> bool {
        way.iter().any(|dir| self.nodes[*dir].opaque)
    }

    fn put(&mut self, dir: usize, name: &'static str, node: usize, own: bool) {
        self.names(dir).insert(name, Edge { node, older: false, own });
    }

    fn reach(
        &mut self,
        path: &[&'static str],
        missing: Missing,
        time: i64,
    ) -> Result<Reached, Refused> {
        let mut way = vec![ROOT];
        let mut turns: VecDeque<&'static str> = path.iter().copied().collect();
        let mut links = 0;
        while let Some(name) = turns.pop_front() {
            let here = *way.last().unwrap();
            if name == ".." {
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let found = self.names(here).get(name).map(|edge| edge.node);
            let kind = found.map(|node| self.nodes[node].kind.clone());
            match kind {
                Some(Kind::Dir(_)) => way.push(found.unwrap()),
                Some(Kind::Symlink(to)) => {
                    links += 1;
                    if links > 40 {
                        return Err(Refused);
                    }
                    if to.starts_with('/') {
                        way.truncate(1);
                    }
                    for part in to.rsplit('/').filter(|p| !p.is_empty() && *p != ".") {
                        turns.push_front(part);
                    }
                }
                None | Some(Kind::Whiteout) if turns.front() == Some(&"..") => {
                    turns.pop_front();
                }
                None => {
                    if missing == Missing::Stop
                        || (missing == Missing::MakeForMark && self.below_opaque(&way))
                    {
                        return Ok(None);
                    }
                    let dir = self.add(Kind::Dir(BTreeMap::new()), 0o755, Some(time));
                    self.nodes[dir].only_for_marks = missing == Missing::MakeForMark;
                    self.put(here, name, dir, false);
                    way.push(dir);
                }
                Some(Kind::Whiteout) if missing == Missing::Make => {
                    let dir = self.add(Kind::Dir(BTreeMap::new()), 0o755, Some(time));
                    self.nodes[dir].opaque = true;
                    self.put(here, name, dir, false);
                    way.push(dir);
                }
                Some(_) if missing == Missing::Make => return Err(Refused),
                Some(_) => return Ok(None),
            }
        }
        Ok(Some(way))
    }

    fn reach_parent(&mut self, step: &Step) -> Result<Vec<usize>, Refused> {
        let (_, parent) = step.path.split_last().unwrap();
        let way = self.reach(parent, Missing::Make, step.mtime)?.ok_or(Refused)?;
        self.note_real(&way);
        Ok(way)
    }

    fn note_real(&mut self, way: &[usize]) {
        for dir in way {
            self.nodes[*dir].only_for_marks = false;
        }
    }

    fn apply(&mut self, step: &Step) -> Result<(), Refused> {
        match &step.act {
            Act::Whiteout | Act::Opaque => self.mark(step),
            Act::HardLink(target) => self.hard_link(step, target),
            Act::Dir => self.directory(step),
            Act::File(byte) => self.leaf(step, Kind::File(*byte)),
            Act::Symlink(to) => self.leaf(step, Kind::Symlink(to)),
            Act::Fifo => self.leaf(step, Kind::Fifo),
        }
    }

    fn leaf(&mut self, step: &Step, kind: Kind) -> Result<(), Refused> {
        let dir = *self.reach_parent(step)?.last().unwrap();
        let node = self.add(kind, step.mode, Some(step.mtime));
        self.put(dir, step.path.last().unwrap(), node, true);
        Ok(())
    }

    fn directory(&mut self, step: &Step) -> Result<(), Refused> {
        let way = self.reach_parent(step)?;
        let (dir, name) = (*way.last().unwrap(), *step.path.last().unwrap());
        let found = self.names(dir).get(name).copied();
        let node = match found {
            Some(edge) if self.is_dir(edge.node) => {
                self.names(dir).insert(name, Edge { own: true, ..edge });
                edge.node
            }
            other => {
                let node = self.add(Kind::Dir(BTreeMap::new()), 0, None);
                self.nodes[node].opaque = self.layer && other.is_some();
                self.put(dir, name, node, true);
                node
            }
        };
        let node = &mut self.nodes[node];
        (node.mode, node.mtime, node.only_for_marks) = (step.mode | 0o700, Some(step.mtime), false);
        Ok(())
    }

    fn hard_link(&mut self, step: &Step, target: &[&'static str]) -> Result<(), Refused> {
        let (old, parent) = target.split_last().unwrap();
        let way = self.reach(parent, Missing::Stop, 0)?.ok_or(Refused)?;
        let old_dir = *way.last().unwrap();
        let node = self.names(old_dir).get(old).ok_or(Refused)?.node;
        if matches!(self.nodes[node].kind, Kind::Dir(_) | Kind::Whiteout) {
            return Err(Refused);
        }
        let dir = *self.reach_parent(step)?.last().unwrap();
        let name = *step.path.last().unwrap();
        let there = self.names(dir).remove(name);
        // What it replaces may be the directory that the target is in.
        if there.is_none_or(|there| there.node != node) && !self.is_in_tree(ROOT, old_dir) {
            return Err(Refused);
        }
        self.put(dir, name, node, true);
        Ok(())
    }

    fn is_in_tree(&self, from: usize, node: usize) -> bool {
        from == node
            || match &self.nodes[from].kind {
                Kind::Dir(names) => names.values().any(|edge| self.is_in_tree(edge.node, node)),
                _ => false,
            }
    }

    fn mark(&mut self, step: &Step) -> Result<(), Refused> {
        let (parent, name) = match (&step.act, step.path.split_last()) {
            (Act::Whiteout, Some((name, parent))) => (parent, Some(*name)),
            _ => (&step.path[..], None),
        };
        let missing = if self.layer { Missing::MakeForMark } else { Missing::Stop };
        let Some(way) = self.reach(parent, missing, step.mtime)? else {
            return Ok(());
        };
        let dir = *way.last().unwrap();
        match (self.layer, name) {
            (true, Some(name)) => self.whiteout(&way, name),
            (true, None) => self.make_opaque(dir),
            (false, Some(name)) => {
                if let Some(edge) = self.names(dir).get(name).copied()
                    && !self.keeps(edge)
                {
                    self.names(dir).remove(name);
                }
            }
            (false, None) => self.purge(dir),
        }
        Ok(())
    }

    fn whiteout(&mut self, way: &[usize], name: &'static str) {
        let dir = *way.last().unwrap();
        if self.below_opaque(way) {
            return;
        }
        match self.names(dir).get(name).copied() {
            Some(edge) if !self.is_dir(edge.node) => {}
            Some(edge) if !self.nodes[edge.node].only_for_marks => self.make_opaque(edge.node),
            _ => {
                let node = self.add(Kind::Whiteout, 0, None);
                self.put(dir, name, node, false);
            }
        }
    }

    fn make_opaque(&mut self, dir: usize) {
        self.nodes[dir].opaque = true;
        self.sweep(dir);
    }

    fn sweep(&mut self, dir: usize) {
        for (name, edge) in self.names(dir).clone() {
            let node = &self.nodes[edge.node];
            if matches!(node.kind, Kind::Whiteout) || node.only_for_marks {
                self.names(dir).remove(name);
            } else if self.is_dir(edge.node) {
                self.sweep(edge.node);
            }
        }
    }

    /// Whether a name outlives a whiteout of a plain tree.
    fn keeps(&mut self, edge: Edge) -> bool {
        if !self.is_dir(edge.node) {
            return !edge.older;
        }
        self.purge(edge.node);
        let kept = edge.own || !edge.older || !self.names(edge.node).is_empty();
        if kept && !edge.own {
            (self.nodes[edge.node].mode, self.nodes[edge.node].mtime) = (0o755, None);
        }
        kept
    }

    fn purge(&mut self, dir: usize) {
        for (name, edge) in self.names(dir).clone() {
            if !self.keeps(edge) {
                self.names(dir).remove(name);
            }
        }
    }

    /// All that is there is from before, from now on.
    fn age(&mut self) {
        for node in &mut self.nodes {
            if let Kind::Dir(names) = &mut node.kind {
                names.values_mut().for_each(|edge| (edge.older, edge.own) = (true, false));
            }
        }
    }

    /// Holds a directory of the file system to one of the model.
    fn compare(
        &self,
        dir: usize,
        real: &Path,
        target: LayerTarget,
        same: &mut HashMap<u64, usize>,
    ) {
        let Kind::Dir(names) = &self.nodes[dir].kind else { panic!("not a directory") };
        let handle = Dir::open(real).unwrap();
        let format = match target {
            LayerTarget::Layer(format) => Some(format),
            LayerTarget::Tree => None,
        };
        let opaque = format.is_some_and(|f| marks::is_opaque(f, &handle).unwrap());
        assert_eq!(opaque, self.nodes[dir].opaque, "opaque: {real:?}");
        let mut found = 0;
        for entry in handle.entries().unwrap() {
            let path = real.join(entry.name.as_os_str());
            let stat = handle.stat_at(&entry.name).unwrap();
            let mark = format.map_or(Mark::None, |f| marks::decode(f, &entry.name, &stat));
            let name = match &mark {
                Mark::Opaque => continue,
                Mark::Whiteout(of) => of,
                Mark::None => &entry.name,
                Mark::Internal => panic!("{path:?} is left"),
            };
            let name = std::str::from_utf8(name.as_bytes()).unwrap();
            let edge = names.get(name).unwrap_or_else(|| panic!("{path:?} should not be there"));
            let node = &self.nodes[edge.node];
            found += 1;
            let m = path.symlink_metadata().unwrap();
            match (&node.kind, mark) {
                (Kind::Whiteout, Mark::Whiteout(_)) => continue,
                (Kind::Dir(_), Mark::None) if m.is_dir() => {
                    self.compare(edge.node, &path, target, same);
                }
                (Kind::File(byte), Mark::None) if m.is_file() => {
                    assert_eq!(read(&path, m.permissions()), [*byte], "{path:?}");
                }
                (Kind::Symlink(to), Mark::None) if m.is_symlink() => {
                    assert_eq!(path.read_link().unwrap().as_os_str().as_bytes(), to.as_bytes());
                }
                (Kind::Fifo, Mark::None) if m.file_type().is_fifo() => {}
                (kind, mark) => panic!("{path:?} should be {kind:?}, is {mark:?} {m:?}"),
            }
            if !m.is_symlink() {
                assert_eq!(m.mode() & 0o7777, node.mode, "{path:?}");
            }
            if let Some(mtime) = node.mtime {
                assert_eq!(m.mtime(), mtime, "{path:?}");
            }
            if !m.is_dir() {
                assert_eq!(*same.entry(m.ino()).or_insert(edge.node), edge.node, "{path:?}");
            }
        }
        assert_eq!(found, names.len(), "{real:?}: {:?}", names.keys());
    }
}

/// The content of a file that may be closed to its owner.
fn read(path: &Path, permissions: fs::Permissions) -> Vec<u8> {
    let closed = permissions.mode() & 0o400 == 0;
    if closed {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    let content = fs::read(path).unwrap();
    if closed {
        fs::set_permissions(path, permissions).unwrap();
    }
    content
}

/// Four bytes an entry: kind, path, target, mode.
fn script(data: &[u8], first_time: i64) -> Vec<Step> {
    let steps = data.as_chunks::<4>().0.iter().take(60).zip(first_time..);
    let step = |([kind, path, target, mode], mtime): (&[u8; 4], i64)| {
        let act = match kind % 13 {
            0..=2 => Act::File(*mode),
            3..=5 => Act::Dir,
            6 => Act::Symlink(TARGETS[usize::from(*target) % TARGETS.len()]),
            7 | 8 => Act::HardLink(names(*target)),
            9 => Act::Fifo,
            10 | 11 => Act::Whiteout,
            _ => Act::Opaque,
        };
        let mut path = names(*path);
        // Of all entries only the opaque mark may mean the root.
        if matches!(act, Act::Opaque) && *target >= 240 {
            path.clear();
        }
        Step { path, act, mode: u32::from(*mode) << 3 & 0o7777, mtime }
    };
    steps.map(step).collect()
}

/// One to three names.
fn names(byte: u8) -> Vec<&'static str> {
    let mut rest = usize::from(byte);
    let depth = 1 + rest % 3;
    (0..depth)
        .map(|_| {
            rest /= 3;
            NAMES[rest % 3]
        })
        .collect()
}

fn pack(steps: &[Step]) -> Vec<u8> {
    let mut writer = EntryWriter::new(Vec::new());
    for step in steps {
        let mut names: Vec<String> = step.path.iter().map(|name| (*name).to_owned()).collect();
        match step.act {
            Act::Whiteout => names.last_mut().unwrap().insert_str(0, ".wh."),
            Act::Opaque => names.push(".wh..wh..opq".to_owned()),
            _ => {}
        }
        let kind = match &step.act {
            Act::File(_) => EntryKind::File { size: 1, sparse: None },
            Act::Dir => EntryKind::Directory,
            Act::Symlink(to) => EntryKind::Symlink { target: to.as_bytes().to_vec() },
            Act::HardLink(target) => {
                EntryKind::HardLink { target: RelPath::new(target.join("/")).unwrap() }
            }
            Act::Fifo => EntryKind::Fifo,
            Act::Whiteout | Act::Opaque => EntryKind::File { size: 0, sparse: None },
        };
        let mode = if matches!(step.act, Act::Dir) { step.mode | 0o700 } else { step.mode };
        let entry = Entry {
            path: RelPath::new(names.join("/")).unwrap(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: Timestamp { secs: step.mtime, nanos: 0 },
            atime: None,
            xattrs: BTreeMap::new(),
            acl_access: None,
            acl_default: None,
        };
        let content = match step.act {
            Act::File(byte) => vec![byte],
            _ => Vec::new(),
        };
        writer.append(&entry, &mut &content[..]).unwrap();
    }
    writer.finish().unwrap()
}

/// The archive that `data` describes, for messages.
#[cfg(test)]
fn told(data: &[u8]) -> String {
    let steps = script(data.get(1..).unwrap_or_default(), 1);
    let lines = steps.iter().map(|s| format!("{} {:?} {:o}", s.path.join("/"), s.act, s.mode));
    format!("{:?}\n{}", data.first(), lines.collect::<Vec<_>>().join("\n"))
}

/// Unpacks the archive that `data` describes into the empty directory `root`, and compares. Returns
/// whether it could be unpacked.
pub(crate) fn check(data: &[u8], root: &Path) -> bool {
    let Some((choice, data)) = data.split_first() else { return false };
    let target = match choice % 3 {
        0 => LayerTarget::Tree,
        1 => LayerTarget::Layer(LayerFormat::OverlayUser),
        _ => LayerTarget::Layer(LayerFormat::Aufs),
    };
    let options = ApplyOptions::unprivileged();
    let unpack =
        |bytes: Vec<u8>| apply_layer(&bytes[..], root, target, &options, &mut ignore_progress);
    let mut model = Model::new(target != LayerTarget::Tree);
    let mut data = data;
    if target == LayerTarget::Tree {
        let before = usize::from(choice >> 4) * 4;
        let (old, new) = data.split_at(before.min(data.len()));
        let mut old = script(old, 1_000);
        old.retain(|step| !matches!(step.act, Act::Whiteout | Act::Opaque));
        // What cannot be made is left out.
        for step in old {
            let copy = model.nodes.clone();
            if model.apply(&step).is_err() {
                model.nodes = copy;
            } else {
                unpack(pack(&[step])).expect("the model could make it");
            }
        }
        model.age();
        data = new;
    }
    let steps = script(data, 1);
    let done = unpack(pack(&steps));
    let expected = steps.iter().try_for_each(|step| model.apply(step));
    assert_eq!(done.is_err(), expected.is_err(), "{target:?} {done:?}: {steps:#?}");
    if done.is_ok() {
        model.compare(ROOT, root, target, &mut HashMap::new());
    }
    done.is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::test_archive::scratch;
    use super::*;

    #[test]
    fn archives_that_once_left_something_else() {
        for data in [
            // A directory in the place of the link that led to it.
            &[8, 49, 255, 1, 0, 4, 101, 18, 199, 253, 48, 16, 126][..],
            &[8, 253, 48, 16, 126, 161, 40, 255, 2, 122, 122, 122, 16],
        ] {
            check(data, scratch().path());
        }
    }

    #[test]
    fn random_archives_leave_what_the_model_says() {
        let cases = if std::env::var_os("STRATAFS_FULL").is_some() { 20_000 } else { 1_500 };
        let mut unpacked = 0;
        for case in 1..=cases {
            let mut state = u64::wrapping_mul(case, 0x9e37_79b9_7f4a_7c15);
            let mut next = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            let len = 1 + 4 * (next() % 14);
            let data: Vec<u8> = (0..len).map(|_| next() as u8).collect();
            let tmp = scratch();
            let checked = std::panic::catch_unwind(|| check(&data, tmp.path()));
            unpacked +=
                u64::from(checked.unwrap_or_else(|_| panic!("case {case}: {}", told(&data))));
        }
        assert!(unpacked > cases / 4, "{unpacked} of {cases} could be unpacked");
    }
}
