//! The operations: what they are, how they are chosen at random, how they are carried out on a mount.
//!
//! An operation says everything about itself and nothing of what was done before, so that any list of
//! them can be run; what it gives depends on the state, and the model knows it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps,
    Uid, XattrFlags,
};
use rustix::io::Errno;

use super::model::Model;
use crate::support::union_mount::Rng;

/// How many files are open at most.
pub const SLOTS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Read,
    ReadWrite,
    Append,
    Create,
    CreateNew,
    Truncate,
}

impl How {
    pub fn reads(self) -> bool {
        !matches!(self, How::Append | How::Truncate)
    }

    pub fn writes(self) -> bool {
        self != How::Read
    }

    pub fn creates(self) -> bool {
        matches!(self, How::Create | How::CreateNew)
    }

    fn flags(self) -> OFlags {
        let flags = match self {
            How::Read => OFlags::RDONLY,
            How::ReadWrite => OFlags::RDWR,
            How::Append => OFlags::WRONLY | OFlags::APPEND,
            How::Create => OFlags::RDWR | OFlags::CREATE,
            How::CreateNew => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
            How::Truncate => OFlags::WRONLY | OFlags::TRUNC,
        };
        flags | OFlags::NOFOLLOW | OFlags::CLOEXEC
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Extend,
    KeepSize,
    Punch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    At(i64, u32),
    Now,
    Omit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    Any,
    Create,
    Replace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    Plain,
    NoReplace,
    Exchange,
}

/// The bits of a mode, in octal for who reads them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Bits(pub u32);

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#o}", self.0)
    }
}

/// What an operation is about: a name, or a file that is open.
#[derive(Clone, PartialEq, Eq)]
pub enum At {
    Path(PathBuf),
    Slot(usize),
}

impl fmt::Debug for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            At::Path(path) => path.fmt(f),
            At::Slot(slot) => write!(f, "fd{slot}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Open {
        slot: usize,
        path: PathBuf,
        how: How,
        mode: Bits,
    },
    Close {
        slot: usize,
    },
    /// Opens, writes, closes.
    Put {
        path: PathBuf,
        how: How,
        offset: u64,
        len: usize,
        seed: u8,
    },
    Write {
        slot: usize,
        offset: u64,
        len: usize,
        seed: u8,
    },
    Read {
        slot: usize,
        offset: u64,
        len: usize,
    },
    ReadFile {
        path: PathBuf,
    },
    CopyRange {
        from: usize,
        to: usize,
        from_offset: u64,
        offset: u64,
        len: usize,
    },
    Truncate {
        at: At,
        len: u64,
    },
    Allocate {
        slot: usize,
        space: Space,
        offset: u64,
        len: u64,
    },
    Sync {
        slot: usize,
    },
    Stat {
        at: At,
    },
    Chmod {
        at: At,
        mode: Bits,
    },
    Chown {
        at: At,
        uid: Option<u32>,
        gid: Option<u32>,
    },
    Utimens {
        at: At,
        mtime: Time,
    },
    SetXattr {
        at: At,
        name: &'static str,
        value: Vec<u8>,
        set: Set,
    },
    RemoveXattr {
        at: At,
        name: &'static str,
    },
    Xattrs {
        at: At,
    },
    Symlink {
        path: PathBuf,
        target: &'static str,
    },
    ReadLink {
        path: PathBuf,
    },
    Fifo {
        path: PathBuf,
        mode: Bits,
    },
    Char {
        path: PathBuf,
        mode: Bits,
        minor: u32,
        major: u32,
    },
    Mkdir {
        path: PathBuf,
        mode: Bits,
    },
    Rmdir {
        path: PathBuf,
    },
    Unlink {
        path: PathBuf,
    },
    Link {
        from: PathBuf,
        to: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
        how: Move,
    },
    List {
        path: PathBuf,
    },
    Remount,
    /// Unmounts, and mounts with the other engine.
    Switch,
}

/// What an operation gave.
#[derive(Clone, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Failed(Errno),
    Bytes(Vec<u8>),
    Text(Vec<u8>),
    Names(BTreeMap<OsString, char>),
    Xattrs(BTreeMap<String, Vec<u8>>),
    Stat(Stat),
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Done => f.write_str("Done"),
            Outcome::Failed(errno) => nix::errno::Errno::from_raw(errno.raw_os_error()).fmt(f),
            Outcome::Bytes(bytes) => write!(f, "{}", runs(bytes)),
            Outcome::Text(text) => OsStr::from_bytes(text).fmt(f),
            Outcome::Names(names) => names.fmt(f),
            Outcome::Xattrs(xattrs) => xattrs.fmt(f),
            Outcome::Stat(stat) => stat.fmt(f),
        }
    }
}

