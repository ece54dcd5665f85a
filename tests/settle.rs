//! Settled layers, as the kernel's overlayfs shows them: without following redirects it shows what it
//! showed before, following them.
//!
//! The layers are written by the kernel, which renames directories as the union of this crate does, and by
//! that union. Most of it needs root; without it those tests are reported as ignored.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod disk;
    pub mod suite;
    pub mod whole_tree;
}

use std::ffi::{CString, OsStr};
use std::fs::{self, File, Permissions};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use stratafs::{
    ErrorKind, FuseLayer, FuseMount, FuseMountOptions, LayerFormat, Progress, Settled, UpperDir,
    ignore_progress, settle_upper,
};
use support::whole_tree::assert_same;
use support::{disk, suite, whole_tree};

const FORMATS: [LayerFormat; 2] = [LayerFormat::OverlayTrusted, LayerFormat::OverlayUser];
const FOLLOWING: &str = "redirect_dir=follow";
const NOT_FOLLOWING: &str = "redirect_dir=nofollow";
const RENAMING: &str = "redirect_dir=on";

fn main() {
    disk::enter_own_mount_namespace();
    if let Some(arguments) = suite::child_arguments() {
        return child(&arguments);
    }
    let root = suite::needs_root();
    let fuse = root
        .clone()
        .or_else(|| (!Path::new("/dev/fuse").exists()).then(|| "needs /dev/fuse".to_owned()));
    let mut trials = vec![
        suite::trial("all_kinds_of_files_are_whole", root.clone(), all_kinds),
        suite::trial("renames_in_renamed_directories_are_resolved", root.clone(), nested),
        suite::trial("opaque_directories_below_end_what_is_copied", root.clone(), opaque_below),
        suite::trial("random_changes_are_kept", root.clone(), random_changes),
        suite::trial("what_is_stopped_is_the_same_and_goes_on", root.clone(), stopped),
        suite::trial("what_is_killed_is_the_same_and_goes_on", root.clone(), killed),
        suite::trial("a_layer_without_redirects_stays_as_it_is", root.clone(), nothing_to_do),
        suite::trial("a_layer_that_the_kernel_has_mounted_is_busy", root, mounted_by_the_kernel),
        suite::trial("a_layer_that_is_mounted_over_fuse_is_busy", fuse.clone(), mounted_over_fuse),
        suite::trial("a_full_disk_loses_nothing", disk::Kind::Ext4.hindrance(), full_disk),
    ];
    for format in FORMATS {
        let name = format!("what_the_union_renamed_the_kernel_shows::{format}");
        trials.push(suite::trial(name, fuse.clone(), move || by_the_union(format)));
    }
    suite::run_one_by_one(trials);
}

/// Layers in a directory: lower ones, the topmost first, and an upper.
struct Stage {
    dir: PathBuf,
    lowers: Vec<PathBuf>,
    upper: PathBuf,
    work: PathBuf,
    format: LayerFormat,
    _tmp: Option<tempfile::TempDir>,
}

/// An overlay mount, which goes when it is dropped.
struct Overlay(PathBuf);

impl Drop for Overlay {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

impl Stage {
    fn new(lowers: usize) -> Stage {
        // Overlayfs cannot have its upper on every file system in memory.
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let stage = Stage::at(tmp.path(), lowers);
        fs::create_dir(tmp.path().join("mnt")).unwrap();
        for dir in stage.lowers.iter().chain([&stage.upper, &stage.work]) {
            fs::create_dir(dir).unwrap();
        }
        Stage { _tmp: Some(tmp), ..stage }
    }

    fn at(dir: &Path, lowers: usize) -> Stage {
        Stage {
            dir: dir.to_owned(),
            lowers: (0..lowers).rev().map(|i| dir.join(format!("lower-{i}"))).collect(),
            upper: dir.join("upper"),
            work: dir.join("work"),
            format: LayerFormat::OverlayTrusted,
            _tmp: None,
        }
    }

