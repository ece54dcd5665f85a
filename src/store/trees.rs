//! Snapshots that are used as plain trees, which an engine that copies made of their layers.
//!
//! ```text
//! snapshots/<id>/tree        all that the snapshot shows; while an active one has it, it is what
//!                            counts, and `fs` may be behind
//! snapshots/<id>/tree.stamp  a moment at which the tree was still as it was made, of the parents alone:
//!                            what has not changed since need not be compared with them
//! ```
//!
//! A tree is made in `staging/`, under a lock as everything there, synced, and renamed when it is
//! whole; a half one is swept as any abandoned entry is. Its presence is the record: it is removed by
//! a rename, which is on disk before anybody can write to `fs` again.
//!
//! *Folding* writes what the tree has beyond the parents into a new layer in `staging/`, and exchanges
//! that with `fs`. The tree counts until the metadata say that the snapshot is settled or committed,
//! so folding may be interrupted anywhere and begun anew. It is done for `settle` and `commit`, and
//! before an engine that uses the layers themselves gets the snapshot. One process folds at a time:
//! the one that has the lock of the snapshot's `work` directory, which no engine is using then.
//!
//! The tree of a view is a cache. A committed snapshot has none; one that was in use at the commit is
//! left to gc.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::hold::{Hold, held};
use super::metadata::Row;
use super::snapshot::{Info, Kind};
use super::staging::{self, Staged};
use super::{Store, layout};
use crate::changes::{self, Change};
use crate::driver::{Driver, MountOptions, MountRequest, Shown};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::Usage;
use crate::layer::stack::{Branch, LayerStack};
use crate::path::RelPath;
use crate::progress::{ProgressFn, ignore_progress};
use crate::sys::dir::{Dir, OnExisting};
use crate::sys::lock::{Flock, Sharing, try_lock};
use crate::sys::stat::Time;
use crate::sys::{errno, fs_features, mountinfo};
use crate::tree;

const TREE: &str = "tree";
const STAMP: &str = "tree.stamp";

/// How long the clock of a file system may take to move on, before it is not relied on.
const COARSE: Duration = Duration::from_millis(200);

