//! New files: made in the upper, under their name at once where one call makes all of them and nothing is in
//! the way. Else they get their name, or the place of a whiteout, in one step when they are complete: made
//! without a name where the file system can (O_TMPFILE), or beside in the work directory.
//!
//! The file system of the upper does what is inherited (default access rights, the group of a setgid
//! directory, the umask), since it knows how; so the umask of whoever asks is the thread's own for the
//! moment. What is made beside is made in a directory that hands the same down.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::attr::{SETGID, SETUID};
use super::descriptors::OpenFile;
use super::lookup::{Entry, View};
use super::node::{Directory, Node, Place as NodePlace};
use super::xattr::ZERO_DEVICE_FILE;
use super::{Union, UpperBranch};
use crate::idmap::IdMap;
use crate::layer::entry::{self, Found as Says};
use crate::layer::{LayerFormat, marks};
use crate::path::{NAME_MAX, Name, RelPath};
use crate::sys::dir::{Dir, Node as Special, OnExisting};
use crate::sys::errno::Code;
use crate::sys::file::{self, Place};
use crate::sys::fuse::user_and_group;
use crate::sys::owners::Owners;
use crate::sys::stat::{FileType, Stat};
use crate::sys::umask;

/// What is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NewFile {
    Regular,
    Directory,
    /// With its target.
    Symlink(Vec<u8>),
    Fifo,
    Socket,
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
}

/// A file to be made.
#[derive(Clone, Debug)]
pub(crate) struct Make {
    pub(crate) file: NewFile,
    /// As asked for, before the umask.
    pub(crate) mode: u32,
    pub(crate) umask: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What a new name meets in the upper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ground {
    Free,
    Whiteout,
}

impl Union {
    /// Makes a file, and counts a lookup of it.
    ///
    /// # Errors
    /// EEXIST if there is one of that name; EOVERFLOW for an owner that no file can have here; EINVAL for
    /// AUFS's own names.
    pub(crate) fn make(&self, parent: &Arc<Node>, name: &Name, make: &Make) -> io::Result<Entry> {
        let upper = self.writable()?;
        check_name(upper.format, name)?;
        let host = |map: &IdMap, id| match self.options.root_makes_for_nobody {
            true => map.host_of_maker(id),
            false => map.host(id),
        };
        let uid = host(&self.options.uids, make.uid).ok_or(Code::Overflow)?;
        let gid = host(&self.options.gids, make.gid).ok_or(Code::Overflow)?;
        let make = Make { uid, gid, ..make.clone() };
        let _names = parent.names.lock();
        let (view, dir) = self.parent_dir(upper, parent)?;
        let made = if takes_steps(upper.format, &dir, &make)? {
            let ground = self.ground(upper, &view, &dir, name)?;
            make_complete(upper, &dir, name, &make, ground)?
        } else {
            match self.make_if_free(upper, (&view, &dir), name, &make)? {
                Some(made) => made,
                None => make_complete(upper, &dir, name, &make, Ground::Whiteout)?,
            }
        };
        let directory = made.stat.is_dir().then(|| Directory::new(Vec::new(), RelPath::ROOT));
        let node = self.new_node(parent, name, &made.stat, directory);
        if let Some(file) = made.file {
            node.cached.store(true, Ordering::Relaxed);
            let open = Arc::new(OpenFile { file, writable: true });
            self.table.descriptors.keep_file(node.generation, &open);
        }
        self.listed(parent, name);
        self.entry_as_found(node, &made.stat)
    }

    /// Makes a file; none if a whiteout is in the way.
    fn make_if_free(
        &self,
        upper: &UpperBranch,
        (view, dir): (&View, &Dir),
        name: &Name,
        make: &Make,
    ) -> io::Result<Option<Made>> {
        // Where nothing else can be in the way than what the upper has there, the attempt tells.
        if view.lowers.is_empty() && upper.format.xattr_prefix().is_some() {
            match make_in(upper.format, dir, name, make) {
                Err(e) if Code::Exists.is(&e) => {}
                made => return made.map(Some),
            }
        }
        match self.ground(upper, view, dir, name)? {
            Ground::Free => make_in(upper.format, dir, name, make).map(Some),
            Ground::Whiteout => Ok(None),
        }
    }

