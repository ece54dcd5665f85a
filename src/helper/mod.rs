//! Helper processes: one serves one mount, and outlives the process that started it.
//!
//! A mount over FUSE lives as long as the process that serves it. A helper is that process: it is started
//! with a socket as its standard input, told what to mount (`protocol`), and serves it until it is
//! unmounted. It leaves the session and the working directory of its starter, and when that one is gone it
//! goes on serving.
//!
//! - `spawn`: the starter's side, the only one that starts processes. `serve`: the helper's.
//! - A helper is any program that calls [`run_if_requested`] first in its `main`: the program itself, or
//!   another of the same version of this crate.
//! - It keeps open what it is given to keep: a lock, which is so free when nothing is written any more.

pub(crate) mod protocol;
mod serve;
mod spawn;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::socket;

pub(crate) use spawn::Helper;

use protocol::Message;

/// The argument that makes a program a helper.
const REQUEST: &str = "--stratafs-serve-mount";

/// How the other end is named where it fails.
const OTHER: &str = "the other process";

/// Which program is started as a helper. It must call [`run_if_requested`] first in its `main`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HelperCommand {
    /// The program at this path, built with the same version of this crate.
    Path(PathBuf),
    /// This very program, also if its file was replaced meanwhile.
    CurrentExe,
}

/// Serves a mount, and ends the process when that is done, if this process was started as a helper. Else
/// it does nothing.
///
/// Call it first in `main`, before anything is opened, any thread started, or arguments are looked at.
///
/// ```
/// fn main() {
///     stratafs::helper::run_if_requested();
///     // What the program does.
/// }
/// ```
#[allow(clippy::needless_doctest_main, reason = "where in `main` is the point")]
pub fn run_if_requested() {
    let mut arguments = std::env::args_os();
    if arguments.nth(1).is_some_and(|argument| argument == REQUEST) && arguments.next().is_none() {
        std::process::exit(serve::run());
    }
}

/// Says something to the other process, and hands it a descriptor.
fn say(socket: &OwnedFd, message: &Message, descriptor: Option<BorrowedFd<'_>>) -> Result<()> {
    let bytes = protocol::encode(message)?;
    socket::send(socket, &bytes, descriptor).at("talk to", OTHER)
}

/// Hears what the other process says; none if it has gone.
fn hear(socket: impl AsFd) -> Result<Option<(Message, Option<OwnedFd>)>> {
    let gone = |e: &io::Error| e.kind() == io::ErrorKind::ConnectionReset;
    let mut head = [0; 4];
    let (n, descriptor) = match socket::receive(&socket, &mut head) {
        Err(e) if gone(&e) => return Ok(None),
        received => received.at("hear from", OTHER)?,
    };
    if n == 0 {
        return Ok(None);
    }
    let mut body = vec![0; protocol::length(head)?];
    let (n, _) = socket::receive(&socket, &mut body).at("hear from", OTHER)?;
    if n < body.len() {
        let text = "the other process ended in the middle of a message";
        return Err(Error::new(ErrorKind::Io, text));
    }
    Ok(Some((protocol::decode(&body)?, descriptor)))
}
