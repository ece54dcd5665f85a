//! Layers as archives: `apply`, `export`, `diff`, `layer apply`, `layer diff`.

use std::fs;
use std::io::{self, IsTerminal as _, Write};
use std::path::Path;

use serde::Serialize;
use stratafs::{
    Applied, ApplyOptions, ArchiveForm, Change, ExportOptions, Exported, LayerFormat, LayerTarget,
    Owners, ProgressFn, apply_layer, diff_trees, export_diff,
};

use super::{Context, Missing, Result, snapshot, snapshot_or_top};
use crate::args;
use crate::failure::Failure;
use crate::output::{JsonPath, PendingFile, Report};

const STANDARD_STREAM: &str = "-";

pub(super) fn apply(context: &Context, args: args::Apply) -> Result {
    let mut input = context.archive(&args.file)?;
    let store = context.open(Missing::Create)?;
    let parent = match &args.parent {
        Some(name) => snapshot_or_top(&store, name)?,
        None => None,
    };
    let mut reporter = context.reporter();
    let applied = store
        .apply(
            &args.name,
            parent.as_deref(),
            &mut input,
            &context.apply_options(store.owners()),
            args.labels.into_map(),
            &mut |progress| reporter.step(progress),
        )
        .map_err(|e| Failure::of_archive(&args.file, e))?;
    drop(reporter);
    context.print(&Unpacked::from(&applied))
}

pub(super) fn apply_to_directory(context: &Context, args: args::LayerApply) -> Result {
    // Told at once, and not when the first of the archive has come.
    fs::metadata(&args.root).map_err(|e| Failure::io("open", &args.root, e))?;
    let name = Path::new(STANDARD_STREAM);
    let input = context.archive(name)?;
    let target = match (args.overlay, context.privileged) {
        (true, true) => LayerTarget::Layer(LayerFormat::OverlayTrusted),
        (true, false) => LayerTarget::Layer(LayerFormat::OverlayUser),
        (false, _) => LayerTarget::Tree,
    };
    let mut options = context.apply_options(Owners::OfFiles);
    options.parents = args.parents;
    options.threads = args.threads.unwrap_or(options.threads);
    let mut reporter = context.reporter();
    let applied =
        apply_layer(input, &args.root, target, &options, &mut |progress| reporter.step(progress))
            .map_err(|e| Failure::of_archive(name, e))?;
    drop(reporter);
    context.print(&Unpacked::from(&applied))
}

pub(super) fn export(context: &Context, args: &args::Export) -> Result {
    check_output(context, &args.output)?;
    let store = context.open(Missing::Refuse)?;
    let key = snapshot(&store, &args.name)?;
    let mut options = ExportOptions::new();
    if args.canonical {
        options.form = ArchiveForm::Canonical;
    }
    let Some(parent) = &args.parent else {
        return pack(context, &args.output, |out, progress| {
            store.export(&key, out, &options, progress)
        });
    };
    let parent = snapshot_or_top(&store, parent)?;
    pack(context, &args.output, |out, progress| {
        store.export_between(&key, parent.as_deref(), out, &options, progress)
    })
}

pub(super) fn diff_directories(context: &Context, args: &args::LayerDiff) -> Result {
    let (lower, upper) = (&args.lower, &args.upper);
    if args.list {
        let mut reporter = context.reporter();
        let changes = diff_trees(lower, upper, &mut |progress| reporter.step(progress))?;
        drop(reporter);
        return print_changes(context, &changes, args.null);
    }
    check_output(context, &args.output)?;
    pack(context, &args.output, |out, progress| {
        export_diff(lower, upper, out, &ExportOptions::new(), progress)
    })
}

