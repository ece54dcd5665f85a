//! Lookup and listing over a stack of layers, as a union mount of them would show.
//!
//! A [`MergedDir`] is one directory of the union: the layers' directories that merge in it, topmost
//! first, ended by the first opaque one, whiteout or non-directory. Walking goes down from
//! [`LayerStack::root`] one name at a time, and follows no symlink. A redirect sends the lookup in
//! the layers below to another name or path, whatever the depth.
//!
//! A plain directory is a union too, of one layer in which nothing is a mark ([`LayerStack::plain`]).
//!
//! Costs one descriptor for each layer that has the directory, while the [`MergedDir`] lives.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::LayerFormat;
use super::entry::{self, Found};
use super::marks::{self, Mark, Redirect};
use super::walk::has_vanished;
use crate::error::{IoContext, Result};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::stat::{FileType, Stat};

/// One layer's directory and its format.
#[derive(Clone, Debug)]
pub(crate) struct Branch {
    pub(crate) dir: Arc<Dir>,
    pub(crate) format: LayerFormat,
}

/// Layers, topmost first.
#[derive(Clone, Debug, Default)]
pub(crate) struct LayerStack {
    layers: Vec<Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    dir: Arc<Dir>,
    marks: Marks,
}

/// The marks of a layer; none where every name and xattr is just that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Marks(Option<LayerFormat>);

/// A directory of the union.
#[derive(Clone, Debug)]
pub(crate) struct MergedDir {
    path: RelPath,
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
struct Part {
    /// Index of the layer in the stack.
    layer: usize,
    marks: Marks,
    dir: Arc<Dir>,
}

/// What the union shows under a name.
#[derive(Clone, Debug)]
pub(crate) struct Visible {
    /// Index of the layer that it comes from, 0 being the topmost.
    pub(crate) layer: usize,
    pub(crate) stat: Stat,
    /// The layer's directory that holds it.
    pub(crate) dir: Arc<Dir>,
    /// Its name there.
    pub(crate) name: Name,
}

impl LayerStack {
    pub(crate) fn new(layers: Vec<Branch>) -> Self {
        let layer = |Branch { dir, format }| Layer { dir, marks: Marks(Some(format)) };
        LayerStack { layers: layers.into_iter().map(layer).collect() }
    }

    /// The tree in `dir` as it is.
    pub(crate) fn plain(dir: Arc<Dir>) -> Self {
        LayerStack { layers: vec![Layer { dir, marks: Marks(None) }] }
    }

    /// The root of the union.
    pub(crate) fn root(&self) -> Result<MergedDir> {
        self.root_from(0)
    }

    fn root_from(&self, first: usize) -> Result<MergedDir> {
        let mut parts = Vec::new();
        for (layer, Layer { dir, marks }) in self.layers.iter().enumerate().skip(first) {
            let opaque = marks
                .is_opaque(dir)
                .at("read the marks of the root of layer", layer.to_string())?;
            parts.push(Part { layer, marks: *marks, dir: Arc::clone(dir) });
            if opaque {
                break;
            }
        }
        Ok(MergedDir { path: RelPath::ROOT, parts })
    }

    /// What the union shows at `path`, which must not be the root; none if there is nothing, or if a
    /// component on the way is not a directory.
    pub(crate) fn lookup(&self, path: &RelPath) -> Result<Option<Visible>> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(None);
        };
        match self.directory(&parent)? {
            Some(dir) => dir.lookup(&name),
            None => Ok(None),
        }
    }

    /// The directory `path` of the union; none if it is not there or is no directory.
    pub(crate) fn directory(&self, path: &RelPath) -> Result<Option<MergedDir>> {
        self.descend(self.root()?, path)
    }

    fn descend(&self, from: MergedDir, path: &RelPath) -> Result<Option<MergedDir>> {
        let mut dir = from;
        for name in path.components() {
            match dir.enter(self, &name)? {
                Some(next) => dir = next,
                None => return Ok(None),
            }
        }
        Ok(Some(dir))
    }
}

impl MergedDir {
    /// How many layers merge in it; each costs a descriptor.
    pub(crate) fn layers(&self) -> usize {
        self.parts.len()
    }

    /// The topmost layer's directory, whose attributes it shows; none in a union without layers.
    pub(crate) fn own(&self) -> Option<&Arc<Dir>> {
        self.parts.first().map(|part| &part.dir)
    }

    /// The entry `name` of one of its layers, which [`MergedDir::list`] gave; none if it has vanished.
    pub(crate) fn visible(&self, name: &Name, layer: usize) -> Result<Option<Visible>> {
        let Some(part) = self.parts.iter().find(|part| part.layer == layer) else {
            return Ok(None);
        };
        let stat = part.dir.try_stat_at(name).at("look at", self.path.join(name))?;
        let dir = Arc::clone(&part.dir);
        Ok(stat.map(|stat| Visible { layer, stat, dir, name: name.clone() }))
    }

