//! What a FUSE mount keeps in memory for each file and directory that the kernel knows: by the resident
//! size of a process (`VmRSS`, proc_pid_status(5)) that serves the mount, and does nothing else.
//!
//! First every file is looked up by its name, then every directory is listed, then all is forgotten.
//! Needs /dev/fuse, and root or fusermount3: `cargo bench --bench fuse_memory`. Nothing is asserted.

mod support;

use std::env;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use stratafs::{FuseLayer, FuseMount, FuseMountOptions, LayerFormat, UpperDir};

use support::for_figures;
use support::scratch::{is_root, scratch};

/// Set for the process that serves: in which directory.
const IN: &str = "STRATAFS_BENCH_FUSE_MEMORY_IN";

const FILES_A_DIRECTORY: usize = 500;

fn main() {
    if let Some(dir) = env::var_os(IN) {
        return serve(Path::new(&dir));
    }
    let directories = if for_figures() { 400 } else { 4 };
    let scratch = scratch();
    for dir in ["lower", "upper", "work", "mnt"] {
        fs::create_dir(scratch.path().join(dir)).expect("a new directory");
    }
    let names = || (0..directories).flat_map(|d| (0..FILES_A_DIRECTORY).map(move |f| (d, f)));
    let name = |d, f| format!("directory-{d}/some-file-{f}.txt");
    for d in 0..directories {
        fs::create_dir(scratch.path().join(format!("lower/directory-{d}"))).expect("a directory");
    }
    for (d, f) in names() {
        fs::write(scratch.path().join("lower").join(name(d, f)), "").expect("a new file");
    }

    let program = env::current_exe().expect("this program");
    let mut server = Command::new(program)
        .env(IN, scratch.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut answers = BufReader::new(server.stdout.take().expect("a pipe")).lines();
    let mut questions = server.stdin.take().expect("a pipe");
    let mut resident = move || -> f64 {
        writeln!(questions, "?").expect("it listens");
        let answer = answers.next().expect("an answer").expect("an answer");
        answer.parse().unwrap_or_else(|_| panic!("the server says: {answer}"))
    };
    let before = resident();
    let mount = scratch.path().join("mnt");
    for (d, f) in names() {
        fs::symlink_metadata(mount.join(name(d, f))).expect("a file of the lower");
    }
    let looked_up = resident();
    for d in 0..directories {
        let dir = fs::read_dir(mount.join(format!("directory-{d}"))).expect("a directory");
        assert_eq!(dir.count(), FILES_A_DIRECTORY, "all files are listed");
    }
    let listed = resident();
    let inodes = names().count() as f64;
    println!("{inodes} files known: {:.0} bytes each", (looked_up - before) / inodes);
    println!("directories listed: {:.0} bytes more for each name", (listed - looked_up) / inodes);
    if is_root() && fs::write("/proc/sys/vm/drop_caches", "2").is_ok() {
        println!("forgotten: {:.0} bytes each are left", (resident() - before) / inodes);
    }
    drop(resident);
    server.wait().expect("it ends");
}

/// Serves, and answers each line with the resident size in bytes, until there are no more.
fn serve(dir: &Path) {
    let format = if is_root() { LayerFormat::OverlayTrusted } else { LayerFormat::OverlayUser };
    let mut options = FuseMountOptions::new(format);
    options.lowers = vec![FuseLayer { dir: dir.join("lower"), format }];
    options.upper = Some(UpperDir { dir: dir.join("upper"), work: dir.join("work") });
    let mut mount = match FuseMount::new(&dir.join("mnt"), &options) {
        Ok(mount) => mount,
        Err(e) => return println!("cannot mount: {e}"),
    };
    for question in std::io::stdin().lines() {
        question.expect("a line");
        println!("{}", resident());
    }
    mount.unmount(true).expect("unmounted");
}

fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("the kernel tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    let size = line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
    size * 1024
}
