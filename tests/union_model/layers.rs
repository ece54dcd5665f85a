//! Random lower layers, with whiteouts and opaque directories: written to disk, and merged in memory.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, makedev,
};
use stratafs::{LayerFormat, Owners};

use super::choose::{Chooser, XATTRS};
use super::model::{Dir, Id, Inode, Model, ROOT, Rules, What};
use super::ops::{self, pattern};

/// What a layer says of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saying {
    Dir { opaque: bool },
    File { len: usize, seed: u8 },
    Symlink(&'static str),
    Fifo,
    Null,
    Whiteout,
}

/// A line of a layer. Lines that contradict others of their layer do nothing, so that any list of
/// lines makes layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// From the bottom.
    pub layer: usize,
    pub path: PathBuf,
    pub saying: Saying,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub xattr: Option<(&'static str, Vec<u8>)>,
}

pub fn random_lines(chooser: &mut Chooser, layers: usize) -> Vec<Line> {
    let mut lines = Vec::new();
    for layer in 0..layers {
        for _ in 0..4 + chooser.rng.below(12) {
            let saying = match chooser.rng.below(14) {
                0..5 => Saying::Dir { opaque: layer > 0 && chooser.rng.one_in(3) },
                5..9 => Saying::File { len: chooser.len(), seed: chooser.seed() },
                9 => Saying::Symlink(chooser.rng.pick(&["a", "b", "nowhere"])),
                10 if chooser.rng.one_in(2) => Saying::Fifo,
                11 if chooser.rng.one_in(2) => Saying::Null,
                _ if layer > 0 => Saying::Whiteout,
                _ => Saying::Dir { opaque: false },
            };
            let (mode, owner) = (chooser.mode(), chooser.owner());
            let (path, mtime) = (chooser.path(), chooser.time());
            let xattr = chooser.rng.one_in(3).then(|| {
                let seed = chooser.seed();
                (chooser.rng.pick(XATTRS), pattern(usize::from(seed % 5), seed))
            });
            lines.push(Line { layer, path, saying, mode, owner, mtime, xattr });
        }
    }
    lines
}

/// A tree of one layer.
#[derive(Debug)]
enum Node {
    Dir { opaque: bool, children: BTreeMap<OsString, Entry> },
    Whiteout,
    Other(What),
}

#[derive(Debug)]
struct Entry {
    node: Node,
    mode: u32,
    owner: (u32, u32),
    mtime: Option<(i64, u32)>,
    xattrs: BTreeMap<String, Vec<u8>>,
}

impl Entry {
    fn plain_dir() -> Entry {
        let node = Node::Dir { opaque: false, children: BTreeMap::new() };
        let xattrs = BTreeMap::new();
        Entry { node, mode: 0o755, owner: (0, 0), mtime: None, xattrs }
    }

    fn of(line: &Line, format: LayerFormat) -> Entry {
        let what = match &line.saying {
            Saying::Dir { opaque } => Err(Node::Dir { opaque: *opaque, children: BTreeMap::new() }),
            Saying::Whiteout => Err(Node::Whiteout),
            Saying::File { len, seed } => Ok(What::File(pattern(*len, *seed))),
            Saying::Symlink(target) => Ok(What::Symlink((*target).into())),
            Saying::Fifo => Ok(What::Fifo),
            Saying::Null => Ok(What::Char(1, 3)),
        };
        let node = what.map_or_else(|node| node, Node::Other);
        let (mut mode, mut xattrs) = (line.mode, BTreeMap::new());
        if let Node::Other(What::Symlink(_)) = node {
            mode = 0o777;
        }
        if let Some((name, value)) = &line.xattr {
            // Marks of the layer's own format are marks; those of another are anybody's xattrs.
            let mark = *name == mark_name(format);
            let allowed = match &node {
                Node::Dir { .. } | Node::Other(What::File(_)) => true,
                Node::Whiteout => false,
                Node::Other(_) => name.starts_with("trusted."),
            };
            if allowed && !mark {
                xattrs.insert((*name).to_owned(), value.clone());
            }
        }
        Entry { node, mode, owner: line.owner, mtime: Some(line.mtime), xattrs }
    }
}

fn mark_name(format: LayerFormat) -> &'static str {
    match format {
        LayerFormat::OverlayTrusted => "trusted.overlay.opaque",
        LayerFormat::OverlayUser => "user.overlay.opaque",
        _ => ".wh..wh..opq",
    }
}

