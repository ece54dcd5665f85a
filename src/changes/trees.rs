//! What changed from one tree to another: a walk of both at once.
//!
//! Either side is a union of layers or a plain directory ([`LayerStack::plain`]). Entries come in the
//! order of archives: a directory before its contents; in a directory what is deleted first, then the
//! rest, both in byte order. Of a deleted directory only itself is told, of a new one all below it.
//! No symlink is followed. Where both sides are the very same directories, nothing below is looked
//! at, since it is the same; nor are files that both sides have from one and the same directory.
//!
//! Memory is that of the listings on the way down; the descriptors held are bounded, whatever the
//! depth and the number of layers.

use std::collections::BTreeMap;

use super::equal::{Comparison, Mtimes, Side};
use super::untouched::Untouched;
use super::{Change, ChangeKind};
use crate::error::{IoContext, Result};
use crate::layer::cursor::Cursor;
use crate::layer::stack::{LayerStack, MergedDir, Visible};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::stat::{FileType, Time};

/// One path of either tree.
#[derive(Debug)]
pub(crate) struct Difference<'a> {
    /// From the roots, which are not told of themselves.
    pub(crate) path: &'a RelPath,
    /// None where both are equal.
    pub(crate) kind: Option<ChangeKind>,
    /// What the upper tree has; none for a deletion.
    pub(crate) upper: Option<&'a Visible>,
    /// What the lower tree has, unless the upper has nothing there.
    pub(crate) lower: Option<&'a Visible>,
}

/// A directory that the walk is in.
struct Frame {
    /// In the order in which they are visited.
    names: std::vec::IntoIter<Listed>,
    /// Of the upper tree's.
    untouched: Untouched,
}

/// A name, and the index of the layer that it comes from in each tree that has it.
struct Listed {
    name: Name,
    upper: Option<usize>,
    lower: Option<usize>,
}