/// Bytes as text: where a run of [`pattern`], or of zeros, begins and how it goes on.
pub fn runs(bytes: &[u8]) -> String {
    let mut text = format!("{} bytes", bytes.len());
    let mut previous = None;
    let mut shown = 0;
    for (i, &byte) in bytes.iter().enumerate() {
        let goes_on = previous
            .is_some_and(|p: u8| if p == 0 || byte == 0 { p == byte } else { byte == p % 250 + 1 });
        if !goes_on {
            shown += 1;
            if shown > 8 {
                return text + " ...";
            }
            text.push_str(&format!(" @{i}:{byte}"));
        }
        previous = Some(byte);
    }
    text
}

/// What is written: never zero, which holes are.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let mut byte = seed % 250;
    std::iter::repeat_with(|| {
        byte = byte % 250 + 1;
        byte
    })
    .take(len)
    .collect()
}

/// What stat gives; none where nothing is promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub kind: char,
    pub mode: Bits,
    pub owner: (u32, u32),
    pub size: Option<u64>,
    pub nlink: Option<u64>,
    pub rdev: Option<(u32, u32)>,
    pub mtime: Option<(i64, u32)>,
}

pub fn kind_of(kind: FileType) -> char {
    match kind {
        FileType::RegularFile => 'f',
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::Fifo => 'p',
        FileType::CharacterDevice => 'c',
        _ => '?',
    }
}

#[allow(clippy::unnecessary_cast, reason = "the types differ between architectures")]
pub fn stat_of(stat: &rustix::fs::Stat) -> Stat {
    let kind = kind_of(FileType::from_raw_mode(stat.st_mode));
    let device = kind == 'c';
    let rdev = device.then(|| (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)));
    Stat {
        kind,
        mode: Bits(stat.st_mode & 0o7777),
        owner: (stat.st_uid, stat.st_gid),
        size: matches!(kind, 'f' | 'l').then_some(stat.st_size as u64),
        nlink: (kind != 'd').then_some(stat.st_nlink as u64),
        rdev,
        mtime: Some((stat.st_mtime as i64, stat.st_mtime_nsec as u32)),
    }
}

/// The files that are open.
pub struct Hands {
    root: PathBuf,
    slots: [Option<OwnedFd>; SLOTS],
}

type Attempt<T> = rustix::io::Result<T>;

impl Hands {
    pub fn new(root: &Path) -> Hands {
        Hands { root: root.to_owned(), slots: Default::default() }
    }

    /// Carries out an operation; those on mounts are not for it.
    pub fn carry_out(&mut self, op: &Op) -> Outcome {
        self.attempt(op).unwrap_or_else(Outcome::Failed)
    }

