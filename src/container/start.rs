//! The starter's side of a container: a thread that starts its first process, as the child of a new pid
//! namespace, and waits for it. The process dies with that thread.

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use super::NotStarted;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::helper::init::plan::{self, Answer, Plan};
use crate::helper::{HelperCommand, arguments_to_be_first};
use crate::sys::signals::{self, Foreground, Taken};
use crate::sys::{namespace, socket};

/// How the first process is named where something fails.
const FIRST: &str = "the first process of a container";

/// A container that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    first: OwnedFd,
    socket: OwnedFd,
    /// None once it was waited for.
    waits: Option<JoinHandle<std::io::Result<ExitStatus>>>,
}

pub(super) fn start(helper: &HelperCommand, plan: &Plan) -> Result<Running, NotStarted> {
    let (socket, theirs) = socket::pair().at("make a socket for", FIRST)?;
    let mut command = Command::new(helper.program());
    command.arg0("stratafs-init").args(arguments_to_be_first(theirs.as_fd()));
    namespace::inherit(&mut command, theirs.as_fd());
    let (told, tell) = mpsc::channel();
    let begin = move || {
        // Of this thread's children alone.
        namespace::children_in_new_pid_namespace()?;
        let mut child = command.spawn()?;
        drop((command, theirs));
        let opened = signals::open_process(child.id());
        let is_open = opened.is_ok();
        // Whoever started this waits for it.
        let _ = told.send(opened);
        if !is_open {
            child.kill()?;
        }
        child.wait()
    };
    let thread = thread::Builder::new().name("stratafs-container".to_owned());
    let waits = thread.spawn(begin).at("start a thread for", FIRST)?;
    let Ok(first) = tell.recv() else {
        let e = join(waits).err().unwrap_or_else(|| std::io::ErrorKind::Other.into());
        let e = match e.kind() {
            std::io::ErrorKind::PermissionDenied => Error::io("start", FIRST, e).context(
                "a container needs CAP_SYS_ADMIN: start it as root, or in a user namespace of your own \
                 (`stratafs unshare`)",
            ),
            _ => Error::io("start", FIRST, e),
        };
        return Err(e.into());
    };
    let mut running = Running { first: first.at("open", FIRST)?, socket, waits: Some(waits) };
    let begun = running.begin(plan);
    if begun.is_err() {
        // It may still have to take away what it made.
        running.join().at("wait for", FIRST)?;
    }
    begun.map(|()| running)
}

impl Running {
    /// What is not an answer of the first process is the end of it.
    fn begin(&mut self, plan: &Plan) -> Result<(), NotStarted> {
        match self.answer(plan) {
            Ok(Some(Answer::Started)) => Ok(()),
            Ok(Some(Answer::Failed { code, text })) => {
                let kind = match code {
                    126 => ErrorKind::PermissionDenied,
                    127 => ErrorKind::NotFound,
                    _ => ErrorKind::FailedPrecondition,
                };
                let exit_code = u8::try_from(code).unwrap_or(125);
                Err(NotStarted { exit_code, error: Error::new(kind, text) })
            }
            Ok(_) => {
                self.kill();
                let text = "the helper ended without an answer: its `main` must begin with \
                            stratafs::helper::run_if_requested()";
                Err(Error::new(ErrorKind::Incompatible, text).into())
            }
            Err(e) => {
                self.kill();
                Err(e.into())
            }
        }
    }

    fn answer(&self, plan: &Plan) -> Result<Option<Answer>> {
        match plan::hear(&self.socket)? {
            Some(Answer::Born) => plan::say(&self.socket, plan)?,
            other => return Ok(other.filter(|answer| matches!(answer, Answer::Failed { .. }))),
        }
        match plan::hear(&self.socket)? {
            Some(Answer::Left(left)) => {
                tell_of(&left);
                plan::hear(&self.socket)
            }
            answer => Ok(answer),
        }
    }

    /// Sends a signal to the command, one of those that programs are ended by or told something: SIGHUP, SIGINT,
    /// SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM, SIGWINCH; or kills all of the container, by SIGKILL (9).
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, signal: i32) -> Result<()> {
        signals::send_to(&self.first, signal).at("send a signal to", FIRST)
    }

    /// Waits until all of the container has ended, and gives the command's exit code: 128 and the signal, if
    /// one has ended it.
    ///
    /// # Errors
    /// If the container was ended by something else than its command.
    pub fn wait(mut self) -> Result<i32> {
        let status = self.join().at("wait for", FIRST)?;
        match (status.code(), status.signal()) {
            (Some(code), _) => {
                self.hear_what_is_left()?;
                Ok(code)
            }
            (None, Some(signal)) => Ok(128 + signal),
            (None, None) => Err(Error::new(ErrorKind::Io, "the container has not ended")),
        }
    }

    fn hear_what_is_left(&self) -> Result<()> {
        match plan::hear(&self.socket)? {
            Some(Answer::Left(left)) => tell_of(&left),
            Some(Answer::Failed { text, .. }) => return Err(Error::new(ErrorKind::Io, text)),
            _ => {}
        }
        Ok(())
    }

    fn join(&mut self) -> std::io::Result<ExitStatus> {
        match self.waits.take() {
            Some(thread) => join(thread),
            None => Err(std::io::Error::other("it was waited for already")),
        }
    }

    fn kill(&self) {
        // It has ended, then.
        let _ = self.signal(9);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.waits.is_some() {
            self.kill();
            if let Err(e) = self.join() {
                tracing::warn!(error = %e, "cannot wait for the end of a container");
            }
        }
    }
}

fn join(thread: JoinHandle<std::io::Result<ExitStatus>>) -> std::io::Result<ExitStatus> {
    thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the waiting thread panicked")))
}

fn tell_of(left: &std::collections::BTreeSet<String>) {
    for what in left {
        tracing::warn!("what a container was given to mount on stays: {what}");
    }
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).at("make absolute the path", path)
}

/// Takes the process's signals over for as long as `body` lasts, which may start a container: those that
/// processes send to this one go to it, once [`Terminal::pass_to`] was called. For programs alone.
#[doc(hidden)]
pub fn pass_signals<T>(body: impl FnOnce(&Terminal) -> T) -> Result<T> {
    let (taken, reader) = signals::take_over().at("take over", "the signals of this process")?;
    let terminal =
        Terminal { reader: std::sync::Mutex::new(Some(reader)), front: Foreground::now(), taken };
    let done = body(&terminal);
    if let Some(front) = &terminal.front
        && let Err(e) = front.take_again()
    {
        tracing::debug!(error = %e, "the terminal stays with another process group");
    }
    drop(terminal.taken);
    Ok(done)
}

/// The signals and the terminal of a program that has a container in front.
#[doc(hidden)]
#[derive(Debug)]
pub struct Terminal {
    reader: std::sync::Mutex<Option<std::io::PipeReader>>,
    front: Option<Foreground>,
    taken: Taken,
}

impl Terminal {
    /// From now on signals go to the container, and those that came before.
    pub fn pass_to(&self, running: &Running) -> Result<()> {
        let reader = self.reader.lock().ok().and_then(|mut reader| reader.take());
        let Some(mut reader) = reader else { return Ok(()) };
        let first = running.first.try_clone().at("open again", FIRST)?;
        let pass = move || {
            let mut signal = [0];
            while matches!(reader.read(&mut signal), Ok(1)) {
                let [signal] = signal;
                // It may just have ended.
                let _ = signals::send_to(&first, signal.into());
            }
        };
        let thread = thread::Builder::new().name("stratafs-signals".to_owned());
        thread.spawn(pass).map(drop).at("start a thread for", "signals")
    }
}
