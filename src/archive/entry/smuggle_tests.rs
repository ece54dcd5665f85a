//! Entries that readers in use take differently, one and all refused: what a scanner sees must be
//! what is unpacked. The reader that differs is named beside each.

use super::tests::{assert_refused, block, extended, padded, pax, plain, read};
use super::*;

/// Puts text into the field where ustar has the prefix of the name.
fn prefixed(name: &str, typeflag: u8, magic: &[u8; 8], prefix: &[u8]) -> Vec<u8> {
    block(name.as_bytes(), typeflag, 0, |b| {
        b[157] = b'x';
        b[257..265].copy_from_slice(magic);
        b[345..345 + prefix.len()].copy_from_slice(prefix);
    })
}

#[test]
fn a_prefix_is_part_of_the_name_to_python_whatever_the_magic() {
    let ustar = prefixed("f", b'0', b"ustar\x0000", b"dir");
    assert_eq!(read(&ustar).unwrap()[0].0.path.as_bytes(), b"dir/f");
    for magic in [b"ustar  \0", &[0; 8]] {
        for typeflag in [0, b'0', b'1', b'2', b'5', b'6'] {
            assert_refused("prefix", &prefixed("f", typeflag, magic, b"dir"));
        }
    }
    // Of its sparse files and long names it takes none, and GNU's headers have other things there.
    let sparse = block(b"f", b'S', 0, |b| {
        b[257..265].copy_from_slice(b"ustar  \0");
        b[345..356].copy_from_slice(b"14524770400");
        b[483..494].copy_from_slice(b"00000000000");
    });
    assert_eq!(read(&sparse).unwrap().len(), 1);
}

#[test]
fn a_name_that_is_all_prefix_is_a_directory_to_some() {
    for typeflag in [0, b'0', b'5'] {
        assert_refused("prefix", &prefixed("", typeflag, b"ustar\x0000", b"dir"));
        assert_refused("prefix", &prefixed("", typeflag, b"ustar\x0000", b"dir/"));
    }
}

#[test]
fn only_a_slash_in_the_header_itself_makes_an_old_directory() {
    assert!(read(&plain("d/", 0, 0)).is_ok());
    // To Go and Python these are files.
    for name in ["d/.", "."] {
        assert_refused(name, &plain(name, 0, 0));
    }
    // A directory to Python, which decides before it reads the longer name; a file to Go.
    for longer in [pax(&[("path", "f")]), extended(b'L', b"f\0")] {
        assert_refused("longer name", &[longer, plain("d/", 0, 0)].concat());
    }
}

#[test]
fn a_long_target_can_make_a_link_of_any_file_to_libarchive() {
    for (typeflag, ok) in [(b'0', false), (0, false), (b'5', false), (b'6', false), (b'1', true)] {
        for long in [pax(&[("linkpath", "other")]), extended(b'K', b"other\0")] {
            let archive = [long, plain("f", typeflag, 0)].concat();
            match read(&archive) {
                Ok(_) => assert!(ok, "{typeflag}"),
                Err(e) => assert!(!ok && e.kind() == ErrorKind::InvalidArchive, "{e}"),
            }
        }
    }
}

#[test]
fn type_s_is_gnus_sparse_file_in_gnus_dialect_alone() {
    let sparse = |magic: &[u8; 8]| {
        let header = block(b"f", b'S', 3, |b| {
            b[257..265].copy_from_slice(magic);
            b[386..409].copy_from_slice(b"00000000000\x0000000000003");
            b[483..494].copy_from_slice(b"00000000003");
        });
        [header, padded(b"abc")].concat()
    };
    assert!(read(&sparse(b"ustar  \0")).is_ok());
    // star has another map there; Go fails, GNU tar takes a plain file.
    assert_refused("ustar", &sparse(b"ustar\x0000"));
    assert_refused("v7", &sparse(&[0; 8]));
}

#[test]
fn the_crate_tar_knows_ustar_of_one_version_and_no_extended_headers_of_v7() {
    let ant = b"ustar\0\0\0";
    assert!(read(&block(b"f", b'0', 0, |b| b[257..265].copy_from_slice(ant))).is_ok());
    assert_refused("prefix", &prefixed("f", b'0', ant, b"dir"));
    for magic in [ant, &[0; 8]] {
        for typeflag in *b"xgLK" {
            let header = block(b"x", typeflag, 2, |b| b[257..265].copy_from_slice(magic));
            assert_refused("extended", &[header, padded(b"f\0"), plain("f", b'0', 0)].concat());
        }
    }
}

