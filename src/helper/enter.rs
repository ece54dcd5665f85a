//! A helper that enters new namespaces, and becomes another program in them.
//!
//! What it is started with: [`REQUEST`], what to enter (`mount`, or `user` for both), and for a user
//! namespace the mappings of users and of groups, as /proc/PID/uid_map has them with commas for line feeds,
//! and the programs that may write these, nothing for who maps himself alone. Then the program and its
//! arguments. Standard input, output and error output are that program's.
//!
//! Who may map other ids than his own has newuidmap(1) and newgidmap(1) do it, from outside of the new
//! namespace: for that a copy of this process stays behind.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use super::forbidden::{Refused, Stage};
use crate::sys::namespace::{self, Propagation};

/// The argument that makes a program such a helper.
pub(super) const REQUEST: &str = "--stratafs-enter-namespaces";
/// What to enter.
pub(super) const USER: &str = "user";
pub(super) const MOUNT: &str = "mount";

/// The exit codes of programs that start others: env(1), unshare(1), podman-run(1).
pub(super) const NOT_MADE: i32 = 125;
pub(super) const NOT_EXECUTABLE: i32 = 126;
pub(super) const NO_SUCH_PROGRAM: i32 = 127;

/// Becomes the program; else says why not, and gives the exit code.
pub(super) fn run(arguments: impl Iterator<Item = OsString>) -> i32 {
    match enter(arguments) {
        Ok(never) => match never {},
        Err((code, text)) => {
            // Should nobody hear it, the code still tells.
            let _ = writeln!(io::stderr(), "stratafs: {text}");
            code
        }
    }
}

enum Never {}

fn enter(mut arguments: impl Iterator<Item = OsString>) -> Result<Never, (i32, String)> {
    let malformed =
        || (NOT_MADE, "the helper was started in a way that it does not know".to_owned());
    let mut next = || arguments.next().ok_or_else(malformed);
    let refused = |stage| move |e| (NOT_MADE, Refused::new(stage, e).to_string());
    match next()?.to_str() {
        Some(MOUNT) => {}
        Some(USER) => {
            let maps = [next()?, next()?];
            let programs = [next()?, next()?];
            let texts = maps.map(|map| map.to_string_lossy().replace(',', "\n"));
            if programs.iter().any(|program| program.is_empty()) {
                namespace::enter_user().map_err(refused(Stage::User))?;
                map_oneself(&texts).map_err(refused(Stage::Map))?;
            } else {
                enter_mapped(&texts, &programs)?;
            }
            namespace::become_root().map_err(refused(Stage::Map))?;
        }
        _ => return Err(malformed()),
    }
    namespace::enter_mount().map_err(refused(Stage::Mount))?;
    namespace::set_propagation(Propagation::Slave).map_err(refused(Stage::Mount))?;
    namespace::close_others_on_exec().map_err(refused(Stage::Mount))?;
    let program = next()?;
    let e = Command::new(&program).args(arguments).exec();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let exists =
        || std::env::split_paths(&path).any(|dir| dir.join(&program).symlink_metadata().is_ok());
    Err(not_executed(&program.to_string_lossy(), &e, exists))
}

/// Why a program could not be run, with the exit code for that. `exists` tells of one that is named without a
/// directory whether there is any.
pub(super) fn not_executed(
    program: &str,
    e: &io::Error,
    exists: impl FnOnce() -> bool,
) -> (i32, String) {
    match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            (NO_SUCH_PROGRAM, format!("cannot run {program:?}: {e}"))
        }
        // execvp(3) says so, too, if it may not look into one of the directories.
        io::ErrorKind::PermissionDenied if !program.contains('/') && !exists() => {
            (NO_SUCH_PROGRAM, format!("cannot run {program:?}: there is none in PATH"))
        }
        _ => (NOT_EXECUTABLE, format!("cannot run {program:?}: {e}")),
    }
}

/// Maps one user and one group, which everybody may for himself: user_namespaces(7).
fn map_oneself([users, groups]: &[String; 2]) -> io::Result<()> {
    match fs::write("/proc/self/setgroups", "deny") {
        // Before Linux 3.19.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        done => done?,
    }
    fs::write("/proc/self/gid_map", groups)?;
    fs::write("/proc/self/uid_map", users)
}

/// Enters a user namespace, and has a copy of this process that is left outside map its ids.
fn enter_mapped(maps: &[String; 2], programs: &[OsString; 2]) -> Result<(), (i32, String)> {
    let no_copy = |e: io::Error| (NOT_MADE, format!("cannot start a process to map ids: {e}"));
    let (mut go, said) = (io::pipe().map_err(no_copy)?, io::pipe().map_err(no_copy)?);
    let Some(copy) = namespace::fork().map_err(no_copy)? else {
        drop((go.1, said.0));
        let mut text = [0; 1];
        // Nothing comes if there is no namespace to map.
        if matches!(go.0.read(&mut text), Ok(1)) {
            let failed =
                maps.iter().zip(programs).find_map(|(map, program)| map_by(program, map).err());
            let _ = { said.1 }.write_all(failed.unwrap_or_default().as_bytes());
        }
        namespace::exit_now(0)
    };
    drop((go.0, said.1));
    let entered = namespace::enter_user();
    if entered.is_ok() {
        // Should the copy be gone, no ids are mapped: that is found below.
        let _ = go.1.write_all(b"x");
    }
    drop(go.1);
    let mut failed = String::new();
    let heard = { said.0 }.read_to_string(&mut failed);
    namespace::wait_for(copy).map_err(no_copy)?;
    entered.map_err(|e| (NOT_MADE, Refused::new(Stage::User, e).to_string()))?;
    heard.map_err(no_copy)?;
    match failed.is_empty() {
        true => Ok(()),
        false => Err((NOT_MADE, failed)),
    }
}

/// In the copy: has a program map the ids of the process that this is a copy of.
fn map_by(program: &OsString, map: &str) -> Result<(), String> {
    let name = Path::new(program);
    let mut command = Command::new(program);
    command.arg(namespace::parent().to_string()).args(map.split_ascii_whitespace());
    let output = command.output().map_err(|e| format!("cannot run {name:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "{name:?} refused to map ids: {}: it must be setuid root or have the capability, and the ranges \
         must be this user's in /etc/subuid and /etc/subgid",
        said.trim()
    ))
}
