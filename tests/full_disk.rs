//! A full disk stops what needs room, leaves nothing half done, and never stops `remove`.
//! A read-only one is said to be read-only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod disk;
    pub mod imported;
    pub mod model;
    pub mod script;
    pub mod suite;
}

use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;
use stratafs::{
    ApplyOptions, CommitOptions, Durability, ErrorKind, Labels, Store, ignore_progress,
};
use support::disk::{self, Kind, Mounted};
use support::model::{self, Model};
use support::script;
use support::suite;

fn main() {
    disk::enter_own_mount_namespace();
    let mut trials = Vec::new();
    for small in [Small::Ext4, Small::Xfs, Small::Btrfs, Small::Tmpfs] {
        let mut add = |what: &str, body: fn(&Disk)| {
            let name = format!("{what}_on_{}", small.name());
            trials.push(suite::trial(name, small.hindrance(), move || body(&Disk::new(small))));
        };
        add("a_disk_that_fills_up_under_an_open_store", fills_up_while_open);
        add("a_store_opened_on_a_full_disk", opened_when_full);
        add("a_store_created_on_a_full_disk", created_when_full);
        add("a_disk_that_fills_up_during_an_apply", fills_up_during_an_apply);
        if small != Small::Tmpfs {
            add("a_read_only_file_system", read_only);
        }
    }
    suite::run_one_by_one(trials);
}

/// Where a disk is small.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Small {
    Ext4,
    Xfs,
    Btrfs,
    Tmpfs,
}

impl Small {
    fn kind(self) -> Option<Kind> {
        match self {
            Small::Ext4 => Some(Kind::Ext4),
            Small::Xfs => Some(Kind::Xfs),
            Small::Btrfs => Some(Kind::Btrfs),
            Small::Tmpfs => None,
        }
    }

    fn name(self) -> &'static str {
        self.kind().map_or("tmpfs", Kind::name)
    }

    fn hindrance(self) -> Option<String> {
        self.kind().map_or_else(suite::needs_root, Kind::hindrance)
    }
}

/// A small file system, mounted.
struct Disk {
    // Unmounted before its image goes.
    mounted: Mounted,
    _dir: tempfile::TempDir,
}

impl Disk {
    fn new(small: Small) -> Disk {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("mount"));
        let mounted = match small.kind() {
            Some(kind) => {
                disk::make_image(kind, &image);
                Mounted::image(kind, &image, &at)
            }
            None => Mounted::tmpfs(&at, "4m"),
        };
        Disk { mounted, _dir: dir }
    }

    fn root(&self) -> PathBuf {
        self.mounted.path().join("store")
    }

    fn filler(&self) -> PathBuf {
        self.mounted.path().join("filler")
    }

    fn fill(&self) {
        disk::fill(&self.filler());
    }

    fn empty(&self) {
        std::fs::remove_file(self.filler()).unwrap();
        // Freed blocks can be used again when the file system has said so on disk.
        let top = std::fs::File::open(self.mounted.path()).unwrap();
        rustix::fs::syncfs(top).unwrap();
    }

    fn open(&self) -> Store {
        Store::open(self.root(), model::options(Durability::Full)).unwrap()
    }

    /// A store with a committed layer and something to remove.
    fn store(&self) -> Store {
        let store = self.open();
        store.prepare("a", None, Labels::new()).unwrap();
        let upper = model::upper_dir(&store, "a");
        std::fs::write(upper.join("file"), vec![1; 100_000]).unwrap();
        store.commit("base", "a", CommitOptions::new()).unwrap();
        store.prepare("big", Some("base"), Labels::new()).unwrap();
        let upper = model::upper_dir(&store, "big");
        std::fs::write(upper.join("large"), vec![2; 500_000]).unwrap();
        store
    }
}

fn apply_large(store: &Store, name: &str) -> stratafs::Result<()> {
    let large = model::Node::File(vec![0x77; 1 << 20]);
    let tree = (0..400).map(|i| (format!("large-{i}").into(), large.clone())).collect();
    let archive = script::archive(&tree);
    let options = ApplyOptions::unprivileged();
    let stop = &mut ignore_progress;
    store.apply(name, None, &mut &*archive, &options, Labels::new(), stop).map(drop)
}

