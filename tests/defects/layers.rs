//! What a peer gets wrong with layers: what hides what, what is left in the upper and the work directory,
//! and what happens when there is no room.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::RenameFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::support::calls::{self, names, read, write};
use crate::support::fuse_union::{Stage, mode};

pub const TESTS: &[(&str, fn())] = &[
    ("opaque_middle_directories_hide_grandchildren", opaque_middle),
    ("leftovers_in_the_work_directory_do_no_harm", leftovers),
    ("removed_directories_leave_nothing_behind", rmdir_leaves_nothing),
    ("a_copy_up_without_room_leaves_nothing_behind", no_room),
    ("temporary_files_leave_no_whiteouts", temporary_files),
    ("xattrs_that_have_no_room_fail_the_copy_up", xattrs_without_room),
    ("changes_in_a_layer_show_without_timeouts", changed_layers),
    ("a_stacked_lower_costs_the_others_nothing", stacked_lower),
];

fn opaque_middle() {
    let stage = Stage::new(3);
    let [_, middle, bottom] = stage.lowers.as_slice() else { unreachable!() };
    for dir in ["a/b/c", "whole"] {
        fs::create_dir_all(bottom.join(dir)).unwrap();
        write(&bottom.join(dir).join("hidden"), "hidden");
    }
    fs::create_dir_all(middle.join("a/b/c")).unwrap();
    calls::set_xattr(&middle.join("a"), "trusted.overlay.opaque", b"y").unwrap();
    fs::create_dir_all(stage.lower("a/b")).unwrap();
    write(&stage.lower("a/b/top"), "top");
    // Nor where the opaque directory has nothing of the name.
    for lower in [&stage.lowers[0], bottom] {
        fs::create_dir_all(lower.join("a/only/deep")).unwrap();
    }
    write(&bottom.join("a/only/hidden"), "hidden");
    write(&bottom.join("a/only/deep/hidden"), "hidden");
    let union = stage.mount();
    assert_eq!(names(&union.join("a/only")), ["deep"]);
    assert_eq!(names(&union.join("a/only/deep")), [""; 0]);
    assert!(!union.join("a/only/deep/hidden").exists());
    assert!(!union.join("a/b/c/hidden").exists());
    assert_eq!(names(&union.join("a/b/c")), [""; 0]);
    assert_eq!(names(&union.join("a/b")), ["c", "top"]);
    assert_eq!(names(&union.join("whole")), ["hidden"]);
    write(&union.join("a/b/c/new"), "new");
    stage.survives(union);
    let union = stage.mount();
    assert_eq!(names(&union.join("a/b/c")), ["new"]);
    union.unmount();
    // The same where it is the topmost, and nothing can be written.
    let mut stage = stage;
    stage.upper = None;
    stage.lowers.remove(0);
    let union = stage.mount();
    assert_eq!(names(&union.join("a/b/c")), [""; 0]);
    assert!(!union.join("a/b/c/hidden").exists());
    stage.survives(union);
}

/// All directories below a work directory, but what keeps state on purpose.
fn work_directories(work: &Path) -> Vec<PathBuf> {
    walkdir::WalkDir::new(work)
        .into_iter()
        .filter_entry(|entry| entry.file_name() != "state")
        .map(Result::unwrap)
        .filter(|entry| entry.file_type().is_dir())
        .map(walkdir::DirEntry::into_path)
        .collect()
}

fn leftovers() {
    let stage = Stage::new(1);
    for n in 0..12 {
        write(&stage.lower(format!("f{n}")), "short");
    }
    fs::create_dir_all(stage.lower("d/e")).unwrap();
    write(&stage.lower("d/e/f"), "short");
    let union = stage.mount();
    write(&union.join("f0"), "up");
    fs::create_dir(union.join("first")).unwrap();
    union.unmount();
    // Whatever a dead process leaves there: long files, full directories, a whiteout.
    for dir in work_directories(stage.work()) {
        for n in 0..20 {
            let path = dir.join(n.to_string());
            match n % 3 {
                0 | 1 => fs::write(&path, vec![b'!'; 9_999]).unwrap(),
                _ => {
                    fs::create_dir_all(&path).unwrap();
                    fs::write(path.join("full"), "of things").unwrap();
                }
            }
        }
        fs::write(dir.join("#1"), "left").unwrap();
    }
    let union = stage.mount();
    for n in 1..12 {
        let path = union.join(format!("f{n}"));
        File::options().write(true).open(&path).unwrap().write_at(b"S", 0).unwrap();
        assert_eq!(read(&path), "Short");
        fs::create_dir(union.join(format!("dir{n}"))).unwrap();
        assert_eq!(names(&union.join(format!("dir{n}"))), [""; 0]);
    }
    mode(&union.join("d/e/f"), 0o600);
    assert_eq!(names(&union.join("d")), ["e"]);
    fs::remove_dir_all(union.join("d")).unwrap();
    stage.survives(union);
}

