//! Odd archives by hand: every dialect, and what each has at its edges.

use super::tarball::{GNU, Tarball, USTAR, V7, header, number, records};

/// What must become of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is read, and has so many entries.
    Read(usize),
    /// It is refused, and the message has this.
    Refused(&'static str),
}

use Fate::{Read, Refused};

/// A header with a field replaced.
fn with(name: &str, at: usize, field: &[u8]) -> Vec<u8> {
    Tarball::new()
        .header(GNU, name.as_bytes(), b'0', 0, |b| b[at..at + field.len()].copy_from_slice(field))
        .file("next", b"next")
        .end()
}

/// A file with PAX records.
fn with_pax(list: &[(&str, &[u8])]) -> Vec<u8> {
    Tarball::new().pax(list).file("name", b"data").file("next", b"next").end()
}

/// Slots of an old sparse map.
fn slots(list: &[(u64, u64)]) -> Vec<u8> {
    list.iter()
        .flat_map(|(offset, len)| [number(i128::from(*offset), 12), number(i128::from(*len), 12)])
        .flatten()
        .collect()
}

/// GNU's old sparse file: four slots in the header, then blocks of 21.
fn old_sparse(map: &[(u64, u64)], real: u64) -> Vec<u8> {
    let stored: u64 = map.iter().map(|(_, len)| len).sum();
    let (first, rest) = map.split_at(map.len().min(4));
    let mut tar = Tarball::new().header(GNU, b"sparse", b'S', stored, |b| {
        let first = slots(first);
        b[386..386 + first.len()].copy_from_slice(&first);
        b[482] = u8::from(!rest.is_empty());
        b[483..495].copy_from_slice(&number(i128::from(real), 12));
    });
    let mut rest = rest.chunks(21).peekable();
    while let Some(chunk) = rest.next() {
        let mut block = slots(chunk);
        block.resize(512, 0);
        block[504] = u8::from(rest.peek().is_some());
        tar = tar.raw(&block);
    }
    tar.content(&vec![b'd'; usize::try_from(stored).unwrap()]).file("next", b"next").end()
}

fn pax_sparse(list: &[(&str, &[u8])], name: &str, stored: &[u8]) -> Vec<u8> {
    Tarball::new().pax(list).file(name, stored).file("next", b"next").end()
}

/// As GNU tar writes form 1.0.
fn newest_sparse(map: &str, real: &str, data: &[u8]) -> Vec<u8> {
    let mut stored = map.as_bytes().to_vec();
    stored.resize(stored.len().next_multiple_of(512), 0);
    stored.extend_from_slice(data);
    let list = [
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"sparse"),
        ("GNU.sparse.realsize", real.as_bytes()),
    ];
    pax_sparse(&list, "GNUSparseFile.1/sparse", &stored)
}

