//! Images in and out of a store: what is shared, what is refused, and that a refusal leaves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stratafs::{
    ApplyOptions, CommitOptions, Compression, Digest, Error, ErrorKind, ImageLayout, ImageRecord,
    ImportOptions, Labels, LayerFormat, LayoutWriter, Ownership, SaveOptions, Store, StoreOptions,
    ignore_progress, import_image, save_image,
};

struct Fixture {
    tmp: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let store = store(&tmp.path().join("store"));
        Fixture { tmp, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }

    fn import(&self, layout: &Path, name: &str) -> Result<(), Error> {
        let layout = ImageLayout::open(layout)?;
        import_image(&self.store, &layout, name, &options(), &mut ignore_progress).map(drop)
    }

    fn is_empty(&self) -> bool {
        let mut snapshots = 0;
        self.store
            .walk(&[], &mut |_| {
                snapshots += 1;
                Ok(())
            })
            .unwrap();
        let leftovers = ["snapshots", "staging", "trash", "blobs/sha256"]
            .iter()
            .map(|dir| fs::read_dir(self.path("store").join(dir)).unwrap().count())
            .sum::<usize>();
        snapshots == 0 && leftovers == 0 && self.store.images().unwrap().is_empty()
    }
}

fn store(root: &Path) -> Store {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    Store::open(root, options).unwrap()
}

/// As an ordinary user too.
fn options() -> ImportOptions {
    let mut options = ImportOptions::new();
    options.apply = ApplyOptions::default();
    options.apply.ownership = Ownership::Ignore;
    options
}

/// A layer archive with these files; a name that ends in a slash is a directory.
fn layer(files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o755);
        if name.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        tar.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Writes a layout by hand, whose manifest and configuration `edit` may have made contradictory.
fn image(path: &Path, layers: &[Vec<u8>], edit: impl FnOnce(&mut Value, &mut Value)) {
    let mut files = vec![("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())];
    let mut add = |kind: &str, bytes: &[u8]| -> Value {
        let digest = Digest::of(bytes);
        files.push((format!("blobs/sha256/{}", digest.hex()), bytes.to_vec()));
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": digest.to_string(),
            "size": bytes.len(),
        })
    };
    let descriptors: Vec<Value> = layers.iter().map(|layer| add("layer.v1.tar", layer)).collect();
    let diff_ids: Vec<String> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
    let mut config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": ["A=B"], "X-unknown": 1 },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "layers": descriptors,
    });
    edit(&mut manifest, &mut config);
    manifest["config"] = add("config.v1+json", config.to_string().as_bytes());
    let manifest = add("manifest.v1+json", manifest.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    files.push(("index.json".to_owned(), index.to_string().into_bytes()));
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    tar.finish().unwrap();
}

/// How often the import reports: that it unpacks.
fn reports(f: &Fixture, layout: &Path, name: &str) -> (Error, u32) {
    let layout = ImageLayout::open(layout).unwrap();
    let mut reports = 0;
    let imported = import_image(&f.store, &layout, name, &options(), &mut |_| {
        reports += 1;
        ControlFlow::Continue(())
    });
    (imported.unwrap_err(), reports)
}

fn plain(path: &Path, layers: &[Vec<u8>]) {
    image(path, layers, |_, _| ());
}

#[track_caller]
fn refused(f: &Fixture, result: Result<(), Error>, kinds: &[ErrorKind], naming: &str) {
    let e = result.unwrap_err();
    assert!(kinds.contains(&e.kind()), "{:?}: {e}", e.kind());
    assert!(e.to_string().contains(naming), "{naming}: {e}");
    assert!(f.is_empty(), "{e} left something");
}

#[test]
fn images_share_the_layers_that_they_have_in_common() {
    let f = Fixture::new();
    let (base, one, two) =
        (layer(&[("etc/", ""), ("etc/a", "1")]), layer(&[("one", "1")]), layer(&[("two", "2")]));
    plain(&f.path("one.tar"), &[base.clone(), one]);
    plain(&f.path("two.tar"), &[base, two]);
    f.import(&f.path("one.tar"), "one").unwrap();
    f.import(&f.path("two.tar"), "two").unwrap();
    let (one, two) = (f.store.image("one").unwrap(), f.store.image("two").unwrap());
    assert_eq!(one.layers[0], two.layers[0]);
    assert_ne!(one.layers[1], two.layers[1]);
    f.import(&f.path("one.tar"), "one").unwrap();
    assert_eq!(f.store.image("one").unwrap().layers, one.layers, "importing again is no change");
    assert_eq!(f.store.remove_image("one").unwrap(), [one.layers[1].clone()]);
    assert_eq!(f.store.remove_image("two").unwrap().len(), 2);
    assert!(f.is_empty());
}

