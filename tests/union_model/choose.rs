//! Operations chosen at random: on few names, so that they meet, and often on what is there.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use super::model::Model;
use super::ops::{At, Bits, How, Move, Op, SLOTS, Set, Space, Time, is_long, pattern};
use crate::support::union_mount::Rng;

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
        match self.rng.below(106) {
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
            103..105 => Op::Forget,
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
                Op::Forget => {}
                _ => _ = model.carry_out(&op),
            }
            op
        };
        (0..count).map(next).collect()
    }
}
