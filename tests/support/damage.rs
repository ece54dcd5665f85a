//! Random damage to archives, with checksums made right, so that it reaches what is behind them.

use super::tarball::{GNU, Tarball, USTAR, V7, is_header, number, records, sum};

/// xorshift64.
pub struct Random(pub u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }

    fn of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

/// Fields of a header: where, and how long.
const FIELDS: &[(usize, usize)] = &[
    (0, 100),
    (100, 8),
    (108, 8),
    (116, 8),
    (124, 12),
    (136, 12),
    (156, 1),
    (157, 100),
    (257, 8),
    (265, 32),
    (297, 32),
    (329, 8),
    (337, 8),
    (345, 155),
    (386, 96),
    (482, 1),
    (483, 12),
    (508, 4),
];

/// An archive after some damage, from another on the way.
pub fn mutated(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut archive = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(3) {
        mutate(random, seeds, &mut archive);
    }
    archive
}

fn mutate(random: &mut Random, seeds: &[Vec<u8>], archive: &mut Vec<u8>) {
    let blocks = archive.len() / 512;
    if blocks == 0 {
        return;
    }
    let headers: Vec<usize> =
        (0..blocks).map(|n| n * 512).filter(|at| is_header(&archive[*at..*at + 512])).collect();
    let at = if headers.is_empty() { 0 } else { headers[random.below(headers.len())] };
    let put = |archive: &mut Vec<u8>, field: usize, bytes: &[u8]| {
        archive[at + field..at + field + bytes.len()].copy_from_slice(bytes);
        sum(&mut archive[at..at + 512]);
    };
    match random.below(14) {
        0 => {
            let field = random.below(512);
            let byte = archive[at + field] ^ 1 << random.below(8);
            put(archive, field, &[byte]);
        }
        1 | 2 => {
            let (field, len) = FIELDS[random.below(FIELDS.len())];
            let field = field + if random.below(2) == 0 { 0 } else { random.below(len) };
            let byte = *b"\0 /.078x\x80\xff-+\n".get(random.below(13)).unwrap();
            put(archive, field, &[byte]);
        }
        3 => {
            let kind = b"0\x001234567xgLKSDMNVX"[random.below(19)];
            put(archive, 156, &[kind]);
        }
        4 => {
            let size = [0, 1, 3, 4, 511, 512, 513, 1024, 1536][random.below(9)];
            put(archive, 124, &number(size, 12));
        }
        5 => {
            let magic = *random.of(&[USTAR, GNU, V7, b"ustar  0", b"ustar\x0012"]);
            put(archive, 257, &magic);
        }
        6 => {
            let (one, two) = (random.below(blocks) * 512, random.below(blocks) * 512);
            let block = archive[one..one + 512].to_vec();
            archive.copy_within(two..two + 512, one);
            archive[two..two + 512].copy_from_slice(&block);
        }
        7 => {
            let from = random.below(blocks) * 512;
            let block = archive[from..from + 512].to_vec();
            archive.splice(at..at, block);
        }
        8 => drop(archive.drain(at..at + 512)),
        9 => drop(archive.splice(at..at, [0; 512])),
        10 => archive.truncate(if random.below(2) == 0 { at } else { random.below(archive.len()) }),
        11 => {
            const KEYS: [&str; 16] = [
                "path",
                "path",
                "linkpath",
                "size",
                "size",
                "mtime",
                "uid",
                "gid",
                "comment",
                "hdrcharset",
                "GNU.sparse.name",
                "GNU.sparse.size",
                "GNU.sparse.realsize",
                "SCHILY.xattr.user.k",
                "atime",
                "uname",
            ];
            let values: [&[u8]; 14] = [
                b"",
                b"a",
                b"a/b",
                b"a/",
                b"./a",
                b"0",
                b"4",
                b"512",
                b"1.5",
                b"-1.5",
                b"BINARY",
                b"\xff",
                b"8589934592",
                b"3\n13 path=evil",
            ];
            let list: Vec<(&str, &[u8])> = (0..=random.below(2))
                .map(|_| (KEYS[random.below(16)], random.of(&values)))
                .collect();
            let kind = if random.below(6) == 0 { b'g' } else { b'x' };
            let pax = Tarball::new().extended(USTAR, "PaxHeaders/x", kind, &records(&list)).0;
            archive.splice(at..at, pax);
        }
        12 => {
            let name = random.of(&["a", "a/b", "dir/", "d/.", "long/long/long"]);
            let kind = [b'L', b'K'][random.below(2)];
            archive.splice(at..at, Tarball::new().long(kind, name).0);
        }
        _ => {
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len().max(512) / 512) * 512;
            archive.splice(at..at, other.get(from..).unwrap_or_default().to_vec());
        }
    }
}
