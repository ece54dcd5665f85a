//! Blobs: small files named by their SHA-256, kept byte for byte.

use std::io::{Read, Write};

use super::layout::name;
use super::{Store, staging};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::dir::OnExisting;

/// The largest blob that is kept, in bytes: manifests and configurations are far smaller.
const BLOB_MAX: u64 = 64 << 20;

impl Store {
    /// Writes a blob; data and name are on disk with the next sync of the file system.
    pub(super) fn write_blob(&self, bytes: &[u8]) -> Result<Digest> {
        if bytes.len() as u64 > BLOB_MAX {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!(
                    "a blob has {} bytes, and {BLOB_MAX} is the most that is kept",
                    bytes.len()
                ),
            ));
        }
        let digest = Digest::of(bytes);
        let (target, blobs) = (name(&digest.hex())?, &self.layout.blobs);
        let at = self.layout.path.join("blobs/sha256").join(digest.hex());
        if self.blob(&digest).is_ok() {
            return Ok(digest);
        }
        let temp = name(&format!("new-{:016x}", staging::random()))?;
        let write = || -> std::io::Result<()> {
            blobs.create_file(&temp, 0o600)?.write_all(bytes)?;
            blobs.rename(&temp, blobs, &target, OnExisting::Replace)
        };
        if let Err(e) = write() {
            if let Err(e) = blobs.unlink(&temp) {
                tracing::debug!(error = %e, "no temporary blob to remove");
            }
            return Err(Error::io("write blob", at, e));
        }
        Ok(digest)
    }

    /// Reads a blob, and verifies it.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`].
    /// - [`ErrorKind::DigestMismatch`]: it was damaged on disk.
    pub fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let at = self.layout.path.join("blobs/sha256").join(digest.hex());
        let mut bytes = Vec::new();
        let file = self.layout.blobs.open_file(&name(&digest.hex())?).at("open blob", &at)?;
        file.take(BLOB_MAX).read_to_end(&mut bytes).at("read blob", &at)?;
        if Digest::of(&bytes) == *digest {
            Ok(bytes)
        } else {
            Err(Error::new(ErrorKind::DigestMismatch, "blob is damaged: import its image again")
                .with_path(at))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerFormat;
    use crate::store::StoreOptions;

    #[test]
    fn a_blob_too_large_to_be_read_back_is_not_written() {
        let tmp = tempfile::tempdir().unwrap();
        let mut options = StoreOptions::new();
        options.format = Some(LayerFormat::Aufs);
        let store = Store::open(tmp.path(), options).unwrap();
        let large = vec![0; usize::try_from(BLOB_MAX).unwrap() + 1];
        let e = store.put_image("image", &large, b"config", &[]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded, "{e}");
    }
}
