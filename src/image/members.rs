//! Members of a Docker archive by name: in a tar file, or in a directory that one was unpacked to.
//!
//! Old archives have links among their members, from the layer of one image to that of another.
//! They are followed here, inside of the archive: `..` above its top, and what leads nowhere, is an
//! error, and so are more than [`LINKS_MAX`] links in a row. No link of a directory leads out of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::blob::Section;
use super::docker_manifest::member_path;
use super::quote::quoted;
use super::tar_index::{Content, no_file, scan};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::path::RelPath;
use crate::sys::dir::Dir;
use crate::sys::resolve::Resolver;
use crate::sys::stat::FileType;

/// How many links may lead from one to the next.
const LINKS_MAX: usize = 8;

/// Where the members are.
#[derive(Debug)]
pub(super) enum Members {
    Tar(Arc<File>),
    Directory(Dir),
}

/// A member that was found: bytes of the tar file, or a file, which is opened when it is read.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Section(Section),
    File(RelPath),
}

/// What a name stands for.
enum Found {
    Place(Place),
    Link(RelPath),
}

impl Members {
    /// Finds all of these; `path` is the archive's, for messages.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::InvalidImage`] for what comes twice and for links to
    /// nowhere, [`ErrorKind::Unsupported`] for what is no file.
    pub(super) fn find(
        &self,
        names: &BTreeSet<RelPath>,
        path: &Path,
    ) -> Result<BTreeMap<RelPath, Place>> {
        // Each name with the link that it now stands for.
        let mut asked: BTreeMap<RelPath, RelPath> =
            names.iter().map(|name| (name.clone(), name.clone())).collect();
        let mut places = BTreeMap::new();
        for _ in 0..=LINKS_MAX {
            let wanted: BTreeSet<&RelPath> = asked.values().collect();
            let found = match self {
                Members::Tar(file) => in_tar(file, &wanted, path)?,
                Members::Directory(dir) => in_directory(dir, &wanted, path)?,
            };
            let mut next = BTreeMap::new();
            for (name, at) in asked {
                match found.get(&at) {
                    Some(Found::Place(place)) => {
                        places.insert(name, place.clone());
                    }
                    Some(Found::Link(to)) => {
                        next.insert(name, to.clone());
                    }
                    None => {
                        let what = show(&at);
                        let link = if name == at { String::new() } else { link_from(&name) };
                        return Err(Error::new(
                            ErrorKind::NotFound,
                            format!("{what}{link} is missing in"),
                        )
                        .with_path(path));
                    }
                }
            }
            if next.is_empty() {
                return Ok(places);
            }
            asked = next;
        }
        Err(Error::new(
            ErrorKind::InvalidImage,
            format!("more than {LINKS_MAX} links in a row lead to a file of the image in"),
        )
        .with_path(path))
    }

    /// The bytes of a member.
    pub(super) fn open(&self, place: &Place, path: &Path) -> Result<Section> {
        match (place, self) {
            (Place::Section(section), _) => Ok(section.clone()),
            (Place::File(name), Members::Directory(dir)) => {
                let open = || -> io::Result<Section> {
                    let parent = name.parent().unwrap_or_default();
                    let parent = Resolver::available().open_dir(dir, &parent)?;
                    let last = name.file_name().ok_or(io::ErrorKind::IsADirectory)?;
                    let file = parent.open_file(&last)?;
                    let size = file.metadata()?.len();
                    Ok(Section::new(Arc::new(file), 0, size))
                };
                open().at("open", path.join(name))
            }
            // `find` gives no such place.
            (Place::File(name), Members::Tar(_)) => {
                Err(Error::io("open", path.join(name), io::ErrorKind::NotFound.into()))
            }
        }
    }
}

fn show(name: &RelPath) -> String {
    quoted(&String::from_utf8_lossy(name.as_bytes()))
}

fn link_from(name: &RelPath) -> String {
    format!(", which {} is a link to,", show(name))
}

fn in_tar(
    file: &Arc<File>,
    wanted: &BTreeSet<&RelPath>,
    path: &Path,
) -> Result<BTreeMap<RelPath, Found>> {
    let mut found = BTreeMap::new();
    scan(file, path, &mut |member| {
        let Some(name) = member_path(&member.name).filter(|name| wanted.contains(name)) else {
            return Ok(());
        };
        let here = match member.content {
            Content::File(section) => Found::Place(Place::Section(section)),
            // Its target is a member's name, not relative to the link.
            Content::HardLink(to) => {
                Found::Link(member_path(&to).ok_or_else(|| leads_out(&name, path))?)
            }
            Content::Symlink(to) => Found::Link(follow(&name, &to, path)?),
            Content::Other(kind) => return Err(no_file(&show(&name), kind, path)),
        };
        let what = show(&name);
        if found.insert(name, here).is_some() {
            return Err(Error::new(ErrorKind::InvalidImage, format!("{what} comes twice in"))
                .with_path(path));
        }
        Ok(())
    })?;
    Ok(found)
}

fn in_directory(
    dir: &Dir,
    wanted: &BTreeSet<&RelPath>,
    path: &Path,
) -> Result<BTreeMap<RelPath, Found>> {
    let mut found = BTreeMap::new();
    for name in wanted.iter().copied() {
        let Some(last) = name.file_name() else {
            continue;
        };
        let at: PathBuf = path.join(name);
        let parent = name.parent().unwrap_or_default();
        // Links on the way stay inside.
        let parent = match Resolver::available().open_dir(dir, &parent) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            parent => parent.at("look for", &at)?,
        };
        let here = match parent.try_stat_at(&last).at("look for", &at)? {
            None => continue,
            Some(stat) if stat.is_file() => Found::Place(Place::File(name.clone())),
            Some(stat) if stat.file_type == FileType::Symlink => {
                let to = parent.read_link(&last).at("read link", &at)?;
                Found::Link(follow(name, &to, path)?)
            }
            Some(_) => {
                let text = "part of an image is not a regular file:";
                return Err(Error::new(ErrorKind::InvalidImage, text).with_path(at));
            }
        };
        found.insert(name.clone(), here);
    }
    Ok(found)
}

/// Where a symlink leads, by its text alone.
fn follow(link: &RelPath, to: &[u8], path: &Path) -> Result<RelPath> {
    if to.first() == Some(&b'/') {
        return Err(leads_out(link, path));
    }
    let mut at = link.parent().unwrap_or_default();
    for component in to.split(|b| *b == b'/') {
        if component == b".." {
            if at.is_root() {
                return Err(leads_out(link, path));
            }
            at.pop();
        } else {
            for name in member_path(component).ok_or_else(|| leads_out(link, path))?.components() {
                at.push(&name);
            }
        }
    }
    Ok(at)
}

fn leads_out(link: &RelPath, path: &Path) -> Error {
    let text = format!("{} is a link that leads out of the image:", show(link));
    Error::new(ErrorKind::InvalidImage, text).with_path(path)
}
