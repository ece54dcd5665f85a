//! The operations, and what they give.
//!
//! An operation says everything about itself and nothing of what was done before, so that any list of
//! them can be run; what it gives depends on the state, and the model knows it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

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

    pub fn flags(self) -> OFlags {
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
    /// Has the kernel forget what it knows.
    Forget,
    /// Unmounts, and mounts with the other engine.
    Switch,
}

impl Op {
    /// The paths that it names, and the open file.
    pub fn about(&self) -> (Vec<&Path>, Option<usize>) {
        match self {
            Op::Link { from, to } | Op::Rename { from, to, .. } => (vec![from, to], None),
            Op::Truncate { at, .. }
            | Op::Stat { at }
            | Op::Chmod { at, .. }
            | Op::Chown { at, .. }
            | Op::Utimens { at, .. }
            | Op::SetXattr { at, .. }
            | Op::RemoveXattr { at, .. }
            | Op::Xattrs { at } => match at {
                At::Path(path) => (vec![path], None),
                At::Slot(slot) => (Vec::new(), Some(*slot)),
            },
            Op::Open { path, .. }
            | Op::Put { path, .. }
            | Op::ReadFile { path }
            | Op::Symlink { path, .. }
            | Op::ReadLink { path }
            | Op::Fifo { path, .. }
            | Op::Char { path, .. }
            | Op::Mkdir { path, .. }
            | Op::Rmdir { path }
            | Op::Unlink { path }
            | Op::List { path } => (vec![path], None),
            Op::Close { slot }
            | Op::Write { slot, .. }
            | Op::Read { slot, .. }
            | Op::CopyRange { to: slot, .. }
            | Op::Allocate { slot, .. }
            | Op::Sync { slot } => (Vec::new(), Some(*slot)),
            Op::Remount | Op::Forget | Op::Switch => (Vec::new(), None),
        }
    }
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

/// Whether a name is near the limit.
pub fn is_long(name: &OsStr) -> bool {
    name.len() > 100
}
