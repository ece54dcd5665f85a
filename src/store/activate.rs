//! Mounts of snapshots: as plain data, and made by this store.
//!
//! A snapshot that this store mounted is held: by the lock of its directory while the guard lives, and
//! by a row ([`mount_rows`](super::mount_rows)) for as long as the mount itself stands, also after the
//! guard was left or its process died.
//!
//! A tree that is used in place, without a mount, has a row too, which stands for as long as that use
//! lasts: the guard, or whoever deactivates it, removes the row.

use std::path::Path;

use super::hold::{Hold, held};
use super::metadata::Row;
use super::mount_rows::{Kept, MountRow, remove_if_gone, remove_row, write_row};
use super::snapshot::Kind;
use super::staging::Staged;
use super::{Store, wrong_kind};
use crate::driver::{
    Driver, Guard, Mount, MountOptions, MountRequest, ProbeTarget, Shown, UpperDir, WriteBack,
    unmount_at, write_back,
};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::marks;
use crate::progress::ignore_progress;
use crate::sys::userns;

impl Store {
    /// The drivers that show snapshots, as [`DriverChoice`](crate::DriverChoice) has them: the first
    /// that works. There is at least one.
    pub fn drivers(&self) -> impl Iterator<Item = &dyn Driver> {
        self.drivers.iter().map(AsRef::as_ref)
    }

    /// What must be mounted to see the snapshot, as plain data, to be mounted by anybody. The same
    /// for every call. What is mounted so is the caller's affair: the store does not know of it. With a
    /// driver that copies, the copy is made now.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`].
    /// - [`ErrorKind::FailedPrecondition`]: a committed snapshot; make a view of it.
    /// - [`ErrorKind::LimitExceeded`]: more layers than the driver can mount.
    pub fn mounts(&self, key: &str, options: &MountOptions) -> Result<Vec<Mount>> {
        let mut row = self.mountable(key)?;
        let request = self.request(&row, options)?;
        let driver = self.driver_for(&row, &request)?;
        let mounts = driver.mounts(&request)?;
        let mut _hold = None;
        if !self.is_ready(&row, &request, driver, Shown::Mounted)? {
            let (held, hold) = self.hold_unmounted(key, &row)?;
            row = held;
            let stop = &mut ignore_progress;
            self.make_ready_for(&row, &request, driver, Shown::Mounted, &hold, stop)?;
            row = self.mountable(key)?;
            _hold = Some(hold);
        }
        self.unsettle(&row)?;
        if !row.handed_out {
            // Lost with the power, as are the mounts.
            self.lazily(|tx| tx.set_handed_out(row.id))?;
        }
        Ok(mounts)
    }

    /// Mounts the snapshot at the directory `target`, until the guard is dropped or unmounted.
    ///
    /// # Errors
    /// - As [`Store::mounts`].
    /// - [`ErrorKind::Busy`]: it is mounted already, or another operation is at it.
    /// - [`ErrorKind::PermissionDenied`], [`ErrorKind::Unsupported`]: the driver cannot mount here;
    ///   the message says why.
    pub fn activate(&self, key: &str, target: &Path, options: &MountOptions) -> Result<Guard> {
        let (row, hold) = self.hold_unmounted(key, &self.mountable(key)?)?;
        let target = target.canonicalize().at("find the mount point", target)?;
        let mut request = self.request(&row, options)?;
        request.lock = Some(hold.share()?);
        let mount = |driver: &dyn Driver, row: &Row, path: &Path| {
            let mut mount = MountRow::new(row.id, &target);
            mount.served = driver.is_served();
            mount.helper = driver.has_helpers();
            mount.private = options.private;
            mount.of_user =
                !userns::is_initial().at("identify the user namespace", "/proc/self/ns/user")?;
            write_row(path, &mount)?;
            let guard = match driver.activate(&request, &target) {
                Ok(guard) => guard,
                Err(e) => {
                    remove_row(path)?;
                    return Err(e);
                }
            };
            // From here on a failure drops the guard, which unmounts.
            mount.identity = Some(guard.identity().clone());
            write_row(path, &mount)?;
            Ok(guard)
        };
        self.show(key, row, hold, &request, Shown::Mounted, mount)
    }

