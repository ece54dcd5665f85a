//! Other processes in place of this one, in new namespaces: `unshare`, and how `run` begins.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::absolute;

use stratafs::helper::HelperCommand;
use stratafs::rootless::{self, Namespaces};

use super::{Context, Result};
use crate::OWNERS_VARIABLE;
use crate::args::{self, OwnersName};
use crate::failure::Failure;

/// Tells the command in which store the command that started it works.
pub(crate) const ROOT_VARIABLE: &str = "STRATAFS_ROOT";
/// Tells this program that it, by its process id, is in the namespaces already.
const INSIDE_VARIABLE: &str = "STRATAFS_NAMESPACES_OF";

pub(super) fn unshare(context: &Context, args: args::Unshare) -> Result {
    let mut command = args.command.into_iter();
    let program = command.next().or_else(|| env::var_os("SHELL").filter(|shell| !shell.is_empty()));
    let program = program.unwrap_or_else(|| "/bin/sh".into());
    Err(become_command(context, program, command, &[]))
}

/// Sees that this process is in namespaces of its own, in which it may mount: if it is not, it becomes itself
/// again there, and this call does not come back.
pub(super) fn enter_namespaces(context: &Context) -> Result {
    let own = std::process::id().to_string();
    if env::var_os(INSIDE_VARIABLE).is_some_and(|inside| inside == *own) {
        return Ok(());
    }
    let arguments = env::args_os().skip(1);
    let inside = [(INSIDE_VARIABLE, own.into())];
    Err(become_command(context, "/proc/self/exe".into(), arguments, &inside))
}

/// Comes back only with why it could not.
fn become_command(
    context: &Context,
    program: OsString,
    arguments: impl Iterator<Item = OsString>,
    variables: &[(&str, OsString)],
) -> Failure {
    let start = || -> Result<io::Error> {
        let root = absolute(&context.root).map_err(|e| Failure::io("find", &context.root, e))?;
        let namespaces = Namespaces::for_caller()?;
        if let Namespaces::UserAndMount(mapping) = &namespaces
            && let Some(why) = mapping.one_id()
        {
            tracing::warn!("files can have one owner only: {why}");
        }
        let mut command = rootless::command(&HelperCommand::CurrentExe, &namespaces, program);
        command.args(arguments).env(ROOT_VARIABLE, root);
        // What is made in there is to be of use outside.
        let owners = context.owners.or(context.owners_of_new);
        let ordinary = matches!(namespaces, Namespaces::UserAndMount(_));
        if let Some(owners) = owners.or(ordinary.then_some(OwnersName::Xattrs)) {
            command.env(OWNERS_VARIABLE, owners.as_str());
        }
        command.envs(variables.iter().map(|(key, value)| (key, value)));
        Ok(command.exec())
    };
    match start() {
        Ok(e) => Failure::io("start again", "/proc/self/exe".as_ref(), e),
        Err(failure) => failure,
    }
}
