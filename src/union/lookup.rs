//! What the union shows under a name.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Union;
use super::attr::Attr;
use super::create::is_too_long;
use super::identity::Identified;
use super::listing::Placed;
use super::node::{LowerPlace, Node, Part, State};
use crate::layer::LayerFormat;
use crate::layer::entry::{self, Found as Says};
use crate::layer::marks::{self, Redirect};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::errno::Code;
use crate::sys::stat::Stat;

/// A file that was looked up or made, of which one lookup has been counted.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) node: Arc<Node>,
    pub(crate) attr: Attr,
}

/// A directory, as lookups in it need it.
pub(super) struct View {
    pub(super) upper: Option<Arc<Dir>>,
    pub(super) lowers: Arc<[Part]>,
    below: Arc<RelPath>,
}

/// What was found under a name.
pub(super) struct Found {
    pub(super) name: Name,
    pub(super) stat: Stat,
    /// The upper's directory, if it is there.
    pub(super) upper: Option<Arc<Dir>>,
    /// Else the lower layer's.
    pub(super) lower: Option<LowerPlace>,
    /// The directory itself, if it had to be opened.
    pub(super) own_dir: Option<Arc<Dir>>,
    /// The lower parts of a directory.
    pub(super) lowers: Vec<Part>,
    pub(super) below: RelPath,
}

/// What the lower layers have under a name.
pub(super) struct Lowers {
    pub(super) first: Option<(Stat, LowerPlace)>,
    parts: Vec<Part>,
}

/// How often a lookup that others disturb is begun anew.
pub(super) const MAX_RETRIES: u32 = 1000;

impl Union {
    /// Looks a name up; a lookup is counted of what is found.
    ///
    /// # Errors
    /// ENOTDIR if `parent` is none; ENAMETOOLONG for what no file can be called here; and those of the
    /// layers' file systems.
    pub(crate) fn lookup(&self, parent: &Arc<Node>, name: &Name) -> io::Result<Option<Entry>> {
        match self.resolve_with_stat(parent, name, 0)? {
            None => match &self.upper {
                // Not only absent: it can never be there.
                Some(upper) if is_too_long(upper.format, name) => Err(Code::NameTooLong.into()),
                _ => Ok(None),
            },
            Some((node, stat)) => self.entry_as_found(node, &stat).map(Some),
        }
    }

    /// As [`Union::lookup`], of a name from the directory's listing.
    pub(crate) fn lookup_listed(
        &self,
        parent: &Arc<Node>,
        listed: &Placed,
    ) -> io::Result<Option<Entry>> {
        match self.resolve_with_stat(parent, &listed.name, listed.layer)? {
            None => Ok(None),
            Some((node, stat)) => self.entry_as_found(node, &stat).map(Some),
        }
    }

    /// As [`Union::entry`], of a node that was just found with these attributes.
    pub(super) fn entry_as_found(&self, node: Arc<Node>, stat: &Stat) -> io::Result<Entry> {
        let attr = self.attr_as_found(&node, stat)?;
        self.table.retain(&node);
        Ok(Entry { node, attr })
    }

    /// Counts a lookup, and tells what the node is.
    pub(super) fn entry(&self, node: Arc<Node>) -> io::Result<Entry> {
        let attr = self.attr(&node)?;
        self.table.retain(&node);
        Ok(Entry { node, attr })
    }

    /// The node under a name.
    pub(super) fn resolve(&self, parent: &Arc<Node>, name: &Name) -> io::Result<Option<Arc<Node>>> {
        Ok(self.resolve_with_stat(parent, name, 0)?.map(|(node, _)| node))
    }

    /// The node under a name that no lower layer above the layer `from` has.
    fn resolve_with_stat(
        &self,
        parent: &Arc<Node>,
        name: &Name,
        from: usize,
    ) -> io::Result<Option<(Arc<Node>, Stat)>> {
        for _ in 0..MAX_RETRIES {
            let since = self.published.load(Ordering::Acquire);
            let view = self.view(parent)?;
            let Some(found) = self.find_from(from, &view, name)? else { return Ok(None) };
            let stat = found.stat;
            match self.identify(parent, found, since)? {
                Identified::Node(node) => return Ok(Some((node, stat))),
                Identified::Changed => {}
            }
        }
        Err(Code::Stale.into())
    }

    /// A directory's parts.
    ///
    /// # Errors
    /// ENOTDIR for what is none, ENOENT for one that was removed.
    pub(super) fn view(&self, node: &Arc<Node>) -> io::Result<View> {
        let look = |state: &State| -> io::Result<(bool, Arc<[Part]>, Arc<RelPath>)> {
            let directory = state.directory.as_ref().ok_or(Code::NotDirectory)?;
            if directory.dead.is_some() {
                return Err(Code::NoEntry.into());
            }
            Ok((state.is_upper(), Arc::clone(&directory.lowers), Arc::clone(&directory.below)))
        };
        let (in_upper, lowers, below) = look(&node.state.lock())?;
        let upper = if in_upper { Some(self.upper_dir(node)?) } else { None };
        Ok(View { upper, lowers, below })
    }

    /// What is under a name in a directory.
    pub(super) fn find(&self, view: &View, name: &Name) -> io::Result<Option<Found>> {
        self.find_from(0, view, name)
    }

