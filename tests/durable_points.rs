//! How often each call waits for the disk. Waits are what calls cost on a busy machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod imported;
    pub mod model;
    pub mod script;
    pub mod suite;
}

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use stratafs::{
    CommitOptions, Durability, DurablePoint, DurablePointHook, Labels, Shown, Store,
    ignore_progress,
};
use support::{model, script, suite};

/// A store, and how often it waited.
struct Counted {
    store: Store,
    waits: Arc<AtomicUsize>,
    _dir: tempfile::TempDir,
}

impl Counted {
    fn new(durability: Durability) -> Counted {
        let dir = suite::temp();
        let waits = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&waits);
        let mut options = model::options(durability);
        options.on_durable_point = Some(DurablePointHook(Arc::new(move |point| {
            counter.fetch_add(usize::from(point.done), Ordering::Relaxed);
        })));
        let store = Store::open(dir.path().join("store"), options).unwrap();
        Counted { store, waits, _dir: dir }
    }

    /// How often a call waits.
    fn waits<T>(&self, call: impl FnOnce(&Store) -> stratafs::Result<T>) -> usize {
        let before = self.waits.load(Ordering::Relaxed);
        call(&self.store).unwrap();
        self.waits.load(Ordering::Relaxed) - before
    }
}

#[test]
fn calls_wait_no_more_often_than_promised_and_never_less_than_once() {
    let s = Counted::new(Durability::Full);
    let promised = |call: &str, most: usize, waits: usize| {
        assert!((1..=most).contains(&waits), "{call} waits {waits} times, not 1 to {most}");
    };
    promised("prepare", 2, s.waits(|s| s.prepare("a", None, Labels::new())));
    std::fs::write(model::upper_dir(&s.store, "a").join("file"), "contents").unwrap();
    promised("settle", 2, s.waits(|s| s.settle("a", &mut ignore_progress)));
    promised("commit", 3, s.waits(|s| s.commit("base", "a", CommitOptions::new())));
    promised("prepare", 2, s.waits(|s| s.prepare("b", Some("base"), Labels::new())));
    promised("commit", 3, s.waits(|s| s.commit("top", "b", CommitOptions::new())));
    promised("prepare", 2, s.waits(|s| s.prepare("c", Some("base"), Labels::new())));
    let stop = &mut ignore_progress;
    promised("make ready", 2, s.waits(|s| s.make_ready("c", Shown::InPlace, stop)));
    promised("commit of a copy", 3, s.waits(|s| s.commit("copied", "c", CommitOptions::new())));
    promised("view", 2, s.waits(|s| s.view("v", Some("top"), Labels::new())));
    promised("update", 1, s.waits(|s| s.update("v", Labels::new(), &[])));
    promised("remove", 2, s.waits(|s| s.remove("v")));
    let apply = |s: &Store| {
        script::apply(s, "applied", None, &mut ignore_progress);
        Ok(())
    };
    promised("apply", 2, s.waits(apply));
    let layers = ["base".to_owned(), "top".to_owned()];
    promised("put_image", 2, s.waits(|s| s.put_image("img", b"manifest", b"config", &layers)));
    promised("remove_image", 3, s.waits(|s| s.remove_image("img")));
}

#[test]
fn looking_waits_for_nothing() {
    let s = Counted::new(Durability::Full);
    s.store.prepare("a", None, Labels::new()).unwrap();
    assert_eq!(s.waits(|s| s.stat("a")), 0);
    assert_eq!(s.waits(|s| s.usage("a")), 0);
    assert_eq!(s.waits(|s| s.mounts("a", &stratafs::MountOptions::default())), 0);
    assert_eq!(s.waits(|s| s.walk(&[], &mut |_| Ok(()))), 0);
    assert_eq!(s.waits(|s| s.check(&mut ignore_progress)), 0);
}

#[test]
fn without_durability_nothing_waits() {
    let s = Counted::new(Durability::None);
    let life = |s: &Store| {
        script::SCRIPT.iter().for_each(|step| (step.run)(s));
        Ok(())
    };
    assert_eq!(s.waits(life), 0);
}

#[test]
fn each_wait_is_told_of_before_and_after() {
    let dir = suite::temp();
    let told = Arc::new(Mutex::new(Vec::<DurablePoint>::new()));
    let notes = Arc::clone(&told);
    let mut options = model::options(Durability::Full);
    options.on_durable_point =
        Some(DurablePointHook(Arc::new(move |point| notes.lock().unwrap().push(point))));
    let store = Store::open(dir.path().join("store"), options).unwrap();
    store.prepare("a", None, Labels::new()).unwrap();
    let told = told.lock().unwrap();
    assert!(!told.is_empty());
    for pair in told.chunks(2) {
        assert_eq!((pair[0].name, pair[0].done, pair[1].done), (pair[1].name, false, true));
    }
}
