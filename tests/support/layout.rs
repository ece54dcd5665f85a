//! Image layouts that are written blob by blob.

use std::io::Write as _;

use serde_json::Value;
use stratafs::LayoutWriter;

/// Adds a blob, and gives its descriptor; `media` is what its type has after that of OCI images.
pub fn blob(layout: &mut LayoutWriter, media: &str, bytes: &[u8]) -> Value {
    let mut blob = layout.blob().unwrap();
    blob.write_all(bytes).unwrap();
    let (digest, size) = blob.finish().unwrap();
    serde_json::json!({
        "mediaType": format!("application/vnd.oci.image.{media}"),
        "digest": digest.to_string(), "size": size,
    })
}
