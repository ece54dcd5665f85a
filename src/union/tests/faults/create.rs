//! Making files.

use super::*;

/// Owner, group, and mode of a name in the upper.
fn owned(f: &Fixture, name: &str) -> Option<(u32, u32, u32)> {
    let meta = fs::symlink_metadata(f.path("upper").join(name)).ok()?;
    Some((meta.uid(), meta.gid(), meta.mode()))
}

#[test]
fn a_new_file_has_its_owner_and_mode_or_is_not_there() {
    let own = crate::sys::fuse::user_and_group();
    // Others can only be given files by root; setuid bits take several steps for everybody.
    let (uid, gid) = if own.0 == 0 { (1234, 4321) } else { own };
    let mut kinds = vec![
        NewFile::Regular,
        NewFile::Directory,
        NewFile::Symlink(b"to".to_vec()),
        NewFile::Fifo,
        NewFile::Char { major: 0, minor: 0 },
    ];
    if own.0 == 0 {
        kinds.push(NewFile::Block { major: 7, minor: 1 });
    }
    for format in FORMATS {
        for kind in &kinds {
            for (free, mode) in [(true, 0o6755), (true, 0o640), (false, 0o4711)] {
                let prepare = || {
                    let f = Fixture::new(format);
                    if !free {
                        f.file("bottom/new");
                        let u = f.open();
                        u.rm("new").unwrap();
                    }
                    f
                };
                let make = |u: &Union| {
                    let file = kind.clone();
                    let make = Make { file, mode, umask: 0o022, uid, gid };
                    let _ = u.make(u.root(), &name("new"), &make);
                };
                let whole = {
                    let f = prepare();
                    make(&f.open());
                    owned(&f, "new").unwrap()
                };
                assert_eq!((whole.0, whole.1), (uid, gid));
                killed_anywhere(prepare, make, |f, u, at| {
                    let what = format!("{kind:?} of mode {mode:o}, free: {free}, killed at {at:?}");
                    let shown = u.walk("new").is_some();
                    if shown {
                        assert_eq!(owned(f, "new"), Some(whole), "{what}");
                    }
                });
            }
        }
    }
}
