//! From a layout's index to one manifest: by name first, then by platform.
//!
//! Indexes may hold indexes; depth, the number of entries and that of documents read are bounded. What is no image
//! (attestations, signatures, unknown media types) is passed over, as the specification asks, and
//! named only if nothing else is left.

use std::collections::BTreeSet;

use oci_spec::image::{ANNOTATION_REF_NAME, Descriptor};

use super::blob::Blob;
use super::layout::ImageLayout;
use super::manifest::{Image, Manifest, parse_index};
use super::media::{Media, refuse};
use super::platform::Platform;
use super::quote::{brief, quoted};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};

/// Where containerd keeps the full name; the standard annotation then has the tag only.
const ANNOTATION_CONTAINERD_NAME: &str = "io.containerd.image.name";

/// How deep indexes may be nested.
const DEPTH_MAX: usize = 4;

/// How many documents are read to find one image.
const DOCUMENTS_MAX: usize = 256;

/// How many entries of indexes are looked at to find one image.
const ENTRIES_MAX: usize = 10_000;

/// How many names or platforms a message lists.
pub(super) const LISTED_MAX: usize = 16;

/// Which image of a layout is meant.
///
/// By default the only one, and of an image for several platforms that for this machine. An image
/// for one platform is taken whatever it is for, unless a platform was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageSelector {
    /// The name (annotation `org.opencontainers.image.ref.name`, or containerd's
    /// `io.containerd.image.name`), or the digest of a manifest or index at the top of the layout. In
    /// Docker's archives, a tag, or the image's id.
    pub name: Option<String>,
    /// The platform, where it is not this machine's.
    pub platform: Option<Platform>,
}

/// The names that a descriptor gives what it describes, the fullest first.
pub(crate) fn names_of(descriptor: &Descriptor) -> impl Iterator<Item = &str> {
    let annotations = descriptor.annotations().as_ref();
    [ANNOTATION_CONTAINERD_NAME, ANNOTATION_REF_NAME]
        .into_iter()
        .filter_map(move |key| annotations?.get(key).map(String::as_str))
}

/// Finds the image that is meant, and verifies its manifest and configuration.
pub(super) fn find(layout: &ImageLayout, which: &ImageSelector) -> Result<Image> {
    let index = layout.index()?;
    let mut search = Search {
        layout,
        documents: 0,
        entries: 0,
        seen: BTreeSet::new(),
        found: Vec::new(),
        passed_over: None,
    };
    for descriptor in named(index.manifests(), which.name.as_deref())? {
        search.visit(descriptor, 0)?;
    }
    search.choose(which.platform.as_ref())
}

/// The descriptors with this name, or all if they are one image.
fn named<'a>(all: &'a [Descriptor], name: Option<&str>) -> Result<Vec<&'a Descriptor>> {
    if let Some(name) = name {
        let digest: Option<Digest> = name.parse().ok();
        let is_meant = |d: &Descriptor| {
            names_of(d).any(|n| n == name)
                || digest.is_some_and(|digest| d.digest().as_ref().parse().ok() == Some(digest))
        };
        let meant: Vec<_> = all.iter().filter(|d| is_meant(d)).collect();
        if meant.is_empty() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("no image is named {}: there {}", quoted(name), listed(all)),
            ));
        }
        return Ok(meant);
    }
    let digests: BTreeSet<&str> = all.iter().map(|d| d.digest().as_ref()).collect();
    let names: BTreeSet<Option<&str>> = all.iter().map(|d| names_of(d).next()).collect();
    if digests.len() > 1 && names.len() > 1 {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("there are several images: name one; there {}", listed(all)),
        ));
    }
    Ok(all.iter().collect())
}

/// What a name could have been, for a message.
fn listed(all: &[Descriptor]) -> String {
    let names: BTreeSet<String> = all
        .iter()
        .map(|d| match names_of(d).next() {
            Some(name) => quoted(name),
            None => brief(d.digest().as_ref()),
        })
        .collect();
    match names.len() {
        0 => "are none".to_owned(),
        n if n > LISTED_MAX => format!("are {n}"),
        1 => format!("is {}", join(names)),
        _ => format!("are {}", join(names)),
    }
}

pub(super) fn join(words: impl IntoIterator<Item = String>) -> String {
    words.into_iter().collect::<Vec<_>>().join(", ")
}

/// A manifest that could be the one.
struct Candidate {
    blob: Blob,
    /// What its descriptor says; its configuration says more, but must be read.
    platform: Option<Platform>,
}

struct Search<'a> {
    layout: &'a ImageLayout,
    documents: usize,
    entries: usize,
    seen: BTreeSet<Blob>,
    found: Vec<Candidate>,
    /// Why the first descriptor that is no image was not taken.
    passed_over: Option<Error>,
}

