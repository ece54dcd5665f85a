//! Trials that say why they are not run, children that are this binary run again, and directories to
//! test in.

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// The first argument of a child: what follows is which of its duties, and that duty's arguments.
const CHILD: &str = "--as-child";
const TEMP: &str = "STRATAFS_TEST_TEMP";

/// The rest of the arguments, if this process is a child.
pub fn child_arguments() -> Option<Vec<String>> {
    let mut arguments = std::env::args().skip(1);
    (arguments.next().as_deref() == Some(CHILD)).then(|| arguments.collect())
}

/// This binary again, as a child with a duty; its standard input and output are pipes.
pub fn child(duty: &str, arguments: &[&str]) -> Child {
    start(&mut Command::new(std::env::current_exe().unwrap()), duty, arguments)
}

/// The same, of one that may be killed: its temporary directories are in `dir`.
pub fn mortal_child(dir: &Path, duty: &str, arguments: &[&str]) -> Child {
    start(Command::new(std::env::current_exe().unwrap()).env(TEMP, dir), duty, arguments)
}

fn start(command: &mut Command, duty: &str, arguments: &[&str]) -> Child {
    command
        .arg(CHILD)
        .arg(duty)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Whether the child ended by SIGKILL; panics unless it ended so or well.
#[track_caller]
pub fn was_killed(status: ExitStatus) -> bool {
    match status.signal() {
        Some(9) => true,
        _ => {
            assert!(status.success(), "the child failed: {status}");
            false
        }
    }
}

/// Ends this process as a power cut would: no destructor runs, nothing is flushed.
pub fn kill_myself() -> ! {
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
        .unwrap();
    // The signal is pending when the call returns.
    std::process::abort()
}

/// A line to the parent, now.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

/// A trial that is ignored with a reason where `hindrance` has one.
pub fn trial(
    name: impl Into<String>,
    hindrance: Option<String>,
    body: impl FnOnce() + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match hindrance {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => {
            body();
            Ok::<_, Failed>(Completion::Completed)
        }
    })
}

/// Runs the trials, as `main`.
pub fn run(trials: Vec<Trial>) -> ! {
    libtest_mimic::run(&Arguments::from_args(), trials).exit()
}

/// Runs the trials one after another, as `main`: a process that one thread starts has, for a moment,
/// copies of what others have open, and no file system is unmounted then.
pub fn run_one_by_one(trials: Vec<Trial>) -> ! {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials).exit()
}

/// Why this process cannot act as root in the initial user namespace, if it cannot.
pub fn needs_root() -> Option<String> {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
    let root = rustix::process::geteuid().is_root() && effective & CAP_SYS_ADMIN != 0;
    (!root).then(|| "needs root".to_owned())
}

/// Where a program is: by `PATH`, or among those of the administration.
pub fn find_program(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administration = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into);
    let mut dirs = std::env::split_paths(&path).chain(administration);
    dirs.find_map(|dir| Some(dir.join(program)).filter(|path| path.is_file()))
}

/// Why what needs a program is not run, if it is not there.
pub fn needs_program(program: &str) -> Option<String> {
    find_program(program).is_none().then(|| format!("needs {program}"))
}

/// A directory where files keep `user.*` xattrs; in memory, if there are such.
pub fn temp() -> tempfile::TempDir {
    if let Some(dir) = std::env::var_os(TEMP) {
        return tempfile::tempdir_in(dir).unwrap();
    }
    for place in ["/dev/shm", "/var/tmp"] {
        if let Ok(dir) = tempfile::tempdir_in(place)
            && keeps_user_xattrs(dir.path())
        {
            return dir;
        }
    }
    panic!("neither /dev/shm nor /var/tmp keeps user.* xattrs");
}

fn keeps_user_xattrs(dir: &Path) -> bool {
    rustix::fs::setxattr(dir, "user.probe", b"y", rustix::fs::XattrFlags::empty()).is_ok()
        && rustix::fs::removexattr(dir, "user.probe").is_ok()
}

/// Asserts that a call failed so, and that the message names what it should.
#[track_caller]
pub fn fails<T: std::fmt::Debug>(
    result: stratafs::Result<T>,
    kind: stratafs::ErrorKind,
    naming: &str,
) {
    let e = result.unwrap_err();
    assert_eq!(e.kind(), kind, "{e}");
    assert!(e.to_string().contains(naming), "{e}");
}
