//! The hidden link targets of AUFS.
//!
//! AUFS kept files with several names in `.wh..wh.plnk` at the root of its branch, and old archives
//! of such branches have those files there, and hard links to them elsewhere. The directory is not
//! part of the layer. Its files are put into a directory in the root that no entry can name, since
//! all names with its prefix are AUFS's own, and that is removed in the end.

use std::io::{self, BufRead};
use std::os::fd::AsFd;
use std::sync::Arc;

use super::target::Missing;
use super::{Unpack, refuse};
use crate::archive::entry::{Entry, EntryKind};
use crate::error::{IoContext, Result};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::remove::remove_tree;
use crate::sys::xattr::Of;

/// Where AUFS has them.
pub(super) const DIRECTORY: &[u8] = b".wh..wh.plnk";

/// Where we have them, with a number behind it.
const STASH: &str = ".wh..wh.stratafs-";
/// How many numbers are tried: more than one only where a crash left some behind.
const ATTEMPTS: u32 = 1000;

/// Where the target of a hard link is.
pub(super) enum Stashed {
    /// Not among the hidden files.
    Elsewhere,
    /// It should be, and is not.
    Missing,
    Here(Arc<Dir>, Name),
}

impl Unpack<'_> {
    /// Keeps a file of `.wh..wh.plnk`.
    pub(super) fn stash(
        &mut self,
        name: &Name,
        entry: &Entry,
        content: &mut dyn BufRead,
    ) -> Result<()> {
        let EntryKind::File { size, sparse } = &entry.kind else {
            return Ok(());
        };
        self.check_file_size(&entry.path, *size)?;
        let dir = self.stash_dir(&entry.path)?;
        let path = &entry.path;
        let file = match dir.create_file(name, 0o600) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                self.capture_loss(path, &dir, name)?;
                dir.unlink(name).at("replace", path)?;
                dir.create_file(name, 0o600)
            }
            made => made,
        };
        let file = file.at("create file", path)?;
        self.capture_content(path.clone(), entry);
        self.fill(&file, *size, sparse.as_deref(), content, path)?;
        self.attributes(Of::Fd(file.as_fd()), &dir, name, entry)?;
        Ok(())
    }

    /// The directory that keeps them, made if there is none.
    fn stash_dir(&mut self, path: &RelPath) -> Result<Dir> {
        self.reach(&RelPath::ROOT, Missing::Stop, path)?;
        let root = self.target.dir();
        if let Some(name) = &self.stash {
            return root.open_dir(name).at("open hidden directory for", path);
        }
        self.target.touch();
        self.target.tally.give_up();
        for n in 0..ATTEMPTS {
            let name = Name::new(format!("{STASH}{n}"))?;
            match root.make_dir(&name, 0o700) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                made => {
                    made.at("make hidden directory for", path)?;
                    let dir = root.open_dir(&name);
                    self.stash = Some(name);
                    return dir.at("open hidden directory for", path);
                }
            }
        }
        Err(refuse(path, "no name is free for what it needs"))
    }

    /// Whether a name in the current directory is the hidden directory.
    pub(super) fn is_stash(&self, name: &Name) -> bool {
        self.target.at_root() && self.stash.as_ref() == Some(name)
    }

    /// Where the target of a hard link is, if it is one of these.
    pub(super) fn stashed(&mut self, target: &RelPath) -> Result<Stashed> {
        let mut names = target.components();
        if names.next().is_none_or(|name| name.as_bytes() != DIRECTORY) {
            return Ok(Stashed::Elsewhere);
        }
        match (names.next(), names.next()) {
            (Some(name), None) if self.stash.is_some() => {
                Ok(Stashed::Here(Arc::new(self.stash_dir(target)?), name))
            }
            _ => Ok(Stashed::Missing),
        }
    }

    /// Removes the hidden directory.
    pub(super) fn remove_stash(&mut self) -> Result<()> {
        let Some(name) = self.stash.take() else {
            return Ok(());
        };
        self.reach(&RelPath::ROOT, Missing::Stop, &RelPath::ROOT)?;
        self.target.touch();
        let root = self.target.dir();
        if self.captures_losses() {
            let dir = root.open_dir(&name).at("open hidden directory", &name)?;
            let hidden = RelPath::from(Name::new(DIRECTORY)?);
            for entry in dir.entries().at("list hidden directory", &name)? {
                self.capture_loss(&hidden.join(&entry.name), &dir, &entry.name)?;
            }
        }
        remove_tree(&root, &name, &mut || Ok(())).at("remove hidden directory", &name)
    }
}
