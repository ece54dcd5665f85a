//! Removal of whole trees, by descriptor: nothing is followed, no mount is entered.
//!
//! Depth costs no descriptors: a directory found deeper than [`MAX_DEPTH`] is first moved up beside
//! the tree's root, and removed from there.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::dir::{Dir, OnExisting};
use super::stat::FileType;
use crate::path::Name;

/// How many directories are held open at once.
const MAX_DEPTH: usize = 48;
/// How often a tree to which others add names is emptied again.
const MAX_RETRIES: u32 = 16;

/// Removes `name` in `parent` with everything below it. Names that vanish meanwhile are fine. Calls
/// `each` after every name removed; its error stops the removal.
///
/// A mount point below fails with EXDEV or EBUSY, and what is mounted there is not touched.
pub(crate) fn remove_tree(
    parent: &Dir,
    name: &Name,
    each: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<()> {
    match parent.unlink(name) {
        Ok(()) => return each(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        // EISDIR on Linux, EPERM by POSIX.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EISDIR | libc::EPERM)) => {
            if !parent.stat_at(name)?.is_dir() {
                return Err(e);
            }
        }
        Err(e) => return Err(e),
    }
    let mut moved = 0_u64;
    for _ in 0..MAX_RETRIES {
        let top = match open_below(parent, name) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            top => top?,
        };
        remove_contents(&top, &top, 1, &mut moved, each)?;
        match finish(parent, name, each) {
            // Another who removes it has just moved a deep directory up.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            done => return done,
        }
    }
    Err(io::ErrorKind::DirectoryNotEmpty.into())
}

/// Empties `dir`; `top` takes what is too deep.
fn remove_contents(
    top: &Dir,
    dir: &Dir,
    depth: usize,
    moved: &mut u64,
    each: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<()> {
    // Moving directories up adds names to `top`, so it is read until it is empty.
    loop {
        let entries = dir.entries()?;
        if entries.is_empty() {
            return Ok(());
        }
        for entry in entries {
            let name = &entry.name;
            let mut is_dir = entry.file_type == FileType::Directory;
            if !is_dir {
                match dir.unlink(name) {
                    Ok(()) => each()?,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) if e.raw_os_error() == Some(libc::EISDIR) => is_dir = true,
                    Err(e) => return Err(e),
                }
            }
            if !is_dir {
                continue;
            }
            if depth < MAX_DEPTH {
                match open_below(dir, name) {
                    Ok(child) => remove_contents(top, &child, depth + 1, moved, each)?,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(e),
                }
                finish(dir, name, each)?;
            } else {
                move_up(dir, name, top, moved)?;
            }
        }
    }
}

fn finish(dir: &Dir, name: &Name, each: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
    match dir.remove_dir(name) {
        Ok(()) => each(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

fn move_up(dir: &Dir, name: &Name, top: &Dir, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved += 1;
        let up = Name::new(format!("deep-{moved}")).map_err(io::Error::other)?;
        match dir.rename(name, top, &up, OnExisting::Fail) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Renaming a directory rewrites its "..": an unprivileged owner needs write permission.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                dir.chmod_at(name, 0o700)?;
                return dir.rename(name, top, &up, OnExisting::Fail);
            }
            done => return done,
        }
    }
}

/// Opens a child directory on the same mount, giving its owner the rights to empty it if need be.
fn open_below(dir: &Dir, name: &Name) -> io::Result<Dir> {
    let open = || -> io::Result<Dir> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let how = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
        match rustix::fs::openat2(dir, name.as_bytes(), flags, Mode::empty(), how) {
            // Before Linux 5.6; EPERM comes from seccomp filters that do not know the call.
            Err(Errno::NOSYS | Errno::PERM) => open_on_same_mount(dir, name),
            done => Dir::try_from(done?),
        }
    };
    let child = match open() {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            dir.chmod_at(name, 0o700)?;
            open()?
        }
        done => done?,
    };
    if child.stat()?.mode & 0o300 != 0o300 {
        match child.chmod(0o700) {
            // Somebody else's: whether we may empty it will be seen.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
            done => done?,
        }
    }
    Ok(child)
}

