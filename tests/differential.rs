//! The archive reader against others in use: GNU tar, libarchive (bsdtar), Python's tarfile and the
//! crate tar. Where they disagree about what is in an archive we must refuse it, for then a scanner
//! sees one list of files and the unpacker another; where all agree we must read it, and as they do,
//! but for what [`STRICTER`] lists.
//!
//! `STRATAFS_FULL` in the environment asks for many more random archives; `STRATAFS_KEEP` names a
//! directory that keeps those which fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod damage;
    pub mod odd_archives;
    pub mod suite;
    pub mod tar_readers;
    pub mod tarball;
}

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use libtest_mimic::Trial;
use stratafs::list_archive;
use support::damage::{Random, mutated};
use support::odd_archives::{self, Fate};
use support::suite;
use support::tar_readers::{Listing, Python, agree, crate_tar, gnu_tar, ours};
use support::tarball::is_header;

/// All readers, at work.
struct Readers {
    python: Python,
    tmp: tempfile::TempDir,
}

fn has(archive: &[u8], text: &[u8]) -> bool {
    archive.windows(text.len()).any(|w| w == text)
}

/// What came of a comparison.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// We read it, as all who read it.
    Same,
    /// We refuse it, and others disagree or refuse.
    Refused,
    /// We refuse it for a reason in [`STRICTER`].
    Stricter(&'static str),
}

impl Readers {
    fn list(&mut self, archive: &[u8]) -> Vec<(&'static str, Listing)> {
        let path = self.tmp.path().join("archive.tar");
        fs::write(&path, archive).unwrap();
        let [tarfile, libarchive] = self.python.list(archive).expect("the script answers");
        let mut all =
            vec![("GNU tar", gnu_tar(&path)), ("tarfile", tarfile), ("libarchive", libarchive)];
        // To the crate tar these are other files, and their maps content.
        if !has(archive, b"GNU.sparse.") {
            all.push(("the crate tar", crate_tar(archive)));
        }
        all
    }

    /// Holds our reader to the rule in the module's head.
    fn judge(&mut self, archive: &[u8]) -> Result<Verdict, String> {
        let has_sparse_records = has(archive, b"GNU.sparse.");
        let mut others = self.list(archive);
        let ours = ours(archive);
        // GNU tar counts from the first of several headers, and from before a map of holes.
        for (_, listing) in others.iter_mut().filter(|(reader, _)| *reader == "GNU tar") {
            for seen in listing.iter_mut().flatten() {
                let header = seen.offset.and_then(|o| usize::try_from(o).ok()?.checked_sub(512));
                let header = header.and_then(|at| archive.get(at..at + 512));
                let plain =
                    header.is_some_and(|h| is_header(h) && matches!(h[156], 0 | b'0' | b'7'));
                seen.offset = seen.offset.filter(|_| plain && !has_sparse_records);
            }
        }
        let lists: Vec<_> = others.iter().filter_map(|(_, l)| l.as_ref().ok()).collect();
        let they_agree = lists.windows(2).all(|pair| agree(pair[0], pair[1]));
        match &ours {
            Ok(ours) => {
                let differs = |l: &&(&str, Listing)| l.1.as_ref().is_ok_and(|l| !agree(ours, l));
                match others.iter().find(differs) {
                    None => Ok(Verdict::Same),
                    Some((reader, list)) => {
                        Err(format!("{reader} reads {list:#?}\nwhere we read {ours:#?}"))
                    }
                }
            }
            Err(reason) if they_agree && lists.len() == others.len() => {
                match STRICTER.iter().find(|(part, _)| reason.contains(part)) {
                    Some((part, _)) => Ok(Verdict::Stricter(part)),
                    None => Err(format!("all read {:#?}\nand we refuse: {reason}", lists[0])),
                }
            }
            Err(_) => Ok(Verdict::Refused),
        }
    }
}

