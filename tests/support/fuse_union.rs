//! A union on a stage: a directory with lowers, an upper, a work directory and a mount point, mounted
//! the way a user mounts it, by a program in the foreground, and unmounted when dropped.
//!
//! `STRATAFS_FUSE_PROGRAM` in the environment puts another file system in its place, so that a test can
//! be tested: `kernel` is the kernel's overlayfs, a path that ends in `stratafs-fuse` is another build of
//! ours, anything else is a program with the options of fuse-overlayfs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::suite;
use super::whole_tree;

/// After this a server that does not answer is taken for dead, and killed. Nothing asserts how long a
/// thing takes; this only turns a deadlock into a failure.
const HUNG: Duration = Duration::from_secs(300);

/// What makes the union.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// `stratafs-fuse`.
    Own(PathBuf),
    /// The kernel's overlayfs.
    Kernel,
    /// A program with the options of fuse-overlayfs.
    Program(PathBuf),
}

impl Engine {
    /// `stratafs-fuse`, or what the environment puts in its place.
    pub fn under_test() -> Engine {
        match std::env::var_os("STRATAFS_FUSE_PROGRAM").map(PathBuf::from) {
            None => Engine::Own(env!("CARGO_BIN_EXE_stratafs-fuse").into()),
            Some(kernel) if kernel == Path::new("kernel") => Engine::Kernel,
            Some(path) if path.ends_with("stratafs-fuse") => Engine::Own(path),
            Some(path) => Engine::Program(path),
        }
    }

    pub fn is_own(&self) -> bool {
        matches!(self, Engine::Own(_))
    }

    fn program(&self) -> Option<&Path> {
        match self {
            Engine::Own(program) | Engine::Program(program) => Some(program),
            Engine::Kernel => None,
        }
    }

    /// Why it cannot be mounted here, if it cannot.
    pub fn hindrance(&self) -> Option<String> {
        suite::needs_root().or_else(|| match self {
            Engine::Kernel => None,
            _ => needs_device(),
        })
    }

    /// The same for a suite that an ordinary user runs, too, whose mounts fusermount3 makes.
    pub fn hindrance_for_anyone(&self) -> Option<String> {
        if suite::needs_root().is_none() {
            return self.hindrance();
        }
        match self {
            Engine::Kernel => suite::needs_root(),
            _ => needs_device().or_else(|| suite::needs_program("fusermount3")),
        }
    }
}

fn needs_device() -> Option<String> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    device.is_err().then(|| "needs /dev/fuse".to_owned())
}

/// Why only another file system than the one under test can be tested so, if it is.
pub fn needs_own() -> Option<String> {
    let engine = Engine::under_test();
    engine.hindrance().or_else(|| (!engine.is_own()).then(|| "only for stratafs-fuse".to_owned()))
}

/// Puts this process into a mount namespace of its own, with a umask that hides nothing. Call it first
/// in `main`: it holds for threads that come later.
pub fn enter_own_mount_namespace() {
    rustix::process::umask(rustix::fs::Mode::from(0o022));
    if suite::needs_root().is_none()
        && nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_ok()
    {
        let flags = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        rustix::mount::mount_change("/", flags).unwrap();
    }
}

/// How layers are marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Overlay,
    Aufs,
}

/// Lowers, an upper, a work directory and a mount point.
#[derive(Debug)]
pub struct Stage {
    pub lowers: Vec<PathBuf>,
    pub upper: Option<(PathBuf, PathBuf)>,
    pub at: PathBuf,
    pub format: Format,
    /// Options beyond these, each after a comma; the kernel's overlayfs gets none of them.
    pub more: String,
    /// What follows a server's death by the watchdog; none for runs that last.
    pub patience: Option<Duration>,
    dir: tempfile::TempDir,
}

impl Stage {
    /// With this number of empty lowers, and an upper, on the disk of `/var/tmp`; in memory, where that is
    /// a union itself, on which the kernel puts no upper.
    pub fn new(lowers: usize) -> Stage {
        const OVERLAYFS_SUPER_MAGIC: i64 = 0x794c_7630;
        let kind = rustix::fs::statfs("/var/tmp").unwrap().f_type;
        let place = if kind == OVERLAYFS_SUPER_MAGIC { "/dev/shm" } else { "/var/tmp" };
        Stage::inside(tempfile::tempdir_in(place).unwrap(), lowers)
    }