fn tree_of<'a>(lines: impl Iterator<Item = &'a Line>, format: LayerFormat) -> Entry {
    let mut root = Entry::plain_dir();
    for line in lines {
        let too_long = |name: &OsStr| name.len() > 255;
        let mark = |name: &OsStr| name.as_bytes().starts_with(b".wh.");
        let long = |name: &OsStr| ops::is_long(name);
        if matches!(line.saying, Saying::Dir { .. }) && line.path.iter().any(long) {
            continue;
        }
        if line.path.iter().any(|n| too_long(n) || format == LayerFormat::Aufs && mark(n)) {
            continue;
        }
        let (Some(name), Some(parent)) = (line.path.file_name(), line.path.parent()) else {
            continue;
        };
        if let Some(children) = children_at(&mut root, parent) {
            children.entry(name.to_owned()).or_insert_with(|| Entry::of(line, format));
        }
    }
    root
}

/// Where lower layers may have whiteouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    Anywhere,
    /// Only in directories that lower layers have, too: in others the kernel lists them as devices.
    InMerged,
}

/// Takes away whiteouts in directories that are merged with none: `below` is what they are put on.
fn prune(layer: &mut Entry, below: Option<Id>, model: &Model) {
    let Node::Dir { opaque, children } = &mut layer.node else { return };
    let below = below.filter(|&id| !*opaque && model.inode(id).kind() == 'd');
    if below.is_none() {
        children.retain(|_, child| !matches!(child.node, Node::Whiteout));
    }
    for (name, child) in children {
        prune(child, below.and_then(|id| model.dir(id).entries.get(name).copied()), model);
    }
}

/// What is in a directory, which is made if it is missing; none if something else has its name.
fn children_at<'a>(top: &'a mut Entry, dir: &Path) -> Option<&'a mut BTreeMap<OsString, Entry>> {
    let mut at = top;
    for name in dir {
        let Node::Dir { children, .. } = &mut at.node else { return None };
        at = children.entry(name.to_owned()).or_insert_with(Entry::plain_dir);
    }
    match &mut at.node {
        Node::Dir { children, .. } => Some(children),
        _ => None,
    }
}

/// The layers on disk, the topmost first, and the model of their union.
pub fn build(
    lines: &[Line],
    layers: usize,
    dir: &Path,
    rules: Rules,
    whiteouts: Whiteouts,
) -> (Vec<PathBuf>, Model) {
    let mut dirs = Vec::new();
    let model = merge_all(lines, layers, rules, whiteouts, |layer, tree| {
        let at = dir.join(format!("lower{layer}"));
        write(tree, &at, rules);
        dirs.insert(0, at);
    });
    (dirs, model)
}

/// The model of layers that are not on disk.
pub fn merged(lines: &[Line], layers: usize, rules: Rules, whiteouts: Whiteouts) -> Model {
    merge_all(lines, layers, rules, whiteouts, |_, _| ())
}

fn merge_all(
    lines: &[Line],
    layers: usize,
    rules: Rules,
    whiteouts: Whiteouts,
    mut each: impl FnMut(usize, &Entry),
) -> Model {
    let root = Inode::new(What::Dir(Dir { merged: true, ..Dir::default() }), 0o755, (0, 0));
    let mut model = Model::new(rules, root);
    for layer in 0..layers {
        let mut tree = tree_of(lines.iter().filter(|line| line.layer == layer), rules.format);
        if whiteouts == Whiteouts::InMerged {
            prune(&mut tree, Some(ROOT), &model);
        }
        each(layer, &tree);
        merge(&tree, ROOT, &mut model);
    }
    model
}

fn merge(layer: &Entry, id: Id, model: &mut Model) {
    let Node::Dir { children, .. } = &layer.node else { unreachable!("only directories") };
    for (name, entry) in children {
        let below = model.dir(id).entries.get(name).copied();
        let merged_with = below.filter(|&below| model.inode(below).kind() == 'd');
        let new = match &entry.node {
            Node::Whiteout => {
                model.remove(id, name);
                continue;
            }
            Node::Dir { opaque, .. } => match merged_with.filter(|_| !opaque) {
                Some(below) => below,
                None => {
                    let what = What::Dir(Dir { merged: true, ..Dir::default() });
                    model.put(id, name, Inode::new(what, 0, (0, 0)))
                }
            },
            Node::Other(what) => {
                model.put(id, name, Inode::new(what.clone(), 0, (0, 0)));
                model.dir(id).entries[name]
            }
        };
        let inode = model.inode_mut(new);
        (inode.mode, inode.owner, inode.mtime) = (entry.mode, entry.owner, entry.mtime);
        inode.xattrs = entry.xattrs.clone();
        if let Node::Dir { .. } = entry.node {
            merge(entry, new, model);
        }
    }
}

