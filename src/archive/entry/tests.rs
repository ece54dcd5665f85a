//! Reader and writer held against hand-made archives and against each other.

use std::io::{self, Read};

use super::*;

/// A ustar header with its checksum, made without the encoder under test.
pub(super) fn block(
    name: &[u8],
    typeflag: u8,
    size: u64,
    change: impl FnOnce(&mut [u8; 512]),
) -> Vec<u8> {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name);
    block[100..107].copy_from_slice(b"0000644");
    block[108..115].copy_from_slice(b"0001750");
    block[116..123].copy_from_slice(b"0001751");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[136..147].copy_from_slice(b"14524770400");
    block[156] = typeflag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    change(&mut block);
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block.to_vec()
}

pub(super) fn plain(name: &str, typeflag: u8, size: u64) -> Vec<u8> {
    block(name.as_bytes(), typeflag, size, |_| {})
}

pub(super) fn padded(content: &[u8]) -> Vec<u8> {
    let mut content = content.to_vec();
    content.resize(content.len().next_multiple_of(512), 0);
    content
}

/// An extended header with a body.
pub(super) fn extended(typeflag: u8, body: &[u8]) -> Vec<u8> {
    let header = plain("extended", typeflag, body.len() as u64);
    [header, padded(body)].concat()
}

pub(super) fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut body = String::new();
    for (key, value) in records {
        let len = (1..).find(|n| n.to_string().len() + key.len() + value.len() + 3 == *n).unwrap();
        body += &format!("{len} {key}={value}\n");
    }
    extended(b'x', body.as_bytes())
}

fn reader(archive: &[u8]) -> EntryReader<&[u8]> {
    EntryReader::new(archive, EntryLimits::default())
}

/// All entries with their contents.
pub(super) fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>> {
    let mut reader = reader(archive);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut content = Vec::new();
        reader.content().read_to_end(&mut content).map_err(|e| e.downcast::<Error>().unwrap())?;
        entries.push((entry, content));
    }
    Ok(entries)
}

fn one(archive: &[u8]) -> Entry {
    let mut entries = read(archive).unwrap();
    assert_eq!(entries.len(), 1);
    entries.pop().unwrap().0
}

pub(super) fn assert_refused(what: &str, archive: &[u8]) {
    let e = read(archive).expect_err(what);
    assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{what}: {e}");
}

#[test]
fn names_lose_slashes_and_dots_but_never_leave() {
    for (raw, path) in [
        ("/", ""),
        (".", ""),
        ("./", ""),
        ("./a", "a"),
        ("/a//b/./c/", "a/b/c"),
        (".../..a", ".../..a"),
    ] {
        assert_eq!(normalise(raw.as_bytes(), 4096).unwrap().as_bytes(), path.as_bytes(), "{raw:?}");
    }
    let long = "n".repeat(256);
    for bad in ["", "..", "a/..", "a/../b", "/../etc", "a\0b", &long] {
        let e = normalise(bad.as_bytes(), 4096).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{bad:?}");
    }
    let e = normalise(b"aaaa/bbbb", 8).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::LimitExceeded);
}

#[test]
fn reads_a_plain_header() {
    let archive = [plain("./dir/file", b'0', 3), padded(b"abc")].concat();
    let entries = read(&archive).unwrap();
    let expected = Entry {
        path: RelPath::new("dir/file").unwrap(),
        kind: EntryKind::File { size: 3, sparse: None },
        mode: 0o644,
        uid: 1000,
        gid: 1001,
        mtime: Timestamp { secs: 0o14524770400, nanos: 0 },
        atime: None,
        xattrs: BTreeMap::new(),
        acl_access: None,
        acl_default: None,
    };
    assert_eq!(entries, [(expected, b"abc".to_vec())]);
}

