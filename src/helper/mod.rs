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
//!
//! Other helpers are started where a process must have one thread, and what is done would be the embedder's
//! affair: `enter` becomes another program in new namespaces, `trial` tries what can be mounted there, and
//! `init` is the first process of a container.

mod enter;
mod forbidden;
pub(crate) mod init;
pub(crate) mod protocol;
mod serve;
mod spawn;
mod trial;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

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

impl HelperCommand {
    pub(crate) fn program(&self) -> &OsStr {
        match self {
            HelperCommand::Path(path) => path.as_os_str(),
            HelperCommand::CurrentExe => OsStr::new("/proc/self/exe"),
        }
    }
}

/// The arguments after which a helper that enters new namespaces takes the program to become.
pub(crate) fn arguments_to_enter(mapping: Option<EnterUser<'_>>) -> Vec<OsString> {
    let mut arguments = vec![OsString::from(enter::REQUEST)];
    match mapping {
        None => arguments.push(enter::MOUNT.into()),
        Some(EnterUser { users, groups, programs }) => {
            arguments.push(enter::USER.into());
            arguments.extend([users, groups].map(OsString::from));
            let programs = programs.unwrap_or([Path::new(""); 2]);
            arguments.extend(programs.map(|program| program.as_os_str().to_owned()));
        }
    }
    arguments
}

/// How ids are mapped into a new user namespace: see `enter`.
#[derive(Debug)]
pub(crate) struct EnterUser<'a> {
    pub(crate) users: String,
    pub(crate) groups: String,
    pub(crate) programs: Option<[&'a Path; 2]>,
}

/// What a helper can try to mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TryMount {
    /// A writable overlay of the kernel's, with marks in `user.*`.
    Overlay,
    Fuse,
}

/// The arguments by which a helper tries that, for layers in `dir`.
pub(crate) fn arguments_to_try(what: TryMount, dir: &Path) -> [OsString; 3] {
    let what = match what {
        TryMount::Overlay => trial::OVERLAY,
        TryMount::Fuse => trial::FUSE,
    };
    [trial::REQUEST.into(), what.into(), dir.into()]
}

/// The arguments by which a helper is the first process of a container.
pub(crate) fn arguments_to_be_first(socket: BorrowedFd<'_>) -> [OsString; 2] {
    [init::REQUEST.into(), socket.as_raw_fd().to_string().into()]
}

/// Does what a helper does, and ends the process when that is done, if this process was started as a helper.
/// Else it does nothing.
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
    let mut arguments = std::env::args_os().skip(1).peekable();
    let Some(request) = arguments.next() else { return };
    let code = match request.to_str() {
        Some(REQUEST) if arguments.peek().is_none() => serve::run(),
        Some(enter::REQUEST) => enter::run(arguments),
        Some(trial::REQUEST) => trial::run(arguments),
        Some(init::REQUEST) => init::run(arguments),
        _ => return,
    };
    std::process::exit(code);
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
