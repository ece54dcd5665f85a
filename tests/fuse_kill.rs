//! The server is killed in the middle of random operations: the upper mounts again, with every operation
//! on names that had returned, and all data that was closed or fsynced; nothing is half done.
//!
//! What the kernel had not yet handed over may be lost, page by page, as at a power cut. The operation
//! that was under way is done or not done.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod suite;
    pub mod union_mount;
}
mod union_model {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod choose;
    pub mod compare;
    pub mod files;
    pub mod hands;
    pub mod layers;
    pub mod model;
    pub mod names;
    pub mod ops;
}

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use stratafs::{LayerFormat, Owners};
use support::suite;
use support::union_mount::{Branches, Engine, Rng, UnionMount, asked_seed, full};
use union_model::choose::Chooser;
use union_model::compare::{self, Numbered, Numbers};
use union_model::hands::Hands;
use union_model::layers::{self, Whiteouts};
use union_model::model::{Expected, Id, Model, ROOT, Rules, What, ZeroDevices};
use union_model::ops::{How, Op, Outcome, runs};

fn main() {
    support::union_mount::enter_own_mount_namespace();
    let engine = Engine::under_test();
    let hindrance = match engine {
        Engine::Kernel => Some("the kernel cannot be killed".to_owned()),
        _ => engine.hindrance(),
    };
    let mut trials = Vec::new();
    for format in [LayerFormat::OverlayTrusted, LayerFormat::OverlayUser, LayerFormat::Aufs] {
        for (name, moment) in
            [("killed_between_operations", Moment::Between), ("killed_at_work", Moment::During)]
        {
            let engine = engine.clone();
            let trial = move || {
                let rounds = if full() { 300 } else { 25 };
                for i in 0..rounds {
                    let seed = asked_seed().unwrap_or(i);
                    round(&engine, format, moment, seed)
                        .unwrap_or_else(|e| panic!("STRATAFS_SEED={seed}: {e}"));
                }
            };
            trials.push(suite::trial(format!("{name}::{format}"), hindrance.clone(), trial));
        }
    }
    suite::run_one_by_one(trials);
}

/// When the server is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// When it has nothing to do.
    Between,
    /// A little after an operation was begun; it may be the next when it dies.
    During,
}

/// Contents that a file may have, since the kernel may not have handed over the last: what is certain
/// comes first.
type Versions = BTreeMap<Id, Vec<Vec<u8>>>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    Alive,
    /// About to be killed, or dead.
    Doomed,
}

/// A state that the union may be in.
#[derive(Clone)]
struct State {
    model: Model,
    versions: Versions,
}

impl State {
    /// Notes what an operation may have written.
    fn note(&mut self, before: &Model, op: &Op) {
        for (id, now) in self.model.files() {
            let old = before.content(id);
            if old == Some(now) {
                continue;
            }
            let versions = self.versions.entry(id).or_default();
            if versions.is_empty() {
                versions.push(old.cloned().unwrap_or_default());
            }
            let emptied = match op {
                Op::Put { how, .. } | Op::Open { how, .. } => *how == How::Truncate,
                _ => false,
            };
            if emptied {
                versions.push(Vec::new());
            }
            versions.push(now.clone());
        }
    }

    /// A copy that comes into a directory changes its time, which is put back right after that.
    fn forget_dir_times(&mut self, touched: &[PathBuf]) {
        for path in touched {
            for dir in path.ancestors().skip(1) {
                let root = dir.as_os_str().is_empty().then_some(ROOT);
                if let Some(id) = root.or_else(|| self.model.id_at(dir)) {
                    self.model.inode_mut(id).mtime = None;
                }
            }
        }
    }

    /// An operation has returned: what must have been handed over by then is certain. Of a server that
    /// may have been dead already, nothing is learned by closing a file: the kernel drops what it cannot
    /// hand over, and only sometimes says so.
    fn settle(&mut self, before: &State, op: &Op, slot_id: Option<Id>, server: Server) {
        match op {
            Op::Put { .. } | Op::Close { .. } if server == Server::Doomed => {}
            Op::Put { path, .. } => {
                if let Some(id) = self.model.id_at(path) {
                    self.versions.remove(&id);
                }
            }
            Op::Sync { .. } | Op::Close { .. } => {
                if let Some(id) = slot_id {
                    self.versions.remove(&id);
                }
            }
            // These are handed over at once; but not what was written before them.
            Op::Truncate { .. } | Op::Allocate { .. } | Op::Open { .. } | Op::CopyRange { .. } => {
                self.versions.retain(|id, _| before.versions.contains_key(id));
            }
            _ => {}
        }
    }
}

