//! The progress bar: on a terminal's stderr, and nowhere else.

use std::io::{self, IsTerminal as _};
use std::ops::ControlFlow;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use stratafs::{Phase, Progress};

use crate::interrupt::Interrupt;

/// Shows how a long call fares, and stops it when a signal has come. The bar goes when it is dropped.
#[derive(Debug)]
pub(crate) struct Reporter {
    interrupt: Interrupt,
    bar: Option<ProgressBar>,
    shown: Option<(Phase, Option<u64>)>,
}

impl Reporter {
    pub(crate) fn new(interrupt: Interrupt) -> Reporter {
        let bar = io::stderr().is_terminal().then(|| {
            // Redrawn ten times a second at most, however often it is told; first by `step`.
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10))
                .with_style(style(None))
        });
        Reporter { interrupt, bar, shown: None }
    }

    /// The library's callback.
    pub(crate) fn step(&mut self, progress: Progress) -> ControlFlow<()> {
        if self.interrupt.is_raised() {
            return ControlFlow::Break(());
        }
        if let Some(bar) = &self.bar {
            bar.set_message(message(progress));
            let shape = (progress.phase, progress.total_bytes);
            if self.shown != Some(shape) {
                self.shown = Some(shape);
                bar.set_style(style(progress.total_bytes));
                bar.reset();
                match progress.total_bytes {
                    Some(total) => bar.set_length(total),
                    None => bar.unset_length(),
                }
            }
            bar.set_position(progress.bytes);
        }
        ControlFlow::Continue(())
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(total_bytes: Option<u64>) -> ProgressStyle {
    let template = match total_bytes {
        Some(_) => "{msg}  [{bar:30}]  {bytes}/{total_bytes}  {bytes_per_sec}",
        None => "{msg}  {spinner}  {bytes}  {bytes_per_sec}",
    };
    // A template that does not parse would be a mistake above; the default one is no harm.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn message(progress: Progress) -> String {
    let doing = match progress.phase {
        Phase::Verify => "verifying",
        Phase::Apply => "unpacking",
        Phase::Export => "packing",
        Phase::Walk => "walking",
        Phase::Copy => "copying",
        Phase::Remove => "removing",
        _ => "working",
    };
    match progress.entries {
        0 => doing.to_owned(),
        entries => format!("{doing} {entries} entries"),
    }
}
