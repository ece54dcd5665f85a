//! Listings that stay right while names come and go; numbers of files that stay the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::Path;

use rustix::fs::{Dir, FileType, OFlags};

use crate::support::calls::{self, names, write};
use crate::support::fuse_union::{Stage, mode};

pub const TESTS: &[(&str, fn())] = &[
    ("listings_are_stable_while_names_come_and_go", stable),
    ("positions_are_good_for_later_readers", positions),
    ("listed_numbers_are_those_of_the_files", numbers),
    ("numbers_stay_through_copy_up_rename_and_remount", numbers_stay),
    ("directories_may_be_removed_while_listed", remove_while_listing),
];

fn open(path: &Path) -> Dir {
    Dir::new(calls::open(path, OFlags::RDONLY | OFlags::DIRECTORY).unwrap()).unwrap()
}

fn next(dir: &mut Dir) -> Option<(String, i64)> {
    loop {
        let entry = dir.read()?.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            return Some((name, entry.offset()));
        }
    }
}

/// A directory of 900 names: 450 of the lower, 450 of the upper, and 150 deleted besides.
fn large() -> (Stage, crate::support::fuse_union::Union) {
    let stage = Stage::new(2);
    for lower in &stage.lowers {
        fs::create_dir(lower.join("d")).unwrap();
    }
    for n in 0..600 {
        let lower = &stage.lowers[n % 2];
        write(&lower.join(format!("d/low-with-quite-a-long-name-{n:04}")), "");
    }
    let union = stage.mount();
    for n in 0..450 {
        write(&union.join(format!("d/up-with-quite-a-long-name-{n:04}")), "");
    }
    for n in (0..600).step_by(4) {
        fs::remove_file(union.join(format!("d/low-with-quite-a-long-name-{n:04}"))).unwrap();
    }
    (stage, union)
}

fn stable() {
    let (stage, union) = large();
    let d = union.join("d");
    let all: BTreeSet<String> = names(&d).into_iter().collect();
    assert_eq!(all.len(), 900);
    let (mut first, mut second) = (open(&d), open(&d));
    let mut seen: Vec<String> = Vec::new();
    for _ in 0..100 {
        seen.push(next(&mut first).unwrap().0);
        next(&mut second).unwrap();
    }
    // Half of what was seen goes, and half of what was not; others come.
    let unseen: Vec<_> = all.iter().filter(|name| !seen.contains(name)).cloned().collect();
    let gone: BTreeSet<String> = seen.iter().chain(&unseen).step_by(2).cloned().collect();
    for name in &gone {
        fs::remove_file(d.join(name)).unwrap();
    }
    for n in 0..200 {
        write(&d.join(format!("late-with-quite-a-long-name-{n:04}")), "");
    }
    for dir in [&mut first, &mut second] {
        let mut rest = seen.clone();
        while let Some((name, _)) = next(dir) {
            rest.push(name);
        }
        let distinct: BTreeSet<_> = rest.iter().cloned().collect();
        if rest[..100] == seen[..] {
            assert_eq!(distinct.len(), rest.len(), "names are listed twice");
        }
        let lost: Vec<_> = all.difference(&gone).filter(|name| !distinct.contains(*name)).collect();
        assert!(lost.is_empty(), "lost: {lost:?}");
    }
    // From the start, it is what is there.
    first.rewind();
    let mut now = BTreeSet::new();
    while let Some((name, _)) = next(&mut first) {
        assert!(now.insert(name), "a name is listed twice");
    }
    let expected: BTreeSet<_> = all.difference(&gone).cloned().collect();
    assert_eq!(now.iter().filter(|name| !name.starts_with("late")).count(), expected.len());
    assert_eq!(now.iter().filter(|name| name.starts_with("late")).count(), 200);
    drop((first, second));
    stage.survives(union);
}

fn positions() {
    let (stage, union) = large();
    let d = union.join("d");
    let mut dir = open(&d);
    let mut marks = Vec::new();
    let mut order = Vec::new();
    while let Some((name, position)) = next(&mut dir) {
        order.push(name);
        marks.push(position);
    }
    let check = |dir: &mut Dir, gone: &BTreeSet<String>| {
        for at in [0, 1, 7, 99, 450, 898] {
            dir.seek(marks[at]).unwrap();
            let mut rest = Vec::new();
            while let Some((name, _)) = next(dir) {
                rest.push(name);
            }
            // What was removed since the directory was opened may still be listed; the rest must be.
            rest.retain(|name| !gone.contains(name));
            let expected: Vec<_> =
                order[at + 1..].iter().filter(|name| !gone.contains(*name)).cloned().collect();
            assert!(rest == expected, "after position {at}: {rest:?}, not {expected:?}");
        }
    };
    check(&mut dir, &BTreeSet::new());
    let gone: BTreeSet<String> = order.iter().step_by(3).cloned().collect();
    for name in &gone {
        fs::remove_file(d.join(name)).unwrap();
    }
    check(&mut dir, &gone);
    drop(dir);
    stage.survives(union);
}

fn kind_of(meta: &fs::Metadata) -> FileType {
    let kind = meta.file_type();
    match () {
        () if kind.is_dir() => FileType::Directory,
        () if kind.is_file() => FileType::RegularFile,
        () if kind.is_symlink() => FileType::Symlink,
        () if kind.is_fifo() => FileType::Fifo,
        () if kind.is_socket() => FileType::Socket,
        () if kind.is_char_device() => FileType::CharacterDevice,
        () => FileType::BlockDevice,
    }
}