    fn path(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn fd(&self, slot: usize) -> &OwnedFd {
        self.slots[slot].as_ref().expect("operations on files that are not open are skipped")
    }

    fn attempt(&mut self, op: &Op) -> Attempt<Outcome> {
        match op {
            Op::Open { slot, path, how, mode } => {
                // Its number is taken before, as by dup2.
                self.slots[*slot] = None;
                let path = self.path(path);
                self.slots[*slot] =
                    Some(rustix::fs::open(path, how.flags(), Mode::from_raw_mode(mode.0))?);
            }
            Op::Close { slot } => close(self.slots[*slot].take())?,
            Op::Put { path, how, offset, len, seed } => {
                let mode = Mode::from_raw_mode(0o666);
                let fd = rustix::fs::open(self.path(path), how.flags(), mode)?;
                write_all(&fd, &pattern(*len, *seed), *offset)?;
                close(Some(fd))?;
            }
            Op::Write { slot, offset, len, seed } => {
                write_all(self.fd(*slot), &pattern(*len, *seed), *offset)?;
            }
            Op::Read { slot, offset, len } => {
                return Ok(Outcome::Bytes(read_all(self.fd(*slot), *offset, *len)?));
            }
            Op::ReadFile { path } => {
                let fd = rustix::fs::open(self.path(path), How::Read.flags(), Mode::empty())?;
                return Ok(Outcome::Bytes(read_all(&fd, 0, usize::MAX)?));
            }
            Op::CopyRange { from, to, from_offset, offset, len } => {
                let (mut from_offset, mut offset, mut left) = (*from_offset, *offset, *len);
                let (from, to) = (self.fd(*from), self.fd(*to));
                while left > 0 {
                    let (at_from, at_to) = (Some(&mut from_offset), Some(&mut offset));
                    let n = rustix::fs::copy_file_range(from, at_from, to, at_to, left)?;
                    if n == 0 {
                        break;
                    }
                    left -= n;
                }
            }
            Op::Truncate { at: At::Slot(slot), len } => {
                rustix::fs::ftruncate(self.fd(*slot), *len)?;
            }
            Op::Truncate { at: At::Path(path), len } => {
                nix::unistd::truncate(&self.path(path), (*len).try_into().unwrap())
                    .map_err(|e| Errno::from_raw_os_error(e as i32))?;
            }
            Op::Allocate { slot, space, offset, len } => {
                let flags = match space {
                    Space::Extend => FallocateFlags::empty(),
                    Space::KeepSize => FallocateFlags::KEEP_SIZE,
                    Space::Punch => FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE,
                };
                rustix::fs::fallocate(self.fd(*slot), flags, *offset, *len)?;
            }
            Op::Sync { slot } => rustix::fs::fsync(self.fd(*slot))?,
            Op::Stat { at: At::Path(path) } => {
                return Ok(Outcome::Stat(stat_of(&rustix::fs::lstat(self.path(path))?)));
            }
            Op::Stat { at: At::Slot(slot) } => {
                return Ok(Outcome::Stat(stat_of(&rustix::fs::fstat(self.fd(*slot))?)));
            }
            Op::Chmod { at, mode } => {
                let mode = Mode::from_raw_mode(mode.0);
                match at {
                    At::Path(path) => rustix::fs::chmod(self.path(path), mode)?,
                    At::Slot(slot) => rustix::fs::fchmod(self.fd(*slot), mode)?,
                }
            }
            Op::Chown { at, uid, gid } => {
                let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                match at {
                    At::Path(path) => {
                        let flags = AtFlags::SYMLINK_NOFOLLOW;
                        rustix::fs::chownat(CWD, self.path(path), uid, gid, flags)?;
                    }
                    At::Slot(slot) => rustix::fs::fchown(self.fd(*slot), uid, gid)?,
                }
            }
            Op::Utimens { at, mtime } => {
                let (sec, nsec) = match *mtime {
                    Time::At(sec, nsec) => (sec, nsec.into()),
                    Time::Now => (0, rustix::fs::UTIME_NOW),
                    Time::Omit => (0, rustix::fs::UTIME_OMIT),
                };
                let times = Timestamps {
                    last_access: Timespec { tv_sec: 1_000_000_000, tv_nsec: 1 },
                    last_modification: Timespec { tv_sec: sec, tv_nsec: nsec },
                };
                match at {
                    At::Path(path) => {
                        let flags = AtFlags::SYMLINK_NOFOLLOW;
                        rustix::fs::utimensat(CWD, self.path(path), &times, flags)?;
                    }
                    At::Slot(slot) => rustix::fs::futimens(self.fd(*slot), &times)?,
                }
            }
            Op::SetXattr { at, name, value, set } => {
                let flags = match set {
                    Set::Any => XattrFlags::empty(),
                    Set::Create => XattrFlags::CREATE,
                    Set::Replace => XattrFlags::REPLACE,
                };
                match at {
                    At::Path(path) => rustix::fs::lsetxattr(self.path(path), *name, value, flags)?,
                    At::Slot(slot) => rustix::fs::fsetxattr(self.fd(*slot), *name, value, flags)?,
                }
            }
            Op::RemoveXattr { at: At::Path(path), name } => {
                rustix::fs::lremovexattr(self.path(path), *name)?;
            }
            Op::RemoveXattr { at: At::Slot(slot), name } => {
                rustix::fs::fremovexattr(self.fd(*slot), *name)?;
            }
            Op::Xattrs { at: At::Path(path) } => {
                return Ok(Outcome::Xattrs(xattrs_of(&self.path(path))?));
            }
            Op::Xattrs { at: At::Slot(slot) } => {
                return Ok(Outcome::Xattrs(fd_xattrs(self.fd(*slot))?));
            }
            Op::Symlink { path, target } => rustix::fs::symlink(*target, self.path(path))?,
            Op::ReadLink { path } => {
                let target = rustix::fs::readlink(self.path(path), Vec::new())?;
                return Ok(Outcome::Text(target.into_bytes()));
            }
            Op::Fifo { path, mode } => {
                let mode = Mode::from_raw_mode(mode.0);
                rustix::fs::mknodat(CWD, self.path(path), FileType::Fifo, mode, 0)?;
            }
            Op::Char { path, mode, minor, major } => {
                let (mode, dev) =
                    (Mode::from_raw_mode(mode.0), rustix::fs::makedev(*major, *minor));
                rustix::fs::mknodat(CWD, self.path(path), FileType::CharacterDevice, mode, dev)?;
            }
            Op::Mkdir { path, mode } => {
                rustix::fs::mkdir(self.path(path), Mode::from_raw_mode(mode.0))?;
            }
            Op::Rmdir { path } => rustix::fs::rmdir(self.path(path))?,
            Op::Unlink { path } => rustix::fs::unlink(self.path(path))?,
            Op::Link { from, to } => rustix::fs::link(self.path(from), self.path(to))?,
            Op::Rename { from, to, how } => {
                let flags = match how {
                    Move::Plain => RenameFlags::empty(),
                    Move::NoReplace => RenameFlags::NOREPLACE,
                    Move::Exchange => RenameFlags::EXCHANGE,
                };
                rustix::fs::renameat_with(CWD, self.path(from), CWD, self.path(to), flags)?;
            }
            Op::List { path } => return Ok(Outcome::Names(list(&self.path(path))?)),
            Op::Remount | Op::Switch => unreachable!("not done by hand"),
        }
        Ok(Outcome::Done)
    }
}

/// What was written may fail only now.
fn close(fd: Option<OwnedFd>) -> Attempt<()> {
    let closed = fd.map_or(Ok(()), nix::unistd::close);
    closed.map_err(|e| Errno::from_raw_os_error(e as i32))
}

fn write_all(fd: impl AsFd, mut bytes: &[u8], mut offset: u64) -> Attempt<()> {
    while !bytes.is_empty() {
        let n = rustix::io::pwrite(&fd, bytes, offset)?;
        bytes = &bytes[n..];
        offset += n as u64;
    }
    Ok(())
}

fn read_all(fd: impl AsFd, mut offset: u64, len: usize) -> Attempt<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; len.min(1 << 16)];
    while bytes.len() < len {
        let want = buffer.len().min(len - bytes.len());
        let n = rustix::io::pread(&fd, &mut buffer[..want], offset)?;
        if n == 0 {
            break;
        }
        bytes.extend_from_slice(&buffer[..n]);
        offset += n as u64;
    }
    Ok(bytes)
}

