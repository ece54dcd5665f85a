//! Union mounts to test, made the way a user makes them: by the mount helper, run in the foreground.
//!
//! `STRATAFS_FUSE_PROGRAM` in the environment puts another file system in its place, so that a test can
//! be tested: `kernel` is the kernel's overlayfs, anything else a program with the options of
//! fuse-overlayfs.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use stratafs::LayerFormat;

use super::suite;

/// Long after this a server that does not answer is taken for dead. No test asserts how long a thing
/// takes; this only turns a deadlock into a failure.
const HUNG: Duration = Duration::from_secs(120);

/// After this nobody is busy any more in a mount in which no test has a file open.
const SETTLED: Duration = Duration::from_secs(5);

/// What makes the union.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// `stratafs-fuse`.
    Own,
    /// The kernel's overlayfs.
    Kernel,
    /// A program with the options of fuse-overlayfs.
    Program(PathBuf),
}

impl Engine {
    /// `stratafs-fuse`, or what the environment puts in its place.
    pub fn under_test() -> Engine {
        match std::env::var_os("STRATAFS_FUSE_PROGRAM") {
            None => Engine::Own,
            Some(kernel) if kernel == "kernel" => Engine::Kernel,
            Some(program) if is_own(&program) => Engine::Own,
            Some(program) => Engine::Program(program.into()),
        }
    }

    fn program(&self) -> Option<PathBuf> {
        match self {
            Engine::Own => Some(own_program()),
            Engine::Kernel => None,
            Engine::Program(program) => Some(program.clone()),
        }
    }

    /// Why it cannot be mounted here, if it cannot.
    pub fn hindrance(&self) -> Option<String> {
        suite::needs_root().or_else(|| {
            let device = || File::options().read(true).write(true).open("/dev/fuse");
            let without = *self != Engine::Kernel && device().is_err();
            without.then(|| "needs /dev/fuse".to_owned())
        })
    }
}

/// The program as built for these tests, or another build of it that the environment names.
fn own_program() -> PathBuf {
    let named = std::env::var_os("STRATAFS_FUSE_PROGRAM").filter(|program| is_own(program));
    named.unwrap_or_else(|| env!("CARGO_BIN_EXE_stratafs-fuse").into()).into()
}

fn is_own(program: &std::ffi::OsStr) -> bool {
    Path::new(program).file_name() == Some("stratafs-fuse".as_ref())
}

/// Puts this process into a mount namespace of its own, with the umask that the tests count on. Call it
/// first in `main`: it holds for threads that come later.
pub fn enter_own_mount_namespace() {
    rustix::process::umask(UMASK.into());
    if suite::needs_root().is_none()
        && nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_ok()
    {
        let flags = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        rustix::mount::mount_change("/", flags).unwrap();
    }
}

/// Not the usual one, so that one who takes his own for the caller's is found out.
pub const UMASK: u32 = 0o027;

/// What is mounted.
#[derive(Clone, Debug)]
pub struct Branches {
    /// The topmost first.
    pub lowers: Vec<PathBuf>,
    /// The upper and the work directory.
    pub upper: Option<(PathBuf, PathBuf)>,
    pub format: LayerFormat,
    /// Whether directories of lower layers can be renamed.
    pub redirects: bool,
    /// Whether the kernel's overlayfs shows metadata-only copies, and makes some.
    pub metacopy: bool,
    /// Options of our own program beyond these, each after a comma.
    pub more: String,
}

impl Branches {
    /// With redirects where the format has them.
    pub fn new(
        lowers: Vec<PathBuf>,
        upper: Option<(PathBuf, PathBuf)>,
        format: LayerFormat,
    ) -> Branches {
        let redirects = format != LayerFormat::Aufs;
        Branches { lowers, upper, format, redirects, metacopy: false, more: String::new() }
    }

    fn options(&self, engine: &Engine) -> String {
        let lowers: Vec<_> = self.lowers.iter().map(|dir| dir.to_str().unwrap()).collect();
        let mut options = format!("lowerdir={}", lowers.join(":"));
        if let Some((upper, work)) = &self.upper {
            let (upper, work) = (upper.to_str().unwrap(), work.to_str().unwrap());
            options.push_str(&format!(",upperdir={upper},workdir={work}"));
        }
        match (engine, self.format) {
            (Engine::Own, format) => {
                options.push_str(&format!(",format={},dev,suid", format.as_str()));
                options.push_str(&self.more);
                if !self.redirects {
                    options.push_str(",redirect_dir=off");
                }
            }
            (Engine::Kernel, LayerFormat::OverlayTrusted) => {
                let redirects = if self.redirects { "on" } else { "nofollow" };
                let metacopy = if self.metacopy { "on" } else { "off" };
                options
                    .push_str(&format!(",redirect_dir={redirects},metacopy={metacopy},index=off"));
            }
            (Engine::Kernel, _) => {
                assert!(!self.redirects, "the kernel has no user.overlay.redirect");
                options.push_str(",userxattr,index=off");
            }
            (Engine::Program(_), _) => options.push_str(",dev,suid"),
        }
        options
    }
}

/// A mounted union, unmounted when dropped.
#[derive(Debug)]
pub struct UnionMount {
    at: PathBuf,
    server: Option<Child>,
    log: PathBuf,
    mounted: bool,
}

