//! Layered copy-on-write snapshots for container runtimes.
//!
//! # From the top
//!
//! - [`Store`] is a directory of snapshots. *Committed* ones are immutable layers on top of one
//!   another; an *active* one is writable, on top of a committed one; a *view* is read-only. The
//!   contract is that of containerd's snapshotters: prepare, commit, view, remove, stat, update,
//!   usage, walk, cleanup.
//! - [`Mount`] is what must be mounted to see a snapshot, as plain data for whoever mounts, and
//!   [`Guard`] a mount that this process made and that ends with it. A [`Driver`] makes mounts: of the
//!   kernel's overlayfs; of this crate's own union over FUSE, which ordinary users can have, too; or of
//!   copies, which can also be used without any mount ([`Store::activate_in_place`]).
//! - [`ImageLayout`] is a directory or tar file with OCI images: [`import_image`] takes them into a
//!   store, [`save_image`] out of it.
//! - With the feature `fuse`, `rootless` starts programs in namespaces in which an ordinary user may mount, and
//!   `container` runs a command on a mounted snapshot.
//!
//! A layer on disk is what overlayfs makes of it, a delta with whiteouts ([`LayerFormat`]); outside it
//! is a tar archive, which [`Store::apply`] and [`Store::export`] translate from and to. What came from
//! an archive goes out as that archive, byte for byte ([`ArchiveForm`]). Any two snapshots, or
//! directories, can be compared, and the difference packed as a layer ([`Store::export_between`],
//! [`export_diff`]).
//! Layer directories that other union file systems wrote come in by [`Store::adopt`].
//!
//! # Layers, a writable snapshot, its changes
//!
//! ```
//! use stratafs::{ApplyOptions, CommitOptions, ExportOptions, Labels, Store, StoreOptions};
//! # let dir = std::env::temp_dir().join(format!("stratafs-crate-doc-{}", std::process::id()));
//! # let mut options = StoreOptions::new();
//! # options.format = Some(stratafs::LayerFormat::Aufs);
//! # let root = dir.join("store");
//! # let layer_tar: &[u8] = &[];
//! # let stop = &mut stratafs::ignore_progress;
//!
//! let store = Store::open(&root, options)?;
//! // From a tar, compressed or not, to a committed layer; nothing is seen of it before it is whole.
//! let mut input = layer_tar;
//! store.apply("base", None, &mut input, &ApplyOptions::default(), Labels::new(), stop)?;
//! // A writable snapshot on top; `store.mounts` or `store.activate` would make it usable.
//! store.prepare("container-1", Some("base"), Labels::new())?;
//! for change in store.changes("container-1", stop)? {
//!     println!("{change}");
//! }
//! store.commit("edited", "container-1", CommitOptions::new())?;
//! let mut tar = Vec::new();
//! store.export("edited", &mut tar, &ExportOptions::default(), stop)?;
//! # std::fs::remove_dir_all(&dir).unwrap();
//! # Ok::<(), stratafs::Error>(())
//! ```
//!
//! # A mount that ends with its guard
//!
//! ```no_run
//! # use std::path::Path;
//! # use stratafs::{Labels, MountOptions, Store, StoreOptions};
//! # let store = Store::open("/var/lib/stratafs", StoreOptions::new())?;
//! let mut guard = store.activate("container-1", Path::new("/mnt"), &MountOptions::default())?;
//! std::fs::write(guard.target().join("hello"), "written to the upper layer").unwrap();
//! guard.unmount()?; // dropping it would unmount too, and log a failure instead of giving it
//! # Ok::<(), stratafs::Error>(())
//! ```
//!
//! # A mount that outlives its process
//!
//! Mounts over FUSE are served by a process: this one, or a helper.
//!
//! ```no_run
//! # #[cfg(feature = "fuse")]
//! # fn main() -> Result<(), stratafs::Error> {
//! # use std::path::Path;
//! # use stratafs::{DriverChoice, FuseServer, MountOptions, Store, StoreOptions, helper};
//! helper::run_if_requested(); // first in main
//! let mut options = StoreOptions::new();
//! options.driver = DriverChoice::Fuse;
//! options.fuse_server = FuseServer::Helper(helper::HelperCommand::CurrentExe);
//! let store = Store::open("/var/lib/stratafs", options)?;
//! store.activate("container-1", Path::new("/mnt"), &MountOptions::default())?.leave()?;
//! // ... and later, in any process:
//! store.deactivate(Path::new("/mnt"))?;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "fuse"))]
//! # fn main() {}
//! ```
//!
//! # An image in, an image out
//!
//! ```no_run
//! # use stratafs::*;
//! # let store = Store::open("/var/lib/stratafs", StoreOptions::new())?;
//! let layout = ImageLayout::open("busybox.oci.tar")?;
//! let options = ImportOptions::new();
//! let image = import_image(&store, &layout, "busybox", &options, &mut ignore_progress)?;
//! store.prepare("container-1", image.layers.last().map(String::as_str), Labels::new())?;
//! // ... and after a commit as "edited":
//! let out = LayoutWriter::to_tar_file("edited.oci.tar", "/var/tmp")?;
//! save_image(&store, "edited", out, &SaveOptions::new(), &mut ignore_progress)?;
//! # Ok::<(), stratafs::Error>(())
//! ```
//!
//! # Owners
//!
//! Who may not give files away (no CAP_CHOWN) gets a store that keeps owners, modes and devices in xattrs
//! ([`Owners::InXattrs`]), as containers/storage does. Nothing that an image says is lost in it; every file is
//! that user's own, none is setuid or a device; the union over FUSE and copies show it, the kernel's overlayfs does
//! not.
//!
//! # What it promises
//!
//! - A call that returned is on disk; a crash at any moment leaves the store as it was before or
//!   after each call, never between ([`Durability`] can switch the waiting off).
//! - Archives and images are hostile: nothing leaves the layer's root, all is bounded, digests are
//!   verified before anything is seen.
//! - Names are bytes ([`Name`], [`RelPath`]). No call panics, prints, reads the environment, or
//!   touches the process's umask, working directory or signals.
//! - Calls block. Long ones take a callback ([`ProgressFn`]) that is told of progress and can stop
//!   them. [`Store`] and [`Guard`] are `Send + Sync`.
//!
//! # Features
//!
//! | feature | default | |
//! |---|---|---|
//! | `fuse` | yes | the union over FUSE, helper processes, namespaces and containers |
//! | `zstd` | yes | layers compressed with zstd |
//! | `bundled-sqlite` | yes | builds SQLite in; else the system's is linked |
//! | `cli` | no | the programs `stratafs` and, with `fuse`, `stratafs-fuse` |
#![deny(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![deny(clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs, missing_debug_implementations, unreachable_pub)]

