//! Snapshots that are mounted, and no longer.

use std::path::PathBuf;

use clap::Args;
use stratafs::IdRange;

#[derive(Debug, Args)]
pub(crate) struct Mount {
    /// The snapshot: active, or a view
    pub(crate) key: String,
    /// Where to mount it. Without it nothing is mounted: the snapshot is shown as a copy, and where that
    /// is is printed
    pub(crate) dir: Option<PathBuf>,
    /// Show COUNT users from HOST on, as files have them, as SHOWN and those that follow; may be repeated.
    /// Users in no range are shown as 65534
    #[arg(long, value_name = "HOST:SHOWN:COUNT", requires = "dir")]
    pub(crate) uidmap: Vec<IdRange>,
    /// The same for groups; without it, as --uidmap says
    #[arg(long, value_name = "HOST:SHOWN:COUNT", requires = "dir")]
    pub(crate) gidmap: Vec<IdRange>,
}

#[derive(Debug, Args)]
pub(crate) struct Umount {
    /// Where it is mounted, or what `mount` printed
    pub(crate) dir: PathBuf,
}
