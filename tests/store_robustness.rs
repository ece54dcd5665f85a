//! The store after accidents, and beside others that work on the same files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;

use stratafs::{Labels, LayerFormat, Store, StoreOptions, ignore_progress};

fn store(root: &Path) -> Store {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    Store::open(root, options).unwrap()
}

fn temp() -> tempfile::TempDir {
    // Not in /tmp, which may be a tmpfs without user xattrs.
    tempfile::tempdir_in("/var/tmp").unwrap()
}

#[test]
fn a_row_of_a_mount_that_a_power_cut_tore_does_not_keep_the_store_shut() {
    let tmp = temp();
    store(tmp.path()).prepare("a", None, Labels::new()).unwrap();
    let rows = tmp.path().join("run/mounts");
    fs::create_dir_all(&rows).unwrap();
    // The name is there, the data is not: nobody syncs a row.
    let torn = "1-00000000-0000-4000-8000-000000000000-0123456789abcdef";
    for name in [torn.to_owned(), format!(".{torn}")] {
        fs::write(rows.join(name), "").unwrap();
    }
    let store = store(tmp.path());
    store.remove("a").unwrap();
    store.gc(&mut ignore_progress).unwrap();
    assert_eq!(fs::read_dir(rows).unwrap().count(), 0);
}
