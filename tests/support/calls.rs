//! System calls as others would make them: as another user, with another umask, and with errors as
//! numbers that a test can name.

use std::fs;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::{Errno, Result};
use rustix::process::{Gid, Uid};

/// Runs `body` in a thread with these ids alone, and so without capabilities.
pub fn as_user<T: Send>(uid: u32, gid: u32, body: impl FnOnce() -> T + Send) -> T {
    in_thread(|| {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        body()
    })
}

/// Runs `body` in a thread with this umask.
pub fn with_umask<T: Send>(mask: u32, body: impl FnOnce() -> T + Send) -> T {
    in_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        rustix::process::umask(Mode::from(mask));
        body()
    })
}

fn in_thread<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope.spawn(body).join().unwrap_or_else(|e| std::panic::resume_unwind(e))
    })
}

pub fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from(0o666))
}

pub fn mkdir(path: &Path, mode: u32) -> Result<()> {
    rustix::fs::mkdir(path, Mode::from(mode))
}

pub fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<()> {
    rustix::fs::renameat_with(CWD, from, CWD, to, flags)
}

pub fn mknod(path: &Path, kind: rustix::fs::FileType, mode: u32, device: u64) -> Result<()> {
    rustix::fs::mknodat(CWD, path, kind, Mode::from(mode), device)
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> Result<()> {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
}

pub fn get_xattr(path: &Path, name: &str) -> Result<Vec<u8>> {
    let mut value = vec![0_u8; 64 << 10];
    let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}

pub fn has_xattr(path: &Path, name: &str) -> bool {
    match get_xattr(path, name) {
        Ok(_) => true,
        Err(Errno::NODATA) => false,
        Err(e) => panic!("{}: {name}: {e}", path.display()),
    }
}

#[track_caller]
pub fn chown(path: &Path, uid: u32, gid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
}

/// Sets access and modification time, of a symbolic link itself.
#[track_caller]
pub fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

pub fn mtime(path: &Path) -> (i64, i64) {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.mtime(), meta.mtime_nsec())
}

/// The mode's twelve bits.
#[track_caller]
pub fn mode_of(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    meta.mode() & 0o7777
}

#[track_caller]
pub fn owner_of(path: &Path) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.uid(), meta.gid())
}

pub fn ino(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::symlink_metadata(path).unwrap().ino()
}

pub fn links(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::symlink_metadata(path).unwrap().nlink()
}

/// Names in a directory, sorted; each must be there once.
#[track_caller]
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count, "{} lists a name twice", dir.display());
    names
}

#[track_caller]
pub fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[track_caller]
pub fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::write(path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Shared memory of a file.
pub struct Mapping {
    start: *mut u8,
    length: usize,
}

impl Mapping {
    pub fn new(file: impl AsFd, length: usize, writable: bool) -> std::io::Result<Mapping> {
        let protection =
            if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Mapping { start: start.cast(), length })
    }

    pub fn read(&self, at: usize, length: usize) -> Vec<u8> {
        assert!(at + length <= self.length);
        // SAFETY: inside of the mapping, which lives as long as self; volatile, since others write it.
        (at..at + length).map(|at| unsafe { self.start.add(at).read_volatile() }).collect()
    }

    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.length);
        for (n, byte) in bytes.iter().enumerate() {
            // SAFETY: inside of the mapping, which lives as long as self and is writable.
            unsafe { self.start.add(at + n).write_volatile(*byte) };
        }
    }

    pub fn sync(&self) -> std::io::Result<()> {
        // SAFETY: the whole mapping, which lives as long as self.
        match unsafe { libc::msync(self.start.cast(), self.length, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// A `security.capability` of version 2: `cap_net_raw+ep`.
pub fn capability() -> Vec<u8> {
    let words: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// An access or default ACL: permissions of the owner, of `uid`, of the group, the mask, of others.
pub fn acl(owner: u16, uid: u32, user: u16, group: u16, mask: u16, others: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, owner, NOBODY),
        (0x02, user, uid),
        (0x04, group, NOBODY),
        (0x10, mask, NOBODY),
        (0x20, others, NOBODY),
    ];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

pub const ACCESS: &str = "system.posix_acl_access";
pub const DEFAULT: &str = "system.posix_acl_default";
