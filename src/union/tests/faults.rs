//! Kills and failing calls in the midst of an operation, at each call that changes the file system.
//!
//! What a mount then shows, and the next one, is what was before the operation or what is after it.

mod changes;
mod create;
mod settle;

use std::collections::BTreeMap;

use super::*;
use crate::sys::intercept::{Call, Failure, Verdict, intercept};
use crate::sys::stat::FileType;

/// Formats, and where owners are kept.
const SETUPS: [(LayerFormat, Owners); 3] = [
    (LayerFormat::OverlayUser, Owners::OfFiles),
    (LayerFormat::Aufs, Owners::OfFiles),
    (LayerFormat::OverlayUser, Owners::InXattrs),
];

/// Which calls fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// All from the `k`th on: nothing changes any more, as after a kill.
    Killed(usize),
    /// The `k`th alone, with this error.
    Fails(usize, Failure),
}

/// With how many kinds of failure each call is to fail: in a long run with all.
fn shifts() -> usize {
    if std::env::var_os("STRATAFS_FULL").is_some() { Failure::ALL.len() } else { 1 }
}

/// Where what is tested begins and ends: calls outside do not fail.
#[derive(Debug, Default)]
struct Span(AtomicBool);

impl Span {
    fn begin(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn end(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Runs `work`, in whose span calls fail. Gives the call at which the first did, if it came so far.
fn under<R: Send>(fault: Fault, work: impl FnOnce(&Span) -> R + Send) -> (R, Option<Call>) {
    let span = Span::default();
    let (mut count, mut at) = (0, None);
    let done = intercept(
        || work(&span),
        |call| {
            if !span.0.load(Ordering::SeqCst) {
                return Verdict::Proceeds;
            }
            count += 1;
            let (fails, with) = match fault {
                Fault::Killed(k) => (count > k, Failure::Disk),
                Fault::Fails(k, with) => (count == k + 1, with),
            };
            if !fails {
                return Verdict::Proceeds;
            }
            at.get_or_insert(call);
            Verdict::Fails(with)
        },
    );
    (done, at)
}

/// For each call of what `work` does to the union of a fresh fixture of `prepare`: is it killed there, `check`
/// finds what is right when the union has been opened again. Tells how many calls there are.
fn killed_anywhere(
    prepare: impl Fn() -> Fixture,
    work: impl Fn(&Union) + Sync,
    check: impl Fn(&Fixture, &Union, Call),
) -> usize {
    for k in 0.. {
        let f = prepare();
        let (_, at) = under(Fault::Killed(k), |span| {
            let u = f.open();
            span.begin();
            work(&u);
            // Nothing that it would do now is done.
            drop(u);
        });
        let u = f.open();
        let Some(at) = at else { return k };
        check(&f, &u, at);
        assert!(names(&f.path("work/temp")).is_empty(), "left by a kill at {at:?}, the {k}th");
    }
    unreachable!()
}

/// All that a union shows, by path. Times of change are told by whether they are from before 1980.
fn shown(u: &Union) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut dirs = vec![String::new()];
    while let Some(dir) = dirs.pop() {
        for name in u.ls(&dir) {
            if matches!(&*name, "." | "..") {
                continue;
            }
            let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
            let Some(node) = u.walk(&path) else { panic!("{path} is listed, but not there") };
            let attr = u.attr(&node).unwrap();
            let mut keys = u.xattrs(&node).unwrap();
            keys.sort();
            let xattrs: Vec<_> =
                keys.iter().map(|key| (key, u.xattr(&node, key).unwrap())).collect();
            let what = if attr.kind == FileType::Directory {
                dirs.push(path.clone());
                String::new()
            } else if attr.kind != FileType::Regular {
                format!("{} links, {:?}, {:?}", attr.nlink, attr.rdev, u.read_link(&node).ok())
            } else {
                let size = usize::try_from(attr.size).unwrap();
                let digest = crate::Digest::of(&u.bytes(&node, 0, size + 1));
                let old = attr.mtime.secs < 315_532_800;
                format!("{} links, {size} bytes, {digest}, old: {old}", attr.nlink)
            };
            let type_and_mode = (attr.kind, attr.mode, attr.uid, attr.gid);
            all.insert(path, format!("{type_and_mode:?} {what} {xattrs:?}"));
        }
    }
    all
}
