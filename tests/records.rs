//! Layers that came from archives go out as those archives, byte for byte: what the store keeps for
//! that, when it does not, and that it notices damage.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::path::PathBuf;

use stratafs::{
    ApplyOptions, ArchiveForm, CommitOptions, Compression, DiffId, Digest, Error, ErrorKind,
    ExportOptions, Exported, ImageLayout, ImportOptions, Labels, LayerFormat, LayoutWriter,
    RecordState, SaveOptions, Store, StoreOptions, ignore_progress, import_image, save_image,
};

struct Fixture {
    tmp: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut options = StoreOptions::new();
        options.format = Some(LayerFormat::OverlayUser);
        let store = Store::open(tmp.path().join("store"), options).unwrap();
        Fixture { tmp, store }
    }

    fn apply_with(&self, name: &str, parent: Option<&str>, tar: &[u8], options: &ApplyOptions) {
        let mut input = tar;
        self.store
            .apply(name, parent, &mut input, options, Labels::new(), &mut ignore_progress)
            .unwrap();
    }

    fn apply(&self, name: &str, parent: Option<&str>, tar: &[u8]) {
        self.apply_with(name, parent, tar, &ApplyOptions::unprivileged());
    }

    fn export_as(&self, name: &str, how: &ExportOptions) -> Result<(Vec<u8>, Exported), Error> {
        let mut out = Vec::new();
        let exported = self.store.export(name, &mut out, how, &mut ignore_progress)?;
        assert_eq!(exported.diff_id, DiffId::from(Digest::of(&out)));
        assert_eq!(exported.bytes, out.len() as u64);
        Ok((out, exported))
    }

    fn export(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.export_as(name, &ExportOptions::new()).map(|(bytes, _)| bytes)
    }

    fn canonical(&self, name: &str) -> Vec<u8> {
        let mut how = ExportOptions::new();
        how.form = ArchiveForm::Canonical;
        let (bytes, exported) = self.export_as(name, &how).unwrap();
        assert_eq!(exported.form, ArchiveForm::Canonical);
        bytes
    }

    /// The only snapshot's directory.
    fn snapshot(&self) -> PathBuf {
        let mut entries = fs::read_dir(self.tmp.path().join("store/snapshots")).unwrap();
        entries.next().unwrap().unwrap().path()
    }

    fn problems(&self) -> String {
        format!("{:?}", self.store.check(&mut ignore_progress).unwrap().problems)
    }
}

/// An archive in no order, with a path twice, a whiteout, and no end: not what is packed here.
fn odd(salt: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, text: &str| {
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o755);
        header.set_mtime(1_700_000_000);
        if name.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        tar.append_data(&mut header, name, text.as_bytes()).unwrap();
    };
    add("z", "last first");
    add("dir/file", "text that is replaced");
    add("dir/.wh.other", "");
    add("dir/", "");
    add("dir/file", salt);
    let mut bytes = tar.into_inner().unwrap();
    bytes.truncate(bytes.len() - 1024);
    bytes
}

#[test]
fn a_layer_goes_out_as_it_came_in_unless_another_form_is_asked_for() {
    let f = Fixture::new();
    let tar = odd("1");
    f.apply("base", None, &tar);
    assert_eq!(f.store.stat("base").unwrap().record, RecordState::Kept);
    let (bytes, exported) = f.export_as("base", &ExportOptions::new()).unwrap();
    assert!(bytes == tar);
    assert_eq!((exported.form, exported.entries), (ArchiveForm::AsImported, 5));
    let canonical = f.canonical("base");
    assert!(canonical != tar);
    let mut how = ExportOptions::new();
    how.source_date_epoch = Some(0);
    assert_eq!(f.export_as("base", &how).unwrap().1.form, ArchiveForm::Canonical);

    f.store.prepare("work", Some("base"), Labels::new()).unwrap();
    f.store.commit("mine", "work", CommitOptions::new()).unwrap();
    assert_eq!(f.store.stat("mine").unwrap().record, RecordState::NotImported);
    assert!(f.export("mine").unwrap() == f.canonical("mine"));
    let report = f.store.check(&mut ignore_progress).unwrap();
    assert_eq!((report.problems, report.records), (Vec::new(), 1));
}

#[test]
fn beyond_a_bound_the_canonical_form_goes_out_and_stat_says_why() {
    let f = Fixture::new();
    let mut options = ApplyOptions::unprivileged();
    options.record.max_inline_bytes = 20;
    f.apply_with("base", None, &odd("1"), &options);
    let RecordState::Missing(reason) = f.store.stat("base").unwrap().record else {
        panic!("there is a record");
    };
    assert!(reason.contains("max_inline_bytes"), "{reason}");
    assert!(!f.snapshot().join("record").exists());
    assert!(f.export("base").unwrap() == f.canonical("base"));
    assert_eq!(f.problems(), "[]");
}

