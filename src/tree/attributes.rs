//! Owner, mode, xattrs, access control lists and times, read of one file and given to another.
//!
//! The order matters: chown clears setuid, setgid and `security.capability`, so it comes first; an
//! ordinary user can set `user.*` only while the mode lets him write, so xattrs come before the mode;
//! chmod changes an access control list's mask, so lists come after it; and times come last. The
//! umask is neither asked nor changed.

use std::io;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::LayerFormat;
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::file::{Place, SetTime};
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, Of};

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
const CAPABILITY: &[u8] = b"security.capability";

/// All that is to be known of a file but its contents.
#[derive(Clone, Debug)]
pub(super) struct Attributes {
    pub(super) stat: Stat,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    /// Those of a file with these of stat(2); the marks of `format` are none.
    pub(super) fn of(of: Of<'_>, stat: Stat, format: LayerFormat) -> io::Result<Attributes> {
        let mut xattrs = Vec::new();
        for key in xattr::list(of)? {
            let is_mark =
                format.xattr_prefix().is_some_and(|prefix| key.starts_with(prefix.as_bytes()));
            if !is_mark && let Some(value) = xattr::get(of, &key)? {
                xattrs.push((key, value));
            }
        }
        Ok(Attributes { stat, xattrs })
    }

    /// Gives them to an open file or directory.
    pub(super) fn give(&self, to: Place<'_>, path: &RelPath) -> Result<()> {
        let Stat { uid, gid, mode, atime, mtime, .. } = self.stat;
        match to.chown(Some(uid), Some(gid)) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                let own = to.stat().at("look at", path)?;
                self.must_own(&own, path, e)?;
            }
            done => done.at("set the owner of", path)?,
        }
        self.give_xattrs(to.xattrs(), path, |key| !is_acl(key))?;
        to.chmod(mode).at("set the mode of", path)?;
        self.give_xattrs(to.xattrs(), path, is_acl)?;
        to.set_times(SetTime::To(atime), SetTime::To(mtime)).at("set the times of", path)
    }

    /// Gives them to what must not be opened: a symlink, a fifo, a device.
    pub(super) fn give_to_name(&self, dir: &Dir, name: &Name, path: &RelPath) -> Result<()> {
        let Stat { uid, gid, mode, atime, mtime, .. } = self.stat;
        match dir.chown_at(name, uid, gid) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                let own = dir.stat_at(name).at("look at", path)?;
                self.must_own(&own, path, e)?;
            }
            done => done.at("set the owner of", path)?,
        }
        let of = Of::Child(dir, name);
        self.give_xattrs(of, path, |key| !is_acl(key))?;
        if self.stat.file_type != FileType::Symlink {
            dir.chmod_at(name, mode).at("set the mode of", path)?;
            self.give_xattrs(of, path, is_acl)?;
        }
        dir.set_times_at(name, atime, mtime).at("set the times of", path)
    }

    /// Who may not give a file away need not, if it is the right owner's already.
    fn must_own(&self, own: &Stat, path: &RelPath, e: io::Error) -> Result<()> {
        if (own.uid, own.gid) == (self.stat.uid, self.stat.gid) {
            return Ok(());
        }
        let error = Error::io("set the owner of", path, e);
        Err(error.context("a copy has the owners of the original, which takes CAP_CHOWN"))
    }

    fn give_xattrs(
        &self,
        of: Of<'_>,
        path: &RelPath,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<()> {
        for (key, value) in self.xattrs.iter().filter(|(key, _)| wanted(key)) {
            match xattr::set(of, key, value) {
                Err(e) if is_the_systems(key, &e) => {
                    tracing::debug!(path = ?path, key = ?String::from_utf8_lossy(key), "not set: {e}");
                }
                done => done.at("set an xattr of", path).map_err(|e| {
                    e.context(format!("xattr {:?} is not copied", String::from_utf8_lossy(key)))
                })?,
            }
        }
        Ok(())
    }
}

fn is_acl(key: &[u8]) -> bool {
    key == ACL_ACCESS || key == ACL_DEFAULT
}

/// Whether the attribute is for this machine's policy to give, and it has refused: labels and
/// measurements. Capabilities are the image's.
fn is_the_systems(key: &[u8], e: &io::Error) -> bool {
    let is_policy = key.starts_with(b"security.") && key != CAPABILITY;
    is_policy && matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported)
}

/// Takes away the access control lists that a new directory has of the one above, lest what is made in
/// it inherit them too.
pub(super) fn drop_inherited_acls(dir: &Dir) -> io::Result<()> {
    for key in [ACL_DEFAULT, ACL_ACCESS] {
        match xattr::remove(Of::dir(dir), key) {
            // Then there are none.
            Err(e) if e.kind() != io::ErrorKind::Unsupported => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// The kind of failure that a name which a layer would take for a mark gives.
pub(super) fn would_be_a_mark(path: &RelPath, what: &str) -> Error {
    Error::new(
        ErrorKind::FailedPrecondition,
        format!("{what}, which a layer would take for a mark: remove it, or give it another name"),
    )
    .with_path(path)
}