impl UnionMount {
    /// Mounts on `at`, which is made if it is missing; what a server says goes to `at` with `.log`.
    #[track_caller]
    pub fn new(engine: &Engine, branches: &Branches, at: &Path) -> UnionMount {
        UnionMount::try_new(engine, branches, at).unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn try_new(engine: &Engine, branches: &Branches, at: &Path) -> Result<UnionMount, String> {
        std::fs::create_dir_all(at).unwrap();
        let options = branches.options(engine);
        let log = at.with_extension("log");
        let Some(program) = engine.program() else {
            let data = std::ffi::CString::new(options.clone()).unwrap();
            rustix::mount::mount("stratafs-test", at, "overlay", MountFlags::empty(), &*data)
                .map_err(|e| format!("overlay does not mount with {options}: {e}"))?;
            return Ok(UnionMount { at: at.to_owned(), server: None, log, mounted: true });
        };
        let says = File::create(&log).unwrap();
        let server = Command::new(&program)
            .args(["-f", "-o", &options])
            .arg(at)
            // There may be no /dev/null.
            .stdin(Stdio::piped())
            .stdout(says.try_clone().unwrap())
            .stderr(says)
            .spawn()
            .unwrap();
        let mut mount = UnionMount { at: at.to_owned(), server: Some(server), log, mounted: false };
        let start = Instant::now();
        // A FUSE mount answers as soon as it is there, or makes wait until it does.
        while !is_fuse(at) {
            let status = mount.server.as_mut().unwrap().try_wait().unwrap();
            if status.is_some() || start.elapsed() > HUNG {
                let problem = format!(
                    "{} -f -o {options} {}: {status:?}: {}",
                    program.display(),
                    at.display(),
                    mount.log()
                );
                mount.kill();
                return Err(problem);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        mount.mounted = true;
        Ok(mount)
    }

    pub fn path(&self) -> &Path {
        &self.at
    }

    /// The process that serves it; none where the kernel does.
    pub fn server(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }

    /// What the server has said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Unmounts and waits for the server, which must end well and must not have panicked.
    pub fn unmount(mut self) -> Result<(), String> {
        self.end()
    }

    fn end(&mut self) -> Result<(), String> {
        if std::mem::take(&mut self.mounted) {
            let at = self.at.display().to_string();
            let start = Instant::now();
            let unmounted = loop {
                match rustix::mount::unmount(&self.at, UnmountFlags::empty()) {
                    // A server that has only just mounted has a look at its mount.
                    Err(rustix::io::Errno::BUSY) if start.elapsed() < SETTLED => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    // The kernel lets root alone, and fusermount3 who mounted by it.
                    Err(rustix::io::Errno::PERM) if self.server.is_some() => {
                        let mut command = Command::new("fusermount3");
                        match command.arg("-u").arg(&self.at).status() {
                            Ok(status) if status.success() => break Ok(()),
                            _ => break Err(rustix::io::Errno::PERM),
                        }
                    }
                    unmounted => break unmounted,
                }
            };
            if let Err(e) = unmounted {
                // Somebody has a file open in it, or its server is dead.
                rustix::mount::unmount(&self.at, UnmountFlags::DETACH).ok();
                self.kill();
                return Err(format!("{at} does not unmount: {e}: {}", self.log()));
            }
        }
        if let Some(mut server) = self.server.take() {
            let _watchdog = Watchdog::over(server.id(), "the server, after it was unmounted");
            let status = server.wait().unwrap();
            let log = self.log();
            if !status.success() || log.contains("panicked") {
                return Err(format!("the server ended with {status}: {log}"));
            }
        }
        Ok(())
    }

    /// Has the kernel forget all names and files of this mount that nobody uses at the moment.
    pub fn forget(&self) -> Result<(), String> {
        // A remount that changes nothing drops what is cached.
        rustix::mount::mount_remount(&self.at, MountFlags::empty(), c"")
            .map_err(|e| format!("{} is not remounted: {e}", self.at.display()))
    }

    /// Kills the server as a crash would, and takes away the mount that it leaves.
    pub fn crash(mut self) {
        assert!(self.server.is_some(), "the kernel cannot be killed");
        self.kill();
        self.mounted = false;
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH).unwrap();
    }

    fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().ok();
            server.wait().unwrap();
        }
    }

    /// Kills the server, if it is not dropped in time: who waits for an answer gets an error then.
    pub fn watchdog(&self) -> Watchdog {
        match self.server() {
            Some(pid) => Watchdog::over(pid, "the union"),
            None => Watchdog { _done: channel().0 },
        }
    }
}

impl Drop for UnionMount {
    fn drop(&mut self) {
        let ended = self.end();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn is_fuse(at: &Path) -> bool {
    const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
    rustix::fs::statfs(at).is_ok_and(|fs| fs.f_type == FUSE_SUPER_MAGIC)
}

/// Kills a process that has not done its part long after it should have.
pub struct Watchdog {
    _done: Sender<()>,
}

impl Watchdog {
    pub fn over(pid: u32, what: &'static str) -> Watchdog {
        let (done, wait) = channel::<()>();
        std::thread::spawn(move || {
            if wait.recv_timeout(HUNG) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{what} (process {pid}) hangs: it is killed");
                let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
        });
        Watchdog { _done: done }
    }
}

/// Numbers that look random and are the same for a seed every time (splitmix64).
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// One time in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

/// `STRATAFS_SEED`, if a run is to be repeated.
pub fn asked_seed() -> Option<u64> {
    let text = std::env::var("STRATAFS_SEED").ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("STRATAFS_SEED={text} is not a number")))
}

/// Whether the long runs are asked for.
pub fn full() -> bool {
    std::env::var_os("STRATAFS_FULL").is_some()
}
