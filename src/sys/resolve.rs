//! Paths resolved inside a root: `..` and absolute symlinks stop at it, magic links are refused.
//!
//! [`Resolver::Kernel`] is `openat2(2)` with RESOLVE_IN_ROOT and RESOLVE_NO_MAGICLINKS;
//! [`Resolver::Userspace`] walks by hand, for kernels before 5.6 and for sandboxes that deny openat2.
//! Both run the same test cases. The kernel answers EAGAIN when something was renamed during a walk
//! over `..`; that is retried a bounded number of times.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::dir::Dir;
use super::stat::{FileType, fstat};
use crate::path::{Name, RelPath};

/// How paths are resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resolver {
    Kernel,
    Userspace,
}

/// As the kernel: more symlinks than this in one path are ELOOP.
const MAX_SYMLINKS: u32 = 40;
/// How often a walk is tried again after a concurrent rename.
const MAX_RETRIES: u32 = 128;

static AVAILABLE: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const KERNEL: u8 = 1;
const USERSPACE: u8 = 2;

impl Resolver {
    /// The kernel's where it may be called, found out by calling it once.
    pub(crate) fn available() -> Resolver {
        match AVAILABLE.load(Ordering::Relaxed) {
            KERNEL => Resolver::Kernel,
            USERSPACE => Resolver::Userspace,
            _ => {
                let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let probe = rustix::fs::openat2(rustix::fs::CWD, c".", flags, Mode::empty(), how);
                // EPERM comes from seccomp filters that do not know the call.
                let (found, store) = match probe {
                    Err(Errno::NOSYS | Errno::PERM) => (Resolver::Userspace, USERSPACE),
                    _ => (Resolver::Kernel, KERNEL),
                };
                AVAILABLE.store(store, Ordering::Relaxed);
                found
            }
        }
    }

    /// Opens the directory `path` inside `root`, following symlinks inside `root`.
    pub(crate) fn open_dir(self, root: &Dir, path: &RelPath) -> io::Result<Dir> {
        if path.is_root() {
            return root.try_clone();
        }
        match self {
            Resolver::Kernel => Dir::of(kernel(root, path)?, root.owners()),
            Resolver::Userspace => userspace(root, path),
        }
    }
}

/// The kernel takes paths of up to 4095 bytes; longer ones are walked in pieces of at most this.
const PIECE: usize = 4000;

/// Opens the directory `path` below `root`, which must not lead over any symlink.
pub(crate) fn open_beneath(root: &Dir, path: &RelPath) -> io::Result<Dir> {
    if path.is_root() {
        return root.reopen();
    }
    if Resolver::available() == Resolver::Userspace {
        return step_by_step(root, path);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOCTTY;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let mut rest = path.as_bytes();
    let mut dir: Option<Dir> = None;
    while !rest.is_empty() {
        let (piece, after) = match rest.get(..PIECE) {
            None => (rest, &[][..]),
            Some(most) => {
                let slash = most.iter().rposition(|b| *b == b'/');
                let slash =
                    slash.ok_or_else(|| io::Error::from_raw_os_error(libc::ENAMETOOLONG))?;
                let (piece, after) = rest.split_at(slash);
                (piece, after.strip_prefix(b"/").unwrap_or(after))
            }
        };
        rest = after;
        let from = dir.as_ref().unwrap_or(root);
        let opened = loop {
            match rustix::fs::openat2(from, piece, flags, Mode::empty(), how) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                opened => break opened?,
            }
        };
        dir = Some(Dir::of(opened, root.owners())?);
    }
    dir.map_or_else(|| root.reopen(), Ok)
}

fn step_by_step(root: &Dir, path: &RelPath) -> io::Result<Dir> {
    let mut dir = root.reopen()?;
    for name in path.components() {
        dir = dir.open_dir(&name)?;
    }
    Ok(dir)
}

fn kernel(root: &Dir, path: &RelPath) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOCTTY;
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..MAX_RETRIES {
        match rustix::fs::openat2(root, path.as_bytes(), flags, Mode::empty(), how) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::ResourceBusy,
        "the tree was renamed under the walk again and again: something else is writing to it",
    ))
}

/// One step of a walk: down by a name, or up.
enum Step {
    Down(Name),
    Up,
}

/// Splits a symlink's target: whether it starts at the root, and its steps.
fn steps(target: &[u8]) -> io::Result<(bool, Vec<Step>)> {
    let mut steps = Vec::new();
    for component in target.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => steps.push(Step::Up),
            name => steps.push(Step::Down(
                Name::new(name).map_err(|_| io::Error::from_raw_os_error(libc::ENAMETOOLONG))?,
            )),
        }
    }
    Ok((target.first() == Some(&b'/'), steps))
}

