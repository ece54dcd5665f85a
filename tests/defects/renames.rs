//! Renames of everything onto everything, and removals: as on ext4.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::fs::RenameFlags;
use rustix::io::{Errno, Result};

use crate::support::calls::{self, names, read, write};
use crate::support::fuse_union::Stage;
use crate::support::whole_tree;

pub const TESTS: &[(&str, fn())] = &[
    ("replacing", || all_pairs(RenameFlags::empty())),
    ("noreplace", || all_pairs(RenameFlags::NOREPLACE)),
    ("exchange", || all_pairs(RenameFlags::EXCHANGE)),
    ("whiteout", whiteout),
    ("odd_renames_are_as_on_ext4", odd),
    ("directories_with_whiteouts_only_are_empty", rmdir),
    ("open_descriptors_follow_renames", open_descriptors),
];

/// What stands at a name, and how it came to be there.
const STATES: [&str; 11] = [
    "absent",
    "whiteout",
    "low-file",
    "up-file",
    "copied-file",
    "low-dir",
    "up-dir",
    "up-empty-dir",
    "merged-dir",
    "emptied-dir",
    "recreated-dir",
];

/// What the lower has of a state, at a path that is not there yet.
fn lay_below(state: &str, path: &Path) {
    match state {
        "low-file" | "copied-file" | "whiteout" => write(path, format!("lower {state}")),
        "low-dir" | "merged-dir" | "emptied-dir" | "recreated-dir" => {
            fs::create_dir_all(path.join("sub")).unwrap();
            write(&path.join("sub/low"), "low");
            write(&path.join("low"), "low");
        }
        _ => {}
    }
}

/// What is done then, on the union and on ext4.
fn lay_above(state: &str, path: &Path) {
    match state {
        "whiteout" => fs::remove_file(path).unwrap(),
        "up-file" => write(path, "upper file"),
        "copied-file" => write(path, "copied up"),
        "up-dir" => {
            fs::create_dir_all(path.join("sub")).unwrap();
            write(&path.join("sub/up"), "up");
        }
        "up-empty-dir" => fs::create_dir(path).unwrap(),
        "merged-dir" => {
            write(&path.join("up"), "up");
            write(&path.join("sub/up"), "up");
        }
        "emptied-dir" => {
            fs::remove_dir_all(path.join("sub")).unwrap();
            fs::remove_file(path.join("low")).unwrap();
        }
        "recreated-dir" => {
            fs::remove_dir_all(path).unwrap();
            fs::create_dir(path).unwrap();
            write(&path.join("new"), "new");
        }
        _ => {}
    }
}

/// Names, kinds and contents.
fn shape(root: &Path) -> Vec<String> {
    let entries = walkdir::WalkDir::new(root).sort_by_file_name();
    let lines = entries.into_iter().map(|entry| {
        let entry = entry.unwrap();
        let content = match entry.file_type().is_file() {
            true => read(entry.path()),
            false => format!("{:?}", entry.file_type()),
        };
        format!("{} {content}", entry.path().strip_prefix(root).unwrap().display())
    });
    lines.collect()
}

/// A directory for each pair of states, with `from` and `to` in it; once as a union and once on ext4.
fn lay_pairs(stage: &Stage, plain: &Path) -> crate::support::fuse_union::Union {
    let pairs = || STATES.into_iter().flat_map(|from| STATES.map(|to| (from, to)));
    for (from, to) in pairs() {
        let dir = stage.lower(format!("{from}+{to}"));
        fs::create_dir(&dir).unwrap();
        lay_below(from, &dir.join("from"));
        lay_below(to, &dir.join("to"));
    }
    let copied = Command::new("cp").arg("-a").arg(stage.lower(".")).arg(plain).status().unwrap();
    assert!(copied.success());
    let union = stage.mount();
    for root in [union.path(), plain] {
        for (from, to) in pairs() {
            let dir = root.join(format!("{from}+{to}"));
            lay_above(from, &dir.join("from"));
            lay_above(to, &dir.join("to"));
        }
    }
    assert_eq!(shape(union.path()), shape(plain));
    union
}

