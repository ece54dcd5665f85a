//! What a server keeps does not grow with the tree: neither descriptors, nor, once the kernel has
//! forgotten what it knew, memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod suite;
    pub mod union_mount;
}

use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use stratafs::LayerFormat;
use support::suite;
use support::union_mount::{Branches, Engine, UnionMount, full};
use tempfile::TempDir;

/// Far below the number of files, and of what processes may have open.
const MOST_DESCRIPTORS: usize = 5000;
const FILES_A_DIR: usize = 100;
const PARTS: usize = 10;

fn main() {
    support::union_mount::enter_own_mount_namespace();
    let engine = Engine::under_test();
    let hindrance = match engine {
        Engine::Kernel => Some("the kernel has no server".to_owned()),
        _ => engine.hindrance(),
    };
    type Test = fn(&Engine, &Tree);
    let tests: [(&str, Test); 4] = [
        ("descriptors_are_bounded", walk),
        ("memory_does_not_grow_with_what_was_seen", walk_parts),
        ("memory_is_given_back", give_back),
        ("names_that_come_and_go_leave_nothing", churn),
    ];
    // Only the trials own it: this function never returns.
    let tree = Arc::<Tree>::default();
    let trials = tests.into_iter().map(move |(name, test)| {
        let (engine, tree) = (engine.clone(), Arc::clone(&tree));
        suite::trial(name, hindrance.clone(), move || test(&engine, &tree))
    });
    suite::run_one_by_one(trials.collect());
}

/// A lower layer of many files, made by the first test that needs it, and gone with the last.
#[derive(Default)]
struct Tree(OnceLock<TempDir>);

impl Tree {
    fn path(&self) -> &Path {
        let make = || {
            // A million files in memory would be too many.
            let dir =
                if full() { tempfile::tempdir_in("/var/tmp").unwrap() } else { suite::temp() };
            for i in 0..files() / FILES_A_DIR {
                let below = dir.path().join(format!("{}/{i}", i % PARTS));
                fs::create_dir_all(&below).unwrap();
                for j in 0..FILES_A_DIR {
                    // And so would be a block for each.
                    let content = if j % 10 == 0 { format!("{i} {j}") } else { String::new() };
                    fs::write(below.join(format!("file-{j}")), content).unwrap();
                }
            }
            dir
        };
        self.0.get_or_init(make).path()
    }
}

fn files() -> usize {
    if full() { 1_000_000 } else { 30_000 }
}

struct Server {
    mount: UnionMount,
    _dir: TempDir,
}

impl Server {
    fn over(engine: &Engine, tree: &Tree) -> Server {
        let lower = tree.path().to_owned();
        let dir = suite::temp();
        let (upper, work) = (dir.path().join("upper"), dir.path().join("work"));
        for dir in [&upper, &work] {
            fs::create_dir(dir).unwrap();
        }
        let format = LayerFormat::OverlayTrusted;
        let branches = Branches::new(vec![lower], Some((upper, work)), format);
        let mount = UnionMount::new(engine, &branches, &dir.path().join("mount"));
        Server { mount, _dir: dir }
    }

    fn root(&self) -> &Path {
        self.mount.path()
    }

    fn proc(&self, file: &str) -> std::path::PathBuf {
        format!("/proc/{}/{file}", self.mount.server().unwrap()).into()
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(self.proc("fd")).unwrap().count()
    }

    fn check_descriptors(&self) {
        let open = self.descriptors();
        assert!(open < MOST_DESCRIPTORS, "the server has {open} descriptors");
    }

    /// In KiB.
    fn resident(&self) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Reads all below a directory; the number of files.
    fn walk(&self, dir: &Path) -> usize {
        let mut files = 0;
        for entry in walkdir::WalkDir::new(dir) {
            let entry = entry.unwrap();
            if entry.file_type().is_file() {
                let read = fs::read(entry.path()).unwrap();
                assert_eq!(
                    read.len() as u64,
                    entry.metadata().unwrap().len(),
                    "{:?}",
                    entry.path()
                );
                files += 1;
            } else if files % (50 * FILES_A_DIR) == 0 {
                self.check_descriptors();
            }
        }
        self.check_descriptors();
        files
    }

    /// Has the kernel forget what it knows of the mount (pages first, which keep inodes), and the server hear it.
    fn forget(&self) {
        for _ in 0..2 {
            fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
            // It is told in between other requests, which it answers in the order in which they come.
            for _ in 0..2000 {
                rustix::fs::statfs(self.root()).unwrap();
            }
        }
    }
}

fn walk(engine: &Engine, tree: &Tree) {
    let files = files();
    let server = Server::over(engine, tree);
    for _ in 0..2 {
        assert_eq!(server.walk(server.root()), files);
    }
    server.forget();
    server.check_descriptors();
    server.mount.unmount().unwrap();
}

/// One part of the tree after the other: what is freed of one has room for the next.
fn walk_parts(engine: &Engine, tree: &Tree) {
    let server = Server::over(engine, tree);
    let mut after = Vec::new();
    for part in 0..PARTS {
        server.walk(&server.root().join(part.to_string()));
        server.forget();
        after.push(server.resident());
    }
    // By the first the allocator has not yet all that it keeps for later, which of a small heap is much.
    let (second, last) = (after[1], after[PARTS - 1]);
    assert!(last * 10 <= second * 12 + 20_480, "memory grows: {after:?} KiB");
    server.mount.unmount().unwrap();
}

/// Most of what a walk took comes back to the system; of small heaps some never does.
fn give_back(engine: &Engine, tree: &Tree) {
    let server = Server::over(engine, tree);
    let fresh = server.resident();
    server.walk(server.root());
    let most = server.resident();
    server.forget();
    let left = server.resident();
    let (taken, kept) = (most.saturating_sub(fresh), left.saturating_sub(fresh));
    assert!(
        kept <= taken / 2 + 4096,
        "{fresh} KiB at first, {most} after the walk, {left} when it was forgotten"
    );
    server.mount.unmount().unwrap();
}

/// Names that come and go leave nothing in memory.
fn churn(engine: &Engine, tree: &Tree) {
    let server = Server::over(engine, tree);
    let rounds = if full() { 40 } else { 4 };
    let mut after = Vec::new();
    for round in 0..rounds {
        for i in 0..2000 {
            let (path, to) = (format!("made-{round}-{i}"), format!("moved-{round}-{i}"));
            let (path, to) = (server.root().join(path), server.root().join(to));
            fs::write(&path, "made").unwrap();
            fs::rename(&path, &to).unwrap();
            assert!(fs::metadata(&path).is_err());
            fs::remove_file(&to).unwrap();
        }
        server.check_descriptors();
        server.forget();
        after.push(server.resident());
    }
    let (first, last) = (after[0], after[after.len() - 1]);
    assert!(last * 10 <= first * 12, "memory grows: {after:?} KiB");
    server.mount.unmount().unwrap();
}
