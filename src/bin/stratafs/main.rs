//! The command line tool: `stratafs --help`.
//!
//! The way of a command: [`args`] as typed -> [`commands`], which validate, make one call of the
//! library, and print what it gives ([`output`]) -> [`failure`], if it fails. The environment is read
//! here alone; the library is told.
#![deny(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![warn(missing_debug_implementations, unreachable_pub)]

mod args;
mod commands;
mod failure;
mod interrupt;
mod output;
mod progress;

use std::env;
use std::fs;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;
use tracing::level_filters::LevelFilter;

use args::{Arguments, OwnersName};
use commands::Context;
use failure::Failure;
use interrupt::Interrupt;

/// By which `unshare` tells where a new store is to keep owners.
pub(crate) const OWNERS_VARIABLE: &str = "STRATAFS_OWNERS";

fn main() -> ExitCode {
    #[cfg(feature = "fuse")]
    stratafs::helper::run_if_requested();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(e) => return refuse(&e),
    };
    log(arguments.verbose, arguments.json);
    let json = arguments.json;
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    let interrupt = Interrupt::install()
        .map_err(|source| Failure::Io { what: "cannot take signals over".to_owned(), source })?;
    let privileged = is_root() && !has_one_id();
    let root = match arguments.root {
        Some(root) => root,
        None => default_root(privileged)?,
    };
    let context = Context {
        root,
        owners: arguments.owners,
        owners_of_new: owners_of_new()?,
        driver: arguments.driver,
        json: arguments.json,
        privileged,
        interrupt: interrupt.clone(),
    };
    match commands::run(&context, arguments.command) {
        // Reading from a pipe fails when a signal comes, whatever the library makes of it.
        Err(failure) if interrupt.is_raised() && !failure.is_of_a_command() => {
            tracing::info!(%failure, "stopped by a signal");
            Err(Failure::Interrupted)
        }
        done => done,
    }
}

/// Help and version on stdout; on stderr what is wrong with the command line.
fn refuse(e: &clap::Error) -> ExitCode {
    let code = u8::try_from(e.exit_code()).unwrap_or(2);
    // Not parsed, so not known for sure; what else could it mean?
    let json = env::args_os().any(|argument| argument == "--json");
    let printed = if json && e.use_stderr() {
        let text = e.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let object = failure::error_object("usage", text.trim_end());
        writeln!(io::stderr(), "{object}")
    } else {
        e.print()
    };
    match printed {
        Err(e) if code == 0 => Failure::from(e).report(json),
        // Should stderr be closed, the exit code still tells.
        _ => ExitCode::from(code),
    }
}

fn log(verbose: u8, json: bool) {
    let level = match verbose {
        0 if json => LevelFilter::OFF,
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .init();
}

/// What `unshare` tells of new stores.
fn owners_of_new() -> Result<Option<OwnersName>, Failure> {
    let Some(text) = env::var_os(OWNERS_VARIABLE).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let known = [OwnersName::Files, OwnersName::Xattrs];
    match known.into_iter().find(|name| text == name.as_str()) {
        Some(name) => Ok(Some(name)),
        None => {
            Err(Failure::Usage(format!("{OWNERS_VARIABLE} is {text:?}: make it files or xattrs")))
        }
    }
}

fn default_root(privileged: bool) -> Result<PathBuf, Failure> {
    // As `unshare` sets it.
    if let Some(root) = env::var_os("STRATAFS_ROOT").filter(|root| !root.is_empty()) {
        return Ok(PathBuf::from(root));
    }
    if privileged {
        return Ok(PathBuf::from("/var/lib/stratafs"));
    }
    // Relative ones are to be ignored: XDG Base Directory Specification 0.8.
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .map(|data| data.join("stratafs"))
        .ok_or_else(|| {
            Failure::Usage("no store: give --root DIR, or set XDG_DATA_HOME or HOME".to_owned())
        })
}

/// Whether there is but one user in this user namespace, so that no file can be given to another:
/// user_namespaces(7).
fn has_one_id() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let mut counts = map.lines().filter_map(|line| line.split_whitespace().nth(2));
    counts.next() == Some("1") && counts.next().is_none()
}

/// Whether the effective user is root: the second number of `Uid:`, proc_pid_status(5).
fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().nth(1))
        .is_some_and(|effective| effective == "0")
}