/// Writes what `export` packs to a file, and tells of it, or to standard output.
fn pack(
    context: &Context,
    output: &Path,
    export: impl Fn(&mut dyn Write, &mut ProgressFn<'_>) -> stratafs::Result<Exported>,
) -> Result {
    let mut reporter = context.reporter();
    let mut export = |out: &mut dyn Write| export(out, &mut |progress| reporter.step(progress));
    if output == Path::new(STANDARD_STREAM) {
        let mut out = io::stdout().lock();
        export(&mut out)?;
        out.flush()?;
        return Ok(());
    }
    let mut file = PendingFile::create(output)?;
    let exported = export(&mut file)?;
    file.publish()?;
    drop(reporter);
    context.print(&Packed::from(&exported))
}

/// Refuses standard output where no archive may go.
fn check_output(context: &Context, output: &Path) -> Result {
    if output == Path::new(STANDARD_STREAM) { refuse_stdout(context) } else { Ok(()) }
}

/// An archive goes to standard output only if it is no terminal, and if nothing else goes there.
pub(super) fn refuse_stdout(context: &Context) -> Result {
    let why = if context.json {
        "with --json standard output is for JSON: name a file with -o"
    } else if io::stdout().is_terminal() {
        "standard output is a terminal: name a file with -o, or redirect it"
    } else {
        return Ok(());
    };
    Err(Failure::Usage(why.to_owned()))
}

pub(super) fn diff(context: &Context, args: &args::Diff) -> Result {
    let store = context.open(Missing::Refuse)?;
    let key = snapshot(&store, &args.key)?;
    let parent = args.parent.as_ref().map(|name| snapshot_or_top(&store, name)).transpose()?;
    let mut reporter = context.reporter();
    let progress: &mut ProgressFn<'_> = &mut |progress| reporter.step(progress);
    let changes = match parent {
        None => store.changes(&key, progress)?,
        Some(parent) => store.changes_between(&key, parent.as_deref(), progress)?,
    };
    drop(reporter);
    print_changes(context, &changes, args.null)
}

fn print_changes(context: &Context, changes: &[Change], null: bool) -> Result {
    let end = if null { b'\0' } else { b'\n' };
    context.print(&Changes(changes.iter().map(|change| Line::new(change, end)).collect()))
}

impl Context {
    /// What this user can unpack.
    pub(super) fn apply_options(&self, owners: Owners) -> ApplyOptions {
        match self.privileged || owners == Owners::InXattrs {
            true => ApplyOptions::default(),
            false => ApplyOptions::unprivileged(),
        }
    }
}

/// What came of unpacking.
#[derive(Debug, Serialize)]
struct Unpacked {
    diff_id: String,
    blob: String,
    blob_bytes: u64,
    unpacked_bytes: u64,
    entries: u64,
    usage: stratafs::Usage,
    stripped_xattrs: u64,
    skipped_xattrs: u64,
    skipped_devices: u64,
}

impl From<&Applied> for Unpacked {
    fn from(applied: &Applied) -> Unpacked {
        Unpacked {
            diff_id: applied.diff_id.to_string(),
            blob: applied.blob.to_string(),
            blob_bytes: applied.blob_bytes,
            unpacked_bytes: applied.unpacked_bytes,
            entries: applied.entries,
            usage: applied.usage,
            stripped_xattrs: applied.stripped_xattrs,
            skipped_xattrs: applied.skipped_xattrs,
            skipped_devices: applied.skipped_devices,
        }
    }
}

impl Report for Unpacked {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} with {} entries", self.diff_id, self.entries)?;
        for (count, what) in [
            (self.stripped_xattrs, "xattrs of union file systems"),
            (self.skipped_xattrs, "xattrs that cannot be set here"),
            (self.skipped_devices, "devices"),
        ] {
            if count > 0 {
                writeln!(out, "left out: {count} {what}")?;
            }
        }
        Ok(())
    }
}

/// What came of packing.
#[derive(Debug, Serialize)]
struct Packed {
    diff_id: String,
    bytes: u64,
    entries: u64,
    left_out_sockets: u64,
    /// Whether it is the archive that the layer was unpacked from.
    as_imported: bool,
}

impl From<&Exported> for Packed {
    fn from(exported: &Exported) -> Packed {
        Packed {
            diff_id: exported.diff_id.to_string(),
            bytes: exported.bytes,
            entries: exported.entries,
            left_out_sockets: exported.sockets,
            as_imported: exported.form == ArchiveForm::AsImported,
        }
    }
}

impl Report for Packed {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} with {} entries", self.diff_id, self.entries)?;
        match self.left_out_sockets {
            0 => Ok(()),
            count => writeln!(out, "left out: {count} sockets"),
        }
    }
}

/// A change as printed.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    kind: char,
    #[serde(flatten)]
    path: JsonPath,
    #[serde(skip)]
    line: Vec<u8>,
}

impl Line {
    pub(super) fn new(change: &Change, end: u8) -> Line {
        let kind = change.kind.letter();
        let path = [b"/", change.path.as_bytes()].concat();
        let mut line = format!("{kind} ").into_bytes();
        line.extend_from_slice(&path);
        line.push(end);
        Line { kind, path: JsonPath::new(&path), line }
    }

    /// As text.
    #[cfg(feature = "fuse")]
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.line
    }
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Changes(Vec<Line>);

impl Report for Changes {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        self.0.iter().try_for_each(|line| out.write_all(&line.line))
    }
}
