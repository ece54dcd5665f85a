//! Mounts over FUSE that helper processes serve: who ends them, and what comes of it when a process is
//! killed. This program is its own helper.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/suite.rs"]
#[allow(dead_code, reason = "each suite uses its part")]
mod suite;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};
use stratafs::helper::HelperCommand;
use stratafs::{
    Driver, DriverChoice, Durability, Error, ErrorKind, FuseDriver, FuseServer, Guard, Labels,
    LayerFormat, MountOptions, MountRequest, MountState, Store, StoreOptions, UpperDir,
    ignore_progress, unmount_at,
};
use tempfile::TempDir;

fn main() {
    stratafs::helper::run_if_requested();
    if let Some(arguments) = suite::child_arguments() {
        return hold_a_mount(&arguments);
    }
    let cases: [(&str, fn()); 11] = [
        ("a_left_mount_is_served_until_it_is_unmounted", left),
        ("a_guard_unmounts_what_a_helper_serves", guarded),
        ("a_mount_in_use_is_detached_and_held_until_it_is_not", in_use),
        ("a_mount_outlives_the_killed_process_that_made_it", starter_killed),
        ("a_mount_without_a_server_is_told_and_taken_away", helper_killed),
        ("a_dead_mount_is_taken_away_by_the_next_who_comes", dead_at_open),
        ("a_dead_mount_is_taken_away_by_the_next_activation", dead_at_activation),
        ("a_dead_mount_of_a_killed_process_is_taken_away", in_process_killed),
        ("what_the_kernel_holds_back_is_there_after_deactivation", written_back),
        ("the_helpers_error_is_told", errors),
        ("a_program_that_is_no_helper_is_told", no_helper),
    ];
    let trials = cases.into_iter().map(|(name, case)| suite::trial(name, hindrance(), case));
    suite::run_one_by_one(trials.collect());
}

fn hindrance() -> Option<String> {
    if !Path::new("/dev/fuse").exists() {
        return Some("needs /dev/fuse".to_owned());
    }
    let missing = Command::new("fusermount3").arg("--version").output().is_err();
    (suite::needs_root().is_some() && missing).then(|| "needs root, or fusermount3".to_owned())
}

/// A store with the active snapshot `a` on the committed `base`, and a mount point.
struct Stage {
    store: Store,
    tmp: TempDir,
}

fn open(root: &Path, server: FuseServer) -> Store {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    options.driver = DriverChoice::Fuse;
    options.fuse_server = server;
    options.durability = Durability::None;
    Store::open(root.join("store"), options).unwrap()
}

fn helped() -> FuseServer {
    FuseServer::Helper(HelperCommand::CurrentExe)
}

impl Stage {
    fn new() -> Stage {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir(tmp.path().join("mnt")).unwrap();
        let stage = Stage { store: open(tmp.path(), helped()), tmp };
        stage.store.prepare("base-active", None, Labels::new()).unwrap();
        let mut guard = stage.mount("base-active");
        fs::write(stage.target().join("below"), "below").unwrap();
        guard.unmount().unwrap();
        stage.store.commit("base", "base-active", Default::default()).unwrap();
        stage.store.prepare("a", Some("base"), Labels::new()).unwrap();
        stage
    }

    fn target(&self) -> PathBuf {
        self.tmp.path().join("mnt")
    }

    fn mount(&self, key: &str) -> Guard {
        self.store.activate(key, &self.target(), &MountOptions::default()).unwrap()
    }

    fn changes(&self) -> Vec<String> {
        let changes = self.store.changes("a", &mut ignore_progress).unwrap();
        changes.iter().map(ToString::to_string).collect()
    }

    fn is_mounted(&self) -> bool {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().any(|line| line.split(' ').nth(4) == self.target().to_str())
    }

    /// The helpers of this store's mounts: those that keep its directories open.
    fn helpers(&self) -> Vec<Pid> {
        let mut found = Vec::new();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let is_helper = command.starts_with(b"stratafs-helper\0");
            let Ok(open) = fs::read_dir(process.path().join("fd")) else { continue };
            let root = self.tmp.path();
            let mut open = open.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
            if is_helper && open.any(|file| file.starts_with(root)) {
                found.push(Pid::from_raw(pid).unwrap());
            }
        }
        found
    }

    /// A helper lets go of the snapshot just before it ends.
    fn until_no_helper_is_left(&self) {
        while !self.helpers().is_empty() {
            std::thread::yield_now();
        }
    }

    fn kill_helper(&self) -> Pid {
        let helpers = self.helpers();
        assert_eq!(helpers.len(), 1);
        kill_process(helpers[0], Signal::KILL).unwrap();
        helpers[0]
    }

    /// Kills the helper of a mount that was left, and waits until nothing is left of it.
    fn kill_helper_of_a_left_mount(&self) {
        let pid = self.kill_helper().as_raw_nonzero();
        while Path::new(&format!("/proc/{pid}")).exists() {
            std::thread::yield_now();
        }
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, kind: ErrorKind, naming: &str) {
    suite::fails(result, kind, naming);
}

