//! A helper that tries, in the namespaces in which it was started, whether something can be mounted there.
//!
//! What it is started with: [`REQUEST`], what to try, and the directory on whose file system the layers are
//! to be. It exits with 0 if it can, and else with 1, and says why on standard output.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};
use crate::sys::fuse::{self, FuseMount};
use crate::sys::mount::{self, Attributes, FsContext};

/// The argument that makes a program such a helper.
pub(super) const REQUEST: &str = "--stratafs-try-mount";
/// What to try.
pub(super) const OVERLAY: &str = "overlay";
pub(super) const FUSE: &str = "fuse";

pub(super) fn run(mut arguments: impl Iterator<Item = OsString>) -> i32 {
    let tried = match (arguments.next(), arguments.next()) {
        (Some(what), Some(dir)) if what == OVERLAY => overlay(Path::new(&dir)),
        (Some(what), Some(_)) if what == FUSE => over_fuse(),
        _ => return 2,
    };
    match tried {
        Ok(()) => 0,
        Err(e) => {
            // Whoever asked may have gone.
            let _ = std::io::stdout().write_all(e.to_string().as_bytes());
            1
        }
    }
}

/// Mounts a writable overlay with marks in `user.*`, and deletes a file of its lower layer.
fn overlay(dir: &Path) -> Result<()> {
    let room = Room::make(dir)?;
    for name in ["lower", "upper", "work", "target"] {
        fs::create_dir(room.0.join(name)).at("create directory", room.0.join(name))?;
    }
    let (file, target) = (room.0.join("lower/file"), room.0.join("target"));
    fs::write(&file, "").at("write", &file)?;
    let context = FsContext::open("overlay").at("mount overlay on", &target)?;
    let mut opened = Vec::new();
    let mounted = (|| {
        context.set_string("source", "stratafs")?;
        for (key, name) in [("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")] {
            // By descriptor: a longer path than 255 bytes may lead to it.
            let layer = mount::open_layer(&room.0.join(name))?;
            context.set_string(key, &mount::fd_name(&layer).replace("thread-self", "self"))?;
            opened.push(layer);
        }
        context.set_flag("userxattr")?;
        context.create()?;
        let made = context.mount(Attributes::default())?;
        mount::attach(&made, mount::open_dir_path(&target)?)
    })();
    if let Err(e) = mounted {
        let told = context.take_log();
        let e = Error::io("mount overlay on", &target, e);
        return Err(if told.is_empty() { e } else { e.context(told.join("; ")) });
    }
    // It goes with this process's mount namespace.
    let shown = target.join("file");
    let deleted = fs::remove_file(&shown).at("delete from a mounted overlay", &shown);
    let parent = mount::open_dir_path(&room.0).at("open", &room.0)?;
    mount::unmount(&parent, "target".as_ref(), mount::Unmount::Detach).at("unmount", &target)?;
    deleted
}

/// Makes a mount over FUSE that is attached nowhere.
fn over_fuse() -> Result<()> {
    let device = fuse::open_device().at("open", "/dev/fuse")?;
    let request = FuseMount {
        source: "stratafs".as_ref(),
        attributes: Attributes::default(),
        allow_other: true,
        options: &[],
    };
    let made = fuse::mount_detached(&device, &request).at("mount over", "/dev/fuse")?;
    // It goes unanswered, and waits for nobody, once there is nobody.
    drop(device);
    drop(made);
    Ok(())
}

/// A new directory, removed again.
struct Room(PathBuf);

impl Room {
    fn make(dir: &Path) -> Result<Room> {
        let path = dir.join(format!(".stratafs-trial-{}", std::process::id()));
        fs::create_dir(&path).at("create directory for trials", &path)?;
        Ok(Room(path))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = ?self.0, error = %e, "a directory for trials is left");
        }
    }
}
