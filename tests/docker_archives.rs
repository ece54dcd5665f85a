//! Images from Docker's archives, made here by hand: the forms that there are, and hostile ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stratafs::{
    ApplyOptions, Digest, Error, ErrorKind, ImageLayout, ImageRecord, ImportOptions, LayerFormat,
    Ownership, RelPath, Store, StoreOptions, ignore_progress, import_image,
};

/// A member of an archive.
enum Member {
    File(Vec<u8>),
    Symlink(&'static str),
    HardLink(String),
}
use Member::{File, HardLink, Symlink};

type Members = Vec<(String, Member)>;

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

    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }

    fn import(
        &self,
        archive: &Path,
        edit: impl Fn(&mut ImportOptions),
    ) -> Result<ImageRecord, Error> {
        let mut options = ImportOptions::new();
        options.apply = ApplyOptions::default();
        options.apply.ownership = Ownership::Ignore;
        edit(&mut options);
        let layout = ImageLayout::open(archive)?;
        import_image(&self.store, &layout, "image", &options, &mut ignore_progress)
    }

    fn named(&self, archive: &Path, name: &str) -> Result<ImageRecord, Error> {
        self.import(archive, |options| options.select.name = Some(name.to_owned()))
    }

    /// Whether the image has the file.
    fn has(&self, image: &ImageRecord, path: &str) -> bool {
        let path = RelPath::new(path).unwrap();
        self.store.provenance(image.layers.last().unwrap(), &path).unwrap().is_some()
    }

    #[track_caller]
    fn refused(&self, result: Result<ImageRecord, Error>, kind: ErrorKind, why: &str) {
        let e = result.unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(why), "{why}: {e}");
        for dir in ["snapshots", "staging", "trash", "blobs/sha256"] {
            let left = fs::read_dir(self.path("store").join(dir)).unwrap().count();
            assert_eq!(left, 0, "{e} left something in {dir}");
        }
    }
}

fn write_tar(path: &Path, members: &Members) {
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, member) in members {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(0);
        match member {
            File(bytes) => {
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, name, &bytes[..]).unwrap();
            }
            Symlink(to) => {
                header.set_entry_type(tar::EntryType::Symlink);
                tar.append_link(&mut header, name, to).unwrap();
            }
            HardLink(to) => {
                header.set_entry_type(tar::EntryType::Link);
                tar.append_link(&mut header, name, to).unwrap();
            }
        }
    }
    tar.finish().unwrap();
}

fn write_directory(path: &Path, members: &Members) {
    for (name, member) in members {
        let at = path.join(name);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        match member {
            File(bytes) => fs::write(at, bytes).unwrap(),
            Symlink(to) => symlink(to, at).unwrap(),
            HardLink(to) => fs::hard_link(path.join(to), at).unwrap(),
        }
    }
}

