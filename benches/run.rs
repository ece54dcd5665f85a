//! `stratafs run` of an image in the store: until the command's first output, and to the end of all; by the
//! kernel's overlayfs and over FUSE, beside unshare(1), which makes the same namespaces around a command and
//! nothing else. As root, or as an ordinary user in a user namespace.
//!
//! `cargo bench --bench run --features cli`. Nothing is asserted; the aim is that the first instruction comes
//! within 100 ms. `STRATAFS_BENCH_SCRATCH` says where the store lies: by default in memory.

mod support;

use std::cell::RefCell;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use support::scratch::{is_root, scratch};
use support::table::{OURS, Table};

const PROGRAM: &str = env!("CARGO_BIN_EXE_stratafs");

fn main() {
    let Some(busybox) = busybox() else {
        return println!(
            "skipped: the program busybox, of the package busybox-static, is not there"
        );
    };
    let scratch = scratch();
    let store = scratch.path().join("store");
    if let Err(why) = import(&store, &busybox, scratch.path()) {
        return println!("skipped: {why}");
    }
    let mut table = Table::new();
    for driver in ["overlay", "fuse"] {
        let run = |command: &[&str]| {
            let mut run = Command::new(PROGRAM);
            run.arg("--root").arg(&store).args(["--driver", driver, "run", "image", "--"]);
            run.args(command);
            run
        };
        until_output(
            &mut table,
            &format!("{driver}: to the first output"),
            OURS,
            run(&["/busybox", "echo", "x"]),
        );
        to_the_end(&mut table, &format!("{driver}: to the end"), OURS, run(&["/busybox", "true"]));
        to_the_end(
            &mut table,
            &format!("{driver}: to the end"),
            "unshare",
            unshare(&busybox, &["true"]),
        );
        until_output(
            &mut table,
            &format!("{driver}: to the first output"),
            "unshare",
            unshare(&busybox, &["echo", "x"]),
        );
    }
    table.finish();
}

/// Times from before the start until the command has written something; its end is waited for afterwards.
fn until_output(table: &mut Table, what: &str, who: &str, mut command: Command) {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let running: RefCell<Option<Child>> = RefCell::new(None);
    let end = || running.take().map_or(Ok(()), |mut child| ended_well(child.wait()));
    let start = || {
        let mut child = command.spawn().map_err(|e| e.to_string())?;
        let out = child.stdout.as_mut().ok_or("no output")?;
        let read = out.read_exact(&mut [0; 1]).map_err(|e| e.to_string());
        running.replace(Some(child));
        read
    };
    table.compare(what, who, || end().unwrap_or_default(), start);
    end().unwrap_or_else(|why| println!("{what} by {who}: {why}"));
}

fn to_the_end(table: &mut Table, what: &str, who: &str, mut command: Command) {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    table.compare(what, who, || (), || ended_well(command.status()));
}

fn ended_well(ended: std::io::Result<std::process::ExitStatus>) -> Result<(), String> {
    match ended {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(status.to_string()),
        Err(e) => Err(e.to_string()),
    }
}

fn unshare(busybox: &Path, command: &[&str]) -> Command {
    let mut unshare = Command::new("unshare");
    if !is_root() {
        unshare.arg("--map-root-user");
    }
    unshare.args(["--mount", "--pid", "--ipc", "--uts", "--fork", "--mount-proc"]);
    unshare.arg(busybox).args(command);
    unshare
}

fn busybox() -> Option<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from).into_iter().find(|path| path.is_file())
}

/// A store with an image that has the one program.
fn import(store: &Path, busybox: &Path, dir: &Path) -> Result<(), String> {
    let archive = dir.join("layer.tar");
    let mut tar = tar::Builder::new(fs::File::create(&archive).map_err(|e| e.to_string())?);
    tar.append_path_with_name(busybox, "busybox").map_err(|e| e.to_string())?;
    tar.finish().map_err(|e| e.to_string())?;
    let mut apply = Command::new(PROGRAM);
    apply.arg("--root").arg(store).args(["apply", "image"]).arg(&archive);
    let output = apply.output().map_err(|e| e.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
