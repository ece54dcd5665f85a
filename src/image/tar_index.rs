//! A layout in a tar file, indexed once: where in the file each document and blob is.
//!
//! Nothing is extracted, so no name in the tar can lead anywhere. Names are compared by component,
//! without empty ones and `.`; what is not part of a layout is ignored, but a part of it that comes
//! twice, or is not a regular file, is refused. A hard link stands for the entry that it names, which
//! must come first: GNU tar writes files with several names so.
//!
//! Reading a header may read at most [`HEADER_MAX`] bytes, long names and PAX records included, and
//! contents are seeked over; so indexing is cheap, and bounded in memory, whatever the tar holds.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use tar::EntryType;

use super::blob::Section;
use super::quote::quoted;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};

/// The most bytes that the headers of one entry may have.
const HEADER_MAX: u64 = 1 << 20;

/// The most entries that a tar may have.
const ENTRIES_MAX: usize = 1 << 20;

/// A part of a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// `oci-layout`
    Version,
    /// `index.json`
    Index,
    /// `manifest.json`, by which Docker's own format is known.
    DockerManifest,
    /// `blobs/sha256/<hex>`
    Blob(Digest),
}

impl Part {
    /// The part that a tar's entry of this name is, if any.
    fn named(name: &[u8]) -> Option<Self> {
        let mut components = name.split(|b| *b == b'/').filter(|c| !c.is_empty() && *c != b".");
        let part = match components.next()? {
            b"oci-layout" => Part::Version,
            b"index.json" => Part::Index,
            b"manifest.json" => Part::DockerManifest,
            b"blobs" if components.next()? == b"sha256" => {
                let hex = std::str::from_utf8(components.next()?).ok()?;
                Part::Blob(Digest::from_hex(hex).ok()?)
            }
            _ => return None,
        };
        components.next().is_none().then_some(part)
    }
}

/// Where the parts of a layout are in a tar file.
#[derive(Debug)]
pub(super) struct TarIndex(BTreeMap<Part, Section>);

impl TarIndex {
    /// Indexes the tar file `file`; `path` is for messages.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`] if it is no tar, cut short, or has a part of a layout twice;
    /// [`ErrorKind::Unsupported`] if a part is not a regular file; [`ErrorKind::LimitExceeded`].
    pub(super) fn new(file: Arc<File>, path: &Path) -> Result<Self> {
        let bad = |message: String| Error::new(ErrorKind::InvalidImage, message).with_path(path);
        let mut parts = BTreeMap::new();
        scan(&file, path, &mut |member| {
            let Some(part) = Part::named(&member.name) else {
                return Ok(());
            };
            let name = quoted(&String::from_utf8_lossy(&member.name));
            let section = match member.content {
                Content::File(section) => section,
                Content::HardLink(target) => Part::named(&target)
                    .and_then(|target| parts.get(&target).cloned())
                    .ok_or_else(|| bad(format!("{name} is a hard link to nothing before it in")))?,
                Content::Symlink(_) => return Err(no_file(&name, EntryType::Symlink, path)),
                Content::Other(kind) => return Err(no_file(&name, kind, path)),
            };
            if parts.insert(part, section).is_some() {
                return Err(bad(format!("{name} comes twice in")));
            }
            Ok(())
        })?;
        Ok(TarIndex(parts))
    }

    pub(super) fn get(&self, part: Part) -> Option<&Section> {
        self.0.get(&part)
    }
}

/// The error for a member that ought to be a file.
pub(super) fn no_file(name: &str, kind: EntryType, path: &Path) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{name} is a tar entry of type {kind:?}, not a regular file, in"),
    )
    .with_path(path)
}

/// A member of a tar file.
pub(super) struct Member {
    pub(super) name: Vec<u8>,
    pub(super) content: Content,
}

/// What a member is; links with what they name.
pub(super) enum Content {
    File(Section),
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Other(EntryType),
}

/// Reads all headers of the tar file `file`, and tells of each member; `path` is for messages.
pub(super) fn scan(
    file: &Arc<File>,
    path: &Path,
    each: &mut dyn FnMut(Member) -> Result<()>,
) -> Result<()> {
    let bad = |message: String| Error::new(ErrorKind::InvalidImage, message).with_path(path);
    let failed = |e: io::Error| match e.downcast::<Error>() {
        Ok(e) => e.with_path(path),
        Err(e) if e.raw_os_error().is_some() => Error::io("read", path, e),
        // The codec's message quotes what it found there, which may be any file's contents.
        Err(_) => bad("not a tar file, or a damaged one:".to_owned()),
    };
    let end = file.metadata().map_err(|e| Error::io("stat", path, e))?.len();
    let budget = Cell::new(HEADER_MAX);
    let mut archive = tar::Archive::new(Headers { file, at: 0, budget: &budget });
    let entries = archive.entries_with_seek().map_err(failed)?;
    for (n, entry) in entries.enumerate() {
        let entry = entry.map_err(failed)?;
        budget.set(HEADER_MAX);
        if n >= ENTRIES_MAX {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("more than {ENTRIES_MAX} entries in the image"),
            )
            .with_path(path));
        }
        let (at, size) = (entry.raw_file_position(), entry.size());
        if at.checked_add(size).is_none_or(|stop| stop > end) {
            return Err(bad("the tar file is cut short".to_owned()));
        }
        let target = || entry.link_name_bytes().unwrap_or_default().into_owned();
        let content = match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                Content::File(Section::new(Arc::clone(file), at, size))
            }
            EntryType::Link => Content::HardLink(target()),
            EntryType::Symlink => Content::Symlink(target()),
            other => Content::Other(other),
        };
        each(Member { name: entry.path_bytes().into_owned(), content })?;
    }
    Ok(())
}

