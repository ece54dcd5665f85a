//! What a peer gets wrong with modes, owners and times.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use rustix::fs::{FileType, OFlags};

use crate::support::calls::{self, names, write};
use crate::support::fuse_union::{Stage, mode};

pub const TESTS: &[(&str, fn())] = &[
    ("the_umask_of_the_caller_holds", umask),
    ("copied_up_directories_keep_their_modes", directory_modes),
    ("times_before_1970_in_lowers", early_times),
    ("writes_of_others_clear_setuid", setuid_cleared),
    ("setgid_directories_give_their_group", setgid_directories),
    ("modes_of_devices_and_pipes", special_modes),
    ("negative_times_are_set", set_early_times),
    ("capabilities_outlast_what_was_written_before_them", late_writes),
];

fn umask() {
    let stage = Stage::new(1);
    for dir in ["plain", "default"] {
        fs::create_dir(stage.lower(dir)).unwrap();
    }
    let acl = calls::acl(7, 1234, 7, 7, 7, 7);
    calls::set_xattr(&stage.lower("default"), calls::DEFAULT, &acl).unwrap();
    let union = stage.mount();
    for (mask, file, dir) in [(0o077, 0o600, 0o700), (0, 0o666, 0o777), (0o137, 0o640, 0o640)] {
        let name = |what: &str| union.join(format!("plain/{what}{mask:o}"));
        calls::with_umask(mask, || {
            calls::open(&name("file"), OFlags::CREATE | OFlags::WRONLY).unwrap();
            calls::mkdir(&name("dir"), 0o777).unwrap();
            calls::mknod(&name("pipe"), FileType::Fifo, 0o666, 0).unwrap();
            symlink("target", name("symlink")).unwrap();
        });
        assert_eq!(calls::mode_of(&name("file")), file, "umask {mask:o}");
        assert_eq!(calls::mode_of(&name("dir")), dir, "umask {mask:o}");
        assert_eq!(calls::mode_of(&name("pipe")), file, "umask {mask:o}");
        assert_eq!(calls::mode_of(&name("symlink")), 0o777, "umask {mask:o}");
    }
    // A default ACL takes the place of the umask.
    calls::with_umask(0o077, || {
        calls::open(&union.join("default/file"), OFlags::CREATE | OFlags::WRONLY).unwrap();
        calls::mkdir(&union.join("default/dir"), 0o750).unwrap();
        calls::mknod(&union.join("default/pipe"), FileType::Fifo, 0o640, 0).unwrap();
    });
    assert_eq!(calls::mode_of(&union.join("default/file")), 0o666);
    assert_eq!(calls::mode_of(&union.join("default/dir")), 0o750);
    assert_eq!(calls::mode_of(&union.join("default/pipe")), 0o640);
    let access = |name: &str| calls::get_xattr(&union.join(name), calls::ACCESS).unwrap();
    assert_eq!(access("default/file"), calls::acl(6, 1234, 7, 7, 6, 6));
    assert_eq!(access("default/dir"), calls::acl(7, 1234, 7, 7, 5, 0));
    assert_eq!(access("default/pipe"), calls::acl(6, 1234, 7, 7, 4, 0));
    let inherited = calls::get_xattr(&union.join("default/dir"), calls::DEFAULT).unwrap();
    assert_eq!(inherited, acl);
    stage.survives(union);
}

