//! A walk over one layer's directory, by descriptor, following nothing: [`walk`] looks at every entry,
//! [`walk_listed`] takes listings at their word where they tell types.
//!
//! A directory comes before its contents. In a directory, what may be a mark (character devices, names
//! that begin with `.wh.`) comes first, then the rest, both in byte order: the order of archives. Depth is bounded by nothing: of the
//! directories on the way down only the last [`OPEN_DIRS`] stay open, those above are opened again
//! through `..` and must then be the same.

use std::io;

use super::marks::WHITEOUT_PREFIX;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::path::{Name, RelPath};
use crate::sys::dir::{Dir, DirEntry};
use crate::sys::stat::{FileType, Stat};

/// How many directories are held open at once.
const OPEN_DIRS: usize = 32;

/// One entry.
#[derive(Debug)]
pub(crate) struct Visit<'a> {
    /// Its path from the root of the walk.
    pub(crate) path: &'a RelPath,
    /// The directory that holds it.
    pub(crate) dir: &'a Dir,
    pub(crate) name: &'a Name,
    pub(crate) stat: &'a Stat,
}

/// One entry, not yet looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listed<'a> {
    /// Its path from the root of the walk.
    pub(crate) path: &'a RelPath,
    /// The directory that holds it.
    pub(crate) dir: &'a Dir,
    pub(crate) name: &'a Name,
    /// As the listing has it; it may have become something else.
    pub(crate) file_type: FileType,
}

impl Listed<'_> {
    /// A look at it; none if it has vanished.
    pub(crate) fn stat(&self) -> Result<Option<Stat>> {
        match self.dir.stat_at(self.name) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            stat => stat.at("look at", self.path).map(Some),
        }
    }
}

/// Whether to go into the directory just visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descend {
    Into,
    Past,
}

struct Frame {
    dir: Option<Dir>,
    identity: (u64, u64),
    entries: std::vec::IntoIter<DirEntry>,
}

/// 0 for what may be a mark, 1 for the rest.
fn order(entry: &DirEntry) -> u8 {
    let device = entry.file_type == FileType::CharDevice;
    u8::from(!device && !entry.name.as_bytes().starts_with(WHITEOUT_PREFIX))
}

impl Frame {
    fn new(dir: Dir, path: &RelPath) -> Result<Frame> {
        let stat = dir.stat().at("look at directory", path)?;
        let mut entries = dir.entries_once().at("list", path)?;
        entries.sort_unstable_by(|a, b| (order(a), &a.name).cmp(&(order(b), &b.name)));
        let entries = entries.into_iter();
        Ok(Frame { identity: (stat.dev, stat.ino), dir: Some(dir), entries })
    }
}

