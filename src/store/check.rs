//! Looking for damage.

use std::collections::HashSet;
use std::fmt;

use super::Store;
use super::commit::inspect_layer;
use super::metadata::Row;
use super::snapshot::{Kind, RecordState};
use crate::error::{ErrorKind, Result};
use crate::progress::ProgressFn;

/// Something wrong with a store.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Problem {
    /// What is damaged: a snapshot's or image's name, or a part of the store.
    pub object: String,
    /// What is wrong, and what to do about it.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.what)
    }
}

/// What [`Store::check`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct CheckReport {
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Records of archives that layers were unpacked from, found sound together with their layers.
    pub records: u64,
    /// Images looked at.
    pub images: u64,
    /// Layers kept as they came, read and found sound.
    pub layer_blobs: u64,
    /// What is wrong; none if the store is sound.
    pub problems: Vec<Problem>,
}

impl CheckReport {
    fn add(&mut self, object: impl Into<String>, what: impl Into<String>) {
        self.problems.push(Problem { object: object.into(), what: what.into() });
    }
}

impl Store {
    /// Looks for damage: in the metadata, at the layers (are they there, settled, of the recorded
    /// size, with their marks), at the blobs' digests, those of kept layers too. Of a layer that was
    /// unpacked from an archive every file is read: together with the record it must give that archive
    /// again. Changes nothing.
    ///
    /// # Errors
    /// Only for what keeps it from looking; damage is in the report.
    pub fn check(&self, progress: &mut ProgressFn<'_>) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        for finding in self.metadata.integrity()? {
            report.add("metadata.db", finding);
        }
        for row in self.metadata.read(|tx| tx.every())? {
            report.snapshots += 1;
            let sound = report.problems.len();
            self.check_snapshot(&row, &mut report, progress)?;
            // What is removed while it is looked at is no damage.
            if report.problems.len() > sound
                && self.metadata.read(|tx| tx.find_id(row.id))?.is_none()
            {
                report.problems.truncate(sound);
            }
        }
        let mut seen = HashSet::new();
        for image in self.images()? {
            report.images += 1;
            // Damage of the manifest is reported below.
            for digest in self.layers_named(&image.manifest).unwrap_or_default() {
                if !seen.insert(digest) {
                    continue;
                }
                match self.verify_kept(&digest, progress) {
                    Ok(kept) => report.layer_blobs += u64::from(kept),
                    Err(e) if matches!(e.kind(), ErrorKind::Poisoned | ErrorKind::Cancelled) => {
                        return Err(e);
                    }
                    Err(e) => report.add(format!("image {:?}", image.name), e.to_string()),
                }
            }
            for digest in [&image.manifest, &image.config] {
                match self.blob(digest) {
                    Ok(_) => {}
                    Err(e) if e.kind() == ErrorKind::Poisoned => return Err(e),
                    Err(e) => report.add(format!("image {:?}", image.name), e.to_string()),
                }
            }
        }
        Ok(report)
    }

    fn check_snapshot(
        &self,
        row: &Row,
        report: &mut CheckReport,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        let object = format!("snapshot {:?}", row.info.key);
        let layer = match self.layout.layer_dir(row.id) {
            Ok(layer) => layer,
            // Folding its tree was interrupted, or will be over soon.
            Err(_) if row.info.kind == Kind::Active && self.tree_dir(row)?.is_some() => {
                return Ok(());
            }
            Err(e) => {
                report.add(object, format!("{e}; remove it"));
                return Ok(());
            }
        };
        if row.info.kind != Kind::Committed {
            return Ok(());
        }
        // It names the file, where the count of inodes says only that something was changed.
        let named = self.check_record(row, report, progress)?;
        match inspect_layer(&layer, self.layout.format, progress) {
            Err(e) if e.kind() == ErrorKind::Cancelled => return Err(e),
            Err(e) => report.add(object, e.to_string()),
            Ok((usage, has_marks)) => {
                if row.has_marks == Some(true) && !has_marks {
                    report.add(
                        &object,
                        "its whiteouts and opaque marks are gone: the store was copied without \
                         xattrs or devices; copy it again with them",
                    );
                }
                if let Some(stored) = row.info.usage
                    && stored.inodes != usage.inodes
                    && !named
                {
                    report.add(
                        object,
                        format!(
                            "it has {} inodes, not {} as recorded: it was changed after the commit",
                            usage.inodes, stored.inodes
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    /// Sees whether record and layer give the archive that the layer was unpacked from; whether
    /// there is a problem with that.
    fn check_record(
        &self,
        row: &Row,
        report: &mut CheckReport,
        progress: &mut ProgressFn<'_>,
    ) -> Result<bool> {
        if row.info.record != RecordState::Kept {
            return Ok(false);
        }
        match self.replay(row, &mut std::io::sink(), 2, progress) {
            Err(e) if e.kind() == ErrorKind::Cancelled => return Err(e),
            // Written by a build with zstd, and read by one without it.
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                tracing::warn!(key = row.info.key, error = %e, "record not looked at");
            }
            Err(e) => {
                report.add(format!("snapshot {:?}", row.info.key), e.to_string());
                return Ok(true);
            }
            Ok(_) => report.records += 1,
        }
        Ok(false)
    }
}
