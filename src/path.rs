//! Names and paths inside a layer: validated bytes, never lossy UTF-8.
//!
//! A [`Name`] is one component and cannot be `.`, `..`, empty, longer than 255 bytes, or hold `/` or
//! NUL; a [`RelPath`] is a sequence of names, the empty one being the layer's root. A path that
//! leaves the root cannot be written down in these types.

use std::borrow::Borrow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// The longest name of a directory entry, in bytes (`NAME_MAX`).
pub const NAME_MAX: usize = 255;

/// One component of a path: any bytes but `/` and NUL, 1 to 255 of them, neither `.` nor `..`. Clones
/// share the bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<[u8]>);

impl Name {
    /// Validates `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if they are not a name.
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<Self> {
        let bytes = bytes.as_ref();
        let reason = if bytes.is_empty() {
            "it is empty"
        } else if bytes == b"." || bytes == b".." {
            "it stands for a directory"
        } else if bytes.contains(&b'/') {
            "it has a slash"
        } else if bytes.contains(&0) {
            "it has a NUL byte"
        } else if bytes.len() > NAME_MAX {
            "it is longer than 255 bytes"
        } else {
            return Ok(Name(bytes.into()));
        };
        Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{:?} is not a file name: {reason}", OsStr::from_bytes(bytes)),
        ))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As the standard library's type for such strings.
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }
}

impl AsRef<Path> for Name {
    fn as_ref(&self) -> &Path {
        Path::new(self.as_os_str())
    }
}

impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_os_str(), f)
    }
}

/// A path below a layer's root: names joined by `/`, without a slash at either end.
///
/// ```
/// let p = stratafs::RelPath::new("usr/bin/env")?;
/// assert_eq!(p.file_name().unwrap().as_bytes(), b"env");
/// assert_eq!(p.parent().unwrap().as_bytes(), b"usr/bin");
/// assert!(stratafs::RelPath::new("../etc").is_err());
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct RelPath(Vec<u8>);

impl RelPath {
    /// The layer's root.
    pub const ROOT: RelPath = RelPath(Vec::new());

    /// Validates a relative path; every component must be a [`Name`]. The empty path is the root.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for absolute paths and for components that are no names,
    /// `.`, `..` and empty ones among them.
    pub fn new(path: impl AsRef<OsStr>) -> Result<Self> {
        let bytes = path.as_ref().as_bytes();
        if !bytes.is_empty() {
            for component in bytes.split(|b| *b == b'/') {
                Name::new(component).map_err(|e| {
                    Error::new(ErrorKind::InvalidArgument, "not a path inside a layer")
                        .with_path(path.as_ref())
                        .with_source(e)
                })?;
            }
        }
        Ok(RelPath(bytes.to_vec()))
    }

    /// The bytes, names joined by `/`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As the standard library's path, relative to the layer's root.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// Whether this is the layer's root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The last name; none for the root.
    pub fn file_name(&self) -> Option<Name> {
        self.components().next_back()
    }

    /// All but the last name; none for the root.
    pub fn parent(&self) -> Option<RelPath> {
        match self.0.iter().rposition(|b| *b == b'/') {
            _ if self.is_root() => None,
            None => Some(RelPath::ROOT),
            Some(slash) => self.0.get(..slash).map(|p| RelPath(p.to_vec())),
        }
    }

    /// The path of `name` in this directory.
    #[must_use]
    pub fn join(&self, name: &Name) -> RelPath {
        let mut joined = self.clone();
        joined.push(name);
        joined
    }

    /// Goes down to `name`.
    pub fn push(&mut self, name: &Name) {
        if !self.0.is_empty() {
            self.0.push(b'/');
        }
        self.0.extend_from_slice(name.as_bytes());
    }

    /// Goes up one name; the root stays the root.
    pub fn pop(&mut self) {
        let end = self.0.iter().rposition(|b| *b == b'/').unwrap_or(0);
        self.0.truncate(end);
    }

    /// The names from the root down.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = Name> + '_ {
        self.0.split(|b| *b == b'/').filter(|c| !c.is_empty()).map(|c| Name(c.into()))
    }

    /// Whether `self` is `ancestor` or below it.
    pub fn starts_with(&self, ancestor: &RelPath) -> bool {
        ancestor.is_root()
            || self
                .0
                .strip_prefix(ancestor.as_bytes())
                .is_some_and(|rest| rest.first().is_none_or(|b| *b == b'/'))
    }
}

/// By components, so that a directory sorts right before its contents.
impl Ord for RelPath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let key = |b: &u8| if *b == b'/' { 0 } else { *b };
        self.0.iter().map(key).cmp(other.0.iter().map(key))
    }
}

impl PartialOrd for RelPath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl AsRef<Path> for RelPath {
    fn as_ref(&self) -> &Path {
        self.as_path()
    }
}

impl From<Name> for RelPath {
    fn from(name: Name) -> Self {
        RelPath(name.as_bytes().to_vec())
    }
}

impl From<RelPath> for OsString {
    fn from(path: RelPath) -> Self {
        OsString::from_vec(path.0)
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_path(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none() {
        let long = "n".repeat(256);
        for bad in ["", ".", "..", "a/b", "a\0b", &long] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
        assert!(Name::new("n".repeat(255)).is_ok());
        assert!(Name::new(vec![0xff, b'\n']).is_ok());
        assert!(Name::new("...").is_ok());
    }

    #[test]
    fn paths_that_leave_or_stutter_are_refused() {
        for bad in ["/", "/a", "a/", "a//b", "./a", "a/..", "a/../b"] {
            assert!(RelPath::new(bad).is_err(), "{bad:?}");
        }
        assert!(RelPath::new("").unwrap().is_root());
    }

    #[test]
    fn walks_up_and_down() {
        let mut p = RelPath::new("a/b").unwrap();
        p.push(&Name::new("c").unwrap());
        assert_eq!(p.as_bytes(), b"a/b/c");
        assert!(p.starts_with(&RelPath::new("a/b").unwrap()));
        assert!(!p.starts_with(&RelPath::new("a/bb").unwrap()));
        p.pop();
        p.pop();
        p.pop();
        p.pop();
        assert!(p.is_root());
        assert_eq!(p.parent(), None);
    }

    #[test]
    fn a_directory_sorts_right_before_its_contents() {
        let p = |s: &str| RelPath::new(s).unwrap();
        let mut paths = [p("a.b"), p("a/c"), p("a")];
        paths.sort();
        assert_eq!(paths, [p("a"), p("a/c"), p("a.b")]);
    }
}
