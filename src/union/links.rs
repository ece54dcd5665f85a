//! Files with several names in a lower layer that were copied up.
//!
//! The copy has the names under which the file was known when it was changed, while others are still the
//! lower file's. So that a write through one name shows under all of them, now and when the union is
//! opened again, it keeps a further link to the copy in its work directory, and notes beside it which
//! lower file the copy stands for. When the upper is settled, all names are placed in it.
//!
//! ```text
//! links/7        a name of the copy
//! links/7.from   8 bytes: the layer, 0 being the lowest; 8: how many names the union shows; 8: the size of
//!                the original; all little-endian; then the path of the original in its layer
//! ```

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::node::{LowerPlace, Node, NodeId, Place, Real};
use super::spec::SyncPolicy;
use super::workdir::Marker;
use super::{Listed, Union, UpperBranch};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::errno::{self, Code};
use crate::sys::file::Access;
use crate::sys::remove::remove_tree;
use crate::sys::resolve::open_beneath;
use crate::sys::stat::Stat;

/// What a note's name ends in.
const NOTE: &[u8] = b".from";
/// How much of a note is read, in bytes: directories can be deep.
const MOST_OF_A_NOTE: u64 = 16 << 20;

/// One such file.
#[derive(Debug)]
pub(super) struct Linked {
    /// Its name among the union's own links.
    pub(super) name: Name,
    id: AtomicU64,
    pub(super) lower: Real,
    pub(super) upper: Real,
    /// How many names the union shows of it.
    names: AtomicU64,
    /// Held while that is noted.
    noting: Mutex<()>,
}

impl Linked {
    pub(super) fn new(name: Name, id: NodeId, lower: Real, upper: Real, names: u64) -> Linked {
        Linked {
            name,
            id: AtomicU64::new(id),
            lower,
            upper,
            names: AtomicU64::new(names),
            noting: Mutex::new(()),
        }
    }

    /// The number of its node.
    pub(super) fn id(&self) -> NodeId {
        self.id.load(Ordering::Relaxed)
    }

    pub(super) fn set_id(&self, id: NodeId) {
        self.id.store(id, Ordering::Relaxed);
    }

    pub(super) fn names(&self) -> u64 {
        self.names.load(Ordering::Relaxed)
    }

    pub(super) fn add_name(&self) {
        self.names.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a name away; how many are left.
    pub(super) fn remove_name(&self) -> u64 {
        let less = |n: u64| Some(n.saturating_sub(1));
        let before = self.names.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        before.unwrap_or(0).saturating_sub(1)
    }
}

/// All such files.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// By the lower file and by the copy.
    by_file: Mutex<HashMap<Real, Arc<Linked>>>,
    /// Whether there is any: mostly there is none.
    any: AtomicBool,
    /// There are links of which these layers do not have the original.
    lack_originals: AtomicBool,
}

impl Links {
    pub(super) fn of(&self, real: Real) -> Option<Arc<Linked>> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.by_file.lock().get(&real).cloned()
    }

    pub(super) fn insert(&self, linked: Linked) {
        let linked = Arc::new(linked);
        let mut by_file = self.by_file.lock();
        self.any.store(true, Ordering::Release);
        by_file.insert(linked.lower, Arc::clone(&linked));
        by_file.insert(linked.upper, linked);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_file.lock().is_empty()
    }

    pub(super) fn lacks_originals(&self) -> bool {
        self.lack_originals.load(Ordering::Relaxed)
    }

    /// Each of them once.
    fn all(&self) -> Vec<Arc<Linked>> {
        let by_file = self.by_file.lock();
        by_file
            .iter()
            .filter(|(real, linked)| **real == linked.upper)
            .map(|(_, l)| Arc::clone(l))
            .collect()
    }

    pub(super) fn remove(&self, linked: &Linked) {
        let mut by_file = self.by_file.lock();
        by_file.remove(&linked.lower);
        by_file.remove(&linked.upper);
    }
}

/// What a link stands for.
enum Stands {
    For(Linked),
    /// A file that the layers do not have.
    ForWhatIsAbsent,
    /// It was not made to the end, or has all its names.
    ForNothing,
}

/// What is noted of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note {
    /// From the lowest layer on.
    layer: u64,
    names: u64,
    size: u64,
    path: RelPath,
}

impl Note {
    fn encode(&self) -> Vec<u8> {
        [
            &self.layer.to_le_bytes()[..],
            &self.names.to_le_bytes(),
            &self.size.to_le_bytes(),
            self.path.as_bytes(),
        ]
        .concat()
    }

    /// Whether this is the original.
    fn is_of(&self, stat: &Stat) -> bool {
        !stat.is_dir() && stat.size == self.size
    }

