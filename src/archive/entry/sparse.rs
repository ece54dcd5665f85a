//! The four ways in which GNU tar says where a sparse file has data.
//!
//! | form | where the map is | its numbers |
//! |---|---|---|
//! | old, type `S` | in the header, and in blocks behind it | octal or base-256, 24 bytes a slot |
//! | PAX 0.0 | `GNU.sparse.offset` and `.numbytes`, repeated | decimal |
//! | PAX 0.1 | `GNU.sparse.map` | decimal, commas |
//! | PAX 1.0 | in front of the data, in the entry's content | decimal, a line each |
//!
//! Whatever the form, [`checked`] holds the map to one rule: extents ascend, end within the file, and
//! add up to what is stored. Forms are not mixed, and a count, where given, must be right.

use super::header::Block;
use super::pax::decimal;
use super::{Extent, MAX_FILE, Parsed, Reason};

/// Bytes of one slot of an old map: offset and length.
const SLOT: usize = 24;

/// What the `GNU.sparse.*` records of one header say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SparseKeys {
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    /// `GNU.sparse.size`, forms 0.0 and 0.1.
    size: Option<u64>,
    /// `GNU.sparse.realsize`, form 1.0.
    real_size: Option<u64>,
    blocks: Option<u64>,
    map: Option<Vec<Extent>>,
    pairs: Vec<Extent>,
    /// An offset whose length is still to come.
    offset: Option<u64>,
}

/// A PAX sparse file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PaxSparse {
    /// The file's name; the entry's own is a stand-in for readers that do not know the form.
    pub(super) name: Option<Vec<u8>>,
    /// The size with all holes.
    pub(super) size: u64,
    pub(super) map: MapPlace,
}

/// Where the map of a PAX sparse file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum MapPlace {
    Records(Vec<Extent>),
    Content,
}

impl SparseKeys {
    /// The file's own name, if it was among the records so far.
    pub(super) fn name(&self) -> Option<&[u8]> {
        self.name.as_deref()
    }

    /// Whether a key repeats by design.
    pub(super) fn repeats(key: &[u8]) -> bool {
        matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes")
    }

    /// Takes a `GNU.*` record; unknown ones are refused, since they change what the content means.
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Parsed<()> {
        match key {
            b"GNU.sparse.major" => self.major = Some(decimal(value)?),
            b"GNU.sparse.minor" => self.minor = Some(decimal(value)?),
            b"GNU.sparse.name" => self.name = Some(value.to_vec()),
            b"GNU.sparse.size" => self.size = Some(decimal(value)?),
            b"GNU.sparse.realsize" => self.real_size = Some(decimal(value)?),
            b"GNU.sparse.numblocks" => self.blocks = Some(decimal(value)?),
            b"GNU.sparse.map" => self.map = Some(comma_map(value)?),
            b"GNU.sparse.offset" => {
                if self.offset.replace(decimal(value)?).is_some() {
                    return Err("follows another offset, without a length".into());
                }
            }
            b"GNU.sparse.numbytes" => {
                let offset = self.offset.take().ok_or("has no offset before it")?;
                let len = decimal(value)?;
                self.pairs.push(Extent { offset, len });
            }
            _ => return Err("is of no kind that a layer may hold".into()),
        }
        Ok(())
    }

