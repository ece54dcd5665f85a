//! Traps of a file system that is asked for little: no opens, data written late, permissions checked by
//! the kernel; and the two things done better than by the kernel's overlayfs.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::support::calls::{self, names, read, write};
use crate::support::fuse_union::{Stage, mode};
use crate::support::suite;

pub const TESTS: &[(&str, fn())] = &[
    ("truncating_opens_reach_the_backing_file", truncating_opens),
    ("privileges_are_cleared_as_on_the_backing_file_system", privileges),
    ("setgid_without_group_execution_is_cleared_by_outsiders", setgid_alone),
    ("others_do_not_take_privileges_away", strangers),
    ("copies_of_files_being_written_have_their_bytes", dirty_copies),
    ("errors_of_synchronous_calls_come_from_them", synchronous_errors),
    ("permissions_hold_for_other_users", permissions),
    ("open_readers_see_later_writes", open_readers),
    ("long_redirects_are_refused_or_right", long_redirects),
    ("read_only_unions_refuse_writes", read_only),
    ("file_times_are_those_of_the_last_write", times_after_writes),
    ("mapped_writes_change_the_time", mapped_writes),
];

/// Those that no other file system has an option for.
pub const OWN: &[(&str, fn())] = &[
    ("without_writeback_a_write_fails_itself", failing_writes),
    ("mapped_writes_change_the_time_also_without_writeback", mapped_without_writeback),
];

fn truncating_opens() {
    let stage = Stage::new(1);
    for name in ["low", "low2"] {
        write(&stage.lower(name), vec![b'x'; 1 << 20]);
    }
    let union = stage.mount();
    for name in ["up", "up2"] {
        write(&union.join(name), vec![b'x'; 1 << 20]);
    }
    for name in ["low", "up"] {
        // What the shell does for `: > file`.
        drop(File::create(union.join(name)).unwrap());
        assert_eq!(fs::metadata(stage.upper(name)).unwrap().len(), 0, "{name}");
    }
    for name in ["low2", "up2"] {
        let reader = File::open(union.join(name)).unwrap();
        let mut file = File::create(union.join(name)).unwrap();
        file.write_all(b"short").unwrap();
        assert_eq!(reader.metadata().unwrap().len(), 5);
        drop(file);
        assert_eq!(fs::metadata(stage.upper(name)).unwrap().len(), 5, "{name}");
    }
    union.forget();
    for (name, length) in [("low", 0), ("up", 0), ("low2", 5), ("up2", 5)] {
        assert_eq!(fs::read(union.join(name)).unwrap().len(), length, "{name}");
    }
    assert_eq!(fs::metadata(stage.lower("low")).unwrap().len(), 1 << 20);
    stage.survives(union);
}

type Deed = (&'static str, fn(&Path) -> std::io::Result<()>);

/// What can be done to a file that may take its privileges away.
const DEEDS: &[Deed] = &[
    ("write", |path| {
        File::options().write(true).open(path)?.write_at(b"x", 0)?;
        Ok(())
    }),
    ("append", |path| File::options().append(true).open(path)?.write_all(b"x")),
    ("shrink", |path| File::options().write(true).open(path)?.set_len(1)),
    ("grow", |path| File::options().write(true).open(path)?.set_len(9_999)),
    ("truncate", |path| File::create(path).map(drop)),
    ("fallocate", |path| {
        let file = File::options().write(true).open(path)?;
        Ok(rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 9_000)?)
    }),
    ("copy_file_range", |path| {
        let to = File::options().write(true).open(path)?;
        let from = File::open(path.parent().unwrap().join("source"))?;
        rustix::fs::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), 3)?;
        Ok(())
    }),
    ("chown", |path| std::os::unix::fs::chown(path, Some(1000), None)),
    ("chgrp", |path| std::os::unix::fs::chown(path, None, Some(1000))),
    ("chmod", |path| fs::set_permissions(path, fs::Permissions::from_mode(0o6755))),
    ("touch", |path| {
        let file = File::options().write(true).open(path)?;
        file.set_modified(std::time::UNIX_EPOCH)
    }),
];