/// What is in a work directory beside directories, and how many of these there are.
fn work_content(work: &Path) -> (usize, Vec<PathBuf>) {
    let entries: Vec<_> = walkdir::WalkDir::new(work).into_iter().map(Result::unwrap).collect();
    let files = entries.iter().filter(|entry| {
        let empty = entry.metadata().unwrap().len() == 0;
        // Locks and the like are there for as long as the mount is, and whiteouts kept to be linked.
        !entry.file_type().is_dir() && !empty
    });
    let dirs = entries.iter().filter(|entry| entry.file_type().is_dir()).count();
    (dirs, files.map(|entry| entry.path().to_owned()).collect())
}

fn rmdir_leaves_nothing() {
    let stage = Stage::new(1);
    for n in 0..10 {
        fs::create_dir_all(stage.lower(format!("d{n}/sub"))).unwrap();
        write(&stage.lower(format!("d{n}/f")), "f");
    }
    let union = stage.mount();
    // The first may make what is needed once.
    fs::remove_dir_all(union.join("d0")).unwrap();
    let before = work_content(stage.work());
    for n in 1..10 {
        let dir = union.join(format!("d{n}"));
        write(&dir.join("new"), "new");
        fs::remove_file(dir.join("f")).unwrap();
        fs::remove_file(dir.join("new")).unwrap();
        fs::remove_dir(dir.join("sub")).unwrap();
        fs::remove_dir(&dir).unwrap();
    }
    assert_eq!(work_content(stage.work()), before);
    assert_eq!(names(union.path()), [""; 0]);
    stage.survives(union);
}

fn no_room() {
    let stage = Stage::new(1);
    write(&stage.lower("large"), vec![b'x'; 8 << 20]);
    write(&stage.lower("small"), "small");
    let small = stage.beside("small-disk");
    rustix::mount::mount("stratafs-test", &small, "tmpfs", MountFlags::empty(), c"size=3m")
        .unwrap();
    let (upper, work) = (small.join("upper"), small.join("work"));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    let mut stage = stage;
    stage.upper = Some((upper, work));
    {
        let union = stage.mount();
        let free = || rustix::fs::statvfs(&small).unwrap().f_bfree;
        write(&union.join("small"), "written");
        let before = free();
        for _ in 0..3 {
            // The error comes at the open, at the write, or at last when what was written is kept.
            let e = File::options()
                .write(true)
                .open(union.join("large"))
                .and_then(|mut file| {
                    file.write_all(b"y")?;
                    file.sync_all()
                })
                .unwrap_err();
            assert_eq!(e.kind(), std::io::ErrorKind::StorageFull, "{e}");
            let (_, files) = work_content(stage.work());
            assert_eq!(files, [""; 0].map(PathBuf::from), "left in the work directory");
        }
        // Its attributes may be there, as the kernel has set its time before the data were refused.
        if let Ok(meta) = fs::metadata(stage.upper("large")) {
            let marked = calls::has_xattr(&stage.upper("large"), "trusted.overlay.metacopy");
            assert!(marked && meta.blocks() == 0, "a partial file is in the upper");
        }
        assert_eq!(free(), before, "room is lost");
        // The mount goes on.
        write(&union.join("small"), "again");
        write(&union.join("other"), vec![b'z'; 1 << 20]);
        union.unmount();
        let union = stage.mount();
        assert_eq!(fs::metadata(union.join("large")).unwrap().len(), 8 << 20);
        assert!(fs::read(union.join("large")).unwrap().iter().all(|byte| *byte == b'x'));
        assert_eq!(read(&union.join("small")), "again");
    }
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
}

fn temporary_files() {
    let stage = Stage::new(1);
    fs::create_dir(stage.lower("d")).unwrap();
    write(&stage.lower("d/low"), "low");
    let union = stage.mount();
    let dir = union.join("d");
    for n in 0..20 {
        let temporary = dir.join(format!("tmp{n}"));
        write(&temporary, "x");
        if n % 2 == 0 {
            fs::remove_file(&temporary).unwrap();
        } else {
            fs::rename(&temporary, dir.join("result")).unwrap();
        }
        fs::create_dir(dir.join(format!("dir{n}"))).unwrap();
        fs::remove_dir(dir.join(format!("dir{n}"))).unwrap();
    }
    assert_eq!(names(&stage.upper("d")), ["result"]);
    stage.survives(union);
    assert_eq!(names(&stage.upper("d")), ["result"]);
}

