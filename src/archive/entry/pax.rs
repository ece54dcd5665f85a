//! PAX extended headers: `LENGTH KEY=VALUE\n` records.
//!
//! Strict where readers differ:
//! - The length is plain decimal, without sign or leading zero, and ends exactly behind the newline.
//! - A key comes once. (POSIX says that the last wins; some readers take the first. The two keys of
//!   the oldest sparse form, which repeat by design, are the exception.)
//! - A line inside of a value is not itself a record: the crate tar cuts records at newlines, and
//!   would take a name from a comment. (It also misses a name that has a newline, and what follows a
//!   value with an empty line. Names and access control lists have those for good reasons, so they
//!   are read.)
//! - An empty value, which in POSIX cancels a global record, is refused for every key that counts:
//!   some readers then fall back to the header, others take the empty string.
//! - A global header may hold only comments, as `git archive` writes them. Anything else would
//!   change later entries behind the back of readers that skip it.
//! - The name of a sparse file comes behind the stand-in for it: Python's tarfile takes the last of
//!   the two, others take the former. (So GNU tar's form 0.1, where that needs a record for the
//!   stand-in, is refused: it writes them the other way round.)
//! - Xattrs come as `SCHILY.xattr.NAME` (raw) or `LIBARCHIVE.xattr.NAME` (name with percent codes,
//!   value in base64); both may be there if they agree. The former's name is taken as it is, as Go
//!   does; GNU tar alone has percent codes for `%` and `=` in it.
//!
//! Ignored: user and group names and `RHT.security.selinux`, which belong to the machine that made
//! the archive, `ctime`, inode and link counts, file flags, and the keys of other vendors.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::sparse::SparseKeys;
use super::{Parsed, Reason, Timestamp};

const SCHILY_XATTR: &[u8] = b"SCHILY.xattr.";
const LIBARCHIVE_XATTR: &[u8] = b"LIBARCHIVE.xattr.";

/// One record as it stands: key and value.
type Record<'a> = (&'a [u8], &'a [u8]);

/// What one extended header says about the entry that follows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) linkpath: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) devmajor: Option<u64>,
    pub(super) devminor: Option<u64>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) atime: Option<Timestamp>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) acl_access: Option<Vec<u8>>,
    pub(super) acl_default: Option<Vec<u8>>,
    pub(super) sparse: SparseKeys,
}

