//! Which of several manifests is for this machine.
//!
//! Names are Go's (`linux/arm64/v8`), as the specification has them. A variant is a level of an
//! architecture's instruction set: a machine runs its own level and those below, and the highest
//! of these is taken. Without one, `amd64` is v1, `arm64` is v8 and `arm` is v7, as in containerd.
//!
//! Sources: OCI image specification, `image-index.md`, "Platform Variants"; Go's `GOOS`, `GOARCH`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

/// An operating system, an architecture and a variant of it, written `os/architecture[/variant]`.
///
/// ```
/// let p: stratafs::Platform = "linux/arm64".parse()?;
/// assert_eq!(p.to_string(), "linux/arm64");
/// assert_eq!(p.architecture(), "arm64");
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl Platform {
    /// The platform of the machine that this code was compiled for.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            "loongarch64" => "loong64",
            "mips64" if cfg!(target_endian = "little") => "mips64le",
            "mips" if cfg!(target_endian = "little") => "mipsle",
            same => same,
        };
        Platform::new(std::env::consts::OS, architecture, None)
    }

    /// Takes the words as they are; an empty variant is none.
    pub(crate) fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.filter(|v| !v.is_empty()).map(str::to_owned),
        }
    }

    /// The operating system, in Go's spelling.
    pub fn os(&self) -> &str {
        &self.os
    }

    /// The architecture, in Go's spelling.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The variant, where one is given.
    pub fn variant(&self) -> Option<&str> {
        self.variant.as_deref()
    }

    /// How well a machine of this platform runs what was built for `built`: the higher the better,
    /// none if not at all.
    pub(crate) fn suits(&self, built: &Platform) -> Option<u32> {
        if (&self.os, &self.architecture) != (&built.os, &built.architecture) {
            return None;
        }
        match (self.level(), built.level()) {
            (Some(own), Some(other)) => (other <= own).then_some(other),
            // Variants that are no level of ours are the same or are not.
            _ => (self.variant == built.variant).then_some(0),
        }
    }

    /// The number of the variant, with the architecture's default filled in.
    fn level(&self) -> Option<u32> {
        let default = match self.architecture.as_str() {
            "amd64" => "v1",
            "arm64" => "v8",
            "arm" => "v7",
            _ => return None,
        };
        let variant = self.variant.as_deref().unwrap_or(default);
        // "v8" and, for minor levels of arm64, "v8.2".
        let (major, minor) = variant
            .strip_prefix('v')
            .unwrap_or(variant)
            .split_once('.')
            .unwrap_or((variant.trim_start_matches('v'), "0"));
        let (major, minor): (u16, u16) = (major.parse().ok()?, minor.parse().ok()?);
        Some(u32::from(major) << 16 | u32::from(minor))
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // These words come from images: control characters stay off the terminal.
        write!(f, "{}/{}", self.os.escape_debug(), self.architecture.escape_debug())?;
        match &self.variant {
            Some(variant) => write!(f, "/{}", variant.escape_debug()),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let words: Vec<&str> = s.split('/').collect();
        let plain = |w: &&str| {
            !w.is_empty() && w.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        match words.as_slice() {
            [os, architecture, rest @ ..] if rest.len() <= 1 && words.iter().all(plain) => {
                Ok(Platform::new(os, architecture, rest.first().copied()))
            }
            _ => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{s:?} is not a platform: it must look like linux/amd64 or linux/arm64/v8"),
            )),
        }
    }
}

impl From<&oci_spec::image::Platform> for Platform {
    fn from(p: &oci_spec::image::Platform) -> Self {
        Platform::new(&p.os().to_string(), &p.architecture().to_string(), p.variant().as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(s: &str) -> Platform {
        s.parse().unwrap()
    }

    #[test]
    fn reads_back_what_it_writes_and_nothing_else() {
        for s in ["linux/amd64", "linux/arm/v6", "windows/amd64"] {
            assert_eq!(p(s).to_string(), s);
        }
        for bad in ["", "linux", "linux/", "/amd64", "linux/arm/v7/x", "linux/a\nb"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_machine_runs_its_own_level_and_those_below() {
        let suits = |a: &str, b: &str| p(a).suits(&p(b));
        assert!(suits("linux/arm/v7", "linux/arm/v6") < suits("linux/arm/v7", "linux/arm/v7"));
        assert_eq!(suits("linux/arm/v6", "linux/arm/v7"), None);
        assert_eq!(suits("linux/amd64", "linux/amd64/v2"), None);
        assert!(suits("linux/amd64/v3", "linux/amd64").is_some());
        assert!(suits("linux/arm64", "linux/arm64/v8").is_some());
        assert_eq!(suits("linux/arm64", "linux/arm64/v8.1"), None);
        assert_eq!(suits("linux/amd64", "windows/amd64"), None);
        assert_eq!(suits("linux/riscv64", "linux/riscv64/x"), None);
        assert!(suits("linux/riscv64", "linux/riscv64").is_some());
    }

    #[test]
    fn the_host_suits_itself() {
        assert!(Platform::host().suits(&Platform::host()).is_some());
        assert_eq!(Platform::host().os(), "linux");
    }
}
