//! Unions on unions: ours on ours, ours on the kernel's overlayfs, the kernel's overlayfs on ours, and in a
//! container that has /dev/fuse and little else.
//!
//! What a nest shows is compared with a plain directory after the same changes, and what its outermost union
//! wrote with what it writes where it is on no other. Root does it in the initial user namespace and in
//! others, anybody else in others, and by fusermount3. A full run (`STRATAFS_FULL`) puts each of the layers
//! on a union by itself, too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod calls;
    pub mod suite;
    pub mod union_mount;
    pub mod whole_tree;
}

mod nests {
    pub mod container;
    pub mod nest;
    pub mod zoo;
}

use std::path::Path;

use libtest_mimic::Trial;
use nests::container;
use nests::nest::{self, Part};
use nests::zoo::Rights;
use stratafs::LayerFormat;
use support::suite;
use support::union_mount::{self, Engine};

type Unions = Vec<(Engine, LayerFormat)>;

const OWN: Engine = Engine::Own;
const KERNEL: Engine = Engine::Kernel;
const TRUSTED: LayerFormat = LayerFormat::OverlayTrusted;
const USER: LayerFormat = LayerFormat::OverlayUser;
const AUFS: LayerFormat = LayerFormat::Aufs;

/// The innermost first.
fn all_nests() -> Vec<(&'static str, Unions, &'static [Part])> {
    let all = &Part::ALL;
    let lower = &Part::ALL[..1];
    vec![
        ("ours_on_ours", vec![(OWN, TRUSTED), (OWN, TRUSTED)], all),
        ("ours_on_ours", vec![(OWN, USER), (OWN, USER)], all),
        ("ours_on_ours", vec![(OWN, TRUSTED), (OWN, USER)], all),
        ("ours_on_ours", vec![(OWN, USER), (OWN, TRUSTED)], all),
        ("ours_on_ours", vec![(OWN, AUFS), (OWN, USER)], all),
        ("ours_on_ours", vec![(OWN, USER), (OWN, AUFS)], all),
        ("ours_on_ours", vec![(OWN, AUFS), (OWN, AUFS)], lower),
        ("ours_on_ours_on_ours", vec![(OWN, TRUSTED), (OWN, TRUSTED), (OWN, TRUSTED)], all),
        ("ours_on_ours_on_ours", vec![(OWN, USER), (OWN, USER), (OWN, USER)], all),
        ("ours_on_the_kernels", vec![(KERNEL, TRUSTED), (OWN, TRUSTED)], lower),
        ("ours_on_the_kernels", vec![(KERNEL, USER), (OWN, USER)], lower),
        ("ours_on_the_kernels", vec![(KERNEL, TRUSTED), (OWN, AUFS)], all),
        ("ours_on_the_kernels", vec![(KERNEL, USER), (OWN, AUFS)], all),
        ("the_kernels_on_ours", vec![(OWN, TRUSTED), (KERNEL, TRUSTED)], all),
        ("the_kernels_on_ours", vec![(OWN, USER), (KERNEL, USER)], all),
        ("the_kernels_on_ours", vec![(OWN, USER), (KERNEL, TRUSTED)], all),
        ("the_kernels_on_ours", vec![(OWN, AUFS), (KERNEL, USER)], all),
        (
            "the_kernels_on_ours_on_the_kernels",
            vec![(KERNEL, USER), (OWN, USER), (KERNEL, USER)],
            lower,
        ),
        ("ours_on_the_kernels_on_ours", vec![(OWN, USER), (KERNEL, USER), (OWN, USER)], lower),
    ]
}

/// What is refused, and what is said then.
fn refusals() -> Vec<(&'static str, Unions, Part, &'static str)> {
    vec![
        ("upper_on_the_kernels", vec![(KERNEL, USER), (OWN, USER)], Part::Upper, "whiteouts"),
        ("upper_on_the_kernels", vec![(KERNEL, TRUSTED), (OWN, TRUSTED)], Part::Both, "whiteouts"),
        ("aufs_on_aufs", vec![(OWN, AUFS), (OWN, AUFS)], Part::Upper, "whiteouts"),
    ]
}

type Case = fn(&Path, &[(Engine, LayerFormat)]);

/// What is otherwise than in a plain directory. Of setuid and capabilities, see `zoo::lose_privileges`.
fn known_differences() -> Vec<(&'static str, Case, Unions)> {
    vec![
        (
            "directories_that_stay::ours_on_aufs",
            nest::directories_that_stay,
            vec![(OWN, AUFS), (OWN, USER)],
        ),
        (
            "directories_that_stay::the_kernels_on_aufs",
            nest::directories_that_stay,
            vec![(OWN, AUFS), (KERNEL, USER)],
        ),
        (
            "no_files_without_names::ours_on_ours",
            nest::files_without_names,
            vec![(OWN, USER), (OWN, USER)],
        ),
        (
            "no_files_without_names::the_kernels_on_ours",
            nest::files_without_names,
            vec![(OWN, USER), (KERNEL, USER)],
        ),
    ]
}

