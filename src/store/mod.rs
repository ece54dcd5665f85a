//! The store: the facade that embedders use, over snapshots, their metadata and their mounts.
//!
//! # How an operation becomes durable
//! The files are made in `staging/` -> an intent row gives the id (lazily: it may be lost) -> they are
//! renamed into `snapshots/<id>` -> the file system is synced, data and names in one -> the row is committed.
//! A directory without a row is garbage; a row without its directory never happens. Removal goes the
//! other way: the row first, then the files. So prepare and commit wait for the disk twice, remove
//! once.
//!
//! # Locks, in the order in which they are taken
//! 1. the root directory's: while a store is opened or created;
//! 2. `staging/`'s: shared while an entry is made, exclusive while abandoned ones are looked for;
//! 3. a snapshot directory's (`hold`): exclusive while it is made, mounted, committed or removed,
//!    shared while something long is made on top of it; and, if it is used as a tree, that of its
//!    `work` directory while the layer is brought up to date (`trees`);
//! 4. `blobs/sha256`'s: shared while an image is written, exclusive while unused blobs are removed;
//! 5. the database's, last and shortest: no file is touched under it.
//!
//! Locks 1 and 2 are waited for, and 4 when it is shared; who finds another taken gives
//! [`ErrorKind::Busy`].

mod activate;
mod adopt;
mod blobs;
mod check;
mod commit;
mod content;
mod durability;
mod filter;
mod gc;
mod hold;
mod images;
mod kept;
mod labels;
mod layout;
mod metadata;
mod mount_rows;
mod prepare;
mod records;
mod redirects;
mod remove;
mod snapshot;
mod staging;
mod trees;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::driver::{CopyDriver, Driver, OverlayDriver};
#[cfg(feature = "fuse")]
use crate::driver::{FuseDriver, FuseServer};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::LayerFormat;
use crate::sys::fs_features;
use crate::sys::owners::Owners;

pub use check::{CheckReport, Problem};
pub(crate) use content::Expected;
pub use durability::{Durability, DurablePoint, DurablePointHook};
pub(crate) use filter::Fields;
pub use filter::Filter;
pub use gc::GcReport;
pub use images::ImageRecord;
pub(crate) use kept::Keeping;
pub(crate) use snapshot::check_key;
pub use snapshot::{CommitOptions, Info, Kind, Labels, RecordState};

use durability::Waits;
use layout::Layout;
use metadata::{Journal, Metadata, Sync, Tx};

/// How a store is opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StoreOptions {
    /// Whether to create the store where there is none; the default is true.
    pub create: bool,
    /// The format of a new store's layers, and what an existing store must have. The default, none,
    /// is [`LayerFormat::OverlayTrusted`] for new stores where this process may use it, else
    /// [`LayerFormat::OverlayUser`]; existing stores have the one they were made with.
    pub format: Option<LayerFormat>,
    /// Where a new store keeps the owners, modes and devices of files, and what an existing store must have.
    /// The default, none, is for new stores that of a process that may give files away (CAP_CHOWN, and all ids
    /// up to 65535): with the files; for any other in xattrs ([`Owners::InXattrs`]), so that nothing is lost of
    /// what an image says. Only this crate's engines over FUSE and by copies show such a store.
    pub owners: Option<Owners>,
    /// Whether calls wait until the disk has what they did; the default is that they do.
    pub durability: Durability,
    /// Where rows of mounts are kept; the default, none, is `run` in the store. Give a directory that
    /// is empty after a reboot, such as one in `/run`, and the same to every process.
    pub run_dir: Option<PathBuf>,
    /// How long to wait for another process's transaction; the default is 10 seconds.
    pub busy_timeout: Duration,
    /// The engine that mounts; the default picks one.
    pub driver: DriverChoice,
    /// Who serves mounts over FUSE; the default is this process.
    #[cfg(feature = "fuse")]
    pub fuse_server: FuseServer,
    #[doc(hidden)]
    pub on_durable_point: Option<DurablePointHook>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            create: true,
            format: None,
            owners: None,
            durability: Durability::Full,
            run_dir: None,
            busy_timeout: Duration::from_secs(10),
            driver: DriverChoice::Auto,
            #[cfg(feature = "fuse")]
            fuse_server: FuseServer::InProcess,
            on_durable_point: None,
        }
    }
}

impl StoreOptions {
    /// The defaults.
    pub fn new() -> Self {
        StoreOptions::default()
    }

    fn drivers(&self, owners: Owners) -> Vec<Box<dyn Driver>> {
        #[cfg(feature = "fuse")]
        let drivers = self.driver.drivers_served_by(&self.fuse_server);
        #[cfg(not(feature = "fuse"))]
        let drivers = self.driver.drivers();
        self.driver.fitting(drivers, owners)
    }
}

/// Which engine mounts snapshots.
///
/// All engines work on one format: a snapshot may be used with one, and with another when it is no
/// longer mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DriverChoice {
    /// The best that works: the kernel's overlayfs; where that may not be mounted, or cannot serve the
    /// store, as one that keeps owners in xattrs, the union of this crate over FUSE; and for a store or kernel that neither can serve
    /// whatever rights this process had, copies, with a warning in the log. A snapshot that stands as
    /// a copy already is used as one.
    ///
    /// A process that merely may not mount gets no copies unasked: to copy a whole image for every
    /// container is what fills disks unseen, and a copy could not be mounted either. It is told of
    /// them, and can ask: by [`Store::activate_in_place`], or by choosing the driver.
    #[default]
    Auto,
    /// The kernel's overlayfs.
    Overlay,
    /// The union file system of this crate, over FUSE.
    #[cfg(feature = "fuse")]
    Fuse,
    /// A copy of all that a snapshot shows.
    Copy,
}

