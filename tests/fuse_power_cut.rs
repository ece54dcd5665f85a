//! A power cut loses nothing that was there before: after it each file is as it was at some moment since it was
//! last synced, whole, under one name; and data that nobody wrote are those of the lower layer.
//!
//! The upper lives on ext4, XFS and Btrfs. After each change the device is cloned as it is then: what the file
//! system still held in memory is not in the clone. Each clone is then mounted, which replays its journal, the
//! union is mounted on it, looked at, settled, and looked at again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod disk;
    pub mod suite;
    pub mod union_mount;
}

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use stratafs::LayerFormat;
use support::disk::{self, Host, Kind, Mounted};
use support::suite;
use support::union_mount::{Branches, Engine, Rng, UnionMount, asked_seed, full};

fn main() {
    support::union_mount::enter_own_mount_namespace();
    let mut trials = Vec::new();
    for kind in Kind::ALL {
        for format in [LayerFormat::OverlayTrusted, LayerFormat::Aufs] {
            let name =
                format!("a_power_cut_loses_nothing_on_{}_in_{}", kind.name(), format.as_str());
            let hindrance = kind.hindrance().or_else(Host::hindrance);
            trials.push(suite::trial(
                name,
                hindrance.or_else(|| Engine::Own.hindrance()),
                move || {
                    power_cuts(kind, format);
                },
            ));
        }
    }
    suite::run_one_by_one(trials);
}

const PAGE: usize = 4096;
const FILES: usize = 6;

/// A file at one moment.
#[derive(Clone, PartialEq, Eq)]
struct State {
    /// None: removed.
    path: Option<String>,
    mode: u32,
    content: Vec<u8>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} of mode {:o}, {} bytes", self.path, self.mode, self.content.len())
    }
}

impl State {
    fn page(&self, k: usize) -> Vec<u8> {
        page(&self.content, k)
    }
}

/// With zeros where it ends before.
fn page(content: &[u8], k: usize) -> Vec<u8> {
    let start = content.len().min(k * PAGE);
    let mut page = content[start..content.len().min((k + 1) * PAGE)].to_vec();
    page.resize(PAGE, 0);
    page
}

/// A file, and all that it has been since it was synced: the last is what it is.
#[derive(Clone, Debug)]
struct Life(Vec<State>);

impl Life {
    fn now(&self) -> &State {
        self.0.last().unwrap()
    }

    fn change(&mut self, change: impl FnOnce(&mut State)) {
        let mut state = self.now().clone();
        change(&mut state);
        self.0.push(state);
    }

    fn synced(&mut self) {
        self.0.drain(..self.0.len() - 1);
    }

    /// Whether what is found after a power cut may be.
    fn check(&self, kind: Kind, root: &Path) -> Result<(), String> {
        let paths: BTreeSet<_> = self.0.iter().filter_map(|state| state.path.clone()).collect();
        let stat = |path: &String| fs::symlink_metadata(root.join(path));
        let found: Vec<_> = paths.iter().filter(|path| stat(path).is_ok()).collect();
        let may_be_gone = self.0.iter().any(|state| state.path.is_none());
        let one = match &*found {
            [] => may_be_gone,
            [_] => true,
            // A file that was renamed may have both names there, on Btrfs itself as well.
            [first, rest @ ..] => {
                let ino = stat(first).unwrap().ino();
                kind == Kind::Btrfs && rest.iter().all(|path| stat(path).unwrap().ino() == ino)
            }
        };
        if !one {
            return Err(format!("of {paths:?} there are {found:?}"));
        }
        if found.is_empty() {
            return Ok(());
        }
        let path = root.join(found[0]);
        let meta = fs::symlink_metadata(&path).unwrap();
        if !self.0.iter().any(|state| state.mode == meta.mode() & 0o7777) {
            return Err(format!("{path:?} is of mode {:o}", meta.mode()));
        }
        let content = fs::read(&path).map_err(|e| format!("{path:?}: {e}"))?;
        if !self.0.iter().any(|state| state.content.len() == content.len()) {
            return Err(format!("{path:?} is of {} bytes", content.len()));
        }
        for k in 0..content.len().div_ceil(PAGE) {
            let mut found = page(&content, k);
            let is = |state: &State| {
                // What a longer one had there does not show.
                let mut page = state.page(k);
                let end = content.len().saturating_sub(k * PAGE).min(PAGE);
                page.truncate(end);
                found.truncate(end);
                page == found
            };
            if !self.0.iter().any(is) {
                return Err(format!("{path:?}: page {k} is none that ever was"));
            }
        }
        Ok(())
    }
}

/// A device as it was at one moment.
struct Clone {
    image: PathBuf,
    moment: String,
    allowed: Vec<Life>,
}

fn power_cuts(kind: Kind, format: LayerFormat) {
    let host = Host::new();
    let (image, at) = (host.path().join("image"), host.path().join("disk"));
    disk::make_image(kind, &image);
    let dir = suite::temp();
    let lower = dir.path().join("lower");
    let lives = make_lower(&lower);
    for clone in live(kind, format, &host, &image, &lower, lives) {
        let mounted = Mounted::image(kind, &clone.image, &at);
        let check = |when: &str| {
            let union = mount(&mounted, format, &lower, &dir.path().join("mount"));
            for life in &clone.allowed {
                if let Err(e) = life.check(kind, union.path()) {
                    panic!("cut after {}, {when}: {e}\n{life:?}", clone.moment);
                }
            }
            let (one, other) = (union.path().join("link-1"), union.path().join("link-2"));
            assert_eq!(fs::read(one).unwrap(), fs::read(other).unwrap(), "{}", clone.moment);
            union.unmount().unwrap();
        };
        check("mounted");
        let settled = Command::new(env!("CARGO_BIN_EXE_stratafs"))
            .arg("settle")
            .args(["--format", format.as_str(), "--lower"])
            .arg(&lower)
            .arg("--upper")
            .arg(mounted.path().join("upper"))
            .arg("--work")
            .arg(mounted.path().join("work"))
            .output()
            .unwrap();
        assert!(settled.status.success(), "cut after {}: {settled:?}", clone.moment);
        check("settled");
        drop(mounted);
        fs::remove_file(clone.image).unwrap();
    }
}

