//! Names of any bytes up to the limit, and times of any age.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, RenameFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use crate::support::calls::{self, read, write};
use crate::support::fuse_union::Stage;

pub const TESTS: &[(&str, fn())] = &[
    ("names_have_255_bytes_and_no_more", limits),
    ("names_are_of_any_bytes", bytes),
    ("targets_of_symbolic_links_are_long_and_of_any_bytes", targets),
    ("paths_are_longer_than_path_max", deep),
    ("times_beyond_2038", late_times),
    ("times_that_are_left_or_are_now", partial_times),
    ("xattr_names_are_of_any_bytes", xattr_names),
];

fn limits() {
    let stage = Stage::new(1);
    let longest = |letter: &str| letter.repeat(255);
    write(&stage.lower(longest("l")), "lower");
    write(&stage.lower("f"), "f");
    let union = stage.mount();
    let at = |name: String| union.join(name);
    write(&at(longest("f")), "file");
    fs::create_dir(at(longest("d"))).unwrap();
    symlink("x", at(longest("s"))).unwrap();
    calls::mknod(&at(longest("p")), FileType::Fifo, 0o600, 0).unwrap();
    fs::hard_link(at("f".into()), at(longest("h"))).unwrap();
    fs::rename(at(longest("l")), at(longest("r"))).unwrap();
    fs::remove_file(at(longest("f"))).unwrap();
    write(&at(longest("f")), "again");
    fs::remove_dir(at(longest("d"))).unwrap();
    let long = at("n".repeat(256));
    let short = at("f".into());
    let errors = [
        ("create", calls::open(&long, rustix::fs::OFlags::CREATE).map(drop)),
        ("open", calls::open(&long, rustix::fs::OFlags::RDONLY).map(drop)),
        ("mkdir", calls::mkdir(&long, 0o755)),
        ("mknod", calls::mknod(&long, FileType::Fifo, 0o600, 0)),
        ("symlink", rustix::fs::symlink("x", &long)),
        ("link", rustix::fs::link(&short, &long)),
        ("rename", calls::rename(&short, &long, RenameFlags::empty())),
        ("exchange", calls::rename(&short, &long, RenameFlags::EXCHANGE)),
        ("rename from", calls::rename(&long, &short, RenameFlags::empty())),
        ("stat", rustix::fs::lstat(&long).map(drop)),
        ("unlink", rustix::fs::unlink(&long)),
        ("rmdir", rustix::fs::rmdir(&long)),
        ("through", rustix::fs::lstat(long.join("x")).map(drop)),
    ];
    for (what, result) in errors {
        assert_eq!(result, Err(Errno::NAMETOOLONG), "{what}");
    }
    assert_eq!(rustix::fs::statvfs(union.path()).unwrap().f_namemax, 255);
    stage.survives(union);
}

/// Each byte that a name may have, alone, and names that programs stumble over.
fn odd_names() -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> =
        (1..=255).filter(|byte| !b"/.".contains(byte)).map(|byte| vec![byte]).collect();
    names.push((1..=255).filter(|byte| *byte != b'/').collect());
    let odd: [&[u8]; 12] = [
        b"...",
        b" ",
        b"-rf",
        b"new\nline",
        b"\xff\xfe\xfd",
        b"a\xcc\x88",
        b"\xc3\xa4",
        b"work",
        b"index",
        b"#1",
        b"\\,:=",
        b"%s%n",
    ];
    names.extend(odd.map(<[u8]>::to_vec));
    names.sort();
    names.dedup();
    names
}

fn bytes() {
    let stage = Stage::new(1);
    let names = odd_names();
    let path = |base: &Path, name: &[u8]| base.join(OsStr::from_bytes(name));
    fs::create_dir(stage.lower("low")).unwrap();
    for name in &names {
        write(&path(&stage.lower("low"), name), name);
    }
    let union = stage.mount();
    let (low, up) = (union.join("low"), union.join("up"));
    fs::create_dir(&up).unwrap();
    for (n, name) in names.iter().enumerate() {
        write(&path(&up, name), name);
        match n % 4 {
            0 => fs::remove_file(path(&low, name)).unwrap(),
            1 => write(&path(&low, name), "changed"),
            2 => assert_eq!(fs::read(path(&low, name)).unwrap(), *name),
            _ => {}
        }
    }
    union.forget();
    for (dir, expected) in [(&up, names.len()), (&low, names.len() - names.len().div_ceil(4))] {
        let mut listed: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
            .collect();
        listed.sort();
        assert!(listed.iter().all(|name| names.contains(name)));
        assert_eq!(listed.len(), expected);
    }
    stage.survives(union);
}