const ACTORS: [(&str, u32); 2] = [("root", 0), ("user", 1000)];

fn privileged_files(base: &Path, set: &str, modes: &[u32]) {
    fs::create_dir(base.join(set)).unwrap();
    mode(&base.join(set), 0o777);
    write(&base.join(set).join("source"), "the source");
    for (deed, _) in DEEDS {
        for &bits in modes {
            for (actor, _) in ACTORS {
                for owner in [0, 1000] {
                    let path = base.join(set).join(format!("{deed}-{bits:o}-{actor}-{owner}"));
                    write(&path, "some content");
                    calls::chown(&path, owner, owner);
                    mode(&path, bits);
                    let capability = calls::capability();
                    calls::set_xattr(&path, "security.capability", &capability).unwrap();
                }
            }
        }
    }
}

/// Does all deeds, and says what became of each file.
fn after_deeds(dir: &Path, modes: &[u32]) -> Vec<String> {
    let mut outcomes = Vec::new();
    for (deed, act) in DEEDS {
        for &bits in modes {
            for (actor, uid) in ACTORS {
                for owner in [0, 1000] {
                    let name = format!("{deed}-{bits:o}-{actor}-{owner}");
                    let path = dir.join(&name);
                    let result = match uid {
                        0 => act(&path),
                        _ => calls::as_user(uid, uid, || act(&path)),
                    };
                    let result = result.map_err(|e| e.raw_os_error());
                    let (mode, owner) = (calls::mode_of(&path), calls::owner_of(&path));
                    let capable = calls::has_xattr(&path, "security.capability");
                    outcomes.push(format!("{name}: {result:?} {mode:o} {owner:?} {capable}"));
                }
            }
        }
    }
    outcomes
}

fn privileges() {
    let expected = compare_deeds(&[0o6777, 0o4666]);
    // They are not all the same: something is cleared, and something is not.
    assert!(expected.iter().any(|line| line.contains(" 777 ")));
    assert!(expected.iter().any(|line| line.ends_with("true")));
}

/// The bit once meant mandatory locking, and means nothing now; others than the group clear it still.
fn setgid_alone() {
    let expected = compare_deeds(&[0o2767]);
    assert!(expected.iter().any(|line| line.contains(" 767 ")));
}

/// Asserts that the union does as the file system below it, and says what that does.
fn compare_deeds(modes: &[u32]) -> Vec<String> {
    let stage = Stage::new(1);
    privileged_files(&stage.lowers[0], "low", modes);
    let plain = stage.beside("plain");
    privileged_files(&plain, "files", modes);
    let expected = after_deeds(&plain.join("files"), modes);
    let union = stage.mount();
    privileged_files(union.path(), "up", modes);
    for set in ["low", "up"] {
        let shown = after_deeds(&union.join(set), modes);
        let wrong: Vec<_> = expected.iter().zip(&shown).filter(|(a, b)| a != b).collect();
        assert!(wrong.is_empty(), "{set}: expected, and shown: {wrong:#?}");
        union.forget();
        // Nor do they come back when the kernel asks again.
        for line in &expected {
            let (name, _) = line.split_once(':').unwrap();
            let path = union.join(set).join(name);
            let capable = calls::has_xattr(&path, "security.capability");
            let end = format!("{:o} {:?} {capable}", calls::mode_of(&path), calls::owner_of(&path));
            assert!(line.ends_with(&end), "{set}: {line}, and later {end}");
        }
    }
    stage.survives(union);
    expected
}

