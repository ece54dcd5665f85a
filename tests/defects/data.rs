//! Reading and writing in all ways there are.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags};
use rustix::io::Errno;

use crate::support::calls::{self, read, write};
use crate::support::fuse_union::{Stage, mode};
use crate::support::suite;

pub const TESTS: &[(&str, fn())] = &[
    ("fallocate_is_as_on_ext4", fallocate),
    ("copy_file_range_copies", copy_file_range),
    ("locks_hold_across_copy_up", locks),
    ("direct_io_is_coherent", direct),
    ("appends_of_many_processes_are_all_there", appends),
    ("shared_mappings_are_one", mappings),
    ("mapped_writes_survive_without_sync", unsynced_mappings),
    ("exclusive_creation_sees_all_layers", exclusive),
    ("programs_run_and_are_busy", programs),
    ("the_file_system_tells_its_room", room),
    ("truncation_clears_what_was_behind", truncation),
];

/// What a process of its own does for a test.
pub fn duty(arguments: &[String]) -> ! {
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["append", path, who] => {
            let mut file = File::options().append(true).open(path).unwrap();
            for n in 0..LINES {
                file.write_all(line(who, n).as_bytes()).unwrap();
            }
        }
        ["lock", path, kind] => {
            let file = File::options().read(true).write(true).open(path).unwrap();
            let exclusive = FlockOperation::NonBlockingLockExclusive;
            let locked = match kind {
                "flock" => rustix::fs::flock(&file, exclusive),
                "posix" => rustix::fs::fcntl_lock(&file, exclusive),
                _ => open_file_lock(&file),
            };
            suite::say(match locked {
                Ok(()) => "locked",
                Err(Errno::WOULDBLOCK | Errno::ACCESS) => "held",
                Err(e) => panic!("{e}"),
            });
        }
        ["dirty", path] => super::traps::dirty(path),
        _ => panic!("{arguments:?}"),
    }
    std::process::exit(0)
}

fn fallocate() {
    let stage = Stage::new(1);
    let plain = stage.beside("plain");
    let content: Vec<u8> = (0..60_000_u32).map(|n| (n % 250) as u8 + 1).collect();
    let keep = FallocateFlags::KEEP_SIZE;
    let punch = FallocateFlags::PUNCH_HOLE;
    let zero = FallocateFlags::ZERO_RANGE;
    let cases = [
        ("plain", FallocateFlags::empty(), 10_000, 90_000),
        ("inside", FallocateFlags::empty(), 10, 100),
        ("keep", keep, 50_000, 90_000),
        ("punch", punch | keep, 4_097, 20_000),
        ("punch-end", punch | keep, 55_000, 90_000),
        ("punch-without-keep", punch, 4_096, 8_192),
        ("zero", zero, 5_000, 70_000),
        ("zero-keep", zero | keep, 5_000, 70_000),
        ("collapse", FallocateFlags::COLLAPSE_RANGE, 4_096, 8_192),
        ("insert", FallocateFlags::INSERT_RANGE, 4_096, 8_192),
        ("nothing", FallocateFlags::empty(), 0, 0),
        ("beyond", FallocateFlags::empty(), 1 << 62, 1 << 61),
    ];
    for (name, ..) in cases {
        write(&stage.lower(format!("low-{name}")), &content);
        write(&plain.join(name), &content);
    }
    let union = stage.mount();
    for (name, flags, offset, length) in cases {
        write(&union.join(format!("up-{name}")), &content);
        let allocate = |path: &Path| {
            let file = File::options().read(true).write(true).open(path).unwrap();
            let result = rustix::fs::fallocate(&file, flags, offset, length);
            (result, file.metadata().unwrap().len())
        };
        let expected = allocate(&plain.join(name));
        for layer in ["low", "up"] {
            let path = union.join(format!("{layer}-{name}"));
            let shown = allocate(&path);
            let refused = (Err(Errno::OPNOTSUPP), content.len() as u64);
            // FUSE has no way to ask for these.
            if matches!(name, "collapse" | "insert") && shown == refused {
                assert!(fs::read(&path).unwrap() == content, "{layer} {name}");
                continue;
            }
            assert_eq!(shown, expected, "{layer} {name}");
            assert!(
                fs::read(&path).unwrap() == fs::read(plain.join(name)).unwrap(),
                "{layer} {name}"
            );
            union.forget();
            assert!(
                fs::read(&path).unwrap() == fs::read(plain.join(name)).unwrap(),
                "{layer} {name}"
            );
        }
    }
    let reader = File::open(union.join("up-plain")).unwrap();
    assert_eq!(rustix::fs::fallocate(&reader, keep, 0, 1), Err(Errno::BADF));
    drop(reader);
    stage.survives(union);
}

