//! Unions on unions: the layers of each on a mount of the one below, and a plain directory to which the same
//! is done.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use stratafs::LayerFormat;

use super::zoo::{self, Can, Rights, TREES};
use crate::support::union_mount::{Branches, Engine, UnionMount};
use crate::support::whole_tree::assert_same;

/// Which layers of a union are on the mount of the one below; the others are in a plain directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Lower,
    Upper,
    Both,
}

impl Part {
    pub const ALL: [Part; 3] = [Part::Lower, Part::Upper, Part::Both];

    pub fn name(self) -> &'static str {
        match self {
            Part::Lower => "lower",
            Part::Upper => "upper",
            Part::Both => "both",
        }
    }

    fn has_lower(self) -> bool {
        self != Part::Upper
    }

    fn has_upper(self) -> bool {
        self != Part::Lower
    }
}

/// A union's directories.
#[derive(Clone, Debug)]
struct Level {
    engine: Engine,
    format: LayerFormat,
    /// The topmost first.
    lowers: Vec<PathBuf>,
    upper: PathBuf,
    work: PathBuf,
    at: PathBuf,
}

impl Level {
    fn mount(&self) -> Result<UnionMount, String> {
        let upper = Some((self.upper.clone(), self.work.clone()));
        let mut branches = Branches::new(self.lowers.clone(), upper, self.format);
        if self.engine == Engine::Kernel {
            branches.redirects = self.format == LayerFormat::OverlayTrusted;
            branches.metacopy = branches.redirects;
        }
        UnionMount::try_new(&self.engine, &branches, &self.at)
    }