#[test]
fn ends_where_every_reader_ends() {
    let file = plain("f", b'0', 0);
    let zero = vec![0; 512];
    for tail in
        [vec![], zero.clone(), vec![0; 1024], [vec![0; 1024], b"anything".to_vec()].concat()]
    {
        let archive = [file.clone(), tail].concat();
        assert_eq!(read(&archive).unwrap().len(), 1);
    }
    assert_eq!(read(b"").unwrap(), []);
    assert_refused("lone zero", &[&file[..], &zero, &file].concat());
    assert_refused("half block", &[&file[..], b"half"].concat());
    assert_refused("half header", &file[..511]);
}

#[test]
fn leaves_what_follows_the_trailer_to_the_caller() {
    let archive = [plain("f", b'0', 0), vec![0; 1024], b"rest".to_vec()].concat();
    let mut reader = reader(&archive);
    assert!(reader.next().unwrap().is_some());
    assert!(reader.next().unwrap().is_none());
    assert!(reader.next().unwrap().is_none());
    assert_eq!(reader.into_inner(), b"rest");
}

#[test]
fn skips_content_that_nobody_read() {
    let archive =
        [plain("a", b'0', 700), padded(&[b'x'; 700]), plain("b", b'0', 1), padded(b"y")].concat();
    let mut reader = reader(&archive);
    reader.next().unwrap();
    let mut some = [0; 10];
    reader.content().read_exact(&mut some).unwrap();
    let b = reader.next().unwrap().unwrap();
    assert_eq!(b.path.as_bytes(), b"b");
    assert!(reader.next().unwrap().is_none());
}

#[test]
fn a_truncated_archive_never_looks_like_a_short_file() {
    let archive = [plain("f", b'0', 600), padded(&[b'x'; 600])].concat();
    let whole = 512 + 600;
    for len in 513..whole {
        assert_refused("truncated", &archive[..len]);
    }
    // Only padding is missing.
    for len in whole..archive.len() {
        assert_eq!(read(&archive[..len]).unwrap().len(), 1);
    }
    let mut reader = reader(&archive[..600]);
    reader.next().unwrap();
    let e = reader.next().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArchive);
    // Nothing can be had after an error.
    assert!(reader.next().is_err());
}

#[test]
fn sizes_that_readers_take_differently_are_refused() {
    let sized = |field: &[u8], size: &str, content: usize| {
        let header = block(b"f", b'0', 0, |b| {
            b[124..136].fill(0);
            b[124..124 + field.len()].copy_from_slice(field);
        });
        [pax(&[("size", size)]), header, vec![0x20; content]].concat()
    };
    assert!(read(&sized(b"00000001000", "512", 512)).is_ok());
    assert!(read(&sized(b"\x80\0\0\0\0\0\0\0\0\0\x02\0", "512", 512)).is_ok());
    for (field, size) in [
        (&b"00000000000"[..], "512"),
        (b"", "512"),
        (b"00000002000", "512"),
        (b"00000000001", "8589934592"),
        (b"77777777777", "512"),
        (b"00000001000", "0"),
    ] {
        assert_refused("contradiction", &sized(field, size, 512));
    }
    // Beyond eleven octal digits the field cannot hold it: 0 or all sevens.
    for field in [&b"00000000000"[..], b"", b"77777777777"] {
        let archive = sized(field, "8589934592", 0);
        let entry = reader(&archive).next().unwrap().unwrap();
        assert_eq!(entry.stored_size(), 8_589_934_592, "{field:?}");
    }
    assert_refused("beyond files", &sized(b"", "9223372036854775807", 0));
}

#[test]
fn only_files_have_content() {
    for typeflag in b"123456" {
        let link = |b: &mut [u8; 512]| b[157..163].copy_from_slice(b"target");
        assert!(read(&block(b"x", *typeflag, 0, link)).is_ok());
        let archive = [block(b"x", *typeflag, 1, link), padded(b"y")].concat();
        assert_refused(&char::from(*typeflag).to_string(), &archive);
    }
}

#[test]
fn types_that_no_layer_holds_are_refused() {
    for typeflag in *b"VMDNAXZ8 \xff" {
        assert_refused("type", &plain("x", typeflag, 0));
    }
    assert_eq!(one(&plain("x", b'7', 0)).kind, EntryKind::File { size: 0, sparse: None });
}

