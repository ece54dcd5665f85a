//! What an engine can do, and why not.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::layer::LayerFormat;
use crate::sys::owners::Owners;

/// Where, and for which layers, to try an engine.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ProbeTarget {
    /// A directory on the file system where the layers are to be. Trials are made in a new directory
    /// in it, which is removed again.
    pub dir: PathBuf,
    /// The format of the layers.
    pub format: LayerFormat,
    /// Where they keep owners. The default is where file systems do.
    pub owners: Owners,
}

impl ProbeTarget {
    /// Trials of `format` in `dir`.
    pub fn new(dir: impl Into<PathBuf>, format: LayerFormat) -> Self {
        ProbeTarget { dir: dir.into(), format, owners: Owners::OfFiles }
    }
}

/// One thing that an engine, a kernel or a file system can do, or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Feature {
    /// A short name that stays.
    pub name: &'static str,
    /// Whether a trial of it succeeded.
    pub available: bool,
    /// How, or why not; for people.
    pub reason: String,
}

impl Feature {
    pub(super) fn yes(name: &'static str, reason: impl Into<String>) -> Self {
        Feature { name, available: true, reason: reason.into() }
    }

    pub(super) fn no(name: &'static str, reason: impl fmt::Display) -> Self {
        Feature { name, available: false, reason: reason.to_string() }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.available { "yes" } else { "no" };
        write!(f, "{}: {word}", self.name)?;
        if !self.reason.is_empty() {
            write!(f, " ({})", self.reason)?;
        }
        Ok(())
    }
}

/// What came out of a probe. Printed, it is a line a feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Probe {
    /// The engine.
    pub driver: &'static str,
    /// The file system that was tried, such as `ext4`.
    pub file_system: String,
    /// Whether the engine mounts layers of the format that was asked for.
    pub mount: Feature,
    /// Whether writable layers may be on that file system.
    pub upper: Feature,
    /// The parts, and what may be had besides.
    pub features: Vec<Feature>,
}

impl Probe {
    /// Whether the engine can be used there, for views and for writable layers.
    pub fn usable(&self) -> bool {
        self.mount.available && self.upper.available
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "driver {} on {}", self.driver, self.file_system)?;
        for feature in [&self.mount, &self.upper].into_iter().chain(&self.features) {
            writeln!(f, "{feature}")?;
        }
        Ok(())
    }
}
