//! What other union file systems get wrong, each a test: mounted, used, and mounted again, and the upper
//! and the lowers by the kernel's overlayfs too, where all must be as it was.
//!
//! Each test can be tried on another file system: see `support/fuse_union.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod calls;
    pub mod fuse_union;
    pub mod suite;
    pub mod whole_tree;
}

mod defects {
    pub mod aufs;
    pub mod copyup;
    pub mod data;
    pub mod layers;
    pub mod listing;
    pub mod marks;
    pub mod modes;
    pub mod names;
    pub mod renames;
    pub mod rows;
    pub mod traps;
    pub mod unlinked;
}

use support::fuse_union::{self, Engine};
use support::suite;

fn main() {
    if let Some(arguments) = suite::child_arguments() {
        defects::data::duty(&arguments);
    }
    fuse_union::enter_own_mount_namespace();
    let hindrance = Engine::under_test().hindrance();
    let own = fuse_union::needs_own();
    let suites = [
        ("rows", defects::rows::TESTS, &hindrance),
        ("modes", defects::modes::TESTS, &hindrance),
        ("layers", defects::layers::TESTS, &hindrance),
        ("traps", defects::traps::TESTS, &hindrance),
        ("traps", defects::traps::OWN, &own),
        ("marks", defects::marks::TESTS, &hindrance),
        ("unlinked", defects::unlinked::TESTS, &hindrance),
        ("renames", defects::renames::TESTS, &hindrance),
        ("listing", defects::listing::TESTS, &hindrance),
        ("copyup", defects::copyup::TESTS, &hindrance),
        ("data", defects::data::TESTS, &hindrance),
        ("names", defects::names::TESTS, &hindrance),
        ("aufs", defects::aufs::TESTS, &own),
    ];
    let mut trials = Vec::new();
    for (suite, tests, hindrance) in suites {
        for (name, body) in tests {
            trials.push(suite::trial(format!("{suite}::{name}"), hindrance.clone(), body));
        }
    }
    suite::run_one_by_one(trials);
}
