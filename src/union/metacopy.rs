//! Metadata-only copies: a file of which only the attributes were changed has its own in the upper, and
//! its data still in the lower layer.
//!
//! On disk as the kernel's overlayfs has it under `metacopy=on`: the copy is as long as the original, and
//! all hole; `<prefix>metacopy` (empty) says that the data are elsewhere, `<prefix>redirect` under which
//! path of the lower layers. The kernel shows such a file if it is told to follow both, and otherwise
//! refuses it with EPERM. So another engine gets the layer after [`settle`](super::settle) alone. Formats
//! without xattrs have no such copies.
//!
//! # Completion
//!
//! When data are written or cut off, they are copied into the copy where it stands, under all its names,
//! and then the mark is removed: that is the step by which it counts. What this changes of the file on the
//! way (times, length, setuid, capabilities) is written down in an xattr of the union's own before, and
//! the file gets a name in the work directory's `temp`: there the next union finds it after a kill, and
//! makes it what it was. Meanwhile the union shows what was written down.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use super::caller::CAPABILITY;
use super::copyup::Data;
use super::lookup::MAX_RETRIES;
use super::node::{LowerPlace, Node, State};
use super::rename::REDIRECT_MAX;
use super::spec::SyncPolicy;
use super::workdir::Marker;
use super::{Union, UpperBranch};
use crate::layer::LayerFormat;
use crate::layer::marks::{self, Redirect};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::errno::{self, Code};
use crate::sys::file::{self, Access, Place, SetTime};
use crate::sys::stat::{FileType, Stat, Time, fstat};
use crate::sys::xattr::{self, Of};

/// The key, after the prefix, of what is written down of a copy that is being completed.
const COMPLETING: &str = "completing";

/// Where the data of a metadata-only copy are.
#[derive(Debug)]
pub(super) struct Below {
    pub(super) place: LowerPlace,
    /// What the original takes, in units of 512 bytes: by a file without any, programs know that it is
    /// all hole.
    pub(super) blocks: u64,
    /// Set while it is completed: what it is to be shown as.
    pub(super) shown: Option<Kept>,
}

/// What completing a copy changes, and must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) atime: Time,
    pub(super) mtime: Time,
    /// Bytes.
    pub(super) size: u64,
    pub(super) mode: u32,
    capabilities: Option<Vec<u8>>,
    /// It has a further name in the work directory.
    pub(super) noted: bool,
}

impl Below {
    /// In a lower layer, in a file with these attributes.
    pub(super) fn at(place: LowerPlace, stat: &Stat) -> Arc<Below> {
        Arc::new(Below { place, blocks: stat.blocks, shown: None })
    }
}

