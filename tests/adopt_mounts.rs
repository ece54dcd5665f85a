//! Adopting what real union file systems wrote: the kernel's overlayfs in its variants, and
//! fuse-overlayfs. What their mounts show, a mount of the adopted layers must show.
//!
//! All of it needs root, and fuse-overlayfs where that is meant.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[allow(dead_code)]
#[path = "support/foreign.rs"]
mod foreign;
#[allow(dead_code)]
#[path = "support/suite.rs"]
mod suite;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use foreign::{Bench, Layer};
use stratafs::{AdoptOptions, AdoptReport, ForeignFormat, Labels, LayerFormat, MountOptions};
use suite::{needs_root, trial};

fn main() {
    let kernel: [(&str, fn()); 6] = [
        ("overlayfs_with_renamed_directories_and_metacopies", kernel_renames),
        ("overlayfs_with_user_xattrs", kernel_user),
        ("overlayfs_with_whiteouts_in_xattrs", kernel_xattr_whiteouts),
        ("overlayfs_after_random_changes", kernel_random),
        ("overlayfs_without_redirects_after_random_changes", kernel_plain_random),
        ("overlayfs_with_user_xattrs_after_random_changes", kernel_user_random),
    ];
    let fuse: [(&str, fn()); 3] = [
        ("fuse_overlayfs", fuse_scripted),
        ("fuse_overlayfs_after_random_changes", fuse_random),
        ("fuse_overlayfs_without_devices_after_random_changes", fuse_named_random),
    ];
    let no_fuse = needs_root().or_else(needs_fuse_overlayfs);
    let kernel = kernel.into_iter().map(|(name, test)| trial(name, needs_root(), test));
    let fuse = fuse.into_iter().map(|(name, test)| trial(name, no_fuse.clone(), test));
    suite::run_one_by_one(kernel.chain(fuse).collect());
}

fn needs_fuse_overlayfs() -> Option<String> {
    let there = Command::new("fuse-overlayfs").arg("--version").output().is_ok()
        && Path::new("/dev/fuse").exists();
    (!there).then(|| "needs fuse-overlayfs and /dev/fuse".to_owned())
}

// --- mounts ------------------------------------------------------------------------------------

/// How the foreign layers are mounted.
#[derive(Clone, Copy)]
enum Engine {
    Kernel(&'static str),
    Fuse,
    /// Where devices cannot be made.
    FuseWithoutDevices,
}

impl Engine {
    fn format(self) -> ForeignFormat {
        match self {
            Engine::Kernel(options) if options.contains("userxattr") => ForeignFormat::OverlayUser,
            Engine::Kernel(_) => ForeignFormat::Overlay,
            Engine::Fuse | Engine::FuseWithoutDevices => ForeignFormat::FuseOverlayfs,
        }
    }
}

/// A foreign mount, unmounted when it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// `lowers` nearest first; with an upper it can be written to.
    fn new(engine: Engine, lowers: &[&Path], upper: Option<&Path>, at: &Path) -> Mounted {
        let mut options = OsString::from("lowerdir=");
        for (index, lower) in lowers.iter().enumerate() {
            if index > 0 {
                options.push(":");
            }
            options.push(lower);
        }
        if let Some(upper) = upper {
            let work = upper.with_extension("work");
            fs::create_dir_all(&work).unwrap();
            for (key, dir) in [(",upperdir=", upper), (",workdir=", &work)] {
                options.push(key);
                options.push(dir);
            }
        }
        fs::create_dir_all(at).unwrap();
        let mut command = match engine {
            Engine::Kernel(more) => {
                options.push(",");
                options.push(more);
                let mut command = Command::new("mount");
                command.args(["-t", "overlay", "overlay"]);
                command
            }
            Engine::Fuse => Command::new("fuse-overlayfs"),
            Engine::FuseWithoutDevices => {
                let mut command = Command::new("fuse-overlayfs");
                command.env("FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT", "y");
                command
            }
        };
        let done = command.arg("-o").arg(options).arg(at).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        Mounted(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).output().unwrap();
        assert!(done.status.success() || std::thread::panicking(), "{done:?}");
    }
}

/// A line for each path, with everything that must be the same.
fn view(root: &Path, links: bool) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let meta = fs::symlink_metadata(entry.path()).unwrap();
        let content = if meta.is_file() {
            format!("{:?}", String::from_utf8_lossy(&fs::read(entry.path()).unwrap()))
        } else if meta.is_symlink() {
            format!("{:?}", fs::read_link(entry.path()).unwrap())
        } else {
            String::new()
        };
        let links = if links && !meta.is_dir() { meta.nlink() } else { 0 };
        lines.push(format!(
            "{:?} {:o} {}:{} {:x} {links} {}.{:09} {content}",
            entry.path().strip_prefix(root).unwrap(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.rdev(),
            meta.mtime(),
            meta.mtime_nsec(),
        ));
    }
    lines.extend(foreign::xattrs(root));
    lines
}

