//! For the program `stratafs-fuse`: servers whose mounts nobody can see any more, by their upper directories.

use super::{UpperDir, own_work};
use crate::error::Result;
use crate::fuse::{ViewUpper, unseen};

fn view(upper: &UpperDir) -> Result<ViewUpper> {
    Ok(ViewUpper { dir: upper.dir.clone(), work: upper.work.clone(), own: own_work()? })
}

/// Asks the server that keeps an upper in use to end if nobody sees its mount, and waits for that. Tells whether the
/// upper is free now.
#[doc(hidden)]
pub fn end_unseen_server(upper: &UpperDir) -> Result<bool> {
    unseen::end_unseen_server(&view(upper)?)
}

/// When it is asked: whether no other process sees the mount that this one serves. If one does, whoever asks for
/// the upper is told.
#[doc(hidden)]
pub fn nobody_sees_the_mount_on(upper: &UpperDir) -> Result<bool> {
    unseen::nobody_sees_the_mount_on(&view(upper)?)
}
