//! An archive that was unpacked comes back byte for byte, from the layer and its record.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::random_tests::{Random, cases};
use super::test_archive::*;
use super::*;
use crate::archive::RecordOptions;
use crate::archive::record::{Captured, replay};
use crate::progress::ignore_progress;

/// A layer beside its record.
struct Layer {
    tmp: tempfile::TempDir,
    applied: Applied,
    captured: Captured,
}

impl Layer {
    fn try_new(bytes: &[u8], format: LayerFormat, options: &ApplyOptions) -> Result<Layer> {
        let tmp = scratch();
        fs::create_dir(tmp.path().join("fs")).unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        let layer = Dir::open(tmp.path().join("fs")).unwrap();
        let name = Name::new("record").unwrap();
        let capture = Mutex::new(Capture::new(&dir, name, options.record).unwrap());
        let target = LayerTarget::Layer(format);
        let mut input = bytes;
        let tap = Some(&capture);
        let applied = apply(&mut input, &layer, target, options, tap, &mut ignore_progress)?;
        let capture = capture.into_inner().unwrap();
        let captured =
            capture.finish(applied.diff_id, applied.unpacked_bytes, applied.entries).unwrap();
        let names: Vec<_> =
            dir.entries().unwrap().into_iter().map(|e| e.name.as_bytes().to_vec()).collect();
        let has_record = names.contains(&b"record".to_vec());
        assert_eq!(has_record, captured == Captured::Record);
        assert_eq!(names.len(), 1 + usize::from(has_record), "{names:?}");
        Ok(Layer { tmp, applied, captured })
    }

    fn new(bytes: &[u8], format: LayerFormat) -> Layer {
        Layer::try_new(bytes, format, &options()).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join("fs").join(name)
    }

    fn record(&self) -> PathBuf {
        self.tmp.path().join("record")
    }

    fn replay(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let record = File::open(self.record()).unwrap();
        let layer = Dir::open(self.tmp.path().join("fs")).unwrap();
        let diff_id = self.applied.diff_id;
        let replayed = replay(&record, &layer, diff_id, &mut out, 2, &mut ignore_progress)?;
        assert_eq!(replayed.bytes, out.len() as u64);
        assert_eq!(replayed.entries, self.applied.entries);
        Ok(out)
    }
}

#[track_caller]
fn comes_back(bytes: &[u8]) {
    for format in formats() {
        let layer = Layer::new(bytes, format);
        assert_eq!(layer.captured, Captured::Record);
        assert!(layer.replay().unwrap() == bytes, "{format}: another archive");
    }
}

#[track_caller]
fn has_no_record(bytes: &[u8], options: RecordOptions, naming: &str) {
    let all = ApplyOptions { record: options, ..super::test_archive::options() };
    let layer = Layer::try_new(bytes, LayerFormat::Aufs, &all).unwrap();
    let Captured::Nothing(reason) = layer.captured else { panic!("there is a record") };
    assert!(reason.contains(naming), "{reason}");
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}

#[test]
fn plain_archives_come_back() {
    comes_back(&archive(&[]));
    comes_back(b"");
    comes_back(&archive(&["a/", "a/b", "c", "d/e/f", "l -> a", "l/through", "a/h = c", "empty/"]));
    let mut archive = Archive::new();
    archive.file("empty", b"").file("block", &[7; 512]).file("large", &noise(1 << 20));
    archive.file("zeros", &[0; 100_000]).file("last", b"x");
    comes_back(&archive.finish());
}

#[test]
fn what_is_replaced_or_deleted_comes_back() {
    for entries in [
        &["a", "a"][..],
        &["a", "a", "a/", "a/b", "a/b", "a", "b"],
        &["d/x", "d/y/z", "d", "d/", "d/x", "d/x/"],
        &["a", "b = a", "a", "b"],
        &["a", "b = a", "b", "a", "c = b"],
        &["a", "a -> b", "a/c", "b/d", "a", "b/c"],
        &["real/f", "s -> real", "s/f", "real/f", "s/", "s/f"],
        &["s -> deep/er", "s/f", "deep/er/f", "deep", "deep/", "deep/er/f"],
        &[".wh.a", "a", ".wh.b", "b/", "b/c", "c/d", "c/.wh..wh..opq", "c/.wh.d"],
        &["a/b", ".wh.a", "a/.wh.c", "a/c", "a", ".wh.x", "x/y", "x", "x/"],
        &["s -> d", "s/f", "s", "s/", "s/f2"],
    ] {
        comes_back(&archive(entries));
    }
    let mut archive = Archive::new();
    archive.file("d/large", &noise(300_000)).file("d/other", &noise(70_000));
    archive.file("d/large", b"small").entry("d").dir("d").file("d/x", b"1").dir("d");
    comes_back(&archive.finish());
}

