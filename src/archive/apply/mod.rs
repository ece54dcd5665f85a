//! Unpacking a layer archive into a directory.
//!
//! Input is read once, from first byte to last: digested as it came, uncompressed, digested again
//! and cut into entries, each of which is made before the next is begun, by up to three threads
//! ([`pipeline`]). Memory does not grow with the archive, but for what whiteouts need: of a plain tree
//! a few bytes for each name ([`placed`]), of a layer the directories that are opaque; and within a
//! bound for directories that have no entry ([`parents`]).
//!
//! Invariants:
//! - Nothing outside of the root is made, changed, removed or looked at, whatever the archive says
//!   and whatever symlinks it makes ([`target`]). The last name of a path is never followed.
//! - What is made is what the entry says, whatever the umask and whatever was there ([`place`],
//!   [`attributes`]).
//! - Whiteouts mean lower layers only, never what the archive itself has, in any order
//!   ([`whiteout`]).
//! - An error leaves the directory half filled: unpack where nobody looks, and remove it then.
//!   Nothing is synced to disk.
//!
//! It relies on nobody else writing to the directory meanwhile for the right result, not for staying
//! inside.
//!
//! Sources: OCI image specification `layer.md`; POSIX `pax`; moby's `pkg/archive/diff.go` for what
//! AUFS left in archives (`.wh..wh.plnk`).

mod acl;
mod attributes;
mod lost;
mod options;
mod parents;
mod pipeline;
mod place;
mod placed;
mod plnk;
mod stream;
mod tally;
mod target;
mod watch;
mod whiteout;

#[cfg(test)]
mod breakout_tests;
#[cfg(test)]
mod cost_tests;
#[cfg(test)]
mod mark_tests;
#[cfg(any(test, fuzzing))]
pub(in crate::archive) mod model;
#[cfg(test)]
mod parents_tests;
#[cfg(test)]
mod peer_tests;
#[cfg(test)]
mod pipeline_tests;
#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod record_tests;
#[cfg(test)]
mod test_archive;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io::{BufRead, Read};
use std::path::Path;
use std::sync::Mutex;

use self::parents::MadeUp;
use self::pipeline::{Job, Outcome};
use self::placed::Placed;
use self::target::{Inode, Target};
use self::watch::Watch;
use crate::archive::entry::{Entry, EntryLimits, EntryReader, Timestamp};
use crate::archive::record::{Capture, Tapped};
use crate::digest::DiffId;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::marks::{self, DotWh};
use crate::layer::{LayerFormat, Usage, usage};
use crate::path::{Name, RelPath};
use crate::progress::{self, Phase, Progress, ProgressFn};
use crate::sys::dir::Dir;
use crate::sys::stat::Time;

pub(crate) use self::parents::Below;

pub use self::options::{
    Applied, ApplyLimits, ApplyOptions, Devices, LayerTarget, Ownership, UnionXattrs, XattrPolicy,
};

