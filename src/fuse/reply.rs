//! How a request is carried out and answered, whatever it is.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fuser::{Errno, ReplyEmpty, ReplyXattr};

use crate::sys::errno;

/// Serves a request: its error is made a number, and a panic is caught.
pub(super) fn serve<T>(
    what: &'static str,
    work: impl FnOnce() -> io::Result<T>,
) -> Result<T, Errno> {
    // What the union holds is changed in whole steps, and its locks are released in unwinding.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(e)) => {
            tracing::trace!(request = what, error = %e, "refused");
            Err(Errno::from_i32(errno::number(&e)))
        }
        Err(_) => {
            tracing::error!(request = what, "the server panicked on a request, and goes on");
            Err(Errno::EIO)
        }
    }
}

pub(super) fn reply_empty(done: Result<(), Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

/// Answers a request for a value of which first only the size is asked.
pub(super) fn reply_sized(value: Result<Vec<u8>, Errno>, size: u32, reply: ReplyXattr) {
    match value {
        Err(e) => reply.error(e),
        Ok(value) => match u32::try_from(value.len()) {
            Ok(len) if size == 0 => reply.size(len),
            Ok(len) if len <= size => reply.data(&value),
            _ => reply.error(Errno::ERANGE),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::errno::Code;

    #[test]
    fn errors_become_numbers_and_panics_an_input_output_error() {
        assert!(matches!(serve("test", || Ok(7)), Ok(7)));
        let code = |e: Errno| e.code();
        let refused = serve::<()>("test", || Err(Code::NotEmpty.into()));
        assert_eq!(refused.map_err(code), Err(Errno::ENOTEMPTY.code()));
        let panicked = serve::<()>("test", || panic!("on purpose"));
        assert_eq!(panicked.map_err(code), Err(Errno::EIO.code()));
    }
}