fn strangers() {
    let stage = Stage::new(1);
    let make = |path: &Path| {
        write(path, "a program");
        mode(path, 0o6755);
        calls::set_xattr(path, "security.capability", &calls::capability()).unwrap();
    };
    make(&stage.lower("low"));
    let union = stage.mount();
    make(&union.join("up"));
    for name in ["low", "up"] {
        let path = union.join(name);
        calls::as_user(1000, 1000, || {
            // A call that changes nothing, but clears what an owner's change of owner clears.
            std::os::unix::fs::chown(&path, None, None).ok();
            std::os::unix::fs::chown(&path, Some(0), None).unwrap_err();
            File::options().write(true).open(&path).unwrap_err();
        });
        for _ in 0..2 {
            assert_eq!(calls::mode_of(&path), 0o6755, "{name}");
            let capable = calls::has_xattr(&path, "security.capability");
            assert!(capable, "{name} has lost its capability");
            union.forget();
        }
    }
    stage.survives(union);
}

/// What [`dirty`] writes, which has no zeros.
fn pattern() -> Vec<u8> {
    (0..700_000_u32).map(|n| (n % 251) as u8 + 1).collect()
}

/// Writes at the end of a file, says so, and keeps it open: parts of pages, and pages, that are nowhere
/// but in memory. In a process of its own, since to close a descriptor, as each new process does with
/// those of its parent, is to write back.
pub fn dirty(path: &str) -> ! {
    let mut file = File::options().append(true).create(true).open(path).unwrap();
    for chunk in pattern().chunks(70_001) {
        file.write_all(chunk).unwrap();
    }
    suite::say("written");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    std::process::exit(0)
}

/// What is done to a file that another process is writing to.
#[derive(Clone, Copy, Debug)]
enum Copying {
    Cp(&'static str),
    Seeking,
}

fn dirty_copies() {
    const ALL: [(&str, Copying); 4] = [
        ("auto", Copying::Cp("--sparse=auto")),
        ("always", Copying::Cp("--sparse=always")),
        ("never", Copying::Cp("--sparse=never")),
        ("seeking", Copying::Seeking),
    ];
    let stage = Stage::new(1);
    for (name, _) in ALL {
        write(&stage.lower(format!("low-{name}")), pattern());
    }
    let union = stage.mount();
    for (layer, times) in [("low", 2), ("up", 1)] {
        for (name, copying) in ALL {
            let path = union.join(format!("{layer}-{name}"));
            let written = pattern().repeat(times);
            let mut writer = suite::child("dirty", &[path.to_str().unwrap()]);
            let mut word = [0; 8];
            writer.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
            match copying {
                Copying::Cp(how) => {
                    let copy = union.join(format!("{layer}-{name}-copy"));
                    let cp = Command::new("cp").arg(how).args([&path, &copy]).status().unwrap();
                    assert!(cp.success());
                    assert!(fs::read(&copy).unwrap() == written, "{layer} by cp {how}");
                }
                Copying::Seeking => {
                    let (reader, end) = (File::open(&path).unwrap(), written.len() as u64);
                    for at in [1, end - 100_000] {
                        let data = rustix::fs::seek(&reader, rustix::fs::SeekFrom::Data(at));
                        assert_eq!(data, Ok(at), "{layer}");
                        let hole = rustix::fs::seek(&reader, rustix::fs::SeekFrom::Hole(at));
                        assert_eq!(hole, Ok(end), "{layer}");
                    }
                }
            }
            drop(writer.stdin.take());
            assert!(writer.wait().unwrap().success());
            assert!(fs::read(&path).unwrap() == written, "{layer} {name}");
        }
    }
    stage.survives(union);
}

/// A stage whose upper is on a file system of 3 MiB with a lower file of 8 MiB.
fn small_stage() -> (Stage, std::path::PathBuf) {
    let mut stage = Stage::new(1);
    write(&stage.lower("large"), vec![b'x'; 8 << 20]);
    let small = stage.beside("small-disk");
    rustix::mount::mount("stratafs-test", &small, "tmpfs", MountFlags::empty(), c"size=3m")
        .unwrap();
    let (upper, work) = (small.join("upper"), small.join("work"));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    stage.upper = Some((upper, work));
    (stage, small)
}

fn synchronous_errors() {
    let (stage, small) = small_stage();
    {
        let union = stage.mount();
        let path = union.join("large");
        // Nothing is written late here, so nothing is told late.
        let open = || File::options().write(true).open(&path);
        let shrunk = open().and_then(|file| file.set_len((8 << 20) - 1));
        assert_eq!(shrunk.unwrap_err().raw_os_error(), Some(28));
        let up = File::create(union.join("up")).unwrap();
        let room = rustix::fs::fallocate(&up, FallocateFlags::empty(), 0, 8 << 20);
        assert_eq!(room, Err(Errno::NOSPC));
        drop(up);
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 20);
        assert!(!stage.upper("large").exists());
        // Cut short it has room.
        open().and_then(|file| file.set_len(4096)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![b'x'; 4096]);
        union.unmount();
    }
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
}

