//! Layers that show other ids than their files have: id-mapped mounts of them, which nobody sees,
//! for a union or to be mounted themselves.
//!
//! Lower layers, the upper and its work directory are mapped alike, so that what is copied up keeps its
//! owner on disk. What the kernel makes in the upper by itself, such as whiteouts, it makes as whoever
//! mounts: that must be one of the ids that are shown ([`Mapped::maker`]).
//!
//! Source: `ovl_get_layers`, `ovl_workdir_create` in the kernel's `fs/overlayfs/super.c`; `can_idmap_mount`
//! in `fs/namespace.c`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::UpperDir;
use super::overlay::refusal;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::idmap::{IdRange, ShownIds, shown};
use crate::sys::mount::{self as sys, Refusal};
use crate::sys::{fs_features, idmapped, stat};

/// What shows the ids of a mount.
#[derive(Debug)]
pub(super) struct Mapped<'a> {
    ids: &'a ShownIds,
    namespace: OwnedFd,
}

/// A layer, and the mount that it is on, which is gone when it is closed.
#[derive(Debug)]
pub(super) struct MappedLayer {
    pub(super) dir: OwnedFd,
    pub(super) mount: OwnedFd,
}

impl<'a> Mapped<'a> {
    /// None if all ids are to be shown as they are.
    pub(super) fn new(ids: &'a ShownIds) -> Result<Option<Self>> {
        if ids.is_empty() {
            return Ok(None);
        }
        ids.check()?;
        let namespace = idmapped::user_namespace(&map(&ids.uids), &map(&ids.gids));
        let namespace = namespace.map_err(|e| {
            let (kind, remedy) = match Refusal::of(&e) {
                Refusal::NotPermitted => (
                    ErrorKind::PermissionDenied,
                    "CAP_SETUID, CAP_SETGID and CAP_SETFCAP are needed, and all these ids in the user \
                     namespace of this process",
                ),
                Refusal::NoSpace => (
                    ErrorKind::PermissionDenied,
                    "there may be no more of them: raise user.max_user_namespaces",
                ),
                _ => (ErrorKind::Unsupported, "the kernel may have none"),
            };
            let text =
                format!("cannot make a user namespace that shows other ids than files have: {remedy}");
            Error::new(kind, text).with_source(e)
        })?;
        Ok(Some(Mapped { ids, namespace }))
    }

    /// A mount of the directory `dir`, attached nowhere, with the ids mapped.
    pub(super) fn mount(&self, dir: impl AsFd, path: &Path) -> Result<OwnedFd> {
        let dir = dir.as_fd();
        let mount = sys::clone_tree(dir).map_err(|e| refused(dir, path, e))?;
        sys::map_ids(&mount, &self.namespace).map_err(|e| refused(dir, path, e))?;
        Ok(mount)
    }

    /// A lower layer.
    pub(super) fn lower(&self, dir: OwnedFd, path: &Path) -> Result<MappedLayer> {
        let mount = self.mount(&dir, path)?;
        let dir = sys::open_below(&mount, Path::new("")).at("open layer", path)?;
        Ok(MappedLayer { dir, mount })
    }

    /// An upper directory, and its work directory, which must be on the same mount.
    pub(super) fn upper(&self, paths: &UpperDir) -> Result<(MappedLayer, OwnedFd)> {
        let dirs = [&paths.dir, &paths.work];
        let opened = [open(&paths.dir)?, open(&paths.work)?];
        let mut places = Vec::new();
        for (dir, path) in opened.iter().zip(dirs) {
            places.push(match sys::where_is(dir) {
                Some(place) => place,
                None => std::path::absolute(path).at("make absolute the path", path)?,
            });
        }
        let (above, below) = common(&places);
        let mount = self.mount(open(&above)?, &above)?;
        let mut found = Vec::new();
        for ((dir, path), place) in opened.iter().zip(dirs).zip(below) {
            let same = match sys::open_below(&mount, &place) {
                Ok(found) => is_same(dir, &found).at("look at", path)?.then_some(found),
                Err(_) => None,
            };
            found.push(same.ok_or_else(|| {
                let text = format!(
                    "the upper directory {:?} and its work directory {:?} must be on the same mount, \
                     without mounts between them and",
                    paths.dir, paths.work
                );
                Error::new(ErrorKind::InvalidArgument, text).with_path(&above)
            })?);
        }
        let (Some(work), Some(dir)) = (found.pop(), found.pop()) else {
            return Err(Error::new(ErrorKind::Unsupported, "no upper directory"));
        };
        Ok((MappedLayer { dir, mount }, work))
    }