    /// Mounts the `upper` on the lower layers below it.
    fn overlay(&self, lowers: &[PathBuf], upper: &Path, redirects: &str) -> Overlay {
        let lowers: Vec<_> = lowers.iter().map(|dir| dir.to_str().unwrap()).collect();
        let mut options = format!(
            "lowerdir={},upperdir={},workdir={},metacopy=off,index=off,xino=off",
            lowers.join(":"),
            upper.display(),
            self.work.display(),
        );
        match self.format {
            LayerFormat::OverlayUser => options.push_str(",userxattr"),
            _ => options = format!("{options},{redirects}"),
        }
        let at = self.dir.join("mnt");
        let options = CString::new(options).unwrap();
        rustix::mount::mount("overlay", &at, "overlay", MountFlags::empty(), &*options).unwrap();
        Overlay(at)
    }

    /// Has the kernel write to the layer `name`, or read it.
    fn mounted<T>(&self, redirects: &str, see: impl FnOnce(&Path) -> T) -> T {
        let overlay = self.overlay(&self.lowers, &self.upper, redirects);
        see(&overlay.0)
    }

    fn shown(&self, redirects: &str) -> Vec<String> {
        self.mounted(redirects, whole_tree::lines)
    }

    /// Has the kernel write the lower layer `index`, counted from the top.
    fn write_lower(&self, index: usize, write: impl FnOnce(&Path)) {
        match self.lowers.get(index + 1..) {
            Some(below) if !below.is_empty() => {
                let overlay = self.overlay(below, &self.lowers[index], NOT_FOLLOWING);
                write(&overlay.0);
            }
            _ => write(&self.lowers[index]),
        }
    }

