//! What moving layers costs: unpacking an archive into a store, packing it again, importing an image
//! of four layers. GNU tar stands beside for scale. Runs as anybody: `cargo bench --bench layers`.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use stratafs::{
    ApplyOptions, Durability, ExportOptions, ImageLayout, ImportOptions, Labels, LayerFormat,
    LayoutWriter, Ownership, SaveOptions, Store, StoreOptions, ignore_progress, import_image,
    save_image,
};

const FILES: usize = 5_000;

fn open(root: &Path) -> Store {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    options.durability = Durability::None;
    Store::open(root, options).expect("store opens")
}

fn apply_options() -> ApplyOptions {
    let mut options = ApplyOptions::default();
    options.ownership = Ownership::Ignore;
    options
}

/// Small files in directories of fifty, as packages have them.
fn archive(seed: usize) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for i in 0..FILES {
        let text = format!("{seed} {i} ").repeat(100 + i % 400);
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        let name = format!("usr/share/{seed}/{}/file-{i}", i / 50);
        tar.append_data(&mut header, name, text.as_bytes()).expect("entry");
    }
    tar.into_inner().expect("archive")
}

fn layers(c: &mut Criterion) {
    let tmp = tempfile::tempdir_in("/dev/shm").expect("temporary directory");
    let store = open(&tmp.path().join("store"));
    let tar = archive(0);
    let apply = |name: &str| {
        let labels = Labels::new();
        store
            .apply(name, None, &mut &tar[..], &apply_options(), labels, &mut ignore_progress)
            .expect("apply")
    };
    let mut group = c.benchmark_group("layers");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    group.throughput(Throughput::Bytes(tar.len() as u64));
    group.bench_function("apply", |b| {
        b.iter_batched(
            || drop(store.remove("layer")),
            |()| apply("layer"),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("gnu-tar-extract", |b| {
        let target = tmp.path().join("gnu");
        let clear = || {
            drop(std::fs::remove_dir_all(&target));
            std::fs::create_dir(&target).expect("directory");
        };
        let extract = |()| {
            let mut child = Command::new("tar")
                .arg("-xf-")
                .arg("-C")
                .arg(&target)
                .stdin(Stdio::piped())
                .spawn()
                .expect("tar runs");
            child.stdin.take().expect("pipe").write_all(&tar).expect("tar reads");
            assert!(child.wait().expect("tar ends").success());
        };
        b.iter_batched(clear, extract, BatchSize::PerIteration);
    });
    if store.stat("layer").is_err() {
        apply("layer");
    }
    group.bench_function("export", |b| {
        b.iter(|| {
            let mut out = Vec::with_capacity(tar.len() * 2);
            let options = ExportOptions::default();
            store.export("layer", &mut out, &options, &mut ignore_progress).expect("export")
        });
    });
    group.finish();

    let mut parent = None;
    for i in 0..4 {
        let (name, tar) = (format!("base{i}"), archive(i));
        let labels = Labels::new();
        store
            .apply(
                &name,
                parent.as_deref(),
                &mut &tar[..],
                &apply_options(),
                labels,
                &mut ignore_progress,
            )
            .expect("apply");
        parent = Some(name);
    }
    let image = tmp.path().join("image.tar");
    let out = LayoutWriter::to_tar_file(&image, tmp.path()).expect("layout");
    save_image(&store, "base3", out, &SaveOptions::new(), &mut ignore_progress).expect("save");
    let mut group = c.benchmark_group("image");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    group.bench_function("import-4-layers-gzip", |b| {
        let mut options = ImportOptions::new();
        options.apply = apply_options();
        let import = |()| {
            let layout = ImageLayout::open(&image).expect("layout");
            import_image(&store, &layout, "image", &options, &mut ignore_progress).expect("import")
        };
        b.iter_batched(|| drop(store.remove_image("image")), import, BatchSize::PerIteration);
    });
    group.finish();
}

criterion_group!(benches, layers);
criterion_main!(benches);
