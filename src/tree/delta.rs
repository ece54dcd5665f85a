//! The layer that makes one tree of another: what a tree has to say beyond the layers below it.

use super::attributes::would_be_a_mark;
use super::writer::{Reports, Writer};
use crate::changes::{ChangeKind, Difference, Mtimes, trees_since};
use crate::error::{IoContext, Result};
use crate::layer::LayerFormat;
use crate::layer::marks::{self, Mark};
use crate::layer::stack::{Branch, LayerStack, Visible};
use crate::layer::usage::{Counter, Usage};
use crate::layer::walk::{Descend, walk};
use crate::path::RelPath;
use crate::progress::{ProgressFn, ignore_progress};
use crate::sys::dir::Dir;
use crate::sys::stat::{Stat, Time};

/// Writes into `into`, an empty directory, a layer of `format` that shows `tree` when it is put on
/// `below`. Times count: what was only touched is in the layer, as in one that overlayfs wrote. `since`
/// is the moment from which on the tree, made as a copy of `below`, has been edited.
///
/// Files of the tree that share an inode do so in the layer, where all their names are if one is.
pub(crate) fn write_delta(
    tree: &Branch,
    below: &LayerStack,
    since: Option<Time>,
    into: &Dir,
    progress: &mut ProgressFn<'_>,
) -> Result<()> {
    let format = tree.format;
    let plain = LayerStack::plain(tree.dir.clone());
    let reports = Reports::new(progress);
    let mut writer = Writer::new(&plain, format, into, &reports)?;
    let mut quiet = ignore_progress;
    trees_since(&plain, below, Mtimes::Count, since, &mut quiet, &mut |found| {
        reports.entry()?;
        match (found.kind, found.upper) {
            (Some(ChangeKind::Deleted), _) => delete(&mut writer, format, found.path),
            (Some(_), Some(new)) => {
                refuse_marks(format, found.path, new)?;
                writer.write(found.path, new)?;
                if replaces(found) {
                    let dir = writer.go_to(found.path)?;
                    marks::make_opaque(format, dir).at("make opaque", found.path)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    })?;
    if writer.links.are_incomplete() {
        write_other_names(&mut writer, &tree.dir)?;
    }
    writer.finish()
}

fn delete(writer: &mut Writer<'_, '_, '_>, format: LayerFormat, path: &RelPath) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    let dir = writer.go_to(&parent)?;
    marks::make_whiteout(format, dir, &name).at("mark the deletion of", path)
}

/// Whether it is a directory where there was something else: nothing that other layers may have there
/// is to come back.
fn replaces(found: &Difference<'_>) -> bool {
    found.upper.is_some_and(|new| new.stat.is_dir())
        && found.lower.is_some_and(|old| !old.stat.is_dir())
}

fn refuse_marks(format: LayerFormat, path: &RelPath, new: &Visible) -> Result<()> {
    match marks::decode(format, &new.name, &new.stat) {
        Mark::None => Ok(()),
        _ if marks::is_zero_device(&new.stat) => {
            Err(would_be_a_mark(path, "it is the character device 0:0"))
        }
        _ => Err(would_be_a_mark(path, "its name begins with .wh.")),
    }
}

/// Adds the names that are as they were below of files that have changed names too: an unchanged
/// file with a new name is one file still.
fn write_other_names(writer: &mut Writer<'_, '_, '_>, tree: &Dir) -> Result<()> {
    walk(tree, &mut |visit| {
        if visit.stat.nlink > 1 && !visit.stat.is_dir() && writer.links.know(visit.stat) {
            let parent = visit.path.parent().unwrap_or_default();
            let dir = writer.go_to(&parent)?;
            if dir.try_stat_at(visit.name).at("look for", visit.path)?.is_none() {
                let from = Visible {
                    layer: 0,
                    stat: *visit.stat,
                    dir: visit.dir.try_clone().at("open the directory of", visit.path)?.into(),
                    name: visit.name.clone(),
                };
                writer.write(visit.path, &from)?;
            }
        }
        Ok(Descend::Into)
    })
}

/// What [`write_delta`] would take on disk, without writing it: the room of what has changed, and an
/// inode for each deletion and each directory on the way.
pub(crate) fn count_delta(
    tree: &Branch,
    below: &LayerStack,
    since: Option<Time>,
    progress: &mut ProgressFn<'_>,
) -> Result<Usage> {
    let plain = LayerStack::plain(tree.dir.clone());
    let mut counter = Counter::default();
    counter.add(&tree.dir.stat().at("look at", "the root of a tree")?);
    let mut deletions = 0;
    // The directories on the way, and whether they are counted.
    let mut way: Vec<(RelPath, Stat, bool)> = Vec::new();
    trees_since(&plain, below, Mtimes::Count, since, progress, &mut |found| {
        while way.last().is_some_and(|(dir, ..)| !found.path.starts_with(dir)) {
            way.pop();
        }
        if found.kind.is_some() {
            for (_, stat, counted) in way.iter_mut().filter(|(.., counted)| !counted) {
                counter.add(stat);
                *counted = true;
            }
        }
        match found.upper {
            Some(new) => {
                if found.kind.is_some() {
                    counter.add(&new.stat);
                }
                if new.stat.is_dir() {
                    way.push((found.path.clone(), new.stat, found.kind.is_some()));
                }
            }
            None => deletions += 1,
        }
        Ok(())
    })?;
    let Usage { bytes, inodes } = counter.usage();
    Ok(Usage { bytes, inodes: inodes.saturating_add(deletions) })
}
