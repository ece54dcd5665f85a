//! The union over FUSE: requests of the kernel decoded, carried out by the union, and answered.
//!
//! The only importer of fuser.

mod busy_poll;
mod capabilities;
mod convert;
mod filesystem;
mod latch;
mod reply;
mod requests;
mod session;
mod union_fs;
pub(crate) mod unseen;
mod view;

pub(crate) use busy_poll::BUSY_POLL;
pub(crate) use session::{Mounted, Session, SessionOptions, Transport};
pub(crate) use view::{View, ViewUpper, lock_work};
