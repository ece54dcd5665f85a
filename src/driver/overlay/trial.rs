//! Trials of the kernel's overlayfs on a file system: mounts it, uses it, and looks at what came of it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::OverlayDriver;
use crate::driver::room::Room;
use crate::driver::{Driver, Feature, MountRequest, Probe, ProbeTarget, UpperDir};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::idmap::{IdRange, ShownIds};
use crate::layer::LayerFormat;
use crate::sys::mount::{FsContext, Refusal};
use crate::sys::{errno, fs_features, userns};

pub(super) fn probe(driver: &OverlayDriver, target: &ProbeTarget) -> Result<Probe> {
    let room = Room::make(&target.dir)?;
    let file_system = fs::File::open(room.path())
        .and_then(fs_features::file_system_name)
        .at("identify the file system of", room.path())?;

    let parts = upper_parts(room.path());
    let mount = match super::owners_can_be_shown(target.owners) {
        Ok(()) => mount_feature("mount", driver, &room, target.format),
        Err(e) => Feature::no("mount", e),
    };
    let upper = upper_feature(&file_system, &parts, target.format, &mount);
    let mut features = vec![rung_feature(driver, room.path(), mount.available)];
    for format in [LayerFormat::OverlayTrusted, LayerFormat::OverlayUser] {
        let name = format.as_str();
        features.push(match format == target.format {
            true => Feature { name, ..mount.clone() },
            false => mount_feature(name, driver, &room, format),
        });
    }
    features.push(match mount.available {
        true => volatile_feature(driver, &room, target.format),
        false => Feature::no("volatile", "nothing can be mounted"),
    });
    features.push(match mount.available {
        true => mapped_feature(driver, &room, target.format),
        false => Feature::no("idmapped-layers", "nothing can be mounted"),
    });
    features.extend(parts.into_iter().map(|part| part.feature));
    Ok(Probe { driver: driver.name(), file_system, mount, upper, features })
}

/// What can be found out without a mount, which would stay if this process died in the middle.
pub(super) fn try_out(target: &ProbeTarget) -> Result<()> {
    super::owners_can_be_shown(target.owners)?;
    if let Err(e) = FsContext::open("overlay")
        && Refusal::of(&e) == Refusal::NoSuchFileSystem
    {
        return Err(Error::new(ErrorKind::Unsupported, "this kernel has no overlayfs"));
    }
    let room = Room::make(&target.dir)?;
    let file_system = fs::File::open(room.path())
        .and_then(fs_features::file_system_name)
        .at("identify the file system of", room.path())?;
    let parts = upper_parts(room.path());
    let Some(missing) = missing_part(&parts, target.format) else { return Ok(()) };
    // Another overlay says that its whiteouts are forbidden.
    let may_help = missing.forbidden && fs_features::known_as_upper(&file_system);
    if may_help || missing.full {
        return Ok(());
    }
    let Feature { name, reason, .. } = &missing.feature;
    Err(Error::new(ErrorKind::Unsupported, lacking(&file_system, name, reason)))
}

/// Something that an upper directory needs of its file system.
struct Part {
    feature: Feature,
    /// The file system may have it, but this process may not use it.
    forbidden: bool,
    /// The file system may have it, but there is no room to try.
    full: bool,
}

impl Part {
    fn tried(name: &'static str, done: io::Result<()>) -> Self {
        match done {
            Ok(()) => Part { feature: Feature::yes(name, ""), forbidden: false, full: false },
            Err(e) => Part {
                forbidden: Refusal::of(&e) == Refusal::NotPermitted,
                full: errno::is_full(&e),
                feature: Feature::no(name, e),
            },
        }
    }
}

fn upper_parts(room: &Path) -> Vec<Part> {
    let dir = room.join("parts");
    let made = fs::create_dir(&dir)
        .and_then(|()| fs::create_dir(dir.join("d")))
        .and_then(|()| fs::write(dir.join("f"), ""))
        .and_then(|()| fs::File::open(&dir));
    let open = match made {
        Ok(open) => open,
        Err(e) => return vec![Part::tried("create", Err(e))],
    };
    let d_type = match fs_features::listings_tell_types(&open) {
        Ok(true) => Ok(()),
        Ok(false) => Err(io::Error::other("listings do not tell the type of files")),
        Err(e) => Err(e),
    };
    let whiteout = fs_features::make_whiteout(&open, OsStr::new("w"));
    let rename = fs_features::rename_leaving_whiteout(&open, OsStr::new("f"), OsStr::new("g"));
    let trusted = fs_features::set_xattr(&open, "trusted.overlay.probe");
    let user = fs_features::set_xattr(&open, "user.overlay.probe");
    let unnamed = fs_features::make_unnamed_file(&open).map(drop);
    vec![
        Part::tried("d_type", d_type),
        Part::tried("trusted-xattr", trusted),
        Part::tried("user-xattr", user),
        Part::tried("whiteout-device", whiteout),
        Part::tried("rename-whiteout", rename),
        Part::tried("unnamed-file", unnamed),
    ]
}

fn upper_feature(
    file_system: &str,
    parts: &[Part],
    format: LayerFormat,
    mount: &Feature,
) -> Feature {
    let Some(missing) = missing_part(parts, format) else {
        return match mount.available {
            true => Feature::yes("upper", file_system),
            false => Feature::no(
                "upper",
                format!(
                    "the file system, {file_system}, has what an upper directory needs, but \
                     nothing can be mounted"
                ),
            ),
        };
    };
    let Feature { name, reason, .. } = &missing.feature;
    Feature::no(
        "upper",
        match missing.forbidden {
            true => format!(
                "this process may not use, on the file system, {file_system}, what an upper \
                 directory needs: {name}: {reason}"
            ),
            false => lacking(file_system, name, reason),
        },
    )
}

