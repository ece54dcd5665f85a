//! The crates `pjdfstest` and `fsx`, looked for in `$STRATAFS_FSTOOLS/bin` (`/opt/fstools/bin` if that is not
//! set), then in PATH; and what pjdfstest says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

pub fn find(tool: &str) -> Option<PathBuf> {
    let root = std::env::var_os("STRATAFS_FSTOOLS").unwrap_or_else(|| "/opt/fstools".into());
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(Path::new(&root).join("bin"))
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(tool))
        .find(|program| program.is_file())
}

/// Why what needs a tool is not run, if so.
pub fn hindrance(tool: &str, other: &Option<String>) -> Option<String> {
    let missing = || format!("needs {tool}: cargo install --root /opt/fstools {tool}");
    other.clone().or_else(|| find(tool).is_none().then(missing))
}

/// All that Linux has. The users are those that each Debian has.
const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}

[settings]
naptime = 0.02
allow_remount = false

[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// What became of each test.
pub type Outcomes = BTreeMap<String, String>;

/// Runs those tests whose names have `pattern` in them, or all, in the directory `at`. `tools` is one for
/// what it needs beside that.
pub fn outcomes(at: &Path, tools: &Path, pattern: Option<&str>) -> Outcomes {
    let configuration = tools.join("pjdfstest.toml");
    fs::write(&configuration, CONFIGURATION).unwrap();
    // Another file system, for what must not be done across two.
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::set_permissions(elsewhere.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(find("pjdfstest").unwrap())
        .arg("-c")
        .arg(&configuration)
        .arg("-s")
        .arg(elsewhere.path())
        .arg("-p")
        .arg(at)
        .args(pattern)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let mut outcomes = Outcomes::new();
    let mut last = String::new();
    for line in text.lines() {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            [name, outcome @ ("ok" | "FAILED" | "skipped")] if name.contains("::") => {
                outcomes.insert(name.to_owned(), outcome.to_owned());
                last = name.to_owned();
            }
            // The reason follows.
            _ if line.starts_with('\t') && outcomes.contains_key(&last) => {
                let outcome = outcomes.get_mut(&last).unwrap();
                outcome.push_str(&format!(": {}", line.trim()));
            }
            _ => {}
        }
    }
    let summary = text.lines().find(|line| line.starts_with("Summary: ")).unwrap_or_else(|| {
        panic!("pjdfstest did not end: {text} {}", String::from_utf8_lossy(&output.stderr))
    });
    let total = format!("{} total", outcomes.len());
    assert!(summary.ends_with(&total), "{} were understood of: {summary}", outcomes.len());
    assert!(outcomes.len() > 300 || pattern.is_some(), "{summary}");
    outcomes
}

pub fn those(outcomes: &Outcomes, what: &str) -> BTreeSet<String> {
    let matching = outcomes.iter().filter(|(_, outcome)| outcome.starts_with(what));
    matching.map(|(name, _)| name.clone()).collect()
}
