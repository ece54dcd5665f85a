//! Adopting: a layer directory that another union file system wrote, copied into one of this crate's.
//!
//! The tree is copied, file by file, rather than packed and unpacked as an archive would be: so holes
//! stay holes, data is shared with the original where the file system can, and access times, all
//! xattrs and 255 byte names with their whiteouts survive. The original is only read.
//!
//! What is copied is the foreign directory alone, its marks turned into the store's. Where a redirect
//! or metacopy sends to a lower layer, what is there is copied too, since committed layers are
//! settled: a renamed directory becomes an opaque one with all its contents.
//!
//! Invariants:
//! - The format is stated, never found out entry by entry ([`ForeignFormat`]). What is not understood is
//!   an error that names it; nothing is shown that the original did not show, nor hidden that it did.
//! - Nothing outside of the given directories is looked at: no symlink is followed, no mount crossed.
//! - What changes while it is copied is an error, found by the times of each directory and file after
//!   they were read, not a mixture of before and after.
//! - An error leaves the new layer half filled: adopt where nobody looks, and remove it then.
//!
//! ```text
//! union.rs       the foreign layers: lookup, listing, redirects
//! walk.rs        the way through the directory, and the marks
//! files.rs       what is no directory
//! attributes.rs  owners, modes, xattrs, times
//! verity.rs      the digests that metacopies name
//! ```

mod attributes;
mod files;
mod options;
mod report;
mod union;
mod verity;
mod walk;

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::descent::{Descent, Purpose};
use crate::layer::foreign::ForeignFormat;
use crate::layer::{LayerFormat, usage};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn};
use crate::sys::copy::Copier;
use crate::sys::dir::Dir;
use crate::sys::stat::Stat;
use crate::sys::xattr::{self, Of};

pub use options::{AdoptOptions, OtherMarks, OverrideStats};
pub use report::{AdoptReport, Adopted, Finding};
pub(crate) use union::Branch;

use union::{Stack, refuse};
use walk::Frame;

/// Which file: device and inode number.
type Inode = (u64, u64);

/// An adoption under way.
struct Adoption<'a> {
    options: &'a AdoptOptions,
    /// The new layer's format, and its root.
    format: LayerFormat,
    layer: &'a Dir,
    stack: Stack,
    target: Descent<()>,
    /// The directories from the root to where it stands, and their path.
    frames: Vec<Frame>,
    path: RelPath,
    /// Where files with several names are in the new layer.
    links: HashMap<Inode, RelPath>,
    /// AUFS's pseudo-linked files: their names there, and how many there are in the layer.
    pseudo_links: HashMap<Inode, (Name, u64)>,
    copier: Copier,
    counter: usage::Counter,
    has_marks: bool,
    report: AdoptReport,
    done: Progress,
    progress: &'a mut ProgressFn<'a>,
}

/// What the layers are that a directory is adopted from.
pub(crate) struct Source {
    /// The directory, and the layers below it.
    pub(crate) branches: Vec<Branch>,
    /// The store, which is never walked into.
    pub(crate) store: Stat,
}

/// Copies the first of the branches into `layer`, a new directory, in `format`.
///
/// # Errors
/// As [`Store::adopt`](crate::Store::adopt).
pub(crate) fn adopt<'a>(
    source: Source,
    layer: &'a Dir,
    format: LayerFormat,
    options: &'a AdoptOptions,
    progress: &'a mut ProgressFn<'a>,
) -> Result<Adopted> {
    needs_trusted(options.format, layer)?;
    let root = layer.reopen().at("open", "the new layer")?;
    let target = Descent::new(root, Purpose::Change).at("open", "the new layer")?;
    let mut adoption = Adoption {
        options,
        format,
        layer,
        stack: Stack::new(source.branches, source.store),
        target,
        frames: Vec::new(),
        path: RelPath::ROOT,
        links: HashMap::new(),
        pseudo_links: HashMap::new(),
        copier: Copier::new(),
        counter: usage::Counter::default(),
        has_marks: false,
        report: AdoptReport::new(options.format),
        done: Progress::new(Phase::Apply),
        progress,
    };
    adoption.run()?;
    Ok(Adopted {
        entries: adoption.done.entries,
        usage: adoption.counter.usage(),
        has_marks: adoption.has_marks,
        report: adoption.report,
    })
}

/// The layer `dir` of a foreign format, for messages called `shown`.
pub(crate) fn branch(dir: Dir, shown: &std::path::Path, options: &AdoptOptions) -> Branch {
    Branch {
        dir: Arc::new(dir),
        format: options.format,
        other_marks: options.other_marks,
        own: false,
        shown: shown.to_owned(),
    }
}

/// A layer of a store's own.
pub(crate) fn own_branch(dir: Dir, shown: &std::path::Path, format: LayerFormat) -> Branch {
    Branch {
        dir: Arc::new(dir),
        format: ForeignFormat::from(format),
        other_marks: OtherMarks::Plain,
        own: true,
        shown: shown.to_owned(),
    }
}

/// Without the privilege, `trusted.*` xattrs look as if they were not there: then what is deleted would
/// be shown. Found out in a directory of our own.
fn needs_trusted(format: ForeignFormat, own: &Dir) -> Result<()> {
    if format != ForeignFormat::Overlay {
        return Ok(());
    }
    const PROBE: &[u8] = b"trusted.stratafs.probe";
    match xattr::set(Of::dir(own), PROBE, b"y") {
        Ok(()) => xattr::remove(Of::dir(own), PROBE).at("remove an xattr of", "the new layer"),
        Err(e) => Err(Error::new(
            ErrorKind::PermissionDenied,
            "the marks of overlay are trusted.overlay.* xattrs, which this process cannot see: run it \
             with CAP_SYS_ADMIN in the initial user namespace; or if it was mounted with userxattr, \
             state overlay-user",
        )
        .with_source(e)),
    }
}

/// Whether it is the directory that Docker and containers/storage keep about a layer, and not the layer.
fn refuse_layer_home(dir: &Dir, shown: &std::path::Path) -> Result<()> {
    let is_dir = |name: &str| -> Result<bool> {
        let stat = dir.try_stat_at(&Name::new(name)?).at("look at", shown)?;
        Ok(stat.is_some_and(|stat| stat.is_dir()))
    };
    let link = dir.try_stat_at(&Name::new("link")?).at("look at", shown)?;
    if is_dir("diff")? && link.is_some_and(|stat| stat.is_file() && stat.size == 26) {
        let message = "it is what docker or containers/storage keep about a layer, and the layer is \
                       the directory diff in it: adopt that";
        return Err(refuse(message).with_path(shown));
    }
    Ok(())
}
