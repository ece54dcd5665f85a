//! Snapshots and their names: `prepare`, `view`, `commit`, `ls`, `stat`, `usage`, `rm`.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;
use stratafs::{CommitOptions, ErrorKind, ImageRecord, Info, RecordState, Store, Usage};

use super::{Context, Missing, Result, snapshot_or_top};
use crate::args;
use crate::output::{Report, size, timestamp};

pub(super) fn prepare(context: &Context, args: args::Prepare) -> Result {
    let store = context.open(Missing::Create)?;
    let parent = parent(&store, args.parent.as_deref())?;
    let info = store.prepare(&args.key, parent.as_deref(), args.labels.into_map())?;
    context.print(&Created(info.into()))
}

pub(super) fn view(context: &Context, args: args::Prepare) -> Result {
    let store = context.open(Missing::Create)?;
    let parent = parent(&store, args.parent.as_deref())?;
    let info = store.view(&args.key, parent.as_deref(), args.labels.into_map())?;
    context.print(&Created(info.into()))
}

pub(super) fn commit(context: &Context, args: args::Commit) -> Result {
    let store = context.open(Missing::Refuse)?;
    let mut options = CommitOptions::new();
    options.parent = parent(&store, args.parent.as_deref())?;
    options.labels = args.labels.into_map();
    let info = store.commit(&args.name, &args.key, options)?;
    context.print(&Created(info.into()))
}

/// The snapshot that a PARENT means.
pub(super) fn parent(store: &Store, name: Option<&str>) -> Result<Option<String>> {
    name.map_or(Ok(None), |name| snapshot_or_top(store, name))
}

pub(super) fn ls(context: &Context, args: &args::Ls) -> Result {
    let store = context.open(Missing::Refuse)?;
    let mut snapshots = Vec::new();
    store.walk(&args.filters, &mut |info| {
        snapshots.push(Snapshot::from(info.clone()));
        Ok(())
    })?;
    let images = if args.filters.is_empty() {
        store.images()?.into_iter().map(Image::from).collect()
    } else {
        Vec::new()
    };
    context.print(&Listing { snapshots, images })
}

pub(super) fn stat(context: &Context, args: &args::Key) -> Result {
    let store = context.open(Missing::Refuse)?;
    match find(&store, &args.key)? {
        Found::Snapshot(info) => context.print(&Snapshot::from(info)),
        Found::Image(image) => context.print(&Image::from(image)),
    }
}

pub(super) fn usage(context: &Context, args: &args::Key) -> Result {
    let store = context.open(Missing::Refuse)?;
    let usage = match find(&store, &args.key)? {
        Found::Snapshot(info) => store.usage(&info.key)?,
        Found::Image(image) => {
            let mut sum = Usage::default();
            for layer in &image.layers {
                let layer = store.usage(layer)?;
                sum.bytes += layer.bytes;
                sum.inodes += layer.inodes;
            }
            sum
        }
    };
    context.print(&Used(usage))
}

pub(super) fn rm(context: &Context, args: &args::Rm) -> Result {
    let store = context.open(Missing::Refuse)?;
    let mut removed = Vec::new();
    let outcome = args.names.iter().try_for_each(|name| remove(&store, name, &mut removed));
    // What is gone is gone, even if another could not be removed.
    if outcome.is_ok() || !removed.is_empty() {
        context.print(&Removed { removed })?;
    }
    outcome
}

fn remove(store: &Store, name: &str, removed: &mut Vec<String>) -> Result {
    match find(store, name)? {
        Found::Snapshot(info) => {
            store.remove(&info.key)?;
            removed.push(info.key);
        }
        Found::Image(image) => {
            let layers = store.remove_image(&image.name)?;
            removed.push(image.name);
            removed.extend(layers);
        }
    }
    Ok(())
}

/// What a name stands for where images have a meaning of their own.
enum Found {
    Snapshot(Info),
    Image(ImageRecord),
}

fn find(store: &Store, name: &str) -> Result<Found> {
    match store.stat(name) {
        Ok(info) => Ok(Found::Snapshot(info)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Found::Image(super::image(store, name)?)),
        Err(e) => Err(e.into()),
    }
}

/// A snapshot as printed.
#[derive(Debug, Serialize)]
struct Snapshot {
    kind: &'static str,
    key: String,
    parent: Option<String>,
    labels: BTreeMap<String, String>,
    created: String,
    updated: String,
    usage: Option<Usage>,
    diff_id: Option<String>,
    /// Whether the archive of that digest can be given back; null if there was none.
    record: Option<bool>,
    /// Why it cannot.
    no_record: Option<String>,
}