    fn settle(
        &self,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> stratafs::Result<Settled> {
        let format = self.format;
        let lowers: Vec<_> =
            self.lowers.iter().map(|dir| FuseLayer { dir: dir.clone(), format }).collect();
        let upper = UpperDir { dir: self.upper.clone(), work: self.work.clone() };
        settle_upper(&lowers, &upper, format, progress)
    }

    /// The directories of the upper that have redirects.
    fn redirects(&self) -> Vec<PathBuf> {
        let entries = walkdir::WalkDir::new(&self.upper).into_iter().map(Result::unwrap);
        let has = |path: &Path| {
            whole_tree::xattrs(path).iter().any(|xattr| xattr.contains(".overlay.redirect="))
        };
        entries.map(|entry| entry.path().to_owned()).filter(|path| has(path)).collect()
    }

    /// Settles what has this many renamed directories, none of them in another.
    #[track_caller]
    fn settles(&self, directories: u64) -> Settled {
        assert!(self.redirects().len() as u64 >= directories, "{:?}", self.redirects());
        let before = self.shown(FOLLOWING);
        let settled = self.settle(&mut ignore_progress).unwrap();
        assert_same("settled", &before, &self.shown(NOT_FOLLOWING));
        self.is_clean();
        assert_eq!(settled.directories, directories);
        settled
    }

    /// Nothing of settling is left but its result.
    #[track_caller]
    fn is_clean(&self) {
        assert_eq!(self.redirects(), Vec::<PathBuf>::new());
        let own = self.work.join("stratafs");
        for dir in ["temp", "links", "state"] {
            let left: Vec<_> = fs::read_dir(own.join(dir)).unwrap().map(Result::unwrap).collect();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
    }
}

fn write(path: &Path, text: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn mv(root: &Path, from: &str, to: &str) {
    fs::rename(root.join(from), root.join(to)).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn node(path: &Path, kind: FileType, device: u64) {
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device).unwrap();
}

fn all_kinds() {
    let stage = Stage::new(1);
    stage.write_lower(0, |root| {
        let d = root.join("d");
        write(&d.join("sub/deep/file"), "deep");
        write(&d.join("big"), vec![7; 300_000]);
        symlink("nowhere/at/all", d.join("link")).unwrap();
        node(&d.join("fifo"), FileType::Fifo, 0);
        node(&d.join("socket"), FileType::Socket, 0);
        node(&d.join("null"), FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        node(&d.join("disk"), FileType::BlockDevice, rustix::fs::makedev(7, 99));
        write(&d.join(OsStr::from_bytes(b"\xff\n name")), "bytes");
        write(&d.join("n".repeat(255)), "a long name");
        let holes = File::create(d.join("holes")).unwrap();
        holes.write_all_at(b"end", 64 << 20).unwrap();
        write(&d.join("set"), "setuid, with capabilities");
        std::os::unix::fs::chown(d.join("set"), Some(70_000), Some(4_000_000_000)).unwrap();
        fs::set_permissions(d.join("set"), Permissions::from_mode(0o6755)).unwrap();
        fs::set_permissions(d.join("sub"), Permissions::from_mode(0o2551)).unwrap();
        set_xattr(&d.join("big"), "user.a", b"1");
        set_xattr(&d.join("sub"), "trusted.b", b"2");
        set_xattr(&d.join("link"), "trusted.c", b"3");
        let capabilities = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        set_xattr(&d.join("big"), "security.capability", &capabilities);
        // user::rwx, user:1000:r-x, group::r-x, mask::r-x, other::---
        let entry = |tag: u16, rights: u16, id: u32| {
            [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let none = u32::MAX;
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, rights, id) in
            [(1, 7, none), (2, 5, 1000), (4, 5, none), (16, 5, none), (32, 0, none)]
        {
            acl.extend(entry(tag, rights, id));
        }
        set_xattr(&d.join("sub/deep"), "system.posix_acl_default", &acl);
        set_xattr(&d.join("holes"), "system.posix_acl_access", &acl);
        for (path, time) in [
            ("big", UNIX_EPOCH - Duration::new(86_400 * 365, 5)),
            ("holes", UNIX_EPOCH + Duration::new(1 << 32, 999_999_999)),
            ("sub/deep", UNIX_EPOCH + Duration::new(7, 1)),
            ("sub", UNIX_EPOCH + Duration::new(8, 2)),
            ("", UNIX_EPOCH + Duration::new(9, 3)),
        ] {
            File::open(d.join(path)).unwrap().set_modified(time).unwrap();
        }
        fs::hard_link(d.join("big"), d.join("sub/deep/bigger")).unwrap();
        fs::hard_link(d.join("fifo"), d.join("other fifo")).unwrap();
        let mut deep = d.join("way");
        for _ in 0..60 {
            deep.push("down");
        }
        write(&deep.join("file"), "at the bottom");
    });
    stage.mounted(RENAMING, |root| {
        mv(root, "d", "e");
        write(&root.join("e/new"), "new");
        fs::hard_link(root.join("e/new"), root.join("outside")).unwrap();
    });
    let settled = stage.settles(1);
    let meta = |path: &str| fs::metadata(stage.upper.join("e").join(path)).unwrap();
    assert!(meta("holes").blocks() < 1024, "holes are holes");
    assert_eq!((meta("big").ino(), meta("big").nlink()), (meta("sub/deep/bigger").ino(), 2));
    assert_eq!(meta("fifo").ino(), meta("other fifo").ino());
    let outside = fs::metadata(stage.upper.join("outside")).unwrap();
    assert_eq!((outside.ino(), outside.nlink()), (meta("new").ino(), 2));
    // Each inode once: files, the directories and what is special.
    assert!(settled.copied > 70 && settled.bytes > 64 << 20, "{settled:?}");
}

/// Renamed directories in renamed directories, in which files are gone, of two layers.
fn nested_stage() -> Stage {
    let stage = Stage::new(2);
    stage.write_lower(1, |root| {
        for path in ["a/low", "a/gone", "a/sub/x", "a/sub/gone", "b/in/y", "b/in/gone", "c/z"] {
            write(&root.join(path), format!("1 {path}"));
        }
    });
    stage.write_lower(0, |root| {
        for path in ["a/low", "a/high", "a/sub/w", "b/in/y", "b/high"] {
            write(&root.join(path), format!("0 {path}"));
        }
        fs::remove_file(root.join("a/sub/gone")).unwrap();
    });
    stage.mounted(RENAMING, |root| {
        // In its own directory: the kernel writes a name, not a path.
        mv(root, "a/sub", "a/moved");
        fs::remove_file(root.join("a/moved/x")).unwrap();
        mv(root, "b/in", "a/moved/from-b");
        fs::remove_file(root.join("a/moved/from-b/gone")).unwrap();
        fs::remove_file(root.join("a/gone")).unwrap();
        write(&root.join("a/moved/new"), "new");
        mv(root, "a", "second");
        mv(root, "second", "c/third");
        // The old name again, with something else below it.
        write(&root.join("a/sub/other"), "other");
        mv(root, "c/third/moved/from-b", "b/in");
        mv(root, "c", "b/c");
    });
    stage
}

fn nested() {
    let stage = nested_stage();
    assert!(stage.redirects().len() >= 4, "{:?}", stage.redirects());
    stage.settles(2);
    // It is the difference: what hides nothing is not marked.
    let marks = whole_tree::xattrs(&stage.upper.join("b/c"));
    assert!(!marks.iter().any(|mark| mark.contains("opaque")), "{marks:?}");
    let marks = whole_tree::xattrs(&stage.upper.join("b/in"));
    assert!(marks.iter().any(|mark| mark == "trusted.overlay.opaque=y"), "{marks:?}");
}

fn opaque_below() {
    let stage = Stage::new(3);
    stage.write_lower(2, |root| {
        for path in ["d/hidden", "d/sub/hidden", "e/hidden/x", "e/seen", "f/x"] {
            write(&root.join(path), path);
        }
    });
    stage.write_lower(1, |root| {
        fs::remove_dir_all(root.join("d")).unwrap();
        write(&root.join("d/sub/shown"), "shown");
        fs::remove_dir_all(root.join("e/hidden")).unwrap();
        fs::remove_dir_all(root.join("f")).unwrap();
        write(&root.join("f"), "a file");
    });
    stage.write_lower(0, |root| {
        write(&root.join("d/top"), "top");
        write(&root.join("e/hidden"), "a file now");
        fs::remove_file(root.join("f")).unwrap();
        write(&root.join("f/again"), "again");
    });
    stage.mounted(RENAMING, |root| {
        mv(root, "d", "d2");
        mv(root, "e", "e2");
        mv(root, "f", "d");
    });
    stage.settles(3);
    let names = |path: &str| {
        let mut names: Vec<_> = fs::read_dir(stage.upper.join(path))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!((names("d"), names("d2/sub")), (vec!["again".into()], vec!["shown".into()]));
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % n as u64).unwrap()
    }
}

/// Does one thing or another below `root`; what is refused is not done.
fn change(rng: &mut Rng, root: &Path) {
    let (mut dirs, mut files) = (Vec::new(), Vec::new());
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        if entry.file_type().is_dir() { &mut dirs } else { &mut files }.push(entry.into_path());
    }
    let dir = dirs[rng.below(dirs.len())].clone();
    let new = dir.join(["a", "b", "c", "d"][rng.below(4)]);
    let from = dirs[rng.below(dirs.len())].clone();
    let file = (!files.is_empty()).then(|| files[rng.below(files.len())].clone());
    let text = rng.0.to_string();
    let result = match (rng.below(12), file) {
        (0 | 1, _) => fs::create_dir(&new),
        (2 | 3, _) => fs::write(&new, text),
        (4..=6, _) => fs::rename(&from, &new),
        (7, Some(file)) => fs::rename(file, &new),
        (8, Some(file)) => fs::remove_file(file),
        (9, Some(file)) => fs::write(file, text),
        (10, Some(file)) => fs::hard_link(file, &new),
        (11, _) if from != root && rng.below(3) == 0 => fs::remove_dir_all(from),
        _ => fs::set_permissions(from, Permissions::from_mode(0o700 + (rng.0 % 64) as u32)),
    };
    drop(result);
}

fn random_changes() {
    let (mut renamed, mut copied) = (0, 0);
    for seed in 1..=40_u64 {
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let stage = Stage::new(3);
        for dir in ["a", "b/a", "b/c", "c/a/b", "d/d/d"] {
            for file in ["e", "f", "g"] {
                let path = stage.lowers[2].join(dir).join(file);
                write(&path, format!("{dir}/{file}"));
            }
        }
        for index in [2, 1, 0] {
            stage.write_lower(index, |root| (0..12).for_each(|_| change(&mut rng, root)));
        }
        stage.mounted(RENAMING, |root| (0..25).for_each(|_| change(&mut rng, root)));
        let before = stage.shown(FOLLOWING);
        let settled = stage.settle(&mut ignore_progress).unwrap();
        assert_same(&format!("seed {seed}"), &before, &stage.shown(NOT_FOLLOWING));
        stage.is_clean();
        renamed += settled.directories;
        copied += settled.copied;
    }
    assert!(renamed > 40 && copied > 100, "{renamed} directories, {copied} entries");
}

fn stopped() {
    let stage = nested_stage();
    let before = stage.shown(FOLLOWING);
    let mut points = 0;
    loop {
        let mut left = points;
        let ended = stage.settle(&mut |_| {
            left -= 1;
            if left < 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_same(&format!("stopped at {points}"), &before, &stage.shown(FOLLOWING));
        match ended {
            Ok(_) => break,
            Err(e) => assert_eq!(e.kind(), ErrorKind::Cancelled, "{e}"),
        }
        points += 1;
    }
    assert!(points > 10, "{points}");
    assert_same("settled", &before, &stage.shown(NOT_FOLLOWING));
    stage.is_clean();
}

fn killed() {
    for k in 0.. {
        let stage = nested_stage();
        let before = stage.shown(FOLLOWING);
        let arguments = [stage.dir.to_str().unwrap(), &k.to_string()];
        let mut child = suite::child("settle", &arguments);
        let killed = suite::was_killed(child.wait().unwrap());
        assert_same(&format!("killed at {k}"), &before, &stage.shown(FOLLOWING));
        stage.settle(&mut ignore_progress).unwrap();
        assert_same(&format!("settled after {k}"), &before, &stage.shown(NOT_FOLLOWING));
        stage.is_clean();
        if !killed {
            assert!(k > 20, "{k}");
            return;
        }
    }
}

fn child(arguments: &[String]) {
    let stage = Stage::at(Path::new(&arguments[1]), 2);
    let last: usize = arguments[2].parse().unwrap();
    let mut reports = 0;
    let mut die_at_last = |_| {
        if reports == last {
            suite::kill_myself();
        }
        reports += 1;
        ControlFlow::Continue(())
    };
    stage.settle(&mut die_at_last).unwrap();
}

fn nothing_to_do() {
    let stage = Stage::new(1);
    stage.write_lower(0, |root| write(&root.join("d/file"), "x"));
    stage.mounted(RENAMING, |root| {
        write(&root.join("d/new"), "new");
        fs::remove_file(root.join("d/file")).unwrap();
        write(&root.join("e/file"), "e");
        mv(root, "e", "f");
    });
    let before = whole_tree::lines(&stage.upper);
    assert_eq!(stage.settle(&mut ignore_progress).unwrap(), Settled::default());
    assert_same("untouched", &before, &whole_tree::lines(&stage.upper));
}

fn mounted_by_the_kernel() {
    let stage = nested_stage();
    stage.mounted(FOLLOWING, |_| {
        suite::fails(stage.settle(&mut ignore_progress), ErrorKind::Busy, "upper");
    });
    stage.settles(2);
}

fn fuse_options(stage: &Stage) -> FuseMountOptions {
    let format = stage.format;
    let mut options = FuseMountOptions::new(format);
    options.lowers =
        stage.lowers.iter().map(|dir| FuseLayer { dir: dir.clone(), format }).collect();
    options.upper = Some(UpperDir { dir: stage.upper.clone(), work: stage.work.clone() });
    options.allow_other = true;
    options
}

fn mounted_over_fuse() {
    let stage = nested_stage();
    let mut mount = FuseMount::new(&stage.dir.join("mnt"), &fuse_options(&stage)).unwrap();
    suite::fails(stage.settle(&mut ignore_progress), ErrorKind::Busy, "upper");
    mount.unmount(false).unwrap();
    drop(mount);
    stage.settles(2);
}

fn by_the_union(format: LayerFormat) {
    let mut stage = Stage::new(2);
    stage.format = format;
    stage.write_lower(1, |root| {
        for path in ["a/low", "a/gone", "a/sub/x", "a/sub/gone", "b/in/y", "b/in/gone", "c/z"] {
            write(&root.join(path), format!("1 {path}"));
        }
        fs::hard_link(root.join("a/low"), root.join("a/sub/linked")).unwrap();
    });
    stage.write_lower(0, |root| {
        write(&root.join("a/high"), "0 a/high");
        fs::remove_file(root.join("a/sub/gone")).unwrap();
    });
    let mut mount = FuseMount::new(&stage.dir.join("mnt"), &fuse_options(&stage)).unwrap();
    let root = mount.target().to_owned();
    mv(&root, "a/sub", "a/moved");
    fs::remove_file(root.join("a/moved/x")).unwrap();
    mv(&root, "b/in", "a/moved/from-b");
    fs::remove_file(root.join("a/moved/from-b/gone")).unwrap();
    mv(&root, "a", "c/a");
    write(&root.join("a/again"), "again");
    let before = whole_tree::lines(&root);
    mount.unmount(false).unwrap();
    drop(mount);
    assert!(stage.work.join("stratafs/state/redirected").exists());
    let settled = stage.settle(&mut ignore_progress).unwrap();
    assert_eq!(settled.directories, 1);
    assert_same("settled", &before, &stage.shown(NOT_FOLLOWING));
    stage.is_clean();
}

fn full_disk() {
    let stage = Stage::new(1);
    stage.write_lower(0, |root| {
        for i in 0..20 {
            write(&root.join(format!("d/sub-{}/big-{i}", i % 3)), vec![i; 2 << 20]);
        }
    });
    // The upper is on a disk of its own.
    let image = stage.dir.join("image");
    disk::make_image(disk::Kind::Ext4, &image);
    let small = disk::Mounted::image(disk::Kind::Ext4, &image, &stage.dir.join("small"));
    let (upper, work) = (small.path().join("upper"), small.path().join("work"));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    let stage = Stage { upper, work, ..stage };
    stage.mounted(RENAMING, |root| {
        mv(root, "d", "e");
        fs::remove_file(root.join("e/sub-0/big-0")).unwrap();
    });
    let before = stage.shown(FOLLOWING);
    let filler = small.path().join("filler");
    // Room for some of it.
    fs::write(small.path().join("room"), vec![1; 5 << 20]).unwrap();
    disk::fill(&filler);
    fs::remove_file(small.path().join("room")).unwrap();
    rustix::fs::syncfs(File::open(small.path()).unwrap()).unwrap();
    for _ in 0..2 {
        suite::fails(stage.settle(&mut ignore_progress), ErrorKind::NoSpace, "upper");
        let temp = stage.work.join("stratafs/temp");
        assert_eq!(fs::read_dir(temp).unwrap().count(), 0, "nothing half copied");
        assert_same("on a full disk", &before, &stage.shown(FOLLOWING));
    }
    fs::remove_file(filler).unwrap();
    rustix::fs::syncfs(File::open(small.path()).unwrap()).unwrap();
    stage.settles(1);
    // Before the directory that it is in.
    drop(small);
}
