//! What the benches share: where they write ([`scratch`]), what they move ([`tree`]), whom they are
//! compared with ([`peers`], [`unions`]), and how it is told ([`table`]).
#![allow(dead_code, reason = "no bench uses all of it")]

pub mod peers;
pub mod scratch;
pub mod table;
pub mod tree;
#[cfg(feature = "fuse")]
pub mod unions;

use std::path::Path;

use stratafs::{ApplyOptions, Durability, Labels, Store, StoreOptions, ignore_progress};

/// Whether `cargo bench` runs this. `cargo test --benches` does, too, to see that it still works.
pub fn for_figures() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// A store in the format that this user gets, which waits for no disk: the peers do not either.
pub fn store(root: &Path) -> Store {
    let mut options = StoreOptions::new();
    options.durability = Durability::None;
    Store::open(root, options).expect("the store opens")
}

/// What this user can unpack.
pub fn apply_options() -> ApplyOptions {
    if scratch::is_root() { ApplyOptions::default() } else { ApplyOptions::unprivileged() }
}

/// Unpacks an archive from its file into a new layer.
pub fn apply(store: &Store, name: &str, parent: Option<&str>, archive: &Path) {
    let mut input = std::fs::File::open(archive).expect("the archive opens");
    let options = apply_options();
    store
        .apply(name, parent, &mut input, &options, Labels::new(), &mut ignore_progress)
        .expect("the layer is applied");
}
