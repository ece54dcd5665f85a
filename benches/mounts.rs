//! Mounting and unmounting, by number of layers and by the way the kernel takes them. Needs root.

use std::fs;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use stratafs::{Driver, LayerFormat, MountRequest, OverlayDriver, Rung, UpperDir};

fn mount_and_unmount(c: &mut Criterion) {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let dir = |name: String| {
        let path = temp.path().join(name);
        fs::create_dir(&path).expect("a new directory");
        path
    };
    let target = dir("target".to_owned());
    let mut request = MountRequest::new(LayerFormat::OverlayTrusted, dir("empty".to_owned()));
    request.upper = Some(UpperDir { dir: dir("upper".to_owned()), work: dir("work".to_owned()) });
    let layers: Vec<_> = (0..500).map(|i| dir(i.to_string())).collect();

    let mut group = c.benchmark_group("mount_and_unmount");
    for rung in Rung::ALL {
        let driver = OverlayDriver::with_rung(rung);
        for count in [1, 32, 128, 500] {
            request.lower = layers.iter().take(count).cloned().collect();
            if let Err(e) = driver.activate(&request, &target) {
                eprintln!("skipped: {rung:?} with {count} layers: {e}");
                continue;
            }
            group.bench_function(BenchmarkId::new(format!("{rung:?}"), count), |b| {
                b.iter(|| {
                    let mut guard = driver.activate(black_box(&request), &target).expect("a mount");
                    guard.unmount().expect("unmounted");
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, mount_and_unmount);
criterion_main!(benches);
