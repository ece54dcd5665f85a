//! What is removed but open works in every operation, and does what it does on ext4.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, XattrFlags};
use rustix::io::Result;

use crate::support::calls::{self, names, read, write};
use crate::support::fuse_union::Stage;

pub const TESTS: &[(&str, fn())] = &[
    ("files_removed_while_open", files),
    ("files_replaced_while_open", replaced),
    ("directories_removed_while_open", directories),
    ("symbolic_links_and_pipes_removed_while_open", others),
    ("a_new_file_of_the_name_is_another", recreated),
    ("removed_files_give_their_room_back", room),
];

/// How a file comes to be without a name.
#[derive(Clone, Copy, Debug)]
enum End {
    Removed,
    Replaced,
}

const FLAGS: [(&str, OFlags); 2] = [("rw", OFlags::RDWR), ("ro", OFlags::RDONLY)];

/// Takes the name away under an open descriptor, and says what each operation on it gives.
fn after_the_end(path: &Path, flags: OFlags, end: End) -> Vec<String> {
    let fd = calls::open(path, flags).unwrap();
    let other = path.with_file_name("other");
    let target = path.with_file_name("target");
    write(&target, "");
    match end {
        End::Removed => fs::remove_file(path).unwrap(),
        End::Replaced => {
            write(&other, "the other");
            fs::rename(&other, path).unwrap();
        }
    }
    let said = operations(fd.as_fd(), &target);
    match end {
        End::Removed => assert!(!path.exists()),
        End::Replaced => assert_eq!(read(path), "the other"),
    }
    fs::remove_file(&target).unwrap();
    said
}

fn state(fd: BorrowedFd) -> String {
    match rustix::fs::fstat(fd) {
        Ok(s) => format!(
            "{:o} {}:{} {} links {} bytes mtime {}.{}",
            s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_size, s.st_mtime, s.st_mtime_nsec
        ),
        Err(e) => format!("{e:?}"),
    }
}

fn operations(fd: BorrowedFd, target: &Path) -> Vec<String> {
    let mut said = Vec::new();
    let again = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let content = |fd: BorrowedFd| {
        let mut bytes = vec![0_u8; 100];
        let length = rustix::io::pread(fd, &mut bytes, 0)?;
        Result::Ok(bytes[..length].escape_ascii().to_string())
    };
    let then = rustix::fs::Timespec { tv_sec: 1_000_000_007, tv_nsec: 123_456_789 };
    let times = rustix::fs::Timestamps { last_access: then, last_modification: then };
    let set_times = |what: &str, said: &mut Vec<String>| {
        // So that states are the same wherever and whenever this runs.
        said.push(format!("{what}: times {:?}", rustix::fs::futimens(fd, &times)));
        said.push(format!("{what}: {}", state(fd)));
    };
    set_times("at first", &mut said);
    said.push(format!("read {:?}", content(fd)));
    said.push(format!("fchmod {:?}", rustix::fs::fchmod(fd, Mode::from(0o640))));
    let (uid, gid) = (rustix::fs::Uid::from_raw(1234), rustix::fs::Gid::from_raw(5678));
    said.push(format!("fchown {:?}", rustix::fs::fchown(fd, Some(uid), Some(gid))));
    set_times("changed", &mut said);
    for (name, value) in [("user.a", "one"), ("user.b", "two"), ("trusted.c", "three")] {
        let set = rustix::fs::fsetxattr(fd, name, value.as_bytes(), XattrFlags::empty());
        said.push(format!("set {name} {set:?}"));
    }
    let removed = rustix::fs::fremovexattr(fd, "user.b");
    said.push(format!("remove {removed:?}"));
    for name in ["user.a", "user.b", "trusted.c", "user.before"] {
        let mut value = [0_u8; 100];
        let got = rustix::fs::fgetxattr(fd, name, &mut value[..]);
        said.push(format!("get {name} {got:?} {:?}", value[..10].escape_ascii().to_string()));
    }
    let mut list = vec![0_u8; 999];
    let listed = rustix::fs::flistxattr(fd, &mut list[..]);
    let mut all: Vec<_> = list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    all.sort();
    let all: Vec<_> = all.into_iter().map(|name| name.escape_ascii().to_string()).collect();
    said.push(format!("list {listed:?} {all:?}"));
    said.push(format!("write {:?}", rustix::io::pwrite(fd, b"written", 3)));
    said.push(format!("read {:?}", content(fd)));
    said.push(format!("ftruncate {:?}", rustix::fs::ftruncate(fd, 8_000)));
    said.push(format!(
        "allocate {:?}",
        rustix::fs::fallocate(fd, FallocateFlags::empty(), 0, 9_000)
    ));
    said.push(format!("seek {:?}", rustix::fs::seek(fd, rustix::fs::SeekFrom::End(-1))));
    set_times("grown", &mut said);
    let mapped = calls::Mapping::new(fd, 4_096, false).map(|mapping| mapping.read(3, 7));
    said.push(format!("map {:?}", mapped.map_err(|e| e.raw_os_error())));
    let mapped = calls::Mapping::new(fd, 4_096, true).and_then(|mut mapping| {
        mapping.write(3, b"MAPPED");
        mapping.sync()
    });
    said.push(format!("map to write {:?}", mapped.map_err(|e| e.raw_os_error())));
    said.push(format!("read {:?}", content(fd)));
    said.push(format!("shrink {:?}", rustix::fs::ftruncate(fd, 12)));
    said.push(format!("read {:?}", content(fd)));
    said.push(format!("fsync {:?}", rustix::fs::fsync(fd)));
    said.push(format!("fdatasync {:?}", rustix::fs::fdatasync(fd)));
    set_times("synced", &mut said);
    for (name, flags) in [("read", OFlags::RDONLY), ("write", OFlags::RDWR)] {
        let reopened = calls::open(Path::new(&again), flags);
        said.push(format!("reopen to {name} {:?}", reopened.as_ref().map(drop)));
        if let Ok(reopened) = reopened {
            said.push(format!("read {:?}", content(reopened.as_fd())));
            said.push(format!("write {:?}", rustix::io::pwrite(&reopened, name.as_bytes(), 0)));
            said.push(format!("reopened {:?}", rustix::fs::fstat(&reopened).map(|s| s.st_nlink)));
        }
    }
    said.push(format!("read {:?}", content(fd)));
    let to = File::options().write(true).open(target).unwrap();
    let copied = rustix::fs::copy_file_range(fd, Some(&mut 0), &to, Some(&mut 0), 5);
    said.push(format!("copy from it {copied:?} {:?}", read(target)));
    let from = File::open(target).unwrap();
    let copied = rustix::fs::copy_file_range(&from, Some(&mut 0), fd, Some(&mut 6), 3);
    said.push(format!("copy to it {copied:?} {:?}", content(fd)));
    let back = target.with_file_name("back");
    let linked = rustix::fs::linkat(fd, "", CWD, &back, AtFlags::EMPTY_PATH);
    said.push(format!("link back {linked:?} {}", back.exists()));
    let linked = rustix::fs::linkat(CWD, &again, CWD, &back, AtFlags::SYMLINK_FOLLOW);
    said.push(format!("link back by /proc {linked:?} {}", back.exists()));
    set_times("at last", &mut said);
    said
}