impl Kept {
    fn of(file: &File) -> io::Result<Kept> {
        let stat = fstat(file)?;
        Ok(Kept {
            atime: stat.atime,
            mtime: stat.mtime,
            size: stat.size,
            mode: stat.mode,
            capabilities: xattr::get(Of::Fd(file.as_fd()), CAPABILITY)?,
            noted: false,
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
        Some(Kept { atime, mtime, size, mode, capabilities, noted: false })
    }

    /// Gives the file back what it had, but for its length.
    fn restore(&self, file: &File) -> io::Result<()> {
        let of = Of::Fd(file.as_fd());
        if let Some(value) = &self.capabilities
            && xattr::get(of, CAPABILITY)?.as_ref() != Some(value)
        {
            xattr::set(of, CAPABILITY, value)?;
        }
        let place = Place::Open(file.as_fd());
        if place.stat()?.mode != self.mode {
            place.chmod(self.mode)?;
        }
        place.set_times(SetTime::To(self.atime), SetTime::To(self.mtime))
    }

    /// Takes data out of the file again, and makes it what it was.
    fn undo(&self, file: &File) -> io::Result<()> {
        file.set_len(self.size)?;
        match file::punch_hole(file, 0, self.size) {
            Err(e) if Code::NotSupported.is(&e) => {
                file.set_len(0)?;
                file.set_len(self.size)?;
            }
            done => done?,
        }
        self.restore(file)
    }
}

/// The keys of the marks on a file.
struct Keys {
    metacopy: Vec<u8>,
    redirect: Vec<u8>,
    completing: Vec<u8>,
}

impl Keys {
    fn of(format: LayerFormat) -> Option<Keys> {
        let prefix = format.xattr_prefix()?;
        Some(Keys {
            metacopy: format!("{prefix}metacopy").into_bytes(),
            redirect: format!("{prefix}redirect").into_bytes(),
            completing: Union::own_key(format, COMPLETING)?,
        })
    }
}

impl Union {
    /// Under which path of the lower layers a file is found, if a copy of it may leave the data there.
    pub(super) fn path_below(
        &self,
        upper: &UpperBranch,
        node: &Node,
        stat: &Stat,
    ) -> Option<RelPath> {
        let allowed = upper.format.xattr_prefix().is_some()
            && !self.options.no_redirects
            && !self.options.no_metacopy;
        if !allowed || stat.file_type != FileType::Regular || stat.size == 0 {
            return None;
        }
        // As long as it is not copied, each of its names is one in the lower layers.
        let (above, name) = node.link()?;
        let below = above.state.lock().directory.as_ref().map(|dir| Arc::clone(&dir.below))?;
        let path = below.join(&name);
        // With the slash that comes before it.
        (path.as_bytes().len() < REDIRECT_MAX).then_some(path)
    }

    /// Makes a new file one whose data are in the lower layers, at `path`.
    pub(super) fn leave_data(
        &self,
        upper: &UpperBranch,
        file: &File,
        size: u64,
        path: &RelPath,
    ) -> io::Result<()> {
        let keys = Keys::of(upper.format).ok_or(Code::NotSupported)?;
        upper.work.note(Marker::Metacopy)?;
        file.set_len(size)?;
        let of = Of::Fd(file.as_fd());
        xattr::set(of, &keys.redirect, &[b"/", path.as_bytes()].concat())?;
        xattr::set(of, &keys.metacopy, b"")
    }

    /// Where the data of a file of the upper are, if not with it; `keys` are those of its xattrs.
    pub(super) fn data_below(
        &self,
        format: LayerFormat,
        (parent, name): (&Arc<Node>, &Name),
        of: Of<'_>,
        keys: &[Vec<u8>],
    ) -> io::Result<Option<Arc<Below>>> {
        let Some(own) = Keys::of(format) else { return Ok(None) };
        if !keys.contains(&own.metacopy) {
            return Ok(None);
        }
        let redirect = if keys.contains(&own.redirect) {
            let value = xattr::get(of, &own.redirect)?.unwrap_or_default();
            Some(marks::decode_redirect(&value).ok_or_else(errno::eio)?)
        } else {
            None
        };
        let found = match &redirect {
            Some(Redirect::Path(path)) => {
                let (Some(dir), Some(last)) = (path.parent(), path.file_name()) else {
                    return Err(errno::eio());
                };
                self.find_below(&self.lower_parts(0, &dir)?, &last)?
            }
            Some(Redirect::Sibling(sibling)) => {
                self.find_below(&self.view(parent)?.lowers, sibling)?
            }
            None => self.find_below(&self.view(parent)?.lowers, name)?,
        };
        match found.first {
            Some((stat, place)) if stat.is_file() => Ok(Some(Below::at(place, &stat))),
            _ => {
                tracing::error!(
                    ?name,
                    ?redirect,
                    "the data of a file should be in a lower layer (metacopy), and are not: these are \
                     not the layers that it was made on"
                );
                Err(errno::eio())
            }
        }
    }

    /// Sees to it that a node is in the upper before its attributes are changed. Its data stay where they
    /// are for as long as what comes back is held.
    pub(super) fn copy_up_attributes<'a>(
        &self,
        node: &'a Arc<Node>,
    ) -> io::Result<Option<MutexGuard<'a, ()>>> {
        self.copy_up(node, Data::Below)?;
        if node.state.lock().below.is_none() {
            return Ok(None);
        }
        Ok(Some(node.copying.lock()))
    }

