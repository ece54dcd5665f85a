//! The union's own directory beside the upper: what is not complete yet, and what must be remembered.
//!
//! ```text
//! temp/    files and directories being made, or taken out to be removed; emptied when the union is opened
//! links/   kept: a name for each file that has further names in a lower layer, and what it is (see `links`)
//! state/   kept: the markers of what in the upper refers to lower layers
//! ```

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::attr::SETGID;
use super::{acl, complete};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::{LayerFormat, marks};
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::errno::Code;
use crate::sys::remove::remove_tree;
use crate::sys::umask;
use crate::sys::xattr::{self, Of};

/// What in the upper refers to lower layers, and must be settled before others read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marker {
    /// Directories, by redirects.
    Redirected,
    /// Files, which have their data there.
    Metacopy,
    /// Files with several names, some of which are there alone.
    Linked,
}

impl Marker {
    pub(super) const ALL: [Marker; 3] = [Marker::Redirected, Marker::Metacopy, Marker::Linked];

    /// The file in `state` that says so.
    fn file(self) -> &'static str {
        match self {
            Marker::Redirected => "redirected",
            Marker::Metacopy => "metacopy",
            Marker::Linked => "linked",
        }
    }
}

/// A union's own directory, for one union at a time.
#[derive(Debug)]
pub(super) struct Work {
    temp: Dir,
    links: Dir,
    state: Dir,
    /// Of the upper.
    format: LayerFormat,
    next: AtomicU64,
    /// Which markers are known to be there.
    noted: Mutex<[bool; Marker::ALL.len()]>,
}

/// A directory in which something is made that shall have inherited from another directory.
#[derive(Debug)]
pub(super) struct Nursery<'a> {
    work: &'a Work,
    name: Name,
    pub(super) dir: Dir,
}