/// Waits until the server of a mount has ended.
fn until_end(guard: &Guard) {
    let server = guard.server().unwrap();
    let mut fds = [PollFd::new(&server, PollFlags::IN)];
    poll(&mut fds, None).unwrap();
}

/// As a child: mounts, says so, and waits to be killed.
fn hold_a_mount(arguments: &[String]) {
    let root = Path::new(&arguments[1]);
    let server = if arguments[0] == "helped" { helped() } else { FuseServer::InProcess };
    let store = open(root, server);
    let guard = store.activate("a", &root.join("mnt"), &MountOptions::default()).unwrap();
    suite::say("mounted");
    std::io::stdin().lock().lines().next();
    drop(guard);
}

fn child_with_a_mount(stage: &Stage, server: &str) -> std::process::Child {
    let mut child = suite::child(server, &[stage.tmp.path().to_str().unwrap()]);
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "mounted\n");
    child
}

fn left() {
    let stage = Stage::new();
    let identity = stage.mount("a").leave().unwrap();
    assert_eq!(identity.state(&stage.target()).unwrap(), MountState::Mounted);
    fs::write(stage.target().join("new"), "x").unwrap();
    refused(stage.store.remove("a"), ErrorKind::Busy, "mounted");
    stage.store.deactivate(&stage.target()).unwrap();
    assert!(!stage.is_mounted());
    stage.until_no_helper_is_left();
    assert_eq!(stage.changes(), ["A /new"]);
    // Not by the store, but by anybody.
    let identity = stage.mount("a").leave().unwrap();
    unmount_at(&stage.target(), Some(&identity)).unwrap();
    // It ends by itself, and lets go of the snapshot.
    while stage.store.remove("a").is_err_and(|e| e.kind() == ErrorKind::Busy) {
        std::thread::yield_now();
    }
    assert_eq!(stage.store.stat("a").unwrap_err().kind(), ErrorKind::NotFound);
}

fn guarded() {
    let stage = Stage::new();
    let mut guard = stage.mount("a");
    assert_eq!(guard.state().unwrap(), MountState::Mounted);
    fs::write(stage.target().join("new"), "x").unwrap();
    let open = File::open(stage.target().join("below")).unwrap();
    refused(guard.unmount(), ErrorKind::Busy, "");
    assert_eq!(guard.state().unwrap(), MountState::Mounted);
    drop(open);
    guard.unmount().unwrap();
    assert_eq!(guard.state().unwrap(), MountState::Gone);
    assert!(!stage.is_mounted());
    // At once, by whoever waits for nothing.
    drop(stage.mount("a"));
    assert!(!stage.is_mounted());
    stage.until_no_helper_is_left();
    stage.store.remove("a").unwrap();
}

fn in_use() {
    let stage = Stage::new();
    let guard = stage.mount("a");
    let mut open = File::create(stage.target().join("open")).unwrap();
    drop(guard);
    assert!(!stage.is_mounted());
    open.write_all(b"written after that").unwrap();
    refused(stage.store.remove("a"), ErrorKind::Busy, "in use");
    drop(open);
    let again = loop {
        match stage.store.activate("a", &stage.target(), &MountOptions::default()) {
            Err(e) if e.kind() == ErrorKind::Busy => std::thread::yield_now(),
            again => break again.unwrap(),
        }
    };
    assert_eq!(fs::read(stage.target().join("open")).unwrap(), b"written after that");
    drop(again);
}

fn starter_killed() {
    let stage = Stage::new();
    let mut child = child_with_a_mount(&stage, "helped");
    child.kill().unwrap();
    assert!(suite::was_killed(child.wait().unwrap()));
    fs::write(stage.target().join("new"), "x").unwrap();
    assert_eq!(fs::read(stage.target().join("below")).unwrap(), b"below");
    refused(stage.store.remove("a"), ErrorKind::Busy, "");
    stage.store.deactivate(&stage.target()).unwrap();
    stage.until_no_helper_is_left();
    assert_eq!(stage.changes(), ["A /new"]);
}

