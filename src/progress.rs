//! How long calls report, and how they are stopped.

use std::ops::ControlFlow;
#[cfg(feature = "fuse")]
use std::sync::mpsc;

use crate::error::{Error, ErrorKind, Result};

/// What a long call has done so far; the counters only grow within one call and [`Phase`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes read or written so far.
    pub bytes: u64,
    /// How many bytes there will be, where that is known.
    pub total_bytes: Option<u64>,
    /// Files, directories and other entries handled so far.
    pub entries: u64,
}

/// The parts of a long call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Reading and verifying an image's metadata and blobs.
    Verify,
    /// Unpacking a layer, or adopting a foreign one.
    Apply,
    /// Packing a layer.
    Export,
    /// Walking a layer: settling, counting, comparing.
    Walk,
    /// Copying files: a tree made of layers, or a layer of a tree.
    Copy,
    /// Deleting files.
    Remove,
}

impl Progress {
    pub(crate) fn new(phase: Phase) -> Self {
        Progress { phase, bytes: 0, total_bytes: None, entries: 0 }
    }
}

/// The callback of a long call. It is called often, and on the calling thread; returning
/// [`ControlFlow::Break`] rolls everything back and makes the call fail with
/// [`ErrorKind::Cancelled`]. [`ignore_progress`] is one that does nothing.
pub type ProgressFn<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// A progress callback that does nothing and never stops a call.
pub fn ignore_progress(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Does work that needs a thread of its own, while what it reports is passed on on the calling thread.
#[cfg(feature = "fuse")]
pub(crate) fn on_another_thread<T: Send>(
    work: impl FnOnce(&mut ProgressFn<'_>) -> Result<T> + Send,
    callback: &mut ProgressFn<'_>,
) -> Result<T> {
    let (reports, reported) = mpsc::sync_channel(0);
    let (answers, answered) = mpsc::sync_channel(0);
    // The channels go with it, if the callback panics: then the other side does not wait.
    std::thread::scope(move |scope| {
        let working = scope.spawn(move || {
            work(&mut |progress| {
                // The other side listens for as long as this one works.
                let answer = reports.send(progress).ok().and_then(|()| answered.recv().ok());
                answer.unwrap_or(ControlFlow::Break(()))
            })
        });
        for progress in reported {
            if answers.send(callback(progress)).is_err() {
                break;
            }
        }
        match working.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Reports, and turns a `Break` into the error that rolls the call back.
pub(crate) fn report(callback: &mut ProgressFn<'_>, progress: Progress) -> Result<()> {
    match callback(progress) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => {
            Err(Error::new(ErrorKind::Cancelled, "stopped by the progress callback"))
        }
    }
}

#[cfg(all(test, feature = "fuse"))]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_callback_ends_work_on_another_thread() {
        let work = |progress: &mut ProgressFn<'_>| {
            for _ in 0..3 {
                report(progress, Progress::new(Phase::Copy))?;
            }
            Ok(())
        };
        let mut calls = 0;
        on_another_thread(work, &mut |_| {
            calls += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(calls, 3);
        let stopped = on_another_thread(work, &mut |_| ControlFlow::Break(()));
        assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
        let panicked = std::panic::catch_unwind(|| {
            on_another_thread(work, &mut |_| panic!("by the callback"))
        });
        assert!(panicked.is_err());
    }
}