/// What we refuse although all these readers read it, and alike: a part of the message, and why.
const STRICTER: &[(&str, &str)] = &[
    ("is beyond 4095:1048575", "the kernel has no such device numbers"),
    ("field is beyond 64 bits", "in an extended header's own block, where the others do not look"),
    ("its magic is that of no tar dialect", "Go takes no prefix from it, others do"),
    ("which this dialect has no numbers for", "v7 has none: they are whatever is there"),
    ("its name is longer than star's header holds", "star and Go end the prefix earlier"),
    ("character set that names are not in", "names would have to be converted"),
    ("it has an empty name", "there is nothing to make"),
    ("its link target is empty", "no file system has such a link"),
    ("is not a time in seconds", "Go and POSIX want digits on both sides of the point"),
    ("and readers differ on which to take", "others ignore one: RUSTSEC-2025-0111"),
    ("has a long link target, but is not a link", "libarchive may make a link of it, by the name"),
    ("bytes of data, its content", "Go refuses it, others fill up with zeros"),
    ("ends in the middle", "Go fails on half a block behind a zero one"),
    ("it has content, but is not a regular file", "Go takes none, others some"),
    ("ends in a slash, but it is not a directory", "Go makes a file of it, GNU tar a directory"),
    ("only comments may be", "readers that skip global headers see other entries"),
    ("two extended headers of one kind", "Go merges them, others take the last"),
    ("a global header stands between", "Go drops what came before it"),
    ("device field", "Go reads numbers as we do, others stop at what is none"),
    ("field is not an octal number", "Go reads numbers as we do, others stop at what is none"),
    ("field is negative", "Go reads large ones, others take some of the bits"),
    ("is of no kind that a layer may hold", "Go and others differ on its content"),
    ("those of no form, or of two", "Go takes such a file for a plain one"),
    ("long name and its PAX path differ", "which one counts depends on their order"),
    ("it has a malformed PAX record", "Go fails, others skip it or what follows"),
    ("its long name is empty or has a NUL byte", "readers end it at another place"),
    ("its sparse map has gaps", "Go and GNU tar end it at another place"),
    ("without a target", "there is nothing to link to"),
    ("to the layer's root", "there is nothing to link to"),
    ("is empty or has a NUL byte", "readers go back to the header, or take nothing"),
    ("has the name of a directory beside another", "Go and tarfile go by different ones"),
    ("but is not a regular file", "Go refuses it"),
    ("where only sparse files have a map", "libarchive takes it for one"),
    ("goes on behind its end", "GNU tar takes what is behind it too"),
    ("comes twice", "readers take the first or the last"),
    ("sparse files", "star and Solaris have holes where others have data"),
    ("it has bytes where only ustar", "tarfile takes them for a part of the name"),
    ("reads as a record", "the crate tar takes it for one"),
    ("that of the sparse file", "which one counts depends on their order"),
    ("in a dialect that has none", "the crate tar takes it for a file"),
    ("is not a file name: it is longer than 255 bytes", "no file system has such names"),
    ("is not a number from 0 to 2^63-1", "the others take what they can of it"),
    ("its name is all in the header's prefix", "GNU tar and Go put a slash behind it"),
    ("where some readers stop", "Go fails on a lone zero block"),
];

fn random_archives(readers: &mut Readers) {
    let seeds: Vec<Vec<u8>> = odd_archives::all().into_iter().map(|(_, _, a)| a).collect();
    let full = std::env::var_os("STRATAFS_FULL").is_some();
    let cases: u64 = if full { 60_000 } else { 2_500 };
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let mut failures = Vec::new();
    let keep = std::env::var_os("STRATAFS_KEEP");
    for case in 1..=cases {
        let mut random = Random(case.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let archive = mutated(&mut random, &seeds);
        match readers.judge(&archive) {
            Ok(verdict) => *counts.entry(format!("{verdict:?}")).or_default() += 1,
            Err(e) => {
                if let Some(dir) = &keep {
                    fs::write(Path::new(&dir).join(format!("{case}.tar")), &archive).unwrap();
                }
                failures.push(format!("case {case}: {e}"));
            }
        }
    }
    let total = failures.len();
    failures.truncate(5);
    assert!(failures.is_empty(), "{total} of {cases}, {counts:#?}\n{}", failures.join("\n\n"));
    // Neither all refused nor all read: the damage reaches something.
    assert!(counts["Same"] > cases / 10 && counts["Refused"] > cases / 10, "{counts:#?}");
}

/// A tree for real tools to archive: plain, or with what only some dialects hold.
fn tree(root: &Path, rich: bool) {
    fs::create_dir_all(root.join("dir/empty")).unwrap();
    fs::write(root.join("dir/file"), "content").unwrap();
    fs::write(root.join("dir/none"), "").unwrap();
    fs::write(root.join("blocks"), [b'x'; 1024]).unwrap();
    fs::hard_link(root.join("dir/file"), root.join("dir/linked")).unwrap();
    symlink("dir/file", root.join("sym")).unwrap();
    fs::hard_link(root.join("sym"), root.join("sym2")).unwrap();
    let set_time = |path: &str, secs: i64, nanos: u32| {
        let at = if secs < 0 {
            UNIX_EPOCH - Duration::from_secs(secs.unsigned_abs())
                + Duration::from_nanos(nanos.into())
        } else {
            UNIX_EPOCH + Duration::new(secs.unsigned_abs(), nanos)
        };
        File::options().write(true).open(root.join(path)).unwrap().set_modified(at).unwrap();
    };
    set_time("dir/file", 1_500_000_000, 0);
    if !rich {
        return;
    }
    let long = "n".repeat(150);
    fs::write(root.join("dir").join(&long), "long").unwrap();
    fs::create_dir_all(root.join(format!("{long}d/{long}"))).unwrap();
    symlink(format!("dir/{long}"), root.join("to-long")).unwrap();
    fs::hard_link(root.join("dir").join(&long), root.join("long-linked")).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"\xff\xfe")), "bytes").unwrap();
    fs::write(root.join("\u{e4}\u{2192}\n\"quoted\\"), "odd").unwrap();
    fs::write(root.join("before"), "").unwrap();
    set_time("before", -5, 250_000_000);
    fs::write(root.join("after"), "").unwrap();
    set_time("after", 5_000_000_000, 7);
    for (name, pieces, size) in
        [("two", 2, 1 << 20), ("forty", 40, 1 << 22), ("hole", 0, 1 << 20), ("huge", 2, 9 << 30)]
    {
        let file = File::create(root.join(name)).unwrap();
        for piece in 0..pieces {
            file.write_all_at(b"data", piece * 65536).unwrap();
        }
        file.set_len(size).unwrap();
    }
}