mod adopt;
mod archive;
mod changes;
mod compression;
#[cfg(feature = "fuse")]
pub mod container;
mod digest;
mod driver;
mod error;
#[cfg(feature = "fuse")]
mod fuse;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "fuse")]
pub mod helper;
mod idmap;
mod image;
mod layer;
mod path;
mod progress;
#[cfg(feature = "fuse")]
pub mod rootless;
mod store;
mod sys;
mod tree;
#[cfg(feature = "fuse")]
mod union;

pub use adopt::{AdoptOptions, AdoptReport, Adopted, Finding, OtherMarks, OverrideStats};
pub use archive::{
    Applied, ApplyLimits, ApplyOptions, ArchiveForm, Devices, ExportOptions, Exported, LayerTarget,
    Ownership, RecordOptions, SecurityLabels, UnionXattrs, XattrPolicy, apply_layer, diff_trees,
    export_diff,
};
#[doc(hidden)]
pub use archive::{ListedEntry, list_archive};
pub use changes::{Change, ChangeKind};
pub use compression::Compression;
pub use digest::{ChainId, DiffId, Digest};
#[doc(hidden)]
pub use driver::Rung;
pub use driver::{
    CopyDriver, Driver, Feature, Guard, MAX_LAYERS, Mount, MountIdentity, MountOptions,
    MountRequest, MountState, NamespaceId, OverlayDriver, Probe, ProbeTarget, Restrictions, Shown,
    UpperDir, Visibility, unmount_at,
};
#[cfg(feature = "fuse")]
pub use driver::{
    FuseDriver, FuseLayer, FuseMount, FuseMountOptions, FuseServer, FuseUnmounter, settle_upper,
};
#[cfg(feature = "fuse")]
#[doc(hidden)]
pub use driver::{
    end_unseen_server, fuse_privileges, is_of_containers_storage, leave_terminal,
    nobody_sees_the_mount_on,
};
pub use error::{Error, ErrorKind, Result};
pub use idmap::{IdRange, ShownIds};
pub use image::{
    BlobWriter, Image, ImageLayer, ImageLayout, ImageSelector, ImportOptions, LayoutWriter,
    Platform, SaveOptions, SavedImage, import_image, save_image,
};
pub use layer::{ForeignFormat, LayerFormat, Usage};
pub use path::{NAME_MAX, Name, RelPath};
pub use progress::{Phase, Progress, ProgressFn, ignore_progress};
pub use store::{
    CheckReport, CommitOptions, DriverChoice, Durability, Filter, GcReport, ImageRecord, Info,
    Kind, Labels, Problem, RecordState, Store, StoreOptions,
};
#[doc(hidden)]
pub use store::{DurablePoint, DurablePointHook};
pub use sys::owners::Owners;
#[cfg(feature = "fuse")]
pub use union::Settled;

/// The types of the OCI specifications, re-exported on purpose: [`Image::configuration`] gives one of
/// them, and an embedder should not have to guess which version of the crate they are of.
pub use oci_spec;
