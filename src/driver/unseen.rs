//! Servers whose mounts nobody can see any more.
//!
//! A server that was started in a mount namespace of somebody else's, such as that of `buildah unshare`, is the
//! last one there when all others have gone, and keeps the mount and the namespace with itself. To everybody else
//! the mount has gone: whoever mounts the same upper again is right to, and must not find it in use. From
//! elsewhere nobody can find out who is in that namespace, so it is the server that is asked, by SIGUSR1, and that
//! unmounts if it is alone. Only one whose lock says that it knows what is meant gets the signal.

use std::io::Read as _;
use std::time::{Duration, Instant};

use super::{UpperDir, own_work};
use crate::error::{IoContext, Result};
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::lock::{self, Sharing};
use crate::sys::process;

/// What the file says that is locked, if its holder may be asked.
pub(crate) const MAY_BE_ASKED: &[u8] =
    b"SIGUSR1: unmount if nobody else is in the mount namespace\n";

/// How long a server may take to unmount. One that does not is waited for in vain.
const LIMIT: Duration = Duration::from_secs(3);

/// For the program `stratafs-fuse`: asks the server that keeps an upper in use to end if nobody sees its mount, and
/// waits for that. Tells whether the upper is free now.
#[doc(hidden)]
pub fn end_unseen_server(upper: &UpperDir) -> Result<bool> {
    let work = &upper.work;
    let dir = Dir::open(work).at("open work directory", work)?;
    let own = dir.open_dir(&own_work()?).at("open the union's own directory in", work)?;
    let mut file = own.open_file(&Name::new("lock")?).at("open the lock in", work)?;
    let mut says = Vec::new();
    file.read_to_end(&mut says).at("read the lock in", work)?;
    let holder = lock::holder(&file).at("ask for the holder of the lock in", work)?;
    let Some(holder) = holder.filter(|_| says == MAY_BE_ASKED) else { return Ok(false) };
    process::signal_user_1(holder).at("ask the server of", &upper.dir)?;
    let start = Instant::now();
    let mut lock = file.into();
    while start.elapsed() < LIMIT {
        // Given back at once, for whoever mounts.
        match lock::try_lock(lock, Sharing::Exclusive).at("lock", work)? {
            Ok(_) => return Ok(true),
            Err(still) => lock = still,
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(false)
}

/// For the program `stratafs-fuse`: whether no other process sees the mounts of this one.
#[doc(hidden)]
pub fn nobody_sees_these_mounts() -> Result<bool> {
    process::is_alone_with_its_mounts().at("look who is in the mount namespace, in", "/proc")
}
