//! `manifest.json` of Docker's archives (`docker save`): which files of the archive are which image.
//!
//! A list of images, each with the names of its configuration and its layers, the lowest first, and
//! the tags that it goes by. Names are paths inside of the archive: relative, with no `..`.
//!
//! Source: moby's `image/tarexport/tarexport.go` and `image/spec/spec.md`.

use serde::Deserialize;

use super::manifest::{DOCUMENT_MAX, LAYERS_MAX};
use super::quote::{brief, quoted};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::path::{Name, RelPath};

/// The most images in one archive.
const IMAGES_MAX: usize = 10_000;

/// An image of an archive: the files that make it up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DockerImage {
    pub(crate) config: RelPath,
    pub(crate) tags: Vec<String>,
    pub(crate) layers: Vec<RelPath>,
}

impl DockerImage {
    /// The digest that the configuration's file is named by, as Docker and most others name it.
    pub(crate) fn id(&self) -> Option<Digest> {
        let name = self.config.file_name()?;
        let name = std::str::from_utf8(name.as_bytes()).ok()?;
        let name = name.strip_suffix(".json").unwrap_or(name);
        Digest::from_hex(name.strip_prefix("sha256:").unwrap_or(name)).ok()
    }
}

/// A line of `manifest.json`. Go writes an empty list as null.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Line {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

/// Reads `manifest.json`.
///
/// # Errors
/// [`ErrorKind::InvalidImage`], and [`ErrorKind::LimitExceeded`] for too many images or layers.
pub(crate) fn parse_docker_manifest(json: &[u8]) -> Result<Vec<DockerImage>> {
    let over = |what: String| Err(Error::new(ErrorKind::LimitExceeded, what));
    if json.len() as u64 > DOCUMENT_MAX {
        return over(format!("manifest.json is longer than {DOCUMENT_MAX} bytes"));
    }
    let lines: Vec<Line> = serde_json::from_slice(json).map_err(|e| {
        Error::new(ErrorKind::InvalidImage, "manifest.json is malformed")
            .with_source(brief(&e.to_string()))
    })?;
    if lines.len() > IMAGES_MAX {
        return over(format!("manifest.json has more than {IMAGES_MAX} images"));
    }
    let mut images = Vec::with_capacity(lines.len());
    for Line { config, repo_tags, layers } in lines {
        let layers = layers.unwrap_or_default();
        if layers.len() > LAYERS_MAX {
            return over(format!(
                "the image {} has {} layers: {LAYERS_MAX} are the most that can be mounted",
                quoted(&config),
                layers.len()
            ));
        }
        images.push(DockerImage {
            config: member(&config)?,
            tags: repo_tags.unwrap_or_default(),
            layers: layers.iter().map(|layer| member(layer)).collect::<Result<_>>()?,
        });
    }
    Ok(images)
}

fn member(text: &str) -> Result<RelPath> {
    member_path(text.as_bytes())
        .filter(|path| !text.starts_with('/') && !path.is_root())
        .ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidImage,
                format!("manifest.json names {}, which is no file of the archive", quoted(text)),
            )
        })
}

/// The name of an archive's member, without empty components and `.`; none if it has `..` in it, or
/// what cannot be a name.
pub(super) fn member_path(text: &[u8]) -> Option<RelPath> {
    let mut path = RelPath::ROOT;
    for component in text.split(|b| *b == b'/').filter(|c| !c.is_empty() && *c != b".") {
        path.push(&Name::new(component).ok()?);
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str, kind: ErrorKind) {
        let e = parse_docker_manifest(json.as_bytes()).unwrap_err();
        assert_eq!(e.kind(), kind, "{json}: {e}");
        assert!(e.to_string().contains("manifest.json") || kind == ErrorKind::LimitExceeded, "{e}");
    }

    #[test]
    fn files_and_tags_are_read_in_the_forms_that_there_are() {
        let hex = Digest::of(b"").hex();
        let json = format!(
            r#"[{{"Config":"{hex}.json","RepoTags":["a:1","b"],"Layers":["x/layer.tar","./y.tar"]}},
                {{"Config":"blobs/sha256/{hex}","RepoTags":null,"Layers":null,"Parent":"z"}},
                {{"Config":"sha256:{hex}"}}, {{"Config":"config.json"}}]"#
        );
        let images = parse_docker_manifest(json.as_bytes()).unwrap();
        assert_eq!(images[0].tags, ["a:1", "b"]);
        let layers: Vec<_> = images[0].layers.iter().map(RelPath::as_bytes).collect();
        assert_eq!(layers, [&b"x/layer.tar"[..], b"y.tar"]);
        let ids: Vec<_> = images.iter().map(|i| i.id().is_some()).collect();
        assert_eq!(ids, [true, true, true, false]);
    }

    #[test]
    fn what_leads_out_of_the_archive_or_is_too_much_is_refused() {
        let invalid = ErrorKind::InvalidImage;
        for json in ["", "{}", "null", "[1]", r#"[{"Layers":[]}]"#, r#"[{"Config":1}]"#] {
            refused(json, invalid);
        }
        for name in ["../x", "/etc/passwd", "a/../../b", "", ".", "a/\\u0000"] {
            refused(&format!(r#"[{{"Config":"{name}"}}]"#), invalid);
            refused(&format!(r#"[{{"Config":"c","Layers":["{name}"]}}]"#), invalid);
        }
        let layers = vec!["\"l\""; LAYERS_MAX + 1].join(",");
        refused(&format!(r#"[{{"Config":"c","Layers":[{layers}]}}]"#), ErrorKind::LimitExceeded);
        let images = vec![r#"{"Config":"c"}"#; IMAGES_MAX + 1].join(",");
        refused(&format!("[{images}]"), ErrorKind::LimitExceeded);
    }
}
