//! File contents: reading, writing, holes, and waiting for the disk.
//!
//! Nothing depends on who opened a file or how: the kernel has checked that, and may have collected
//! what several wrote. So a write may come without an open, and from nobody.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Union;
use super::caller::{CAPABILITY, Caller};
use super::copyup::Data;
use super::descriptors::OpenFile;
use super::node::Node;
use super::spec::SyncPolicy;
use crate::sys::errno::Code;
use crate::sys::file::{self, Access, Seek};
use crate::sys::stat::FileType;
use crate::sys::xattr::{self, Of};

/// No clock's tick is longer: seconds, as whole ones are compared.
const LONGEST_TICK: i64 = 1;

impl Union {
    /// Reads into `buffer`, and tells how many bytes; fewer than fit only at the end of the file.
    pub(crate) fn read(
        &self,
        node: &Arc<Node>,
        offset: u64,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        self.regular(node)?;
        let open = self.data(node)?;
        loop {
            // Of a regular file the kernel gives less only at its end.
            match open.file.read_at(buffer, offset) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    /// Writes all of `data`. With `kill` setuid and capabilities go, as when that one writes.
    ///
    /// What was `held_back` was written earlier.
    pub(crate) fn write(
        &self,
        node: &Arc<Node>,
        offset: u64,
        data: &[u8],
        kill: Option<Caller>,
        held_back: bool,
    ) -> io::Result<()> {
        let open = self.writable_data(node)?;
        if let Some(caller) = kill {
            self.drop_privileges(node, caller)?;
        }
        if !held_back {
            return open.file.write_all_at(data, offset);
        }
        self.at_the_told_time(node, &open, |file| {
            // Any write takes capabilities away; this one came before they were given.
            let capable = node.capable.lock();
            let of = Of::Fd(file.as_fd());
            let kept = if *capable { xattr::get(of, CAPABILITY)? } else { None };
            file.write_all_at(data, offset)?;
            kept.map_or(Ok(()), |value| xattr::set(of, CAPABILITY, &value))
        })
    }

    /// Changes a file at a time that the kernel tells by itself, before or after; if it tells none, the file
    /// had that time already.
    ///
    /// A copy of a lower file gets a time of now until then, so that a kill in between leaves no changed
    /// file that looks unchanged: but not if the lower file is so new that it may have been changed within
    /// the same tick of the kernel's clock, for then nothing is told.
    fn at_the_told_time<R>(
        &self,
        node: &Node,
        open: &OpenFile,
        change: impl FnOnce(&File) -> io::Result<R>,
    ) -> io::Result<R> {
        if !self.times_are_told.load(Ordering::Relaxed) {
            return change(&open.file);
        }
        // With the lock, so that no time that is set in between is lost.
        let time_is_set = node.time_is_set.lock();
        let before = file::modified(&open.file)?;
        let is_new = before.secs >= self.opened.secs.saturating_sub(LONGEST_TICK);
        if node.lower.is_some() && !*time_is_set && !is_new {
            return change(&open.file);
        }
        let changed = change(&open.file)?;
        file::set_modified(&open.file, before)?;
        Ok(changed)
    }

    /// fallocate(2), with its mode as a number.
    pub(crate) fn allocate(
        &self,
        node: &Arc<Node>,
        mode: u32,
        offset: u64,
        len: u64,
        caller: Caller,
    ) -> io::Result<()> {
        let open = self.writable_data(node)?;
        self.drop_privileges(node, caller)?;
        self.at_the_told_time(node, &open, |file| file::allocate(file, mode, offset, len))
    }

    /// The next data or hole from `offset` on.
    pub(crate) fn seek(&self, node: &Arc<Node>, what: Seek, offset: u64) -> io::Result<u64> {
        self.regular(node)?;
        file::seek(&self.data(node)?.file, what, offset)
    }

    /// copy_file_range(2); how many bytes were copied.
    pub(crate) fn copy_range(
        &self,
        (from, from_offset): (&Arc<Node>, u64),
        (to, to_offset): (&Arc<Node>, u64),
        len: u64,
        caller: Caller,
    ) -> io::Result<usize> {
        self.regular(from)?;
        self.regular(to)?;
        self.writable_data(to)?;
        self.drop_privileges(to, caller)?;
        // The first, so that a copy within one file has one descriptor.
        let open = self.writable_data(to)?;
        let from = self.data(from)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.at_the_told_time(to, &open, |file| {
            file::copy_range(&from.file, from_offset, file, to_offset, len)
        })
    }

    /// Waits until a file's contents are on disk, and unless `data_only` its attributes.
    pub(crate) fn sync(&self, node: &Arc<Node>, data_only: bool) -> io::Result<()> {
        if self.options.sync == SyncPolicy::Volatile || !node.state.lock().is_upper() {
            return Ok(());
        }
        if node.is_dir() {
            return self.own_dir(node)?.0.sync();
        }
        if node.kind != FileType::Regular {
            return Ok(());
        }
        if node.state.lock().below.is_some() {
            // The data are safe where they are.
            return self.at(node, |place, _, _| place.open_data(Access::Read)?.sync_all());
        }
        let open = self.data(node)?;
        if data_only { open.file.sync_data() } else { open.file.sync_all() }
    }

    /// A regular file of the upper, copied up first if need be, open for reading and writing.
    fn writable_data(&self, node: &Arc<Node>) -> io::Result<Arc<OpenFile>> {
        self.regular(node)?;
        let is_below = {
            let state = node.state.lock();
            !state.is_upper() || state.below.is_some()
        };
        if is_below {
            self.writable()?;
            self.copy_up(node, Data::All)?;
        }
        loop {
            let open = self.data(node)?;
            if open.writable {
                self.place_names(node)?;
                return Ok(open);
            }
            self.writable()?;
            drop(open);
            self.copy_up(node, Data::All)?;
        }
    }

    fn regular(&self, node: &Node) -> io::Result<()> {
        match node.kind {
            FileType::Regular => Ok(()),
            FileType::Directory => Err(Code::IsDirectory.into()),
            _ => Err(Code::Invalid.into()),
        }
    }
}
