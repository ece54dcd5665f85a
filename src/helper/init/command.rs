//! The command of a container: made up as execvp(3) does, started as a copy of the first process, which has
//! one thread, and waited for.

use std::ffi::{CString, OsStr};
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::plan::{Bytes, Plan};
use super::user::{self, User};
use crate::error::{Error, ErrorKind, Result};
use crate::helper::enter::{NOT_EXECUTABLE, NOT_MADE, not_executed};
use crate::sys::confine::{self, Pointers, Start, Step};
use crate::sys::namespace;

/// Where programs are looked for without another word: as Docker has it.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why it does not run, with the exit code for that.
pub(super) type Refusal = (i32, String);

/// Starts the plan's command in the root that this process has; gives its pid.
pub(super) fn start(plan: &Plan) -> Result<u32, Refusal> {
    let not_made = |e: Error| (NOT_MADE, e.to_string());
    let user = user::find(&plan.user).map_err(not_made)?;
    let start = make_up(plan, &user).map_err(not_made)?;
    let (arguments, environment) =
        (Pointers::to(&start.arguments), Pointers::to(&start.environment));
    let no_process = |e: io::Error| (NOT_MADE, format!("cannot start a process: {e}"));
    let (mut said, mut say) = io::pipe().map_err(no_process)?;
    let Some(pid) = namespace::fork().map_err(no_process)? else {
        let (step, e) = confine::become_command(&start, &arguments, &environment);
        let number = e.raw_os_error().unwrap_or_default().to_le_bytes();
        let [a, b, c, d] = number;
        // Its end tells enough.
        let _ = say.write_all(&[step as u8, a, b, c, d]);
        namespace::exit_now(NOT_MADE)
    };
    drop(say);
    let mut failed = Vec::new();
    said.read_to_end(&mut failed).map_err(no_process)?;
    let &[step, a, b, c, d] = failed.as_slice() else { return Ok(pid) };
    namespace::wait_for(pid).map_err(no_process)?;
    let e = io::Error::from_raw_os_error(i32::from_le_bytes([a, b, c, d]));
    Err(explain(Step::from_number(step), &e, (plan, &user, &start)))
}

fn explain(
    step: Option<Step>,
    e: &io::Error,
    (plan, user, start): (&Plan, &User, &Start),
) -> Refusal {
    let program = || plan.arguments.first().map(Bytes::text).unwrap_or_default();
    let exists = || {
        let path = |program: &CString| Path::new(OsStr::from_bytes(program.as_bytes())).to_owned();
        start.programs.iter().any(|program| path(program).symlink_metadata().is_ok())
    };
    match step {
        Some(Step::Program) => not_executed(&program().to_string_lossy(), e, exists),
        Some(Step::Directory) => (
            NOT_EXECUTABLE,
            format!("cannot enter in the container {:?}: {e}", plan.directory.text()),
        ),
        Some(Step::User) => {
            let User { uid, gid, .. } = user;
            let remedy = match e.kind() {
                io::ErrorKind::InvalidInput => {
                    "; there is no such id in this user namespace: `stratafs info` says how to get more ids"
                }
                _ => "",
            };
            (NOT_MADE, format!("cannot become user {uid} with group {gid}: {e}{remedy}"))
        }
        Some(Step::Filter) => (NOT_MADE, format!("cannot filter system calls: {e}")),
        Some(Step::Rights) | None => (NOT_MADE, format!("cannot give up rights: {e}")),
    }
}

fn make_up(plan: &Plan, user: &User) -> Result<Start> {
    let mut environment: Vec<&[u8]> =
        plan.environment.iter().map(|entry| entry.0.as_slice()).collect();
    let is_set = |key: &str| {
        let begins = |entry: &Bytes| {
            entry.0.strip_prefix(key.as_bytes()).is_some_and(|rest| rest.starts_with(b"="))
        };
        plan.environment.iter().any(begins)
    };
    let home = [b"HOME=", user.home.as_deref().unwrap_or(b"/")].concat();
    let path = [b"PATH=", PATH].concat();
    for (key, default) in [("HOME", &home), ("PATH", &path)] {
        if !is_set(key) {
            environment.push(default);
        }
    }
    let path =
        environment.iter().rev().find_map(|entry| entry.strip_prefix(b"PATH=")).unwrap_or(PATH);
    let Some(program) = plan.arguments.first() else {
        return Err(Error::new(ErrorKind::InvalidArgument, "there is no command to run"));
    };
    let programs = candidates(&program.0, path);
    Ok(Start {
        programs: c_strings(programs.iter().map(Vec::as_slice))?,
        arguments: c_strings(plan.arguments.iter().map(|argument| argument.0.as_slice()))?,
        environment: c_strings(environment.into_iter())?,
        directory: c_string(&plan.directory.0)?,
        user: user.uid,
        group: user.gid,
        groups: may_set_groups()?.then(|| user.groups.clone()),
    })
}

/// The files that a program's name means, in turn.
fn candidates(program: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if program.is_empty() {
        return Vec::new();
    }
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    let program = OsStr::from_bytes(program);
    let in_dir = |dir: &[u8]| {
        let dir = if dir.is_empty() { b".".as_slice() } else { dir };
        Path::new(OsStr::from_bytes(dir)).join(program).into_os_string().as_bytes().to_vec()
    };
    path.split(|b| *b == b':').map(in_dir).collect()
}

fn c_strings<'a>(texts: impl Iterator<Item = &'a [u8]>) -> Result<Vec<CString>> {
    texts.map(c_string).collect()
}

fn c_string(text: &[u8]) -> Result<CString> {
    CString::new(text).map_err(|e| {
        Error::new(ErrorKind::InvalidArgument, "the command or its environment has a NUL byte")
            .with_source(e)
    })
}

/// Not in a user namespace that maps its maker alone: user_namespaces(7).
fn may_set_groups() -> Result<bool> {
    let path = "/proc/self/setgroups";
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim() != "deny"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(Error::io("read", path, e)),
    }
    .or_else(|e| if Path::new("/proc/self").exists() { Err(e) } else { Ok(false) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_as_a_shell_does() {
        let of = |program: &str, path: &str| candidates(program.as_bytes(), path.as_bytes());
        assert_eq!(of("ls", "/a::/b"), [&b"/a/ls"[..], b"./ls", b"/b/ls"]);
        assert_eq!(of("./ls", "/a"), [b"./ls"]);
        assert_eq!(of("/ls", "/a"), [b"/ls"]);
        assert!(of("", "/a").is_empty());
    }
}
