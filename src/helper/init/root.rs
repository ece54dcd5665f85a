//! The root directory of a container: what is mounted in it, and that nothing of that stays in its layer.
//!
//! All that comes from outside is opened before the root is changed; attached is it afterwards, when no path
//! leads out any more, whatever symbolic links the image has. What it is attached to and is not there is made,
//! and taken away again when the container has ended, unless it has become something else.
//!
//! What there is: /proc, of the new pid namespace; /sys, read-only; /dev with the harmless devices, a
//! /dev/pts of its own and /dev/shm; the host's /etc/resolv.conf and /etc/hosts, read-only, for the network is
//! the host's; and what is shared. What in /proc and /sys tells of the machine, or changes it, is hidden or
//! read-only, as runc and Docker have it.
//!
//! Sources: the OCI runtime specification's `config-linux.md`, "Default Filesystems", "Default Devices";
//! runc's `libcontainer/specconv`, Docker's `oci/defaults.go`.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use super::plan::{Plan, Shared};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::mount::{self, Attributes};
use crate::sys::mount_tree::{self, LastLink};
use crate::sys::namespace::{self, Propagation};
use crate::sys::stat;

/// Bound from the host, since a user namespace can make none.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
const OF_NETWORK: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];
const HIDDEN: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Forbids all that a container's own file systems do not need.
const PLAIN: Attributes = Attributes { read_only: false, nosuid: true, nodev: true, noexec: true };
const PLAIN_READ_ONLY: Attributes = Attributes { read_only: true, ..PLAIN };
/// What is shared may be run.
const SHARED: Attributes = Attributes { noexec: false, ..PLAIN };
/// A device works where devices do.
const DEVICE: Attributes = Attributes { nodev: false, ..PLAIN };

/// The root directory of this process, as it is to be left.
#[derive(Debug, Default)]
pub(super) struct Root {
    /// In the order in which they were mounted.
    mounted: Vec<PathBuf>,
    /// In the order in which they were made.
    made: Vec<Made>,
    read_only: bool,
}

/// A mount point that was not there.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    kind: Kind,
    device: u64,
    inode: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

