//! The snapshotter's contract, row by row, as far as it needs neither mounts nor layers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use stratafs::{
    CommitOptions, ErrorKind, Filter, Info, Kind, Labels, LayerFormat, Store, StoreOptions,
    ignore_progress,
};

fn store(root: &std::path::Path) -> Store {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    Store::open(root, options).unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn committed(store: &Store, name: &str, parent: Option<&str>) -> Info {
    let key = format!("{name}-active");
    store.prepare(&key, parent, Labels::new()).unwrap();
    store.commit(name, &key, CommitOptions::new()).unwrap()
}

fn temp() -> tempfile::TempDir {
    // Not in /tmp, which may be a tmpfs without user xattrs.
    tempfile::tempdir_in("/var/tmp").unwrap()
}

#[track_caller]
fn fails<T: std::fmt::Debug>(result: stratafs::Result<T>, kind: ErrorKind, naming: &str) {
    let e = result.unwrap_err();
    assert_eq!(e.kind(), kind, "{e}");
    assert!(e.to_string().contains(naming), "{e}");
}

#[test]
fn prepare_commit_view_and_stat() {
    let tmp = temp();
    let store = store(tmp.path());
    let info = store.prepare("a", None, labels(&[("k", "v")])).unwrap();
    assert_eq!((info.kind, info.parent.clone()), (Kind::Active, None));
    assert_eq!(info.labels, labels(&[("k", "v")]));
    let base = store.commit("base", "a", CommitOptions::new()).unwrap();
    assert_eq!((base.kind, base.labels.len()), (Kind::Committed, 0), "labels are not inherited");
    fails(store.stat("a"), ErrorKind::NotFound, "\"a\"");
    let view = store.view("v", Some("base"), Labels::new()).unwrap();
    assert_eq!((view.kind, view.parent.as_deref()), (Kind::View, Some("base")));
    assert_eq!(store.stat("v").unwrap(), view);
    assert_eq!(store.usage("v").unwrap().inodes, 0);
    assert_eq!(store.usage("base").unwrap().inodes, 1);
}

#[test]
fn keys_and_names_are_one_space() {
    let tmp = temp();
    let store = store(tmp.path());
    committed(&store, "base", None);
    store.prepare("a", Some("base"), Labels::new()).unwrap();
    for key in ["a", "base"] {
        fails(store.prepare(key, None, Labels::new()), ErrorKind::AlreadyExists, key);
        fails(store.view(key, None, Labels::new()), ErrorKind::AlreadyExists, key);
    }
    fails(store.commit("base", "a", CommitOptions::new()), ErrorKind::AlreadyExists, "base");
    assert_eq!(store.stat("a").unwrap().kind, Kind::Active, "the active snapshot stays");
}

#[test]
fn parents_must_be_committed() {
    let tmp = temp();
    let store = store(tmp.path());
    store.prepare("a", None, Labels::new()).unwrap();
    fails(store.prepare("b", Some("none"), Labels::new()), ErrorKind::NotFound, "none");
    fails(store.prepare("b", Some("a"), Labels::new()), ErrorKind::InvalidArgument, "\"a\"");
    fails(store.view("b", Some("a"), Labels::new()), ErrorKind::InvalidArgument, "\"a\"");
}

#[test]
fn only_active_snapshots_are_committed() {
    let tmp = temp();
    let store = store(tmp.path());
    committed(&store, "base", None);
    store.view("v", Some("base"), Labels::new()).unwrap();
    fails(store.commit("n", "v", CommitOptions::new()), ErrorKind::FailedPrecondition, "view");
    fails(store.commit("n", "base", CommitOptions::new()), ErrorKind::FailedPrecondition, "base");
    fails(store.commit("n", "none", CommitOptions::new()), ErrorKind::NotFound, "none");
    fails(store.settle("v", &mut ignore_progress), ErrorKind::FailedPrecondition, "view");
}

#[test]
fn rebase_gives_a_parent_to_what_had_none() {
    let tmp = temp();
    let store = store(tmp.path());
    committed(&store, "base", None);
    committed(&store, "other", None);
    let onto = |parent: &str| CommitOptions { parent: Some(parent.into()), labels: Labels::new() };
    store.prepare("a", None, Labels::new()).unwrap();
    fails(store.commit("n", "a", onto("none")), ErrorKind::NotFound, "none");
    store.prepare("b", None, Labels::new()).unwrap();
    fails(store.commit("n", "a", onto("b")), ErrorKind::FailedPrecondition, "\"b\"");
    assert_eq!(store.commit("n", "a", onto("base")).unwrap().parent.as_deref(), Some("base"));
    store.prepare("c", Some("base"), Labels::new()).unwrap();
    fails(store.commit("m", "c", onto("other")), ErrorKind::InvalidArgument, "other");
    store.commit("m", "c", onto("base")).unwrap();
}

#[test]
fn remove_refuses_what_has_children_and_frees_the_name() {
    let tmp = temp();
    let store = store(tmp.path());
    committed(&store, "base", None);
    store.prepare("a", Some("base"), Labels::new()).unwrap();
    fails(store.remove("base"), ErrorKind::FailedPrecondition, "\"a\"");
    store.remove("a").unwrap();
    fails(store.remove("a"), ErrorKind::NotFound, "\"a\"");
    store.prepare("a", Some("base"), Labels::new()).unwrap();
    store.remove("a").unwrap();
    store.remove("base").unwrap();
    store.cleanup().unwrap();
    for dir in ["snapshots", "staging", "trash"] {
        assert_eq!(std::fs::read_dir(tmp.path().join(dir)).unwrap().count(), 0, "{dir}");
    }
}

#[test]
fn update_changes_labels_and_nothing_else() {
    let tmp = temp();
    let store = store(tmp.path());
    let first = store.prepare("a", None, labels(&[("x", "1"), ("y", "2"), ("z.z", "3")])).unwrap();
    let one = store.update("a", labels(&[("x", "9"), ("q", "8")]), &["labels.x", "labels.z.z"]);
    let one = one.unwrap();
    assert_eq!(one.labels, labels(&[("x", "9"), ("y", "2")]));
    assert_eq!(one.created, first.created);
    assert!(one.updated > first.updated);
    let empty = store.update("a", labels(&[("x", "")]), &["labels.x"]).unwrap();
    assert_eq!(empty.labels, labels(&[("y", "2")]));
    assert_eq!(store.update("a", labels(&[("n", "1")]), &[]).unwrap().labels.len(), 1);
    assert_eq!(store.update("a", Labels::new(), &["labels"]).unwrap().labels, BTreeMap::new());
    for field in ["parent", "kind", "labels.", "", "created"] {
        fails(store.update("a", Labels::new(), &[field]), ErrorKind::InvalidArgument, field);
    }
    fails(store.update("b", Labels::new(), &[]), ErrorKind::NotFound, "\"b\"");
}

#[test]
fn walk_filters_and_lets_the_callback_use_the_store() {
    let tmp = temp();
    let store = store(tmp.path());
    committed(&store, "base", None);
    store.prepare("a", Some("base"), labels(&[("app.io/x", "1")])).unwrap();
    store.view("v", Some("base"), Labels::new()).unwrap();
    let names = |filters: &[&str]| -> Vec<String> {
        let filters: Vec<Filter> = filters.iter().map(|f| Filter::parse(f).unwrap()).collect();
        let mut names = Vec::new();
        store
            .walk(&filters, &mut |info| {
                assert_eq!(store.stat(&info.key)?.key, info.key);
                names.push(info.key.clone());
                Ok(())
            })
            .unwrap();
        names.sort();
        names
    };
    assert_eq!(names(&[]), ["a", "base", "v"]);
    assert_eq!(names(&["kind==active"]), ["a"]);
    assert_eq!(names(&["parent==base,kind!=view"]), ["a"]);
    assert_eq!(names(&["kind==view", "name==base"]), ["base", "v"]);
    assert_eq!(names(&["labels.\"app.io/x\"==1"]), ["a"]);
    assert_eq!(names(&["name~=^[ab]"]), ["a", "base"]);
}

#[test]
fn a_second_handle_sees_what_the_first_did() {
    let tmp = temp();
    let (one, two) = (store(tmp.path()), store(tmp.path()));
    one.prepare("a", None, Labels::new()).unwrap();
    fails(two.prepare("a", None, Labels::new()), ErrorKind::AlreadyExists, "\"a\"");
    two.commit("base", "a", CommitOptions::new()).unwrap();
    one.remove("base").unwrap();
    fails(two.stat("base"), ErrorKind::NotFound, "base");
}

#[test]
fn a_store_moves_and_keeps_its_format() {
    let tmp = temp();
    let (here, there) = (tmp.path().join("here"), tmp.path().join("there"));
    committed(&store(&here), "base", None);
    std::fs::rename(&here, &there).unwrap();
    assert_eq!(store(&there).stat("base").unwrap().kind, Kind::Committed);
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::Aufs);
    fails(Store::open(&there, options), ErrorKind::Incompatible, "overlay-user");
    let mut options = StoreOptions::new();
    options.create = false;
    fails(Store::open(&here, options), ErrorKind::NotFound, "here");
}