/// As openat2(2) with RESOLVE_NO_XDEV.
fn open_on_same_mount(dir: &Dir, name: &Name) -> io::Result<Dir> {
    let child = dir.open_dir(name)?;
    if mount_id(dir)? == mount_id(&child)? { Ok(child) } else { Err(Errno::XDEV.into()) }
}

/// The mount that a descriptor was opened through, from the file that every kernel has (proc(5),
/// `/proc/PID/fdinfo`).
fn mount_id(dir: &Dir) -> io::Result<u64> {
    let info = std::fs::read(format!("/proc/self/fdinfo/{}", dir.as_fd().as_raw_fd()))?;
    info.split(|b| *b == b'\n')
        .find_map(|line| line.strip_prefix(b"mnt_id:"))
        .and_then(|id| std::str::from_utf8(id).ok()?.trim().parse().ok())
        .ok_or_else(|| io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn remove(parent: &std::path::Path, name: &str) -> io::Result<u64> {
        let mut removed = 0;
        let dir = Dir::open(parent).unwrap();
        remove_tree(&dir, &Name::new(name).unwrap(), &mut || {
            removed += 1;
            Ok(())
        })?;
        Ok(removed)
    }

    #[test]
    fn removes_the_tree_and_nothing_that_links_point_to() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("keep")).unwrap();
        fs::write(tmp.path().join("keep/file"), "").unwrap();
        fs::create_dir_all(tmp.path().join("tree/a/b")).unwrap();
        fs::write(tmp.path().join("tree/a/f"), "").unwrap();
        symlink("../../keep", tmp.path().join("tree/a/link")).unwrap();
        symlink("keep", tmp.path().join("top")).unwrap();
        fs::set_permissions(tmp.path().join("tree/a"), PermissionsExt::from_mode(0o000)).unwrap();
        assert_eq!(remove(tmp.path(), "tree").unwrap(), 5);
        assert_eq!(remove(tmp.path(), "top").unwrap(), 1);
        assert_eq!(remove(tmp.path(), "gone").unwrap(), 0);
        assert!(tmp.path().join("keep/file").exists());
        assert!(!tmp.path().join("tree").exists());
    }

    #[test]
    fn depth_is_no_limit() {
        let tmp = tempfile::tempdir().unwrap();
        let name = Name::new("d".repeat(20)).unwrap();
        let mut dir = Dir::open(tmp.path()).unwrap();
        for _ in 0..3000 {
            dir.make_dir(&name, 0o700).unwrap();
            dir = dir.open_dir(&name).unwrap();
        }
        assert_eq!(remove(tmp.path(), &"d".repeat(20)).unwrap(), 3000);
        assert!(Dir::open(tmp.path()).unwrap().is_empty().unwrap());
    }

    #[test]
    fn two_may_remove_the_same_tree() {
        let tmp = tempfile::tempdir().unwrap();
        let name = Name::new("tree").unwrap();
        fs::create_dir_all(tmp.path().join("tree/a/b")).unwrap();
        fs::write(tmp.path().join("tree/a/f"), "").unwrap();
        fs::create_dir_all(tmp.path().join("tree/c/d")).unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        // The other is done between two steps of the first.
        remove_tree(&dir, &name, &mut || remove_tree(&dir, &name, &mut || Ok(()))).unwrap();
        assert!(dir.is_empty().unwrap());
    }

    #[test]
    fn mounts_are_not_entered_without_openat2_either() {
        let root = Dir::open("/").unwrap();
        let open = |name: &str| open_on_same_mount(&root, &Name::new(name).unwrap());
        let e = open("proc").unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EXDEV));
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("d")).unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        open_on_same_mount(&dir, &Name::new("d").unwrap()).unwrap();
    }
}
