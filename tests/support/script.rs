//! A life of a store, step by step, and what it must hold before, during and after each: for tests that
//! interrupt it anywhere.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use stratafs::{
    AdoptOptions, ApplyOptions, CommitOptions, ForeignFormat, Kind, Labels, MountOptions, Progress,
    Shown, Store, ignore_progress,
};

use super::imported;
use super::model::{Model, Node, Snapshot, Tree, upper_dir};

/// One call of the store, or something done to a layer between calls.
pub struct Step {
    pub name: &'static str,
    pub run: fn(&Store),
    /// The states that the step goes through, given the one before it; the last is the one after it.
    states: fn(&Model) -> Vec<Model>,
}

impl Step {
    /// What the store may hold while the step runs.
    pub fn during(&self, before: &Model) -> Vec<Model> {
        let mut states = vec![before.clone()];
        states.extend((self.states)(before));
        states
    }

    /// What the store holds once it is done.
    pub fn after(&self, before: &Model) -> Model {
        (self.states)(before).pop().unwrap()
    }
}

/// The life. Every call that changes something is in it, some in two situations.
pub const SCRIPT: &[Step] = &[
    Step {
        name: "prepare without a parent",
        run: |store| drop(store.prepare("a", None, label("of", "a")).unwrap()),
        states: |m| one(m, |m| insert(m, "a", Kind::Active, None, label("of", "a"), None)),
    },
    Step {
        name: "write to a mounted layer",
        run: |store| write_tree(&upper_dir(store, "a"), &base_tree()),
        states: |m| vec![m.clone()],
    },
    Step {
        name: "settle",
        run: |store| {
            store.settle("a", &mut ignore_progress).unwrap();
        },
        states: |m| vec![m.clone()],
    },
    Step {
        name: "write after settling",
        run: |store| {
            let dir = upper_dir(store, "a");
            fs::write(dir.join("late"), b"late").unwrap();
            // On disk before anything that the store still holds back.
            for path in [dir.join("late"), dir] {
                fs::File::open(path).unwrap().sync_all().unwrap();
            }
        },
        states: |m| vec![m.clone()],
    },
    Step {
        name: "write what nobody syncs",
        run: |store| fs::write(upper_dir(store, "a").join("latest"), vec![b'l'; 70_000]).unwrap(),
        states: |m| vec![m.clone()],
    },
    Step {
        name: "commit what is not settled",
        run: |store| drop(store.commit("base", "a", CommitOptions::new()).unwrap()),
        states: |m| {
            let mut tree = base_tree();
            tree.insert("late".into(), Node::File(b"late".to_vec()));
            tree.insert("latest".into(), Node::File(vec![b'l'; 70_000]));
            one(m, |m| committed(m, "base", "a", tree))
        },
    },
    Step {
        name: "prepare on a parent",
        run: |store| drop(store.prepare("b", Some("base"), Labels::new()).unwrap()),
        states: |m| one(m, |m| insert(m, "b", Kind::Active, Some("base"), Labels::new(), None)),
    },
    Step {
        name: "write whiteouts",
        run: |store| write_tree(&upper_dir(store, "b"), &top_tree()),
        states: |m| vec![m.clone()],
    },
    Step {
        name: "settle on a parent",
        run: |store| {
            store.settle("b", &mut ignore_progress).unwrap();
        },
        states: |m| vec![m.clone()],
    },
    Step {
        name: "commit what is settled",
        run: |store| drop(store.commit("top", "b", CommitOptions::new()).unwrap()),
        states: |m| one(m, |m| committed(m, "top", "b", top_tree())),
    },
    Step {
        name: "view",
        run: |store| drop(store.view("v", Some("top"), Labels::new()).unwrap()),
        states: |m| one(m, |m| insert(m, "v", Kind::View, Some("top"), Labels::new(), None)),
    },
    Step {
        name: "update",
        run: |store| drop(store.update("top", label("k", "v"), &["labels.k"]).unwrap()),
        states: |m| one(m, |m| m.snapshots.get_mut("top").unwrap().labels = label("k", "v")),
    },
    Step {
        name: "apply",
        run: |store| apply(store, "applied", None, &mut ignore_progress),
        states: |m| {
            let tree = Some(applied_tree());
            one(m, |m| insert(m, "applied", Kind::Committed, None, Labels::new(), tree))
        },
    },
    Step {
        name: "apply on a parent",
        run: |store| apply(store, "applied on top", Some("top"), &mut ignore_progress),
        states: |m| {
            let (tree, labels) = (Some(applied_tree()), Labels::new());
            one(m, |m| insert(m, "applied on top", Kind::Committed, Some("top"), labels, tree))
        },
    },
    Step {
        name: "adopt",
        run: |store| {
            // Beside the store, so that it goes with it if this process is killed.
            let foreign = store.root().with_file_name("foreign");
            fs::create_dir(&foreign).unwrap();
            write_tree(&foreign, &applied_tree());
            let options = AdoptOptions::unprivileged(ForeignFormat::OverlayUser);
            let labels = Labels::new();
            store.adopt("adopted", None, &foreign, &options, labels, &mut ignore_progress).unwrap();
            fs::remove_dir_all(&foreign).unwrap();
        },
        states: |m| {
            let tree = Some(applied_tree());
            one(m, |m| insert(m, "adopted", Kind::Committed, None, Labels::new(), tree))
        },
    },
    Step {
        name: "put an image",
        run: |store| put_image(store, b"first manifest", &["base", "top"]),
        states: |m| one(m, |m| image(m, b"first manifest", &["base", "top"])),
    },
    Step {
        name: "replace an image",
        run: |store| put_image(store, b"second manifest", &["applied"]),
        states: |m| one(m, |m| image(m, b"second manifest", &["applied"])),
    },
    Step {
        name: "remove a view",
        run: |store| store.remove("v").unwrap(),
        states: |m| one(m, |m| drop(m.snapshots.remove("v").unwrap())),
    },
    Step {
        name: "rebase",
        run: |store| {
            store.prepare("c", None, Labels::new()).unwrap();
            let parent = Some("base".to_owned());
            store.commit("rebased", "c", CommitOptions { parent, labels: Labels::new() }).unwrap();
        },
        states: |m| {
            let prepared = changed(m, |m| insert(m, "c", Kind::Active, None, Labels::new(), None));
            let rebased = changed(&prepared, |m| {
                committed(m, "rebased", "c", Tree::new());
                m.snapshots.get_mut("rebased").unwrap().parent = Some("base".into());
            });
            vec![prepared, rebased]
        },
    },
    Step {
        name: "make a copy",
        run: |store| {
            store.prepare("e", Some("base"), Labels::new()).unwrap();
            store.make_ready("e", Shown::InPlace, &mut ignore_progress).unwrap();
        },
        states: |m| one(m, |m| insert(m, "e", Kind::Active, Some("base"), Labels::new(), None)),
    },
    Step {
        name: "write to the copy",
        run: |store| {
            let tree = only_tree(store);
            fs::write(tree.join("copied"), vec![b'c'; 70_000]).unwrap();
            fs::remove_file(tree.join("base/2")).unwrap();
        },
        states: |m| vec![m.clone()],
    },
    Step {
        name: "settle the copy",
        run: |store| {
            store.settle("e", &mut ignore_progress).unwrap();
        },
        states: |m| vec![m.clone()],
    },
    Step {
        name: "write to the settled copy",
        run: |store| {
            // As whoever is about to write does.
            store.mounts("e", &MountOptions::default()).unwrap();
            fs::remove_file(only_tree(store).join("base/3")).unwrap();
        },
        states: |m| vec![m.clone()],
    },
    Step {
        name: "commit the copy",
        run: |store| drop(store.commit("copied", "e", CommitOptions::new()).unwrap()),
        states: |m| {
            let tree = Tree::from([
                ("base".into(), Node::Dir),
                ("base/2".into(), Node::Whiteout),
                ("base/3".into(), Node::Whiteout),
                ("copied".into(), Node::File(vec![b'c'; 70_000])),
            ]);
            one(m, |m| committed(m, "copied", "e", tree))
        },
    },
    Step {
        name: "remove a committed snapshot",
        run: |store| store.remove("applied on top").unwrap(),
        states: |m| one(m, |m| drop(m.snapshots.remove("applied on top").unwrap())),
    },
    Step {
        name: "remove an image",
        run: |store| assert_eq!(store.remove_image("img").unwrap(), ["applied"]),
        states: |m| {
            let without = changed(m, |m| drop(m.images.remove("img").unwrap()));
            let layerless = changed(&without, |m| drop(m.snapshots.remove("applied").unwrap()));
            vec![without, layerless]
        },
    },
    Step {
        name: "prepare and remove at once",
        run: |store| {
            store.prepare("d", Some("top"), Labels::new()).unwrap();
            fs::write(upper_dir(store, "d").join("file"), "").unwrap();
            store.remove("d").unwrap();
        },
        states: |m| {
            let with = changed(m, |m| {
                insert(m, "d", Kind::Active, Some("top"), Labels::new(), None);
            });
            vec![with, m.clone()]
        },
    },
    Step {
        name: "gc",
        run: |store| {
            store.gc(&mut ignore_progress).unwrap();
        },
        states: |m| vec![m.clone()],
    },
    Step { name: "import an image", run: imported::import, states: imported::states },
];

