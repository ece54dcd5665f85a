//! Layers that are made to stand on their own: `settle`.

use super::snapshots::Used;
use super::{Context, Missing, Result};
use crate::args;
use crate::failure::Failure;

pub(super) fn settle(context: &Context, args: args::Settle) -> Result {
    match (&args.key, &args.upper, &args.work) {
        (Some(key), ..) => {
            let store = context.open(Missing::Refuse)?;
            let mut reporter = context.reporter();
            let usage = store.settle(key, &mut |progress| reporter.step(progress))?;
            drop(reporter);
            context.print(&Used(usage))
        }
        (None, Some(upper), Some(work)) => directories::settle(context, &args, upper, work),
        _ => Err(Failure::Usage("name a snapshot, or a layer by --upper and --work".to_owned())),
    }
}

#[cfg(feature = "fuse")]
mod directories {
    use std::io::{self, Write};
    use std::path::Path;

    use serde::Serialize;
    use stratafs::{FuseLayer, LayerFormat, Settled, UpperDir, fuse_privileges, settle_upper};

    use super::{Context, Result, args};
    use crate::output::{Report, size};

    pub(super) fn settle(
        context: &Context,
        args: &args::Settle,
        upper: &Path,
        work: &Path,
    ) -> Result {
        let format = match args.format {
            Some(format) => format,
            // As `stratafs-fuse` does.
            None if fuse_privileges()?.0 => LayerFormat::OverlayTrusted,
            None => LayerFormat::OverlayUser,
        };
        let lowers: Vec<_> =
            args.lowers.iter().map(|dir| FuseLayer { dir: dir.clone(), format }).collect();
        let upper = UpperDir { dir: upper.to_owned(), work: work.to_owned() };
        let mut reporter = context.reporter();
        let settled =
            settle_upper(&lowers, &upper, format, &mut |progress| reporter.step(progress))?;
        drop(reporter);
        context.print(&Completed(settled))
    }

    #[derive(Debug, Serialize)]
    #[serde(transparent)]
    struct Completed(Settled);

    impl Report for Completed {
        fn text(&self, out: &mut dyn Write) -> io::Result<()> {
            let Settled { directories, files, copied, bytes, .. } = self.0;
            let bytes = size(bytes);
            writeln!(
                out,
                "{directories} renamed directories, {files} files without data, {copied} entries \
                 copied, {bytes}"
            )
        }
    }
}

#[cfg(not(feature = "fuse"))]
mod directories {
    use std::path::Path;

    use super::{Context, Failure, Result, args};

    pub(super) fn settle(_: &Context, _: &args::Settle, _: &Path, _: &Path) -> Result {
        let text = "this build has no union of its own (the feature `fuse`), which --upper needs";
        Err(Failure::Usage(text.to_owned()))
    }
}
