//! Metadata-only copies: a file of which only the attributes were changed has its own in the upper, and
//! its data still in the lower layer.
//!
//! On disk as the kernel's overlayfs has it under `metacopy=on`: the copy is as long as the original, and
//! all hole; `<prefix>metacopy` (empty) says that the data are elsewhere, `<prefix>redirect` under which
//! path of the lower layers. The kernel shows such a file if it is told to follow both, and otherwise
//! refuses it with EPERM. So another engine gets the layer after [`settle`](super::settle) alone. Formats
//! without xattrs have no such copies.
//!
//! Who can write to the upper beside the union can have it show any file of the lower layers by such marks,
//! with the copy's owner and mode; in the format with `user.*` xattrs that is the owner of its files. He
//! gains nothing over what the server may read, and should: a server with more privilege than the owner of
//! the upper is for the format with `trusted.*` alone.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use parking_lot::MutexGuard;

use super::complete::Kept;
use super::copyup::{Data, Source};
use super::node::{LowerPlace, Node, State};
use super::rename::REDIRECT_MAX;
use super::workdir::Marker;
use super::{Union, UpperBranch};
use crate::layer::LayerFormat;
use crate::layer::marks::{self, Redirect};
use crate::path::{Name, RelPath};
use crate::sys::errno::{self, Code};
use crate::sys::file::Place;
use crate::sys::stat::{FileType, Stat};
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
    /// Whether the copy says so itself, wherever it is moved.
    pub(super) absolute: bool,
    /// Set while it is completed: what it is to be shown as.
    pub(super) shown: Option<Kept>,
}

impl Below {
    /// In a lower layer, in a file with these attributes.
    pub(super) fn at(place: LowerPlace, stat: &Stat, absolute: bool) -> Arc<Below> {
        Arc::new(Below { place, blocks: stat.blocks, absolute, shown: None })
    }
}

/// The keys of the marks on a file.
pub(super) struct Keys {
    pub(super) metacopy: Vec<u8>,
    pub(super) redirect: Vec<u8>,
    pub(super) completing: Vec<u8>,
}

impl Keys {
    pub(super) fn of(format: LayerFormat) -> Option<Keys> {
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
        source: &Source<'_>,
    ) -> Option<RelPath> {
        let stat = &source.stat;
        let allowed = upper.format.xattr_prefix().is_some()
            && !self.options.no_redirects
            && !self.options.no_metacopy;
        if !allowed || stat.file_type != FileType::Regular || stat.size == 0 {
            return None;
        }
        // What is nowhere whole cannot be completed either, which is told at once by who copies it.
        if marks::has_data_below(source.format, Of::Child(source.dir, source.name)).unwrap_or(true)
        {
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
        file: Place<'_>,
        keys: &[Vec<u8>],
    ) -> io::Result<Option<Arc<Below>>> {
        let Some(own) = Keys::of(format) else { return Ok(None) };
        if !keys.contains(&own.metacopy) {
            return Ok(None);
        }
        let Some(mark) = file.despite_its_mode(|| xattr::get(file.xattrs(), &own.metacopy))? else {
            // It has got its data since.
            return Ok(None);
        };
        if !is_understood(&mark) {
            tracing::error!(?name, "the mark of a metadata-only copy is of an unknown kind");
            return Err(errno::eio());
        }
        let redirect = if keys.contains(&own.redirect) {
            let value = file.despite_its_mode(|| xattr::get(file.xattrs(), &own.redirect))?;
            let value = value.unwrap_or_default();
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
        let size = file.stat()?.size;
        match found.first {
            Some((stat, place)) if stat.is_file() && stat.size == size => {
                let absolute = matches!(redirect, Some(Redirect::Path(_)));
                Ok(Some(Below::at(place, &stat, absolute)))
            }
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

    /// Sees to it that a node is in the upper, in a way that lets it have other names.
    pub(super) fn copy_up_for_names(&self, node: &Arc<Node>) -> io::Result<()> {
        self.copy_up(node, Data::Below)?;
        // What only says that its data have its own name, or another in that directory: so the kernel does.
        let is_relative = node.state.lock().below.as_ref().is_some_and(|below| !below.absolute);
        if is_relative { self.complete(node, Data::All) } else { Ok(()) }
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
        let copying = node.copying.lock();
        if node.state.lock().below.as_ref().is_some_and(|below| below.shown.is_some()) {
            // Its data were copied in vain, and that could not be undone: it would lose the change.
            return Err(Code::Io.into());
        }
        Ok(Some(copying))
    }
}

/// Whether a mark is as the kernel writes it: empty, or `struct ovl_metacopy` of version 0, which may have a
/// digest that nobody asked to be verified.
fn is_understood(mark: &[u8]) -> bool {
    mark.is_empty() || (mark.len() >= 4 && mark.first() == Some(&0))
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