impl Store {
    /// The tree of an active snapshot or view, if it has one.
    pub(super) fn tree_dir(&self, row: &Row) -> Result<Option<Dir>> {
        if row.info.kind == Kind::Committed {
            return Ok(None);
        }
        let dir = match self.layout.snapshot_dir(row.id) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            dir => dir?,
        };
        match dir.open_dir(&layout::name(TREE)?) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            tree => tree.map(Some).at("open", self.layout.snapshot_path(row.id, TREE)),
        }
    }

    /// The tree of an active snapshot whose layer may be behind it.
    pub(super) fn ahead(&self, row: &Row) -> Result<Option<Branch>> {
        if row.settled || row.info.kind != Kind::Active {
            return Ok(None);
        }
        let tree = self.tree_dir(row)?;
        Ok(tree.map(|dir| Branch { dir: Arc::new(dir), format: self.layout.format }))
    }

    /// Does beforehand what [`Store::mounts`], [`Store::activate`] or [`Store::activate_in_place`] would
    /// take long for: with a driver that copies, it makes the copy; with another, it makes a layer of
    /// the copy as which the snapshot was used before. Reports, and can be stopped, which those cannot.
    ///
    /// # Errors
    /// As those; and [`ErrorKind::Cancelled`]: the snapshot is as it was.
    pub fn make_ready(&self, key: &str, shown: Shown, progress: &mut ProgressFn<'_>) -> Result<()> {
        let row = self.mountable(key)?;
        let request = self.request(&row, &MountOptions::default())?;
        let driver = match shown {
            Shown::Mounted => self.driver_for(&row, &request)?,
            Shown::InPlace => match self.drivers().find(|d| d.needs_tree(&request, shown)) {
                Some(driver) => driver,
                None => return Ok(()),
            },
        };
        if self.is_ready(&row, &request, driver, shown)? {
            return Ok(());
        }
        driver.may_show(&request, shown)?;
        let (row, hold) = self.hold_unmounted(key, &row)?;
        self.make_ready_for(&row, &request, driver, shown, &hold, progress)
    }

    /// Makes a held snapshot fit for an engine: makes the tree, if the engine shows one; else brings the
    /// layer up to date and takes the tree away.
    pub(super) fn make_ready_for(
        &self,
        row: &Row,
        request: &MountRequest,
        driver: &dyn Driver,
        shown: Shown,
        hold: &Hold,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        if !driver.follows_redirects() && self.needs_settling(row)? {
            self.not_used_by_others(row)?;
            self.complete(row, hold, progress)?;
        }
        let has_tree = self.tree_dir(row)?.is_some();
        match (driver.needs_tree(request, shown), has_tree, row.info.kind) {
            (true, true, _) | (false, false, _) | (false, true, Kind::View) => Ok(()),
            (true, false, _) => {
                self.not_used_by_others(row)?;
                self.make_tree(row, progress)
            }
            (false, true, _) => {
                self.not_used_by_others(row)?;
                let (settled, _folding) = match self.ahead(row)? {
                    None => (None, self.lock_folding(row)?),
                    Some(_) => {
                        let folded = self.fold(row, progress)?;
                        (Some(folded.settled), folded.folding)
                    }
                };
                self.waits.sync_files(&self.layout.layer_dir(row.id)?)?;
                if settled.is_some() {
                    self.durably(|tx| tx.set_settled(row.id, settled))?;
                }
                self.drop_tree(row.id)?;
                // Else it could come back with the power, and hide what was written to the layer.
                self.waits.sync_files(&self.layout.layer_dir(row.id)?)
            }
        }
    }

    /// Whether [`make_ready_for`](Self::make_ready_for) would do nothing.
    pub(super) fn is_ready(
        &self,
        row: &Row,
        request: &MountRequest,
        driver: &dyn Driver,
        shown: Shown,
    ) -> Result<bool> {
        let has_tree = self.tree_dir(row)?.is_some();
        let is_cache = row.info.kind == Kind::View && has_tree;
        let shows_all = driver.follows_redirects() || !self.needs_settling(row)?;
        Ok(shows_all && (is_cache || driver.needs_tree(request, shown) == has_tree))
    }

    /// Makes the tree of what the snapshot's layer and its parents show.
    fn make_tree(&self, row: &Row, progress: &mut ProgressFn<'_>) -> Result<()> {
        let chain = self.metadata.read(|tx| tx.chain(row.id))?;
        if row.info.kind == Kind::Active && !row.settled {
            // Else what is not there would be copied as zeros, or not at all.
            self.inspect(row, progress)?;
        }
        let staged = Staged::new(&self.layout)?;
        let (tree, stamp) = (layout::name(TREE)?, layout::name(STAMP)?);
        let made = staged.dir().make_dir(&tree, 0o700).and_then(|()| staged.dir().open_dir(&tree));
        let into = made.at("create directory", TREE)?;
        tree::materialise(&self.stack(&chain)?, self.layout.format, &into, progress).map_err(
            |e| e.context(format!("snapshot {:?} cannot be copied to a tree", row.info.key)),
        )?;
        // Else the tree is of more than the parents, with which it will be compared.
        let is_copy = self.layout.layer_dir(row.id)?.is_empty().at("list", "the layer's root")?;
        let moment = match is_copy {
            true => stamp_of(&into, staged.dir()).at("read the clock of", &self.layout.path)?,
            false => None,
        };
        if let Some(Time { secs, nanos }) = moment {
            let write = || {
                let mut file = staged.dir().create_file(&stamp, 0o600)?;
                file.write_all(format!("{secs}.{nanos:09}\n").as_bytes())
            };
            write().at("write", STAMP)?;
        }
        self.waits.sync_files(&into)?;
        drop(into);
        let dir = self.layout.snapshot_dir(row.id)?;
        let at = self.layout.snapshot_path(row.id, TREE);
        let stamp_at = self.layout.snapshot_path(row.id, STAMP);
        match moment {
            Some(_) => {
                let renamed = staged.dir().rename(&stamp, &dir, &stamp, OnExisting::Replace);
                renamed.at("publish", &stamp_at)?;
            }
            None => match dir.unlink(&stamp) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                done => done.at("remove", &stamp_at)?,
            },
        }
        staged.dir().rename(&tree, &dir, &tree, OnExisting::Fail).at("publish", &at)?;
        self.waits.sync_files(&dir)
    }

    /// Writes the layer anew from the tree. It is not yet on disk, nor noted.
    pub(super) fn fold(&self, row: &Row, progress: &mut ProgressFn<'_>) -> Result<Folded> {
        let folding = self.lock_folding(row)?;
        // Another may have committed it meanwhile, for whom it was folded then.
        let found = self.metadata.read(|tx| tx.find_id(row.id))?;
        let row = match found {
            Some(now) if now.info.kind == Kind::Active => now,
            _ => {
                let text = format!("{:?} was removed or committed meanwhile", row.info.key);
                return Err(Error::new(ErrorKind::NotFound, text));
            }
        };
        let (staged, delta) = self.delta(&row, progress)?;
        let settled = super::commit::inspect_layer(&delta, self.layout.format, progress)?;
        drop(delta);
        let fs = layout::name("fs")?;
        let dir = self.layout.snapshot_dir(row.id)?;
        let at = self.layout.snapshot_path(row.id, "fs");
        match staged.dir().exchange(&fs, &dir, &fs) {
            // The file system cannot, or a fold that was interrupted right here left none.
            Err(e) if errno::cannot_exchange(&e) => {
                staging::discard(&self.layout, &dir, &fs)?;
                staged.dir().rename(&fs, &dir, &fs, OnExisting::Fail).at("publish", &at)?;
            }
            done => done.at("publish", &at)?,
        }
        Ok(Folded { settled, folding })
    }

    /// The layer that the snapshot's tree stands for, in a place of its own.
    pub(super) fn delta(
        &self,
        row: &Row,
        progress: &mut ProgressFn<'_>,
    ) -> Result<(Staged<'_>, Dir)> {
        let (tree, below) = self.tree_and_parents(row)?;
        let staged = Staged::new(&self.layout)?;
        // A clock that is behind the stamp now was set back, and ctimes say nothing.
        let now = staged.dir().stat().at("read the clock of", &self.layout.path)?.ctime;
        let since = self.stamp(row)?.filter(|since| *since < now);
        let fs = layout::name("fs")?;
        let made = staged.dir().make_dir(&fs, 0o700).and_then(|()| staged.dir().open_dir(&fs));
        let delta = made.at("create directory", "fs")?;
        tree::write_delta(&tree, &below, since, &delta, progress).map_err(|e| {
            e.context(format!("the tree of snapshot {:?} cannot become a layer", row.info.key))
        })?;
        Ok((staged, delta))
    }

    /// What [`Store::delta`] would take on disk.
    pub(super) fn delta_usage(&self, row: &Row) -> Result<Usage> {
        let (tree, below) = self.tree_and_parents(row)?;
        let since = self.stamp(row)?;
        tree::count_delta(&tree, &below, since, &mut ignore_progress)
    }

    /// What has changed in the tree.
    pub(super) fn tree_changes(
        &self,
        row: &Row,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Change>> {
        let (tree, below) = self.tree_and_parents(row)?;
        let since = self.stamp(row)?;
        changes::between_since(&LayerStack::plain(tree.dir), &below, since, progress)
    }

    /// The index, in the snapshot's chain, of the layer that what its tree has at `path` comes from.
    pub(super) fn tree_provenance(&self, row: &Row, path: &RelPath) -> Result<Option<usize>> {
        let (tree, below) = self.tree_and_parents(row)?;
        let Some(new) = LayerStack::plain(tree.dir).lookup(path)? else { return Ok(None) };
        Ok(Some(match below.lookup(path)? {
            Some(old) if changes::are_equal(&new, &old, path)? => old.layer.saturating_add(1),
            _ => 0,
        }))
    }

    fn tree_and_parents(&self, row: &Row) -> Result<(Branch, LayerStack)> {
        let chain = self.metadata.read(|tx| tx.chain(row.id))?;
        let tree = self.tree_dir(row)?.ok_or_else(|| gone(&row.info))?;
        let tree = Branch { dir: Arc::new(tree), format: self.layout.format };
        Ok((tree, self.stack(chain.get(1..).unwrap_or_default())?))
    }

    /// The moment after which changes to the tree began, if it is known.
    fn stamp(&self, row: &Row) -> Result<Option<Time>> {
        let dir = self.layout.snapshot_dir(row.id)?;
        let mut text = String::new();
        match dir.open_file(&layout::name(STAMP)?) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file
                .and_then(|file| file.take(64).read_to_string(&mut text))
                .at("read", self.layout.snapshot_path(row.id, STAMP))?,
        };
        Ok(parse_stamp(&text))
    }

    /// Takes the tree away; what cannot be removed of it is left to `cleanup`.
    pub(super) fn drop_tree(&self, id: i64) -> Result<()> {
        let dir = self.layout.snapshot_dir(id)?;
        staging::discard(&self.layout, &dir, &layout::name(TREE)?)?;
        match dir.unlink(&layout::name(STAMP)?) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            done => done.at("remove", self.layout.snapshot_path(id, STAMP)),
        }
    }

    /// Takes away the tree of a snapshot that has just been committed, unless it is in use.
    pub(super) fn drop_committed_tree(&self, row: &Row) {
        let dropped = match self.not_used_by_others(row) {
            Ok(()) => self.drop_tree(row.id),
            Err(e) => Err(e),
        };
        if let Err(e) = dropped {
            tracing::warn!(id = row.id, error = %e, "the tree of a committed snapshot is left for gc");
        }
    }

    /// Takes away the tree of a committed snapshot; whether there was one that nobody uses.
    pub(super) fn sweep_tree(&self, row: &Row) -> Result<bool> {
        let Ok(dir) = self.layout.snapshot_dir(row.id) else {
            // Damage that `check` reports.
            return Ok(false);
        };
        if dir.try_stat_at(&layout::name(TREE)?).at("look at", TREE)?.is_none() {
            return Ok(false);
        }
        let Some(_hold) = self.try_hold(row.id, Sharing::Exclusive)? else {
            return Ok(false);
        };
        if self.not_mounted(row).is_err() || self.not_used_by_others(row).is_err() {
            return Ok(false);
        }
        self.drop_tree(row.id)?;
        Ok(true)
    }

    /// Fails if somebody has mounted the snapshot who was told by [`Store::mounts`] how to, as far as
    /// this process can see.
    fn not_used_by_others(&self, row: &Row) -> Result<()> {
        if !row.handed_out {
            return Ok(());
        }
        let dir = self.layout.snapshot_dir(row.id)?;
        let at = self.layout.snapshot_path(row.id, "");
        let Some(place) = mountinfo::place_of(&dir).at("find", &at)? else { return Ok(()) };
        let upper = self.layout.snapshot_path(row.id, "fs");
        match mountinfo::is_in_use(&place, &upper).at("read the mounts of", "all processes")? {
            true => Err(held(&row.info)),
            false => Ok(()),
        }
    }

    /// Keeps others from bringing the layer up to date.
    pub(super) fn lock_folding(&self, row: &Row) -> Result<Flock> {
        let work = self.layout.snapshot_dir(row.id)?.open_dir(&layout::name("work")?);
        let at = self.layout.snapshot_path(row.id, "work");
        let locked =
            work.and_then(|dir| try_lock(dir.into(), Sharing::Exclusive)).at("lock", at)?;
        locked.map_err(|_| held(&row.info))
    }
}