#[test]
fn leftovers_of_the_dead_are_swept_and_check_finds_damage() {
    let tmp = temp();
    let first = store(tmp.path());
    committed(&first, "base", None);
    std::fs::create_dir_all(tmp.path().join("staging/dead/fs")).unwrap();
    std::fs::create_dir_all(tmp.path().join("snapshots/99/fs")).unwrap();
    std::fs::create_dir_all(tmp.path().join("trash/old/fs")).unwrap();
    std::fs::write(tmp.path().join("blobs/sha256/feed"), "").unwrap();
    let report = first.gc(&mut ignore_progress).unwrap();
    assert_eq!((report.staging, report.orphans, report.blobs), (1, 1, 1));
    assert!(report.trash >= 1);
    assert_eq!(first.check(&mut ignore_progress).unwrap().problems, []);
    std::fs::write(tmp.path().join("snapshots/1/fs/added"), "").unwrap();
    let problems = first.check(&mut ignore_progress).unwrap().problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    std::fs::remove_dir_all(tmp.path().join("snapshots/1")).unwrap();
    let problems = first.check(&mut ignore_progress).unwrap().problems;
    assert!(problems[0].object.contains("base"), "{problems:?}");
    first.remove("base").unwrap();
}

#[test]
fn names_that_cannot_be_are_refused() {
    let tmp = temp();
    let store = store(tmp.path());
    for bad in ["", "..", "a/../b", "a\0b"] {
        fails(store.prepare(bad, None, Labels::new()), ErrorKind::InvalidArgument, "cannot name");
    }
    store.prepare("a", None, Labels::new()).unwrap();
    fails(store.commit("..", "a", CommitOptions::new()), ErrorKind::InvalidArgument, "cannot name");
}