#[test]
fn trailing_slashes_are_for_directories() {
    assert_eq!(one(&plain("d/", b'5', 0)).kind, EntryKind::Directory);
    assert_eq!(one(&plain("d", b'5', 0)).kind, EntryKind::Directory);
    assert_eq!(one(&plain("d/", 0, 0)).kind, EntryKind::Directory);
    assert_refused("file", &plain("d/", b'0', 0));
    assert_refused("v7 with content", &[plain("d/", 0, 1), padded(b"x")].concat());
    assert_refused("fifo", &plain("d/.", b'6', 0));
    let long = [extended(b'L', b"d/\0"), plain("d", 0, 0)].concat();
    assert_refused("long name", &long);
}

#[test]
fn links_and_names_that_leave_are_refused() {
    let link = |typeflag, target: &[u8]| {
        block(b"x", typeflag, 0, |b| b[157..157 + target.len()].copy_from_slice(target))
    };
    let hard = one(&link(b'1', b"/./a//b"));
    assert_eq!(hard.kind, EntryKind::HardLink { target: RelPath::new("a/b").unwrap() });
    let soft = one(&link(b'2', b"../../x//"));
    assert_eq!(soft.kind, EntryKind::Symlink { target: b"../../x//".to_vec() });
    for target in [&b""[..], b"/", b"..", b"a/../b"] {
        assert_refused("hard link", &link(b'1', target));
    }
    assert_refused("symlink", &link(b'2', b""));
    for name in ["..", "a/..", "../x"] {
        assert_refused(name, &plain(name, b'5', 0));
    }
    assert_refused("no name", &plain("", b'0', 0));
    for typeflag in b"0126" {
        assert_refused("root", &block(b".", *typeflag, 0, |b| b[157] = b'x'));
    }
    assert!(one(&plain("./", b'5', 0)).path.is_root());
}

#[test]
fn device_numbers_fit_the_kernel() {
    let device = |major: &[u8], minor: &[u8]| {
        block(b"x", b'3', 0, |b| {
            b[329..329 + major.len()].copy_from_slice(major);
            b[337..337 + minor.len()].copy_from_slice(minor);
        })
    };
    assert_eq!(
        one(&device(b"0007777", b"3777777")).kind,
        EntryKind::CharDevice { major: 0xfff, minor: 0xf_ffff }
    );
    assert_refused("major", &device(b"0010000", b"0000001"));
    assert_refused("minor", &device(b"0000001", b"4000000"));
    assert_refused("garbage", &device(b"000000x", b"0000001"));
    let v7 = block(b"x", b'3', 0, |b| b[257..265].fill(0));
    assert_refused("v7", &v7);
    let both = |major| {
        let records = pax(&[("SCHILY.devmajor", major), ("SCHILY.devminor", "3")]);
        [records, device(b"0000001", b"0000003")].concat()
    };
    assert!(read(&both("1")).is_ok());
    assert_refused("contradiction", &both("2"));
}

