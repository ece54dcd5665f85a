//! The store itself: `info`, `gc`, `check`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, absolute};

use serde::Serialize;
use stratafs::{CheckReport, Driver, ErrorKind, GcReport, LayerFormat, Owners, Probe, ProbeTarget};

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
        None => context.driver.choice().drivers().iter().map(|driver| probe(&**driver)).collect(),
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
    })
}

pub(super) fn gc(context: &Context) -> Result {
    let store = context.open(Missing::Refuse)?;
    let mut reporter = context.reporter();
    let report = store.gc(&mut |progress| reporter.step(progress))?;
    drop(reporter);
    context.print(&Collected(report))
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
#[serde(transparent)]
struct Collected(GcReport);

impl Report for Collected {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for (count, what) in [
            (self.0.staging, "unfinished snapshots"),
            (self.0.orphans, "directories without a snapshot"),
            (self.0.workdirs, "work directories of committed snapshots"),
            (self.0.trees, "copies of committed snapshots"),
            (self.0.trash, "removed snapshots whose files were left"),
            (self.0.layers, "layers that no image needs"),
            (self.0.blobs, "blobs that no image needs"),
            (self.0.mounts, "records of mounts that are gone"),
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
        Ok(())
    }
}
