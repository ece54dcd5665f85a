//! The layers that a foreign directory is seen through: lookup and listing, by foreign marks.
//!
//! Layer 0 is the directory itself; those after it are the layers below, asked only where a redirect
//! or a metacopy sends there. The rules are the kernel's (`ovl_lookup` of `fs/overlayfs/namei.c`): the
//! first whiteout, non-directory or opaque directory ends the merge; a redirect of one name goes on
//! under that name in the same directory, an absolute one at that path from the roots of the layers
//! below the one that has it. The root of a kernel layer is never opaque, whatever it is marked.
//!
//! No symlink is followed.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::OtherMarks;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::foreign::{self, ForeignFormat, Key, NameMark, Opaque};
use crate::layer::marks::{self, OPAQUE_NAME, Redirect};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::mountinfo;
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, Of};

/// A layer.
#[derive(Debug)]
pub(crate) struct Branch {
    pub(crate) dir: Arc<Dir>,
    pub(crate) format: ForeignFormat,
    pub(crate) other_marks: OtherMarks,
    /// Whether it is a layer of this crate's own, where an opaque root is honoured.
    pub(crate) own: bool,
    /// Its directory, for messages.
    pub(crate) shown: PathBuf,
}

/// All layers, the foreign directory first.
#[derive(Debug)]
pub(super) struct Stack {
    branches: Vec<Branch>,
    /// The mount through which each was opened, where the kernel tells.
    mounts: Vec<Option<u64>>,
    /// A directory that is never entered: the store.
    forbidden: Stat,
}

/// A directory of one layer.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) layer: usize,
    /// None while it is closed, to have fewer descriptors open.
    pub(super) dir: Option<Arc<Dir>>,
    /// Where it is in its layer.
    pub(super) path: RelPath,
    /// What it was when it was opened.
    pub(super) before: Stat,
    xattr_whiteouts: bool,
}

/// What a directory is marked as.
#[derive(Debug, Default)]
pub(super) struct DirMarks {
    pub(super) opaque: bool,
    pub(super) redirect: Option<Redirect>,
}

/// What one layer has under a name.
enum Found {
    Nothing,
    Whiteout,
    /// `ends` if what is below is hidden whatever it is.
    Entry {
        stat: Stat,
        ends: bool,
    },
}

/// What a listing of one directory says.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Deleted names, and whether by an xattr; sorted.
    pub(super) whiteouts: BTreeMap<Name, bool>,
    /// All else but marks; sorted.
    pub(super) names: Vec<Name>,
    /// Those of them that another format would take for marks.
    pub(super) plain_marks: HashSet<Name>,
    /// AUFS's own.
    pub(super) pseudo_links: Option<Name>,
    pub(super) internal: Vec<Name>,
}

/// An error about what is in a directory.
pub(super) fn refuse(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::FailedPrecondition, message)
}

/// The error for what is not any more what it was.
pub(super) fn changed(path: impl AsRef<std::path::Path>) -> Error {
    let text = "it changed while it was adopted: unmount it, stop what writes to it, and try again";
    Error::new(ErrorKind::Busy, text).with_path(path)
}

impl Part {
    pub(super) fn dir(&self) -> Result<&Arc<Dir>> {
        self.dir.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "a directory that is being adopted was closed")
                .with_path(&self.path)
        })
    }
}

impl Stack {
    pub(super) fn new(branches: Vec<Branch>, forbidden: Stat) -> Stack {
        let mounts = branches.iter().map(|b| mountinfo::ids(&*b.dir).ok().map(|m| m.id)).collect();
        Stack { branches, mounts, forbidden }
    }

