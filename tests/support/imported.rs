//! An image of two layers that a script imports, and what the store holds on the way.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::Path;

use stratafs::{
    ApplyOptions, Durability, ImageLayout, ImportOptions, LayoutWriter, Progress, SaveOptions,
    Store, ignore_progress, import_image, save_image,
};

use super::model::{self, Model};
use super::{script, suite};

/// Writes a layout with the image to `dir`; the same bytes each time.
pub fn write_layout(dir: &Path) {
    let scratch = suite::temp();
    let store = Store::open(scratch.path(), model::options(Durability::None)).unwrap();
    script::apply(&store, "lower", None, &mut ignore_progress);
    script::apply(&store, "upper", Some("lower"), &mut ignore_progress);
    let mut options = SaveOptions::new();
    options.export.source_date_epoch = Some(1_000_000_000);
    let writer = LayoutWriter::to_directory(dir).unwrap();
    save_image(&store, "upper", writer, &options, &mut ignore_progress).unwrap();
}

/// Imports the image, as "imported".
pub fn import(store: &Store) {
    let dir = suite::temp();
    write_layout(dir.path());
    import_from(store, dir.path(), None, &mut ignore_progress);
}

/// Imports the image of a layout written before, so many layers at once.
pub fn import_from(
    store: &Store,
    dir: &Path,
    threads: Option<NonZeroUsize>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) {
    let layout = ImageLayout::open(dir).unwrap();
    let mut options = ImportOptions::new();
    options.threads = threads;
    options.apply = ApplyOptions::unprivileged();
    import_image(store, &layout, "imported", &options, progress).unwrap();
}

/// What [`import`] adds to a store, one after another: each layer, the image.
pub fn states(before: &Model) -> Vec<Model> {
    let scratch = suite::temp();
    let store = Store::open(scratch.path(), model::options(Durability::None)).unwrap();
    import(&store);
    let added = Model::of(&store);
    let (_, layers) = &added.images["imported"];
    assert_eq!((layers.len(), added.snapshots.len()), (2, 2));
    let mut states = Vec::new();
    let mut model = before.clone();
    for layer in layers {
        model.snapshots.insert(layer.clone(), added.snapshots[layer].clone());
        states.push(model.clone());
    }
    model.images.extend(added.images);
    states.push(model);
    states
}
