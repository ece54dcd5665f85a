//! Suites of others: pjdfstest on a plain file system, on the kernel's overlayfs and on ours; fsx on a
//! file that begins in a lower.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod calls;
    pub mod fuse_union;
    pub mod pjdfstest;
    pub mod suite;
    pub mod whole_tree;
}

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use support::fuse_union::{self, Engine, Stage};
use support::pjdfstest::{Outcomes, find, hindrance as needs, those};
use support::{pjdfstest, suite};

fn main() {
    fuse_union::enter_own_mount_namespace();
    let engine = Engine::under_test().hindrance();
    let own = fuse_union::needs_own();
    let mut trials = vec![
        suite::trial("pjdfstest", needs("pjdfstest", &engine), || {
            // A lower with the root of the tests, and an upper.
            let stage = Stage::new(1);
            fails_no_more_than_the_kernel(&stage, &[]);
        }),
        suite::trial("pjdfstest_without_writeback_and_acls", needs("pjdfstest", &own), || {
            let stage = Stage::with_options(1, ",writeback=0,noacl");
            fails_no_more_than_the_kernel(&stage, &[]);
        }),
        suite::trial("pjdfstest_with_owners_in_xattrs", needs("pjdfstest", &own), || {
            let stage = Stage::with_options(1, ",xattr_permissions=2");
            fails_no_more_than_the_kernel(&stage, &[]);
        }),
        suite::trial("pjdfstest_with_owners_in_security_xattrs", needs("pjdfstest", &own), || {
            let stage = Stage::with_options(1, ",xattr_permissions=1");
            fails_no_more_than_the_kernel(&stage, &[]);
        }),
        suite::trial("pjdfstest_on_an_aufs_upper", needs("pjdfstest", &own), || {
            fails_no_more_than_the_kernel(&Stage::aufs(1), AUFS);
        }),
    ];
    for (name, mapped) in [("fsx", true), ("fsx_without_mmap", false)] {
        trials.push(suite::trial(name, needs("fsx", &engine), move || {
            exercise(Stage::new(1), Run { mapped, ..Run::LONG });
        }));
    }
    trials.push(suite::trial("fsx_of_a_fixed_size", needs("fsx", &engine), || {
        exercise(Stage::new(1), Run { fixed: true, ..Run::SHORT });
    }));
    trials.push(suite::trial("fsx_without_writeback", needs("fsx", &own), || {
        let stage = Stage::with_options(1, ",writeback=0");
        exercise(stage, Run::SHORT);
    }));
    trials.push(suite::trial("fsx_with_owners_in_xattrs", needs("fsx", &own), || {
        let stage = Stage::with_options(1, ",xattr_permissions=2");
        exercise(stage, Run::SHORT);
    }));
    trials.push(suite::trial("fsx_on_an_aufs_upper", needs("fsx", &own), || {
        exercise(Stage::aufs(1), Run::SHORT);
    }));
    suite::run_one_by_one(trials);
}

// --- pjdfstest -----------------------------------------------------------------------------------

/// What an AUFS upper cannot do, since a whiteout's name is the name with `.wh.` before it.
const AUFS: &[&str] = &[];

/// Skipped on FUSE: it has no pathconf that would tell how many links a file may have.
const SKIPPED: &[&str] = &["link::link_count_max"];

fn outcomes(at: &Path, stage: &Stage) -> Outcomes {
    pjdfstest::outcomes(at, &stage.beside("tools"), None)
}

/// Of the plain file system and of the kernel's overlayfs, once.
fn references() -> &'static [Outcomes; 2] {
    static REFERENCES: OnceLock<[Outcomes; 2]> = OnceLock::new();
    REFERENCES.get_or_init(|| {
        let stage = Stage::new(1);
        fs::create_dir(stage.lower("tests")).unwrap();
        let plain = outcomes(&stage.beside("plain"), &stage);
        let kernel = stage.mount_by_the_kernel();
        let kernel = outcomes(&kernel.join("tests"), &stage);
        [plain, kernel]
    })
}

