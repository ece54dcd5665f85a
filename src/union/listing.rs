//! What a directory of the union has in it, in an order that stays.
//!
//! Nobody holds a directory open, so a listing belongs to the directory. Every entry has a cookie, a
//! number that grows: one can go on after any cookie at any time. A new name comes last, one that is
//! removed leaves a gap. So whoever is in the middle of a listing sees every name that was there all the
//! time exactly once.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Union;
use super::lookup::View;
use super::node::Node;
use crate::layer::lower_marks::LowerMarks;
use crate::layer::marks::Mark;
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

/// A name, and where it need not be looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) name: Name,
    /// No lower layer above this one has it.
    pub(super) layer: usize,
}

impl Placed {
    /// Of which nothing is known.
    fn anywhere(name: Name) -> Placed {
        Placed { name, layer: 0 }
    }
}

/// Most directories are listed and never changed, so nothing is kept for finding a name before one is
/// looked for.
#[derive(Debug, Default)]
struct Entries {
    /// By cookie, growing; without a name where one was removed.
    all: Vec<(u64, Option<Placed>)>,
    /// How many have no name.
    gaps: usize,
    /// The cookies, if a name was looked for.
    by_name: Option<HashMap<Name, u64>>,
    last: u64,
}

impl Entries {
    fn by_name(&mut self) -> &mut HashMap<Name, u64> {
        let all = &self.all;
        self.by_name.get_or_insert_with(|| {
            all.iter()
                .filter_map(|(cookie, placed)| Some((placed.as_ref()?.name.clone(), *cookie)))
                .collect()
        })
    }

    fn push(&mut self, placed: Placed) -> u64 {
        let cookie = self.last.max(DOT_DOT).saturating_add(1);
        self.last = cookie;
        self.all.push((cookie, Some(placed)));
        cookie
    }

    fn add(&mut self, name: &Name) {
        if !self.by_name().contains_key(name) {
            let cookie = self.push(Placed::anywhere(name.clone()));
            self.by_name().insert(name.clone(), cookie);
        }
    }

    fn remove(&mut self, name: &Name) {
        let Some(cookie) = self.by_name().remove(name) else { return };
        if let Ok(at) = self.all.binary_search_by_key(&cookie, |(cookie, _)| *cookie)
            && let Some((_, placed)) = self.all.get_mut(at)
        {
            *placed = None;
            self.gaps = self.gaps.saturating_add(1);
        }
        if self.gaps > self.all.len() / 2 {
            self.all.retain(|(_, placed)| placed.is_some());
            self.all.shrink_to_fit();
            self.gaps = 0;
        }
    }
}

/// An entry of a listing.
#[derive(Clone, Debug)]
pub(crate) enum Listed {
    /// The directory itself.
    Dot,
    /// The one above.
    DotDot(Arc<Node>),
    Name(Placed),
}

impl Listing {
    /// Of names that are all different.
    fn of(names: Vec<Placed>) -> Listing {
        let mut entries = Entries { all: Vec::with_capacity(names.len()), ..Entries::default() };
        for placed in names {
            entries.push(placed);
        }
        Listing { entries: Mutex::new(entries) }
    }

    pub(super) fn add(&self, name: &Name) {
        self.entries.lock().add(name);
    }

    pub(super) fn remove(&self, name: &Name) {
        self.entries.lock().remove(name);
    }

    fn is_empty(&self) -> bool {
        let entries = self.entries.lock();
        entries.all.len() <= entries.gaps
    }

    /// Makes the names what they are now; those that stay keep their cookies.
    fn renew(&self, names: &[Placed]) {
        let now: HashSet<&Name> = names.iter().map(|placed| &placed.name).collect();
        let mut entries = self.entries.lock();
        let gone: Vec<Name> =
            entries.by_name().keys().filter(|name| !now.contains(name)).cloned().collect();
        gone.iter().for_each(|name| entries.remove(name));
        names.iter().for_each(|placed| entries.add(&placed.name));
    }

