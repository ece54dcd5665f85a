//! The program `stratafs-fuse` as it is typed: what it refuses and what it says then, how it goes to the
//! background, and how it ends.
//!
//! Mounting needs root and /dev/fuse; without them those tests are reported as ignored.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/suite.rs"]
#[allow(dead_code, reason = "each suite uses its part")]
mod suite;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use libtest_mimic::Trial;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process};

fn main() {
    let hindrance = suite::needs_root()
        .or_else(|| (!Path::new("/dev/fuse").exists()).then(|| "needs /dev/fuse".to_owned()));
    let cases: [(&str, fn()); 9] = [
        ("what_is_wrong_is_named_and_nothing_is_mounted", refusals),
        ("help_and_version_are_printed", help),
        ("it_returns_when_the_mount_answers", background),
        ("without_dev_null_it_says_so_and_serves_in_the_foreground", without_null),
        ("a_signal_writes_back_and_unmounts", signals),
        ("a_signal_detaches_a_mount_that_is_in_use", in_use),
        ("an_upper_has_one_writer", one_writer),
        ("a_killed_server_leaves_an_upper_that_mounts_again", killed),
        ("mount_8_finds_it_by_the_type", by_type),
    ];
    let trials = cases.into_iter().map(|(name, case)| {
        let needs_nothing = name == "help_and_version_are_printed";
        let ignored = hindrance.is_some() && !needs_nothing;
        let name = match &hindrance {
            Some(why) if ignored => format!("{name} ({why})"),
            _ => name.to_owned(),
        };
        Trial::test(name, move || {
            case();
            Ok(())
        })
        .with_ignored_flag(ignored)
    });
    suite::run_one_by_one(trials.collect());
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_stratafs-fuse");

/// A lower with a file, an upper, a work directory and a mount point.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir_in("/var/tmp").unwrap());
        for dir in ["lower", "upper", "work", "mnt", "other"] {
            fs::create_dir(place.path(dir)).unwrap();
        }
        fs::write(place.path("lower/file"), "lower").unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn options(&self, more: &str) -> String {
        let dir = self.0.path().display();
        format!("lowerdir={dir}/lower,upperdir={dir}/upper,workdir={dir}/work{more}")
    }

    fn mount(&self, target: &str, options: &str) -> Output {
        let target = self.path(target);
        Command::new(PROGRAM).arg("-o").arg(options).arg(target).output().unwrap()
    }

    /// In the foreground, once it answers.
    fn serve(&self, options: &str) -> Child {
        let target = self.path("mnt");
        let mut command = Command::new(PROGRAM);
        command.args(["-f", "-o", options]).arg(&target).stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        while !is_mounted(&target) {
            assert!(child.try_wait().unwrap().is_none(), "it has ended");
            std::thread::yield_now();
        }
        child
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for target in ["mnt", "other"] {
            while is_mounted(&self.path(target)) {
                rustix::mount::unmount(self.path(target), UnmountFlags::DETACH).unwrap();
            }
        }
    }
}

fn is_mounted(path: &Path) -> bool {
    let info = fs::read("/proc/self/mountinfo").unwrap();
    let path = path.as_os_str().as_bytes();
    info.split(|b| *b == b'\n').any(|line| line.split(|b| *b == b' ').nth(4) == Some(path))
}

/// What a program said of its failure.
fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn unmount(path: &Path) {
    rustix::mount::unmount(path, UnmountFlags::empty()).unwrap();
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

fn refusals() {
    let place = Place::new();
    let dir = place.0.path().display().to_string();
    let lower = format!("lowerdir={dir}/lower");
    for (target, options, named) in [
        ("mnt", place.options(",frobnicate"), "frobnicate"),
        ("mnt", format!("lowerdir={dir}/nope"), "nope"),
        ("nowhere", lower.clone(), "nowhere"),
        ("lower/file", lower.clone(), "file"),
        ("mnt", format!("{lower},upperdir={dir}/upper"), "workdir="),
        ("mnt", format!("{lower},upperdir={dir}/upper,workdir=/dev/shm"), "same mount"),
        ("mnt", format!("{lower},upperdir={dir}/upper,workdir={dir}/upper"), "one inside"),
        ("mnt", format!("{lower}:{dir}/lower"), "twice"),
        ("", lower, "below the mount target"),
        ("mnt", place.options(",format=zfs"), "zfs"),
        ("mnt", place.options(",context"), "context="),
    ] {
        let output = place.mount(target, &options);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{options}: {said}");
        assert!(said.contains(named), "{options}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert!(!is_mounted(&place.path(target)), "{options}");
    }
    assert_eq!(fs::read_dir(place.path("upper")).unwrap().count(), 0);
}

fn help() {
    let output = Command::new(PROGRAM).arg("--help").output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("lowerdir=DIR"));
    let output = Command::new(PROGRAM).arg("-V").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("stratafs-fuse 0."));
}

