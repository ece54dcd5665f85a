//! The union under random operations, remounts, and changes of engine, against a tree in memory: the
//! result of every operation, and the whole tree after every remount.
//!
//! A failure prints the seed, and the least of the layers and operations that still fails.
//! `STRATAFS_SEED` runs that seed alone; `STRATAFS_FULL` asks for ten times as many operations.
//! The kernel's overlayfs goes through the same operations, but for what it is known to do otherwise
//! ([`kernel_does_otherwise`]): so the model is not merely what one program does.
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

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use stratafs::{LayerFormat, Owners};
use support::suite;
use support::union_mount::{Branches, Engine, Rng, UnionMount, asked_seed, full};
use union_model::choose::Chooser;
use union_model::compare::{self, Numbered, Numbers};
use union_model::hands::Hands;
use union_model::layers::{self, Line, Whiteouts};
use union_model::model::{Expected, Model, Rules, ZeroDevices};
use union_model::ops::{At, Op};

/// A kind of union.
#[derive(Clone, Debug)]
struct Setup {
    name: &'static str,
    engine: Engine,
    rules: Rules,
    switches: bool,
    /// Further options.
    more: &'static str,
}

impl Setup {
    fn whiteouts(&self) -> Whiteouts {
        let kernel = self.switches || self.engine == Engine::Kernel;
        if kernel { Whiteouts::InMerged } else { Whiteouts::Anywhere }
    }
}

const OPS_PER_SEED: usize = 250;

fn main() {
    support::union_mount::enter_own_mount_namespace();
    use LayerFormat::{Aufs, OverlayTrusted, OverlayUser};
    let own = Engine::under_test();
    let setup = |name, engine: &Engine, format, redirects, switches: bool| Setup {
        name,
        engine: engine.clone(),
        rules: Rules {
            format,
            owners: Owners::OfFiles,
            redirects,
            zero_devices: match engine {
                Engine::Own if !switches => ZeroDevices::Made,
                Engine::Kernel => ZeroDevices::Refused,
                _ => ZeroDevices::Untried,
            },
        },
        switches,
        more: "",
    };
    let mut setups = vec![setup("trusted", &own, OverlayTrusted, true, false)];
    if own == Engine::Own {
        for (name, more) in [
            // Each write goes to the server.
            ("trusted_without_writeback", ",writeback=off"),
            // And so does each question.
            ("trusted_without_caches", ",timeout=0"),
        ] {
            setups.push(Setup { more, ..setup(name, &own, OverlayTrusted, true, false) });
        }
    }
    if own != Engine::Kernel {
        setups.extend([
            setup("trusted_and_the_kernel", &own, OverlayTrusted, true, true),
            setup("user", &own, OverlayUser, true, false),
            setup("aufs", &own, Aufs, false, false),
        ]);
        if own == Engine::Own {
            for (name, format) in
                [("owners_in_xattrs", OverlayUser), ("aufs_owners_in_xattrs", Aufs)]
            {
                let mut setup = setup(name, &own, format, format != Aufs, false);
                setup.rules.owners = Owners::InXattrs;
                setups.push(Setup { more: ",xattr_permissions=2", ..setup });
            }
        }
    }
    setups.extend([
        setup("user_without_redirects_and_the_kernel", &own, OverlayUser, false, true),
        setup("trusted_in_the_kernel", &Engine::Kernel, OverlayTrusted, true, false),
        setup("user_in_the_kernel", &Engine::Kernel, OverlayUser, false, false),
    ]);
    let trials = setups.into_iter().zip(1..).map(|(setup, number)| {
        let hindrance = setup.engine.hindrance();
        suite::trial(format!("random_operations::{}", setup.name), hindrance, move || {
            let seeds = if full() { 60 } else { 6 };
            let mut failures = String::new();
            for i in 0..seeds {
                let seed = asked_seed().unwrap_or(number * 1_000_000 + i);
                if let Err(report) = run_seed(&setup, seed) {
                    writeln!(failures, "{report}").unwrap();
                }
                if asked_seed().is_some() || failures.len() > 20_000 {
                    break;
                }
            }
            assert!(failures.is_empty(), "{failures}");
        })
    });
    suite::run_one_by_one(trials.collect());
}

/// All that is done for a seed.
#[derive(Clone, Debug)]
struct Script {
    layers: usize,
    lines: Vec<Line>,
    ops: Vec<Op>,
}

