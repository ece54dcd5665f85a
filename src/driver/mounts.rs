//! Mounts as plain data, in the manner of containerd's `Mount{Type, Source, Options}`.
//!
//! The text form is that of mount(2) and mount(8): `lowerdir=` is cut at `:` and options at `,`, and
//! overlayfs takes a backslash before each as an escape (`ovl_parse_monolithic` and
//! `ovl_parse_param_split_lowerdirs` in the kernel's `fs/overlayfs/params.c`). Blanks and all other
//! bytes are as they are. More layers than fit a page of text can only be mounted by the newer calls.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::UpperDir;
use crate::idmap::{IdRange, ShownIds, joined};
use crate::sys::mount::Attributes;

/// What a mount forbids; the default forbids nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restrictions {
    /// No writes.
    pub read_only: bool,
    /// setuid, setgid and file capabilities have no effect.
    pub nosuid: bool,
    /// Device files cannot be opened.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
}

impl Restrictions {
    pub(super) fn attributes(self) -> Attributes {
        Attributes {
            read_only: self.read_only,
            nosuid: self.nosuid,
            nodev: self.nodev,
            noexec: self.noexec,
        }
    }

    fn words(self) -> impl Iterator<Item = OsString> {
        [
            (true, if self.read_only { "ro" } else { "rw" }),
            (self.nosuid, "nosuid"),
            (self.nodev, "nodev"),
            (self.noexec, "noexec"),
        ]
        .into_iter()
        .filter(|(set, _)| *set)
        .map(|(_, word)| word.into())
    }
}

/// Something that must be mounted for a view to appear; anybody with the rights may do it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mount {
    /// The directory itself, without what is mounted below it.
    Bind {
        /// The directory.
        source: PathBuf,
        /// As whose its files are to be shown.
        ids: ShownIds,
        /// What the mount forbids.
        restrictions: Restrictions,
    },
    /// The kernel's overlayfs.
    Overlay {
        /// The read-only layers, the topmost first.
        lower: Vec<PathBuf>,
        /// The writable layer; without one the kernel forbids all writes.
        upper: Option<UpperDir>,
        /// The other options, such as `index=off`.
        options: Vec<String>,
        /// As whose the files are to be shown: if not as they are, each directory must be given to the kernel as an
        /// id-mapped mount, the upper and its work directory in one.
        ids: ShownIds,
        /// What the mount forbids.
        restrictions: Restrictions,
    },
    /// The union of this crate over FUSE, which the program `stratafs-fuse` mounts and serves; mount(8)
    /// finds it by the type.
    Fuse {
        /// The read-only layers, the topmost first.
        lower: Vec<PathBuf>,
        /// The writable layer.
        upper: Option<UpperDir>,
        /// The other options, such as `format=overlay-user`.
        options: Vec<String>,
        /// What the mount forbids.
        restrictions: Restrictions,
    },
}

