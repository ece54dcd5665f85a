//! The store's metadata: one SQLite database, and the only importer of rusqlite.
//!
//! - WAL, so that readers never wait for a writer, except where its index would be a danger
//!   ([`Journal`]); BEGIN IMMEDIATE for writers, so that a transaction that began will not find out at
//!   its end that it may not write.
//! - [`Sync::Durable`] transactions are on disk when they return (`synchronous=FULL`: one fsync of the
//!   log). [`Sync::Lazy`] ones may be lost at a power cut, never torn, and never out of order with
//!   durable ones.
//! - BUSY and FULL roll back and leave the handle usable. After an I/O error or signs of corruption
//!   the handle refuses everything: [`ErrorKind::Poisoned`].
//! - A handle used after fork would break SQLite's locks, so that is refused.
//! - No file of the store is touched inside a transaction.

mod images;
mod schema;
mod snapshots;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};

use crate::error::{Error, ErrorKind, Result};

pub(super) use images::ImageRow;
pub(super) use schema::Journal;
pub(super) use snapshots::{NewSnapshot, Row};

/// When a transaction is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sync {
    /// When the call returns.
    Durable,
    /// With the next durable one, or with a sync of the whole file system.
    Lazy,
}

/// The open database.
#[derive(Debug)]
pub(super) struct Metadata {
    connection: Mutex<Connection>,
    path: PathBuf,
    poisoned: AtomicBool,
    process: u32,
}

/// A running transaction.
#[derive(Debug)]
pub(super) struct Tx<'c>(Transaction<'c>);

impl Metadata {
    /// Opens the database, and creates its tables if it is new.
    pub(super) fn open(path: &Path, busy_timeout: Duration, journal: Journal) -> Result<Metadata> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let open = || -> rusqlite::Result<Connection> {
            // NOFOLLOW is about every component, and the root may well lie behind a symlink.
            let resolved = match (path.parent().map(Path::canonicalize), path.file_name()) {
                (Some(Ok(parent)), Some(name)) => parent.join(name),
                _ => path.to_owned(),
            };
            let connection = Connection::open_with_flags(resolved, flags)?;
            connection.busy_timeout(busy_timeout)?;
            schema::configure(&connection, journal)?;
            Ok(connection)
        };
        let mut connection = open().map_err(|e| failure("open the metadata", e).with_path(path))?;
        schema::create_or_check(&mut connection).map_err(|e| e.with_path_if_none(path))?;
        Ok(Metadata {
            connection: Mutex::new(connection),
            path: path.to_owned(),
            poisoned: AtomicBool::new(false),
            process: std::process::id(),
        })
    }

    /// Runs `read` on one consistent state.
    pub(super) fn read<T>(&self, read: impl FnOnce(&Tx<'_>) -> Result<T>) -> Result<T> {
        self.run(TransactionBehavior::Deferred, None, read)
    }

    /// Runs `change` alone among writers; an error from it changes nothing.
    pub(super) fn write<T>(
        &self,
        sync: Sync,
        change: impl FnOnce(&Tx<'_>) -> Result<T>,
    ) -> Result<T> {
        self.run(TransactionBehavior::Immediate, Some(sync), change)
    }

    fn run<T>(
        &self,
        behavior: TransactionBehavior,
        sync: Option<Sync>,
        body: impl FnOnce(&Tx<'_>) -> Result<T>,
    ) -> Result<T> {
        if self.process != std::process::id() {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "this store was opened before a fork: open it again in the child",
            ));
        }
        if self.is_poisoned() {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "an earlier failure of the metadata left this handle unusable: open the store again",
            )
            .with_path(&self.path));
        }
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let attempt = || -> Result<T> {
            if let Some(sync) = sync {
                let level = match sync {
                    Sync::Durable => "FULL",
                    Sync::Lazy => "NORMAL",
                };
                connection
                    .pragma_update(None, "synchronous", level)
                    .map_err(|e| failure("configure the metadata", e))?;
            }
            let tx = connection
                .transaction_with_behavior(behavior)
                .map_err(|e| failure("begin a transaction", e))?;
            let tx = Tx(tx);
            let value = body(&tx)?;
            tx.0.commit().map_err(|e| failure("commit to the metadata", e))?;
            Ok(value)
        };
        attempt().map_err(|e| {
            if is_fatal(&e) {
                self.poisoned.store(true, Ordering::Release);
            }
            if is_sqlites(&e) { e.with_path_if_none(&self.path) } else { e }
        })
    }

    /// Whether an earlier failure left the handle unusable, and what it wrote last in doubt.
    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// SQLite's own check of the file; its findings, none if it is sound.
    pub(super) fn integrity(&self) -> Result<Vec<String>> {
        self.read(|tx| {
            let findings =
                tx.all("PRAGMA integrity_check(20)", (), |row| row.get::<_, String>(0))?;
            Ok(findings.into_iter().filter(|line| line != "ok").collect())
        })
    }
}

