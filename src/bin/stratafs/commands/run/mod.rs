//! A command in a container: `run`.
//!
//! The program enters namespaces first, by becoming itself again there: what it mounts goes with it, however it
//! ends. In them it finds the snapshot ([`image`]), mounts it, starts the container, passes signals on, and
//! cleans up. What a killed one has left is found by its label ([`leftovers`]).

mod image;
pub(super) mod leftovers;

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;

use serde::Serialize;
use stratafs::container::{Container, NotStarted, pass_signals};
use stratafs::helper::HelperCommand;
use stratafs::{Change, CommitOptions, ErrorKind, FuseServer, Labels, MountOptions, Store};

use super::layers::Line;
use super::unshare::enter_namespaces;
use super::{Context, Missing, Result};
use crate::args;
use crate::failure::Failure;

use image::{Base, Configured};

/// How many changes are shown to who did not ask for them.
const SHOWN: usize = 20;

/// All failures but the command's own end with 125.
pub(super) fn run(context: &Context, args: args::Run) -> Result {
    match run_in_container(context, args) {
        Err(failure @ (Failure::Status(_) | Failure::NotStarted(_) | Failure::Interrupted)) => {
            Err(failure)
        }
        Err(_) if context.interrupt.is_raised() => Err(Failure::Interrupted),
        Err(failure) => Err(Failure::NoContainer(Box::new(failure))),
        Ok(()) => Ok(()),
    }
}

fn run_in_container(context: &Context, args: args::Run) -> Result {
    enter_namespaces(context)?;
    let store = context.open_served_by(Missing::Create, FuseServer::InProcess)?;
    leftovers::sweep(&store)?;
    if let Some(name) = &args.commit {
        is_free(&store, name)?;
    }
    let (base, configured) = image::find(context, &store, &args.image)?;
    let snapshot = match base {
        Base::Active(key) => Snapshot { store: &store, key, is_own: false },
        Base::Committed(parent) => {
            let key = leftovers::new_key()?;
            let label = leftovers::label()?;
            store.prepare(&key, parent.as_deref(), label)?;
            Snapshot { store: &store, key, is_own: true }
        }
    };
    let outcome = in_snapshot(context, &args, &snapshot, configured);
    // A snapshot that the command did not come to use is nobody's either.
    let is_kept = match &outcome {
        Ok(outcome) => outcome.committed.is_some(),
        Err(failure) => matches!(failure, Failure::NotCommitted { .. }),
    };
    let removed = if is_kept { Ok(()) } else { snapshot.remove() };
    let outcome = outcome?;
    removed?;
    outcome.tell(context, args.diff)?;
    match outcome.exit_code {
        0 => Ok(()),
        code => Err(Failure::Status(u8::try_from(code).unwrap_or(u8::MAX))),
    }
}

/// Before the command has done anything that could then not be kept.
fn is_free(store: &Store, name: &str) -> Result {
    match store.stat(name) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e.into()),
        Ok(_) => Err(Failure::Usage(format!(
            "there is a snapshot {name:?} already: give --commit another name, or remove it"
        ))),
    }
}

/// The snapshot that the command works on.
struct Snapshot<'a> {
    store: &'a Store,
    key: String,
    /// It is this command's, and goes with it.
    is_own: bool,
}

impl Snapshot<'_> {
    fn remove(&self) -> Result {
        if self.is_own { Ok(self.store.remove(&self.key)?) } else { Ok(()) }
    }

    /// Makes it the user's, since it could not be committed: what the command has done is not lost.
    fn keep(&self, name: &str, e: stratafs::Error) -> Failure {
        if self.is_own
            && let Err(e) = self.store.update(&self.key, Labels::new(), &["labels"])
        {
            tracing::warn!("the snapshot {:?} is removed by the next `run`: {e}", self.key);
        }
        Failure::NotCommitted { name: name.to_owned(), key: self.key.clone(), source: e }
    }
}

