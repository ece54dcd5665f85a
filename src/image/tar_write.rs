//! The tar form of a layout: the same blobs give the same bytes, with no time, owner or host in them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use crate::digest::Digest;
use crate::error::{Error, IoContext, Result};
use crate::progress::{Phase, Progress, ProgressFn, report};

/// All of a layout, ready to be written as a tar.
pub(super) struct Layout<'a> {
    pub(super) blobs: &'a Path,
    pub(super) sizes: &'a BTreeMap<Digest, u64>,
    pub(super) documents: [(&'static str, &'a [u8]); 2],
}

impl Layout<'_> {
    /// Documents first, so that a reader of the stream knows early what it reads; then the blobs by
    /// digest. `path` is for messages.
    pub(super) fn write_tar<W: Write>(
        &self,
        output: W,
        path: &Path,
        progress: &mut ProgressFn<'_>,
    ) -> Result<W> {
        let failed = |e| Error::io("write image", path, e);
        let mut state = Progress::new(Phase::Export);
        state.total_bytes = Some(self.sizes.values().sum());
        report(progress, state)?;
        let mut tar = tar::Builder::new(BufWriter::with_capacity(128 * 1024, output));
        for (name, bytes) in self.documents {
            let mut header = header(tar::EntryType::Regular, bytes.len() as u64);
            tar.append_data(&mut header, name, bytes).map_err(failed)?;
        }
        for name in ["blobs/", "blobs/sha256/"] {
            let mut header = header(tar::EntryType::Directory, 0);
            tar.append_data(&mut header, name, io::empty()).map_err(failed)?;
        }
        for (digest, size) in self.sizes {
            let file = self.blobs.join(digest.hex());
            let blob = Reporting {
                inner: File::open(&file).at("open", &file)?,
                state: &mut state,
                progress,
            };
            let mut header = header(tar::EntryType::Regular, *size);
            tar.append_data(&mut header, format!("blobs/sha256/{}", digest.hex()), blob)
                .map_err(failed)?;
            state.entries += 1;
        }
        let buffered = tar.into_inner().map_err(failed)?;
        let mut output = buffered.into_inner().map_err(|e| failed(e.into_error()))?;
        output.flush().map_err(failed)?;
        Ok(output)
    }
}

/// A header that says nothing of when, where and by whom.
fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// Reports what is read.
struct Reporting<'a, 'b, R> {
    inner: R,
    state: &'a mut Progress,
    progress: &'a mut ProgressFn<'b>,
}

impl<R: Read> Read for Reporting<'_, '_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.state.bytes = self.state.bytes.saturating_add(n as u64);
        report(self.progress, *self.state)?;
        Ok(n)
    }
}
