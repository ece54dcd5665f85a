//! What several readers of tar archives see in one, in one form: ours, GNU tar, the crate tar, and by
//! way of a Python process tarfile and libarchive.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;
use stratafs::{Digest, ListedEntry, list_archive};

use super::tarball::Tarball;

/// Files that are larger are compared by their size and place alone.
const SMALL: u64 = 1 << 20;

/// One entry as one reader sees it; what it does not tell is none.
#[derive(Clone, Default)]
pub struct Seen {
    pub path: Vec<u8>,
    pub kind: char,
    pub size: u64,
    pub link: Vec<u8>,
    pub mode: Option<u32>,
    pub owner: Option<(u64, u64)>,
    pub mtime: Option<i64>,
    pub offset: Option<u64>,
    pub content: Option<String>,
}

/// What a reader makes of an archive: a list, or why there is none.
pub type Listing = Result<Vec<Seen>, String>;

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Seen { path, kind, size, link, mode, owner, mtime, offset, content } = self;
        let (path, link) = (OsStr::from_bytes(path), OsStr::from_bytes(link));
        let content = content.as_deref().map(|hex| &hex[..8]);
        write!(f, "{kind} {path:?} {link:?} {size} at {offset:?} {content:?}")?;
        write!(f, " {mode:?} {owner:?} {mtime:?}")
    }
}

impl Seen {
    /// Whether two readers see the same, as far as both tell.
    fn agrees(&self, other: &Seen) -> bool {
        fn both<T: PartialEq>(a: &Option<T>, b: &Option<T>) -> bool {
            a.is_none() || b.is_none() || a == b
        }
        self.path == other.path
            && self.kind == other.kind
            && self.size == other.size
            // libarchive loses a long target where the header's own is empty, as Go writes it for
            // one without ASCII.
            && (self.link == other.link || self.link.is_empty() || other.link.is_empty())
            && both(&self.mode, &other.mode)
            && both(&self.owner, &other.owner)
            // libarchive rounds fractions before 1970 the other way.
            && self.mtime.zip(other.mtime).is_none_or(|(a, b)| a.abs_diff(b) <= 1)
            && both(&self.offset, &other.offset)
            && both(&self.content, &other.content)
    }
}

pub fn agree(a: &[Seen], b: &[Seen]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.agrees(b))
}

/// Without slashes and dots that say nothing.
fn normal(path: &[u8]) -> Vec<u8> {
    let names: Vec<&[u8]> =
        path.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".").collect();
    names.join(&b'/')
}

pub fn ours(archive: &[u8]) -> Listing {
    let listed = list_archive(archive).map_err(|e| e.to_string())?;
    Ok(listed.iter().map(seen).collect())
}

