//! Adopting a foreign layer directory into a store.

use std::path::Path;

use super::Store;
use super::prepare::{Filled, Making};
use super::snapshot::{Kind, Labels};
use crate::adopt::{self, AdoptOptions, Adopted, Branch};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::progress::ProgressFn;
use crate::sys::dir::Dir;

impl Store {
    /// Copies the layer directory `dir`, which another union file system wrote, and commits the copy as
    /// `name` on top of the committed `parent`. The directory is only read. Mounted on its parents, the
    /// snapshot shows what `dir` showed on top of the same ones.
    ///
    /// The directory is that of one layer, not the place where a union is mounted, and nothing may write
    /// to it meanwhile. It is the `diff` of Docker's `overlay2/<id>/` and of containers/storage's
    /// `overlay/<id>/`, containerd's `io.containerd.snapshotter.v1.overlayfs/snapshots/<n>/fs`, Docker's
    /// `aufs/diff/<id>`.
    ///
    /// ```no_run
    /// # use stratafs::*;
    /// # let store = Store::open("/var/lib/stratafs", StoreOptions::new())?;
    /// let options = AdoptOptions::new(ForeignFormat::Overlay);
    /// let layer = "/var/lib/docker/overlay2/4f1c/diff";
    /// let labels = Labels::new();
    /// let adopted = store.adopt("old", None, layer, &options, labels, &mut ignore_progress)?;
    /// print!("{}", adopted.report);
    /// # Ok::<(), stratafs::Error>(())
    /// ```
    ///
    /// # Errors
    /// - As [`Store::prepare`].
    /// - [`ErrorKind::NotFound`]: there is no such directory.
    /// - [`ErrorKind::InvalidArgument`]: the directory is in the store, or the store in it; or lower
    ///   layers are given for a format that never refers to them.
    /// - [`ErrorKind::FailedPrecondition`]: something in the directory is not understood, is a mark of
    ///   another format than the stated one, cannot be kept in this store's format, or is in lower
    ///   layers that neither the options nor the parent give. The message names it.
    /// - [`ErrorKind::PermissionDenied`]: the marks, or what is to be copied, cannot be read by this
    ///   process; or owners and devices cannot be made.
    /// - [`ErrorKind::Busy`]: it changed while it was read.
    /// - [`ErrorKind::DigestMismatch`]: a lower file is not the one that a file's data should be in.
    /// - [`ErrorKind::Corrupt`]: a mark of the stated format is malformed.
    /// - [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`], and those of the file systems.
    ///
    /// Nothing of it is left then.
    pub fn adopt(
        &self,
        name: &str,
        parent: Option<&str>,
        dir: impl AsRef<Path>,
        options: &AdoptOptions,
        labels: Labels,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Adopted> {
        let making =
            Making { key: name, kind: Kind::Committed, parent, labels: &labels, below: None };
        let shown = dir.as_ref();
        let opened = Dir::open(shown).at("open directory", shown)?;
        self.refuse_inside(&opened, shown)?;
        let mut branches = vec![adopt::branch(opened, shown, options)];
        branches.extend(self.foreign_lowers(parent, options)?);
        let store = self.layout.root.stat().at("look at", &self.layout.path)?;
        let mut result = None;
        self.make(&making, |layer, _| {
            let source = adopt::Source { branches, store };
            let adopted = adopt::adopt(source, layer, self.layout.format, options, progress)
                .map_err(|e| {
                    e.context(format!("adopting {shown:?} as {} failed", options.format))
                })?;
            let filled = Filled {
                settled: Some((adopted.usage, adopted.has_marks)),
                describes_root: true,
                ..Filled::default()
            };
            result = Some(adopted);
            Ok(filled)
        })?;
        result.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the directory was not copied"))
    }

    /// The layers below a foreign one: those given, else the parents in the store.
    fn foreign_lowers(&self, parent: Option<&str>, options: &AdoptOptions) -> Result<Vec<Branch>> {
        if options.format.overlay_prefix().is_none() {
            return match options.lowers.first() {
                None => Ok(Vec::new()),
                Some(lower) => Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!(
                        "a layer of {} never refers to lower ones: adopt this one too, and name it as \
                         the parent",
                        options.format
                    ),
                )
                .with_path(lower)),
            };
        }
        if !options.lowers.is_empty() {
            let open = |lower: &std::path::PathBuf| {
                let dir = Dir::open(lower).at("open lower directory", lower)?;
                Ok(adopt::branch(dir, lower, options))
            };
            return options.lowers.iter().map(open).collect();
        }
        let Some(parent) = parent else {
            return Ok(Vec::new());
        };
        let chain = self.metadata.read(|tx| match tx.find(parent)? {
            Some(row) => tx.chain(row.id),
            // Which `make` answers.
            None => Ok(Vec::new()),
        })?;
        let open = |row: &super::metadata::Row| {
            let dir = self.layout.layer_dir(row.id)?;
            let shown = self.layout.snapshot_path(row.id, "fs");
            Ok(adopt::own_branch(dir, &shown, self.layout.format))
        };
        chain.iter().map(open).collect()
    }

    /// Refuses a directory that is the store or in it.
    fn refuse_inside(&self, dir: &Dir, shown: &Path) -> Result<()> {
        let store = self.layout.root.stat().at("look at", &self.layout.path)?;
        let mut here = dir.reopen().at("open directory", shown)?;
        let mut stat = here.stat().at("look at", shown)?;
        loop {
            if stat.same_inode(&store) {
                let message = "the directory is in the store itself: snapshots have their layers there \
                               already";
                return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(shown));
            }
            let above = match here.open_parent() {
                // Whoever may not look there has no store there.
                Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Ok(()),
                above => above.at("open the directory above", shown)?,
            };
            let next = above.stat().at("look at the directory above", shown)?;
            if next.same_inode(&stat) {
                return Ok(());
            }
            (here, stat) = (above, next);
        }
    }
}
