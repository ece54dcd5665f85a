//! Copies: the whole view as a plain tree, for machines that have neither overlayfs nor FUSE, and for
//! formats and numbers of layers that overlayfs does not take.
//!
//! The tree is made once for a snapshot, at [`MountRequest::tree`], and is what is mounted, by a bind
//! mount: read-only for a view. Whoever may not mount uses it where it is
//! ([`Store::activate_in_place`](crate::Store::activate_in_place)). Where the file system can share
//! blocks it costs an inode a file, else the size of the whole image, and in both cases a time that
//! grows with the number of files. What needs no union needs no copy either: a writable layer without
//! layers below is used itself, and so is a single layer without marks, where a mount can keep it
//! from being written to.
//!
//! Edits go to the tree; turning them into a layer is the store's, which holds the tree to be
//! authoritative until that is done. A driver that is used without a store makes the tree, if it is
//! not there, under a name beside it and renames it when it is whole, and never reads it back.

use std::ffi::OsString;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::guard::{InPlace, KernelMount};
use super::identity::MountIdentity;
use super::target::Target;
use super::{
    Driver, Feature, Guard, Mount, MountRequest, Probe, ProbeTarget, Restrictions, Shown, bind,
    sealed,
};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::stack::{Branch, LayerStack};
use crate::path::Name;
use crate::progress::ignore_progress;
use crate::sys::dir::{Dir, OnExisting};
use crate::sys::{copy, fs_features, mountinfo, remove, userns};
use crate::tree;

/// What to do about a mount that this process may not make.
const IN_PLACE: &str = "mounting needs CAP_SYS_ADMIN; a copy can also be used where it is, without a \
                        mount: activate it in place (`stratafs mount KEY`, without a directory)";

/// The engine that copies: see the README for when to use it.
#[derive(Debug, Default)]
pub struct CopyDriver {
    _private: (),
}

impl CopyDriver {
    /// An engine that copies.
    pub fn new() -> Self {
        CopyDriver::default()
    }

    /// The directory that is to be seen, and what is forbidden there.
    fn plan(request: &MountRequest, shown: Shown) -> Result<(PathBuf, Restrictions)> {
        request.options.ids.check()?;
        let restrictions = request.options.restrictions;
        let read_only = Restrictions { read_only: true, ..restrictions };
        Ok(match (request.lower.as_slice(), &request.upper) {
            ([], Some(upper)) => (upper.dir.clone(), restrictions),
            ([], None) if shown == Shown::Mounted => (request.empty.clone(), read_only),
            ([lower], None) if shown == Shown::Mounted && !request.lower_has_marks => {
                (lower.clone(), read_only)
            }
            (_, upper) => {
                let tree = request.tree.clone().ok_or_else(|| {
                    Error::new(
                        ErrorKind::InvalidArgument,
                        "the request says nowhere to put the copy: set its field `tree`",
                    )
                })?;
                (tree, if upper.is_some() { restrictions } else { read_only })
            }
        })
    }

    /// Makes the tree unless it is there, or not needed.
    fn ready(&self, request: &MountRequest, shown: Shown) -> Result<()> {
        if !self.needs_tree(request, shown) {
            return Ok(());
        }
        let Some(tree) = &request.tree else { return Ok(()) };
        if fs::symlink_metadata(tree).is_ok_and(|meta| meta.is_dir()) {
            return Ok(());
        }
        make_beside(request, tree)
    }
}

fn may_mount() -> Result<()> {
    if userns::may_administer().at("look at the capabilities of", "this thread")? {
        return Ok(());
    }
    Err(Error::new(ErrorKind::PermissionDenied, IN_PLACE))
}

