//! The record of an archive: what it takes, beside the unpacked layer, to give the same bytes back.
//!
//! Headers, extended headers, sparse maps, padding, the trailer and what follows it cannot be made
//! anew from files: dialects, order and padding are the choice of whoever wrote them, and the digest
//! of a layer is one of all of that. So while an archive is unpacked, [`capture`] writes down every
//! byte that is not a file's content, and of content where in the layer it went; [`replay()`] puts
//! the two together again, and verifies each file and the whole.
//!
//! Content that the layer does not have at the end is in the record itself: what entries hold that
//! are not unpacked (AUFS's own files), what was read before a later entry of the archive replaced
//! or removed it, what its owner may not read. [`RecordOptions`] bound that, and the whole; beyond a
//! bound the layer has no record, and the reason is told.
//!
//! # The file
//! ```text
//! "stratafs-record 1\n"
//! operations             in order; compressed with zstd (gzip in a build without it), as is
//! kept contents          by the number of the content that they stand for
//! footer                 68 bytes: the sizes of both, the archive's size, entries and digest, CRC-32
//! ```
//! [`codec`] has the operations and the kept contents, [`ends`] the first line and the footer. Both streams carry the checksums
//! of their compression, files a CRC-32 each, which names the one that was changed.
//!
//! Paths in it are of the layer as it is: every name a directory's but the last, which is a regular
//! file's. No symlink is followed, so nothing outside of the layer can be read, whatever the record
//! says and whatever was put into the layer.
//!
//! The idea is tar-split's, which moby and containers/storage use; that fails on duplicate paths,
//! and takes sparse files for plain ones.

mod capture;
mod codec;
mod ends;
mod replay;
mod spool;

pub(crate) use capture::{Capture, Captured, Tapped, locked};
#[cfg(fuzzing)]
pub(crate) use codec::recoded;
pub(crate) use replay::replay;

/// How much a record may hold. Beyond a bound the layer is unpacked all the same, but has no record,
/// and can only be exported in the canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordOptions {
    /// Bytes of content that the layer itself does not have: of files that the same archive replaces
    /// or deletes, of AUFS's own files, of files that their owner may not read, and what follows the
    /// archive's end, zeros aside. Default: 16 MiB.
    pub max_inline_bytes: u64,
    /// Bytes of the record on disk; about 60 for each file as a rule. With 0 none is written.
    /// Default: 1 GiB.
    pub max_bytes: u64,
}

impl Default for RecordOptions {
    fn default() -> Self {
        RecordOptions { max_inline_bytes: 16 << 20, max_bytes: 1 << 30 }
    }
}
