//! Owner, mode, xattrs, access control lists and times of what was made.
//!
//! The order matters: chown clears setuid, setgid and `security.capability`, so it comes first; an
//! ordinary user can set `user.*` only while the mode lets him write, so xattrs come before the mode;
//! chmod changes an access control list's mask, so lists come after it; and times come last. The
//! umask is neither asked nor changed, nor is it asked who this process is: a new file is looked at,
//! and gets what it does not have.

use std::io;
use std::path::Path;

use super::acl::Acl;
use super::{Ownership, UnionXattrs, Unpack, XattrPolicy, refuse};
use crate::archive::entry::{Entry, EntryKind};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::marks;
use crate::path::Name;
use crate::sys::dir::{self, Dir};
use crate::sys::stat::Stat;
use crate::sys::xattr::{self, Of};

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
pub(super) const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
const SELINUX: &[u8] = b"security.selinux";

impl Unpack<'_> {
    /// Gives a new file, which is no directory, all that its entry says of it and that it does not
    /// have from the start. `of` is the file itself, open, or the name in `dir` where it cannot be
    /// opened. Returns what it takes on disk, and was, at last.
    pub(super) fn attributes(
        &mut self,
        of: Of<'_>,
        dir: &Dir,
        name: &Name,
        entry: &Entry,
    ) -> Result<Stat> {
        let path = &entry.path;
        let place = dir.place(of);
        let look = || place.stat().at("read attributes of", path);
        let mut made = look()?;
        self.newcomer = Some((made.uid, made.gid));
        let mut given = false;
        let at_once = dir.owners().are_in_xattrs()
            && self.options.ownership != Ownership::Ignore
            && !matches!(entry.kind, EntryKind::Symlink { .. });
        if !at_once
            && self.options.ownership != Ownership::Ignore
            && (made.uid, made.gid) != (entry.uid, entry.gid)
        {
            given = true;
            place
                .chown(Some(entry.uid), Some(entry.gid))
                .at("set owner of", path)
                .map_err(owner_remedy)?;
        }
        self.set_xattrs(of, entry)?;
        if at_once && (made.uid, made.gid, made.mode) != (entry.uid, entry.gid, entry.mode & 0o7777)
        {
            // Each of them is a change of the same xattr.
            place.assign(entry.uid, entry.gid, entry.mode).at("set owner and mode of", path)?;
            made.mode = entry.mode & 0o7777;
        }
        // A symlink has no mode of its own.
        if !matches!(entry.kind, EntryKind::Symlink { .. }) {
            let mode = entry.mode & 0o7777;
            if given || made.mode != mode || entry.has_xattrs() || self.inherits_acls {
                place.chmod(mode).at("set mode of", path)?;
            }
            self.set_acls(of, entry)?;
        }
        let (atime, mtime) = super::times(entry);
        match of {
            Of::Fd(fd) => dir::set_times(fd, atime, mtime),
            Of::Child(..) => dir.set_times_at(name, atime, mtime),
        }
        .at("set times of", path)?;
        if entry.has_xattrs() || self.inherits_acls {
            made = look()?;
        }
        Ok(made)
    }

    /// Sets a directory's owner that the archive records, if owners are wanted.
    pub(super) fn set_owner(&self, dir: &Dir, entry: &Entry) -> Result<()> {
        self.chown(dir, entry.uid, entry.gid).at("set owner of", &entry.path).map_err(owner_remedy)
    }

    pub(super) fn chown(&self, dir: &Dir, uid: u32, gid: u32) -> io::Result<()> {
        match self.options.ownership {
            Ownership::AsRecorded | Ownership::InXattrs => dir.chown(uid, gid),
            Ownership::Ignore => Ok(()),
        }
    }

    /// Sets the entry's xattrs as the policy says, but for access control lists.
    pub(super) fn set_xattrs(&mut self, of: Of<'_>, entry: &Entry) -> Result<()> {
        if entry.xattrs.is_empty() {
            return Ok(());
        }
        let sizes = entry.xattrs.iter().map(|(k, v)| k.len() + v.len());
        let total = sizes.fold(0_u64, |sum, n| sum.saturating_add(n as u64));
        let max = self.options.limits.max_xattr_bytes;
        if total > max {
            let message =
                format!("{total} bytes of xattrs are over the limit max_xattr_bytes of {max}");
            return Err(Error::new(ErrorKind::LimitExceeded, message).with_path(&entry.path));
        }
        for (key, value) in &entry.xattrs {
            if is_acl(key) {
                continue;
            }
            if marks::is_union_xattr(key) {
                if self.options.union_xattrs == UnionXattrs::Refuse {
                    let key = String::from_utf8_lossy(key);
                    return Err(refuse(
                        &entry.path,
                        format!("it has {key:?}, an xattr of union file systems"),
                    ));
                }
                self.counts.stripped_xattrs += 1;
            } else {
                self.set_xattr(of, key, value, entry.path.as_path())?;
            }
        }
        Ok(())
    }

    /// Sets one xattr, or leaves it out and counts it, by the policy.
    fn set_xattr(&mut self, of: Of<'_>, key: &[u8], value: &[u8], path: &Path) -> Result<()> {
        if !set_by_policy(self.options.xattrs, of, key, value, path)? {
            self.counts.skipped_xattrs += 1;
        }
        Ok(())
    }

    /// Sets the entry's access control lists, in whichever form they came, and takes away those that
    /// it inherited from its directory.
    pub(super) fn set_acls(&mut self, of: Of<'_>, entry: &Entry) -> Result<()> {
        let is_dir = entry.kind == EntryKind::Directory;
        if self.inherits_acls {
            self.drop_inherited_acls(of, is_dir, entry.path.as_path())?;
        }
        let lists =
            [(ACL_ACCESS, &entry.acl_access, true), (ACL_DEFAULT, &entry.acl_default, is_dir)];
        for (key, text, fits) in lists {
            let binary = entry.xattrs.get(key);
            if text.is_none() && binary.is_none() {
                continue;
            }
            let value = match (text, binary) {
                (Some(text), _) => Acl::parse(text).map(|acl| acl.encode()),
                (None, binary) => binary.cloned(),
            };
            if self.target.dir().owners().are_in_xattrs() {
                // It would be one of this user's files, and change their modes.
                if self.options.xattrs == XattrPolicy::Exact {
                    let message = "its access control list has no place where owners are in xattrs";
                    return Err(refuse(&entry.path, message));
                }
                self.counts.skipped_xattrs += 1;
                continue;
            }
            match value.filter(|_| fits) {
                Some(value) => {
                    self.set_xattr(of, key, &value, entry.path.as_path())?;
                    self.inherits_acls |= key == ACL_DEFAULT;
                }
                // It names users whom only the image knows, or is no list at all.
                None if self.options.xattrs == XattrPolicy::Exact => {
                    let message = "its access control list is malformed or names users without ids";
                    return Err(refuse(&entry.path, message));
                }
                None => self.counts.skipped_xattrs += 1,
            }
        }
        Ok(())
    }

    fn drop_inherited_acls(&self, of: Of<'_>, is_dir: bool, path: &Path) -> Result<()> {
        let keys = [Some(ACL_ACCESS), is_dir.then_some(ACL_DEFAULT)];
        for key in keys.into_iter().flatten() {
            match xattr::remove(of, key).at("remove inherited access control list of", path) {
                Err(e) if e.kind() != ErrorKind::Unsupported => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes the xattrs that the current directory has from before or inherited. Marks stay, and
    /// what is the host's or the file system's own.
    pub(super) fn drop_old_xattrs(&self) -> Result<()> {
        let dir = self.target.dir();
        let at = self.target.path();
        let keys = xattr::list(Of::dir(&dir)).at("list xattrs of", &at)?;
        for key in keys {
            let is_system = key.starts_with(b"system.") && !is_acl(&key);
            if is_system || key == SELINUX || marks::is_union_xattr(&key) {
                continue;
            }
            match xattr::remove(Of::dir(&dir), &key).at("remove old xattr of", &at) {
                Err(e)
                    if self.options.xattrs != XattrPolicy::Exact && may_be_left_out(&key, &e) => {}
                removed => removed?,
            }
        }
        Ok(())
    }

    /// Looks whether what is made in the root will inherit access control lists.
    pub(super) fn find_inherited_acls(&mut self) -> Result<()> {
        let dir = self.target.dir();
        let found = xattr::get(Of::dir(&dir), ACL_DEFAULT);
        self.inherits_acls = found.at("read access control list of", "")?.is_some();
        Ok(())
    }
}

/// Sets one xattr, or leaves it out by the policy; whether it is set.
pub(super) fn set_by_policy(
    policy: XattrPolicy,
    of: Of<'_>,
    key: &[u8],
    value: &[u8],
    path: &Path,
) -> Result<bool> {
    let wanted = match policy {
        XattrPolicy::Exact => true,
        XattrPolicy::Skip => false,
        XattrPolicy::Lenient => {
            is_acl(key)
                || key.starts_with(b"user.")
                || (key.starts_with(b"security.") && key != SELINUX)
        }
    };
    if !wanted {
        return Ok(false);
    }
    match xattr::set(of, key, value).at("set xattr of", path) {
        Err(e) if policy == XattrPolicy::Lenient && may_be_left_out(key, &e) => Ok(false),
        Err(e) => {
            let key = String::from_utf8_lossy(key);
            Err(e.context(format!("xattr {key:?} is not restored")))
        }
        Ok(()) => Ok(true),
    }
}

fn is_acl(key: &[u8]) -> bool {
    key == ACL_ACCESS || key == ACL_DEFAULT
}

/// Whether a lenient restore goes on without this xattr: the file system does not take it, or it is
/// not for us, or (of lists, which the kernel checks) it is malformed.
fn may_be_left_out(key: &[u8], e: &Error) -> bool {
    match e.kind() {
        ErrorKind::Unsupported | ErrorKind::PermissionDenied => true,
        ErrorKind::InvalidArgument => is_acl(key),
        _ => false,
    }
}

fn owner_remedy(e: Error) -> Error {
    match e.kind() {
        ErrorKind::PermissionDenied => {
            e.context("owners need CAP_CHOWN: run with it, or unpack with Ownership::Ignore")
        }
        _ => e,
    }
}