fn seen(entry: &ListedEntry) -> Seen {
    let mut content = None;
    if entry.kind == '0' && entry.size <= SMALL {
        let mut whole = vec![0; usize::try_from(entry.size).unwrap()];
        let mut stored = &entry.content[..];
        let extents = entry.extents.clone().unwrap_or_else(|| vec![(0, entry.size)]);
        for (offset, len) in extents {
            let (at, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
            let (part, rest) = stored.split_at(len);
            whole[at..at + len].copy_from_slice(part);
            stored = rest;
        }
        content = Some(Digest::of(&whole).hex());
    }
    Seen {
        path: entry.path.clone(),
        kind: entry.kind,
        size: entry.size,
        link: entry.link.clone(),
        mode: Some(entry.mode),
        owner: Some((entry.uid.into(), entry.gid.into())),
        mtime: Some(entry.mtime.0),
        offset: (entry.kind == '0' && entry.size > 0).then_some(entry.offset),
        content,
    }
}

/// A Python process that lists archives with tarfile and libarchive.
pub struct Python {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Python {
    /// Starts it, or says what is missing.
    pub fn start() -> Result<Python, String> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/readers.py");
        let mut child = Command::new("python3")
            .arg(script)
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("needs python3: {e}"))?;
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut python = Python { child, answers };
        match python.list(&Tarball::new().file("f", b"").end()) {
            Some(_) => Ok(python),
            None => Err("needs python3 3.8 with libarchive.so.13".to_owned()),
        }
    }

    /// What tarfile and libarchive see.
    pub fn list(&mut self, archive: &[u8]) -> Option<[Listing; 2]> {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(&(archive.len() as u64).to_be_bytes()).ok()?;
        stdin.write_all(archive).ok()?;
        stdin.flush().ok()?;
        let mut line = String::new();
        self.answers.read_line(&mut line).ok()?;
        let answer: Value = serde_json::from_str(&line).ok()?;
        Some(["tarfile", "libarchive"].map(|reader| listing_of(&answer[reader])))
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

fn listing_of(value: &Value) -> Listing {
    let entries = value.as_array().ok_or_else(|| value.to_string())?;
    Ok(entries.iter().map(seen_by_python).collect())
}

fn seen_by_python(entry: &Value) -> Seen {
    let bytes = |key: &str| {
        let hex = entry[key].as_str().unwrap().as_bytes();
        let digit = |b: u8| char::from(b).to_digit(16).unwrap() as u8;
        hex.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect::<Vec<u8>>()
    };
    let kind = entry["kind"].as_str().unwrap().chars().next().unwrap();
    Seen {
        path: normal(&bytes("path")),
        kind,
        size: if kind == '0' { entry["size"].as_u64().unwrap_or(u64::MAX) } else { 0 },
        link: link_of(kind, bytes("link")),
        mode: entry["mode"].as_u64().map(|mode| (mode & 0o7777) as u32),
        owner: entry["uid"].as_u64().zip(entry["gid"].as_u64()),
        // A float, in tarfile: exact only so far.
        mtime: entry["mtime"].as_i64().filter(|time| time.unsigned_abs() < 1 << 50),
        offset: entry["offset"].as_u64(),
        content: entry["content"].as_str().map(str::to_owned),
    }
}

fn link_of(kind: char, link: Vec<u8>) -> Vec<u8> {
    match kind {
        '1' => normal(&link),
        '2' => link,
        _ => Vec::new(),
    }
}

/// What GNU tar lists; its complaints on standard error do not matter if it ends well.
pub fn gnu_tar(archive: &Path) -> Listing {
    let output = Command::new("tar")
        .args(["-tvvR", "--numeric-owner", "--full-time", "--quoting-style=c", "-f"])
        .arg(archive)
        .env("LC_ALL", "C.UTF-8")
        .env("TZ", "UTC")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let lines = output.stdout.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    lines.filter(|line| !line.ends_with(b"** Block of NULs **")).map(gnu_line).collect()
}

fn gnu_line(line: &[u8]) -> Result<Seen, String> {
    let odd = || format!("an odd line: {}", String::from_utf8_lossy(line));
    let quote = line.iter().position(|b| *b == b'"').ok_or_else(odd)?;
    let head = std::str::from_utf8(&line[..quote]).map_err(|_| odd())?;
    let (path, rest) = unquote(&line[quote..]).ok_or_else(odd)?;
    let words: Vec<&str> = head.split_whitespace().collect();
    let [_, block, rights, owner, size, ..] = words[..] else { return Err(odd()) };
    let block: u64 = block.trim_end_matches(':').parse().map_err(|_| odd())?;
    let kind = match rights.as_bytes()[0] {
        b'-' | b'C' => '0',
        b'h' => '1',
        b'l' => '2',
        b'c' => '3',
        b'b' => '4',
        b'd' => '5',
        b'p' => '6',
        _ => '?',
    };
    let link = match rest {
        b"" => Vec::new(),
        rest => {
            let quote = rest.iter().position(|b| *b == b'"').ok_or_else(odd)?;
            unquote(&rest[quote..]).ok_or_else(odd)?.0
        }
    };
    let mut mode = 0;
    for (at, right) in rights.bytes().skip(1).take(9).enumerate() {
        mode |= u32::from(!matches!(right, b'-' | b'S' | b'T')) << (8 - at);
        if matches!(right, b's' | b'S' | b't' | b'T') {
            mode |= [0o4000, 0o2000, 0o1000][at / 3];
        }
    }
    let owner = owner.split_once('/').and_then(|(u, g)| Some((u.parse().ok()?, g.parse().ok()?)));
    let size = if kind == '0' { size.parse().map_err(|_| odd())? } else { 0 };
    Ok(Seen {
        path: normal(&path),
        kind,
        size,
        link: link_of(kind, link),
        mode: Some(mode),
        owner,
        mtime: None,
        offset: (kind == '0' && size > 0).then_some(block * 512 + 512),
        content: None,
    })
}

/// A string as C writes it, and what follows.
fn unquote(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut out = Vec::new();
    let mut at = 1;
    loop {
        match *text.get(at)? {
            b'"' => return Some((out, &text[at + 1..])),
            b'\\' => {
                at += 1;
                let escaped = *text.get(at)?;
                out.push(match escaped {
                    b'0'..=b'7' => {
                        let digits = std::str::from_utf8(text.get(at..at + 3)?).ok()?;
                        at += 2;
                        u8::from_str_radix(digits, 8).ok()?
                    }
                    b'a' => 7,
                    b'b' => 8,
                    b't' => 9,
                    b'n' => 10,
                    b'v' => 11,
                    b'f' => 12,
                    b'r' => 13,
                    other => other,
                });
            }
            byte => out.push(byte),
        }
        at += 1;
    }
}

/// What the crate tar sees. It knows neither PAX's sparse files nor its numbers but the size.
pub fn crate_tar(archive: &[u8]) -> Listing {
    let mut entries = Vec::new();
    let mut reader = tar::Archive::new(archive);
    for entry in reader.entries().map_err(|e| e.to_string())? {
        let mut entry = entry.map_err(|e| e.to_string())?;
        if entry.header().entry_type().is_pax_global_extensions() {
            // It gives them to its caller.
            continue;
        }
        let path = entry.path_bytes().into_owned();
        let kind = match entry.header().entry_type() {
            // It leaves the old directories to its caller.
            tar::EntryType::Regular if path.ends_with(b"/") => '5',
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => '0',
            other => char::from(other.as_byte()),
        };
        let link = entry.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default();
        let mut seen =
            Seen { path: normal(&path), kind, link: link_of(kind, link), ..Seen::default() };
        if kind == '0' {
            seen.size = entry.size();
            if seen.size <= SMALL {
                let mut content = Vec::new();
                entry.read_to_end(&mut content).map_err(|e| e.to_string())?;
                seen.content = Some(Digest::of(&content).hex());
            }
        }
        entries.push(seen);
    }
    Ok(entries)
}
