//! The ways in which kernels take layers, best first.
//!
//! A rung is chosen once, by trying how the kernel takes the first layer of the first mount; a call
//! that is lacking, or hidden by a filter, leads to the next rung. What fails for another reason
//! fails: the rungs below could only say less of it.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use super::refusal::{self, Stage};
use crate::driver::mapped::Mapped;
use crate::driver::target::Target;
use crate::driver::{UpperDir, bind};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::idmapped;
use crate::sys::mount::{self as sys, Attributes, FsContext, Refusal};

/// mount(2) takes a page of options, the final NUL included.
const PAGE: usize = 4096;

const FSTYPE: &str = "overlay";

/// A way of giving layers to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Rung {
    /// fsconfig(2) with a descriptor a layer: Linux 6.13.
    LayerDescriptors,
    /// fsconfig(2) with a string a layer, `lowerdir+`: Linux 6.7.
    LayerStrings,
    /// mount(2) with one page of options, in which descriptor numbers name the layers.
    MountCall,
}

impl Rung {
    /// All, best first.
    pub const ALL: [Rung; 3] = [Rung::LayerDescriptors, Rung::LayerStrings, Rung::MountCall];
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rung::LayerDescriptors => "fsconfig with descriptors",
            Rung::LayerStrings => "fsconfig with strings",
            Rung::MountCall => "mount(2)",
        })
    }
}

/// An overlay mount to be made.
pub(super) struct Plan<'a> {
    pub(super) lower: &'a [std::path::PathBuf],
    pub(super) upper: Option<&'a UpperDir>,
    pub(super) options: &'a [String],
    pub(super) attributes: Attributes,
    /// What shows the ids of all directories.
    pub(super) mapped: Option<&'a Mapped<'a>>,
}

/// Where mounts of layers with mapped ids are while the kernel takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nowhere: Linux 6.15.
    Detached,
    /// In a mount namespace that has no other use, one on another.
    OwnNamespace,
}

/// A directory for the kernel, and, if its mount is attached nowhere, what must stay open until it has taken
/// them all.
struct Layer {
    fd: OwnedFd,
    held: Option<OwnedFd>,
}

/// The rung in use, and what is wrong with those above it.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub(super) rung: Rung,
    pub(super) passed_over: Vec<(Rung, String)>,
}

#[derive(Debug, Default)]
pub(super) struct Ladder {
    forced: Option<Rung>,
    choice: OnceLock<Choice>,
    /// For tests.
    own_namespace: bool,
}

/// A rung that the kernel lacks, as opposed to a mount that it refuses.
enum Attempt {
    Mounted(OwnedFd),
    Lacking(Error),
}

impl Ladder {
    pub(super) fn forced(rung: Rung) -> Self {
        Ladder { forced: Some(rung), ..Ladder::default() }
    }

    /// Layers with mapped ids are given as to older kernels.
    pub(super) fn in_own_namespace(self) -> Self {
        Ladder { own_namespace: true, ..self }
    }

    /// The rung for a mount whose first layer is `layer`.
    pub(super) fn choose(&self, layer: &Path) -> Result<Choice> {
        if let Some(rung) = self.forced {
            return Ok(Choice { rung, passed_over: Vec::new() });
        }
        if let Some(choice) = self.choice.get() {
            return Ok(choice.clone());
        }
        let (choice, certain) = try_rungs(layer)?;
        if certain {
            tracing::debug!("overlay layers are given by {}", choice.rung);
            // Another thread may have been faster; it found the same.
            let choice = self.choice.get_or_init(|| choice);
            return Ok(choice.clone());
        }
        Ok(choice)
    }

    /// Mounts, and gives the root of the mount.
    pub(super) fn mount(&self, plan: &Plan<'_>, target: &Target) -> Result<OwnedFd> {
        let topmost = plan.lower.first().map_or(Path::new("/"), |p| p.as_path());
        let choice = self.choose(topmost)?;
        let last = self.forced.unwrap_or(Rung::MountCall);
        for rung in Rung::ALL {
            if rung < choice.rung || rung > last {
                continue;
            }
            let attempt = match (plan.mapped, rung) {
                (Some(mapped), _) => self.by_thread(rung, plan, mapped, target)?,
                (None, Rung::MountCall) => Attempt::Mounted(by_mount_call(plan, target, None)?),
                (None, _) => match by_context(rung, plan, target, None)? {
                    Attempt::Mounted(root) => attach(root, plan, target)?,
                    lacking => lacking,
                },
            };
            match attempt {
                Attempt::Mounted(root) => return bind::make_private(root, target),
                Attempt::Lacking(e) if rung == last => return Err(e),
                Attempt::Lacking(e) => tracing::debug!("no overlay mount by {rung}: {e}"),
            }
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            "the kernel takes overlay layers in no way that is known",
        ))
    }

    /// Mounts layers with mapped ids, in a thread that makes files as one whose id is shown.
    fn by_thread(
        &self,
        rung: Rung,
        plan: &Plan<'_>,
        mapped: &Mapped<'_>,
        target: &Target,
    ) -> Result<Attempt> {
        let maker = plan.upper.map(|upper| mapped.maker(upper)).transpose()?;
        let make = |place| {
            let made = idmapped::in_thread_as(maker, || detached(rung, plan, target, place));
            made.at("start a thread that mounts on", target.path())?
        };
        // mount(2) can only be asked for a mount that is somewhere.
        let made = match rung == Rung::MountCall || self.own_namespace {
            true => make(Place::OwnNamespace)?,
            false => match make(Place::Detached) {
                Err(e)
                    if matches!(e.kind(), ErrorKind::InvalidArgument | ErrorKind::Unsupported) =>
                {
                    tracing::debug!("layers are mounted in a namespace, since: {e}");
                    make(Place::OwnNamespace)?
                }
                other => other?,
            },
        };
        match made {
            Attempt::Mounted(root) => attach(root, plan, target),
            lacking => Ok(lacking),
        }
    }
}