/// The names in a directory and their types, by which getdents tells them; `!` with types that stat
/// does not tell, or names that come twice.
fn list(dir: &Path) -> Attempt<BTreeMap<OsString, char>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::empty())?;
    let mut names = BTreeMap::new();
    for entry in rustix::fs::Dir::read_from(fd)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        if names.insert(name.clone(), kind_of(entry.file_type())).is_some() {
            names.insert(name, '!');
        }
    }
    for dots in [".", ".."] {
        // Where they are told at all, they are directories.
        if names.remove(OsStr::new(dots)).is_some_and(|kind| kind != 'd') {
            names.insert(dots.into(), '!');
        }
    }
    Ok(names)
}

/// All that can be seen, but for what the system adds of its own accord.
pub fn xattrs_of(path: &Path) -> Attempt<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; 1 << 16];
    let len = rustix::fs::llistxattr(path, &mut names)?;
    names.truncate(len);
    collect_xattrs(&names, |name, value| rustix::fs::lgetxattr(path, name, value))
}

fn fd_xattrs(fd: &OwnedFd) -> Attempt<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; 1 << 16];
    let len = rustix::fs::flistxattr(fd, &mut names)?;
    names.truncate(len);
    collect_xattrs(&names, |name, value| rustix::fs::fgetxattr(fd, name, value))
}

fn collect_xattrs(
    names: &[u8],
    get: impl Fn(&str, &mut [u8]) -> Attempt<usize>,
) -> Attempt<BTreeMap<String, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    for name in names.split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let name = String::from_utf8_lossy(name).into_owned();
        if name.starts_with("security.") || name.starts_with("system.") {
            continue;
        }
        let mut value = [0; 256];
        let len = get(&name, &mut value)?;
        xattrs.insert(name, value[..len].to_vec());
    }
    Ok(xattrs)
}