    pub(super) fn branch(&self, layer: usize) -> Result<&Branch> {
        self.branches
            .get(layer)
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("there is no layer {layer}")))
    }

    /// Whether there is any layer below this one.
    pub(super) fn has_below(&self, layer: usize) -> bool {
        layer.saturating_add(1) < self.branches.len()
    }

    /// A path in a layer, for messages.
    pub(super) fn shown(&self, layer: usize, path: &RelPath) -> PathBuf {
        match self.branches.get(layer) {
            Some(branch) if path.is_root() => branch.shown.clone(),
            Some(branch) => branch.shown.join(path),
            None => path.as_path().to_owned(),
        }
    }

    /// The root of one layer.
    pub(super) fn root(&self, layer: usize) -> Result<(Part, DirMarks)> {
        let branch = self.branch(layer)?;
        self.part(layer, Arc::clone(&branch.dir), RelPath::ROOT)
    }

    /// The roots of the layers from `first` on.
    fn roots(&self, first: usize) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        for layer in first..self.branches.len() {
            let (part, marks) = self.root(layer)?;
            parts.push(part);
            if marks.opaque {
                break;
            }
        }
        Ok(parts)
    }

    /// The directory at `path` as the layers from `first` on show it; no parts if there is none.
    pub(super) fn directory(&self, first: usize, path: &RelPath) -> Result<Vec<Part>> {
        let mut parts = self.roots(first)?;
        for name in path.components() {
            parts = self.enter(&parts, &name)?;
        }
        Ok(parts)
    }

    fn part(&self, layer: usize, dir: Arc<Dir>, path: RelPath) -> Result<(Part, DirMarks)> {
        let before = dir.stat().map_err(|e| Error::io("look at", self.shown(layer, &path), e))?;
        if before.same_inode(&self.forbidden) {
            let message = "this is the store itself, which a layer cannot hold: name another \
                           directory, or move the store";
            let error = Error::new(ErrorKind::InvalidArgument, message);
            return Err(error.with_path(self.shown(layer, &path)));
        }
        let mount = self.mounts.get(layer).copied().flatten();
        let crossed = match (mount, mountinfo::ids(&*dir)) {
            (Some(root), Ok(ids)) => root != ids.id,
            _ => before.dev != self.branch(layer)?.dir.stat().at("look at", &path)?.dev,
        };
        if crossed {
            let message =
                "a file system is mounted there, which is no part of the layer: unmount it";
            return Err(refuse(message).with_path(self.shown(layer, &path)));
        }
        let (marks, xattr_whiteouts) = self.dir_marks(layer, &dir, &path)?;
        Ok((Part { layer, dir: Some(dir), path, before, xattr_whiteouts }, marks))
    }

    /// What a directory is marked as, and whether it holds whiteouts that are files with an xattr.
    fn dir_marks(&self, layer: usize, dir: &Dir, path: &RelPath) -> Result<(DirMarks, bool)> {
        let branch = self.branch(layer)?;
        let (mut marks, mut holds_whiteouts) = (DirMarks::default(), false);
        let shown = || self.shown(layer, path);
        let fail = |e| Error::io("read the marks of", shown(), e);
        for key in xattr::list(Of::dir(dir)).map_err(fail)? {
            let meaning = foreign::decode_key(branch.format, &key);
            if !matches!(meaning, Key::Opaque | Key::Redirect) {
                continue;
            }
            let value = xattr::get(Of::dir(dir), &key).map_err(fail)?.unwrap_or_default();
            if meaning == Key::Opaque {
                match foreign::decode_opaque(branch.format, &value) {
                    Some(Opaque::Yes) => marks.opaque = true,
                    Some(Opaque::HasXattrWhiteouts) => holds_whiteouts = true,
                    None => {
                        let (key, value) =
                            (String::from_utf8_lossy(&key), String::from_utf8_lossy(&value));
                        let text = format!("its {key:?} is {value:?}, which means nothing known");
                        return Err(refuse(text).with_path(shown()));
                    }
                }
            } else if branch.format == ForeignFormat::OverlayUser {
                // Whoever writes to a layer directly could have set it; the kernel answers EPERM.
                let text = "it is redirected, which a mount with userxattr refuses to follow";
                return Err(refuse(text).with_path(shown()));
            } else {
                marks.redirect = Some(decode_redirect(&value).map_err(|e| e.with_path(shown()))?);
            }
        }
        if branch.format.overlay_prefix().is_some() && path.is_root() {
            marks.opaque &= branch.own;
            marks.redirect = None;
        }
        if branch.format.has_named_whiteouts() {
            let name = Name::new(OPAQUE_NAME)?;
            marks.opaque |= dir.try_stat_at(&name).map_err(fail)?.is_some();
        }
        Ok((marks, holds_whiteouts))
    }

    /// A child directory of a part.
    pub(super) fn child(&self, part: &Part, name: &Name) -> Result<(Part, DirMarks)> {
        let path = part.path.join(name);
        let dir = part.dir()?.open_dir(name).map_err(|e| self.open_error(part, &path, e))?;
        self.part(part.layer, Arc::new(dir), path)
    }

    fn open_error(&self, part: &Part, path: &RelPath, e: io::Error) -> Error {
        let shown = self.shown(part.layer, path);
        match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => changed(shown),
            _ => Error::io("open directory", shown, e),
        }
    }

    /// A child as the union of `parts` shows it; no parts if it is not there or is no directory.
    pub(super) fn enter(&self, parts: &[Part], name: &Name) -> Result<Vec<Part>> {
        for (index, part) in parts.iter().enumerate() {
            match self.find(part, name)? {
                Found::Nothing => {}
                Found::Entry { stat, ends } if stat.is_dir() => {
                    let (child, mut marks) = self.child(part, name)?;
                    marks.opaque |= ends;
                    let rest = parts.get(index.saturating_add(1)..).unwrap_or_default();
                    return self.merge(child, marks, name, rest);
                }
                Found::Whiteout | Found::Entry { .. } => break,
            }
        }
        Ok(Vec::new())
    }

    /// What merges with a directory whose marks have been read: `rest` are its parent's parts in the
    /// layers below, where it is looked for under `name` or where it is redirected to.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] if a redirect leads to nothing.
    pub(super) fn merge(
        &self,
        child: Part,
        marks: DirMarks,
        name: &Name,
        rest: &[Part],
    ) -> Result<Vec<Part>> {
        let (mut last, mut wanted) = (marks, name.clone());
        let mut parts = vec![child];
        let mut rest = rest.iter();
        while !last.opaque {
            let redirected = last.redirect.is_some();
            let before = parts.len();
            match last.redirect.take() {
                Some(Redirect::Path(path)) => {
                    let layer = parts.last().map_or(0, |part| part.layer);
                    let below = self.directory(layer.saturating_add(1), &path)?;
                    parts.extend(below);
                    last.opaque = true;
                    wanted = path.file_name().unwrap_or(wanted);
                }
                sibling => {
                    if let Some(Redirect::Sibling(sibling)) = sibling {
                        wanted = sibling;
                    }
                    last = self.next(&mut rest, &wanted, &mut parts)?;
                }
            }
            if redirected && parts.len() == before {
                return Err(self.missing_redirect(parts.last(), &wanted));
            }
        }
        Ok(parts)
    }

    /// Adds the next part of that name; the marks of it, opaque if there is none.
    fn next<'p>(
        &self,
        rest: &mut impl Iterator<Item = &'p Part>,
        wanted: &Name,
        parts: &mut Vec<Part>,
    ) -> Result<DirMarks> {
        for part in rest {
            match self.find(part, wanted)? {
                Found::Nothing => {}
                Found::Entry { stat, ends } if stat.is_dir() => {
                    let (child, mut marks) = self.child(part, wanted)?;
                    marks.opaque |= ends;
                    parts.push(child);
                    return Ok(marks);
                }
                Found::Whiteout | Found::Entry { .. } => break,
            }
        }
        Ok(DirMarks { opaque: true, redirect: None })
    }

    fn missing_redirect(&self, part: Option<&Part>, wanted: &Name) -> Error {
        let (layer, path) = part.map_or((0, RelPath::ROOT), |p| (p.layer, p.path.clone()));
        let remedy = if self.has_below(layer) {
            "which the lower layers given do not have: give those that it was mounted on, nearest first"
        } else {
            "and no lower layer was given: give those that it was mounted on, nearest first"
        };
        refuse(format!("its contents are in a lower directory, renamed from {wanted:?}, {remedy}"))
            .with_path(self.shown(layer, &path))
    }

    /// What one layer has under a name.
    fn find(&self, part: &Part, name: &Name) -> Result<Found> {
        let branch = self.branch(part.layer)?;
        let dir = part.dir()?;
        let look = || -> io::Result<Found> {
            let hidden = match marks::whiteout_name(name) {
                Some(mark) if branch.format.has_named_whiteouts() => {
                    dir.try_stat_at(&mark)?.is_some()
                }
                _ => false,
            };
            let Some(stat) = dir.try_stat_at(name)? else {
                return Ok(if hidden { Found::Whiteout } else { Found::Nothing });
            };
            let at_root = part.path.is_root();
            let mark = decode_name(branch.format, name, &stat, at_root);
            let plain = matches!(mark, NameMark::Plain | NameMark::OtherUnion);
            Ok(match mark {
                NameMark::Whiteout { own: true, .. } => Found::Whiteout,
                // The format's own files are not part of the union.
                _ if !plain => Found::Nothing,
                _ if part.xattr_whiteouts && is_xattr_whiteout(branch, dir, name, &stat)? => {
                    Found::Whiteout
                }
                _ => Found::Entry { stat, ends: hidden },
            })
        };
        look().map_err(|e| Error::io("look up", self.shown(part.layer, &part.path.join(name)), e))
    }

    /// The file that has the data of a metacopy: the directory that holds it, its name there, and its
    /// layer and path. `rest` are the parts of its directory in the layers below `layer`.
    pub(super) fn data_of(
        &self,
        layer: usize,
        path: &RelPath,
        redirect: Option<Redirect>,
        rest: Vec<Part>,
    ) -> Result<(Arc<Dir>, Name, usize, RelPath)> {
        let shown = || self.shown(layer, path);
        let (mut rest, mut redirect, mut above) = (rest, redirect, layer);
        let mut wanted = path
            .file_name()
            .ok_or_else(|| refuse("the root has no data in lower layers").with_path(shown()))?;
        loop {
            match redirect.take() {
                None => {}
                Some(Redirect::Sibling(sibling)) => wanted = sibling,
                Some(Redirect::Path(target)) => {
                    let parent = target.parent().unwrap_or_default();
                    rest = self.directory(above.saturating_add(1), &parent)?;
                    wanted = target.file_name().unwrap_or(wanted);
                }
            }
            let mut found = None;
            for (index, part) in rest.iter().enumerate() {
                match self.find(part, &wanted)? {
                    Found::Nothing => {}
                    Found::Entry { stat, .. } if stat.is_file() => {
                        found = Some(index);
                        break;
                    }
                    Found::Whiteout | Found::Entry { .. } => break,
                }
            }
            let Some(index) = found else {
                let text = format!(
                    "its data is in a lower file {wanted:?}, which no lower layer given has: give \
                     the layers that it was mounted on, nearest first"
                );
                return Err(refuse(text).with_path(shown()));
            };
            let below = rest.split_off(index.saturating_add(1));
            let Some(part) = rest.pop() else {
                return Err(changed(shown()));
            };
            let dir = Arc::clone(part.dir()?);
            match self.metacopy(&part, &dir, &wanted)? {
                None => {
                    let path = part.path.join(&wanted);
                    return Ok((dir, wanted, part.layer, path));
                }
                Some(onward) => (rest, redirect, above) = (below, onward, part.layer),
            }
        }
    }

    /// Whether a file's data is in a still lower layer, and under which other name.
    fn metacopy(&self, part: &Part, dir: &Dir, name: &Name) -> Result<Option<Option<Redirect>>> {
        let Some(prefix) = self.branch(part.layer)?.format.overlay_prefix() else {
            return Ok(None);
        };
        let of = Of::Child(dir, name);
        let shown = || self.shown(part.layer, &part.path.join(name));
        let get = |key: &str| {
            xattr::get(of, format!("{prefix}{key}").as_bytes())
                .map_err(|e| Error::io("read the marks of", shown(), e))
        };
        if get("metacopy")?.is_none() {
            return Ok(None);
        }
        let redirect = get("redirect")?.map(|value| decode_redirect(&value)).transpose();
        Ok(Some(redirect.map_err(|e| e.with_path(shown()))?))
    }

    /// What a directory of one layer holds.
    pub(super) fn list(&self, part: &Part) -> Result<Listing> {
        let branch = self.branch(part.layer)?;
        let dir = part.dir()?;
        let shown = |name: &Name| self.shown(part.layer, &part.path.join(name));
        let mut listing = Listing::default();
        let entries = dir.entries();
        let here = || self.shown(part.layer, &part.path);
        for entry in entries.map_err(|e| Error::io("list", here(), e))? {
            let name = entry.name;
            let may_be_mark = match entry.file_type {
                FileType::CharDevice | FileType::Unknown => true,
                FileType::Regular if part.xattr_whiteouts => true,
                _ => name.as_bytes().starts_with(marks::WHITEOUT_PREFIX),
            };
            if !may_be_mark {
                listing.names.push(name);
                continue;
            }
            let stat = match dir.try_stat_at(&name) {
                Ok(Some(stat)) => stat,
                Ok(None) => return Err(changed(shown(&name))),
                Err(e) => return Err(Error::io("look at", shown(&name), e)),
            };
            match decode_name(branch.format, &name, &stat, part.path.is_root()) {
                NameMark::Plain => {
                    let is_whiteout = part.xattr_whiteouts
                        && is_xattr_whiteout(branch, dir, &name, &stat)
                            .map_err(|e| Error::io("read the marks of", shown(&name), e))?;
                    if is_whiteout {
                        listing.whiteouts.insert(name, true);
                    } else {
                        listing.names.push(name);
                    }
                }
                NameMark::Whiteout { of, own: true } => {
                    listing.whiteouts.insert(of, false);
                }
                NameMark::Whiteout { of, own: false } => {
                    listing.whiteouts.insert(of, false);
                }
                NameMark::Opaque => {}
                NameMark::PseudoLinks => listing.pseudo_links = Some(name),
                NameMark::Internal => listing.internal.push(name),
                NameMark::OtherUnion if branch.other_marks == OtherMarks::Plain => {
                    listing.plain_marks.insert(name.clone());
                    listing.names.push(name);
                }
                NameMark::OtherUnion => {
                    let text = format!(
                        "it is a mark of another union file system than {}: state that one, or take \
                         such marks for plain files",
                        branch.format
                    );
                    return Err(refuse(text).with_path(shown(&name)));
                }
                NameMark::Unknown => {
                    let text = format!("{} has no such file of its own", branch.format);
                    return Err(refuse(text).with_path(shown(&name)));
                }
            }
        }
        listing.names.sort_unstable();
        // A layer of our own may say so: the deletion is of what is below.
        for name in listing.whiteouts.keys().filter(|_| !branch.own) {
            if listing.names.binary_search(name).is_ok() {
                let text = "it is there and deleted at once: remove it, or the whiteout beside it";
                return Err(refuse(text).with_path(shown(name)));
            }
        }
        Ok(listing)
    }
}

fn decode_name(format: ForeignFormat, name: &Name, stat: &Stat, at_root: bool) -> NameMark {
    foreign::decode_name(format, name, stat.file_type, stat.rdev, stat.size, at_root)
}

pub(super) fn decode_redirect(value: &[u8]) -> Result<Redirect> {
    marks::decode_redirect(value).ok_or_else(|| {
        let value = String::from_utf8_lossy(value);
        Error::new(
            ErrorKind::Corrupt,
            format!("its redirect {value:?} is neither a name nor a path"),
        )
    })
}

/// Whether an entry of a directory with such whiteouts is one.
fn is_xattr_whiteout(branch: &Branch, dir: &Dir, name: &Name, stat: &Stat) -> io::Result<bool> {
    let Some(prefix) = branch.format.overlay_prefix() else {
        return Ok(false);
    };
    if !stat.is_file() || stat.size != 0 {
        return Ok(false);
    }
    let key = format!("{prefix}whiteout");
    Ok(xattr::get(Of::Child(dir, name), key.as_bytes())?.is_some())
}