/// Mounts that are attached nowhere yet.
struct Prepared<'a> {
    root: OwnedFd,
    proc: OwnedFd,
    sys: OwnedFd,
    dev: OwnedFd,
    pts: Option<OwnedFd>,
    shm: OwnedFd,
    empty: OwnedFd,
    devices: Vec<(&'static str, OwnedFd)>,
    of_network: Vec<(&'static str, OwnedFd)>,
    shared: Vec<(&'a Shared, Kind, OwnedFd)>,
}

impl Root {
    /// Makes the plan's root the root of this process, in namespaces of its own.
    pub(super) fn enter(plan: &Plan) -> Result<Root> {
        let mut root = Root::default();
        namespace::set_propagation(Propagation::Private)
            .at("make private the mounts below", "/")?;
        let prepared = prepare(plan)?;
        namespace::change_root(&prepared.root)
            .at("change the root directory to", plan.root.text())?;
        match root.attach(prepared, plan) {
            Ok(()) => Ok(root),
            Err(e) => {
                root.leave();
                Err(e)
            }
        }
    }

    fn attach(&mut self, prepared: Prepared<'_>, plan: &Plan) -> Result<()> {
        let Prepared { root, proc, sys, dev, pts, shm, empty, devices, of_network, shared } =
            prepared;
        self.attach_on("/proc", &proc)?;
        self.attach_on("/sys", &sys)?;
        self.attach_on("/dev", &dev)?;
        for (name, target) in LINKS {
            mount_tree::make_link(&dev, name, target).at("make in /dev the link", name)?;
        }
        for (name, device) in &devices {
            mount_tree::make_file(&dev, OsStr::new(name)).at("make in /dev the file", name)?;
            attach_at(device, &Path::new("/dev").join(name))?;
        }
        for (name, mounted) in [("pts", pts.as_ref()), ("shm", Some(&shm))] {
            mount_tree::make_dir(&dev, OsStr::new(name), 0o755).at("make in /dev", name)?;
            if let Some(mounted) = mounted {
                attach_at(mounted, &Path::new("/dev").join(name))?;
            }
        }
        let null = devices.iter().find(|(name, _)| *name == "null").map(|(_, device)| device);
        for path in READ_ONLY {
            restrict_in_place(Path::new(path))?;
        }
        let mut covers = Covers { empty, is_used: false, null };
        for path in HIDDEN {
            covers.hide(Path::new(path))?;
        }
        for (path, mounted) in &of_network {
            self.attach_of_network(Path::new(path), mounted)?;
        }
        for (shared, kind, mounted) in &shared {
            let target = absolute(&shared.target.text())?;
            let place = self.place(&target, *kind, LastLink::Followed)?;
            self.attach_to(mounted, &place, target)?;
        }
        // What is missing is made first.
        self.place(&absolute(&plan.directory.text())?, Kind::Directory, LastLink::Followed)?;
        self.read_only = plan.read_only;
        if plan.read_only {
            mount_tree::set_read_only(&root, true).at("make read-only", "/")?;
        }
        Ok(())
    }

    /// One of the container's own file systems: a link in its place is the image's mistake, or trick.
    fn attach_on(&mut self, path: &'static str, mounted: &OwnedFd) -> Result<()> {
        let path = Path::new(path);
        let place = self.place(path, Kind::Directory, LastLink::Kept)?;
        if !mount::is_directory(&place).at("look at", path)? {
            let text = "the image has something else than a directory where one is needed, at";
            return Err(Error::new(ErrorKind::InvalidArgument, text).with_path(path));
        }
        self.attach_to(mounted, &place, path.to_owned())
    }

    /// The host's file: in an image that has /etc. A link to what is not there stays as it is.
    fn attach_of_network(&mut self, path: &Path, mounted: &OwnedFd) -> Result<()> {
        let parent = path.parent().unwrap_or(path);
        match mount_tree::open(parent, LastLink::Followed) {
            Ok(parent) if mount::is_directory(&parent).unwrap_or(false) => {}
            _ => return Ok(()),
        }
        let is_link = mount_tree::open(path, LastLink::Kept).is_ok()
            && mount_tree::open(path, LastLink::Followed).is_err();
        if is_link {
            tracing::debug!(?path, "a link that leads nowhere: the host's file is not shown");
            return Ok(());
        }
        let place = self.place(path, Kind::File, LastLink::Followed)?;
        if mount::is_directory(&place).at("look at", path)? {
            return Ok(());
        }
        self.attach_to(mounted, &place, path.to_owned())
    }

    fn attach_to(&mut self, mounted: &OwnedFd, place: &OwnedFd, path: PathBuf) -> Result<()> {
        mount::attach(mounted, place).at("mount in the container on", &path)?;
        self.mounted.push(path);
        Ok(())
    }

    /// What is at an absolute path; made, with all that leads there, if it is missing.
    fn place(&mut self, path: &Path, kind: Kind, last: LastLink) -> Result<OwnedFd> {
        match mount_tree::open(path, last) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            opened => return opened.at("open in the container", path),
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            let text = "a path in the container may not end in `..`";
            return Err(Error::new(ErrorKind::InvalidArgument, text).with_path(path));
        };
        let parent = self.place(parent, Kind::Directory, LastLink::Followed)?;
        match kind {
            Kind::Directory => mount_tree::make_dir(&parent, name, 0o755),
            Kind::File => mount_tree::make_file(&parent, name),
        }
        .at("make in the container", path)?;
        let place = mount_tree::open(path, LastLink::Kept).at("open in the container", path)?;
        let found = stat::fstat(&place).at("look in the container at", path)?;
        self.made.push(Made { path: path.to_owned(), kind, device: found.dev, inode: found.ino });
        Ok(place)
    }

    /// Takes away what was mounted and made, when no other process is left; gives what stays for other
    /// reasons than that it is used.
    pub(super) fn leave(self) -> BTreeSet<String> {
        let mut left = BTreeSet::new();
        for path in self.mounted.iter().rev() {
            if let Err(e) = mount_tree::detach(path) {
                tracing::debug!(?path, error = %e, "a mount in a container stays until its end");
            }
        }
        if self.read_only
            && let Err(e) = mount_tree::open(Path::new("/"), LastLink::Followed)
                .and_then(|root| mount_tree::set_read_only(root, false))
        {
            left.insert(format!("/: {e}"));
        }
        for made in self.made.iter().rev() {
            if let Err(e) = made.remove() {
                left.insert(format!("{}: {e}", made.path.display()));
            }
        }
        left
    }
}

impl Made {
    /// Only if it is still what was made, and empty.
    fn remove(&self) -> io::Result<()> {
        let (Some(parent), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Ok(());
        };
        let gone = |e: &io::Error| {
            matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        };
        let found = match mount_tree::open(&self.path, LastLink::Kept) {
            Err(e) if gone(&e) => return Ok(()),
            found => stat::fstat(found?)?,
        };
        if (found.dev, found.ino) != (self.device, self.inode)
            || (self.kind == Kind::File && found.size != 0)
        {
            return Ok(());
        }
        let parent = mount_tree::open(parent, LastLink::Followed)?;
        match mount_tree::remove(&parent, name, self.kind == Kind::Directory) {
            Err(e) if gone(&e) || e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            done => done,
        }
    }
}

/// Opens and makes all that needs the old root.
fn prepare(plan: &Plan) -> Result<Prepared<'_>> {
    let path = PathBuf::from(plan.root.text());
    let root = mount::open_dir_path(&path).at("open the container's root", &path)?;
    let proc = mount_tree::new("proc", &[], PLAIN).map_err(|e| {
        let e = Error::io("mount in the container", "/proc", e);
        e.context("the container around this hides parts of its /proc, and so forbids new ones: start it \
                   with `--security-opt unmask=ALL` (podman), `--security-opt systempaths=unconfined` \
                   (docker)")
    })?;
    let mut devices = Vec::with_capacity(DEVICES.len());
    for name in DEVICES {
        let device = Path::new("/dev").join(name);
        let mounted = match mount_tree::clone(&device) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                tracing::debug!(?device, "the host has no such device, nor has the container");
                continue;
            }
            mounted => mounted.at("take from the host", &device)?,
        };
        if let Err(e) = mount_tree::restrict(&mounted, DEVICE) {
            tracing::debug!(?device, error = %e, "a device stays as the host has it");
        }
        devices.push((name, mounted));
    }
    let mut of_network = Vec::with_capacity(OF_NETWORK.len());
    for file in OF_NETWORK {
        match mount_tree::clone(Path::new(file)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            mounted => {
                let mounted = mounted.at("take from the host", file)?;
                mount_tree::restrict(&mounted, PLAIN_READ_ONLY).at("make read-only", file)?;
                of_network.push((file, mounted));
            }
        }
    }
    let mut shared = Vec::with_capacity(plan.shared.len());
    for share in &plan.shared {
        shared.push(take(share)?);
    }
    Ok(Prepared {
        root,
        proc,
        sys: system()?,
        dev: tmpfs("/dev", &["mode=755", "size=65536k"], Attributes { noexec: true, ..SHARED })?,
        pts: terminals(),
        shm: tmpfs("/dev/shm", &["mode=1777", "size=65536k"], PLAIN)?,
        empty: tmpfs("/proc", &["mode=755", "size=0k"], PLAIN_READ_ONLY)?,
        devices,
        of_network,
        shared,
    })
}