/// The tree of the one snapshot that has one.
fn only_tree(store: &Store) -> PathBuf {
    let dirs = fs::read_dir(store.root().join("snapshots")).unwrap();
    let mut trees = dirs.map(|dir| dir.unwrap().path().join("tree")).filter(|tree| tree.exists());
    trees.next().unwrap()
}

/// Applies the archive of [`applied_tree`].
pub fn apply(
    store: &Store,
    name: &str,
    parent: Option<&str>,
    progress: &mut dyn FnMut(Progress) -> std::ops::ControlFlow<()>,
) {
    let (archive, options) = (archive(&applied_tree()), ApplyOptions::unprivileged());
    store.apply(name, parent, &mut &*archive, &options, Labels::new(), progress).unwrap();
}

/// A layer archive of a tree; whiteouts are marks in it.
pub fn archive(tree: &Tree) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, node) in tree {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o755);
        header.set_mtime(1_000_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        let mut path = path.clone();
        match node {
            Node::Dir => header.set_entry_type(tar::EntryType::Directory),
            Node::File(bytes) => header.set_size(bytes.len() as u64),
            Node::Link(to) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_link_name(to).unwrap();
            }
            Node::Whiteout => {
                let name = [b".wh.", path.file_name().unwrap().as_bytes()].concat();
                path.set_file_name(std::ffi::OsStr::from_bytes(&name));
            }
            Node::Other => panic!("not in an archive: {path:?}"),
        }
        let bytes: &[u8] = if let Node::File(bytes) = node { bytes } else { &[] };
        builder.append_data(&mut header, path, bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Writes a tree as overlayfs would.
fn write_tree(root: &Path, tree: &Tree) {
    for (path, node) in tree {
        let at = root.join(path);
        match node {
            Node::Dir => fs::create_dir(at).unwrap(),
            Node::File(bytes) => fs::write(at, bytes).unwrap(),
            Node::Link(to) => std::os::unix::fs::symlink(to, at).unwrap(),
            Node::Whiteout => {
                let (mode, kind) =
                    (rustix::fs::Mode::empty(), rustix::fs::FileType::CharacterDevice);
                rustix::fs::mknodat(rustix::fs::CWD, at, kind, mode, 0).unwrap();
            }
            Node::Other => panic!("cannot make {at:?}"),
        }
    }
}

fn base_tree() -> Tree {
    let mut tree = small_files("base", 40);
    tree.insert("base/large".into(), Node::File(vec![0xb5; 300_000]));
    tree.insert("link".into(), Node::Link("base/0".into()));
    tree
}

fn top_tree() -> Tree {
    let mut tree = small_files("top", 10);
    tree.insert("base".into(), Node::Dir);
    tree.insert("base/0".into(), Node::Whiteout);
    tree.insert("link".into(), Node::Whiteout);
    tree
}

/// What [`apply`] makes.
pub fn applied_tree() -> Tree {
    let mut tree = small_files("applied", 20);
    tree.insert("applied/large".into(), Node::File(vec![0xa9; 200_000]));
    tree.insert("base".into(), Node::Dir);
    tree.insert("base/1".into(), Node::Whiteout);
    tree
}

fn small_files(dir: &str, count: usize) -> Tree {
    let mut tree = Tree::from([(PathBuf::from(dir), Node::Dir)]);
    for i in 0..count {
        let contents = format!("file {i} of {dir}\n").repeat(i * 7 + 1);
        tree.insert(Path::new(dir).join(i.to_string()), Node::File(contents.into_bytes()));
    }
    tree
}

fn label(key: &str, value: &str) -> Labels {
    Labels::from([(key.to_owned(), value.to_owned())])
}

fn changed(model: &Model, change: impl FnOnce(&mut Model)) -> Model {
    let mut model = model.clone();
    change(&mut model);
    model
}

fn one(model: &Model, change: impl FnOnce(&mut Model)) -> Vec<Model> {
    vec![changed(model, change)]
}

fn insert(
    model: &mut Model,
    key: &str,
    kind: Kind,
    parent: Option<&str>,
    labels: Labels,
    tree: Option<Tree>,
) {
    let parent = parent.map(str::to_owned);
    model.snapshots.insert(key.to_owned(), Snapshot { kind, parent, labels, tree });
}

fn committed(model: &mut Model, name: &str, key: &str, tree: Tree) {
    let active = model.snapshots.remove(key).unwrap();
    let snapshot = Snapshot {
        kind: Kind::Committed,
        labels: Labels::new(),
        tree: Some(tree),
        parent: active.parent,
    };
    model.snapshots.insert(name.to_owned(), snapshot);
}

fn put_image(store: &Store, manifest: &[u8], layers: &[&str]) {
    let layers: Vec<String> = layers.iter().map(|&layer| layer.to_owned()).collect();
    store.put_image("img", manifest, b"configuration", &layers).unwrap();
}

fn image(model: &mut Model, manifest: &[u8], layers: &[&str]) {
    let layers = layers.iter().map(|&layer| layer.to_owned()).collect();
    model.images.insert("img".into(), (manifest.to_vec(), layers));
}