fn helper_killed() {
    let stage = Stage::new();
    let mut guard = stage.mount("a");
    let file = File::create(stage.target().join("synced")).unwrap();
    (&file).write_all(b"x").unwrap();
    file.sync_all().unwrap();
    drop(file);
    stage.kill_helper();
    until_end(&guard);
    assert_eq!(guard.state().unwrap(), MountState::Dead);
    refused(guard.unmount(), ErrorKind::Io, "has died");
    assert_eq!(guard.state().unwrap(), MountState::Gone);
    guard.unmount().unwrap();
    drop(guard);
    let guard = stage.mount("a");
    assert_eq!(fs::read(stage.target().join("synced")).unwrap(), b"x");
    // One that is dropped is taken away, too; and none is left.
    stage.kill_helper();
    until_end(&guard);
    drop(guard);
    assert!(!stage.is_mounted());
    let guard = stage.mount("a");
    stage.kill_helper();
    until_end(&guard);
    refused(guard.leave(), ErrorKind::FailedPrecondition, "has died");
    assert!(!stage.is_mounted());
}

fn dead_at_open() {
    let stage = Stage::new();
    stage.mount("a").leave().unwrap();
    stage.kill_helper_of_a_left_mount();
    assert!(stage.is_mounted());
    let other = open(stage.tmp.path(), helped());
    assert!(!stage.is_mounted());
    other.remove("a").unwrap();
    // Or by who has it open.
    stage.store.prepare("a", Some("base"), Labels::new()).unwrap();
    stage.mount("a").leave().unwrap();
    stage.kill_helper_of_a_left_mount();
    stage.store.gc(&mut ignore_progress).unwrap();
    assert!(!stage.is_mounted());
}

fn dead_at_activation() {
    let stage = Stage::new();
    stage.mount("a").leave().unwrap();
    stage.kill_helper_of_a_left_mount();
    let mut guard = stage.mount("a");
    assert_eq!(fs::read(stage.target().join("below")).unwrap(), b"below");
    guard.unmount().unwrap();
    assert!(!stage.is_mounted(), "one was taken away, and one unmounted");
}

fn in_process_killed() {
    let stage = Stage::new();
    let mut child = child_with_a_mount(&stage, "in-process");
    child.kill().unwrap();
    assert!(suite::was_killed(child.wait().unwrap()));
    assert!(stage.is_mounted());
    drop(open(stage.tmp.path(), helped()));
    assert!(!stage.is_mounted());
    stage.store.remove("a").unwrap();
}

fn written_back() {
    let stage = Stage::new();
    stage.mount("a").leave().unwrap();
    let content = vec![7; 3 << 20];
    fs::write(stage.target().join("big"), &content).unwrap();
    stage.store.deactivate(&stage.target()).unwrap();
    // In the layer itself.
    let layers = fs::read_dir(stage.tmp.path().join("store/snapshots")).unwrap();
    let mut found = layers.filter_map(|dir| fs::read(dir.unwrap().path().join("fs/big")).ok());
    assert!(found.next().unwrap() == content);
}

fn errors() {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    for name in ["lower", "upper", "mnt"] {
        fs::create_dir(tmp.path().join(name)).unwrap();
    }
    let mut request = MountRequest::new(LayerFormat::OverlayUser, tmp.path().join("empty"));
    request.lower = vec![tmp.path().join("lower")];
    let work = tmp.path().join("no-work");
    request.upper = Some(UpperDir { dir: tmp.path().join("upper"), work });
    let driver = FuseDriver::served_by(helped());
    let refusal = driver.activate(&request, &tmp.path().join("mnt"));
    refused(refusal, ErrorKind::NotFound, "no-work");
}

fn no_helper() {
    let stage = Stage::new();
    for program in ["/bin/true", "/bin/false"] {
        let command = HelperCommand::Path(program.into());
        let store = open(stage.tmp.path(), FuseServer::Helper(command));
        let refusal = store.activate("a", &stage.target(), &MountOptions::default());
        refused(refusal, ErrorKind::Incompatible, "run_if_requested");
    }
    let store = open(stage.tmp.path(), FuseServer::Helper(HelperCommand::Path("/none".into())));
    let refusal = store.activate("a", &stage.target(), &MountOptions::default());
    refused(refusal, ErrorKind::NotFound, "/none");
    // Nothing is held after that.
    stage.store.remove("a").unwrap();
}
