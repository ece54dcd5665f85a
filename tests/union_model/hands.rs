//! Operations carried out on a mount.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps,
    Uid, XattrFlags,
};
use rustix::io::Errno;

use super::ops::{At, How, Move, Op, Outcome, SLOTS, Set, Space, Time, kind_of, pattern, stat_of};

/// The files that are open.
pub struct Hands {
    root: PathBuf,
    slots: [Option<OwnedFd>; SLOTS],
}

type Attempt<T> = rustix::io::Result<T>;

impl Hands {
    pub fn new(root: &Path) -> Hands {
        Hands { root: root.to_owned(), slots: Default::default() }
    }

    /// Carries out an operation; those on mounts are not for it.
    pub fn carry_out(&mut self, op: &Op) -> Outcome {
        self.attempt(op).unwrap_or_else(Outcome::Failed)
    }

    fn path(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn fd(&self, slot: usize) -> &OwnedFd {
        self.slots[slot].as_ref().expect("operations on files that are not open are skipped")
    }

    fn attempt(&mut self, op: &Op) -> Attempt<Outcome> {
        match op {
            Op::Open { slot, path, how, mode } => {
                // Its number is taken before, as by dup2.
                self.slots[*slot] = None;
                let path = self.path(path);
                self.slots[*slot] =
                    Some(rustix::fs::open(path, how.flags(), Mode::from_raw_mode(mode.0))?);
            }
            Op::Close { slot } => close(self.slots[*slot].take())?,
            Op::Put { path, how, offset, len, seed } => {
                let mode = Mode::from_raw_mode(0o666);
                let fd = rustix::fs::open(self.path(path), how.flags(), mode)?;
                write_all(&fd, &pattern(*len, *seed), *offset)?;
                close(Some(fd))?;
            }
            Op::Write { slot, offset, len, seed } => {
                write_all(self.fd(*slot), &pattern(*len, *seed), *offset)?;
            }
            Op::Read { slot, offset, len } => {
                return Ok(Outcome::Bytes(read_all(self.fd(*slot), *offset, *len)?));
            }
            Op::ReadFile { path } => {
                let fd = rustix::fs::open(self.path(path), How::Read.flags(), Mode::empty())?;
                return Ok(Outcome::Bytes(read_all(&fd, 0, usize::MAX)?));
            }
            Op::CopyRange { from, to, from_offset, offset, len } => {
                let (mut from_offset, mut offset, mut left) = (*from_offset, *offset, *len);
                let (from, to) = (self.fd(*from), self.fd(*to));
                while left > 0 {
                    let (at_from, at_to) = (Some(&mut from_offset), Some(&mut offset));
                    let n = rustix::fs::copy_file_range(from, at_from, to, at_to, left)?;
                    if n == 0 {
                        break;
                    }
                    left -= n;
                }
            }
            Op::Truncate { at: At::Slot(slot), len } => {
                rustix::fs::ftruncate(self.fd(*slot), *len)?;
            }
            Op::Truncate { at: At::Path(path), len } => {
                nix::unistd::truncate(&self.path(path), (*len).try_into().unwrap())
                    .map_err(|e| Errno::from_raw_os_error(e as i32))?;
            }
            Op::Allocate { slot, space, offset, len } => {
                let flags = match space {
                    Space::Extend => FallocateFlags::empty(),
                    Space::KeepSize => FallocateFlags::KEEP_SIZE,
                    Space::Punch => FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE,
                };
                rustix::fs::fallocate(self.fd(*slot), flags, *offset, *len)?;
            }
            Op::Sync { slot } => rustix::fs::fsync(self.fd(*slot))?,
            Op::Stat { at: At::Path(path) } => {
                return Ok(Outcome::Stat(stat_of(&rustix::fs::lstat(self.path(path))?)));
            }
            Op::Stat { at: At::Slot(slot) } => {
                return Ok(Outcome::Stat(stat_of(&rustix::fs::fstat(self.fd(*slot))?)));
            }
            Op::Chmod { at, mode } => {
                let mode = Mode::from_raw_mode(mode.0);
                match at {
                    At::Path(path) => rustix::fs::chmod(self.path(path), mode)?,
                    At::Slot(slot) => rustix::fs::fchmod(self.fd(*slot), mode)?,
                }
            }
            Op::Chown { at, uid, gid } => {
                let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                match at {
                    At::Path(path) => {
                        let flags = AtFlags::SYMLINK_NOFOLLOW;
                        rustix::fs::chownat(CWD, self.path(path), uid, gid, flags)?;
                    }
                    At::Slot(slot) => rustix::fs::fchown(self.fd(*slot), uid, gid)?,
                }
            }
            Op::Utimens { at, mtime } => {
                let (sec, nsec) = match *mtime {
                    Time::At(sec, nsec) => (sec, nsec.into()),
                    Time::Now => (0, rustix::fs::UTIME_NOW),
                    Time::Omit => (0, rustix::fs::UTIME_OMIT),
                };
                let times = Timestamps {
                    last_access: Timespec { tv_sec: 1_000_000_000, tv_nsec: 1 },
                    last_modification: Timespec { tv_sec: sec, tv_nsec: nsec },
                };
                match at {
                    At::Path(path) => {
                        let flags = AtFlags::SYMLINK_NOFOLLOW;
                        rustix::fs::utimensat(CWD, self.path(path), &times, flags)?;
                    }
                    At::Slot(slot) => rustix::fs::futimens(self.fd(*slot), &times)?,
                }
            }
            Op::SetXattr { at, name, value, set } => {
                let flags = match set {
                    Set::Any => XattrFlags::empty(),
                    Set::Create => XattrFlags::CREATE,
                    Set::Replace => XattrFlags::REPLACE,
                };
                match at {
                    At::Path(path) => rustix::fs::lsetxattr(self.path(path), *name, value, flags)?,
                    At::Slot(slot) => rustix::fs::fsetxattr(self.fd(*slot), *name, value, flags)?,
                }
            }
            Op::RemoveXattr { at: At::Path(path), name } => {
                rustix::fs::lremovexattr(self.path(path), *name)?;
            }
            Op::RemoveXattr { at: At::Slot(slot), name } => {
                rustix::fs::fremovexattr(self.fd(*slot), *name)?;
            }
            Op::Xattrs { at: At::Path(path) } => {
                return Ok(Outcome::Xattrs(xattrs_of(&self.path(path))?));
            }
            Op::Xattrs { at: At::Slot(slot) } => {
                return Ok(Outcome::Xattrs(fd_xattrs(self.fd(*slot))?));
            }
            Op::Symlink { path, target } => rustix::fs::symlink(*target, self.path(path))?,
            Op::ReadLink { path } => {
                let target = rustix::fs::readlink(self.path(path), Vec::new())?;
                return Ok(Outcome::Text(target.into_bytes()));
            }
            Op::Fifo { path, mode } => {
                let mode = Mode::from_raw_mode(mode.0);
                rustix::fs::mknodat(CWD, self.path(path), FileType::Fifo, mode, 0)?;
            }
            Op::Char { path, mode, minor, major } => {
                let (mode, dev) =
                    (Mode::from_raw_mode(mode.0), rustix::fs::makedev(*major, *minor));
                rustix::fs::mknodat(CWD, self.path(path), FileType::CharacterDevice, mode, dev)?;
            }
            Op::Mkdir { path, mode } => {
                rustix::fs::mkdir(self.path(path), Mode::from_raw_mode(mode.0))?;
            }
            Op::Rmdir { path } => rustix::fs::rmdir(self.path(path))?,
            Op::Unlink { path } => rustix::fs::unlink(self.path(path))?,
            Op::Link { from, to } => rustix::fs::link(self.path(from), self.path(to))?,
            Op::Rename { from, to, how } => {
                let flags = match how {
                    Move::Plain => RenameFlags::empty(),
                    Move::NoReplace => RenameFlags::NOREPLACE,
                    Move::Exchange => RenameFlags::EXCHANGE,
                };
                rustix::fs::renameat_with(CWD, self.path(from), CWD, self.path(to), flags)?;
            }
            Op::List { path } => return Ok(Outcome::Names(list(&self.path(path))?)),
            Op::Remount | Op::Forget | Op::Switch => unreachable!("not done by hand"),
        }
        Ok(Outcome::Done)
    }
}

/// What was written may fail only now.
fn close(fd: Option<OwnedFd>) -> Attempt<()> {
    let closed = fd.map_or(Ok(()), nix::unistd::close);
    closed.map_err(|e| Errno::from_raw_os_error(e as i32))
}

fn write_all(fd: impl AsFd, mut bytes: &[u8], mut offset: u64) -> Attempt<()> {
    while !bytes.is_empty() {
        let n = rustix::io::pwrite(&fd, bytes, offset)?;
        bytes = &bytes[n..];
        offset += n as u64;
    }
    Ok(())
}

fn read_all(fd: impl AsFd, mut offset: u64, len: usize) -> Attempt<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; len.min(1 << 16)];
    while bytes.len() < len {
        let want = buffer.len().min(len - bytes.len());
        let n = rustix::io::pread(&fd, &mut buffer[..want], offset)?;
        if n == 0 {
            break;
        }
        bytes.extend_from_slice(&buffer[..n]);
        offset += n as u64;
    }
    Ok(bytes)
}

