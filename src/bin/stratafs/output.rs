//! What commands print, as text or as JSON, and files that appear whole or not at all.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::failure::Failure;

/// The outcome of a command, which can be told in both ways.
pub(crate) trait Report: Serialize {
    /// For people; ends in a line feed, or is nothing.
    fn text(&self, out: &mut dyn Write) -> io::Result<()>;
}

/// Prints `report` on stdout.
pub(crate) fn print(json: bool, report: &impl Report) -> Result<(), Failure> {
    let mut out = BufWriter::new(io::stdout().lock());
    if json {
        serde_json::to_writer_pretty(&mut out, report).map_err(io::Error::from)?;
        out.write_all(b"\n")?;
    } else {
        report.text(&mut out)?;
    }
    out.flush()?;
    Ok(())
}

/// A path in JSON: see `--help`.
#[derive(Debug, Serialize)]
pub(crate) struct JsonPath {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_bytes: Option<Vec<u8>>,
}

impl JsonPath {
    pub(crate) fn new(bytes: &[u8]) -> JsonPath {
        JsonPath {
            path: String::from_utf8_lossy(bytes).into_owned(),
            path_bytes: str::from_utf8(bytes).is_err().then(|| bytes.to_vec()),
        }
    }
}

/// For people: the approximate text.
impl fmt::Display for JsonPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.path)
    }
}

/// A time as RFC 3339 has it, in UTC, to the second.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let seconds = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX),
    };
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days to a date in years that begin in March, by eras of 400 of them; from Howard Hinnant,
    // "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// A number of bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut shown = None;
    for unit in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        shown = Some(unit);
    }
    match shown {
        Some(unit) => format!("{value:.1} {unit}"),
        None => format!("{bytes} B"),
    }
}

/// A file that is written under a temporary name beside its own, and renamed when it is complete.
/// Dropped before that, it leaves nothing.
#[derive(Debug)]
pub(crate) struct PendingFile {
    file: File,
    /// None where there is nothing to rename: pipes and devices are written to as they are.
    temporary: Option<PathBuf>,
    target: PathBuf,
}

impl PendingFile {
    pub(crate) fn create(path: &Path) -> Result<PendingFile, Failure> {
        let fail = |e| Failure::io("write", path, e);
        let (target, special) = match fs::metadata(path) {
            Ok(found) if found.is_dir() => return Err(fail(io::ErrorKind::IsADirectory.into())),
            Ok(found) => {
                let kind = found.file_type();
                let special = kind.is_fifo() || kind.is_char_device() || kind.is_block_device();
                // What a symbolic link points to is replaced, not the link.
                let target = if special { Ok(path.to_owned()) } else { path.canonicalize() };
                (target.map_err(fail)?, special)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => (path.to_owned(), false),
            Err(e) => return Err(fail(e)),
        };
        if special {
            let file = OpenOptions::new().write(true).open(path).map_err(fail)?;
            return Ok(PendingFile { file, temporary: None, target });
        }
        let name = target
            .file_name()
            .ok_or_else(|| Failure::Usage(format!("{path:?} does not name a file")))?;
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.partial", process::id()));
        let temporary = target.with_file_name(hidden);
        let file =
            OpenOptions::new().write(true).create_new(true).open(&temporary).map_err(fail)?;
        Ok(PendingFile { file, temporary: Some(temporary), target })
    }

    /// Shows the file under its name, complete and on disk.
    pub(crate) fn publish(mut self) -> Result<(), Failure> {
        if let Some(temporary) = self.temporary.take() {
            let renamed = self.file.sync_all().and_then(|()| fs::rename(&temporary, &self.target));
            if let Err(e) = renamed {
                self.temporary = Some(temporary);
                return Err(Failure::io("write", &self.target, e));
            }
        }
        Ok(())
    }
}

impl Write for PendingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && let Err(e) = fs::remove_file(temporary)
        {
            tracing::warn!(path = ?temporary, error = %e, "an unfinished file is left");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_of_leap_years_and_before_1970() {
        let at = |seconds: i64| {
            let distance = Duration::from_secs(seconds.unsigned_abs());
            timestamp(if seconds < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance })
        };
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(at(-1), "1969-12-31T23:59:59Z");
    }

    #[test]
    fn sizes() {
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1.0 KiB");
        assert_eq!(size(5 << 30), "5.0 GiB");
        assert_eq!(size(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn names_that_are_not_utf8_have_their_bytes_too() {
        let json = |bytes| serde_json::to_string(&JsonPath::new(bytes)).unwrap();
        assert_eq!(json("/ä".as_bytes()), r#"{"path":"/ä"}"#);
        assert_eq!(json(b"/\xff"), r#"{"path":"/�","path_bytes":[47,255]}"#);
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "old").unwrap();
        let names = || fs::read_dir(dir.path()).unwrap().count();

        let mut pending = PendingFile::create(&path).unwrap();
        pending.write_all(b"new").unwrap();
        assert_eq!((fs::read(&path).unwrap(), names()), (b"old".to_vec(), 2));
        drop(pending);
        assert_eq!((fs::read(&path).unwrap(), names()), (b"old".to_vec(), 1));

        let mut pending = PendingFile::create(&path).unwrap();
        pending.write_all(b"new").unwrap();
        pending.publish().unwrap();
        assert_eq!((fs::read(&path).unwrap(), names()), (b"new".to_vec(), 1));
    }

    #[test]
    fn what_a_link_points_to_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("f"), dir.path().join("link"));
        fs::write(&path, "old").unwrap();
        std::os::unix::fs::symlink("f", &link).unwrap();
        let mut pending = PendingFile::create(&link).unwrap();
        pending.write_all(b"new").unwrap();
        pending.publish().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