fn make(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    write(path, "old content");
    calls::set_xattr(path, "user.before", b"before").unwrap();
}

/// Compares with ext4, for files of all origins.
fn compare(end: End) {
    let stage = Stage::new(1);
    let plain = stage.beside("plain");
    for (name, _) in FLAGS {
        make(&stage.lower(name).join("low"));
        make(&stage.lower(name).join("copied"));
        make(&plain.join(name).join("file"));
    }
    let union = stage.mount();
    for (name, flags) in FLAGS {
        let expected = after_the_end(&plain.join(name).join("file"), flags, end);
        make(&union.join(name).join("up"));
        calls::set_mtime(&union.join(name).join("copied"), 0, 0);
        for file in ["low", "copied", "up"] {
            let shown = after_the_end(&union.join(name).join(file), flags, end);
            let wrong: Vec<_> = expected.iter().zip(&shown).filter(|(a, b)| a != b).collect();
            assert!(wrong.is_empty(), "{name} {file}: expected, and shown: {wrong:#?}");
        }
    }
    stage.survives(union);
}

fn files() {
    compare(End::Removed);
}

fn replaced() {
    compare(End::Replaced);
}

fn directory_operations(path: &Path) -> Vec<String> {
    let fd = calls::open(path, OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
    fs::remove_dir(path).unwrap();
    let mut said = Vec::new();
    let then = rustix::fs::Timespec { tv_sec: 1_000_000_007, tv_nsec: 5 };
    let times = rustix::fs::Timestamps { last_access: then, last_modification: then };
    said.push(format!("times {:?}", rustix::fs::futimens(&fd, &times)));
    said.push(state(fd.as_fd()));
    said.push(format!("fchmod {:?}", rustix::fs::fchmod(&fd, Mode::from(0o711))));
    let uid = rustix::fs::Uid::from_raw(1234);
    said.push(format!("fchown {:?}", rustix::fs::fchown(&fd, Some(uid), None)));
    let set = rustix::fs::fsetxattr(&fd, "user.a", b"one", XattrFlags::empty());
    said.push(format!("set {set:?}"));
    let mut value = [0_u8; 100];
    said.push(format!("get {:?}", rustix::fs::fgetxattr(&fd, "user.a", &mut value[..])));
    said.push(format!("remove {:?}", rustix::fs::fremovexattr(&fd, "user.a")));
    said.push(format!("fsync {:?}", rustix::fs::fsync(&fd)));
    said.push(state(fd.as_fd()));
    let made = rustix::fs::openat(&fd, "f", OFlags::CREATE | OFlags::WRONLY, Mode::from(0o600));
    said.push(format!("create {:?}", made.map(drop)));
    said.push(format!("mkdir {:?}", rustix::fs::mkdirat(&fd, "d", Mode::from(0o700))));
    said.push(format!("symlink {:?}", rustix::fs::symlinkat("x", &fd, "l")));
    said.push(format!("stat {:?}", rustix::fs::statat(&fd, "old", AtFlags::empty()).map(drop)));
    let listed: Result<Vec<_>> = rustix::fs::Dir::read_from(&fd).and_then(|dir| {
        dir.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    });
    // Whether "." is still listed depends on the file system.
    let listed =
        listed.map(|names| names.into_iter().filter(|name| !name.starts_with('.')).count());
    said.push(format!("list {listed:?}"));
    said
}

fn directories() {
    let stage = Stage::new(1);
    let plain = stage.beside("plain");
    for path in [stage.lower("low"), stage.lower("merged"), plain.join("dir")] {
        fs::create_dir(path).unwrap();
    }
    write(&stage.lower("merged/old"), "old");
    let expected = directory_operations(&plain.join("dir"));
    let union = stage.mount();
    fs::create_dir(union.join("up")).unwrap();
    write(&union.join("merged/new"), "new");
    fs::remove_file(union.join("merged/new")).unwrap();
    fs::remove_file(union.join("merged/old")).unwrap();
    for dir in ["low", "merged", "up"] {
        let shown = directory_operations(&union.join(dir));
        let wrong: Vec<_> = expected.iter().zip(&shown).filter(|(a, b)| a != b).collect();
        assert!(wrong.is_empty(), "{dir}: expected, and shown: {wrong:#?}");
    }
    assert_eq!(names(union.path()), [""; 0]);
    stage.survives(union);
}

fn others() {
    let stage = Stage::new(1);
    symlink("a target", stage.lower("low-link")).unwrap();
    calls::mknod(&stage.lower("low-pipe"), rustix::fs::FileType::Fifo, 0o600, 0).unwrap();
    let union = stage.mount();
    symlink("a target", union.join("up-link")).unwrap();
    calls::mknod(&union.join("up-pipe"), rustix::fs::FileType::Fifo, 0o600, 0).unwrap();
    for layer in ["low", "up"] {
        let link = union.join(format!("{layer}-link"));
        let fd: OwnedFd = calls::open(&link, OFlags::PATH | OFlags::NOFOLLOW).unwrap();
        fs::remove_file(&link).unwrap();
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_nlink, 0, "{layer}");
        let target = rustix::fs::readlinkat(&fd, "", Vec::new()).unwrap();
        assert_eq!(target.to_bytes(), b"a target");
        let pipe = union.join(format!("{layer}-pipe"));
        let fd = calls::open(&pipe, OFlags::RDWR).unwrap();
        fs::remove_file(&pipe).unwrap();
        rustix::io::write(&fd, b"through").unwrap();
        let mut bytes = [0; 7];
        rustix::io::read(&fd, &mut bytes).unwrap();
        assert_eq!(&bytes, b"through");
        rustix::fs::fchmod(&fd, Mode::from(0o644)).unwrap();
        let stat = rustix::fs::fstat(&fd).unwrap();
        assert_eq!((stat.st_nlink, stat.st_mode & 0o777), (0, 0o644), "{layer}");
    }
    assert_eq!(names(union.path()), [""; 0]);
    stage.survives(union);
}

