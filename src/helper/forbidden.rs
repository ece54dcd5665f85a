//! Why namespaces could not be made, and what mends it.
//!
//! The kernel answers EPERM or ENOSPC, whoever forbids it: the settings that do are looked at.

use std::fmt;
use std::fs;
use std::io;

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    User,
    Map,
    Mount,
    Container,
}

impl Stage {
    fn what(self) -> &'static str {
        match self {
            Stage::User => "cannot make a user namespace",
            Stage::Map => "cannot map ids into a new user namespace",
            Stage::Mount => "cannot make a mount namespace",
            Stage::Container => "cannot make the namespaces of a container",
        }
    }
}

/// The settings that forbid namespaces; none where the kernel has no such setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Settings {
    /// user.max_user_namespaces
    max_user: Option<u64>,
    /// user.max_mnt_namespaces
    max_mount: Option<u64>,
    /// kernel.unprivileged_userns_clone, of Debian
    by_anybody: Option<u64>,
    /// kernel.apparmor_restrict_unprivileged_userns, of Ubuntu
    by_profile: Option<u64>,
}

impl Settings {
    fn now() -> Settings {
        let read = |name| {
            fs::read_to_string(format!("/proc/sys/{name}")).ok().and_then(|t| t.trim().parse().ok())
        };
        Settings {
            max_user: read("user/max_user_namespaces"),
            max_mount: read("user/max_mnt_namespaces"),
            by_anybody: read("kernel/unprivileged_userns_clone"),
            by_profile: read("kernel/apparmor_restrict_unprivileged_userns"),
        }
    }

    fn remedy(self, stage: Stage, e: &io::Error) -> String {
        if self.max_user == Some(0) {
            return "user.max_user_namespaces is 0, which forbids user namespaces: as root, `sysctl \
                    user.max_user_namespaces=15000`"
                .to_owned();
        }
        if self.by_anybody == Some(0) {
            return "kernel.unprivileged_userns_clone is 0, which leaves user namespaces to root: as root, \
                    `sysctl kernel.unprivileged_userns_clone=1`"
                .to_owned();
        }
        if matches!(e.kind(), io::ErrorKind::PermissionDenied) && self.by_profile == Some(1) {
            return "kernel.apparmor_restrict_unprivileged_userns is 1, which leaves user namespaces to \
                    programs with an AppArmor profile: give this program one with the rule `userns,`, or \
                    as root, `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
                .to_owned();
        }
        match e.kind() {
            io::ErrorKind::StorageFull => match (stage, self.max_mount) {
                (Stage::Mount | Stage::Container, Some(0)) => {
                    "user.max_mnt_namespaces is 0, which forbids mount namespaces: as root, `sysctl \
                     user.max_mnt_namespaces=15000`"
                }
                _ => {
                    "there are as many namespaces as user.max_user_namespaces and its like allow: end \
                     some, or as root, raise it"
                }
            }
            .to_owned(),
            io::ErrorKind::PermissionDenied => {
                "a container, a chroot or a filter of system calls forbids it: start the container around \
                 this with `--privileged`, or, with podman or docker, with `--security-opt \
                 seccomp=unconfined --cap-add SYS_ADMIN`"
                    .to_owned()
            }
            _ => "the kernel has no such namespaces, or forbids more of them inside each other".to_owned(),
        }
    }
}

/// Namespaces could not be made.
#[derive(Debug)]
pub(super) struct Refused {
    stage: Stage,
    error: io::Error,
    remedy: String,
}

impl Refused {
    pub(super) fn new(stage: Stage, error: io::Error) -> Refused {
        let remedy = Settings::now().remedy(stage, &error);
        Refused { stage, error, remedy }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.stage.what(), self.error, self.remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_that_forbids_it_is_named_with_the_command_that_mends_it() {
        let remedy =
            |settings: Settings, stage, kind: io::ErrorKind| settings.remedy(stage, &kind.into());
        let (full, denied) = (io::ErrorKind::StorageFull, io::ErrorKind::PermissionDenied);
        let none = Settings::default();
        for (settings, stage, kind, expected) in [
            (
                Settings { max_user: Some(0), ..none },
                Stage::User,
                full,
                "max_user_namespaces=15000",
            ),
            (Settings { max_user: Some(9), ..none }, Stage::User, full, "as many namespaces"),
            (
                Settings { max_mount: Some(0), ..none },
                Stage::Mount,
                full,
                "max_mnt_namespaces=15000",
            ),
            (Settings { by_anybody: Some(0), ..none }, Stage::User, denied, "userns_clone=1"),
            (
                Settings { by_profile: Some(1), ..none },
                Stage::Mount,
                denied,
                "unprivileged_userns=0",
            ),
            (Settings { by_profile: Some(1), ..none }, Stage::User, full, "as many namespaces"),
            (none, Stage::User, denied, "--privileged"),
            (none, Stage::User, io::ErrorKind::InvalidInput, "no such namespaces"),
        ] {
            let text = remedy(settings, stage, kind);
            assert!(text.contains(expected), "{settings:?} {stage:?} {kind:?}: {text}");
        }
    }
}
