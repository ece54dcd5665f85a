//! New snapshots: prepare and view.

use super::metadata::{NewSnapshot, Row};
use super::snapshot::{Info, Kind, Labels, check_key};
use super::staging::Staged;
use super::{Store, layout, wrong_kind};
use crate::archive::Below;
use crate::digest::DiffId;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::{Usage, marks};
use crate::sys::dir::{self, Dir};
use crate::sys::lock::Sharing;
use crate::sys::xattr::{self, Of};

/// A snapshot about to be published.
pub(super) struct Making<'a> {
    pub(super) key: &'a str,
    pub(super) kind: Kind,
    pub(super) parent: Option<&'a str>,
    pub(super) labels: &'a Labels,
    /// Where the parent comes to be only while the layer is being filled.
    pub(super) below: Option<&'a Below>,
}

/// What filling a new layer found out.
#[derive(Debug, Default)]
pub(super) struct Filled {
    pub(super) settled: Option<(Usage, bool)>,
    pub(super) diff_id: Option<DiffId>,
    /// Whether the layer's root has attributes of its own, not its parent's.
    pub(super) describes_root: bool,
    /// Why there is no record of the archive of that digest, if there is none.
    pub(super) no_record: Option<String>,
}

impl Store {
    /// Makes a writable snapshot on top of the committed `parent`, or an empty one.
    ///
    /// It is not mounted: see [`Store::mounts`] and [`Store::activate`].
    ///
    /// # Errors
    /// - [`ErrorKind::AlreadyExists`]: the key is in use, by a snapshot of any kind.
    /// - [`ErrorKind::NotFound`]: there is no such parent.
    /// - [`ErrorKind::InvalidArgument`]: the parent is not committed, or the key cannot be one.
    pub fn prepare(&self, key: &str, parent: Option<&str>, labels: Labels) -> Result<Info> {
        let making = Making { key, kind: Kind::Active, parent, labels: &labels, below: None };
        self.make(&making, |_, _| Ok(Filled::default())).map(|(info, _)| info)
    }

    /// Makes a read-only view of the committed `parent`, or an empty one.
    ///
    /// # Errors
    /// As [`Store::prepare`].
    pub fn view(&self, key: &str, parent: Option<&str>, labels: Labels) -> Result<Info> {
        let making = Making { key, kind: Kind::View, parent, labels: &labels, below: None };
        let settled = Some((Usage::default(), false));
        self.make(&making, |_, _| Ok(Filled { settled, ..Filled::default() })).map(|(info, _)| info)
    }

    /// Makes a snapshot whose layer `fill` writes, given that and the snapshot's directory; a failure
    /// anywhere leaves nothing.
    pub(super) fn make(
        &self,
        making: &Making<'_>,
        fill: impl FnOnce(&Dir, &Dir) -> Result<Filled>,
    ) -> Result<(Info, Filled)> {
        check_key(making.key)?;
        let look = || {
            self.metadata.read(|tx| {
                tx.free_key(making.key)?;
                making.parent.map(|parent| committed_parent(tx, parent)).transpose()
            })
        };
        let hold = |parent: &Option<Row>| match parent {
            Some(parent) => self.try_hold(parent.id, Sharing::Shared),
            None => Ok(None),
        };
        // Looked at now to fail early, and again when the row is written.
        let (mut parent, mut _hold) = (None, None);
        match making.below {
            None => {
                parent = look()?;
                _hold = hold(&parent)?;
            }
            Some(_) => self.metadata.read(|tx| tx.free_key(making.key))?,
        }
        let staged = Staged::new(&self.layout)?;
        let make_dir = |text: &str, mode: u32| -> Result<Dir> {
            let name = layout::name(text)?;
            let made =
                staged.dir().make_dir(&name, mode).and_then(|()| staged.dir().open_dir(&name));
            let opened = made.at("create directory", text)?;
            opened.chmod(mode).at("set the mode of", text)?;
            Ok(opened)
        };
        let layer = make_dir("fs", 0o755)?;
        if making.kind == Kind::Active {
            make_dir("work", 0o700)?;
        }
        let mut filled = fill(&layer, staged.dir())?;
        if let Some(below) = making.below {
            below.wait()?;
            parent = look()?;
            _hold = hold(&parent)?;
        }
        if let Some(parent) = parent
            && !filled.describes_root
        {
            let grown = copy_root_attributes(&self.layout.layer_dir(parent.id)?, &layer)?;
            if let (Kind::Committed, Some((usage, _))) = (making.kind, &mut filled.settled) {
                usage.bytes = usage.bytes.saturating_add(grown);
            }
        }
        // After the parent's, which must be the smaller one.
        let id = self.lazily(|tx| tx.new_id(making.kind.as_str()))?;
        let made = self.publish(id, making, staged, layer, &filled);
        if made.is_err()
            && let Err(e) = self.lazily(|tx| tx.end_intent(id))
        {
            tracing::warn!(id, error = %e, "intent left for gc");
        }
        Ok((made?, filled))
    }

    fn publish(
        &self,
        id: i64,
        making: &Making<'_>,
        staged: Staged<'_>,
        layer: Dir,
        filled: &Filled,
    ) -> Result<Info> {
        let published = staged.publish(id)?;
        self.waits.sync_files(&layer)?;
        drop(layer);
        let written = self.durably(|tx| {
            let parent = making.parent.map(|parent| committed_parent(tx, parent)).transpose()?;
            tx.insert(&NewSnapshot {
                id,
                key: making.key,
                kind: making.kind,
                parent: parent.map(|p| p.id),
                labels: making.labels,
                settled: filled.settled,
                diff_id: filled.diff_id,
                no_record: filled.no_record.as_deref(),
            })?;
            Ok(tx.get(making.key)?.info)
        });
        // After an I/O error nobody knows whether the row will be there: whoever opens the store next
        // finds out, and sweeps the layer if it is not.
        if written.is_ok() || self.metadata.is_poisoned() {
            published.keep();
        }
        written
    }
}

/// The parent, which must be committed.
pub(super) fn committed_parent(tx: &super::Tx<'_>, parent: &str) -> Result<super::metadata::Row> {
    let row = tx
        .find(parent)?
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no parent {parent:?}")))?;
    if row.info.kind != Kind::Committed {
        let e = wrong_kind(&row.info, "only a committed one can be a parent");
        return Err(Error::new(ErrorKind::InvalidArgument, e.to_string()));
    }
    Ok(row)
}

/// A union shows the attributes of its topmost root: a new layer has its parent's. Gives the number of
/// bytes that the directory grew by on disk.
fn copy_root_attributes(from: &Dir, to: &Dir) -> Result<u64> {
    let copy = || -> std::io::Result<u64> {
        let stat = from.stat()?;
        let own = to.stat()?;
        if (stat.uid, stat.gid) != (own.uid, own.gid) {
            to.chown(stat.uid, stat.gid)?;
        }
        for key in xattr::list(Of::dir(from))? {
            // Labels of this machine's policy are the policy's to give, and not everyone's to set.
            if marks::is_union_xattr(&key) || key.starts_with(b"security.") {
                continue;
            }
            if let Some(value) = xattr::get(Of::dir(from), &key)? {
                xattr::set(Of::dir(to), &key, &value)?;
            }
        }
        // After the xattrs, which an ordinary user may not set on what he may not write to.
        to.chmod(stat.mode)?;
        dir::set_times(to, stat.atime, stat.mtime)?;
        Ok(to.stat()?.blocks.saturating_sub(own.blocks).saturating_mul(512))
    };
    copy().at("copy the attributes of", "the parent's root directory")
}
