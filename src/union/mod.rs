//! The union file system: what is read through a stack of branches, and what is changed in the
//! topmost of them. It knows nothing of FUSE.

mod spec;

pub(crate) use spec::{Lower, SyncPolicy, UnionOptions, UnionSpec, Upper};

use crate::error::{Error, ErrorKind, Result};

/// A union of branches, at work.
#[derive(Debug)]
pub(crate) struct Union {
    spec: UnionSpec,
}

impl Union {
    /// Takes the branches into use. With an upper its work directory is emptied first.
    pub(crate) fn open(spec: UnionSpec) -> Result<Union> {
        if spec.lowers.is_empty() && spec.upper.is_none() {
            return Err(Error::new(ErrorKind::InvalidArgument, "a union needs a branch"));
        }
        Ok(Union { spec })
    }
}
