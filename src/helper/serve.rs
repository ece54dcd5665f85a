//! The helper's side: mounts what it is told to, serves it, and ends when it is unmounted.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::protocol::Message;
use super::{hear, say};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::fuse::{Mounted, Session, View, ViewUpper, unseen};
use crate::sys::{daemon, mount, mountinfo, signals, wait};

/// How a helper ends: what it exits with.
pub(super) fn run() -> i32 {
    let Ok(socket) = daemon::leave_with_input() else { return 1 };
    match serve(&socket) {
        Ok(()) => 0,
        Err(e) => {
            // Nobody may be there to hear it.
            let failed = Message::Failed { kind: e.kind(), text: e.to_string() };
            let _ = say(&socket, &failed, None);
            1
        }
    }
}

fn serve(socket: &OwnedFd) -> Result<()> {
    let Some((Message::Mount { view, target }, lock)) = hear(socket)? else {
        let text = "a helper is to be told what to mount, by the process that starts it";
        return Err(Error::new(ErrorKind::Incompatible, text));
    };
    let (ended, until_end) = std::io::pipe().at("make a pipe for", &target)?;
    // Before there are other threads.
    signals::block_questions().at("block SIGUSR1 in", "a helper")?;
    let mut session = mount(&view, &target, until_end.into())?;
    if let Some(upper) = &view.upper {
        end_when_unseen(upper, session.mounted().clone())?;
    }
    let root = session.root()?;
    let ids = mountinfo::ids(&root).at("identify the mount on", &target)?;
    drop(root);
    let features = session.granted().into_iter().map(|(name, granted)| (name.to_owned(), granted));
    let ready = Message::Ready { mount: ids, features: features.collect() };
    // Should the starter be gone already, the mount is served as after any later end of it.
    let mut is_heard = say(socket, &ready, None).is_ok();
    while is_heard {
        let [asked, over] = wait::until_readable([socket.as_fd(), ended.as_fd()], None)
            .at("wait for the end of the mount on", &target)?;
        if over {
            break;
        }
        if asked {
            is_heard = answer(socket, &mut session)?;
        }
    }
    let served = session.wait();
    // Now nothing is written any more.
    drop(lock);
    served
}

fn mount(view: &View, target: &Path, until_end: OwnedFd) -> Result<Session> {
    let dir = mount::open_dir_path(target).at("open mount target", target)?;
    view.mount(&dir, target, Some(until_end))
}

/// Unmounts when somebody asks who wants the upper, if nobody sees the mount any more: it was made in a namespace that
/// all others have left.
fn end_when_unseen(upper: &ViewUpper, mounted: Mounted) -> Result<()> {
    let asked_for = upper.clone();
    let wait = move || {
        while signals::be_asked().is_ok() {
            let unmounted = match unseen::nobody_sees_the_mount_on(&asked_for) {
                Ok(true) => mounted.unmount(false).and_then(|kept| kept).map(|()| true),
                other => other,
            };
            match unmounted {
                Ok(true) => return,
                Ok(false) => {}
                Err(e) => tracing::warn!(error = %e, "asked whether anybody sees the mount"),
            }
        }
    };
    let thread = std::thread::Builder::new().name("stratafs-asked".to_owned()).spawn(wait);
    thread.at("start a thread for", "the questions of others")?;
    unseen::may_be_asked(upper)
}

/// Does what the starter asks for; whether he may ask again.
fn answer(socket: &OwnedFd, session: &mut Session) -> Result<bool> {
    let detach = match hear(socket) {
        Ok(Some((Message::Unmount { detach }, _))) => detach,
        // He has gone, or makes no sense: the mount is not to suffer for it.
        _ => return Ok(false),
    };
    let reply = match session.unmount(detach) {
        Ok(()) => Message::Unmounted,
        Err(e) => Message::Failed { kind: e.kind(), text: e.to_string() },
    };
    Ok(say(socket, &reply, None).is_ok() && reply != Message::Unmounted)
}