/// Nothing that needs room works, and nothing is left of it.
fn nothing_fits(store: &Store, root: &Path) {
    let before = Model::of_rows(store);
    // An inode or a few blocks may be left where no file data can go: use them up.
    let full =
        (0..10_000).find_map(|i| store.prepare(&format!("p-{i}"), None, Labels::new()).err());
    let e = full.expect("the disk is never full");
    assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
    let e = apply_large(store, "applied").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
    suite::fails(store.stat("applied"), ErrorKind::NotFound, "applied");
    for dir in ["staging", "trash"] {
        assert_eq!(model::names(&root.join(dir)), Default::default(), "{dir}");
    }
    let after = Model::of_rows(store);
    let rows = model::names(&root.join("snapshots")).len();
    assert_eq!(rows, after.snapshots.len(), "a row for each directory");
    assert!(before.snapshots.keys().all(|key| after.snapshots.contains_key(key)));
    model::assert_sound(store, "on a full disk");
}

/// Removing works, and gives back what was asked for.
fn removing_frees(disk: &Disk, store: &Store) {
    store.remove("big").unwrap();
    suite::fails(store.stat("big"), ErrorKind::NotFound, "big");
    let keys: Vec<_> = Model::of_rows(store).snapshots.into_keys().collect();
    for key in keys.iter().filter(|key| key.starts_with("p-")) {
        store.remove(key).unwrap();
    }
    store.cleanup().unwrap();
    disk.empty();
    store.prepare("again", Some("base"), Labels::new()).unwrap();
    script::apply(store, "applied", Some("base"), &mut ignore_progress);
    model::assert_sound(store, "with room again");
    model::assert_no_leftovers(store, "with room again");
    assert_eq!(std::fs::metadata(disk.root().join("reserve")).unwrap().len(), 1 << 20);
}

fn fills_up_while_open(disk: &Disk) {
    let store = disk.store();
    disk.fill();
    nothing_fits(&store, &disk.root());
    removing_frees(disk, &store);
}

fn opened_when_full(disk: &Disk) {
    drop(disk.store());
    disk.fill();
    let store = disk.open();
    nothing_fits(&store, &disk.root());
    drop(store);
    // Once more, now without its reserve.
    let store = disk.open();
    removing_frees(disk, &store);
}

fn created_when_full(disk: &Disk) {
    disk.fill();
    let opened = (0..10_000).find_map(|i| {
        let root = disk.mounted.path().join(format!("store-{i}"));
        Store::open(&root, model::options(Durability::Full)).err().map(|e| (root, e))
    });
    let (root, e) = opened.expect("the disk is never full");
    assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
    disk.empty();
    // What was begun is no obstacle.
    let store = Store::open(&root, model::options(Durability::Full)).unwrap();
    store.prepare("a", None, Labels::new()).unwrap();
}

/// A full disk found out in the midst of it, with room for all the rest.
fn fills_up_during_an_apply(disk: &Disk) {
    let store = disk.store();
    let e = apply_large(&store, "applied").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
    // At once: it did not hold on to what it had written.
    store.prepare("next", Some("base"), Labels::new()).unwrap();
    script::apply(&store, "applied", Some("base"), &mut ignore_progress);
    model::assert_sound(&store, "after an apply that had no room");
    model::assert_no_leftovers(&store, "after an apply that had no room");
}

fn read_only(disk: &Disk) {
    let root = disk.root();
    drop(disk.store());
    let remount = |flags| {
        rustix::mount::mount_remount(disk.mounted.path(), flags, c"").unwrap();
    };
    let open = |root: &Path| Store::open(root, model::options(Durability::Full));
    remount(MountFlags::RDONLY);
    suite::fails(open(&root), ErrorKind::ReadOnly, root.to_str().unwrap());
    let new = disk.mounted.path().join("new");
    suite::fails(open(&new), ErrorKind::ReadOnly, new.to_str().unwrap());
    remount(MountFlags::empty());
    let store = open(&root).unwrap();
    model::assert_sound(&store, "writable again");
    store.prepare("again", Some("base"), Labels::new()).unwrap();
}