fn lacking(file_system: &str, name: &str, reason: &str) -> String {
    format!(
        "overlayfs cannot use the file system, {file_system}, for an upper directory: it lacks \
         {name}: {reason}"
    )
}

/// The first part that an upper directory needs and has not.
fn missing_part(parts: &[Part], format: LayerFormat) -> Option<&Part> {
    let xattr = match format {
        LayerFormat::OverlayTrusted => "trusted-xattr",
        _ => "user-xattr",
    };
    let needed = ["create", "d_type", "whiteout-device", xattr];
    parts.iter().find(|part| !part.feature.available && needed.contains(&part.feature.name))
}

/// The way in which layers are given, which counts only where something can be mounted.
fn rung_feature(driver: &OverlayDriver, dir: &Path, mountable: bool) -> Feature {
    match driver.ladder.choose(dir) {
        Ok(choice) => {
            let mut reason = choice.rung.to_string();
            for (rung, why) in &choice.passed_over {
                reason.push_str(&format!("; not {rung}: {why}"));
            }
            Feature { available: mountable, ..Feature::yes("layers-by", reason) }
        }
        Err(e) => Feature::no("layers-by", e),
    }
}

fn mount_feature(
    name: &'static str,
    driver: &OverlayDriver,
    room: &Room,
    format: LayerFormat,
) -> Feature {
    match deletions_are_marked(driver, room, format, false) {
        Ok(()) => Feature::yes(name, ""),
        Err(e) => Feature::no(name, e),
    }
}

fn volatile_feature(driver: &OverlayDriver, room: &Room, format: LayerFormat) -> Feature {
    match deletions_are_marked(driver, room, format, true) {
        Ok(()) => Feature::yes("volatile", ""),
        Err(e) => Feature::no("volatile", e),
    }
}

fn mapped_feature(driver: &OverlayDriver, room: &Room, format: LayerFormat) -> Feature {
    let name = "idmapped-layers";
    match ids_are_mapped(driver, room, format) {
        Ok(()) => Feature::yes(name, "files can be shown as those of other users"),
        Err(e) => Feature::no(name, e),
    }
}

/// Shows a file as another user's, and deletes it.
fn ids_are_mapped(driver: &OverlayDriver, room: &Room, format: LayerFormat) -> Result<()> {
    let dir = room.corner().at("create directory for trials in", room.path())?;
    let at = |name: &str| dir.join(name);
    for name in ["lower", "upper", "work", "empty", "target"] {
        fs::create_dir(at(name)).at("create directory", at(name))?;
    }
    fs::write(at("lower/file"), "").at("write", at("lower/file"))?;
    let own = fs::symlink_metadata(at("lower/file")).at("look at", at("lower/file"))?;
    // In most user namespaces there is another id; in one with a single id that has to do.
    let has_all = userns::has_all_ids().at("look at the ids of", "this user namespace")?;
    let other = |id: u32| if has_all { id ^ 1 } else { id };
    let range = |host| vec![IdRange { host, shown: other(host), len: 1 }];

    let mut request = MountRequest::new(format, at("empty"));
    request.lower = vec![at("lower")];
    request.upper = Some(UpperDir { dir: at("upper"), work: at("work") });
    request.options.ids = ShownIds { uids: range(own.uid()), gids: range(own.gid()) };
    let mut guard = driver.activate(&request, &at("target"))?;
    let file = at("target/file");
    let shown = fs::symlink_metadata(&file).at("look at", &file)?;
    fs::remove_file(&file).at("delete from a mounted overlay", &file)?;
    guard.unmount()?;
    match (shown.uid(), shown.gid()) == (other(own.uid()), other(own.gid())) {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Unsupported,
            "a mounted overlay does not show the ids of its layers' mounts",
        )),
    }
}

/// Deletes a file and makes a directory anew in a mount, and looks for the marks in the upper.
fn deletions_are_marked(
    driver: &OverlayDriver,
    room: &Room,
    format: LayerFormat,
    volatile: bool,
) -> Result<()> {
    let dir = room.corner().at("create directory for trials in", room.path())?;
    let at = |name: &str| dir.join(name);
    for name in ["lower", "lower/again", "upper", "work", "empty", "target"] {
        fs::create_dir(at(name)).at("create directory", at(name))?;
    }
    fs::write(at("lower/gone"), "").at("write", at("lower/gone"))?;
    fs::write(at("lower/again/old"), "").at("write", at("lower/again/old"))?;

    let mut request = MountRequest::new(format, at("empty"));
    request.lower = vec![at("lower")];
    request.upper = Some(UpperDir { dir: at("upper"), work: at("work") });
    request.options.volatile = volatile;
    let mut guard = driver.activate(&request, &at("target"))?;
    let gone = at("target/gone");
    fs::remove_file(&gone).at("delete from a mounted overlay", &gone)?;
    let again = at("target/again");
    fs::remove_dir_all(&again).at("delete from a mounted overlay", &again)?;
    fs::create_dir(&again).at("create in a mounted overlay", &again)?;
    let left = fs::read_dir(&again).at("list", &again)?.count();
    guard.unmount()?;

    let mark = fs::symlink_metadata(at("upper/gone")).at("look for the mark of", &gone)?;
    let is_whiteout = mark.file_type().is_char_device() && mark.rdev() == 0;
    if !is_whiteout || left != 0 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "a mounted overlay does not mark what is deleted",
        ));
    }
    Ok(())
}