impl From<Info> for Snapshot {
    fn from(info: Info) -> Snapshot {
        let (record, no_record) = match info.record {
            RecordState::Kept => (Some(true), None),
            RecordState::Missing(reason) => (Some(false), Some(reason)),
            _ => (None, None),
        };
        Snapshot {
            kind: info.kind.as_str(),
            key: info.key,
            parent: info.parent,
            labels: info.labels,
            created: timestamp(info.created),
            updated: timestamp(info.updated),
            usage: info.usage,
            diff_id: info.diff_id.map(|id| id.to_string()),
            record,
            no_record,
        }
    }
}

impl Report for Snapshot {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "key      {}", self.key)?;
        writeln!(out, "kind     {}", self.kind)?;
        if let Some(parent) = &self.parent {
            writeln!(out, "parent   {parent}")?;
        }
        for (key, value) in &self.labels {
            writeln!(out, "label    {key}={value:?}")?;
        }
        writeln!(out, "created  {}", self.created)?;
        writeln!(out, "updated  {}", self.updated)?;
        if let Some(usage) = self.usage {
            writeln!(out, "usage    {} bytes, {} inodes", usage.bytes, usage.inodes)?;
        }
        if let Some(diff_id) = &self.diff_id {
            writeln!(out, "diff id  {diff_id}")?;
        }
        if self.record == Some(true) {
            writeln!(out, "record   kept: `export` gives the imported archive back")?;
        }
        if let Some(reason) = &self.no_record {
            writeln!(out, "record   none: {reason}")?;
        }
        Ok(())
    }
}

/// The answer to what makes a snapshot: in JSON all of it, in text only its name.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Created(Snapshot);

impl Report for Created {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.0.key)
    }
}

/// An image as printed.
#[derive(Debug, Serialize)]
pub(super) struct Image {
    kind: &'static str,
    pub(super) name: String,
    manifest: String,
    config: String,
    layers: Vec<String>,
    created: String,
}

impl From<ImageRecord> for Image {
    fn from(image: ImageRecord) -> Image {
        Image {
            kind: "image",
            name: image.name,
            manifest: image.manifest.to_string(),
            config: image.config.to_string(),
            layers: image.layers,
            created: timestamp(image.created),
        }
    }
}

impl Report for Image {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "name      {}", self.name)?;
        writeln!(out, "kind      {}", self.kind)?;
        writeln!(out, "manifest  {}", self.manifest)?;
        writeln!(out, "config    {}", self.config)?;
        for layer in &self.layers {
            writeln!(out, "layer     {layer}")?;
        }
        writeln!(out, "created   {}", self.created)
    }
}

#[derive(Debug, Serialize)]
struct Listing {
    snapshots: Vec<Snapshot>,
    images: Vec<Image>,
}

impl Report for Listing {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let heading = ["KIND", "SIZE", "CREATED", "NAME", "PARENT"].map(str::to_owned);
        let snapshots = self.snapshots.iter().map(|snapshot| {
            [
                snapshot.kind.to_owned(),
                snapshot.usage.map_or_else(|| "-".to_owned(), |usage| size(usage.bytes)),
                snapshot.created.clone(),
                snapshot.key.clone(),
                snapshot.parent.clone().unwrap_or_else(|| "-".to_owned()),
            ]
        });
        let images = self.images.iter().map(|image| {
            [
                image.kind.to_owned(),
                "-".to_owned(),
                image.created.clone(),
                image.name.clone(),
                image.layers.last().cloned().unwrap_or_else(|| "-".to_owned()),
            ]
        });
        // Those that may be very long come last.
        let rows: Vec<_> = [heading].into_iter().chain(snapshots).chain(images).collect();
        for row in &rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = rows
                    .iter()
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or(0);
                line += &format!("{cell:width$}  ");
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct Used(pub(super) Usage);

impl Report for Used {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Usage { bytes, inodes } = self.0;
        writeln!(out, "{bytes} bytes ({}), {inodes} inodes", size(bytes))
    }
}

#[derive(Debug, Serialize)]
struct Removed {
    removed: Vec<String>,
}

impl Report for Removed {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        self.removed.iter().try_for_each(|name| writeln!(out, "{name}"))
    }
}
