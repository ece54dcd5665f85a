//! Random archives over a few names, so that they collide: what must hold of any of them.
//!
//! The seeds are fixed; `STRATAFS_FULL` in the environment asks for many more.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::test_archive::*;
use super::*;
use crate::layer::stack::{Branch, LayerStack};

/// xorshift64.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    /// A path of one to three of the names a, b and c.
    pub(super) fn path(&mut self) -> String {
        let names: Vec<&str> = (0..=self.below(3))
            .map(|_| ["a", "b", "c"][usize::try_from(self.below(3)).unwrap()])
            .collect();
        names.join("/")
    }

    fn entries(&mut self, most: u64, marks: bool) -> Vec<String> {
        (0..=self.below(most))
            .map(|_| {
                let path = self.path();
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
                let slash = if parent.is_empty() { "" } else { "/" };
                match self.below(if marks { 8 } else { 5 }) {
                    0 | 1 => format!("{path}/"),
                    2..=4 => path,
                    5 | 6 => format!("{parent}{slash}.wh.{name}"),
                    _ => format!("{path}/.wh..wh..opq"),
                }
            })
            .collect()
    }
}

pub(super) fn cases() -> u64 {
    if std::env::var_os("STRATAFS_FULL").is_some() { 4_000 } else { 250 }
}

fn pack(entries: &[String]) -> Vec<u8> {
    archive(&entries.iter().map(String::as_str).collect::<Vec<_>>())
}

fn is_mark(entry: &str) -> bool {
    entry.rsplit('/').next().unwrap().starts_with(".wh.")
}

/// What a union of a layer and a tree shows, without directories: those of an upper layer may be
/// there for their marks alone.
fn union(layer: &Path, format: LayerFormat, lower: &Path) -> BTreeMap<String, String> {
    let branch = |path: &Path| Branch { dir: Arc::new(Dir::open(path).unwrap()), format };
    let stack = LayerStack::new(vec![branch(layer), branch(lower)]);
    let mut files = BTreeMap::new();
    let mut dirs = vec![(RelPath::ROOT, stack.root().unwrap())];
    while let Some((at, dir)) = dirs.pop() {
        for name in dir.list().unwrap().keys() {
            let path = at.join(name);
            match dir.enter(&stack, name).unwrap() {
                Some(below) => dirs.push((path, below)),
                None => {
                    let found = dir.lookup(name).unwrap().unwrap();
                    let mut file = found.dir.open_file(&found.name).unwrap();
                    let mut text = String::new();
                    file.read_to_string(&mut text).unwrap();
                    files.insert(path.as_path().to_str().unwrap().to_owned(), text);
                }
            }
        }
    }
    files
}

#[test]
fn a_layer_over_a_tree_shows_what_unpacking_into_the_tree_gives() {
    let mut compared = 0;
    for seed in 1..=cases() {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (before, entries) = (random.entries(6, false), random.entries(8, true));
        let (lower, plain) = (scratch(), scratch());
        if unpack(&pack(&before), lower.path(), LayerTarget::Tree).is_err() {
            continue;
        }
        unpack(&pack(&before), plain.path(), LayerTarget::Tree).unwrap();
        // A mark in what is a file below is no layer's, and a tree has no place for it.
        let strange = entries.iter().filter(|entry| is_mark(entry)).any(|mark| {
            let mut above = Path::new(mark).ancestors().skip(1);
            above.any(|path| lower.path().join(path).is_file())
        });
        let bytes = pack(&entries);
        if strange || unpack(&bytes, plain.path(), LayerTarget::Tree).is_err() {
            continue;
        }
        let mut expected = tree(plain.path(), None);
        expected.retain(|_, what| what != "dir");
        for format in formats() {
            let layer = scratch();
            unpack(&bytes, layer.path(), LayerTarget::Layer(format)).unwrap();
            let found = union(layer.path(), format, lower.path());
            assert_eq!(found, expected, "seed {seed}, {format}: {entries:?} over {before:?}");
        }
        compared += 1;
    }
    assert!(compared > cases() / 4, "{compared} archives were fit");
}

/// Without the opaque marks below an opaque directory, which hide nothing more.
fn once_opaque(mut layer: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let opaque: Vec<String> =
        layer.iter().filter(|(_, what)| *what == "opaque").map(|(path, _)| path.clone()).collect();
    for (path, what) in &mut layer {
        let below = opaque.iter().any(|o| path != o && Path::new(path).starts_with(o));
        if below && what == "opaque" {
            *what = "dir".to_owned();
        }
    }
    layer
}

#[test]
fn where_marks_stand_in_an_archive_changes_nothing() {
    let mut compared = 0;
    for seed in 1..=cases() {
        let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95));
        let entries = random.entries(8, true);
        let (marks, rest): (Vec<_>, Vec<_>) = entries.iter().cloned().partition(|e| is_mark(e));
        let first = [marks.clone(), rest.clone()].concat();
        let last = [rest, marks].concat();
        for format in formats() {
            let layers = [&entries, &first, &last].map(|order| {
                let tmp = scratch();
                let done = unpack(&pack(order), tmp.path(), LayerTarget::Layer(format));
                done.ok().map(|_| once_opaque(tree(tmp.path(), Some(format))))
            });
            compared += u64::from(layers[0].is_some());
            for layer in &layers[1..] {
                assert_eq!(&layers[0], layer, "seed {seed}, {format}: {entries:?}");
            }
        }
    }
    assert!(compared > cases() / 2, "{compared} archives were fit");
}