fn targets() {
    let stage = Stage::new(1);
    let all: Vec<u8> = (1..=255).collect();
    let long = [b"t".repeat(4000), all.clone()].concat();
    // Some file systems, such as XFS, have less room than a path may need.
    let room = [4095, 1023].into_iter().find(|length| {
        let probe = stage.beside("plain").join("link");
        symlink(OsStr::from_bytes(&long[..*length]), probe).is_ok()
    });
    let long = &long[..room.unwrap()];
    let targets: [&[u8]; 5] = [&all, long, b"/absolute", b"..", b"a//b/./"];
    for (n, target) in targets.iter().enumerate() {
        symlink(OsStr::from_bytes(target), stage.lower(format!("low{n}"))).unwrap();
    }
    let union = stage.mount();
    for (n, target) in targets.iter().enumerate() {
        symlink(OsStr::from_bytes(target), union.join(format!("up{n}"))).unwrap();
        for layer in ["low", "up"] {
            let shown = fs::read_link(union.join(format!("{layer}{n}"))).unwrap();
            assert_eq!(shown.as_os_str().as_bytes(), *target);
            let length = union.join(format!("{layer}{n}")).symlink_metadata().unwrap().len();
            assert_eq!(length, target.len() as u64);
        }
        calls::chown(&union.join(format!("low{n}")), 5, 5);
    }
    let beyond = OsStr::from_bytes(&[b't'; 4096]);
    assert_eq!(rustix::fs::symlink(beyond, union.join("x")), Err(Errno::NAMETOOLONG));
    stage.survives(union);
}

/// A tree deeper than any path can say, made and removed with descriptors.
fn deep() {
    use rustix::fs::{AtFlags, Mode, OFlags};
    let stage = Stage::new(1);
    let name = "d".repeat(250);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let descend = |root: &Path, make: bool| {
        let mut dir = calls::open(root, flags).unwrap();
        for _ in 0..30 {
            if make {
                rustix::fs::mkdirat(&dir, &*name, Mode::from(0o755)).unwrap();
            }
            dir = rustix::fs::openat(&dir, &*name, flags, Mode::empty()).unwrap();
        }
        dir
    };
    {
        let bottom = descend(&stage.lowers[0], true);
        let made = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(&bottom, "low", made, Mode::from(0o644)).unwrap();
    }
    let union = stage.mount();
    {
        let bottom = descend(union.path(), false);
        rustix::fs::chmodat(&bottom, "low", Mode::from(0o600), AtFlags::empty()).unwrap();
        let made = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&bottom, "up", made, Mode::from(0o644)).unwrap();
        rustix::io::write(&file, b"content").unwrap();
        rustix::fs::renameat(&bottom, "up", &bottom, "renamed").unwrap();
        rustix::fs::symlinkat("x", &bottom, "link").unwrap();
        rustix::fs::mkdirat(&bottom, "dir", Mode::from(0o755)).unwrap();
    }
    union.unmount();
    let union = stage.mount();
    {
        let bottom = descend(union.path(), false);
        let stat = rustix::fs::statat(&bottom, "low", AtFlags::empty()).unwrap();
        assert_eq!(stat.st_mode & 0o777, 0o600);
        let stat = rustix::fs::statat(&bottom, "renamed", AtFlags::empty()).unwrap();
        assert_eq!(stat.st_size, 7);
    }
    // The whole of it goes, as `rm -r` does it.
    let removed =
        std::process::Command::new("rm").arg("-r").arg(union.join(&name)).status().unwrap();
    assert!(removed.success());
    stage.survives(union);
    std::process::Command::new("rm").arg("-r").arg(stage.lower(&name)).status().unwrap();
}

/// Where ext4 ends, and where 32 bits do.
const LATE: [(i64, i64); 5] = [
    (2_147_483_647, 999_999_999),
    (2_147_483_648, 1),
    (4_294_967_296, 0),
    (10_000_000_000, 500_000_000),
    (15_032_385_535, 0),
];