fn copy_file_range() {
    let stage = Stage::new(1);
    let content: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    for name in ["low", "low-target"] {
        write(&stage.lower(name), &content);
    }
    let outside = stage.beside("plain").join("outside");
    write(&outside, &content);
    let union = stage.mount();
    write(&union.join("up"), &content);
    let open = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
    for source in ["low", "up"] {
        for target in ["low-target", "new"] {
            let from = File::open(union.join(source)).unwrap();
            if target == "new" {
                write(&union.join(target), "");
            }
            let to = open(&union.join(target));
            let (mut at, mut there) = (1_000, 5_000);
            while at < 150_000 {
                let left = usize::try_from(150_000 - at).unwrap();
                let copied =
                    rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut there), left);
                assert!(copied.unwrap() > 0);
            }
            assert_eq!((at, there), (150_000, 154_000));
            let copied = fs::read(union.join(target)).unwrap();
            assert!(copied[5_000..154_000] == content[1_000..150_000], "{source} to {target}");
            drop((from, to));
        }
    }
    // What is dirty is copied too, and overlaps are refused.
    let file = open(&union.join("up"));
    file.write_at(b"just written", 70_000).unwrap();
    let to = open(&union.join("new"));
    rustix::fs::copy_file_range(&file, Some(&mut 70_000), &to, Some(&mut 0), 12).unwrap();
    assert_eq!(&fs::read(union.join("new")).unwrap()[..12], b"just written");
    let overlap = rustix::fs::copy_file_range(&file, Some(&mut 0), &file, Some(&mut 10), 100);
    assert_eq!(overlap, Err(Errno::INVAL));
    let end = rustix::fs::copy_file_range(&file, Some(&mut 200_000), &to, Some(&mut 0), 100);
    assert_eq!(end, Ok(0));
    drop((file, to));
    // From outside: refused, so that callers copy themselves, or done.
    let from = File::open(&outside).unwrap();
    let to = open(&union.join("new"));
    match rustix::fs::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), 1000) {
        Ok(length) => assert_eq!(fs::read(union.join("new")).unwrap()[..length], content[..length]),
        Err(e) => assert_eq!(e, Errno::XDEV),
    }
    drop((from, to));
    fs::copy(&outside, union.join("copied")).unwrap();
    assert!(fs::read(union.join("copied")).unwrap() == content);
    stage.survives(union);
}

/// Tries to lock in another process.
fn lock_elsewhere(path: &Path, kind: &str) -> String {
    let child = suite::child("lock", &[path.to_str().unwrap(), kind]);
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn open_file_lock(file: &File) -> rustix::io::Result<()> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel only reads the structure, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
        _ => Ok(()),
    }
}

fn locks() {
    let stage = Stage::new(1);
    for kind in ["flock", "posix", "ofd"] {
        write(&stage.lower(format!("low-{kind}")), "low");
    }
    let union = stage.mount();
    for kind in ["flock", "posix", "ofd"] {
        write(&union.join(format!("up-{kind}")), "up");
        for layer in ["low", "up"] {
            let path = union.join(format!("{layer}-{kind}"));
            let file = match kind {
                // One that cannot be written: the copy-up comes later, through another.
                "flock" => File::open(&path).unwrap(),
                _ => File::options().read(true).write(true).open(&path).unwrap(),
            };
            match kind {
                "flock" => rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap(),
                "posix" => rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap(),
                _ => open_file_lock(&file).unwrap(),
            }
            assert_eq!(lock_elsewhere(&path, kind), "held", "{layer} {kind}");
            mode(&path, 0o600);
            // A descriptor of the same file, closed in this process, would end a POSIX lock.
            if kind != "posix" {
                File::options().append(true).open(&path).unwrap().write_all(b"!").unwrap();
            }
            assert_eq!(lock_elsewhere(&path, kind), "held", "{layer} {kind}, copied up");
            let other = path.with_extension("renamed");
            fs::rename(&path, &other).unwrap();
            assert_eq!(lock_elsewhere(&other, kind), "held", "{layer} {kind}, renamed");
            drop(file);
            assert_eq!(lock_elsewhere(&other, kind), "locked", "{layer} {kind}, closed");
        }
    }
    stage.survives(union);
}

/// Memory as direct I/O wants it.
#[repr(align(4096))]
struct Aligned([u8; 8192]);