/// The changes that make the tree `upper` from `lower`, sorted by path, by the rules of the
/// [module](super).
pub(crate) fn between(
    upper: &LayerStack,
    lower: &LayerStack,
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<Change>> {
    between_since(upper, lower, None, progress)
}

/// As [`between`]; `since` is as for [`trees_since`].
pub(crate) fn between_since(
    upper: &LayerStack,
    lower: &LayerStack,
    since: Option<Time>,
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    trees_since(upper, lower, Mtimes::Ignore, since, progress, &mut |difference| {
        if let Some(kind) = difference.kind {
            changes.push(Change { path: difference.path.clone(), kind });
        }
        Ok(())
    })?;
    changes.sort();
    Ok(changes)
}

/// Visits every path of either tree, but for those below what is deleted and those that are the very
/// same by the directory that they are in; an error from `visit` ends the walk. Names that vanish meanwhile are passed over.
///
/// Neither tree may have redirects: layers must be settled.
pub(crate) fn trees(
    upper: &LayerStack,
    lower: &LayerStack,
    mtimes: Mtimes,
    progress: &mut ProgressFn<'_>,
    visit: &mut dyn FnMut(&Difference<'_>) -> Result<()>,
) -> Result<()> {
    trees_since(upper, lower, mtimes, None, progress, visit)
}

/// As [`trees`]; `since` is the moment from which on the upper tree, made as a copy of the lower, has
/// been edited, if that is known.
pub(crate) fn trees_since(
    upper: &LayerStack,
    lower: &LayerStack,
    mtimes: Mtimes,
    since: Option<Time>,
    progress: &mut ProgressFn<'_>,
    visit: &mut dyn FnMut(&Difference<'_>) -> Result<()>,
) -> Result<()> {
    let mut walk = Walk::new(upper, lower, mtimes);
    walk.since = since;
    walk.run(RelPath::ROOT, Both::MayBeOne, progress, visit)
}

/// Whether two files are equal, their modification times included.
pub(crate) fn are_equal(upper: &Visible, lower: &Visible, path: &RelPath) -> Result<bool> {
    Comparison::new(Mtimes::Count).equal(side(upper), side(lower), path)
}

/// Visits every path below the directory `path` of `upper` as added.
pub(crate) fn added(
    upper: &LayerStack,
    path: &RelPath,
    progress: &mut ProgressFn<'_>,
    visit: &mut dyn FnMut(&Difference<'_>) -> Result<()>,
) -> Result<()> {
    let lower = LayerStack::default();
    let mut walk = Walk::new(upper, &lower, Mtimes::Ignore);
    walk.run(path.clone(), Both::UpperAlone, progress, visit)
}

/// What is known of a directory of both trees before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Both {
    /// It may be the very same.
    MayBeOne,
    /// Each tree has one of its own.
    Differ,
    /// The lower tree has no directory there.
    UpperAlone,
}

struct Walk<'a> {
    upper: Cursor<'a>,
    lower: Cursor<'a>,
    comparison: Comparison,
    since: Option<Time>,
}

impl<'a> Walk<'a> {
    fn new(upper: &'a LayerStack, lower: &'a LayerStack, mtimes: Mtimes) -> Self {
        let (upper, lower) = (Cursor::new(upper), Cursor::new(lower));
        Walk { upper, lower, comparison: Comparison::new(mtimes), since: None }
    }

    fn run(
        &mut self,
        top: RelPath,
        both: Both,
        progress: &mut ProgressFn<'_>,
        visit: &mut dyn FnMut(&Difference<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut done = Progress::new(Phase::Walk);
        let mut path = top;
        let root = Untouched::root(self.since);
        let mut frames: Vec<Frame> = self.list(&path, both, root)?.into_iter().collect();
        while let Some(frame) = frames.last_mut() {
            let Some(listed) = frame.names.next() else {
                frames.pop();
                path.pop();
                continue;
            };
            done.entries += 1;
            report(progress, done)?;
            match self.visit(&mut path, &listed, frame.untouched, visit)? {
                Some(frame) => frames.push(frame),
                None => path.pop(),
            }
        }
        Ok(())
    }

    /// Goes to a name in `path`, and gives what is to be visited below it.
    fn visit(
        &mut self,
        path: &mut RelPath,
        listed: &Listed,
        above: Untouched,
        visit: &mut dyn FnMut(&Difference<'_>) -> Result<()>,
    ) -> Result<Option<Frame>> {
        let new = self.upper.visible(path, &listed.name, listed.upper)?;
        let old = match &new {
            Some(_) => self.lower.visible(path, &listed.name, listed.lower)?,
            None => None,
        };
        path.push(&listed.name);
        let Some(new) = new else {
            if listed.lower.is_some() {
                let kind = Some(ChangeKind::Deleted);
                visit(&Difference { path, kind, upper: None, lower: None })?;
            }
            return Ok(None);
        };
        let untouched = above.entry(&new.stat);
        let kind = match &old {
            None => Some(ChangeKind::Added),
            Some(old) => {
                let equal = untouched.is_equal(&new, old)
                    || self.comparison.equal(side(&new), side(old), path)?;
                (!equal).then_some(ChangeKind::Modified)
            }
        };
        visit(&Difference { path, kind, upper: Some(&new), lower: old.as_ref() })?;
        if !new.stat.is_dir() {
            return Ok(None);
        }
        let both = match &old {
            Some(old) if old.stat.same_inode(&new.stat) => Both::MayBeOne,
            Some(old) if old.stat.is_dir() => Both::Differ,
            _ => Both::UpperAlone,
        };
        self.list(path, both, untouched)
    }

    /// The names in a directory; none if both trees have the very same there.
    fn list(&mut self, path: &RelPath, both: Both, untouched: Untouched) -> Result<Option<Frame>> {
        let upper = self.upper.directory(path)?;
        let lower = match both {
            Both::UpperAlone => None,
            Both::MayBeOne | Both::Differ => self.lower.directory(path)?,
        };
        let mut shared = Vec::new();
        if let (Some(upper), Some(lower)) = (upper, lower) {
            shared = upper.shared(lower).at("look at directory", path)?;
            let same = |dir: &MergedDir| dir.layers() == shared.len();
            let in_order = shared.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1);
            if both == Both::MayBeOne && same(upper) && same(lower) && in_order {
                return Ok(None);
            }
        }
        let names = |dir: Option<&MergedDir>| dir.map(MergedDir::list).transpose();
        let (upper, lower) = (names(upper)?.unwrap_or_default(), names(lower)?.unwrap_or_default());
        let names = join(upper, lower, &shared);
        Ok(Some(Frame { names: names.into_iter(), untouched }))
    }
}

/// Both listings in one, in the order of visits, without the files that both have from a directory
/// that is the very same.
fn join(upper: Listing, lower: Listing, shared: &[(usize, usize)]) -> Vec<Listed> {
    let mut deleted = Vec::new();
    let mut rest = Vec::with_capacity(upper.len());
    let mut lower = lower.into_iter().peekable();
    for (name, (layer, file_type)) in upper {
        while let Some((gone, (layer, _))) = lower.next_if(|(old, _)| *old < name) {
            deleted.push(Listed { name: gone, upper: None, lower: Some(layer) });
        }
        let old = lower.next_if(|(old, _)| *old == name).map(|(_, (layer, _))| layer);
        let is_file = !matches!(file_type, FileType::Directory | FileType::Unknown);
        if is_file && old.is_some_and(|old| shared.contains(&(layer, old))) {
            continue;
        }
        rest.push(Listed { name, upper: Some(layer), lower: old });
    }
    deleted.extend(lower.map(|(name, (layer, _))| Listed {
        name,
        upper: None,
        lower: Some(layer),
    }));
    deleted.append(&mut rest);
    deleted
}

type Listing = BTreeMap<Name, (usize, FileType)>;

fn side(of: &Visible) -> Side<'_> {
    Side { dir: &of.dir, name: &of.name, stat: &of.stat }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerFormat;
    use crate::layer::stack::Branch;
    use crate::progress::ignore_progress;
    use crate::sys::dir::Dir;
    use crate::sys::remove::remove_tree;
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    fn plain(path: &Path) -> LayerStack {
        LayerStack::plain(Arc::new(Dir::open(path).unwrap()))
    }

    /// All visits, `=` for what is equal.
    fn visits(upper: &LayerStack, lower: &LayerStack, mtimes: Mtimes) -> Vec<String> {
        let mut seen = Vec::new();
        trees(upper, lower, mtimes, &mut ignore_progress, &mut |d| {
            let kind = d.kind.map_or('=', ChangeKind::letter);
            assert_eq!(d.upper.is_none(), d.kind == Some(ChangeKind::Deleted));
            seen.push(format!("{kind} {}", d.path.as_path().display()));
            Ok(())
        })
        .unwrap();
        seen
    }

    fn at(path: &Path, secs: u64) {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(secs);
        fs::File::open(path).unwrap().set_modified(time).unwrap();
    }

    #[test]
    fn visits_are_in_the_order_of_archives() {
        let tmp = tempfile::tempdir().unwrap();
        let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
        for path in ["a/x", "b/gone/deep", "c", "z/x", "same"] {
            fs::create_dir_all(old.join(path)).unwrap();
        }
        for path in ["a/y/z", "a.b", "b/x", "same", "c"] {
            fs::create_dir_all(new.join(path)).unwrap();
        }
        // A file that takes the place of a directory is all that is told of it.
        fs::remove_dir(new.join("c")).unwrap();
        fs::write(new.join("c"), "").unwrap();
        let seen = visits(&plain(&new), &plain(&old), Mtimes::Ignore);
        let expected = [
            "D z", "= a", "D a/x", "A a/y", "A a/y/z", "A a.b", "= b", "D b/gone", "A b/x", "M c",
            "= same",
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn times_alone_count_where_they_are_to_count() {
        let tmp = tempfile::tempdir().unwrap();
        let (old, new) = (tmp.path().join("old"), tmp.path().join("new"));
        for (root, secs) in [(&old, 5), (&new, 6)] {
            fs::create_dir_all(root.join("d")).unwrap();
            for file in ["touched", "same", "edited"] {
                fs::write(root.join(file), "text").unwrap();
            }
            at(&root.join("same"), 5);
            at(&root.join("edited"), 5);
            at(&root.join("touched"), secs);
            at(&root.join("d"), secs);
        }
        fs::write(new.join("edited"), "TEXT").unwrap();
        at(&new.join("edited"), 5);
        let (new, old) = (plain(&new), plain(&old));
        let seen = visits(&new, &old, Mtimes::Ignore);
        assert_eq!(seen, ["= d", "M edited", "= same", "= touched"]);
        let seen = visits(&new, &old, Mtimes::Count);
        assert_eq!(seen, ["M d", "M edited", "= same", "M touched"]);
    }

    #[test]
    fn what_is_the_very_same_is_not_walked() {
        let tmp = tempfile::tempdir().unwrap();
        for path in ["0/d", "1/d/x", "1/e/x", "2/e/y", "2/f/x"] {
            fs::create_dir_all(tmp.path().join(path)).unwrap();
        }
        // Of different sizes: their times may be the same.
        for (n, file) in ["0/d/above", "1/d/file", "1/d/above", "2/e/file"].iter().enumerate() {
            fs::write(tmp.path().join(file), "x".repeat(n)).unwrap();
        }
        let stack = |layers: &[&str]| {
            let branch = |layer: &&str| Branch {
                dir: Arc::new(Dir::open(tmp.path().join(layer)).unwrap()),
                format: LayerFormat::Aufs,
            };
            LayerStack::new(layers.iter().map(branch).collect())
        };
        let seen = visits(&stack(&["0", "1", "2"]), &stack(&["1", "2"]), Mtimes::Ignore);
        assert_eq!(seen, ["= d", "M d/above", "= d/x", "= e", "= f"]);
        let seen = visits(&stack(&["1", "2"]), &stack(&["2"]), Mtimes::Ignore);
        let new = ["A d", "A d/above", "A d/file", "A d/x"];
        assert_eq!(seen, [&new[..], &["= e", "A e/x", "= e/y", "= f"]].concat());
        assert!(visits(&stack(&["1"]), &stack(&["1"]), Mtimes::Ignore).is_empty());
        let seen = visits(&stack(&["1", "0"]), &stack(&["0", "1"]), Mtimes::Ignore);
        assert_eq!(seen, ["= d", "M d/above", "= d/x", "= e"]);
        assert_eq!(visits(&stack(&["0"]), &LayerStack::default(), Mtimes::Ignore).len(), 2);
    }

    #[test]
    fn depth_is_no_limit() {
        let tmp = tempfile::tempdir().unwrap();
        let name = Name::new("d").unwrap();
        let root = Dir::open(tmp.path()).unwrap();
        for side in ["old", "new"] {
            let side = Name::new(side).unwrap();
            root.make_dir(&side, 0o700).unwrap();
            let mut dir = root.open_dir(&side).unwrap();
            for _ in 0..1200 {
                dir.make_dir(&name, 0o700).unwrap();
                dir = dir.open_dir(&name).unwrap();
            }
            dir.make_dir(&side, 0o700).unwrap();
        }
        let (new, old) = (plain(&tmp.path().join("new")), plain(&tmp.path().join("old")));
        let changes = between(&new, &old, &mut ignore_progress).unwrap();
        assert_eq!(changes.len(), 2);
        for side in ["old", "new"] {
            remove_tree(&root, &Name::new(side).unwrap(), &mut || Ok(())).unwrap();
        }
    }
}