impl DriverChoice {
    /// New engines, in the order in which they are tried.
    pub fn drivers(self) -> Vec<Box<dyn Driver>> {
        #[cfg(feature = "fuse")]
        return self.drivers_served_by(&FuseServer::InProcess);
        #[cfg(not(feature = "fuse"))]
        match self {
            DriverChoice::Auto => vec![Box::new(OverlayDriver::new()), Box::new(CopyDriver::new())],
            DriverChoice::Overlay => vec![Box::new(OverlayDriver::new())],
            DriverChoice::Copy => vec![Box::new(CopyDriver::new())],
        }
    }

    /// The same for a store that keeps owners so: [`DriverChoice::Auto`] is none that cannot show them.
    pub fn drivers_for(self, owners: Owners) -> Vec<Box<dyn Driver>> {
        self.fitting(self.drivers(), owners)
    }

    fn fitting(self, mut drivers: Vec<Box<dyn Driver>>, owners: Owners) -> Vec<Box<dyn Driver>> {
        if self == DriverChoice::Auto {
            drivers.retain(|driver| driver.reads_owners(owners));
        }
        drivers
    }

    #[cfg(feature = "fuse")]
    fn drivers_served_by(self, server: &FuseServer) -> Vec<Box<dyn Driver>> {
        let overlay = || Box::new(OverlayDriver::new());
        let fuse = || Box::new(FuseDriver::served_by(server.clone()));
        let copy = || Box::new(CopyDriver::new());
        match self {
            DriverChoice::Auto => vec![overlay(), fuse(), copy()],
            DriverChoice::Overlay => vec![overlay()],
            DriverChoice::Fuse => vec![fuse()],
            DriverChoice::Copy => vec![copy()],
        }
    }
}

/// A store of snapshots in a directory.
///
/// Several processes, and several handles in one, may use the same store at once. A handle may be
/// shared between threads; it must not be used across a fork.
#[derive(Debug)]
pub struct Store {
    layout: Layout,
    metadata: Metadata,
    waits: Waits,
    /// Never empty.
    drivers: Vec<Box<dyn Driver>>,
    /// Which of the drivers is the first that can serve this store; none until somebody must know.
    able: OnceLock<usize>,
    run_dir: PathBuf,
}

impl Store {
    /// Opens the store in the directory `root`, and creates it if there is none and the options allow.
    /// What a crash left half done is swept away, as far as no living process is at it.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`]: there is none, and it was not to be created.
    /// - [`ErrorKind::FailedPrecondition`]: the directory holds other things.
    /// - [`ErrorKind::Incompatible`]: written by a newer version, or its marks cannot be read by this
    ///   process, on this file system.
    /// - [`ErrorKind::Corrupt`], [`ErrorKind::Busy`], [`ErrorKind::NoSpace`], [`ErrorKind::ReadOnly`].
    pub fn open(root: impl AsRef<Path>, options: StoreOptions) -> Result<Store> {
        let (layout, lock) =
            Layout::open(root.as_ref(), options.create, (options.format, options.owners))?;
        let database = layout.path.join("metadata.db");
        let file_system = fs_features::file_system_name(&layout.root)
            .at("find the file system of", &layout.path)?;
        let journal = Journal::on(&file_system);
        let open = || Metadata::open(&database, options.busy_timeout, journal);
        let metadata = match open() {
            // SQLite needs a little room even to read.
            Err(e) if e.kind() == ErrorKind::NoSpace || e.kind() == ErrorKind::Io => {
                if !layout.release_reserve()? {
                    return Err(e);
                }
                open()?
            }
            opened => opened?,
        };
        layout.fill_reserve()?;
        let drivers = options.drivers(layout.owners);
        let run_dir = options.run_dir.unwrap_or_else(|| layout.path.join("run"));
        drop(lock);
        let waits = Waits { durability: options.durability, hook: options.on_durable_point };
        let able = OnceLock::new();
        let store = Store { layout, metadata, waits, drivers, able, run_dir };
        match store.sweep() {
            // A full or read-only disk is no reason not to open: `remove` must work.
            Err(e) if matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::ReadOnly) => {
                tracing::warn!(error = %e, "leftovers of interrupted operations are not swept");
            }
            done => done?,
        }
        Ok(store)
    }

    /// The directory, made absolute.
    pub fn root(&self) -> &Path {
        &self.layout.path
    }

    /// The format of the store's layers.
    pub fn format(&self) -> LayerFormat {
        self.layout.format
    }

    /// Where the store keeps owners.
    pub fn owners(&self) -> Owners {
        self.layout.owners
    }

    /// A durable change of the metadata; on a full disk the reserve is given up for it.
    fn durably<T>(&self, change: impl Fn(&Tx<'_>) -> Result<T>) -> Result<T> {
        let attempt = || self.waits.transaction(&self.metadata, &change);
        match attempt() {
            Err(e) if e.kind() == ErrorKind::NoSpace && self.layout.release_reserve()? => attempt(),
            done => done,
        }
    }

    /// A change of the metadata that may be lost with the power.
    fn lazily<T>(&self, change: impl FnOnce(&Tx<'_>) -> Result<T>) -> Result<T> {
        self.metadata.write(Sync::Lazy, change)
    }
}

/// The error for a snapshot of the wrong kind.
fn wrong_kind(info: &Info, needed: &str) -> Error {
    Error::new(
        ErrorKind::FailedPrecondition,
        format!("{:?} is {} snapshot: {needed}", info.key, info.kind.with_article()),
    )
}