fn in_snapshot(
    context: &Context,
    args: &args::Run,
    snapshot: &Snapshot<'_>,
    configured: Configured,
) -> Result<Outcome> {
    let store = snapshot.store;
    let mut options = MountOptions::default();
    // The devices that a container may use are not the image's.
    options.restrictions.nodev = true;
    options.private = true;
    // Nobody sees it after a crash.
    options.volatile = snapshot.is_own && args.commit.is_none();
    let mut guard = store.activate(&snapshot.key, &mount_point(store)?, &options)?;
    if context.interrupt.is_raised() {
        return Err(Failure::Interrupted);
    }
    let container = container(args, configured, &snapshot.key, guard.target().to_owned())?;
    let ended = pass_signals(|terminal| -> Result<i32> {
        let running = container.start(&HelperCommand::CurrentExe)?;
        terminal.pass_to(&running)?;
        Ok(running.wait()?)
    });
    let unmounted = guard.unmount();
    drop(guard);
    let exit_code = ended??;
    // From here on nothing may be lost that was to be kept.
    let committed = match &args.commit {
        None => unmounted.map(|()| None)?,
        Some(name) => unmounted
            .and_then(|()| store.commit(name, &snapshot.key, CommitOptions::new()))
            .map(|_| Some(name.clone()))
            .map_err(|e| snapshot.keep(name, e))?,
    };
    let asked = args.diff || context.json || io::stderr().is_terminal();
    let shown = committed.as_ref().unwrap_or(&snapshot.key);
    let changes = match asked && !args.read_only {
        true => store.changes(shown, &mut stratafs::ignore_progress),
        false => Ok(Vec::new()),
    };
    let changes = match (changes, &committed) {
        (Err(e), Some(_)) => {
            tracing::warn!("what was committed cannot be shown: {e}");
            Vec::new()
        }
        (changes, _) => changes?,
    };
    Ok(Outcome { exit_code, changes, committed })
}

/// One directory for all: each mounts on it in a namespace of its own.
fn mount_point(store: &Store) -> Result<PathBuf> {
    let path = store.root().join("run/root");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
    made.map_err(|e| Failure::io("create directory", &path, e))?;
    Ok(path)
}

fn container(
    args: &args::Run,
    configured: Configured,
    key: &str,
    root: PathBuf,
) -> Result<Container> {
    let command = configured.command(args.entrypoint.as_ref(), &args.command);
    let mut container = Container::new(root, command);
    let mut set = |key: OsString, value: OsString| {
        container.environment.retain(|(known, _)| *known != key);
        container.environment.push((key, value));
    };
    container_defaults(&mut set);
    let host_name = match &args.hostname {
        Some(name) => name.clone(),
        None => host_name(key).to_owned(),
    };
    set("HOSTNAME".into(), host_name.clone().into());
    for (key, value) in configured.environment {
        set(key, value);
    }
    for (key, value) in &args.environment {
        match value.clone().or_else(|| env::var_os(key)) {
            Some(value) => set(key.clone(), value),
            None => tracing::debug!(?key, "the caller has no such variable"),
        }
    }
    container.host_name = host_name;
    container.directory =
        args.workdir.clone().or(configured.directory).unwrap_or_else(|| "/".into());
    container.user = args.user.clone().or(configured.user).unwrap_or_default();
    container.read_only = args.read_only;
    container.volumes.clone_from(&args.volumes);
    for volume in &container.volumes {
        fs::metadata(&volume.source)
            .map_err(|e| Failure::io("share with the container", &volume.source, e))?;
    }
    Ok(container)
}

/// What programs look at to know where they are.
fn container_defaults(set: &mut impl FnMut(OsString, OsString)) {
    set("container".into(), "stratafs".into());
    if io::stdin().is_terminal()
        && let Some(term) = env::var_os("TERM")
    {
        set("TERM".into(), term);
    }
}

/// The snapshot's name, if a host may have it.
fn host_name(key: &str) -> &str {
    let fits = !key.is_empty()
        && key.len() <= 63
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !key.starts_with('-');
    if fits { key } else { "container" }
}

/// What came of a container.
struct Outcome {
    exit_code: i32,
    changes: Vec<Change>,
    committed: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    exit_code: i32,
    /// The committed snapshot; null if it was not asked for.
    committed: Option<&'a str>,
    changes: Vec<Line>,
}

impl Outcome {
    fn tell(&self, context: &Context, all: bool) -> Result {
        let lines = self.changes.iter().map(|change| Line::new(change, b'\n'));
        if context.json {
            let report = Report {
                exit_code: self.exit_code,
                committed: self.committed.as_deref(),
                changes: lines.collect(),
            };
            let mut line = serde_json::to_vec(&report).map_err(io::Error::from)?;
            line.push(b'\n');
            let mut out = io::stdout().lock();
            out.write_all(&line)?;
            return Ok(out.flush()?);
        }
        let shown = if all { self.changes.len() } else { SHOWN };
        let mut text: Vec<u8> = lines.take(shown).flat_map(Line::into_bytes).collect();
        match self.changes.len().saturating_sub(shown) {
            0 => {}
            more => text.extend(format!("and {more} more: --diff shows all\n").into_bytes()),
        }
        // Whoever would see it may have gone; the exit code is the command's.
        let _ = io::stderr().write_all(&text);
        Ok(())
    }
}

impl From<NotStarted> for Failure {
    fn from(e: NotStarted) -> Failure {
        Failure::NotStarted(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_named_after_the_snapshot_if_it_may() {
        assert_eq!(host_name("run-12ab"), "run-12ab");
        for key in ["", "a/b", "a b", "-a", "\u{e4}", &"x".repeat(64)] {
            assert_eq!(host_name(key), "container", "{key:?}");
        }
    }
}