/// Visits everything below `root`, not `root` itself; an error from `visit` ends the walk. Names that
/// vanish while the walk is under way are passed over.
pub(crate) fn walk(root: &Dir, visit: &mut dyn FnMut(Visit<'_>) -> Result<Descend>) -> Result<()> {
    walk_listed(root, &mut |listed| match listed.stat()? {
        None => Ok(Descend::Past),
        Some(stat) => {
            let Listed { path, dir, name, .. } = listed;
            let descend = visit(Visit { path, dir, name, stat: &stat })?;
            Ok(if stat.is_dir() { descend } else { Descend::Past })
        }
    })
}

/// As [`walk`], without a look at what need not be looked at. Where the listing does not tell whether
/// a name is a directory's, `visit` is told [`FileType::Unknown`], and may descend into it all the same.
pub(crate) fn walk_listed(
    root: &Dir,
    visit: &mut dyn FnMut(Listed<'_>) -> Result<Descend>,
) -> Result<()> {
    let mut path = RelPath::ROOT;
    let mut frames = vec![Frame::new(root.reopen().at("open", "the root of a layer")?, &path)?];
    while let Some(frame) = frames.last_mut() {
        let Some(DirEntry { name, file_type }) = frame.entries.next() else {
            let done = frames.pop();
            if let (Some(above), Some(done)) = (frames.last_mut(), done) {
                reopen(above, done, &path)?;
            }
            path.pop();
            continue;
        };
        let Some(dir) = &frame.dir else { continue };
        path.push(&name);
        let descend = visit(Listed { path: &path, dir, name: &name, file_type })?;
        let may_be_dir = matches!(file_type, FileType::Directory | FileType::Unknown);
        if descend == Descend::Past || !may_be_dir {
            path.pop();
            continue;
        }
        let child = match dir.open_dir(&name) {
            Err(e) if has_vanished(&e) => {
                path.pop();
                continue;
            }
            child => child.at("open directory", &path)?,
        };
        frames.push(Frame::new(child, &path)?);
        if let Some(high) = frames.len().checked_sub(OPEN_DIRS.saturating_add(1))
            && let Some(frame) = frames.get_mut(high)
        {
            frame.dir = None;
        }
    }
    Ok(())
}

/// Whether this error of opening a directory means that there is none of that name any more.
pub(crate) fn has_vanished(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Gives the frame above its directory back.
fn reopen(above: &mut Frame, done: Frame, path: &RelPath) -> Result<()> {
    let (None, Some(below)) = (&above.dir, done.dir) else {
        return Ok(());
    };
    let dir = below.open_parent().at("open the directory above", path)?;
    let stat = dir.stat().at("look at the directory above", path)?;
    if (stat.dev, stat.ino) != above.identity {
        return Err(Error::new(
            ErrorKind::Busy,
            "a directory was moved while it was being walked: something else is writing to the layer",
        )
        .with_path(path));
    }
    above.dir = Some(dir);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn paths(root: &std::path::Path) -> Vec<String> {
        let mut paths = Vec::new();
        walk(&Dir::open(root).unwrap(), &mut |v| {
            paths.push(v.path.as_path().to_str().unwrap().to_owned());
            Ok(if v.name.as_bytes() == b"past" { Descend::Past } else { Descend::Into })
        })
        .unwrap();
        paths
    }

    #[test]
    fn marks_come_first_and_directories_before_their_contents() {
        let tmp = tempfile::tempdir().unwrap();
        for path in ["b/x", "a/y/z", "past/hidden"] {
            fs::create_dir_all(tmp.path().join(path)).unwrap();
        }
        std::os::unix::fs::symlink("a", tmp.path().join("link")).unwrap();
        fs::write(tmp.path().join("-"), "").unwrap();
        fs::write(tmp.path().join(".wh.x"), "").unwrap();
        assert_eq!(
            paths(tmp.path()),
            [".wh.x", "-", "a", "a/y", "a/y/z", "b", "b/x", "link", "past"]
        );
    }

    #[test]
    fn depth_is_no_limit() {
        let tmp = tempfile::tempdir().unwrap();
        let mut dir = Dir::open(tmp.path()).unwrap();
        let name = Name::new("d").unwrap();
        for _ in 0..1500 {
            dir.create_file(&Name::new("e").unwrap(), 0o600).unwrap();
            dir.make_dir(&name, 0o700).unwrap();
            dir = dir.open_dir(&name).unwrap();
        }
        assert_eq!(paths(tmp.path()).len(), 3000);
    }

    #[test]
    fn directories_that_vanish_or_turn_into_something_else_are_passed_over() {
        let tmp = tempfile::tempdir().unwrap();
        for path in ["a", "b", "c"] {
            fs::create_dir(tmp.path().join(path)).unwrap();
        }
        let mut paths = Vec::new();
        walk(&Dir::open(tmp.path()).unwrap(), &mut |v| {
            // Somebody does so between our look at it and our going in.
            let path = tmp.path().join(v.path);
            fs::remove_dir(&path).unwrap();
            match v.name.as_bytes() {
                b"a" => fs::write(path, "").unwrap(),
                b"b" => std::os::unix::fs::symlink(".", path).unwrap(),
                _ => {}
            }
            paths.push(v.path.as_path().to_str().unwrap().to_owned());
            Ok(Descend::Into)
        })
        .unwrap();
        assert_eq!(paths, ["a", "b", "c"]);
    }
}
