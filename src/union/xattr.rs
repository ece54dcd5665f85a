//! Extended attributes.
//!
//! The marks of a branch's own format are hidden. A user's attributes whose keys would be such marks, as
//! an overlay mounted on top of this one sets, are kept under escaped keys: `trusted.overlay.x` as
//! `trusted.overlay.overlay.x`, which is what the kernel's overlayfs does, too. In the formats of other
//! branches all of these are attributes like any other.
//!
//! Where branches keep owners in an xattr, that is hidden, too, and set by nobody: whoever could would make his
//! file root's.

use std::io;
use std::sync::Arc;

use super::Union;
use super::acl;
use super::attr::SETGID;
use super::caller::{CAPABILITY, Caller};
use super::node::Node;
use crate::layer::LayerFormat;
use crate::sys::errno::Code;
use crate::sys::file::Place;
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, OnPresence};

/// The longest key, in bytes (`XATTR_NAME_MAX`).
const KEY_MAX: usize = 255;
const ESCAPE: &[u8] = b"overlay.";
/// The key, after the prefix, of what stands for a character device 0:0 of a user's.
const ZERO_DEVICE: &str = "zero-device";
/// The mode of such a file: the owner can read and write its xattrs, and hardly a file has it otherwise.
pub(super) const ZERO_DEVICE_FILE: u32 = 0o1600;

/// The key that a user's key has in a layer.
fn escaped(format: Option<LayerFormat>, key: &[u8]) -> Vec<u8> {
    match format.and_then(LayerFormat::xattr_prefix) {
        Some(prefix) if key.starts_with(prefix.as_bytes()) => {
            let rest = key.get(prefix.len()..).unwrap_or_default();
            [prefix.as_bytes(), ESCAPE, rest].concat()
        }
        _ => key.to_vec(),
    }
}

/// The key as the user knows it; none if it is the layer's own.
pub(super) fn unescaped(format: Option<LayerFormat>, key: &[u8]) -> Option<Vec<u8>> {
    let Some(prefix) = format.and_then(LayerFormat::xattr_prefix) else {
        return Some(key.to_vec());
    };
    match key.strip_prefix(prefix.as_bytes()) {
        None => Some(key.to_vec()),
        Some(own) => own.strip_prefix(ESCAPE).map(|rest| [prefix.as_bytes(), rest].concat()),
    }
}

/// The key that an attribute of a lower file has on its copy in the upper; none for the layer's own.
pub(super) fn copied(
    from: Option<LayerFormat>,
    to: Option<LayerFormat>,
    key: &[u8],
) -> Option<Vec<u8>> {
    unescaped(from, key).map(|key| escaped(to, &key))
}

impl Union {
    /// The value of an attribute; none if there is no such.
    pub(crate) fn xattr(&self, node: &Arc<Node>, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        if self.options.no_acl && acl::is_key(key) {
            return Err(Code::NotSupported.into());
        }
        if self.is_where_owners_are(key) {
            return Ok(None);
        }
        let _complete = self.when_complete(node);
        let value = self.at(node, |place, format, _| {
            let key = escaped(format, key);
            // No layer can have it.
            if key.len() > KEY_MAX { Ok(None) } else { xattr::get(place.xattrs(), &key) }
        })?;
        Ok(value.map(|value| match acl::is_key(key) {
            true => acl::shown(&value, &self.options.uids, &self.options.gids),
            false => value,
        }))
    }

    /// The keys of all attributes.
    pub(crate) fn xattrs(&self, node: &Arc<Node>) -> io::Result<Vec<Vec<u8>>> {
        let _complete = self.when_complete(node);
        self.at(node, |place, format, _| {
            let keys = xattr::list(place.xattrs())?;
            let keys = keys.iter().filter_map(|key| unescaped(format, key));
            Ok(keys
                .filter(|key| !(self.options.no_acl && acl::is_key(key)))
                .filter(|key| !self.is_where_owners_are(key))
                .collect())
        })
    }

    fn is_where_owners_are(&self, key: &[u8]) -> bool {
        self.owners().xattr().is_some_and(|xattr| xattr.key == key)
    }