/// The tar file as the codec reads it: headers only, no more than the budget between two entries.
struct Headers<'a> {
    file: &'a File,
    at: u64,
    budget: &'a Cell<u64>,
}

impl Read for Headers<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.at)?;
        self.at = self.at.saturating_add(n as u64);
        let left = self.budget.get().checked_sub(n as u64).ok_or_else(|| {
            io::Error::from(Error::new(
                ErrorKind::LimitExceeded,
                format!("an entry's headers have more than {HEADER_MAX} bytes"),
            ))
        })?;
        self.budget.set(left);
        Ok(n)
    }
}

impl Seek for Headers<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    type Builder = tar::Builder<Vec<u8>>;

    fn add(b: &mut Builder, name: &str, kind: EntryType, link: &str, bytes: &[u8]) {
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(kind);
        h.set_size(bytes.len() as u64);
        h.set_mode(0o644);
        if !link.is_empty() {
            h.set_link_name(link).unwrap();
        }
        b.append_data(&mut h, name, bytes).unwrap();
    }

    fn file(b: &mut Builder, name: &str, bytes: &[u8]) {
        add(b, name, EntryType::Regular, "", bytes);
    }

    fn index_bytes(bytes: &[u8]) -> Result<TarIndex> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        TarIndex::new(Arc::new(file), Path::new("image.tar"))
    }

    fn index(fill: impl Fn(&mut Builder)) -> Result<TarIndex> {
        let mut b = Builder::new(Vec::new());
        fill(&mut b);
        index_bytes(&b.into_inner().unwrap())
    }

    fn content(index: &TarIndex, part: Part) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        index.get(part)?.clone().read_to_end(&mut bytes).unwrap();
        Some(bytes)
    }

    #[test]
    fn finds_the_parts_under_any_spelling_and_nothing_else() {
        let index = index(|b| {
            file(b, "./oci-layout", b"v");
            file(b, "blobs/sha256/not-a-digest", b"x");
            file(b, &format!("blobs/sha256/{HEX}/below"), b"x");
            file(b, &"long/".repeat(60), b"x");
            file(b, &format!("././blobs//sha256/{HEX}"), b"blob");
            file(b, "elsewhere/index.json", b"x");
        })
        .unwrap();
        assert_eq!(content(&index, Part::Version).unwrap(), b"v");
        let blob = Part::Blob(Digest::of(b""));
        assert_eq!(content(&index, blob).unwrap(), b"blob");
        assert_eq!(content(&index, Part::Index), None);
        assert_eq!(index.0.len(), 2);
    }

    #[test]
    fn a_part_that_comes_twice_is_refused() {
        let e = index(|b| {
            file(b, "index.json", b"a");
            file(b, "./index.json", b"b");
        })
        .unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidImage);
        assert!(e.to_string().contains("comes twice"), "{e}");
    }

    #[test]
    fn a_hard_link_stands_for_the_entry_it_names() {
        let name = format!("blobs/sha256/{HEX}");
        let index1 = index(|b| {
            file(b, &name, b"doc");
            add(b, "index.json", EntryType::Link, &name, b"");
        })
        .unwrap();
        assert_eq!(content(&index1, Part::Index).unwrap(), b"doc");
        let e = index(|b| add(b, "index.json", EntryType::Link, &name, b"")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidImage);
    }

    #[test]
    fn parts_that_are_no_files_are_refused() {
        for kind in [EntryType::Symlink, EntryType::Fifo, EntryType::Directory] {
            let e = index(|b| add(b, "index.json", kind, "oci-layout", b"")).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported, "{kind:?}");
        }
    }

    #[test]
    fn what_is_no_tar_or_cut_short_is_refused() {
        let mut b = Builder::new(Vec::new());
        file(&mut b, "oci-layout", &[b'x'; 2000]);
        let bytes = b.into_inner().unwrap();
        for cut in [&bytes[..600], &bytes[..300], &b"not a tar"[..]] {
            let e = index_bytes(cut).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidImage, "{e}");
        }
        // Without the end mark, and with half of it, nothing is lost.
        for end in [2560, 3072] {
            assert_eq!(index_bytes(&bytes[..end]).unwrap().0.len(), 1);
        }
    }

    #[test]
    fn an_error_quotes_nothing_of_a_file_that_is_no_tar() {
        let e = index_bytes(&b"secret\n".repeat(200)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidImage);
        assert!(!format!("{e} {e:?}").contains("secret"), "{e:?}");
    }

    #[test]
    fn huge_headers_are_refused_before_they_are_in_memory() {
        let e = index(|b| {
            add(b, "././@LongLink", EntryType::GNULongName, "", &vec![b'n'; HEADER_MAX as usize]);
            file(b, "x", b"");
        })
        .unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded, "{e}");
    }
}
