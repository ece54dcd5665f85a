//! The changes that one upper directory makes to the layers below it: a walk of the upper alone.

use std::collections::BTreeSet;

use super::equal::{Comparison, Mtimes, Side};
use super::{Change, ChangeKind};
use crate::error::{IoContext, Result};
use crate::layer::cursor::Cursor;
use crate::layer::marks::{self, Mark};
use crate::layer::stack::{Branch, LayerStack};
use crate::layer::walk::{Descend, walk};
use crate::path::RelPath;
use crate::progress::{Phase, Progress, ProgressFn, report};

/// The changes of `layer` against the union `below`, sorted by path. The layer must be settled.
pub(crate) fn upper(
    layer: &Branch,
    below: &LayerStack,
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<Change>> {
    let format = layer.format;
    let mut changes = Vec::new();
    let mut below = Cursor::new(below);
    let mut comparison = Comparison::new(Mtimes::Ignore);
    let mut done = Progress::new(Phase::Walk);
    if marks::is_opaque(format, &layer.dir).at("read the marks of", "the layer's root")? {
        lost(&mut below, &RelPath::ROOT, layer, &layer.dir, &mut changes)?;
    }
    walk(&layer.dir, &mut |visit| {
        done.entries += 1;
        report(progress, done)?;
        let parent = visit.path.parent().unwrap_or_default();
        match marks::decode(format, visit.name, visit.stat) {
            Mark::None => {}
            Mark::Whiteout(name) => {
                let hides = match below.directory(&parent)? {
                    Some(dir) => dir.lookup(&name)?.is_some(),
                    None => false,
                };
                // An entry of that name in the same layer is a change of it, not a deletion.
                let replaced = name != *visit.name
                    && visit.dir.try_stat_at(&name).at("look at", visit.path)?.is_some();
                if hides && !replaced {
                    changes.push(Change { path: parent.join(&name), kind: ChangeKind::Deleted });
                }
                return Ok(Descend::Past);
            }
            Mark::Opaque | Mark::Internal => return Ok(Descend::Past),
        }
        let old = match below.directory(&parent)? {
            Some(dir) => dir.lookup(visit.name)?,
            None => None,
        };
        let mut kind = match &old {
            None => Some(ChangeKind::Added),
            Some(old) => {
                let new = Side { dir: visit.dir, name: visit.name, stat: visit.stat };
                let old = Side { dir: &old.dir, name: &old.name, stat: &old.stat };
                (!comparison.equal(new, old, visit.path)?).then_some(ChangeKind::Modified)
            }
        };
        if visit.stat.is_dir() {
            let was_dir = old.is_some_and(|old| old.stat.is_dir());
            let dir = visit.dir.open_dir(visit.name).at("open directory", visit.path)?;
            let hidden = marks::separate_whiteout(format, visit.name)
                .map_or(Ok(None), |mark| visit.dir.try_stat_at(&mark))
                .at("look at", visit.path)?
                .is_some();
            if was_dir
                && (hidden || marks::is_opaque(format, &dir).at("read the marks of", visit.path)?)
            {
                kind = Some(ChangeKind::Modified);
                lost(&mut below, visit.path, layer, &dir, &mut changes)?;
            }
        }
        if let Some(kind) = kind {
            changes.push(Change { path: visit.path.clone(), kind });
        }
        Ok(Descend::Into)
    })?;
    changes.sort();
    Ok(changes)
}

/// The children that an opaque directory hides and does not have itself.
fn lost(
    below: &mut Cursor<'_>,
    path: &RelPath,
    layer: &Branch,
    dir: &crate::sys::dir::Dir,
    changes: &mut Vec<Change>,
) -> Result<()> {
    let Some(old) = below.directory(path)? else {
        return Ok(());
    };
    let mut own = BTreeSet::new();
    let mut whiteouts = BTreeSet::new();
    for entry in dir.entries().at("list", path)? {
        let stat = dir.stat_at(&entry.name).at("look at", path.join(&entry.name))?;
        match marks::decode(layer.format, &entry.name, &stat) {
            Mark::None => {
                own.insert(entry.name);
            }
            Mark::Whiteout(name) => {
                whiteouts.insert(name);
            }
            Mark::Opaque | Mark::Internal => {}
        }
    }
    for name in old.list()?.into_keys() {
        // A whiteout says so itself.
        if !own.contains(&name) && !whiteouts.contains(&name) {
            changes.push(Change { path: path.join(&name), kind: ChangeKind::Deleted });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerFormat;
    use crate::path::Name;
    use crate::progress::ignore_progress;
    use crate::sys::dir::{self, Dir};
    use crate::sys::stat::Time;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    struct Trees {
        tmp: tempfile::TempDir,
        format: LayerFormat,
    }

    impl Trees {
        fn new(format: LayerFormat) -> Self {
            let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
            fs::create_dir(tmp.path().join("upper")).unwrap();
            fs::create_dir(tmp.path().join("lower")).unwrap();
            Trees { tmp, format }
        }

        fn path(&self, path: &str) -> PathBuf {
            self.tmp.path().join(path)
        }

        fn file(&self, path: &str, text: &str, secs: i64, nanos: u32) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            let time = Time { secs, nanos };
            dir::set_times(fs::File::open(&path).unwrap(), time, time).unwrap();
        }

        fn opaque(&self, path: &str) {
            fs::create_dir_all(self.path(path)).unwrap();
            marks::make_opaque(self.format, &Dir::open(self.path(path)).unwrap()).unwrap();
        }

        fn whiteout(&self, path: &str) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let name = Name::new(path.file_name().unwrap().to_str().unwrap()).unwrap();
            let dir = Dir::open(path.parent().unwrap()).unwrap();
            marks::make_whiteout(self.format, &dir, &name).unwrap();
        }

        fn branch(&self, path: &Path) -> Branch {
            Branch { dir: Arc::new(Dir::open(path).unwrap()), format: self.format }
        }

        fn changes(&self) -> Vec<String> {
            let below = LayerStack::new(vec![self.branch(&self.path("lower"))]);
            let changes = upper(&self.branch(&self.path("upper")), &below, &mut ignore_progress);
            changes.unwrap().iter().map(Change::to_string).collect()
        }
    }

    const FORMATS: [LayerFormat; 2] = [LayerFormat::OverlayUser, LayerFormat::Aufs];

    #[test]
    fn additions_modifications_and_deletions() {
        for format in FORMATS {
            let t = Trees::new(format);
            t.file("lower/d/same", "x", 5, 1);
            t.file("upper/d/same", "x", 5, 1);
            t.file("lower/d/touched", "x", 5, 1);
            t.file("upper/d/touched", "x", 6, 1);
            t.file("lower/d/edited", "x", 5, 0);
            t.file("upper/d/edited", "y", 5, 0);
            t.file("lower/d/gone", "x", 5, 1);
            t.file("lower/tree/a/b", "x", 5, 1);
            t.whiteout("upper/d/gone");
            t.whiteout("upper/tree");
            t.whiteout("upper/d/never-was");
            t.file("upper/new/file", "x", 5, 1);
            let expected = ["M /d/edited", "D /d/gone", "A /new", "A /new/file", "D /tree"];
            assert_eq!(t.changes(), expected, "{format}");
        }
    }

    #[test]
    fn a_recreated_directory_is_modified_and_lost_what_it_had() {
        for format in FORMATS {
            let t = Trees::new(format);
            t.file("lower/d/old", "x", 5, 1);
            t.file("lower/d/kept", "x", 5, 1);
            t.file("lower/d/sub/deep", "x", 5, 1);
            t.opaque("upper/d");
            t.file("upper/d/kept", "x", 5, 1);
            t.file("upper/d/new", "x", 5, 1);
            assert_eq!(t.changes(), ["M /d", "A /d/new", "D /d/old", "D /d/sub"], "{format}");
        }
    }

    #[test]
    fn other_types_modes_and_targets_are_modifications() {
        let t = Trees::new(LayerFormat::OverlayUser);
        t.file("lower/dir/x", "x", 5, 1);
        t.file("upper/dir", "x", 5, 1);
        t.file("lower/file", "x", 5, 1);
        t.file("upper/file/x", "x", 5, 1);
        t.file("lower/mode", "x", 5, 1);
        t.file("upper/mode", "x", 5, 1);
        fs::set_permissions(
            t.path("upper/mode"),
            std::os::unix::fs::PermissionsExt::from_mode(0o4711),
        )
        .unwrap();
        std::os::unix::fs::symlink("a", t.path("lower/link")).unwrap();
        std::os::unix::fs::symlink("b", t.path("upper/link")).unwrap();
        let expected = ["M /dir", "M /file", "A /file/x", "M /link", "M /mode"];
        assert_eq!(t.changes(), expected);
    }
}