    /// Gives a file another name, and counts a lookup of it.
    ///
    /// # Errors
    /// EEXIST if there is one of that name; EPERM for a directory; ENOENT for a file that has no name.
    pub(crate) fn link(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        name: &Name,
    ) -> io::Result<Entry> {
        let upper = self.writable()?;
        check_name(upper.format, name)?;
        if node.is_dir() {
            return Err(Code::Perm.into());
        }
        self.copy_up_for_names(node)?;
        let _moving = self.moving.read();
        let _names = parent.names.lock();
        let (view, dir) = self.parent_dir(upper, parent)?;
        let ground = self.ground(upper, &view, &dir, name)?;
        let linked = match (&node.state.lock().place, node.lower) {
            (NodePlace::Linked(_), Some(lower)) => self.links.of(lower),
            _ => None,
        };
        if let Some(linked) = &linked {
            linked.add_name();
            self.note_another_name(linked).inspect_err(|_| {
                linked.remove_name();
            })?;
        }
        let made = match ground {
            Ground::Free => self.at(node, |place, _, _| place.link(&dir, name)),
            Ground::Whiteout => upper.work.nursery(&dir).and_then(|nursery| {
                self.at(node, |place, _, _| place.link(&nursery.dir, name))?;
                cover_whiteout(upper, &nursery.dir, &dir, name, false)
            }),
        };
        if let Err(e) = made {
            if let Some(linked) = &linked {
                linked.remove_name();
                self.note_fewer_names(linked);
            }
            return Err(e);
        }
        node.state.lock().add_link(parent, name);
        if node.may_have_data_below() {
            self.moved.fetch_add(1, Ordering::SeqCst);
        }
        self.listed(parent, name);
        self.entry(Arc::clone(node))
    }

    /// The upper's directory of a node whose names are to change, copied up if need be.
    pub(super) fn parent_dir(
        &self,
        upper: &UpperBranch,
        parent: &Arc<Node>,
    ) -> io::Result<(View, Arc<Dir>)> {
        if !parent.is_dir() {
            return Err(Code::NotDirectory.into());
        }
        if parent.state.lock().is_dead() {
            return Err(Code::NoEntry.into());
        }
        self.copy_up_dirs(upper, parent)?;
        let view = self.view(parent)?;
        let dir = view.upper.clone().ok_or(Code::Io)?;
        Ok((view, dir))
    }

