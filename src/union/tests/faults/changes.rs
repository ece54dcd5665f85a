//! Every kind of change to what lower layers have.

use std::os::fd::AsFd;

use super::*;
use crate::sys::file::Place;
use crate::sys::xattr::{self, Of};

/// A change, and its name in messages.
pub(super) type Change = (&'static str, fn(&Union) -> io::Result<()>);

const SIZE: u64 = 40_000;

/// Layers with a sparse file, files with several names, and files in the way.
pub(super) fn layers((format, owners): (LayerFormat, Owners)) -> Fixture {
    // Not what a union has left on this thread.
    crate::sys::umask::set_on_this_thread(0o022).unwrap();
    let f = Fixture::keeping(format, owners);
    for path in ["bottom/d/file", "bottom/d/sub/deep", "bottom/l1", "bottom/e/x", "bottom/over"] {
        f.file(path);
    }
    f.file("top/over");
    f.file("top/d/sub/too");
    let sparse = fs::File::options().write(true).open(f.path("bottom/d/file")).unwrap();
    sparse.set_len(SIZE).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[7; 5000], 30_000).unwrap();
    xattr::set(Of::Fd(sparse.as_fd()), b"user.key", b"value").unwrap();
    sparse.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
    for name in ["l2", "d/l3"] {
        fs::hard_link(f.path("bottom/l1"), f.path("bottom").join(name)).unwrap();
    }
    std::os::unix::fs::symlink("to", f.path("bottom/d/symlink")).unwrap();
    let old = SetTime::To(Time { secs: 1_000_000, nanos: 0 });
    for path in ["bottom/d/file", "bottom/d/sub/deep", "bottom/l1", "bottom/over", "top/over"] {
        let file = fs::File::open(f.path(path)).unwrap();
        Place::Open(file.as_fd(), Owners::OfFiles).set_times(old, old).unwrap();
    }
    f
}

fn found(u: &Union, path: &str) -> Arc<Node> {
    u.walk(path).unwrap()
}

fn set(u: &Union, path: &str, set: SetAttr) -> io::Result<()> {
    u.set_attr(&found(u, path), &set).map(drop)
}

fn ln(u: &Union, path: &str, to: &str) -> io::Result<()> {
    let (parent, name) = u.parent_of(to);
    u.link(&found(u, path), &parent, &name).map(drop)
}

