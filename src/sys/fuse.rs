//! Getting a FUSE mount from the kernel: by ourselves, or by the setuid program fusermount3.
//!
//! Sources: the kernel's `Documentation/filesystems/fuse/fuse.rst` and `fs/fuse/inode.c`; fusermount3(1)
//! and libfuse's `lib/mount.c` for how it hands over the descriptor.

use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

use super::mount::{Attributes, FsContext};

/// What the kernel reports as the type of our mounts, after `fuse.`.
const SUBTYPE: &str = "stratafs";
/// The program that mounts for who may not.
pub(crate) const FUSERMOUNT: &str = "fusermount3";

/// How a FUSE mount is to be.
#[derive(Clone, Debug)]
pub(crate) struct FuseMount<'a> {
    pub(crate) source: &'a OsStr,
    pub(crate) attributes: Attributes,
    pub(crate) allow_other: bool,
    /// `key` or `key=value` each.
    pub(crate) options: &'a [OsString],
}

/// Opens the device by which a FUSE file system is served.
pub(crate) fn open_device() -> io::Result<OwnedFd> {
    Ok(std::fs::File::options().read(true).write(true).open("/dev/fuse")?.into())
}

/// Makes a mount that is served through `device`, attached nowhere yet. Whatever the kernel said about a
/// failure is in the error.
pub(crate) fn mount_detached(device: &OwnedFd, mount: &FuseMount<'_>) -> io::Result<OwnedFd> {
    let context = FsContext::open("fuse")?;
    let made = configure(&context, device, mount)
        .and_then(|()| context.create())
        .and_then(|()| context.mount(mount.attributes));
    made.map_err(|e| {
        let log = context.take_log();
        if log.is_empty() {
            e
        } else {
            io::Error::new(e.kind(), format!("{}: {e}", log.join("; ")))
        }
    })
}

fn configure(context: &FsContext, device: &OwnedFd, mount: &FuseMount<'_>) -> io::Result<()> {
    let text = |value: &OsStr| {
        value.to_str().map(str::to_owned).ok_or_else(|| {
            let what = format!("{value:?} is not UTF-8, which mount options have to be");
            io::Error::new(io::ErrorKind::InvalidInput, what)
        })
    };
    context.set_string("source", &text(mount.source)?)?;
    context.set_string("subtype", SUBTYPE)?;
    context.set_string("fd", &device.as_raw_fd().to_string())?;
    context.set_string("rootmode", "40000")?;
    context.set_string("user_id", &rustix::process::getuid().as_raw().to_string())?;
    context.set_string("group_id", &rustix::process::getgid().as_raw().to_string())?;
    context.set_flag("default_permissions")?;
    if mount.attributes.read_only {
        // Also when somebody remounts it.
        context.set_flag("ro")?;
    }
    if mount.allow_other {
        context.set_flag("allow_other")?;
    }
    for option in mount.options {
        let option = text(option)?;
        match option.split_once('=') {
            Some((key, value)) => context.set_string(key, value)?,
            None => context.set_flag(&option)?,
        }
    }
    Ok(())
}

/// What fusermount3 says of its version, which shows that it is there.
pub(crate) fn fusermount_version() -> io::Result<String> {
    let mut command = Command::new(FUSERMOUNT);
    let output = command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output();
    let output = output.map_err(|e| io::Error::new(e.kind(), format!("cannot run it: {e}")))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Has fusermount3 mount on `target`: the device, and with `auto_unmount` the socket at whose closing it
/// unmounts.
pub(crate) fn mount_by_fusermount(
    target: &Path,
    mount: &FuseMount<'_>,
    auto_unmount: bool,
) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut command = Command::new(FUSERMOUNT);
    command.arg("-o").arg(fusermount_options(mount, auto_unmount)).arg("--").arg(target);
    // Its standard input is the socket: no other descriptor is inherited.
    command.env("_FUSE_COMMFD", "0").stdin(Stdio::from(theirs)).stdout(Stdio::null());
    command.stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| {
        io::Error::new(e.kind(), format!("cannot run {FUSERMOUNT}: {e}: install the package fuse3"))
    })?;
    drop(command);
    let device = receive_descriptor(&ours)?;
    let Some(device) = device else {
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("{FUSERMOUNT} refused: {}", said.trim())));
    };
    if auto_unmount {
        // It stays, and is reaped by whoever reaps orphans once this process has ended.
        return Ok((device, Some(ours)));
    }
    child.wait()?;
    Ok((device, None))
}