    /// As [`Union::find`], of a name that no lower layer above the layer `from` has.
    fn find_from(&self, from: usize, view: &View, name: &Name) -> io::Result<Option<Found>> {
        // Of no use but for directories.
        let below = |stat: &Stat| {
            if stat.is_dir() { view.below.join(name) } else { RelPath::ROOT }
        };
        if let (Some(dir), Some(upper)) = (&view.upper, &self.upper) {
            match entry::find(Some(upper.format), dir, name)? {
                Says::Nothing => {}
                Says::Whiteout => return Ok(None),
                Says::Entry { stat, ends } => {
                    let mut found = Found {
                        name: name.clone(),
                        stat,
                        upper: Some(Arc::clone(dir)),
                        lower: None,
                        own_dir: None,
                        lowers: Vec::new(),
                        below: below(&stat),
                    };
                    if stat.is_dir() && !ends && !self.lowers.is_empty() {
                        self.merge_below(view, &mut found, upper.format, dir)?;
                    }
                    return Ok(Some(found));
                }
            }
        }
        // Parts are in the order of their layers.
        let (_, lowers) =
            view.lowers.split_at(view.lowers.partition_point(|part| part.layer < from));
        let Lowers { first, parts } = self.find_below(lowers, name)?;
        Ok(first.map(|(stat, place)| Found {
            name: name.clone(),
            stat,
            upper: None,
            lower: Some(place),
            own_dir: None,
            lowers: parts,
            below: below(&stat),
        }))
    }

    /// Adds what merges with a directory of the upper.
    fn merge_below(
        &self,
        view: &View,
        found: &mut Found,
        format: LayerFormat,
        dir: &Dir,
    ) -> io::Result<()> {
        let open = || dir.open_dir(&found.name);
        let own = Arc::new(self.table.descriptors.opening(open)?);
        let opaque = marks::is_opaque(format, &own)?;
        let redirect = if opaque { None } else { marks::redirect(format, &own)? };
        found.own_dir = Some(own);
        if opaque {
            return Ok(());
        }
        match redirect {
            Some(Redirect::Path(path)) => {
                found.lowers = self.lower_parts(0, &path)?;
                found.below = path;
            }
            Some(Redirect::Sibling(sibling)) => {
                found.lowers = self.find_below(&view.lowers, &sibling)?.parts;
                found.below = view.below.join(&sibling);
            }
            None if view.lowers.is_empty() => {}
            None => found.lowers = self.find_below(&view.lowers, &found.name)?.parts,
        }
        Ok(())
    }

    /// The directories that make up `path` in the union of the lower layers from `first` on.
    pub(super) fn lower_parts(&self, first: usize, path: &RelPath) -> io::Result<Vec<Part>> {
        let mut parts = Vec::new();
        for (layer, lower) in self.lowers.iter().enumerate().skip(first) {
            parts.push(Part { layer, path: Arc::new(RelPath::ROOT) });
            if lower.marks().is_opaque(&lower.dir)? {
                break;
            }
        }
        for name in path.components() {
            parts = self.find_below(&parts, &name)?.parts;
        }
        Ok(parts)
    }

    /// What the lower layers have under a name, in the directories `parts`.
    pub(super) fn find_below(&self, parts: &[Part], name: &Name) -> io::Result<Lowers> {
        let mut found = Lowers { first: None, parts: Vec::new() };
        let mut wanted = name.clone();
        for (index, part) in parts.iter().enumerate() {
            let lower_marks = self.lower(part.layer)?.marks();
            let dir = self.lower_dir(part)?;
            let (stat, ends) = match lower_marks.find(&dir, &wanted)? {
                Says::Nothing => continue,
                Says::Whiteout => break,
                Says::Entry { stat, .. } if !stat.is_dir() => {
                    if found.first.is_none() {
                        found.first = Some((stat, place(part, &wanted)));
                    }
                    break;
                }
                Says::Entry { stat, ends } => (stat, ends),
            };
            if found.first.is_none() {
                found.first = Some((stat, place(part, &wanted)));
            }
            let own = Part { layer: part.layer, path: Arc::new(part.path.join(&wanted)) };
            let last = index.saturating_add(1) >= parts.len();
            let further = part.layer.saturating_add(1) < self.lowers.len();
            if ends || !further {
                found.parts.push(own);
                break;
            }
            // Marks are of interest only if there is something below.
            let format = lower_marks.format;
            let (opaque, redirect) = if last && format.xattr_prefix().is_none() {
                (false, None)
            } else {
                let dir = self.lower_dir(&own)?;
                (lower_marks.is_opaque(&dir)?, marks::redirect(format, &dir)?)
            };
            let layer = part.layer;
            found.parts.push(own);
            if opaque {
                break;
            }
            match redirect {
                None => {}
                Some(Redirect::Sibling(sibling)) => wanted = sibling,
                Some(Redirect::Path(path)) => {
                    found.parts.extend(self.lower_parts(layer.saturating_add(1), &path)?);
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Whether the layers below the upper would show something under a name: then removing it needs a
    /// whiteout. What kind of thing, if so.
    pub(super) fn shown_below(&self, view: &View, name: &Name) -> io::Result<Option<Stat>> {
        for part in view.lowers.iter() {
            match self.lower(part.layer)?.marks().find(&*self.lower_dir(part)?, name)? {
                Says::Nothing => {}
                Says::Whiteout => return Ok(None),
                Says::Entry { stat, .. } => return Ok(Some(stat)),
            }
        }
        Ok(None)
    }
}

fn place(part: &Part, name: &Name) -> LowerPlace {
    LowerPlace { dir: part.clone(), name: name.clone() }
}