fn write(entry: &Entry, path: &Path, rules: Rules) {
    let format = rules.format;
    // What stands for a file whose owner, or what it is, is told by an xattr.
    let told = match (&entry.node, rules.owners) {
        (Node::Whiteout, _) | (_, Owners::OfFiles) => None,
        (Node::Other(What::Symlink(_)), _) if entry.owner == (0, 0) => None,
        (Node::Dir { .. }, _) => Some(("dir".to_owned(), None)),
        (Node::Other(what), _) => Some(match what {
            What::File(bytes) => ("file".to_owned(), Some(bytes.clone())),
            What::Symlink(to) => ("symlink".to_owned(), Some(to.as_os_str().as_bytes().to_vec())),
            What::Fifo => ("pipe".to_owned(), Some(Vec::new())),
            What::Char(major, minor) => (format!("char-{major}-{minor}"), Some(Vec::new())),
            What::Dir(_) => unreachable!("directories are nodes of their own"),
        }),
    };
    let mode = Mode::from_raw_mode(0o600);
    let device = |minor| {
        rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(minor / 3, minor))
            .unwrap();
    };
    match &entry.node {
        _ if let Some((_, Some(content))) = &told => std::fs::write(path, content).unwrap(),
        Node::Whiteout if format == LayerFormat::Aufs => {
            let name = [b".wh.", path.file_name().unwrap().as_bytes()].concat();
            // A mark for a name beyond the limit cannot be.
            if name.len() <= 255 {
                std::fs::write(path.with_file_name(OsStr::from_bytes(&name)), "").unwrap();
            }
            return;
        }
        Node::Whiteout => return device(0),
        Node::Dir { opaque, children } => {
            std::fs::create_dir(path).unwrap();
            if *opaque && format == LayerFormat::Aufs {
                std::fs::write(path.join(".wh..wh..opq"), "").unwrap();
            } else if *opaque {
                let flags = XattrFlags::empty();
                rustix::fs::lsetxattr(path, mark_name(format), b"y", flags).unwrap();
            }
            for (name, child) in children {
                write(child, &path.join(name), rules);
            }
        }
        Node::Other(What::File(bytes)) => std::fs::write(path, bytes).unwrap(),
        Node::Other(What::Symlink(target)) => std::os::unix::fs::symlink(target, path).unwrap(),
        Node::Other(What::Fifo) => {
            rustix::fs::mknodat(CWD, path, FileType::Fifo, mode, 0).unwrap();
        }
        Node::Other(What::Char(..)) => device(3),
        Node::Other(What::Dir(_)) => unreachable!("directories are nodes of their own"),
    }
    for (name, value) in &entry.xattrs {
        rustix::fs::lsetxattr(path, name.as_str(), value, XattrFlags::empty()).unwrap();
    }
    if let Some((word, _)) = &told {
        let (uid, gid) = entry.owner;
        let value = format!("{uid}:{gid}:{:04o}:{word}", entry.mode);
        let (key, flags) = ("user.containers.override_stat", XattrFlags::empty());
        rustix::fs::lsetxattr(path, key, value.as_bytes(), flags).unwrap();
        let least = if word == "dir" { 0o700 } else { 0o600 };
        let mode = Mode::from_raw_mode(entry.mode & 0o777 | least);
        rustix::fs::chmod(path, mode).unwrap();
        return set_mtime(entry, path);
    }
    let (uid, gid) = (Uid::from_raw(entry.owner.0), Gid::from_raw(entry.owner.1));
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(CWD, path, Some(uid), Some(gid), nofollow).unwrap();
    if !matches!(entry.node, Node::Other(What::Symlink(_))) {
        rustix::fs::chmod(path, Mode::from_raw_mode(entry.mode)).unwrap();
    }
    set_mtime(entry, path);
}

fn set_mtime(entry: &Entry, path: &Path) {
    if let Some((sec, nsec)) = entry.mtime {
        let time = Timespec { tv_sec: sec, tv_nsec: nsec.into() };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}
