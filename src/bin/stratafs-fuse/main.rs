//! The mount helper: mounts a union of plain directories over FUSE and serves it. `stratafs-fuse --help`.
//!
//! [`options`] as typed -> one call of the library -> serving until it is unmounted or a signal comes. In
//! the background the program runs itself once more, and the first one ends when the mount answers.
#![deny(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![warn(missing_debug_implementations, unreachable_pub)]

mod options;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use stratafs::{ErrorKind, FuseMount, FuseUnmounter, LayerFormat, UpperDir};
use tracing::level_filters::LevelFilter;

use options::{Caller, MountRequest, Request};

/// The first argument of the one in the background.
const IN_BACKGROUND: &str = "--in-background";
/// What it says when the mount answers.
const READY: u8 = b'1';

/// What takes the place of its standard streams.
const NULL: &str = "/dev/null";

/// How long a server of an upper in containers/storage may take to end that nobody sees any more in this namespace.
const TO_END: Duration = Duration::from_secs(3);

const USAGE: &str = "\
Mounts a union of directories over FUSE, in the manner of overlayfs and AUFS.

Usage: stratafs-fuse [SOURCE] MOUNTPOINT -o OPTION[,OPTION...] [-f] [-d]

  -f             stay in the foreground
  -d             stay in the foreground, and say what happens
  -h, --help     this text
  -V, --version  the version

Layers (a backslash before a colon or comma makes it part of a name):
  lowerdir=DIR[:DIR...]    directories that are only read, the topmost first
  upperdir=DIR             the directory that takes all changes; without it all is read-only
  workdir=DIR              a directory on the same file system as upperdir, for nothing else
  format=FORMAT            how layers say what is deleted: overlay-trusted (default with privilege),
                           overlay-user (default without), or aufs
  br=DIR=rw:DIR=ro:...     AUFS's way to say it, with format=aufs; `rr` and `+wh` are as `ro`; without
                           workdir=, that is the first branch's name with `.stratafs-work` after it

Owners:
  uidmapping=HOST:SHOWN:COUNT[:...]  show user ids from HOST on as SHOWN and on; gidmapping= likewise
  squash_to_root, squash_to_uid=ID, squash_to_gid=ID  show one owner for all files

Behaviour:
  timeout=SECONDS          how long the kernel relies on what it knows (default: for ever); changes
                           beside the mount show after that
  writeback=0|1            collect small writes (default 1); with 0 a full disk shows at write(2)
  volatile, fsync=0        never wait for the disk
  redirect_dir=on|off      rename directories of lower layers (default on), or EXDEV
  metacopy=on|off          change attributes of files without copying their data (default on)
  xattr_permissions=1|2    owners, modes and devices are in xattrs: 2 user.containers.override_stat, 1
                           security.fuseoverlayfs.override_stat, which takes CAP_SYS_ADMIN
  noacl                    no POSIX ACLs
  static_nlink             show one link for every file
  threads=N                how many serve it (default: as processors, 2 to 4)
  busy_poll=MICROSECONDS   while requests follow each other, ask for the next for so long before sleeping
                           (default 100; 0: sleep at once)
  xino=off|auto|on         without effect: inode numbers are unique and lasting

Mount:
  ro, nodev, nosuid, noexec, dev, suid, exec, context=..., and flags that mount(8) passes
  allow_other              for others, too (default for root)
  auto_unmount             without privilege: unmount when this program ends, however it does
  fsname=NAME              the source that /proc/mounts shows
";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Nobody may be left to read it.
            let _ = writeln!(io::stderr(), "stratafs-fuse: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let in_background = arguments.first().is_some_and(|first| first == IN_BACKGROUND);
    if in_background {
        arguments.remove(0);
    }
    let (reads_trusted, is_root) = stratafs::fuse_privileges().map_err(|e| e.to_string())?;
    let caller = Caller { reads_trusted, is_root };
    let request = match options::parse(arguments.iter().cloned(), caller)? {
        Request::Help => return print(USAGE),
        Request::Version => {
            return print(&format!("stratafs-fuse {}\n", env!("CARGO_PKG_VERSION")));
        }
        Request::Mount(mut request) => {
            request.options.may_be_asked = true;
            request
        }
    };
    if in_background || request.foreground || request.debug {
        log(request.debug);
        return serve(&request, in_background);
    }
    go_to_background(&arguments)
}

fn print(text: &str) -> Result<(), String> {
    io::stdout().write_all(text.as_bytes()).map_err(|e| format!("cannot write: {e}"))
}