#[test]
fn layers_of_one_digest_do_not_depend_on_each_other() {
    let f = Fixture::new();
    let tar = odd("1");
    f.apply("one", None, &tar);
    f.apply("base", None, &odd("2"));
    f.apply("two", Some("base"), &tar);
    f.store.remove("one").unwrap();
    assert!(f.export("two").unwrap() == tar);
    f.store.remove("two").unwrap();
    f.store.remove("base").unwrap();
    f.store.gc(&mut ignore_progress).unwrap();
    for dir in ["snapshots", "staging", "trash"] {
        let left = fs::read_dir(f.tmp.path().join("store").join(dir)).unwrap().count();
        assert_eq!(left, 0, "{dir}");
    }
}

#[test]
fn an_apply_that_fails_leaves_no_record() {
    let f = Fixture::new();
    let tar = odd("1");
    let mut input = &tar[..tar.len() - 700];
    let options = ApplyOptions::unprivileged();
    f.store
        .apply("base", None, &mut input, &options, Labels::new(), &mut ignore_progress)
        .unwrap_err();
    for dir in ["snapshots", "staging"] {
        assert_eq!(fs::read_dir(f.tmp.path().join("store").join(dir)).unwrap().count(), 0);
    }
}

#[test]
fn a_changed_layer_or_record_is_found_by_export_and_check() {
    type Change<'a> = (&'a str, ErrorKind, &'a dyn Fn(PathBuf));
    let changes: [Change<'_>; 4] = [
        ("dir/file", ErrorKind::DigestMismatch, &|p| {
            fs::write(p.join("fs/dir/file"), "2").unwrap()
        }),
        ("dir/file", ErrorKind::DigestMismatch, &|p| {
            fs::remove_file(p.join("fs/dir/file")).unwrap();
        }),
        ("record", ErrorKind::Corrupt, &|p| fs::remove_file(p.join("record")).unwrap()),
        ("record", ErrorKind::Corrupt, &|p| {
            let whole = fs::read(p.join("record")).unwrap();
            fs::write(p.join("record"), &whole[..whole.len() - 1]).unwrap();
        }),
    ];
    for (naming, kind, change) in changes {
        let f = Fixture::new();
        f.apply("base", None, &odd("1"));
        change(f.snapshot());
        let e = f.export("base").unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        let text = e.to_string();
        assert!(text.contains(naming) && text.contains("canonical"), "{text}");
        let problems = f.problems();
        assert!(problems.contains("base") && problems.contains(naming), "{problems}");
        f.canonical("base");
    }
}

#[test]
fn an_image_saved_unchanged_keeps_its_configuration_and_the_digests_of_its_layers() {
    let f = Fixture::new();
    let (base, top) = (odd("1"), odd("2"));
    let mut layout = LayoutWriter::to_tar_file(f.tmp.path().join("in.tar"), f.tmp.path()).unwrap();
    let mut descriptors = Vec::new();
    for layer in [&base, &top] {
        let mut blob = layout.blob().unwrap();
        std::io::Write::write_all(&mut blob, layer).unwrap();
        let (digest, size) = blob.finish().unwrap();
        descriptors.push(serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": digest.to_string(),
            "size": size,
        }));
    }
    // Spaces and an order of its own, which nobody would write again.
    let config = format!(
        "{{ \"os\": \"linux\", \"architecture\": \"amd64\",\n \"rootfs\": {{ \"diff_ids\": [\"{}\", \
         \"{}\"], \"type\": \"layers\" }} }}",
        Digest::of(&base),
        Digest::of(&top),
    )
    .into_bytes();
    let mut blob = layout.blob().unwrap();
    std::io::Write::write_all(&mut blob, &config).unwrap();
    blob.finish().unwrap();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(&config).to_string(),
            "size": config.len(),
        },
        "layers": descriptors,
    });
    layout.add_image(manifest.to_string().as_bytes(), &config, Some("in")).unwrap();
    layout.finish(&mut ignore_progress).unwrap();

    let layout = ImageLayout::open(f.tmp.path().join("in.tar")).unwrap();
    let mut options = ImportOptions::new();
    options.apply = ApplyOptions::unprivileged();
    import_image(&f.store, &layout, "in", &options, &mut ignore_progress).unwrap();
    for compression in [Compression::None, Compression::Gzip] {
        let out = LayoutWriter::to_directory(f.tmp.path().join(compression.as_str())).unwrap();
        let mut how = SaveOptions::new();
        how.compression = Some(compression);
        let saved = save_image(&f.store, "in", out, &how, &mut ignore_progress).unwrap();
        let expected = [&base, &top].map(|layer| DiffId::from(Digest::of(layer)));
        assert_eq!(saved.diff_ids, expected, "{compression}");
        assert_eq!(saved.config, Digest::of(&config), "{compression}");
    }
    // A layer more, and all of the configuration is carried on.
    let top = f.store.image("in").unwrap().layers.pop().unwrap();
    f.store.prepare("work", Some(&top), Labels::new()).unwrap();
    f.store.commit("mine", "work", CommitOptions::new()).unwrap();
    let out = LayoutWriter::to_directory(f.tmp.path().join("mine")).unwrap();
    let saved = save_image(&f.store, "mine", out, &SaveOptions::new(), &mut ignore_progress);
    assert_eq!(saved.unwrap().diff_ids.len(), 3);
}
