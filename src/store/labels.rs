//! Looking at snapshots: stat, usage, walk, and changing their labels.

use std::borrow::Cow;

use super::redirects::Refers;
use super::snapshot::{Info, Kind, Labels};
use super::{Fields, Filter, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::{Usage, usage};
use crate::progress::ignore_progress;

impl Fields for Info {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["name"] => Some(Cow::Borrowed(&self.key)),
            ["parent"] => Some(Cow::Borrowed(self.parent.as_deref().unwrap_or_default())),
            ["kind"] => Some(Cow::Borrowed(self.kind.as_str())),
            ["labels", key @ ..] if !key.is_empty() => {
                self.labels.get(&key.join(".")).map(|value| Cow::Borrowed(value.as_str()))
            }
            _ => None,
        }
    }
}

impl Store {
    /// What the store knows of a snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn stat(&self, key: &str) -> Result<Info> {
        Ok(self.metadata.read(|tx| tx.get(key))?.info)
    }

    /// Changes labels: with the field `labels`, or none at all, all of them; with `labels.KEY` that
    /// one, which is removed if `labels` does not hold it or holds it empty.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`].
    /// - [`ErrorKind::InvalidArgument`]: any other field.
    pub fn update(&self, key: &str, labels: Labels, fields: &[&str]) -> Result<Info> {
        self.durably(|tx| {
            let row = tx.get(key)?;
            let mut new = row.info.labels.clone();
            if fields.is_empty() {
                new.clone_from(&labels);
            }
            for field in fields {
                match field.split_once('.') {
                    None if *field == "labels" => new.clone_from(&labels),
                    Some(("labels", label)) if !label.is_empty() => match labels.get(label) {
                        Some(value) if !value.is_empty() => {
                            new.insert(label.to_owned(), value.clone());
                        }
                        _ => {
                            new.remove(label);
                        }
                    },
                    _ => {
                        return Err(Error::new(
                            ErrorKind::InvalidArgument,
                            format!(
                                "field {field:?} of a snapshot cannot be changed: only labels and \
                                 labels.KEY can"
                            ),
                        ));
                    }
                }
            }
            tx.set_labels(row.id, &new)?;
            Ok(tx.get(key)?.info)
        })
    }

    /// What a snapshot takes on disk, its parents not counted. Stored for committed and settled ones;
    /// an active one is walked, without any lock. A view takes nothing of its own. Of a snapshot that is
    /// used as a copy it is what its layer would take; what the copy itself takes is its image's size,
    /// less what it shares with the layers.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], and those of the file system.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        let row = self.metadata.read(|tx| tx.get(key))?;
        match (row.info.kind, row.settled, row.info.usage) {
            (Kind::View, ..) => Ok(Usage::default()),
            (_, true, Some(usage)) => Ok(usage),
            _ if self.ahead(&row)?.is_some() => self.delta_usage(&row),
            _ if self.refers_below(&row)? == Refers::Directories => {
                self.catch_up(&row, &mut ignore_progress)?;
                usage::count(&self.layout.layer_dir(row.id)?, &mut || Ok(()))
            }
            _ => usage::count(&self.layout.layer_dir(row.id)?, &mut || Ok(())),
        }
    }

    /// Calls `each` for every snapshot that one of the filters matches, for all if there are none. The
    /// listing is of one moment; `each` may call the store.
    ///
    /// # Errors
    /// The first error of `each` ends the walk and is given.
    pub fn walk(
        &self,
        filters: &[Filter],
        each: &mut dyn FnMut(&Info) -> Result<()>,
    ) -> Result<()> {
        for row in self.metadata.read(|tx| tx.every())? {
            if Filter::any_matches(filters, &row.info) {
                each(&row.info)?;
            }
        }
        Ok(())
    }
}
