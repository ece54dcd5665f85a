//! What the first process of a container is told, and what it answers: JSON with its length before it.
//!
//! Names and arguments are bytes. Both ends are of one version of this crate.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::socket;

/// How the other end is named where it fails.
const OTHER: &str = "the first process of a container";
/// The most that a message may take, in bytes.
const MAX: u32 = 64 << 20;

/// A name or an argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Bytes {
    pub(crate) fn of(text: impl AsRef<OsStr>) -> Bytes {
        Bytes(text.as_ref().as_bytes().to_vec())
    }

    pub(crate) fn text(&self) -> OsString {
        OsString::from_vec(self.0.clone())
    }
}

/// A directory or file that the container has from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shared {
    pub(crate) source: Bytes,
    pub(crate) target: Bytes,
    pub(crate) read_only: bool,
}

/// A container: what is in it, and what is to be run there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) version: String,
    /// The root directory, a mount point.
    pub(crate) root: Bytes,
    pub(crate) read_only: bool,
    pub(crate) host_name: String,
    pub(crate) arguments: Vec<Bytes>,
    /// `KEY=VALUE` each.
    pub(crate) environment: Vec<Bytes>,
    pub(crate) directory: Bytes,
    /// `USER` or `USER:GROUP`, by name or number.
    pub(crate) user: String,
    pub(crate) shared: Vec<Shared>,
}

impl Plan {
    pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
}

/// What comes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// It dies with its starter, and wants to be told what to do.
    Born,
    /// The command runs.
    Started,
    /// It does not: the exit code for that, and why.
    Failed { code: i32, text: String },
    /// What could not be taken out of the root again.
    Left(BTreeSet<String>),
}

/// Says something to the other end.
pub(crate) fn say(socket: &OwnedFd, message: &impl Serialize) -> Result<()> {
    let body = serde_json::to_vec(message).map_err(|e| {
        Error::new(ErrorKind::InvalidArgument, "cannot write a message").with_source(e)
    })?;
    let length =
        u32::try_from(body.len()).ok().filter(|length| *length <= MAX).ok_or_else(|| {
            let text = format!("the command and its environment take over {MAX} bytes");
            Error::new(ErrorKind::LimitExceeded, text)
        })?;
    let bytes = [&length.to_le_bytes(), body.as_slice()].concat();
    socket::send(socket, &bytes, None).at("talk to", OTHER)
}

/// Hears what the other end says; none if it has gone.
pub(crate) fn hear<T: DeserializeOwned>(socket: &OwnedFd) -> Result<Option<T>> {
    let mut head = [0; 4];
    let received = match socket::receive(socket, &mut head) {
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
        received => received.at("hear from", OTHER)?.0,
    };
    if received < head.len() {
        return Ok(None);
    }
    let malformed = || {
        let text = "what the other process said is no message: use a program built with the same version \
                    of this crate";
        Error::new(ErrorKind::Incompatible, text)
    };
    let length = u32::from_le_bytes(head);
    if length > MAX {
        return Err(malformed());
    }
    let mut body = vec![0; length as usize];
    if socket::receive(socket, &mut body).at("hear from", OTHER)?.0 < body.len() {
        return Ok(None);
    }
    serde_json::from_slice(&body).map(Some).map_err(|e| malformed().with_source(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_the_end_is_told() {
        let (ours, theirs) = socket::pair().unwrap();
        let shared = Shared {
            source: Bytes(b"/a\xff".to_vec()),
            target: Bytes::of("/b c"),
            read_only: true,
        };
        say(&ours, &shared).unwrap();
        assert_eq!(hear::<Shared>(&theirs).unwrap(), Some(shared));
        say(&ours, &Answer::Started).unwrap();
        assert_eq!(hear::<Shared>(&theirs).unwrap_err().kind(), ErrorKind::Incompatible);
        drop(ours);
        assert_eq!(hear::<Answer>(&theirs).unwrap(), None);
    }
}
