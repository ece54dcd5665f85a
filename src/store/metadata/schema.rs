//! The tables, and the version that says which they are.

use rusqlite::{Connection, TransactionBehavior};

use super::failure;
use crate::error::{Error, ErrorKind, Result};

/// Marks the file as a stratafs store's: "stra".
const APPLICATION_ID: i32 = 0x7374_7261;
/// Version of the tables below.
const VERSION: i32 = 1;

/// - `intents`: the source of snapshot ids, which are never used twice; a row stands while the
///   snapshot is being made.
/// - `snapshots`: one key space for all kinds. `bytes`, `inodes` and `has_marks` are known of settled
///   ones; `labels` is a JSON object.
///   `no_record` is why a layer with a `diff_id` has no record; without that it has one.
///   `handed_out`: its mounts were given to others, so nobody knows until when it is mounted.
/// - `images`, `image_layers`: which layers an image needs, the base first.
const TABLES: &str = "
    CREATE TABLE intents (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        operation TEXT NOT NULL
    ) STRICT;
    CREATE TABLE snapshots (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        kind INTEGER NOT NULL CHECK (kind BETWEEN 1 AND 3),
        parent INTEGER REFERENCES snapshots (id) ON DELETE RESTRICT,
        labels TEXT NOT NULL,
        created INTEGER NOT NULL,
        updated INTEGER NOT NULL,
        settled INTEGER NOT NULL DEFAULT 0,
        bytes INTEGER,
        inodes INTEGER,
        has_marks INTEGER,
        handed_out INTEGER NOT NULL DEFAULT 0,
        diff_id TEXT,
        no_record TEXT
    ) STRICT;
    CREATE INDEX snapshots_parent ON snapshots (parent);
    CREATE TABLE images (
        name TEXT PRIMARY KEY,
        manifest TEXT NOT NULL,
        config TEXT NOT NULL,
        created INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE image_layers (
        image TEXT NOT NULL REFERENCES images (name) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE RESTRICT,
        PRIMARY KEY (image, position)
    ) STRICT;
    CREATE INDEX image_layers_snapshot ON image_layers (snapshot);
";

/// How SQLite keeps transactions whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Journal {
    /// Readers never wait for a writer. Its index is a shared mapping, and writing to one needs room on
    /// a file system that never overwrites in place: where there is none, SIGBUS ends the process.
    WriteAhead,
    /// No mapping; readers wait for the end of a write.
    Rollback,
}

impl Journal {
    /// The one for a store on a file system of that name.
    pub(in crate::store) fn on(file_system: &str) -> Journal {
        match file_system {
            "btrfs" | "bcachefs" => Journal::Rollback,
            _ => Journal::WriteAhead,
        }
    }
}

/// Settings of the connection, and the journal of the file.
pub(super) fn configure(connection: &Connection, journal: Journal) -> rusqlite::Result<()> {
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    let journal = match journal {
        Journal::WriteAhead => "WAL",
        // Unlike DELETE, its end is synced with `synchronous=FULL`.
        Journal::Rollback => "TRUNCATE",
    };
    connection.pragma_update_and_check(None, "journal_mode", journal, |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")
}

/// Makes the tables in a new file; refuses another program's file and a newer version's.
pub(super) fn create_or_check(connection: &mut Connection) -> Result<()> {
    let check = |e| failure("read the version of the metadata", e);
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(check)?;
    let read = |pragma: &str| {
        tx.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0)).map_err(check)
    };
    match (read("application_id")?, read("user_version")?) {
        (0, 0) => {
            let create = || {
                tx.execute_batch(TABLES)?;
                tx.pragma_update(None, "application_id", APPLICATION_ID)?;
                tx.pragma_update(None, "user_version", VERSION)
            };
            create().map_err(|e| failure("create the metadata", e))?;
            tx.commit().map_err(|e| failure("create the metadata", e))
        }
        (APPLICATION_ID, VERSION) => Ok(()),
        (APPLICATION_ID, version) => Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "the store's metadata has version {version}, this build reads version {VERSION}: \
                 use the version of stratafs that wrote it, or a newer one"
            ),
        )),
        _ => Err(Error::new(ErrorKind::Corrupt, "the metadata is another program's database")),
    }
}
