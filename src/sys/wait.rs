//! Waiting for descriptors: until something can be read from one of them, or its other end is closed.
//!
//! Source: poll(2).

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

/// Waits until one of the descriptors can be read from, or its other end is closed; for as long as
/// `limit` at most. Tells which are so; none if the time is over.
pub(crate) fn until_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    limit: Option<Duration>,
) -> io::Result<[bool; N]> {
    let end = limit.map(|limit| Instant::now() + limit);
    loop {
        let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match rustix::event::poll(&mut polled, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            done => {
                done?;
                return Ok(polled.map(|fd| !fd.revents().is_empty()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_closed_end_and_a_passed_time_are_told_apart() {
        let (reader, writer) = io::pipe().unwrap();
        let now = Some(Duration::ZERO);
        assert_eq!(until_readable([reader.as_fd()], now).unwrap(), [false]);
        drop(writer);
        assert_eq!(until_readable([reader.as_fd()], None).unwrap(), [true]);
    }
}
