//! Trials of the union over FUSE on a file system: mounts it, uses it, and looks at what came of it.

use std::fs;
use std::path::Path;

use super::FuseDriver;
use crate::driver::guard::ActiveMount;
use crate::driver::room::Room;
use crate::driver::target::Target;
use crate::driver::{Feature, MountRequest, Probe, ProbeTarget, UpperDir};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::fuse::Transport;
use crate::layer::LayerFormat;
use crate::sys::fs_features;
use crate::sys::mount::Unmount;

type Granted = Vec<(&'static str, bool)>;

pub(super) fn probe(driver: &FuseDriver, target: &ProbeTarget) -> Result<Probe> {
    let room = Room::make(&target.dir)?;
    let file_system = fs::File::open(room.path())
        .and_then(fs_features::file_system_name)
        .at("identify the file system of", room.path())?;
    let transport = driver.transport();
    let how = match &transport {
        Ok(Transport::Direct) => Feature::yes("transport", "by this process"),
        Ok(Transport::Fusermount) => Feature::yes("transport", "by the program fusermount3"),
        Err(e) => Feature::no("transport", e),
    };
    let mut features = vec![how];
    let tried = transport.and_then(|_| view_of_a_layer(driver, &room, target.format));
    let mount = match &tried {
        Ok(_) => Feature::yes("mount", ""),
        Err(e) => Feature::no("mount", e),
    };
    let upper = match &tried {
        Ok(_) => match deletions_last(driver, &room, target.format) {
            Ok(()) => Feature::yes("upper", file_system.clone()),
            Err(e) => Feature::no("upper", e),
        },
        Err(_) => Feature::no("upper", "nothing can be mounted"),
    };
    features.extend(tried.unwrap_or_default().into_iter().map(|(name, granted)| match granted {
        true => Feature::yes(name, ""),
        false => Feature::no(name, "this kernel has it not"),
    }));
    Ok(Probe { driver: "fuse", file_system, mount, upper, features })
}

/// Mounts a layer, looks into it, and gives what the kernel granted.
fn view_of_a_layer(driver: &FuseDriver, room: &Room, format: LayerFormat) -> Result<Granted> {
    let stage = Stage::new(room, format)?;
    let mut served = driver.serve(&stage.request(false), Target::open(&stage.0.join("target"))?)?;
    let shown = stage.shows(true);
    let granted = served.granted();
    served.unmount(Unmount::WhenIdle)?;
    shown.map(|()| granted)
}

/// Deletes a file and makes a directory anew, and looks whether another mount shows the same.
fn deletions_last(driver: &FuseDriver, room: &Room, format: LayerFormat) -> Result<()> {
    let stage = Stage::new(room, format)?;
    let target = stage.0.join("target");
    let mut served = driver.serve(&stage.request(true), Target::open(&target)?)?;
    let edit = || {
        let (gone, again) = (target.join("gone"), target.join("again"));
        fs::remove_file(&gone).at("delete from a mounted union", &gone)?;
        fs::remove_dir_all(&again).at("delete from a mounted union", &again)?;
        fs::create_dir(&again).at("create in a mounted union", &again)
    };
    let edited = edit();
    served.unmount(Unmount::WhenIdle)?;
    drop(served);
    edited?;
    let mut served = driver.serve(&stage.request(true), Target::open(&target)?)?;
    let shown = stage.shows(false);
    served.unmount(Unmount::WhenIdle)?;
    shown
}

/// Directories for a trial.
struct Stage(std::path::PathBuf, LayerFormat);

impl Stage {
    fn new(room: &Room, format: LayerFormat) -> Result<Stage> {
        let dir = room.corner().at("create directory for trials in", room.path())?;
        for name in ["lower", "lower/again", "upper", "work", "target"] {
            fs::create_dir(dir.join(name)).at("create directory", dir.join(name))?;
        }
        for name in ["lower/gone", "lower/again/old"] {
            fs::write(dir.join(name), "").at("write", dir.join(name))?;
        }
        Ok(Stage(dir, format))
    }

    fn request(&self, writable: bool) -> MountRequest {
        let mut request = MountRequest::new(self.1, self.0.join("empty"));
        request.lower = vec![self.0.join("lower")];
        let upper = UpperDir { dir: self.0.join("upper"), work: self.0.join("work") };
        request.upper = writable.then_some(upper);
        request
    }

    /// Whether what the lower layer has is, or is not, to be seen.
    fn shows(&self, expected: bool) -> Result<()> {
        let target = self.0.join("target");
        for name in ["gone", "again/old"] {
            let path = target.join(name);
            if path.try_exists().at("look for", &path)? != expected {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "a mounted union does not show its layers as they are",
                ));
            }
        }
        let again = Path::new("again");
        fs::read_dir(target.join(again)).at("list", target.join(again)).map(drop)
    }
}