fn xattrs_without_room() {
    let mut stage = Stage::new(0);
    // A file system whose xattrs may be longer than what ext4 has room for.
    let lower = tempfile::tempdir_in("/dev/shm").unwrap();
    stage.lowers = vec![lower.path().to_owned()];
    write(&stage.lower("f"), "data");
    for (name, value) in [("user.a", 10), ("user.large", 30_000), ("user.z", 10)] {
        calls::set_xattr(&stage.lower("f"), name, &vec![b'v'; value]).unwrap();
    }
    let probe = stage.beside("probe").join("f");
    write(&probe, "");
    let upper_keeps = calls::set_xattr(&probe, "user.large", &[b'v'; 30_000]).is_ok();
    let union = stage.mount();
    let path = union.join("f");
    let changed = File::options().append(true).open(&path).and_then(|mut file| {
        file.write_all(b" and more")?;
        file.sync_all()
    });
    let all = |path: &Path| {
        ["user.a", "user.large", "user.z"].map(|name| calls::get_xattr(path, name).map(|v| v.len()))
    };
    assert_eq!(all(&path), [Ok(10), Ok(30_000), Ok(10)]);
    if upper_keeps {
        changed.unwrap();
    } else {
        changed.unwrap_err();
        union.forget();
        assert_eq!(read(&path), "data");
        assert!(!stage.upper("f").exists(), "a file without its xattrs is in the upper");
        let (_, files) = work_content(stage.work());
        assert_eq!(files, [""; 0].map(PathBuf::from));
    }
    assert_eq!(all(&path), [Ok(10), Ok(30_000), Ok(10)]);
    write(&union.join("other"), "other");
    stage.survives(union);
}

fn changed_layers() {
    let mut stage = Stage::new(2);
    // With writeback the kernel alone knows how long a file is.
    stage.more = ",timeout=0,writeback=0".to_owned();
    for dir in ["low", "merged"] {
        fs::create_dir(stage.lower(dir)).unwrap();
        write(&stage.lower(dir).join("old"), "old");
    }
    fs::create_dir(stage.lowers[1].join("merged")).unwrap();
    let union = stage.mount();
    for dir in ["low", "merged"] {
        assert_eq!(names(&union.join(dir)), ["old"]);
        assert!(!union.join(dir).join("new").exists());
        write(&stage.lower(dir).join("new"), "new");
        assert_eq!(read(&union.join(dir).join("new")), "new", "{dir}");
        assert_eq!(names(&union.join(dir)), ["new", "old"]);
        write(&stage.lower(dir).join("new"), "longer than before");
        assert_eq!(read(&union.join(dir).join("new")), "longer than before", "{dir}");
        fs::remove_file(stage.lower(dir).join("old")).unwrap();
        assert_eq!(fs::metadata(union.join(dir).join("old")).unwrap_err().raw_os_error(), Some(2));
        assert_eq!(names(&union.join(dir)), ["new"]);
    }
    write(&stage.lowers[1].join("merged/below"), "below");
    assert_eq!(names(&union.join("merged")), ["below", "new"]);
    assert_eq!(read(&union.join("merged/below")), "below");
    write(&stage.lowers[1].join("top"), "top");
    assert_eq!(read(&union.join("top")), "top");
}

fn stacked_lower() {
    let inner = Stage::new(2);
    write(&inner.lowers[1].join("deep"), "deep");
    write(&inner.lower("f"), "f");
    let below = inner.mount_by_the_kernel();
    write(&below.join("written"), "written");
    let mut stage = Stage::new(1);
    write(&stage.lower("plain"), "plain");
    stage.lowers.push(below.path().to_owned());
    let union = stage.mount();
    let all = ["deep", "f", "plain", "written"];
    assert_eq!(names(union.path()), all);
    for name in all {
        let mut file = File::options().read(true).write(true).open(union.join(name)).unwrap();
        let mut content = String::new();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, name);
        file.rewind().unwrap();
        file.write_all(b"X").unwrap();
        drop(file);
        assert_eq!(read(&union.join(name)), format!("X{}", &name[1..]));
    }
    assert_eq!(read(&below.join("deep")), "deep");
    assert_eq!(
        calls::rename(&union.join("f"), &union.join("deep"), RenameFlags::NOREPLACE),
        Err(Errno::EXIST)
    );
    stage.survives(union);
}
