//! Pairs of connected sockets, and descriptors sent through them.
//!
//! Sources: unix(7), cmsg(3), socketpair(2).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// Two sockets, of which each receives what is sent through the other.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Sends all of `data`, and with its first byte a descriptor. Raises no SIGPIPE.
pub(crate) fn send(
    socket: impl AsFd,
    data: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_ref().map(std::slice::from_ref);
    if let Some(descriptors) = descriptors
        && !control.push(SendAncillaryMessage::ScmRights(descriptors))
    {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let mut rest = data;
    while !rest.is_empty() {
        let parts = [io::IoSlice::new(rest)];
        match rustix::net::sendmsg(&socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            sent => {
                rest = rest.get(sent?..).unwrap_or_default();
                control.clear();
            }
        }
    }
    Ok(())
}

/// Fills `data`, and gives the descriptor that came with it. Less only if the other end was closed: how
/// much is told.
pub(crate) fn receive(socket: impl AsFd, data: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut descriptor = None;
    let mut done = 0;
    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [io::IoSliceMut::new(rest)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = match rustix::net::recvmsg(&socket, &mut parts, &mut control, flags) {
            Err(rustix::io::Errno::INTR) => continue,
            received => received?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                descriptor = descriptors.next().or(descriptor);
            }
        }
        if received.bytes == 0 {
            break;
        }
        done += received.bytes;
    }
    Ok((done, descriptor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_a_descriptor_arrive_and_the_end_is_told() {
        let (ours, theirs) = pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        send(&ours, b"hello", Some(writer.as_fd())).unwrap();
        drop(writer);
        let mut data = [0; 5];
        let (n, descriptor) = receive(&theirs, &mut data).unwrap();
        assert_eq!((n, &data), (5, b"hello"));
        let writer = std::fs::File::from(descriptor.unwrap());
        io::Write::write_all(&mut &writer, b"x").unwrap();
        drop(writer);
        assert_eq!(io::read_to_string(reader).unwrap(), "x");
        send(&ours, b"ab", None).unwrap();
        drop(ours);
        let (n, none) = receive(&theirs, &mut data).unwrap();
        assert!(n == 2 && none.is_none());
        assert_eq!(send(&theirs, b"x", None).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