fn userspace(root: &Dir, path: &RelPath) -> io::Result<Dir> {
    // The directories from the root to where we are: going up is a pop, and cannot pass the root,
    // whatever is renamed meanwhile.
    let mut walked: Vec<Dir> = Vec::new();
    let mut left: VecDeque<Step> = path.components().map(Step::Down).collect();
    let mut links = 0;
    while let Some(step) = left.pop_front() {
        let here = walked.last().unwrap_or(root);
        let name = match step {
            Step::Up => {
                walked.pop();
                continue;
            }
            Step::Down(name) => name,
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = rustix::fs::openat(here, name.as_bytes(), flags, Mode::empty())?;
        match fstat(&found)?.file_type {
            FileType::Directory => {
                let next = here.open_dir(&name)?;
                walked.push(next);
            }
            FileType::Symlink => {
                links += 1;
                if links > MAX_SYMLINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                let target = rustix::fs::readlinkat(&found, c"", Vec::new())?.into_bytes();
                if target.is_empty() {
                    return Err(io::ErrorKind::NotFound.into());
                }
                let (absolute, inner) = steps(&target)?;
                if absolute {
                    walked.clear();
                }
                for step in inner.into_iter().rev() {
                    left.push_front(step);
                }
            }
            _ => return Err(io::ErrorKind::NotADirectory.into()),
        }
    }
    walked.pop().map_or_else(|| root.try_clone(), Ok)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Each path, and the directory that it must resolve to or the errno.
    const CASES: &[(&str, Result<&str, i32>)] = &[
        ("", Ok("")),
        ("a", Ok("a")),
        ("a/b/c", Ok("a/b/c")),
        ("to-a", Ok("a")),
        ("to-a/b", Ok("a/b")),
        ("a/abs", Ok("a/b")),
        ("a/abs/c", Ok("a/b/c")),
        ("a/up", Ok("")),
        ("a/up/a/b", Ok("a/b")),
        ("a/b/far-up", Ok("")),
        ("a/b/far-up/etc", Ok("etc")),
        ("a/b/far-up-etc", Ok("etc")),
        ("abs-etc", Ok("etc")),
        ("root", Ok("")),
        ("root/root/a", Ok("a")),
        ("chain", Ok("a/b")),
        ("slashes", Ok("a/b")),
        ("dot", Ok("")),
        ("missing", Err(libc::ENOENT)),
        ("dangling", Err(libc::ENOENT)),
        ("dangling/x", Err(libc::ENOENT)),
        ("file", Err(libc::ENOTDIR)),
        ("file/x", Err(libc::ENOTDIR)),
        ("to-file", Err(libc::ENOTDIR)),
        ("loop", Err(libc::ELOOP)),
        ("loop/x", Err(libc::ELOOP)),
        ("self", Err(libc::ELOOP)),
    ];

    fn tree() -> tempfile::TempDir {
        let tmp = tempfile::tempdir().unwrap();
        let p = tmp.path();
        fs::create_dir_all(p.join("a/b/c")).unwrap();
        fs::create_dir(p.join("etc")).unwrap();
        fs::write(p.join("file"), "").unwrap();
        for (target, link) in [
            ("a", "to-a"),
            ("/a/b", "a/abs"),
            ("..", "a/up"),
            ("../../../../../..", "a/b/far-up"),
            ("../../../../../../etc", "a/b/far-up-etc"),
            ("/etc", "abs-etc"),
            ("/", "root"),
            ("to-a/abs", "chain"),
            ("//a///./b//", "slashes"),
            (".", "dot"),
            ("gone", "dangling"),
            ("file", "to-file"),
            ("loop2", "loop"),
            ("loop", "loop2"),
            ("self", "self"),
        ] {
            symlink(target, p.join(link)).unwrap();
        }
        tmp
    }

    #[test]
    fn both_resolvers_stay_inside_and_agree() {
        let tmp = tree();
        let root = Dir::open(tmp.path()).unwrap();
        for resolver in [Resolver::Kernel, Resolver::Userspace] {
            for (path, expected) in CASES {
                let found = resolver.open_dir(&root, &RelPath::new(path).unwrap());
                match (found, expected) {
                    (Ok(dir), Ok(expected)) => {
                        let meta = fs::metadata(tmp.path().join(expected)).unwrap();
                        use std::os::unix::fs::MetadataExt;
                        assert_eq!(dir.stat().unwrap().ino, meta.ino(), "{resolver:?} {path}");
                    }
                    (Err(e), Err(errno)) => {
                        let same = e.raw_os_error() == Some(*errno)
                            || io::Error::from_raw_os_error(*errno).kind() == e.kind();
                        assert!(same, "{resolver:?} {path}: {e}");
                    }
                    (found, expected) => panic!("{resolver:?} {path}: {found:?}, not {expected:?}"),
                }
            }
        }
    }

    #[test]
    fn magic_links_are_not_followed() {
        let root = Dir::open("/proc/self").unwrap();
        let path = RelPath::new("root/etc").unwrap();
        assert!(Resolver::Kernel.open_dir(&root, &path).is_err());
    }

    #[test]
    fn many_links_are_a_loop_for_both() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("l0")).unwrap();
        for i in 1..=41 {
            symlink(format!("l{}", i - 1), tmp.path().join(format!("l{i}"))).unwrap();
        }
        let root = Dir::open(tmp.path()).unwrap();
        for resolver in [Resolver::Kernel, Resolver::Userspace] {
            assert!(
                resolver.open_dir(&root, &RelPath::new("l40").unwrap()).is_ok(),
                "{resolver:?}"
            );
            assert!(
                resolver.open_dir(&root, &RelPath::new("l41").unwrap()).is_err(),
                "{resolver:?}"
            );
        }
    }
}