fn fails_no_more_than_the_kernel(stage: &Stage, tolerated: &[&str]) {
    let [plain, kernel] = references();
    fs::create_dir(stage.lower("tests")).unwrap();
    let union = stage.mount();
    let shown = outcomes(&union.join("tests"), stage);
    let unexpected = |what: &str, tolerated: &[&str]| {
        let mut names = those(&shown, what);
        for reference in [plain, kernel] {
            names = names.difference(&those(reference, what)).cloned().collect();
        }
        names.retain(|name| !tolerated.contains(&name.as_str()));
        names.into_iter().map(|name| format!("{name}: {}", shown[&name])).collect::<Vec<_>>()
    };
    let failed = unexpected("FAILED", tolerated);
    assert!(failed.is_empty(), "beyond plain and kernel's overlayfs: {failed:#?}");
    let skipped = unexpected("skipped", SKIPPED);
    assert!(skipped.is_empty(), "beyond plain and kernel's overlayfs: {skipped:#?}");
    // What is tolerated for no reason is to be struck off.
    let failing = those(&shown, "FAILED");
    let needless: Vec<_> = tolerated.iter().filter(|name| !failing.contains(**name)).collect();
    assert!(needless.is_empty(), "these pass: {needless:#?}");
    stage.survives(union);
}

// --- fsx -----------------------------------------------------------------------------------------

const LENGTH: usize = 262_144;

/// As many operations at most as one process of fsx is asked for: it never unmaps what it mapped to read,
/// and a process may have 65,530 mappings.
const AT_A_TIME: u32 = 250_000;

/// What fsx does.
struct Run {
    /// Whether it maps the file.
    mapped: bool,
    /// Whether the file keeps its size, and so begins with what the lower has.
    fixed: bool,
    /// The number of operations of a full run.
    full: u32,
}

impl Run {
    const LONG: Run = Run { mapped: true, fixed: false, full: 1_000_000 };
    const SHORT: Run = Run { full: 100_000, ..Run::LONG };
}

/// Random operations on a file that the lower has; fsx compares each read with what it wrote.
fn exercise(mut stage: Stage, run: Run) {
    stage.patience = None;
    let Run { mapped, fixed, full } = run;
    let operations = if std::env::var_os("STRATAFS_FULL").is_some() { full } else { 20_000 };
    let weight = |used: bool| if used { 10 } else { 0 };
    let (map, resize) = (weight(mapped), weight(!fixed));
    // Of no bytes, posix_fallocate is refused everywhere, which fsx takes for a lack of it.
    let configuration = format!(
        "flen = {LENGTH}\nblockmode = {fixed}\n[opsize]\nmin = 1\nmax = 65536\n[weights]\n\
         close_open = {resize}\nread = 10\nwrite = 10\nmapread = {map}\nmapwrite = {map}\n\
         invalidate = {map}\ntruncate = {resize}\nfsync = 1\nfdatasync = 1\n\
         posix_fallocate = {resize}\npunch_hole = 5\nsendfile = 5\nposix_fadvise = 5\n\
         copy_file_range = 5\n"
    );
    let tools = stage.beside("tools");
    let settings = tools.join("fsx.toml");
    fs::write(&settings, configuration).unwrap();
    // Of a fixed size, it begins as zeros; else it is cut short at first.
    let content = if fixed { vec![0; LENGTH] } else { vec![b'l'; LENGTH] };
    let seed = std::env::var("STRATAFS_SEED").map_or(20_231_117, |seed| seed.parse().unwrap());
    let parts: Vec<_> = (0..operations.div_ceil(AT_A_TIME))
        .map(|n| {
            (format!("file{n}"), seed + u64::from(n), AT_A_TIME.min(operations - n * AT_A_TIME))
        })
        .collect();
    for (name, ..) in &parts {
        fs::write(stage.lower(name), &content).unwrap();
    }
    let union = stage.mount();
    for (name, seed, operations) in &parts {
        let output = Command::new(find("fsx").unwrap())
            .args(["-S", &seed.to_string(), "-N", &operations.to_string(), "-f"])
            .arg(&settings)
            .arg("-P")
            .arg(&tools)
            .arg(union.join(name))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let tail: Vec<_> = text.lines().rev().take(40).collect();
        assert!(
            output.status.success(),
            "STRATAFS_SEED={seed}: {}: {:#?} {}",
            output.status,
            tail.into_iter().rev().collect::<Vec<_>>(),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(fs::read(stage.lower(name)).unwrap() == content, "the lower was written");
    }
    stage.survives(union);
}
