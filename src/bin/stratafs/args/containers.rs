//! The commands that run others: in namespaces, and in containers.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use clap::Args;
use stratafs::container::Volume;

/// Run a command in a container on an image
///
/// IMAGE is an image or committed snapshot of the store; the path of an OCI layout or an archive of `docker
/// save`, which is imported first; or an active snapshot, which is used itself, so that its changes stay. Of
/// all others the command gets a new snapshot, which is removed when it has ended, unless --commit keeps it.
///
/// The command has a root directory, processes, mounts, a host name and System V IPC of its own, and the
/// network of the host. If none is given it is the image's, or /bin/sh; the image's environment, working
/// directory, user and entry point count as with docker. An ordinary user needs no rights: he gets a user
/// namespace, with the ids that /etc/subuid gives him; `stratafs info` says what he can have.
///
/// It is left docker's capabilities, and cannot gain more privileges: setuid programs stay its user's. There
/// is no filter of system calls to speak of, and no bound on memory: as root, run only what you trust.
///
/// What it has changed is shown on stderr at the end, as `diff` does: with --diff all of it; without, the first
/// lines, and only if that is a terminal. With --json an object with the exit code and the changes is printed
/// on stdout, in the last line.
///
/// The exit code is the command's, or 128 and the signal that ended it; 127 if there is no such command, 126
/// if it cannot be run, and 125 for all other failures; but 2 for a command line that cannot be right, and 130
/// if a signal came before the command ran. The container ends with its first command, and with this one,
/// however that ends.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stratafs run alpine.tar
  stratafs run alpine -- ls -l /etc
  stratafs run --diff alpine -- apk add curl
  stratafs run --commit alpine-curl alpine -- apk add curl
  stratafs run --volume .:/src --workdir /src --user 1000 alpine -- make
  stratafs prepare web-1 alpine && stratafs run web-1")]
pub(crate) struct Run {
    /// What to run it on
    pub(crate) image: OsString,
    /// The command and its arguments; options come before it. Default: the image's, else /bin/sh
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
    /// Keep what it has changed, whatever its exit code, as a committed snapshot of this name
    #[arg(long, value_name = "NAME")]
    pub(crate) commit: Option<String>,
    /// Show all that it has changed
    #[arg(long)]
    pub(crate) diff: bool,
    /// A variable of its environment; without a value, that of the caller. May be repeated
    #[arg(short, long = "env", value_name = "KEY[=VALUE]", value_parser = variable)]
    pub(crate) environment: Vec<Variable>,
    /// Its working directory, which is made if it is missing. Default: the image's, else /
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<PathBuf>,
    /// Who it is, by numbers or by names in the image. Default: the image's user, else root
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// A directory or file of the host that it sees at DST; `:ro`: and cannot change. May be repeated
    #[arg(long = "volume", value_name = "SRC:DST[:ro]", value_parser = volume)]
    pub(crate) volumes: Vec<Volume>,
    /// Its host name. Default: the name of its snapshot
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Run this before CMD, instead of the image's entry point; nothing, for none
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<OsString>,
    /// It cannot change its root directory
    #[arg(long, conflicts_with = "commit")]
    pub(crate) read_only: bool,
}

/// Run a command as root of a user namespace, or a shell
///
/// In it an ordinary user may mount, and has the ids that /etc/subuid and /etc/subgid give him: what is owned
/// by others in a store, or in a mount, can be looked at and changed. It has a mount namespace of its own, too:
/// nobody else sees what is mounted there. STRATAFS_ROOT is set, so that `stratafs` in it uses the same store.
///
/// Who may mount already, as root, gets a mount namespace alone.
///
/// The command takes the place of this process: its exit code is the command's; 127 if there is no such
/// command, 126 if it cannot be run, and 125 if there are no namespaces.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stratafs unshare
  stratafs unshare -- sh -c 'stratafs mount web-1 /mnt && ls -l /mnt'
  stratafs unshare -- cat /proc/self/uid_map")]
pub(crate) struct Unshare {
    /// The command and its arguments. Default: $SHELL, else /bin/sh
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// A variable, and what it is to be; none: what the caller has.
pub(crate) type Variable = (OsString, Option<OsString>);

fn variable(text: &str) -> Result<Variable, &'static str> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.into())),
        None => (text, None),
    };
    if key.is_empty() { Err("write it as KEY=VALUE or KEY") } else { Ok((key.into(), value)) }
}

fn volume(text: &str) -> Result<Volume, &'static str> {
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let parts: Vec<&[u8]> = text.as_bytes().split(|b| *b == b':').collect();
    let (source, target, read_only) = match parts[..] {
        [source, target] | [source, target, b"rw"] => (source, target, false),
        [source, target, b"ro"] => (source, target, true),
        _ => return Err("write it as SRC:DST or SRC:DST:ro"),
    };
    if source.is_empty() || !target.starts_with(b"/") {
        return Err("SRC must name something, and DST be an absolute path");
    }
    Ok(Volume { source: path(source), target: path(target), read_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_two_paths() {
        let parsed = volume("a b:/c:ro").unwrap();
        assert_eq!(parsed, Volume { source: "a b".into(), target: "/c".into(), read_only: true });
        assert!(!volume("/a:/c").unwrap().read_only && !volume("/a:/c:rw").unwrap().read_only);
        for bad in ["", "/a", ":/c", "/a:", "/a:c", "/a:/c:x", "/a:/c:ro:ro"] {
            assert!(volume(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn variables_need_a_name() {
        assert_eq!(variable("A=b=c"), Ok(("A".into(), Some("b=c".into()))));
        assert_eq!(variable("A="), Ok(("A".into(), Some("".into()))));
        assert_eq!(variable("A"), Ok(("A".into(), None)));
        assert!(variable("=b").is_err() && variable("").is_err());
    }
}