    fn decode(bytes: &[u8]) -> Option<Note> {
        let (layer, rest) = bytes.split_first_chunk()?;
        let (names, rest) = rest.split_first_chunk()?;
        let (size, path) = rest.split_first_chunk()?;
        let path = RelPath::new(OsStr::from_bytes(path)).ok().filter(|path| !path.is_root())?;
        Some(Note {
            layer: u64::from_le_bytes(*layer),
            names: u64::from_le_bytes(*names),
            size: u64::from_le_bytes(*size),
            path,
        })
    }
}

/// A note, read and written again.
#[cfg(fuzzing)]
pub(super) fn recoded(bytes: &[u8]) -> Option<Vec<u8>> {
    Note::decode(bytes).map(|note| note.encode())
}

/// The name of the note of a copy that has this name among the links.
fn note_name(name: &Name) -> io::Result<Name> {
    Name::new([name.as_bytes(), NOTE].concat()).map_err(io::Error::other)
}

fn remove(dir: &Dir, name: &Name) -> io::Result<()> {
    match dir.unlink(name) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // Nothing that the union put there.
        Err(e) if Code::IsDirectory.is(&e) => remove_tree(dir, name, &mut || Ok(())),
        removed => removed,
    }
}

/// Removes a link and its note.
pub(super) fn discard(links: &Dir, name: &Name) -> io::Result<()> {
    remove(links, name)?;
    remove(links, &note_name(name)?)
}

impl Union {
    /// Gives a copy that is complete in the work directory its further link, with a note of what it is.
    pub(super) fn note_link_of(
        &self,
        upper: &UpperBranch,
        temp: &Name,
        (place, original): (&LowerPlace, &Stat),
        names: u64,
    ) -> io::Result<()> {
        upper.work.note(Marker::Linked)?;
        let below = self.lowers.len().saturating_sub(1).saturating_sub(place.dir.layer);
        let path = place.dir.path.join(&place.name);
        let note = Note { layer: below as u64, names, size: original.size, path };
        let links = upper.work.links();
        let file = links.create_file(&note_name(temp)?, 0o600)?;
        file.write_all_at(&note.encode(), 0)?;
        if self.options.sync == SyncPolicy::Strict {
            file.sync_all()?;
        }
        upper.work.temp().hard_link(temp, links, temp)
    }

    /// Notes how many names the union shows of a copy, before one is added: with too few in the note it
    /// would seem to have all its names, and be forgotten.
    pub(super) fn note_another_name(&self, linked: &Linked) -> io::Result<()> {
        self.write_names(linked, self.options.sync)
    }

    /// Notes how many names the union shows of a copy, after one has been taken away.
    pub(super) fn note_fewer_names(&self, linked: &Linked) {
        // More in the note than there are do no harm but to the number of links that is shown.
        if let Err(e) = self.write_names(linked, SyncPolicy::Volatile) {
            tracing::warn!(error = %e, "cannot note the number of names of a file: it may be shown too high \
                                        after the next mount");
        }
    }

    fn write_names(&self, linked: &Linked, sync: SyncPolicy) -> io::Result<()> {
        let _noting = linked.noting.lock();
        let (links, note) = (self.writable()?.work.links(), note_name(&linked.name)?);
        let file = crate::sys::file::Place::Child(links, &note).open_data(Access::ReadWrite)?;
        file.write_all_at(&linked.names().to_le_bytes(), 8)?;
        if sync == SyncPolicy::Strict { file.sync_data() } else { Ok(()) }
    }

    /// Takes up what the union before has noted. What stands for nothing any more is removed.
    pub(super) fn load_links(&self) -> io::Result<()> {
        let Some(upper) = &self.upper else { return Ok(()) };
        let links = upper.work.links();
        for entry in links.entries()? {
            let bytes = entry.name.as_bytes();
            let name = Name::new(bytes.strip_suffix(NOTE).unwrap_or(bytes));
            let Some((name, note)) = name.ok().and_then(|name| {
                let note = note_name(&name).ok()?;
                Some((name, note))
            }) else {
                // No name that the union gives.
                remove(links, &entry.name)?;
                continue;
            };
            // Looked at along with its note.
            if entry.name != note && links.try_stat_at(&note)?.is_some() {
                continue;
            }
            match self.read_link_note(links, &name)? {
                Stands::For(linked) => self.links.insert(linked),
                // With the right layers it may be there again, and this its only name.
                Stands::ForWhatIsAbsent => self.links.lack_originals.store(true, Ordering::Relaxed),
                Stands::ForNothing => discard(links, &name)?,
            }
        }
        let none = self.links.is_empty() && !self.links.lacks_originals();
        if none { upper.work.clear(Marker::Linked) } else { upper.work.note(Marker::Linked) }
    }

