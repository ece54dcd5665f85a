//! The 512-byte header block: fields, numbers, checksum, dialects.
//!
//! Strict where readers differ:
//! - A number is spaces, octal digits, then only spaces and NULs; an empty field is 0. A digit
//!   after the terminator is refused: some readers stop there, some skip it.
//! - A base-256 number starts with exactly 0x80 or 0xff: GNU tar takes no other, Go takes more.
//! - The checksum may be the signed or the unsigned sum; both are in the wild, and which it is
//!   changes nothing that is read.
//! - The magic is ustar's, GNU's, or all zero (v7). A block with another one is refused, since the
//!   magic decides whether bytes 345 to 500 are part of the name. With star's trailer the name part
//!   is 24 bytes shorter; names which reach that far are refused. ustar of another version than `00`
//!   (Ant wrote NULs) is taken for v7, as the crate tar does: with no name part, others see the same.
//! - Python's tarfile takes those bytes for part of the name whatever the magic: without ustar's they
//!   must be empty, but in GNU's own types, where it does not. (GNU tar has times there in incremental
//!   dumps, which no layer is.) A name that is all prefix, which some take for a directory's, is
//!   refused too.
//! - libarchive takes the map of a sparse file from any header of GNU's: only those of type `S` may
//!   have one.
//! - Device numbers must be numbers even where nobody needs them: Python reads them of every header,
//!   and ends its list, without a word, where it fails to.

use super::{Parsed, Reason};

/// The unit of tar, in bytes.
pub(super) const BLOCK: usize = 512;

/// One unit of tar.
pub(super) type Block = [u8; BLOCK];

/// The largest value that eleven octal digits hold: the size and time fields.
pub(super) const MAX_OCTAL_11: u64 = 0o777_7777_7777;
/// The largest value that seven octal digits hold: the id, mode and device fields.
pub(super) const MAX_OCTAL_7: u64 = 0o777_7777;

/// Where a field is in the block.
#[derive(Clone, Copy)]
struct Field {
    at: usize,
    len: usize,
}

const fn field(at: usize, len: usize) -> Field {
    Field { at, len }
}

const NAME: Field = field(0, 100);
const MODE: Field = field(100, 8);
const UID: Field = field(108, 8);
const GID: Field = field(116, 8);
const SIZE: Field = field(124, 12);
const MTIME: Field = field(136, 12);
const CHECKSUM: Field = field(148, 8);
const TYPE: Field = field(156, 1);
const LINK: Field = field(157, 100);
const MAGIC: Field = field(257, 8);
const MAJOR: Field = field(329, 8);
const MINOR: Field = field(337, 8);
const PREFIX: Field = field(345, 155);
const STAR_TRAILER: Field = field(508, 4);
/// GNU: four slots of a sparse map, whether blocks with more follow, and the file's size.
const SPARSE: Field = field(386, 96);
const SPARSE_MORE: Field = field(482, 1);
const SPARSE_SIZE: Field = field(483, 12);

/// star's name prefix: it must end, with its NUL, before byte 476.
const STAR_PREFIX_LEN: usize = 130;

impl Field {
    fn of(self, block: &Block) -> &[u8] {
        block.get(self.at..self.at.saturating_add(self.len)).unwrap_or_default()
    }

    fn byte(self, block: &Block) -> u8 {
        block.get(self.at).copied().unwrap_or(0)
    }

    /// Copies as much of `bytes` as fits.
    fn put(self, block: &mut Block, bytes: &[u8]) {
        if let Some(space) = block.get_mut(self.at..self.at.saturating_add(self.len)) {
            for (to, from) in space.iter_mut().zip(bytes) {
                *to = *from;
            }
        }
    }

    /// Writes octal digits and a NUL; 0 for what does not fit, which then stands in a PAX record.
    fn put_octal(self, block: &mut Block, value: u64) {
        let digits = self.len.saturating_sub(1);
        let text = format!("{value:0digits$o}");
        if text.len() == digits {
            self.put(block, text.as_bytes());
        } else {
            self.put(block, "0".repeat(digits).as_bytes());
        }
    }
}

/// Which dialect a block's magic announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    V7,
    Ustar,
    Gnu,
}

/// A header block, its fields decoded but not yet put together with what extended headers say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) dialect: Dialect,
    /// Name and ustar prefix joined.
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) typeflag: u8,
    pub(super) mode: u64,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) size: u64,
    pub(super) mtime: i64,
}