    /// Gives the snapshot as a plain directory, [`Guard::target`], without mounting anything: what an
    /// ordinary user can do. A copy of all that the snapshot shows is made there, unless it is one
    /// already. Until the guard is dropped or its use is ended otherwise the snapshot counts as
    /// mounted; files that are still open then are nobody's.
    ///
    /// Nothing keeps the owner of the store from writing to a view's copy; that changes no layer.
    ///
    /// ```
    /// use stratafs::{Labels, MountOptions, Store, StoreOptions};
    /// # let dir = std::env::temp_dir().join(format!("stratafs-in-place-{}", std::process::id()));
    /// # let mut options = StoreOptions::new();
    /// # options.format = Some(stratafs::LayerFormat::Aufs);
    /// # let root = dir.join("store");
    ///
    /// let store = Store::open(&root, options)?;
    /// store.prepare("work", None, Labels::new())?;
    /// let mut guard = store.activate_in_place("work", &MountOptions::default())?;
    /// std::fs::write(guard.target().join("hello"), "written to the copy").unwrap();
    /// guard.unmount()?;
    /// # std::fs::remove_dir_all(&dir).unwrap();
    /// # Ok::<(), stratafs::Error>(())
    /// ```
    ///
    /// # Errors
    /// - As [`Store::activate`].
    /// - [`ErrorKind::Unsupported`]: the driver shows snapshots by mounting alone, or the options
    ///   forbid something, which only a mount can.
    /// - [`ErrorKind::NoSpace`]: there is no room for a copy.
    pub fn activate_in_place(&self, key: &str, options: &MountOptions) -> Result<Guard> {
        let (row, hold) = self.hold_unmounted(key, &self.mountable(key)?)?;
        let request = self.request(&row, options)?;
        let use_tree = |driver: &dyn Driver, row: &Row, path: &Path| {
            let guard = driver.activate_in_place(&request, path)?;
            let mut mount = MountRow::new(row.id, guard.target());
            mount.identity = Some(guard.identity().clone());
            write_row(path, &mount)?;
            Ok(guard)
        };
        self.show(key, row, hold, &request, Shown::InPlace, use_tree)
    }

    /// Shows a held snapshot by the first driver that can.
    fn show(
        &self,
        key: &str,
        row: Row,
        hold: Hold,
        request: &MountRequest,
        shown: Shown,
        by: impl Fn(&dyn Driver, &Row, &Path) -> Result<Guard>,
    ) -> Result<Guard> {
        let path = self.row_path(row.id)?;
        let drivers = self.drivers_for(&row)?;
        let last = drivers.len().saturating_sub(1);
        // Of the first driver that could if it were allowed to.
        let mut forbidden: Option<(&str, Error)> = None;
        for (i, driver) in drivers.into_iter().enumerate() {
            if i == last
                && i > 0
                && let Some((name, e)) = forbidden.take()
            {
                return Err(e.context(format!(
                    "the driver {name} may not mount; a copy needs no mount: activate {key:?} in place \
                     (`stratafs mount KEY`, without a directory)"
                )));
            }
            let show = || {
                driver.may_show(request, shown)?;
                let stop = &mut ignore_progress;
                self.make_ready_for(&row, request, driver, shown, &hold, stop)?;
                // Its tree may have been made a layer, and so settled it.
                self.unsettle(&self.mountable(key)?)?;
                by(driver, &row, &path)
            };
            match show() {
                Ok(mut guard) => {
                    let hold = match guard.has_lock() {
                        true => {
                            hold.hand_over();
                            None
                        }
                        false => Some(hold),
                    };
                    guard.hold(Box::new(Kept { row: path, _hold: hold }));
                    return Ok(guard);
                }
                Err(e) if i < last && e.kind() == ErrorKind::Unsupported => {
                    if shown == Shown::Mounted {
                        tracing::warn!("the driver {} does not work: {e}", driver.name());
                    }
                }
                Err(e) if i < last && e.kind() == ErrorKind::PermissionDenied => {
                    tracing::debug!("the driver {} may not: {e}", driver.name());
                    forbidden.get_or_insert((driver.name(), e));
                }
                Err(e) => return Err(e),
            }
        }
        Err(Error::new(ErrorKind::Unsupported, "there is no driver"))
    }

    /// Holds a snapshot that this store has mounted nowhere, and reads it again.
    pub(super) fn hold_unmounted(&self, key: &str, row: &Row) -> Result<(Row, Hold)> {
        let hold = self.try_hold_alone(row)?.ok_or_else(|| held(&row.info))?;
        // It may have been removed or committed before it was held.
        let row = match self.metadata.read(|tx| tx.find(key))? {
            Some(now) if now.id == row.id => now,
            _ => {
                let text = format!("there is no snapshot {key:?} any more");
                return Err(Error::new(ErrorKind::NotFound, text));
            }
        };
        self.sweep_dead_mounts(Some((row.id, &hold)))?;
        self.not_mounted(&row)?;
        Ok((row, hold))
    }