fn late_times() {
    let stage = Stage::new(1);
    let kinds = |base: &Path, prefix: &str| -> Vec<PathBuf> {
        ["file", "dir", "link"].map(|kind| base.join(format!("{prefix}-{kind}"))).to_vec()
    };
    let make = |base: &Path, prefix: &str| {
        let [file, dir, link] = kinds(base, prefix).try_into().unwrap();
        write(&file, "f");
        fs::create_dir(&dir).unwrap();
        symlink("x", &link).unwrap();
    };
    for (n, (seconds, nanoseconds)) in LATE.into_iter().enumerate() {
        make(&stage.lowers[0], &format!("low{n}"));
        for path in kinds(&stage.lowers[0], &format!("low{n}")) {
            calls::set_mtime(&path, seconds, nanoseconds);
        }
        make(&stage.lowers[0], &format!("set{n}"));
    }
    let union = stage.mount();
    for (n, time) in LATE.into_iter().enumerate() {
        make(union.path(), &format!("up{n}"));
        for prefix in ["set", "up"] {
            for path in kinds(union.path(), &format!("{prefix}{n}")) {
                calls::set_mtime(&path, time.0, time.1);
            }
        }
        for _ in 0..2 {
            for prefix in ["low", "set", "up"] {
                for path in kinds(union.path(), &format!("{prefix}{n}")) {
                    assert_eq!(calls::mtime(&path), time, "{}", path.display());
                }
            }
            union.forget();
        }
    }
    // Access times too.
    let far = Timespec { tv_sec: 7_000_000_000, tv_nsec: 7 };
    let past = Timespec { tv_sec: -77, tv_nsec: 7 };
    for (access, change) in [(far, past), (past, far)] {
        let times = Timestamps { last_access: access, last_modification: change };
        let file = File::options().write(true).open(union.join("up0-file")).unwrap();
        rustix::fs::futimens(&file, &times).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        assert_eq!((stat.st_atime, stat.st_mtime), (access.tv_sec, change.tv_sec));
    }
    stage.survives(union);
}

fn partial_times() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), "low");
    calls::set_mtime(&stage.lower("low"), 1000, 1);
    let union = stage.mount();
    write(&union.join("up"), "up");
    calls::set_mtime(&union.join("up"), 1000, 1);
    let special = |nanoseconds: i64| Timespec { tv_sec: 0, tv_nsec: nanoseconds };
    for name in ["low", "up"] {
        let path = union.join(name);
        let set = |access: Timespec, change: Timespec| {
            let times = Timestamps { last_access: access, last_modification: change };
            rustix::fs::utimensat(CWD, &path, &times, rustix::fs::AtFlags::empty()).unwrap();
            rustix::fs::stat(&path).unwrap()
        };
        let given = Timespec { tv_sec: 2000, tv_nsec: 2 };
        let stat = set(given, special(UTIME_OMIT));
        assert_eq!((stat.st_atime, stat.st_mtime, stat.st_mtime_nsec), (2000, 1000, 1), "{name}");
        let stat = set(special(UTIME_OMIT), given);
        assert_eq!((stat.st_atime, stat.st_mtime, stat.st_mtime_nsec), (2000, 2000, 2), "{name}");
        let stat = set(special(UTIME_OMIT), special(UTIME_NOW));
        assert_eq!(stat.st_atime, 2000, "{name}");
        assert!(stat.st_mtime > 1_500_000_000, "{name}");
        let stat = set(special(UTIME_NOW), given);
        assert!(stat.st_atime > 1_500_000_000, "{name}");
        assert_eq!(stat.st_mtime, 2000, "{name}");
        // A change of times is a change.
        assert!(stat.st_ctime > 1_500_000_000, "{name}");
        assert_eq!(read(&path).len(), name.len());
    }
    stage.survives(union);
}

fn xattr_names() {
    let stage = Stage::new(1);
    write(&stage.lower("f"), "f");
    let names: [&[u8]; 6] =
        [b"user.\xff\xfe", b"user. ", b"user.a=b", b"user.\n", b"user..", b"user.\xc3\xa4"];
    let longest = [b"user.".to_vec(), vec![b'n'; 250]].concat();
    let flags = rustix::fs::XattrFlags::empty;
    rustix::fs::lsetxattr(stage.lower("f"), names[0], b"low", flags()).unwrap();
    let union = stage.mount();
    let path = union.join("f");
    for name in names.into_iter().chain([&longest[..]]) {
        rustix::fs::lsetxattr(&path, name, name, flags()).unwrap();
        let mut value = vec![0; 999];
        let length = rustix::fs::lgetxattr(&path, name, &mut value[..]).unwrap();
        assert_eq!(&value[..length], name);
    }
    let create = rustix::fs::XattrFlags::CREATE;
    assert_eq!(rustix::fs::lsetxattr(&path, names[1], b"x", create), Err(Errno::EXIST));
    let replace = rustix::fs::XattrFlags::REPLACE;
    assert_eq!(rustix::fs::lsetxattr(&path, "user.absent", b"x", replace), Err(Errno::NODATA));
    let too_long = [longest, vec![b'n']].concat();
    assert_eq!(rustix::fs::lsetxattr(&path, &too_long[..], b"x", flags()), Err(Errno::RANGE));
    let mut small = [0; 2];
    assert_eq!(rustix::fs::lgetxattr(&path, names[0], &mut small[..]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::llistxattr(&path, &mut small[..]), Err(Errno::RANGE));
    stage.survives(union);
}