fn directory_modes() {
    let stage = Stage::new(2);
    let modes = [("root", 0o700), ("tmp", 0o1777), ("team", 0o2770), ("odd", 0o4711), ("no", 0)];
    for (n, (name, bits)) in modes.iter().enumerate() {
        let deep = stage.lower(name).join("deep");
        fs::create_dir_all(&deep).unwrap();
        write(&deep.join("f"), "f");
        for dir in [&deep, &stage.lower(name)] {
            calls::chown(dir, 1000 + u32::try_from(n).unwrap(), 2000);
            mode(dir, *bits);
            calls::set_xattr(dir, "user.k", b"v").unwrap();
            calls::set_mtime(dir, 1_000_000_007, 123_456_789);
        }
    }
    let union = stage.mount();
    for (name, bits) in modes {
        let path = union.join(name);
        // This changes nothing of the directories above the file.
        mode(&path.join("deep/f"), 0o600);
        for dir in [&path, &path.join("deep")] {
            assert_eq!(calls::mtime(dir), (1_000_000_007, 123_456_789), "{name}");
            assert_eq!(calls::mode_of(dir), bits, "{name}");
            assert_eq!(calls::get_xattr(dir, "user.k").unwrap(), b"v", "{name}");
        }
        write(&path.join("new"), "new");
        assert_eq!(calls::mode_of(&path), bits, "{name}");
        assert_eq!(calls::mode_of(&stage.upper(name)), bits, "{name} in the upper");
    }
    stage.survives(union);
}

fn early_times() {
    let stage = Stage::new(1);
    let times = [(-1, 999_999_999), (-1, 0), (-1_500_000_000, 5), (-2_000_000_000, 0), (0, 0)];
    for (n, (seconds, nanoseconds)) in times.into_iter().enumerate() {
        let [file, dir, link] = ["file", "dir", "link"].map(|s| stage.lower(format!("{s}{n}")));
        write(&file, "f");
        fs::create_dir(&dir).unwrap();
        symlink("f", &link).unwrap();
        for path in [&file, &dir, &link] {
            calls::set_mtime(path, seconds, nanoseconds);
        }
    }
    let union = stage.mount();
    assert_eq!(names(union.path()).len(), 15);
    for (n, time) in times.into_iter().enumerate() {
        for kind in ["file", "dir", "link"] {
            for _ in 0..2 {
                assert_eq!(calls::mtime(&union.join(format!("{kind}{n}"))), time);
                union.forget();
            }
        }
        // Copied up, they are the same.
        mode(&union.join(format!("file{n}")), 0o600);
        mode(&union.join(format!("dir{n}")), 0o700);
        assert_eq!(calls::mtime(&union.join(format!("file{n}"))), time);
        assert_eq!(calls::mtime(&union.join(format!("dir{n}"))), time);
    }
    stage.survives(union);
}

fn setuid_cleared() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), "lower");
    mode(&stage.lower("low"), 0o6777);
    let union = stage.mount();
    write(&union.join("up"), "upper");
    mode(&union.join("up"), 0o6777);
    for name in ["low", "up"] {
        let path = union.join(name);
        assert_eq!(calls::mode_of(&path), 0o6777);
        calls::as_user(1000, 1000, || {
            let file = File::options().write(true).open(&path).unwrap();
            file.write_at(b"X", 0).unwrap();
        });
        assert_eq!(calls::mode_of(&path), 0o777, "{name}");
    }
    stage.survives(union);
    assert_eq!(calls::mode_of(&stage.lower("low")), 0o6777);
    assert_eq!(calls::mode_of(&stage.upper("low")), 0o777);
}

fn setgid_directories() {
    let stage = Stage::new(1);
    let set = |dir: &Path| {
        fs::create_dir(dir).unwrap();
        calls::chown(dir, 1000, 5000);
        mode(dir, 0o2777);
    };
    set(&stage.lower("low"));
    let union = stage.mount();
    set(&union.join("up"));
    for name in ["low", "up"] {
        let dir = union.join(name);
        calls::with_umask(0o022, || make_in_setgid(&dir, "root"));
        calls::as_user(1000, 1000, || make_in_setgid(&dir, "user"));
        for who in ["root", "user"] {
            for what in ["file", "pipe", "dir", "dir/dir", "symlink"] {
                let (base, rest) = what.split_once('/').unwrap_or((what, ""));
                let path = dir.join(format!("{who}-{base}")).join(rest);
                let path = if rest.is_empty() { dir.join(format!("{who}-{base}")) } else { path };
                assert_eq!(calls::owner_of(&path).1, 5000, "{}", path.display());
                if base == "dir" {
                    assert_eq!(calls::mode_of(&path), 0o2755, "{}", path.display());
                }
            }
        }
        // A new file of a group that its maker is not in loses the bit that would give him it.
        calls::as_user(1001, 1001, || {
            let flags = OFlags::CREATE | OFlags::WRONLY;
            rustix::fs::open(dir.join("sgid"), flags, rustix::fs::Mode::from(0o2770)).unwrap();
        });
        assert_eq!(calls::mode_of(&dir.join("sgid")), 0o750);
    }
    stage.survives(union);
}