/// One call of the union each.
const CHANGES: &[Change] = &[
    ("write", |u| u.write(&found(u, "d/file"), 10_000, b"new", None, false)),
    ("chmod", |u| set(u, "d/file", SetAttr { mode: Some(0o4711), ..SetAttr::nothing() })),
    ("utimes", |u| set(u, "d/file", SetAttr { mtime: SetTime::Now, ..SetAttr::nothing() })),
    ("truncate to nothing", |u| set(u, "d/file", SetAttr { size: Some(0), ..SetAttr::nothing() })),
    ("truncate to half", |u| {
        set(u, "d/file", SetAttr { size: Some(SIZE / 2), ..SetAttr::nothing() })
    }),
    ("grow", |u| set(u, "d/file", SetAttr { size: Some(SIZE * 2), ..SetAttr::nothing() })),
    ("setxattr", |u| {
        let node = found(u, "d/file");
        u.set_xattr(&node, b"user.new", b"1", OnPresence::Any, SetAttr::nothing().caller)
    }),
    ("removexattr", |u| {
        u.remove_xattr(&found(u, "d/file"), b"user.key", SetAttr::nothing().caller)
    }),
    ("link", |u| ln(u, "d/file", "d/sub/linked")),
    ("link over a whiteout", |u| ln(u, "over", "gone")),
    ("rename", |u| u.mv("d/file", "moved", RenameMode::Replace)),
    ("rename over a file", |u| u.mv("d/file", "over", RenameMode::Replace)),
    ("rename over a whiteout", |u| u.mv("d/file", "gone", RenameMode::NoReplace)),
    ("exchange", |u| u.mv("d/file", "over", RenameMode::Exchange)),
    ("rename of a directory", |u| u.mv("d/sub", "moved", RenameMode::Replace)),
    ("rename of a directory over a whiteout", |u| u.mv("d", "gone", RenameMode::Replace)),
    ("rename of a directory over an empty one", |u| u.mv("d/sub", "empty", RenameMode::Replace)),
    ("unlink", |u| u.rm("over")),
    ("unlink of what was changed", |u| u.rm("changed")),
    ("rmdir", |u| u.rm_dir("empty")),
    ("mkdir over a whiteout", |u| u.put("gone", NewFile::Directory).map(drop)),
    ("create over a whiteout", |u| u.put("gone", NewFile::Regular).map(drop)),
    ("create", |u| u.put("d/sub/new", NewFile::Regular).map(drop)),
    ("mknod", |u| u.put("d/sub/new", NewFile::Fifo).map(drop)),
    ("chown", |u| set(u, "d/file", SetAttr { uid: Some(7), gid: Some(8), ..SetAttr::nothing() })),
    ("chown of a symlink", |u| set(u, "d/symlink", SetAttr { uid: Some(7), ..SetAttr::nothing() })),
    ("write to one of three names", |u| u.write(&found(u, "d/l3"), 0, b"N", None, false)),
    ("write to a linked file", |u| u.write(&found(u, "linked"), 0, b"N", None, false)),
    ("link of one of three names", |u| ln(u, "l1", "l4")),
    ("rename of one of three names", |u| u.mv("l1", "l4", RenameMode::Replace)),
    ("unlink of one of three names", |u| u.rm("l1")),
    ("write to a copy without data", |u| u.write(&found(u, "changed"), 9, b"N", None, false)),
    ("truncate of a copy without data", |u| {
        set(u, "changed", SetAttr { size: Some(5), ..SetAttr::nothing() })
    }),
    ("rename of a copy without data", |u| u.mv("changed", "d/changed", RenameMode::Replace)),
    ("fsync of a copy without data", |u| u.sync(&found(u, "changed"), false)),
];

/// Layers on which something has been done already.
fn used(setup: (LayerFormat, Owners)) -> Fixture {
    let f = layers(setup);
    for path in ["bottom/gone", "bottom/empty/x", "bottom/changed", "bottom/link-1"] {
        f.file(path);
    }
    fs::hard_link(f.path("bottom/link-1"), f.path("bottom/linked")).unwrap();
    let u = f.open();
    u.rm("gone").unwrap();
    u.rm("empty/x").unwrap();
    u.set_xattr(&found(&u, "empty"), b"user.dir", b"d", OnPresence::Any, SetAttr::nothing().caller)
        .unwrap();
    set(&u, "changed", SetAttr { mode: Some(0o600), ..SetAttr::nothing() }).unwrap();
    set(&u, "link-1", SetAttr { mode: Some(0o600), ..SetAttr::nothing() }).unwrap();
    u.close().unwrap();
    drop(u);
    f
}

/// What is shown. The number of names is not looked at where a note of it is changed before the name, or is
/// not known: names that hide the lower file's are counted only while the union is mounted.
fn seen(u: &Union, change: &Change) -> BTreeMap<String, String> {
    let all = shown(u);
    if change.0.ends_with("one of three names") { without_links(all) } else { all }
}

fn without_links(mut all: BTreeMap<String, String>) -> BTreeMap<String, String> {
    for says in all.values_mut() {
        for n in 1..=4 {
            *says = says.replace(&format!(" {n} links"), "");
        }
    }
    all
}

/// What is shown before and after a change. None if it cannot be made in this format.
fn before_and_after(
    setup: (LayerFormat, Owners),
    change: &Change,
) -> Option<[BTreeMap<String, String>; 2]> {
    let f = used(setup);
    let u = f.open();
    let before = seen(&u, change);
    match (change.1)(&u) {
        Err(e) if Code::CrossDevice.is(&e) => return None,
        // To others only root can give files.
        Err(e) if Code::Perm.is(&e) && change.0.starts_with("chown") => return None,
        done => done.unwrap(),
    }
    let after = seen(&u, change);
    drop(u);
    assert_eq!(seen(&f.open(), change), after, "{}, and mounted again", change.0);
    Some([before, after])
}

