//! A full disk in the middle of a copy-up: an error, no partial file, and a mount that works on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod suite;
    pub mod union_mount;
}

use std::ffi::CString;
use std::fs;
use std::hash::{DefaultHasher, Hasher as _};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use stratafs::LayerFormat;
use support::suite;
use support::union_mount::{Branches, Engine, UnionMount};

fn main() {
    support::union_mount::enter_own_mount_namespace();
    let engine = Engine::under_test();
    let trial = |name: &str, body: fn(&Engine, Writeback), writeback| {
        let hindrance = engine.hindrance();
        let engine = engine.clone();
        let with = if writeback == Writeback::On { "" } else { "_without_writeback" };
        suite::trial(format!("{name}{with}"), hindrance, move || body(&engine, writeback))
    };
    let mut trials = Vec::new();
    for writeback in [Writeback::On, Writeback::Off] {
        if writeback == Writeback::Off && engine != Engine::Own {
            continue;
        }
        trials.push(trial("a_copy_that_has_no_room_leaves_nothing", no_room, writeback));
        trials.push(trial("changes_without_data_are_whole_or_not_at_all", no_data, writeback));
        trials.push(trial("without_inodes_nothing_changes", no_inodes, writeback));
    }
    suite::run_one_by_one(trials);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Writeback {
    On,
    Off,
}

/// Lower layers with room, and an upper with little.
struct Stage {
    /// Unmounted before its directory goes.
    small: Small,
    lower: PathBuf,
    dir: tempfile::TempDir,
}

struct Small(PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

const BIG: usize = 8 << 20;
const SMALL: usize = 100_000;

fn content(len: usize) -> Vec<u8> {
    let mut bytes = (1..=251).collect::<Vec<u8>>().repeat(len / 251 + 1);
    bytes.truncate(len);
    bytes
}

impl Stage {
    fn new(options: &str, big: usize) -> Stage {
        let dir = suite::temp();
        let (small, lower) = (dir.path().join("small"), dir.path().join("lower"));
        fs::create_dir(&small).unwrap();
        let options = CString::new(options).unwrap();
        rustix::mount::mount("stratafs-test", &small, "tmpfs", MountFlags::empty(), &*options)
            .unwrap();
        for made in ["upper", "work"] {
            fs::create_dir(small.join(made)).unwrap();
        }
        fs::create_dir_all(lower.join("dir/below")).unwrap();
        for name in ["big", "dir/big"] {
            fs::write(lower.join(name), content(big)).unwrap();
        }
        for name in ["small", "dir/below/small"] {
            fs::write(lower.join(name), content(SMALL)).unwrap();
        }
        Stage { small: Small(small), lower, dir }
    }

    fn mount(&self, engine: &Engine, writeback: Writeback) -> UnionMount {
        let (upper, work) = (self.small.0.join("upper"), self.small.0.join("work"));
        let lowers = vec![self.lower.clone()];
        let format = LayerFormat::OverlayTrusted;
        let mut branches = Branches::new(lowers, Some((upper, work)), format);
        if writeback == Writeback::Off {
            branches.more.push_str(",writeback=off");
        }
        UnionMount::new(engine, &branches, &self.dir.path().join("mount"))
    }

    fn free(&self) -> u64 {
        let fs = rustix::fs::statvfs(&self.small.0).unwrap();
        fs.f_bfree * fs.f_frsize
    }

    /// No regular file that the test did not make: neither in the upper nor in the work directory.
    fn assert_no_partial_file(&self, what: &str) {
        for entry in walkdir::WalkDir::new(&self.small.0) {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            let path = entry.path().strip_prefix(&self.small.0).unwrap();
            let ours = path == Path::new("filler") || path.starts_with("upper/filler");
            // What the union notes for itself is its own affair, as long as it holds no data of files.
            let note = path.starts_with("work") && meta.blocks() * 512 <= 8192;
            // Its attributes may be there, as the kernel has set its time before the data were refused.
            let metadata_only = meta.is_file()
                && meta.blocks() * 512 <= 8192
                && has_xattr(entry.path(), "trusted.overlay.metacopy");
            assert!(
                !meta.is_file() || ours || note || metadata_only,
                "{what} leaves {path:?}, {} bytes",
                meta.len()
            );
        }
    }
}

fn has_xattr(path: &Path, key: &str) -> bool {
    rustix::fs::lgetxattr(path, key, &mut [0; 64][..]).is_ok()
}

/// A line for each path: all that a change that fails must leave as it was.
fn lines(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let meta = fs::symlink_metadata(entry.path()).unwrap();
        let path = entry.path().strip_prefix(root).unwrap();
        let mut line = format!("{path:?} {:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
        if meta.is_file() {
            let mut hasher = DefaultHasher::new();
            hasher.write(&fs::read(entry.path()).unwrap());
            let (hash, time) = (hasher.finish(), meta.modified().unwrap());
            line += &format!(" {} links, {} bytes {hash:x}, {time:?}", meta.nlink(), meta.len());
            let mut value = [0; 16];
            line += &format!(" {:?}", rustix::fs::lgetxattr(entry.path(), "user.x", &mut value));
        }
        lines.push(line);
    }
    lines
}

/// What the kernel has kept in memory goes: what is read afterwards is what the union has.
fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

fn errno(e: &io::Error) -> Errno {
    Errno::from_io_error(e).unwrap()
}

type Change = (&'static str, fn(&Path) -> io::Result<()>);

/// Writes, through to the union.
fn write_at(path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
    let file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all_at(bytes, offset)?;
    file.sync_all()
}

/// These need the whole of a file's data.
const DATA: &[Change] = &[
    ("a write at the start", |path| write_at(path, b"new", 0)),
    ("a write in the middle", |path| write_at(path, b"new", BIG as u64 / 2)),
    ("a write at the end", |path| write_at(path, b"new", BIG as u64)),
    ("a truncation by little", |path| {
        fs::OpenOptions::new().write(true).open(path)?.set_len(BIG as u64 - 1)
    }),
    ("an extension", |path| {
        let file = fs::OpenOptions::new().write(true).open(path)?;
        file.set_len(BIG as u64 + 1)?;
        file.sync_all()
    }),
];

fn no_room(engine: &Engine, writeback: Writeback) {
    let stage = Stage::new("size=16m", BIG);
    let mount = stage.mount(engine, writeback);
    let root = mount.path();
    let _watchdog = mount.watchdog();
    // By way of the mount, so that its room is given back through it, too.
    fs::write(root.join("filler"), content(12 << 20)).unwrap();
    fs::File::open(root.join("filler")).unwrap().sync_all().unwrap();
    for (what, change) in DATA {
        for name in ["big", "dir/big"] {
            let free = stage.free();
            let error = change(&root.join(name)).expect_err(what);
            assert_eq!(errno(&error), Errno::NOSPC, "{what} on {name}");
            stage.assert_no_partial_file(what);
            drop_caches();
            let read = fs::read(root.join(name)).unwrap();
            assert!(read == content(BIG), "{what} on {name}: it holds {} bytes", read.len());
            let now = stage.free();
            assert!(
                free.abs_diff(now) <= 256 << 10,
                "{what} on {name}: {free} bytes free, then {now}"
            );
        }
        // The mount works on, with what has room.
        fs::write(root.join("made"), what).unwrap();
        assert_eq!(fs::read_to_string(root.join("made")).unwrap(), *what);
        fs::remove_file(root.join("made")).unwrap();
    }
    write_at(&root.join("small"), b"new", 10).unwrap();
    let mut small = content(SMALL);
    small[10..13].copy_from_slice(b"new");
    assert!(fs::read(root.join("small")).unwrap() == small);
    fs::remove_file(root.join("filler")).unwrap();
    drop_caches();
    write_at(&root.join("dir/big"), b"new", 10).unwrap();
    let mut big = content(BIG);
    big[10..13].copy_from_slice(b"new");
    drop_caches();
    assert!(fs::read(root.join("dir/big")).unwrap() == big);
    drop(_watchdog);
    mount.unmount().unwrap();
    let mount = stage.mount(engine, writeback);
    assert!(fs::read(mount.path().join("dir/big")).unwrap() == big);
    assert!(fs::read(mount.path().join("big")).unwrap() == content(BIG));
    assert!(fs::read(mount.path().join("small")).unwrap() == small);
}

/// These need only a file's attributes; the data may come along, and then there may be no room.
const NO_DATA: &[Change] = &[
    ("chmod", |path| Ok(rustix::fs::chmod(path, Mode::from_raw_mode(0o600))?)),
    ("setxattr", |path| Ok(rustix::fs::setxattr(path, "user.x", b"y", XattrFlags::empty())?)),
    ("utimens", |path| fs::File::open(path)?.set_modified(std::time::SystemTime::UNIX_EPOCH)),
    ("link", |path| fs::hard_link(path, path.with_file_name("linked"))),
    ("rename", |path| fs::rename(path, path.with_file_name("renamed"))),
];

fn no_data(engine: &Engine, writeback: Writeback) {
    for (what, change) in NO_DATA {
        let stage = Stage::new("size=16m", BIG);
        fs::write(stage.small.0.join("filler"), content(12 << 20)).unwrap();
        let mount = stage.mount(engine, writeback);
        let _watchdog = mount.watchdog();
        let before = lines(mount.path());
        let free = stage.free();
        if let Err(error) = change(&mount.path().join("dir/big")) {
            assert_eq!(errno(&error), Errno::NOSPC, "{what}");
            stage.assert_no_partial_file(what);
            drop_caches();
            assert_same(&lines(mount.path()), &before, what);
            let now = stage.free();
            assert!(free.abs_diff(now) <= 256 << 10, "{what}: {free} bytes free, then {now}");
            fs::remove_file(stage.small.0.join("filler")).unwrap();
            change(&mount.path().join("dir/big"))
                .unwrap_or_else(|e| panic!("{what}, when there is room: {e}"));
        }
        let after = lines(mount.path());
        drop(_watchdog);
        mount.unmount().unwrap();
        let mount = stage.mount(engine, writeback);
        assert_same(&lines(mount.path()), &after, what);
    }
}

fn assert_same(seen: &[String], expected: &[String], what: &str) {
    assert!(seen == expected, "{what}: it is {seen:#?}, not {expected:#?}");
}

/// Everything that needs a new inode, or several.
const NAMES: &[Change] = &[
    ("mkdir", |root| fs::create_dir(root.join("dir/new"))),
    ("create", |root| fs::File::create_new(root.join("dir/new")).map(drop)),
    ("symlink", |root| std::os::unix::fs::symlink("x", root.join("dir/below/new"))),
    ("unlink", |root| fs::remove_file(root.join("dir/below/small"))),
    ("rename of a file", |root| fs::rename(root.join("dir/below/small"), root.join("dir/x"))),
    ("rename of a directory", |root| fs::rename(root.join("dir/below"), root.join("moved"))),
    ("link", |root| fs::hard_link(root.join("dir/below/small"), root.join("dir/x"))),
    ("a write", |root| write_at(&root.join("dir/below/small"), b"new", 0)),
    ("chmod of a directory", |root| {
        Ok(rustix::fs::chmod(root.join("dir/below"), Mode::from_raw_mode(0o711))?)
    }),
];

fn no_inodes(engine: &Engine, writeback: Writeback) {
    for (what, change) in NAMES {
        // Room for this many of the new inodes that it needs: at each there must be a way back.
        for spare in 0..4 {
            let stage = Stage::new("size=16m,nr_inodes=60", SMALL);
            let mount = stage.mount(engine, writeback);
            let _watchdog = mount.watchdog();
            let fillers = stage.small.0.join("fillers");
            fs::create_dir(&fillers).unwrap();
            let mut made = 0;
            while fs::File::create_new(fillers.join(made.to_string())).is_ok() {
                made += 1;
            }
            for i in 0..spare {
                fs::remove_file(fillers.join(i.to_string())).unwrap();
            }
            let make_room = || fs::remove_dir_all(&fillers).unwrap();
            let before = lines(mount.path());
            if let Err(error) = change(mount.path()) {
                assert_eq!(errno(&error), Errno::NOSPC, "{what}, {spare} inodes left");
                drop_caches();
                let seen = lines(mount.path());
                assert_same(&seen, &before, &format!("{what}, {spare} inodes left"));
                make_room();
                change(mount.path())
                    .unwrap_or_else(|e| panic!("{what}, when there is room: {e} ({spare})"));
            } else {
                make_room();
            }
            drop_caches();
            let after = lines(mount.path());
            assert!(after != before, "{what} does nothing");
            drop(_watchdog);
            mount.unmount().unwrap();
            let mount = stage.mount(engine, writeback);
            let seen = lines(mount.path());
            assert_same(&seen, &after, &format!("{what}, after a remount"));
        }
    }
}