impl Pax {
    /// Decodes the body of an `x` header.
    pub(super) fn decode(body: &[u8]) -> Parsed<Pax> {
        let mut pax = Pax::default();
        let mut seen = BTreeSet::new();
        for record in (Records { rest: body }) {
            let (key, value) = record?;
            if !SparseKeys::repeats(key) && !seen.insert(key) {
                return Err(about(key, "comes twice"));
            }
            if has_record_inside(value) {
                return Err(about(key, "has a line that reads as a record"));
            }
            pax.take(key, value).map_err(|reason| about(key, &reason))?;
        }
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Parsed<()> {
        match key {
            b"path" => {
                let path = name(value)?;
                if self.sparse.name().is_some_and(|sparse| sparse != path) {
                    return Err("is another name behind that of the sparse file".into());
                }
                self.path = Some(path);
            }
            b"linkpath" => self.linkpath = Some(name(value)?),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"SCHILY.devmajor" => self.devmajor = Some(decimal(value)?),
            b"SCHILY.devminor" => self.devminor = Some(decimal(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"atime" => self.atime = Some(time(value)?),
            b"SCHILY.acl.access" => self.acl_access = Some(value.to_vec()),
            b"SCHILY.acl.default" => self.acl_default = Some(value.to_vec()),
            b"hdrcharset" => {
                if !matches!(value, b"BINARY" | b"ISO-IR 10646 2000 UTF-8") {
                    return Err("is a character set that names are not in".into());
                }
            }
            b"SCHILY.realsize" => return Err("belongs to star's own sparse files".into()),
            b"SUN.holesdata" => return Err("belongs to Solaris's own sparse files".into()),
            _ => {
                if let Some(xattr) = key.strip_prefix(SCHILY_XATTR) {
                    self.xattr(xattr.to_vec(), value.to_vec())?;
                } else if let Some(xattr) = key.strip_prefix(LIBARCHIVE_XATTR) {
                    self.xattr(percent_decode(xattr)?, base64_decode(value)?)?;
                } else if key.starts_with(b"GNU.") {
                    self.sparse.take(key, value)?;
                }
            }
        }
        Ok(())
    }

    fn xattr(&mut self, name: Vec<u8>, value: Vec<u8>) -> Parsed<()> {
        match self.xattrs.get(&name) {
            Some(known) if *known != value => Err("contradicts the other record of it".into()),
            _ => {
                self.xattrs.insert(name, value);
                Ok(())
            }
        }
    }
}

/// Checks the body of a `g` header: only comments may be global.
pub(super) fn check_global(body: &[u8]) -> Parsed<()> {
    for record in (Records { rest: body }) {
        let (key, _) = record?;
        if key != b"comment" {
            return Err(about(key, "is global: only comments may be"));
        }
    }
    Ok(())
}

/// Encodes records, sorted by key.
pub(super) fn encode(records: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        // Space, equals sign and newline; then the length's own digits, which may add one to it.
        let bare = key.len() + value.len() + 3;
        let digits = |n: usize| n.to_string().len();
        let mut len = bare + digits(bare);
        len = bare + digits(len);
        body.extend_from_slice(format!("{len} ").as_bytes());
        body.extend_from_slice(key);
        body.push(b'=');
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    body
}

/// The record of an xattr. A name with an equals sign would end early in the common form.
pub(super) fn xattr_record(name: &[u8], value: &[u8]) -> (Vec<u8>, Vec<u8>) {
    if name.contains(&b'=') {
        ([LIBARCHIVE_XATTR, &percent_encode(name)].concat(), base64_encode(value))
    } else {
        ([SCHILY_XATTR, name].concat(), value.to_vec())
    }
}

/// A time as PAX writes it: seconds with a fraction, without zeros at the end.
pub(super) fn time_text(time: Timestamp) -> String {
    let sign = if time.secs < 0 { "-" } else { "" };
    // Nanoseconds count up from the second: -2 s and 500,000,000 ns are -1.5.
    let (whole, nanos) = match (time.secs < 0, time.nanos) {
        (true, 1..=999_999_999) => {
            (time.secs.unsigned_abs().saturating_sub(1), 1_000_000_000 - time.nanos)
        }
        _ => (time.secs.unsigned_abs(), time.nanos),
    };
    if nanos == 0 {
        format!("{sign}{whole}")
    } else {
        let text = format!("{sign}{whole}.{nanos:09}");
        text.trim_end_matches('0').to_owned()
    }
}

/// Takes records off the front; after an error there is nothing more.
struct Records<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = Parsed<Record<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let (record, rest) = match split_record(self.rest) {
            Some((record, rest)) => (Ok(record), rest),
            None => (
                Err("it has a malformed PAX record: needed LENGTH KEY=VALUE and a newline".into()),
                &[][..],
            ),
        };
        self.rest = rest;
        Some(record)
    }
}

fn split_record(body: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let space = body.iter().take(20).position(|b| *b == b' ')?;
    let (digits, _) = body.split_at_checked(space)?;
    if digits.first() == Some(&b'0') {
        return None;
    }
    let len = usize::try_from(decimal(digits).ok()?).ok()?;
    let (record, rest) = body.split_at_checked(len)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|b| *b == b'=')?;
    let (key, value) = record.split_at_checked(equals)?;
    if key.is_empty() || key.contains(&0) {
        return None;
    }
    Some(((key, value.strip_prefix(b"=")?), rest))
}

/// Whether a line of a value but the first, which begins with the record's own length, is a record.
fn has_record_inside(value: &[u8]) -> bool {
    value.split(|b| *b == b'\n').skip(1).any(|line| {
        let space = line.iter().position(|b| *b == b' ').unwrap_or(line.len());
        let (digits, rest) = line.split_at_checked(space).unwrap_or_default();
        // Its sign may be a plus to the crate tar.
        let digits = digits.strip_prefix(b"+").unwrap_or(digits);
        rest.contains(&b'=') && magnitude(digits) == u64::try_from(line.len() + 1).ok()
    })
}

fn about(key: &[u8], what: &str) -> Reason {
    format!("its PAX record {:?} {what}", OsStr::from_bytes(key)).into()
}

fn name(value: &[u8]) -> Parsed<Vec<u8>> {
    if value.is_empty() || value.contains(&0) {
        return Err("is empty or has a NUL byte".into());
    }
    Ok(value.to_vec())
}

/// A decimal number without sign.
pub(super) fn decimal(digits: &[u8]) -> Parsed<u64> {
    magnitude(digits)
        .filter(|value| i64::try_from(*value).is_ok())
        .ok_or_else(|| "is not a number from 0 to 2^63-1".into())
}

fn magnitude(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    digits.iter().try_fold(0u64, |value, b| value.checked_mul(10)?.checked_add(u64::from(b - b'0')))
}