    /// As whom the kernel is to make files in an upper: as root of the files on disk, or as the owner of the
    /// upper directory.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the owners of the directories are not shown: the kernel would mount
    /// them read-only, without a word.
    pub(super) fn maker(&self, upper: &UpperDir) -> Result<(u32, u32)> {
        let mut maker = (0, 0);
        for path in [&upper.work, &upper.dir] {
            let stat = stat::fstat(&open(path)?).at("look at", path)?;
            let by = |ranges: &[IdRange], id: u32, what: &str| {
                let root = shown(ranges, 0).filter(|_| id != 0);
                let own = shown(ranges, id).ok_or_else(|| {
                    Error::new(
                        ErrorKind::InvalidArgument,
                        format!(
                            "the {what} {id}, who owns the upper directory or its work directory, is \
                             in none of the ranges, so that nothing could be written: add one for"
                        ),
                    )
                    .with_path(path)
                })?;
                Ok::<u32, Error>(root.unwrap_or(own))
            };
            maker = (by(&self.ids.uids, stat.uid, "user")?, by(&self.ids.gids, stat.gid, "group")?);
        }
        Ok(maker)
    }
}

/// The form of /proc/PID/uid_map: first the id on disk, then what is shown for it.
fn map(ranges: &[IdRange]) -> String {
    let line = |r: &IdRange| format!("{} {} {}\n", r.host, r.shown, r.len);
    ranges.iter().map(line).collect()
}

fn open(path: &Path) -> Result<OwnedFd> {
    sys::open_layer(path).map_err(|e| refusal::of_open(path, e))
}

/// The directory above both, and what leads from there to each.
fn common(places: &[PathBuf]) -> (PathBuf, Vec<PathBuf>) {
    let Some((first, others)) = places.split_first() else { return Default::default() };
    let above = first
        .ancestors()
        .find(|above| others.iter().all(|other| other.starts_with(above)))
        .unwrap_or(Path::new("/"));
    let rest = |place: &PathBuf| place.strip_prefix(above).unwrap_or(place).to_owned();
    (above.to_owned(), places.iter().map(rest).collect())
}

fn is_same(one: impl AsFd, other: impl AsFd) -> std::io::Result<bool> {
    let (one, other) = (stat::fstat(one)?, stat::fstat(other)?);
    Ok((one.dev, one.ino) == (other.dev, other.ino))
}

/// The kernel does not map the ids of a mount.
fn refused(dir: impl AsFd, path: &Path, e: std::io::Error) -> Error {
    let name = fs_features::file_system_name(dir).unwrap_or_else(|_| "unknown".to_owned());
    let (kind, why) = match Refusal::of(&e) {
        Refusal::NotPermitted => (
            ErrorKind::PermissionDenied,
            format!(
                "CAP_SYS_ADMIN is needed in the user namespace in which its file system, {name}, was \
                 mounted, and a mount that maps no ids yet; the driver fuse needs neither"
            ),
        ),
        Refusal::NoSuchCall => (
            ErrorKind::Unsupported,
            "Linux 5.12 or later is needed, and a filter of system calls that knows mount_setattr; the \
             driver fuse needs neither"
                .to_owned(),
        ),
        Refusal::Invalid => (
            ErrorKind::Unsupported,
            format!(
                "this kernel cannot do that on its file system, {name}: keep the store on another, such as \
                 ext4, xfs or btrfs, or use the driver fuse"
            ),
        ),
        _ => return Error::io("map the ids of a mount of", path, e),
    };
    Error::new(kind, format!("cannot show other ids than files have: {why}:"))
        .with_path(path)
        .with_source(e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_above_two_is_found() {
        let common = |a: &str, b: &str| {
            let (above, rest) = common(&[a.into(), b.into()]);
            format!("{} {} {}", above.display(), rest[0].display(), rest[1].display())
        };
        assert_eq!(common("/s/1/fs", "/s/1/work"), "/s/1 fs work");
        assert_eq!(common("/a", "/b/c"), "/ a b/c");
        assert_eq!(common("/a", "/a/c"), "/a  c");
    }
}