/// Chooses operations.
pub struct Chooser {
    pub rng: Rng,
    /// Whether names that end at a limit may be chosen.
    pub long_names: bool,
    pub switches: bool,
    /// Paths of which there is something, to be chosen as often as any others.
    pub there: Vec<PathBuf>,
    /// The files that are open.
    pub open: Vec<usize>,
}

pub fn is_long(name: &OsStr) -> bool {
    name.len() > 100
}

const MODES: &[u32] =
    &[0o644, 0o600, 0o755, 0o700, 0o000, 0o444, 0o4755, 0o2755, 0o2644, 0o6711, 0o1755];
const IDS: &[u32] = &[0, 1, 1000, 65534, 3_000_000_000];
/// The last two are marks in the one format or the other, the first two in none.
pub const XATTRS: &[&str] =
    &["user.a", "trusted.b", "user.overlay.opaque", "trusted.overlay.opaque"];
const TARGETS: &[&str] = &["a", "b", "a/b", "c/d", ".", "nowhere"];

impl Chooser {
    fn name(&mut self) -> OsString {
        const USUAL: &[&[u8]] = &[b"a", b"b", b"c", b"d"];
        match self.rng.below(60) {
            0 => OsStr::from_bytes(b"\xff\xfe \n").to_owned(),
            1 | 2 => ".wh.a".into(),
            3 if self.long_names => "L".repeat(255).into(),
            4 if self.long_names && self.rng.one_in(4) => "L".repeat(256).into(),
            _ => OsStr::from_bytes(self.rng.pick(USUAL)).to_owned(),
        }
    }

    pub fn path(&mut self) -> PathBuf {
        if !self.there.is_empty() && self.rng.one_in(2) {
            let i = self.rng.below(self.there.len() as u64);
            return self.there[usize::try_from(i).unwrap()].clone();
        }
        let depth = 1 + self.rng.below(2) + u64::from(self.rng.one_in(4));
        let names: Vec<_> = (0..depth).map(|_| self.name()).collect();
        let last = names.len() - 1;
        let fits = |(i, name): (usize, &OsString)| i == last || !is_long(name);
        // Directories with long names would have redirects too long to be written.
        names.iter().enumerate().filter(|entry| fits(*entry)).map(|(_, name)| name).collect()
    }

    /// One to be opened.
    fn any_slot(&mut self) -> usize {
        usize::try_from(self.rng.below(SLOTS as u64)).unwrap()
    }

    fn slot(&mut self) -> usize {
        if !self.open.is_empty() && !self.rng.one_in(8) {
            return self.rng.pick(&self.open);
        }
        self.any_slot()
    }

    fn at(&mut self) -> At {
        if self.rng.one_in(3) { At::Slot(self.slot()) } else { At::Path(self.path()) }
    }

    pub fn mode(&mut self) -> u32 {
        self.rng.pick(MODES)
    }

    pub fn owner(&mut self) -> (u32, u32) {
        (self.rng.pick(IDS), self.rng.pick(IDS))
    }

    /// Before 1970, beyond 2038, with nanoseconds and without.
    pub fn time(&mut self) -> (i64, u32) {
        let sec = self.rng.pick(&[-631_152_000, -1, 0, 1, 1_700_000_000, 1 << 32, 13_569_465_600]);
        (sec, self.rng.pick(&[0, 1, 123_456_789, 999_999_999]))
    }

    fn offset(&mut self) -> u64 {
        match self.rng.below(4) {
            0 => 0,
            1 => 4096 * self.rng.below(4),
            _ => self.rng.below(12_000),
        }
    }

    pub fn len(&mut self) -> usize {
        let most = self.rng.pick(&[1, 100, 5000]);
        usize::try_from(self.rng.below(most)).unwrap() + 1
    }

    pub fn seed(&mut self) -> u8 {
        u8::try_from(self.rng.below(250)).unwrap()
    }

    fn how(&mut self) -> How {
        use How::*;
        self.rng.pick(&[Read, Read, ReadWrite, ReadWrite, Append, Create, CreateNew, Truncate])
    }

