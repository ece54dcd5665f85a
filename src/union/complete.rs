//! Completion: metadata-only copies ([`metacopy`](super::metacopy)) get their data.
//!
//! When data are written or cut off, they are copied into the copy where it stands, under all its names,
//! and then the mark is removed: that is the step by which it counts. What this changes of the file on the
//! way (times, length, setuid, capabilities) is written down in an xattr of the union's own before, and
//! the file gets a name in the work directory's `temp`: there the next union finds it after a kill, and
//! makes it what it was. Meanwhile the union shows what was written down.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{Mutex, MutexGuard};

use super::caller::CAPABILITY;
use super::copyup::Data;
use super::metacopy::{Below, Keys};
use super::node::{Node, Real, State};
use super::spec::SyncPolicy;
use super::workdir::Marker;
use super::{Union, UpperBranch};
use crate::layer::{LayerFormat, marks};
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::errno::{self, Code};
use crate::sys::file::{self, Access, Place, SetTime};
use crate::sys::owners::Owners;
use crate::sys::stat::{FileType, Time, fstat};
use crate::sys::xattr::{self, Of};

/// How often a search that renames disturb is begun anew.
const MOST_ROUNDS: u32 = 16;

/// What completing a copy changes, and must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) atime: Time,
    pub(super) mtime: Time,
    /// Bytes.
    pub(super) size: u64,
    pub(super) mode: u32,
    capabilities: Option<Vec<u8>>,
    /// Its further name in the work directory.
    pub(super) note: Option<Name>,
}

impl Kept {
    fn of(copy: &Copy<'_>) -> io::Result<Kept> {
        let stat = copy.place().stat()?;
        Ok(Kept {
            atime: stat.atime,
            mtime: stat.mtime,
            size: stat.size,
            mode: stat.mode,
            capabilities: xattr::get(Of::Fd(copy.file.as_fd()), CAPABILITY)?,
            note: None,
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for time in [self.atime, self.mtime] {
            bytes.extend_from_slice(&time.secs.to_le_bytes());
            bytes.extend_from_slice(&time.nanos.to_le_bytes());
        }
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.mode.to_le_bytes());
        bytes.extend_from_slice(self.capabilities.as_deref().unwrap_or_default());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Kept> {
        fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
            let (first, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            Some(*first)
        }
        let mut rest = bytes;
        let mut time = || {
            let secs = i64::from_le_bytes(take(&mut rest)?);
            Some(Time { secs, nanos: u32::from_le_bytes(take(&mut rest)?) })
        };
        let (atime, mtime) = (time()?, time()?);
        let size = u64::from_le_bytes(take(&mut rest)?);
        let mode = u32::from_le_bytes(take(&mut rest)?);
        let capabilities = (!rest.is_empty()).then(|| rest.to_vec());
        Some(Kept { atime, mtime, size, mode, capabilities, note: None })
    }

    /// What is written down, read and written again.
    #[cfg(fuzzing)]
    pub(super) fn recoded(bytes: &[u8]) -> Option<Vec<u8>> {
        Kept::decode(bytes).map(|kept| kept.encode())
    }

    /// Gives the file back what it had, but for its length.
    fn restore(&self, copy: &Copy<'_>) -> io::Result<()> {
        let of = Of::Fd(copy.file.as_fd());
        if let Some(value) = &self.capabilities
            && xattr::get(of, CAPABILITY)?.as_ref() != Some(value)
        {
            xattr::set(of, CAPABILITY, value)?;
        }
        let place = copy.place();
        if place.stat()?.mode != self.mode {
            place.chmod(self.mode)?;
        }
        place.set_times(SetTime::To(self.atime), SetTime::To(self.mtime))
    }

    /// Takes data out of the file again, and makes it what it was.
    fn undo(&self, copy: &Copy<'_>) -> io::Result<()> {
        let file = copy.file;
        file.set_len(self.size)?;
        if self.size == 0 {
            return self.restore(copy);
        }
        match file::punch_hole(file, 0, self.size) {
            Err(e) if Code::NotSupported.is(&e) => {
                file.set_len(0)?;
                file.set_len(self.size)?;
            }
            done => done?,
        }
        self.restore(copy)
    }
}

/// Which files are being completed: one at a time by whoever, though there should be one node for each.
#[derive(Debug, Default)]
pub(super) struct Completions {
    by_file: Mutex<HashMap<Real, Arc<Mutex<()>>>>,
}

impl Completions {
    /// Calls `complete` when nobody else completes the file.
    fn one_by_one<R>(&self, real: Real, complete: impl FnOnce() -> R) -> R {
        let turn = Arc::clone(self.by_file.lock().entry(real).or_default());
        let done = {
            let _turn = turn.lock();
            complete()
        };
        let mut by_file = self.by_file.lock();
        drop(turn);
        if by_file.get(&real).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            by_file.remove(&real);
        }
        done
    }
}

/// A metadata-only copy, open.
struct Copy<'a> {
    file: &'a File,
    keys: &'a Keys,
    /// Where the upper keeps owners.
    owners: Owners,
}

