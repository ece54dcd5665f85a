//! Random entries through writer and reader, and archives with random damage.

use super::tests::{file, read, write};
use super::*;

/// Numbers that look random and are the same every time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn bytes(&mut self, max: u64, allowed: impl Fn(u8) -> bool) -> Vec<u8> {
        let len = 1 + self.below(max);
        (0..len).map(|_| self.below(256) as u8).map(|b| if allowed(b) { b } else { b'_' }).collect()
    }

    fn path(&mut self) -> RelPath {
        let longest = [8, 60, 254][self.below(3) as usize];
        let names: Vec<_> = (0..=self.below(6))
            .map(|_| self.bytes(longest, |b| !matches!(b, 0 | b'/' | b'.')))
            .collect();
        RelPath::new(OsStr::from_bytes(&names.join(&b'/'))).unwrap()
    }

    fn time(&mut self) -> Timestamp {
        let secs = match self.below(4) {
            0 => self.below(1 << 33) as i64,
            1 => -(self.below(1 << 40) as i64),
            2 => self.below(1 << 62) as i64,
            _ => [0, -1, i64::MIN, i64::MAX, 0o77777777777, 0o100000000000][self.below(6) as usize],
        };
        let nanos = [0, 1, 999_999_999, self.below(1_000_000_000) as u32];
        Timestamp { secs, nanos: nanos[self.below(4) as usize] }
    }

    fn entry(&mut self) -> (Entry, Vec<u8>) {
        let mut content = Vec::new();
        let kind = match self.below(8) {
            0 => EntryKind::Directory,
            1 => EntryKind::Fifo,
            2 => EntryKind::Symlink { target: self.bytes(300, |b| b != 0) },
            3 => EntryKind::HardLink { target: self.path() },
            4 => EntryKind::CharDevice {
                major: self.below(0x1000) as u32,
                minor: self.below(0x10_0000) as u32,
            },
            5 => EntryKind::BlockDevice {
                major: self.below(0x1000) as u32,
                minor: self.below(0x10_0000) as u32,
            },
            _ => {
                content = self.bytes(2000, |_| true);
                EntryKind::File { size: content.len() as u64, sparse: None }
            }
        };
        let mut entry = file("x", 0);
        entry.path = self.path();
        if kind == EntryKind::Directory && self.below(4) == 0 {
            entry.path = RelPath::ROOT;
        }
        entry.kind = kind;
        entry.mode = self.below(0o10000) as u32;
        entry.uid = self.below(u64::from(u32::MAX)) as u32 >> self.below(32);
        entry.gid = self.below(u64::from(u32::MAX)) as u32 >> self.below(32);
        entry.mtime = self.time();
        if self.below(3) == 0 {
            entry.atime = Some(self.time());
        }
        for _ in 0..self.below(3) {
            let name = self.bytes(50, |b| b != 0);
            let value = self.bytes(200, |_| true);
            entry.xattrs.insert(name, value);
        }
        if self.below(5) == 0 {
            entry.acl_access = Some(self.bytes(50, |_| true));
            entry.acl_default = Some(Vec::new());
        }
        (entry, content)
    }
}

#[test]
fn random_entries_read_back_as_written() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let entries: Vec<_> = (0..2000).map(|_| random.entry()).collect();
    let archive = write(&entries);
    let back = read(&archive).unwrap();
    assert_eq!(back.len(), entries.len());
    for (back, entry) in back.iter().zip(&entries) {
        assert_eq!(back, entry);
    }
    assert_eq!(write(&back), archive);
}

#[test]
fn damaged_archives_never_panic() {
    let mut random = Random(7);
    let entries: Vec<_> = (0..20).map(|_| random.entry()).collect();
    let archive = write(&entries);
    for _ in 0..3_000 {
        let mut damaged = archive.clone();
        let start = random.below(damaged.len() as u64 / 512) as usize * 512;
        let at = start + random.below(512) as usize;
        damaged[at] = random.below(256) as u8;
        // With the sum made right, so that the damage reaches what is behind it.
        let header = &mut damaged[start..start + 512];
        if header[257..262] == *b"ustar" && random.below(8) != 0 {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
            header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        }
        if let Err(e) = read(&damaged) {
            let kind = e.kind();
            assert!(matches!(kind, ErrorKind::InvalidArchive | ErrorKind::LimitExceeded), "{e}");
        }
    }
}