fn make_in_setgid(dir: &Path, who: &str) {
    let path = |what: &str| dir.join(format!("{who}-{what}"));
    calls::open(&path("file"), OFlags::CREATE | OFlags::WRONLY).unwrap();
    calls::mknod(&path("pipe"), FileType::Fifo, 0o644, 0).unwrap();
    calls::mkdir(&path("dir"), 0o777).unwrap();
    calls::mkdir(&path("dir/dir"), 0o777).unwrap();
    symlink("x", path("symlink")).unwrap();
}

fn special_modes() {
    let stage = Stage::new(1);
    let union = stage.mount();
    let kinds = [
        ("pipe", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
        ("char", FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
        ("block", FileType::BlockDevice, rustix::fs::makedev(7, 200)),
        ("file", FileType::RegularFile, 0),
    ];
    for (name, kind, device) in kinds {
        for bits in [0o600, 0o000, 0o644, 0o222] {
            let path = union.join(format!("{name}{bits:o}"));
            calls::with_umask(0, || calls::mknod(&path, kind, bits, device)).unwrap();
            assert_eq!(calls::mode_of(&path), bits, "{name}");
            let stat = rustix::fs::lstat(&path).unwrap();
            assert_eq!(FileType::from_raw_mode(stat.st_mode), kind);
            assert_eq!(stat.st_rdev, device, "{name}");
        }
    }
    let mut null = File::options().write(true).open(union.join("char644")).unwrap();
    null.write_all(b"gone").unwrap();
    drop(null);
    stage.survives(union);
}

fn set_early_times() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), "low");
    fs::create_dir(stage.lower("lowdir")).unwrap();
    symlink("x", stage.lower("lowlink")).unwrap();
    let union = stage.mount();
    write(&union.join("up"), "up");
    for time in [(-1, 0), (-1, 999_999_999), (-1_234_567_890, 987_654_321)] {
        for name in ["low", "lowdir", "lowlink", "up"] {
            calls::set_mtime(&union.join(name), time.0, time.1);
            assert_eq!(calls::mtime(&union.join(name)), time, "{name}");
        }
        union.forget();
        for name in ["low", "lowdir", "lowlink", "up"] {
            assert_eq!(calls::mtime(&union.join(name)), time, "{name}");
            assert_eq!(calls::mtime(&stage.upper(name)), time, "{name} in the upper");
        }
    }
    stage.survives(union);
}

/// The kernel may hand over what was written after the capabilities that were given later.
fn late_writes() {
    const KEY: &str = "security.capability";
    let stage = Stage::new(1);
    write(&stage.lower("below"), "below");
    let union = stage.mount();
    for name in ["new", "below"] {
        let path = union.join(name);
        let mut file = File::options().append(true).create(true).open(&path).unwrap();
        file.write_all(&[b'x'; 10_000]).unwrap();
        calls::set_xattr(&path, KEY, &calls::capability()).unwrap();
        file.sync_all().unwrap();
        assert_eq!(calls::get_xattr(&path, KEY).unwrap(), calls::capability(), "{name}");
        // What is written now takes them away.
        file.write_all(b"more").unwrap();
        assert!(!calls::has_xattr(&path, KEY), "{name}");
        file.sync_all().unwrap();
        assert!(!calls::has_xattr(&path, KEY), "{name}");
        calls::set_xattr(&path, KEY, &calls::capability()).unwrap();
    }
    stage.survives(union);
}
