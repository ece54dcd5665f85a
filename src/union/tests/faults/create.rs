//! Making files.

use super::*;

/// Owner, group, mode and type of a name in the upper.
fn owned(f: &Fixture, of: &str) -> Option<(u32, u32, u32, FileType)> {
    let upper = Dir::open_with(f.path("upper"), f.owners).unwrap();
    let stat = upper.try_stat_at(&name(of)).unwrap()?;
    Some((stat.uid, stat.gid, stat.mode, stat.file_type))
}

#[test]
fn a_new_file_has_its_owner_and_mode_or_is_not_there() {
    let own = crate::sys::fuse::user_and_group();
    let kinds = vec![
        NewFile::Regular,
        NewFile::Directory,
        NewFile::Symlink(b"to".to_vec()),
        NewFile::Fifo,
        NewFile::Char { major: 0, minor: 0 },
        NewFile::Block { major: 7, minor: 1 },
    ];
    for (format, owners) in SETUPS {
        // Others can only be given files by root; setuid bits take several steps for everybody.
        let may_give = own.0 == 0 || owners == Owners::InXattrs;
        let (uid, gid) = if may_give { (1234, 4321) } else { own };
        for kind in &kinds {
            if !may_give && matches!(kind, NewFile::Block { .. }) {
                continue;
            }
            for (free, mode) in [(true, 0o6755), (true, 0o640), (false, 0o4711)] {
                let prepare = || {
                    let f = Fixture::keeping(format, owners);
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