/// What differs between what is shown and what should be.
pub(super) fn difference(a: &BTreeMap<String, String>, b: &BTreeMap<String, String>) -> String {
    let mut said = String::new();
    for path in a.keys().chain(b.keys().filter(|path| !a.contains_key(*path))) {
        if a.get(path) != b.get(path) {
            said += &format!("\n  {path}:\n    {:?}\n    {:?}", a.get(path), b.get(path));
        }
    }
    said
}

#[test]
fn a_kill_leaves_the_old_or_the_new() {
    for setup in SETUPS {
        for change in CHANGES {
            let Some([before, after]) = before_and_after(setup, change) else { continue };
            let killed = killed_anywhere(
                || used(setup),
                |u| drop((change.1)(u)),
                |_, u, at| {
                    let now = seen(u, change);
                    assert!(
                        now == before || now == after,
                        "{setup:?}: {}, killed at {at:?}; from before: {}\nfrom after: {}",
                        change.0,
                        difference(&now, &before),
                        difference(&now, &after)
                    );
                },
            );
            assert!(killed > 0 || change.0.starts_with("fsync"), "{}", change.0);
        }
    }
}

#[test]
fn a_symlink_that_is_a_file_is_on_disk_before_it_hides_another() {
    // A lower one of somebody's is copied up with its directory's new name; the root's is given to somebody.
    for sync in [SyncPolicy::Strict, SyncPolicy::Volatile] {
        let mut f = layers((LayerFormat::OverlayUser, Owners::InXattrs));
        f.options.sync = sync;
        let bottom = Dir::open_with(f.path("bottom"), Owners::InXattrs).unwrap();
        bottom.symlink(b"to", &name("his")).unwrap();
        bottom.chown_at(&name("his"), 7, 7).unwrap();
        for path in ["his", "d/symlink"] {
            let u = f.open();
            let mut calls = Vec::new();
            intercept(
                || set(&u, path, SetAttr { uid: Some(8), ..SetAttr::nothing() }).unwrap(),
                |call| {
                    calls.push(call.0);
                    Verdict::Proceeds
                },
            );
            let published = calls.iter().rposition(|call| *call == "renameat2").unwrap();
            let synced = calls[..published].contains(&"fsync");
            assert_eq!(synced, sync == SyncPolicy::Strict, "{path}: {calls:?}");
        }
    }
}

#[test]
fn a_failing_call_leaves_the_old_or_the_new() {
    for setup in SETUPS {
        for change in CHANGES {
            let Some([before, after]) = before_and_after(setup, change) else { continue };
            for shift in 0..shifts() {
                for k in 0.. {
                    let failure = Failure::ALL[(k + shift) % Failure::ALL.len()];
                    let f = used(setup);
                    let ((u, done), at) = under(Fault::Fails(k, failure), |span| {
                        let u = f.open();
                        span.begin();
                        let done = (change.1)(&u);
                        span.end();
                        (u, done)
                    });
                    let Some(at) = at else { break };
                    let what = format!("{setup:?}: {}, {failure:?} at {at:?}: {done:?}", change.0);
                    let now = seen(&u, change);
                    // A note that could not be removed is one more name of the file until the next mount.
                    let has_note = done.is_ok() && change.0.ends_with("copy without data");
                    let same =
                        has_note && without_links(now.clone()) == without_links(after.clone());
                    if now != after && !same {
                        assert!(now == before, "{what}: {}", difference(&now, &before));
                        let e = done.expect_err(&what);
                        assert_eq!(e.raw_os_error(), Some(failure.number()), "{what}");
                        // The trouble is over.
                        (change.1)(&u).unwrap_or_else(|e| panic!("{what}; then {e}"));
                        let now = seen(&u, change);
                        assert!(now == after, "{what}; done again: {}", difference(&now, &after));
                    }
                    u.close().unwrap_or_else(|e| panic!("{what}; closed: {e}"));
                    drop(u);
                    let u = f.open();
                    let now = seen(&u, change);
                    assert!(now == after, "{what}; mounted again: {}", difference(&now, &after));
                    assert!(names(&f.path("work/temp")).is_empty(), "{what}: something is left");
                }
            }
        }
    }
}
