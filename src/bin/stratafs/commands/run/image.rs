//! What a command is to run on, and what the image says of how.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use stratafs::{ErrorKind, Image, ImageRecord, Info, Kind, Store};

use super::super::{Context, Result, images};
use crate::failure::Failure;

/// What the command's root directory is made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Base {
    /// This snapshot itself.
    Active(String),
    /// A new one on top of this; none: on nothing.
    Committed(Option<String>),
}

/// What an image says of its command; nothing, where there is no image.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Configured {
    entrypoint: Vec<String>,
    arguments: Vec<String>,
    pub(super) environment: Vec<(OsString, OsString)>,
    pub(super) directory: Option<PathBuf>,
    pub(super) user: Option<String>,
}

/// Finds what was named; an archive is imported.
pub(super) fn find(context: &Context, store: &Store, name: &OsStr) -> Result<(Base, Configured)> {
    if let Some(name) = name.to_str()
        && let Some(found) = in_store(store, name)?
    {
        return Ok(found);
    }
    let path = Path::new(name);
    if path.symlink_metadata().is_err() {
        return Err(Failure::NotFound(format!(
            "there is no snapshot, no image and no file {name:?}: `stratafs ls` lists what there is, and \
             `stratafs import` brings an image"
        )));
    }
    let image = images::import_under_its_own_name(context, store, path)?;
    if !context.json {
        // By that name it is there the next time. Should nobody read it, `ls` tells.
        let _ = writeln!(io::stderr(), "imported {path:?} as {:?}", image.name);
    }
    let configured = Configured::of(store, &image)?;
    Ok((Base::Committed(image.layers.last().cloned()), configured))
}

fn in_store(store: &Store, name: &str) -> Result<Option<(Base, Configured)>> {
    // What cannot be a name may be a path.
    let absent =
        |e: &stratafs::Error| matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InvalidArgument);
    match store.stat(name) {
        Ok(info) => {
            let configured = configuration_below(store, &info)?;
            let base = match info.kind {
                Kind::Active => Base::Active(info.key),
                Kind::Committed => Base::Committed(Some(info.key)),
                _ => {
                    return Err(Failure::Usage(format!(
                        "{name:?} is a view, and a command writes: name an image, or an active or committed \
                         snapshot"
                    )));
                }
            };
            return Ok(Some((base, configured)));
        }
        Err(e) if absent(&e) => {}
        Err(e) => return Err(e.into()),
    }
    match store.image(name) {
        Ok(image) => {
            let configured = Configured::of(store, &image)?;
            Ok(Some((Base::Committed(image.layers.last().cloned()), configured)))
        }
        Err(e) if absent(&e) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// What the image says that the snapshot was built on, if one was.
fn configuration_below(store: &Store, info: &Info) -> Result<Configured> {
    let images = store.images()?;
    let mut key = Some(info.key.clone());
    while let Some(name) = key {
        let is_top = |image: &&ImageRecord| image.layers.last() == Some(&name);
        if let Some(image) = images.iter().find(is_top) {
            return Configured::of(store, image);
        }
        key = store.stat(&name)?.parent;
    }
    Ok(Configured::default())
}

impl Configured {
    fn of(store: &Store, image: &ImageRecord) -> Result<Configured> {
        let read = Image::from_json(&store.blob(&image.manifest)?, &store.blob(&image.config)?)?;
        let configuration = read.configuration()?;
        let Some(config) = configuration.config() else { return Ok(Configured::default()) };
        let some = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let variable = |entry: &String| {
            let (key, value) = entry.split_once('=')?;
            Some((key.into(), value.into()))
        };
        Ok(Configured {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            arguments: config.cmd().clone().unwrap_or_default(),
            environment: config.env().iter().flatten().filter_map(variable).collect(),
            directory: some(config.working_dir()).map(PathBuf::from),
            user: some(config.user()),
        })
    }

    /// As docker puts it together: another entry point leaves nothing of the image's command.
    pub(super) fn command(
        &self,
        entrypoint: Option<&OsString>,
        given: &[OsString],
    ) -> Vec<OsString> {
        let own = |texts: &[String]| texts.iter().map(OsString::from).collect::<Vec<_>>();
        let mut command = match entrypoint {
            Some(program) => Some(program).filter(|p| !p.is_empty()).into_iter().cloned().collect(),
            None => own(&self.entrypoint),
        };
        match (given, entrypoint) {
            ([], None) => command.extend(own(&self.arguments)),
            (given, _) => command.extend_from_slice(given),
        }
        if command.is_empty() {
            command.push("/bin/sh".into());
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_put_together_as_docker_does() {
        let image = Configured {
            entrypoint: vec!["entry".to_owned()],
            arguments: vec!["a".to_owned()],
            ..Configured::default()
        };
        let program = OsString::from("other");
        let nothing = OsString::new();
        let given = ["x".into(), "y".into()];
        for (configured, entrypoint, given, expected) in [
            (&image, None, &[][..], "entry a"),
            (&image, None, &given, "entry x y"),
            (&image, Some(&program), &[], "other"),
            (&image, Some(&program), &given, "other x y"),
            (&image, Some(&nothing), &given, "x y"),
            (&image, Some(&nothing), &[], "/bin/sh"),
            (&Configured::default(), None, &[], "/bin/sh"),
            (&Configured::default(), None, &given, "x y"),
        ] {
            let command = configured.command(entrypoint, given).join(OsStr::new(" "));
            assert_eq!(command, expected);
        }
    }
}