/// One of each kind.
fn one_of_each(base: &Path, prefix: &str) {
    let path = |name: &str| base.join(format!("{prefix}-{name}"));
    write(&path("file"), prefix);
    fs::create_dir(path("dir")).unwrap();
    write(&path("dir").join("inner"), "");
    symlink("x", path("link")).unwrap();
    calls::mknod(&path("pipe"), FileType::Fifo, 0o600, 0).unwrap();
    calls::mknod(&path("socket"), FileType::Socket, 0o600, 0).unwrap();
    let null = rustix::fs::makedev(1, 3);
    calls::mknod(&path("char"), FileType::CharacterDevice, 0o600, null).unwrap();
}

/// Checks each listing against `stat`, and gives the numbers by path.
fn numbers_of(root: &Path) -> BTreeMap<String, u64> {
    let mut numbers = BTreeMap::new();
    for entry in walkdir::WalkDir::new(root) {
        let entry = entry.unwrap();
        let name = entry.path().strip_prefix(root).unwrap().display().to_string();
        numbers.insert(name, calls::ino(entry.path()));
        if !entry.file_type().is_dir() {
            continue;
        }
        let mut dir = open(entry.path());
        while let Some(listed) = dir.read() {
            let listed = listed.unwrap();
            let name = listed.file_name().to_string_lossy().into_owned();
            let path = entry.path().join(&name);
            let meta = fs::symlink_metadata(&path).unwrap();
            if name != ".." || entry.path() != root {
                assert_eq!(listed.ino(), meta.ino(), "{}", path.display());
            }
            if listed.file_type() != FileType::Unknown {
                assert_eq!(listed.file_type(), kind_of(&meta), "{}", path.display());
            }
        }
    }
    numbers
}

fn numbers() {
    let stage = Stage::new(2);
    one_of_each(&stage.lower(""), "low");
    one_of_each(&stage.lowers[1], "bottom");
    for lower in &stage.lowers {
        fs::create_dir(lower.join("merged")).unwrap();
    }
    one_of_each(&stage.lower("merged"), "low");
    one_of_each(&stage.lowers[1].join("merged"), "bottom");
    let union = stage.mount();
    one_of_each(union.path(), "up");
    one_of_each(&union.join("merged"), "up");
    mode(&union.join("low-file"), 0o600);
    mode(&union.join("bottom-dir"), 0o700);
    let first = numbers_of(union.path());
    let distinct: BTreeSet<_> = first.values().collect();
    assert_eq!(distinct.len(), first.len(), "two files have one number");
    union.forget();
    assert_eq!(numbers_of(union.path()), first);
    // Device numbers are one, too.
    let devices: BTreeSet<_> = walkdir::WalkDir::new(union.path())
        .into_iter()
        .map(|entry| entry.unwrap().path().symlink_metadata().unwrap().dev())
        .collect();
    assert_eq!(devices.len(), 1);
    stage.survives(union);
}

fn numbers_stay() {
    let stage = Stage::new(2);
    one_of_each(&stage.lower(""), "low");
    for lower in &stage.lowers {
        fs::create_dir(lower.join("merged")).unwrap();
        write(&lower.join("merged/f"), "f");
    }
    let union = stage.mount();
    one_of_each(union.path(), "up");
    let number = |name: &str| calls::ino(&union.join(name));
    let before = numbers_of(union.path());
    for kind in ["file", "dir", "link", "pipe", "socket", "char"] {
        calls::chown(&union.join(format!("low-{kind}")), 1000, 1000);
    }
    write(&union.join("merged/new"), "");
    write(&union.join("low-dir/inner"), "written");
    write(&union.join("merged/f"), "written");
    union.forget();
    for (name, ino) in &before {
        assert_eq!(number(name), *ino, "{name}, copied up");
    }
    let mut moved = BTreeMap::new();
    for kind in ["file", "dir", "link", "pipe", "socket", "char"] {
        for layer in ["low", "up"] {
            let (from, to) = (format!("{layer}-{kind}"), format!("moved-{layer}-{kind}"));
            fs::rename(union.join(&from), union.join(&to)).unwrap();
            assert_eq!(number(&to), before[&from], "{from}, renamed");
            moved.insert(to, before[&from]);
        }
    }
    fs::rename(union.join("merged"), union.join("moved-merged")).unwrap();
    moved.insert("moved-merged".into(), before["merged"]);
    moved.insert("moved-merged/f".into(), before["merged/f"]);
    fs::hard_link(union.join("moved-low-file"), union.join("linked")).unwrap();
    moved.insert("linked".into(), before["low-file"]);
    numbers_of(union.path());
    stage.survives(union);
    let union = stage.mount();
    for (name, ino) in &moved {
        let kind = kind_of(&union.join(name).symlink_metadata().unwrap());
        if matches!(kind, FileType::RegularFile | FileType::Directory) {
            assert_eq!(calls::ino(&union.join(name)), *ino, "{name}, mounted again");
        }
    }
}

fn remove_while_listing() {
    let (stage, union) = large();
    let d = union.join("d");
    let mut dir = open(&d);
    let mut removed = 0;
    while let Some((name, _)) = next(&mut dir) {
        fs::remove_file(d.join(&name)).unwrap();
        removed += 1;
    }
    assert_eq!(removed, 900);
    drop(dir);
    fs::remove_dir(&d).unwrap();
    stage.survives(union);
}
