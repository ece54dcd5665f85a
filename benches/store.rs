//! What the store's own operations cost: prepare, commit of a settled snapshot, remove; with and
//! without waiting for the disk. Run as anybody: `cargo bench --bench store`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use stratafs::{
    CommitOptions, Durability, Labels, LayerFormat, Store, StoreOptions, ignore_progress,
};

fn open(root: &std::path::Path, durability: Durability) -> Store {
    let mut options = StoreOptions::new();
    options.format = Some(LayerFormat::OverlayUser);
    options.durability = durability;
    Store::open(root, options).expect("store opens")
}

/// Times `work` alone; what `before` and `after` do is not counted.
fn timed<T>(
    rounds: u64,
    mut before: impl FnMut(u64) -> T,
    mut work: impl FnMut(u64, &T),
    mut after: impl FnMut(u64),
) -> Duration {
    let mut total = Duration::ZERO;
    for round in 0..rounds {
        let prepared = before(round);
        let start = Instant::now();
        work(round, black_box(&prepared));
        total += start.elapsed();
        after(round);
    }
    total
}

fn operations(c: &mut Criterion) {
    for (name, durability) in [("durable", Durability::Full), ("volatile", Durability::None)] {
        let tmp = tempfile::tempdir_in("/var/tmp").expect("temporary directory");
        let store = open(&tmp.path().join("store"), durability);
        store.prepare("a", None, Labels::new()).expect("prepare");
        store.commit("base", "a", CommitOptions::new()).expect("commit");
        let prepare = |_| drop(store.prepare("key", Some("base"), Labels::new()).expect("prepare"));
        let remove = |key: &str| store.remove(key).expect("remove");
        let mut group = c.benchmark_group(format!("store/{name}"));
        group.sample_size(20).measurement_time(Duration::from_secs(3));
        group.bench_function("prepare", |b| {
            b.iter_custom(|n| timed(n, |_| (), |i, ()| prepare(i), |_| remove("key")));
        });
        group.bench_function("commit-settled", |b| {
            b.iter_custom(|n| {
                let before = |i| {
                    prepare(i);
                    store.settle("key", &mut ignore_progress).expect("settle");
                };
                let commit = |_, (): &()| {
                    store.commit("name", "key", CommitOptions::new()).expect("commit");
                };
                timed(n, before, commit, |_| remove("name"))
            });
        });
        group.bench_function("remove", |b| {
            b.iter_custom(|n| timed(n, prepare, |_, ()| remove("key"), |_| ()));
        });
        group.bench_function("stat", |b| b.iter(|| store.stat("base").expect("stat")));
        group.finish();
    }
}

criterion_group!(benches, operations);
criterion_main!(benches);
