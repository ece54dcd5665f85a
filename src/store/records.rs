//! Records: what it takes to give a layer's archive back, byte for byte.
//!
//! A record stands beside its layer, in `snapshots/<id>/record`: it is made in staging with the
//! layer, published by the same rename, on disk by the same sync, and gone with the same removal. So
//! there is never one without its layer, and no other snapshot's removal can take it: that, for a
//! few megabytes more where two chains have the same layer.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use super::metadata::Row;
use super::{Store, layout};
use crate::archive::record::{self, Capture, Captured};
use crate::archive::{Applied, ApplyOptions, ArchiveForm, Exported};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::path::Name;
use crate::progress::ProgressFn;
use crate::sys::dir::Dir;

fn file_name() -> Result<Name> {
    layout::name("record")
}

/// Begins the record of an archive that is unpacked into the snapshot.
pub(super) fn capture(snapshot: &Dir, options: &ApplyOptions) -> Result<Mutex<Capture>> {
    Capture::new(snapshot, file_name()?, options.record).map(Mutex::new)
}

/// Finishes it; the reason if there is none.
pub(super) fn finish(capture: Mutex<Capture>, applied: &Applied) -> Result<Option<String>> {
    let capture = capture.into_inner().unwrap_or_else(PoisonError::into_inner);
    match capture.finish(applied.diff_id, applied.unpacked_bytes, applied.entries)? {
        Captured::Record => Ok(None),
        Captured::Nothing(reason) => Ok(Some(reason)),
    }
}

impl Store {
    /// Gives back the archive that the layer of `row` was unpacked from.
    pub(super) fn replay(
        &self,
        row: &Row,
        out: &mut dyn Write,
        threads: usize,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Exported> {
        let at = self.layout.snapshot_path(row.id, "record");
        let Some(diff_id) = row.info.diff_id else {
            let text = format!("snapshot {:?} was not unpacked from an archive", row.info.key);
            return Err(Error::new(ErrorKind::FailedPrecondition, text));
        };
        let record = match self.layout.snapshot_dir(row.id)?.open_file(&file_name()?) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "the record of the layer's archive is gone: import the layer again, or export \
                     it in the canonical form",
                )
                .with_path(at));
            }
            record => record.at("open record", &at)?,
        };
        let layer = self.layout.layer_dir(row.id)?;
        let replayed = record::replay(&record, &layer, diff_id, out, threads, progress)?;
        Ok(Exported {
            diff_id,
            bytes: replayed.bytes,
            entries: replayed.entries,
            sockets: 0,
            form: ArchiveForm::AsImported,
        })
    }
}