fn direct() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), vec![b'l'; 40_000]);
    let union = stage.mount();
    write(&union.join("up"), vec![b'u'; 40_000]);
    for (name, letter) in [("low", b'l'), ("up", b'u')] {
        let path = union.join(name);
        let reader = calls::open(&path, OFlags::RDONLY | OFlags::DIRECT).unwrap();
        let mut buffer = Aligned([0; 8192]);
        assert_eq!(rustix::io::pread(&reader, &mut buffer.0, 4096), Ok(8192));
        assert!(buffer.0.iter().all(|byte| *byte == letter));
        let buffered = File::options().read(true).write(true).open(&path).unwrap();
        // Written through the cache, read past it.
        buffered.write_at(b"buffered", 8192).unwrap();
        assert_eq!(rustix::io::pread(&reader, &mut buffer.0, 4096), Ok(8192));
        assert_eq!(&buffer.0[4096..4104], b"buffered", "{name}");
        // Written past it, read through it.
        let writer = calls::open(&path, OFlags::RDWR | OFlags::DIRECT).unwrap();
        let written = Aligned([b'd'; 8192]);
        assert_eq!(rustix::io::pwrite(&writer, &written.0, 16_384), Ok(8192));
        let mut bytes = [0; 100];
        buffered.read_exact_at(&mut bytes, 16_384).unwrap();
        assert!(bytes.iter().all(|byte| *byte == b'd'), "{name}");
        // At the end, what is there.
        assert_eq!(rustix::io::pread(&reader, &mut buffer.0, 36_864), Ok(40_000 - 36_864));
        assert_eq!(buffered.metadata().unwrap().len(), 40_000);
        assert_eq!(rustix::io::pwrite(&writer, &written.0, 40_960), Ok(8192));
        assert_eq!(fs::metadata(&path).unwrap().len(), 49_152);
    }
    stage.survives(union);
}

const LINES: u32 = 1000;

fn line(who: &str, n: u32) -> String {
    format!("{who} has written line {n:06} of its own\n")
}

fn appends() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), "from the lower\n");
    let union = stage.mount();
    write(&union.join("up"), "from the upper\n");
    for name in ["low", "up"] {
        let path = union.join(name);
        let path = path.to_str().unwrap();
        let children: Vec<_> =
            ["a", "b", "c", "d"].map(|who| suite::child("append", &[path, who])).into();
        for child in children {
            assert!(child.wait_with_output().unwrap().status.success());
        }
        let content = read(path.as_ref());
        let mut lines: Vec<_> = content.lines().collect();
        assert!(lines.remove(0).starts_with("from the "));
        for who in ["a", "b", "c", "d"] {
            let own: Vec<_> = lines.iter().filter(|line| line.starts_with(who)).collect();
            let expected: Vec<_> = (0..LINES).map(|n| line(who, n)).collect();
            assert_eq!(own.len(), expected.len(), "{name}: lines of {who}");
            assert!(own.iter().zip(&expected).all(|(a, b)| **a == b.trim_end()), "{name}: {who}");
        }
        assert_eq!(lines.len(), 4 * LINES as usize);
    }
    stage.survives(union);
}

fn mappings() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), vec![b'l'; 10_000]);
    let union = stage.mount();
    write(&union.join("up"), vec![b'u'; 10_000]);
    for name in ["low", "up"] {
        let path = union.join(name);
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (a, b) = (open(), open());
        let mut first = calls::Mapping::new(&a, 10_000, true).unwrap();
        let mut second = calls::Mapping::new(&b, 10_000, true).unwrap();
        first.write(100, b"first");
        assert_eq!(second.read(100, 5), b"first");
        second.write(5_000, b"second");
        assert_eq!(first.read(5_000, 6), b"second");
        // Reads and writes see it, and are seen.
        assert_eq!(&fs::read(&path).unwrap()[5_000..5_006], b"second");
        a.write_at(b"third", 9_000).unwrap();
        assert_eq!(second.read(9_000, 5), b"third");
        first.sync().unwrap();
        let upper = fs::read(stage.upper(name)).unwrap();
        assert_eq!((&upper[100..105], &upper[5_000..5_006]), (&b"first"[..], &b"second"[..]));
        drop((a, b));
        first.write(0, b"closed");
        drop((first, second));
        assert_eq!(&fs::read(&path).unwrap()[..6], b"closed");
    }
    stage.survives(union);
}

