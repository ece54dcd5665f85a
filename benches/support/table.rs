//! Measures with criterion, and keeps the samples for one table of ratios at the end.

use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode};

/// Rows of what was done, by whom, and how long each run of it took.
pub struct Table {
    criterion: Criterion,
    rows: Vec<Row>,
}

struct Row {
    what: String,
    who: String,
    samples: Vec<Duration>,
}

/// Whose rows the others are compared with.
pub const OURS: &str = "stratafs";

impl Table {
    pub fn new() -> Table {
        Table { criterion: Criterion::default().configure_from_args(), rows: Vec::new() }
    }

    /// Times `run` alone; `before` is not counted. Ours comes first of each `what`.
    pub fn measure(
        &mut self,
        what: &str,
        who: &str,
        mut before: impl FnMut(),
        mut run: impl FnMut(),
    ) {
        let mut samples = Vec::new();
        let mut group = self.criterion.benchmark_group(what);
        group
            .sample_size(10)
            .sampling_mode(SamplingMode::Flat)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_secs(2));
        group.bench_function(who, |bencher| {
            bencher.iter_custom(|rounds| {
                let mut total = Duration::ZERO;
                for _ in 0..rounds {
                    before();
                    let start = Instant::now();
                    run();
                    let took = start.elapsed();
                    samples.push(took);
                    total += took;
                }
                total
            });
        });
        group.finish();
        // None, if the command line filters it out.
        if !samples.is_empty() {
            self.rows.push(Row { what: what.to_owned(), who: who.to_owned(), samples });
        }
    }

    /// As [`Table::measure`], of what takes too long for more than a few runs, each of so many operations:
    /// the samples are of one.
    pub fn measure_few(
        &mut self,
        what: &str,
        who: &str,
        (runs, operations): (u32, u32),
        mut before: impl FnMut() -> Result<(), String>,
        mut run: impl FnMut() -> Result<(), String>,
    ) {
        let mut samples = Vec::new();
        for _ in 0..runs {
            let done = before().and_then(|()| {
                let start = Instant::now();
                run()?;
                Ok(start.elapsed() / operations)
            });
            match done {
                Ok(took) => samples.push(took),
                Err(why) => return println!("skipped: {what} by {who}: {why}"),
            }
        }
        self.rows.push(Row { what: what.to_owned(), who: who.to_owned(), samples });
    }

    /// One run of each after the other, so many times, for what the machine's moods would decide. Each is tried
    /// once before; who cannot do it is skipped, with the reason.
    pub fn in_turn<R: FnMut() -> Result<(), String>>(
        &mut self,
        what: &str,
        rounds: u32,
        contenders: &mut [(&str, R)],
    ) {
        let mut rows: Vec<_> = contenders
            .iter_mut()
            .filter_map(|(who, run)| match run() {
                Ok(()) => {
                    let row =
                        Row { what: what.to_owned(), who: (*who).to_owned(), samples: Vec::new() };
                    Some((row, run))
                }
                Err(why) => {
                    println!("skipped: {what} by {who}: {why}");
                    None
                }
            })
            .collect();
        for _ in 0..rounds {
            for (row, run) in &mut rows {
                let start = Instant::now();
                run().expect("as the first time");
                row.samples.push(start.elapsed());
            }
        }
        self.rows.extend(rows.into_iter().map(|(row, _)| row));
    }

    /// As [`Table::measure`], of a peer: tried once, and skipped, with the reason, if it cannot do it.
    pub fn compare(
        &mut self,
        what: &str,
        who: &str,
        mut before: impl FnMut(),
        mut run: impl FnMut() -> Result<(), String>,
    ) {
        before();
        match run() {
            Err(why) => println!("skipped: {what} by {who}: {why}"),
            Ok(()) => self.measure(what, who, before, || run().expect("as the first time")),
        }
    }

    /// Prints all of it. Below 1, we are faster.
    pub fn finish(self) {
        self.criterion.final_summary();
        println!("\n{:<40} {:<18} {:>13}  stratafs/who", "what", "who", "median");
        for i in 0..self.rows.len() {
            let (median, row) = (median(&self.rows[i].samples), &self.rows[i]);
            let ours = self.rows.iter().find(|other| other.what == row.what && other.who == OURS);
            let ratio = match ours {
                Some(ours) if row.who != OURS => {
                    let ratio = self::median(&ours.samples).as_secs_f64() / median.as_secs_f64();
                    format!("{ratio:.2}")
                }
                _ => String::new(),
            };
            let ms = median.as_secs_f64() * 1e3;
            println!("{:<40} {:<18} {ms:>10.3} ms  {ratio}", row.what, row.who);
        }
    }
}

fn median(samples: &[Duration]) -> Duration {
    let mut sorted = samples.to_vec();
    sorted.sort();
    sorted[sorted.len() / 2]
}
