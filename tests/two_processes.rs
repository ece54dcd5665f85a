//! Several processes on one store: they get in each other's way only as documented, and none cleans up
//! what another is working on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod disk;
    pub mod imported;
    pub mod model;
    pub mod script;
    pub mod suite;
}

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::Path;

use stratafs::{
    ApplyOptions, CommitOptions, Durability, ErrorKind, Kind, Labels, Store, ignore_progress,
};
use support::{disk, model, script, suite};

fn main() {
    if let Some(arguments) = suite::child_arguments() {
        return child(&arguments);
    }
    disk::enter_own_mount_namespace();
    let btrfs = disk::Kind::Btrfs.hindrance();
    suite::run_one_by_one(vec![
        suite::trial("two_processes_share_a_store", None, || {
            crowd(suite::temp(), 2, Durability::Full)
        }),
        suite::trial("four_processes_share_a_store", None, || {
            crowd(suite::temp(), 4, Durability::None)
        }),
        suite::trial("four_processes_share_a_store_on_btrfs", btrfs, crowd_on_btrfs),
        suite::trial("processes_may_create_one_store_at_once", None, create_at_once),
        suite::trial("a_running_apply_is_left_alone", None, a_running_apply_is_left_alone),
        suite::trial("a_dead_apply_is_cleaned_up_by_others", None, a_dead_apply_is_cleaned_up),
        suite::trial("the_parent_of_a_running_apply_stays", None, the_parent_stays),
        suite::trial("a_handle_is_of_no_use_after_fork", None, after_fork),
    ]);
}

fn child(arguments: &[String]) {
    let root = Path::new(&arguments[1]);
    match arguments[0].as_str() {
        "jostle" => jostle(root, &arguments[2], arguments[3] == "durable"),
        "create" => {
            // All at once: when the parent closes the pipe.
            suite::say("ready");
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
            let store = Store::open(root, model::options(Durability::None)).unwrap();
            store.prepare(&arguments[2], None, Labels::new()).unwrap();
        }
        "apply" => {
            let store = Store::open(root, model::options(Durability::None)).unwrap();
            let parent = arguments.get(2).map(String::as_str);
            let mut input = std::io::stdin().lock();
            let options = ApplyOptions::unprivileged();
            let stop = &mut ignore_progress;
            store.apply("applied", parent, &mut input, &options, Labels::new(), stop).unwrap();
        }
        "fork" => fork(root),
        other => panic!("no duty {other:?}"),
    }
}

// --- random operations ---------------------------------------------------------------------------

/// Numbers in an order that the seed fixes (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What calls may answer where others change the same names.
fn is_documented(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotFound
            | ErrorKind::AlreadyExists
            | ErrorKind::FailedPrecondition
            | ErrorKind::InvalidArgument
            | ErrorKind::Busy
    )
}

/// Random operations on names that all processes use, and on some of its own, which it tells in the end.
fn jostle(root: &Path, me: &str, durable: bool) {
    let durability = if durable { Durability::Full } else { Durability::None };
    let store = Store::open(root, model::options(durability)).unwrap();
    let mut random = Random(0x9e37_79b9 * (me.parse::<u64>().unwrap() + 1));
    let mut own = BTreeSet::new();
    let long = if std::env::var_os("STRATAFS_FULL").is_some() { 20 } else { 1 };
    for i in 0..long * if durable { 60 } else { 250 } {
        let active = format!("active-{}", random.below(3));
        let committed = format!("committed-{}", random.below(3));
        let parent = (random.below(2) == 0).then_some(committed.as_str());
        let mut mine = |what: &str| {
            let key = format!("own-{me}-{i}-{what}");
            own.insert(key.clone());
            key
        };
        let result = match random.below(12) {
            0 | 1 => store.prepare(&active, parent, Labels::new()).map(drop),
            2 | 3 => store.commit(&committed, &active, CommitOptions::new()).map(drop),
            4 => store.remove(&active),
            5 => store.remove(&committed),
            6 => store.view(&active, parent, Labels::new()).map(drop),
            7 => store.gc(&mut ignore_progress).map(drop),
            8 => store.cleanup(),
            9 => {
                let layer = [committed.clone()];
                store.put_image("shared", me.as_bytes(), b"config", &layer).map(drop)
            }
            10 => store.remove_image("shared").map(drop),
            _ => {
                // Nobody else uses these names, so all of it must work.
                let (key, name) = (format!("own-{me}-{i}-gone"), mine("committed"));
                store.prepare(&key, None, Labels::new()).unwrap();
                std::fs::write(model::upper_dir(&store, &key).join("owner"), me).unwrap();
                store.commit(&name, &key, CommitOptions::new()).unwrap();
                store.prepare(&mine("active"), Some(&name), Labels::new()).map(drop)
            }
        };
        if let Err(e) = result {
            assert!(is_documented(e.kind()), "{me}, {i}: {e:?}");
        }
    }
    own.iter().for_each(|key| suite::say(key));
}