#[test]
fn what_is_saved_is_imported_again_with_the_same_tree_and_configuration() {
    let f = Fixture::new();
    plain(
        &f.path("in.tar"),
        &[layer(&[("d/", ""), ("d/a", "1"), ("d/b", "2")]), layer(&[("d/.wh.a", ""), ("c", "3")])],
    );
    f.import(&f.path("in.tar"), "in").unwrap();
    let top = f.store.image("in").unwrap().layers.pop().unwrap();
    f.store.prepare("key", Some(&top), Labels::new()).unwrap();
    f.store.commit("mine", "key", CommitOptions::new()).unwrap();
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let mut saved = Vec::new();
        for round in ["first", "second"] {
            let path = f.path(&format!("{compression}-{round}.tar"));
            let out = LayoutWriter::to_tar_file(&path, f.tmp.path()).unwrap();
            let mut how = SaveOptions::new();
            how.compression = Some(compression);
            save_image(&f.store, "mine", out, &how, &mut ignore_progress).unwrap();
            saved.push(fs::read(&path).unwrap());
            let other = store(&f.path(&format!("store-{compression}-{round}")));
            let layout = ImageLayout::open(&path).unwrap();
            let image =
                import_image(&other, &layout, "again", &options(), &mut ignore_progress).unwrap();
            assert_eq!(image.layers.len(), 3);
            let config: Value =
                serde_json::from_slice(&other.blob(&image.config).unwrap()).unwrap();
            assert_eq!(config["config"], json!({ "Env": ["A=B"], "X-unknown": 1 }));
            assert_eq!(config["history"].as_array().unwrap().len(), 3);
            let path = stratafs::RelPath::new("d/a").unwrap();
            assert_eq!(other.provenance(image.layers.last().unwrap(), &path).unwrap(), None);
        }
        assert_eq!(saved[0], saved[1], "{compression}: saving is deterministic");
    }
}

#[test]
fn damaged_images_are_refused_and_leave_nothing() {
    let f = Fixture::new();
    let path = f.path("image.tar");
    let layers = [layer(&[("a", "1")]), layer(&[("b", "2")])];
    use ErrorKind::{DigestMismatch, InvalidArchive, InvalidImage, NotFound, Unsupported};
    let missing = f.import(&f.path("none.tar"), "x");
    refused(&f, missing, &[NotFound], "none.tar");
    image(&path, &layers, |manifest, _| manifest["layers"][1]["size"] = 7.into());
    refused(&f, f.import(&path, "x"), &[DigestMismatch, InvalidImage], "sha256:");
    image(&path, &layers, |manifest, _| {
        manifest["layers"][1]["digest"] = Digest::of(b"other").to_string().into();
    });
    refused(&f, f.import(&path, "x"), &[NotFound, InvalidImage], &Digest::of(b"other").hex());
    image(&path, &layers, |_, config| {
        config["rootfs"]["diff_ids"][1] = Digest::of(b"other").to_string().into();
    });
    refused(&f, f.import(&path, "x"), &[DigestMismatch], &Digest::of(b"other").hex());
    image(&path, &layers, |_, config| {
        config["rootfs"]["diff_ids"].as_array_mut().unwrap().pop();
    });
    refused(&f, f.import(&path, "x"), &[InvalidImage], "diff");
    image(&path, &layers, |manifest, _| {
        manifest["layers"][0]["mediaType"] = "application/x-floppy".into();
    });
    refused(&f, f.import(&path, "x"), &[Unsupported], "x-floppy");
    plain(&path, &[layers[0].clone(), b"no tar at all, but long enough to be looked at".to_vec()]);
    refused(&f, f.import(&path, "x"), &[InvalidArchive], "sha256:");
    plain(&path, &[layers[0].clone(), layers[1][..400].to_vec()]);
    refused(&f, f.import(&path, "x"), &[InvalidArchive], "sha256:");
    plain(&path, &layers);
    let whole = fs::read(&path).unwrap();
    for cut in [100, 1000, whole.len() / 2] {
        fs::write(&path, &whole[..cut]).unwrap();
        let e = f.import(&path, "x").unwrap_err();
        assert!(f.is_empty(), "{e}");
    }
}