/// Some file systems, such as XFS, say of a directory that is not empty that it exists.
fn agree(expected: &Result<()>, got: &Result<()>) -> bool {
    expected == got || (*expected, *got) == (Err(Errno::EXIST), Err(Errno::NOTEMPTY))
}

fn all_pairs(flags: RenameFlags) {
    let stage = Stage::new(1);
    let plain = stage.beside("plain");
    let union = lay_pairs(&stage, &plain);
    let mut wrong = Vec::new();
    for from in STATES {
        for to in STATES {
            let pair = format!("{from}+{to}");
            let rename = |root: &Path| {
                let dir = root.join(&pair);
                calls::rename(&dir.join("from"), &dir.join("to"), flags)
            };
            let (expected, got) = (rename(&plain), rename(union.path()));
            let (kept, shown) = (shape(&plain.join(&pair)), shape(&union.join(&pair)));
            if !agree(&expected, &got) || kept != shown {
                wrong
                    .push(format!("{pair}: expected {expected:?} {kept:?}, got {got:?} {shown:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // And back again, where it went: names are used twice.
    for from in STATES {
        for to in STATES {
            let pair = format!("{from}+{to}");
            let rename = |root: &Path| {
                let dir = root.join(&pair);
                calls::rename(&dir.join("to"), &dir.join("from"), RenameFlags::NOREPLACE)
            };
            assert_eq!(rename(&plain), rename(union.path()), "back: {pair}");
        }
    }
    assert_eq!(shape(union.path()), shape(&plain));
    stage.survives(union);
}

/// The name that is left is a whiteout for a union mounted on this one, or the call is refused; what is
/// in the lower comes back in no case.
fn whiteout() {
    let stage = Stage::new(1);
    let plain = stage.beside("plain");
    let union = lay_pairs(&stage, &plain);
    let mut wrong = Vec::new();
    for from in STATES {
        for to in STATES {
            let pair = format!("{from}+{to}");
            let rename = |root: &Path| {
                let dir = root.join(&pair);
                calls::rename(&dir.join("from"), &dir.join("to"), RenameFlags::WHITEOUT)
            };
            let before = shape(&plain.join(&pair));
            let (expected, got) = (rename(&plain), rename(union.path()));
            let mut kept = shape(&plain.join(&pair));
            let mut shown = shape(&union.join(&pair));
            let refused = got == Err(Errno::INVAL) && shown == before;
            let hides = |line: &String| !line.starts_with("from FileType");
            kept.retain(hides);
            shown.retain(hides);
            if !refused && (!agree(&expected, &got) || kept != shown) {
                wrong
                    .push(format!("{pair}: expected {expected:?} {kept:?}, got {got:?} {shown:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let shown = whole_tree::lines(union.path());
    union.unmount();
    let again = stage.mount();
    whole_tree::assert_same("mounted again", &shown, &whole_tree::lines(again.path()));
    again.unmount();
    // The kernel has no device 0:0 to show for what is left, but what hides nothing.
    let without = |lines: Vec<String>| -> Vec<String> {
        let left = |line: &String| {
            let words: Vec<_> = line.split(' ').collect();
            words[0].ends_with("/from") && matches!(words[1], "20000" | "101600")
        };
        lines.into_iter().filter(|line| !left(line)).collect()
    };
    let kernel = stage.mount_by_the_kernel();
    let by_the_kernel = without(whole_tree::lines(kernel.path()));
    whole_tree::assert_same("mounted by the kernel", &without(shown), &by_the_kernel);
}

fn odd() {
    let stage = Stage::new(1);
    fs::create_dir_all(stage.lower("d/sub/deep")).unwrap();
    write(&stage.lower("f"), "f");
    fs::hard_link(stage.lower("f"), stage.lower("g")).unwrap();
    let plain = stage.beside("plain");
    let copied = Command::new("cp").arg("-a").arg(stage.lower(".")).arg(&plain).status().unwrap();
    assert!(copied.success());
    let union = stage.mount();
    let long = "n".repeat(256);
    let empty = RenameFlags::empty();
    let cases = [
        ("d", "d/sub/inside", empty),
        ("d", "d/sub/deep", RenameFlags::EXCHANGE),
        ("d/sub", "d", empty),
        ("d", "d", empty),
        ("f", "f", empty),
        ("f", "g", empty),
        ("f", "f/x", empty),
        ("f", "absent/x", empty),
        ("absent", "x", empty),
        ("f", "d", empty),
        ("d", "f", empty),
        ("f", &*long, empty),
        ("f", ".", empty),
        ("d/sub/..", "x", empty),
        ("f", "g", RenameFlags::NOREPLACE | RenameFlags::EXCHANGE),
        ("f", "d/sub", RenameFlags::EXCHANGE),
        ("f", "f", RenameFlags::NOREPLACE),
        ("f", "absent", RenameFlags::EXCHANGE),
        ("d/sub", "d/sub/", empty),
    ];
    for (from, to, flags) in cases {
        let rename = |root: &Path| calls::rename(&root.join(from), &root.join(to), flags);
        assert_eq!(rename(union.path()), rename(&plain), "{from} to {to} {flags:?}");
        assert_eq!(shape(union.path()), shape(&plain), "{from} to {to} {flags:?}");
    }
    stage.survives(union);
}

fn rmdir() {
    let stage = Stage::new(2);
    for dir in ["a", "b", "c"] {
        for lower in &stage.lowers {
            fs::create_dir_all(lower.join(dir).join("sub")).unwrap();
            write(&lower.join(dir).join("f"), "f");
        }
        write(&stage.lowers[1].join(dir).join("g"), "g");
    }
    let union = stage.mount();
    let remove = |dir: &str| rustix::fs::rmdir(union.join(dir));
    assert_eq!(remove("a"), Err(Errno::NOTEMPTY));
    for name in ["f", "g"] {
        fs::remove_file(union.join("a").join(name)).unwrap();
        assert_eq!(remove("a"), Err(Errno::NOTEMPTY));
    }
    fs::remove_dir(union.join("a/sub")).unwrap();
    write(&union.join("a/new"), "new");
    assert_eq!(remove("a"), Err(Errno::NOTEMPTY));
    fs::remove_file(union.join("a/new")).unwrap();
    assert_eq!(remove("a"), Ok(()));
    assert_eq!(remove("a"), Err(Errno::NOENT));
    // A directory with whiteouts only is replaced by another.
    fs::remove_dir(union.join("b/sub")).unwrap();
    fs::remove_file(union.join("b/f")).unwrap();
    fs::create_dir(union.join("new")).unwrap();
    write(&union.join("new/x"), "x");
    let onto = |to: &str| calls::rename(&union.join("new"), &union.join(to), RenameFlags::empty());
    assert_eq!(onto("b"), Err(Errno::NOTEMPTY));
    fs::remove_file(union.join("b/g")).unwrap();
    assert_eq!(onto("b"), Ok(()));
    assert_eq!(names(&union.join("b")), ["x"]);
    assert_eq!(rustix::fs::rmdir(union.join("c/f")), Err(Errno::NOTDIR));
    assert_eq!(rustix::fs::unlink(union.join("c/sub")), Err(Errno::ISDIR));
    assert_eq!(rustix::fs::rmdir(union.join("c/sub/.")), Err(Errno::INVAL));
    stage.survives(union);
}

fn open_descriptors() {
    use std::io::{Read as _, Write as _};
    let stage = Stage::new(1);
    fs::create_dir_all(stage.lower("d/sub")).unwrap();
    write(&stage.lower("d/sub/f"), "content");
    let union = stage.mount();
    let dir = fs::File::open(union.join("d/sub")).unwrap();
    let mut file = fs::File::options().read(true).append(true).open(union.join("d/sub/f")).unwrap();
    fs::rename(union.join("d"), union.join("e")).unwrap();
    fs::rename(union.join("e/sub"), union.join("s")).unwrap();
    fs::rename(union.join("s/f"), union.join("g")).unwrap();
    let mut content = String::new();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, "content");
    file.write_all(b" and more").unwrap();
    rustix::fs::mkdirat(&dir, "made", rustix::fs::Mode::from(0o755)).unwrap();
    assert_eq!(read(&union.join("g")), "content and more");
    assert_eq!(names(&union.join("s")), ["made"]);
    drop((dir, file));
    stage.survives(union);
}