/// A union that is attached nowhere yet.
fn detached(rung: Rung, plan: &Plan<'_>, target: &Target, place: Place) -> Result<Attempt> {
    if place == Place::Detached {
        return by_context(rung, plan, target, None);
    }
    idmapped::enter_own_mount_namespace()
        .at("make a mount namespace in which to mount for", target.path())?;
    // The directory as it is in that namespace. What is mounted on it is seen there alone.
    let target = Target::open(target.path())?;
    let on = Some(target.dir());
    if rung != Rung::MountCall {
        return by_context(rung, plan, &target, on);
    }
    let root = by_mount_call(plan, &target, on)?;
    let root =
        sys::clone_tree(&root).at("take out of its namespace the mount for", target.path())?;
    Ok(Attempt::Mounted(root))
}

impl Plan<'_> {
    /// Opens the directories, the topmost lower first, then the upper and its work directory, with the names
    /// by which the kernel knows them; each when it is asked for. With mapped ids, their mounts are attached
    /// to `on` before.
    fn layers<'s>(
        &'s self,
        target: &'s Target,
        on: Option<BorrowedFd<'s>>,
    ) -> impl Iterator<Item = Result<(&'static str, &'s Path, Layer)>> {
        let attach = move |mount: &OwnedFd, dir: &Path| match on {
            None => Ok(()),
            Some(on) => {
                sys::attach(mount, on).at("mount, in a namespace of its own, the layer", dir)
            }
        };
        let lowers = self.lower.iter().map(move |dir| {
            let fd = open(dir, target)?;
            let Some(mapped) = self.mapped else {
                return Ok(("lowerdir+", dir.as_path(), Layer { fd, held: None }));
            };
            let layer = mapped.lower(fd, dir)?;
            attach(&layer.mount, dir)?;
            let layer = Layer { fd: layer.dir, held: on.is_none().then_some(layer.mount) };
            Ok(("lowerdir+", dir.as_path(), layer))
        });
        let uppers = self.upper.into_iter().flat_map(move |upper| {
            let both = || -> Result<[Layer; 2]> {
                let [fd, work] = [open(&upper.dir, target)?, open(&upper.work, target)?];
                let Some(mapped) = self.mapped else {
                    return Ok([Layer { fd, held: None }, Layer { fd: work, held: None }]);
                };
                let (layer, work) = mapped.upper(upper)?;
                attach(&layer.mount, &upper.dir)?;
                let dir = Layer { fd: layer.dir, held: on.is_none().then_some(layer.mount) };
                Ok([dir, Layer { fd: work, held: None }])
            };
            match both() {
                Ok([dir, work]) => vec![
                    Ok(("upperdir", upper.dir.as_path(), dir)),
                    Ok(("workdir", upper.work.as_path(), work)),
                ],
                Err(e) => vec![Err(e)],
            }
        });
        lowers.chain(uppers)
    }
}

fn open(dir: &Path, target: &Target) -> Result<OwnedFd> {
    let fd = sys::open_layer(dir).map_err(|e| refusal::of_open(dir, e))?;
    target.keep_apart(&fd, dir)?;
    Ok(fd)
}

/// The best rung, and whether that holds for later mounts too: a lack of rights may be this thread's.
fn try_rungs(layer: &Path) -> Result<(Choice, bool)> {
    let mut passed_over = Vec::new();
    let fs = match FsContext::open(FSTYPE) {
        Ok(fs) => fs,
        Err(e) => {
            let certain = Refusal::of(&e) == Refusal::NoSuchCall;
            let reason = format!("fsopen: {e}");
            passed_over.push((Rung::LayerDescriptors, reason.clone()));
            passed_over.push((Rung::LayerStrings, reason));
            let rung = Rung::MountCall;
            return Ok((Choice { rung, passed_over }, certain));
        }
    };
    let fd = sys::open_layer(layer).at("open layer", layer)?;
    for rung in [Rung::LayerDescriptors, Rung::LayerStrings] {
        let taken = match rung {
            Rung::LayerDescriptors => fs.set_fd("lowerdir+", &fd),
            _ => fs.set_string("lowerdir+", &sys::fd_name(&fd)),
        };
        match taken {
            Ok(()) => return Ok((Choice { rung, passed_over }, true)),
            Err(e) => {
                let told = fs.take_log();
                let certain = refusal::is_unknown_parameter(&e, &told);
                passed_over.push((rung, refusal::text(&e, &told)));
                if !certain {
                    // This layer may be at fault. Let the mount itself say so, or go down.
                    return Ok((Choice { rung, passed_over }, false));
                }
            }
        }
    }
    let rung = Rung::MountCall;
    Ok((Choice { rung, passed_over }, true))
}

