//! What is in a snapshot: the union it shows, from which layer, and how it differs from its parent.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use super::Store;
use super::metadata::Row;
use super::prepare::{Filled, Making};
use super::records;
use super::snapshot::{Kind, Labels, RecordState};
use crate::archive::{self, Applied, ApplyOptions, Below, ExportOptions, Exported, LayerTarget};
use crate::changes::{self, Change};
use crate::digest::{DiffId, Digest};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::stack::{Branch, LayerStack};
use crate::path::RelPath;
use crate::progress::ProgressFn;
use crate::sys::lock::Sharing;

/// What an image promises of a layer that is being unpacked.
#[derive(Debug)]
pub(crate) struct Expected {
    /// The digest of the archive as it is read.
    pub(crate) blob: Digest,
    /// That of the uncompressed archive.
    pub(crate) diff_id: DiffId,
    /// The layers below, which come to be meanwhile.
    pub(crate) below: Below,
}

impl Expected {
    fn check(&self, applied: &Applied) -> Result<()> {
        let mismatch = |message: String| Err(Error::new(ErrorKind::DigestMismatch, message));
        if applied.blob != self.blob {
            return mismatch(format!("blob {} has the digest {}", self.blob, applied.blob));
        }
        if applied.diff_id != self.diff_id {
            return mismatch(format!(
                "the layer's archive has the digest {}, and {} was promised",
                applied.diff_id, self.diff_id
            ));
        }
        Ok(())
    }
}

impl Store {
    /// The snapshot that `path` comes from, as a mount of `key` shows it: the topmost layer that has
    /// it. None if the mount shows nothing there, or `path` is the root.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound): there is no such snapshot.
    pub fn provenance(&self, key: &str, path: &RelPath) -> Result<Option<String>> {
        let chain = self.metadata.read(|tx| tx.chain(tx.get(key)?.id))?;
        let layer = match chain.first() {
            Some(own) if self.ahead(own)?.is_some() => self.tree_provenance(own, path)?,
            _ => self.stack(&chain)?.lookup(path)?.map(|visible| visible.layer),
        };
        Ok(layer.and_then(|layer| chain.get(layer)).map(|row| row.info.key.clone()))
    }

    /// How a snapshot differs from its parent, sorted by path; of one without a parent everything is
    /// an addition. Reads the snapshot's own layer, and of the parents only what it touches; of one that
    /// is used as a copy, all of both is looked at.
    ///
    /// What the union over FUSE need not copy, directories that were renamed and the data of files of which
    /// only attributes were changed, is copied now; in a mount as [`Store::settle`] tells.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound);
    /// [`ErrorKind::FailedPrecondition`], [`ErrorKind::Busy`]: as [`Store::settle`];
    /// [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled); those of the file system.
    pub fn changes(&self, key: &str, progress: &mut ProgressFn<'_>) -> Result<Vec<Change>> {
        let chain = self.metadata.read(|tx| tx.chain(tx.get(key)?.id))?;
        if let Some(own) = chain.first() {
            self.catch_up(own, progress)?;
        }
        match chain.split_first() {
            Some((own, _)) if self.ahead(own)?.is_some() => self.tree_changes(own, progress),
            Some((own, parents)) => {
                self.stands_alone(own, progress)?;
                changes::upper(&self.branch(own)?, &self.stack(parents)?, progress)
            }
            None => Ok(Vec::new()),
        }
    }