fn failing_writes() {
    let (mut stage, small) = small_stage();
    stage.more = ",writeback=off".to_owned();
    {
        let union = stage.mount();
        let written = File::options()
            .write(true)
            .open(union.join("large"))
            .and_then(|file| file.write_at(b"y", 0));
        assert_eq!(written.unwrap_err().raw_os_error(), Some(28));
        let mut up = File::create(union.join("up")).unwrap();
        let written = up.write_all(&vec![b'z'; 8 << 20]);
        assert_eq!(written.unwrap_err().raw_os_error(), Some(28));
        drop(up);
        union.unmount();
    }
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// Files and directories that uid 1000 may use in part.
fn guarded(base: &Path, set: &str) {
    let dir = base.join(set);
    fs::create_dir(&dir).unwrap();
    for (name, bits) in [("private", 0o700), ("sticky", 0o1777), ("open", 0o777), ("shown", 0o755)]
    {
        fs::create_dir(dir.join(name)).unwrap();
        for (file, bits) in [("secret", 0o600), ("group", 0o640), ("public", 0o644), ("all", 0o666)]
        {
            let path = dir.join(name).join(file);
            write(&path, "content");
            calls::chown(&path, 0, 4000);
            mode(&path, bits);
        }
        let granted = dir.join(name).join("granted");
        write(&granted, "content");
        mode(&granted, 0o600);
        calls::set_xattr(&granted, calls::ACCESS, &calls::acl(6, 1000, 4, 0, 4, 0)).unwrap();
        calls::set_xattr(&granted, "trusted.secret", b"x").unwrap();
        mode(&dir.join(name), bits);
    }
    symlink("private/secret", dir.join("link")).unwrap();
}

/// What uid 1000 can do there.
fn attempts(dir: &Path) -> Vec<String> {
    let mut outcomes = Vec::new();
    let mut tell = |what: String, result: std::io::Result<()>| {
        outcomes.push(format!("{what}: {:?}", result.map_err(|e| e.raw_os_error())));
    };
    tell("link".into(), fs::read(dir.join("link")).map(drop));
    for place in ["private", "sticky", "open", "shown"] {
        let at = |name: &str| dir.join(place).join(name);
        let names: &[&str] = &["secret", "group", "public", "all", "granted", "absent"];
        tell(format!("list {place}"), fs::read_dir(dir.join(place)).map(drop));
        tell(format!("make in {place}"), fs::write(at("new"), "x"));
        tell(format!("mkdir in {place}"), fs::create_dir(at("newdir")));
        tell(format!("symlink in {place}"), symlink("x", at("newlink")));
        for name in names {
            let path = at(name);
            let what = |deed: &str| format!("{deed} {place}/{name}");
            tell(what("read"), fs::read(&path).map(drop));
            tell(what("open for writing"), File::options().write(true).open(&path).map(drop));
            tell(
                what("truncate"),
                File::options().write(true).truncate(true).open(&path).map(drop),
            );
            tell(what("stat"), fs::metadata(&path).map(drop));
            tell(what("chmod"), fs::set_permissions(&path, fs::Permissions::from_mode(0o777)));
            tell(what("chown"), std::os::unix::fs::chown(&path, Some(1000), None));
            tell(what("user xattr"), calls::set_xattr(&path, "user.x", b"x").map_err(Into::into));
            let trusted = calls::set_xattr(&path, "trusted.x", b"x");
            tell(what("trusted xattr"), trusted.map_err(Into::into));
            let secret = calls::get_xattr(&path, "trusted.secret").map(drop);
            tell(what("get trusted xattr"), secret.map_err(Into::into));
            let listed = rustix::fs::llistxattr(&path, &mut vec![0_u8; 9_999][..]);
            tell(what("list xattrs"), listed.map(drop).map_err(Into::into));
            let epoch = std::time::UNIX_EPOCH;
            let times = File::open(&path).and_then(|file| file.set_modified(epoch));
            tell(what("set times"), times);
            tell(what("link"), fs::hard_link(&path, at("another")));
            tell(what("rename"), fs::rename(&path, at("renamed")));
            tell(what("rename back"), fs::rename(at("renamed"), &path));
            tell(what("remove"), fs::remove_file(&path));
        }
        tell(format!("rmdir {place}"), fs::remove_dir(dir.join(place)));
    }
    outcomes
}

fn permissions() {
    let stage = Stage::new(1);
    guarded(&stage.lowers[0], "low");
    let plain = stage.beside("plain");
    guarded(&plain, "files");
    let expected = calls::as_user(1000, 1000, || attempts(&plain.join("files")));
    for errno in ["Ok", "Err(Some(13))", "Err(Some(1))", "Err(Some(2))"] {
        assert!(expected.iter().any(|line| line.contains(errno)), "{errno} in {expected:#?}");
    }
    let union = stage.mount();
    guarded(union.path(), "up");
    // Root has asked before, so that the kernel has it all in its caches.
    crate::support::whole_tree::lines(union.path());
    for set in ["low", "up"] {
        let shown = calls::as_user(1000, 1000, || attempts(&union.join(set)));
        let wrong: Vec<_> = expected.iter().zip(&shown).filter(|(a, b)| a != b).collect();
        assert!(wrong.is_empty(), "{set}: expected, and shown: {wrong:#?}");
    }
    stage.survives(union);
}

fn open_readers() {
    let stage = Stage::new(1);
    write(&stage.lower("f"), "old content");
    let union = stage.mount();
    let path = union.join("f");
    let reader = File::open(&path).unwrap();
    let mapping = calls::Mapping::new(&reader, 4096, false).unwrap();
    assert_eq!(mapping.read(0, 3), b"old");
    let mut writer = File::options().read(true).write(true).open(&path).unwrap();
    writer.write_all(b"NEW content, and longer").unwrap();
    let mut seen = String::new();
    (&reader).read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "NEW content, and longer");
    assert_eq!(mapping.read(0, 3), b"NEW");
    let (a, b) = (reader.metadata().unwrap(), fs::metadata(&path).unwrap());
    assert_eq!((a.len(), a.ino(), a.mtime_nsec()), (b.len(), b.ino(), b.mtime_nsec()));
    mode(&path, 0o640);
    assert_eq!(reader.metadata().unwrap().mode() & 0o777, 0o640);
    writer.set_len(3).unwrap();
    assert_eq!(reader.metadata().unwrap().len(), 3);
    drop((reader, mapping, writer));
    stage.survives(union);
}

