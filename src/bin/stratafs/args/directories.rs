//! The commands on plain directories, without a store.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum Layer {
    /// Unpack a layer archive from standard input into a directory
    ///
    /// Without --overlay the directory is a plain tree, with the layers below already in it: whiteouts
    /// delete. With it the directory becomes a layer for overlayfs: whiteouts become its marks, in
    /// trusted.overlay.* xattrs for root and in user.overlay.* ones for all others.
    ///
    /// After a failure the directory may hold a part of the layer.
    #[command(after_help = "Examples:
  stratafs layer apply rootfs < base.tar
  stratafs layer apply rootfs < app.tar.gz
  stratafs layer apply --overlay --parent base app < app.tar.gz")]
    Apply(LayerApply),

    /// Write what makes one directory from another as a layer archive
    ///
    /// Unpacked over LOWER the archive gives UPPER, modification times included. Both are plain trees:
    /// no name or xattr in them is a mark. Files are equal if type, mode, owner, xattrs, size and
    /// contents are; contents are not read where modification times are the same to the nanosecond.
    ///
    /// With --list it shows the changes instead, a line a path: A (added), M (modified) or D (deleted),
    /// a space, and the path. What differs in modification times alone is packed, but not listed.
    #[command(after_help = "Examples:
  stratafs layer diff before after > layer.tar
  stratafs layer diff before after -o layer.tar
  stratafs layer diff --list before after
  stratafs layer diff before after | stratafs layer apply copy-of-before")]
    Diff(LayerDiff),
}

#[derive(Debug, Args)]
pub(crate) struct LayerApply {
    /// Make a layer in overlayfs' format
    #[arg(long)]
    pub(crate) overlay: bool,
    /// A tree below, topmost first: missing parent directories take their attributes from there
    #[arg(long = "parent", value_name = "DIR")]
    pub(crate) parents: Vec<PathBuf>,
    /// How many threads work on it at most. Default: 3, which read, digest and write
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// The directory to unpack into
    pub(crate) root: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct LayerDiff {
    /// Show the changes, and pack nothing
    #[arg(long, conflicts_with = "output")]
    pub(crate) list: bool,
    /// With --list: end lines by NUL, since names may have line feeds
    #[arg(short = '0', long, requires = "list")]
    pub(crate) null: bool,
    /// Where to, or - for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub(crate) output: PathBuf,
    /// The directory as it was
    pub(crate) lower: PathBuf,
    /// The directory as it is to be
    pub(crate) upper: PathBuf,
}