    /// The drivers to try for a snapshot. One that stands as a copy stays one, if no driver was chosen.
    fn drivers_for(&self, row: &Row) -> Result<Vec<&dyn Driver>> {
        let all: Vec<&dyn Driver> = self.drivers().collect();
        match all.split_last() {
            Some((last, [_, ..])) if self.tree_dir(row)?.is_some() => Ok(vec![*last]),
            _ => Ok(all),
        }
    }

    /// The driver whose mounts are given to others: the first that they could mount.
    pub(super) fn driver_for(&self, row: &Row, request: &MountRequest) -> Result<&dyn Driver> {
        let drivers = self.drivers_for(row)?;
        let Some((last, others)) = drivers.split_last() else {
            return Err(Error::new(ErrorKind::Unsupported, "there is no driver"));
        };
        if others.is_empty() {
            return Ok(*last);
        }
        // Whoever mounts them may have rights that this process lacks.
        let unsupported = |e: &Error| e.kind() == ErrorKind::Unsupported;
        let able = *self.able.get_or_init(|| {
            let tried = Staged::new(&self.layout).map(|staged| {
                let dir = self.layout.path.join("staging").join(staged.name());
                let mut target = ProbeTarget::new(dir, self.layout.format);
                target.owners = self.layout.owners;
                let cannot = |driver: &&&dyn Driver| match driver.try_out(&target) {
                    Err(e) if unsupported(&e) => {
                        tracing::warn!("the driver {} does not work: {e}", driver.name());
                        true
                    }
                    _ => false,
                };
                others.iter().take_while(cannot).count()
            });
            tried.unwrap_or(0)
        });
        let rest = drivers.iter().skip(able);
        let mut fit =
            rest.filter(|driver| !driver.mounts(request).as_ref().is_err_and(unsupported));
        Ok(*fit.next().unwrap_or(last))
    }

    /// Unmounts what [`Store::activate`] mounted at `target` and a guard left there; or ends the use of
    /// the copy `target` that [`Store::activate_in_place`] gave. Of a mount that a helper serves, waits until
    /// all that was written is with the layer's file system.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`]: this store has nothing mounted there.
    /// - [`ErrorKind::Busy`]: files in it are open.
    pub fn deactivate(&self, target: &Path) -> Result<()> {
        let target = target.canonicalize().at("find the mount point", target)?;
        for (path, row) in self.rows()? {
            if row.target() == target && !row.is_gone()? {
                if let Some(identity) = &row.identity {
                    write_back(&target, identity, WriteBack::Written)?;
                }
                unmount_at(&target, row.identity.as_ref())?;
                if row.helper {
                    self.wait_until_free(row.snapshot)?;
                }
                return remove_if_gone(&path);
            }
        }
        let text = "this store has mounted nothing at this directory";
        Err(Error::new(ErrorKind::NotFound, text).with_path(target))
    }

    pub(super) fn mountable(&self, key: &str) -> Result<Row> {
        let row = self.metadata.read(|tx| tx.get(key))?;
        match row.info.kind {
            Kind::Active | Kind::View => Ok(row),
            Kind::Committed => Err(wrong_kind(&row.info, "make a view of it to mount it")),
        }
    }

    /// What is handed out may be written to.
    fn unsettle(&self, row: &Row) -> Result<()> {
        if row.settled && row.info.kind == Kind::Active {
            self.durably(|tx| tx.set_settled(row.id, None))?;
        }
        Ok(())
    }

    pub(super) fn request(&self, row: &Row, options: &MountOptions) -> Result<MountRequest> {
        options.ids.check()?;
        let chain = self.metadata.read(|tx| tx.chain(row.id))?;
        let (own, parents) = chain.split_first().ok_or_else(|| held(&row.info))?;
        let fs = |row: &Row| self.layout.snapshot_path(row.id, "fs");
        let upper = (own.info.kind == Kind::Active)
            .then(|| UpperDir { dir: fs(own), work: self.layout.snapshot_path(own.id, "work") });
        let mut request = MountRequest::new(self.layout.format, fs(own));
        request.owners = self.layout.owners;
        for parent in parents {
            request.lower.push(fs(parent));
            // The kernel does not look for the mark of an opaque root.
            if parent.has_marks != Some(false) {
                let layer = self.layout.layer_dir(parent.id)?;
                if marks::is_opaque(self.layout.format, &layer)
                    .at("read the marks of", fs(parent))?
                {
                    break;
                }
            }
        }
        request.upper = upper;
        request.tree = Some(self.layout.snapshot_path(own.id, "tree"));
        // Unless it is known to bear none.
        request.lower_has_marks = parents.first().is_some_and(|p| p.has_marks != Some(false));
        request.options = options.clone();
        Ok(request)
    }
}