fn recreated() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), "old");
    let union = stage.mount();
    write(&union.join("up"), "old");
    for name in ["low", "up"] {
        let path = union.join(name);
        let mut held = Vec::new();
        for n in 0..10 {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            fs::remove_file(&path).unwrap();
            write(&path, format!("new {n}"));
            held.push(file);
        }
        for (n, file) in held.iter().enumerate() {
            file.write_at(b"!", 100).unwrap();
            let mut bytes = [0; 5];
            let length = file.read_at(&mut bytes, 0).unwrap();
            let expected = if n == 0 { "old\0\0".into() } else { format!("new {}", n - 1) };
            assert_eq!(&bytes[..length], expected.as_bytes());
        }
        assert_eq!(read(&path), "new 9");
    }
    stage.survives(union);
}

fn room() {
    let stage = Stage::new(1);
    let union = stage.mount();
    let used = || {
        let upper = walkdir::WalkDir::new(&stage.upper.as_ref().unwrap().0);
        let work = walkdir::WalkDir::new(stage.work());
        let entries = upper.into_iter().chain(work).map(|entry| entry.unwrap().metadata().unwrap());
        entries.filter(|meta| meta.is_file()).map(|meta| meta.len()).sum::<u64>()
    };
    let server_holds = || {
        let mut held = 0;
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(fds) = fs::read_dir(process.path().join("fd")) else { continue };
            let targets = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
            let upper = stage.upper.as_ref().unwrap().0.to_str().unwrap().to_owned();
            held += targets
                .filter(|to| {
                    let to = to.to_string_lossy();
                    to.starts_with(&upper) && to.ends_with("(deleted)")
                })
                .count();
        }
        held
    };
    for n in 0..50 {
        let path = union.join(format!("f{n}"));
        write(&path, vec![b'x'; 100_000]);
        let file = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 100_000);
    }
    // The kernel says that it has forgotten a file some time after it has; what never comes is found
    // by the watchdog.
    while (used(), server_holds()) != (0, 0) {
        union.forget();
        assert_ne!(calls::ino(union.path()), 0);
    }
    stage.survives(union);
}