    /// Has the upper refer to no lower layer, so that it can be one.
    fn settle(&self) {
        if self.engine != Engine::Own {
            return;
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_stratafs"));
        command.arg("settle").args(["--format", self.format.as_str()]);
        for lower in &self.lowers {
            command.arg("--lower").arg(lower);
        }
        command.arg("--upper").arg(&self.upper).arg("--work").arg(&self.work);
        let output = command.stdin(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {said}");
    }
}

/// Mounted unions, each on the one before.
pub struct Nest {
    /// The innermost first.
    levels: Vec<Level>,
    mounts: Vec<UnionMount>,
}

impl Nest {
    /// In a directory; the innermost union first. Its lower layer has what `make` makes in each directory in
    /// which a lower layer of the outermost begins.
    fn new(dir: &Path, unions: &[(Engine, LayerFormat)], part: Part, make: impl Fn(&Path)) -> Nest {
        let mut levels: Vec<Level> = Vec::new();
        for (n, (engine, format)) in unions.iter().enumerate() {
            let plain = dir.join(format!("level{n}"));
            fs::create_dir(&plain).unwrap();
            let below = levels.last().map(|level| level.at.clone());
            let on = |is: bool| below.clone().filter(|_| is).unwrap_or_else(|| plain.clone());
            let (lower, upper) = (on(part.has_lower()), on(part.has_upper()));
            levels.push(Level {
                engine: engine.clone(),
                format: *format,
                lowers: vec![lower.join("lower")],
                upper: upper.join("upper"),
                work: upper.join("work"),
                at: dir.join(format!("mount{n}")),
            });
        }
        // Where each union's lower layer is on the disk, with the directories of the next one in it.
        let mut lower = dir.to_owned();
        for n in 0..levels.len() {
            let plain = dir.join(format!("level{n}"));
            for there in [&plain, &lower] {
                if n > 0 || there == &plain {
                    make_all(there);
                }
            }
            lower = if n == 0 || !part.has_lower() { plain } else { lower }.join("lower");
        }
        make(&lower);
        Nest { levels, mounts: Vec::new() }
    }

    fn mount(&mut self) -> Result<(), String> {
        while self.mounts.len() < self.levels.len() {
            self.mount_next()?;
        }
        Ok(())
    }

    fn mount_next(&mut self) -> Result<(), String> {
        let mount = self.levels[self.mounts.len()].mount()?;
        self.mounts.push(mount);
        Ok(())
    }

    fn unmount_last(&mut self) {
        self.mounts.pop().unwrap().unmount().unwrap();
    }

    fn unmount(&mut self) {
        while !self.mounts.is_empty() {
            self.unmount_last();
        }
    }

    fn outermost(&self) -> &Level {
        self.levels.last().unwrap()
    }

    /// The root that the outermost shows.
    fn root(&self) -> &Path {
        &self.outermost().at
    }
}

impl Drop for Nest {
    /// The outermost first.
    fn drop(&mut self) {
        while self.mounts.pop().is_some() {}
    }
}

fn make_all(dir: &Path) {
    for name in ["lower", "upper", "work"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
}

/// Has unions on each other show what a plain directory shows after the same changes: those before the outer
/// one is there, those in it, when all is mounted again, and when what the innermost took has become a
/// layer below another.
pub fn same_as_plain(dir: &Path, rights: Rights, unions: &[(Engine, LayerFormat)], part: Part) {
    let can = Can::all(rights, unions, part);
    let (plain, flat) = (dir.join("plain"), dir.join("flat"));
    for made in [&plain, &flat] {
        fs::create_dir(made).unwrap();
    }
    zoo::make(&plain, can);
    let mut nest = Nest::new(dir, unions, part, |lower| zoo::make(lower, can));
    // The outermost union alone, with all its layers in plain directories.
    let outer = nest.outermost();
    let alone = vec![(outer.engine.clone(), outer.format)];
    let mut alone = Nest::new(&flat, &alone, Part::Both, |lower| {
        zoo::make(lower, can);
        zoo::change(&lower.join(TREES[0]), can);
    });

    // In the lower layer, through the union that it is on.
    while nest.mounts.len() + 1 < nest.levels.len() {
        nest.mount_next().unwrap();
    }
    for lower in [&plain, &nest.outermost().lowers[0]] {
        zoo::change(&lower.join(TREES[0]), can);
    }
    nest.mount().unwrap();
    alone.mount().unwrap();
    let check = |when: &str, root: &Path| {
        assert_same(when, &zoo::lines(&plain), &zoo::lines(root));
    };
    check("mounted", nest.root());
    check("mounted, on no other", alone.root());
    for root in [&plain, nest.root(), alone.root()] {
        zoo::change_again(&root.join(TREES[0]), can);
        zoo::change(&root.join(TREES[1]), can);
        zoo::mark(&root.join(TREES[1]), can);
    }
    check("changed, on no other", alone.root());
    alone.unmount();
    for root in [&plain, &alone.outermost().upper] {
        zoo::lose_privileges(&root.join(TREES[1]), can);
    }
    check("changed", nest.root());
    same_upper("changed", &mut nest, &alone);
    nest.unmount();
    nest.mount().unwrap();
    check("mounted again", nest.root());
    nest.unmount();

    // The directories of an upper cannot be moved where they are in the lower layer of such.
    let moves = |(engine, format): &(Engine, LayerFormat)| {
        *engine == Engine::Own && *format != LayerFormat::Aufs
    };
    let inner = unions.len() - 1;
    if part.has_upper() && !unions[..inner].iter().all(moves) {
        return;
    }
    // What the outer has written is in a lower layer of the innermost now.
    let innermost = &mut nest.levels[0];
    innermost.settle();
    let next = dir.join("next");
    innermost.lowers.insert(0, innermost.upper.clone());
    (innermost.upper, innermost.work) = (next.join("upper"), next.join("work"));
    make_all(&next);
    nest.mount().unwrap();
    check("on another layer", nest.root());
    alone.mount().unwrap();
    for root in [&plain, nest.root(), alone.root()] {
        zoo::change_again(&root.join(TREES[1]), can);
        zoo::change(&root.join(TREES[2]), can);
        zoo::mark(&root.join(TREES[2]), can);
    }
    check("changed again, on no other", alone.root());
    alone.unmount();
    for root in [&plain, &alone.outermost().upper] {
        zoo::lose_privileges(&root.join(TREES[2]), can);
    }
    check("changed on another layer", nest.root());
    same_upper("changed on another layer", &mut nest, &alone);
    nest.unmount();
    nest.mount().unwrap();
    check("on another layer, mounted again", nest.root());
    nest.unmount();
}

/// Asserts that the upper of the outermost holds what it holds where it is on no union: the inner ones have
/// taken none of its marks for their own, and lost none. Unmounts the outermost.
fn same_upper(when: &str, nest: &mut Nest, alone: &Nest) {
    nest.unmount_last();
    let (expected, shown) = (&alone.outermost().upper, &nest.outermost().upper);
    assert_same(&format!("the upper, {when}"), &zoo::marks(expected), &zoo::marks(shown));
}

/// What is said where a union is not mounted on another.
pub fn refusal(dir: &Path, unions: &[(Engine, LayerFormat)], part: Part) -> String {
    let mut nest = Nest::new(dir, unions, part, |_| {});
    while nest.mounts.len() + 1 < nest.levels.len() {
        nest.mount_next().unwrap();
    }
    nest.mount_next().expect_err("it mounts")
}

/// In an upper that is in the lower layer of a union without redirects, directories cannot be moved, and so
/// not be removed if something below shows through: the call fails, and all is as it was.
pub fn directories_that_stay(dir: &Path, unions: &[(Engine, LayerFormat)]) {
    let mut nest = Nest::new(dir, unions, Part::Upper, |lower| {
        fs::create_dir(lower.join("d")).unwrap();
        fs::write(lower.join("d/f"), "below").unwrap();
    });
    nest.mount().unwrap();
    fs::remove_file(nest.root().join("d/f")).unwrap();
    nest.unmount();
    let innermost = &mut nest.levels[0];
    let next = dir.join("next");
    innermost.lowers.insert(0, innermost.upper.clone());
    (innermost.upper, innermost.work) = (next.join("upper"), next.join("work"));
    make_all(&next);
    nest.mount().unwrap();
    let there = nest.root().join("d");
    let refused = fs::remove_dir(&there).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::CrossesDevices, "{refused}");
    assert_eq!(fs::read_dir(&there).unwrap().count(), 0);
    nest.unmount();
    nest.mount().unwrap();
    assert_eq!(fs::read_dir(&there).unwrap().count(), 0);
    nest.unmount();
}

/// On ours no file can be made without a name (`O_TMPFILE`), which the library that speaks FUSE does not know;
/// and so not in the kernel's overlayfs with its upper on ours.
pub fn files_without_names(dir: &Path, unions: &[(Engine, LayerFormat)]) {
    use rustix::fs::{Mode, OFlags};
    let mut nest = Nest::new(dir, unions, Part::Upper, |_| {});
    nest.mount().unwrap();
    for mount in &nest.mounts {
        let made = rustix::fs::open(mount.path(), OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR);
        assert_eq!(made.unwrap_err(), rustix::io::Errno::OPNOTSUPP);
    }
}