impl Tx<'_> {
    /// All rows of a query.
    fn all<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let mut statement = self.0.prepare(sql).map_err(|e| failure("read the metadata", e))?;
        let rows =
            statement.query_map(params, read).map_err(|e| failure("read the metadata", e))?;
        rows.collect::<rusqlite::Result<_>>().map_err(|e| failure("read the metadata", e))
    }

    /// The first row of a query.
    fn first<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        Ok(self.all(sql, params, read)?.into_iter().next())
    }

    /// Runs a statement; how many rows it changed.
    fn execute(&self, sql: &str, params: impl rusqlite::Params) -> Result<usize> {
        self.0
            .prepare(sql)
            .and_then(|mut statement| statement.execute(params))
            .map_err(|e| failure("write the metadata", e))
    }
}

/// An error of SQLite as one of ours; `op` is a verb phrase.
fn failure(op: &'static str, e: rusqlite::Error) -> Error {
    let kind = match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            return Error::new(
                ErrorKind::Busy,
                format!(
                    "cannot {op}: another process is writing to it for longer than the busy timeout; \
                     try again or raise it"
                ),
            )
            .with_source(e);
        }
        Some(ErrorCode::DiskFull) => ErrorKind::NoSpace,
        Some(ErrorCode::ReadOnly) => ErrorKind::ReadOnly,
        Some(ErrorCode::PermissionDenied | ErrorCode::AuthorizationForStatementDenied) => {
            ErrorKind::PermissionDenied
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => ErrorKind::Corrupt,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("cannot {op}")).with_source(e)
}

/// SQLite's own error, where that is the cause.
fn cause(e: &Error) -> Option<&rusqlite::Error> {
    use std::error::Error as _;
    e.source().and_then(|source| source.downcast_ref())
}

fn is_sqlites(e: &Error) -> bool {
    cause(e).is_some()
}

/// Whether the handle must not be used after this.
fn is_fatal(e: &Error) -> bool {
    let code = cause(e).and_then(rusqlite::Error::sqlite_error_code);
    matches!(
        code,
        Some(ErrorCode::SystemIoFailure | ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
    )
}

/// A time as the database keeps it: nanoseconds since 1970.
fn to_nanos(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
    }
}

/// The reverse of [`to_nanos`].
fn from_nanos(nanos: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanos.unsigned_abs());
    let time =
        if nanos < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path, timeout: u64) -> Metadata {
        let timeout = Duration::from_millis(timeout);
        Metadata::open(&dir.join("metadata.db"), timeout, Journal::WriteAhead).unwrap()
    }

    #[test]
    fn a_writer_in_the_way_is_busy_and_the_handle_lives() {
        let tmp = tempfile::tempdir().unwrap();
        let (one, two) = (open(tmp.path(), 1), open(tmp.path(), 1));
        one.write(Sync::Durable, |_| {
            let e = two.write(Sync::Durable, |_| Ok(())).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
            Ok(())
        })
        .unwrap();
        two.write(Sync::Lazy, |_| Ok(())).unwrap();
    }

    #[test]
    fn an_error_in_a_transaction_changes_nothing() {
        let tmp = tempfile::tempdir().unwrap();
        let db = open(tmp.path(), 1000);
        let first = db.write(Sync::Lazy, |tx| tx.new_id("prepare")).unwrap();
        let failed = db.write(Sync::Lazy, |tx| {
            tx.end_intent(first)?;
            Err::<(), _>(Error::new(ErrorKind::Cancelled, "no"))
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(db.read(|tx| tx.intents()).unwrap(), [first]);
    }

    #[test]
    fn what_is_no_database_is_corrupt_and_of_a_newer_version_incompatible() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("metadata.db");
        std::fs::write(&path, vec![b'x'; 8192]).unwrap();
        let e = Metadata::open(&path, Duration::ZERO, Journal::WriteAhead).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        std::fs::remove_file(&path).unwrap();
        open(tmp.path(), 0);
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let e = Metadata::open(&path, Duration::ZERO, Journal::WriteAhead).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Incompatible, "{e}");
    }

    #[test]
    fn times_read_back_as_written() {
        for nanos in [0, 1, -1, i64::MAX, i64::MIN + 1, 1_700_000_000_123_456_789] {
            assert_eq!(to_nanos(from_nanos(nanos)), nanos);
        }
    }
}