/// Foreign layers, bottom first, and what a mount of the first so many shows.
struct Chain {
    bench: Bench,
    engine: Engine,
    layers: Vec<Layer>,
    links: bool,
    /// Of random changes.
    seed: Option<u64>,
}

impl Chain {
    fn new(engine: Engine, base: fn(&Layer)) -> Chain {
        let format = LayerFormat::OverlayTrusted;
        let mut chain = Chain {
            bench: Bench::new(format),
            engine,
            layers: Vec::new(),
            links: true,
            seed: None,
        };
        let layer = chain.bench.layer("layer-0");
        base(&layer);
        chain.layers.push(layer);
        chain
    }

    fn below(&self) -> Vec<&Path> {
        self.layers.iter().rev().map(|layer| layer.0.as_path()).collect()
    }

    /// Writes another layer through a mount.
    fn write(&mut self, change: impl FnOnce(&Layer)) {
        let upper = self.bench.layer(&format!("layer-{}", self.layers.len()));
        let at = self.bench.tmp.path().join("foreign");
        let mounted = Mounted::new(self.engine, &self.below(), Some(&upper.0), &at);
        change(&Layer(at));
        drop(mounted);
        self.layers.push(upper);
    }

    /// Adopts all layers, and compares what is seen through each; the reports, bottom first.
    #[track_caller]
    fn adopts_the_same(&self) -> Vec<AdoptReport> {
        let at = self.bench.tmp.path();
        let mut reports = Vec::new();
        let below = self.below();
        for (index, layer) in self.layers.iter().enumerate() {
            let lowers = &below[self.layers.len() - index..];
            // By the lower layers given, and by the parents: what is seen is the same.
            let mut options = AdoptOptions::new(self.engine.format());
            let by_parents = format!("parents-{index}");
            let parent = (index > 0).then(|| format!("parents-{}", index - 1));
            let adopted =
                self.bench.adopt_with(&by_parents, parent.as_deref(), layer, &options).unwrap();
            reports.push(adopted.report);
            let by_lowers = format!("lowers-{index}");
            if self.engine.format() != ForeignFormat::FuseOverlayfs {
                options.lowers = lowers.iter().map(|path| path.to_path_buf()).collect();
            }
            let parent = (index > 0).then(|| format!("lowers-{}", index - 1));
            self.bench.adopt_with(&by_lowers, parent.as_deref(), layer, &options).unwrap();

            let shown = match index {
                0 => view(&layer.0, self.links),
                _ => {
                    let upper = Some(layer.0.as_path());
                    let mounted = Mounted::new(self.engine, lowers, upper, &at.join("foreign"));
                    let shown = view(&mounted.0, self.links);
                    drop(mounted);
                    shown
                }
            };
            for name in [by_parents, by_lowers] {
                let key = format!("{name}-view");
                self.bench.store.view(&key, Some(&name), Labels::new()).unwrap();
                let target = at.join("ours");
                fs::create_dir_all(&target).unwrap();
                let options = MountOptions::default();
                let mut guard = self.bench.store.activate(&key, &target, &options).unwrap();
                let ours = view(guard.target(), self.links);
                guard.unmount().unwrap();
                same(&ours, &shown, &format!("{name}, of changes {:?}", self.seed));
            }
        }
        let problems = self.bench.store.check(&mut stratafs::ignore_progress).unwrap().problems;
        assert_eq!(problems, []);
        reports
    }
}

#[track_caller]
fn same(ours: &[String], theirs: &[String], what: &str) {
    let lost: Vec<_> = theirs.iter().filter(|line| !ours.contains(line)).collect();
    let new: Vec<_> = ours.iter().filter(|line| !theirs.contains(line)).collect();
    assert!(lost.is_empty() && new.is_empty(), "{what}\nlost: {lost:#?}\nnew: {new:#?}");
}

