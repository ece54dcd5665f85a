//! What a copy-up keeps: everything.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::support::calls::{self, read, write};
use crate::support::fuse_union::{Stage, mode};
use crate::support::whole_tree;

pub const TESTS: &[(&str, fn())] = &[
    ("holes_are_kept", holes),
    ("attributes_are_kept_by_every_cause", attributes),
    ("copied_up_is_what_the_upper_has", in_the_upper),
    ("failed_operations_copy_nothing_up", failures),
    ("readers_copy_nothing_up", readers),
];

const MIB: u64 = 1 << 20;

fn blocks(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks()
}

fn holes() {
    let stage = Stage::new(1);
    let layouts: [(&str, &[u64], u64); 4] = [
        ("empty", &[], 64 * MIB),
        ("ends", &[0, 63 * MIB], 64 * MIB),
        ("middle", &[MIB + 4096, 30 * MIB], 64 * MIB),
        ("odd", &[12_345, 20 * MIB + 1], 40 * MIB + 77),
    ];
    for (name, data, length) in layouts {
        let file = File::create(stage.lower(name)).unwrap();
        file.set_len(length).unwrap();
        for at in data {
            file.write_at(b"some data", *at).unwrap();
        }
    }
    let union = stage.mount();
    for (name, data, length) in layouts {
        let path = union.join(name);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.write_at(b"new", 5 * MIB).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let upper = stage.upper(name);
        assert_eq!(fs::metadata(&upper).unwrap().len(), length, "{name}");
        assert!(blocks(&upper) < 200, "{name}: {} blocks in the upper", blocks(&upper));
        let shown = File::open(&path).unwrap();
        for at in data {
            let mut bytes = [0; 9];
            shown.read_exact_at(&mut bytes, *at).unwrap();
            assert_eq!(&bytes, b"some data", "{name}");
        }
        union.forget();
        assert!(blocks(&path) < 200, "{name}: {} blocks", blocks(&path));
    }
    stage.survives(union);
}

/// One of each kind, with all that can be set on it, in a directory that has it too.
fn decorated(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let path = |name: &str| dir.join(name);
    write(&path("file"), "some content");
    write(&path("empty"), "");
    fs::create_dir(path("dir")).unwrap();
    symlink("some/target", path("link")).unwrap();
    calls::mknod(&path("pipe"), FileType::Fifo, 0o640, 0).unwrap();
    calls::mknod(&path("socket"), FileType::Socket, 0o604, 0).unwrap();
    let device = rustix::fs::makedev(0x123, 0x4567);
    calls::mknod(&path("block"), FileType::BlockDevice, 0o660, device).unwrap();
    for name in ["file", "empty", "dir", "link", "pipe", "socket", "block"] {
        let path = path(name);
        calls::chown(&path, 70_001, 3_000_000_001);
        match name {
            "link" => calls::set_xattr(&path, "trusted.on-link", b"link").unwrap(),
            "file" | "empty" | "dir" => {
                mode(&path, if name == "dir" { 0o3751 } else { 0o6751 });
                calls::set_xattr(&path, calls::ACCESS, &calls::acl(7, 99, 5, 4, 5, 1)).unwrap();
                calls::set_xattr(&path, "user.text", b"value").unwrap();
                calls::set_xattr(&path, "user.empty", b"").unwrap();
                calls::set_xattr(&path, "user.bytes", &[0, 255, 10, 0]).unwrap();
                calls::set_xattr(&path, "user.long", &[b'l'; 1500]).unwrap();
                calls::set_xattr(&path, "trusted.mine", b"trusted").unwrap();
                match name {
                    "dir" => {
                        let acl = calls::acl(7, 99, 6, 5, 7, 0);
                        calls::set_xattr(&path, calls::DEFAULT, &acl).unwrap();
                    }
                    _ => {
                        let capability = calls::capability();
                        calls::set_xattr(&path, "security.capability", &capability).unwrap();
                    }
                }
            }
            _ => {
                calls::set_xattr(&path, "trusted.on-special", b"special").unwrap();
            }
        }
        calls::set_mtime(&path, 1_234_567_890, 987_654_321);
    }
    calls::set_mtime(dir, 1_000_000_000, 1);
}