/// The names in a directory and their types, by which getdents tells them; `!` with types that stat
/// does not tell, or names that come twice.
fn list(dir: &Path) -> Attempt<BTreeMap<OsString, char>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::empty())?;
    let mut names = BTreeMap::new();
    for entry in rustix::fs::Dir::read_from(fd)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        if names.insert(name.clone(), kind_of(entry.file_type())).is_some() {
            names.insert(name, '!');
        }
    }
    for dots in [".", ".."] {
        // Where they are told at all, they are directories.
        if names.remove(OsStr::new(dots)).is_some_and(|kind| kind != 'd') {
            names.insert(dots.into(), '!');
        }
    }
    Ok(names)
}

/// All that can be seen, but for what the system adds of its own accord.
pub fn xattrs_of(path: &Path) -> Attempt<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; 1 << 16];
    let len = rustix::fs::llistxattr(path, &mut names)?;
    names.truncate(len);
    collect_xattrs(&names, |name, value| rustix::fs::lgetxattr(path, name, value))
}

fn fd_xattrs(fd: &OwnedFd) -> Attempt<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; 1 << 16];
    let len = rustix::fs::flistxattr(fd, &mut names)?;
    names.truncate(len);
    collect_xattrs(&names, |name, value| rustix::fs::fgetxattr(fd, name, value))
}

fn collect_xattrs(
    names: &[u8],
    get: impl Fn(&str, &mut [u8]) -> Attempt<usize>,
) -> Attempt<BTreeMap<String, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    for name in names.split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let name = String::from_utf8_lossy(name).into_owned();
        if name.starts_with("security.") || name.starts_with("system.") {
            continue;
        }
        let mut value = [0; 256];
        let len = get(&name, &mut value)?;
        xattrs.insert(name, value[..len].to_vec());
    }
    Ok(xattrs)
}