fn tmpfs(purpose: &str, options: &[&str], attributes: Attributes) -> Result<OwnedFd> {
    mount_tree::new("tmpfs", options, attributes).at("mount in the container a tmpfs for", purpose)
}

/// A new /sys is for who owns the network namespace; others see the host's.
fn system() -> Result<OwnedFd> {
    if let Ok(new) = mount_tree::new("sysfs", &[], PLAIN_READ_ONLY) {
        return Ok(new);
    }
    let host = mount_tree::clone(Path::new("/sys")).at("take from the host", "/sys")?;
    mount_tree::restrict(&host, PLAIN_READ_ONLY).at("make read-only", "/sys")?;
    Ok(host)
}

/// Group 5 is the terminals' by custom; it may not be mapped.
fn terminals() -> Option<OwnedFd> {
    let attributes = Attributes { noexec: true, nosuid: true, ..Attributes::default() };
    let options = ["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
    let (without_group, _) = options.split_at(3);
    let made = mount_tree::new("devpts", &options, attributes)
        .or_else(|_| mount_tree::new("devpts", without_group, attributes));
    made.inspect_err(|e| tracing::debug!(error = %e, "no /dev/pts for the container")).ok()
}

fn take(shared: &Shared) -> Result<(&Shared, Kind, OwnedFd)> {
    let source = PathBuf::from(shared.source.text());
    let mounted = mount_tree::clone(&source).at("share with the container", &source)?;
    let attributes = Attributes { read_only: shared.read_only, ..SHARED };
    mount_tree::restrict(&mounted, attributes).at("restrict what is shared of", &source)?;
    let is_dir = mount::is_directory(&mounted).at("look at", &source)?;
    Ok((shared, if is_dir { Kind::Directory } else { Kind::File }, mounted))
}

fn attach_at(mounted: &OwnedFd, path: &Path) -> Result<()> {
    let place = mount_tree::open(path, LastLink::Kept).at("open in the container", path)?;
    mount::attach(mounted, place).at("mount in the container on", path)
}

/// What the kernel has not is passed over.
fn found(path: &Path) -> Result<Option<OwnedFd>> {
    match mount_tree::open(path, LastLink::Kept) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            Ok(None)
        }
        place => place.at("open in the container", path).map(Some),
    }
}