/// Whether there is anything in the fields that GNU has for the map of a sparse file.
fn has_map(block: &Block) -> bool {
    [SPARSE, SPARSE_MORE, SPARSE_SIZE].iter().any(|field| field.of(block).iter().any(|b| *b != 0))
}

/// Whether all bytes are zero: the end of an archive.
pub(super) fn is_zero(block: &Block) -> bool {
    block.iter().all(|b| *b == 0)
}

impl Header {
    /// Reads a block that is not all zero.
    pub(super) fn decode(block: &Block) -> Parsed<Header> {
        check_sum(block)?;
        let dialect = match MAGIC.of(block) {
            b"ustar\x0000" => Dialect::Ustar,
            b"ustar  \0" => Dialect::Gnu,
            [0, 0, 0, 0, 0, 0, 0, 0] | [b'u', b's', b't', b'a', b'r', 0, ..] => Dialect::V7,
            _ => return Err("its magic is that of no tar dialect".into()),
        };
        let mut name = Vec::new();
        if dialect == Dialect::Ustar {
            let prefix = text(PREFIX.of(block));
            if prefix.len() > STAR_PREFIX_LEN && STAR_TRAILER.of(block) == b"tar\0" {
                return Err("its name is longer than star's header holds".into());
            }
            if !prefix.is_empty() {
                if text(NAME.of(block)).is_empty() {
                    return Err("its name is all in the header's prefix".into());
                }
                name.extend_from_slice(prefix);
                name.push(b'/');
            }
        } else if PREFIX.byte(block) != 0
            && !(dialect == Dialect::Gnu && matches!(TYPE.byte(block), b'S' | b'L' | b'K'))
        {
            return Err("it has bytes where only ustar has a part of the name".into());
        } else if dialect == Dialect::Gnu && TYPE.byte(block) != b'S' && has_map(block) {
            return Err("it has bytes where only sparse files have a map".into());
        }
        Header::device(block)?;
        name.extend_from_slice(text(NAME.of(block)));
        Ok(Header {
            dialect,
            name,
            link: text(LINK.of(block)).to_vec(),
            typeflag: TYPE.byte(block),
            mode: unsigned(MODE.of(block)).map_err(in_field("mode"))?,
            uid: unsigned(UID.of(block)).map_err(in_field("owner"))?,
            gid: unsigned(GID.of(block)).map_err(in_field("group"))?,
            size: unsigned(SIZE.of(block)).map_err(in_field("size"))?,
            mtime: number(MTIME.of(block)).map_err(in_field("mtime"))?,
        })
    }

    /// The name as the block has it, for messages about blocks that cannot be decoded.
    pub(super) fn name_of(block: &Block) -> &[u8] {
        text(NAME.of(block))
    }

    /// The major and minor device number.
    pub(super) fn device(block: &Block) -> Parsed<(u64, u64)> {
        Ok((
            unsigned(MAJOR.of(block)).map_err(in_field("major device"))?,
            unsigned(MINOR.of(block)).map_err(in_field("minor device"))?,
        ))
    }

    /// A GNU sparse header's first slots, whether more blocks follow, and the file's size.
    pub(super) fn gnu_sparse(block: &Block) -> Parsed<(&[u8], bool, u64)> {
        Ok((
            SPARSE.of(block),
            SPARSE_MORE.byte(block) != 0,
            unsigned(SPARSE_SIZE.of(block)).map_err(in_field("sparse size"))?,
        ))
    }

