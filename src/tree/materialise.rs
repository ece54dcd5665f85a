//! A plain tree of what a stack of layers shows.

use super::writer::{Reports, Writer};
use crate::changes::{Mtimes, trees};
use crate::error::Result;
use crate::layer::LayerFormat;
use crate::layer::stack::LayerStack;
use crate::progress::ProgressFn;
use crate::sys::dir::Dir;

/// Makes in `into`, an empty directory, what `layers` show, and gives it the attributes of their root.
/// The layers must be settled. After an error a part is there.
pub(crate) fn materialise(
    layers: &LayerStack,
    format: LayerFormat,
    into: &Dir,
    progress: &mut ProgressFn<'_>,
) -> Result<()> {
    let reports = Reports::new(progress);
    let mut writer = Writer::new(layers, format, into, &reports)?;
    // Against nothing, everything is new.
    let nothing = LayerStack::default();
    let mut quiet = crate::progress::ignore_progress;
    trees(layers, &nothing, Mtimes::Count, &mut quiet, &mut |found| {
        reports.entry()?;
        match found.upper {
            Some(from) => writer.write(found.path, from),
            None => Ok(()),
        }
    })?;
    writer.finish()
}