fn background() {
    let place = Place::new();
    let output = place.mount("mnt", &place.options(",fsname=sourcename"));
    assert!(output.status.success(), "{}", text(&output));
    // No wait: it answers.
    assert_eq!(fs::read_to_string(place.path("mnt/file")).unwrap(), "lower");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(mounts.lines().any(|line| line.starts_with("sourcename ")), "{mounts}");
    fs::write(place.path("mnt/new"), "new").unwrap();
    unmount(&place.path("mnt"));
    assert_eq!(fs::read_to_string(place.path("upper/new")).unwrap(), "new");
}

/// In a mount namespace whose /dev has nothing but FUSE; it ends with the shell.
const WITHOUT_NULL: &str = r#"
place=$1 program=$2
options="lowerdir=$place/lower,upperdir=$place/upper,workdir=$place/work"
mount -t tmpfs dev /dev
mknod /dev/fuse c 10 229
"$program" -o "$options" "$place/mnt" && exit 1
# A shell gives /dev/null to what it has in the background.
{ "$program" -f -o "$options" "$place/mnt" || touch "$place/failed"; } | {
    until mountpoint -q "$place/mnt"; do [ ! -e "$place/failed" ]; done
    cat "$place/mnt/file"
    umount "$place/mnt"
}
[ ! -e "$place/failed" ]
"#;

fn without_null() {
    let place = Place::new();
    let output = in_own_mounts(WITHOUT_NULL, &place);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("/dev/null") && said.contains("-f serves"), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "lower");
}

fn signals() {
    for end in [Signal::TERM, Signal::INT, Signal::HUP] {
        let place = Place::new();
        let mut child = place.serve(&place.options(""));
        fs::write(place.path("mnt/new"), "written").unwrap();
        signal(&child, end);
        assert!(child.wait().unwrap().success());
        assert!(!is_mounted(&place.path("mnt")));
        assert_eq!(fs::read_to_string(place.path("upper/new")).unwrap(), "written");
        assert_eq!(fs::read_dir(place.path("work/stratafs/temp")).unwrap().count(), 0);
    }
}

fn in_use() {
    use std::io::{Read as _, Write as _};
    let place = Place::new();
    let mut child = place.serve(&place.options(""));
    let path = place.path("mnt/file");
    let mut file = fs::File::options().read(true).write(true).open(path).unwrap();
    signal(&child, Signal::TERM);
    while is_mounted(&place.path("mnt")) {
        std::thread::yield_now();
    }
    let mut read = String::new();
    file.read_to_string(&mut read).unwrap();
    file.write_all(b" and more").unwrap();
    assert_eq!(read, "lower");
    drop(file);
    assert!(child.wait().unwrap().success());
    assert_eq!(fs::read_to_string(place.path("upper/file")).unwrap(), "lower and more");
}

fn one_writer() {
    let place = Place::new();
    let mut child = place.serve(&place.options(""));
    let output = place.mount("other", &place.options(""));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("writes to this upper"), "{}", text(&output));
    assert!(!is_mounted(&place.path("other")));
    unmount(&place.path("mnt"));
    assert!(child.wait().unwrap().success());
    assert!(place.mount("other", &place.options("")).status.success());
    unmount(&place.path("other"));
}

fn killed() {
    let place = Place::new();
    let mut child = place.serve(&place.options(""));
    fs::write(place.path("mnt/closed"), "closed").unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    rustix::mount::unmount(place.path("mnt"), UnmountFlags::DETACH).unwrap();
    let mut child = place.serve(&place.options(""));
    assert_eq!(fs::read_to_string(place.path("mnt/closed")).unwrap(), "closed");
    unmount(&place.path("mnt"));
    assert!(child.wait().unwrap().success());
}

/// mount(8) forgets the caller's PATH, and its helper for FUSE has the shell look for the program:
/// it is put where the shell looks by itself, in a mount namespace that ends with the shell.
const BY_TYPE: &str = r#"
place=$1 program=$2
mount -t tmpfs programs /usr/local/bin
ln -s "$program" /usr/local/bin/stratafs-fuse
mount -t fuse.stratafs-fuse -o "ro,noatime,lowerdir=$place/lower" none "$place/mnt"
cat "$place/mnt/file"
if (: >"$place/mnt/new") 2>/dev/null; then echo "made a file in a read-only mount" >&2; exit 1; fi
grep -F "none $place/mnt fuse.stratafs ro," /proc/self/mounts >/dev/null
umount "$place/mnt"
"#;

fn in_own_mounts(script: &str, place: &Place) -> Output {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-euc", script, "-"]);
    command.arg(place.0.path()).arg(PROGRAM).output().unwrap()
}

fn by_type() {
    let place = Place::new();
    let output = in_own_mounts(BY_TYPE, &place);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "lower");
}
