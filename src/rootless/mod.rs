//! Namespaces for ordinary users: in a user namespace of his own everybody is root, and may mount.
//!
//! A process enters namespaces for good, and one with several threads cannot enter a user namespace at all. So
//! the calling process never does: [`command`] gives the [`Command`] of a helper, which enters them and becomes
//! the program that is to run there.
//!
//! ```no_run
//! use stratafs::helper::{HelperCommand, run_if_requested};
//! use stratafs::rootless::{self, Namespaces};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     run_if_requested(); // First in main.
//!     let namespaces = Namespaces::for_caller()?;
//!     let mut command = rootless::command(&HelperCommand::CurrentExe, &namespaces, "id");
//!     let status = command.arg("-u").status()?; // Prints 0.
//!     std::process::exit(status.code().unwrap_or(1));
//! }
//! ```
//!
//! [`ids`](IdMapping) are those that the user has in /etc/subuid and /etc/subgid; without any he has one.
//! [`ladder`] tells what he can mount how, and who sees that.

mod ids;
mod ladder;

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::error::{IoContext, Result};
use crate::helper::{EnterUser, HelperCommand, arguments_to_enter};
use crate::sys::userns;

pub use ids::{IdMapping, MappedIds, OneId};
pub use ladder::{RootlessRung, Sees, ladder};

/// Which namespaces a program is to run in.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Namespaces {
    /// A mount namespace: for who may mount already, as root may.
    Mount,
    /// A user namespace with these ids, and a mount namespace that belongs to it.
    UserAndMount(IdMapping),
}

impl Namespaces {
    /// What the calling thread needs in order to mount: a user namespace, if it has no CAP_SYS_ADMIN in its
    /// own.
    ///
    /// # Errors
    /// Those of [`IdMapping::of_caller`].
    pub fn for_caller() -> Result<Namespaces> {
        Ok(match userns::may_administer().at("look at the capabilities of", "this thread")? {
            true => Namespaces::Mount,
            false => Namespaces::UserAndMount(IdMapping::of_caller()?),
        })
    }
}

/// A command that runs `program` in new namespaces, as root of them: add its arguments, and spawn it, or
/// replace the process by it ([`CommandExt::exec`](std::os::unix::process::CommandExt::exec)). The process
/// that is started becomes the program, so that signals, the terminal and its end are the program's. Standard
/// input, output and error output are what they are made; all other descriptors are closed. Mounts that are
/// made outside later are seen inside, those made inside are not seen outside.
///
/// What does not work shows as the exit code, with a message on standard error that says what to do: 125 if
/// the namespaces cannot be made, 126 if the program cannot be run, 127 if there is none.
///
/// The program is looked for as [`Command::new`] does.
pub fn command(
    helper: &HelperCommand,
    namespaces: &Namespaces,
    program: impl AsRef<OsStr>,
) -> Command {
    let mapping = match namespaces {
        Namespaces::Mount => None,
        Namespaces::UserAndMount(mapping) => Some(EnterUser {
            users: ids::to_text(mapping.users()),
            groups: ids::to_text(mapping.groups()),
            programs: mapping.programs(),
        }),
    };
    let mut command = Command::new(helper.program());
    command.arg0("stratafs-helper").args(arguments_to_enter(mapping)).arg(program);
    command
}