/// A layer that was brought up to date.
#[derive(Debug)]
pub(super) struct Folded {
    /// Its usage, and whether it has marks.
    pub(super) settled: (Usage, bool),
    /// To be kept until that is noted.
    pub(super) folding: Flock,
}

fn gone(info: &Info) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!("the tree of snapshot {:?} was taken away meanwhile: try again", info.key),
    )
}

/// A moment of the file system's clock, not before the last change to the tree just made, and before
/// all that come later: those get a later ctime. None where the clock stands still for long, or where
/// it is not known that renames change ctimes too.
fn stamp_of(tree: &Dir, beside: &Dir) -> std::io::Result<Option<Time>> {
    const KNOWN: [&str; 6] = ["ext4", "xfs", "btrfs", "tmpfs", "f2fs", "bcachefs"];
    if !KNOWN.contains(&fs_features::file_system_name(tree)?.as_str()) {
        return Ok(None);
    }
    let last = tree.stat()?.ctime;
    let begun = Instant::now();
    while begun.elapsed() < COARSE {
        // Any change gives it the time that it is.
        beside.chmod(0o700)?;
        if beside.stat()?.ctime > last {
            return Ok(Some(last));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(None)
}

/// None for what was not written whole.
fn parse_stamp(text: &str) -> Option<Time> {
    let (secs, nanos) = text.strip_suffix('\n')?.split_once('.')?;
    let nanos = (nanos.len() == 9).then(|| nanos.parse().ok())??;
    Some(Time { secs: secs.parse().ok()?, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_read_whole_or_not_at_all() {
        assert_eq!(parse_stamp("12.000000007\n"), Some(Time { secs: 12, nanos: 7 }));
        for torn in ["", "1", "12.0", "12.000000007", "12.00000000\n", "\0\0\0\0"] {
            assert_eq!(parse_stamp(torn), None, "{torn:?}");
        }
    }

    #[test]
    fn what_is_changed_after_the_stamp_has_a_later_ctime() {
        let tmp = tempfile::tempdir().unwrap();
        for name in ["tree", "beside"] {
            std::fs::create_dir(tmp.path().join(name)).unwrap();
        }
        let (tree, beside) = (tmp.path().join("tree"), tmp.path().join("beside"));
        let open = |path| Dir::open(path).unwrap();
        let stamp = stamp_of(&open(&tree), &open(&beside)).unwrap().unwrap();
        assert!(stamp >= open(&tree).stat().unwrap().ctime);
        std::fs::write(tree.join("f"), "").unwrap();
        assert!(open(&tree).stat().unwrap().ctime > stamp);
    }
}