    /// The same, in a directory of the caller's choice.
    pub fn inside(dir: tempfile::TempDir, lowers: usize) -> Stage {
        let root = dir.path().to_owned();
        // Other users go through it.
        mode(&root, 0o755);
        let make = |name: &str| {
            let path = root.join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        Stage {
            lowers: (0..lowers).map(|n| make(&format!("lower{n}"))).collect(),
            upper: Some((make("upper"), make("work"))),
            at: make("merged"),
            format: Format::Overlay,
            more: String::new(),
            patience: Some(HUNG),
            dir,
        }
    }

    pub fn aufs(lowers: usize) -> Stage {
        Stage { format: Format::Aufs, ..Stage::new(lowers) }
    }

    /// With this number of lowers, and options of our own, each after a comma.
    pub fn with_options(lowers: usize, more: &str) -> Stage {
        Stage { more: more.to_owned(), ..Stage::new(lowers) }
    }

    /// A path in the topmost lower.
    pub fn lower(&self, path: impl AsRef<Path>) -> PathBuf {
        self.lowers[0].join(path)
    }

    pub fn upper(&self, path: impl AsRef<Path>) -> PathBuf {
        self.upper.as_ref().unwrap().0.join(path)
    }

    pub fn work(&self) -> &Path {
        &self.upper.as_ref().unwrap().1
    }

    /// A directory beside the layers, on the same file system and in no union.
    pub fn beside(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn options(&self, engine: &Engine, work: Option<&Path>) -> String {
        let lowers: Vec<_> = self.lowers.iter().map(|dir| dir.to_str().unwrap()).collect();
        let mut options = format!("lowerdir={}", lowers.join(":"));
        if let Some((upper, own_work)) = &self.upper {
            let (upper, work) = (upper.display(), work.unwrap_or(own_work).display());
            options.push_str(&format!(",upperdir={upper},workdir={work}"));
        }
        // What fusermount3 gives to an ordinary user.
        let privileged = suite::needs_root().is_none();
        match engine {
            Engine::Own(_) => {
                if privileged {
                    options.push_str(",dev,suid,allow_other");
                }
                if self.format == Format::Aufs {
                    options.push_str(",format=aufs");
                }
                options.push_str(&self.more);
            }
            Engine::Kernel => {
                assert_eq!(self.format, Format::Overlay);
                // What the upper refers to is in a lower layer.
                options.push_str(",redirect_dir=on,metacopy=on,index=off");
            }
            Engine::Program(_) => {
                if privileged {
                    options.push_str(",dev,suid");
                }
                options.push_str(&self.more);
            }
        }
        options
    }

    #[track_caller]
    pub fn mount(&self) -> Union {
        self.mount_by(&Engine::under_test())
    }

    #[track_caller]
    pub fn mount_by(&self, engine: &Engine) -> Union {
        let options = self.options(engine, None);
        Union::new(engine, &options, &self.at, self.patience).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Mounts what is there with the kernel's overlayfs, whatever is under test, with another work
    /// directory.
    #[track_caller]
    pub fn mount_by_the_kernel(&self) -> Union {
        let options = self.options(&Engine::Kernel, Some(&self.beside("kernel-work")));
        Union::new(&Engine::Kernel, &options, &self.at, None).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Asserts that what `union` shows survives: the same tree is there when it is mounted again, and
    /// when the kernel's overlayfs mounts it.
    #[track_caller]
    pub fn survives(&self, union: Union) {
        let shown = whole_tree::lines(union.path());
        union.unmount();
        self.shows(&shown);
    }

    /// Asserts that a new mount shows this tree, and that of the kernel's overlayfs, if root may make one, does
    /// too.
    #[track_caller]
    pub fn shows(&self, expected: &[String]) {
        let again = self.mount();
        whole_tree::assert_same("mounted again", expected, &whole_tree::lines(again.path()));
        again.unmount();
        if self.format == Format::Overlay && suite::needs_root().is_none() {
            let kernel = self.mount_by_the_kernel();
            let shown = whole_tree::lines(kernel.path());
            whole_tree::assert_same("mounted by the kernel", expected, &shown);
            kernel.unmount();
        }
    }
}

/// A mounted union.
#[derive(Debug)]
pub struct Union {
    at: PathBuf,
    server: Option<Child>,
    log: PathBuf,
    mounted: bool,
    _watchdog: Option<Sender<()>>,
}

impl Union {
    /// Mounts on `at`; what the server says goes to `at` with `.log`.
    pub fn new(
        engine: &Engine,
        options: &str,
        at: &Path,
        patience: Option<Duration>,
    ) -> Result<Union, String> {
        let log = at.with_extension("log");
        let at = at.to_owned();
        let Some(program) = engine.program() else {
            let data = std::ffi::CString::new(options).unwrap();
            rustix::mount::mount("stratafs-test", &at, "overlay", MountFlags::empty(), &*data)
                .map_err(|e| format!("overlay does not mount with {options}: {e}"))?;
            return Ok(Union { at, server: None, log, mounted: true, _watchdog: None });
        };
        let says = File::create(&log).unwrap();
        let server = Command::new(program)
            .args(["-f", "-o", options])
            .arg(&at)
            .stdin(Stdio::null())
            .stdout(says.try_clone().unwrap())
            .stderr(says)
            .spawn()
            .unwrap();
        let watchdog = patience.map(|patience| watch(server.id(), patience));
        let mut union =
            Union { at, server: Some(server), log, mounted: false, _watchdog: watchdog };
        let start = Instant::now();
        // A FUSE mount answers as soon as it is there, or makes wait until it does.
        while !is_fuse(&union.at) {
            let status = union.server.as_mut().unwrap().try_wait().unwrap();
            if status.is_some() || start.elapsed() > HUNG {
                let (program, at, log) = (program.display(), union.at.display(), union.log());
                return Err(format!("{program} -f -o {options} {at}: {status:?}: {log}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        union.mounted = true;
        Ok(union)
    }

    pub fn path(&self) -> &Path {
        &self.at
    }

    /// A path in it.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.at.join(path)
    }

    /// Has the kernel forget what it has cached of this mount and nobody uses.
    pub fn forget(&self) {
        // A remount that changes nothing drops it.
        if self.server.is_some() {
            rustix::mount::mount_remount(&self.at, MountFlags::empty(), c"").unwrap();
        }
    }

    /// What the server has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Unmounts and waits for the server, which must end well and must not have panicked.
    #[track_caller]
    pub fn unmount(mut self) {
        self.end().unwrap();
    }

    fn end(&mut self) -> Result<(), String> {
        let log = self.log();
        if std::mem::take(&mut self.mounted) {
            let at = self.at.display().to_string();
            let start = Instant::now();
            let unmounted = loop {
                match rustix::mount::unmount(&self.at, UnmountFlags::empty()) {
                    // The kernel lets root alone, and fusermount3 who mounted by it.
                    Err(rustix::io::Errno::PERM) if unmounts_by_fusermount(&self.at) => {
                        break Ok(());
                    }
                    // The server itself uses the mount for a moment after it is there.
                    Err(rustix::io::Errno::BUSY | rustix::io::Errno::PERM)
                        if start.elapsed() < Duration::from_secs(10) =>
                    {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    result => break result,
                }
            };
            if let Err(e) = unmounted {
                // Somebody has a file open in it, or its server is dead.
                if rustix::mount::unmount(&self.at, UnmountFlags::DETACH).is_err() {
                    Command::new("fusermount3").args(["-u", "-z"]).arg(&self.at).status().ok();
                }
                self.kill();
                return Err(format!("{at} does not unmount: {e}: {log}"));
            }
        }
        if let Some(mut server) = self.server.take() {
            let _watchdog = watch(server.id(), HUNG);
            let status = server.wait().unwrap();
            let log = self.log();
            if !status.success() || log.contains("panicked") {
                return Err(format!("the server ended with {status}: {log}"));
            }
        }
        Ok(())
    }

    fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().ok();
            server.wait().unwrap();
        }
    }
}

impl Drop for Union {
    fn drop(&mut self) {
        let ended = self.end();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn unmounts_by_fusermount(at: &Path) -> bool {
    let mut command = Command::new("fusermount3");
    command.args(["-u", "-q"]).arg(at).status().is_ok_and(|status| status.success())
}

fn is_fuse(at: &Path) -> bool {
    const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
    rustix::fs::statfs(at).is_ok_and(|fs| fs.f_type == FUSE_SUPER_MAGIC)
}

/// Kills a process unless the sender is dropped before; who waits for its answer gets an error then.
fn watch(pid: u32, patience: Duration) -> Sender<()> {
    let (done, wait) = channel::<()>();
    std::thread::spawn(move || {
        if wait.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            eprintln!("the server (process {pid}) hangs: it is killed");
            let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
    });
    done
}

/// Sets a mode, all twelve bits of it.
#[track_caller]
pub fn mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}