#[test]
fn images_hold_their_layers() {
    let tmp = temp();
    let store = store(tmp.path());
    committed(&store, "one", None);
    committed(&store, "two", Some("one"));
    let layers = ["one".to_owned(), "two".to_owned()];
    let image = store.put_image("img", b"manifest", b"config", &layers).unwrap();
    assert_eq!(store.image("img").unwrap(), image);
    assert_eq!(store.blob(&image.manifest).unwrap(), b"manifest");
    fails(store.remove("two"), ErrorKind::FailedPrecondition, "img");
    fails(store.put_image("bad", b"", b"config", &["none".into()]), ErrorKind::NotFound, "none");
    let blobs = || std::fs::read_dir(store.root().join("blobs/sha256")).unwrap().count();
    assert_eq!(blobs(), 2, "what no image names is gone, what one names is not");
    fails(store.image("bad"), ErrorKind::NotFound, "bad");
    store.prepare("a", Some("one"), Labels::new()).unwrap();
    assert_eq!(store.remove_image("img").unwrap(), ["two"], "the other has a child");
    fails(store.remove_image("img"), ErrorKind::NotFound, "img");
    assert_eq!(blobs(), 0);
    assert_eq!(store.gc(&mut ignore_progress).unwrap().blobs, 0);
}

#[test]
fn handles_may_be_shared_between_threads() {
    fn shareable<T: Send + Sync + 'static>() {}
    shareable::<Store>();
}
