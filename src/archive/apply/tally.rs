//! What the layer takes on disk, counted while it is made, which saves a walk over it.
//!
//! A new inode counts with its blocks when all of it is written; a directory with those it has when it
//! is first entered, and again with what it grew by whenever it is left. Hard links add nothing. That
//! is exact as long as the directory was empty at first and nothing is removed: else the count is given
//! up, and a walk at the end counts instead. Archives that replace what they made are rare.
//!
//! As with any walk, a file system that allocates late (ext4, Btrfs, XFS) may change its mind about
//! blocks afterwards.

use crate::layer::Usage;
use crate::sys::stat::Stat;

/// The count, or none if a walk must tell.
#[derive(Debug)]
pub(super) struct Tally(Option<Usage>);

impl Tally {
    /// Of a directory in which there was something, or nothing, at first.
    pub(super) fn new(root: &Stat, empty: bool) -> Self {
        let mut tally = Tally(empty.then(Usage::default));
        tally.add(root);
        tally
    }

    /// Whether it goes on.
    pub(super) fn counts(&self) -> bool {
        self.0.is_some()
    }

    /// Counts a new inode.
    pub(super) fn add(&mut self, made: &Stat) {
        if let Some(usage) = &mut self.0 {
            usage.inodes = usage.inodes.saturating_add(1);
            usage.bytes = usage.bytes.saturating_add(bytes(made));
        }
    }

    /// Counts what changed of one that is counted.
    pub(super) fn change(&mut self, before: &Stat, now: &Stat) {
        if let Some(usage) = &mut self.0 {
            usage.bytes = usage.bytes.saturating_add(bytes(now)).saturating_sub(bytes(before));
        }
    }

    /// Counts what inodes that are counted took more.
    pub(super) fn grow(&mut self, bytes: u64) {
        if let Some(usage) = &mut self.0 {
            usage.bytes = usage.bytes.saturating_add(bytes);
        }
    }

    /// Notes that something is removed.
    pub(super) fn give_up(&mut self) {
        self.0 = None;
    }

    /// The sum, if it is known.
    pub(super) fn usage(&self) -> Option<Usage> {
        self.0
    }
}

fn bytes(stat: &Stat) -> u64 {
    stat.blocks.saturating_mul(512)
}
