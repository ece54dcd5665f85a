//! What the union over FUSE may leave in the layer of an active snapshot: directories that were renamed,
//! of which a lower layer still has the contents, files of which only attributes were changed, whose data
//! are there, and files of which some names are there.
//!
//! Only that engine shows them. Before any other gets the snapshot, and before the layer is taken for
//! the difference to its parents, they are completed: see `union::settle`. Whether there may be any say
//! markers in the union's own work directory, which are there before the first of them. Files can be
//! completed while the snapshot is mounted, by whoever serves the mount.
//!
//! What a mount holds back of writes is also the union's: it is written to the layer before that is read.

use super::hold::Hold;
use super::metadata::Row;
use super::snapshot::Kind;
use super::{Store, layout};
use crate::driver::{WriteBack, write_back};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::progress::ProgressFn;
use crate::sys::dir::Dir;
use crate::sys::lock::Sharing;

/// What in a layer may refer to layers below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refers {
    Nothing,
    /// Files, whose data or further names are there.
    Files,
    /// Directories that were renamed, and perhaps files.
    Directories,
}

impl Store {
    /// Whether the layer may refer to layers below it.
    pub(super) fn needs_settling(&self, row: &Row) -> Result<bool> {
        Ok(self.refers_below(row)? != Refers::Nothing)
    }

    /// By what the layer may refer to layers below it.
    pub(super) fn refers_below(&self, row: &Row) -> Result<Refers> {
        if row.info.kind != Kind::Active || row.settled {
            return Ok(Refers::Nothing);
        }
        let at = self.layout.union_state(row.id)?;
        let mut dir: Dir = match self.layout.snapshot_dir(row.id) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Refers::Nothing),
            dir => dir?,
        };
        for name in &at.names {
            dir = match dir.open_dir(name) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Refers::Nothing),
                opened => opened.at("look for the markers of the union in", &at.path)?,
            };
        }
        for (marker, refers) in [
            ("redirected", Refers::Directories),
            ("metacopy", Refers::Files),
            ("linked", Refers::Files),
        ] {
            let found = dir.try_stat_at(&layout::name(marker)?);
            if found.at("look for the markers of the union in", &at.path)?.is_some() {
                return Ok(refers);
            }
        }
        Ok(Refers::Nothing)
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
        use crate::idmap::IdMap;
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
            owners: request.owners,
            uids: IdMap::default(),
            gids: IdMap::default(),
            volatile: false,
            attributes: Attributes::default(),
            transport: Transport::Direct,
        };
        let settled = crate::union::settle(view.spec()?, progress).map_err(|e| {
            e.context(format!(
                "renamed directories and files without data in {:?} cannot be completed",
                row.info.key
            ))
        })?;
        tracing::debug!(?settled, key = row.info.key, "the layer stands on its own");
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
                "directories or files in {:?} have their contents in lower layers, and only a build with \
                 the feature `fuse` can complete them: settle it with such",
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
        // Also if there is nothing yet: while the layer is read nothing of the kind may come.
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
        // Whatever comes later from a mount belongs to a layer that stands on its own.
        self.write_back(row)?;
        if !self.needs_settling(row)? {
            return Ok(());
        }
        match hold {
            Some(hold) if self.not_mounted(row).is_ok() => self.complete(row, hold, progress),
            _ => Err(renamed_and_in_use(row)),
        }
    }

    /// Has what belongs to mounts of the snapshot written to its layer.
    fn write_back(&self, row: &Row) -> Result<()> {
        for (_, mount) in self.rows()? {
            if mount.snapshot == row.id
                && let Some(identity) = &mount.identity
            {
                write_back(&mount.target(), identity, WriteBack::AllData)?;
            }
        }
        Ok(())
    }
}

fn renamed_and_in_use(row: &Row) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "directories were renamed in {:?}, or files there have no data of their own; that must be \
             copied into its layer first, and cannot be while it is in use: unmount it, and try again",
            row.info.key
        ),
    )
}
