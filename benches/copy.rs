//! What it costs to show a snapshot of 5,000 files as a copy, and to find out what was changed in it,
//! with `cp -a --reflink=auto` beside; and a copy of one large file, dense and sparse, with
//! `cp --reflink=auto --sparse=auto` beside. Run as anybody: `cargo bench --bench copy`. The disk is that of
//! `/var/tmp`, or of the directory in `STRATAFS_BENCH_DIR`: name one on XFS or Btrfs to see blocks
//! shared.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use stratafs::{
    ApplyOptions, CommitOptions, DriverChoice, Durability, Labels, LayerFormat, MountOptions,
    Shown, Store, StoreOptions, ignore_progress,
};

/// 5,000 files of 8 KiB in 100 directories, with times as archives have them.
fn layer() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let contents: Vec<u8> = (0..8192_u32).map(|i| (i % 251) as u8).collect();
    for i in 0..5000 {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_mtime(1_000_000_000);
        header.set_size(contents.len() as u64);
        let path = format!("d{}/file{i}", i % 100);
        builder.append_data(&mut header, path, &*contents).expect("an entry");
    }
    builder.into_inner().expect("an archive")
}

/// Times `work` alone.
fn timed(
    rounds: u64,
    mut before: impl FnMut(),
    mut work: impl FnMut(),
    mut after: impl FnMut(),
) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..rounds {
        before();
        let start = Instant::now();
        work();
        total += start.elapsed();
        after();
    }
    total
}

fn copies(c: &mut Criterion) {
    let place = std::env::var_os("STRATAFS_BENCH_DIR").unwrap_or("/var/tmp".into());
    let tmp = tempfile::tempdir_in(place).expect("temporary directory");
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    options.durability = Durability::None;
    options.driver = DriverChoice::Copy;
    let store = Store::open(tmp.path().join("store"), options).expect("store opens");
    let (tar, unprivileged, stop) = (layer(), ApplyOptions::unprivileged(), &mut ignore_progress);
    store.apply("base", None, &mut &*tar, &unprivileged, Labels::new(), stop).expect("applied");
    let prepare = || drop(store.prepare("a", Some("base"), Labels::new()).expect("prepared"));
    let ready = || store.make_ready("a", Shown::InPlace, &mut ignore_progress).expect("copied");
    let remove = || store.remove("a").expect("removed");

    let mut group = c.benchmark_group("5000_files");
    group.sample_size(10);
    group.bench_function("copy", |b| b.iter_custom(|n| timed(n, prepare, ready, remove)));
    prepare();
    let mut guard = store.activate_in_place("a", &MountOptions::default()).expect("active");
    let tree = guard.target().to_owned();
    guard.unmount().expect("ended");
    group.bench_function("cp", |b| {
        let copy = tmp.path().join("copy");
        let cp = || {
            let done =
                Command::new("cp").args(["-a", "--reflink=auto"]).args([&tree, &copy]).status();
            assert!(done.expect("cp").success());
        };
        b.iter_custom(|n| timed(n, || (), cp, || fs::remove_dir_all(&copy).expect("removed")));
    });
    edit(&tree);
    group.bench_function("changes", |b| {
        b.iter(|| store.changes("a", &mut ignore_progress).expect("changes").len());
    });
    let unsettle = || fs::write(tree.join("d1/new"), "new").expect("an edit");
    group.bench_function("export", |b| {
        b.iter_custom(|n| {
            let export = || {
                let out = &mut std::io::sink();
                store.export("a", out, &Default::default(), &mut ignore_progress).expect("packed");
            };
            timed(n, unsettle, export, || ())
        });
    });
    group.finish();
}

/// The routine by which files are copied, whatever asks for it: of a file of 256 MiB, and of one of 4 GiB of which
/// each 16th MiB begins with 64 KiB of data.
fn one_file(c: &mut Criterion) {
    let place = std::env::var_os("STRATAFS_BENCH_DIR").unwrap_or("/var/tmp".into());
    for (what, size, sparse) in [("256_MiB", 256 << 20, false), ("4_GiB_sparse", 4 << 30, true)] {
        let tmp = tempfile::tempdir_in(&place).expect("temporary directory");
        let mut options = StoreOptions::new();
        options.format = Some(LayerFormat::OverlayUser);
        options.durability = Durability::None;
        options.driver = DriverChoice::Copy;
        let store = Store::open(tmp.path().join("store"), options).expect("store opens");
        drop(store.prepare("made", None, Labels::new()).expect("prepared"));
        let mut guard = store.activate_in_place("made", &MountOptions::default()).expect("active");
        let file = fs::File::create(guard.target().join("file")).expect("a file");
        file.set_len(size).expect("its length");
        let block: Vec<u8> =
            (0..1 << 16).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for at in (0..size).step_by(block.len()).filter(|at| !sparse || at % (16 << 20) == 0) {
            file.write_all_at(&block, at).expect("its data");
        }
        file.sync_all().expect("on disk");
        guard.unmount().expect("ended");
        store.commit("base", "made", CommitOptions::default()).expect("committed");
        let prepare = || drop(store.prepare("a", Some("base"), Labels::new()).expect("prepared"));
        let ready = || store.make_ready("a", Shown::InPlace, &mut ignore_progress).expect("copied");
        let remove = || store.remove("a").expect("removed");
        let mut group = c.benchmark_group(what);
        group.sample_size(10);
        group.bench_function("copy", |b| b.iter_custom(|n| timed(n, prepare, ready, remove)));
        prepare();
        let mut guard = store.activate_in_place("a", &MountOptions::default()).expect("active");
        let file = guard.target().join("file");
        guard.unmount().expect("ended");
        group.bench_function("cp", |b| {
            let copy = tmp.path().join("copy");
            let cp = || {
                let done = Command::new("cp")
                    .args(["--reflink=auto", "--sparse=auto"])
                    .args([&file, &copy])
                    .status();
                assert!(done.expect("cp").success());
            };
            b.iter_custom(|n| timed(n, || (), cp, || fs::remove_file(&copy).expect("removed")));
        });
        group.finish();
    }
}

fn edit(tree: &Path) {
    fs::write(tree.join("d0/new"), "new").expect("an edit");
    fs::remove_file(tree.join("d1/file1")).expect("a deletion");
}

criterion_group!(benches, copies, one_file);
criterion_main!(benches);