#[test]
fn a_stopped_import_leaves_nothing() {
    let f = Fixture::new();
    plain(&f.path("i.tar"), &[layer(&[("a", "1")]), layer(&[("b", "2"), ("c", "3")])]);
    let layout = ImageLayout::open(f.path("i.tar")).unwrap();
    for stop_at in 0..50 {
        let mut calls = 0;
        let result = import_image(&f.store, &layout, "x", &options(), &mut |_| {
            calls += 1;
            if calls > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match result {
            Err(e) => assert_eq!(e.kind(), ErrorKind::Cancelled, "{e}"),
            Ok(_) => {
                assert!(stop_at > 3);
                return;
            }
        }
        assert!(f.is_empty(), "stopped at call {stop_at}");
    }
    panic!("never finished");
}

#[test]
fn what_can_be_known_before_is_refused_before_anything_is_unpacked() {
    let f = Fixture::new();
    let path = f.path("image.tar");
    let layers = [layer(&[("a", "1")]), layer(&[("b", "2")])];
    plain(&path, &layers);
    for name in ["", "a\nb", "../x"] {
        let (e, reports) = reports(&f, &path, name);
        assert_eq!((e.kind(), reports), (ErrorKind::InvalidArgument, 0), "{e}");
    }
    image(&path, &layers, |manifest, _| {
        manifest["layers"][1]["digest"] = Digest::of(b"other").to_string().into();
    });
    let (e, told) = reports(&f, &path, "x");
    assert_eq!((e.kind(), told), (ErrorKind::NotFound, 0), "{e}");
    image(&path, &layers, |manifest, _| manifest["layers"][1]["size"] = 7.into());
    let (e, told) = reports(&f, &path, "x");
    assert_eq!((e.kind(), told), (ErrorKind::DigestMismatch, 0), "{e}");
    assert!(f.is_empty());
}

#[test]
fn an_image_of_more_layers_than_any_mount_takes_is_refused() {
    let f = Fixture::new();
    let path = f.path("image.tar");
    let empty = layer(&[]);
    image(&path, &[empty], |manifest, config| {
        manifest["layers"] = vec![manifest["layers"][0].clone(); 501].into();
        let diff_id = config["rootfs"]["diff_ids"][0].clone();
        config["rootfs"]["diff_ids"] = vec![diff_id; 501].into();
    });
    refused(&f, f.import(&path, "x"), &[ErrorKind::LimitExceeded], "501 layers");
}

#[test]
fn a_configuration_that_could_not_be_saved_again_is_refused() {
    let f = Fixture::new();
    let path = f.path("image.tar");
    let deep = (0..200).fold(Value::Null, |inner, _| json!([inner]));
    image(&path, &[layer(&[("a", "1")])], |_, config| config["deep"] = deep);
    refused(&f, f.import(&path, "x"), &[ErrorKind::InvalidImage], "configuration sha256:");
}

#[test]
fn messages_quote_little_of_an_image_and_nothing_that_a_terminal_obeys() {
    let f = Fixture::new();
    let path = f.path("image.tar");
    let layers = [layer(&[("a", "1")])];
    let hostile = format!("\u{1b}[31m{}", "x".repeat(100_000));
    type Edit<'a> = &'a dyn Fn(&mut Value, &mut Value);
    let edits: [Edit<'_>; 8] = [
        &|m, _| m["layers"][0]["mediaType"] = hostile.as_str().into(),
        &|m, _| m["layers"][0]["digest"] = hostile.as_str().into(),
        &|m, _| m["layers"][0]["digest"] = format!("{}:00", "x".repeat(100_000)).into(),
        &|m, _| m["layers"][0]["size"] = hostile.as_str().into(),
        &|m, _| m["artifactType"] = hostile.as_str().into(),
        &|m, _| m["mediaType"] = hostile.as_str().into(),
        &|_, c| c["rootfs"]["type"] = hostile.as_str().into(),
        &|_, c| c["rootfs"]["diff_ids"][0] = hostile.as_str().into(),
    ];
    for (n, edit) in edits.into_iter().enumerate() {
        image(&path, &layers, edit);
        let e = f.import(&path, "x").unwrap_err().to_string();
        assert!(!e.contains(char::is_control), "{n}: {e:?}");
        assert!(e.len() < 2000, "{n}: {} bytes", e.len());
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    // By another program than ours, in effect: another level.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// An image of compressed layers, which packed anew would be other bytes.
fn packed(path: &Path, layers: &[Vec<u8>]) {
    let blobs: Vec<_> = layers.iter().map(|layer| gzip(layer)).collect();
    image(path, &blobs, |manifest, config| {
        for (n, layer) in layers.iter().enumerate() {
            manifest["layers"][n]["annotations"] = json!({ "kept": "too" });
            config["rootfs"]["diff_ids"][n] = Digest::of(layer).to_string().into();
        }
        config["history"] = json!([{ "odd": 1e-7 }]);
    });
}

impl Fixture {
    fn keeping(&self, layout: &Path, name: &str) -> Result<ImageRecord, Error> {
        let mut options = options();
        options.keep_blobs = true;
        let layout = ImageLayout::open(layout)?;
        import_image(&self.store, &layout, name, &options, &mut ignore_progress)
    }

    fn saved(&self, name: &str, compression: Option<Compression>) -> Digest {
        let path = self.path("saved.tar");
        let out = LayoutWriter::to_tar_file(&path, self.tmp.path()).unwrap();
        let mut how = SaveOptions::new();
        how.compression = compression;
        let saved = save_image(&self.store, name, out, &how, &mut ignore_progress).unwrap();
        let layout = ImageLayout::open(&path).unwrap();
        assert_eq!(layout.image(&Default::default()).unwrap().digest(), saved.manifest);
        saved.manifest
    }

    fn blobs(&self) -> usize {
        fs::read_dir(self.path("store/blobs/sha256")).unwrap().count()
    }
}

#[test]
fn an_image_with_its_blobs_kept_is_saved_as_it_came() {
    let f = Fixture::new();
    let layers = [layer(&[("d/", ""), ("d/a", "1")]), layer(&[("b", "2")]), layer(&[("c", "3")])];
    packed(&f.path("i.tar"), &layers);
    let image = f.keeping(&f.path("i.tar"), "i").unwrap();
    assert_eq!(f.blobs(), 5);
    assert_eq!(f.saved("i", None), image.manifest);
    assert_eq!(f.saved(image.layers.last().unwrap(), None), image.manifest, "by its top layer");
    assert_ne!(f.saved("i", Some(Compression::Gzip)), image.manifest);
    let other = store(&f.path("other"));
    let layout = ImageLayout::open(f.path("saved.tar")).unwrap();
    import_image(&other, &layout, "again", &options(), &mut ignore_progress).unwrap();
    // What is built on it is another image.
    f.store.prepare("key", image.layers.last().map(String::as_str), Labels::new()).unwrap();
    f.store.commit("mine", "key", CommitOptions::new()).unwrap();
    assert_ne!(f.saved("mine", None), image.manifest);
    f.store.remove("mine").unwrap();
    assert_eq!(f.store.check(&mut ignore_progress).unwrap().layer_blobs, 3);
    assert_eq!(f.store.gc(&mut ignore_progress).unwrap().blobs, 0);
    f.store.remove_image("i").unwrap();
    assert!(f.is_empty());
}

#[test]
fn blobs_that_another_image_names_outlive_the_one_they_came_with() {
    let f = Fixture::new();
    let (base, one, two) = (layer(&[("a", "1")]), layer(&[("b", "2")]), layer(&[("c", "3")]));
    packed(&f.path("one.tar"), &[base.clone(), one]);
    packed(&f.path("two.tar"), &[base, two]);
    let one = f.keeping(&f.path("one.tar"), "one").unwrap();
    let two = f.keeping(&f.path("two.tar"), "two").unwrap();
    assert_eq!(f.blobs(), 7);
    f.store.remove_image("one").unwrap();
    assert_eq!(f.blobs(), 4);
    assert_eq!(f.saved("two", None), two.manifest);
    // Replaced by an image without the layer.
    f.keeping(&f.path("one.tar"), "two").unwrap();
    assert_eq!(f.saved("two", None), one.manifest);
    assert_eq!(f.blobs(), 4);
}

#[test]
fn blobs_of_layers_that_are_there_are_kept_without_unpacking_if_they_are_right() {
    let f = Fixture::new();
    let layers = [layer(&[("a", "1")]), layer(&[("b", "2")])];
    packed(&f.path("i.tar"), &layers);
    f.import(&f.path("i.tar"), "i").unwrap();
    assert_eq!(f.blobs(), 2);
    let before = f.saved("i", None);
    let image = f.keeping(&f.path("i.tar"), "i").unwrap();
    assert_eq!((f.blobs(), f.saved("i", None)), (4, image.manifest));
    assert_ne!(before, image.manifest);
    // A blob that was damaged on disk is found, and replaced by importing again.
    let blob = f.path("store/blobs/sha256").join(Digest::of(&gzip(&layers[1])).hex());
    fs::write(&blob, b"damaged").unwrap();
    let problems = f.store.check(&mut ignore_progress).unwrap().problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].what.contains("import its image again"), "{}", problems[0].what);
    let out = LayoutWriter::to_directory(f.path("out")).unwrap();
    let e = save_image(&f.store, "i", out, &SaveOptions::new(), &mut ignore_progress).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::DigestMismatch, "{e}");
    assert!(!f.path("out").exists());
    f.keeping(&f.path("i.tar"), "i").unwrap();
    assert!(f.store.check(&mut ignore_progress).unwrap().problems.is_empty());
    // One that does not give the layer is refused, though nothing is to be unpacked.
    image_of_wrong_blob(&f.path("wrong.tar"), &layers);
    let e = f.keeping(&f.path("wrong.tar"), "wrong").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::DigestMismatch, "{e}");
    assert_eq!(f.blobs(), 4);
}

