//! Unions of the same layers by stratafs over FUSE, by the kernel's overlayfs and by fuse-overlayfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags};
use stratafs::{FuseLayer, FuseMount, FuseMountOptions, LayerFormat, UpperDir};

use super::scratch::{empty, is_root};

/// What makes the union.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// This library over FUSE, served by this process.
    Ours,
    /// The same without the kernel's writeback.
    OursWithoutWriteback,
    /// The same, whose threads sleep as soon as they have answered.
    OursWithoutPolling,
    /// The same, which never waits for the disk.
    OursVolatile,
    /// The kernel's overlayfs, for root.
    Kernel,
    /// The same, which never waits for the disk.
    KernelVolatile,
    /// The same, which copies no data for changes of attributes.
    KernelMetacopy,
    /// The program in PATH.
    FuseOverlayfs,
}

impl Maker {
    /// Those that can be tried here; says which others are skipped, and why.
    pub fn all() -> Vec<Maker> {
        let mut makers = vec![Maker::Ours, Maker::OursWithoutPolling, Maker::OursWithoutWriteback];
        if is_root() {
            makers.push(Maker::Kernel);
        } else {
            println!("skipped: kernel: needs root");
        }
        if super::peers::find("fuse-overlayfs").is_some() {
            makers.push(Maker::FuseOverlayfs);
        }
        makers
    }

    /// Of those, the ones that differ in how they copy up.
    pub fn that_copy_up() -> Vec<Maker> {
        let mut makers = Maker::all();
        makers.retain(|maker| {
            !matches!(maker, Maker::OursWithoutWriteback | Maker::OursWithoutPolling)
        });
        makers.insert(1, Maker::OursVolatile);
        if makers.contains(&Maker::Kernel) {
            makers.extend([Maker::KernelVolatile, Maker::KernelMetacopy]);
        }
        makers
    }

    /// As it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Maker::Ours => super::table::OURS,
            Maker::OursWithoutWriteback => "writeback off",
            Maker::OursWithoutPolling => "busy_poll 0",
            Maker::OursVolatile => "stratafs volatile",
            Maker::Kernel => "kernel",
            Maker::KernelVolatile => "kernel volatile",
            Maker::KernelMetacopy => "kernel metacopy",
            Maker::FuseOverlayfs => "fuse-overlayfs",
        }
    }
}

/// A union that is mounted. Dropped, it is unmounted.
pub struct Mounted {
    target: PathBuf,
    ours: Option<FuseMount>,
}

impl Mounted {
    /// Mounts `lowers`, the topmost first, with an empty upper, all in `dir`.
    pub fn new(maker: Maker, lowers: &[PathBuf], dir: &Path) -> Result<Mounted, String> {
        let [upper, work, target] = ["upper", "work", "mnt"].map(|name| dir.join(name));
        for dir in [&upper, &work, &target] {
            empty(dir);
        }
        let ours = match maker {
            Maker::Ours
            | Maker::OursWithoutWriteback
            | Maker::OursWithoutPolling
            | Maker::OursVolatile => {
                let format =
                    if is_root() { LayerFormat::OverlayTrusted } else { LayerFormat::OverlayUser };
                let mut options = FuseMountOptions::new(format);
                let layer = |dir: &PathBuf| FuseLayer { dir: dir.clone(), format };
                options.lowers = lowers.iter().map(layer).collect();
                options.upper = Some(UpperDir { dir: upper, work });
                options.writeback = maker != Maker::OursWithoutWriteback;
                options.volatile = maker == Maker::OursVolatile;
                if maker == Maker::OursWithoutPolling {
                    options.busy_poll = std::time::Duration::ZERO;
                }
                Some(FuseMount::new(&target, &options).map_err(|e| e.to_string())?)
            }
            _ => {
                let lowers: Vec<_> = lowers.iter().map(|dir| dir.to_string_lossy()).collect();
                let more = match maker {
                    Maker::KernelVolatile => ",volatile",
                    Maker::KernelMetacopy => ",metacopy=on,redirect_dir=on",
                    _ => "",
                };
                let options = format!(
                    "lowerdir={},upperdir={},workdir={}{more}",
                    lowers.join(":"),
                    upper.display(),
                    work.display()
                );
                if maker != Maker::FuseOverlayfs {
                    let options = std::ffi::CString::new(options).expect("no NUL");
                    let flags = MountFlags::empty();
                    rustix::mount::mount("overlay", &target, "overlay", flags, options.as_c_str())
                        .map_err(|e| e.to_string())?;
                } else {
                    let mut program = Command::new("fuse-overlayfs");
                    let output = program.arg("-o").arg(options).arg(&target).output();
                    let output = output.map_err(|e| e.to_string())?;
                    if !output.status.success() {
                        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
                    }
                }
                None
            }
        };
        Ok(Mounted { target, ours })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.target
    }

    /// How many requests the kernel has sent to us, but those for which nobody waits.
    pub fn requests(&self) -> Option<u64> {
        let counts = self.ours.as_ref()?.requests();
        Some(counts.iter().filter(|(kind, _)| *kind != "forget").map(|(_, n)| n).sum())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = match &mut self.ours {
            Some(mount) => mount.unmount(false).map_err(|e| e.to_string()),
            None if is_root() => rustix::mount::unmount(&self.target, UnmountFlags::empty())
                .map_err(|e| e.to_string()),
            None => match Command::new("fusermount3").arg("-u").arg(&self.target).status() {
                Ok(status) if status.success() => Ok(()),
                other => Err(format!("fusermount3: {other:?}")),
            },
        };
        if let Err(e) = done {
            println!("cannot unmount {}: {e}", self.target.display());
        }
    }
}

/// Makes lower layers of what there is to do in them: `t` with small files in directories, a tenth of
/// them again in the topmost of the two; `cu` with files of 16 KiB; `ren` with directories; `big`.
pub fn lowers(dir: &Path, files: usize, big: usize) -> Vec<PathBuf> {
    let bytes: Vec<u8> =
        (0..1 << 16).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let put = |path: PathBuf, len: usize| {
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, &bytes[..len]).expect("a file");
    };
    let [lower, upper] = ["l1", "l2"].map(|name| dir.join(name));
    for i in 0..files {
        let name = format!("t/{}/file-{i}.txt", i / 100);
        let len = [100, 1000, 2000, 4096, 8192, 20_000][i % 6];
        put(lower.join(&name), len);
        if i % 10 == 0 {
            put(upper.join(&name), len);
        }
        if i % 4 == 0 {
            put(lower.join(format!("cu/file-{i}")), 1 << 14);
        }
        if i % 40 == 0 {
            put(lower.join(format!("ren/{i}/sub/file")), 100);
        }
    }
    fs::write(lower.join("big"), bytes.repeat(big >> 16)).expect("a large file");
    vec![upper, lower]
}

/// So many layers, in which directories merge: each has files of its own in the same ten directories.
pub fn many(dir: &Path, layers: usize, files: usize) -> Vec<PathBuf> {
    let layer = |n: usize| dir.join(format!("layer-{n}"));
    for i in 0..files {
        let path = layer(i % layers).join(format!("t/{}/file-{i}", i % 10));
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, "").expect("a file");
    }
    (0..layers).map(layer).collect()
}
