//! The store itself: `info`, `gc`, `check`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, absolute};

use serde::Serialize;
use stratafs::{CheckReport, Driver, ErrorKind, GcReport, LayerFormat, Owners, Probe, ProbeTarget};
#[cfg(feature = "fuse")]
use stratafs::{
    helper::HelperCommand,
    rootless::{self, Namespaces, RootlessRung},
};

use super::{Context, Missing, Result};
use crate::failure::Failure;
use crate::output::{JsonPath, Report};

/// A store is not made just to be told of: without one, the nearest directory stands for it.
pub(super) fn info(context: &Context) -> Result {
    let store = match context.open(Missing::Refuse) {
        Ok(store) => Some(store),
        Err(Failure::Library(e)) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(e),
    };
    let root = match &store {
        Some(store) => store.root().to_owned(),
        None => absolute(&context.root).map_err(|e| Failure::io("find", &context.root, e))?,
    };
    let new_format =
        if context.privileged { LayerFormat::OverlayTrusted } else { LayerFormat::OverlayUser };
    let format = store.as_ref().map(stratafs::Store::format);
    let dir = root.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    let mut target = ProbeTarget::new(dir, format.unwrap_or(new_format));
    let owners = store.as_ref().map(stratafs::Store::owners);
    let new_owners = if context.privileged { Owners::OfFiles } else { Owners::InXattrs };
    target.owners = owners.unwrap_or(new_owners);
    let probe = |driver: &dyn Driver| match driver.probe(&target) {
        Ok(probe) => Probed::Done(probe),
        Err(e) => Probed::Failed { driver: driver.name(), error: e.to_string() },
    };
    let drivers = match &store {
        Some(store) => store.drivers().map(probe).collect(),
        None => {
            let drivers = context.driver.choice().drivers_for(target.owners);
            drivers.iter().map(|driver| probe(&**driver)).collect()
        }
    };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    context.print(&About {
        version: env!("CARGO_PKG_VERSION"),
        kernel: kernel.trim_end().to_owned(),
        root: JsonPath::new(root.as_os_str().as_bytes()),
        format: format.map(LayerFormat::as_str),
        owners: owners.map(|owners| match owners {
            Owners::InXattrs => "in-xattrs",
            _ => "of-files",
        }),
        drivers,
        #[cfg(feature = "fuse")]
        rootless: Rootless::of_caller(dir)?,
    })
}

pub(super) fn gc(context: &Context) -> Result {
    let store = context.open(Missing::Refuse)?;
    let mut reporter = context.reporter();
    let report = store.gc(&mut |progress| reporter.step(progress))?;
    drop(reporter);
    #[cfg(feature = "fuse")]
    let runs = super::run::leftovers::sweep(&store)?;
    #[cfg(not(feature = "fuse"))]
    let runs = 0;
    context.print(&Collected { report, runs })
}

pub(super) fn check(context: &Context) -> Result {
    let store = context.open(Missing::Refuse)?;
    let mut reporter = context.reporter();
    let report = store.check(&mut |progress| reporter.step(progress))?;
    drop(reporter);
    let problems = report.problems.len();
    context.print(&Checked(report))?;
    match problems {
        0 => Ok(()),
        n => Err(Failure::Problems(n)),
    }
}

#[derive(Debug, Serialize)]
struct Collected {
    #[serde(flatten)]
    report: GcReport,
    /// Snapshots of `run` processes that are gone.
    runs: u64,
}

impl Report for Collected {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let report = &self.report;
        for (count, what) in [
            (report.staging, "unfinished snapshots"),
            (report.orphans, "directories without a snapshot"),
            (report.workdirs, "work directories of committed snapshots"),
            (report.trees, "copies of committed snapshots"),
            (report.trash, "removed snapshots whose files were left"),
            (report.layers, "layers that no image needs"),
            (report.blobs, "blobs that no image needs"),
            (report.mounts, "records of mounts that are gone"),
            (self.runs, "snapshots of commands that are gone"),
        ] {
            if count > 0 {
                writeln!(out, "freed {count} {what}")?;
            }
        }
        Ok(())
    }
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Checked(CheckReport);

impl Report for Checked {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for problem in &self.0.problems {
            writeln!(out, "{problem}")?;
        }
        let CheckReport { snapshots, records, images, .. } = &self.0;
        writeln!(out, "looked at {snapshots} snapshots and {images} images")?;
        writeln!(out, "{records} layers give the archive back that they were unpacked from")
    }
}

#[derive(Debug, Serialize)]
struct About {
    version: &'static str,
    kernel: String,
    root: JsonPath,
    /// None: there is no store yet.
    format: Option<&'static str>,
    /// Where the store keeps owners.
    owners: Option<&'static str>,
    /// In the order in which they are tried.
    drivers: Vec<Probed>,
    #[cfg(feature = "fuse")]
    rootless: Rootless,
}

/// What an ordinary user can have without root.
#[cfg(feature = "fuse")]
#[derive(Debug, Serialize)]
struct Rootless {
    /// Who may mount needs none of it, and nothing is tried.
    needed: bool,
    /// How many users' ids he can give to files in a user namespace, and why it is but one.
    ids: Option<u64>,
    one_id: Option<String>,
    rungs: Vec<RootlessRung>,
}

#[cfg(feature = "fuse")]
impl Rootless {
    fn of_caller(dir: &Path) -> Result<Rootless> {
        let Namespaces::UserAndMount(mapping) = Namespaces::for_caller()? else {
            return Ok(Rootless { needed: false, ids: None, one_id: None, rungs: Vec::new() });
        };
        Ok(Rootless {
            needed: true,
            ids: Some(mapping.users().iter().map(|ids| u64::from(ids.count)).sum()),
            one_id: mapping.one_id().map(ToString::to_string),
            rungs: rootless::ladder(&HelperCommand::CurrentExe, dir)?,
        })
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        if !self.needed {
            return writeln!(out, "rungs for ordinary users: none is needed by who may mount");
        }
        writeln!(out, "rungs for ordinary users")?;
        for rung in &self.rungs {
            writeln!(out, "{rung}")?;
        }
        match (&self.one_id, self.ids) {
            (Some(why), _) => writeln!(out, "ids in a user namespace: 1 ({why})"),
            (None, ids) => writeln!(out, "ids in a user namespace: {}", ids.unwrap_or(1)),
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Probed {
    Done(Probe),
    Failed { driver: &'static str, error: String },
}

impl Report for About {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "stratafs {}", self.version)?;
        writeln!(out, "kernel {}", self.kernel)?;
        match self.format {
            Some(format) => {
                write!(out, "store {} of format {format}", self.root)?;
                match self.owners {
                    Some("in-xattrs") => writeln!(out, ", with owners in xattrs")?,
                    _ => writeln!(out)?,
                }
            }
            None => writeln!(out, "no store at {} yet", self.root)?,
        }
        for driver in &self.drivers {
            match driver {
                Probed::Done(probe) => write!(out, "{probe}")?,
                Probed::Failed { driver, error } => {
                    writeln!(out, "driver {driver}: not tried: {error}")?;
                }
            }
        }
        #[cfg(feature = "fuse")]
        self.rootless.text(out)?;
        Ok(())
    }
}
