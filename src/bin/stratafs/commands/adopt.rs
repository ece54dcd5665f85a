//! Foreign layer directories: `adopt`.

use std::io::{self, Write};

use serde::Serialize;
use stratafs::{
    AdoptOptions, AdoptReport, Adopted, ForeignFormat, OtherMarks, OverrideStats, Owners,
};

use super::{Context, Missing, Result, snapshot_or_top};
use crate::args::{self, ForeignName, OtherMarksName, OverrideStatName};
use crate::output::{Report, size};

pub(super) fn adopt(context: &Context, args: args::Adopt) -> Result {
    let store = context.open(Missing::Create)?;
    let parent = match &args.parent {
        Some(name) => snapshot_or_top(&store, name)?,
        None => None,
    };
    let format = match args.format {
        ForeignName::Overlay => ForeignFormat::Overlay,
        ForeignName::OverlayUser => ForeignFormat::OverlayUser,
        ForeignName::FuseOverlayfs => ForeignFormat::FuseOverlayfs,
        ForeignName::Aufs => ForeignFormat::Aufs,
    };
    let mut options = if context.privileged || store.owners() == Owners::InXattrs {
        AdoptOptions::new(format)
    } else {
        AdoptOptions::unprivileged(format)
    };
    options.lowers = args.lowers;
    options.override_stats = match args.override_stat {
        OverrideStatName::Refuse => OverrideStats::Refuse,
        OverrideStatName::Ignore => OverrideStats::Ignore,
        OverrideStatName::Honour => OverrideStats::Honour,
    };
    options.other_marks = match args.other_marks {
        OtherMarksName::Refuse => OtherMarks::Refuse,
        OtherMarksName::Plain => OtherMarks::Plain,
    };
    let mut reporter = context.reporter();
    let adopted = store.adopt(
        &args.name,
        parent.as_deref(),
        &args.dir,
        &options,
        args.labels.into_map(),
        &mut |progress| reporter.step(progress),
    )?;
    drop(reporter);
    context.print(&Copied::from(adopted))
}

/// What came of adopting.
#[derive(Debug, Serialize)]
struct Copied {
    entries: u64,
    usage: stratafs::Usage,
    has_marks: bool,
    report: AdoptReport,
}

impl From<Adopted> for Copied {
    fn from(adopted: Adopted) -> Copied {
        Copied {
            entries: adopted.entries,
            usage: adopted.usage,
            has_marks: adopted.has_marks,
            report: adopted.report,
        }
    }
}

impl Report for Copied {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} entries, {} on disk", self.entries, size(self.usage.bytes))?;
        write!(out, "{}", self.report)
    }
}