#[test]
fn any_archive_that_is_accepted_comes_back() {
    let mut compared = 0;
    for seed in 1..=cases() {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut bytes = Archive::new();
        for n in 0..=random.below(14) {
            let (path, to) = (random.path(), random.path());
            let content = noise(usize::try_from(random.below(3) * 700 + n).unwrap());
            match random.below(12) {
                0 | 1 => bytes.dir(&path),
                2..=5 => bytes.file(&path, &content),
                6 => bytes.symlink(&path, &to),
                7 => bytes.symlink(&path, &format!("/{to}")),
                8 | 9 => bytes.link(&path, &to),
                10 => bytes.file(&format!("{path}/.wh.a"), b""),
                _ => bytes.file(&format!("{path}/.wh..wh..opq"), b""),
            };
        }
        let bytes = bytes.finish();
        let format = formats()[usize::try_from(seed).unwrap() % formats().len()];
        let Ok(layer) = Layer::try_new(&bytes, format, &options()) else { continue };
        assert_eq!(layer.captured, Captured::Record, "seed {seed}");
        assert!(layer.replay().unwrap() == bytes, "seed {seed}, {format}");
        compared += 1;
    }
    assert!(compared > cases() / 6, "{compared} archives were fit");
}

/// A header block with other bytes in some places, and the sum of those.
fn header(edits: &[(usize, &[u8])]) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.header("file", b'0', 0, "");
    let mut block = archive.finish()[..512].to_vec();
    for (at, bytes) in edits {
        block[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

const GNU: (usize, &[u8]) = (257, b"ustar  \0");

fn with_end(parts: &[&[u8]]) -> Vec<u8> {
    [&parts.concat()[..], &[0; 1024]].concat()
}

#[test]
fn sparse_files_of_all_dialects_come_back() {
    let data = noise(1024);
    // Old GNU: 512 bytes each at 4096 and 1 MiB, 2 MiB in all; with a block that continues the map.
    let octal = |n: u64| format!("{n:011o}\0").into_bytes();
    let slots = [octal(4096), octal(512), octal(1 << 20), octal(512)].concat();
    let old =
        header(&[GNU, (124, b"00000002000\0"), (156, b"S"), (386, &slots), (483, &octal(2 << 20))]);
    let many: Vec<u8> = (0..4).flat_map(|n| [octal(n * 8192), octal(128)].concat()).collect();
    let first = header(&[
        GNU,
        (0, b"more"),
        (124, b"00000001200\0"),
        (156, b"S"),
        (386, &many),
        (482, b"\x01"),
        (483, &octal(2 << 20)),
    ]);
    let mut next = [octal(1 << 20), octal(128)].concat();
    next.resize(512, 0);
    let old = with_end(&[&old, &data, &first, &next, &data[..640], &[0; 384]]);
    comes_back(&old);

    let mut pax = Archive::new();
    pax.pax("GNU.sparse.major", b"1").pax("GNU.sparse.minor", b"0");
    pax.pax("GNU.sparse.name", b"one").pax("GNU.sparse.realsize", b"1048576");
    let mut content = b"2\n0\n500\n8192\n524\n".to_vec();
    content.resize(512, 0);
    content.extend_from_slice(&data);
    pax.file("GNUSparseFile.0/one", &content);
    pax.pax("GNU.sparse.map", b"512,512,1048064,512").pax("GNU.sparse.size", b"1048576");
    pax.pax("GNU.sparse.numblocks", b"2").pax("GNU.sparse.name", b"two");
    pax.file("GNUSparseFile.0/two", &data);
    pax.pax("GNU.sparse.size", b"65536").pax("GNU.sparse.numblocks", b"1");
    pax.pax("GNU.sparse.offset", b"1000").pax("GNU.sparse.numbytes", b"1024");
    pax.file("three", &data);
    // Nothing but a hole.
    pax.pax("GNU.sparse.map", b"65536,0").pax("GNU.sparse.size", b"65536");
    pax.pax("GNU.sparse.numblocks", b"1").pax("GNU.sparse.name", b"hole");
    pax.file("GNUSparseFile.0/hole", b"");
    comes_back(&pax.finish());
    // Lost, alone and with a directory; linked, and then lost.
    pax.link("link", "two")
        .file("two", b"x")
        .file("one", &data)
        .file("three", b"")
        .file("link", b"");
    comes_back(&pax.finish());
}

#[test]
fn names_and_headers_of_all_dialects_come_back() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(130));
    let mut name = long.clone().into_bytes();
    name.push(0);
    let size = format!("{:011o}\0", name.len());
    let gnu = header(&[GNU, (0, b"././@LongLink\0"), (124, size.as_bytes()), (156, b"L")]);
    name.resize(512, 0);
    let file = header(&[GNU, (0, &[b'd'; 100]), (124, b"00000000001\0")]);
    let mut x = vec![0; 512];
    x[0] = b'x';
    comes_back(&with_end(&[&gnu, &name, &file, &x]));

    let v7 = header(&[(156, b"\0"), (257, &[0; 255]), (124, b"00000000001\0")]);
    comes_back(&with_end(&[&v7, &x]));
    // Base-256, numbers with spaces, padding that is no zeros.
    let odd = header(&[GNU, (124, b"\x80\0\0\0\0\0\0\0\0\0\0\x01"), (136, b"       1234 ")]);
    x[511] = b'!';
    comes_back(&with_end(&[&odd, &x]));

    let mut pax = Archive::new();
    pax.header("pax_global_header", b'g', 18, "");
    let mut bytes = pax.finish();
    bytes.truncate(512);
    bytes.extend_from_slice(b"18 comment=global\n");
    bytes.resize(1024, 0);
    let mut rest = Archive::new();
    rest.pax("path", long.as_bytes()).pax("mtime", b"1234567890.123456789").file("short", b"1");
    rest.pax("SCHILY.xattr.user.a", b"value").pax("uid", b"0").file("b", &noise(1000));
    bytes.extend_from_slice(&rest.finish());
    comes_back(&bytes);
}

