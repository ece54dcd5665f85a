//! Rows of snapshots, and the intents that they begin as.

use std::collections::BTreeMap;
use std::time::SystemTime;

use rusqlite::params;

use super::{Tx, from_nanos, to_nanos};
use crate::digest::DiffId;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::Usage;
use crate::store::snapshot::{Info, Kind, Labels, RecordState};

/// A snapshot as it stands in the database.
#[derive(Clone, Debug)]
pub(in crate::store) struct Row {
    pub(in crate::store) id: i64,
    pub(in crate::store) parent: Option<i64>,
    /// Whether `usage` and `has_marks` hold, and the layer refers to nothing below it.
    pub(in crate::store) settled: bool,
    /// Whether the layer bears whiteouts or opaque marks; unknown until settled.
    pub(in crate::store) has_marks: Option<bool>,
    /// Whether others may have it mounted without this store's knowing.
    pub(in crate::store) handed_out: bool,
    pub(in crate::store) info: Info,
}

/// What is written of a new snapshot.
#[derive(Debug)]
pub(in crate::store) struct NewSnapshot<'a> {
    pub(in crate::store) id: i64,
    pub(in crate::store) key: &'a str,
    pub(in crate::store) kind: Kind,
    pub(in crate::store) parent: Option<i64>,
    pub(in crate::store) labels: &'a Labels,
    /// Usage and whether it has marks, of what is settled from the start.
    pub(in crate::store) settled: Option<(Usage, bool)>,
    pub(in crate::store) diff_id: Option<DiffId>,
    /// Why there is no record of the archive of that digest, if there is none.
    pub(in crate::store) no_record: Option<&'a str>,
}

const COLUMNS: &str = "s.id, s.key, s.kind, s.parent, p.key, s.labels, s.created, s.updated, \
     s.settled, s.bytes, s.inodes, s.has_marks, s.diff_id, s.handed_out, \
     s.no_record";
const FROM: &str = "FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent";

/// A row as SQLite gives it, before it is understood.
struct Raw {
    id: i64,
    key: String,
    kind: i64,
    parent: Option<i64>,
    parent_key: Option<String>,
    labels: String,
    created: i64,
    updated: i64,
    settled: bool,
    usage: (Option<i64>, Option<i64>),
    has_marks: Option<bool>,
    diff_id: Option<String>,
    handed_out: bool,
    no_record: Option<String>,
}

fn read_raw(row: &rusqlite::Row<'_>) -> rusqlite::Result<Raw> {
    Ok(Raw {
        id: row.get(0)?,
        key: row.get(1)?,
        kind: row.get(2)?,
        parent: row.get(3)?,
        parent_key: row.get(4)?,
        labels: row.get(5)?,
        created: row.get(6)?,
        updated: row.get(7)?,
        settled: row.get(8)?,
        usage: (row.get(9)?, row.get(10)?),
        has_marks: row.get(11)?,
        diff_id: row.get(12)?,
        handed_out: row.get(13)?,
        no_record: row.get(14)?,
    })
}

fn understand(raw: Raw) -> Result<Row> {
    let corrupt = |what: &str| {
        Error::new(ErrorKind::Corrupt, format!("snapshot {:?} has {what} in the metadata", raw.key))
    };
    let kind = Kind::from_number(raw.kind).ok_or_else(|| corrupt("an unknown kind"))?;
    let labels: BTreeMap<String, String> = serde_json::from_str(&raw.labels)
        .map_err(|e| corrupt("unreadable labels").with_source(e))?;
    let usage = match raw.usage {
        (Some(bytes), Some(inodes)) => Some(Usage {
            bytes: u64::try_from(bytes).map_err(|_| corrupt("a negative size"))?,
            inodes: u64::try_from(inodes).map_err(|_| corrupt("a negative count of inodes"))?,
        }),
        _ => None,
    };
    let diff_id = raw.diff_id.as_deref().map(str::parse).transpose()?;
    let record = match (diff_id, raw.no_record) {
        (None, _) => RecordState::NotImported,
        (Some(_), None) => RecordState::Kept,
        (Some(_), Some(reason)) => RecordState::Missing(reason),
    };
    Ok(Row {
        id: raw.id,
        parent: raw.parent,
        settled: raw.settled,
        has_marks: raw.has_marks,
        handed_out: raw.handed_out,
        info: Info {
            key: raw.key,
            kind,
            parent: raw.parent_key,
            labels,
            created: from_nanos(raw.created),
            updated: from_nanos(raw.updated),
            usage,
            diff_id,
            record,
        },
    })
}