fn log(debug: bool) {
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
    tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr).init();
}

/// Has the program run in the background, and waits until the mount answers.
fn go_to_background(arguments: &[OsString]) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let null = File::open(NULL).map_err(|e| {
        format!("cannot open {NULL}, which a server in the background needs (-f serves in the foreground): {e}")
    })?;
    let mut child = Command::new(program)
        .arg0("stratafs-fuse")
        .arg(OsStr::new(IN_BACKGROUND))
        .args(arguments)
        .stdin(null)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start the server: {e}"))?;
    let mut said = [0; 1];
    let answer = match child.stdout.take() {
        Some(mut stdout) => stdout.read(&mut said),
        None => Ok(0),
    };
    match answer {
        Ok(1..) if said == [READY] => Ok(()),
        _ => {
            let status = child.wait().map_err(|e| format!("cannot wait for the server: {e}"))?;
            // It has said why; if a signal has not ended it.
            match status.code() {
                Some(_) => std::process::exit(1),
                None => Err(format!("the server has not mounted: {status}")),
            }
        }
    }
}

/// Mounts; an upper that only a server keeps whose mount nobody sees any more is taken over.
fn mount(request: &MountRequest) -> stratafs::Result<FuseMount> {
    let mount = || match FuseMount::new(&request.target, &request.options) {
        // No other marks can be made on a union.
        Err(e) if e.kind() == ErrorKind::Unsupported && request.may_be_aufs => {
            tracing::debug!(error = %e, "with marks of AUFS instead");
            let mut options = request.options.clone();
            options.format = LayerFormat::Aufs;
            FuseMount::new(&request.target, &options)
        }
        mounted => mounted,
    };
    let refused = match mount() {
        Err(e) if e.kind() == ErrorKind::Busy => e,
        mounted => return mounted,
    };
    match request.options.upper.as_ref().map(stratafs::end_unseen_server) {
        Some(Ok(true)) => mount(),
        Some(Err(e)) => {
            tracing::warn!(error = %e, "cannot find out who has the upper");
            Err(refused)
        }
        // podman unmounts while the namespace of the container that has ended is still being taken down, and mounts
        // again.
        Some(Ok(false)) if request.of_containers_storage => {
            let start = Instant::now();
            loop {
                match mount() {
                    Err(e) if e.kind() == ErrorKind::Busy && start.elapsed() < TO_END => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    mounted => return mounted,
                }
            }
        }
        _ => Err(refused),
    }
}

fn serve(request: &MountRequest, in_background: bool) -> Result<(), String> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1])
        .map_err(|e| format!("cannot take signals over: {e}"))?;
    let mut mount = mount(request).map_err(|e| e.to_string())?;
    for (feature, granted) in mount.granted() {
        tracing::debug!(feature, granted, "asked of the kernel");
    }
    if in_background {
        let ready = io::stdout().as_fd().try_clone_to_owned();
        let mut ready = File::from(ready.map_err(|e| format!("cannot keep a pipe: {e}"))?);
        stratafs::leave_terminal().map_err(|e| e.to_string())?;
        // Whoever waited may have been killed; the mount is there nevertheless.
        if let Err(e) = ready.write_all(&[READY]) {
            tracing::warn!(error = %e, "nobody waits for the mount");
        }
    }
    let (unmounter, upper) = (mount.unmounter(), request.options.upper.clone());
    let on_signal = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            if signal == SIGUSR1 && !upper.as_ref().is_some_and(may_go) {
                continue;
            }
            tracing::debug!(signal, "unmounting");
            if unmount(&unmounter) {
                break;
            }
        }
    });
    on_signal.map_err(|e| format!("cannot watch for signals: {e}"))?;
    mount.wait().map_err(|e| e.to_string())
}

/// Somebody wants the upper: whether nobody sees this mount any more.
fn may_go(upper: &UpperDir) -> bool {
    stratafs::nobody_sees_the_mount_on(upper).unwrap_or_else(|e| {
        tracing::warn!(error = %e, "asked whether anybody sees the mount");
        false
    })
}

/// Unmounts at the wish of a signal: files that are in use can be used to their end.
fn unmount(unmounter: &FuseUnmounter) -> bool {
    let done = match unmounter.unmount(false) {
        Err(e) if e.kind() == ErrorKind::Busy => unmounter.unmount(true),
        done => done,
    };
    match done {
        Ok(()) => true,
        Err(e) => {
            tracing::error!(error = %e, "cannot unmount");
            // Somebody else has done it, and the end is near.
            e.kind() == ErrorKind::NotFound
        }
    }
}
