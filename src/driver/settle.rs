//! Settling a layer in plain directories, outside of any store: one that a [`FuseMount`](super::FuseMount)
//! wrote is made fit for other programs.
//!
//! The lock of the work directory is held meanwhile, as a mount that writes to the layer holds it. The
//! kernel's overlayfs takes no lock that others see: its mounts are looked for.

use std::path::Path;

use super::fuse_mount::open;
use super::{FuseLayer, FuseMountOptions, UpperDir};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::LayerFormat;
use crate::progress::ProgressFn;
use crate::sys::dir::Dir;
use crate::sys::mountinfo;
use crate::union::{self, Settled};

/// Completes the directories that were renamed in `upper`, the files of which only attributes were changed,
/// and the names of those that have several: the rest of them is in one of `lowers`, the topmost first, the
/// layers that it was mounted with. Afterwards it alone is the difference to them, and may be mounted with
/// `redirect_dir=nofollow`, `metacopy=off` or `userxattr`, packed, or compared.
///
/// What is missing is copied; data are shared with the original where the file system can do that. Can be
/// stopped, by a kill too, and called again: the layer shows the same at every moment.
///
/// ```no_run
/// use stratafs::{FuseLayer, LayerFormat, UpperDir, ignore_progress, settle_upper};
///
/// let format = LayerFormat::OverlayUser;
/// let lowers = [FuseLayer { dir: "/layers/1".into(), format }];
/// let upper = UpperDir { dir: "/upper".into(), work: "/work".into() };
/// let settled = settle_upper(&lowers, &upper, format, &mut ignore_progress)?;
/// println!("{} directories were renamed, {} files got data", settled.directories, settled.files);
/// # Ok::<(), stratafs::Error>(())
/// ```
///
/// # Errors
/// - [`ErrorKind::Busy`]: the upper is mounted.
/// - [`ErrorKind::NotFound`], [`ErrorKind::InvalidArgument`], [`ErrorKind::PermissionDenied`]: as
///   [`FuseMount::new`](super::FuseMount::new), of the directories.
/// - [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`], and those of the file system: what was copied by
///   then stays in the layer.
pub fn settle_upper(
    lowers: &[FuseLayer],
    upper: &UpperDir,
    format: LayerFormat,
    progress: &mut ProgressFn<'_>,
) -> Result<Settled> {
    let mut options = FuseMountOptions::new(format);
    options.lowers = lowers.to_vec();
    options.upper = Some(upper.clone());
    let spec = open(&options, None)?;
    not_mounted(&upper.dir)?;
    union::settle(spec, progress)
        .map_err(|e| e.context(format!("the layer {:?} is not settled", upper.dir)))
}

/// Fails if the directory is the upper of an overlay mount, or mounted itself, as far as this process can
/// see.
fn not_mounted(upper: &Path) -> Result<()> {
    let path = upper.canonicalize().at("find the layer", upper)?;
    let dir = Dir::open(&path).at("open layer", &path)?;
    let Some(place) = mountinfo::place_of(&dir).at("find the mount of", &path)? else {
        return Ok(());
    };
    match mountinfo::is_in_use(&place, &path).at("read the mounts of", "all processes")? {
        false => Ok(()),
        true => {
            let text = "the layer is mounted: first unmount";
            Err(Error::new(ErrorKind::Busy, text).with_path(upper))
        }
    }
}
