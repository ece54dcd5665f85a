//! Settling.

use super::changes::{difference, layers};
use super::*;

/// An upper in which everything refers to lower layers that can.
fn referring() -> Fixture {
    let f = layers((LayerFormat::OverlayUser, Owners::OfFiles));
    let u = f.open();
    let chmod = |path: &str| {
        let set = SetAttr { mode: Some(0o600), ..SetAttr::nothing() };
        u.set_attr(&u.walk(path).unwrap(), &set).unwrap();
    };
    chmod("d/file");
    chmod("l1");
    u.write(&u.walk("d/l3").unwrap(), 0, b"N", None, false).unwrap();
    u.mv("d/sub", "moved", RenameMode::Replace).unwrap();
    chmod("moved/deep");
    u.mv("moved/deep", "d/deep", RenameMode::Replace).unwrap();
    u.mv("d", "gone", RenameMode::Replace).unwrap();
    u.close().unwrap();
    drop(u);
    f
}

fn settle_all(f: &Fixture) -> Result<()> {
    settle(f.spec(), &mut crate::ignore_progress).map(drop)
}

/// Settled by now, it shows the same, and needs no lower layer for what it refers to.
fn check(f: &Fixture, before: &BTreeMap<String, String>, what: &str) {
    let now = shown(&f.open());
    assert!(now == *before, "{what}: {}", difference(&now, before));
    settle_all(f).unwrap_or_else(|e| panic!("{what}; then {e}"));
    let now = shown(&f.open());
    assert!(now == *before, "{what}; settled: {}", difference(&now, before));
    for marker in ["redirected", "metacopy", "linked"] {
        assert!(!f.path("work/state").join(marker).exists(), "{what}: {marker}");
    }
    for dir in ["work/temp", "work/links"] {
        assert_eq!(names(&f.path(dir)), [""; 0], "{what}: {dir}");
    }
}

#[test]
fn a_kill_while_settling_changes_nothing_that_is_shown() {
    let before = shown(&referring().open());
    let mut killed = 0;
    loop {
        let f = referring();
        let (_, at) = under(Fault::Killed(killed), |span| {
            span.begin();
            drop(settle_all(&f));
        });
        let Some(at) = at else { break };
        check(&f, &before, &format!("killed at the {killed}th call, {at:?}"));
        killed += 1;
    }
    assert!(killed > 20, "{killed}");
}

#[test]
fn a_failing_call_while_settling_changes_nothing_that_is_shown() {
    let before = shown(&referring().open());
    for shift in 0..shifts() {
        for k in 0.. {
            let failure = Failure::ALL[(k + shift) % Failure::ALL.len()];
            let f = referring();
            let (settled, at) = under(Fault::Fails(k, failure), |span| {
                span.begin();
                settle_all(&f)
            });
            let Some(at) = at else { break };
            check(&f, &before, &format!("{failure:?} at the {k}th call, {at:?}: {settled:?}"));
        }
    }
}
