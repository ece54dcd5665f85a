//! What a store holds, in a form that can be compared: what was seen, with what must be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use stratafs::{
    CommitOptions, Durability, Info, Kind, Labels, LayerFormat, Mount, MountOptions, Store,
    StoreOptions, ignore_progress,
};

/// An entry of a layer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Dir,
    File(Vec<u8>),
    Link(PathBuf),
    Whiteout,
    Other,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Node::Dir => f.write_str("Dir"),
            Node::File(bytes) => {
                let start = &bytes[..bytes.len().min(16)];
                write!(f, "File({} bytes, {:?}..)", bytes.len(), String::from_utf8_lossy(start))
            }
            Node::Link(to) => write!(f, "Link({to:?})"),
            Node::Whiteout => f.write_str("Whiteout"),
            Node::Other => f.write_str("Other"),
        }
    }
}

/// The entries of a layer by path, its root not among them.
pub type Tree = BTreeMap<PathBuf, Node>;

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub kind: Kind,
    pub parent: Option<String>,
    pub labels: Labels,
    /// What is in its layer: of committed ones only, since nothing is promised of others.
    pub tree: Option<Tree>,
}

/// A whole store: snapshots by key; images by name, with their manifests and layers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub snapshots: BTreeMap<String, Snapshot>,
    pub images: BTreeMap<String, (Vec<u8>, Vec<String>)>,
}

impl Model {
    /// What there is; panics where something that is there cannot be read.
    pub fn of(store: &Store) -> Model {
        let mut model = Model::of_rows(store);
        for (key, snapshot) in &mut model.snapshots {
            if snapshot.kind == Kind::Committed {
                snapshot.tree = Some(read_tree(&layer_dir(store, key)));
            }
        }
        model
    }

    /// What there is, without a look into the layers, which takes a view.
    pub fn of_rows(store: &Store) -> Model {
        let mut model = Model::default();
        store
            .walk(&[], &mut |info| {
                let Info { key, kind, parent, labels, .. } = info.clone();
                model.snapshots.insert(key, Snapshot { kind, parent, labels, tree: None });
                Ok(())
            })
            .unwrap();
        for image in store.images().unwrap() {
            let manifest = store.blob(&image.manifest).unwrap();
            store.blob(&image.config).unwrap();
            model.images.insert(image.name, (manifest, image.layers));
        }
        model
    }
}

/// A new or existing store of the format that works for everybody.
pub fn options(durability: Durability) -> StoreOptions {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    options.durability = durability;
    options
}

/// The directory that an active snapshot's layer is written to when it is mounted.
pub fn upper_dir(store: &Store, key: &str) -> PathBuf {
    match store.mounts(key, &MountOptions::default()).unwrap().remove(0) {
        Mount::Bind { source, .. } => source,
        Mount::Overlay { upper, .. } | Mount::Fuse { upper, .. } => upper.unwrap().dir,
        other => panic!("{other:?}"),
    }
}

/// The directory of a committed snapshot's own layer.
pub fn layer_dir(store: &Store, name: &str) -> PathBuf {
    store.view("layer-dir", Some(name), Labels::new()).unwrap();
    let dir = match store.mounts("layer-dir", &MountOptions::default()).unwrap().remove(0) {
        Mount::Bind { source, .. } => source,
        Mount::Overlay { mut lower, .. } | Mount::Fuse { mut lower, .. } => lower.remove(0),
        other => panic!("{other:?}"),
    };
    store.remove("layer-dir").unwrap();
    dir
}

/// The entries of a directory, recursively.
pub fn read_tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let node = if meta.is_dir() {
                dirs.push(path.clone());
                Node::Dir
            } else if meta.is_file() {
                Node::File(fs::read(&path).unwrap())
            } else if meta.is_symlink() {
                Node::Link(fs::read_link(&path).unwrap())
            } else if meta.file_type().is_char_device() && meta.rdev() == 0 {
                Node::Whiteout
            } else {
                Node::Other
            };
            tree.insert(path.strip_prefix(root).unwrap().to_owned(), node);
        }
    }
    tree
}

