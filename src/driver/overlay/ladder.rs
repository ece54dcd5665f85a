//! The ways in which kernels take layers, best first.
//!
//! A rung is chosen once, by trying how the kernel takes the first layer of the first mount; a call
//! that is lacking, or hidden by a filter, leads to the next rung. What fails for another reason
//! fails: the rungs below could only say less of it.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use super::refusal::{self, Stage};
use crate::driver::target::Target;
use crate::driver::{UpperDir, bind};
use crate::error::{Error, ErrorKind, IoContext, Result};
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
}

/// A rung that the kernel lacks, as opposed to a mount that it refuses.
enum Attempt {
    Mounted(OwnedFd),
    Lacking(Error),
}

impl Ladder {
    pub(super) fn forced(rung: Rung) -> Self {
        Ladder { forced: Some(rung), choice: OnceLock::new() }
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
            let attempt = match rung {
                Rung::LayerDescriptors | Rung::LayerStrings => by_context(rung, plan, target)?,
                Rung::MountCall => Attempt::Mounted(by_mount_call(plan, target)?),
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

fn by_context(rung: Rung, plan: &Plan<'_>, target: &Target) -> Result<Attempt> {
    let lacking = |stage: Stage, e: std::io::Error| {
        Ok(Attempt::Lacking(refusal::explain(stage, e, Vec::new(), plan, target.path())))
    };
    let is_lacking =
        |e: &std::io::Error| matches!(Refusal::of(e), Refusal::NoSuchCall | Refusal::NotPermitted);

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
    let set_dir = |key: &str, dir: &Path| -> Result<std::io::Result<()>> {
        let fd = sys::open_layer(dir).map_err(|e| refusal::of_open(dir, e))?;
        target.keep_apart(&fd, dir)?;
        // The kernel takes its own reference: one descriptor at a time is enough.
        Ok(match rung {
            Rung::LayerDescriptors => fs.set_fd(key, &fd),
            _ => fs.set_string(key, &sys::fd_name(&fd)),
        })
    };
    let uppers = plan.upper.into_iter().flat_map(|u| [("upperdir", &u.dir), ("workdir", &u.work)]);
    for (key, dir) in plan.lower.iter().map(|l| ("lowerdir+", l)).chain(uppers) {
        if let Err(e) = set_dir(key, dir)? {
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
    let root = match fs.mount(plan.attributes) {
        Ok(root) => root,
        Err(e) if is_lacking(&e) => return lacking(Stage::Attach, e),
        Err(e) => {
            let told = fs.take_log();
            return Err(refusal::explain(Stage::Attach, e, told, plan, target.path()));
        }
    };
    match sys::attach(&root, target.dir()) {
        Ok(()) => Ok(Attempt::Mounted(root)),
        Err(e) if is_lacking(&e) => lacking(Stage::Attach, e),
        Err(e) => Err(refusal::explain(Stage::Attach, e, Vec::new(), plan, target.path())),
    }
}

fn by_mount_call(plan: &Plan<'_>, target: &Target) -> Result<OwnedFd> {
    let open = |dir: &Path| -> Result<OwnedFd> {
        let fd = sys::open_layer(dir).map_err(|e| refusal::of_open(dir, e))?;
        target.keep_apart(&fd, dir)?;
        Ok(fd)
    };
    let mut text = String::from("lowerdir=");
    let mut held = Vec::with_capacity(plan.lower.len() + 2);
    for (i, dir) in plan.lower.iter().enumerate() {
        let fd = open(dir)?;
        if i > 0 {
            text.push(':');
        }
        text.push_str(&fd.as_raw_fd().to_string());
        held.push(fd);
    }
    let uppers = plan.upper.into_iter().flat_map(|u| [("upperdir", &u.dir), ("workdir", &u.work)]);
    for (key, dir) in uppers {
        let fd = open(dir)?;
        text.push_str(&format!(",{key}={}", fd.as_raw_fd()));
        held.push(fd);
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