impl Search<'_> {
    fn visit(&mut self, descriptor: &Descriptor, depth: usize) -> Result<()> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("more than {ENTRIES_MAX} entries in the indexes to find the image in"),
            ));
        }
        let media_type = descriptor.media_type();
        let platform = descriptor.platform().as_ref().map(Platform::from);
        match Media::of(media_type) {
            Media::Index => {
                if depth == DEPTH_MAX {
                    return Err(Error::new(
                        ErrorKind::LimitExceeded,
                        format!("indexes are nested deeper than {DEPTH_MAX}"),
                    ));
                }
                let json = self.read(Blob::try_from(descriptor)?)?;
                for inner in parse_index(&json)?.manifests() {
                    self.visit(inner, depth + 1)?;
                }
            }
            // Attestations are manifests for the platform unknown/unknown.
            Media::Manifest if platform.as_ref().is_some_and(|p| p.os() == "unknown") => {}
            Media::Manifest => {
                let blob = Blob::try_from(descriptor)?;
                if self.seen.insert(blob) {
                    self.found.push(Candidate { blob, platform });
                }
            }
            _ => {
                let what = format!("entry {}", brief(descriptor.digest().as_ref()));
                self.passed_over.get_or_insert_with(|| refuse(&what, media_type));
            }
        }
        Ok(())
    }

    /// Reads a document, counting it.
    fn read(&mut self, blob: Blob) -> Result<Vec<u8>> {
        self.documents += 1;
        if self.documents > DOCUMENTS_MAX {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("more than {DOCUMENTS_MAX} documents to be read to find the image"),
            ));
        }
        self.layout.small_blob(blob)
    }

    fn load(&mut self, manifest: Blob) -> Result<Image> {
        let manifest = Manifest::parse(&self.read(manifest)?)?;
        let config = self.read(manifest.config())?;
        manifest.with_config(&config)
    }

    /// Takes the candidate that suits best; of several that suit alike, the first.
    fn choose(mut self, asked: Option<&Platform>) -> Result<Image> {
        let candidates = std::mem::take(&mut self.found);
        if let ([only], None) = (candidates.as_slice(), asked) {
            return self.load(only.blob);
        }
        let host = Platform::host();
        let wanted = asked.unwrap_or(&host);
        let mut best: Option<(u32, Blob)> = None;
        let mut others = BTreeSet::new();
        for Candidate { blob, platform } in candidates {
            let platform = match platform.map_or_else(|| self.platform_of(blob), |p| Ok(Some(p)))? {
                Some(platform) => platform,
                None => continue,
            };
            match wanted.suits(&platform) {
                Some(how_well) if best.is_none_or(|(best, _)| how_well > best) => {
                    best = Some((how_well, blob));
                }
                Some(_) => {}
                None => {
                    others.insert(brief(&platform.to_string()));
                }
            }
        }
        match best {
            Some((_, blob)) => self.load(blob),
            None if !others.is_empty() => Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "no image is for {wanted}, only for {}",
                    join(others.into_iter().take(LISTED_MAX))
                ),
            )),
            None => Err(self
                .passed_over
                .unwrap_or_else(|| Error::new(ErrorKind::NotFound, "there is no image"))),
        }
    }

    /// What the configuration says that the image is for; none if it is no image.
    fn platform_of(&mut self, manifest: Blob) -> Result<Option<Platform>> {
        match self.load(manifest) {
            Ok(image) => Ok(Some(image.platform().clone())),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                self.passed_over.get_or_insert(e);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";

    /// A layout directory made by hand, so that it may be wrong.
    struct Layout(tempfile::TempDir);

    impl Layout {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
            Layout(dir).with_version("1.0.0")
        }

        fn path(&self) -> &Path {
            self.0.path()
        }

        fn with_version(self, version: &str) -> Self {
            let json = json!({ "imageLayoutVersion": version }).to_string();
            fs::write(self.path().join("oci-layout"), json).unwrap();
            self
        }

        /// Puts a document there, and gives a descriptor of it.
        fn put(&self, media_type: &str, json: &Value) -> Value {
            let bytes = serde_json::to_vec(json).unwrap();
            let digest = Digest::of(&bytes);
            fs::write(self.path().join("blobs/sha256").join(digest.hex()), &bytes).unwrap();
            json!({
                "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len(),
            })
        }

        /// A manifest of an image for `platform`.
        fn manifest(&self, platform: &str) -> Value {
            let p: Platform = platform.parse().unwrap();
            let config = json!({
                "os": p.os(), "architecture": p.architecture(), "variant": p.variant(),
                "rootfs": { "type": "layers", "diff_ids": [] },
            });
            let config = self.put("application/vnd.oci.image.config.v1+json", &config);
            let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [] });
            self.put(MANIFEST, &manifest)
        }

        fn index(&self, manifests: Vec<Value>) -> Value {
            self.put(INDEX, &json!({ "schemaVersion": 2, "manifests": manifests }))
        }

        fn find(&self, manifests: Vec<Value>, which: &ImageSelector) -> Result<Image> {
            let index = json!({ "schemaVersion": 2, "manifests": manifests });
            fs::write(self.path().join("index.json"), index.to_string()).unwrap();
            ImageLayout::open(self.path())?.image(which)
        }

        /// What the image found is for.
        #[track_caller]
        fn found(&self, manifests: Vec<Value>, which: &ImageSelector) -> String {
            let image = self.find(manifests, which).unwrap();
            image.platform().to_string()
        }

        #[track_caller]
        fn refused(&self, manifests: Vec<Value>, which: &ImageSelector, kind: ErrorKind) -> String {
            let e = self.find(manifests, which).unwrap_err();
            assert_eq!(e.kind(), kind, "{e}");
            e.to_string()
        }
    }

    fn with(mut descriptor: Value, field: &str, value: Value) -> Value {
        descriptor[field] = value;
        descriptor
    }

    fn called(descriptor: Value, name: &str) -> Value {
        with(descriptor, "annotations", json!({ ANNOTATION_REF_NAME: name }))
    }

    fn by_name(name: &str) -> ImageSelector {
        ImageSelector { name: Some(name.to_owned()), ..ImageSelector::default() }
    }

    fn by_platform(platform: &str) -> ImageSelector {
        ImageSelector { platform: Some(platform.parse().unwrap()), ..ImageSelector::default() }
    }

    fn any() -> ImageSelector {
        ImageSelector::default()
    }

    #[test]
    fn the_only_image_is_taken_whatever_it_is_for() {
        let l = Layout::new();
        let m = l.manifest("plan9/mips");
        assert_eq!(l.found(vec![m.clone()], &any()), "plan9/mips");
        assert_eq!(l.found(vec![l.index(vec![m.clone()])], &any()), "plan9/mips");
        let e = l.refused(vec![m], &by_platform("linux/mips"), ErrorKind::NotFound);
        assert!(e.contains("linux/mips") && e.contains("plan9/mips"), "{e}");
        l.refused(vec![], &any(), ErrorKind::NotFound);
    }

    #[test]
    fn of_several_images_one_is_taken_by_name_or_digest() {
        let l = Layout::new();
        let a = called(l.manifest("linux/amd64"), "a");
        let b = with(
            l.manifest("linux/s390x"),
            "annotations",
            json!({ ANNOTATION_CONTAINERD_NAME: "example.org/b:1", ANNOTATION_REF_NAME: "1" }),
        );
        let both = || vec![a.clone(), b.clone()];
        assert_eq!(l.found(both(), &by_name("a")), "linux/amd64");
        assert_eq!(l.found(both(), &by_name("1")), "linux/s390x");
        assert_eq!(l.found(both(), &by_name("example.org/b:1")), "linux/s390x");
        let digest = b["digest"].as_str().unwrap();
        assert_eq!(l.found(both(), &by_name(digest)), "linux/s390x");
        let e = l.refused(both(), &by_name("c"), ErrorKind::NotFound);
        assert!(e.contains("\"a\", \"example.org/b:1\""), "{e}");
        l.refused(both(), &any(), ErrorKind::InvalidArgument);
        let names = ImageLayout::open(l.path()).unwrap().names().unwrap();
        assert_eq!(names, ["a", "example.org/b:1"]);
    }

    #[test]
    fn one_image_with_two_names_is_one_image() {
        let l = Layout::new();
        let m = l.manifest("linux/amd64");
        let tags = vec![called(m.clone(), "1"), called(m, "latest")];
        assert_eq!(l.found(tags, &any()), "linux/amd64");
    }

    #[test]
    fn the_platform_decides_whether_or_not_the_index_names_it() {
        let l = Layout::new();
        for named in [true, false] {
            let entry = |os: &str, arch: &str, variant: &str| {
                let m = l.manifest(&format!("{os}/{arch}/{variant}"));
                let platform = json!({ "os": os, "architecture": arch, "variant": variant });
                if named { with(m, "platform", platform) } else { m }
            };
            let index = l.index(vec![
                entry("linux", "arm", "v5"),
                entry("linux", "arm", "v6"),
                entry("linux", "arm", "v7"),
                entry("windows", "amd64", "v1"),
            ]);
            let find = |p: &str| l.found(vec![index.clone()], &by_platform(p));
            assert_eq!(find("linux/arm"), "linux/arm/v7");
            assert_eq!(find("linux/arm/v6"), "linux/arm/v6");
            assert_eq!(find("linux/arm/v8"), "linux/arm/v7");
            let e = l.refused(vec![index], &by_platform("linux/amd64"), ErrorKind::NotFound);
            assert!(e.contains("linux/arm/v5"), "{e}");
        }
    }

    #[test]
    fn without_a_platform_the_hosts_is_taken() {
        let l = Layout::new();
        let host = Platform::host().to_string();
        let several = vec![l.manifest("plan9/mips"), l.manifest(&host)];
        assert_eq!(l.found(several, &any()), host);
    }

    #[test]
    fn what_is_no_image_is_passed_over_and_named_if_nothing_else_is_left() {
        let l = Layout::new();
        let image = l.manifest("linux/amd64");
        let attestation = with(
            l.manifest("unknown/unknown"),
            "platform",
            json!({ "os": "unknown", "architecture": "unknown" }),
        );
        let empty = l.put("application/vnd.oci.empty.v1+json", &json!({}));
        let artifact =
            l.put(MANIFEST, &json!({ "schemaVersion": 2, "config": empty, "layers": [] }));
        let unknown = l.put("application/vnd.example+json", &json!({}));
        let others = vec![attestation, artifact, unknown];
        let mut all = others.clone();
        all.push(image);
        assert_eq!(l.found(all, &by_platform("linux/amd64")), "linux/amd64");
        let e = l.refused(others, &by_platform("linux/amd64"), ErrorKind::Unsupported);
        assert!(e.contains("vnd.example"), "{e}");
    }

    #[test]
    fn nesting_and_the_number_of_documents_are_bounded() {
        let l = Layout::new();
        let nested = |n: usize| {
            let mut d = l.manifest("linux/amd64");
            for _ in 0..n {
                d = l.index(vec![d]);
            }
            d
        };
        assert_eq!(l.found(vec![nested(DEPTH_MAX)], &any()), "linux/amd64");
        l.refused(vec![nested(DEPTH_MAX + 1)], &any(), ErrorKind::LimitExceeded);
        let mut wide = l.manifest("linux/amd64");
        for _ in 0..DEPTH_MAX {
            wide = l.index(vec![wide; 20]);
        }
        l.refused(vec![wide], &any(), ErrorKind::LimitExceeded);
    }

    #[test]
    fn the_number_of_entries_is_bounded_over_all_indexes() {
        let l = Layout::new();
        let bulk = |salt: usize| {
            let entry = |n: usize| {
                json!({
                    "mediaType": MANIFEST, "size": 2,
                    "digest": Digest::of(format!("{salt} {n}").as_bytes()).to_string(),
                })
            };
            (0..ENTRIES_MAX / 3).map(entry).collect::<Vec<_>>()
        };
        let indexes = (0..4).map(|salt| l.index(bulk(salt))).collect();
        let e = l.refused(indexes, &any(), ErrorKind::LimitExceeded);
        assert!(e.contains("entries"), "{e}");
    }

    #[test]
    fn missing_and_damaged_documents_are_named() {
        let l = Layout::new();
        let m = l.manifest("linux/amd64");
        let file =
            l.path().join("blobs/sha256").join(&m["digest"].as_str().unwrap()["sha256:".len()..]);
        let digest = m["digest"].as_str().unwrap();
        let bytes = fs::read(&file).unwrap();

        fs::write(&file, &bytes[1..]).unwrap();
        let e = l.refused(vec![m.clone()], &any(), ErrorKind::DigestMismatch);
        assert!(e.contains(digest), "{e}");
        fs::write(&file, vec![b'x'; bytes.len()]).unwrap();
        let e = l.refused(vec![m.clone()], &any(), ErrorKind::DigestMismatch);
        assert!(e.contains(digest), "{e}");
        let huge = with(m.clone(), "size", json!(u64::MAX));
        l.refused(vec![huge], &any(), ErrorKind::DigestMismatch);
        fs::remove_file(&file).unwrap();
        let e = l.refused(vec![m.clone()], &any(), ErrorKind::NotFound);
        assert!(e.contains(digest), "{e}");
        fs::create_dir(&file).unwrap();
        l.refused(vec![m], &any(), ErrorKind::InvalidImage);
    }

    #[test]
    fn only_layouts_of_version_1_0_are_read() {
        for (version, good) in
            [("1.0.0", true), ("1.0.12", true), ("1.0.", false), ("1.1.0", false)]
        {
            let l = Layout::new().with_version(version);
            let m = l.manifest("linux/amd64");
            let found = l.find(vec![m], &any());
            assert_eq!(found.is_ok(), good, "{version}");
            if let Err(e) = found {
                assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
            }
        }
    }
}