    /// Sets an attribute. Setgid goes when somebody sets a list of access rights who is not in the file's
    /// group.
    pub(crate) fn set_xattr(
        &self,
        node: &Arc<Node>,
        key: &[u8],
        value: &[u8],
        presence: OnPresence,
        caller: Caller,
    ) -> io::Result<()> {
        self.writable()?;
        if self.is_where_owners_are(key) {
            return Err(Code::Perm.into());
        }
        let mapped;
        let mut value = value;
        if acl::is_key(key) {
            if self.options.no_acl {
                return Err(Code::NotSupported.into());
            }
            mapped =
                acl::host(value, &self.options.uids, &self.options.gids).ok_or(Code::Invalid)?;
            value = &mapped;
        }
        // Told before anything is copied.
        let exists = match presence {
            OnPresence::Any => None,
            OnPresence::Create | OnPresence::Replace => Some(self.xattr(node, key)?.is_some()),
        };
        match (presence, exists) {
            (OnPresence::Create, Some(true)) => return Err(Code::Exists.into()),
            (OnPresence::Replace, Some(false)) => return Err(Code::NoData.into()),
            _ => {}
        }
        let _capable = (key == CAPABILITY).then(|| {
            let mut capable = node.capable.lock();
            *capable = true;
            capable
        });
        let _data_stay = self.copy_up_attributes(node)?;
        let keep_setgid = key != acl::ACCESS
            || caller.is_privileged()
            || caller.is_in_group(self.attr(node)?.gid);
        self.at(node, |place, format, _| {
            let key = user_key(format, key)?;
            xattr::set_if(place.xattrs(), &key, value, presence)?;
            if !keep_setgid && node.kind != FileType::Directory {
                let mode = place.stat()?.mode;
                if mode & SETGID != 0 {
                    place.chmod(mode & !SETGID)?;
                }
            }
            Ok(())
        })
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// ENODATA if there is no such; EPERM for capabilities if who asks could not write the file: the kernel
    /// asks for their removal in the name of anybody who changes the owner to what it is.
    pub(crate) fn remove_xattr(
        &self,
        node: &Arc<Node>,
        key: &[u8],
        caller: Caller,
    ) -> io::Result<()> {
        self.writable()?;
        if key == CAPABILITY && !self.could_write(node, caller)? {
            return Err(Code::Perm.into());
        }
        if self.options.no_acl && acl::is_key(key) {
            return Err(Code::NotSupported.into());
        }
        if self.xattr(node, key)?.is_none() {
            // Lists of access rights can be removed where there are none.
            return if acl::is_key(key) { Ok(()) } else { Err(Code::NoData.into()) };
        }
        let _capable = (key == CAPABILITY).then(|| node.capable.lock());
        let _data_stay = self.copy_up_attributes(node)?;
        self.at(node, |place, format, _| {
            xattr::remove_existing(place.xattrs(), &user_key(format, key)?)
        })
    }

    /// The mode of what is shown as a character device 0:0: in a layer that would be a whiteout, so
    /// there it is an empty file with an xattr.
    pub(super) fn zero_device_mode(
        place: Place<'_>,
        format: Option<LayerFormat>,
        stat: &Stat,
    ) -> io::Result<Option<u32>> {
        if stat.file_type != FileType::Regular || stat.size != 0 || stat.mode != ZERO_DEVICE_FILE {
            return Ok(None);
        }
        let Some(key) = format.and_then(|format| Self::own_key(format, ZERO_DEVICE)) else {
            return Ok(None);
        };
        let Some(value) = xattr::get(place.xattrs(), &key)? else { return Ok(None) };
        Ok(<[u8; 4]>::try_from(value).ok().map(u32::from_le_bytes).map(|mode| mode & 0o7777))
    }

    /// Makes an empty file of [`ZERO_DEVICE_FILE`]'s mode one that is shown as a character device 0:0.
    pub(super) fn set_zero_device_mode(
        place: Place<'_>,
        format: Option<LayerFormat>,
        mode: u32,
    ) -> io::Result<()> {
        let key = format.and_then(|format| Self::own_key(format, ZERO_DEVICE)).ok_or(Code::Perm)?;
        xattr::set(place.xattrs(), &key, &mode.to_le_bytes())
    }
}

/// The key in a layer of what a user sets.
fn user_key(format: Option<LayerFormat>, key: &[u8]) -> io::Result<Vec<u8>> {
    let escaped = escaped(format, key);
    if escaped.len() > KEY_MAX { Err(Code::Range.into()) } else { Ok(escaped) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_layers_own_keys_are_hidden_and_nested_ones_escaped() {
        let trusted = Some(LayerFormat::OverlayTrusted);
        assert_eq!(unescaped(trusted, b"trusted.overlay.opaque"), None);
        assert_eq!(unescaped(trusted, b"trusted.overlay.stratafs.origin"), None);
        for (user, stored) in [
            (&b"trusted.overlay.opaque"[..], &b"trusted.overlay.overlay.opaque"[..]),
            (b"user.overlay.opaque", b"user.overlay.opaque"),
            (b"user.x", b"user.x"),
        ] {
            assert_eq!(escaped(trusted, user), stored);
            assert_eq!(unescaped(trusted, stored).as_deref(), Some(user));
            assert_eq!(escaped(Some(LayerFormat::Aufs), user), user);
        }
        assert_eq!(
            copied(trusted, Some(LayerFormat::OverlayUser), b"trusted.overlay.overlay.x"),
            Some(b"trusted.overlay.x".to_vec())
        );
    }
}
