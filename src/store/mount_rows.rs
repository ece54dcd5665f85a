//! The rows of mounts that this store made: a file each in `<run>/mounts`.
//!
//! A row names boot, mount namespace and unique mount id, so it cannot be mistaken for another mount at
//! the same place; one whose mount is gone is removed by whoever comes by.
//!
//! A row is not synced: it says nothing after a reboot. What a power cut leaves of it may be torn, so
//! its file's name has the boot too, and rows of other boots are never read.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::hold::Hold;
use super::metadata::Row;
use super::{Store, staging};
use crate::driver::{MountIdentity, MountState, NamespaceId, detach_at, is_mount_point};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::lock::Sharing;
use crate::sys::{mountinfo, userns};

/// A mount that this store made, as its file in `<run>/mounts` tells it.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct MountRow {
    pub(super) snapshot: i64,
    /// Bytes, since a path need not be UTF-8.
    target: Vec<u8>,
    /// None while it is being mounted; should the process die then, whatever is mounted at the target
    /// is taken for it.
    pub(super) identity: Option<MountIdentity>,
    /// A process serves it, and holds the snapshot for as long as it does.
    #[serde(default)]
    pub(super) served: bool,
    /// That is a helper: it ends with the mount.
    #[serde(default)]
    pub(super) helper: bool,
    /// Whoever made it has its mount namespace to himself, and holds the snapshot until both are gone.
    #[serde(default)]
    pub(super) private: bool,
    /// It was made in a user namespace of a user's, as was its mount namespace.
    #[serde(default)]
    pub(super) of_user: bool,
}

impl MountRow {
    pub(super) fn new(snapshot: i64, target: &Path) -> MountRow {
        MountRow {
            snapshot,
            target: target.as_os_str().as_bytes().to_vec(),
            identity: None,
            served: false,
            helper: false,
            private: false,
            of_user: false,
        }
    }

    pub(super) fn target(&self) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.target.clone()))
    }

    /// Whether nobody can be in the mount any more. In doubt it is there.
    pub(super) fn is_gone(&self) -> Result<bool> {
        self.is_gone_or(|identity| !self.private && !self.is_inhabited(identity))
    }

    /// The same, for a caller who holds the snapshot: so nobody does who has it in a namespace of his own, or who
    /// serves it.
    fn is_gone_though_held(&self) -> Result<bool> {
        self.is_gone_or(|identity| self.private || self.served || !self.is_inhabited(identity))
    }

    /// From outside of all user namespaces, their owner can look at every process in his own: what he may not
    /// look at is in none of these.
    fn is_inhabited(&self, identity: &MountIdentity) -> bool {
        let hidden = match self.of_user && userns::is_initial().unwrap_or(false) {
            true => Hidden::Elsewhere,
            false => Hidden::MaybeThere,
        };
        is_inhabited(identity.mount_namespace(), hidden)
    }

    fn is_gone_or(&self, elsewhere: impl Fn(&MountIdentity) -> bool) -> Result<bool> {
        let Some(identity) = &self.identity else {
            return is_mount_point(&self.target()).map(|mounted| !mounted);
        };
        Ok(match identity.state(&self.target())? {
            MountState::Gone => true,
            MountState::OtherNamespace => elsewhere(identity),
            MountState::Mounted | MountState::Unknown | MountState::Dead => false,
        })
    }
}

/// What a guard keeps until its mount is gone: the snapshot's lock, then the row.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) row: PathBuf,
    /// None if another process has it.
    pub(super) _hold: Option<Hold>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        // A guard that was left has not unmounted: then the row stays.
        if let Err(e) = remove_if_gone(&self.row) {
            tracing::warn!(row = ?self.row, error = %e, "row of a mount is left for gc");
        }
    }
}

