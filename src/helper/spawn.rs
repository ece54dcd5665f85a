//! The starter's side: starts a helper, and asks it to unmount.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::protocol::Message;
use super::{HelperCommand, REQUEST, hear, say};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::fuse::View;
use crate::sys::mountinfo::MountIds;
use crate::sys::{socket, wait};

/// How long a helper may take to mount. That takes an instant; a program that is no helper may wait for ever.
const TO_MOUNT: Duration = Duration::from_secs(60);

/// What takes the place of a helper's standard streams.
const NULL: &str = "/dev/null";

/// A helper that serves a mount. Dropped, it goes on serving.
#[derive(Debug)]
pub(crate) struct Helper {
    socket: OwnedFd,
    /// None once it was waited for.
    child: Option<Child>,
    mount: MountIds,
}

impl Helper {
    /// Starts a helper that mounts `view` on the directory `target`, an absolute path, and keeps `lock` open
    /// for as long as anything may be written.
    ///
    /// # Errors
    /// What it says of mounting, with its kind; [`ErrorKind::Incompatible`] if the program is no helper.
    pub(crate) fn start(
        command: &HelperCommand,
        view: &View,
        target: &Path,
        lock: Option<BorrowedFd<'_>>,
    ) -> Result<Helper> {
        let (socket, theirs) = socket::pair().at("make a socket for", "a helper")?;
        let program = command.program();
        let mut start = Command::new(program);
        start.arg0("stratafs-helper").arg(REQUEST);
        let null = || File::options().write(true).open(NULL).at("open, for a helper,", NULL);
        start.stdin(Stdio::from(theirs)).stdout(null()?).stderr(null()?);
        let child = start.spawn().at("start as a helper the program", program)?;
        // Its copy of the other end: else its end would not be noticed.
        drop(start);
        let mut helper =
            Helper { socket, child: Some(child), mount: MountIds { id: 0, unique: None } };
        match helper.begin(view, target, lock) {
            Ok(()) => Ok(helper),
            Err(e) => {
                helper.kill();
                Err(e.with_path_if_none(target))
            }
        }
    }

    fn begin(&mut self, view: &View, target: &Path, lock: Option<BorrowedFd<'_>>) -> Result<()> {
        let message = Message::Mount { view: view.clone(), target: target.to_owned() };
        if let Err(e) = say(&self.socket, &message, lock) {
            return Err(self.or_ended(e));
        }
        let answered = wait::until_readable([self.socket.as_fd()], Some(TO_MOUNT));
        if answered.at("wait for", "a helper")? == [false] {
            return Err(Error::new(
                ErrorKind::Incompatible,
                "the helper does not answer: its `main` must begin with \
                 stratafs::helper::run_if_requested(); it was to mount on",
            ));
        }
        match hear(&self.socket).map_err(|e| self.or_ended(e))? {
            Some((Message::Ready { mount, features }, _)) => {
                tracing::debug!(?features, ?target, "a helper has mounted");
                self.mount = mount;
                Ok(())
            }
            Some((Message::Failed { kind, text }, _)) => Err(Error::new(kind, text)),
            _ => Err(ended()),
        }
    }

    /// What is to be said of an error in talking to it: by when it ended depends which one that is.
    fn or_ended(&self, e: Error) -> Error {
        if e.kind() == ErrorKind::Io && self.has_ended(Duration::ZERO) { ended() } else { e }
    }

    /// Which mount it made.
    pub(crate) fn mount(&self) -> MountIds {
        self.mount
    }

    /// Becomes readable when the helper has ended: it says nothing unasked.
    pub(crate) fn end(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether it has ended, within `limit`.
    pub(crate) fn has_ended(&self, limit: Duration) -> bool {
        // In doubt it lives.
        wait::until_readable([self.end()], Some(limit)).is_ok_and(|[ended]| ended)
    }

    /// Has it unmount, and waits until all that was written is with the layer's file system; with `detach`,
    /// which a mount that is in use needs, it does not wait.
    ///
    /// # Errors
    /// What it says; [`ErrorKind::Busy`] while files are in use.
    pub(crate) fn unmount(&mut self, detach: bool) -> Result<()> {
        say(&self.socket, &Message::Unmount { detach }, None)?;
        match hear(&self.socket)? {
            Some((Message::Unmounted, _)) => {
                if !detach {
                    self.reap();
                }
                Ok(())
            }
            Some((Message::Failed { kind, text }, _)) => Err(Error::new(kind, text)),
            _ => Err(Error::new(ErrorKind::Io, "the process that served the mount has died")),
        }
    }

    /// Waits for its end, after which the lock is free.
    pub(crate) fn reap(&mut self) {
        if let Some(mut child) = self.child.take()
            && let Err(e) = child.wait()
        {
            tracing::warn!(error = %e, "cannot wait for the end of a helper");
        }
    }

    fn kill(&mut self) {
        if let Some(child) = &mut self.child
            && let Err(e) = child.kill()
        {
            tracing::warn!(error = %e, "a helper that failed is left");
        }
        self.reap();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Else a process that lives long would gather zombies.
        let thread = std::thread::Builder::new().name("stratafs-reaper".to_owned());
        if let Err(e) = thread.spawn(move || child.wait()) {
            tracing::warn!(error = %e, "nobody waits for the end of a helper");
        }
    }
}

fn ended() -> Error {
    Error::new(
        ErrorKind::Incompatible,
        "the helper ended without an answer: its `main` must begin with \
         stratafs::helper::run_if_requested(); it was to mount on",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_that_ended_before_it_was_told_anything_is_none() {
        let (socket, theirs) = socket::pair().unwrap();
        drop(theirs);
        let mount = MountIds { id: 0, unique: None };
        let helper = Helper { socket, child: None, mount };
        let e = say(&helper.socket, &Message::Unmounted, None).unwrap_err();
        assert_eq!(helper.or_ended(e).kind(), ErrorKind::Incompatible);
    }
}