impl Copy<'_> {
    fn place(&self) -> Place<'_> {
        Place::Open(self.file.as_fd(), self.owners)
    }

    fn set(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.place().despite_its_mode(|| xattr::set(Of::Fd(self.file.as_fd()), key, value))
    }

    fn remove(&self, key: &[u8]) -> io::Result<()> {
        self.place().despite_its_mode(|| xattr::remove(Of::Fd(self.file.as_fd()), key))
    }

    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.place().despite_its_mode(|| xattr::get(Of::Fd(self.file.as_fd()), key))
    }

    fn is_marked(&self) -> io::Result<bool> {
        Ok(self.get(&self.keys.metacopy)?.is_some())
    }
}

impl Union {
    /// Waits until a file is not being completed, and keeps it so for as long as what comes back is held:
    /// its xattrs are for the moment not what they are to be.
    pub(super) fn when_complete<'a>(&self, node: &'a Arc<Node>) -> Option<MutexGuard<'a, ()>> {
        let is_at_work = {
            let state = node.state.lock();
            state.below.as_ref().is_some_and(|below| below.shown.is_some())
        };
        is_at_work.then(|| node.copying.lock())
    }

    /// Gives a metadata-only copy its data.
    ///
    /// # Errors
    /// Those of copying: then nothing has changed.
    pub(super) fn complete(&self, node: &Arc<Node>, data: Data) -> io::Result<()> {
        let upper = self.writable()?;
        let keys = Keys::of(upper.format).ok_or(Code::NotSupported)?;
        let _copying = node.copying.lock();
        if node.state.lock().below.is_none() {
            return Ok(());
        }
        let file = self.at(node, |place, _, _| place.open_data(Access::ReadWrite))?;
        let copy = Copy { file: &file, keys: &keys, owners: upper.dir.owners() };
        let real = Real::from(&fstat(&file)?);
        self.completions.one_by_one(real, || self.complete_copy(upper, node, &copy, data))
    }

    fn complete_copy(
        &self,
        upper: &UpperBranch,
        node: &Arc<Node>,
        copy: &Copy<'_>,
        data: Data,
    ) -> io::Result<()> {
        let Some(below) = node.state.lock().below.clone() else { return Ok(()) };
        if !copy.is_marked()? {
            self.has_its_data(node, &mut node.state.lock());
            return Ok(());
        }
        // Of one that could not be undone is known what it was.
        let mut kept = match &below.shown {
            Some(kept) => kept.clone(),
            None => Kept::of(copy)?,
        };
        {
            // Nobody is to see the further name.
            let mut state = node.state.lock();
            if kept.note.is_none() {
                let note = upper.work.new_name()?;
                match copy.place().link(upper.work.temp(), &note) {
                    Ok(()) => kept.note = Some(note),
                    // Unlinked: after a kill it is gone.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
            let (place, shown) = (below.place.clone(), Some(kept.clone()));
            state.below = Some(Arc::new(Below { place, shown, ..*below }));
        }
        if let Err(e) = self.fill(copy, &below, &kept, data) {
            // What counts is whether the mark is gone; if nobody can say, the next attempt finds out.
            if copy.is_marked()? {
                self.undo(upper, node, copy, (&below, &kept), &e)?;
                return Err(e);
            }
        }
        let cleared =
            copy.remove(&copy.keys.redirect).and_then(|()| copy.remove(&copy.keys.completing));
        // The note goes when nothing is left on the disk that needs it.
        let cleared =
            cleared.and_then(|()| if upper.needs_order { copy.file.sync_all() } else { Ok(()) });
        let mut state = node.state.lock();
        let cleared = cleared.and_then(|()| match &kept.note {
            Some(note) => upper.work.temp().unlink(note),
            None => Ok(()),
        });
        self.has_its_data(node, &mut state);
        drop(state);
        if let Err(e) = cleared {
            // It has its data, and loses what it does not need any more when the union is opened next.
            tracing::warn!(error = %e, "cannot remove the marks of a copy that has its data now");
        }
        Ok(())
    }

    /// Copies the data, up to the step by which they count.
    fn fill(&self, copy: &Copy<'_>, below: &Below, kept: &Kept, data: Data) -> io::Result<()> {
        let noted = match copy.set(&copy.keys.completing, &kept.encode()) {
            // There is no room for it: then what a kill would leave must be as long as it is.
            Err(e) if errno::has_no_room_for_xattrs(&e) => false,
            set => {
                set?;
                true
            }
        };
        let data = if noted { data } else { Data::All };
        let source_dir = self.lower_dir(&below.place.dir)?;
        let source = self.source(&below.place, &source_dir)?;
        self.copy_data(&source, copy.file, data)?;
        kept.restore(copy)?;
        if let Data::First(size) = data
            && size < kept.size
        {
            copy.file.set_len(size)?;
        }
        if self.options.sync == SyncPolicy::Strict {
            copy.file.sync_all()?;
        }
        copy.remove(&copy.keys.metacopy)
    }

    /// After a copy of data that failed: the file is what it was, and shown as it is.
    ///
    /// # Errors
    /// If it could not be made that: it keeps its note, and the next union has another try, as has this one.
    fn undo(
        &self,
        upper: &UpperBranch,
        node: &Node,
        copy: &Copy<'_>,
        (below, kept): (&Below, &Kept),
        cause: &io::Error,
    ) -> io::Result<()> {
        kept.undo(copy).inspect_err(|e| {
            tracing::warn!(error = %e, %cause, "cannot undo a copy of data that failed");
        })?;
        copy.remove(&copy.keys.completing)?;
        let mut state = node.state.lock();
        if let Some(note) = &kept.note {
            upper.work.temp().unlink(note)?;
        }
        let place = below.place.clone();
        state.below = Some(Arc::new(Below { place, shown: None, ..*below }));
        state.touch();
        Ok(())
    }

    /// Notes that a file has its data in the upper.
    fn has_its_data(&self, node: &Node, state: &mut State) {
        state.below = None;
        state.touch();
        // A descriptor of the original must not be used any more.
        self.table.descriptors.drop_file(node.generation);
        // Who has just read its marks reads them again.
        self.published.fetch_add(1, Ordering::AcqRel);
    }

    /// From now on no more such copies are made, and those that there are get their data, and files all their
    /// names, while the union is in use.
    pub(crate) fn complete_all(&self) -> io::Result<()> {
        let Some(upper) = &self.upper else { return Ok(()) };
        // Waits for those that are being made.
        *self.metacopies_end.write() = true;
        let any = upper.work.has(Marker::Metacopy)? || upper.work.has(Marker::Linked)?;
        for round in 1..=if any { MOST_ROUNDS } else { 0 } {
            // While nothing is on its way that was counted already.
            let at_rest = self.moving.write();
            let moved = {
                let _none_is_made = self.metacopies_end.write();
                self.moved.load(Ordering::SeqCst)
            };
            // In the last round nothing moves, and little is left to be copied.
            let at_rest = (round == MOST_ROUNDS).then_some(at_rest);
            if self.lacks_names()? {
                self.place_all_names(&mut || ControlFlow::Continue(()))?;
            }
            self.complete_below(upper)?;
            let _at_rest = at_rest.unwrap_or_else(|| self.moving.write());
            let _none_is_made = self.metacopies_end.write();
            // What was moved or made meanwhile may have been missed.
            if self.moved.load(Ordering::SeqCst) == moved || round == MOST_ROUNDS {
                if !self.links.lacks_originals() {
                    upper.work.clear(Marker::Linked)?;
                }
                return upper.work.clear(Marker::Metacopy);
            }
        }
        // No rename that was begun before leaves a redirect.
        drop(self.moving.write());
        Ok(())
    }

    fn complete_below(&self, upper: &UpperBranch) -> io::Result<()> {
        let mut dirs = vec![Arc::clone(&self.root)];
        while let Some(dir) = dirs.pop() {
            // What is in lower layers alone has none.
            if !dir.state.lock().is_upper() {
                continue;
            }
            let entries = match self.upper_dir(&dir).and_then(|dir| dir.entries()) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                if !matches!(
                    entry.file_type,
                    FileType::Regular | FileType::Directory | FileType::Unknown
                ) || marks::may_be_mark(upper.format, &entry.name, entry.file_type)
                {
                    continue;
                }
                let node = match self.resolve(&dir, &entry.name) {
                    Ok(Some(node)) => node,
                    Ok(None) => continue,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(e),
                };
                if node.is_dir() {
                    dirs.push(node);
                } else if node.state.lock().below.is_some() {
                    self.complete(&node, Data::All)?;
                } else if node.kind == FileType::Regular {
                    match self.upper_dir(&dir) {
                        Ok(dir) => strip_void_marks(upper.format, &dir, &entry.name)?,
                        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                        Err(e) => return Err(e),
                    }
                }
            }
        }
        Ok(())
    }
}

