//! What callers may choose about unpacking, and what they get told.

use std::path::PathBuf;

use super::parents::Below;
use crate::archive::record::RecordOptions;
use crate::digest::{DiffId, Digest};
use crate::layer::{LayerFormat, Usage};
use crate::sys::owners::Owners;

/// What the directory is that a layer archive is unpacked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayerTarget {
    /// A layer of its own, in this format: the archive's whiteouts become the format's marks. All
    /// that is in the directory belongs to this layer; it is empty as a rule.
    Layer(LayerFormat),
    /// A plain tree with the layers below already in it: the archive's whiteouts delete what was
    /// there before.
    Tree,
}

/// Bounds on what one archive may make this process do. Reaching one is
/// [`ErrorKind::LimitExceeded`](crate::ErrorKind::LimitExceeded), and its message names the option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ApplyLimits {
    /// Headers in the archive, and as many missing parent directories. Default: 10 million.
    pub max_entries: u64,
    /// Bytes of a path or link target, and of a path once the links in it were followed. Default: 4096.
    pub max_path_bytes: usize,
    /// Bytes of extended headers of one entry. Default: 1 MiB.
    pub max_pax_bytes: u64,
    /// Bytes of xattr names and values of one entry. Default: 256 KiB.
    pub max_xattr_bytes: u64,
    /// Bytes of the uncompressed archive, and of any single file with its holes. Default: 1 TiB.
    pub max_unpacked_bytes: u64,
    /// Uncompressed bytes for each compressed byte, once 64 MiB were uncompressed. Default: 1100,
    /// which is just beyond what gzip reaches for zeros (1032): it stops only bombs in zstd, and
    /// those in gzip are stopped by `max_unpacked_bytes`.
    pub max_ratio: u64,
}

impl Default for ApplyLimits {
    fn default() -> Self {
        ApplyLimits {
            max_entries: 10_000_000,
            max_path_bytes: 4096,
            max_pax_bytes: 1 << 20,
            max_xattr_bytes: 256 << 10,
            max_unpacked_bytes: 1 << 40,
            max_ratio: 1100,
        }
    }
}

/// What to do with xattrs in an archive that belong to union file systems (`trusted.overlay.*`,
/// `user.overlay.*`, `user.fuseoverlayfs.*`, `security.fuseoverlayfs.*`,
/// `user.containers.override_*`). They are never set: an archive could uncover deleted files with
/// them, or hand out setuid bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UnionXattrs {
    /// Leave them out, and count them.
    #[default]
    Strip,
    /// Refuse the archive.
    Refuse,
}

/// Which other xattrs of an archive are set, POSIX access control lists among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum XattrPolicy {
    /// `user.*`, `security.*` but for `security.selinux` (labels are the host's), and access control
    /// lists. What the file system does not take, or this process may not set, is left out and
    /// counted.
    #[default]
    Lenient,
    /// All of them; one that cannot be set is an error.
    Exact,
    /// None of them; all are counted.
    Skip,
}

/// Who owns what is unpacked. In a store that keeps owners in xattrs, [`Ownership::AsRecorded`] needs no right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ownership {
    /// The users and groups that the archive records; needs CAP_CHOWN.
    #[default]
    AsRecorded,
    /// The user who unpacks; those that the archive records, and devices, are kept in xattrs:
    /// [`Owners::InXattrs`].
    InXattrs,
    /// The user who unpacks.
    Ignore,
}

impl Ownership {
    /// Where a plain directory is to keep them.
    pub(super) fn owners(self) -> Owners {
        match self {
            Ownership::InXattrs => Owners::InXattrs,
            Ownership::AsRecorded | Ownership::Ignore => Owners::OfFiles,
        }
    }
}

/// What is done with the devices in an archive. The whiteout device 0:0 is refused always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Devices {
    /// They are made; needs CAP_MKNOD in the initial user namespace.
    #[default]
    Create,
    /// They are left out and counted.
    Skip,
}

/// How a layer archive is unpacked. [`ApplyOptions::default`] is for a privileged process,
/// [`ApplyOptions::unprivileged`] for any other.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ApplyOptions {
    /// Bounds.
    pub limits: ApplyLimits,
    /// Xattrs that belong to union file systems. Default: stripped.
    pub union_xattrs: UnionXattrs,
    /// All other xattrs. Default: lenient.
    pub xattrs: XattrPolicy,
    /// Directories, topmost first, that are asked for the attributes of parent directories which an
    /// archive names no entry for: the first that has the path gives owner, mode, xattrs and times.
    /// Where a layer is unpacked they are layers of its format, and what their marks hide is not there.
    /// Without one they are root's with mode 0755 and the time of the entry that needs them.
    /// Default: none.
    pub parents: Vec<PathBuf>,
    /// More of them, which come to be while the archive is unpacked.
    pub(crate) below: Option<Below>,
    /// Owners. Default: as recorded.
    pub ownership: Ownership,
    /// Devices. Default: made.
    pub devices: Devices,
    /// Bounds of the record that a store keeps, so that it can give the same archive back. Default:
    /// as [`RecordOptions`] says.
    pub record: RecordOptions,
    /// How many threads work on it at most; the result is the same, and so are the errors. The
    /// caller's is one, and alone reads the input and calls the progress callback; 0 and 1 are that
    /// one alone. With 2 another makes the files, with 3 or more yet another digests the archive. A
    /// small archive is unpacked on the caller's. Default: 3.
    pub threads: usize,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        ApplyOptions {
            limits: ApplyLimits::default(),
            union_xattrs: UnionXattrs::default(),
            xattrs: XattrPolicy::default(),
            parents: Vec::new(),
            below: None,
            ownership: Ownership::default(),
            devices: Devices::default(),
            record: RecordOptions::default(),
            threads: 3,
        }
    }
}

impl ApplyOptions {
    /// What an ordinary user can do: everything is the user's own, and devices are left out.
    pub fn unprivileged() -> Self {
        ApplyOptions {
            ownership: Ownership::Ignore,
            devices: Devices::Skip,
            ..ApplyOptions::default()
        }
    }
}

/// What unpacking a layer archive found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied {
    /// The digest of the uncompressed archive, all of it.
    pub diff_id: DiffId,
    /// The digest of the input as it came, to its very end.
    pub blob: Digest,
    /// Its size.
    pub blob_bytes: u64,
    /// The size of the uncompressed archive.
    pub unpacked_bytes: u64,
    /// Entries of the archive, marks and skipped ones among them.
    pub entries: u64,
    /// What the directory takes on disk now.
    pub usage: Usage,
    /// Whether the layer has marks: false if surely none, true if some were written, though a later
    /// entry may have replaced them. Always false for a plain tree.
    pub has_marks: bool,
    /// Whether the archive has an entry for the root directory.
    pub describes_root: bool,
    /// How many xattrs of union file systems were stripped.
    pub stripped_xattrs: u64,
    /// How many other xattrs and access control lists were not set, by [`XattrPolicy`].
    pub skipped_xattrs: u64,
    /// How many devices were not made, by [`Devices::Skip`].
    pub skipped_devices: u64,
}
