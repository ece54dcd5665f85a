//! What the union over FUSE may leave in the layer of an active snapshot: directories that were renamed,
//! of which a lower layer still has the contents.
//!
//! Only that engine shows them. Before any other gets the snapshot, and before the layer is taken for
//! the difference to its parents, they are completed: see `union::settle`. Whether there may be any says
//! a marker in the union's own work directory, which is there before the first of them.
//!
//! What a mount holds back of writes is also the union's: it is written to the layer before that is read.

use super::Store;
use super::hold::Hold;
use super::metadata::Row;
use super::snapshot::Kind;
use crate::driver::write_back;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::progress::ProgressFn;
use crate::sys::dir::Dir;
use crate::sys::lock::Sharing;

impl Store {
    /// Whether the layer may refer to layers below it by directories that were renamed.
    pub(super) fn needs_settling(&self, row: &Row) -> Result<bool> {
        if row.info.kind != Kind::Active || row.settled {
            return Ok(false);
        }
        let at = self.layout.redirect_marker(row.id)?;
        let Some((last, dirs)) = at.names.split_last() else { return Ok(false) };
        let mut dir: Dir = match self.layout.snapshot_dir(row.id) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            dir => dir?,
        };
        for name in dirs {
            dir = match dir.open_dir(name) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
                opened => opened.at("look for renamed directories in", &at.path)?,
            };
        }
        let found = dir.try_stat_at(last).at("look for renamed directories in", &at.path)?;
        Ok(found.is_some())
    }

    /// Completes what needs the layers below, of a snapshot that nobody has mounted.
    #[cfg(feature = "fuse")]
    pub(super) fn complete(
        &self,
        row: &Row,
        _hold: &Hold,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        use crate::driver::{MountOptions, own_work};
        use crate::fuse::{Transport, View, ViewUpper};
        use crate::sys::mount::Attributes;

        let request = self.request(row, &MountOptions::default())?;
        let upper = match request.upper {
            Some(upper) => Some(ViewUpper { dir: upper.dir, work: upper.work, own: own_work()? }),
            None => None,
        };
        let view = View {
            lowers: request.lower,
            upper,
            format: request.format,
            volatile: false,
            attributes: Attributes::default(),
            transport: Transport::Direct,
        };
        let settled = crate::union::settle(view.spec()?, progress).map_err(|e| {
            e.context(format!("directories renamed in {:?} cannot be completed", row.info.key))
        })?;
        tracing::debug!(?settled, key = row.info.key, "renamed directories are complete");
        Ok(())
    }

    #[cfg(not(feature = "fuse"))]
    pub(super) fn complete(
        &self,
        row: &Row,
        _hold: &Hold,
        _progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "directories were renamed in {:?}, and only a build with the feature `fuse` can \
                 complete them: settle it with such",
                row.info.key
            ),
        ))
    }

    /// Makes the layer say what the snapshot shows, as far as the union over FUSE has left that open.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if directories were renamed in it and it is in use.
    pub(super) fn catch_up(&self, row: &Row, progress: &mut ProgressFn<'_>) -> Result<()> {
        if row.info.kind != Kind::Active || row.settled {
            return Ok(());
        }
        self.write_back(row)?;
        if !self.needs_settling(row)? {
            return Ok(());
        }
        match self.try_hold(row.id, Sharing::Exclusive)? {
            Some(hold) if self.not_mounted(row).is_ok() => self.complete(row, &hold, progress),
            _ => Err(renamed_and_in_use(row)),
        }
    }

    /// As [`Store::catch_up`], of a snapshot that the caller holds, or cannot hold.
    pub(super) fn catch_up_held(
        &self,
        row: &Row,
        hold: Option<&Hold>,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        self.write_back(row)?;
        if !self.needs_settling(row)? {
            return Ok(());
        }
        match hold {
            Some(hold) if self.not_mounted(row).is_ok() => self.complete(row, hold, progress),
            _ => Err(renamed_and_in_use(row)),
        }
    }

    /// Has what was written to mounts of the snapshot, and is still with the kernel, written to its layer.
    fn write_back(&self, row: &Row) -> Result<()> {
        for (_, mount) in self.rows()? {
            if mount.snapshot == row.id
                && let Some(identity) = &mount.identity
            {
                write_back(&mount.target(), identity)?;
            }
        }
        Ok(())
    }
}

fn renamed_and_in_use(row: &Row) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "directories were renamed in {:?}, whose contents must be copied into its layer first, and \
             that cannot be done while it is in use: unmount it, and try again",
            row.info.key
        ),
    )
}