/// Makes a file what it was, of which `name` in the work directory says that it was being completed; what
/// is there for another reason is left alone.
pub(super) fn recover(format: LayerFormat, temp: &Dir, name: &Name) -> io::Result<()> {
    let Some(keys) = Keys::of(format) else { return Ok(()) };
    let stat = temp.stat_at(name)?;
    if !stat.is_file() || stat.nlink < 2 {
        return Ok(());
    }
    let child = Place::Child(temp, name);
    if !xattr::list(child.xattrs())?.contains(&keys.completing) {
        return Ok(());
    }
    let file = child.open_data(Access::ReadWrite)?;
    let copy = Copy { file: &file, keys: &keys, owners: temp.owners() };
    let kept = copy.get(&keys.completing)?.and_then(|value| Kept::decode(&value));
    match &kept {
        None => {
            tracing::error!("a copy of data was not done, and what it was before cannot be read")
        }
        Some(kept) if copy.is_marked()? => kept.undo(&copy)?,
        // Perhaps it was only just given the right to lose its mark.
        Some(kept) if copy.place().stat()?.mode == kept.mode | 0o700 => {
            copy.place().chmod(kept.mode)?;
        }
        Some(_) => {}
    }
    strip(&copy)
}

/// Removes what a file with data of its own has no use for.
fn strip(copy: &Copy<'_>) -> io::Result<()> {
    if !copy.is_marked()? {
        copy.remove(&copy.keys.redirect)?;
    }
    copy.remove(&copy.keys.completing)
}

