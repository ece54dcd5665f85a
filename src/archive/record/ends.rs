//! The two ends of a record: its first line, and the footer with what must be known first.

use std::io::{self, Write};

use super::codec::damaged;
use crate::digest::{DiffId, Digest};
use crate::error::{Error, ErrorKind, Result};

/// The first line, up to the version.
const MAGIC: &[u8] = b"stratafs-record ";
/// The version and the end of the line.
const VERSION: &[u8] = b"1\n";
/// The size of the first line, in bytes.
pub(super) const HEAD: usize = MAGIC.len() + VERSION.len();
/// The size of the footer, in bytes.
pub(super) const FOOTER: usize = 68;

/// The end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Footer {
    /// The sizes of the two compressed streams, in bytes.
    pub(super) operations: u64,
    pub(super) kept: u64,
    /// The size of the archive in bytes, its entries and its digest.
    pub(super) bytes: u64,
    pub(super) entries: u64,
    pub(super) diff_id: DiffId,
}

/// Writes the first line.
pub(super) fn write_head(out: &mut impl Write) -> io::Result<()> {
    out.write_all(MAGIC)?;
    out.write_all(VERSION)
}

/// Reads the first line.
///
/// # Errors
/// [`ErrorKind::Incompatible`] for a version to come, [`ErrorKind::Corrupt`] for what is no record.
pub(super) fn check_head(head: &[u8; HEAD]) -> Result<()> {
    match head.strip_prefix(MAGIC) {
        Some(VERSION) => Ok(()),
        Some(_) => Err(Error::new(
            ErrorKind::Incompatible,
            "the record is of a version that this build does not know: use a newer version of \
             stratafs, or export in the canonical form",
        )),
        None => Err(damaged("its first line")),
    }
}

impl Footer {
    pub(super) fn encode(&self) -> [u8; FOOTER] {
        let mut bytes = [0; FOOTER];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            if let Some(space) = bytes.get_mut(at..at + part.len()) {
                space.copy_from_slice(part);
            }
            at += part.len();
        };
        for number in [self.operations, self.kept, self.bytes, self.entries] {
            put(&number.to_le_bytes());
        }
        put(self.diff_id.digest().as_bytes());
        let crc = crc(bytes.get(..FOOTER - 4).unwrap_or_default());
        if let Some(space) = bytes.last_chunk_mut::<4>() {
            *space = crc.to_le_bytes();
        }
        bytes
    }

    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub(super) fn decode(bytes: &[u8; FOOTER]) -> Result<Footer> {
        let (fields, sum) = bytes.split_at_checked(FOOTER - 4).unwrap_or_default();
        if crc(fields).to_le_bytes() != *sum {
            return Err(damaged("its end"));
        }
        let (numbers, digest) = fields.split_at_checked(32).unwrap_or_default();
        let mut numbers = numbers.as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n));
        let mut next = || numbers.next().unwrap_or(0);
        let (operations, kept, bytes, entries) = (next(), next(), next(), next());
        let digest = digest.try_into().map_err(|_| damaged("its end"))?;
        let diff_id = DiffId::from(Digest::from_bytes(digest));
        Ok(Footer { operations, kept, bytes, entries, diff_id })
    }
}

/// The CRC-32 of some bytes, as gzip has it.
pub(super) fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_footer_reads_back_and_any_changed_bit_is_noticed() {
        let diff_id = DiffId::from(Digest::of(b"x"));
        let footer = Footer { operations: 1, kept: 2, bytes: 1 << 60, entries: 4, diff_id };
        let bytes = footer.encode();
        assert_eq!(Footer::decode(&bytes).unwrap(), footer);
        for bit in 0..FOOTER * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Footer::decode(&damaged).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
