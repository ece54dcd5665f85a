//! The whole of `podman run --rm IMAGE true`, with `stratafs-fuse` in the place of the kernel's overlayfs
//! (`overlay.mount_program`), with fuse-overlayfs there, and with the kernel itself: in turn, 20 times.
//!
//! `cargo bench --bench podman --features cli`, as root. Nothing is asserted; the aim is to be no slower than
//! fuse-overlayfs. `STRATAFS_BENCH_SCRATCH` says where podman keeps its images: by default in memory.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::UnmountFlags;
use support::peers;
use support::scratch::{is_root, scratch};
use support::table::{OURS, Table};

const PROGRAM: &str = env!("CARGO_BIN_EXE_stratafs-fuse");
const BUSYBOX: &str = "/bin/busybox";

fn main() {
    if let Some(why) = hindrance() {
        return println!("skipped: {why}");
    }
    let runs = if support::for_figures() { 20 } else { 1 };
    let scratch = scratch();
    let layer = scratch.path().join("layer.tar");
    pack(&layer).expect("an archive of busybox");
    let peer = peers::find("fuse-overlayfs").and_then(|_| in_path("fuse-overlayfs"));
    let mut podmans = vec![Podman::new(scratch.path(), OURS, Some(PROGRAM))];
    if let Some(peer) = &peer {
        podmans.push(Podman::new(scratch.path(), "fuse-overlayfs", Some(peer)));
    }
    podmans.push(Podman::new(scratch.path(), "kernel", None));
    podmans.retain(|podman| match podman.import(&layer) {
        Ok(()) => true,
        Err(why) => {
            println!("skipped: {}: {why}", podman.who);
            false
        }
    });
    let mut table = Table::new();
    let mut contenders: Vec<_> =
        podmans.iter().map(|podman| (podman.who, || podman.run())).collect();
    table.in_turn("podman run --rm", runs, &mut contenders);
    table.finish();
}

fn hindrance() -> Option<String> {
    if !is_root() {
        return Some("podman on the kernel's overlayfs needs root".to_owned());
    }
    let missing = ["podman", "runc"].into_iter().find(|program| peers::find(program).is_none());
    missing.map(|program| format!("{program} is not there")).or_else(|| {
        (!Path::new(BUSYBOX).is_file())
            .then(|| format!("{BUSYBOX}, of the package busybox-static, is not there"))
    })
}

/// podman wants the whole path.
fn in_path(program: &str) -> Option<String> {
    let path = std::env::var_os("PATH")?;
    let found =
        std::env::split_paths(&path).map(|dir| dir.join(program)).find(|at| at.is_file())?;
    found.to_str().map(str::to_owned)
}

/// A layer that has the one program.
fn pack(archive: &Path) -> std::io::Result<()> {
    let mut tar = tar::Builder::new(fs::File::create(archive)?);
    tar.append_path_with_name(BUSYBOX, "busybox")?;
    tar.finish()
}

/// A storage of podman's. Dropped, it is unmounted.
struct Podman<'a> {
    who: &'static str,
    mount_program: Option<&'a str>,
    dir: PathBuf,
}

impl<'a> Podman<'a> {
    fn new(dir: &Path, who: &'static str, mount_program: Option<&'a str>) -> Podman<'a> {
        Podman { who, mount_program, dir: dir.join(who) }
    }

    fn podman(&self, arguments: &[&str]) -> Result<(), String> {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.storage()).arg("--runroot").arg(self.dir.join("run"));
        command.args(["--runtime", "runc", "--cgroup-manager", "cgroupfs"]);
        command.args(["--storage-driver", "overlay"]);
        if let Some(program) = self.mount_program {
            command.arg("--storage-opt").arg(format!("overlay.mount_program={program}"));
        }
        let output = command.args(arguments).stdin(Stdio::null()).output();
        let output = output.map_err(|e| e.to_string())?;
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    fn storage(&self) -> PathBuf {
        self.dir.join("storage")
    }

    fn import(&self, layer: &Path) -> Result<(), String> {
        self.podman(&["import", "-q", &layer.to_string_lossy(), "image"])
    }

    fn run(&self) -> Result<(), String> {
        let limits = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=10000:10000"];
        let run = ["run", "--rm", "--network", "none"];
        self.podman(&[&run[..], &limits, &["image", "/busybox", "true"]].concat())
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        // podman has it mounted on itself; without it there is nothing to unmount.
        rustix::mount::unmount(self.storage().join("overlay"), UnmountFlags::DETACH).ok();
    }
}