#[test]
fn every_end_comes_back() {
    let whole = archive(&["a", "b"]);
    let entries = &whole[..whole.len() - 1024];
    comes_back(entries);
    comes_back(&whole[..whole.len() - 512]);
    // Without the padding of the last file.
    comes_back(&entries[..entries.len() - 511]);
    for trailing in [&[0; 9216][..], b"not zero", &noise(10_000), &[0; 8 << 20]] {
        comes_back(&[&whole, trailing].concat());
    }
    comes_back(&[&whole[..], &[0; 10_000], &noise(10), &[0; 3]].concat());
}

#[test]
fn what_aufs_left_in_archives_comes_back() {
    let mut archive = Archive::new();
    archive.file(".wh..wh.aufs", b"with a body").dir(".wh..wh.orph").dir(".wh..wh.plnk");
    archive.file(".wh..wh.plnk/1.1", &noise(5000)).file(".wh..wh.plnk/2.2", b"never linked");
    archive.file(".wh..wh.plnk/3.3", b"first").link("first", ".wh..wh.plnk/3.3");
    archive.file(".wh..wh.plnk/3.3", b"second").link("second", ".wh..wh.plnk/3.3");
    archive.link("a", ".wh..wh.plnk/1.1").link("d/b", ".wh..wh.plnk/1.1").link(".wh.x", "a");
    archive.file(".wh..wh.orph/lost", &noise(600));
    comes_back(&archive.finish());
    // Found again in a file that goes too, and in one that does not.
    archive.file("a", b"other").link("a", "d/b").file("d/b", b"").file("second", b"");
    comes_back(&archive.finish());
    archive.file("a", b"");
    comes_back(&archive.finish());
}

#[test]
fn what_only_its_owner_may_not_read_comes_back() {
    let mut archive = Archive::new();
    archive.mode = 0;
    archive.file("shadow", b"secret").file("d/gone", b"secret too").file("d/gone", b"");
    archive.dir_mode("closed", 0).file("closed/file", b"x").mode = 0o200;
    archive.file("replaced", b"1").file("replaced", b"2");
    let bytes = archive.finish();
    comes_back(&bytes);
    let own = ApplyOptions::unprivileged();
    let layer = Layer::try_new(&bytes, LayerFormat::Aufs, &own).unwrap();
    fs::remove_file(layer.path("shadow")).unwrap();
    fs::set_permissions(layer.path("closed"), PermissionsExt::from_mode(0o700)).unwrap();
    fs::remove_file(layer.path("closed/file")).unwrap();
    assert_eq!(layer.replay().unwrap(), bytes, "who cannot read it has it in the record");
}

#[test]
fn compressed_archives_come_back_uncompressed() {
    use crate::compression::{Compression, Compressor};
    use std::io::Write;
    let bytes = archive(&["a", "b/c", "a"]);
    for compression in [Compression::Gzip, Compression::Zstd] {
        let Ok(mut packed) = Compressor::new(Vec::new(), compression) else { continue };
        packed.write_all(&bytes).unwrap();
        let layer = Layer::new(&packed.finish().unwrap(), LayerFormat::Aufs);
        assert_eq!(layer.replay().unwrap(), bytes, "{compression}");
    }
}