/// Seconds, perhaps negative, perhaps with a fraction; digits beyond nanoseconds are dropped.
fn time(value: &[u8]) -> Parsed<Timestamp> {
    let bad = || Reason::from("is not a time in seconds");
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |b| *b == b'.');
    let whole = parts.next().unwrap_or_default();
    let fraction = parts.next();
    if fraction.is_some_and(|f| f.is_empty() || !f.iter().all(u8::is_ascii_digit)) {
        return Err(bad());
    }
    let nanos = fraction
        .unwrap_or_default()
        .iter()
        .map(|b| u32::from(b - b'0'))
        .chain(std::iter::repeat(0))
        .take(9)
        .fold(0, |nanos, digit| nanos * 10 + digit);
    let whole = magnitude(whole).ok_or_else(bad)?;
    let (secs, nanos) = match (negative, nanos) {
        (false, nanos) => (0i64.checked_add_unsigned(whole), nanos),
        (true, 0) => (0i64.checked_sub_unsigned(whole), 0),
        (true, nanos) => ((-1i64).checked_sub_unsigned(whole), 1_000_000_000 - nanos),
    };
    secs.map(|secs| Timestamp { secs, nanos }).ok_or_else(bad)
}

fn percent_decode(text: &[u8]) -> Parsed<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(b) = bytes.next() {
        if *b != b'%' {
            out.push(*b);
            continue;
        }
        let mut digit = || {
            bytes
                .next()
                .and_then(|b| char::from(*b).to_digit(16))
                .and_then(|d| u8::try_from(d).ok())
        };
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push(high << 4 | low),
            _ => return Err("has a broken percent code".into()),
        }
    }
    Ok(out)
}

