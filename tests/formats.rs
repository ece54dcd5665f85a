//! Stores of every format that was ever released open for ever; those of formats to come, and those
//! that this process cannot read, are refused with the reason.
//!
//! `tests/fixtures/store-v1.tar` is what `cargo test --test formats -- --make-fixture` wrote with the
//! first version. It is never made anew: a new format gets a fixture of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod imported;
    pub mod model;
    pub mod script;
    pub mod suite;
}

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use stratafs::{
    CommitOptions, Durability, ErrorKind, ExportOptions, Kind, Labels, LayerFormat, RecordState,
    RelPath, Store, StoreOptions, ignore_progress,
};
use support::model::{self, Model, Node, Snapshot, Tree};
use support::{script, suite};

fn main() {
    if let Some(arguments) = suite::child_arguments() {
        return open_as_nobody(Path::new(&arguments[1]));
    }
    if std::env::args().any(|argument| argument == "--make-fixture") {
        return make_fixture();
    }
    suite::run(vec![
        suite::trial("a_store_of_version_1_holds_what_it_held", None, version_1),
        suite::trial("a_store_of_version_1_can_be_worked_with", None, version_1_works),
        suite::trial("a_store_copied_without_its_marks_is_found_out", None, lost_marks),
        suite::trial("a_newer_format_is_refused", None, newer_format),
        suite::trial("an_unknown_feature_is_refused", None, unknown_feature),
        suite::trial("what_is_no_store_is_refused", None, no_store),
        suite::trial("a_users_store_opens_as_what_it_is", None, users_store),
        suite::trial(
            "a_trusted_store_is_refused_to_ordinary_users",
            suite::needs_root(),
            trusted_store_and_user,
        ),
    ]);
}

// --- the fixture ---------------------------------------------------------------------------------

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/store-v1.tar")
}

fn tar() -> Command {
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=user.*", "--numeric-owner"]);
    tar
}

/// The fixture unpacked: its directory, and the store in it.
fn unpacked() -> (tempfile::TempDir, PathBuf) {
    let dir = suite::temp();
    let mut command = tar();
    command.args(["--no-same-owner", "-p", "-C"]).arg(dir.path()).arg("-xf").arg(fixture());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let root = dir.path().join("store");
    (dir, root)
}

