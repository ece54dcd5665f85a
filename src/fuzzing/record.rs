//! Records of archives: their codec, and that every archive that is accepted comes back.

use std::fs::{self, File};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::archive::{CAGE, script, with_sums};
use crate::archive::record::{Capture, Captured, recoded, replay};
use crate::archive::{ApplyLimits, ApplyOptions, LayerTarget, apply};
use crate::layer::LayerFormat;
use crate::path::Name;
use crate::progress::ignore_progress;
use crate::sys::dir::Dir;

/// Records. The first byte chooses what the others are:
/// - operations, or kept contents: they are either damaged, or the same when written again;
/// - an archive, as it is or as a script of entries with names that collide, and the format of the
///   layer: if it can be unpacked, record and layer give it back, byte for byte.
pub fn record(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    if choice & 1 == 0 {
        if let Some(again) = recoded(data, choice & 2 == 0) {
            assert_eq!(again, data);
        }
        return;
    }
    let format = if choice & 4 == 0 { LayerFormat::Aufs } else { LayerFormat::OverlayUser };
    let archive = if choice & 2 == 0 { with_sums(data) } else { script(data, &CAGE.top) };
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let name = format!("record-{}", RUNS.fetch_add(1, Ordering::Relaxed));
    let root = CAGE.top.join("in").join(&name);
    fs::create_dir_all(root.join("fs")).expect("a layer can be made");
    comes_back(&archive, &Dir::open(&root).expect("it is there"), format);
    let above = Dir::open(CAGE.top.join("in")).expect("the roots are there");
    let name = Name::new(name).expect("a root's name is one");
    crate::sys::remove::remove_tree(&above, &name, &mut || Ok(())).expect("a root can be removed");
}

fn comes_back(archive: &[u8], dir: &Dir, format: LayerFormat) {
    let mut options = ApplyOptions::unprivileged();
    options.limits =
        ApplyLimits { max_entries: 500, max_unpacked_bytes: 1 << 20, ..ApplyLimits::default() };
    let layer = dir.open_dir(&Name::new("fs").expect("a name")).expect("the layer is there");
    let record = Name::new("record").expect("a name");
    let capture = Capture::new(dir, record.clone(), options.record).expect("a record can begin");
    let capture = Mutex::new(capture);
    let target = LayerTarget::Layer(format);
    let mut input = archive;
    let applied = apply(&mut input, &layer, target, &options, Some(&capture), &mut ignore_progress);
    let applied = match applied {
        Ok(applied) => applied,
        Err(_) => return,
    };
    let capture = capture.into_inner().expect("nobody panicked");
    let captured = capture
        .finish(applied.diff_id, applied.unpacked_bytes, applied.entries)
        .expect("a record can be finished");
    assert_eq!(captured, Captured::Record, "nothing is near a bound");
    let record: File = dir.open_file(&record).expect("the record is there");
    let mut out = Vec::new();
    let replayed = replay(&record, &layer, applied.diff_id, &mut out, 1, &mut ignore_progress)
        .expect("an archive that was unpacked comes back");
    assert_eq!((replayed.bytes, replayed.entries), (applied.unpacked_bytes, applied.entries));
    // Its digest was compared; if it was plain, it can be itself.
    if applied.unpacked_bytes == applied.blob_bytes {
        assert!(out == archive);
    }
}