    /// Gives a snapshot's own layer as an uncompressed archive, which [`Store::apply`] takes.
    ///
    /// A layer that [`Store::apply`] made comes back as the archive that it was made from, byte for
    /// byte, unless the options ask for another or [`Info::record`](crate::Info::record) says why it
    /// cannot. Any other is packed in the canonical form: with a mark for everything that the layer
    /// deletes of its parents, and for nothing else.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`].
    /// - [`ErrorKind::DigestMismatch`]: the layer was changed since its archive was unpacked; the
    ///   error names a file. [`ErrorKind::Corrupt`]: the record of the archive is damaged. By then
    ///   bytes may be out, which must not be used.
    /// - [`ErrorKind::FailedPrecondition`]: it holds what no archive can say: a file whose name reads
    ///   as a whiteout, the deletion of a name too long for one. Nothing is written then. Or it was
    ///   changed while it was read.
    /// - [`ErrorKind::Cancelled`], and those of the file system and of `out`.
    pub fn export(
        &self,
        key: &str,
        out: &mut dyn Write,
        options: &ExportOptions,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Exported> {
        let chain = self.metadata.read(|tx| tx.chain(tx.get(key)?.id))?;
        let Some((own, parents)) = chain.split_first() else {
            return Err(Error::new(ErrorKind::Corrupt, format!("{key:?} has no layers")));
        };
        self.catch_up(own, progress)?;
        let _hold = self.try_hold(own.id, Sharing::Shared)?;
        if options.wants_as_imported() && own.info.record == RecordState::Kept {
            return self
                .replay(own, out, options.threads, progress)
                .map_err(|e| e.context(format!("export of snapshot {key:?} failed")));
        }
        // Dropped, it is removed.
        let mut staged = None;
        let layer = match self.ahead(own)? {
            Some(_) => {
                let (place, delta) = self.delta(own, progress)?;
                staged = Some(place);
                Branch { dir: Arc::new(delta), format: self.layout.format }
            }
            None => {
                self.stands_alone(own, progress)?;
                self.branch(own)?
            }
        };
        let parents = self.stack(parents)?;
        let exported = archive::export(&layer, Some(&parents), out, options, progress)
            .map_err(|e| e.context(format!("export of snapshot {key:?} failed")));
        drop(staged);
        exported
    }

    /// What makes the snapshot `key` from the snapshot `from`, or from the empty tree, sorted by path:
    /// any two, whether or not one is below the other. Of layers that both have only what others touch
    /// is read.
    ///
    /// To its own parent it says what [`Store::changes`] says, but for a directory that was deleted and
    /// made again just as it was: that shows in the snapshot's own layer alone.
    ///
    /// # Errors
    /// As [`Store::changes`], of either snapshot.
    pub fn changes_between(
        &self,
        key: &str,
        from: Option<&str>,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Change>> {
        let (_, upper) = self.shown(key, progress)?;
        let lower = match from {
            Some(from) => self.shown(from, progress)?.1,
            None => LayerStack::default(),
        };
        changes::between(&upper, &lower, progress)
    }

    /// Packs what makes the snapshot `key` from the snapshot `from`, or from the empty tree, as an
    /// uncompressed archive: [`Store::apply`] on top of `from` gives what `key` shows. It has more than
    /// [`Store::changes_between`] tells: what differs in modification times alone, the directories above
    /// all that it has, and every name of a file of which it has one.
    ///
    /// # Errors
    /// As [`Store::export`], of either snapshot.
    pub fn export_between(
        &self,
        key: &str,
        from: Option<&str>,
        out: &mut dyn Write,
        options: &ExportOptions,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Exported> {
        let (own, upper) = self.shown(key, progress)?;
        let _hold = self.try_hold(own, Sharing::Shared)?;
        let mut below = None;
        let lower = match from {
            Some(from) => {
                let (id, lower) = self.shown(from, progress)?;
                below = self.try_hold(id, Sharing::Shared)?;
                lower
            }
            None => LayerStack::default(),
        };
        let exported = archive::export_trees(&upper, &lower, out, options, progress);
        drop(below);
        exported.map_err(|e| e.context(format!("export of snapshot {key:?} failed")))
    }

    /// The id of a snapshot, and the union that a mount of it shows.
    fn shown(&self, key: &str, progress: &mut ProgressFn<'_>) -> Result<(i64, LayerStack)> {
        let chain = self.metadata.read(|tx| tx.chain(tx.get(key)?.id))?;
        let Some(own) = chain.first() else {
            return Err(Error::new(ErrorKind::Corrupt, format!("{key:?} has no layers")));
        };
        self.catch_up(own, progress)?;
        if let Some(tree) = self.ahead(own)? {
            return Ok((own.id, LayerStack::plain(tree.dir)));
        }
        self.stands_alone(own, progress)?;
        Ok((own.id, self.stack(&chain)?))
    }

    /// Unpacks a layer archive, compressed or not, onto the committed `parent`, and commits it as
    /// `name`. Nothing is to be seen of it before it is whole and on disk. Directories that it puts
    /// things into without describing them keep the attributes that they have in the parents.
    ///
    /// # Errors
    /// - As [`Store::prepare`].
    /// - [`ErrorKind::InvalidArchive`]: truncated, damaged, ambiguous, or trying to leave its root.
    /// - [`ErrorKind::LimitExceeded`]: beyond a bound of the options.
    /// - [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`], and those of the file system and of
    ///   `input`.
    ///
    /// Nothing of it is left then.
    pub fn apply(
        &self,
        name: &str,
        parent: Option<&str>,
        input: &mut dyn Read,
        options: &ApplyOptions,
        labels: Labels,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Applied> {
        self.apply_expecting(name, parent, input, options, labels, None, progress)
    }

    /// As [`Store::apply`], of an archive that must be as expected. With an expectation the parent need
    /// not be there yet: it is waited for.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn apply_expecting(
        &self,
        name: &str,
        parent: Option<&str>,
        input: &mut dyn Read,
        options: &ApplyOptions,
        labels: Labels,
        expected: Option<&Expected>,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Applied> {
        let below = expected.map(|expected| &expected.below);
        let making = Making { key: name, kind: Kind::Committed, parent, labels: &labels, below };
        // A directory that the archive has no entry for is not to lose its owner and mode.
        let mut options = options.clone();
        match (below, parent) {
            (Some(below), _) => options.below = Some(below.clone()),
            (None, Some(parent)) => options.parents.extend(self.layer_paths(parent)?),
            (None, None) => {}
        }
        let mut result = None;
        self.make(&making, |layer, snapshot| {
            let target = LayerTarget::Layer(self.layout.format);
            let capture = records::capture(snapshot, &options)?;
            let tap = Some(&capture);
            let applied = archive::apply(input, layer, target, &options, tap, progress)?;
            if let Some(expected) = expected {
                expected.check(&applied)?;
            }
            let filled = Filled {
                settled: Some((applied.usage, applied.has_marks)),
                diff_id: Some(applied.diff_id),
                describes_root: applied.describes_root,
                no_record: records::finish(capture, &applied)?,
            };
            result = Some(applied);
            Ok(filled)
        })?;
        result.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the layer was not unpacked"))
    }

    /// The directories of a snapshot's layer and of those below it, topmost first; none if there is no
    /// such snapshot.
    pub(crate) fn layer_paths(&self, key: &str) -> Result<Vec<PathBuf>> {
        let chain = self.metadata.read(|tx| match tx.find(key)? {
            Some(row) => tx.chain(row.id),
            None => Ok(Vec::new()),
        })?;
        Ok(chain.iter().map(|row| self.layout.snapshot_path(row.id, "fs")).collect())
    }

    /// Fails if the layer refers to layers below it, so that it cannot be understood by itself.
    fn stands_alone(&self, row: &Row, progress: &mut ProgressFn<'_>) -> Result<()> {
        if row.settled { Ok(()) } else { self.inspect(row, progress).map(drop) }
    }

    /// The layers of a chain, topmost first.
    pub(super) fn stack(&self, chain: &[Row]) -> Result<LayerStack> {
        let branches = chain.iter().map(|row| self.branch(row));
        Ok(LayerStack::new(branches.collect::<Result<_>>()?))
    }

    /// One snapshot's layer.
    pub(super) fn branch(&self, row: &Row) -> Result<Branch> {
        let dir = Arc::new(self.layout.layer_dir(row.id)?);
        Ok(Branch { dir, format: self.layout.format })
    }
}
