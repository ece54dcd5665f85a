//! Other programs read what is saved here, and unpack the tree that a mount shows: skopeo and umoci as
//! judges of images, GNU tar and bsdtar as judges of layers. Listed as ignored, with the reason, where
//! a program or a right is missing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/tree.rs"]
mod tree;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use tree::Times;

use libtest_mimic::{Arguments, Trial};
use stratafs::{
    CommitOptions, Compression, ExportOptions, ImageLayout, ImportOptions, Labels, LayoutWriter,
    MountOptions, SaveOptions, Store, StoreOptions, ignore_progress, import_image, save_image,
};

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    output
}

fn tree(root: &Path) -> Vec<String> {
    // The root's own mode is the unpacker's.
    tree::lines(root, Times::OfFilesInSeconds).split_off(1)
}

#[track_caller]
fn same(one: &[String], two: &[String]) {
    let differs: Vec<_> = one.iter().filter(|line| !two.contains(line)).collect();
    let other: Vec<_> = two.iter().filter(|line| !one.contains(line)).collect();
    assert!(differs.is_empty() && other.is_empty(), "{differs:#?} against {other:#?}");
}

/// A store with the image layers `one` and, on top, `two`, of all kinds of changes.
fn store(tmp: &Path) -> Store {
    let store = Store::open(tmp.join("store"), StoreOptions::new()).unwrap();
    let mount = tmp.join("mount");
    fs::create_dir(&mount).unwrap();
    let layer = |name: &str, parent: Option<&str>, edit: &dyn Fn(&Path)| {
        store.prepare("key", parent, Labels::new()).unwrap();
        let mut guard = store.activate("key", &mount, &MountOptions::default()).unwrap();
        edit(&mount);
        guard.unmount().unwrap();
        store.commit(name, "key", CommitOptions::new()).unwrap();
    };
    layer("one", None, &|root| {
        for path in ["etc/passwd", "gone", "tree/a/b", "remade/old", "file-then-dir", "links/one"] {
            fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            fs::write(root.join(path), path).unwrap();
        }
        fs::hard_link(root.join("links/one"), root.join("links/two")).unwrap();
        symlink("../etc/passwd", root.join("links/sym")).unwrap();
        fs::create_dir(root.join("dir-then-file")).unwrap();
        fs::write(root.join("dir-then-file/x"), "x").unwrap();
        fs::set_permissions(root.join("etc/passwd"), Permissions::from_mode(0o4640)).unwrap();
        std::os::unix::fs::chown(root.join("etc/passwd"), Some(1000), Some(70_000)).unwrap();
        run("mknod", &[root.join("null").to_str().unwrap(), "c", "1", "3"]);
        run("mkfifo", &[root.join("fifo").to_str().unwrap()]);
    });
    layer("two", Some("one"), &|root| {
        fs::remove_file(root.join("gone")).unwrap();
        fs::remove_dir_all(root.join("tree")).unwrap();
        fs::remove_dir_all(root.join("remade")).unwrap();
        fs::create_dir(root.join("remade")).unwrap();
        fs::write(root.join("remade/new"), "new").unwrap();
        fs::remove_file(root.join("file-then-dir")).unwrap();
        fs::create_dir(root.join("file-then-dir")).unwrap();
        fs::write(root.join("file-then-dir/inside"), "inside").unwrap();
        fs::remove_dir_all(root.join("dir-then-file")).unwrap();
        fs::write(root.join("dir-then-file"), "a file").unwrap();
        fs::write(root.join("n".repeat(120)), "long").unwrap();
    });
    store
}

fn mounted(store: &Store, tmp: &Path, name: &str) -> Vec<String> {
    store.view("look", Some(name), Labels::new()).unwrap();
    let mount = tmp.join("mount");
    let mut guard = store.activate("look", &mount, &MountOptions::default()).unwrap();
    let seen = tree(&mount);
    guard.unmount().unwrap();
    store.remove("look").unwrap();
    seen
}

fn skopeo_reads_and_copies_what_is_saved() {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let store = store(tmp.path());
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let path = tmp.path().join(format!("{compression}.tar"));
        let out = LayoutWriter::to_tar_file(&path, tmp.path()).unwrap();
        let mut options = SaveOptions::new();
        options.compression = Some(compression);
        let saved = save_image(&store, "two", out, &options, &mut ignore_progress).unwrap();
        let source = format!("oci-archive:{}:two", path.display());
        let inspected = run("skopeo", &["inspect", &source]);
        let inspected: serde_json::Value = serde_json::from_slice(&inspected.stdout).unwrap();
        assert_eq!(inspected["Digest"], saved.manifest.to_string());
        assert_eq!(inspected["Layers"].as_array().unwrap().len(), 2);
        let copy = tmp.path().join(format!("{compression}-copy"));
        let target = format!("oci:{}:two", copy.display());
        run("skopeo", &["--insecure-policy", "copy", "-q", &source, &target]);
        let other =
            Store::open(tmp.path().join(format!("{compression}-store")), StoreOptions::new())
                .unwrap();
        let layout = ImageLayout::open(&copy).unwrap();
        let options = ImportOptions::new();
        let image = import_image(&other, &layout, "two", &options, &mut ignore_progress).unwrap();
        let top = image.layers.last().unwrap();
        same(&mounted(&other, tmp.path(), top), &mounted(&store, tmp.path(), "two"));
    }
}