/// A call that is hidden, or forbidden by a filter.
fn is_lacking(e: &io::Error) -> bool {
    matches!(Refusal::of(e), Refusal::NoSuchCall | Refusal::NotPermitted)
}

/// A union by fsconfig(2), attached nowhere yet.
fn by_context(
    rung: Rung,
    plan: &Plan<'_>,
    target: &Target,
    on: Option<BorrowedFd<'_>>,
) -> Result<Attempt> {
    let lacking = |stage: Stage, e: io::Error| {
        Ok(Attempt::Lacking(refusal::explain(stage, e, Vec::new(), plan, target.path())))
    };
    let fs = match FsContext::open(FSTYPE) {
        Ok(fs) => fs,
        Err(e) if is_lacking(&e) => return lacking(Stage::Open, e),
        Err(e) => {
            return Err(refusal::explain(Stage::Open, e, Vec::new(), plan, target.path()));
        }
    };
    for option in plan.options {
        let set = match option.split_once('=') {
            Some((key, value)) => fs.set_string(key, value),
            None => fs.set_flag(option),
        };
        set.map_err(|e| refusal::of_option(option, e, fs.take_log(), target.path()))?;
    }
    let mut held = Vec::new();
    for layer in plan.layers(target, on) {
        let (key, dir, layer) = layer?;
        // The kernel takes its own reference: one descriptor at a time is enough. But a mount that is
        // attached nowhere is gone when it is closed.
        let taken = match rung {
            Rung::LayerDescriptors => fs.set_fd(key, &layer.fd),
            _ => fs.set_string(key, &sys::fd_name(&layer.fd)),
        };
        held.extend(layer.held);
        if let Err(e) = taken {
            let told = fs.take_log();
            // A layer is named by its path too, which a page must hold.
            let is_lacking = refusal::is_unknown_parameter(&e, &told)
                || (rung == Rung::LayerDescriptors && Refusal::of(&e) == Refusal::TooLong);
            let error = refusal::of_layer(key, dir, e, told, plan, target.path());
            return match is_lacking {
                true => Ok(Attempt::Lacking(error)),
                false => Err(error),
            };
        }
    }
    fs.create()
        .map_err(|e| refusal::explain(Stage::Create, e, fs.take_log(), plan, target.path()))?;
    match fs.mount(plan.attributes) {
        Ok(root) => Ok(Attempt::Mounted(root)),
        Err(e) if is_lacking(&e) => lacking(Stage::Attach, e),
        Err(e) => {
            let told = fs.take_log();
            Err(refusal::explain(Stage::Attach, e, told, plan, target.path()))
        }
    }
}

fn attach(root: OwnedFd, plan: &Plan<'_>, target: &Target) -> Result<Attempt> {
    let explain = |e| refusal::explain(Stage::Attach, e, Vec::new(), plan, target.path());
    match sys::attach(&root, target.dir()) {
        Ok(()) => Ok(Attempt::Mounted(root)),
        Err(e) if is_lacking(&e) => Ok(Attempt::Lacking(explain(e))),
        Err(e) => Err(explain(e)),
    }
}

fn by_mount_call(plan: &Plan<'_>, target: &Target, on: Option<BorrowedFd<'_>>) -> Result<OwnedFd> {
    let mut text = String::new();
    let mut held = Vec::with_capacity(plan.lower.len() + 2);
    for layer in plan.layers(target, on) {
        let (key, _, layer) = layer?;
        match key {
            "lowerdir+" if held.is_empty() => text.push_str("lowerdir="),
            "lowerdir+" => text.push(':'),
            _ => text.push_str(&format!(",{key}=")),
        }
        text.push_str(&layer.fd.as_raw_fd().to_string());
        held.push(layer);
    }
    for option in plan.options {
        text.push(',');
        text.push_str(option);
    }
    if text.len() >= PAGE {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!(
                "mount(2) takes {} bytes of options, and {} layers need {}: use fewer layers, or \
                 Linux 6.7 or later, to mount on",
                PAGE - 1,
                plan.lower.len(),
                text.len()
            ),
        )
        .with_path(target.path()));
    }
    sys::mount_from_descriptors(FSTYPE, &text, target.dir(), plan.attributes)
        .map_err(|e| refusal::explain(Stage::Create, e, Vec::new(), plan, target.path()))?;
    target.point().open_topmost().at("open mount", target.path())
}