fn long_redirects() {
    let stage = Stage::new(1);
    let long = "n".repeat(200);
    let deep = format!("{long}/{long}/d");
    fs::create_dir_all(stage.lower(&deep)).unwrap();
    write(&stage.lower(&deep).join("f"), "f");
    fs::create_dir(stage.lower("dir")).unwrap();
    write(&stage.lower("dir/f"), "f");
    let union = stage.mount();
    for (from, to) in [(&*deep, "short"), ("dir", &*format!("{long}/{long}/dir"))] {
        match fs::rename(union.join(from), union.join(to)) {
            Ok(()) => assert_eq!(read(&union.join(to).join("f")), "f"),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(18), "{from} to {to}: {e}");
                assert_eq!(read(&union.join(from).join("f")), "f");
                assert!(!union.join(to).exists());
            }
        }
    }
    stage.survives(union);
}

fn read_only() {
    let mut stage = Stage::new(2);
    stage.upper = None;
    for (n, lower) in stage.lowers.iter().enumerate() {
        fs::create_dir(lower.join("d")).unwrap();
        write(&lower.join("d").join(n.to_string()), "f");
    }
    let union = stage.mount();
    let at = |name: &str| union.join("d").join(name);
    let errors = [
        ("write", File::options().write(true).open(at("0")).map(drop)),
        ("create", File::create(at("new")).map(drop)),
        ("mkdir", fs::create_dir(at("new"))),
        ("unlink", fs::remove_file(at("0"))),
        ("rename", fs::rename(at("0"), at("2"))),
        ("chmod", fs::set_permissions(at("0"), fs::Permissions::from_mode(0o600))),
        ("xattr", calls::set_xattr(&at("0"), "user.x", b"x").map_err(Into::into)),
        ("symlink", symlink("x", at("new"))),
        ("link", fs::hard_link(at("0"), at("new"))),
    ];
    for (what, result) in errors {
        assert_eq!(result.map_err(|e| e.raw_os_error()), Err(Some(30)), "{what}");
    }
    assert_eq!(names(&union.join("d")), ["0", "1"]);
    stage.survives(union);
}