    /// Puts the records together; none if the file is not sparse.
    pub(super) fn resolve(self) -> Parsed<Option<PaxSparse>> {
        if self == SparseKeys::default() {
            return Ok(None);
        }
        let mixed = || Reason::from("its sparse records are those of no form, or of two");
        if self.offset.is_some() {
            return Err("its sparse records end in an offset without a length".into());
        }
        match (self.major, self.minor) {
            (Some(1), Some(0)) => {
                let records = self.blocks.is_some() || self.map.is_some() || self.size.is_some();
                match (self.name, self.real_size) {
                    (Some(name), Some(size)) if !records && self.pairs.is_empty() => {
                        Ok(Some(PaxSparse { name: Some(name), size, map: MapPlace::Content }))
                    }
                    _ => Err(mixed()),
                }
            }
            (None, None) | (Some(0), Some(0 | 1)) => {
                let size = match (self.size, self.real_size) {
                    (Some(size), None) => size,
                    _ => return Err(mixed()),
                };
                // Form 0.1 has its own name record and 0.0 has none.
                let extents = match (self.map, self.name.is_some()) {
                    (Some(map), true) if self.pairs.is_empty() => map,
                    (None, false) => self.pairs,
                    _ => return Err(mixed()),
                };
                let count = u64::try_from(extents.len()).unwrap_or(u64::MAX);
                // GNU tar takes a file that tells no number of blocks for one without a map.
                match self.blocks {
                    None => return Err(mixed()),
                    Some(blocks) if blocks != count => {
                        return Err("its sparse map has another length than it says".into());
                    }
                    Some(_) => {}
                }
                Ok(Some(PaxSparse { name: self.name, size, map: MapPlace::Records(extents) }))
            }
            _ => Err("its sparse form is of an unknown version".into()),
        }
    }
}

/// Holds a map to the rule in the module's head; `stored` is the bytes of content. Empty extents,
/// which GNU tar ends a map with to give the size, are dropped.
pub(super) fn checked(mut extents: Vec<Extent>, size: u64, stored: u64) -> Parsed<Vec<Extent>> {
    if size > MAX_FILE {
        return Err("its size is beyond that of any file".into());
    }
    let (mut end, mut sum) = (0u64, 0u64);
    for extent in &extents {
        if extent.offset < end {
            return Err("its sparse map overlaps or goes backwards".into());
        }
        end = extent
            .offset
            .checked_add(extent.len)
            .filter(|end| *end <= size)
            .ok_or("its sparse map ends behind the file's end")?;
        // No overflow: the extents are disjoint and within `size`.
        sum = sum.saturating_add(extent.len);
    }
    if sum != stored {
        return Err(format!("its sparse map has {sum} bytes of data, its content {stored}").into());
    }
    extents.retain(|extent| extent.len != 0);
    Ok(extents)
}

/// Reads slots of an old map. False means that the map ended: an unused slot is all zero, and only
/// unused ones follow it. (GNU tar looks at a slot's length there and Go at its offset.)
pub(super) fn old_slots(slots: &[u8], extents: &mut Vec<Extent>) -> Parsed<bool> {
    let mut more = true;
    for slot in slots.chunks(SLOT) {
        let (offset, len) = slot.split_at_checked(SLOT / 2).unwrap_or_default();
        if slot.iter().all(|b| *b == 0) {
            more = false;
        } else if !more || offset.first() == Some(&0) || len.first() == Some(&0) {
            return Err("its sparse map has gaps".into());
        } else {
            let number = |field| super::header::unsigned(field);
            extents.push(Extent {
                offset: number(offset).map_err(in_map)?,
                len: number(len).map_err(in_map)?,
            });
        }
    }
    Ok(more)
}

/// Reads a block that continues an old map; true if another follows.
pub(super) fn old_block(block: &Block, extents: &mut Vec<Extent>) -> Parsed<bool> {
    let (slots, rest) = block.split_at_checked(21 * SLOT).unwrap_or_default();
    let open = old_slots(slots, extents)?;
    let more = rest.first().is_some_and(|b| *b != 0);
    if more && !open {
        return Err("its sparse map goes on behind its end".into());
    }
    Ok(more)
}

fn in_map(reason: Reason) -> Reason {
    format!("a number in its sparse map {reason}").into()
}

fn comma_map(value: &[u8]) -> Parsed<Vec<Extent>> {
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let mut numbers = value.split(|b| *b == b',').map(decimal);
    let mut extents = Vec::new();
    while let Some(offset) = numbers.next() {
        extents.push(Extent {
            offset: offset?,
            len: numbers.next().ok_or("has an offset without a length")??,
        });
    }
    Ok(extents)
}