fn mount(disk: &Mounted, format: LayerFormat, lower: &Path, at: &Path) -> UnionMount {
    let upper = (disk.path().join("upper"), disk.path().join("work"));
    UnionMount::new(&Engine::Own, &Branches::new(vec![lower.to_owned()], Some(upper), format), at)
}

/// Files of bytes of their own, and one with two names.
fn make_lower(lower: &Path) -> Vec<Life> {
    fs::create_dir_all(lower.join("d")).unwrap();
    fs::write(lower.join("link-1"), vec![b'L'; 3 * PAGE]).unwrap();
    fs::hard_link(lower.join("link-1"), lower.join("link-2")).unwrap();
    let file = |k: usize| {
        let path = if k.is_multiple_of(2) { format!("f{k}") } else { format!("d/f{k}") };
        let content: Vec<u8> = (0..4 * PAGE + 100 * k).map(|i| (i / 7 + k) as u8 | 1).collect();
        fs::write(lower.join(&path), &content).unwrap();
        fs::set_permissions(lower.join(&path), fs::Permissions::from_mode(0o644)).unwrap();
        Life(vec![State { path: Some(path), mode: 0o644, content }])
    };
    (0..FILES).map(file).collect()
}

/// Makes changes, and clones the device after each.
fn live(
    kind: Kind,
    format: LayerFormat,
    host: &Host,
    image: &Path,
    lower: &Path,
    mut lives: Vec<Life>,
) -> Vec<Clone> {
    let mounted = Mounted::image(kind, image, &host.path().join("disk"));
    for dir in ["upper", "work"] {
        fs::create_dir(mounted.path().join(dir)).unwrap();
    }
    rustix::fs::syncfs(File::open(mounted.path()).unwrap()).unwrap();
    let union = mount(&mounted, format, lower, &host.path().join("mount"));
    let _watchdog = union.watchdog();
    let seed = asked_seed().unwrap_or(20_261_128);
    let mut rng = Rng(seed);
    let mut clones = Vec::new();
    for step in 0..if full() { 300 } else { 40 } {
        let k = usize::try_from(rng.below(FILES as u64)).unwrap();
        let (said, synced) = change(&mut rng, union.path(), &mut lives[k], step);
        if synced {
            lives[k].synced();
        }
        if rng.one_in(6) {
            let linked = File::options().write(true).open(union.path().join("link-2")).unwrap();
            linked.write_all_at(&[b'0' + (step % 10) as u8], 0).unwrap();
        }
        let to = host.path().join(format!("clone-{step}"));
        disk::clone_image(image, &to);
        let moment = format!("step {step} of seed {seed}, {said} of file {k}");
        clones.push(Clone { image: to, moment, allowed: lives.clone() });
    }
    union.unmount().unwrap();
    clones
}

/// One change; tells what it was, and whether it was synced.
fn change(rng: &mut Rng, root: &Path, life: &mut Life, step: u64) -> (&'static str, bool) {
    let Some(name) = life.now().path.clone() else { return ("nothing", false) };
    let path = root.join(&name);
    let open = || File::options().write(true).open(&path).unwrap();
    let sync = rng.one_in(3);
    let len = life.now().content.len();
    let said = match rng.below(12) {
        0..=2 => {
            // Within a page, of which the disk has all or nothing.
            let bytes = vec![b'a' + (step % 26) as u8; 1 + len % 50];
            let at = len.next_multiple_of(PAGE).max(PAGE) - PAGE;
            let at = if len % PAGE + bytes.len() > PAGE { at } else { len };
            open().write_all_at(&bytes, at as u64).unwrap();
            life.change(|state| {
                state.content.resize(len.max(at + bytes.len()), 0);
                state.content[at..at + bytes.len()].copy_from_slice(&bytes);
            });
            "append"
        }
        3..=5 => {
            let at = PAGE / 2;
            let byte = b'A' + (step % 26) as u8;
            open().write_all_at(&[byte], at as u64).unwrap();
            life.change(|state| {
                state.content.resize(len.max(at + 1), 0);
                state.content[at] = byte;
            });
            "write"
        }
        6..=8 => {
            let mode = 0o600 | u32::try_from(rng.below(64)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            life.change(|state| state.mode = mode);
            "chmod"
        }
        9..=10 => {
            let to = format!("{}renamed-{step}", if rng.one_in(2) { "d/" } else { "" });
            fs::rename(&path, root.join(&to)).unwrap();
            life.change(|state| state.path = Some(to));
            "rename"
        }
        _ if rng.one_in(3) => {
            fs::remove_file(&path).unwrap();
            life.change(|state| state.path = None);
            return ("unlink", false);
        }
        _ => {
            let size = PAGE * usize::try_from(rng.below(4)).unwrap() + 17;
            open().set_len(size as u64).unwrap();
            life.change(|state| state.content.resize(size, 0));
            "truncate"
        }
    };
    if sync {
        let now = life.now().path.clone().unwrap();
        File::open(root.join(now)).unwrap().sync_all().unwrap();
    }
    (said, sync)
}