/// Unpacks a layer archive, plain or compressed, into the directory `root`.
///
/// `input` is read to its very end, for its digest: compare [`Applied::blob`] or
/// [`Applied::diff_id`] with what was promised before anybody sees the directory. After an error the
/// directory holds a part of the layer, and is to be removed.
///
/// ```
/// use stratafs::{ApplyOptions, LayerTarget, apply_layer, ignore_progress};
/// # let root = tempfile::tempdir()?;
/// let mut archive = tar::Builder::new(Vec::new());
/// let mut header = tar::Header::new_gnu();
/// header.set_size(5);
/// header.set_mode(0o644);
/// archive.append_data(&mut header, "etc/motd", &b"hello"[..])?;
/// let archive = archive.into_inner()?;
///
/// let options = ApplyOptions::unprivileged();
/// let applied =
///     apply_layer(&archive[..], root.path(), LayerTarget::Tree, &options, &mut ignore_progress)?;
/// assert_eq!(applied.entries, 1);
/// assert_eq!(std::fs::read(root.path().join("etc/motd"))?, b"hello");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ErrorKind::InvalidArchive`] for an archive that is damaged, ambiguous or hostile, with the
/// entry's path; [`ErrorKind::LimitExceeded`]; [`ErrorKind::Cancelled`]; and whatever the file system
/// answers, [`ErrorKind::PermissionDenied`] for owners and devices among it.
pub fn apply_layer(
    mut input: impl Read,
    root: impl AsRef<Path>,
    target: LayerTarget,
    options: &ApplyOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<Applied> {
    let root = root.as_ref();
    let owners = options.ownership.owners();
    let root = Dir::open_with(root, owners).at("open directory to unpack into", root)?;
    apply(&mut input, &root, target, options, None, progress)
}

/// As [`apply_layer`], into an open directory, which is to be empty if a record is captured.
pub(crate) fn apply(
    input: &mut dyn Read,
    root: &Dir,
    target: LayerTarget,
    options: &ApplyOptions,
    capture: Option<&Mutex<Capture>>,
    progress: &mut ProgressFn<'_>,
) -> Result<Applied> {
    let Outcome { unpacked, archive, blob } =
        Job::new(root, target, options, capture).run(input, progress)?;
    let (diff_id, unpacked_bytes) = archive;
    let (blob, blob_bytes) = blob;
    let mut usage = match unpacked.usage {
        Some(usage) => usage,
        None => {
            let walking = Progress::new(Phase::Walk);
            usage::count(root, &mut || progress::report(progress, walking))?
        }
    };
    // Last of all, as it may wait for the layers below.
    let settled = parents::settle(root, &unpacked.made_up, options)?;
    usage.bytes = usage.bytes.saturating_add(settled.bytes);
    Ok(Applied {
        diff_id: DiffId::from(diff_id),
        blob,
        blob_bytes,
        unpacked_bytes,
        entries: unpacked.counts.entries,
        usage,
        has_marks: unpacked.has_marks,
        describes_root: unpacked.describes_root,
        stripped_xattrs: unpacked.counts.stripped_xattrs,
        skipped_xattrs: unpacked.counts.skipped_xattrs + settled.skipped_xattrs,
        skipped_devices: unpacked.counts.skipped_devices,
    })
}

/// What is known when all entries have been made.
#[derive(Debug)]
struct Unpacked {
    counts: Counts,
    has_marks: bool,
    /// What it takes on disk, unless a walk must tell.
    usage: Option<Usage>,
    /// The directories that are still to have attributes from below.
    made_up: MadeUp,
    describes_root: bool,
}

/// One archive being unpacked.
struct Unpack<'a> {
    options: &'a ApplyOptions,
    /// The format of marks; none for a plain tree.
    format: Option<LayerFormat>,
    target: Target,
    /// Where AUFS's hidden link targets are kept, once there was one.
    stash: Option<Name>,
    /// What this archive made; of a plain tree only.
    placed: Placed,
    /// The directories that the archive has no entry for, or not yet.
    made_up: MadeUp,
    /// Whether it has an entry for the root.
    describes_root: bool,
    /// The directories of this layer that are opaque.
    opaque: HashSet<Inode>,
    /// The directories of this layer that nothing but marks was put into.
    only_for_marks: HashSet<Inode>,
    /// Whether there may be marks in the directory.
    has_marks: bool,
    /// Whether new files may inherit access control lists, which must be removed from them.
    inherits_acls: bool,
    /// Who owned the last file that was made before it was given to anybody: so will the next one be,
    /// as a rule.
    newcomer: Option<(u32, u32)>,
    counts: Counts,
    /// Where it is written down what it takes to give the archive back.
    capture: Option<&'a Mutex<Capture>>,
    watch: &'a mut dyn Watch,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    entries: u64,
    parents: u64,
    stripped_xattrs: u64,
    skipped_xattrs: u64,
    skipped_devices: u64,
}

/// What an entry's name says about it.
enum Meaning {
    Plain,
    Mark(DotWh),
    /// A file in `.wh..wh.plnk`, by its name there.
    LinkTarget(Name),
    /// Anything else of AUFS's own.
    Internal,
}

impl<'a> Unpack<'a> {
    /// Unpacks everything from an uncompressed archive, and reads it to its end.
    fn all(job: Job<'a>, archive: &mut impl BufRead, watch: &'a mut dyn Watch) -> Result<Unpacked> {
        let mut unpack = Unpack::new(job.root, job.target, job.options, job.capture, watch)?;
        unpack.run(archive)?;
        let has_marks = unpack.has_marks && unpack.format.is_some();
        Ok(Unpacked {
            counts: unpack.counts,
            has_marks,
            usage: unpack.target.tally.usage(),
            made_up: unpack.made_up,
            describes_root: unpack.describes_root,
        })
    }

