//! The union by itself, without a mount.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

/// Where tests stop the union.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    /// Set: copying waits until it is reset.
    hold: Mutex<bool>,
    free: Condvar,
    pub(super) held: AtomicBool,
}

impl Hooks {
    pub(super) fn copying(&self) {
        let mut hold = self.hold.lock();
        while *hold {
            self.held.store(true, Ordering::SeqCst);
            self.free.wait(&mut hold);
        }
    }
}
