//! From a layout into a store.
//!
//! Layers become committed snapshots named by their chain ids, so that images share what they have in
//! common; what is there already is not read again. The others are unpacked side by side ([`overlap`]).
//! Each blob is verified, by size and digest, and each layer by the digest of its uncompressed archive,
//! before it is committed. A failure removes the layers that this import brought.

use std::io::{self, Read, Write as _};
use std::num::NonZeroUsize;

use super::blob::{Verified, reading};
use super::layout::{Chosen, ImageLayout};
use super::manifest::ImageLayer;
use super::overlap::{self, Layer, bring_all};
use super::select::ImageSelector;
use crate::archive::{ApplyOptions, Below};
use crate::compression::Decompressor;
use crate::digest::Hashing;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::store::{Expected, ImageRecord, Keeping, Kind, Labels, Store, check_key};

/// The unit in which blobs are read that are not unpacked, in bytes.
const BUFFER: usize = 128 * 1024;

/// How an image is imported.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ImportOptions {
    /// Which image of the layout, and for which platform; the default is the only one, and the host's.
    pub select: ImageSelector,
    /// How layers are unpacked, with their bounds.
    pub apply: ApplyOptions,
    /// How many layers are unpacked at the same time. The default, none, is as many as this process may
    /// run threads at once, and at most 8. Each takes some megabytes of memory, for zstd up to 128 MiB
    /// more, and up to 64 descriptors.
    pub threads: Option<NonZeroUsize>,
    /// Whether the layers are kept as they came too, compressed as a rule, beside being unpacked: then
    /// [`save_image`](crate::save_image) gives the very same image, with the same digest. Default: no, as
    /// it takes their room again.
    pub keep_blobs: bool,
}

impl ImportOptions {
    /// The defaults.
    pub fn new() -> Self {
        ImportOptions::default()
    }
}

/// Puts an image of `layout` into `store`, under `name`; an image of that name is replaced.
///
/// Progress is of all layers together, in bytes as they are stored.
///
/// # Errors
/// - [`ErrorKind::InvalidImage`], [`ErrorKind::InvalidArchive`], [`ErrorKind::DigestMismatch`],
///   [`ErrorKind::LimitExceeded`], [`ErrorKind::Unsupported`]: the image is damaged, hostile, or not
///   of a kind that is known; the message names the blob.
/// - [`ErrorKind::NotFound`]: the layout has no such image, or not for that platform.
/// - [`ErrorKind::Cancelled`], and those of the store and the file system.
///
/// Nothing of it is left in the store then.
pub fn import_image(
    store: &Store,
    layout: &ImageLayout,
    name: &str,
    options: &ImportOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<ImageRecord> {
    check_key(name)?;
    let chosen = layout.choose(&options.select)?;
    let image = &chosen.image;
    image.layers().iter().try_for_each(|layer| chosen.layer(layer.blob()).map(drop))?;
    let importing = store.begin_import()?;
    let mut unneeded = match store.image(name) {
        Ok(replaced) => store.blobs_named(replaced.manifest, replaced.config),
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e),
    };
    let mut brought = Vec::new();
    let done = layers(store, &chosen, options, &mut brought, progress).and_then(|layers| {
        store.put_image(name, image.manifest_json(), image.config_json(), &layers)
    });
    drop(importing);
    if done.is_err() {
        unneeded.extend([image.digest(), image.config_digest()]);
        unneeded.extend(image.layers().iter().map(ImageLayer::digest));
    }
    if !unneeded.is_empty() {
        store.drop_unneeded_blobs(&unneeded);
    }
    // What another import counts on meanwhile is left for gc.
    if done.is_err()
        && let Err(e) = store.remove_unneeded(brought)
    {
        tracing::warn!(error = %e, "layers of a failed import are left for gc");
    }
    done.map_err(|e| e.context(format!("import of image {name:?} failed")))
}

