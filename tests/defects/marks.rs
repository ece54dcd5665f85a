//! Marks of other formats, and of a union above this one, are xattrs and names like all others.

use std::fs;
use std::path::Path;

use rustix::fs::FileType;

use crate::support::calls::{self, names, read, write};
use crate::support::fuse_union::{Stage, mode};

pub const TESTS: &[(&str, fn())] = &[
    ("foreign_marks_in_a_lower_mark_nothing", in_a_lower),
    ("foreign_marks_set_through_the_mount_mark_nothing", set_through_the_mount),
    ("marks_of_a_union_above_are_kept_apart", nested),
    ("own_marks_are_not_shown", own_marks_hidden),
    ("the_layers_marks_are_honoured", honoured),
    ("xattr_whiteouts_are_honoured", xattr_whiteouts),
];

/// xattrs by which other programs mark directories and files, with values they take.
const FOREIGN: &[(&str, &[u8])] = &[
    ("user.overlay.opaque", b"y"),
    ("user.overlay.whiteout", b"y"),
    ("user.overlay.redirect", b"/elsewhere"),
    ("user.overlay.metacopy", b""),
    ("user.overlay.origin", b"x"),
    ("user.containers.override_stat", b"1234:1234:0104755"),
    ("user.fuseoverlayfs.opaque", b"y"),
    ("user.fuseoverlayfs.override_stat", b"1234:1234:0104755"),
    ("user.fuseoverlayfs.origin", b"elsewhere"),
];

fn mark(path: &Path) {
    for (name, value) in FOREIGN {
        calls::set_xattr(path, name, value).unwrap();
    }
}

#[track_caller]
fn has_marks(path: &Path) {
    for (name, value) in FOREIGN {
        assert_eq!(calls::get_xattr(path, name).unwrap(), *value, "{}: {name}", path.display());
        let listed = format!("{name}={}", value.escape_ascii());
        assert!(crate::support::whole_tree::xattrs(path).contains(&listed), "{listed}");
    }
}

fn in_a_lower() {
    let stage = Stage::new(2);
    let bottom = &stage.lowers[1];
    for lower in &stage.lowers {
        fs::create_dir_all(lower.join("d/sub")).unwrap();
        fs::create_dir_all(lower.join("elsewhere")).unwrap();
        write(&lower.join("elsewhere/wrong"), "wrong");
    }
    for name in ["d/below", "d/sub/below", "d/hidden", "x", "d/empty"] {
        write(&bottom.join(name), "below");
    }
    mark(&stage.lower("d"));
    mark(&stage.lower("d/sub"));
    write(&stage.lower("d/empty"), "");
    write(&stage.lower("f"), "data");
    mark(&stage.lower("d/empty"));
    mark(&stage.lower("f"));
    for name in [".wh.x", ".wh..wh..opq", "d/.wh.hidden", "d/.wh..wh..opq", "d/sub/.wh.below"] {
        write(&stage.lower(name), "");
    }
    let union = stage.mount();
    let check = |at: &Path| {
        assert_eq!(names(at), [".wh..wh..opq", ".wh.x", "d", "elsewhere", "f", "x"]);
        let d = [".wh..wh..opq", ".wh.hidden", "below", "empty", "hidden", "sub"];
        assert_eq!(names(&at.join("d")), d);
        assert_eq!(names(&at.join("d/sub")), [".wh.below", "below"]);
        assert_eq!(read(&at.join("f")), "data");
        assert_eq!(
            (calls::owner_of(&at.join("f")), calls::mode_of(&at.join("f"))),
            ((0, 0), 0o644)
        );
        assert_eq!(read(&at.join("d/empty")), "");
        for name in ["d", "d/sub", "d/empty", "f"] {
            has_marks(&at.join(name));
        }
    };
    check(union.path());
    // Copied up, they are what they were.
    mode(&union.join("d/sub"), 0o755);
    mode(&union.join("f"), 0o644);
    mode(&union.join("d/empty"), 0o644);
    write(&union.join("d/sub/.wh.below"), "");
    check(union.path());
    stage.survives(union);
    check(stage.mount().path());
}

fn set_through_the_mount() {
    let stage = Stage::new(1);
    fs::create_dir_all(stage.lower("d/sub")).unwrap();
    for name in ["d/f", "d/sub/f", "x", "mine"] {
        write(&stage.lower(name), "below");
    }
    calls::chown(&stage.lower("mine"), 1000, 1000);
    calls::chown(&stage.lower("d"), 1000, 1000);
    let union = stage.mount();
    let [d, mine, new] = ["d", "mine", "d/new"].map(|name| union.join(name));
    // By a user, who could give himself what he likes if they were honoured.
    calls::as_user(1000, 1000, || {
        write(&new, "new");
        for path in [&d, &mine, &new] {
            mark(path);
        }
        write(&d.join(".wh.f"), "");
        write(&d.join(".wh..wh..opq"), "");
    });
    write(&union.join(".wh.x"), "");
    let check = |at: &Path| {
        assert_eq!(names(at), [".wh.x", "d", "mine", "x"]);
        assert_eq!(names(&at.join("d")), [".wh..wh..opq", ".wh.f", "f", "new", "sub"]);
        assert_eq!(names(&at.join("d/sub")), ["f"]);
        for name in ["d", "mine", "d/new"] {
            has_marks(&at.join(name));
            assert_eq!(calls::owner_of(&at.join(name)), (1000, 1000), "{name}");
        }
        assert_eq!(calls::mode_of(&at.join("mine")), 0o644);
        assert_eq!(read(&at.join("d/new")), "new");
    };
    check(union.path());
    stage.survives(union);
    let union = stage.mount();
    check(union.path());
    for (name, _) in FOREIGN {
        rustix::fs::removexattr(union.join("mine"), *name).unwrap();
        assert!(!calls::has_xattr(&union.join("mine"), name));
    }
    stage.survives(union);
}