/// What skopeo makes of an image in Docker's format has the same layers and configuration. Another image
/// may be given: an OCI archive, by its path in STRATAFS_TEST_IMAGE.
fn skopeos_docker_archive_is_the_image() {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let store = store(tmp.path());
    let oci = tmp.path().join("two.oci.tar");
    let out = LayoutWriter::to_tar_file(&oci, tmp.path()).unwrap();
    save_image(&store, "two", out, &SaveOptions::new(), &mut ignore_progress).unwrap();
    let mut images = vec![(oci, ":two")];
    images.extend(std::env::var_os("STRATAFS_TEST_IMAGE").map(|image| (image.into(), "")));
    for (n, (oci, tag)) in images.into_iter().enumerate() {
        let docker = tmp.path().join(format!("docker-{n}.tar"));
        let source = format!("oci-archive:{}{tag}", oci.display());
        let target = format!("docker-archive:{}:example.org/two:1", docker.display());
        run("skopeo", &["--insecure-policy", "copy", "-q", &source, &target]);
        let unpacked = tmp.path().join(format!("docker-{n}"));
        fs::create_dir(&unpacked).unwrap();
        let arguments = ["-xf", docker.to_str().unwrap(), "-C", unpacked.to_str().unwrap()];
        run("tar", &arguments);
        let other =
            Store::open(tmp.path().join(format!("store-{n}")), StoreOptions::new()).unwrap();
        let import = |path: &Path, name: &str| {
            let layout = ImageLayout::open(path).unwrap();
            let options = ImportOptions::new();
            import_image(&other, &layout, name, &options, &mut ignore_progress).unwrap()
        };
        let image = import(&docker, "docker");
        assert_eq!(ImageLayout::open(&docker).unwrap().names().unwrap(), ["example.org/two:1"]);
        assert_eq!(import(&unpacked, "unpacked").manifest, image.manifest);
        let same_image = import(&oci, "oci");
        assert_eq!((image.layers, image.config), (same_image.layers, same_image.config));
    }
}

fn umoci_unpacks_the_tree_that_is_mounted() {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let store = store(tmp.path());
    let out = LayoutWriter::to_directory(tmp.path().join("layout")).unwrap();
    save_image(&store, "two", out, &SaveOptions::new(), &mut ignore_progress).unwrap();
    let image = format!("{}:two", tmp.path().join("layout").display());
    let bundle = tmp.path().join("bundle");
    run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
    same(&tree(&bundle.join("rootfs")), &mounted(&store, tmp.path(), "two"));
    // And the other way: what umoci packs is taken in.
    fs::write(bundle.join("rootfs/added"), "by umoci").unwrap();
    // umoci rounds times, up or down.
    let whole = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_600_000_000);
    fs::File::open(bundle.join("rootfs/added")).unwrap().set_modified(whole).unwrap();
    fs::remove_file(bundle.join("rootfs/remade/new")).unwrap();
    run("umoci", &["repack", "--image", &image, bundle.to_str().unwrap()]);
    let layout = ImageLayout::open(tmp.path().join("layout")).unwrap();
    let mut options = ImportOptions::new();
    options.select.name = Some("two".to_owned());
    let image = import_image(&store, &layout, "repacked", &options, &mut ignore_progress).unwrap();
    let top = image.layers.last().unwrap();
    same(&mounted(&store, tmp.path(), top), &tree(&bundle.join("rootfs")));
}

/// A layer without marks, unpacked by others.
fn tars_unpack_what_is_exported(program: &str) {
    let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
    let store = store(tmp.path());
    let tar = tmp.path().join("one.tar");
    let mut file = fs::File::create(&tar).unwrap();
    store.export("one", &mut file, &ExportOptions::default(), &mut ignore_progress).unwrap();
    let target = tmp.path().join("unpacked");
    fs::create_dir(&target).unwrap();
    let arguments = ["-xpf", tar.to_str().unwrap(), "-C", target.to_str().unwrap()];
    run(program, &arguments);
    same(&tree(&target), &mounted(&store, tmp.path(), "one"));
}

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let trial = |name: &str, program: &str, case: fn()| {
        let found = Command::new(program).arg("--version").output().is_ok();
        let reason = match (root, found) {
            (true, true) => String::new(),
            (false, _) => " (needs root: it mounts)".to_owned(),
            (_, false) => format!(" (needs {program})"),
        };
        let ignored = !reason.is_empty();
        Trial::test(format!("{name}{reason}"), move || {
            case();
            Ok(())
        })
        .with_ignored_flag(ignored)
    };
    let trials = vec![
        trial(
            "skopeo_reads_and_copies_what_is_saved",
            "skopeo",
            skopeo_reads_and_copies_what_is_saved,
        ),
        trial("skopeos_docker_archive_is_the_image", "skopeo", skopeos_docker_archive_is_the_image),
        trial(
            "umoci_unpacks_the_tree_that_is_mounted",
            "umoci",
            umoci_unpacks_the_tree_that_is_mounted,
        ),
        trial("gnu_tar_unpacks_what_is_exported", "tar", || tars_unpack_what_is_exported("tar")),
        trial("bsdtar_unpacks_what_is_exported", "bsdtar", || {
            tars_unpack_what_is_exported("bsdtar")
        }),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}