fn run_seed(setup: &Setup, seed: u64) -> Result<(), String> {
    let mut chooser = Chooser {
        rng: Rng(seed),
        long_names: setup.rules.format != LayerFormat::Aufs,
        switches: setup.switches,
        there: Vec::new(),
        open: Vec::new(),
    };
    let layers = 1 + usize::try_from(chooser.rng.below(3)).unwrap();
    let lines = layers::random_lines(&mut chooser, layers);
    let model = layers::merged(&lines, layers, setup.rules, setup.whiteouts());
    let script = Script { layers, lines, ops: chooser.ops(OPS_PER_SEED, model) };
    let Err(failure) = run(setup, &script) else { return Ok(()) };
    let mut report = format!("{}, STRATAFS_SEED={seed}: {failure}\n", setup.name);
    let upto = script.ops.len().min(failure.at + 1);
    writeln!(report, "the last operations:").unwrap();
    for (i, op) in script.ops[..upto].iter().enumerate().skip(upto.saturating_sub(30)) {
        writeln!(report, "  {i:4} {op:?}").unwrap();
    }
    let mut script = script;
    script.ops.truncate(upto);
    let (script, failure) = shrink(setup, script, failure);
    writeln!(report, "the least that fails: {failure}\n  {} layers:", script.layers).unwrap();
    for line in &script.lines {
        let Line { layer, path, saying, mode, owner, mtime, xattr } = line;
        writeln!(report, "    {layer} {path:?} {saying:?} {mode:o} {owner:?} {mtime:?} {xattr:?}")
            .unwrap();
    }
    writeln!(report, "  operations:").unwrap();
    for op in &script.ops {
        writeln!(report, "    {op:?}").unwrap();
    }
    Err(report.replace(&"L".repeat(255), "<255 L>"))
}

#[derive(Clone, Debug)]
struct Failure {
    /// The number of the operation after which it showed.
    at: usize,
    what: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "at operation {}: {}", self.at, self.what)
    }
}

/// A union in the course of a script.
struct Course<'a> {
    setup: &'a Setup,
    dir: &'a Path,
    branches: Branches,
    /// What is mounted now.
    engine: Engine,
    // Before the mount: what is open is closed first.
    hands: Hands,
    mount: Option<UnionMount>,
    model: Model,
    numbers: Numbers,
    mounts: u32,
}

fn run(setup: &Setup, script: &Script) -> Result<(), Failure> {
    let temp = suite::temp();
    let dir = temp.path();
    let (lowers, model) =
        layers::build(&script.lines, script.layers, dir, setup.rules, setup.whiteouts());
    let (upper, work) = (dir.join("upper"), dir.join("work"));
    for made in [&upper, &work] {
        std::fs::create_dir(made).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o755);
        rustix::fs::chmod(made, mode).unwrap();
    }
    let Rules { format, redirects, .. } = setup.rules;
    let mut branches = Branches::new(lowers, Some((upper, work)), format);
    branches.redirects = redirects;
    branches.more = setup.more.to_owned();
    let mut course = Course {
        setup,
        dir,
        branches,
        engine: setup.engine.clone(),
        mount: None,
        hands: Hands::new(dir),
        model,
        numbers: Numbers::default(),
        mounts: 0,
    };
    let failed = |at| move |what| Failure { at, what };
    course.mount().map_err(failed(0))?;
    for (i, op) in script.ops.iter().enumerate() {
        course.step(op).map_err(failed(i))?;
    }
    let end = failed(script.ops.len());
    course.compare("at the end").map_err(end)?;
    course.remount().map_err(end)?;
    if setup.switches {
        course.step(&Op::Switch).map_err(end)?;
    }
    course.unmount().map_err(end)
}