#[test]
fn beyond_a_bound_there_is_no_record_and_the_reason_is_told() {
    let bounds = |max_inline_bytes, max_bytes| RecordOptions { max_inline_bytes, max_bytes };
    let mut lost = Archive::new();
    lost.file("a", &noise(3000)).file("a", b"x").file("b/c", b"x").entry("b");
    has_no_record(&lost.finish(), bounds(3000, 1 << 30), "max_inline_bytes");
    let mut skipped = Archive::new();
    skipped.file(".wh..wh.aufs", &noise(3001)).file("a", b"b");
    has_no_record(&skipped.finish(), bounds(3000, 1 << 30), "max_inline_bytes");
    let trailing = [&archive(&["a"])[..], &noise(4000)].concat();
    has_no_record(&trailing, bounds(3000, 1 << 30), "max_inline_bytes");
    let mut headers = Archive::new();
    headers.pax("comment", &noise(400_000)).file("a", b"b");
    has_no_record(&headers.finish(), bounds(3000, 100_000), "max_bytes");
    has_no_record(&archive(&["a"]), bounds(3000, 0), "max_bytes");

    let all = ApplyOptions { record: bounds(3001, 1 << 30), ..options() };
    let layer = Layer::try_new(&lost.finish(), LayerFormat::Aufs, &all).unwrap();
    assert_eq!(layer.captured, Captured::Record, "on the bound");
    assert_eq!(layer.replay().unwrap(), lost.finish());
}

#[track_caller]
fn fails(layer: &Layer, kinds: &[ErrorKind], naming: &str) {
    let e = layer.replay().unwrap_err();
    assert!(kinds.contains(&e.kind()), "{:?}: {e}", e.kind());
    assert!(e.to_string().contains(naming), "{naming}: {e}");
}

#[test]
fn a_changed_layer_is_found_out_and_the_file_named() {
    let outside = scratch();
    fs::write(outside.path().join("f"), "d/f").unwrap();
    type Change<'a> = &'a dyn Fn(&Layer);
    let changes: [(&str, Change<'_>); 8] = [
        ("another byte", &|l| fs::write(l.path("d/f"), "d/F").unwrap()),
        ("longer", &|l| fs::write(l.path("d/f"), "d/f and more").unwrap()),
        ("shorter", &|l| fs::write(l.path("d/f"), "d").unwrap()),
        ("gone", &|l| fs::remove_file(l.path("d/f")).unwrap()),
        ("a directory", &|l| {
            fs::remove_file(l.path("d/f")).unwrap();
            fs::create_dir(l.path("d/f")).unwrap();
        }),
        ("a link to the same", &|l| {
            fs::remove_file(l.path("d/f")).unwrap();
            std::os::unix::fs::symlink(outside.path().join("f"), l.path("d/f")).unwrap();
        }),
        ("its directory a link", &|l| {
            fs::remove_dir_all(l.path("d")).unwrap();
            std::os::unix::fs::symlink(outside.path(), l.path("d")).unwrap();
        }),
        ("a fifo", &|l| {
            fs::remove_file(l.path("d/f")).unwrap();
            let dir = Dir::open(l.path("d")).unwrap();
            dir.make_node(&Name::new("f").unwrap(), crate::sys::dir::Node::Fifo, 0o600).unwrap();
        }),
    ];
    for (what, change) in changes {
        let layer = Layer::new(&archive(&["a", "d/f", "z"]), LayerFormat::Aufs);
        change(&layer);
        eprintln!("{what}");
        fails(&layer, &[ErrorKind::DigestMismatch], "\"d/f\"");
        fails(&layer, &[ErrorKind::DigestMismatch], "import it again");
    }
}

#[test]
fn a_damaged_record_is_found_out() {
    use ErrorKind::{Corrupt, DigestMismatch, Incompatible};
    let bytes = archive(&["a", "b/c", "a", "d"]);
    let layer = Layer::new(&bytes, LayerFormat::Aufs);
    let whole = fs::read(layer.record()).unwrap();
    for cut in 0..whole.len() {
        fs::write(layer.record(), &whole[..cut]).unwrap();
        fails(&layer, &[Corrupt, Incompatible], "the record");
    }
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        fs::write(layer.record(), damaged).unwrap();
        // A bit of a compressed stream may say nothing.
        match layer.replay() {
            Ok(same) => assert_eq!(same, bytes),
            Err(e) => {
                let known = [Corrupt, Incompatible, DigestMismatch];
                assert!(known.contains(&e.kind()), "{:?}: {e}", e.kind());
            }
        }
    }
    let head = [b"stratafs-record 2\n", &whole[18..]].concat();
    fs::write(layer.record(), head).unwrap();
    fails(&layer, &[Incompatible], "newer version");
    fs::write(
        layer.record(),
        b"somebody else's file, which is long enough to have two ends ........",
    )
    .unwrap();
    fails(&layer, &[Corrupt], "first line");
    let other = Layer::new(&archive(&["a"]), LayerFormat::Aufs);
    fs::copy(other.record(), layer.record()).unwrap();
    fails(&layer, &[DigestMismatch], "not sha256:");
}
