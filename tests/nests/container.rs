//! A user namespace, and a root directory in it that has little more than /dev/fuse.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::zoo::Rights;
use crate::support::suite;
use crate::support::union_mount::UMASK;

/// Runs a duty of this binary as root of a user namespace of its own; it must succeed.
#[track_caller]
pub fn run(duty: &str, rights: Rights, arguments: &[&str]) {
    let word = if rights == Rights::ManyIds { "many" } else { "one" };
    let mut child = suite::child(duty, &[&[word], arguments].concat());
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "unshared", "the child says why");
    map_ids(&child, rights);
    child.stdin.take().unwrap().write_all(b"mapped\n").unwrap();
    assert!(!suite::was_killed(child.wait().unwrap()), "the child was killed");
}

/// Why there is no such namespace, if so.
pub fn hindrance(rights: Rights) -> Option<String> {
    let here = |flags: &[&str]| {
        let output = Command::new("unshare").args(flags).arg("true").output().unwrap();
        output.status.success()
    };
    if !here(&["--user", "--map-root-user", "--mount"]) {
        return Some("needs user namespaces".to_owned());
    }
    if rights == Rights::OneId || suite::needs_root().is_none() {
        return needs_device();
    }
    needs_device().or_else(|| suite::needs_program("newuidmap")).or_else(|| {
        let missing = subordinate("/etc/subuid").is_none() || subordinate("/etc/subgid").is_none();
        missing.then(|| "needs a range of this user's in /etc/subuid and /etc/subgid".to_owned())
    })
}

/// Why no FUSE mount can be served, if so.
pub fn needs_device() -> Option<String> {
    let device = fs::File::options().read(true).write(true).open("/dev/fuse");
    device.is_err().then(|| "needs /dev/fuse".to_owned())
}

/// The first range of subordinate ids of this user.
fn subordinate(file: &str) -> Option<(String, String)> {
    let id = Command::new("id").arg("-un").output().unwrap();
    let name = String::from_utf8(id.stdout).unwrap();
    let uid = rustix::process::getuid().as_raw().to_string();
    let ranges = fs::read_to_string(file).ok()?;
    ranges.lines().find_map(|line| {
        let [whose, first, count] = line.split(':').collect::<Vec<_>>()[..] else { return None };
        (whose == name.trim() || whose == uid).then(|| (first.to_owned(), count.to_owned()))
    })
}

fn map_ids(child: &Child, rights: Rights) {
    let pid = child.id().to_string();
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let in_proc = |file: &str| format!("/proc/{pid}/{file}");
    if rights == Rights::OneId {
        fs::write(in_proc("setgroups"), "deny").unwrap();
        fs::write(in_proc("uid_map"), format!("0 {uid} 1")).unwrap();
        fs::write(in_proc("gid_map"), format!("0 {gid} 1")).unwrap();
        return;
    }
    if suite::needs_root().is_none() {
        fs::write(in_proc("uid_map"), "0 0 65536").unwrap();
        fs::write(in_proc("gid_map"), "0 0 65536").unwrap();
        return;
    }
    for (program, file, own) in
        [("newuidmap", "/etc/subuid", uid), ("newgidmap", "/etc/subgid", gid)]
    {
        let (first, count) = subordinate(file).unwrap();
        let own = own.to_string();
        let status = Command::new(program)
            .args([&pid, "0", &own, "1", "1", &first, &count])
            .status()
            .unwrap();
        assert!(status.success(), "{program}: {status}");
    }
}

/// In the child: the namespaces, and whose rights this process has in them.
pub fn enter(arguments: &[String]) -> Rights {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).unwrap();
    suite::say("unshared");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    assert_eq!(line, "mapped\n");
    rustix::process::umask(UMASK.into());
    let flags = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    rustix::mount::mount_change("/", flags).unwrap();
    if arguments[1] == "many" { Rights::ManyIds } else { Rights::OneId }
}

/// Makes an empty directory this process's root in which there is no /sys, no program but these with their
/// libraries, /proc read-only, and in /dev the device of FUSE alone.
pub fn confine(new: &Path, programs: &[&str]) {
    rustix::mount::mount("container", new, "tmpfs", MountFlags::empty(), c"mode=755").unwrap();
    for dir in ["proc", "dev", "tmp", "var/tmp", "old"] {
        fs::create_dir_all(new.join(dir)).unwrap();
    }
    rustix::mount::mount_bind_recursive("/proc", new.join("proc")).unwrap();
    let flags = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    rustix::mount::mount_remount(new.join("proc"), flags, c"").unwrap();
    let mut files = vec!["/dev/fuse".to_owned()];
    for program in programs {
        files.push((*program).to_owned());
        files.extend(libraries(program));
    }
    files.sort();
    files.dedup();
    for file in &files {
        let there = new.join(file.strip_prefix('/').unwrap());
        fs::create_dir_all(there.parent().unwrap()).unwrap();
        fs::write(&there, "").unwrap();
        rustix::mount::mount_bind(file, &there).unwrap();
    }
    rustix::process::pivot_root(new, new.join("old")).unwrap();
    std::env::set_current_dir("/").unwrap();
    rustix::mount::unmount("/old", UnmountFlags::DETACH).unwrap();
}

fn libraries(program: &str) -> Vec<String> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    words.map(str::to_owned).filter(|path| Path::new(path).is_file()).collect()
}

/// A known difference: without /dev/null the program serves in the foreground alone, and fails else.
pub fn not_in_the_background(program: &str) {
    let dir = suite::temp();
    let options = format!("lowerdir={},format=overlay-user", dir.path().display());
    let at = dir.path().join("at");
    fs::create_dir(&at).unwrap();
    let mut command = Command::new(program);
    let output = command.args(["-o", &options]).arg(&at).stdin(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("/dev/null") && said.contains("-f"),
        "{said}"
    );
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(at.to_str().unwrap()), "{mounts}");
}
