//! Unpacking against a model of it.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use super::archive::{CAGE, canaries};
use crate::archive::check_against_model;
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::remove::remove_tree;

/// Unpacking a script of entries with names that collide, links and marks among them, into a plain tree
/// or a layer: it leaves exactly what a model in memory says, or both refuse; and nothing outside of the
/// directory changes.
pub fn apply_model(data: &[u8]) {
    let cage = &*CAGE;
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let root = cage.top.join(format!("in/model-{}", RUNS.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir(&root).expect("a root can be made");
    check_against_model(data, &root);
    assert_eq!(canaries(&cage.top), cage.before);
    let dir = Dir::open(cage.top.join("in")).expect("the roots are there");
    let name = root.file_name().expect("a root has a name").as_encoded_bytes();
    let name = Name::new(name).expect("a root's name is one");
    remove_tree(&dir, &name, &mut || Ok(())).expect("a root can be removed");
}