/// Where the metadata has another kind of journal.
fn crowd_on_btrfs() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("mount"));
    disk::make_image(disk::Kind::Btrfs, &image);
    let mounted = disk::Mounted::image(disk::Kind::Btrfs, &image, &at);
    crowd(mounted.path(), 4, Durability::None);
}

fn crowd(dir: impl AsRef<Path>, processes: usize, durability: Durability) {
    let root = dir.as_ref().join("store");
    Store::open(&root, model::options(durability)).unwrap();
    let durable = if durability == Durability::Full { "durable" } else { "lazy" };
    let children: Vec<_> = (0..processes)
        .map(|i| suite::child("jostle", &[root.to_str().unwrap(), &i.to_string(), durable]))
        .collect();
    let mut survivors = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", output.status);
        survivors.extend(String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned));
    }
    assert!(survivors.len() > processes, "{survivors:?}");
    let store = Store::open(&root, model::options(Durability::None)).unwrap();
    model::assert_sound(&store, "in the end");
    model::assert_no_leftovers(&store, "in the end");
    for key in survivors {
        let info = store.stat(&key).unwrap();
        if info.kind == Kind::Committed {
            let owner = std::fs::read_to_string(model::layer_dir(&store, &key).join("owner"));
            assert_eq!(format!("own-{}", owner.unwrap()), key[.."own-0".len()]);
        }
    }
}

fn create_at_once() {
    let dir = suite::temp();
    let root = dir.path().join("store");
    let mut children: Vec<_> = ["a", "b", "c", "d"]
        .map(|key| suite::child("create", &[root.to_str().unwrap(), key]))
        .into();
    for child in &mut children {
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut String::new()).unwrap();
    }
    let pipes: Vec<_> = children.iter_mut().map(|child| child.stdin.take()).collect();
    drop(pipes);
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let store = Store::open(&root, model::options(Durability::None)).unwrap();
    for key in ["a", "b", "c", "d"] {
        store.stat(key).unwrap();
    }
    model::assert_no_leftovers(&store, "created at once");
}

// --- a long apply ---------------------------------------------------------------------------------

/// A child that applies what it is fed, after half of it has surely been taken in.
fn half_applied(root: &Path, parent: Option<&str>) -> (std::process::Child, Vec<u8>) {
    let archive = script::archive(&script::applied_tree());
    let arguments: Vec<&str> = [root.to_str().unwrap()].into_iter().chain(parent).collect();
    let mut child = suite::child("apply", &arguments);
    // More than a pipe holds: when this has been written, the child has read some of it, and so is in
    // the midst of it.
    let (half, rest) = archive.split_at(archive.len() - 4096);
    assert!(half.len() > 2 * 65536);
    child.stdin.as_mut().unwrap().write_all(half).unwrap();
    (child, rest.to_vec())
}