type Cause = (&'static str, fn(&Path));

/// What makes a copy-up, and changes nothing that [`whole_tree::line`] tells, or just what it undoes.
const CAUSES: &[Cause] = &[
    ("utimes", |path| calls::set_mtime(path, 1_234_567_890, 987_654_321)),
    ("chown", |path| {
        let line = calls::owner_of(path);
        // It clears privileges of files: what it does to them is looked at elsewhere.
        if !path.symlink_metadata().unwrap().is_file() {
            calls::chown(path, line.0, line.1);
        }
    }),
    ("chmod", |path| {
        if !path.symlink_metadata().unwrap().is_symlink() {
            mode(path, calls::mode_of(path));
        }
    }),
    ("xattr", |path| {
        calls::set_xattr(path, "trusted.new", b"x").unwrap();
        rustix::fs::lremovexattr(path, "trusted.new").unwrap();
    }),
    ("rename", |path| {
        let other = path.with_extension("renamed");
        fs::rename(path, &other).unwrap();
        fs::rename(&other, path).unwrap();
        calls::set_mtime(path.parent().unwrap(), 1_000_000_000, 1);
    }),
    ("link", |path| {
        if !path.symlink_metadata().unwrap().is_dir() {
            fs::hard_link(path, path.with_extension("linked")).unwrap();
            fs::remove_file(path.with_extension("linked")).unwrap();
            calls::set_mtime(path.parent().unwrap(), 1_000_000_000, 1);
        }
    }),
    ("child", |path| {
        if path.symlink_metadata().unwrap().is_dir() {
            write(&path.join("child"), "");
            fs::remove_file(path.join("child")).unwrap();
            calls::set_mtime(path, 1_234_567_890, 987_654_321);
        }
    }),
    ("open", |path| {
        if path.symlink_metadata().unwrap().is_file() {
            File::options().write(true).open(path).unwrap();
        }
    }),
];

fn attributes() {
    let stage = Stage::new(1);
    for (cause, _) in CAUSES {
        decorated(&stage.lower(cause).join("inner"));
    }
    let union = stage.mount();
    for (cause, act) in CAUSES {
        let inner = union.join(cause).join("inner");
        let before = whole_tree::lines(&inner);
        for entry in fs::read_dir(&inner).unwrap().map(Result::unwrap).collect::<Vec<_>>() {
            act(&entry.path());
        }
        whole_tree::assert_same(cause, &before, &whole_tree::lines(&inner));
        union.forget();
        whole_tree::assert_same(cause, &before, &whole_tree::lines(&inner));
    }
    stage.survives(union);
}

fn in_the_upper() {
    let stage = Stage::with_options(1, ",metacopy=off");
    decorated(&stage.lower("d"));
    let union = stage.mount();
    for name in ["file", "empty", "dir", "link", "pipe", "socket", "block"] {
        calls::set_mtime(&union.join("d").join(name), 5, 5);
        let (shown, kept) = (union.join("d").join(name), stage.upper("d").join(name));
        // The upper has marks of its own besides.
        let kept = whole_tree::line_with(&kept, |xattr| !xattr.starts_with("trusted.overlay."));
        assert_eq!(kept, whole_tree::line(&shown), "{name}");
    }
    stage.survives(union);
}

fn upper_paths(stage: &Stage) -> Vec<PathBuf> {
    let entries = walkdir::WalkDir::new(stage.upper("")).min_depth(1).sort_by_file_name();
    entries.into_iter().map(|entry| entry.unwrap().into_path()).collect()
}

fn failures() {
    let stage = Stage::new(1);
    fs::create_dir(stage.lower("d")).unwrap();
    write(&stage.lower("d/f"), "content");
    mode(&stage.lower("d/f"), 0o600);
    let union = stage.mount();
    let path = union.join("d/f");
    calls::as_user(1000, 1000, || {
        File::options().write(true).open(&path).unwrap_err();
        fs::remove_file(&path).unwrap_err();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .unwrap_err();
        fs::hard_link(&path, union.join("d/g")).unwrap_err();
        fs::create_dir(union.join("d/new")).unwrap_err();
    });
    fs::create_dir(&path).unwrap_err();
    fs::rename(union.join("d/absent"), &path).unwrap_err();
    rustix::fs::lremovexattr(&path, "user.absent").unwrap_err();
    let create = rustix::fs::XattrFlags::REPLACE;
    rustix::fs::lsetxattr(&path, "user.absent", b"x", create).unwrap_err();
    assert_eq!(upper_paths(&stage), [""; 0].map(PathBuf::from));
    stage.survives(union);
}

fn readers() {
    let stage = Stage::new(2);
    decorated(&stage.lower("d"));
    fs::create_dir(stage.lowers[1].join("d")).unwrap();
    write(&stage.lowers[1].join("d/below"), "below");
    let union = stage.mount();
    whole_tree::lines(union.path());
    assert_eq!(read(&union.join("d/below")), "below");
    let file = File::open(union.join("d/below")).unwrap();
    let mapping = calls::Mapping::new(&file, 5, false).unwrap();
    assert_eq!(mapping.read(0, 5), b"below");
    file.sync_all().unwrap();
    drop((mapping, file));
    assert_eq!(upper_paths(&stage), [""; 0].map(PathBuf::from));
    stage.survives(union);
    assert_eq!(upper_paths(&stage), [""; 0].map(PathBuf::from));
}
