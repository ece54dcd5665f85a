//! A process that dies in the middle of a call leaves the store as it was before or after that call,
//! and nothing that gc does not remove.
//!
//! A child makes one step of the script and kills itself, at each moment in turn: before and after
//! every wait for the disk, and at every report of progress. The parent looks at what is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod imported;
    pub mod model;
    pub mod script;
    pub mod suite;
}

use std::io::{BufRead as _, BufReader};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stratafs::{Durability, DurablePointHook, Labels, Store};
use support::model::{self, Model, Snapshot};
use support::script::{self, SCRIPT};
use support::{imported, suite};

fn main() {
    if let Some(arguments) = suite::child_arguments() {
        return child(&arguments);
    }
    let mut trials: Vec<_> = SCRIPT
        .iter()
        .enumerate()
        .map(|(i, step)| {
            let name = format!("killed_at_any_wait::{}", step.name.replace(' ', "_"));
            suite::trial(name, None, move || killed_at_any_wait(i))
        })
        .collect();
    trials.push(suite::trial("killed_at_any_report_of_apply", None, killed_at_any_report));
    trials.push(suite::trial("killed_at_any_report_of_import", None, killed_during_import));
    trials.push(suite::trial("killed_at_any_moment", None, killed_at_any_moment));
    suite::run(trials);
}

/// A store with the steps before `step` done, and what it holds.
fn lived_until(root: &Path, step: usize) -> Model {
    let store = Store::open(root, model::options(Durability::None)).unwrap();
    let mut model = Model::default();
    for step in &SCRIPT[..step] {
        (step.run)(&store);
        model = step.after(&model);
    }
    model
}

fn killed_at_any_wait(index: usize) {
    let step = &SCRIPT[index];
    for k in 0.. {
        let dir = suite::temp();
        let root = dir.path().join("store");
        let before = lived_until(&root, index);
        let arguments = [root.to_str().unwrap(), &index.to_string(), &k.to_string()];
        let mut child = suite::mortal_child(dir.path(), "step", &arguments);
        let killed = suite::was_killed(child.wait().unwrap());
        let allowed = if killed { step.during(&before) } else { vec![step.after(&before)] };
        model::assert_survived(&root, &allowed, &format!("{}, killed at {k}", step.name));
        if !killed {
            return;
        }
    }
}

/// An apply is killed at each of its reports, the first of which come before there is anything.
fn killed_at_any_report() {
    for k in 0.. {
        let dir = suite::temp();
        let root = dir.path().join("store");
        let before = Model::default();
        lived_until(&root, 0);
        let mut child =
            suite::mortal_child(dir.path(), "apply", &[root.to_str().unwrap(), &k.to_string()]);
        let killed = suite::was_killed(child.wait().unwrap());
        let mut after = before.clone();
        let applied = Snapshot {
            kind: stratafs::Kind::Committed,
            parent: None,
            labels: Labels::new(),
            tree: Some(script::applied_tree()),
        };
        after.snapshots.insert("applied".into(), applied);
        let allowed = if killed { [before] } else { [after] };
        model::assert_survived(&root, &allowed, &format!("apply, killed at report {k}"));
        if !killed {
            assert!(k > script::applied_tree().len(), "no report for each of the entries");
            return;
        }
    }
}

/// An import leaves none of its layers, or all, or those that were whole until gc comes; whether it
/// unpacks one after the other, which reports each entry, or two at once, which reports now and then.
fn killed_during_import() {
    let layout = suite::temp();
    imported::write_layout(layout.path());
    let states = imported::states(&Model::default());
    for threads in ["1", "2"] {
        for k in 0_usize.. {
            let dir = suite::temp();
            let root = dir.path().join("store");
            lived_until(&root, 0);
            let (root_text, report) = (root.to_str().unwrap(), k.to_string());
            let arguments = [root_text, &report, layout.path().to_str().unwrap(), threads];
            let mut child = suite::mortal_child(dir.path(), "import", &arguments);
            let killed = suite::was_killed(child.wait().unwrap());
            let mut allowed = states.clone();
            let whole = allowed.pop().unwrap();
            allowed.insert(0, Model::default());
            if !killed {
                allowed = vec![whole];
            }
            let what = format!("import by {threads}, killed at report {k}");
            model::assert_survived(&root, &allowed, &what);
            if !killed {
                let least = if threads == "1" { 2 * script::applied_tree().len() } else { 0 };
                assert!(k > least, "no report for each of the entries");
                break;
            }
        }
    }
}

/// A child lives through the script over and over and is killed from outside, wherever it is. It says
/// which steps it has done; what it said is there.
fn killed_at_any_moment() {
    const ROUNDS: u64 = 30;
    for round in 0..ROUNDS {
        let dir = suite::temp();
        let root = dir.path().join("store");
        let mut child = suite::mortal_child(dir.path(), "life", &[root.to_str().unwrap()]);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Some way into the script, and a little after a line: the reader and the child race.
        let steps = usize::try_from(round).unwrap() % SCRIPT.len() + 1;
        let mut done = 0;
        while done < steps {
            lines.next().unwrap().unwrap();
            done += 1;
        }
        for _ in 0..round * round * 200 {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        done += lines.map(Result::unwrap).count();
        let mut model = Model::default();
        for step in &SCRIPT[..done] {
            model = step.after(&model);
        }
        let allowed = match SCRIPT.get(done) {
            Some(step) => step.during(&model),
            None => vec![model],
        };
        model::assert_survived(&root, &allowed, &format!("round {round}, {done} steps done"));
    }
}

fn child(arguments: &[String]) {
    let number = |i: usize| arguments[i].parse::<usize>().unwrap();
    let root = Path::new(&arguments[1]);
    match arguments[0].as_str() {
        "step" => {
            let (step, last) = (number(2), number(3));
            let points = AtomicUsize::new(0);
            let mut options = model::options(Durability::Full);
            options.on_durable_point = Some(DurablePointHook(Arc::new(move |_| {
                if points.fetch_add(1, Ordering::Relaxed) == last {
                    suite::kill_myself();
                }
            })));
            (SCRIPT[step].run)(&Store::open(root, options).unwrap());
        }
        duty @ ("apply" | "import") => {
            let last = number(2);
            let store = Store::open(root, model::options(Durability::None)).unwrap();
            let mut reports = 0;
            let mut die_at_last = |_| {
                if reports == last {
                    suite::kill_myself();
                }
                reports += 1;
                ControlFlow::Continue(())
            };
            if duty == "apply" {
                script::apply(&store, "applied", None, &mut die_at_last);
            } else {
                let threads = arguments[4].parse().ok();
                imported::import_from(&store, Path::new(&arguments[3]), threads, &mut die_at_last);
            }
        }
        "life" => {
            let store = Store::open(root, model::options(Durability::None)).unwrap();
            for step in SCRIPT {
                (step.run)(&store);
                suite::say(step.name);
            }
        }
        other => panic!("no duty {other:?}"),
    }
}