    fn op(&mut self) -> Op {
        match self.rng.below(104) {
            0..6 => Op::Open {
                slot: self.any_slot(),
                path: self.path(),
                how: self.how(),
                mode: Bits(self.mode()),
            },
            6..8 => Op::Close { slot: self.slot() },
            8..18 => {
                use How::*;
                let how = self.rng.pick(&[ReadWrite, Append, Create, Create, CreateNew, Truncate]);
                let (offset, len, seed) = (self.offset(), self.len(), self.seed());
                Op::Put { path: self.path(), how, offset, len, seed }
            }
            18..24 => Op::Write {
                slot: self.slot(),
                offset: self.offset(),
                len: self.len(),
                seed: self.seed(),
            },
            24..27 => Op::Read { slot: self.slot(), offset: self.offset(), len: self.len() },
            27..31 => Op::ReadFile { path: self.path() },
            31..33 => Op::CopyRange {
                from: self.slot(),
                to: self.slot(),
                from_offset: self.offset(),
                offset: self.offset(),
                len: self.len(),
            },
            33..37 => Op::Truncate { at: self.at(), len: self.offset() },
            37..40 => {
                let space = self.rng.pick(&[Space::Extend, Space::KeepSize, Space::Punch]);
                let len = self.len() as u64;
                Op::Allocate { slot: self.slot(), space, offset: self.offset(), len }
            }
            40 => Op::Sync { slot: self.slot() },
            41..45 => Op::Stat { at: self.at() },
            45..48 => Op::Chmod { at: self.at(), mode: Bits(self.mode()) },
            48..51 => {
                let (uid, gid) = self.owner();
                let (uid, gid) = match self.rng.below(3) {
                    0 => (Some(uid), None),
                    1 => (None, Some(gid)),
                    _ => (Some(uid), Some(gid)),
                };
                Op::Chown { at: self.at(), uid, gid }
            }
            51..55 => {
                let (sec, nsec) = self.time();
                let mtime = match self.rng.below(8) {
                    0 => Time::Now,
                    1 => Time::Omit,
                    _ => Time::At(sec, nsec),
                };
                Op::Utimens { at: self.at(), mtime }
            }
            55..59 => {
                let value = pattern(usize::try_from(self.rng.below(20)).unwrap(), self.seed());
                let set = self.rng.pick(&[Set::Any, Set::Any, Set::Create, Set::Replace]);
                Op::SetXattr { at: self.at(), name: self.rng.pick(XATTRS), value, set }
            }
            59..61 => Op::RemoveXattr { at: self.at(), name: self.rng.pick(XATTRS) },
            61..63 => Op::Xattrs { at: self.at() },
            63..66 => Op::Symlink { path: self.path(), target: self.rng.pick(TARGETS) },
            66 => Op::ReadLink { path: self.path() },
            67 => Op::Fifo { path: self.path(), mode: Bits(self.mode()) },
            68 => {
                let (major, minor) = self.rng.pick(&[(1, 3), (1, 3), (1, 3), (0, 0)]);
                Op::Char { path: self.path(), mode: Bits(self.mode()), major, minor }
            }
            69..75 => Op::Mkdir { path: self.path(), mode: Bits(self.mode()) },
            75..79 => Op::Rmdir { path: self.path() },
            79..84 => Op::Unlink { path: self.path() },
            84..88 => Op::Link { from: self.path(), to: self.path() },
            88..98 => {
                let how = self.rng.pick(&[
                    Move::Plain,
                    Move::Plain,
                    Move::Plain,
                    Move::NoReplace,
                    Move::Exchange,
                ]);
                Op::Rename { from: self.path(), to: self.path(), how }
            }
            98..102 => {
                let path = if self.rng.one_in(3) { PathBuf::new() } else { self.path() };
                Op::List { path }
            }
            102 if self.switches => Op::Switch,
            _ => {
                if self.rng.one_in(2) {
                    Op::Remount
                } else {
                    Op::List { path: self.path() }
                }
            }
        }
    }

    /// Operations that are likely to find something, if they are done one after the other.
    pub fn ops(&mut self, count: usize, mut model: Model) -> Vec<Op> {
        let next = |_| {
            self.there = model.paths();
            self.open = (0..SLOTS).filter(|&slot| model.is_open(slot)).collect();
            let op = self.op();
            match op {
                Op::Remount | Op::Switch => model.close_all(),
                _ => _ = model.carry_out(&op),
            }
            op
        };
        (0..count).map(next).collect()
    }
}