/// The names of all layers, once they are there.
fn layers(
    store: &Store,
    chosen: &Chosen<'_>,
    options: &ImportOptions,
    brought: &mut Vec<String>,
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<String>> {
    let mut all: Vec<Bringing<'_>> = Vec::new();
    for layer in chosen.image.layers() {
        let parent = all.last().map(|below| below.name.clone());
        let name = layer.chain_id().to_string();
        all.push(Bringing { store, chosen, layer, name, parent, options });
    }
    // A layer has all below it: those that are missing are the upper ones.
    let mut there = 0;
    for layer in &all {
        // Of one that is there, the blob may not be.
        if options.keep_blobs || !layer.is_there()? {
            break;
        }
        there += 1;
    }
    let (present, missing) = all.split_at(there);
    let parent = Below::default();
    match present.last() {
        Some(layer) => layer.tell(&parent)?,
        None => parent.are(Vec::new()),
    }
    let threads = options.threads.unwrap_or_else(overlap::default_threads);
    let (new, done) = bring_all(missing, &parent, threads, progress);
    brought.extend(new.iter().filter_map(|n| missing.get(*n)).map(|layer| layer.name.clone()));
    done?;
    Ok(all.into_iter().map(|layer| layer.name).collect())
}

/// Copies what is read.
struct Copying<'s, R> {
    from: R,
    to: Keeping<'s>,
}

impl<R: Read> Read for Copying<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buf)?;
        self.to.write_all(buf.get(..n).unwrap_or_default())?;
        Ok(n)
    }
}

/// A layer of the image that is imported.
struct Bringing<'a> {
    store: &'a Store,
    chosen: &'a Chosen<'a>,
    layer: &'a ImageLayer,
    name: String,
    parent: Option<String>,
    options: &'a ImportOptions,
}

impl Bringing<'_> {
    /// Whether the store has the layer. A snapshot of that name that is something else is an error.
    fn is_there(&self) -> Result<bool> {
        let info = match self.store.stat(&self.name) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            info => info?,
        };
        if info.kind == Kind::Committed
            && info.diff_id == Some(self.layer.diff_id())
            && info.parent == self.parent
        {
            return Ok(true);
        }
        Err(Error::new(
            ErrorKind::AlreadyExists,
            format!(
                "the snapshot {:?} has the name of a layer of the image, but not its contents: \
                 remove or rename it",
                self.name
            ),
        ))
    }

    fn unpack(&self, below: &Below, progress: &mut ProgressFn<'_>) -> Result<()> {
        let blob = self.chosen.layer(self.layer.blob())?;
        let labels = Labels::from([(Store::IMAGE_LAYER_LABEL.to_owned(), "true".to_owned())]);
        let expected = Expected {
            blob: self.layer.digest(),
            diff_id: self.layer.diff_id(),
            below: below.clone(),
        };
        let (name, parent) = (&self.name, self.parent.as_deref());
        let how = &self.options.apply;
        let expected = Some(&expected);
        let mut apply = |input: &mut dyn Read| {
            self.store.apply_expecting(name, parent, input, how, labels.clone(), expected, progress)
        };
        if !self.options.keep_blobs {
            return apply(&mut { blob }).map(drop);
        }
        let mut input = Copying { from: blob, to: self.store.keep_blob()? };
        apply(&mut input)?;
        input.to.publish(&self.layer.digest())
    }

    /// Keeps the blob of a layer that is there, without unpacking it. It must be that layer's.
    fn keep(&self, progress: &mut ProgressFn<'_>) -> Result<()> {
        let mut state = Progress::new(Phase::Verify);
        match self.store.verify_kept(&self.layer.digest(), progress) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(e) if e.kind() == ErrorKind::DigestMismatch => {
                tracing::warn!(error = %e, "it is replaced");
            }
            Err(e) => return Err(e),
        }
        let blob = Verified::new(self.chosen.layer(self.layer.blob())?, self.layer.blob());
        let mut input = Copying { from: blob, to: self.store.keep_blob()? };
        let mut archive = Hashing::new(Decompressor::new(&mut input)?);
        let mut buffer = vec![0; BUFFER];
        let max = self.options.apply.limits.max_unpacked_bytes;
        let failed = |e| reading(self.layer.digest(), e);
        while archive.read(&mut buffer).map_err(failed)? > 0 {
            if archive.passed() > max {
                let text = format!("the archive is over the limit max_unpacked_bytes of {max}");
                return Err(Error::new(ErrorKind::LimitExceeded, text));
            }
            state.bytes = archive.passed();
            report(progress, state)?;
        }
        let (_, found, _) = archive.finish();
        if found != *self.layer.diff_id().digest() {
            return Err(Error::new(
                ErrorKind::DigestMismatch,
                format!(
                    "the layer's archive has the digest {found}, and {} was promised",
                    self.layer.diff_id()
                ),
            ));
        }
        input.to.publish(&self.layer.digest())
    }

    /// Whether the layer was not there before.
    fn unpack_or_find(&self, below: &Below, progress: &mut ProgressFn<'_>) -> Result<bool> {
        // Another import may have been faster, before or meanwhile.
        let is_new = !self.is_there()?
            && match self.unpack(below, progress) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists && self.is_there()? => false,
                done => done.map(|()| true)?,
            };
        if !is_new && self.options.keep_blobs {
            self.keep(progress)?;
        }
        Ok(is_new)
    }
}