impl Mount {
    /// The type, as mount(2) and mount(8) take it: `bind`, `overlay` or `fuse.stratafs-fuse`.
    pub fn fstype(&self) -> &'static str {
        match self {
            Mount::Bind { .. } => "bind",
            Mount::Overlay { .. } => "overlay",
            Mount::Fuse { .. } => "fuse.stratafs-fuse",
        }
    }

    /// The source: the directory of a bind mount, else the word `overlay` or `stratafs`.
    pub fn source(&self) -> &Path {
        match self {
            Mount::Bind { source, .. } => source,
            Mount::Overlay { .. } => Path::new("overlay"),
            Mount::Fuse { .. } => Path::new("stratafs"),
        }
    }

    /// The options, escaped; joined by commas they are what mount(8) takes after `-o`.
    ///
    /// Where other ids are to be shown than files have, a bind mount has mount(8)'s option `X-mount.idmap=`
    /// (util-linux 2.39). The kernel's overlayfs has no such option, and neither has mount(8) for the layers
    /// of a union: there they are `uidmap=` and `gidmap=`, as containerd's snapshotters have them, for the one
    /// who mounts. The kernel refuses them, so that nobody mounts the layers without their ids by mistake.
    /// containerd maps lower layers alone: what it mounts so must be a view.
    ///
    /// ```
    /// use stratafs::{Driver, LayerFormat, MountRequest, OverlayDriver};
    ///
    /// let mut request = MountRequest::new(LayerFormat::OverlayTrusted, "/store/empty");
    /// request.lower = vec!["/store/2/a:b".into(), "/store/1".into()];
    /// let mounts = OverlayDriver::new().mounts(&request)?;
    /// assert_eq!(mounts[0].fstype(), "overlay");
    /// assert_eq!(mounts[0].options()[0], r"lowerdir=/store/2/a\:b:/store/1");
    /// # Ok::<(), stratafs::Error>(())
    /// ```
    pub fn options(&self) -> Vec<OsString> {
        match self {
            Mount::Bind { ids, restrictions, .. } => {
                let mut all = vec!["bind".into()];
                all.extend(restrictions.words());
                all.extend(for_mount_program(ids));
                all
            }
            Mount::Overlay { lower, upper, options, ids, restrictions } => {
                let mut all = union(lower, upper.as_ref(), options);
                for (key, ranges) in [("uidmap=", &ids.uids), ("gidmap=", &ids.gids)] {
                    if !ranges.is_empty() {
                        all.push(format!("{key}{}", joined(ranges, "\\,")).into());
                    }
                }
                all.extend(restrictions.words());
                all
            }
            Mount::Fuse { lower, upper, options, restrictions } => {
                let mut all = union(lower, upper.as_ref(), options);
                all.extend(restrictions.words());
                // FUSE mounts forbid both unless told otherwise.
                let allowed = [(restrictions.nosuid, "suid"), (restrictions.nodev, "dev")];
                all.extend(allowed.iter().filter(|(no, _)| !no).map(|(_, word)| word.into()));
                all
            }
        }
    }
}

/// The option of mount(8) that maps ids.
fn for_mount_program(ids: &ShownIds) -> Option<OsString> {
    let of = |kind: &'static str, ranges: &[IdRange]| -> Vec<String> {
        ranges.iter().map(|range| format!("{kind}:{range}")).collect()
    };
    let mut all = of("u", &ids.uids);
    all.extend(of("g", &ids.gids));
    (!all.is_empty()).then(|| format!("X-mount.idmap={}", all.join(" ")).into())
}

/// The options that name layers, and the others.
fn union(lower: &[PathBuf], upper: Option<&UpperDir>, options: &[String]) -> Vec<OsString> {
    let mut all = Vec::new();
    if !lower.is_empty() {
        let mut lowerdir = b"lowerdir=".to_vec();
        for (i, layer) in lower.iter().enumerate() {
            if i > 0 {
                lowerdir.push(b':');
            }
            escape(layer.as_os_str(), b"\\,:", &mut lowerdir);
        }
        all.push(OsString::from_vec(lowerdir));
    }
    if let Some(upper) = upper {
        for (key, dir) in [("upperdir=", &upper.dir), ("workdir=", &upper.work)] {
            let mut option = key.as_bytes().to_vec();
            escape(dir.as_os_str(), b"\\,", &mut option);
            all.push(OsString::from_vec(option));
        }
    }
    all.extend(options.iter().map(OsString::from));
    all
}

fn escape(path: &OsStr, special: &[u8], out: &mut Vec<u8>) {
    for byte in path.as_bytes() {
        if special.contains(byte) {
            out.push(b'\\');
        }
        out.push(*byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_escaped_as_the_kernel_takes_them() {
        let mount = Mount::Overlay {
            lower: vec!["/a:b,c\\d e".into(), "/x".into()],
            upper: Some(UpperDir { dir: "/u:,\\".into(), work: "/w".into() }),
            options: vec!["index=off".to_owned()],
            ids: ShownIds::default(),
            restrictions: Restrictions { nodev: true, ..Restrictions::default() },
        };
        assert_eq!(
            mount.options(),
            [
                r"lowerdir=/a\:b\,c\\d e:/x",
                r"upperdir=/u:\,\\",
                "workdir=/w",
                "index=off",
                "rw",
                "nodev"
            ]
        );
        let mount = Mount::Fuse {
            lower: Vec::new(),
            upper: Some(UpperDir { dir: "/u,".into(), work: "/w".into() }),
            options: vec!["format=aufs".to_owned()],
            restrictions: Restrictions { nodev: true, ..Restrictions::default() },
        };
        let words = [r"upperdir=/u\,", "workdir=/w", "format=aufs", "rw", "nodev", "suid"];
        assert_eq!(mount.options(), words);
    }
}
