//! What was done stays done when the union is mounted again: after it was unmounted, after its server was
//! killed, and after its layer was settled. fsx and pjdfstest with mounts between, and an fsx of our own that
//! knows what each file must hold from one mount to the next.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod calls;
    pub mod pjdfstest;
    pub mod suite;
    pub mod union_mount;
    pub mod whole_tree;
}

mod remounts {
    pub mod exerciser;
}

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use remounts::exerciser::{Exerciser, Open};
use stratafs::LayerFormat;
use support::pjdfstest::{self, Outcomes, those};
use support::suite;
use support::union_mount::{self, Branches, Engine, Rng, UnionMount, asked_seed, full};
use support::whole_tree::{self, assert_same};

fn main() {
    union_mount::enter_own_mount_namespace();
    // pjdfstest has others go through its directories.
    rustix::process::umask(0o022.into());
    let hindrance = Engine::Own.hindrance();
    let mut trials = Vec::new();
    for format in [LayerFormat::OverlayTrusted, LayerFormat::OverlayUser, LayerFormat::Aufs] {
        for (name, more) in
            [("", ""), ("_without_writeback", ",writeback=0"), ("_copied_whole", ",metacopy=off")]
        {
            if format == LayerFormat::Aufs && more == ",metacopy=off" {
                // It has no others.
                continue;
            }
            let name = format!("files_hold_what_was_written{name}::{format}");
            trials.push(suite::trial(name, hindrance.clone(), move || {
                let seeds = if full() { 10 } else { 2 };
                match asked_seed() {
                    Some(seed) => exercise(format, more, seed),
                    None => (0..seeds).for_each(|seed| exercise(format, more, seed)),
                }
            }));
        }
    }
    trials.push(suite::trial(
        "fsx_on_what_it_left_before",
        pjdfstest::hindrance("fsx", &hindrance),
        fsx,
    ));
    for (name, format) in [
        ("pjdfstest_with_kills_between_its_groups", LayerFormat::OverlayTrusted),
        ("pjdfstest_with_kills_between_its_groups_on_an_aufs_upper", LayerFormat::Aufs),
    ] {
        let hindrance = pjdfstest::hindrance("pjdfstest", &hindrance);
        trials.push(suite::trial(name, hindrance, move || groups(format)));
    }
    suite::run_one_by_one(trials);
}

/// Layers, and where they are mounted.
struct Stage {
    dir: tempfile::TempDir,
    branches: Branches,
}

impl Stage {
    /// With two lower layers, in memory if that can be.
    fn new(format: LayerFormat, more: &str) -> Stage {
        Stage::inside(suite::temp(), format, more)
    }

    /// The same on the disk of `/var/tmp`; in memory, where that is a union itself.
    fn on_disk(format: LayerFormat) -> Stage {
        const OVERLAYFS_SUPER_MAGIC: i64 = 0x794c_7630;
        let kind = rustix::fs::statfs("/var/tmp").unwrap().f_type;
        let place = if kind == OVERLAYFS_SUPER_MAGIC { "/dev/shm" } else { "/var/tmp" };
        Stage::inside(tempfile::tempdir_in(place).unwrap(), format, "")
    }