impl Work {
    /// Takes a directory into use, and undoes what was being done to an upper of `format` when the union
    /// before was killed.
    pub(super) fn open(root: Dir, format: LayerFormat) -> Result<Work> {
        let sub = |name: &'static str| -> io::Result<Dir> {
            let name = Name::new(name).map_err(io::Error::other)?;
            match root.make_dir(&name, 0o700) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                made => made?,
            }
            root.open_dir(&name)
        };
        let open = |name: &'static str| sub(name).at("make in the work directory", name);
        let work = Work {
            temp: open("temp")?,
            links: open("links")?,
            state: open("state")?,
            format,
            next: AtomicU64::new(0),
            noted: Mutex::default(),
        };
        for entry in work.links.entries().at("list", "the links in the work directory")? {
            let number = str::from_utf8(entry.name.as_bytes()).ok().and_then(|s| s.parse().ok());
            let next = number.map_or(0, |number: u64| number.saturating_add(1));
            work.next.fetch_max(next, Ordering::Relaxed);
        }
        work.empty().at("empty", "the work directory")?;
        work.takes_whiteouts()?;
        Ok(work)
    }

    /// Finds out by making one whether there can be whiteouts: not on the kernel's overlayfs, for those of the
    /// overlay formats, nor on an AUFS union for those of AUFS. Without them nothing of a lower layer could
    /// be removed.
    fn takes_whiteouts(&self) -> Result<()> {
        use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
        let probe = || -> io::Result<()> {
            let name = self.new_name()?;
            marks::make_whiteout(self.format, &self.temp, &name)?;
            self.temp.unlink(&marks::separate_whiteout(self.format, &name).unwrap_or(name))
        };
        match probe() {
            Err(e) if matches!(e.kind(), InvalidInput | PermissionDenied | Unsupported) => {
                let message = format!(
                    "the file system of the upper takes no whiteouts of the format {}, as unions do not: put the \
                     upper and its work directory elsewhere, or take another format",
                    self.format
                );
                Err(Error::new(ErrorKind::Unsupported, message).with_source(e))
            }
            // It may be full, which does not prevent all changes.
            Err(e) => {
                tracing::debug!(error = %e, "cannot find out whether there can be whiteouts");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Removes everything that is not to be remembered. What a note there says was not done is undone first.
    pub(super) fn empty(&self) -> io::Result<()> {
        for entry in self.temp.entries()? {
            complete::recover(self.format, &self.temp, &entry.name)?;
            remove_tree(&self.temp, &entry.name, &mut || Ok(()))?;
        }
        Ok(())
    }

    /// Where things are made, to be renamed to their place when complete.
    pub(super) fn temp(&self) -> &Dir {
        &self.temp
    }

    pub(super) fn links(&self) -> &Dir {
        &self.links
    }

    /// Notes, before it is done, that something of the upper refers to lower layers.
    pub(super) fn note(&self, marker: Marker) -> io::Result<()> {
        let mut noted = self.noted.lock();
        let Some(noted) = noted.get_mut(marker as usize) else { return Ok(()) };
        if !*noted {
            let file = Name::new(marker.file()).map_err(io::Error::other)?;
            if self.state.try_stat_at(&file)?.is_none() {
                self.state.open_or_create(&file, 0o600)?;
                self.state.sync()?;
            }
            *noted = true;
        }
        Ok(())
    }

    /// Whether something of the upper may do so.
    pub(super) fn has(&self, marker: Marker) -> io::Result<bool> {
        let file = Name::new(marker.file()).map_err(io::Error::other)?;
        Ok(self.state.try_stat_at(&file)?.is_some())
    }

    /// Notes that nothing of the upper does so any more.
    pub(super) fn clear(&self, marker: Marker) -> io::Result<()> {
        let mut noted = self.noted.lock();
        if let Some(noted) = noted.get_mut(marker as usize) {
            *noted = false;
        }
        let file = Name::new(marker.file()).map_err(io::Error::other)?;
        match self.state.unlink(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// A name that is not taken in any of the directories.
    pub(super) fn new_name(&self) -> io::Result<Name> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Name::new(number.to_string()).map_err(io::Error::other)
    }

    /// Removes what has been made or taken out.
    pub(super) fn discard(&self, name: &Name) {
        if let Err(e) = remove_tree(&self.temp, name, &mut || Ok(())) {
            // It takes space, but only until the union is opened again.
            tracing::warn!(?name, error = %e, "cannot remove from the work directory");
        }
    }

    /// Removes a directory that has been taken out, in which there are at most marks. Whoever has it open
    /// sees its attributes unchanged.
    pub(super) fn discard_dir(&self, name: &Name) {
        let remove = || -> io::Result<()> {
            match self.temp.remove_dir(name) {
                Err(e) if Code::NotEmpty.is(&e) => {}
                removed => return removed,
            }
            let dir = self.temp.open_dir(name)?;
            for entry in dir.entries()? {
                dir.unlink(&entry.name)?;
            }
            self.temp.remove_dir(name)
        };
        if let Err(e) = remove() {
            tracing::debug!(?name, error = %e, "a directory that was removed has more in it than marks");
            self.discard(name);
        }
    }

    /// A directory that hands down what `like` does: its group, and its default access rights.
    pub(super) fn nursery(&self, like: &Dir) -> io::Result<Nursery<'_>> {
        umask::set_on_this_thread(0)?;
        let name = self.new_name()?;
        self.temp.make_dir(&name, 0o700)?;
        let nursery = match self.temp.open_dir(&name) {
            Ok(dir) => Nursery { work: self, name, dir },
            Err(e) => {
                self.discard(&name);
                return Err(e);
            }
        };
        let stat = like.stat()?;
        if stat.mode & SETGID != 0 {
            let own = nursery.dir.stat()?;
            if own.gid != stat.gid {
                nursery.dir.chown(own.uid, stat.gid)?;
            }
            nursery.dir.chmod(0o700 | SETGID)?;
        }
        if let Some(default) = xattr::get(Of::Fd(like.as_fd()), acl::DEFAULT)? {
            xattr::set(Of::dir(&nursery.dir), acl::DEFAULT, &default)?;
        } else {
            // Inherited from the work directory.
            xattr::remove(Of::dir(&nursery.dir), acl::DEFAULT)
                .or_else(|e| if Code::NotSupported.is(&e) { Ok(()) } else { Err(e) })?;
        }
        Ok(nursery)
    }
}

impl Drop for Nursery<'_> {
    fn drop(&mut self) {
        self.work.discard(&self.name);
    }
}