#[test]
fn ids_are_32_bits_and_somebodys() {
    let owned = |key, id: &str| [pax(&[(key, id)]), plain("f", b'0', 0)].concat();
    assert_eq!(one(&owned("uid", "4294967294")).uid, u32::MAX - 1);
    assert_eq!(one(&owned("gid", "2097152")).gid, 2_097_152);
    for key in ["uid", "gid"] {
        assert_refused(key, &owned(key, "4294967295"));
        assert_refused(key, &owned(key, "4294967296"));
    }
    let field =
        block(b"f", b'0', 0, |b| b[108..116].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xfe"));
    assert_refused("negative", &field);
}

#[test]
fn pax_records_replace_what_the_header_says() {
    let archive = [
        pax(&[
            ("path", "long/name"),
            ("mtime", "-1.25"),
            ("atime", "5.5"),
            ("SCHILY.xattr.user.a", "v"),
            ("SCHILY.acl.access", "user::rw-"),
            ("uname", "somebody"),
            ("VENDOR.key", "x"),
        ]),
        plain("short", b'0', 0),
    ]
    .concat();
    let entry = one(&archive);
    assert_eq!(entry.path.as_bytes(), b"long/name");
    let time = |secs, nanos| Timestamp { secs, nanos };
    assert_eq!(entry.mtime, time(-2, 750_000_000));
    assert_eq!(entry.atime, Some(time(5, 500_000_000)));
    assert_eq!(entry.xattrs[&b"user.a"[..]], b"v");
    assert_eq!(entry.acl_access.as_deref(), Some(&b"user::rw-"[..]));
    // They are for one entry only.
    let two = [archive, plain("next", b'0', 0)].concat();
    let next = read(&two).unwrap().pop().unwrap().0;
    assert_eq!((next.path.as_bytes(), next.xattrs.len()), (&b"next"[..], 0));
}

#[test]
fn extended_headers_come_once_and_before_an_entry() {
    let file = plain("f", b'0', 0);
    let x = pax(&[("path", "name")]);
    let (l, k) = (extended(b'L', b"name\0"), extended(b'K', b"link\0"));
    let g = extended(b'g', b"17 comment=hello\n");
    let link = block(b"f", b'2', 0, |b| b[157] = b'x');
    for (archive, ok) in [
        (vec![&x, &file], true),
        (vec![&l, &k, &link], true),
        (vec![&l, &x, &file], true),
        (vec![&g, &x, &file], true),
        (vec![&g, &g, &file], true),
        (vec![&x, &x, &file], false),
        (vec![&l, &l, &file], false),
        (vec![&k, &k, &link], false),
        (vec![&x, &g, &file], false),
        (vec![&file, &x], false),
        (vec![&file, &l], false),
        (vec![&file, &g], true),
    ] {
        let archive: Vec<u8> = archive.into_iter().flatten().copied().collect();
        match read(&archive) {
            Ok(entries) => assert!(ok && entries.len() == 1),
            Err(e) => assert!(!ok && e.kind() == ErrorKind::InvalidArchive, "{e}"),
        }
    }
    let other = pax(&[("path", "other")]);
    assert_refused("contradiction", &[&l[..], &other, &file].concat());
    let global_path = extended(b'g', b"11 path=ab\n");
    assert_refused("global path", &[&global_path[..], &file].concat());
    for body in [&b""[..], b"\0", b"a\0b\0"] {
        assert_refused("long name", &[&extended(b'L', body)[..], &file].concat());
    }
}

#[test]
fn limits_hold_before_memory_is_taken() {
    let over = |archive: &[u8], limits| {
        let e = EntryReader::new(archive, limits).next().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded, "{e}");
    };
    let limits = EntryLimits::default();
    for typeflag in b"xgLK" {
        over(&plain("x", *typeflag, 0o77777777777), limits);
    }
    let small = EntryLimits { max_path: 3, ..limits };
    over(&plain("four", b'0', 0), small);
    let none = EntryLimits { max_entries: 0, ..limits };
    over(&plain("f", b'0', 0), none);
    // A map that never ends is cut off at the same bound.
    let mut endless = block(b"f", b'S', 0, |b| {
        b[257..265].copy_from_slice(b"ustar  \0");
        let slot = b"00000000000\x0000000000000\0";
        for at in 0..4 {
            b[386 + at * 24..386 + (at + 1) * 24].copy_from_slice(slot);
        }
        b[482] = 1;
    });
    let mut more = b"00000000000\x0000000000000\0".repeat(21);
    more.resize(512, 1);
    endless.extend(more.repeat(5));
    let bounded = EntryLimits { max_pax_bytes: 2048, ..limits };
    over(&endless, bounded);
}

