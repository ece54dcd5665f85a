//! Snapshots as embedders see them: kinds, labels, keys.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use crate::digest::DiffId;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::Usage;

/// What a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Read-only, of a committed parent; cannot be committed.
    View,
    /// Writable; becomes committed, or is removed.
    Active,
    /// Immutable; the only kind that can be a parent.
    Committed,
}

impl Kind {
    /// The number by which the database and containerd know it.
    pub(super) fn number(self) -> i64 {
        match self {
            Kind::View => 1,
            Kind::Active => 2,
            Kind::Committed => 3,
        }
    }

    pub(super) fn from_number(number: i64) -> Option<Kind> {
        [Kind::View, Kind::Active, Kind::Committed].into_iter().find(|k| k.number() == number)
    }

    /// The word that filters and listings use: `view`, `active`, `committed`.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }

    pub(super) fn with_article(self) -> &'static str {
        match self {
            Kind::View => "a view",
            Kind::Active => "an active",
            Kind::Committed => "a committed",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Free-form pairs that the embedder attaches to a snapshot.
pub type Labels = BTreeMap<String, String>;

/// What the store knows of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// The key of an active snapshot or view, the name of a committed one.
    pub key: String,
    /// What it is.
    pub kind: Kind,
    /// The name of the committed snapshot below it.
    pub parent: Option<String>,
    /// The embedder's labels.
    pub labels: Labels,
    /// When it was prepared, or committed.
    pub created: SystemTime,
    /// When it or its labels last changed.
    pub updated: SystemTime,
    /// What it takes on disk, where that is stored: of committed and of settled snapshots.
    pub usage: Option<Usage>,
    /// The digest of the layer archive that it was made from, if it was.
    pub diff_id: Option<DiffId>,
    /// Whether the store can give that archive back.
    pub record: RecordState,
}

/// Whether a layer can be exported as the archive that it was unpacked from, byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordState {
    /// It was not unpacked from an archive.
    NotImported,
    /// It can.
    Kept,
    /// It cannot: why. It can be exported in the canonical form, which has another digest.
    Missing(String),
}

/// How [`Store::commit`](crate::Store::commit) commits.
#[derive(Clone, Debug, Default)]
pub struct CommitOptions {
    /// A committed snapshot that becomes the parent ("rebase"); only for an active snapshot that was
    /// prepared without one. Nothing is copied: the layer is put on top of another chain.
    pub parent: Option<String>,
    /// The labels of the committed snapshot; those of the active one are not inherited.
    pub labels: Labels,
}

impl CommitOptions {
    /// The defaults: no rebase, no labels.
    pub fn new() -> Self {
        CommitOptions::default()
    }
}

/// The longest key, in bytes.
const KEY_MAX: usize = 4096;

/// Refuses what no key can be. Keys are never used as paths; those that look like an attempt to leave
/// one are refused all the same, since keys end up in other programs' paths.
pub(crate) fn check_key(key: &str) -> Result<()> {
    let reason = if key.is_empty() {
        "it is empty"
    } else if key.len() > KEY_MAX {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{} bytes cannot name a snapshot or image: {KEY_MAX} are the most", key.len()),
        ));
    } else if key.chars().any(char::is_control) {
        "it has a control character"
    } else if key.split('/').any(|part| part == "..") {
        "it has a component \"..\""
    } else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::InvalidArgument,
        format!("{key:?} cannot name a snapshot or image: {reason}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_none() {
        for bad in ["", "a\0b", "a\nb", "..", "a/../b", &"k".repeat(4097)] {
            assert_eq!(check_key(bad).unwrap_err().kind(), ErrorKind::InvalidArgument, "{bad:?}");
        }
        for good in ["a", "ns/1/sha256:ab", "..a", "a b", "ключ", &"k".repeat(4096)] {
            check_key(good).unwrap();
        }
    }
}