/// The records of a sparse file of form 0.1 without holes, but for its name.
const SPARSE: [(&str, &str); 3] =
    [("GNU.sparse.size", "4"), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.map", "0,4")];

#[test]
fn of_two_names_of_a_sparse_file_python_takes_the_last() {
    let sparse = |first: (&str, &str), second: (&str, &str)| {
        let [size, blocks, map] = SPARSE;
        [pax(&[first, size, blocks, map, second]), plain("f", b'0', 4), padded(b"data")].concat()
    };
    let (path, name) = (("path", "stand-in"), ("GNU.sparse.name", "sparse"));
    assert_eq!(read(&sparse(path, name)).unwrap()[0].0.path.as_bytes(), b"sparse");
    assert!(read(&sparse(name, ("path", "sparse"))).is_ok());
    assert_refused("order", &sparse(name, path));
}

#[test]
fn of_a_long_name_and_that_of_a_sparse_file_gnu_tar_takes_the_former() {
    let sparse = |long: &[u8]| {
        let [size, blocks, map] = SPARSE;
        let records = [("GNU.sparse.name", "s"), size, blocks, map];
        [extended(b'L', long), pax(&records), plain("f", b'0', 4), padded(b"data")].concat()
    };
    assert!(read(&sparse(b"s\0")).is_ok());
    assert_refused("long name", &sparse(b"other\0"));
}

#[test]
fn lines_of_a_value_are_records_to_the_crate_tar() {
    let with = |key: &str, value: &str| [pax(&[(key, value)]), plain("f", b'0', 0)].concat();
    for key in ["comment", "SCHILY.xattr.user.k", "VENDOR.key", "path", "SCHILY.acl.access"] {
        for value in
            ["x\n13 path=evil", "\n\n13 path=evil", "\n+14 path=evil\n", "\n013 path=evi\n"]
        {
            assert_refused(value, &with(key, value));
        }
        // None of these has the length that it says.
        for value in ["x\n12 path=evil", "13 path=evil", "\n 13 path=evil", "\n13path=evil"] {
            assert!(read(&with(key, value)).is_ok(), "{value:?}");
        }
    }
    let list = "user::rw-\nuser:7:r--\ngroup::r--\nmask::r--\nother::r--\n";
    assert!(read(&with("SCHILY.acl.access", list)).is_ok());
}

#[test]
fn a_map_in_any_header_of_gnus_makes_a_sparse_file_to_libarchive() {
    for at in [386, 397, 482, 483, 494] {
        let archive = block(b"f", b'0', 0, |b| {
            b[257..265].copy_from_slice(b"ustar  \0");
            b[at] = b'1';
        });
        assert_refused("map", &archive);
    }
}

#[test]
fn a_long_name_ends_at_its_nul_to_gnu_tar() {
    let long = |padding: &[u8]| {
        let mut name = plain("x", b'L', 4);
        name.extend_from_slice(b"name");
        name.extend_from_slice(padding);
        [padded(&name), plain("f", b'0', 0)].concat()
    };
    assert_eq!(read(&long(b"")).unwrap()[0].0.path.as_bytes(), b"name");
    assert_refused("long name", &long(b"-and-more"));
    assert!(read(&long(b"\0and-more")).is_ok());
}

#[test]
fn numbers_that_nobody_needs_are_read_by_python_and_end_its_list() {
    for at in [329, 337] {
        let archive = block(b"f", b'0', 0, |b| b[at..at + 7].copy_from_slice(b"garbage"));
        assert_refused("device number", &archive);
        for empty in [&b"       "[..], b"\0\0\0\0\0\0\0", b"0000000"] {
            let archive = block(b"f", b'0', 0, |b| b[at..at + 7].copy_from_slice(empty));
            assert!(read(&archive).is_ok(), "{empty:?}");
        }
    }
}

#[test]
fn maps_of_holes_of_solaris_are_content_to_all_but_libarchive() {
    let records = pax(&[("SUN.holesdata", " 0 4")]);
    assert_refused("holes", &[records, plain("f", b'0', 4), padded(b"data")].concat());
}

#[test]
fn the_limit_of_paths_is_that_of_link_targets() {
    let limits = EntryLimits { max_path: 5, ..EntryLimits::default() };
    for (typeflag, target, ok) in
        [(b'2', &b"12345"[..], true), (b'2', b"123456", false), (b'1', b"123456", false)]
    {
        let archive =
            block(b"x", typeflag, 0, |b| b[157..157 + target.len()].copy_from_slice(target));
        match EntryReader::new(&archive[..], limits).next() {
            Ok(_) => assert!(ok, "{target:?}"),
            Err(e) => assert!(!ok && e.kind() == ErrorKind::LimitExceeded, "{e}"),
        }
    }
}

#[test]
fn a_slash_alone_is_a_file_to_gnu_tar_where_only_the_name_tells() {
    for name in [&b"/"[..], b"//"] {
        assert_refused(
            "slash alone",
            &prefixed(std::str::from_utf8(name).unwrap(), 0, &[0; 8], b""),
        );
    }
    let named = block(b"/", b'5', 0, |b| b[257..265].copy_from_slice(b"ustar\x0000"));
    assert_eq!(read(&named).unwrap()[0].0.kind, EntryKind::Directory);
}