    /// The first entry after a cookie.
    fn after(&self, cookie: u64) -> Option<(u64, Placed)> {
        let entries = self.entries.lock();
        let first = entries.all.partition_point(|(c, _)| *c <= cookie);
        entries.all.iter().skip(first).find_map(|(cookie, placed)| Some((*cookie, placed.clone()?)))
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
        while let Some((cookie, placed)) = listing.after(at) {
            at = cookie;
            if !each(cookie, Listed::Name(placed))? {
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
                listing.renew(&names);
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
    fn names_in(&self, view: &View) -> io::Result<Vec<Placed>> {
        let mut merged = Merged::default();
        if let (Some(dir), Some(upper)) = (&view.upper, &self.upper) {
            let marks = LowerMarks { format: upper.format, dot_wh: false };
            merged.add(marks, dir, 0, false, view.lowers.is_empty())?;
        }
        let lowest = view.lowers.len().saturating_sub(1);
        for (index, part) in view.lowers.iter().enumerate() {
            let (marks, dir) = (self.lower(part.layer)?.marks(), self.lower_dir(part)?);
            let by_xattr = marks.may_hold_xattr_whiteouts(&dir)?;
            // Where others may add to a layer above, the name may yet be there.
            let layer = if self.options.live { 0 } else { part.layer };
            merged.add(marks, &dir, layer, by_xattr, index == lowest)?;
        }
        Ok(merged.names)
    }
}

/// The names of several layers' directories.
#[derive(Default)]
struct Merged {
    names: Vec<Placed>,
    /// Those that are shown, and those that are deleted.
    seen: HashSet<Name>,
}

impl Merged {
    /// Adds the layer below those that were added, whose names are to be looked for from `layer` on;
    /// `by_xattr` if files may be whiteouts, `lowest` if no other is below it.
    fn add(
        &mut self,
        marks: LowerMarks,
        dir: &Dir,
        layer: usize,
        by_xattr: bool,
        lowest: bool,
    ) -> io::Result<()> {
        // A layer's whiteouts say nothing of its own entries, in whatever order they are listed.
        let mut hidden = Vec::new();
        for entry in dir.entries()? {
            let (name, file_type) = (entry.name, entry.file_type);
            if file_type == FileType::Unknown || marks.may_be_mark(&name, file_type) {
                let Some(stat) = dir.try_stat_at(&name)? else { continue };
                match marks.decode(&name, &stat) {
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
                && marks.is_xattr_whiteout(dir, &name, &stat)?
            {
                hidden.push(name);
                continue;
            }
            let new =
                if lowest { !self.seen.contains(&name) } else { self.seen.insert(name.clone()) };
            if new {
                self.names.push(Placed { name, layer });
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

    fn placed(s: &str) -> Placed {
        Placed::anywhere(name(s))
    }

    fn rest(listing: &Listing, mut at: u64) -> Vec<(u64, String)> {
        let mut names = Vec::new();
        while let Some((cookie, placed)) = listing.after(at) {
            at = cookie;
            names.push((cookie, placed.name.as_os_str().to_str().unwrap().to_owned()));
        }
        names
    }

    #[test]
    fn a_listing_goes_on_after_any_cookie_whatever_changed() {
        let listing = Listing::of(["a", "b", "c", "d"].map(placed).to_vec());
        let all = rest(&listing, 0);
        assert_eq!(all.iter().map(|(c, _)| *c).collect::<Vec<_>>(), [3, 4, 5, 6]);
        listing.remove(&name("b"));
        listing.remove(&name("c"));
        listing.add(&name("b"));
        listing.add(&name("a"));
        assert_eq!(rest(&listing, 4), [(6, "d".to_owned()), (7, "b".to_owned())]);
        listing.renew(&["e", "d"].map(placed));
        assert_eq!(rest(&listing, 0), [(6, "d".to_owned()), (8, "e".to_owned())]);
    }
    #[test]
    fn who_removes_while_listing_sees_every_name_once() {
        let names: Vec<Name> = (0..100).map(|n| name(&n.to_string())).collect();
        let listing = Listing::of(names.iter().cloned().map(Placed::anywhere).collect());
        let (mut at, mut seen) = (0, Vec::new());
        while let Some((cookie, placed)) = listing.after(at) {
            at = cookie;
            listing.remove(&placed.name);
            listing.add(&Name::new(format!("new {cookie}")).unwrap());
            seen.push(placed.name);
            if seen.len() == names.len() {
                break;
            }
        }
        assert_eq!(seen, names);
        assert_eq!(rest(&listing, at).len(), 100);
        for n in 3..103 {
            listing.remove(&name(&format!("new {n}")));
        }
        assert!(listing.is_empty());
        assert_eq!(rest(&listing, 0), []);
        listing.add(&name("0"));
        assert_eq!(rest(&listing, at), [(203, "0".to_owned())]);
    }
}