fn make_fixture() {
    let dir = suite::temp();
    let root = dir.path().join("store");
    let store = Store::open(&root, model::options(Durability::Full)).unwrap();
    let labels = Labels::from([("containerd.io/snapshot.ref".into(), "sha256:feed".into())]);

    store.prepare("a", None, labels).unwrap();
    let upper = model::upper_dir(&store, "a");
    for dir in ["etc", "replaced"] {
        fs::create_dir(upper.join(dir)).unwrap();
    }
    fs::write(upper.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    fs::write(upper.join("etc/passwd"), "root:x:0:0\n").unwrap();
    fs::write(upper.join("replaced/old"), "old").unwrap();
    std::os::unix::fs::symlink("hosts", upper.join("etc/link")).unwrap();
    fs::set_permissions(upper.join("etc/passwd"), fs::Permissions::from_mode(0o640)).unwrap();
    store.commit("base", "a", CommitOptions::new()).unwrap();

    store.prepare("b", Some("base"), Labels::new()).unwrap();
    let upper = model::upper_dir(&store, "b");
    for dir in ["etc", "replaced"] {
        fs::create_dir(upper.join(dir)).unwrap();
    }
    let (mode, kind) = (rustix::fs::Mode::empty(), rustix::fs::FileType::CharacterDevice);
    let whiteout = upper.join("etc/passwd");
    rustix::fs::mknodat(rustix::fs::CWD, whiteout, kind, mode, 0).unwrap();
    let (opaque, flags) = (upper.join("replaced"), rustix::fs::XattrFlags::empty());
    rustix::fs::setxattr(opaque, "user.overlay.opaque", b"y", flags).unwrap();
    fs::write(upper.join("replaced/new"), "new").unwrap();
    let labels = Labels::from([("k".into(), "v".into())]);
    store.commit("top", "b", CommitOptions { parent: None, labels }).unwrap();

    script::apply(&store, "applied", Some("top"), &mut ignore_progress);
    store.prepare("running", Some("top"), Labels::new()).unwrap();
    store.view("looking", Some("top"), Labels::new()).unwrap();
    let layers = ["base".to_owned(), "top".to_owned()];
    store
        .put_image("example.org/image:1", b"{\"manifest\":1}", b"{\"config\":1}", &layers)
        .unwrap();
    drop(store);
    // A megabyte of noise, which every opening makes anew.
    fs::remove_file(root.join("reserve")).unwrap();
    let mut command = tar();
    command.args(["--owner=0", "--group=0", "--sort=name", "-C"]).arg(dir.path());
    assert!(command.arg("-cf").arg(fixture()).arg("store").status().unwrap().success());
}

/// What is in it.
fn held() -> Model {
    let file = |text: &str| Node::File(text.as_bytes().to_vec());
    let base = Tree::from([
        ("etc".into(), Node::Dir),
        ("etc/hosts".into(), file("127.0.0.1 localhost\n")),
        ("etc/link".into(), Node::Link("hosts".into())),
        ("etc/passwd".into(), file("root:x:0:0\n")),
        ("replaced".into(), Node::Dir),
        ("replaced/old".into(), file("old")),
    ]);
    let top = Tree::from([
        ("etc".into(), Node::Dir),
        ("etc/passwd".into(), Node::Whiteout),
        ("replaced".into(), Node::Dir),
        ("replaced/new".into(), file("new")),
    ]);
    let snapshot = |kind, parent: Option<&str>, tree| Snapshot {
        kind,
        parent: parent.map(str::to_owned),
        labels: Labels::new(),
        tree,
    };
    let mut model = Model::default();
    let mut insert = |key: &str, snapshot| model.snapshots.insert(key.to_owned(), snapshot);
    insert("base", snapshot(Kind::Committed, None, Some(base)));
    let labels = Labels::from([("k".into(), "v".into())]);
    let top = snapshot(Kind::Committed, Some("base"), Some(top));
    insert("top", Snapshot { labels, ..top });
    insert("applied", snapshot(Kind::Committed, Some("top"), Some(script::applied_tree())));
    insert("running", snapshot(Kind::Active, Some("top"), None));
    insert("looking", snapshot(Kind::View, Some("top"), None));
    let layers = vec!["base".to_owned(), "top".to_owned()];
    model.images.insert("example.org/image:1".into(), (b"{\"manifest\":1}".to_vec(), layers));
    model
}

fn version_1() {
    let (_dir, root) = unpacked();
    let store = Store::open(&root, StoreOptions::new()).unwrap();
    assert_eq!(store.format(), LayerFormat::OverlayUser);
    assert_eq!(Model::of(&store), held());
    model::assert_sound(&store, "unpacked");
    let changes = store.changes("top", &mut ignore_progress).unwrap();
    let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
    for expected in ["D /etc/passwd", "D /replaced/old", "A /replaced/new"] {
        assert!(changes.iter().any(|change| change == expected), "{expected}: {changes:?}");
    }
    let path = |text: &str| RelPath::new(text).unwrap();
    let from = |text: &str| store.provenance("running", &path(text)).unwrap();
    assert_eq!(from("etc/hosts").as_deref(), Some("base"));
    assert_eq!(from("replaced/new").as_deref(), Some("top"));
    assert_eq!(from("etc/passwd"), None);
    assert_eq!(from("replaced/old"), None);
    let base = store.stat("base").unwrap();
    assert_eq!(base.usage.unwrap().inodes, 7);
    assert!(base.created > UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    assert_eq!(store.stat("applied").unwrap().record, RecordState::Kept);
    let mut tar = Vec::new();
    let exported =
        store.export("applied", &mut tar, &ExportOptions::new(), &mut ignore_progress).map(drop);
    if cfg!(feature = "zstd") {
        exported.unwrap();
        assert!(tar == script::archive(&script::applied_tree()), "the archive that was unpacked");
    } else {
        suite::fails(exported, ErrorKind::Unsupported, "zstd");
    }
    let image = store.image("example.org/image:1").unwrap();
    assert_eq!(store.blob(&image.config).unwrap(), b"{\"config\":1}");
}

fn version_1_works() {
    let (_dir, root) = unpacked();
    model::assert_survived(&root, &[held()], "version 1");
}

fn lost_marks() {
    let (_dir, root) = unpacked();
    let store = Store::open(&root, StoreOptions::new()).unwrap();
    let top = model::layer_dir(&store, "top");
    rustix::fs::removexattr(top.join("replaced"), "user.overlay.opaque").unwrap();
    fs::remove_file(top.join("etc/passwd")).unwrap();
    let problems = store.check(&mut ignore_progress).unwrap().problems;
    let text = format!("{problems:?}");
    assert!(text.contains("top") && text.contains("xattrs or devices"), "{text}");
    let mut tar = Vec::new();
    store.export("base", &mut tar, &ExportOptions::default(), &mut ignore_progress).unwrap();
}

// --- refusals ------------------------------------------------------------------------------------

/// Opens the fixture with another format line, which must fail, and change nothing.
fn refused(line: &str, kind: ErrorKind, naming: &str) {
    let (_dir, root) = unpacked();
    fs::write(root.join("format"), line).unwrap();
    let before = fingerprint(&root);
    suite::fails(Store::open(&root, StoreOptions::new()), kind, naming);
    assert_eq!(fingerprint(&root), before, "{line:?}");
}

/// Names, and the contents of files.
fn fingerprint(root: &Path) -> Tree {
    model::read_tree(root)
}

fn newer_format() {
    let line = "stratafs 2 compat= ro-compat= incompat=layers-overlay-user\n";
    refused(line, ErrorKind::Incompatible, "version 2");
}

fn unknown_feature() {
    let line = "stratafs 1 compat= ro-compat= incompat=layers-overlay-user,chunks\n";
    refused(line, ErrorKind::Incompatible, "\"chunks\"");
    let line = "stratafs 1 compat= ro-compat=quota incompat=layers-overlay-user\n";
    refused(line, ErrorKind::Incompatible, "\"quota\"");
    // One that says of itself that nobody needs to know it.
    let (_dir, root) = unpacked();
    let line = "stratafs 1 compat=hints ro-compat= incompat=layers-overlay-user\n";
    fs::write(root.join("format"), line).unwrap();
    Store::open(&root, StoreOptions::new()).unwrap();
}

fn no_store() {
    refused("", ErrorKind::Corrupt, "format");
    refused("somebody else's\n", ErrorKind::Corrupt, "format");
    let (_dir, root) = unpacked();
    fs::remove_file(root.join("format")).unwrap();
    let naming = root.to_str().unwrap();
    let open = || Store::open(&root, StoreOptions::new());
    suite::fails(open(), ErrorKind::FailedPrecondition, naming);
}

/// A store keeps its format, whoever opens it, and is not opened as another.
fn users_store() {
    let (_dir, root) = unpacked();
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayTrusted);
    suite::fails(Store::open(&root, options), ErrorKind::Incompatible, "overlay-user");
    let store = Store::open(&root, StoreOptions::new()).unwrap();
    assert_eq!(store.format(), LayerFormat::OverlayUser);
}

/// The user whom nothing belongs to.
const NOBODY: u32 = 65534;

fn trusted_store_and_user() {
    let dir = suite::temp();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let root = dir.path().join("store");
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayTrusted);
    let store = Store::open(&root, options).unwrap();
    store.prepare("a", None, Labels::new()).unwrap();
    store.commit("base", "a", CommitOptions::new()).unwrap();
    drop(store);
    // All is his, as after a copy of it: only the xattrs are not for him.
    for entry in walkdir::WalkDir::new(&root) {
        std::os::unix::fs::lchown(entry.unwrap().path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let mut child = suite::child("open", &[root.to_str().unwrap()]);
    assert!(child.wait().unwrap().success());
    // Nor did his attempt harm it.
    let store = Store::open(&root, StoreOptions::new()).unwrap();
    assert_eq!(store.format(), LayerFormat::OverlayTrusted);
    model::assert_sound(&store, "after the attempt");
}

fn open_as_nobody(root: &Path) {
    nix::unistd::setgroups(&[]).unwrap();
    nix::unistd::setgid(NOBODY.into()).unwrap();
    nix::unistd::setuid(NOBODY.into()).unwrap();
    let open = |options| Store::open(root, options);
    suite::fails(open(StoreOptions::new()), ErrorKind::Incompatible, "trusted.overlay.");
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    suite::fails(open(options), ErrorKind::Incompatible, "overlay-trusted");
    // He can have one of his own.
    let own = root.join("staging").join("own");
    let store = Store::open(own, StoreOptions::new()).unwrap();
    assert_eq!(store.format(), LayerFormat::OverlayUser);
}