    /// Whether there are copies that have not all their names in the upper.
    pub(super) fn lacks_names(&self) -> io::Result<bool> {
        let Some(upper) = &self.upper else { return Ok(false) };
        for linked in self.links.all() {
            let copy = upper.work.links().try_stat_at(&linked.name)?;
            if copy.is_some_and(|copy| !has_all_names(&copy, linked.names())) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn read_link_note(&self, links: &Dir, name: &Name) -> io::Result<Stands> {
        let note = note_name(name)?;
        let is_note = links.try_stat_at(&note)?.is_some_and(|note| note.is_file());
        let copy = links.try_stat_at(name)?.filter(|copy| is_note && !copy.is_dir());
        let Some(copy) = copy else { return Ok(Stands::ForNothing) };
        let file = crate::sys::file::Place::Child(links, &note).open_data(Access::Read)?;
        let mut bytes = Vec::new();
        file.take(MOST_OF_A_NOTE).read_to_end(&mut bytes)?;
        let Some(note) = Note::decode(&bytes) else { return Ok(Stands::ForNothing) };
        if has_all_names(&copy, note.names) {
            return Ok(Stands::ForNothing);
        }
        let Some(original) = self.original(&note)? else {
            tracing::warn!(
                path = ?note.path,
                "a file with several names that was copied up is not in the lower layer any more: these \
                 are not the layers that it was made on"
            );
            return Ok(Stands::ForWhatIsAbsent);
        };
        let lower = Real::from(&original);
        let id = self.table.direct_id(lower).unwrap_or_else(|| self.table.dynamic_id());
        let linked = Linked::new(name.clone(), id, lower, Real::from(&copy), note.names);
        Ok(Stands::For(linked))
    }

    fn original(&self, note: &Note) -> io::Result<Option<Stat>> {
        let layer = usize::try_from(note.layer).ok().and_then(|layer| {
            self.lowers.len().checked_sub(1).and_then(|last| last.checked_sub(layer))
        });
        let (Some(layer), Some(dir), Some(name)) =
            (layer, note.path.parent(), note.path.file_name())
        else {
            return Ok(None);
        };
        let dir = match open_beneath(&self.lower(layer)?.dir, &dir) {
            // Whatever is there instead of the directory.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) if Code::NotDirectory.is(&e) || errno::is_loop(&e) => return Ok(None),
            dir => dir?,
        };
        Ok(dir.try_stat_at(&name)?.filter(|stat| note.is_of(stat)))
    }

    /// Places every name that the union shows of such copies in the upper. Calls `step` for each file and
    /// directory, and stops when that says so.
    pub(super) fn place_all_names(
        &self,
        step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> io::Result<()> {
        let gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
        let mut dirs: Vec<Arc<Node>> = vec![Arc::clone(self.root())];
        while let Some(dir) = dirs.pop() {
            let mut names = Vec::new();
            let listed = self.list(&dir, 0, |_, entry| {
                if let Listed::Name(placed) = entry {
                    names.push(placed.name);
                }
                Ok(true)
            });
            match listed {
                Err(e) if gone(&e) => continue,
                listed => listed?,
            }
            for name in names {
                if step().is_break() {
                    return Ok(());
                }
                let node = match self.resolve(&dir, &name) {
                    Ok(Some(node)) => node,
                    Ok(None) => continue,
                    Err(e) if gone(&e) => continue,
                    Err(e) => return Err(e),
                };
                if node.is_dir() {
                    dirs.push(node);
                } else if matches!(node.state.lock().place, Place::Linked(_)) {
                    self.place_names(&node)?;
                }
            }
        }
        Ok(())
    }

    /// Forgets all such copies, of which the upper has all names.
    pub(super) fn forget_links(&self) -> io::Result<()> {
        let Some(upper) = &self.upper else { return Ok(()) };
        for linked in self.links.all() {
            discard(upper.work.links(), &linked.name)?;
            self.links.remove(&linked);
        }
        Ok(())
    }

    /// At the end: forgets those that have all their names in the upper.
    pub(super) fn prune_links(&self) -> io::Result<()> {
        let Some(upper) = &self.upper else { return Ok(()) };
        for linked in self.links.all() {
            let links = upper.work.links();
            let copy = links.try_stat_at(&linked.name)?;
            if copy.is_none_or(|copy| has_all_names(&copy, linked.names())) {
                discard(links, &linked.name)?;
                self.links.remove(&linked);
            }
        }
        let none = upper.work.links().is_empty()?;
        if none { upper.work.clear(Marker::Linked) } else { Ok(()) }
    }
}

/// Whether a copy, which has a link among the union's own, has as many names beside.
fn has_all_names(copy: &Stat, names: u64) -> bool {
    copy.nlink.saturating_sub(1) >= names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_read_back() {
        let path = RelPath::new("a/\u{e9} b").unwrap();
        let note = Note { layer: 3, names: u64::MAX, size: 7, path };
        assert_eq!(Note::decode(&note.encode()), Some(note.clone()));
        let with_path = |path: &[u8]| [&[0; 24], path].concat();
        for bad in [vec![], vec![0; 23], vec![0; 24], with_path(b"/a"), with_path(b"a/../b")] {
            assert_eq!(Note::decode(&bad), None, "{bad:?}");
        }
    }
}
