//! Snapshots that a `run` has made for itself, and that are to go with it: each has a label that names the
//! process. Where that is gone and nobody holds the snapshot, it is removed by whoever comes by.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use stratafs::{ErrorKind, Filter, Kind, Labels, Store};

use super::super::Result;
use crate::failure::Failure;

/// The label's name; its value is boot, pid namespace, pid and start time of the process.
const LABEL: &str = "stratafs.run";

/// A name that nobody else has.
pub(super) fn new_key() -> Result<String> {
    let uuid = read("/proc/sys/kernel/random/uuid")?;
    let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).take(12).collect();
    Ok(format!("run-{digits}"))
}

/// The label of this process's snapshot.
pub(super) fn label() -> Result<Labels> {
    let here = Place::current()?;
    let pid = std::process::id();
    // Without it another command would take this one for gone.
    let start = start_of(pid).ok_or_else(|| {
        let absent = io::Error::from(io::ErrorKind::NotFound);
        Failure::io("read when this process was started in", "/proc/self/stat".as_ref(), absent)
    })?;
    let value = format!("{} {} {pid} {start}", here.boot, here.pid_namespace);
    Ok(Labels::from([(LABEL.to_owned(), value)]))
}

/// Removes what processes that are gone have left; how many snapshots.
pub(in crate::commands) fn sweep(store: &Store) -> Result<u64> {
    let labelled = Filter::parse(&format!("kind==active,labels.{LABEL:?}"))?;
    let mut found = Vec::new();
    store.walk(&[labelled], &mut |info| {
        let value = info.labels.get(LABEL).cloned().unwrap_or_default();
        found.extend((info.kind == Kind::Active).then(|| (info.key.clone(), value)));
        Ok(())
    })?;
    if found.is_empty() {
        return Ok(0);
    }
    let here = Place::current()?;
    let mut removed = 0;
    for (key, value) in found {
        if !here.is_gone(&value, start_of) {
            continue;
        }
        match store.remove(&key) {
            Ok(()) => removed += 1,
            // Something of it still runs, or somebody else removes it.
            Err(e) if matches!(e.kind(), ErrorKind::Busy | ErrorKind::NotFound) => {
                tracing::debug!(key, "the snapshot of a command that is gone stays: {e}");
            }
            Err(e) => tracing::warn!("the snapshot {key:?} of a command that is gone stays: {e}"),
        }
    }
    Ok(removed)
}

/// Where a process id means something.
struct Place {
    boot: String,
    pid_namespace: u64,
}

impl Place {
    fn current() -> Result<Place> {
        let namespace = "/proc/self/ns/pid";
        let found = fs::metadata(namespace);
        let found = found.map_err(|e| Failure::io("look at", namespace.as_ref(), e))?;
        Ok(Place { boot: read("/proc/sys/kernel/random/boot_id")?, pid_namespace: found.ino() })
    }

    /// Whether the process of a label is gone. In doubt it is there.
    fn is_gone(&self, label: &str, start_of: impl Fn(u32) -> Option<String>) -> bool {
        let fields: Vec<&str> = label.split(' ').collect();
        let [boot, namespace, pid, start] = fields[..] else { return false };
        if boot != self.boot {
            return true;
        }
        let Ok(pid) = pid.parse() else { return false };
        namespace == self.pid_namespace.to_string()
            && start_of(pid).is_none_or(|found| found != start)
    }
}

/// When a process was started, in the kernel's ticks: proc_pid_stat(5). None if there is none.
fn start_of(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may have spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19).map(str::to_owned)
}

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).map_err(|e| Failure::io("read", path.as_ref(), e))?;
    Ok(text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_surely_gone_is() {
        let here = Place { boot: "b".to_owned(), pid_namespace: 4 };
        let start_of = |pid| (pid == 7).then(|| "99".to_owned());
        for (label, gone) in [
            ("b 4 7 99", false),
            ("b 4 7 98", true),
            ("b 4 8 99", true),
            ("a 4 7 99", true),
            ("b 5 8 99", false),
            ("b 4 x 99", false),
            ("", false),
        ] {
            assert_eq!(here.is_gone(label, start_of), gone, "{label:?}");
        }
        assert!(start_of_itself());
    }

    fn start_of_itself() -> bool {
        super::start_of(std::process::id()).is_some_and(|start| start.parse::<u64>().is_ok())
    }

    #[test]
    fn names_are_new_each_time() {
        let key = new_key().unwrap();
        assert!(key.len() == 16 && key.starts_with("run-") && key != new_key().unwrap(), "{key}");
    }
}
