//! From nodes to the layers' files: the one place that knows how to reach them.
//!
//! Nothing is waited for upwards: the state of a node is not locked while the directory above it is
//! looked for. What was found so holds only if the node's version is still the same when its state is
//! locked again; else it is done once more.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Union;
use super::descriptors::{DirKey, OpenFile};
use super::node::{Node, Part, Place, State};
use crate::layer::{LayerFormat, marks};
use crate::path::RelPath;
use crate::sys::dir::Dir;
use crate::sys::errno::Code;
use crate::sys::file::{self, Access};
use crate::sys::resolve::open_beneath;
use crate::sys::xattr::Of;

impl Union {
    /// The upper's part of a directory that has one.
    pub(super) fn upper_dir(&self, node: &Arc<Node>) -> io::Result<Arc<Dir>> {
        let upper = self.writable()?;
        if node.is_root() {
            return Ok(Arc::clone(&upper.dir));
        }
        let key = DirKey::Upper(node.generation);
        if let Some(dir) = self.table.descriptors.dir(&key) {
            return Ok(dir);
        }
        let tree = self.tree.read();
        // Up to the first directory that is open.
        let mut names = Vec::new();
        let mut at = Arc::clone(node);
        let base = loop {
            if at.is_root() {
                break Arc::clone(&upper.dir);
            }
            if let Some(dir) = self.table.descriptors.dir(&DirKey::Upper(at.generation)) {
                break dir;
            }
            let above = {
                let state = at.state.lock();
                if let Some(dead) = state.directory.as_ref().and_then(|d| d.dead.as_ref()) {
                    match dead {
                        Some(dir) if names.is_empty() => return Ok(Arc::clone(dir)),
                        _ => return Err(Code::NoEntry.into()),
                    }
                }
                state.links.first().cloned()
            };
            let (above, name) = above.ok_or(Code::NoEntry)?;
            names.push(name);
            at = above;
        };
        let mut path = RelPath::ROOT;
        names.iter().rev().for_each(|name| path.push(name));
        let open = || open_beneath(&base, &path);
        let dir = Arc::new(self.table.descriptors.opening(open)?);
        drop(tree);
        node.cached.store(true, Ordering::Relaxed);
        self.table.descriptors.keep_dir(key, &dir);
        Ok(dir)
    }

    /// A lower layer's directory.
    pub(super) fn lower_dir(&self, part: &Part) -> io::Result<Arc<Dir>> {
        let lower = self.lower(part.layer)?;
        if part.path.is_root() {
            return Ok(Arc::clone(&lower.dir));
        }
        let key = DirKey::Lower(part.clone());
        if let Some(dir) = self.table.descriptors.dir(&key) {
            return Ok(dir);
        }
        let open = || open_beneath(&lower.dir, &part.path);
        let dir = Arc::new(self.table.descriptors.opening(open)?);
        self.table.descriptors.keep_dir(key, &dir);
        Ok(dir)
    }

    /// The directory whose attributes a directory node shows, and the format of its layer.
    pub(super) fn own_dir(&self, node: &Arc<Node>) -> io::Result<(Arc<Dir>, Option<LayerFormat>)> {
        let part = {
            let state = node.state.lock();
            match &state.place {
                Place::Lower(_) => Some(state.lowers().first().cloned()),
                _ => None,
            }
        };
        match part {
            None => Ok((self.upper_dir(node)?, self.upper.as_ref().map(|u| u.format))),
            Some(None) => Err(Code::NoEntry.into()),
            Some(Some(part)) => Ok((self.lower_dir(&part)?, Some(self.lower(part.layer)?.format))),
        }
    }

    /// Calls `with` on a node's file, and the format of the layer it is in. The file is under the given
    /// name for as long as that takes.
    pub(super) fn at<R>(
        &self,
        node: &Arc<Node>,
        mut with: impl FnMut(file::Place<'_>, Option<LayerFormat>, &State) -> io::Result<R>,
    ) -> io::Result<R> {
        if node.is_dir() {
            let (dir, format) = self.own_dir(node)?;
            let state = node.state.lock();
            return with(file::Place::dir(&dir), format, &state);
        }
        let upper_format = self.upper.as_ref().map(|u| u.format);
        loop {
            let state = node.state.lock();
            match &state.place {
                Place::Lower(None) => return Err(Code::Io.into()),
                Place::Lower(Some(place)) => {
                    let place = place.clone();
                    let version = state.version;
                    drop(state);
                    let dir = self.lower_dir(&place.dir)?;
                    let state = node.state.lock();
                    if state.version != version {
                        continue;
                    }
                    let format = self.lower(place.dir.layer)?.format;
                    return with(file::Place::Child(&dir, &place.name), Some(format), &state);
                }
                Place::Pinned(fd) => {
                    let owners = self.owners();
                    return with(file::Place::Open(fd.as_fd(), owners), upper_format, &state);
                }
                Place::Linked(name) => {
                    let dir = self.writable()?.work.links();
                    return with(file::Place::Child(dir, name), upper_format, &state);
                }
                Place::Upper => {
                    let (above, name) = state.links.first().cloned().ok_or(Code::NoEntry)?;
                    let version = state.version;
                    drop(state);
                    let dir = self.upper_dir(&above)?;
                    let state = node.state.lock();
                    if state.version != version {
                        continue;
                    }
                    return with(file::Place::Child(&dir, &name), upper_format, &state);
                }
            }
        }
    }

    /// A file's data, open for reading, and for writing if it is in the upper.
    pub(super) fn data(&self, node: &Arc<Node>) -> io::Result<Arc<OpenFile>> {
        if let Some(file) = self.table.descriptors.file(node.generation) {
            return Ok(file);
        }
        // Under the lock of the state, lest a copy-up comes between.
        let keep = |file: File, writable: bool| {
            let file = Arc::new(OpenFile { file, writable });
            node.cached.store(true, Ordering::Relaxed);
            self.table.descriptors.keep_file(node.generation, &file);
            file
        };
        self.table.descriptors.opening(|| {
            loop {
                let below = node.state.lock().below.clone();
                if let Some(below) = below {
                    let lower = self.lower(below.place.dir.layer)?.format;
                    let dir = self.lower_dir(&below.place.dir)?;
                    let state = node.state.lock();
                    if state.below.is_none() {
                        continue;
                    }
                    let place = file::Place::Child(&dir, &below.place.name);
                    return Ok(keep(open_whole(place, lower, Access::Read)?, false));
                }
                let opened = self.at(node, |place, format, state| match format {
                    _ if state.below.is_some() => Ok(None),
                    _ if state.is_upper() => {
                        Ok(Some(keep(place.open_data(Access::ReadWrite)?, true)))
                    }
                    Some(format) => Ok(Some(keep(open_whole(place, format, Access::Read)?, false))),
                    None => Err(Code::Io.into()),
                })?;
                if let Some(file) = opened {
                    return Ok(file);
                }
            }
        })
    }
}

/// Opens the data of a file of a lower layer.
///
/// # Errors
/// EIO if they are somewhere else: better than to show zeros.
pub(super) fn open_whole(
    place: file::Place<'_>,
    format: LayerFormat,
    access: Access,
) -> io::Result<File> {
    let file = place.open_data(access)?;
    let below = match marks::has_data_below(format, Of::Fd(file.as_fd())) {
        // A file that is closed to its owner, who has no privilege: his overlay makes no such files.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => false,
        below => below?,
    };
    if below {
        tracing::error!(
            "a file has its data in a lower layer (metacopy), and cannot be read: settle it"
        );
        return Err(Code::Io.into());
    }
    Ok(file)
}
