//! Images: `import`, `save`.

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use stratafs::{
    ApplyLimits, Compression, ImageLayout, ImageSelector, ImportOptions, LayoutWriter, ProgressFn,
    SaveOptions, SavedImage, import_image, save_image,
};
#[cfg(feature = "fuse")]
use stratafs::{ImageRecord, Store};

use super::layers::refuse_stdout;
use super::snapshots::Image;
use super::{Context, Missing, Result};
use crate::args::{self, CompressionName};
use crate::failure::Failure;
use crate::output::Report;

pub(super) fn import(context: &Context, args: args::Import) -> Result {
    let mut reporter = context.reporter();
    let mut progress = |progress| reporter.step(progress);
    let layout = open_layout(context, &args.image, &mut progress)?;
    let name = match (args.name, &args.reference) {
        (Some(name), _) => name,
        (None, Some(reference)) => reference.clone(),
        (None, None) => own_name(&layout, &args.image)?,
    };
    let mut options = ImportOptions::new();
    options.select = ImageSelector { name: args.reference, platform: args.platform };
    options.threads = args.threads;
    options.keep_blobs = args.keep_blobs;
    let store = context.open(Missing::Create)?;
    options.apply = context.apply_options(store.owners());
    let image = import_image(&store, &layout, &name, &options, &mut progress)?;
    drop(reporter);
    context.print(&Imported(image.into()))
}

/// Imports as `import` does that is told nothing but a path.
#[cfg(feature = "fuse")]
pub(super) fn import_under_its_own_name(
    context: &Context,
    store: &Store,
    path: &Path,
) -> Result<ImageRecord> {
    let mut reporter = context.reporter();
    let mut progress = |progress| reporter.step(progress);
    let layout = open_layout(context, path, &mut progress)?;
    let name = own_name(&layout, path)?;
    let mut options = ImportOptions::new();
    options.apply = context.apply_options(store.owners());
    Ok(import_image(store, &layout, &name, &options, &mut progress)?)
}

fn open_layout(
    context: &Context,
    path: &Path,
    progress: &mut ProgressFn<'_>,
) -> Result<ImageLayout> {
    if path == Path::new("-") || ImageLayout::needs_spool(path)? {
        let limit = ApplyLimits::default().max_unpacked_bytes;
        return Ok(ImageLayout::spool(context.input(path)?, env::temp_dir(), limit, progress)?);
    }
    Ok(ImageLayout::open(path)?)
}

/// The name that the layout has for its only image, else that of its file.
fn own_name(layout: &ImageLayout, path: &Path) -> Result<String> {
    let mut names = layout.names()?;
    if names.len() == 1
        && let Some(name) = names.pop()
    {
        return Ok(name);
    }
    // "." and "dir/.." have no name of their own.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_stem()
        .and_then(|stem| stem.to_str())
        .map(|stem| stem.strip_suffix(".tar").unwrap_or(stem))
        .filter(|stem| !matches!(*stem, "-" | ""))
        .map(str::to_owned)
        .ok_or_else(|| Failure::Usage("the image has no name: give one with --name".to_owned()))
}

pub(super) fn save(context: &Context, args: &args::Save) -> Result {
    let to_stdout = args.output == Path::new("-");
    if to_stdout {
        refuse_stdout(context)?;
    }
    let store = context.open(Missing::Refuse)?;
    let layout = if to_stdout {
        LayoutWriter::to_stream(io::stdout(), env::temp_dir())?
    } else if names_directory(&args.output) {
        LayoutWriter::to_directory(&args.output)?
    } else {
        let beside = args.output.parent().filter(|dir| !dir.as_os_str().is_empty());
        LayoutWriter::to_tar_file(&args.output, beside.unwrap_or(Path::new(".")))?
    };
    let mut options = SaveOptions::new();
    options.compression = args.compress.map(|compression| match compression {
        CompressionName::Gzip => Compression::Gzip,
        CompressionName::Zstd => Compression::Zstd,
        CompressionName::None => Compression::None,
    });
    let mut reporter = context.reporter();
    let saved =
        save_image(&store, &args.name, layout, &options, &mut |progress| reporter.step(progress))?;
    drop(reporter);
    if to_stdout { Ok(()) } else { context.print(&Saved::from(&saved)) }
}

/// A directory is meant by one that is there, and by a slash at the end.
fn names_directory(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/")
        || fs::metadata(path).is_ok_and(|found| found.is_dir())
}

/// The answer to an import: in JSON all of it, in text only the name.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Imported(Image);

impl Report for Imported {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.0.name)
    }
}

/// What was saved.
#[derive(Debug, Serialize)]
struct Saved {
    manifest: String,
    config: String,
    diff_ids: Vec<String>,
}

impl From<&SavedImage> for Saved {
    fn from(saved: &SavedImage) -> Saved {
        Saved {
            manifest: saved.manifest.to_string(),
            config: saved.config.to_string(),
            diff_ids: saved.diff_ids.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Report for Saved {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.manifest)
    }
}