/// Reads a map of form 1.0, a block at a time: the count, then offset and length of each extent,
/// each number on its line; what is left of the last block is padding.
#[derive(Debug, Default)]
pub(super) struct ContentMap {
    digits: Vec<u8>,
    count: Option<u64>,
    offset: Option<u64>,
    extents: Vec<Extent>,
}

impl ContentMap {
    /// Takes a block; gives the map when it is complete.
    pub(super) fn feed(&mut self, block: &Block) -> Parsed<Option<Vec<Extent>>> {
        for b in block {
            if *b != b'\n' {
                // Longer than any number: keeps memory to what is read.
                if self.digits.len() > 20 {
                    return Err("its sparse map is not in lines of numbers".into());
                }
                self.digits.push(*b);
                continue;
            }
            let number = decimal(&self.digits).map_err(in_map)?;
            self.digits.clear();
            match (self.count, self.offset.take()) {
                (None, _) => self.count = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => self.extents.push(Extent { offset, len: number }),
            }
            let have = u64::try_from(self.extents.len()).unwrap_or(u64::MAX);
            if self.count == Some(have) && self.offset.is_none() {
                return Ok(Some(std::mem::take(&mut self.extents)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(pairs: &[(u64, u64)]) -> Vec<Extent> {
        pairs.iter().map(|(offset, len)| Extent { offset: *offset, len: *len }).collect()
    }

    fn keys(records: &[(&str, &str)]) -> Parsed<Option<PaxSparse>> {
        let mut keys = SparseKeys::default();
        for (key, value) in records {
            keys.take(format!("GNU.sparse.{key}").as_bytes(), value.as_bytes())?;
        }
        keys.resolve()
    }

    #[test]
    fn each_pax_form() {
        assert_eq!(keys(&[]), Ok(None));
        let map = MapPlace::Records(extents(&[(0, 5), (10, 0)]));
        let oldest = keys(&[
            ("size", "10"),
            ("numblocks", "2"),
            ("offset", "0"),
            ("numbytes", "5"),
            ("offset", "10"),
            ("numbytes", "0"),
        ]);
        let name = None;
        let size = 10;
        assert_eq!(oldest, Ok(Some(PaxSparse { name, size, map })));
        let name = Some(b"f".to_vec());
        let map = MapPlace::Records(extents(&[(0, 5)]));
        let middle = keys(&[("name", "f"), ("size", "10"), ("numblocks", "1"), ("map", "0,5")]);
        let expected = PaxSparse { name, size, map };
        assert_eq!(middle, Ok(Some(expected.clone())));
        let newest = keys(&[("major", "1"), ("minor", "0"), ("name", "f"), ("realsize", "10")]);
        let map = MapPlace::Content;
        assert_eq!(newest, Ok(Some(PaxSparse { map, ..expected })));
    }

    #[test]
    fn mixed_and_broken_forms_are_refused() {
        for records in [
            &[("size", "10"), ("offset", "0")][..],
            &[("size", "10"), ("numbytes", "0")],
            &[("size", "10"), ("offset", "0"), ("offset", "0")],
            &[("size", "10")],
            &[("size", "10"), ("offset", "0"), ("numbytes", "10")],
            &[("size", "10"), ("name", "f"), ("map", "0,5")],
            &[("size", "10"), ("numblocks", "1")],
            &[("size", "10"), ("map", "0,5")],
            &[("size", "10"), ("name", "f"), ("map", "0")],
            &[("size", "10"), ("name", "f"), ("map", "0,5,")],
            &[("size", "10"), ("name", "f"), ("map", "0,-5")],
            &[("name", "f")],
            &[("realsize", "10"), ("name", "f"), ("map", "0,5")],
            &[("size", "10"), ("realsize", "10")],
            &[("major", "1"), ("name", "f"), ("realsize", "1")],
            &[("major", "2"), ("minor", "0"), ("name", "f"), ("realsize", "1")],
            &[("major", "1"), ("minor", "0"), ("realsize", "1")],
            &[("major", "1"), ("minor", "0"), ("name", "f"), ("size", "1")],
            &[("unknown", "1")],
        ] {
            assert!(keys(records).is_err(), "{records:?}");
        }
        let mixed = keys(&[
            ("major", "1"),
            ("minor", "0"),
            ("name", "f"),
            ("realsize", "1"),
            ("map", "0,1"),
        ]);
        assert!(mixed.is_err());
    }

    #[test]
    fn maps_ascend_end_in_the_file_and_add_up() {
        let ok = checked(extents(&[(0, 5), (5, 5), (20, 0)]), 20, 10);
        assert_eq!(ok, Ok(extents(&[(0, 5), (5, 5)])));
        assert_eq!(checked(Vec::new(), 20, 0), Ok(Vec::new()));
        for (map, size, stored) in [
            (&[(5, 5), (0, 5)][..], 20, 10),
            (&[(0, 5), (4, 5)], 20, 10),
            (&[(16, 5)], 20, 5),
            (&[(21, 0)], 20, 0),
            (&[(0, 5)], 20, 6),
            (&[(0, 5)], 20, 4),
            (&[(u64::MAX, 2)], 20, 2),
            (&[(0, 1)], u64::MAX, 1),
        ] {
            assert!(checked(extents(map), size, stored).is_err(), "{map:?}");
        }
    }

    #[test]
    fn old_maps_end_at_the_first_unused_slot() {
        let slot = |offset: u64, len: u64| format!("{offset:011o} {len:011o} ").into_bytes();
        let unused = vec![0; SLOT];
        let read = |slots: &[Vec<u8>]| {
            let mut extents = Vec::new();
            old_slots(&slots.concat(), &mut extents).map(|more| (more, extents))
        };
        let full = read(&[slot(0, 1), slot(8, 9)]);
        assert_eq!(full, Ok((true, extents(&[(0, 1), (8, 9)]))));
        let ended = read(&[slot(0, 1), unused.clone()]);
        assert_eq!(ended, Ok((false, extents(&[(0, 1)]))));
        assert!(read(&[unused.clone(), slot(0, 1)]).is_err());
        let mut half = slot(0, 1);
        half[..12].fill(0);
        assert!(read(&[half]).is_err());

        let mut block = [0; 512];
        block[..SLOT].copy_from_slice(&slot(3, 4));
        let mut extents = Vec::new();
        assert_eq!(old_block(&block, &mut extents), Ok(false));
        block[504] = 1;
        assert!(old_block(&block, &mut extents).is_err());
    }

    #[test]
    fn maps_in_the_content_span_blocks() {
        let mut text = b"100\n".to_vec();
        for n in 0..100u64 {
            text.extend_from_slice(format!("{}\n{}\n", n * 1000, n).as_bytes());
        }
        let mut map = ContentMap::default();
        let mut done = None;
        for chunk in text.chunks(512) {
            assert_eq!(done, None);
            let mut block = [0; 512];
            block[..chunk.len()].copy_from_slice(chunk);
            done = map.feed(&block).unwrap();
        }
        let done = done.unwrap();
        assert_eq!((done.len(), done[99].offset, done[99].len), (100, 99_000, 99));

        let feed = |text: &[u8]| {
            let mut block = [0; 512];
            block[..text.len()].copy_from_slice(text);
            ContentMap::default().feed(&block)
        };
        assert_eq!(feed(b"0\n"), Ok(Some(Vec::new())));
        assert_eq!(feed(b"1\n2\n3\n"), Ok(Some(extents(&[(2, 3)]))));
        for bad in [&b""[..], b"\n", b"-1\n", b"1\n2\n\n", b"x\n", b"1\n2\n3"] {
            assert!(feed(bad).is_err(), "{bad:?}");
        }
        assert_eq!(feed(&[b"9\n".as_slice(), &b"1\n".repeat(12), &[b'1'; 20]].concat()).ok(), None);
    }
}
