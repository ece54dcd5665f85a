//! Busy polling: while one request follows the other, a thread that has answered looks for the next one for a
//! moment before it sleeps.
//!
//! What a request over FUSE costs is not its work but two wakes: the server's when it is asked, and that of
//! whoever asked when it is answered. On an idle processor each takes tens of microseconds, under a hypervisor
//! more. A thread that is still awake when the next request comes saves the first of the two. As the kernel's
//! halt polling does, this adapts itself: nobody polls until a request has come within the limit of the answer
//! before it, and nobody any more once polling has been in vain. So a mount on which little is asked costs
//! nothing, and each row of requests at most one limit of processor time at its end. Other threads that want
//! the processor get it between two looks.
//!
//! One thread polls. As long as it keeps up, the others stay away from the device for a moment each time, since
//! the kernel would wake one that waits there for each request, in vain. So a request may wait that long if the
//! only thread at hand has got a slow one. When time and again a request is there before the last is answered,
//! one thread is not enough, and for a while all of them serve.
//!
//! `cargo bench --bench fuse` measures with and without.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::sys::wait;

/// For how long by default.
pub(crate) const BUSY_POLL: Duration = Duration::from_micros(100);

/// For how long a thread stays away while another polls.
const AWAY: Duration = Duration::from_millis(1);
/// For how long none does after one was not enough.
const CROWDED: Duration = Duration::from_millis(10);
/// Which it is if this many requests in a row were there already: one client alone asks for several things at
/// once, too, such as to forget a file.
const MANY: u32 = 8;

/// When threads that serve a mount poll.
#[derive(Debug)]
pub(super) struct BusyPoll {
    device: OwnedFd,
    /// Nanoseconds; 0 if never.
    limit: u64,
    start: Instant,
    /// Nanoseconds from `start` to the last answer.
    answered: AtomicU64,
    /// Likewise, until when one thread is not thought to be enough.
    crowded: AtomicU64,
    /// How many requests in a row were there already.
    waited: AtomicU32,
    /// The last request came within the limit of the answer before.
    in_a_row: AtomicBool,
    /// A thread polls.
    polling: AtomicBool,
}

impl BusyPoll {
    /// For the device by which requests come, which is not read from here.
    pub(super) fn new(device: OwnedFd, limit: Duration) -> BusyPoll {
        // On a single processor it would keep back what is to come.
        let alone = thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        BusyPoll::always(device, if alone { Duration::ZERO } else { limit })
    }

    fn always(device: OwnedFd, limit: Duration) -> BusyPoll {
        BusyPoll {
            device,
            limit: nanos(limit),
            start: Instant::now(),
            answered: AtomicU64::new(0),
            crowded: AtomicU64::new(0),
            waited: AtomicU32::new(0),
            in_a_row: AtomicBool::new(false),
            polling: AtomicBool::new(false),
        }
    }

    /// A request has come.
    pub(super) fn asked(&self) {
        if self.limit != 0 && !self.in_a_row.load(Ordering::Relaxed) {
            let since = self.now().saturating_sub(self.answered.load(Ordering::Relaxed));
            self.in_a_row.store(since <= self.limit, Ordering::Relaxed);
        }
    }

    /// A request has been answered. Returns when the thread is to wait at the device for the next one.
    pub(super) fn answered(&self) {
        if self.limit == 0 {
            return;
        }
        let now = self.now();
        self.answered.store(now, Ordering::Relaxed);
        if !self.in_a_row.load(Ordering::Relaxed) {
            return;
        }
        if self.is_ready() {
            if self.waited.fetch_add(1, Ordering::Relaxed) >= MANY {
                self.crowded.store(now.saturating_add(nanos(CROWDED)), Ordering::Relaxed);
            }
            return;
        }
        self.waited.store(0, Ordering::Relaxed);
        if !self.polling.swap(true, Ordering::Acquire) {
            self.poll(now);
            self.polling.store(false, Ordering::Release);
        } else if now > self.crowded.load(Ordering::Relaxed) {
            thread::sleep(AWAY);
        }
    }

    /// Looks for a request until there is one, or the limit is over.
    fn poll(&self, answered: u64) {
        while !self.is_ready() {
            if self.now().saturating_sub(answered) > self.limit {
                self.in_a_row.store(false, Ordering::Relaxed);
                return;
            }
            thread::yield_now();
        }
    }

    /// Whether a request is there, or reading will tell why not.
    fn is_ready(&self) -> bool {
        let ready = wait::until_readable([self.device.as_fd()], Some(Duration::ZERO));
        ready.map_or(true, |[ready]| ready)
    }

    fn now(&self) -> u64 {
        nanos(self.start.elapsed())
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Read, Write};

    const LONG: Duration = Duration::from_secs(3600);

    fn is_in_a_row(poll: &BusyPoll) -> bool {
        poll.in_a_row.load(Ordering::Relaxed)
    }

    #[test]
    fn it_polls_while_requests_follow_each_other() {
        let (mut reader, mut writer) = io::pipe().unwrap();
        let poll = BusyPoll::always(reader.try_clone().unwrap().into(), LONG);
        poll.asked();
        assert!(is_in_a_row(&poll));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !poll.polling.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                writer.write_all(b"1").unwrap();
            });
            // Nothing is there but what comes while it polls.
            poll.answered();
        });
        assert!(is_in_a_row(&poll) && !poll.polling.load(Ordering::Acquire));
        let crowded = || poll.crowded.load(Ordering::Relaxed);
        assert_eq!(crowded(), 0);
        // Left there time and again, it tells that one thread is not enough.
        poll.answered();
        assert_eq!(crowded(), 0);
        (0..MANY).for_each(|_| poll.answered());
        assert_ne!(crowded(), 0);
        // With nobody at the other end it does not wait.
        drop(writer);
        reader.read_exact(&mut [0]).unwrap();
        poll.answered();
    }

    #[test]
    fn it_gives_up_after_its_limit() {
        let (reader, _writer) = io::pipe().unwrap();
        let poll = BusyPoll::always(reader.into(), Duration::from_nanos(1));
        poll.asked();
        assert!(!is_in_a_row(&poll));
        poll.in_a_row.store(true, Ordering::Relaxed);
        poll.answered();
        assert!(!is_in_a_row(&poll));
    }

    #[test]
    fn without_a_limit_it_never_polls() {
        let (reader, _writer) = io::pipe().unwrap();
        let poll = BusyPoll::always(reader.into(), Duration::ZERO);
        poll.asked();
        assert!(!is_in_a_row(&poll));
        poll.answered();
    }
}