    /// The layers of both that have the very same directory here, by their indexes in each.
    pub(crate) fn shared(&self, other: &MergedDir) -> io::Result<Vec<(usize, usize)>> {
        let mut shared = Vec::new();
        let stats = |dir: &MergedDir| -> io::Result<Vec<Stat>> {
            dir.parts.iter().map(|part| part.dir.stat()).collect()
        };
        let (own, others) = (stats(self)?, stats(other)?);
        for (a, of_a) in self.parts.iter().zip(&own) {
            for (b, of_b) in other.parts.iter().zip(&others) {
                if a.marks == b.marks && of_a.same_inode(of_b) {
                    shared.push((a.layer, b.layer));
                }
            }
        }
        Ok(shared)
    }

    /// What the union shows here under `name`.
    pub(crate) fn lookup(&self, name: &Name) -> Result<Option<Visible>> {
        for part in &self.parts {
            match part.find(name).at("look up", self.path.join(name))? {
                Found::Nothing => {}
                Found::Whiteout => return Ok(None),
                Found::Entry { stat, .. } => {
                    let dir = Arc::clone(&part.dir);
                    return Ok(Some(Visible { layer: part.layer, stat, dir, name: name.clone() }));
                }
            }
        }
        Ok(None)
    }

    /// Goes down into a directory; none if `name` is not there or is no directory.
    pub(crate) fn enter(&self, stack: &LayerStack, name: &Name) -> Result<Option<MergedDir>> {
        let path = self.path.join(name);
        let mut wanted = name.clone();
        let mut parts: Vec<Part> = Vec::new();
        for part in &self.parts {
            let ends = match part.find(&wanted).at("look up", &path)? {
                Found::Nothing => continue,
                Found::Whiteout => break,
                Found::Entry { stat, .. } if !stat.is_dir() => break,
                Found::Entry { ends, .. } => ends,
            };
            let dir = match part.dir.open_dir(&wanted) {
                Err(e) if has_vanished(&e) => break,
                dir => Arc::new(dir.at("open directory", &path)?),
            };
            let marks = || Ok((part.marks.is_opaque(&dir)?, part.marks.redirect(&dir)?));
            let (opaque, redirect) = marks().at("read the marks of", &path)?;
            parts.push(Part { layer: part.layer, marks: part.marks, dir });
            if ends || opaque {
                break;
            }
            match redirect {
                None => {}
                Some(Redirect::Sibling(sibling)) => wanted = sibling,
                Some(Redirect::Path(target)) => {
                    let below = stack.root_from(part.layer.saturating_add(1))?;
                    if let Some(rest) = stack.descend(below, &target)? {
                        parts.extend(rest.parts);
                    }
                    break;
                }
            }
        }
        Ok(if parts.is_empty() { None } else { Some(MergedDir { path, parts }) })
    }

    /// The visible names, sorted, each with the index of its layer and its type.
    pub(crate) fn list(&self) -> Result<BTreeMap<Name, (usize, FileType)>> {
        let mut seen: BTreeMap<Name, Option<(usize, FileType)>> = BTreeMap::new();
        for part in &self.parts {
            // A layer's whiteouts say nothing of its own entries, in whatever order they are listed.
            let mut hidden = Vec::new();
            for entry in part.dir.entries().at("list", &self.path)? {
                let (name, mut file_type) = (entry.name, entry.file_type);
                if file_type == FileType::Unknown || part.marks.may_be(&name, file_type) {
                    let stat = part.dir.try_stat_at(&name);
                    let Some(stat) = stat.at("look at", self.path.join(&name))? else { continue };
                    match part.marks.decode(&name, &stat) {
                        Mark::None => file_type = stat.file_type,
                        Mark::Whiteout(of) => {
                            hidden.push(of);
                            continue;
                        }
                        Mark::Opaque | Mark::Internal => continue,
                    }
                }
                seen.entry(name).or_insert(Some((part.layer, file_type)));
            }
            for name in hidden {
                seen.entry(name).or_insert(None);
            }
        }
        Ok(seen.into_iter().filter_map(|(name, entry)| Some((name, entry?))).collect())
    }
}

impl Part {
    fn find(&self, name: &Name) -> io::Result<Found> {
        entry::find(self.marks.0, &self.dir, name)
    }
}

impl Marks {
    fn decode(self, name: &Name, stat: &Stat) -> Mark {
        self.0.map_or(Mark::None, |format| marks::decode(format, name, stat))
    }

    fn may_be(self, name: &Name, file_type: FileType) -> bool {
        self.0.is_some_and(|format| marks::may_be_mark(format, name, file_type))
    }

    fn is_opaque(self, dir: &Dir) -> io::Result<bool> {
        self.0.map_or(Ok(false), |format| marks::is_opaque(format, dir))
    }

