//! The union and what was agreed with the kernel: all that a request needs; and what several kinds of
//! requests have in common.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use fuser::{Errno, Generation, INodeNo, ReplyAttr, ReplyEntry, Request};

use super::busy_poll::BusyPoll;
use super::capabilities::Granted;
use super::convert;
use super::latch::Latch;
use super::reply::serve;
use super::requests::{Operation, Requests};
use super::session::SessionOptions;
use crate::sys::errno::Code;
use crate::sys::fuse::{KEEP_DATA, user_and_group};
use crate::union::{Attr, Entry, Make, NewFile, Node, Union};

/// How long the kernel may rely on what it was told, if for ever: seconds.
const FOREVER: Duration = Duration::from_secs(1_000_000_000);

/// A request, until it has been answered.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    fs: &'a UnionFs,
    what: Operation,
}

impl Asked<'_> {
    /// Carries it out.
    pub(super) fn serve<T>(&self, work: impl FnOnce() -> io::Result<T>) -> Result<T, Errno> {
        serve(self.what.name(), work)
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.fs.poll.answered();
    }
}

/// A union as fuser wants it.
#[derive(Debug)]
pub(super) struct UnionFs {
    pub(super) union: Arc<Union>,
    pub(super) ttl: Duration,
    pub(super) writeback: bool,
    /// Others may change the layers.
    pub(super) live: bool,
    pub(super) granted: Arc<Granted>,
    pub(super) latch: Arc<Latch>,
    pub(super) requests: Arc<Requests>,
    pub(super) poll: BusyPoll,
}

impl UnionFs {
    pub(super) fn new(
        union: Arc<Union>,
        options: &SessionOptions,
        granted: Arc<Granted>,
        latch: Arc<Latch>,
        requests: Arc<Requests>,
        poll: BusyPoll,
    ) -> UnionFs {
        UnionFs {
            union,
            ttl: options.timeout.unwrap_or(FOREVER),
            // Where nothing is written it saves nothing, and costs a GETATTR for each file that is closed.
            writeback: options.writeback && !options.attributes.read_only,
            live: options.timeout.is_some(),
            granted,
            latch,
            requests,
            poll,
        }
    }

    /// A request that has come.
    pub(super) fn asked(&self, what: Operation) -> Asked<'_> {
        self.requests.count(what);
        self.poll.asked();
        Asked { fs: self, what }
    }

    /// The one call that is not a file's: the owner of the mount wants all data in the upper.
    ///
    /// # Errors
    /// ENOTTY for other calls, EPERM for other users.
    pub(super) fn control(&self, request: &Request, ino: INodeNo, call: u32) -> io::Result<()> {
        if call != KEEP_DATA || ino.0 != self.union.root().id() {
            return Err(Code::NotTty.into());
        }
        let (own, _) = user_and_group();
        if request.uid() != 0 && request.uid() != own {
            return Err(Code::Perm.into());
        }
        self.union.complete_all()
    }

    pub(super) fn node(&self, ino: INodeNo) -> io::Result<Arc<Node>> {
        self.union.node(ino.0)
    }

    pub(super) fn make(
        &self,
        request: &Request,
        (parent, name): (INodeNo, &OsStr),
        (file, mode, umask): (NewFile, u32, u32),
    ) -> io::Result<Entry> {
        let make =
            Make { file, mode: mode & 0o7777, umask, uid: request.uid(), gid: request.gid() };
        self.union.make(&self.node(parent)?, &convert::name(name)?, &make)
    }

    pub(super) fn reply_entry(&self, entry: Result<Entry, Errno>, reply: ReplyEntry) {
        match entry {
            Ok(entry) => {
                let attr = convert::attr(&entry.attr);
                reply.entry(&self.ttl, &attr, Generation(entry.node.generation()));
            }
            Err(e) => reply.error(e),
        }
    }

    pub(super) fn reply_attr(&self, attr: Result<Attr, Errno>, reply: ReplyAttr) {
        match attr {
            Ok(attr) => reply.attr(&self.ttl, &convert::attr(&attr)),
            Err(e) => reply.error(e),
        }
    }
}
