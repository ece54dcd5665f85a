//! Servers whose mounts nobody can see any more.
//!
//! A server that was started in a mount namespace of somebody else's, such as that of `buildah unshare`, is the
//! last one there when all others have gone, and keeps the mount and the namespace with itself. To everybody else
//! the mount has gone: whoever mounts the same upper again is right to, and must not find it in use. From
//! elsewhere nobody can find out who is in that namespace, so it is the server that is asked, by SIGUSR1, and that
//! unmounts if it is alone. Only one whose lock says that it knows what is meant gets the signal: by its mode, for
//! which a full disk has room, too.

use std::fs::File;
use std::time::{Duration, Instant};

use super::ViewUpper;
use crate::error::{IoContext, Result};
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::file;
use crate::sys::lock::{self, Sharing};
use crate::sys::process;
use crate::sys::stat::{self, Time};

/// The mode of the file that is locked, if its holder may be asked. With each refusal it gets another mtime.
pub(crate) const MAY_BE_ASKED: u32 = 0o700;

/// How long a server may take to unmount. One that does not is waited for in vain.
const LIMIT: Duration = Duration::from_secs(3);

/// Asks the server that keeps an upper in use to end if nobody sees its mount, and waits for that. Tells whether the
/// upper is free now.
pub(crate) fn end_unseen_server(upper: &ViewUpper) -> Result<bool> {
    let work = &upper.work;
    let file = open_lock(upper)?;
    let look = || stat::fstat(&file).at("look at the lock in", work);
    let says = look()?;
    let holder = lock::holder(&file).at("ask for the holder of the lock in", work)?;
    let Some(holder) = holder.filter(|_| says.mode == MAY_BE_ASKED) else { return Ok(false) };
    let is_still_meant =
        || Ok(lock::holder(&file)? == Some(holder) && stat::fstat(&file)?.mode == MAY_BE_ASKED);
    if !process::ask_by_signal(holder, is_still_meant).at("ask the server of", &upper.dir)? {
        // It has gone, or is no such server.
        return Ok(false);
    }
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        let refused = look()?.mtime != says.mtime;
        let lock = file.try_clone().at("share the lock in", work)?.into();
        // Given back at once, for whoever mounts.
        if lock::try_lock(lock, Sharing::Exclusive).at("lock", work)?.is_ok() {
            return Ok(true);
        }
        if refused {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(false)
}

/// The file that is locked while a union writes to the upper.
fn open_lock(upper: &ViewUpper) -> Result<File> {
    let work = &upper.work;
    let dir = Dir::open(work).at("open work directory", work)?;
    let own = dir.open_dir(&upper.own).at("open the union's own directory in", work)?;
    own.open_or_create(&Name::new("lock")?, 0o600).at("open the lock in", work)
}

/// Says by its lock that this process, which serves the upper, takes the signal.
pub(crate) fn may_be_asked(upper: &ViewUpper) -> Result<()> {
    let says = lock::set_mode(&open_lock(upper)?, MAY_BE_ASKED);
    says.at("set the mode of the lock in", &upper.work)
}

/// When it is asked: whether no other process sees the mount that this one serves. If one does, whoever asks for
/// the upper is told.
pub(crate) fn nobody_sees_the_mount_on(upper: &ViewUpper) -> Result<bool> {
    let alone = process::is_alone_with_its_mounts();
    if !alone.as_ref().is_ok_and(|alone| *alone) {
        let now = file::set_modified(&open_lock(upper)?, Time::now());
        now.at("set the time of the lock in", &upper.work)?;
    }
    alone.at("look who is in the mount namespace, in", "/proc")
}
