//! The digest that fs-verity gives a file, computed from its bytes.
//!
//! As in the kernel's `Documentation/filesystems/fsverity.rst`, for blocks of 4096 bytes and without
//! salt: what `fsverity enable` and composefs use. Of a file that was sealed with other blocks or with
//! salt the digest is another.

use std::io::{self, Read};

use sha2::{Sha256, Sha512};

use crate::layer::foreign::VerityDigest;

const BLOCK: usize = 4096;

/// Whether the bytes of `data`, `size` of them, have the digest.
pub(super) fn has_digest(data: impl Read, size: u64, digest: &VerityDigest) -> io::Result<bool> {
    Ok(match digest {
        VerityDigest::Sha256(wanted) => measure::<Sha256>(data, size, 1)? == wanted,
        VerityDigest::Sha512(wanted) => measure::<Sha512>(data, size, 2)? == wanted,
    })
}

/// The digest, by the algorithm whose number in descriptors is given.
fn measure<D: sha2::Digest>(mut data: impl Read, size: u64, algorithm: u8) -> io::Result<Vec<u8>> {
    let mut tree = Tree::<D>::default();
    let mut left = size;
    while left > 0 {
        // The last block is padded with zeros.
        let mut block = vec![0; BLOCK];
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK);
        data.read_exact(block.get_mut(..wanted).unwrap_or_default())?;
        tree.add(0, D::digest(&block).as_slice());
        left -= wanted as u64;
    }
    let root = tree.finish();
    // struct fsverity_descriptor: version, algorithm, log2 of the block size, salt size, 4 bytes,
    // data size, root hash (64), salt (32), reserved (144).
    let mut descriptor = vec![1, algorithm, 12, 0, 0, 0, 0, 0];
    descriptor.extend_from_slice(&size.to_le_bytes());
    descriptor.extend_from_slice(&root);
    descriptor.resize(256, 0);
    Ok(D::digest(&descriptor).as_slice().to_vec())
}

/// The hashes of blocks, of blocks of hashes, and so on; each level holds less than a block.
struct Tree<D> {
    levels: Vec<Vec<u8>>,
    blocks: u64,
    algorithm: std::marker::PhantomData<D>,
}

impl<D> Default for Tree<D> {
    fn default() -> Self {
        Tree { levels: Vec::new(), blocks: 0, algorithm: std::marker::PhantomData }
    }
}

impl<D: sha2::Digest> Tree<D> {
    fn add(&mut self, level: usize, hash: &[u8]) {
        if level == 0 {
            self.blocks += 1;
        }
        let mut hash = hash.to_vec();
        for level in level.. {
            if self.levels.len() <= level {
                self.levels.push(Vec::new());
            }
            let Some(pending) = self.levels.get_mut(level) else {
                return;
            };
            // A full block is passed on only when there is more, since the last one may be the root.
            if pending.len() == BLOCK {
                let up = D::digest(&*pending).as_slice().to_vec();
                pending.clear();
                pending.append(&mut hash);
                hash = up;
            } else {
                pending.append(&mut hash);
                return;
            }
        }
    }

    /// The root hash: of a file without data, none; of one block, that block's own.
    fn finish(mut self) -> Vec<u8> {
        if self.blocks <= 1 {
            return self.levels.pop().unwrap_or_default();
        }
        let mut level = 0;
        loop {
            let Some(pending) = self.levels.get_mut(level) else {
                return Vec::new();
            };
            pending.resize(BLOCK, 0);
            let hash = D::digest(&*pending).as_slice().to_vec();
            if level + 1 == self.levels.len() {
                return hash;
            }
            self.add(level + 1, &hash);
            level += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::Digest as _;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn sha256(data: &[u8]) -> String {
        hex(&measure::<Sha256>(data, data.len() as u64, 1).unwrap())
    }

    /// The root of the tree over these hashes of blocks, level by level, as the documentation tells it.
    fn root_by_the_book(mut level: Vec<u8>) -> Vec<u8> {
        while level.len() > 32 {
            level = level
                .chunks(BLOCK)
                .flat_map(|chunk| {
                    let mut block = chunk.to_vec();
                    block.resize(BLOCK, 0);
                    Sha256::digest(&block).to_vec()
                })
                .collect();
        }
        level
    }

    #[test]
    fn an_empty_file_has_the_digest_that_fsverity_gives() {
        assert_eq!(sha256(b""), "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95");
    }

    #[test]
    fn trees_of_all_heights() {
        const PER_BLOCK: u32 = 128;
        for blocks in [
            0,
            1,
            2,
            PER_BLOCK,
            PER_BLOCK + 1,
            2 * PER_BLOCK,
            PER_BLOCK * PER_BLOCK,
            PER_BLOCK * PER_BLOCK + 1,
        ] {
            let mut tree = Tree::<Sha256>::default();
            let mut hashes = Vec::new();
            for block in 0..blocks {
                let hash = [&block.to_le_bytes()[..], &[7; 28]].concat();
                tree.add(0, &hash);
                hashes.extend(hash);
            }
            assert_eq!(tree.finish(), root_by_the_book(hashes), "{blocks}");
        }
    }

    #[test]
    fn the_last_block_is_padded_and_the_size_counts() {
        let mut padded = vec![1; 5000];
        padded.resize(2 * BLOCK, 0);
        let short = padded.get(..5000).unwrap();
        assert_ne!(sha256(short), sha256(&padded));
        let leaves: Vec<u8> =
            padded.chunks(BLOCK).flat_map(|block| Sha256::digest(block).to_vec()).collect();
        let mut descriptor = vec![1, 1, 12, 0, 0, 0, 0, 0];
        descriptor.extend(5000_u64.to_le_bytes());
        descriptor.extend(root_by_the_book(leaves));
        descriptor.resize(256, 0);
        assert_eq!(sha256(short), hex(&Sha256::digest(&descriptor)));
    }

    #[test]
    fn another_digest_is_told() {
        let empty = measure::<Sha256>(&b""[..], 0, 1).unwrap();
        let digest = VerityDigest::Sha256(empty.try_into().unwrap());
        assert!(has_digest(&b""[..], 0, &digest).unwrap());
        assert!(!has_digest(&b"x"[..], 1, &digest).unwrap());
    }
}
