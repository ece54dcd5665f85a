//! Why the kernel refused a mount, in words.
//!
//! The file system context's log has the kernel's own text for what is wrong with one parameter. For
//! what is wrong with the whole mount overlayfs writes to the system log alone, which few may read:
//! the causes behind EINVAL are looked for here, after the fact.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::Path;

use super::ladder::Plan;
use crate::error::{Error, ErrorKind};
use crate::sys::mount::{self as sys, Refusal};
use crate::sys::{fs_features, mountinfo};

pub(super) const RIGHTS: &str = "mounting needs CAP_SYS_ADMIN in the user namespace that owns the mount \
                      namespace: run as root, or in a user and mount namespace of your own \
                      (`unshare -Urm`)";
const MODULE: &str =
    "this kernel has no overlayfs; load the module `overlay`, or use another engine";
const DESCRIPTORS: &str = "too many open files; raise RLIMIT_NOFILE";

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Open,
    Create,
    Attach,
}

/// The kernel's error, what it told besides, and what to do.
#[derive(Debug)]
struct KernelRefusal {
    error: io::Error,
    told: Vec<String>,
    remedy: Option<String>,
}

impl fmt::Display for KernelRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text(&self.error, &self.told))?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl StdError for KernelRefusal {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.error)
    }
}

/// An error and the kernel's own text.
pub(super) fn text(error: &io::Error, told: &[String]) -> String {
    match told {
        [] => error.to_string(),
        told => format!("{error}; the kernel says: {}", told.join("; ")),
    }
}

/// Whether the kernel lacks the parameter, or takes it in another form only. Before 6.7 or so it told
/// the reason to the system log alone.
pub(super) fn is_unknown_parameter(error: &io::Error, told: &[String]) -> bool {
    let of_parameter = |line: &String| {
        ["Unknown parameter", "Bad value", "Unexpected value"]
            .iter()
            .any(|text| line.contains(text))
    };
    match Refusal::of(error) {
        Refusal::Invalid => told.is_empty() || told.iter().any(of_parameter),
        Refusal::NoSuchCall => true,
        _ => false,
    }
}

fn refused(
    kind: ErrorKind,
    message: impl Into<String>,
    path: &Path,
    error: io::Error,
    told: Vec<String>,
    remedy: Option<String>,
) -> Error {
    Error::new(kind, message.into()).with_path(path).with_source(KernelRefusal {
        error,
        told,
        remedy,
    })
}

/// The kernel refused the mount on `target` as a whole.
pub(super) fn explain(
    stage: Stage,
    error: io::Error,
    told: Vec<String>,
    plan: &Plan<'_>,
    target: &Path,
) -> Error {
    let message = "cannot mount overlay on";
    let (kind, remedy) = match Refusal::of(&error) {
        Refusal::NotPermitted => (ErrorKind::PermissionDenied, Some(RIGHTS.to_owned())),
        Refusal::NoSuchFileSystem => (ErrorKind::Unsupported, Some(MODULE.to_owned())),
        Refusal::NoSuchCall => (ErrorKind::Unsupported, None),
        Refusal::Busy => (
            ErrorKind::Busy,
            Some(match plan.upper {
                Some(upper) => format!(
                    "the upper directory {:?} or its work directory is in use by another overlay \
                     mount; unmount that one first",
                    upper.dir
                ),
                None => "the mount target is in use".to_owned(),
            }),
        ),
        Refusal::Loop => (
            ErrorKind::InvalidArgument,
            Some("two layers are the same directory, or one is inside another".to_owned()),
        ),
        Refusal::Stale => (
            ErrorKind::FailedPrecondition,
            Some(
                "the upper directory was mounted over other layers, with index=on; delete `index` \
                 in its work directory"
                    .to_owned(),
            ),
        ),
        Refusal::NoDescriptors => (ErrorKind::LimitExceeded, Some(DESCRIPTORS.to_owned())),
        Refusal::NoSpace => (
            ErrorKind::NoSpace,
            Some(match stage {
                Stage::Attach => "the mount namespace is full; raise fs.mount-max".to_owned(),
                _ => "the file system of the work directory is full, or the mount namespace \
                      (fs.mount-max)"
                    .to_owned(),
            }),
        ),
        Refusal::Invalid if stage == Stage::Attach => (
            ErrorKind::InvalidArgument,
            Some("the mount target is not in the caller's mount namespace".to_owned()),
        ),
        Refusal::Invalid => cause_of_invalid(plan),
        Refusal::TooLong | Refusal::Other => (Error::io("", target, copy(&error)).kind(), None),
    };
    refused(kind, message, target, error, told, remedy)
}

/// `io::Error` cannot be cloned; those of the system are a number.
fn copy(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => error.kind().into(),
    }
}