fn main() {
    if let Some(arguments) = suite::child_arguments() {
        duty(&arguments);
    }
    union_mount::enter_own_mount_namespace();
    let mut trials = Vec::new();
    for (rights, place) in
        [(Rights::Initial, "initial"), (Rights::ManyIds, "many_ids"), (Rights::OneId, "one_id")]
    {
        trials.extend(trials_with(rights, place));
    }
    for part in Part::ALL {
        let name = format!("by_fusermount::ours_on_ours::{}", part.name());
        trials.push(suite::trial(name, fusermount_hindrance(), move || {
            let unions = [(OWN, USER), (OWN, USER)];
            nest::same_as_plain(suite::temp().path(), Rights::OneId, &unions, part);
        }));
    }
    suite::run_one_by_one(trials);
}

/// Why nothing can be mounted without a namespace by who is not root, if so.
fn fusermount_hindrance() -> Option<String> {
    if rustix::process::geteuid().is_root() {
        return Some("needs an ordinary user".to_owned());
    }
    suite::needs_program("fusermount3").or_else(container::needs_device)
}

fn trials_with(rights: Rights, place: &'static str) -> Vec<Trial> {
    let hindrance = match rights {
        Rights::Initial => Engine::Own.hindrance(),
        _ => container::hindrance(rights),
    };
    let mut trials = Vec::new();
    let needs_trusted = |unions: &Unions| {
        unions.iter().any(|(_, format)| *format == TRUSTED) && rights != Rights::Initial
    };
    for (n, (name, unions, parts)) in all_nests().into_iter().enumerate() {
        if needs_trusted(&unions) {
            continue;
        }
        // The last has what the others have.
        let skipped = if union_mount::full() { 0 } else { parts.len() - 1 };
        for part in &parts[skipped..] {
            let (part, at) = (*part, n.to_string());
            let formats: Vec<_> = unions.iter().map(|(_, format)| format.as_str()).collect();
            let name = format!("{place}::{name}::{}::{}", formats.join("_"), part.name());
            let unions = unions.clone();
            trials.push(suite::trial(name, hindrance.clone(), move || match rights {
                Rights::Initial => nest::same_as_plain(suite::temp().path(), rights, &unions, part),
                _ => container::run("nest", rights, &[&at, part.name()]),
            }));
        }
    }
    for (n, (name, case, unions)) in known_differences().into_iter().enumerate() {
        let name = format!("{place}::known::{name}");
        let at = n.to_string();
        trials.push(suite::trial(name, hindrance.clone(), move || match rights {
            Rights::Initial => case(suite::temp().path(), &unions),
            _ => container::run("known", rights, &[&at]),
        }));
    }
    for (n, (name, unions, part, says)) in refusals().into_iter().enumerate() {
        if needs_trusted(&unions) {
            continue;
        }
        let name = format!("{place}::refused::{name}::{}", unions[0].1);
        let at = n.to_string();
        trials.push(suite::trial(name, hindrance.clone(), move || match rights {
            Rights::Initial => refused(&unions, part, says),
            _ => container::run("refusal", rights, &[&at]),
        }));
    }
    if rights != Rights::Initial {
        let name = format!("{place}::with_dev_fuse_alone");
        trials.push(suite::trial(name, hindrance, move || {
            let root = tempfile::tempdir_in("/var/tmp").unwrap();
            container::run("confined", rights, &[root.path().to_str().unwrap()]);
        }));
    }
    trials
}

fn refused(unions: &Unions, part: Part, says: &str) {
    let said = nest::refusal(suite::temp().path(), unions, part);
    assert!(said.contains(says), "{said}");
}

/// What is done in a namespace of its own.
fn duty(arguments: &[String]) -> ! {
    let rights = container::enter(arguments);
    match &arguments[0][..] {
        "nest" => {
            let (_, unions, parts) = all_nests().swap_remove(arguments[2].parse().unwrap());
            let part = *parts.iter().find(|part| part.name() == arguments[3]).unwrap();
            nest::same_as_plain(suite::temp().path(), rights, &unions, part);
        }
        "known" => {
            let (_, case, unions) = known_differences().swap_remove(arguments[2].parse().unwrap());
            case(suite::temp().path(), &unions);
        }
        "refusal" => {
            let (_, unions, part, says) = refusals().swap_remove(arguments[2].parse().unwrap());
            refused(&unions, part, says);
        }
        "confined" => {
            let programs = [env!("CARGO_BIN_EXE_stratafs-fuse"), env!("CARGO_BIN_EXE_stratafs")];
            container::confine(Path::new(&arguments[2]), &programs);
            let unions = [(OWN, USER), (OWN, USER)];
            nest::same_as_plain(suite::temp().path(), rights, &unions, Part::Both);
            container::not_in_the_background(programs[0]);
        }
        duty => panic!("no duty is called {duty}"),
    }
    std::process::exit(0)
}
