//! The union over FUSE: requests of the kernel decoded, carried out by the union, and answered.
//!
//! The only importer of fuser.

mod capabilities;
mod convert;
mod filesystem;
mod latch;
mod session;

pub(crate) use session::{Session, SessionOptions, Transport};