    /// Writes a ustar block. Numbers too large for their field become 0 and names too long are cut:
    /// the caller says them in PAX records.
    pub(super) fn encode(&self, device: (u32, u32)) -> Block {
        let mut block = [0; BLOCK];
        let (prefix, name) = split_name(&self.name).unwrap_or((&[], &self.name));
        PREFIX.put(&mut block, prefix);
        NAME.put(&mut block, name);
        MODE.put_octal(&mut block, self.mode);
        UID.put_octal(&mut block, self.uid);
        GID.put_octal(&mut block, self.gid);
        SIZE.put_octal(&mut block, self.size);
        MTIME.put_octal(&mut block, u64::try_from(self.mtime).unwrap_or(0));
        TYPE.put(&mut block, &[self.typeflag]);
        LINK.put(&mut block, &self.link);
        MAGIC.put(&mut block, b"ustar\x0000");
        MAJOR.put_octal(&mut block, u64::from(device.0));
        MINOR.put_octal(&mut block, u64::from(device.1));
        let (sum, _) = sums(&block);
        CHECKSUM.put(&mut block, format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// Whether a link target fits the header; it may fill the field without a NUL.
pub(super) fn link_fits(link: &[u8]) -> bool {
    link.len() <= LINK.len
}

/// Splits a name into ustar's prefix and name, at the last slash that lets both fit.
pub(super) fn split_name(name: &[u8]) -> Option<(&[u8], &[u8])> {
    if name.len() <= NAME.len {
        return Some((&[], name));
    }
    // The slash itself is not stored. One that ends the name leaves nothing for the name field.
    let last = name.len().checked_sub(2)?.min(PREFIX.len);
    let slash = name.get(..=last)?.iter().rposition(|b| *b == b'/')?;
    let (prefix, rest) = name.split_at_checked(slash)?;
    let rest = rest.strip_prefix(b"/")?;
    (!prefix.is_empty() && rest.len() <= NAME.len).then_some((prefix, rest))
}

/// The bytes before the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

fn in_field(name: &'static str) -> impl Fn(Reason) -> Reason {
    move |reason| format!("its {name} field {reason}").into()
}

pub(super) fn unsigned(field: &[u8]) -> Parsed<u64> {
    u64::try_from(number(field)?).map_err(|_| "is negative".into())
}

/// Reads a numeric field, octal or base-256.
fn number(field: &[u8]) -> Parsed<i64> {
    match field.split_first() {
        Some((first @ (0x80 | 0xff), rest)) => base_256(*first == 0xff, rest),
        _ => octal(field),
    }
}

fn octal(field: &[u8]) -> Parsed<i64> {
    let bad = || Reason::from("is not an octal number");
    let digits = field.trim_ascii_start();
    let end = digits.iter().position(|b| !b.is_ascii_digit()).unwrap_or(digits.len());
    let (digits, rest) = digits.split_at_checked(end).ok_or_else(bad)?;
    let leading = field.len().saturating_sub(digits.len() + rest.len());
    if field.iter().take(leading).any(|b| *b != b' ') || rest.iter().any(|b| !matches!(b, 0 | b' '))
    {
        return Err(bad());
    }
    digits.iter().try_fold(0i64, |value, b| match b {
        // At most twelve digits: 36 bits.
        b'0'..=b'7' => Ok(value << 3 | i64::from(b - b'0')),
        _ => Err(bad()),
    })
}

/// Two's complement, most significant byte first; the first byte of the field was only the sign.
fn base_256(negative: bool, rest: &[u8]) -> Parsed<i64> {
    let value = rest.iter().try_fold(if negative { -1i64 } else { 0 }, |value, b| {
        value.checked_mul(256).map(|shifted| shifted | i64::from(*b))
    });
    match value {
        Some(value) if (value < 0) == negative => Ok(value),
        _ => Err("is beyond 64 bits".into()),
    }
}

/// The unsigned and the signed sum of all bytes, the checksum's own counted as spaces.
fn sums(block: &Block) -> (i64, i64) {
    let own = CHECKSUM.at..CHECKSUM.at + CHECKSUM.len;
    block
        .iter()
        .enumerate()
        .map(|(at, b)| if own.contains(&at) { b' ' } else { *b })
        .fold((0, 0), |(unsigned, signed), b| {
            (unsigned + i64::from(b), signed + i64::from(b.cast_signed()))
        })
}

fn check_sum(block: &Block) -> Parsed<()> {
    let stored = CHECKSUM.of(block);
    let (unsigned, signed) = sums(block);
    match octal(stored) {
        // An empty field reads as 0, which is the sum of no block: eight spaces alone are 256.
        Ok(sum) if sum == unsigned || (sum == signed && sum != 0) => Ok(()),
        _ => Err("its header's checksum is wrong: damaged, or not a tar header".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            dialect: Dialect::Ustar,
            name: b"dir/file".to_vec(),
            link: b"target".to_vec(),
            typeflag: b'0',
            mode: 0o644,
            uid: 1000,
            gid: 1001,
            size: 7,
            mtime: 1_700_000_000,
        }
    }

    fn resum(block: &mut Block) {
        let (sum, _) = sums(block);
        CHECKSUM.put(block, format!("{sum:06o}\0 ").as_bytes());
    }

    #[test]
    fn reads_back_what_it_writes() {
        let block = header().encode((8, 1));
        assert_eq!(Header::decode(&block).unwrap(), header());
        assert_eq!(Header::device(&block).unwrap(), (8, 1));
    }

    #[test]
    fn numbers() {
        for (field, value) in [
            (&b"0000644\0"[..], 0o644),
            (b"   644 \0", 0o644),
            (b"000644 \0", 0o644),
            (b"00000000", 0),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"        ", 0),
            (b"777777777777", (1 << 36) - 1),
            (b"\x80\0\0\0\0\0\0\x01", 1),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", i64::MAX),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", -2),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", i64::MIN),
        ] {
            assert_eq!(number(field), Ok(value), "{field:?}");
        }
        for field in [
            &b"0000648\0"[..],
            b"-000644\0",
            b"+000644\0",
            b"0x00644\0",
            b"\x00000644\0",
            b"0644\x00001\0",
            b"064 4\0\0\0",
            b"\t000644\0",
            b"\x81\0\0\0\0\0\0\0",
            b"\xfe\0\0\0\0\0\0\0",
            b"\x80\0\0\0\x80\0\0\0\0\0\0\0",
            b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff",
            b"\xff\0\0\0\0\0\0\0\0\0\0\0",
        ] {
            assert!(number(field).is_err(), "{field:?}");
        }
    }

    #[test]
    fn takes_either_checksum_and_no_other() {
        let mut h = header();
        h.name = vec![0xff; 20];
        let mut block = h.encode((0, 0));
        let (unsigned, signed) = sums(&block);
        assert_ne!(unsigned, signed);
        CHECKSUM.put(&mut block, format!("{signed:06o}\0 ").as_bytes());
        assert!(Header::decode(&block).is_ok());
        CHECKSUM.put(&mut block, format!("{:06o}\0 ", unsigned + 1).as_bytes());
        assert!(Header::decode(&block).is_err());
        CHECKSUM.put(&mut block, &[0; 8]);
        assert!(Header::decode(&block).is_err());
    }

    #[test]
    fn the_magic_decides_about_the_prefix() {
        let mut h = header();
        h.name = [vec![b'p'; 120], b"/name".to_vec()].concat();
        let mut block = h.encode((0, 0));
        assert_eq!(Header::decode(&block).unwrap().name, h.name);
        for magic in [b"ustar  \0", &[0; 8], b"ustar\x0100"] {
            MAGIC.put(&mut block, magic);
            resum(&mut block);
            assert!(Header::decode(&block).is_err(), "{magic:?}");
        }
        PREFIX.put(&mut block, &[0; 155]);
        for (magic, read) in [(b"ustar  \0", true), (&[0; 8], true), (b"ustar\x0100", false)] {
            MAGIC.put(&mut block, magic);
            resum(&mut block);
            assert_eq!(Header::decode(&block).is_ok_and(|h| h.name == b"name"), read, "{magic:?}");
        }
    }

    #[test]
    fn refuses_a_prefix_that_star_reads_otherwise() {
        let mut h = header();
        h.name = [vec![b'p'; 140], b"/name".to_vec()].concat();
        let mut block = h.encode((0, 0));
        STAR_TRAILER.put(&mut block, b"tar\0");
        resum(&mut block);
        assert!(Header::decode(&block).is_err());
    }

    #[test]
    fn splits_long_names_only_where_both_halves_fit() {
        let name = |len: usize| vec![b'n'; len];
        let join = |a: usize, b: usize| [name(a), name(b)].join(&b'/');
        assert_eq!(split_name(&name(100)), Some((&[][..], &name(100)[..])));
        assert_eq!(split_name(&name(101)), None);
        let both = join(155, 100);
        assert_eq!(split_name(&both), Some((&name(155)[..], &name(100)[..])));
        assert_eq!(split_name(&join(156, 1)), None);
        assert_eq!(split_name(&join(50, 101)), None);
        // The final slash of a directory is no place to split.
        let mut dir = name(110);
        dir.push(b'/');
        assert_eq!(split_name(&dir), None);
        // An absolute name would lose its slash.
        let absolute = [b"/".to_vec(), name(100)].concat();
        assert_eq!(split_name(&absolute), None);
    }
}
