//! What callers may choose about adopting.

use std::path::PathBuf;

use crate::archive::{Devices, Ownership};
use crate::layer::foreign::ForeignFormat;

/// What to do with the xattrs in which unprivileged implementations keep the owner, mode and type that
/// a file should have (`user.containers.override_stat` and its elders).
///
/// No answer is right for all. Any user may set one on a file of his own: honoured in a directory that
/// users wrote to, it hands out files of root with the setuid bit (the lesson of CVE-2023-0386).
/// Ignored in a directory whose owners are kept in it alone, it gives every file to the user who ran
/// the container. So the default is to ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OverrideStats {
    /// The first one found is an error.
    #[default]
    Refuse,
    /// They are left out and counted; files are what they are.
    Ignore,
    /// Files become what they say. For directories that were written through an implementation which
    /// keeps containers from setting them (fuse-overlayfs with `xattr_permissions`).
    Honour,
}

/// What to do with what would be a mark in another format than the stated one: it may be that the
/// wrong format was stated, and it may be that a container with containers in it left it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OtherMarks {
    /// The first one found is an error.
    #[default]
    Refuse,
    /// They are no marks, as they were none to the program that wrote the directory: names are files
    /// like any other, and xattrs are left out and counted.
    Plain,
}

/// How a foreign layer directory is adopted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AdoptOptions {
    /// Which program wrote the directory.
    pub format: ForeignFormat,
    /// The layers below it when it was written, nearest first and in the same format: where the
    /// contents of renamed directories and the data of files whose attributes alone were changed are
    /// (overlayfs with `redirect_dir` and `metacopy`). They are read and not adopted. Default: none,
    /// and then they are looked for in the snapshots below the new one.
    pub lowers: Vec<PathBuf>,
    /// Owners and modes kept in xattrs. Default: refused.
    pub override_stats: OverrideStats,
    /// Marks of other formats. Default: refused.
    pub other_marks: OtherMarks,
    /// Owners. Default: as in the directory.
    pub ownership: Ownership,
    /// Devices. Default: made.
    pub devices: Devices,
    /// How many paths the report has for each thing found. Default: 10.
    pub report_paths: usize,
}

impl AdoptOptions {
    /// The defaults, for a directory that was written in this format.
    pub fn new(format: ForeignFormat) -> Self {
        AdoptOptions {
            format,
            lowers: Vec::new(),
            override_stats: OverrideStats::default(),
            other_marks: OtherMarks::default(),
            ownership: Ownership::default(),
            devices: Devices::default(),
            report_paths: 10,
        }
    }

    /// What an ordinary user can do: everything is the user's own, and devices are left out.
    pub fn unprivileged(format: ForeignFormat) -> Self {
        AdoptOptions {
            ownership: Ownership::Ignore,
            devices: Devices::Skip,
            ..AdoptOptions::new(format)
        }
    }
}