impl Tx<'_> {
    /// A new id, never used before, and the intent to make a snapshot of it.
    pub(in crate::store) fn new_id(&self, operation: &str) -> Result<i64> {
        let sql = "INSERT INTO intents (operation) VALUES (?1) RETURNING id";
        let id = self.first(sql, [operation], |row| row.get(0))?;
        id.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the metadata gave no id"))
    }

    /// The intent is carried out, or given up.
    pub(in crate::store) fn end_intent(&self, id: i64) -> Result<()> {
        self.execute("DELETE FROM intents WHERE id = ?1", [id]).map(drop)
    }

    /// All ids of running or interrupted operations.
    pub(in crate::store) fn intents(&self) -> Result<Vec<i64>> {
        self.all("SELECT id FROM intents ORDER BY id", (), |row| row.get(0))
    }

    /// The snapshot of that key.
    pub(in crate::store) fn find(&self, key: &str) -> Result<Option<Row>> {
        let sql = format!("SELECT {COLUMNS} {FROM} WHERE s.key = ?1");
        self.first(&sql, [key], read_raw)?.map(understand).transpose()
    }

    /// As [`find`](Self::find), or an error that names the key.
    pub(in crate::store) fn get(&self, key: &str) -> Result<Row> {
        self.find(key)?
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no snapshot {key:?}")))
    }

    /// The snapshot of that id.
    pub(in crate::store) fn find_id(&self, id: i64) -> Result<Option<Row>> {
        let sql = format!("SELECT {COLUMNS} {FROM} WHERE s.id = ?1");
        self.first(&sql, [id], read_raw)?.map(understand).transpose()
    }

    /// All snapshots, by id: parents come before their children, but for rebased ones.
    pub(in crate::store) fn every(&self) -> Result<Vec<Row>> {
        let sql = format!("SELECT {COLUMNS} {FROM} ORDER BY s.id");
        self.all(&sql, (), read_raw)?.into_iter().map(understand).collect()
    }

    /// The snapshot and all below it, topmost first.
    pub(in crate::store) fn chain(&self, id: i64) -> Result<Vec<Row>> {
        let mut chain: Vec<Row> = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            let row = self.find_id(id)?.ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, format!("the parent with id {id} is missing"))
            })?;
            next = row.parent;
            if chain.iter().any(|seen| seen.id == row.id) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("snapshot {:?} is its own ancestor", row.info.key),
                ));
            }
            chain.push(row);
        }
        Ok(chain)
    }

    /// The keys of the snapshots that have this one as parent.
    pub(in crate::store) fn children(&self, id: i64) -> Result<Vec<String>> {
        let sql = "SELECT key FROM snapshots WHERE parent = ?1 ORDER BY id";
        self.all(sql, [id], |row| row.get(0))
    }

    /// Writes a new snapshot, and ends its intent.
    pub(in crate::store) fn insert(&self, new: &NewSnapshot<'_>) -> Result<()> {
        self.free_key(new.key)?;
        let now = to_nanos(SystemTime::now());
        let (usage, has_marks) = new.settled.unzip();
        self.execute(
            "INSERT INTO snapshots (id, key, kind, parent, labels, created, updated, settled, \
             bytes, inodes, has_marks, diff_id, no_record) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            params![
                new.id,
                new.key,
                new.kind.number(),
                new.parent,
                labels_text(new.labels)?,
                now,
                new.settled.is_some(),
                usage.map(|u| to_signed(u.bytes)),
                usage.map(|u| to_signed(u.inodes)),
                has_marks,
                new.diff_id.map(|d| d.to_string()),
                new.no_record,
            ],
        )?;
        self.end_intent(new.id)
    }

    /// Fails if the key is in use.
    pub(in crate::store) fn free_key(&self, key: &str) -> Result<()> {
        match self.find(key)? {
            None => Ok(()),
            Some(row) => Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("the name {key:?} is in use by {} snapshot", row.info.kind.with_article()),
            )),
        }
    }

    /// Turns an active snapshot into a committed one of another name.
    pub(in crate::store) fn commit_as(
        &self,
        row: &Row,
        name: &str,
        parent: Option<i64>,
        labels: &Labels,
        (usage, has_marks): (Usage, bool),
    ) -> Result<()> {
        self.free_key(name)?;
        let now = to_nanos(SystemTime::now());
        self.execute(
            "UPDATE snapshots SET key = ?2, kind = ?3, parent = ?4, labels = ?5, created = ?6, \
             updated = ?6, settled = 1, bytes = ?7, inodes = ?8, has_marks = ?9 WHERE id = ?1",
            params![
                row.id,
                name,
                Kind::Committed.number(),
                parent,
                labels_text(labels)?,
                now,
                to_signed(usage.bytes),
                to_signed(usage.inodes),
                has_marks,
            ],
        )
        .map(drop)
    }

    /// Notes what settling found, or with none that the layer may have changed since.
    pub(in crate::store) fn set_settled(
        &self,
        id: i64,
        settled: Option<(Usage, bool)>,
    ) -> Result<()> {
        let (usage, has_marks) = settled.unzip();
        self.execute(
            "UPDATE snapshots SET settled = ?2, bytes = ?3, inodes = ?4, has_marks = ?5 \
             WHERE id = ?1",
            params![
                id,
                settled.is_some(),
                usage.map(|u| to_signed(u.bytes)),
                usage.map(|u| to_signed(u.inodes)),
                has_marks,
            ],
        )
        .map(drop)
    }

    /// Notes that its mounts were given to others.
    pub(in crate::store) fn set_handed_out(&self, id: i64) -> Result<()> {
        self.execute("UPDATE snapshots SET handed_out = 1 WHERE id = ?1", [id]).map(drop)
    }

    /// Replaces the labels.
    pub(in crate::store) fn set_labels(&self, id: i64, labels: &Labels) -> Result<()> {
        let now = to_nanos(SystemTime::now());
        self.execute(
            "UPDATE snapshots SET labels = ?2, updated = ?3 WHERE id = ?1",
            params![id, labels_text(labels)?, now],
        )
        .map(drop)
    }

    /// Forgets a snapshot.
    pub(in crate::store) fn delete(&self, id: i64) -> Result<()> {
        self.execute("DELETE FROM snapshots WHERE id = ?1", [id]).map(drop)
    }
}

fn labels_text(labels: &Labels) -> Result<String> {
    serde_json::to_string(labels).map_err(|e| {
        Error::new(ErrorKind::InvalidArgument, "cannot store the labels").with_source(e)
    })
}

/// SQLite's integers are signed; no file system holds 2^63 bytes.
fn to_signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