    fn inside(dir: tempfile::TempDir, format: LayerFormat, more: &str) -> Stage {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let lowers = vec![path("lower0"), path("lower1")];
        let mut branches = Branches::new(lowers, Some((path("upper"), path("work"))), format);
        branches.more = more.to_owned();
        Stage { dir, branches }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn lower(&self) -> &Path {
        &self.branches.lowers[0]
    }

    #[track_caller]
    fn mount(&self) -> UnionMount {
        UnionMount::new(&Engine::Own, &self.branches, &self.path("mount"))
    }

    /// With all that other engines have of the upper by itself.
    #[track_caller]
    fn mount_by_the_kernel(&self) -> UnionMount {
        let mut branches = self.branches.clone();
        branches.redirects = false;
        UnionMount::new(&Engine::Kernel, &branches, &self.path("mount"))
    }

    #[track_caller]
    fn settle(&self) {
        let (upper, work) = self.branches.upper.as_ref().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_stratafs"));
        command.arg("settle").args(["--format", self.branches.format.as_str()]);
        for lower in &self.branches.lowers {
            command.arg("--lower").arg(lower);
        }
        command.arg("--upper").arg(upper).arg("--work").arg(work);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

// --- our own fsx ---------------------------------------------------------------------------------

/// How a mount ends, and what is done before the next.
#[derive(Clone, Copy, Debug)]
enum End {
    Unmounted,
    /// The server was killed when all was synced.
    Killed,
    /// The server was killed when nothing was.
    KilledUnsynced,
    Settled,
    /// It does not; the kernel forgets what it knew of it.
    Forgotten,
}

fn exercise(format: LayerFormat, more: &str, seed: u64) {
    const ENDS: &[End] =
        &[End::Unmounted, End::Killed, End::KilledUnsynced, End::Settled, End::Forgotten];
    let stage = Stage::new(format, more);
    let lowers: Vec<_> = stage.branches.lowers.iter().map(PathBuf::as_path).collect();
    let mut exerciser = Exerciser::new(seed, format != LayerFormat::Aufs, &lowers);
    let untouched: Vec<_> = lowers.iter().map(|lower| whole_tree::lines(lower)).collect();
    let mut rng = Rng(!seed);
    let mut mount = stage.mount();
    let (rounds, operations) = if full() { (20, 100) } else { (12, 60) };
    for round in 0..rounds {
        let end = rng.pick(ENDS);
        let told = std::panic::AssertUnwindSafe(&mut exerciser);
        let mut open = Open::new();
        let done = std::panic::catch_unwind({
            let (mount, open) = (&mount, std::panic::AssertUnwindSafe(&mut open));
            move || {
                let (exerciser, open) = ({ told }.0, { open }.0);
                let _watchdog = mount.watchdog();
                exerciser.work(mount.path(), operations, open);
                if matches!(end, End::Killed) {
                    exerciser.sync(mount.path());
                }
            }
        });
        let fail = |exerciser: &Exerciser, problems: &str| -> ! {
            panic!(
                "STRATAFS_SEED={seed}, round {round}, {end:?}: {problems}\n{}",
                exerciser.told.join("\n")
            )
        };
        if done.is_err() {
            fail(&exerciser, "an operation failed");
        }
        exerciser.told.push(format!("{end:?}"));
        match end {
            End::Unmounted | End::Settled => {
                drop(open);
                mount.unmount().unwrap();
                exerciser.handed_over();
                if matches!(end, End::Settled) {
                    stage.settle();
                    if format == LayerFormat::OverlayTrusted {
                        let kernels = stage.mount_by_the_kernel();
                        let found = exerciser.check(kernels.path());
                        if !found.is_empty() {
                            fail(&exerciser, &format!("shown by the kernel: {found:#?}"));
                        }
                        kernels.unmount().unwrap();
                    }
                }
                mount = stage.mount();
            }
            End::Killed | End::KilledUnsynced => {
                mount.crash();
                drop(open);
                mount = stage.mount();
            }
            End::Forgotten => {
                drop(open);
                mount.forget().unwrap();
            }
        }
        let found = exerciser.check(mount.path());
        if !found.is_empty() {
            fail(&exerciser, &format!("{found:#?}"));
        }
    }
    mount.unmount().unwrap();
    for (lower, before) in lowers.iter().zip(untouched) {
        assert_same("a lower layer", &before, &whole_tree::lines(lower));
    }
}

// --- fsx -----------------------------------------------------------------------------------------

/// fsx begins with what it left in the mount before, and with a file of a lower layer.
fn fsx() {
    const LENGTH: usize = 131_072;
    let stage = Stage::new(LayerFormat::OverlayTrusted, "");
    let rounds = if full() { 30 } else { 6 };
    let operations = if full() { 5_000 } else { 1_500 };
    let seed = asked_seed().unwrap_or(20_231_118);
    let settings = stage.path("fsx.toml");
    let configuration = format!(
        "flen = {LENGTH}\n[opsize]\nmin = 1\nmax = 65536\n[weights]\nclose_open = 10\nread = 10\n\
         write = 10\nmapread = 10\nmapwrite = 10\ninvalidate = 10\ntruncate = 10\nfsync = 1\n\
         fdatasync = 1\nposix_fallocate = 10\npunch_hole = 5\nsendfile = 5\nposix_fadvise = 5\n\
         copy_file_range = 5\n"
    );
    fs::write(&settings, configuration).unwrap();
    let names: Vec<_> = (0..rounds).map(|n| format!("file{n}")).collect();
    for name in &names {
        fs::write(stage.lower().join(name), vec![b'l'; LENGTH]).unwrap();
    }
    let mut mount = stage.mount();
    for round in 0..names.len() {
        for (n, name) in [&names[0], &names[round]].into_iter().enumerate() {
            let seed = (seed + 2 * round as u64 + n as u64).to_string();
            let output = Command::new(pjdfstest::find("fsx").unwrap())
                .args(["-S", &seed, "-N", &operations.to_string(), "-f"])
                .arg(&settings)
                .arg("-P")
                .arg(stage.dir.path())
                .arg(mount.path().join(name))
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "-S {seed}, round {round}, {name}: {text}");
        }
        let contents = |at: &Path| -> Vec<Vec<u8>> {
            names.iter().map(|name| fs::read(at.join(name)).unwrap()).collect()
        };
        let good = contents(mount.path());
        match round % 3 {
            0 => {
                for name in &names {
                    File::open(mount.path().join(name)).unwrap().sync_all().unwrap();
                }
                mount.crash();
            }
            1 => mount.unmount().unwrap(),
            _ => {
                mount.unmount().unwrap();
                stage.settle();
            }
        }
        mount = stage.mount();
        for (name, (good, shown)) in names.iter().zip(good.iter().zip(contents(mount.path()))) {
            assert!(*good == shown, "round {round}, {name}: other bytes than before");
        }
    }
    mount.unmount().unwrap();
}

// --- pjdfstest -----------------------------------------------------------------------------------

/// Skipped on FUSE: it has no pathconf that would tell how many links a file may have.
const SKIPPED: &[&str] = &["link::link_count_max"];

/// Each group of its tests in a mount whose server was killed after the group before.
fn groups(format: LayerFormat) {
    let stage = Stage::on_disk(format);
    let tools = stage.path("tools");
    fs::create_dir(&tools).unwrap();
    let run = |at: &Path, group: Option<&str>| pjdfstest::outcomes(at, &tools, group);
    let plain = stage.path("plain");
    fs::create_dir(&plain).unwrap();
    let plain = run(&plain, None);
    let kernel = if format == LayerFormat::OverlayTrusted {
        let stage = Stage::on_disk(format);
        fs::create_dir(stage.lower().join("tests")).unwrap();
        let mount = stage.mount_by_the_kernel();
        let outcomes = run(&mount.path().join("tests"), None);
        mount.unmount().unwrap();
        outcomes
    } else {
        Outcomes::new()
    };
    fs::create_dir(stage.lower().join("tests")).unwrap();
    make_others(&stage.lower().join("others"));
    let mut rng = Rng(asked_seed().unwrap_or(7));
    let mut shown = Outcomes::new();
    let mut mount = stage.mount();
    let of = |name: &str| name.split("::").next().unwrap().to_owned();
    let all: BTreeSet<String> = plain.keys().map(|name| of(name)).collect();
    let repeated = if full() { 10 } else { 1 };
    for group in (0..repeated).flat_map(|_| &all) {
        let outcomes = run(&mount.path().join("tests"), Some(&format!("{group}::")));
        shown.extend(outcomes.into_iter().filter(|(name, _)| of(name) == *group));
        change_others(&mount.path().join("others"), &mut rng);
        let before = lines(&stage, mount.path());
        mount.crash();
        mount = stage.mount();
        assert_same(&format!("after {group}"), &before, &lines(&stage, mount.path()));
    }
    assert_eq!(shown.len(), plain.len(), "all were run");
    for (what, tolerated) in [("FAILED", &[][..]), ("skipped", SKIPPED)] {
        let mut names = those(&shown, what);
        for reference in [&plain, &kernel] {
            names = names.difference(&those(reference, what)).cloned().collect();
        }
        names.retain(|name| !tolerated.contains(&name.as_str()));
        let told: Vec<_> = names.iter().map(|name| format!("{name}: {}", shown[name])).collect();
        assert!(told.is_empty(), "beyond plain and kernel's overlayfs: {told:#?}");
    }
    mount.unmount().unwrap();
}

/// A tree, with the link counts of what is in the upper. Those of what is in a lower layer count there, too,
/// what was removed before the union was mounted: a known difference.
fn lines(stage: &Stage, root: &Path) -> Vec<String> {
    let (upper, _) = stage.branches.upper.as_ref().unwrap();
    let entries = walkdir::WalkDir::new(root).sort_by_file_name();
    let paths = entries.into_iter().map(|entry| entry.unwrap().into_path());
    paths
        .map(|path| {
            let name = path.strip_prefix(root).unwrap();
            let counted = fs::symlink_metadata(upper.join(name))
                .and_then(|_| fs::symlink_metadata(&path))
                .map_or(0, |meta| if meta.is_dir() { 0 } else { meta.nlink() });
            format!("{} {counted} {}", name.display(), whole_tree::line(&path))
        })
        .collect()
}

/// Files and directories that pjdfstest leaves alone.
fn make_others(others: &Path) {
    for n in 0..12 {
        let dir = others.join(format!("d{n}/sub"));
        fs::create_dir_all(&dir).unwrap();
        for (name, length) in [("f", 10), ("g", 5_000 * n)] {
            fs::write(dir.join(name), vec![b'o'; length]).unwrap();
        }
        fs::hard_link(dir.join("f"), others.join(format!("d{n}/link"))).unwrap();
        symlink("f", dir.join("symlink")).unwrap();
    }
}

/// Changes some of them; what cannot be done to one of them is not done.
fn change_others(others: &Path, rng: &mut Rng) {
    use support::calls;
    for n in 0..20 {
        let entries = walkdir::WalkDir::new(others).min_depth(1).sort_by_file_name();
        let paths: Vec<_> = entries.into_iter().map(|entry| entry.unwrap().into_path()).collect();
        let at = |rng: &mut Rng| usize::try_from(rng.below(paths.len() as u64)).unwrap();
        let (path, to) = (&paths[at(rng)], &paths[at(rng)]);
        let new = to.parent().unwrap().join(format!("new{n}-{}", rng.below(1_000_000)));
        let meta = fs::symlink_metadata(path).unwrap();
        let _may_fail = match rng.below(9) {
            0 if !meta.is_symlink() => {
                fs::set_permissions(path, fs::Permissions::from_mode(0o711)).is_ok()
            }
            1 => std::os::unix::fs::lchown(path, Some(33), Some(44)).is_ok(),
            2 if !meta.is_symlink() => calls::set_xattr(path, "user.note", b"other").is_ok(),
            3 | 4 => fs::rename(path, &new).is_ok(),
            5 => fs::hard_link(path, &new).is_ok(),
            6 if meta.is_file() => {
                let file = File::options().write(true).open(path).unwrap();
                file.set_len(rng.below(9_000)).unwrap();
                file.sync_all().is_ok()
            }
            7 if !meta.is_dir() => fs::remove_file(path).is_ok(),
            8 => {
                fs::write(&new, "new").unwrap();
                File::open(&new).unwrap().sync_all().is_ok()
            }
            _ => fs::create_dir(&new).is_ok(),
        };
    }
}