fn percent_encode(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    for b in name {
        if b.is_ascii_graphic() && !matches!(b, b'%' | b'=') {
            out.push(*b);
        } else {
            out.extend_from_slice(format!("%{b:02X}").as_bytes());
        }
    }
    out
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Decodes base64 with or without padding; libarchive writes none.
fn base64_decode(text: &[u8]) -> Parsed<Vec<u8>> {
    let bad = || Reason::from("is not base64");
    let end = text.iter().position(|b| *b == b'=').unwrap_or(text.len());
    let (text, padding) = text.split_at_checked(end).ok_or_else(bad)?;
    if padding.len() > 2 || padding.iter().any(|b| *b != b'=') {
        return Err(bad());
    }
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.chunks(4) {
        let mut bits = 0u32;
        for b in group {
            let digit = BASE64.iter().position(|d| d == b).ok_or_else(bad)?;
            bits = bits << 6 | u32::try_from(digit).map_err(|_| bad())?;
        }
        let bytes = match group.len() {
            4 => 3,
            3 => 2,
            2 => 1,
            _ => return Err(bad()),
        };
        bits <<= 6 * (4 - group.len());
        out.extend(bits.to_be_bytes().iter().skip(1).take(bytes));
    }
    Ok(out)
}

fn base64_encode(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() / 3 * 4 + 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, b| bits << 8 | u32::from(*b));
        let bits = bits << (8 * (3 - group.len()));
        for digit in 0..=group.len() {
            let at = usize::try_from(bits >> (18 - 6 * digit) & 63).unwrap_or(0);
            out.extend(BASE64.get(at));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(records: &[(&[u8], &[u8])]) -> BTreeMap<Vec<u8>, Vec<u8>> {
        records.iter().map(|(k, v)| (k.to_vec(), v.to_vec())).collect()
    }

    #[test]
    fn lengths_count_their_own_digits() {
        // 92 to 96 bytes of value are around the step from two digits to three.
        for len in 0..1100 {
            let records = map(&[(b"comment", &vec![b'v'; len])]);
            let body = encode(&records);
            let read: Vec<_> = (Records { rest: &body }).collect();
            assert_eq!(read, [Ok((&b"comment"[..], &vec![b'v'; len][..]))]);
        }
        assert_eq!(encode(&map(&[(b"path", b"x")])), b"9 path=x\n");
    }

    #[test]
    fn malformed_records_are_refused() {
        for body in [
            &b"8 path=x\n"[..],
            b"11 path=x\n",
            b"9 path=xy",
            b"9 path=x\0",
            b"09 path=x\n",
            b"+9 path=x\n",
            b"9  path=x",
            b" 9 path=x\n",
            b"9path=x\n\n",
            b"8 pathx\n",
            b"5 =x\n",
            b"9 p\0h=x\n",
            b"3 \n",
            b"0 path=x\n",
            b"99999999999999999999 path=x\n",
            b"9223372036854775807 path=x\n",
            b"9 path=x\n\0",
            b"9 path=x\n\n",
            b"\n",
        ] {
            assert!(Pax::decode(body).is_err(), "{:?}", OsStr::from_bytes(body));
        }
        assert_eq!(Pax::decode(b""), Ok(Pax::default()));
    }

    #[test]
    fn values_hold_any_bytes() {
        let body = encode(&map(&[(b"SCHILY.xattr.user.a", b"\n=\0\xff9 path=x\n8 path=x")]));
        let pax = Pax::decode(&body).unwrap();
        assert_eq!(pax.xattrs, map(&[(b"user.a", b"\n=\0\xff9 path=x\n8 path=x")]));
        assert_eq!(pax.path, None);
    }

    #[test]
    fn a_key_comes_once() {
        for key in ["path", "size", "mtime", "SCHILY.xattr.user.a", "VENDOR.any"] {
            let one = encode(&map(&[(key.as_bytes(), b"1")]));
            assert!(Pax::decode(&one).is_ok(), "{key}");
            assert!(Pax::decode(&[one.clone(), one].concat()).is_err(), "{key}");
        }
    }

    #[test]
    fn values_that_are_refused() {
        for (key, value) in [
            ("path", ""),
            ("path", "a\0b"),
            ("linkpath", ""),
            ("size", ""),
            ("size", "-1"),
            ("size", "1 "),
            ("size", "0x1"),
            ("size", "9223372036854775808"),
            ("uid", "1.5"),
            ("gid", "+1"),
            ("mtime", ""),
            ("mtime", "-"),
            ("mtime", "."),
            ("mtime", "1."),
            ("mtime", ".5"),
            ("mtime", "1.5.5"),
            ("mtime", "1e5"),
            ("mtime", "--1"),
            ("mtime", "9223372036854775808"),
            ("mtime", "-9223372036854775808.5"),
            ("hdrcharset", "KOI8-R"),
            ("SCHILY.realsize", "1"),
            ("GNU.volume.label", "x"),
            ("GNU.dumpdir", "x"),
            ("LIBARCHIVE.xattr.user.%4", "AA"),
            ("LIBARCHIVE.xattr.user.%zz", "AA"),
            ("LIBARCHIVE.xattr.user.a", "A"),
            ("LIBARCHIVE.xattr.user.a", "A?=="),
            ("LIBARCHIVE.xattr.user.a", "AA==="),
            ("LIBARCHIVE.xattr.user.a", "AA=A"),
        ] {
            let body = encode(&map(&[(key.as_bytes(), value.as_bytes())]));
            assert!(Pax::decode(&body).is_err(), "{key}={value}");
        }
    }

    #[test]
    fn times_before_1970_and_below_the_second() {
        for (text, secs, nanos) in [
            ("0", 0, 0),
            ("1.5", 1, 500_000_000),
            ("1700000000.123456789", 1_700_000_000, 123_456_789),
            ("-1", -1, 0),
            ("-1.5", -2, 500_000_000),
            ("-0.000000001", -1, 999_999_999),
            ("9223372036854775807.999999999", i64::MAX, 999_999_999),
            ("-9223372036854775807.5", i64::MIN, 500_000_000),
            ("-9223372036854775808", i64::MIN, 0),
        ] {
            let t = Timestamp { secs, nanos };
            assert_eq!(time(text.as_bytes()), Ok(t), "{text}");
            assert_eq!(time_text(t), text);
        }
        let dropped = time(b"1.1234567899").unwrap();
        assert_eq!(dropped.nanos, 123_456_789);
    }

    #[test]
    fn both_forms_of_an_xattr_must_agree() {
        let schily = (&b"SCHILY.xattr.user.a b"[..], &b"\xff\0x"[..]);
        let agreeing = (&b"LIBARCHIVE.xattr.user.a%20b"[..], &b"/wB4"[..]);
        let other = (&b"LIBARCHIVE.xattr.user.a%20b"[..], &b"AAAA"[..]);
        let pax = Pax::decode(&encode(&map(&[schily, agreeing]))).unwrap();
        assert_eq!(pax.xattrs, map(&[(b"user.a b", b"\xff\0x")]));
        assert!(Pax::decode(&encode(&map(&[schily, other]))).is_err());
    }

    #[test]
    fn xattr_records_read_back() {
        let names = [&b"user.a"[..], b"user.a=b", b"user.%3D=\xff\n"];
        let values = [&b""[..], b"\0", b"ab", b"abc", b"abcd"];
        for name in names {
            for value in values {
                let (key, text) = xattr_record(name, value);
                let body = encode(&map(&[(&key, &text)]));
                let pax = Pax::decode(&body).unwrap();
                assert_eq!(pax.xattrs, map(&[(name, value)]));
            }
        }
    }

    #[test]
    fn global_headers_hold_comments_only() {
        assert!(check_global(b"").is_ok());
        assert!(check_global(&encode(&map(&[(b"comment", b"0123abcd")]))).is_ok());
        for key in ["path", "size", "SCHILY.xattr.user.a", "VENDOR.x"] {
            assert!(check_global(&encode(&map(&[(key.as_bytes(), b"1")]))).is_err());
        }
        assert!(check_global(b"x").is_err());
    }
}
