//! What a directory of the union has in it, in an order that stays.
//!
//! Nobody holds a directory open, so a listing belongs to the directory. Every entry has a cookie, a
//! number that grows: one can go on after any cookie at any time. A new name comes last, one that is
//! removed leaves a gap. So whoever is in the middle of a listing sees every name that was there all the
//! time exactly once.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Union;
use super::lookup::View;
use super::node::Node;
use crate::layer::LayerFormat;
use crate::layer::marks::{self, Mark};
use crate::layer::xattr_whiteout;
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::errno::Code;
use crate::sys::stat::FileType;

/// The cookie of `..`; entries come after it.
const DOT_DOT: u64 = 2;

/// A directory's entries.
#[derive(Debug, Default)]
pub(super) struct Listing {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    by_cookie: BTreeMap<u64, Arc<Name>>,
    by_name: HashMap<Arc<Name>, u64>,
    last: u64,
}

/// An entry of a listing.
#[derive(Clone, Debug)]
pub(crate) enum Listed {
    /// The directory itself.
    Dot,
    /// The one above.
    DotDot(Arc<Node>),
    Name(Arc<Name>),
}

impl Listing {
    fn of(names: impl IntoIterator<Item = Name>) -> Listing {
        let listing = Listing::default();
        names.into_iter().for_each(|name| listing.add(&name));
        listing
    }

    pub(super) fn add(&self, name: &Name) {
        let mut entries = self.entries.lock();
        if entries.by_name.contains_key(name) {
            return;
        }
        let cookie = entries.last.max(DOT_DOT).saturating_add(1);
        entries.last = cookie;
        let name = Arc::new(name.clone());
        entries.by_name.insert(Arc::clone(&name), cookie);
        entries.by_cookie.insert(cookie, name);
    }

    pub(super) fn remove(&self, name: &Name) {
        let mut entries = self.entries.lock();
        if let Some(cookie) = entries.by_name.remove(name) {
            entries.by_cookie.remove(&cookie);
        }
    }

    fn is_empty(&self) -> bool {
        self.entries.lock().by_cookie.is_empty()
    }

    /// Makes the names what they are now; those that stay keep their cookies.
    fn renew(&self, names: Vec<Name>) {
        let gone: Vec<Arc<Name>> = {
            let now: std::collections::HashSet<&Name> = names.iter().collect();
            let entries = self.entries.lock();
            entries.by_name.keys().filter(|name| !now.contains(&***name)).cloned().collect()
        };
        gone.iter().for_each(|name| self.remove(name));
        names.iter().for_each(|name| self.add(name));
    }

    fn after(&self, cookie: u64) -> Option<(u64, Arc<Name>)> {
        let entries = self.entries.lock();
        let (cookie, name) = entries.by_cookie.range(cookie.saturating_add(1)..).next()?;
        Some((*cookie, Arc::clone(name)))
    }
}

impl Union {
    /// Gives a directory's entries after a cookie (0: from the start), each with its own, until `each`
    /// has enough and answers false.
    ///
    /// # Errors
    /// ENOTDIR for what is no directory; what `each` fails with.
    pub(crate) fn list(
        &self,
        node: &Arc<Node>,
        after: u64,
        mut each: impl FnMut(u64, Listed) -> io::Result<bool>,
    ) -> io::Result<()> {
        if !node.is_dir() {
            return Err(Code::NotDirectory.into());
        }
        if node.state.lock().is_dead() {
            return Ok(());
        }
        if after < 1 && !each(1, Listed::Dot)? {
            return Ok(());
        }
        if after < DOT_DOT {
            let above = node.link().map_or_else(|| Arc::clone(node), |(above, _)| above);
            if !each(DOT_DOT, Listed::DotDot(above))? {
                return Ok(());
            }
        }
        let listing = self.listing(node, after == 0)?;
        let mut at = after.max(DOT_DOT);
        while let Some((cookie, name)) = listing.after(at) {
            at = cookie;
            if !each(cookie, Listed::Name(name))? {
                break;
            }
        }
        Ok(())
    }

    /// A directory's listing, made if it is not there; for one who begins to read it, made anew where
    /// others may change the layers.
    fn listing(&self, node: &Arc<Node>, begins: bool) -> io::Result<Arc<Listing>> {
        let known = |node: &Node| node.state.lock().directory.as_ref()?.listing.clone();
        let renew = begins && self.options.live;
        if let Some(listing) = known(node)
            && !renew
        {
            return Ok(listing);
        }
        let _names = node.names.lock();
        let names = self.names_in(&self.view(node)?)?;
        if let Some(listing) = known(node) {
            if renew {
                listing.renew(names);
            }
            return Ok(listing);
        }
        let listing = Arc::new(Listing::of(names));
        if let Some(directory) = node.state.lock().directory.as_mut() {
            directory.listing = Some(Arc::clone(&listing));
        }
        Ok(listing)
    }