impl Layer for Bringing<'_> {
    fn size(&self) -> u64 {
        self.layer.size()
    }

    fn bring(&self, below: &Below, progress: &mut ProgressFn<'_>) -> Result<bool> {
        let done = self.unpack_or_find(below, progress);
        done.map_err(|e| e.context(format!("layer {} failed", self.layer.digest())))
    }

    fn tell(&self, above: &Below) -> Result<()> {
        above.are(self.store.layer_paths(&self.name)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::archive::Ownership;
    use crate::compression::Compression;
    use crate::image::LayoutWriter;
    use crate::image::blob::Blob;
    use crate::image::compose::compose_manifest;
    use crate::layer::LayerFormat;
    use crate::progress::ignore_progress;
    use crate::store::StoreOptions;
    use crate::sys::dir::Dir;
    use crate::sys::xattr::{self, Of};

    /// xorshift64.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }

        fn path(&mut self) -> String {
            let names: Vec<&str> = (0..=self.below(4))
                .map(|_| ["a", "b", "c"][usize::try_from(self.below(3)).unwrap()])
                .collect();
            names.join("/")
        }

        /// Few entries over few names, marks before and behind what they are beside, most parents
        /// without an entry of their own; each directory with attributes that tell it.
        fn layer(&mut self, lowest: bool) -> Vec<u8> {
            let mut tar = tar::Builder::new(Vec::new());
            for n in 0..1 + self.below(9) {
                let path = self.path();
                let (parent, name) = path.rsplit_once('/').unwrap_or((".", &path));
                let name = match self.below(10) {
                    // Or the root has the time at which it was made.
                    _ if n == 0 && lowest => "./".to_owned(),
                    0..=3 => format!("{path}/"),
                    4 => "./".to_owned(),
                    5 | 6 => format!("{parent}/.wh.{name}"),
                    7 => format!("{path}/.wh..wh..opq"),
                    // Nothing is below a file.
                    _ => format!("{path}/f"),
                };
                let mut header = tar::Header::new_ustar();
                header.set_size(0);
                header.set_mtime(self.below(1 << 30));
                header.set_mode(0o644);
                if name.ends_with('/') {
                    header.set_entry_type(tar::EntryType::Directory);
                    // Open to its owner, who may be nobody special.
                    header.set_mode(u32::try_from(self.below(0o1000)).unwrap() | 0o500);
                    let value = self.below(1 << 20).to_string();
                    let key = ["SCHILY.xattr.user.x", "SCHILY.xattr.user.y"]
                        [usize::try_from(self.below(2)).unwrap()];
                    tar.append_pax_extensions([(key, value.as_bytes())]).unwrap();
                }
                tar.append_data(&mut header, name, &b""[..]).unwrap();
            }
            tar.into_inner().unwrap()
        }
    }

    fn write_image(path: &Path, layers: &[Vec<u8>]) {
        let mut writer = LayoutWriter::to_tar_file(path, path.parent().unwrap()).unwrap();
        let mut blobs = Vec::new();
        for bytes in layers {
            let mut blob = writer.blob().unwrap();
            blob.write_all(bytes).unwrap();
            let (digest, size) = blob.finish().unwrap();
            blobs.push((Blob { digest, size }, Compression::None));
        }
        let diff_ids: Vec<_> = blobs.iter().map(|(b, _)| b.digest.to_string()).collect();
        let config = json!({
            "architecture": "arm", "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = compose_manifest(Blob::of(&config), &blobs).unwrap();
        writer.add_image(&manifest, &config, None).unwrap();
        writer.finish(&mut ignore_progress).unwrap();
    }

    /// Everything about a tree, its root included.
    fn describe(dir: &Path, into: &mut Vec<String>) {
        let meta = std::fs::symlink_metadata(dir).unwrap();
        let mut xattrs = Vec::new();
        if meta.is_dir() {
            let open = Dir::open(dir).unwrap();
            let mut keys = xattr::list(Of::dir(&open)).unwrap();
            keys.sort();
            for key in keys {
                xattrs.push((key.clone(), xattr::get(Of::dir(&open), &key).unwrap()));
            }
        }
        // Whiteouts have no time of their own.
        let mtime = (meta.is_dir() || meta.is_file()).then(|| (meta.mtime(), meta.mtime_nsec()));
        into.push(format!(
            "{dir:?} {:o} {}:{} {:x} {mtime:?} {xattrs:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.rdev(),
        ));
        if meta.is_dir() {
            let mut names: Vec<_> =
                std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
            names.sort();
            names.iter().for_each(|path| describe(path, into));
        }
    }

    /// All layers of the image in a new store: trees, usage, names.
    fn imported(image: &Path, threads: usize) -> Vec<String> {
        let tmp = tempfile::tempdir().unwrap();
        let mut options = StoreOptions::new();
        options.format = Some(LayerFormat::OverlayUser);
        options.durability = crate::store::Durability::None;
        let store = Store::open(tmp.path(), options).unwrap();
        let mut options = ImportOptions::new();
        options.apply.ownership = Ownership::Ignore;
        options.threads = NonZeroUsize::new(threads);
        let layout = ImageLayout::open(image).unwrap();
        let image = import_image(&store, &layout, "image", &options, &mut ignore_progress).unwrap();
        let mut lines = Vec::new();
        for name in &image.layers {
            let info = store.stat(name).unwrap();
            lines.push(format!("{name} on {:?}: {:?}", info.parent, info.usage));
            describe(&store.layer_paths(name).unwrap()[0], &mut lines);
        }
        assert_eq!(store.check(&mut ignore_progress).unwrap().problems, []);
        let root = tmp.path().to_str().unwrap();
        lines.iter().map(|line| line.replace(root, "")).collect()
    }

    #[test]
    fn side_by_side_gives_what_one_after_the_other_gives() {
        crate::sys::file::raise_descriptor_limit();
        let cases: u64 = if std::env::var_os("STRATAFS_FULL").is_some() { 1500 } else { 25 };
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("image.tar");
        let mut taken_from_below = 0;
        for case in 1..=cases {
            let mut random = Random(case.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let layers: Vec<_> = (0..2 + random.below(4)).map(|n| random.layer(n == 0)).collect();
            write_image(&path, &layers);
            let one = imported(&path, 1);
            let four = imported(&path, 4);
            for (one, four) in one.iter().zip(&four) {
                assert_eq!(one, four, "case {case}");
            }
            assert_eq!(one.len(), four.len(), "case {case}");
            // Each value is set once: twice there, it was taken from below.
            let values: Vec<&str> =
                one.iter().filter_map(|line| line.split_once("[([").map(|(_, x)| x)).collect();
            let distinct: std::collections::BTreeSet<_> = values.iter().collect();
            taken_from_below += values.len() - distinct.len();
        }
        assert!(taken_from_below > 8, "{taken_from_below}: the layers have little in common");
    }
}