fn finish(mut child: std::process::Child, rest: &[u8]) {
    child.stdin.take().unwrap().write_all(rest).unwrap();
    assert!(child.wait().unwrap().success());
}

fn staged(root: &Path) -> BTreeSet<String> {
    model::names(&root.join("staging"))
}

fn a_running_apply_is_left_alone() {
    let dir = suite::temp();
    let root = dir.path().join("store");
    let first = Store::open(&root, model::options(Durability::None)).unwrap();
    let (child, rest) = half_applied(&root, None);
    let being_made = staged(&root);
    assert_eq!(being_made.len(), 1);
    let second = Store::open(&root, model::options(Durability::None)).unwrap();
    for store in [&first, &second] {
        store.gc(&mut ignore_progress).unwrap();
        store.cleanup().unwrap();
        assert_eq!(staged(&root), being_made);
        // Nor does anybody wait for it, or see it.
        store.prepare("meanwhile", None, Labels::new()).unwrap();
        store.remove("meanwhile").unwrap();
        suite::fails(store.stat("applied"), ErrorKind::NotFound, "applied");
    }
    finish(child, &rest);
    assert_eq!(model::read_tree(&model::layer_dir(&first, "applied")), script::applied_tree());
    model::assert_sound(&second, "applied");
    model::assert_no_leftovers(&second, "applied");
}

fn a_dead_apply_is_cleaned_up() {
    let dir = suite::temp();
    let root = dir.path().join("store");
    let store = Store::open(&root, model::options(Durability::None)).unwrap();
    let (mut child, _) = half_applied(&root, None);
    assert_eq!(staged(&root).len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(store.gc(&mut ignore_progress).unwrap().staging, 1);
    model::assert_no_leftovers(&store, "after a dead apply");
}

fn the_parent_stays() {
    let dir = suite::temp();
    let root = dir.path().join("store");
    let store = Store::open(&root, model::options(Durability::None)).unwrap();
    script::apply(&store, "base", None, &mut ignore_progress);
    let (child, rest) = half_applied(&root, Some("base"));
    suite::fails(store.remove("base"), ErrorKind::Busy, "base");
    finish(child, &rest);
    suite::fails(store.remove("base"), ErrorKind::FailedPrecondition, "applied");
    store.remove("applied").unwrap();
    store.remove("base").unwrap();
}

// --- fork ----------------------------------------------------------------------------------------

fn after_fork() {
    let dir = suite::temp();
    let root = dir.path().join("store");
    let mut child = suite::child("fork", &[root.to_str().unwrap()]);
    assert!(child.wait().unwrap().success());
}

/// In a process of its own, which has one thread.
fn fork(root: &Path) {
    let store = Store::open(root, model::options(Durability::Full)).unwrap();
    store.prepare("a", None, Labels::new()).unwrap();
    // SAFETY: no other thread of this process holds a lock.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let refused = |e: stratafs::Error| {
            assert_eq!(e.kind(), ErrorKind::Poisoned, "{e}");
            assert!(e.to_string().contains("fork"), "{e}");
        };
        refused(store.stat("a").unwrap_err());
        refused(store.prepare("b", None, Labels::new()).unwrap_err());
        refused(store.commit("c", "a", CommitOptions::new()).unwrap_err());
        refused(store.remove("a").unwrap_err());
        refused(store.gc(&mut ignore_progress).unwrap_err());
        refused(store.check(&mut ignore_progress).unwrap_err());
        refused(store.put_image("img", b"", b"", &[]).unwrap_err());
        // As it says, another one works; and closing the inherited one harms nobody.
        drop(store);
        let own = Store::open(root, model::options(Durability::Full)).unwrap();
        own.prepare("b", None, Labels::new()).unwrap();
        std::process::exit(0);
    }
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the forked child failed");
    store.commit("base", "a", CommitOptions::new()).unwrap();
    store.stat("b").unwrap();
    model::assert_sound(&store, "after the fork");
}