/// A layer archive with one file of that name.
fn layer(name: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, &b"x"[..]).unwrap();
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
    json!({
        "architecture": "s390x", "os": "linux", "config": { "Env": ["A=B"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string()
    .into_bytes()
}

fn manifest(images: &[(&str, &[&str], &[&str])]) -> (String, Member) {
    let images: Vec<Value> = images
        .iter()
        .map(|(config, tags, layers)| json!({ "Config": config, "RepoTags": tags, "Layers": layers }))
        .collect();
    ("manifest.json".to_owned(), File(Value::from(images).to_string().into_bytes()))
}

/// Two images, the first with a layer that it shares with the second by a link, as Docker 1.10 to 24
/// wrote them.
fn classic() -> Members {
    let (base, top) = (layer("base"), layer("top"));
    vec![
        ("aaa/".to_owned() + "VERSION", File(b"1.0".to_vec())),
        ("aaa/layer.tar".to_owned(), File(base.clone())),
        ("bbb/layer.tar".to_owned(), Symlink("../aaa/layer.tar")),
        ("ccc/layer.tar".to_owned(), File(top.clone())),
        ("one.json".to_owned(), File(config(std::slice::from_ref(&base)))),
        ("two.json".to_owned(), File(config(&[base, top]))),
        ("repositories".to_owned(), File(b"{ not even JSON".to_vec())),
        manifest(&[
            ("one.json", &["one:latest", "uno:1"], &["aaa/layer.tar"]),
            ("two.json", &["two:latest"], &["bbb/layer.tar", "ccc/layer.tar"]),
        ]),
    ]
}

#[test]
fn images_are_chosen_by_tag_from_tar_files_and_directories() {
    let f = Fixture::new();
    write_tar(&f.path("a.tar"), &classic());
    write_directory(&f.path("dir"), &classic());
    for archive in [f.path("a.tar"), f.path("dir")] {
        let names = ImageLayout::open(&archive).unwrap().names().unwrap();
        assert_eq!(names, ["one:latest", "two:latest", "uno:1"]);
        let two = f.named(&archive, "two:latest").unwrap();
        assert!(f.has(&two, "base") && f.has(&two, "top"));
        let one = f.named(&archive, "uno:1").unwrap();
        assert!(f.has(&one, "base") && !f.has(&one, "top"));
        assert_eq!(one.layers[0], two.layers[0]);
        assert_eq!(f.store.blob(&one.config).unwrap(), config(&[layer("base")]), "byte for byte");
        let manifest: Value =
            serde_json::from_slice(&f.store.blob(&one.manifest).unwrap()).unwrap();
        assert_eq!(manifest["config"]["digest"], one.config.to_string());
        assert_eq!(manifest["layers"][0]["digest"], Digest::of(&layer("base")).to_string());
        f.store.remove_image("image").unwrap();
        f.store.gc(&mut ignore_progress).unwrap();
        let e = f.import(&archive, |_| ()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArgument);
        assert!(e.to_string().contains("\"one:latest\", \"two:latest\""), "{e}");
        f.refused(
            f.named(&archive, "three"),
            ErrorKind::NotFound,
            "\"one:latest\", \"two:latest\"",
        );
    }
}

#[test]
fn an_image_without_tags_is_known_by_its_id() {
    let f = Fixture::new();
    let archive = f.path("a.tar");
    let layers = [layer("a")];
    let id = Digest::of(&config(&layers));
    let json = format!("{}.json", id.hex());
    let mut members = vec![
        (json.clone(), File(config(&layers))),
        ("other.json".to_owned(), File(config(&[]))),
        ("l.tar".to_owned(), File(layers[0].clone())),
        manifest(&[(&json, &[], &["l.tar"]), ("other.json", &["other"], &[])]),
    ];
    write_tar(&archive, &members);
    assert!(f.has(&f.named(&archive, &id.to_string()).unwrap(), "a"));
    f.store.remove_image("image").unwrap();
    members[0].1 = File([config(&layers), b" ".to_vec()].concat());
    write_tar(&archive, &members);
    f.refused(f.named(&archive, &id.to_string()), ErrorKind::DigestMismatch, &id.hex());
}

#[test]
fn compressed_layers_are_taken_in_too() {
    let f = Fixture::new();
    let archive = f.path("a.tar");
    let layers = [layer("a"), layer("b")];
    // As `crane` names them.
    write_tar(
        &archive,
        &vec![
            manifest(&[("sha256:c", &[], &["x.tar.gz", "y.tar"])]),
            ("y.tar".to_owned(), File(layers[1].clone())),
            ("x.tar.gz".to_owned(), File(gzip(&layers[0]))),
            ("sha256:c".to_owned(), File(config(&layers))),
        ],
    );
    let image = f.import(&archive, |_| ()).unwrap();
    assert!(f.has(&image, "a") && f.has(&image, "b"));
    let manifest: Value = serde_json::from_slice(&f.store.blob(&image.manifest).unwrap()).unwrap();
    assert_eq!(manifest["layers"][0]["digest"], Digest::of(&gzip(&layers[0])).to_string());
    assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
    // And all of it compressed, from a stream.
    let packed = gzip(&fs::read(&archive).unwrap());
    let layout =
        ImageLayout::spool(&packed[..], f.tmp.path(), 1 << 20, &mut ignore_progress).unwrap();
    assert_eq!(layout.image(&Default::default()).unwrap().digest(), image.manifest);
}

#[test]
fn an_oci_index_beside_says_more() {
    let f = Fixture::new();
    let base = layer("base");
    let config = config(std::slice::from_ref(&base));
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    let describe = |kind: &str, bytes: &[u8]| {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": Digest::of(bytes).to_string(), "size": bytes.len(),
        })
    };
    let own = json!({
        "schemaVersion": 2, "config": describe("config.v1+json", &config),
        "layers": [describe("layer.v1.tar", &base)],
    })
    .to_string()
    .into_bytes();
    let index = json!({ "schemaVersion": 2, "manifests": [describe("manifest.v1+json", &own)] });
    let members = vec![
        (blob(&base), File(base.clone())),
        (blob(&config), File(config.clone())),
        (blob(&own), File(own.clone())),
        ("index.json".to_owned(), File(index.to_string().into_bytes())),
        ("oci-layout".to_owned(), File(br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())),
        manifest(&[(&blob(&config), &["x"], &[&blob(&base)])]),
    ];
    write_tar(&f.path("a.tar"), &members);
    write_directory(&f.path("dir"), &members);
    for archive in [f.path("a.tar"), f.path("dir")] {
        assert_eq!(f.import(&archive, |_| ()).unwrap().manifest, Digest::of(&own));
    }
    // Without it, the files under the same names.
    let classic = members.into_iter().filter(|(name, _)| !name.ends_with("oci-layout")).collect();
    write_tar(&f.path("b.tar"), &classic);
    let image = f.named(&f.path("b.tar"), "x").unwrap();
    assert_ne!(image.manifest, Digest::of(&own));
    assert_eq!(image.config, Digest::of(&config));
}

#[test]
fn the_platform_is_the_configurations() {
    let f = Fixture::new();
    write_tar(&f.path("a.tar"), &classic());
    let import = |platform: &str| {
        f.import(&f.path("a.tar"), |options| {
            options.select.name = Some("uno:1".to_owned());
            options.select.platform = Some(platform.parse().unwrap());
        })
    };
    f.refused(import("linux/amd64"), ErrorKind::NotFound, "linux/s390x");
    assert!(f.has(&import("linux/s390x").unwrap(), "base"));
}

/// An archive of one image with one layer, `layer.tar`, which is what `members` say.
fn with_layer(members: Vec<(&str, Member)>) -> Members {
    let mut all: Members = members.into_iter().map(|(n, m)| (n.to_owned(), m)).collect();
    all.push(("config.json".to_owned(), File(config(&[layer("a")]))));
    all.push(manifest(&[("config.json", &["x"], &["d/layer.tar"])]));
    all
}

#[test]
fn links_are_followed_inside_and_not_for_ever() {
    let f = Fixture::new();
    let tar = f.path("a.tar");
    let file = || File(layer("a"));
    write_tar(
        &tar,
        &with_layer(vec![("x.tar", file()), ("d/layer.tar", HardLink("x.tar".into()))]),
    );
    assert!(f.has(&f.import(&tar, |_| ()).unwrap(), "a"));
    f.store.remove_image("image").unwrap();
    let chain = || {
        with_layer(vec![
            ("e/two.tar", Symlink("./..//x.tar")),
            ("d/layer.tar", Symlink("../e/two.tar")),
            ("x.tar", File(layer("a"))),
        ])
    };
    write_tar(&tar, &chain());
    write_directory(&f.path("chain"), &chain());
    for archive in [&tar, &f.path("chain")] {
        assert!(f.has(&f.import(archive, |_| ()).unwrap(), "a"));
        f.store.remove_image("image").unwrap();
    }
    fs::write(f.path("outside.tar"), layer("a")).unwrap();
    fs::create_dir(f.path("outside")).unwrap();
    fs::write(f.path("outside/layer.tar"), layer("a")).unwrap();
    let loops: &[(&str, &str)] = &[("d/layer.tar", "../d/layer.tar")];
    let out: &[(&str, &str)] = &[("d/layer.tar", "../../outside.tar")];
    let absolute: &[(&str, &str)] = &[("d/layer.tar", "/x.tar")];
    let nowhere: &[(&str, &str)] = &[("d/layer.tar", "gone.tar")];
    for (n, (links, kind, why)) in [
        (loops, ErrorKind::InvalidImage, "links in a row"),
        (out, ErrorKind::InvalidImage, "leads out"),
        (absolute, ErrorKind::InvalidImage, "leads out"),
        (nowhere, ErrorKind::NotFound, "\"d/gone.tar\", which \"d/layer.tar\" is a link to,"),
    ]
    .into_iter()
    .enumerate()
    {
        let members = || with_layer(links.iter().map(|(name, to)| (*name, Symlink(to))).collect());
        write_tar(&tar, &members());
        f.refused(f.import(&tar, |_| ()), kind, why);
        let dir = f.path(&format!("dir-{n}"));
        write_directory(&dir, &members());
        f.refused(f.import(&dir, |_| ()), kind, why);
    }
    // A directory on the way that is a link out of the archive.
    let dir = f.path("way-out");
    write_directory(&dir, &with_layer(vec![("d", Symlink("../outside"))]));
    f.refused(f.import(&dir, |_| ()), ErrorKind::NotFound, "d/layer.tar");
}

#[test]
fn damaged_and_ambiguous_archives_are_refused_and_leave_nothing() {
    let f = Fixture::new();
    let tar = f.path("a.tar");
    let check = |members: Members, kind: ErrorKind, why: &str| {
        write_tar(&tar, &members);
        f.refused(f.import(&tar, |_| ()), kind, why);
    };
    let file = |bytes: &[u8]| File(bytes.to_vec());
    check(with_layer(vec![]), ErrorKind::NotFound, "\"d/layer.tar\" is missing");
    let twice = vec![("d/layer.tar", file(&layer("a"))), ("./d/layer.tar", file(&layer("b")))];
    check(with_layer(twice), ErrorKind::InvalidImage, "comes twice");
    let other = Digest::of(&layer("a")).hex();
    check(with_layer(vec![("d/layer.tar", file(&layer("b")))]), ErrorKind::DigestMismatch, &other);
    let packed = gzip(&layer("b"));
    check(with_layer(vec![("d/layer.tar", file(&packed))]), ErrorKind::DigestMismatch, &other);
    let cut = &gzip(&layer("a"))[..40];
    check(with_layer(vec![("d/layer.tar", file(cut))]), ErrorKind::InvalidArchive, "");
    let mut fewer = with_layer(vec![("d/layer.tar", file(&layer("a")))]);
    fewer[1].1 = File(config(&[]));
    check(fewer, ErrorKind::InvalidImage, "0 diff ids");
    let mut bad = with_layer(vec![("d/layer.tar", file(&layer("a")))]);
    bad[1].1 = File(b"{}".to_vec());
    check(bad, ErrorKind::InvalidImage, "configuration");
    let empty = vec![("manifest.json".to_owned(), file(b"[]"))];
    check(empty, ErrorKind::NotFound, "no image");
    let out = vec![manifest(&[("../config.json", &[], &[])])];
    check(out, ErrorKind::InvalidImage, "../config.json");
    let mut same = with_layer(vec![("d/layer.tar", file(&layer("a")))]);
    same.push(("other.json".to_owned(), File(config(&[]))));
    same[2] = manifest(&[("config.json", &["x"], &["d/layer.tar"]), ("other.json", &["x"], &[])]);
    write_tar(&tar, &same);
    f.refused(f.named(&tar, "x"), ErrorKind::InvalidImage, "several images are named \"x\"");
}