    fn redirect(self, dir: &Dir) -> io::Result<Option<Redirect>> {
        self.0.map_or(Ok(None), |format| marks::redirect(format, dir))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::xattr::{self, Of};
    use std::fs;
    use std::path::Path;

    /// Layers in directories, topmost first; marks are written in the format.
    struct Layers {
        tmp: tempfile::TempDir,
        format: LayerFormat,
        count: usize,
    }

    impl Layers {
        fn new(format: LayerFormat, count: usize) -> Self {
            let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
            for i in 0..count {
                fs::create_dir(tmp.path().join(i.to_string())).unwrap();
            }
            Layers { tmp, format, count }
        }

        fn path(&self, layer: usize, path: &str) -> std::path::PathBuf {
            self.tmp.path().join(layer.to_string()).join(path)
        }

        fn file(&self, layer: usize, path: &str) {
            let path = self.path(layer, path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, layer.to_string()).unwrap();
        }

        fn dir(&self, layer: usize, path: &str) -> Dir {
            fs::create_dir_all(self.path(layer, path)).unwrap();
            Dir::open(self.path(layer, path)).unwrap()
        }

        fn whiteout(&self, layer: usize, dir: &str, name: &str) {
            let dir = self.dir(layer, dir);
            marks::make_whiteout(self.format, &dir, &Name::new(name).unwrap()).unwrap();
        }

        fn stack(&self) -> LayerStack {
            let branch = |i: usize| Branch {
                dir: Arc::new(Dir::open(self.path(i, "")).unwrap()),
                format: self.format,
            };
            LayerStack::new((0..self.count).map(branch).collect())
        }

        fn layer_of(&self, path: &str) -> Option<usize> {
            let path = RelPath::new(Path::new(path)).unwrap();
            self.stack().lookup(&path).unwrap().map(|v| v.layer)
        }

        fn names(&self, path: &str) -> Vec<String> {
            let dir = self.stack().directory(&RelPath::new(path).unwrap()).unwrap().unwrap();
            dir.list().unwrap().keys().map(|n| n.as_os_str().to_str().unwrap().into()).collect()
        }
    }

    const FORMATS: [LayerFormat; 2] = [LayerFormat::OverlayUser, LayerFormat::Aufs];

    #[test]
    fn the_topmost_entry_shows_and_whiteouts_hide() {
        for format in FORMATS {
            let l = Layers::new(format, 3);
            l.file(2, "d/old");
            l.file(2, "d/gone");
            l.file(2, "d/back");
            l.whiteout(1, "d", "gone");
            l.whiteout(1, "d", "back");
            l.file(1, "d/old");
            l.file(0, "d/back");
            assert_eq!(l.layer_of("d/old"), Some(1), "{format}");
            assert_eq!(l.layer_of("d/gone"), None);
            assert_eq!(l.layer_of("d/back"), Some(0));
            assert_eq!(l.names("d"), ["back", "old"]);
        }
    }

    #[test]
    fn opaque_directories_and_other_types_end_the_merge() {
        for format in FORMATS {
            let l = Layers::new(format, 3);
            l.file(2, "d/deep");
            l.file(2, "e/deep");
            l.file(1, "e");
            l.file(0, "e/new");
            marks::make_opaque(format, &l.dir(1, "d")).unwrap();
            l.file(0, "d/new");
            assert_eq!(l.names("d"), ["new"], "{format}");
            assert_eq!(l.layer_of("d/deep"), None);
            assert_eq!(l.names("e"), ["new"]);
            assert_eq!(l.layer_of("e/deep"), None);
            assert_eq!(l.layer_of("d/new/x"), None);
        }
    }

    #[test]
    fn a_redirected_directory_shows_what_it_had() {
        let l = Layers::new(LayerFormat::OverlayUser, 3);
        l.file(2, "a/old/x");
        l.file(1, "a/old/y");
        let set = |path: &str, value: &[u8]| {
            let dir = l.dir(0, path);
            xattr::set(Of::dir(&dir), b"user.overlay.redirect", value).unwrap();
        };
        set("a/new", b"old");
        l.whiteout(0, "a", "old");
        set("far", b"/a/old");
        assert_eq!(l.names("a"), ["new"]);
        assert_eq!(l.names("a/new"), ["x", "y"]);
        assert_eq!(l.layer_of("a/new/x"), Some(2));
        assert_eq!(l.layer_of("far/y"), Some(1));
    }

    #[test]
    fn a_whiteout_beside_its_name_hides_only_what_is_below() {
        let l = Layers::new(LayerFormat::Aufs, 2);
        l.file(1, "d/below");
        l.file(0, "d/here");
        l.whiteout(0, "", "d");
        assert_eq!(l.names("d"), ["here"]);
        assert_eq!(l.layer_of("d/below"), None);
    }
}
