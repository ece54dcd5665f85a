//! Doors for the fuzz targets in `fuzz/`: pure functions over bytes, each of which asserts what must
//! hold for any input. Compiled under `cfg(fuzzing)` alone, which cargo-fuzz sets; no part of the
//! crate's interface.
#![allow(clippy::expect_used)]

mod apply_model;
mod archive;
#[cfg(feature = "fuse")]
mod helper;
mod record;
#[cfg(feature = "fuse")]
mod union;

pub use apply_model::apply_model;
pub use archive::{marks, tar_apply, tar_entry};
#[cfg(feature = "fuse")]
pub use helper::helper_protocol;
pub use record::record;
#[cfg(feature = "fuse")]
pub use union::union_notes;

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::digest::Digest;
use crate::driver::{Mount, Restrictions, UpperDir};
use crate::error::{Error, ErrorKind};
use crate::image::{Image, ImageLayer, names_of, parse_docker_manifest, parse_index};
use crate::store::{Fields, Filter};

/// A snapshot with every field that a filter may ask for.
struct Everything;

impl Fields for Everything {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        assert!(!path.is_empty(), "a path has at least one part");
        (path.len() < 4).then(|| path.join(".").into())
    }
}

/// The filter language: any text is either a filter or an invalid argument that says where; a filter
/// gives its text back, means the same when read again, and means the same when ANDed with itself.
pub fn filter(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let filter = match Filter::parse(text) {
        Ok(filter) => filter,
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::InvalidArgument);
            assert!(e.to_string().contains("at byte "), "{e}");
            return;
        }
    };
    assert_eq!(filter.to_string(), text);
    let holds = filter.matches(&Everything);
    if !text.is_empty()
        && let Ok(twice) = Filter::parse(&format!("{text},{text}"))
    {
        assert_eq!(twice.matches(&Everything), holds);
    }
    let again = Filter::parse(text).expect("what was read once is read again");
    assert_eq!(again.matches(&Everything), holds);
    assert_eq!(Filter::any_matches(&[filter], &Everything), holds);
}

/// Manifest and configuration: any two texts are either an image or a refusal of a kind that callers
/// expect; an image gives its bytes back, and has as many chain ids as layers.
pub fn manifest(data: &[u8]) {
    let at = data.iter().position(|b| *b == 0).unwrap_or(data.len());
    let (manifest, config) = data.split_at(at);
    let config = config.strip_prefix(&[0]).unwrap_or(config);
    match Image::from_json(manifest, config) {
        Ok(image) => {
            assert_eq!(image.manifest_json(), manifest);
            assert_eq!(image.config_json(), config);
            assert_eq!(image.digest(), Digest::of(manifest));
            let last = image.layers().last().map(ImageLayer::chain_id);
            assert_eq!(image.chain_id(), last);
        }
        Err(e) => refused(
            &e,
            &[ErrorKind::Unsupported, ErrorKind::DigestMismatch, ErrorKind::InvalidArgument],
        ),
    }
}

/// A document is refused for one of these kinds, or as invalid or too large, by a message that a
/// terminal can show.
fn refused(e: &Error, kinds: &[ErrorKind]) {
    let always = [ErrorKind::InvalidImage, ErrorKind::LimitExceeded];
    assert!(always.contains(&e.kind()) || kinds.contains(&e.kind()), "{e}");
    let text = e.to_string();
    assert!(!text.contains(char::is_control) && text.len() < 4096, "{text:?}");
}

/// An index: any text is either one, with names and digests for its entries, or a refusal of a kind that
/// callers expect.
pub fn image_index(data: &[u8]) {
    match parse_index(data) {
        Ok(index) => {
            for entry in index.manifests() {
                assert!(names_of(entry).count() <= 2);
                assert!(entry.digest().as_ref().contains(':'));
            }
        }
        Err(e) => refused(&e, &[ErrorKind::Unsupported]),
    }
}

/// Docker's `manifest.json`: any text is either images, the files of which are inside of the archive,
/// or a refusal of a kind that callers expect.
pub fn docker_manifest(data: &[u8]) {
    match parse_docker_manifest(data) {
        Ok(images) => {
            for image in images {
                for file in image.layers.iter().chain([&image.config]) {
                    assert!(!file.is_root());
                    let names = file.as_bytes().split(|b| *b == b'/');
                    assert!({ names }.all(|n| !n.is_empty() && n != b"." && n != b".."));
                }
                if let Some(id) = image.id() {
                    let file = image.config.as_path().to_string_lossy();
                    assert!(file.contains(&id.hex()));
                }
            }
        }
        Err(e) => refused(&e, &[]),
    }
}

/// Mount options as text: read by the kernel's rules (a backslash takes the next byte as it is, a comma
/// ends an option, a colon a layer), they name the same directories, whatever bytes these have.
pub fn mount_options(data: &[u8]) {
    let mut paths = data.split(|b| *b == 0).filter(|p| !p.is_empty()).map(path);
    let (Some(dir), Some(work), Some(first)) = (paths.next(), paths.next(), paths.next()) else {
        return;
    };
    let lower: Vec<PathBuf> = std::iter::once(first).chain(paths).collect();
    let mount = Mount::Overlay {
        lower: lower.clone(),
        upper: Some(UpperDir { dir: dir.clone(), work: work.clone() }),
        options: Vec::new(),
        ids: Default::default(),
        restrictions: Restrictions::default(),
    };
    let text = mount.options().join(OsStr::new(","));
    let mut found = (Vec::new(), None, None);
    for option in split(text.as_bytes(), b',') {
        if let Some(layers) = option.strip_prefix(b"lowerdir=") {
            found.0 = split(layers, b':').iter().map(|layer| path(&unescape(layer))).collect();
        } else if let Some(upper) = option.strip_prefix(b"upperdir=") {
            found.1 = Some(path(&unescape(upper)));
        } else if let Some(upper) = option.strip_prefix(b"workdir=") {
            found.2 = Some(path(&unescape(upper)));
        }
    }
    assert_eq!(found, (lower, Some(dir), Some(work)));
}

fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

/// Splits at every separator that no backslash stands before; keeps the backslashes.
fn split(text: &[u8], separator: u8) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        let last = parts.last_mut().expect("there is always a part");
        if *byte == b'\\' {
            last.push(*byte);
            last.extend(bytes.next());
        } else if *byte == separator {
            parts.push(Vec::new());
        } else {
            last.push(*byte);
        }
    }
    parts
}

fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        out.extend(if *byte == b'\\' { bytes.next() } else { Some(byte) });
    }
    out
}