/// Archives that real tools write: all readers read them alike, and so do we.
fn real_archives(readers: &mut Readers) {
    const TARFILE: &str = "import sys, tarfile
with tarfile.open(sys.argv[1], 'w', format=getattr(tarfile, sys.argv[2])) as t: t.add('.')";
    let tmp = suite::temp();
    let (plain, rich) = (tmp.path().join("plain"), tmp.path().join("rich"));
    tree(&plain, false);
    tree(&rich, true);
    let out = tmp.path().join("out.tar");
    let out = out.to_str().unwrap();
    let mut commands: Vec<(&Path, Vec<&str>)> = Vec::new();
    for format in ["--format=v7", "--format=ustar"] {
        commands.push((&plain, vec!["tar", format, "-cf", out, "."]));
    }
    for format in ["--format=oldgnu", "--format=gnu", "--format=pax"] {
        commands.push((&rich, vec!["tar", format, "-Scf", out, "."]));
    }
    for version in ["--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"] {
        commands.push((&rich, vec!["tar", "--format=pax", version, "-Scf", out, "."]));
    }
    commands.push((&rich, vec!["tar", "--format=pax", "--acls", "--xattrs", "-Scf", out, "."]));
    commands.push((
        &rich,
        vec!["tar", "--format=gnu", "--numeric-owner", "--owner=4000000", "-Scf", out, "."],
    ));
    for format in ["v7tar", "ustar"] {
        commands.push((&plain, vec!["bsdtar", "--format", format, "-cf", out, "."]));
    }
    for format in ["gnutar", "pax"] {
        let all = ["--format", format, "--no-read-sparse", "--exclude=huge", "-cf", out, "."];
        commands.push((&rich, [&["bsdtar"][..], &all].concat()));
    }
    let sparse = ["--format=pax", "--read-sparse", "-cf", out, "two", "forty", "hole", "huge"];
    commands.push((&rich, [&["bsdtar"][..], &sparse].concat()));
    for format in ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"] {
        commands.push((&plain, vec!["python3", "-c", TARFILE, out, format]));
    }
    for (dir, command) in commands {
        let done = Command::new(command[0])
            .args(&command[1..])
            .current_dir(dir)
            .env("LC_ALL", "C.UTF-8")
            .output()
            .unwrap();
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
        match readers.judge(&fs::read(out).unwrap()) {
            Ok(Verdict::Same) => {}
            other => panic!("{command:?}: {other:#?}"),
        }
    }
}

fn main() {
    let tar = Command::new("tar").arg("--version").output();
    let gnu = tar.is_ok_and(|o| o.stdout.starts_with(b"tar (GNU tar)"));
    let mut hindrance = (!gnu).then(|| "needs GNU tar".to_owned());
    let readers = match Python::start() {
        Ok(python) => Some(Readers { python, tmp: tempfile::tempdir().unwrap() }),
        Err(e) => {
            hindrance.get_or_insert(e);
            None
        }
    };
    let readers = Arc::new(Mutex::new(readers));
    let mut trials = Vec::new();
    for (name, fate, archive) in odd_archives::all() {
        let bytes = archive.clone();
        trials.push(Trial::test(format!("alone: {name}"), move || {
            match (list_archive(&bytes), fate) {
                (Ok(entries), Fate::Read(count)) if entries.len() == count => Ok(()),
                (Err(e), Fate::Refused(part)) if e.to_string().contains(part) => Ok(()),
                (result, fate) => Err(format!("{result:#?}, not {fate:?}").into()),
            }
        }));
        let readers = Arc::clone(&readers);
        trials.push(suite::trial(format!("agrees: {name}"), hindrance.clone(), move || {
            let mut readers = readers.lock().unwrap_or_else(|e| e.into_inner());
            if let Err(e) = readers.as_mut().unwrap().judge(&archive) {
                drop(readers);
                panic!("{e}");
            }
        }));
    }
    let bsdtar = Command::new("bsdtar").arg("--version").output().is_ok();
    let without = (!bsdtar).then(|| "needs bsdtar".to_owned());
    let real = Arc::clone(&readers);
    let hindered = hindrance.clone().or(without);
    trials.push(suite::trial("agrees: archives of real tools", hindered, move || {
        let mut readers = real.lock().unwrap_or_else(|e| e.into_inner());
        real_archives(readers.as_mut().unwrap());
    }));
    let random = Arc::clone(&readers);
    trials.push(suite::trial("agrees: random archives", hindrance, move || {
        let mut readers = random.lock().unwrap_or_else(|e| e.into_inner());
        random_archives(readers.as_mut().unwrap());
    }));
    suite::run(trials);
}
