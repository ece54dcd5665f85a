//! What a union is made of, and how it is to behave.

use std::sync::Arc;

use crate::idmap::IdMap;
use crate::layer::LayerFormat;
use crate::layer::lower_marks::LowerMarks;
use crate::sys::dir::Dir;
use crate::sys::lock::Flock;

/// A branch that is only read.
#[derive(Clone, Debug)]
pub(crate) struct Lower {
    pub(crate) dir: Arc<Dir>,
    pub(crate) format: LayerFormat,
    /// The marks of AUFS are marks, too.
    pub(crate) dot_wh: bool,
}

impl Lower {
    /// How it says what is deleted.
    pub(crate) fn marks(&self) -> LowerMarks {
        LowerMarks { format: self.format, dot_wh: self.dot_wh }
    }
}

/// The branch that takes all changes.
#[derive(Debug)]
pub(crate) struct Upper {
    pub(crate) dir: Arc<Dir>,
    pub(crate) format: LayerFormat,
    /// A directory of the union's own, on the same file system and mount as `dir` and not inside it,
    /// which no other union uses at the same time (the caller holds the lock). The union keeps `temp`
    /// in it, emptied when it is opened, and `state`, which survives.
    pub(crate) work: Dir,
    /// Whatever says that the upper is in use, kept for as long as the union is.
    pub(crate) lock: Option<Flock>,
}

/// When the union waits for the disk of its own accord.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SyncPolicy {
    /// A copy is on disk before it takes the place of the original; fsync waits.
    #[default]
    Strict,
    /// Never, not even when asked to by fsync.
    Volatile,
}

/// Options of a union; the default is that of a container's root.
#[derive(Clone, Debug, Default)]
pub(crate) struct UnionOptions {
    pub(crate) uids: IdMap,
    pub(crate) gids: IdMap,
    pub(crate) sync: SyncPolicy,
    /// POSIX ACLs are neither shown nor taken.
    pub(crate) no_acl: bool,
    /// Every file is shown with one link.
    pub(crate) static_nlink: bool,
    /// What root makes, if he has no id here, is nobody's. Otherwise he can make nothing.
    pub(crate) root_makes_for_nobody: bool,
    /// Renaming a directory that has a lower one is refused with EXDEV instead of leaving a redirect.
    pub(crate) no_redirects: bool,
    /// A file of which only attributes are changed is copied with its data.
    pub(crate) no_metacopy: bool,
    /// Others may change the layers meanwhile: listings are read anew whenever one is begun.
    pub(crate) live: bool,
}

/// A union to be opened. All its branches keep owners at the same place.
#[derive(Debug)]
pub(crate) struct UnionSpec {
    /// The topmost first.
    pub(crate) lowers: Vec<Lower>,
    /// Without one nothing can be changed.
    pub(crate) upper: Option<Upper>,
    pub(crate) options: UnionOptions,
}