/// Removes marks from a regular file of a layer that say nothing any more.
pub(super) fn strip_void_marks(format: LayerFormat, dir: &Dir, name: &Name) -> io::Result<()> {
    let Some(keys) = Keys::of(format) else { return Ok(()) };
    let child = Place::Child(dir, name);
    let there = match xattr::list(child.xattrs()) {
        // Removed or renamed meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        there => there?,
    };
    let void = |key: &Vec<u8>| there.contains(key);
    if there.contains(&keys.metacopy) || !(void(&keys.redirect) || void(&keys.completing)) {
        return Ok(());
    }
    let file = match child.open_data(Access::Read) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    strip(&Copy { file: &file, keys: &keys, owners: dir.owners() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_reads_back() {
        let time = |secs| Time { secs, nanos: 999_999_999 };
        for capabilities in [None, Some(vec![1, 0, 0, 2, 7])] {
            let (atime, mtime, note) = (time(-1), time(i64::MAX), None);
            let kept = Kept { atime, mtime, size: 1 << 40, mode: 0o4755, capabilities, note };
            let bytes = kept.encode();
            assert_eq!(Kept::decode(&bytes), Some(kept));
            for len in 0..36 {
                assert_eq!(Kept::decode(&bytes[..len]), None, "{len}");
            }
        }
    }
}