fn round(engine: &Engine, format: LayerFormat, moment: Moment, seed: u64) -> Result<(), String> {
    let mut chooser = Chooser {
        rng: Rng(seed ^ 0x6b69_6c6c),
        long_names: format != LayerFormat::Aufs,
        switches: false,
        there: Vec::new(),
        open: Vec::new(),
    };
    let rules = Rules {
        format,
        owners: Owners::OfFiles,
        redirects: format != LayerFormat::Aufs,
        // The kernel is asked, too.
        zero_devices: ZeroDevices::Untried,
    };
    let count = 1 + usize::try_from(chooser.rng.below(2)).unwrap();
    let lines = layers::random_lines(&mut chooser, count);
    let temp = suite::temp();
    let dir = temp.path();
    let (lowers, model) = layers::build(&lines, count, dir, rules, Whiteouts::InMerged);
    let (upper, work) = (dir.join("upper"), dir.join("work"));
    for made in [&upper, &work] {
        std::fs::create_dir(made).unwrap();
        rustix::fs::chmod(made, rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    }
    let branches = Branches::new(lowers, Some((upper, work.clone())), format);
    let at = dir.join("mount");
    let ops = chooser.ops(200, model.clone());
    let last = usize::try_from(chooser.rng.below(150)).unwrap();
    let delay = chooser.rng.below(200_000);
    let mount = UnionMount::try_new(engine, &branches, &at)?;
    let done: Vec<&Op> = ops.iter().filter(|op| !matches!(op, Op::Remount | Op::Forget)).collect();
    let (states, told) = live(&mount, model, &done, last, moment, delay)?;
    mount.crash();

    let mount = UnionMount::try_new(engine, &branches, &at)?;
    let check = |by: &str| {
        let mut problems = String::new();
        for state in &states {
            match differences(&at, state.clone()) {
                found if found.is_empty() => return Ok(()),
                found => problems += &format!("\n  {}", found.join("\n    ")),
            }
        }
        Err(format!("{told}\nof {} states it is in none, by {by}:{problems}", states.len()))
    };
    check("itself")?;
    mount.unmount()?;
    let left = compare::leftovers(&work);
    if !left.is_empty() {
        return Err(format!("{told}\nleft in the work directory: {left:?}"));
    }
    if format == LayerFormat::OverlayTrusted {
        let branches = Branches { metacopy: true, ..branches };
        let _mount = UnionMount::try_new(&Engine::Kernel, &branches, &at)?;
        check("the kernel")?;
    }
    Ok(())
}

/// Carries out operations until the server is dead; the states that it may be in then, and a text for
/// who must find out what went wrong.
fn live(
    mount: &UnionMount,
    model: Model,
    ops: &[&Op],
    last: usize,
    moment: Moment,
    delay: u64,
) -> Result<(Vec<State>, String), String> {
    let mut hands = Hands::new(mount.path());
    let mut state = State { model, versions: Versions::new() };
    let pid = Pid::from_raw(mount.server().unwrap().try_into().unwrap()).unwrap();
    let (kill, order) = channel::<()>();
    let mut told = String::from("operations:");
    let doomed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let doomed = &doomed;
        scope.spawn(move || {
            if order.recv().is_ok() {
                for _ in 0..delay {
                    std::hint::spin_loop();
                }
                doomed.store(true, Ordering::SeqCst);
                kill_process(pid, Signal::KILL).unwrap();
            }
        });
        for (i, op) in ops.iter().enumerate() {
            if i == last {
                match moment {
                    Moment::Between => break,
                    Moment::During => kill.send(()).unwrap(),
                }
            }
            let before = state.clone();
            let slot_id = match op {
                Op::Sync { slot } | Op::Close { slot } => state.model.open_id(*slot),
                _ => None,
            };
            let expected = state.model.carry_out(op);
            if expected == Expected::Skip {
                continue;
            }
            state.note(&before.model, op);
            let outcome = hands.carry_out(op);
            told += &format!("\n  {i:4} {op:?}: {}", short(&outcome));
            if i >= last && died(&outcome) {
                let mut states = vec![before, state];
                let touched: Vec<_> =
                    states.iter().flat_map(|state| state.model.paths_of(op)).collect();
                for state in &mut states {
                    state.forget_dir_times(&touched);
                }
                return Ok((states, told));
            }
            if !expected.allows(&outcome) {
                return Err(format!("{told}\n{outcome:?}, must be {expected}"));
            }
            // Reads and lists are answered by the kernel after the server is dead, and so are the
            // closing of a file to which nothing was written, and writes.
            if !matches!(outcome, Outcome::Failed(_)) {
                let server = match doomed.load(Ordering::SeqCst) {
                    false => Server::Alive,
                    true => Server::Doomed,
                };
                state.settle(&before, op, slot_id, server);
            }
        }
        drop(kill);
        Ok((vec![state], told))
    })
}

fn short(outcome: &Outcome) -> String {
    let text = format!("{outcome:?}");
    text.chars().take(60).collect()
}

fn died(outcome: &Outcome) -> bool {
    const ERRORS: &[Errno] = &[Errno::NOTCONN, Errno::CONNABORTED, Errno::IO];
    matches!(outcome, Outcome::Failed(errno) if ERRORS.contains(errno))
}

/// What is otherwise than in this state.
fn differences(mount: &Path, mut state: State) -> Vec<String> {
    let mut found = Vec::new();
    for path in state.model.paths() {
        let Some(id) = state.model.id_at(&path) else { continue };
        let Some(versions) = state.versions.get(&id) else { continue };
        let Ok(bytes) = std::fs::read(mount.join(&path)) else { continue };
        if !is_made_of(&bytes, versions) {
            let versions: Vec<_> = versions.iter().map(|bytes| runs(bytes)).collect();
            found.push(format!(
                "{path:?} holds {}, which is made of none of {versions:#?}",
                runs(&bytes)
            ));
        }
        let inode = state.model.inode_mut(id);
        (inode.what, inode.mtime) = (What::File(bytes), None);
    }
    let numbered = Numbered::FilesAndDirs;
    found.extend(compare::differences(mount, &state.model, &mut Numbers::default(), numbered));
    found
}

/// Whether each byte is that of a version, or zero where a version has ended before.
fn is_made_of(bytes: &[u8], versions: &[Vec<u8>]) -> bool {
    versions.iter().any(|version| bytes.len() <= version.len())
        && versions.iter().any(|version| bytes.len() >= version.len())
        && bytes.iter().enumerate().all(|(i, byte)| {
            versions.iter().any(|version| match version.get(i) {
                Some(known) => known == byte,
                None => *byte == 0,
            })
        })
}
