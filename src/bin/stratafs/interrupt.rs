//! Signals that stop the program, after a rollback.
//!
//! The first raises a flag, which long calls see at their next report of progress; the second ends
//! the process at once, and what it leaves is swept by the next one.

use std::fs;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether a signal has come.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes the signals over, but for those that whoever started the program wants ignored, as
    /// nohup(1) does, and shells for what they run in the background.
    pub(crate) fn install() -> io::Result<Interrupt> {
        let raised = Arc::new(AtomicBool::new(false));
        let ignored = ignored();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            if ignored >> (signal - 1) & 1 == 1 {
                continue;
            }
            // In this order: the first signal finds the flag down.
            flag::register_conditional_shutdown(signal, 130, Arc::clone(&raised))?;
            flag::register(signal, Arc::clone(&raised))?;
        }
        Ok(Interrupt(raised))
    }

    pub(crate) fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Reads from something that may keep silent for ever, without being deaf to signals meanwhile:
    /// the reading is done by a thread, which is left behind if it is still waiting at the end.
    pub(crate) fn reader(&self, mut input: impl Read + Send + 'static) -> InterruptibleReader {
        let (sender, chunks) = sync_channel(4);
        thread::spawn(move || {
            loop {
                let mut chunk = vec![0; 128 * 1024];
                let read = input.read(&mut chunk);
                if matches!(&read, Err(e) if e.kind() == io::ErrorKind::Interrupted) {
                    continue;
                }
                let last = !matches!(read, Ok(1..));
                let read = read.map(|n| {
                    chunk.truncate(n);
                    chunk
                });
                if sender.send(read).is_err() || last {
                    return;
                }
            }
        });
        InterruptibleReader { interrupt: self.clone(), chunks, chunk: Vec::new(), used: 0 }
    }
}

/// The ignored signals, a bit each from 1 on: `SigIgn:`, proc_pid_status(5).
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// See [`Interrupt::reader`].
#[derive(Debug)]
pub(crate) struct InterruptibleReader {
    interrupt: Interrupt,
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    used: usize,
}

impl Read for InterruptibleReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.used == self.chunk.len() {
            if self.interrupt.is_raised() {
                // Not `Interrupted`, after which callers read on.
                return Err(io::Error::other("interrupted"));
            }
            match self.chunks.recv_timeout(Duration::from_millis(50)) {
                Ok(chunk) => {
                    self.chunk = chunk?;
                    self.used = 0;
                    if self.chunk.is_empty() {
                        return Ok(0);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
            }
        }
        let rest = self.chunk.get(self.used..).unwrap_or_default();
        let n = (&mut &*rest).read(buffer)?;
        self.used += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lowered() -> Interrupt {
        Interrupt(Arc::new(AtomicBool::new(false)))
    }

    #[test]
    fn reads_what_there_is_and_its_end_again_and_again() {
        let data: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
        let mut reader = lowered().reader(io::Cursor::new(data.clone()));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read == data);
        assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn a_silent_input_does_not_keep_the_signal_waiting() {
        let interrupt = lowered();
        let (_silent, input) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut reader = interrupt.reader(input);
        interrupt.0.store(true, Ordering::Relaxed);
        assert_eq!(reader.read(&mut [0; 8]).unwrap_err().to_string(), "interrupted");
    }
}
