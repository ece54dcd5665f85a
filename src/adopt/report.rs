//! What adopting found and did.

use std::collections::BTreeMap;
use std::fmt;

use serde::ser::{Serialize, SerializeMap as _, SerializeSeq as _, Serializer};

use crate::layer::Usage;
use crate::layer::foreign::ForeignFormat;
use crate::path::RelPath;

/// How often something was found, and where first.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// How often.
    pub count: u64,
    /// The first paths, as many as [`AdoptOptions::report_paths`](crate::AdoptOptions::report_paths)
    /// allows.
    #[serde(serialize_with = "paths")]
    pub paths: Vec<RelPath>,
}

impl Finding {
    pub(super) fn add(&mut self, path: &RelPath, keep: usize) {
        self.count = self.count.saturating_add(1);
        if self.paths.len() < keep {
            self.paths.push(path.clone());
        }
    }
}

/// What was found in a foreign layer directory, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct AdoptReport {
    /// What the directory was stated to be.
    #[serde(serialize_with = "name")]
    pub format: ForeignFormat,
    /// Deleted names: devices 0:0 and `.wh.NAME`. They became the store's own whiteouts.
    pub whiteouts: Finding,
    /// Deleted names that were empty files with an xattr; they too.
    pub xattr_whiteouts: Finding,
    /// Directories that hide what is below; they became opaque.
    pub opaque_directories: Finding,
    /// Deletions and opaque directories where nothing can show from below; left out.
    pub void_marks: Finding,
    /// Renamed directories, whose contents were fetched from lower layers.
    pub redirects: Finding,
    /// Files whose data was fetched from lower layers.
    pub metacopies: Finding,
    /// Those of them that named a digest of the data, which was verified.
    pub verified: Finding,
    /// Names of files that AUFS kept pseudo-links to: they are hard links of one file.
    pub pseudo_links: Finding,
    /// Pseudo-linked files, by the names AUFS had for them, that have fewer than two names in this layer:
    /// in lower layers are names that AUFS showed as the same file, and that are other files now.
    /// `auplink DIR flush` before adopting would have made links of them.
    pub open_pseudo_links: Finding,
    /// AUFS's own files and directories; left out.
    pub internal: Finding,
    /// Owners and modes in xattrs that were found,
    pub override_stats: Finding,
    /// and those of them that were honoured.
    pub honoured_override_stats: Finding,
    /// Names that another format would take for marks, and that are plain files.
    pub plain_marks: Finding,
    /// Sockets; left out.
    pub sockets: Finding,
    /// Devices that were left out, by [`Devices::Skip`](crate::Devices::Skip).
    pub skipped_devices: Finding,
    /// Xattrs that were left out, by key: a union file system's, and those that this machine's policy or
    /// file system gives (`security.selinux`). Keys that are not UTF-8 are approximate.
    pub dropped_xattrs: BTreeMap<String, Finding>,
}

impl AdoptReport {
    pub(super) fn new(format: ForeignFormat) -> Self {
        AdoptReport {
            format,
            whiteouts: Finding::default(),
            xattr_whiteouts: Finding::default(),
            opaque_directories: Finding::default(),
            void_marks: Finding::default(),
            redirects: Finding::default(),
            metacopies: Finding::default(),
            verified: Finding::default(),
            pseudo_links: Finding::default(),
            open_pseudo_links: Finding::default(),
            internal: Finding::default(),
            override_stats: Finding::default(),
            honoured_override_stats: Finding::default(),
            plain_marks: Finding::default(),
            sockets: Finding::default(),
            skipped_devices: Finding::default(),
            dropped_xattrs: BTreeMap::new(),
        }
    }

    fn findings(&self) -> [(&Finding, &'static str); 15] {
        [
            (&self.whiteouts, "whiteouts"),
            (&self.xattr_whiteouts, "whiteouts that were files with an xattr"),
            (&self.opaque_directories, "opaque directories"),
            (&self.void_marks, "marks where nothing shows from below, left out"),
            (&self.redirects, "renamed directories, with their contents from lower layers"),
            (&self.metacopies, "files with their data from lower layers"),
            (&self.verified, "of them verified by their digests"),
            (&self.pseudo_links, "names of pseudo-linked files"),
            (&self.open_pseudo_links, "pseudo-linked files with other names in lower layers"),
            (&self.internal, "files of AUFS's own, left out"),
            (&self.override_stats, "owners and modes kept in xattrs"),
            (&self.honoured_override_stats, "of them honoured"),
            (&self.plain_marks, "plain files named as marks of other formats"),
            (&self.sockets, "sockets, left out"),
            (&self.skipped_devices, "devices, left out"),
        ]
    }
}

/// A line for each thing found, with the first path, and how many there are more.
impl fmt::Display for AdoptReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (finding, what) in self.findings() {
            line(f, finding, what)?;
        }
        for (key, finding) in &self.dropped_xattrs {
            line(f, finding, &format!("xattrs {key:?}, left out"))?;
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, finding: &Finding, what: &str) -> fmt::Result {
    if finding.count == 0 {
        return Ok(());
    }
    write!(f, "{what}: {}", finding.count)?;
    if let Some(first) = finding.paths.first() {
        let more = if finding.count > 1 { ", ..." } else { "" };
        write!(f, " ({first:?}{more})")?;
    }
    writeln!(f)
}

/// What adopting gave.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Adopted {
    /// What was found.
    pub report: AdoptReport,
    /// Files and directories in the new layer, each name once; marks not counted.
    pub entries: u64,
    /// What the new layer takes on disk.
    pub usage: Usage,
    /// Whether it has marks.
    pub has_marks: bool,
}

fn name<S: Serializer>(format: &ForeignFormat, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(format.as_str())
}

/// As the command line tool has paths in JSON: approximate text, and bytes where it is that.
fn paths<S: Serializer>(paths: &[RelPath], serializer: S) -> Result<S::Ok, S::Error> {
    struct Path<'a>(&'a RelPath);
    impl Serialize for Path<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let bytes = [b"/", self.0.as_bytes()].concat();
            let mut map = serializer.serialize_map(None)?;
            map.serialize_entry("path", &String::from_utf8_lossy(&bytes))?;
            if std::str::from_utf8(&bytes).is_err() {
                map.serialize_entry("path_bytes", &bytes)?;
            }
            map.end()
        }
    }
    let mut seq = serializer.serialize_seq(Some(paths.len()))?;
    for path in paths {
        seq.serialize_element(&Path(path))?;
    }
    seq.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn the_first_paths_are_kept_and_all_are_counted() {
        let mut report = AdoptReport::new(ForeignFormat::Aufs);
        for bytes in [&b"a"[..], b"\xff\n", b"c"] {
            report.sockets.add(&RelPath::new(OsStr::from_bytes(bytes)).unwrap(), 2);
        }
        assert_eq!(report.to_string(), "sockets, left out: 3 (\"a\", ...)\n");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["format"], "aufs");
        assert_eq!(json["sockets"]["count"], 3);
        let paths = &json["sockets"]["paths"];
        assert_eq!(paths[0], serde_json::json!({"path": "/a"}));
        assert_eq!(paths[1]["path_bytes"], serde_json::json!([47, 255, 10]));
        assert_eq!(paths.as_array().unwrap().len(), 2);
    }
}
