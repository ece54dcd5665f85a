//! The identity of a mount: enough to know it again in another process, and after a restart.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::target;
use crate::error::{IoContext, Result};
use crate::sys::mountinfo::{self, MountIds};

/// A mount namespace, by the device and inode numbers of its `/proc/PID/ns/mnt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NamespaceId {
    /// The device number of nsfs.
    pub device: u64,
    /// The inode number of the namespace.
    pub inode: u64,
}

impl NamespaceId {
    /// Whether these are the attributes of the namespace's file in `/proc/PID/ns`.
    pub(crate) fn is(self, file: &std::fs::Metadata) -> bool {
        use std::os::unix::fs::MetadataExt;
        (self.device, self.inode) == (file.dev(), file.ino())
    }

    /// The calling thread's mount namespace.
    pub(super) fn current() -> Result<Self> {
        let (device, inode) =
            mountinfo::mount_namespace().at("identify the mount namespace", "/proc/self/ns/mnt")?;
        Ok(NamespaceId { device, inode })
    }
}

/// Which mount it is. To be kept in files (serde) while the machine runs; after a reboot every
/// identity is [`MountState::Gone`].
///
/// Since Linux 6.8 a mount has a unique id, and no other mount is ever taken for it. Before, the only
/// id is the one of mountinfo, which a later mount may get again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MountIdentity {
    boot_id: String,
    mount_namespace: NamespaceId,
    mount_id: u64,
    unique_id: Option<u64>,
    /// The file that stands for the use of a tree that is not mounted; in bytes, since a path need not
    /// be UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lease: Option<Vec<u8>>,
}

/// What became of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MountState {
    /// It is there, perhaps under another mount.
    Mounted,
    /// It is, but the process that served it has died: all use of it fails until it is unmounted. Only a
    /// [`Guard`](crate::Guard) can tell.
    Dead,
    /// It is not.
    Gone,
    /// It was made in another mount namespace, where the caller cannot look.
    OtherNamespace,
    /// The kernel does not tell.
    Unknown,
}

impl MountIdentity {
    /// Of a mount that the calling thread sees.
    pub(super) fn new(ids: MountIds) -> Result<Self> {
        Ok(MountIdentity {
            boot_id: mountinfo::boot_id()
                .at("identify this boot", "/proc/sys/kernel/random/boot_id")?,
            mount_namespace: NamespaceId::current()?,
            mount_id: ids.id,
            unique_id: ids.unique,
            lease: None,
        })
    }

    /// Of a tree that is used where it is, on the mount of these ids, for as long as `lease` is there.
    pub(super) fn in_place(ids: MountIds, lease: &Path) -> Result<Self> {
        let lease = Some(lease.as_os_str().as_bytes().to_vec());
        Ok(MountIdentity { lease, ..MountIdentity::new(ids)? })
    }

    /// The file that stands for the use of a tree that is not mounted.
    pub(super) fn lease(&self) -> Option<PathBuf> {
        let lease = self.lease.clone()?;
        Some(PathBuf::from(std::ffi::OsString::from_vec(lease)))
    }

    /// Whether nothing is mounted: a tree is used where it is.
    pub fn is_in_place(&self) -> bool {
        self.lease.is_some()
    }

    /// The kernel's random name of the boot in which it was mounted.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The mount namespace in which it was mounted.
    pub fn mount_namespace(&self) -> NamespaceId {
        self.mount_namespace
    }

    /// The id that `/proc/PID/mountinfo` shows.
    pub fn mount_id(&self) -> u64 {
        self.mount_id
    }

    /// The id that is never used again, from Linux 6.8 on.
    pub fn unique_id(&self) -> Option<u64> {
        self.unique_id
    }

    /// Whether these are the ids of this mount, as seen in the same namespace and boot.
    pub(super) fn is(&self, ids: MountIds) -> bool {
        match (self.unique_id, ids.unique) {
            (Some(own), Some(other)) => own == other,
            _ => self.mount_id == ids.id,
        }
    }

    /// Whether the mount, once made on `target`, is still there.
    ///
    /// # Errors
    /// If /proc is not mounted or cannot be read.
    pub fn state(&self, target: &Path) -> Result<MountState> {
        let boot_id =
            mountinfo::boot_id().at("identify this boot", "/proc/sys/kernel/random/boot_id")?;
        if boot_id != self.boot_id {
            return Ok(MountState::Gone);
        }
        if let Some(lease) = self.lease() {
            return match lease.try_exists().at("look for", &lease)? {
                true => Ok(MountState::Mounted),
                false => Ok(MountState::Gone),
            };
        }
        if NamespaceId::current()? != self.mount_namespace {
            return Ok(MountState::OtherNamespace);
        }
        if let Some(unique) = self.unique_id {
            match mountinfo::exists(unique) {
                Ok(true) => return Ok(MountState::Mounted),
                Ok(false) => return Ok(MountState::Gone),
                // Not to be asked this way: as on an older kernel, below.
                Err(e) => tracing::debug!("statmount of mount {unique}: {e}"),
            }
        }
        // A target that cannot be opened tells nothing; the table still does.
        if let Ok(ids) = target::topmost(target)
            && self.is(ids)
        {
            return Ok(MountState::Mounted);
        }
        let found =
            mountinfo::mount_point(self.mount_id).at("read the mounts", "/proc/self/mountinfo")?;
        Ok(match found {
            None => MountState::Gone,
            // Under another mount, or moved with a directory above; or the id was given again.
            Some(_) => MountState::Unknown,
        })
    }
}