/// A tree with a bit of everything.
fn base(layer: &Layer) {
    layer.file("bin/tool", "tool").file("bin/other", "other").file("etc/conf", "conf");
    layer.file("etc/deep/er/file", "deep").file("etc/deep/second", "second").file("gone", "gone");
    layer.file("lib/a", "aaaa").dir("empty");
    layer.file("lib/inner/x", "x").file("lib/inner/y", "y").file("replaced/by/file", "");
    layer.file("turned", "into a directory");
    symlink("bin/tool", layer.path("link")).unwrap();
    layer.xattr("bin/tool", "user.mime", "text");
    fs::set_permissions(layer.path("bin/tool"), PermissionsExt::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(layer.path("etc/deep"), Some(7), Some(8)).unwrap();
}

/// The same with a file of two names: copied up under one, fuse-overlayfs mixes the two up.
fn linked_base(layer: &Layer) {
    base(layer);
    layer.hard_link("lib/a", "lib/b");
}

const REDIRECTS: &str = "redirect_dir=on,metacopy=on,index=off,xino=off";

fn chmod(layer: &Layer, path: &str, mode: u32) {
    fs::set_permissions(layer.path(path), PermissionsExt::from_mode(mode)).unwrap();
}

fn mv(layer: &Layer, from: &str, to: &str) {
    fs::rename(layer.path(from), layer.path(to)).unwrap();
}

// --- the kernel --------------------------------------------------------------------------------

fn kernel_renames() {
    let mut chain = Chain::new(Engine::Kernel(REDIRECTS), linked_base);
    chain.write(|l| {
        mv(l, "etc/deep", "etc/shallow");
        mv(l, "lib", "library");
        mv(l, "library/inner", "etc/inner");
        chmod(l, "bin/tool", 0o755);
        mv(l, "bin/tool", "bin/moved");
        chmod(l, "etc/shallow/er/file", 0o600);
        fs::remove_file(l.path("gone")).unwrap();
        fs::remove_dir_all(l.path("replaced")).unwrap();
        l.file("replaced", "a file");
        fs::remove_file(l.path("turned")).unwrap();
        l.file("turned/now", "a directory");
    });
    chain.write(|l| {
        mv(l, "etc/shallow", "elsewhere");
        mv(l, "library", "lib");
        mv(l, "elsewhere/er", "lib/er");
        chmod(l, "bin/moved", 0o700);
        fs::hard_link(l.path("bin/moved"), l.path("lib/linked")).unwrap();
        fs::remove_dir_all(l.path("etc/inner")).unwrap();
        l.file("etc/inner/anew", "anew");
        chmod(l, "lib/er/file", 0o640);
        l.file("lib/er/more", "more");
    });
    // Copied up from two layers, a name goes the way of its inode's first.
    chain.links = false;
    let reports = chain.adopts_the_same();
    assert_eq!(reports[0].redirects.count, 0);
    assert!(reports[1].redirects.count >= 3, "{}", reports[1]);
    assert!(reports[1].metacopies.count >= 2, "{}", reports[1]);
    assert!(reports[2].redirects.count >= 2, "{}", reports[2]);
    assert!(reports[2].metacopies.count >= 2, "{}", reports[2]);
    assert!(reports[1].whiteouts.count >= 3, "{}", reports[1]);
}

fn kernel_user() {
    let mut chain = Chain::new(Engine::Kernel("userxattr"), linked_base);
    chain.write(|l| {
        fs::remove_dir_all(l.path("etc")).unwrap();
        l.file("etc/new", "new");
        fs::remove_file(l.path("gone")).unwrap();
        fs::write(l.path("lib/a"), "changed").unwrap();
        l.xattr("etc/new", "user.own", "kept").xattr("etc/new", "trusted.own", "kept");
    });
    let reports = chain.adopts_the_same();
    assert_eq!(reports[1].whiteouts.count, 1);
    // The new directory, and the file turned one.
    assert_eq!(reports[1].opaque_directories.paths[0].as_bytes(), b"etc");
}

fn kernel_xattr_whiteouts() {
    let mut chain = Chain::new(Engine::Kernel(REDIRECTS), base);
    let layer = chain.bench.layer("layer-1");
    layer
        .file("etc/conf", "")
        .file("etc/deep/er/file", "")
        .file("etc/empty", "")
        .file("bin/x", "x");
    for dir in ["etc", "etc/deep/er"] {
        layer.xattr(dir, "trusted.overlay.opaque", "x");
    }
    layer.xattr("etc/conf", "trusted.overlay.whiteout", "y");
    layer.xattr("etc/deep/er/file", "trusted.overlay.whiteout", "");
    chain.layers.push(layer);
    // They are understood in lower layers alone.
    chain.write(|l| {
        l.file("top", "");
    });
    let format = ForeignFormat::Overlay;
    for (index, layer) in chain.layers.iter().enumerate() {
        let parent = index.checked_sub(1).map(|below| below.to_string());
        let options = AdoptOptions::new(format);
        let name = index.to_string();
        let adopted = chain.bench.adopt_with(&name, parent.as_deref(), layer, &options).unwrap();
        assert_eq!(adopted.report.xattr_whiteouts.count, if index == 1 { 2 } else { 0 });
    }
    let at = chain.bench.tmp.path();
    let mounted = Mounted::new(chain.engine, &chain.below(), None, &at.join("foreign"));
    chain.bench.store.view("view", Some("2"), Labels::new()).unwrap();
    fs::create_dir(at.join("ours")).unwrap();
    let options = MountOptions::default();
    let mut guard = chain.bench.store.activate("view", &at.join("ours"), &options).unwrap();
    same(&view(guard.target(), true), &view(&mounted.0, true), "xattr whiteouts");
    guard.unmount().unwrap();
}

fn kernel_random() {
    random(Engine::Kernel(REDIRECTS));
}

fn kernel_plain_random() {
    random(Engine::Kernel("redirect_dir=nofollow,metacopy=off,index=off"));
}

fn kernel_user_random() {
    random(Engine::Kernel("userxattr"));
}

// --- fuse-overlayfs ----------------------------------------------------------------------------

fn fuse_scripted() {
    for engine in [Engine::Fuse, Engine::FuseWithoutDevices] {
        let mut chain = Chain::new(engine, base);
        // It counts only the names that it has seen.
        chain.links = false;
        chain.write(|l| {
            fs::remove_file(l.path("gone")).unwrap();
            fs::remove_dir_all(l.path("etc")).unwrap();
            l.file("etc/new", "new");
            fs::write(l.path("lib/a"), "changed").unwrap();
            l.file("mine/f", "f");
            mv(l, "mine", "yours");
            mv(l, "bin/other", "bin/tool");
            chmod(l, "lib/inner", 0o700);
            symlink("nowhere", l.path("lib/dangling")).unwrap();
            fs::remove_file(l.path("turned")).unwrap();
            l.file("turned/now", "a directory");
        });
        chain.write(|l| {
            fs::remove_dir_all(l.path("yours")).unwrap();
            l.file("gone", "is back");
            fs::remove_file(l.path("lib/inner/x")).unwrap();
        });
        let reports = chain.adopts_the_same();
        assert!(reports[1].whiteouts.count >= 2, "{}", reports[1]);
        assert!(reports[1].opaque_directories.count >= 1, "{}", reports[1]);
        assert!(reports[2].whiteouts.count >= 2, "{}", reports[2]);
    }
}

fn fuse_random() {
    random(Engine::Fuse);
}

fn fuse_named_random() {
    random(Engine::FuseWithoutDevices);
}

// --- random changes ----------------------------------------------------------------------------

/// How many lives: more for a night.
const SEEDS: u64 = 4;

/// Three layers of random changes, some times.
fn random(engine: Engine) {
    for seed in 1..=SEEDS {
        let mut numbers = Numbers(seed);
        let links = matches!(engine, Engine::Kernel(_));
        let mut chain = Chain::new(engine, if links { linked_base } else { base });
        chain.links = false;
        chain.seed = Some(seed);
        for _ in 0..3 {
            chain.write(|layer| {
                for _ in 0..60 {
                    change(layer, &mut numbers, links);
                }
            });
        }
        chain.adopts_the_same();
    }
}

/// xorshift64*.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    /// Something that is there, or nearly.
    fn path(&mut self, root: &Path) -> PathBuf {
        let mut paths: Vec<PathBuf> = walkdir::WalkDir::new(root)
            .min_depth(1)
            .sort_by_file_name()
            .into_iter()
            .map(|entry| entry.unwrap().into_path())
            .collect();
        paths.push(root.join("new"));
        let path = paths[self.below(paths.len())].clone();
        match self.below(3) {
            0 => path.with_file_name(["a", "b", "c", "d"][self.below(4)]),
            1 => path.join(["a", "b", "c", "d"][self.below(4)]),
            _ => path,
        }
    }
}

/// One change; many cannot be done, and are not.
fn change(layer: &Layer, numbers: &mut Numbers, links: bool) {
    let (path, other) = (numbers.path(&layer.0), numbers.path(&layer.0));
    // Names that are taken, parents that are not there, links into nowhere, EXDEV.
    let _ = match numbers.below(12) {
        0 | 1 => fs::write(&path, format!("{}", numbers.below(1000))),
        2 | 3 => fs::create_dir(&path),
        4 => fs::remove_file(&path),
        5 if numbers.below(3) == 0 => fs::remove_dir_all(&path),
        5 => fs::remove_dir(&path),
        6..=8 => fs::rename(&path, &other),
        9 => {
            let mode = [0o700, 0o755, 0o711][numbers.below(3)];
            match fs::symlink_metadata(&path) {
                Ok(meta) if !meta.is_symlink() => {
                    fs::set_permissions(&path, PermissionsExt::from_mode(mode))
                }
                _ => Ok(()),
            }
        }
        10 if links => fs::hard_link(&path, &other),
        _ => symlink("target", &path),
    };
}
