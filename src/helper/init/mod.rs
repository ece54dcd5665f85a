//! A helper that is the first process of a container: it makes the container's root, starts the command, takes
//! care of processes that nobody else waits for, passes signals on, and ends as the command did.
//!
//! What it is started with: [`REQUEST`], and the number of the socket by which it is told what to do
//! ([`plan`]). It is born as the first process of a pid namespace, which ends with it, and dies with the thread
//! that started it. Standard input, output and error output are the command's.

mod command;
pub(crate) mod plan;
mod root;
mod user;

use std::ffi::OsString;
use std::os::fd::OwnedFd;

use super::enter::NOT_MADE;
use super::forbidden::{Refused, Stage};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::{namespace, signals, umask};

use command::Refusal;
use plan::{Answer, Plan};
use root::Root;

/// The argument that makes a program such a helper.
pub(super) const REQUEST: &str = "--stratafs-be-first";

pub(super) fn run(mut arguments: impl Iterator<Item = OsString>) -> i32 {
    let number = arguments.next().and_then(|number| number.to_str()?.parse().ok());
    let Some(Ok(socket)) = number.map(namespace::keep_only) else { return NOT_MADE };
    match be_first(&socket) {
        Ok(code) => code,
        Err((code, text)) => {
            // Whoever would hear it may have gone.
            let _ = plan::say(&socket, &Answer::Failed { code, text });
            code
        }
    }
}

fn be_first(socket: &OwnedFd) -> Result<i32, Refusal> {
    let not_made = |e: Error| (NOT_MADE, e.to_string());
    let plan = hear_plan(socket).map_err(not_made)?;
    let forbidden = |e| (NOT_MADE, Refused::new(Stage::Container, e).to_string());
    namespace::enter_container().map_err(forbidden)?;
    namespace::set_host_name(plan.host_name.as_bytes())
        .at("set the host name", &plan.host_name)
        .map_err(not_made)?;
    namespace::leave_keys();
    // As programs in containers expect it: what they are started by does not show.
    umask::set_on_this_thread(0o022).at("set the umask of", "a container").map_err(not_made)?;
    let root = Root::enter(&plan).map_err(not_made)?;
    let ended = start_and_wait(socket, &plan);
    // Whatever else the command has started ends with it.
    match signals::kill_all_others() {
        Ok(()) => while signals::reap(true).is_ok() {},
        Err(e) => tracing::debug!(error = %e, "processes of a container are left to the kernel"),
    }
    let left = root.leave();
    if !left.is_empty() {
        // Whoever would hear it may have gone.
        let _ = plan::say(socket, &Answer::Left(left));
    }
    ended
}

/// From here on this process dies with its starter: who had died before does not answer.
fn hear_plan(socket: &OwnedFd) -> Result<Plan> {
    namespace::die_with_starter().at("be bound to", "the process that started this")?;
    plan::say(socket, &Answer::Born)?;
    let plan: Option<Plan> = plan::hear(socket)?;
    match plan {
        Some(plan) if plan.version == Plan::VERSION => Ok(plan),
        Some(plan) => Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "the program that starts containers is of version {}, and this is version {}: use the \
                 same one",
                plan.version,
                Plan::VERSION
            ),
        )),
        None => Err(Error::new(ErrorKind::Incompatible, "nobody says what to run in a container")),
    }
}

fn start_and_wait(socket: &OwnedFd, plan: &Plan) -> Result<i32, Refusal> {
    let lost = |e: std::io::Error| (NOT_MADE, format!("cannot wait for the command: {e}"));
    // Before the command is there, whose end is one of them.
    signals::block_all().map_err(lost)?;
    let command = command::start(plan)?;
    plan::say(socket, &Answer::Started).map_err(|e| (NOT_MADE, e.to_string()))?;
    loop {
        // Several may have ended by one signal, and none by the first.
        while let Ok(Some((pid, code))) = signals::reap(false) {
            if pid == command {
                return Ok(code);
            }
        }
        let (signal, is_sent) = signals::next().map_err(lost)?;
        if is_sent && signals::PASSED_ON.contains(&signal) {
            // It may just have ended.
            let _ = signals::send(command, signal);
        }
    }
}
