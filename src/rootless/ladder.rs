//! What an ordinary user can mount, how, and who sees it: from the best to the least.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Stdio;
use std::thread;

use serde::Serialize;

use super::{IdMapping, Namespaces, command};
use crate::error::{IoContext, Result};
use crate::helper::{HelperCommand, TryMount, arguments_to_try};
use crate::sys::fuse::{self, FuseMount};
use crate::sys::mount::Attributes;

/// Who sees what is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Sees {
    /// The caller, and whoever shares his mount namespace.
    #[serde(rename = "the caller")]
    Caller,
    /// What runs in a new mount namespace.
    #[serde(rename = "one namespace")]
    OneNamespace,
}

impl fmt::Display for Sees {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Sees::Caller => "the caller",
            Sees::OneNamespace => "one namespace",
        })
    }
}

/// A way in which an ordinary user may mount layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RootlessRung {
    /// A short name that stays.
    pub name: &'static str,
    /// What it is, for people.
    pub what: &'static str,
    /// Who sees such mounts.
    pub seen_by: Sees,
    /// Whether a trial succeeded.
    pub available: bool,
    /// Why not, and what mends it; for people.
    pub reason: String,
}

impl fmt::Display for RootlessRung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.available { "yes" } else { "no" };
        write!(f, "{}, seen by {}: {word}", self.what, self.seen_by)?;
        if !self.reason.is_empty() {
            write!(f, " ({})", self.reason)?;
        }
        Ok(())
    }
}

/// Tries, by doing it in a helper, how the caller can mount layers that are to be on the file system of the
/// directory `dir`, in which he may write: by the kernel's overlayfs in a user namespace, by FUSE in one, and by
/// FUSE without one.
///
/// ```no_run
/// use stratafs::helper::{HelperCommand, run_if_requested};
///
/// run_if_requested(); // First in main.
/// for rung in stratafs::rootless::ladder(&HelperCommand::CurrentExe, "/home/me".as_ref())? {
///     println!("{rung}");
/// }
/// # Ok::<(), stratafs::Error>(())
/// ```
///
/// # Errors
/// If no helper can be started. What cannot be mounted is an answer.
pub fn ladder(helper: &HelperCommand, dir: &Path) -> Result<Vec<RootlessRung>> {
    // What is tried needs no more than one id.
    let namespaces = Namespaces::UserAndMount(IdMapping::one());
    let attempt = |what| -> Result<Option<String>> {
        let mut command = command(helper, &namespaces, helper.program());
        command.args(arguments_to_try(what, dir)).stdin(Stdio::null());
        let output = command.output().at("start as a helper the program", helper.program())?;
        Ok(match output.status.code() {
            Some(0) => None,
            Some(1) => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
            _ => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let said = said.trim().trim_start_matches("stratafs: ").to_owned();
                Some(if said.is_empty() {
                    format!("the helper ended: {}", output.status)
                } else {
                    said
                })
            }
        })
    };
    let rung = |name, what, seen_by, refusal: Option<String>| RootlessRung {
        name,
        what,
        seen_by,
        available: refusal.is_none(),
        reason: refusal.unwrap_or_default(),
    };
    let no_device = no_device();
    let in_namespace = match &no_device {
        Some(why) => Some(why.clone()),
        None => attempt(TryMount::Fuse)?,
    };
    Ok(vec![
        rung(
            "overlay-in-user-namespace",
            "overlayfs in a user namespace",
            Sees::OneNamespace,
            attempt(TryMount::Overlay)?,
        ),
        rung(
            "fuse-in-user-namespace",
            "FUSE in a user namespace",
            Sees::OneNamespace,
            in_namespace,
        ),
        rung(
            "fuse-by-fusermount",
            "FUSE by fusermount3",
            Sees::Caller,
            no_device.or_else(|| no_program(dir)),
        ),
    ])
}

/// Why /dev/fuse cannot be used.
fn no_device() -> Option<String> {
    let e = fuse::open_device().err()?;
    let remedy = match e.kind() {
        ErrorKind::PermissionDenied => "its mode should be 0666: as root, `chmod 666 /dev/fuse`",
        ErrorKind::NotFound => {
            "as root, `modprobe fuse`; a container is given the device by `--device /dev/fuse`"
        }
        _ => "as root, `modprobe fuse`",
    };
    Some(format!("cannot open /dev/fuse: {e}; {remedy}"))
}

/// Why the program that mounts for others cannot: it is asked to, on a new directory.
fn no_program(dir: &Path) -> Option<String> {
    let target =
        dir.join(format!(".stratafs-trial-{}-{:?}", std::process::id(), thread::current().id()));
    if let Err(e) = fs::create_dir(&target).at("create directory for trials", &target) {
        return Some(e.to_string());
    }
    let request = FuseMount {
        source: "stratafs".as_ref(),
        attributes: Attributes::default(),
        allow_other: false,
        options: &[],
    };
    let tried = fuse::mount_by_fusermount(&target, &request, false);
    if let Ok((device, _)) = tried.as_ref() {
        tracing::debug!(?device, "a trial of {}", fuse::FUSERMOUNT);
        if let Err(e) = fuse::unmount_by_fusermount(&target, true) {
            tracing::warn!(?target, error = %e, "a mount for trials is left");
        }
    }
    if let Err(e) = fs::remove_dir(&target) {
        tracing::warn!(?target, error = %e, "a directory for trials is left");
    }
    let e = tried.err()?;
    let remedy = match e.kind() {
        // It says itself that it is not there, and what to do.
        ErrorKind::NotFound => "",
        _ => "; it must be setuid root, and the directory the user's own",
    };
    Some(format!("{e}{remedy}"))
}