impl Course<'_> {
    fn mount(&mut self) -> Result<(), String> {
        let at = self.dir.join("mount");
        let mount = UnionMount::try_new(&self.engine, &self.branches, &at)?;
        self.mount = Some(mount);
        self.hands = Hands::new(&at);
        self.kernel_forgot();
        self.mounts += 1;
        Ok(())
    }

    /// Completes what refers to lower layers.
    fn settle(&self) -> Result<(), String> {
        let format = self.branches.format;
        let lowers = self.branches.lowers.iter().cloned();
        let lowers: Vec<_> = lowers.map(|dir| stratafs::FuseLayer { dir, format }).collect();
        let (dir, work) = self.branches.upper.clone().unwrap();
        let upper = stratafs::UpperDir { dir, work };
        stratafs::settle_upper(&lowers, &upper, format, &mut stratafs::ignore_progress)
            .map(drop)
            .map_err(|e| e.to_string())
    }

    /// What the kernel's overlayfs shows that is told to follow all marks.
    fn compare_with_the_kernels_metacopies(&mut self) -> Result<(), String> {
        let branches = Branches { metacopy: true, ..self.branches.clone() };
        let at = self.dir.join("mount");
        self.mount = Some(UnionMount::try_new(&Engine::Kernel, &branches, &at)?);
        self.compare("before it is settled")?;
        self.mount.take().unwrap().unmount()
    }

    fn unmount(&mut self) -> Result<(), String> {
        self.model.close_all();
        self.hands = Hands::new(self.dir);
        self.mount.take().unwrap().unmount()?;
        let (_, work) = self.branches.upper.as_ref().unwrap();
        let left = compare::leftovers(work);
        if left.is_empty() { Ok(()) } else { Err(format!("left in the work directory: {left:?}")) }
    }

    fn remount(&mut self) -> Result<(), String> {
        self.unmount()?;
        if self.engine == Engine::Own && self.mounts % 3 == 2 {
            self.settle()?;
        }
        self.mount()?;
        self.compare("after the mount")
    }

    /// Where the marks of the format tell it, we find the number of a file again, and of a directory.
    fn kernel_forgot(&mut self) {
        let ours = self.engine == Engine::Own && self.setup.rules.format != LayerFormat::Aufs;
        self.numbers.keep(&self.model, |kind| ours && matches!(kind, 'f' | 'd'));
    }

    fn compare(&mut self, when: &str) -> Result<(), String> {
        let path: PathBuf = self.mount.as_ref().unwrap().path().to_owned();
        let found =
            compare::differences(&path, &self.model, &mut self.numbers, numbered(&self.engine));
        if found.is_empty() {
            return Ok(());
        }
        Err(format!("{when}, by {:?}:\n    {}", self.engine, found.join("\n    ")))
    }

    fn step(&mut self, op: &Op) -> Result<(), String> {
        match op {
            Op::Remount => {
                self.compare("before the unmount")?;
                return self.remount();
            }
            Op::Forget => {
                self.mount.as_ref().unwrap().forget()?;
                self.kernel_forgot();
                return Ok(());
            }
            Op::Switch => {
                self.numbers = Numbers::default();
                self.unmount()?;
                self.engine = match self.engine {
                    Engine::Kernel => self.setup.engine.clone(),
                    _ => Engine::Kernel,
                };
                if self.engine == Engine::Kernel {
                    if self.setup.rules.redirects {
                        self.compare_with_the_kernels_metacopies()?;
                        self.numbers = Numbers::default();
                    }
                    self.settle()?;
                }
                self.mount()?;
                return self.compare("after the mount");
            }
            _ => {}
        }
        if self.engine == Engine::Kernel && kernel_does_otherwise(op, &self.model) {
            return Ok(());
        }
        let expected = self.model.carry_out(op);
        if expected == Expected::Skip {
            return Ok(());
        }
        let _watchdog = self.mount.as_ref().unwrap().watchdog();
        let outcome = self.hands.carry_out(op);
        if expected.allows(&outcome) {
            return Ok(());
        }
        Err(format!("{op:?} by {:?}\n    gives {outcome:?}\n    must be {expected}", self.engine))
    }
}

/// The kernel's overlayfs gives links, pipes and devices new numbers when it copies them up, if their
/// marks cannot be kept in `user.*` xattrs.
fn numbered(engine: &Engine) -> Numbered {
    if *engine == Engine::Kernel { Numbered::FilesAndDirs } else { Numbered::All }
}

/// Operations that the kernel's overlayfs is known to answer otherwise than a local file system does.
fn kernel_does_otherwise(op: &Op, model: &Model) -> bool {
    match op {
        // Of a lower directory that has lost its name it makes a copy at that name, over what is there.
        Op::Chmod { at: At::Slot(slot), .. }
        | Op::Chown { at: At::Slot(slot), .. }
        | Op::Utimens { at: At::Slot(slot), .. }
        | Op::SetXattr { at: At::Slot(slot), .. }
        | Op::RemoveXattr { at: At::Slot(slot), .. } => model.is_nameless(*slot),
        // Of a lower file over which another is renamed it says that it has a name still.
        Op::Stat { at: At::Slot(slot) } => model.is_nameless(*slot),
        // Links, pipes and devices have no user xattrs, without which it takes the names of a file that
        // it has copied up for names of two.
        Op::Link { from, .. } if model.rules.format == LayerFormat::OverlayUser => {
            model.kind_at(from) != Some('f')
        }
        _ => false,
    }
}

/// Takes away operations and lines of layers, in ever smaller pieces, while it still fails.
fn shrink(setup: &Setup, mut script: Script, mut failure: Failure) -> (Script, Failure) {
    let mut left: usize = 400;
    loop {
        let before = (script.ops.len(), script.lines.len());
        let mut try_out = |candidate: Script, script: &mut Script, failure: &mut Failure| {
            left = left.saturating_sub(1);
            if left == 0 {
                return false;
            }
            match run(setup, &candidate) {
                Ok(()) => false,
                Err(f) => {
                    (*script, *failure) = (candidate, f);
                    true
                }
            }
        };
        let mut size = script.ops.len().div_ceil(2).max(1);
        loop {
            let mut start = 0;
            while start < script.ops.len() {
                let mut candidate = script.clone();
                candidate.ops.drain(start..(start + size).min(script.ops.len()));
                if !try_out(candidate, &mut script, &mut failure) {
                    start += size;
                }
            }
            if size == 1 {
                break;
            }
            size = size.div_ceil(2);
        }
        let mut i = 0;
        while i < script.lines.len() {
            let mut candidate = script.clone();
            candidate.lines.remove(i);
            if !try_out(candidate, &mut script, &mut failure) {
                i += 1;
            }
        }
        if left == 0 || before == (script.ops.len(), script.lines.len()) {
            return (script, failure);
        }
    }
}