/// Looks for what overlayfs answers EINVAL to, in the order in which it checks.
fn cause_of_invalid(plan: &Plan<'_>) -> (ErrorKind, Option<String>) {
    let upper = plan.upper.and_then(|upper| {
        let dir = sys::open_dir_path(&upper.dir).ok()?;
        let work = sys::open_dir_path(&upper.work).ok()?;
        Some((upper, dir, work))
    });
    if let Some((upper, dir, work)) = upper {
        if let (Ok(one), Ok(other)) = (mountinfo::ids(&dir), mountinfo::ids(&work))
            && one != other
        {
            return (
                ErrorKind::InvalidArgument,
                Some(format!(
                    "the upper directory {:?} and its work directory {:?} must be on the same mount",
                    upper.dir, upper.work
                )),
            );
        }
        if let (Some(one), Some(other)) = (sys::where_is(&dir), sys::where_is(&work))
            && (one.starts_with(&other) || other.starts_with(&one))
        {
            return (
                ErrorKind::InvalidArgument,
                Some(format!(
                    "the upper directory {:?} and its work directory {:?} must not be the same, \
                     nor one inside the other",
                    upper.dir, upper.work
                )),
            );
        }
        let volatile = upper.work.join("work/incompat/volatile");
        if volatile.symlink_metadata().is_ok() {
            return (
                ErrorKind::FailedPrecondition,
                Some(format!(
                    "the upper directory was mounted with the option volatile, and may have lost \
                     data in a crash; discard it, or delete {volatile:?} if there was none"
                )),
            );
        }
        if let Ok(name) = fs_features::file_system_name(&dir)
            && !fs_features::known_as_upper(&name)
        {
            return (
                ErrorKind::Unsupported,
                Some(format!(
                    "overlayfs may be unable to use the file system of the upper directory {:?}, \
                     which is {name}; use ext4, xfs, btrfs or tmpfs",
                    upper.dir
                )),
            );
        }
    }
    let stacked = plan.lower.iter().find(|layer| {
        sys::open_dir_path(layer)
            .and_then(fs_features::file_system_name)
            .is_ok_and(|name| name == "overlay")
    });
    let remedy = match stacked {
        Some(layer) => format!(
            "the layer {layer:?} is on an overlay mount, and the kernel stacks no more than two; \
             keep the store on another file system"
        ),
        None if plan.mapped.is_some() => {
            let remedy = "the kernel wrote the reason to the system log: see `dmesg`; layers that show other \
                          ids than files have need Linux 5.19, or the driver fuse";
            return (ErrorKind::Unsupported, Some(remedy.to_owned()));
        }
        None => "the kernel wrote the reason to the system log: see `dmesg`".to_owned(),
    };
    (ErrorKind::InvalidArgument, Some(remedy))
}

/// The kernel refused one of the directories.
pub(super) fn of_layer(
    key: &str,
    dir: &Path,
    error: io::Error,
    told: Vec<String>,
    plan: &Plan<'_>,
    target: &Path,
) -> Error {
    match Refusal::of(&error) {
        Refusal::Invalid if told.is_empty() => {
            let remedy = fs_features_of(dir);
            let message = format!("overlayfs refused, as {}, the directory", role(key));
            refused(ErrorKind::InvalidArgument, message, dir, error, told, remedy)
        }
        Refusal::Invalid => {
            let message = format!("overlayfs refused, as {}, the directory", role(key));
            refused(ErrorKind::InvalidArgument, message, dir, error, told, None)
        }
        _ => explain(Stage::Create, error, told, plan, target),
    }
}

fn role(key: &str) -> &'static str {
    match key {
        "upperdir" => "upper directory",
        "workdir" => "work directory",
        _ => "layer",
    }
}

fn fs_features_of(dir: &Path) -> Option<String> {
    let dir = sys::open_dir_path(dir).ok()?;
    let name = fs_features::file_system_name(dir).ok()?;
    Some(format!("its file system is {name}; it may be read-only"))
}

/// The kernel refused one of the other options.
pub(super) fn of_option(option: &str, error: io::Error, told: Vec<String>, target: &Path) -> Error {
    let kind = match Refusal::of(&error) {
        Refusal::Invalid => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    };
    let remedy = Some("this kernel is too old for it".to_owned());
    let remedy = remedy.filter(|_| is_unknown_parameter(&error, &told));
    let message = format!("overlayfs refused the option {option} for a mount on");
    refused(kind, message, target, error, told, remedy)
}

/// A layer could not be opened.
pub(in crate::driver) fn of_open(dir: &Path, error: io::Error) -> Error {
    match Refusal::of(&error) {
        Refusal::NoDescriptors => refused(
            ErrorKind::LimitExceeded,
            "cannot open layer",
            dir,
            error,
            Vec::new(),
            Some(DESCRIPTORS.to_owned()),
        ),
        _ => Error::io("open layer", dir, error),
    }
}

/// The kernel refused a bind mount.
pub(in crate::driver) fn of_bind(source: &Path, target: &Path, error: io::Error) -> Error {
    let remedy = match Refusal::of(&error) {
        Refusal::NotPermitted => Some(RIGHTS.to_owned()),
        Refusal::NoSpace => Some("the mount namespace is full; raise fs.mount-max".to_owned()),
        Refusal::Invalid => Some(
            "the directory or the mount target is not in the caller's mount namespace, or holds \
             mounts that a user namespace may not uncover"
                .to_owned(),
        ),
        _ => None,
    };
    let kind = Error::io("", target, copy(&error)).kind();
    let message = format!("cannot bind {source:?} to");
    refused(kind, message, target, error, Vec::new(), remedy)
}