/// An image with the diff ids of `layers`, and a blob that is another layer.
fn image_of_wrong_blob(path: &Path, layers: &[Vec<u8>]) {
    let blobs = [gzip(&layers[0]), gzip(&layer(&[("evil", "x")]))];
    image(path, &blobs, |_, config| {
        for (n, layer) in layers.iter().enumerate() {
            config["rootfs"]["diff_ids"][n] = Digest::of(layer).to_string().into();
        }
    });
}

#[test]
fn an_import_that_keeps_blobs_and_fails_keeps_none() {
    let f = Fixture::new();
    let layers = [layer(&[("a", "1")]), layer(&[("b", "2")]), layer(&[("c", "3")])];
    image_of_wrong_blob(&f.path("wrong.tar"), &layers[..2]);
    let failed = f.keeping(&f.path("wrong.tar"), "x").map(drop);
    refused(&f, failed, &[ErrorKind::DigestMismatch], "sha256:");
    packed(&f.path("i.tar"), &layers);
    let layout = ImageLayout::open(f.path("i.tar")).unwrap();
    let mut options = options();
    options.keep_blobs = true;
    for threads in [1, 3] {
        options.threads = std::num::NonZeroUsize::new(threads);
        for stop_at in 0..4 {
            let mut calls = 0;
            let result = import_image(&f.store, &layout, "x", &options, &mut |_| {
                calls += 1;
                if calls > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
            assert!(f.is_empty(), "{threads} threads, stopped at call {stop_at}");
        }
    }
}

#[test]
fn what_is_no_image_cannot_be_saved() {
    let f = Fixture::new();
    f.store.prepare("active", None, Labels::new()).unwrap();
    let fails = |name: &str, kind: ErrorKind| {
        let out = LayoutWriter::to_directory(f.path("out")).unwrap();
        let result = save_image(&f.store, name, out, &SaveOptions::new(), &mut ignore_progress);
        let e = result.unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(name), "{e}");
        assert!(!f.path("out").exists());
    };
    fails("active", ErrorKind::FailedPrecondition);
    fails("none", ErrorKind::NotFound);
}
