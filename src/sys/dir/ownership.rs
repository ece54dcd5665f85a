//! Owners and modes of directories and what is in them, wherever the tree [keeps](super::super::owners) them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, Mode, OFlags};

use super::{Dir, set_times};
use crate::path::Name;
use crate::sys::file::Place;
use crate::sys::owners;
use crate::sys::stat::{self, FileType, Stat};
use crate::sys::xattr::{self, Of};

impl Dir {
    /// Its own owner.
    pub(crate) fn chown(&self, uid: u32, gid: u32) -> io::Result<()> {
        Place::Open(self.as_fd(), self.owners).chown(Some(uid), Some(gid))
    }

    /// Its own mode, setgid and sticky bits included.
    pub(crate) fn chmod(&self, mode: u32) -> io::Result<()> {
        match self.owners.are_in_xattrs() {
            false => Ok(rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(mode))?),
            true => Place::Open(self.as_fd(), self.owners).chmod(mode),
        }
    }

    /// Sets the owner of a child, symlinks themselves included. Clears setuid and setgid of files.
    ///
    /// Where owners are in xattrs, a symlink may become another file by it: only for what nobody sees yet.
    pub(crate) fn chown_at(&self, name: &Name, uid: u32, gid: u32) -> io::Result<()> {
        self.change_owner_at(name, Some(uid), Some(gid))
    }

    /// As [`Dir::chown_at`], of user or group alone, or both.
    pub(in crate::sys) fn change_owner_at(
        &self,
        name: &Name,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> io::Result<()> {
        if let Some(xattr) = self.owners.xattr() {
            let own = self.own_stat_at(name)?;
            if own.file_type == FileType::Symlink {
                let shown = xattr.shown(Of::Child(self, name), own)?;
                let (uid, gid) = (uid.unwrap_or(shown.uid), gid.unwrap_or(shown.gid));
                return match (uid, gid) == (shown.uid, shown.gid) {
                    true => Ok(()),
                    false => self.give_symlink_away(name, &own, xattr.key, (uid, gid)),
                };
            }
            return xattr.chown(Of::Child(self, name), own, uid, gid);
        }
        let (uid, gid) = (uid.map(rustix::fs::Uid::from_raw), gid.map(rustix::fs::Gid::from_raw));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::chownat(&self.fd, name.as_bytes(), uid, gid, flags)?)
    }

    /// Puts a file that stands for it in a symlink's place.
    fn give_symlink_away(
        &self,
        name: &Name,
        own: &Stat,
        key: &[u8],
        (uid, gid): (u32, u32),
    ) -> io::Result<()> {
        let target = rustix::fs::readlinkat(&self.fd, name.as_bytes(), Vec::new())?.into_bytes();
        let mut kept = Vec::new();
        for other in xattr::list(Of::Child(self, name))? {
            if let Some(value) = xattr::get(Of::Child(self, name), &other)? {
                kept.push((other, value));
            }
        }
        self.unlink(name)?;
        let mut file = self.create_itself(name, 0o600)?;
        let told = owners::symlink_of(uid, gid);
        // Whatever the umask is.
        let done = rustix::fs::fchmod(&file, Mode::from_raw_mode(0o600))
            .map_err(io::Error::from)
            .and_then(|()| {
                let of = Of::Fd(file.as_fd());
                kept.iter().try_for_each(|(key, value)| xattr::set(of, key, value))?;
                xattr::set(of, key, &told)
            })
            .and_then(|()| io::Write::write_all(&mut file, &target))
            .and_then(|()| set_times(&file, own.atime, own.mtime));
        self.or_unlink(name, done)
    }

    /// Waits until the target of a symlink is on disk: of one that is a file that stands for it. Of any other it is
    /// there with its name.
    pub(crate) fn sync_link_at(&self, name: &Name) -> io::Result<()> {
        if self.is_symlink_itself(name)? {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::fsync(rustix::fs::openat(&self.fd, name.as_bytes(), flags, Mode::empty())?)?)
    }

    /// Sets the mode of a child that is not a symlink; a symlink there is refused, not followed.
    pub(crate) fn chmod_at(&self, name: &Name, mode: u32) -> io::Result<()> {
        if let Some(xattr) = self.owners.xattr() {
            let own = self.own_stat_at(name)?;
            let of = Of::Child(self, name);
            if xattr.shown(of, own)?.file_type == FileType::Symlink {
                return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            }
            return xattr.chmod(of, own, mode);
        }
        self.chmod_itself_at(name, mode)
    }

    /// The same, of what the file itself has.
    pub(in crate::sys) fn chmod_itself_at(&self, name: &Name, mode: u32) -> io::Result<()> {
        match fchmodat2_nofollow(self.as_fd(), name, mode) {
            // Before Linux 6.6. The descriptor pins the file; the link in /proc is to just that one.
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&self.fd, name.as_bytes(), flags, Mode::empty())?;
                if stat::fstat(&fd)?.file_type == FileType::Symlink {
                    return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
                }
                let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
                Ok(rustix::fs::chmod(link, Mode::from_raw_mode(mode))?)
            }
            done => done,
        }
    }

    pub(super) fn create_itself(&self, name: &Name, mode: u32) -> io::Result<File> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        Ok(File::from(rustix::fs::openat(&self.fd, name.as_bytes(), flags, mode)?))
    }

    /// The mode with which a file that is to have `mode` is made.
    pub(super) fn own_mode(&self, mode: u32, is_dir: bool) -> u32 {
        match self.owners.are_in_xattrs() {
            false => mode,
            true => mode & 0o777 | owners::least_mode(is_dir),
        }
    }

    /// Completes what was just made, where owners are in xattrs.
    pub(super) fn made(
        &self,
        of: Of<'_>,
        own: impl FnOnce() -> io::Result<Stat>,
        mode: u32,
    ) -> io::Result<()> {
        match self.owners.xattr() {
            None => Ok(()),
            Some(xattr) => xattr.made(of, own()?, self, mode),
        }
    }

    /// Removes what was just made, if it could not be completed.
    pub(super) fn or_unlink(&self, name: &Name, done: io::Result<()>) -> io::Result<()> {
        done.inspect_err(|_| {
            if let Err(e) = self.unlink(name) {
                tracing::warn!(?name, error = %e, "cannot remove a file that could not be completed");
            }
        })
    }
}

/// What a file that stands for a symlink holds.
pub(in crate::sys) fn link_target(file: File) -> io::Result<Vec<u8>> {
    let mut target = Vec::new();
    let limit = u64::try_from(libc::PATH_MAX).unwrap_or(u64::MAX);
    io::Read::read_to_end(&mut io::Read::take(file, limit), &mut target)?;
    Ok(target)
}

fn fchmodat2_nofollow(dir: BorrowedFd<'_>, name: &Name, mode: u32) -> io::Result<()> {
    let name = std::ffi::CString::new(name.as_bytes())?;
    // SAFETY: the descriptor and the C string live through the call, which writes no memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fchmodat2,
            dir.as_raw_fd(),
            name.as_ptr(),
            mode,
            libc::AT_SYMLINK_NOFOLLOW,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