fn fusermount_options(mount: &FuseMount<'_>, auto_unmount: bool) -> OsString {
    let mut options: Vec<Vec<u8>> = vec![
        [b"fsname=", escape(mount.source.as_bytes()).as_slice()].concat(),
        format!("subtype={SUBTYPE}").into_bytes(),
        b"default_permissions".to_vec(),
    ];
    let flags = [
        (mount.allow_other, "allow_other"),
        (mount.attributes.read_only, "ro"),
        (mount.attributes.nosuid, "nosuid"),
        (mount.attributes.nodev, "nodev"),
        (mount.attributes.noexec, "noexec"),
        (auto_unmount, "auto_unmount"),
    ];
    options.extend(flags.iter().filter(|(set, _)| *set).map(|(_, f)| f.as_bytes().to_vec()));
    options.extend(mount.options.iter().map(|option| escape(option.as_bytes())));
    OsString::from_vec(options.join(&b','))
}

/// fusermount3 takes commas and backslashes in values behind a backslash.
fn escape(value: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(value.len());
    for byte in value {
        if matches!(byte, b',' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    escaped
}

/// Receives a descriptor; none if the other side has closed the socket.
fn receive_descriptor(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0_u8; 1];
    let mut data = [io::IoSliceMut::new(&mut byte)];
    loop {
        match rustix::net::recvmsg(socket, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => {
                received?;
                break;
            }
        }
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            return Ok(descriptors.next());
        }
    }
    Ok(None)
}

/// Has fusermount3 unmount `target`.
pub(crate) fn unmount_by_fusermount(target: &Path, detach: bool) -> io::Result<()> {
    let mut command = Command::new(FUSERMOUNT);
    command.arg("-u").args(detach.then_some("-z")).arg("--").arg(target);
    let output = command.stdin(Stdio::null()).output().map_err(|e| {
        io::Error::new(e.kind(), format!("cannot run {FUSERMOUNT}: {e}: install the package fuse3"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let kind = match said.contains("busy") {
        true => io::ErrorKind::ResourceBusy,
        false => io::ErrorKind::Other,
    };
    Err(io::Error::new(kind, format!("{FUSERMOUNT} refused: {}", said.trim())))
}

/// Who this process acts for on file systems, by ids.
pub(crate) fn user_and_group() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// Writes what the kernel still holds of writes to the file system of the directory `dir`, and waits.
/// It may be a bare path, which syncfs(2) does not take.
pub(crate) fn sync_file_system(dir: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::syncfs(open_in(dir, OsStr::new("."))?)?)
}

/// The call by which a mount of this crate is asked to keep all data in its upper from now on: `_IO` of
/// ioctl(2), on its root.
pub(crate) const KEEP_DATA: u32 = 0xE7 << 8 | 1;

/// Makes that call on the root of a mount, which may be a bare path, and waits.
///
/// # Errors
/// ENOTTY for what is no such mount; what the mount answers.
pub(crate) fn keep_data(root: impl AsFd) -> io::Result<()> {
    let root = open_in(root, OsStr::new("."))?;
    // SAFETY: the call takes no argument, so that nothing is read or written.
    let answer = unsafe { libc::ioctl(root.as_raw_fd(), KEEP_DATA.into()) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether a server does not know a call.
pub(crate) fn is_unknown_call(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::ENOSYS))
}

/// Opens a file in a mount that may be attached nowhere.
pub(crate) fn open_in(mount: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    Ok(rustix::fs::openat(mount, name, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_escaped_for_fusermount() {
        let mount = FuseMount {
            source: OsStr::new("a,b\\c"),
            attributes: Attributes { nosuid: true, ..Attributes::default() },
            allow_other: false,
            options: &["context=x,y".into()],
        };
        assert_eq!(
            fusermount_options(&mount, true),
            "fsname=a\\,b\\\\c,subtype=stratafs,default_permissions,nosuid,auto_unmount,context=x\\,y"
        );
    }
}