impl Store {
    /// Fails if this store has the snapshot, which the caller holds, mounted somewhere.
    pub(super) fn not_mounted(&self, row: &Row) -> Result<()> {
        for (_, mount) in self.rows()? {
            if mount.snapshot == row.id && !mount.is_gone_though_held()? {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("snapshot {:?} is mounted: first unmount", row.info.key),
                )
                .with_path(mount.target()));
            }
        }
        Ok(())
    }

    /// Removes rows of mounts that are gone, and takes those away that nobody serves any more; how many.
    pub(super) fn sweep_mount_rows(&self) -> Result<u64> {
        self.sweep_dead_mounts(None)?;
        let mut swept = 0;
        let boot = boot()?;
        for path in self.row_paths()? {
            if is_of_another_boot(&path, &boot) {
                remove_row(&path)?;
                swept += 1;
            }
        }
        for (path, row) in self.rows()? {
            // Who is just mounting it holds the snapshot, and who serves it, or has it in a namespace of his own.
            let is_held = row.private || row.served;
            let _hold = match row.identity {
                Some(_) if !is_held => None,
                _ => match self.try_hold(row.snapshot, Sharing::Exclusive) {
                    Ok(None) => continue,
                    Err(e) if e.kind() == ErrorKind::NotFound => None,
                    hold => hold?,
                },
            };
            if row.is_gone_though_held()? {
                match is_held {
                    true => remove_row(&path)?,
                    false => remove_if_gone(&path)?,
                }
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// Takes away the mounts of this boot and namespace whose server has died: nobody holds the snapshot, but
    /// for the caller, should he.
    pub(super) fn sweep_dead_mounts(&self, held: Option<(i64, &Hold)>) -> Result<()> {
        for (path, row) in self.rows()? {
            let Some(identity) = row.identity.as_ref().filter(|_| row.served) else { continue };
            let _hold = match held {
                Some((id, _)) if id == row.snapshot => None,
                Some(_) => continue,
                None => match self.try_hold(row.snapshot, Sharing::Exclusive) {
                    Ok(Some(hold)) => Some(hold),
                    Ok(None) => continue,
                    // It was removed.
                    Err(e) if e.kind() == ErrorKind::NotFound => None,
                    Err(e) => return Err(e),
                },
            };
            let target = row.target();
            if identity.state(&target)? != MountState::Mounted {
                continue;
            }
            match detach_at(&target, identity) {
                Ok(true) => tracing::warn!(
                    "the process that served the mount on {target:?} has died: the mount is taken away, \
                     and what had not been closed or synced may be lost; mount it again"
                ),
                Ok(false) => tracing::warn!(
                    "the process that served the mount on {target:?} has died, and another mount lies \
                     over it: unmount both"
                ),
                Err(e) => tracing::warn!("a mount whose server has died stays: {e}"),
            }
            remove_if_gone(&path)?;
        }
        Ok(())
    }

    fn mounts_dir(&self) -> PathBuf {
        self.run_dir.join("mounts")
    }

    /// A new row's file, under a name that nobody else has.
    pub(super) fn row_path(&self, snapshot: i64) -> Result<PathBuf> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = self.mounts_dir();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .at("create directory", &dir)?;
        let boot = boot()?;
        Ok(dir.join(format!("{snapshot}-{boot}-{:016x}", staging::random())))
    }

    /// All rows of this boot.
    pub(super) fn rows(&self) -> Result<Vec<(PathBuf, MountRow)>> {
        let mut rows = Vec::new();
        let boot = boot()?;
        for path in self.row_paths()? {
            let is_temp = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"."));
            if is_temp || is_of_another_boot(&path, &boot) {
                continue;
            }
            if let Some(row) = read_row(&path)? {
                rows.push((path, row));
            }
        }
        Ok(rows)
    }

    /// The files of rows, those of other boots and those being written included.
    fn row_paths(&self) -> Result<Vec<PathBuf>> {
        let dir = self.mounts_dir();
        let listing = match std::fs::read_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            listing => listing.at("list", &dir)?,
        };
        listing.map(|entry| Ok(entry.at("list", &dir)?.path())).collect()
    }
}

/// The kernel's random name of this boot.
fn boot() -> Result<String> {
    mountinfo::boot_id().at("identify this boot", "/proc/sys/kernel/random/boot_id")
}

/// Whether the name of a row's file says that it was written before the machine was last started.
fn is_of_another_boot(path: &Path, current: &str) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    // SNAPSHOT-BOOT-RANDOM, and the boot has dashes of its own.
    let boot = name
        .and_then(|name| name.split_once('-'))
        .and_then(|(_snapshot, rest)| rest.rsplit_once('-'))
        .map(|(boot, _random)| boot);
    boot.is_some_and(|boot| boot != current)
}

/// Writes or replaces a row as a whole.
pub(super) fn write_row(path: &Path, row: &MountRow) -> Result<()> {
    let name = path.file_name().unwrap_or_default();
    let mut hidden = OsString::from(".");
    hidden.push(name);
    let temp = path.with_file_name(hidden);
    let text = serde_json::to_vec(row)
        .map_err(|e| Error::new(ErrorKind::Io, "cannot write a mount's row").with_source(e))?;
    std::fs::write(&temp, text).and_then(|()| std::fs::rename(&temp, path)).at("write", path)
}

pub(super) fn remove_row(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done.at("remove the row of a mount", path),
    }
}

/// The row, unless it is gone.
fn read_row(path: &Path) -> Result<Option<MountRow>> {
    let text = match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.at("read the row of a mount", path)?,
    };
    match serde_json::from_slice(&text) {
        Ok(row) => Ok(Some(row)),
        Err(e) => Err(Error::new(
            ErrorKind::Corrupt,
            "cannot read the row of a mount: if nothing of this store is mounted, remove it",
        )
        .with_path(path)
        .with_source(e)),
    }
}

/// Where a process is that may not be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hidden {
    MaybeThere,
    Elsewhere,
}

/// Whether a process lives in the namespace: without one, nobody sees what is mounted there.
fn is_inhabited(namespace: NamespaceId, hidden: Hidden) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return true };
    for process in processes.flatten() {
        let is_pid = process.file_name().as_bytes().iter().all(u8::is_ascii_digit);
        if !is_pid {
            continue;
        }
        match std::fs::metadata(process.path().join("ns/mnt")) {
            Ok(found) if namespace.is(&found) => return true,
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e)
                if e.kind() == std::io::ErrorKind::PermissionDenied
                    && hidden == Hidden::Elsewhere => {}
            Err(_) => return true,
        }
    }
    false
}

pub(super) fn remove_if_gone(path: &Path) -> Result<()> {
    match read_row(path)? {
        Some(row) if row.is_gone()? => remove_row(path),
        _ => Ok(()),
    }
}