fn restrict_in_place(path: &Path) -> Result<()> {
    let Some(place) = found(path)? else { return Ok(()) };
    let again = mount_tree::clone_open(&place).at("mount again", path)?;
    mount_tree::restrict(&again, PLAIN_READ_ONLY).at("make read-only", path)?;
    mount::attach(&again, &place).at("mount in the container on", path)
}

/// What is mounted over what is to be hidden.
struct Covers<'a> {
    /// A directory: itself the first time, since only what is attached can be mounted again (before Linux 6.15).
    empty: OwnedFd,
    is_used: bool,
    /// A file.
    null: Option<&'a OwnedFd>,
}

impl Covers<'_> {
    fn hide(&mut self, path: &Path) -> Result<()> {
        let Some(place) = found(path)? else { return Ok(()) };
        let is_dir = mount::is_directory(&place).at("look at", path)?;
        let again = match (is_dir, self.null) {
            (true, _) if !self.is_used => None,
            (true, _) => Some(mount_tree::clone_open(&self.empty)),
            (false, Some(null)) => Some(mount_tree::clone_open(null)),
            (false, None) => return Ok(()),
        };
        let done = match again {
            Some(cover) => mount::attach(cover.at("make a cover for", path)?, &place),
            None => {
                self.is_used = true;
                mount::attach(&self.empty, &place)
            }
        };
        done.at("hide in the container", path)
    }
}

/// A path in the container, without `.` and doubled slashes.
fn absolute(path: &OsStr) -> Result<PathBuf> {
    let path = Path::new(path);
    if !path.is_absolute() {
        let text = "a path in the container must be absolute, and is not:";
        return Err(Error::new(ErrorKind::InvalidArgument, text).with_path(path));
    }
    Ok(path.components().filter(|part| *part != Component::CurDir).collect())
}