    /// Gives a metadata-only copy its data.
    ///
    /// # Errors
    /// Those of copying: then nothing has changed.
    pub(super) fn complete(&self, node: &Arc<Node>, data: Data) -> io::Result<()> {
        let upper = self.writable()?;
        let keys = Keys::of(upper.format).ok_or(Code::NotSupported)?;
        let _copying = node.copying.lock();
        let Some(below) = node.state.lock().below.clone() else { return Ok(()) };
        let file = self.at(node, |place, _, _| place.open_data(Access::ReadWrite))?;
        let of = Of::Fd(file.as_fd());
        let mut kept = Kept::of(&file)?;
        let note = upper.work.new_name()?;
        let place = Place::Open(file.as_fd());
        let set = |key: &[u8], value: &[u8]| place.despite_its_mode(|| xattr::set(of, key, value));
        let remove = |key: &[u8]| place.despite_its_mode(|| xattr::remove(of, key));
        {
            // Nobody is to see the further name.
            let mut state = node.state.lock();
            match place.link(upper.work.temp(), &note) {
                Ok(()) => kept.noted = true,
                // Unlinked: after a kill it is gone.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
            state.below = Some(Arc::new(Below {
                place: below.place.clone(),
                blocks: below.blocks,
                shown: Some(kept.clone()),
            }));
        }
        let filled = (|| {
            set(&keys.completing, &kept.encode())?;
            let source_dir = self.lower_dir(&below.place.dir)?;
            let source = self.source(&below.place, &source_dir)?;
            self.copy_data(&source, &file, data)?;
            kept.restore(&file)?;
            if let Data::First(size) = data
                && size < kept.size
            {
                file.set_len(size)?;
            }
            if self.options.sync == SyncPolicy::Strict {
                file.sync_all()?;
            }
            remove(&keys.metacopy)
        })();
        if let Err(e) = &filled
            && let Err(undo) = kept.undo(&file)
        {
            tracing::warn!(error = %undo, cause = %e, "cannot undo a copy that failed before the next mount");
        }
        let mut state = node.state.lock();
        if kept.noted
            && let Err(e) = upper.work.temp().unlink(&note)
        {
            tracing::warn!(error = %e, "cannot remove the note of a copy that was completed");
        }
        state.touch();
        if let Err(e) = filled {
            state.below = Some(below);
            drop(state);
            remove(&keys.completing)?;
            return Err(e);
        }
        state.below = None;
        // A descriptor of the original must not be used any more.
        self.table.descriptors.drop_file(node.generation);
        drop(state);
        remove(&keys.redirect)?;
        remove(&keys.completing)
    }

    /// From now on no more such copies are made, and those that there are get their data, and files all their
    /// names, while the union is in use.
    pub(crate) fn complete_all(&self) -> io::Result<()> {
        let Some(upper) = &self.upper else { return Ok(()) };
        // Waits for those that are being made.
        *self.metacopies_end.write() = true;
        for _ in 0..MAX_RETRIES {
            let moved = self.moved.load(Ordering::SeqCst);
            if !self.links.is_empty() {
                self.place_all_names(&mut || ControlFlow::Continue(()))?;
            }
            self.complete_below(upper)?;
            // What was moved meanwhile may have been missed.
            if self.moved.load(Ordering::SeqCst) == moved {
                upper.work.clear(Marker::Linked)?;
                return upper.work.clear(Marker::Metacopy);
            }
        }
        Err(Code::Busy.into())
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
                }
            }
        }
        Ok(())
    }
}

impl State {
    /// What is shown of a metadata-only copy instead of what its file has.
    pub(super) fn shown_instead(&self, attr: &mut super::Attr) {
        let Some(below) = &self.below else { return };
        attr.blocks = below.blocks;
        if let Some(kept) = &below.shown {
            attr.size = kept.size;
            attr.mode = kept.mode;
            attr.atime = kept.atime;
            attr.mtime = kept.mtime;
        }
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
    let Some(value) = child.despite_its_mode(|| xattr::get(child.xattrs(), &keys.completing))?
    else {
        return Ok(());
    };
    let file = child.open_data(Access::ReadWrite)?;
    let (of, place) = (Of::Fd(file.as_fd()), Place::Open(file.as_fd()));
    let remove = |key: &[u8]| place.despite_its_mode(|| xattr::remove(of, key));
    if xattr::get(of, &keys.metacopy)?.is_some() {
        Kept::decode(&value).ok_or_else(errno::eio)?.undo(&file)?;
    } else {
        remove(&keys.redirect)?;
    }
    remove(&keys.completing)
}