/// What a union mounted on this one writes into it.
fn nested() {
    let stage = Stage::new(1);
    fs::create_dir_all(stage.lower("d/sub")).unwrap();
    write(&stage.lower("d/f"), "below");
    write(&stage.lower("f"), "below");
    let union = stage.mount();
    let marks: [(&str, &[u8]); 4] = [
        ("trusted.overlay.opaque", b"y"),
        ("trusted.overlay.redirect", b"/elsewhere"),
        ("trusted.overlay.metacopy", b""),
        ("trusted.overlay.overlay.opaque", b"twice"),
    ];
    let check = |at: &Path| {
        for (name, value) in marks {
            for path in ["d", "f"] {
                let path = at.join(path);
                assert_eq!(calls::get_xattr(&path, name).unwrap(), value, "{name}");
                let listed = format!("{name}={}", value.escape_ascii());
                let all = crate::support::whole_tree::xattrs(&path);
                assert!(all.contains(&listed), "{listed} of {all:?}");
            }
        }
        assert_eq!(names(&at.join("d")), ["f", "sub"]);
        assert_eq!(read(&at.join("f")), "below");
    };
    for (name, value) in marks {
        calls::set_xattr(&union.join("d"), name, value).unwrap();
        calls::set_xattr(&union.join("f"), name, value).unwrap();
    }
    check(union.path());
    stage.survives(union);
    let union = stage.mount();
    check(union.path());
    for (name, _) in marks {
        rustix::fs::removexattr(union.join("d"), name).unwrap();
        assert!(!calls::has_xattr(&union.join("d"), name), "{name}");
    }
    assert_eq!(names(&union.join("d")), ["f", "sub"]);
    stage.survives(union);
}

fn own_marks_hidden() {
    let stage = Stage::new(1);
    fs::create_dir_all(stage.lower("gone/sub")).unwrap();
    fs::create_dir_all(stage.lower("moved/sub")).unwrap();
    write(&stage.lower("f"), "f");
    let union = stage.mount();
    fs::remove_dir_all(union.join("gone")).unwrap();
    fs::create_dir(union.join("gone")).unwrap();
    fs::rename(union.join("moved"), union.join("here")).unwrap();
    mode(&union.join("f"), 0o600);
    calls::set_xattr(&union.join("gone"), "user.mine", b"x").unwrap();
    for name in ["gone", "here", "f", "here/sub"] {
        let xattrs = crate::support::whole_tree::xattrs(&union.join(name));
        assert!(xattrs.iter().all(|xattr| xattr.starts_with("user.mine")), "{name}: {xattrs:?}");
        for own in ["trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.overlay.origin"]
        {
            assert!(!calls::has_xattr(&union.join(name), own), "{name}: {own}");
        }
    }
    stage.survives(union);
}

fn honoured() {
    let stage = Stage::new(2);
    let bottom = &stage.lowers[1];
    fs::create_dir_all(bottom.join("old/sub")).unwrap();
    write(&bottom.join("old/sub/f"), "below");
    for name in ["a", "b"] {
        write(&bottom.join(name), "below");
    }
    // As the kernel's overlayfs writes them.
    calls::mknod(&stage.lower("a"), FileType::CharacterDevice, 0, 0).unwrap();
    calls::mknod(&stage.lower("old"), FileType::CharacterDevice, 0, 0).unwrap();
    fs::create_dir(stage.lower("new")).unwrap();
    calls::set_xattr(&stage.lower("new"), "trusted.overlay.redirect", b"/old").unwrap();
    let union = stage.mount();
    assert_eq!(names(union.path()), ["b", "new"]);
    assert_eq!(read(&union.join("new/sub/f")), "below");
    assert!(!union.join("a").exists());
    write(&union.join("new/sub/g"), "new");
    stage.survives(union);
}

/// The kernel reads them since 6.7.
fn xattr_whiteouts() {
    let stage = Stage::new(2);
    let bottom = &stage.lowers[1];
    fs::create_dir(bottom.join("whole")).unwrap();
    for name in ["whole/x", "whole/y"] {
        write(&bottom.join(name), "below");
    }
    // An empty file with an xattr, in a directory that says it has some.
    fs::create_dir(stage.lower("whole")).unwrap();
    calls::set_xattr(&stage.lower("whole"), "trusted.overlay.opaque", b"x").unwrap();
    write(&stage.lower("whole/x"), "");
    calls::set_xattr(&stage.lower("whole/x"), "trusted.overlay.whiteout", b"").unwrap();
    let union = stage.mount();
    assert_eq!(names(&union.join("whole")), ["y"]);
    assert!(!union.join("whole/x").exists());
    write(&union.join("whole/x"), "again");
    stage.survives(union);
}