    /// What a new name meets.
    ///
    /// # Errors
    /// EEXIST if the union shows something there.
    pub(super) fn ground(
        &self,
        upper: &UpperBranch,
        view: &View,
        dir: &Dir,
        name: &Name,
    ) -> io::Result<Ground> {
        match entry::find(Some(upper.format), dir, name)? {
            Says::Entry { .. } => Err(Code::Exists.into()),
            Says::Whiteout => Ok(Ground::Whiteout),
            Says::Nothing if self.shown_below(view, name)?.is_some() => Err(Code::Exists.into()),
            Says::Nothing => Ok(Ground::Free),
        }
    }
}

/// Whether a branch of this format can have a file of this name.
///
/// # Errors
/// EINVAL for AUFS's own names, ENAMETOOLONG for those whose whiteout would be too long.
pub(super) fn check_name(format: LayerFormat, name: &Name) -> io::Result<()> {
    if format != LayerFormat::Aufs {
        return Ok(());
    }
    if name.as_bytes().starts_with(marks::WHITEOUT_PREFIX) {
        return Err(Code::Invalid.into());
    }
    if is_too_long(format, name) { Err(Code::NameTooLong.into()) } else { Ok(()) }
}

/// Whether the whiteout of this name would be longer than names can be.
pub(super) fn is_too_long(format: LayerFormat, name: &Name) -> bool {
    let most = NAME_MAX.saturating_sub(marks::WHITEOUT_PREFIX.len());
    format == LayerFormat::Aufs && name.as_bytes().len() > most
}

/// Moves what was made beside to the place of a whiteout.
pub(super) fn cover_whiteout(
    upper: &UpperBranch,
    from: &Dir,
    dir: &Dir,
    name: &Name,
    is_dir: bool,
) -> io::Result<()> {
    match marks::separate_whiteout(upper.format, name) {
        Some(mark) => {
            file::moving(from, name, || from.rename(name, dir, name, OnExisting::Fail))?;
            dir.unlink(&mark)
        }
        // A directory does not replace a device, so they change places.
        None if is_dir => file::moving(from, name, || from.exchange(name, dir, name)),
        None => from.rename(name, dir, name, OnExisting::Replace),
    }
}

/// Whether a file is complete only some calls after it has been made, so that a kill would leave one that
/// nobody asked for if it had its name from the beginning.
fn takes_steps(format: LayerFormat, dir: &Dir, make: &Make) -> io::Result<bool> {
    let steps = special_bits(make) != 0 || stands_for_zero_device(format, make);
    Ok(match dir.owners() {
        Owners::OfFiles => steps || (make.uid, make.gid) != user_and_group(),
        Owners::InXattrs | Owners::InSecurityXattrs => {
            let plain = match make.file {
                NewFile::Regular => make.mode & (FIRST_MODE & !0o777 | 0o600) == 0o600,
                NewFile::Directory => make.mode & (FIRST_MODE & !0o777 | 0o700) == 0o700,
                NewFile::Symlink(_) => true,
                _ => false,
            };
            steps || !plain || (make.uid, make.gid) != (0, 0) || dir.hands_group_down()?
        }
    })
}

/// Makes a file that gets its name when it is complete.
fn make_complete(
    upper: &UpperBranch,
    dir: &Dir,
    name: &Name,
    make: &Make,
    ground: Ground,
) -> io::Result<Made> {
    if make.file == NewFile::Regular || stands_for_zero_device(upper.format, make) {
        umask::set_on_this_thread(make.umask)?;
        match dir.create_nameless(make.mode & FIRST_MODE) {
            Ok(file) => return name_complete(upper, dir, name, make, ground, file),
            // Not every file system can.
            Err(e) if Code::NotSupported.is(&e) || Code::IsDirectory.is(&e) => {}
            Err(e) => return Err(e),
        }
    }
    make_beside(upper, dir, name, make, ground)
}

/// Completes a file that has no name yet, and gives it its name.
fn name_complete(
    upper: &UpperBranch,
    dir: &Dir,
    name: &Name,
    make: &Make,
    ground: Ground,
    file: File,
) -> io::Result<Made> {
    let place = Place::Open(file.as_fd(), dir.owners());
    finish(upper.format, place, dir, make)?;
    match (ground, marks::separate_whiteout(upper.format, name)) {
        (Ground::Free, _) => place.link(dir, name)?,
        (Ground::Whiteout, Some(mark)) => {
            place.link(dir, name)?;
            dir.unlink(&mark)?;
        }
        (Ground::Whiteout, None) => {
            let temp = upper.work.new_name()?;
            place.link(upper.work.temp(), &temp)?;
            let named = upper.work.temp().rename(&temp, dir, name, OnExisting::Replace);
            named.inspect_err(|_| upper.work.discard(&temp))?;
        }
    }
    Ok(Made { stat: place.stat()?, file: (make.file == NewFile::Regular).then_some(file) })
}

/// Makes a file beside its directory, and moves it to its name.
fn make_beside(
    upper: &UpperBranch,
    dir: &Dir,
    name: &Name,
    make: &Make,
    ground: Ground,
) -> io::Result<Made> {
    let nursery = upper.work.nursery(dir)?;
    let made = make_in(upper.format, &nursery.dir, name, make)?;
    match ground {
        Ground::Free => nursery.dir.rename(name, dir, name, OnExisting::Fail)?,
        Ground::Whiteout => {
            if make.file == NewFile::Directory {
                let made = nursery.dir.open_dir(name)?;
                let mark = || marks::make_opaque(upper.format, &made);
                Place::Child(&nursery.dir, name).despite_its_mode(mark)?;
                upper.keep_order(&made)?;
            }
            cover_whiteout(upper, &nursery.dir, dir, name, made.stat.is_dir())?;
        }
    }
    Ok(Made { stat: dir.stat_at(name)?, file: made.file })
}

/// The bits of a mode that a file is made with: not setuid for somebody else, not even for a moment.
const FIRST_MODE: u32 = 0o1777;

/// Setuid and setgid, which a file gets after it has its owner.
fn special_bits(make: &Make) -> u32 {
    match make.file {
        NewFile::Directory | NewFile::Symlink(_) => 0,
        _ => make.mode & (SETUID | SETGID),
    }
}

/// Whether it is the device 0:0 where a real one would be a whiteout, so that a marked file stands for it.
fn stands_for_zero_device(format: LayerFormat, make: &Make) -> bool {
    make.file == (NewFile::Char { major: 0, minor: 0 }) && format.xattr_prefix().is_some()
}

/// A file that was made.
struct Made {
    stat: Stat,
    /// Its data, open for reading and writing.
    file: Option<File>,
}

/// Makes a file in a directory; all of it or nothing.
fn make_in(format: LayerFormat, dir: &Dir, name: &Name, make: &Make) -> io::Result<Made> {
    umask::set_on_this_thread(make.umask)?;
    let mode = make.mode & FIRST_MODE;
    let mut file = None;
    match &make.file {
        NewFile::Regular => file = Some(dir.create_file(name, mode)?),
        NewFile::Directory => dir.make_dir(name, mode)?,
        NewFile::Symlink(target) => dir.symlink(target, name)?,
        NewFile::Fifo => dir.make_node(name, Special::Fifo, mode)?,
        NewFile::Socket => dir.make_node(name, Special::Socket, mode)?,
        NewFile::Char { .. } if stands_for_zero_device(format, make) => {
            drop(dir.create_file(name, mode)?);
        }
        NewFile::Char { major, minor } => {
            dir.make_node(name, Special::Char { major: *major, minor: *minor }, mode)?;
        }
        NewFile::Block { major, minor } => {
            dir.make_node(name, Special::Block { major: *major, minor: *minor }, mode)?;
        }
    }
    let place = match &file {
        Some(file) => Place::Open(file.as_fd(), dir.owners()),
        None => Place::Child(dir, name),
    };
    match finish(format, place, dir, make) {
        Ok(stat) => Ok(Made { stat, file }),
        Err(e) => {
            let removed = match make.file {
                NewFile::Directory => dir.remove_dir(name),
                _ => dir.unlink(name),
            };
            if let Err(e) = removed {
                tracing::warn!(?name, error = %e, "cannot remove a file that could not be given away");
            }
            Err(e)
        }
    }
}

/// Gives a file that was made for `dir` its owner, the bits of its mode that depend on that, and what marks
/// it as a device.
fn finish(format: LayerFormat, place: Place<'_>, dir: &Dir, make: &Make) -> io::Result<Stat> {
    let stat = place.stat()?;
    // The group of a setgid directory has been handed down.
    let inherits = (stat.gid != make.gid) && dir.stat()?.mode & SETGID != 0;
    let gid = if inherits { stat.gid } else { make.gid };
    let special = special_bits(make);
    let given = (stat.uid, stat.gid) != (make.uid, gid);
    if given {
        place.chown(Some(make.uid), Some(gid))?;
    }
    if stands_for_zero_device(format, make) {
        // By that mode its owner may set an xattr.
        place.chmod(ZERO_DEVICE_FILE)?;
        Union::set_zero_device_mode(place, Some(format), stat.mode | special)?;
    } else if special != 0 {
        place.chmod(stat.mode | special)?;
    } else if !given {
        return Ok(stat);
    }
    place.stat()
}

impl NewFile {
    /// From a file type and device number; none for what is not made so.
    pub(crate) fn special(kind: FileType, major: u32, minor: u32) -> Option<NewFile> {
        match kind {
            FileType::Regular => Some(NewFile::Regular),
            FileType::Fifo => Some(NewFile::Fifo),
            FileType::Socket => Some(NewFile::Socket),
            FileType::CharDevice => Some(NewFile::Char { major, minor }),
            FileType::BlockDevice => Some(NewFile::Block { major, minor }),
            FileType::Directory | FileType::Symlink | FileType::Unknown => None,
        }
    }
}
