//! The fence: the only place with `unsafe`, and the only importer of rustix, nix and libc.
//!
//! Calls take `AsFd` or a [`dir::Dir`] and a [`Name`](crate::Name), and give `OwnedFd` and
//! `std::io::Result`; the caller adds what was tried and on what.
#![allow(unsafe_code)]
#![cfg_attr(not(feature = "fuse"), allow(dead_code, reason = "much is for the union alone"))]

#[cfg(feature = "fuse")]
pub(crate) mod confine;
pub(crate) mod copy;
pub(crate) mod daemon;
pub(crate) mod dir;
pub(crate) mod errno;
pub(crate) mod file;
pub(crate) mod fs_features;
pub(crate) mod fuse;
pub(crate) mod groups;
pub(crate) mod idmapped;
#[cfg(test)]
pub(crate) mod intercept;
pub(crate) mod lock;
pub(crate) mod memory;
pub(crate) mod mount;
#[cfg(feature = "fuse")]
pub(crate) mod mount_tree;
pub(crate) mod mountinfo;
#[cfg(feature = "fuse")]
pub(crate) mod namespace;
pub(crate) mod override_stat;
pub(crate) mod owners;
pub(crate) mod process;
pub(crate) mod remove;
pub(crate) mod resolve;
#[cfg(feature = "fuse")]
mod seccomp;
#[cfg(feature = "fuse")]
pub(crate) mod signals;
pub(crate) mod socket;
pub(crate) mod stat;
pub(crate) mod umask;
pub(crate) mod userns;
pub(crate) mod wait;
pub(crate) mod xattr;
mod xattr_at;
