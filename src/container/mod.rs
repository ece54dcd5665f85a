//! A command in a container: on a root directory of its own, with processes, mounts, host name and System V
//! IPC of its own, and the network of the host.
//!
//! The root directory is one that is mounted, such as [`Store::activate`](crate::Store::activate) gives. Who
//! starts a container must be able to mount: as root, or in a user namespace, in which an ordinary user gets
//! himself by [`rootless::command`](crate::rootless::command). The first process of the container is a helper;
//! the calling process keeps its namespaces, its signals and its terminal.
//!
//! What the command may do is what Docker leaves to a container's root, without what would give it more
//! privileges than it was started with (`no_new_privs`). There is no filter of system calls but one that keeps it
//! from typing into the terminal that it was given, and no bound on what it uses. As the machine's root, that
//! is for programs that one would run anyway, not for hostile ones; in a user namespace it is no more than
//! the user may do.

mod start;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::helper::HelperCommand;
use crate::helper::init::plan::{Bytes, Plan, Shared};

pub use start::Running;
#[doc(hidden)]
pub use start::{Terminal, pass_signals};

/// What a container is to be.
///
/// ```no_run
/// use stratafs::container::Container;
/// use stratafs::helper::{HelperCommand, run_if_requested};
/// use stratafs::{Labels, MountOptions, Store, StoreOptions};
///
/// run_if_requested(); // First in main.
/// let store = Store::open("/var/lib/stratafs", StoreOptions::new())?;
/// store.prepare("container-1", Some("alpine"), Labels::new())?;
/// let target = std::path::Path::new("/run/container-1");
/// let mut guard = store.activate("container-1", target, &MountOptions::default())?;
/// let container = Container::new(target, ["echo", "hello"]);
/// let code = container.start(&HelperCommand::CurrentExe)?.wait()?;
/// guard.unmount()?;
/// assert_eq!(code, 0);
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Container {
    /// Its root directory, a mount point. What it needs there to mount on, and has not, is made, and removed
    /// when it has ended, if it is still empty.
    pub root: PathBuf,
    /// The command and its arguments; it is looked for by its own `PATH`.
    pub command: Vec<OsString>,
    /// Its environment, all of it; but `HOME` and `PATH` have defaults, of the user, and as Docker has it.
    pub environment: Vec<(OsString, OsString)>,
    /// Its working directory, which is made if it is missing; the default is `/`.
    pub directory: PathBuf,
    /// Who it is: `USER` or `USER:GROUP`, by numbers or by the names in the container's own files. The default,
    /// nothing, is root.
    pub user: String,
    /// The host name in it; the default is `container`.
    pub host_name: String,
    /// Whether its root is read-only; the default is that it is not.
    pub read_only: bool,
    /// What it sees of the outside.
    pub volumes: Vec<Volume>,
}

/// A directory or file of the outside that a container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Which it is.
    pub source: PathBuf,
    /// Where the container sees it: an absolute path.
    pub target: PathBuf,
    /// Whether it cannot be changed there.
    pub read_only: bool,
}

/// A container that did not come to run its command.
#[derive(Debug)]
pub struct NotStarted {
    exit_code: u8,
    error: Error,
}

impl NotStarted {
    /// With what programs that start others end then: 126 if the command cannot be run, 127 if there is none,
    /// 125 for all else.
    pub fn exit_code(&self) -> u8 {
        self.exit_code
    }
}

impl std::fmt::Display for NotStarted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for NotStarted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}

impl From<NotStarted> for Error {
    fn from(e: NotStarted) -> Error {
        e.error
    }
}

impl From<Error> for NotStarted {
    fn from(error: Error) -> NotStarted {
        NotStarted { exit_code: 125, error }
    }
}

impl Container {
    /// A container with that root directory and command.
    pub fn new(
        root: impl Into<PathBuf>,
        command: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Self {
        Container {
            root: root.into(),
            command: command.into_iter().map(Into::into).collect(),
            environment: Vec::new(),
            directory: PathBuf::from("/"),
            user: String::new(),
            host_name: "container".to_owned(),
            read_only: false,
            volumes: Vec::new(),
        }
    }

    /// Starts it; the command has the standard input, output and error output of this process, and no other
    /// descriptor. Should this process be killed, or what is given be dropped, all of the container is.
    ///
    /// # Errors
    /// [`NotStarted`], with what was tried and an exit code for programs.
    pub fn start(&self, helper: &HelperCommand) -> Result<Running, NotStarted> {
        start::start(helper, &self.plan()?)
    }

    fn plan(&self) -> Result<Plan> {
        let entry = |(key, value): &(OsString, OsString)| {
            let mut entry = key.clone();
            entry.push("=");
            entry.push(value);
            Bytes::of(entry)
        };
        let mut shared = Vec::with_capacity(self.volumes.len());
        for volume in &self.volumes {
            let source = start::absolute(&volume.source)?;
            shared.push(Shared {
                source: Bytes::of(source),
                target: Bytes::of(&volume.target),
                read_only: volume.read_only,
            });
        }
        Ok(Plan {
            version: Plan::VERSION.to_owned(),
            root: Bytes::of(start::absolute(&self.root)?),
            read_only: self.read_only,
            host_name: self.host_name.clone(),
            arguments: self.command.iter().map(Bytes::of).collect(),
            environment: self.environment.iter().map(entry).collect(),
            directory: Bytes::of(&self.directory),
            user: self.user.clone(),
            shared,
        })
    }
}