/// Makes a tree under another name, and renames it when it is whole.
fn make_beside(request: &MountRequest, tree: &Path) -> Result<()> {
    let (Some(parent), Some(file_name)) = (tree.parent(), tree.file_name()) else {
        let text = "a tree must have a name in a directory, which this does not";
        return Err(Error::new(ErrorKind::InvalidArgument, text).with_path(tree));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let parent_dir = Dir::open_with(parent, request.owners).at("open directory", parent)?;
    let mut text = OsString::from(".");
    text.push(file_name);
    // A number that nobody else draws.
    text.push(format!(".{:016x}", RandomState::new().hash_one(std::process::id())));
    let (temp, name) =
        (Name::new(text.as_encoded_bytes())?, Name::new(file_name.as_encoded_bytes())?);
    parent_dir.make_dir(&temp, 0o700).at("create directory", parent.join(&text))?;
    let make = || {
        let into = parent_dir.open_dir(&temp).at("open directory", parent.join(&text))?;
        tree::materialise(&layers(request)?, request.format, &into, &mut ignore_progress)?;
        let renamed = parent_dir.rename(&temp, &parent_dir, &name, OnExisting::Fail);
        renamed.at("rename a finished copy to", tree)
    };
    let made = make();
    if made.is_err()
        && let Err(e) = remove::remove_tree(&parent_dir, &temp, &mut || Ok(()))
    {
        tracing::warn!("an unfinished copy stays at {:?}: {e}", parent.join(&text));
    }
    made
}

/// The layers of a request, the writable one first.
fn layers(request: &MountRequest) -> Result<LayerStack> {
    let upper = request.upper.as_ref().map(|upper| &upper.dir);
    let branch = |path: &PathBuf| {
        let dir = Arc::new(Dir::open_with(path, request.owners).at("open layer", path)?);
        Ok(Branch { dir, format: request.format })
    };
    Ok(LayerStack::new(upper.into_iter().chain(&request.lower).map(branch).collect::<Result<_>>()?))
}

impl sealed::Sealed for CopyDriver {}

impl Driver for CopyDriver {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn probe(&self, target: &ProbeTarget) -> Result<Probe> {
        let dir = fs::File::open(&target.dir).at("open directory for trials", &target.dir)?;
        let file_system =
            fs_features::file_system_name(&dir).at("identify the file system of", &target.dir)?;
        let (sharing, cost) = match copy::can_share(&dir) {
            Ok(()) => (
                Feature::yes("shared-blocks", "a copy takes an inode for each file of the image"),
                "files share their blocks with the layers",
            ),
            Err(e) => (
                Feature::no(
                    "shared-blocks",
                    format!("a copy takes the room and the time of the whole image: {e}"),
                ),
                "every snapshot is a full copy of its image",
            ),
        };
        let bind = match may_mount() {
            Ok(()) => Feature::yes("bind", "copies are mounted where they are wanted"),
            Err(e) => Feature::no("bind", e),
        };
        Ok(Probe {
            driver: self.name(),
            mount: Feature::yes("mount", format!("by copying: {cost}")),
            upper: Feature::yes("upper", file_system.clone()),
            file_system,
            features: vec![sharing, bind],
        })
    }

    /// It needs nothing.
    fn try_out(&self, _: &ProbeTarget) -> Result<()> {
        Ok(())
    }

    fn mounts(&self, request: &MountRequest) -> Result<Vec<Mount>> {
        let (source, restrictions) = CopyDriver::plan(request, Shown::Mounted)?;
        Ok(vec![Mount::Bind { source, ids: request.options.ids.clone(), restrictions }])
    }

    fn activate(&self, request: &MountRequest, target: &Path) -> Result<Guard> {
        let (source, restrictions) = CopyDriver::plan(request, Shown::Mounted)?;
        let target = Target::open(target)?;
        may_mount()?;
        self.ready(request, Shown::Mounted)?;
        let root = bind::mount(&source, &request.options.ids, restrictions, &target)?;
        let identity = mountinfo::ids(&root)
            .at("identify the mount on", target.path())
            .and_then(MountIdentity::new);
        drop(root);
        match identity {
            Ok(identity) => {
                Ok(Guard::new(Box::new(KernelMount::new(target.into_point(), identity))))
            }
            Err(e) => {
                target.abandon();
                Err(e)
            }
        }
    }

    fn needs_tree(&self, request: &MountRequest, shown: Shown) -> bool {
        match CopyDriver::plan(request, shown) {
            Ok((source, _)) => request.tree.as_deref() == Some(&source),
            Err(_) => false,
        }
    }

    fn may_show(&self, request: &MountRequest, shown: Shown) -> Result<()> {
        match shown {
            Shown::Mounted => may_mount(),
            Shown::InPlace if !request.options.ids.is_empty() => Err(Error::new(
                ErrorKind::Unsupported,
                "a tree that is not mounted can show no other ids than its files have: mount it",
            )),
            Shown::InPlace if request.options.restrictions == Restrictions::default() => Ok(()),
            Shown::InPlace => Err(Error::new(
                ErrorKind::Unsupported,
                "a tree that is not mounted can forbid nothing: leave out the restrictions, or mount it",
            )),
        }
    }

    fn activate_in_place(&self, request: &MountRequest, lease: &Path) -> Result<Guard> {
        let (source, _) = CopyDriver::plan(request, Shown::InPlace)?;
        self.may_show(request, Shown::InPlace)?;
        self.ready(request, Shown::InPlace)?;
        Ok(Guard::new(Box::new(InPlace::new(source, lease)?)))
    }
}