/// All of them, by name.
pub fn all() -> Vec<(&'static str, Fate, Vec<u8>)> {
    let long = "long/".repeat(30) + "name";
    let file = || Tarball::new().file("f", b"content");
    let mut all = Vec::new();
    let mut add = |name, fate, archive: Vec<u8>| all.push((name, fate, archive));

    // Dialects, plain.
    for (name, magic) in [("ustar", USTAR), ("gnu", GNU), ("v7", V7)] {
        let tar = Tarball::new().header(magic, b"d/", b'5', 0, |_| {});
        let tar = tar.header(magic, b"d/f", b'0', 700, |_| {}).content(&[b'c'; 700]);
        let tar = tar.header(magic, b"d/old", 0, 3, |_| {}).content(b"abc");
        let tar = tar.header(magic, b"l", b'2', 0, |b| b[157..160].copy_from_slice(b"d/f"));
        let tar = tar.header(magic, b"h", b'1', 0, |b| b[157..160].copy_from_slice(b"d/f"));
        let tar = tar.header(magic, b"v7dir/", 0, 0, |_| {});
        add(name, Read(7), tar.header(magic, b"p", b'6', 0, |_| {}).end());
    }
    for (name, magic) in [("ustar device", USTAR), ("gnu device", GNU), ("v7 device", V7)] {
        let fate = if magic == V7 { Refused("dialect") } else { Read(1) };
        let device = header(magic, b"null", b'3', 0, |b| {
            b[329..336].copy_from_slice(b"0000001");
            b[337..344].copy_from_slice(b"0000003");
        });
        add(name, fate, Tarball::new().raw(&device).end());
    }
    add(
        "contiguous",
        Read(1),
        Tarball::new().header(USTAR, b"f", b'7', 1, |_| {}).content(b"c").end(),
    );
    add(
        "an unknown magic",
        Refused("magic"),
        Tarball::new().header(b"rats\x00\0\0\0", b"f", b'0', 0, |_| {}).end(),
    );

    // Numbers.
    let base = |value, len| number(value, len);
    add("base-256 owner", Read(2), with("f", 108, &base(1 << 30, 8)));
    add("base-256 small owner", Read(2), with("f", 108, b"\x80\0\0\0\0\0\x03\xe8"));
    add("base-256 negative owner", Refused("negative"), with("f", 108, &base(-2, 8)));
    add(
        "base-256 size",
        Read(2),
        Tarball::new()
            .header(GNU, b"f", b'0', 0, |b| {
                b[124..136].copy_from_slice(b"\x80\0\0\0\0\0\0\0\0\0\0\x04");
            })
            .content(b"data")
            .file("next", b"")
            .end(),
    );
    add("time before 1970", Read(2), with("f", 136, &base(-86_400, 12)));
    add("time beyond 2038", Read(2), with("f", 136, &base(1 << 31, 12)));
    add("time beyond 2106", Read(2), with("f", 136, &base(1 << 32, 12)));
    add("time beyond octal", Read(2), with("f", 136, &base(1 << 33, 12)));
    add("time in twelve digits", Read(2), with("f", 136, b"131560520000"));
    add("number without end", Read(2), with("f", 100, b"00000644"));
    add("number behind spaces", Read(2), with("f", 100, b"   644 \0"));
    add("number of other digits", Refused("octal"), with("f", 100, b"0000648\0"));
    add("number with a sign", Refused("octal"), with("f", 100, b"-000644\0"));
    add("number behind its end", Refused("octal"), with("f", 100, b"0644\x00001"));
    add("empty numbers", Read(2), with("f", 100, &[0; 24]));
    add("other base-256", Refused("octal"), with("f", 108, b"\x81\0\0\0\0\0\0\0"));
    add(
        "device beyond the kernel's",
        Refused("beyond"),
        Tarball::new()
            .header(GNU, b"n", b'3', 0, |b| {
                b[329..337].copy_from_slice(&base(1 << 40, 8));
            })
            .end(),
    );

    // Checksums.
    let mut signed = header(USTAR, b"\xff\xfe", b'0', 0, |_| {});
    let own: i64 = signed
        .iter()
        .enumerate()
        .map(|(at, b)| if (148..156).contains(&at) { 32 } else { i64::from(b.cast_signed()) })
        .sum();
    signed[148..155].copy_from_slice(format!("{own:06o}\0").as_bytes());
    add("signed checksum", Read(1), Tarball::new().raw(&signed).end());
    let mut wrong = header(USTAR, b"f", b'0', 0, |_| {});
    wrong[0] = b'g';
    add("wrong checksum", Refused("checksum"), Tarball::new().raw(&wrong).end());
    add("wrong checksum later", Refused("checksum"), file().raw(&wrong).end());

    // Names.
    add(
        "GNU long name",
        Read(2),
        Tarball::new()
            .long(b'L', &long)
            .header(GNU, b"cut", b'0', 4, |_| {})
            .content(b"data")
            .file("next", b"")
            .end(),
    );
    add(
        "GNU long link",
        Read(1),
        Tarball::new().long(b'K', &long).header(GNU, b"l", b'2', 0, |b| b[157] = b'c').end(),
    );
    add(
        "GNU long name and link",
        Read(2),
        Tarball::new()
            .long(b'K', &long)
            .long(b'L', &(long.clone() + "2"))
            .header(GNU, b"h", b'1', 0, |b| b[157] = b'c')
            .file("next", b"")
            .end(),
    );
    add(
        "GNU long name of a directory",
        Read(1),
        Tarball::new().long(b'L', &(long.clone() + "/")).header(GNU, b"cut", b'5', 0, |_| {}).end(),
    );
    add("PAX long name", Read(2), with_pax(&[("path", long.as_bytes())]));
    add(
        "PAX long link",
        Read(1),
        Tarball::new().pax(&[("linkpath", long.as_bytes())]).entry("l", b'2', "cut").end(),
    );
    add(
        "GNU and PAX names that agree",
        Read(1),
        Tarball::new().pax(&[("path", long.as_bytes())]).long(b'L', &long).file("cut", b"x").end(),
    );
    add(
        "GNU and PAX names that differ",
        Refused("differ"),
        Tarball::new().pax(&[("path", b"other")]).long(b'L', &long).file("cut", b"x").end(),
    );
    add(
        "prefix",
        Read(1),
        Tarball::new().header(USTAR, &[b'n'; 100], b'0', 0, |b| b[345..500].fill(b'p')).end(),
    );
    add(
        "prefix of star",
        Read(1),
        Tarball::new()
            .header(USTAR, b"n", b'0', 0, |b| {
                b[345..475].fill(b'p');
                b[508..512].copy_from_slice(b"tar\0");
            })
            .end(),
    );
    add(
        "prefix beyond star's",
        Refused("star"),
        Tarball::new()
            .header(USTAR, b"n", b'0', 0, |b| {
                b[345..500].fill(b'p');
                b[508..512].copy_from_slice(b"tar\0");
            })
            .end(),
    );
    add(
        "prefix in GNU's dialect",
        Refused("ustar"),
        Tarball::new().header(GNU, b"n", b'0', 0, |b| b[345] = b'p').end(),
    );
    add(
        "name that fills its field",
        Read(1),
        Tarball::new().header(USTAR, &[b'n'; 100], b'0', 0, |_| {}).end(),
    );
    add(
        "name not in UTF-8",
        Read(2),
        Tarball::new().header(USTAR, b"\xff\xfe\xe4", b'0', 0, |_| {}).file("next", b"").end(),
    );
    add(
        "PAX name not in UTF-8",
        Read(2),
        with_pax(&[("hdrcharset", b"BINARY"), ("path", b"\xff\xfe\xe4")]),
    );
    add(
        "PAX name of another charset",
        Refused("character set"),
        with_pax(&[("hdrcharset", b"KOI8-R")]),
    );
    add(
        "name with a newline",
        Read(1),
        Tarball::new().header(USTAR, b"a\nb\t\"c\\", b'0', 0, |_| {}).end(),
    );
    add(
        "name that is empty",
        Refused("empty name"),
        Tarball::new().header(USTAR, b"", b'0', 0, |_| {}).end(),
    );
    add(
        "name with a slash behind",
        Refused("slash"),
        Tarball::new().header(USTAR, b"f/", b'0', 0, |_| {}).end(),
    );

    // Links.
    add(
        "link chain",
        Read(3),
        Tarball::new().file("a", b"a").entry("b", b'1', "a").entry("c", b'1', "b").end(),
    );
    add(
        "link before its target",
        Read(2),
        Tarball::new().entry("b", b'1', "a").file("a", b"a").end(),
    );
    add(
        "link to a symlink",
        Read(2),
        Tarball::new().entry("s", b'2', "gone").entry("h", b'1', "s").end(),
    );
    add("link to itself", Read(1), Tarball::new().entry("h", b'1', "h").end());
    add(
        "link to a directory",
        Read(2),
        Tarball::new().entry("d/", b'5', "").entry("h", b'1', "d").end(),
    );
    add(
        "link without a target",
        Refused("without a target"),
        Tarball::new().entry("h", b'1', "").end(),
    );
    add("symlink without a target", Refused("target"), Tarball::new().entry("s", b'2', "").end());
    add(
        "hard link with content",
        Refused("content"),
        Tarball::new().header(USTAR, b"h", b'1', 4, |b| b[157] = b'f').content(b"data").end(),
    );
    for (name, typeflag) in [
        ("symlink with a size", b'2'),
        ("directory with a size", b'5'),
        ("fifo with a size", b'6'),
        ("device with a size", b'3'),
    ] {
        add(
            name,
            Refused("content"),
            Tarball::new()
                .header(USTAR, b"x", typeflag, 4, |b| b[157] = b'f')
                .content(b"data")
                .end(),
        );
    }

    // PAX.
    for (name, time) in [
        ("PAX time", &b"1500000000.25"[..]),
        ("PAX time before 1970", b"-1.25"),
        ("PAX time long before", b"-62135596800"),
        ("PAX time beyond 2106", b"5000000000.123456789"),
        ("PAX time too exact", b"1.1234567899"),
    ] {
        add(name, Read(2), with_pax(&[("mtime", time)]));
    }
    for (name, time) in [
        ("PAX time without a second", &b".5"[..]),
        ("PAX time without fraction", b"1."),
        ("PAX time in words", b"now"),
        ("PAX time in powers", b"1e9"),
        ("PAX time emptied", b""),
    ] {
        add(name, Refused("mtime"), with_pax(&[("mtime", time)]));
    }
    add("PAX comment", Read(2), with_pax(&[("comment", b"any\n12 path=wrong\n")]));
    add(
        "PAX comment with a record in it",
        Refused("reads as a record"),
        with_pax(&[("comment", b"any\n13 path=evil")]),
    );
    add("PAX vendor's own", Read(2), with_pax(&[("VENDOR.key", b"value")]));
    add("PAX path emptied", Refused("path"), with_pax(&[("path", b"")]));
    add("PAX path with a NUL", Refused("path"), with_pax(&[("path", b"a\0b")]));
    add("PAX path twice", Refused("twice"), with_pax(&[("path", b"a"), ("path", b"b")]));
    add("PAX size that agrees", Read(2), with_pax(&[("size", b"4")]));
    add("PAX size that differs", Refused("size"), with_pax(&[("size", b"512")]));
    add("PAX owner", Read(2), with_pax(&[("uid", b"3000000000"), ("gid", b"7")]));
    add("PAX nothing", Read(2), with_pax(&[]));
    add(
        "PAX record too short",
        Refused("malformed"),
        Tarball::new().extended(USTAR, "x", b'x', b"8 path=x\n").file("f", b"").end(),
    );
    add(
        "PAX record too long",
        Refused("malformed"),
        Tarball::new().extended(USTAR, "x", b'x', b"99 path=x\n").file("f", b"").end(),
    );
    add(
        "PAX global comment",
        Read(1),
        Tarball::new()
            .extended(USTAR, "pax_global_header", b'g', &records(&[("comment", b"hash")]))
            .file("f", b"")
            .end(),
    );
    add(
        "PAX global path",
        Refused("global"),
        Tarball::new()
            .extended(USTAR, "g", b'g', &records(&[("path", b"evil")]))
            .file("f", b"")
            .end(),
    );
    add(
        "PAX global time",
        Refused("global"),
        Tarball::new()
            .extended(USTAR, "g", b'g', &records(&[("mtime", b"1")]))
            .file("f", b"")
            .end(),
    );
    add("PAX of nothing", Refused("to come"), file().pax(&[("path", b"x")]).end());
    add(
        "PAX twice",
        Refused("two extended"),
        Tarball::new().pax(&[("mtime", b"1")]).pax(&[("mtime", b"2")]).file("f", b"").end(),
    );
    add(
        "PAX of Solaris",
        Refused("type"),
        Tarball::new().extended(USTAR, "x", b'X', &records(&[("path", b"x")])).file("f", b"").end(),
    );
    add("PAX holes of Solaris", Refused("holesdata"), with_pax(&[("SUN.holesdata", b" 0 2")]));
    add("PAX sparse of star", Refused("realsize"), with_pax(&[("SCHILY.realsize", b"4000")]));
    add("PAX linkpath of a file", Refused("link"), with_pax(&[("linkpath", b"x")]));

    // Sparse files.
    add("old sparse", Read(2), old_sparse(&[(0, 3), (4096, 5)], 10_000));
    add("old sparse, empty", Read(2), old_sparse(&[(0, 0)], 0));
    add("old sparse, all hole", Read(2), old_sparse(&[(8192, 0)], 8192));
    add("old sparse, hole at the end", Read(2), old_sparse(&[(0, 3), (8192, 0)], 8192));
    let many: Vec<(u64, u64)> = (0..60).map(|n| (n * 1024, n % 7 + 1)).collect();
    add("old sparse, three more blocks", Read(2), old_sparse(&many, 100_000));
    add("old sparse, exactly four", Read(2), old_sparse(&many[..4], 100_000));
    add("old sparse, exactly one more block", Read(2), old_sparse(&many[..25], 100_000));
    add("old sparse of 10 GiB", Read(2), old_sparse(&[(0, 1), (10 << 30, 1)], (10 << 30) + 1));
    add("old sparse that overlaps", Refused("overlaps"), old_sparse(&[(0, 3), (1, 3)], 100));
    add("old sparse beyond its end", Refused("end"), old_sparse(&[(0, 3), (98, 3)], 100));
    add(
        "sparse of another dialect",
        Refused("dialect"),
        Tarball::new().header(USTAR, b"s", b'S', 0, |_| {}).end(),
    );
    let oldest: Vec<(&str, &[u8])> = vec![
        ("GNU.sparse.size", b"4096"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"512"),
        ("GNU.sparse.numbytes", b"4"),
        ("GNU.sparse.offset", b"4096"),
        ("GNU.sparse.numbytes", b"0"),
    ];
    add("sparse 0.0", Read(2), pax_sparse(&oldest, "sparse", b"data"));
    let middle: Vec<(&str, &[u8])> = vec![
        ("GNU.sparse.size", b"4096"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.name", b"sparse"),
        ("GNU.sparse.map", b"512,4,4096,0"),
    ];
    add("sparse 0.1", Read(2), pax_sparse(&middle, "GNUSparseFile.1/sparse", b"data"));
    let sized: Vec<(&str, &[u8])> = vec![("GNU.sparse.size", b"4")];
    add("sparse without a map", Refused("of no form"), pax_sparse(&sized, "sparse", b""));
    add("sparse 1.0", Read(2), newest_sparse("2\n512\n4\n4096\n0\n", "4096", b"data"));
    add("sparse 1.0, empty", Read(2), newest_sparse("0\n", "0", b""));
    add("sparse 1.0, all hole", Read(2), newest_sparse("1\n4096\n0\n", "4096", b""));
    let map: String =
        "100\n".to_owned() + &(0..100).map(|n| format!("{}\n1\n", n * 1000)).collect::<String>();
    add("sparse 1.0, a map of two blocks", Read(2), newest_sparse(&map, "100000", &[b'd'; 100]));
    add(
        "sparse 1.0 of 10 GiB",
        Read(2),
        newest_sparse("2\n0\n1\n10737418240\n1\n", "10737418241", b"ab"),
    );
    add(
        "sparse 1.0 that is not all there",
        Refused("data"),
        newest_sparse("1\n0\n4\n", "4", b"dat"),
    );
    add("sparse 1.0 without a map", Refused("number"), newest_sparse("\n", "4", b"data"));
    add(
        "sparse of two forms",
        Refused("of two"),
        pax_sparse(&[&middle[..], &oldest[2..4]].concat(), "x", b"data"),
    );

    // Ends.
    add("no trailer", Read(1), file().0);
    add("a lone zero block", Read(1), file().raw(&[0; 512]).0);
    add(
        "a lone zero block in between",
        Refused("single zero block"),
        file().raw(&[0; 512]).file("g", b"").end(),
    );
    add("data behind the trailer", Read(1), [file().end(), b"anything".to_vec()].concat());
    add(
        "two archives in a row",
        Read(1),
        [file().end(), Tarball::new().file("g", b"").end()].concat(),
    );
    add("no padding", Read(1), Tarball::new().header(USTAR, b"f", b'0', 3, |_| {}).raw(b"abc").0);
    add(
        "content cut short",
        Refused("ends"),
        Tarball::new().header(USTAR, b"f", b'0', 900, |_| {}).raw(&[b'c'; 600]).0,
    );
    add("header cut short", Refused("ends"), file().raw(&[b'h'; 100]).0);

    // Kinds that no layer has.
    for (name, typeflag) in [
        ("volume label", b'V'),
        ("multi-volume part", b'M'),
        ("dump directory", b'D'),
        ("old long names", b'N'),
        ("inode only", b'I'),
        ("access control list of Solaris", b'A'),
        ("unknown type", b'Z'),
    ] {
        add(
            name,
            Refused("type"),
            Tarball::new().header(GNU, b"x", typeflag, 0, |_| {}).file("f", b"").end(),
        );
    }
    all
}