#[test]
fn all_sparse_forms_read_the_same() {
    let data = padded(b"0123456789");
    let old = block(b"f", b'S', 10, |b| {
        let slots = b"00000001000\x0000000000004\x0000000004000\x0000000000006\x0000000010000\x0000000000000\0";
        b[386..386 + slots.len()].copy_from_slice(slots);
        b[483..494].copy_from_slice(b"00000010000");
        b[257..265].copy_from_slice(b"ustar  \0");
    });
    let oldest = pax(&[
        ("GNU.sparse.size", "4096"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.offset", "512"),
        ("GNU.sparse.numbytes", "4"),
        ("GNU.sparse.offset", "2048"),
        ("GNU.sparse.numbytes", "6"),
    ]);
    let middle = pax(&[
        ("GNU.sparse.size", "4096"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.name", "f"),
        ("GNU.sparse.map", "512,4,2048,6"),
    ]);
    let newest = pax(&[
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "f"),
        ("GNU.sparse.realsize", "4096"),
    ]);
    let map = padded(b"2\n512\n4\n2048\n6\n");
    for archive in [
        [old, data.clone()].concat(),
        [oldest, plain("f", b'0', 10), data.clone()].concat(),
        [middle, plain("GNUSparseFile.0/f", b'0', 10), data.clone()].concat(),
        [newest.clone(), plain("GNUSparseFile.0/f", b'0', 522), map, data].concat(),
    ] {
        let (entry, content) = read(&archive).unwrap().pop().unwrap();
        assert_eq!(entry.path.as_bytes(), b"f");
        let extent = |offset, len| Extent { offset, len };
        let kind =
            EntryKind::File { size: 4096, sparse: Some(vec![extent(512, 4), extent(2048, 6)]) };
        assert_eq!((entry.kind, &content[..]), (kind, &b"0123456789"[..]));
    }
    let short = [newest.clone(), plain("x", b'0', 100), padded(&[b'1'; 100])].concat();
    assert_refused("map beyond content", &short);
    assert_refused("sparse directory", &[newest, plain("x", b'5', 0)].concat());
}

pub(super) fn write(entries: &[(Entry, Vec<u8>)]) -> Vec<u8> {
    let mut writer = EntryWriter::new(Vec::new());
    for (entry, content) in entries {
        writer.append(entry, &mut &content[..]).unwrap();
    }
    writer.finish().unwrap()
}

pub(super) fn file(path: &str, size: u64) -> Entry {
    Entry {
        path: RelPath::new(path).unwrap(),
        kind: EntryKind::File { size, sparse: None },
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        atime: None,
        xattrs: BTreeMap::new(),
        acl_access: None,
        acl_default: None,
    }
}

#[test]
fn writes_plain_ustar_where_it_fits() {
    let mut entry = file("dir/file", 3);
    (entry.uid, entry.gid, entry.mtime.secs) = (1000, 1001, 0o14524770400);
    let mut expected = block(b"dir/file", b'0', 3, |b| {
        b[329..336].copy_from_slice(b"0000000");
        b[337..344].copy_from_slice(b"0000000");
    });
    expected.extend(padded(b"abc"));
    expected.extend([0; 1024]);
    assert_eq!(write(&[(entry, b"abc".to_vec())]), expected);
}

#[test]
fn content_of_another_size_breaks_the_archive_off() {
    for content in [&b"ab"[..], b"abcd", b""] {
        let mut writer = EntryWriter::new(Vec::new());
        let e = writer.append(&file("f", 3), &mut &*content).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
        assert_eq!(e.path().unwrap().as_os_str(), "f");
        assert!(writer.append(&file("g", 0), &mut io::empty()).is_err());
        assert!(writer.finish().is_err());
    }
}

#[test]
fn what_no_archive_holds_is_refused_before_a_byte() {
    let mut bad = [file("a", 0), file("b", 0), file("c", 0), file("d", 0), file("", 0)];
    bad[0].uid = u32::MAX;
    bad[1].kind = EntryKind::Symlink { target: Vec::new() };
    bad[2].kind = EntryKind::CharDevice { major: 0x1000, minor: 0 };
    bad[3].kind = EntryKind::File { size: 0, sparse: Some(Vec::new()) };
    for entry in bad {
        let mut writer = EntryWriter::new(Vec::new());
        let e = writer.append(&entry, &mut io::empty()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArgument);
        assert_eq!(writer.finish().unwrap(), [0; 1024]);
    }
}