/// Asserts everything that must hold of a store after a crash: it is one of the states `allowed`, sound,
/// rid of leftovers by gc, and works. Takes it to pieces.
#[track_caller]
pub fn assert_survived(root: &Path, allowed: &[Model], moment: &str) {
    let store = Store::open(root, options(Durability::None))
        .unwrap_or_else(|e| panic!("{moment}: it does not open: {e}"));
    let seen = Model::of(&store);
    assert!(
        allowed.contains(&seen),
        "{moment}: it holds\n{seen:#?}\nand must be one of\n{allowed:#?}"
    );
    assert_sound(&store, moment);
    assert_no_leftovers(&store, moment);
    let kept = Model::of_rows(&store);
    let lost: Vec<_> =
        seen.snapshots.keys().filter(|key| !kept.snapshots.contains_key(*key)).collect();
    assert!(
        lost.iter().all(|key| key.starts_with("sha256:")) && kept.images.len() == seen.images.len(),
        "{moment}: gc removes {lost:?}, which are not the layers of an import that never ended"
    );
    assert_works(&store, &kept, moment);
}

/// `check` finds nothing.
#[track_caller]
pub fn assert_sound(store: &Store, moment: &str) {
    let report = store.check(&mut ignore_progress).unwrap();
    assert!(report.problems.is_empty(), "{moment}: {:?}", report.problems);
}

/// After gc there is nothing on disk but what the metadata knows.
#[track_caller]
pub fn assert_no_leftovers(store: &Store, moment: &str) {
    store.gc(&mut ignore_progress).unwrap_or_else(|e| panic!("{moment}: {e}"));
    let keys: Vec<_> = Model::of_rows(store).snapshots.into_keys().collect();
    let (mut blobs, mut layers) = (BTreeSet::new(), BTreeSet::new());
    for image in store.images().unwrap() {
        blobs.extend([image.manifest.hex(), image.config.hex()]);
        layers.extend(image.layers);
    }
    // Imports name them so; nobody else here does.
    for key in keys.iter().filter(|key| key.starts_with("sha256:")) {
        assert!(layers.contains(key), "{moment}: {key} is a layer of no image");
    }
    assert_eq!(names(&store.root().join("snapshots")).len(), keys.len(), "{moment}: snapshots/");
    for empty in ["staging", "trash"] {
        assert_eq!(names(&store.root().join(empty)), BTreeSet::new(), "{moment}: {empty}/");
    }
    assert_eq!(names(&store.root().join("blobs/sha256")), blobs, "{moment}: blobs/");
}

/// The names in a directory.
pub fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// What is there can be built upon, committed, and removed.
#[track_caller]
fn assert_works(store: &Store, seen: &Model, moment: &str) {
    let done = |what: &str, e: stratafs::Error| -> ! { panic!("{moment}: {what}: {e}") };
    for (i, (key, snapshot)) in seen.snapshots.iter().enumerate() {
        let parent = match snapshot.kind {
            Kind::Committed => key.clone(),
            Kind::Active => {
                let name = format!("committed-{i}");
                store
                    .commit(&name, key, CommitOptions::new())
                    .unwrap_or_else(|e| done("commit", e));
                name
            }
            _ => continue,
        };
        store
            .prepare(&format!("on-{i}"), Some(&parent), Labels::new())
            .unwrap_or_else(|e| done("prepare", e));
    }
    assert_sound(store, moment);
    for name in seen.images.keys() {
        store.remove_image(name).unwrap_or_else(|e| done("remove image", e));
    }
    // What has no children goes first.
    loop {
        let mut left = Vec::new();
        store
            .walk(&[], &mut |info| {
                left.push((info.key.clone(), info.parent.clone()));
                Ok(())
            })
            .unwrap();
        let parents: BTreeSet<_> = left.iter().filter_map(|(_, parent)| parent.clone()).collect();
        if left.is_empty() {
            break;
        }
        for (key, _) in left.iter().filter(|(key, _)| !parents.contains(key)) {
            store.remove(key).unwrap_or_else(|e| done("remove", e));
        }
    }
    assert_no_leftovers(store, moment);
}