    fn new(
        root: &Dir,
        target: LayerTarget,
        options: &'a ApplyOptions,
        capture: Option<&'a Mutex<Capture>>,
        watch: &'a mut dyn Watch,
    ) -> Result<Self> {
        let clone = root.try_clone().at("open directory to unpack into", "")?;
        // To fail early. There may be hundreds: they are not kept open.
        for parent in &options.parents {
            parents::open_parent(parent, root.owners())?;
        }
        let format = match target {
            LayerTarget::Layer(format) => Some(format),
            LayerTarget::Tree => None,
        };
        let empty = root.is_empty().at("list directory to unpack into", "")?;
        let mut unpack = Unpack {
            options,
            format,
            target: Target::new(clone, empty).at("open directory to unpack into", "")?,
            stash: None,
            placed: Placed::default(),
            made_up: MadeUp::new(format),
            describes_root: false,
            opaque: HashSet::new(),
            only_for_marks: HashSet::new(),
            has_marks: !empty,
            inherits_acls: false,
            newcomer: None,
            counts: Counts::default(),
            capture,
            watch,
        };
        unpack.find_inherited_acls()?;
        if empty {
            unpack.placed.made(unpack.target.inode());
        }
        Ok(unpack)
    }

    fn run(&mut self, archive: &mut impl BufRead) -> Result<()> {
        let limits = &self.options.limits;
        let entry_limits = EntryLimits {
            max_path: limits.max_path_bytes,
            max_pax_bytes: limits.max_pax_bytes,
            max_entries: limits.max_entries,
        };
        let mut entries = EntryReader::new(Tapped::new(archive, self.capture), entry_limits);
        let unpacked = self.entries(&mut entries);
        let cleaned = self.remove_stash();
        unpacked.and(cleaned)?;
        self.target.finish()?;
        self.tell_capture(Capture::entries_ended);
        let mut archive = entries.into_inner();
        loop {
            let rest = archive.fill_buf().at("read the archive", "behind its end")?.len();
            if rest == 0 {
                return Ok(());
            }
            archive.consume(rest);
            self.watch.moved()?;
        }
    }

    fn entries(&mut self, entries: &mut EntryReader<impl BufRead>) -> Result<()> {
        while let Some(entry) = entries.next()? {
            self.counts.entries += 1;
            self.watch.entries(self.counts.entries)?;
            let mut content = entries.content();
            match meaning(&entry.path)? {
                Meaning::Plain => self.place(&entry, &mut content)?,
                Meaning::Mark(mark) => self.mark(&entry, &mark)?,
                Meaning::LinkTarget(name) => self.stash(&name, &entry, &mut content)?,
                Meaning::Internal => {
                    self.tell_capture(|capture| capture.inline(entry.stored_size()));
                }
            }
        }
        Ok(())
    }

    /// Counts a directory that no entry asked for.
    fn count_parent(&mut self) -> Result<()> {
        self.counts.parents += 1;
        let max = self.options.limits.max_entries;
        if self.counts.parents > max {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("missing parent directories are over the limit max_entries of {max}"),
            ));
        }
        Ok(())
    }
}

/// What the name of an entry says about it.
fn meaning(path: &RelPath) -> Result<Meaning> {
    let has_mark =
        path.as_bytes().split(|b| *b == b'/').any(|name| name.starts_with(marks::WHITEOUT_PREFIX));
    if !has_mark {
        return Ok(Meaning::Plain);
    }
    let mut names = path.components().enumerate().peekable();
    while let Some((depth, name)) = names.next() {
        let last = names.peek().is_none();
        match marks::decode_name(&name) {
            DotWh::Plain => {}
            DotWh::Internal if depth == 0 && name.as_bytes() == plnk::DIRECTORY => {
                return Ok(match (names.next(), names.next()) {
                    (Some((_, target)), None) => Meaning::LinkTarget(target),
                    _ => Meaning::Internal,
                });
            }
            DotWh::Internal => return Ok(Meaning::Internal),
            DotWh::Malformed => {
                return Err(refuse(path, "its name is that of a whiteout of no file"));
            }
            mark if last => return Ok(Meaning::Mark(mark)),
            _ => {
                return Err(refuse(
                    path,
                    format!("it is inside of {name:?}, a whiteout, which is not a directory"),
                ));
            }
        }
    }
    Ok(Meaning::Plain)
}

/// The error for an entry that is refused.
fn refuse(path: &RelPath, reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArchive, "refused the archive entry")
        .with_path(path)
        .with_source(reason.into())
}

fn time(t: Timestamp) -> Time {
    Time { secs: t.secs, nanos: t.nanos }
}

/// The access and modification time of an entry: most have only the latter.
fn times(entry: &Entry) -> (Time, Time) {
    let mtime = time(entry.mtime);
    (entry.atime.map_or(mtime, time), mtime)
}
