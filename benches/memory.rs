//! The most memory that moving a layer takes, and what each of its entries adds: by the peak of a
//! process of its own (`VmHWM`, proc_pid_status(5)) that does nothing else, for 10,000 and for 100,000
//! entries. Runs as anybody: `cargo bench --bench memory`. Nothing is asserted.

mod support;

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;

use stratafs::{ArchiveForm, ExportOptions, ignore_progress};

use support::scratch::scratch;
use support::tree::made_up_empty;
use support::{apply, for_figures, store};

/// Set for the process that is measured: what it does.
const DO: &str = "STRATAFS_BENCH_MEMORY_OF";
/// In which directory.
const IN: &str = "STRATAFS_BENCH_MEMORY_IN";

const OPERATIONS: [&str; 5] = ["nothing", "apply", "export", "export as imported", "changes"];

fn main() {
    if let (Ok(operation), Some(dir)) = (env::var(DO), env::var_os(IN)) {
        measured(&operation, Path::new(&dir));
        println!("{}", peak());
        return;
    }
    let sizes: [u64; 2] = if for_figures() { [10_000, 100_000] } else { [100, 1_000] };
    let scratch = scratch();
    let peaks = sizes.map(|entries| {
        let dir = scratch.path().join(entries.to_string());
        fs::create_dir(&dir).expect("a new directory");
        made_up_empty(&dir.join("layer.tar"), usize::try_from(entries).expect("a small number"));
        OPERATIONS.map(|operation| run(operation, &dir))
    });
    let [few, many] = peaks;
    println!("peak memory, KiB:   {:>14} {:>14}   bytes an entry", sizes[0], sizes[1]);
    for (i, operation) in OPERATIONS.iter().enumerate() {
        let more = (many[i] as f64 - few[i] as f64) * 1024.0 / (sizes[1] - sizes[0]) as f64;
        println!("{operation:<20} {:>14} {:>14}   {more:>14.1}", few[i], many[i]);
    }
}

fn run(operation: &str, dir: &Path) -> u64 {
    let program = env::current_exe().expect("this program");
    let output = Command::new(program).env(DO, operation).env(IN, dir).output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().unwrap_or_else(|e| panic!("{operation}: {e}: {output:?}"))
}

fn measured(operation: &str, dir: &Path) {
    let store = store(&dir.join("store"));
    match operation {
        "apply" => apply(&store, "layer", None, &dir.join("layer.tar")),
        "export" | "export as imported" => {
            let mut options = ExportOptions::default();
            options.form = if operation == "export" {
                ArchiveForm::Canonical
            } else {
                ArchiveForm::AsImported
            };
            store.export("layer", &mut io::sink(), &options, &mut ignore_progress).expect("packed");
        }
        "changes" => {
            store.changes("layer", &mut ignore_progress).expect("changes");
        }
        _ => drop(File::open(dir.join("layer.tar")).expect("the archive opens")),
    }
}

/// In KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("the kernel tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("of the peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