    /// Whether the union shows nothing in a directory, whose names are locked.
    pub(super) fn is_empty_dir(&self, node: &Arc<Node>) -> io::Result<bool> {
        if !self.options.live {
            let state = node.state.lock();
            if let Some(listing) = state.directory.as_ref().and_then(|d| d.listing.as_ref()) {
                return Ok(listing.is_empty());
            }
        }
        Ok(self.names_in(&self.view(node)?)?.is_empty())
    }

    /// Notes a new name in a directory, whose names are locked.
    pub(super) fn listed(&self, node: &Node, name: &Name) {
        if let Some(directory) = &node.state.lock().directory
            && let Some(listing) = &directory.listing
        {
            listing.add(name);
        }
    }

    /// Notes that a name is gone from a directory, whose names are locked.
    pub(super) fn unlisted(&self, node: &Node, name: &Name) {
        if let Some(directory) = &node.state.lock().directory
            && let Some(listing) = &directory.listing
        {
            listing.remove(name);
        }
    }

    /// The names that the union shows in a directory: the topmost layer's first.
    fn names_in(&self, view: &View) -> io::Result<Vec<Name>> {
        let mut merged = Merged::default();
        if let (Some(dir), Some(upper)) = (&view.upper, &self.upper) {
            merged.add(upper.format, dir, false)?;
        }
        for part in view.lowers.iter() {
            let (format, dir) = (self.lower(part.layer)?.format, self.lower_dir(part)?);
            let by_xattr = xattr_whiteout::may_hold(format, &dir)?;
            merged.add(format, &dir, by_xattr)?;
        }
        Ok(merged.names)
    }
}

/// The names of several layers' directories.
#[derive(Default)]
struct Merged {
    names: Vec<Name>,
    /// Those that are shown, and those that are deleted.
    seen: std::collections::HashSet<Name>,
}

impl Merged {
    /// Adds the layer below those that were added; `by_xattr` if files may be whiteouts.
    fn add(&mut self, format: LayerFormat, dir: &Dir, by_xattr: bool) -> io::Result<()> {
        // A layer's whiteouts say nothing of its own entries, in whatever order they are listed.
        let mut hidden = Vec::new();
        for entry in dir.entries()? {
            let (name, file_type) = (entry.name, entry.file_type);
            if file_type == FileType::Unknown || marks::may_be_mark(format, &name, file_type) {
                let Some(stat) = dir.try_stat_at(&name)? else { continue };
                match marks::decode(format, &name, &stat) {
                    Mark::None => {}
                    Mark::Whiteout(of) => {
                        hidden.push(of);
                        continue;
                    }
                    Mark::Opaque | Mark::Internal => continue,
                }
            }
            if by_xattr
                && let Some(stat) = dir.try_stat_at(&name)?
                && xattr_whiteout::is_whiteout(format, dir, &name, &stat)?
            {
                hidden.push(name);
                continue;
            }
            if self.seen.insert(name.clone()) {
                self.names.push(name);
            }
        }
        self.seen.extend(hidden);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(s: &str) -> Name {
        Name::new(s).unwrap()
    }

    fn rest(listing: &Listing, mut at: u64) -> Vec<(u64, String)> {
        let mut names = Vec::new();
        while let Some((cookie, name)) = listing.after(at) {
            at = cookie;
            names.push((cookie, name.as_os_str().to_str().unwrap().to_owned()));
        }
        names
    }

    #[test]
    fn a_listing_goes_on_after_any_cookie_whatever_changed() {
        let listing = Listing::of(["a", "b", "c", "d"].map(name));
        let all = rest(&listing, 0);
        assert_eq!(all.iter().map(|(c, _)| *c).collect::<Vec<_>>(), [3, 4, 5, 6]);
        listing.remove(&name("b"));
        listing.remove(&name("c"));
        listing.add(&name("b"));
        listing.add(&name("a"));
        assert_eq!(rest(&listing, 4), [(6, "d".to_owned()), (7, "b".to_owned())]);
        listing.renew(["e", "d"].map(name).to_vec());
        assert_eq!(rest(&listing, 0), [(6, "d".to_owned()), (8, "e".to_owned())]);
    }
}
