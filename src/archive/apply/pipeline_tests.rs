//! Whatever threads there are, and however small the blocks: the same result, the same errors.

use std::ops::ControlFlow;

use super::test_archive::*;
use super::*;
use crate::digest::Digest;
use crate::error::ErrorKind;

/// A few kilobytes with something of everything, and with content across blocks.
fn layer() -> Vec<u8> {
    let mut layer = Archive::new();
    layer.dir("a/").file("a/long", &[7; 3000]).file("a/empty", b"").symlink("a/s", "long");
    layer.pax("mtime", b"1.5").file("a/b/c/deep", b"deep").link("hard", "a/long");
    for i in 0..20 {
        layer.file(&format!("d{}/f{i}", i % 3), &vec![b'x'; i * 97]);
    }
    layer.file("d1/.wh.gone", b"").file("a/long", b"another");
    layer.finish()
}

/// What there is to see of one way to unpack: the result or the error as text, and the tree.
fn outcome(
    bytes: &[u8],
    block: usize,
    options: &ApplyOptions,
) -> (std::result::Result<String, String>, Vec<String>) {
    let tmp = scratch();
    let root = Dir::open(tmp.path()).unwrap();
    let job =
        Job { block, ..Job::new(&root, LayerTarget::Layer(LayerFormat::Aufs), options, None) };
    let done = job.run(&mut &bytes[..], &mut crate::progress::ignore_progress);
    let text = |mut e: Option<&dyn std::error::Error>| {
        let mut text = String::new();
        while let Some(cause) = e {
            text.push_str(&format!("{cause}: "));
            e = cause.source();
        }
        text
    };
    let result = match done {
        Ok(Outcome { unpacked, archive, blob }) => Ok(format!("{unpacked:?} {archive:?} {blob:?}")),
        Err(e) => Err(text(Some(&e))),
    };
    let found = tree(tmp.path(), None).into_iter().map(|(path, what)| format!("{path}: {what}"));
    (result, found.collect())
}

/// Asserts that all ways give the same, and returns it.
fn same_in_all_ways(bytes: &[u8], options: &ApplyOptions) -> std::result::Result<String, String> {
    let mut results = Vec::new();
    for block in [512, 7000] {
        let mut ways = [1, 2, 3].map(|threads| {
            let options = ApplyOptions { threads, ..options.clone() };
            outcome(bytes, block, &options)
        });
        ways.sort();
        let [first, .., last] = ways;
        // No bytes into the log: content is among them.
        assert!(first == last, "{:?} and {:?}", first.0, last.0);
        results.push(first.0);
    }
    results.dedup();
    assert_eq!(results.len(), 1, "{results:?}");
    results.remove(0)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    let mut to =
        crate::compression::Compressor::new(&mut packed, crate::Compression::Gzip).unwrap();
    std::io::Write::write_all(&mut to, bytes).unwrap();
    to.finish().unwrap();
    packed
}

#[test]
fn threads_and_blocks_change_nothing() {
    let plain = layer();
    let digests = same_in_all_ways(&plain, &options()).unwrap();
    let digest = Digest::of(&plain).to_string();
    assert_eq!(digests.matches(&digest).count(), 2, "{digests}");
    let packed = gzip(&plain);
    let digests = same_in_all_ways(&packed, &options()).unwrap();
    assert!(digests.contains(&digest) && digests.contains(&Digest::of(&packed).to_string()));
}

#[test]
fn archives_cut_anywhere_fail_alike() {
    let plain = layer();
    for end in (0..plain.len()).step_by(5011) {
        // What is cut between two entries is whole.
        drop(same_in_all_ways(&plain[..end], &options()));
    }
    let packed = gzip(&plain);
    for end in (12..packed.len()).step_by(701) {
        let e = same_in_all_ways(&packed[..end], &options()).unwrap_err();
        assert!(e.contains("ends too early"), "{e}");
    }
}

#[test]
fn limits_are_exact_on_every_thread() {
    let plain = layer();
    let exact = plain.len() as u64;
    for (max, fits) in [(exact, true), (exact - 1, false), (4000, false)] {
        let mut options = options();
        options.limits.max_unpacked_bytes = max;
        match same_in_all_ways(&plain, &options) {
            Ok(_) => assert!(fits, "{max}"),
            Err(e) => assert!(!fits && e.contains("max_unpacked_bytes"), "{max}: {e}"),
        }
    }
    let mut few = options();
    few.limits.max_entries = 5;
    assert!(same_in_all_ways(&plain, &few).unwrap_err().contains("more than 5 entries"));
}

/// A reader that fails, or panics, after some bytes.
struct Breaks<'a>(&'a [u8], bool);

impl Read for Breaks<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(buf)? {
            0 if self.1 => panic!("on purpose"),
            0 => Err(Error::new(ErrorKind::DigestMismatch, "not what was promised").into()),
            n => Ok(n),
        }
    }
}

#[test]
fn an_error_of_the_input_comes_behind_what_was_read_before_it() {
    let plain = layer();
    for threads in [1, 2, 3] {
        let options = ApplyOptions { threads, ..options() };
        let tmp = scratch();
        let root = Dir::open(tmp.path()).unwrap();
        let job = Job { block: 512, ..Job::new(&root, LayerTarget::Tree, &options, None) };
        let mut input = Breaks(&plain[..6000], false);
        let e = job.run(&mut input, &mut crate::progress::ignore_progress).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::DigestMismatch);
        assert_eq!(std::fs::read(tmp.path().join("a/long")).unwrap(), [7; 3000]);
    }
}

#[test]
fn a_panic_of_the_callers_is_his_and_hangs_nobody() {
    let plain = layer();
    for threads in [1, 2, 3] {
        for in_input in [false, true] {
            let options = ApplyOptions { threads, ..options() };
            let tmp = scratch();
            let root = Dir::open(tmp.path()).unwrap();
            let job = Job { block: 512, ..Job::new(&root, LayerTarget::Tree, &options, None) };
            let run = || {
                let mut input = Breaks(&plain[..6000], in_input);
                job.run(&mut input, &mut |progress| {
                    assert!(in_input || progress.bytes < 3000, "on purpose");
                    ControlFlow::Continue(())
                })
            };
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        }
    }
}

#[test]
fn the_callback_is_called_on_the_callers_thread_and_stops_all() {
    let plain = layer();
    let caller = std::thread::current().id();
    for threads in [1, 2, 3] {
        let options = ApplyOptions { threads, ..options() };
        let mut last = 0;
        for stop_at in [0, 1, 5, usize::MAX] {
            let tmp = scratch();
            let root = Dir::open(tmp.path()).unwrap();
            let job = Job { block: 512, ..Job::new(&root, LayerTarget::Tree, &options, None) };
            let mut calls = 0;
            let done = job.run(&mut &plain[..], &mut |progress| {
                assert_eq!(std::thread::current().id(), caller);
                calls += 1;
                last = progress.entries;
                if calls > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            match done {
                Ok(done) => assert!(stop_at == usize::MAX && last == done.unpacked.counts.entries),
                Err(e) => assert!(calls == stop_at + 1 && e.kind() == ErrorKind::Cancelled, "{e}"),
            }
        }
    }
}