fn unsynced_mappings() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), vec![b'l'; 300_000]);
    let union = stage.mount();
    let file = File::options().read(true).write(true).open(union.join("low")).unwrap();
    let mut mapping = calls::Mapping::new(&file, 300_000, true).unwrap();
    for at in (0..300_000).step_by(10_000) {
        mapping.write(at, b"mapped");
    }
    drop((mapping, file));
    union.unmount();
    let union = stage.mount();
    let content = fs::read(union.join("low")).unwrap();
    for at in (0..300_000).step_by(10_000) {
        assert_eq!(&content[at..at + 6], b"mapped");
    }
    stage.survives(union);
}

fn exclusive() {
    let stage = Stage::new(1);
    for name in ["low", "gone"] {
        write(&stage.lower(name), "low");
    }
    fs::create_dir(stage.lower("dir")).unwrap();
    let union = stage.mount();
    fs::remove_file(union.join("gone")).unwrap();
    let create = |name: &str| {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
        calls::open(&union.join(name), flags).map(drop)
    };
    assert_eq!(create("low"), Err(Errno::EXIST));
    assert_eq!(create("dir"), Err(Errno::EXIST));
    assert_eq!(create("gone"), Ok(()));
    assert_eq!(create("gone"), Err(Errno::EXIST));
    assert_eq!(create("new"), Ok(()));
    assert_eq!(calls::mkdir(&union.join("low"), 0o755), Err(Errno::EXIST));
    assert_eq!(rustix::fs::symlink("x", union.join("low")), Err(Errno::EXIST));
    assert_eq!(rustix::fs::link(union.join("new"), union.join("low")), Err(Errno::EXIST));
    let nofollow = OFlags::RDONLY | OFlags::NOFOLLOW;
    rustix::fs::symlink("low", union.join("link")).unwrap();
    assert_eq!(calls::open(&union.join("link"), nofollow).map(drop), Err(Errno::LOOP));
    let directory = OFlags::RDONLY | OFlags::DIRECTORY;
    assert_eq!(calls::open(&union.join("low"), directory).map(drop), Err(Errno::NOTDIR));
    assert_eq!(calls::open(&union.join("dir"), OFlags::WRONLY).map(drop), Err(Errno::ISDIR));
    stage.survives(union);
}

fn programs() {
    let stage = Stage::new(1);
    let sleep = Path::new("/bin/sleep");
    fs::copy(sleep, stage.lower("low")).unwrap();
    let union = stage.mount();
    fs::copy(sleep, union.join("up")).unwrap();
    for name in ["low", "up"] {
        let path = union.join(name);
        assert!(Command::new(&path).arg("0").status().unwrap().success(), "{name}");
        let mut running = Command::new(&path).arg("1000").spawn().unwrap();
        let busy = File::options().write(true).open(&path);
        running.kill().unwrap();
        running.wait().unwrap();
        assert_eq!(busy.unwrap_err().raw_os_error(), Some(26), "{name} is open while it runs");
        let writer = File::options().append(true).open(&path).unwrap();
        let run = Command::new(&path).arg("0").status();
        assert_eq!(run.unwrap_err().raw_os_error(), Some(26), "{name} runs while it is open");
        drop(writer);
        assert!(Command::new(&path).arg("0").status().unwrap().success(), "{name}");
    }
    stage.survives(union);
}

fn room() {
    let stage = Stage::new(1);
    let union = stage.mount();
    let shown = rustix::fs::statvfs(union.path()).unwrap();
    let upper = rustix::fs::statvfs(stage.upper("")).unwrap();
    assert_eq!((shown.f_blocks, shown.f_frsize), (upper.f_blocks, upper.f_frsize));
    assert_eq!((shown.f_files, shown.f_namemax), (upper.f_files, upper.f_namemax));
    stage.survives(union);
}

fn truncation() {
    let stage = Stage::new(1);
    write(&stage.lower("low"), vec![b'l'; 10_000]);
    let union = stage.mount();
    write(&union.join("up"), vec![b'u'; 10_000]);
    for name in ["low", "up"] {
        let path = union.join(name);
        let mut file = File::options().read(true).write(true).open(&path).unwrap();
        file.set_len(4_000).unwrap();
        file.set_len(9_000).unwrap();
        file.write_at(b"end", 12_000).unwrap();
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert_eq!(content.len(), 12_003);
        assert!(content[..4_000].iter().all(|byte| *byte != 0), "{name}");
        assert!(content[4_000..12_000].iter().all(|byte| *byte == 0), "{name}");
        drop(file);
        union.forget();
        assert!(fs::read(&path).unwrap() == content, "{name}");
        assert_eq!(fs::metadata(&path).unwrap().size(), 12_003);
        rustix::fs::ftruncate(File::options().write(true).open(&path).unwrap(), 1).unwrap();
        assert_eq!(read(&path).len(), 1);
    }
    stage.survives(union);
}
