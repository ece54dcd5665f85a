//! A power cut at any moment leaves the store as it was before or after the call that it interrupted.
//!
//! The store lives through its script on ext4, XFS and Btrfs. Before and after each wait for the disk,
//! and after each call, the device is cloned as it is then: what the file system still held in memory
//! is not in the clone. Each clone is then mounted, which replays its journal, and looked at.
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
use std::sync::{Arc, Mutex};

use stratafs::{Durability, DurablePointHook, Store};
use support::disk::{self, Host, Kind, Mounted};
use support::model::{self, Model};
use support::script::SCRIPT;
use support::suite;

fn main() {
    disk::enter_own_mount_namespace();
    let trials = Kind::ALL.map(|kind| {
        let name = format!("a_power_cut_is_survived_on_{}", kind.name());
        let hindrance = kind.hindrance().or_else(Host::hindrance);
        suite::trial(name, hindrance, move || power_cuts(kind))
    });
    suite::run_one_by_one(trials.into());
}

/// A device as it was at one moment.
struct Clone {
    image: PathBuf,
    moment: String,
    allowed: Vec<Model>,
}

/// What is going on, for the hook to note with each clone.
#[derive(Default)]
struct Now {
    moment: String,
    allowed: Vec<Model>,
    clones: Vec<Clone>,
}

fn power_cuts(kind: Kind) {
    let host = Host::new();
    let (image, at) = (host.path().join("image"), host.path().join("mount"));
    disk::make_image(kind, &image);
    let clones = live(kind, &host, &image, &at);
    let (steps, points) = (SCRIPT.len(), clones.len());
    assert!(points > 3 * steps, "{points} clones in {steps} steps: the hook is not called");
    for clone in clones {
        let mounted = Mounted::image(kind, &clone.image, &at);
        model::assert_survived(&mounted.path().join("store"), &clone.allowed, &clone.moment);
        drop(mounted);
        std::fs::remove_file(clone.image).unwrap();
    }
}

/// Runs the script, and clones the device all along.
fn live(kind: Kind, host: &Host, image: &Path, at: &Path) -> Vec<Clone> {
    let mounted = Mounted::image(kind, image, at);
    let now = Arc::new(Mutex::new(Now::default()));
    let clone = {
        let (now, image, dir) = (Arc::clone(&now), image.to_owned(), host.path().to_owned());
        move |when: &str| {
            let mut now = now.lock().unwrap();
            let to = dir.join(format!("clone-{}", now.clones.len()));
            disk::clone_image(&image, &to);
            let moment = format!("{}, {when}", now.moment);
            let allowed = now.allowed.clone();
            now.clones.push(Clone { image: to, moment, allowed });
        }
    };
    let mut options = model::options(Durability::Full);
    let hook = clone.clone();
    options.on_durable_point = Some(DurablePointHook(Arc::new(move |point| {
        hook(&format!("{} {}", if point.done { "after" } else { "before" }, point.name));
    })));
    let store = Store::open(mounted.path().join("store"), options).unwrap();
    now.lock().unwrap().allowed = vec![Model::default()];
    clone("opened");
    let mut model = Model::default();
    for step in SCRIPT {
        {
            let mut now = now.lock().unwrap();
            now.moment = format!("{} on {}", step.name, kind.name());
            now.allowed = step.during(&model);
        }
        (step.run)(&store);
        model = step.after(&model);
        now.lock().unwrap().allowed = vec![model.clone()];
        clone("done");
    }
    drop(store);
    let clones = std::mem::take(&mut now.lock().unwrap().clones);
    let store = Store::open(mounted.path().join("store"), model::options(Durability::None));
    assert_eq!(Model::of(&store.unwrap()), model, "the script itself");
    clones
}