fn times_after_writes() {
    let stage = Stage::new(1);
    // To copy these takes longer than the kernel's clock takes to move.
    for n in 0..20 {
        write(&stage.lower(format!("low{n}")), "low");
    }
    let union = stage.mount();
    let mut times = Vec::new();
    for n in 0..20 {
        for kind in ["low", "up"] {
            let path = union.join(format!("{kind}{n}"));
            let mut file = File::options().append(true).create(true).open(&path).unwrap();
            file.write_all(b"more").unwrap();
            drop(file);
            times.push((path.clone(), calls::mtime(&path)));
        }
    }
    // A change that is told to make is told once.
    for (path, time) in &times {
        assert_eq!(calls::mtime(path), *time, "{}", path.display());
    }
    union.forget();
    for (path, time) in &times {
        assert_eq!(calls::mtime(path), *time, "{}, asked again", path.display());
    }
    stage.survives(union);
}

fn mapped_writes() {
    mapped_writes_on(&Stage::new(1));
}

fn mapped_without_writeback() {
    let mut stage = Stage::new(1);
    stage.more = ",writeback=off".to_owned();
    mapped_writes_on(&stage);
}

fn mapped_writes_on(stage: &Stage) {
    let age = |path: &Path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1000)).unwrap();
    };
    write(&stage.lower("low"), "content");
    age(&stage.lower("low"));
    let union = stage.mount();
    write(&union.join("up"), "content");
    age(&union.join("up"));
    for name in ["low", "up"] {
        let path = union.join(name);
        assert_eq!(calls::mtime(&path), (1000, 0), "{name}");
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut mapping = calls::Mapping::new(&file, 7, true).unwrap();
        mapping.write(0, b"C");
        mapping.sync().unwrap();
        drop(mapping);
        drop(file);
        assert!(calls::mtime(&path).0 > 1000, "{name}");
        union.forget();
        assert!(calls::mtime(&path).0 > 1000, "{name}, asked again");
        assert_eq!(read(&path), "Content");
    }
    stage.survives(union);
}
