//! What a peer gets wrong with data, deletions, links and renames: one test each.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use rustix::fs::RenameFlags;

use crate::support::calls::{self, names, read, write};
use crate::support::fuse_union::{Stage, mode};

pub const TESTS: &[(&str, fn())] = &[
    ("files_of_lowers_are_never_written", lowers_stay),
    ("what_was_deleted_stays_away_from_new_directories", recreated_directories),
    ("names_at_the_root_stay_deleted", deleted_at_the_root),
    ("renames_onto_whiteouts_stay", rename_onto_whiteout),
    ("names_like_whiteouts_of_files_are_names", whiteout_like_names),
    ("lower_hard_links_stay_together", hard_links_together),
    ("what_is_written_to_lower_hard_links_stays", hard_links_keep_writes),
    ("links_to_lower_files_are_the_same_file", new_links),
    ("link_counts_need_no_look_at_all_names", link_counts),
    ("noreplace_onto_a_deleted_name_and_exchange_with_a_lower", rename_flags),
    ("lower_and_merged_directories_are_renamed", renamed_directories),
];

fn lowers_stay() {
    let stage = Stage::new(1);
    let old = vec![b'o'; 20_000];
    for name in ["f", "mapped"] {
        write(&stage.lower(name), &old);
    }
    let union = stage.mount();
    for name in ["f", "mapped"] {
        let path = union.join(name);
        let reader = File::open(&path).unwrap();
        let mut byte = [0];
        reader.read_at(&mut byte, 9_000).unwrap();
        assert_eq!(byte, *b"o");
        let writer = File::options().read(true).write(true).open(&path).unwrap();
        if name == "mapped" {
            let mut mapping = calls::Mapping::new(&writer, 20_000, true).unwrap();
            mapping.write(9_000, b"new");
            mapping.sync().unwrap();
        } else {
            writer.write_at(b"new", 9_000).unwrap();
        }
        drop((reader, writer));
        assert!(fs::read(stage.lower(name)).unwrap() == old, "the lower {name} was written");
        assert_eq!(&fs::read(&path).unwrap()[8_999..9_004], b"onewo");
    }
    stage.survives(union);
    for name in ["f", "mapped"] {
        assert!(fs::read(stage.lower(name)).unwrap() == old, "the lower {name} was written");
        assert_eq!(&fs::read(stage.upper(name)).unwrap()[8_999..9_004], b"onewo");
    }
}

fn recreated_directories() {
    let stage = Stage::new(2);
    for (n, dir) in ["d", "p/d", "q/d", "q/d/sub"].into_iter().enumerate() {
        for (layer, lower) in stage.lowers.iter().enumerate() {
            fs::create_dir_all(lower.join(dir)).unwrap();
            write(&lower.join(dir).join(format!("old{n}{layer}")), "old");
            fs::create_dir_all(lower.join(dir).join("sub")).unwrap();
            write(&lower.join(dir).join("sub/old"), "old");
        }
    }
    let union = stage.mount();
    fs::remove_dir_all(union.join("d")).unwrap();
    fs::create_dir(union.join("d")).unwrap();
    fs::remove_dir_all(union.join("p/d")).unwrap();
    fs::create_dir_all(union.join("p/d/sub")).unwrap();
    fs::remove_dir_all(union.join("q")).unwrap();
    fs::create_dir_all(union.join("q/d/sub")).unwrap();
    let check = |at: &Path| {
        assert_eq!(names(&at.join("d")), [""; 0]);
        assert_eq!(names(&at.join("p/d")), ["sub"]);
        assert_eq!(names(&at.join("p/d/sub")), [""; 0]);
        assert_eq!(names(&at.join("q/d/sub")), [""; 0]);
        assert!(!at.join("d/sub/old").exists());
    };
    check(union.path());
    stage.survives(union);
    check(stage.mount().path());
}

fn deleted_at_the_root() {
    let stage = Stage::new(1);
    write(&stage.lower("a"), "lower");
    fs::create_dir(stage.lower("d")).unwrap();
    write(&stage.lower("d/f"), "lower");
    fs::create_dir_all(stage.lower("sub/d")).unwrap();
    write(&stage.lower("sub/a"), "lower");
    write(&stage.lower("sub/d/f"), "lower");
    let union = stage.mount();
    for base in [union.path(), &union.join("sub")] {
        fs::remove_file(base.join("a")).unwrap();
        write(&base.join("a"), "upper");
        fs::remove_file(base.join("a")).unwrap();
        fs::remove_dir_all(base.join("d")).unwrap();
        write(&base.join("d"), "a file");
        fs::remove_file(base.join("d")).unwrap();
    }
    assert_eq!(names(union.path()), ["sub"]);
    stage.survives(union);
    let union = stage.mount();
    assert_eq!(names(union.path()), ["sub"]);
    assert_eq!(names(&union.join("sub")), [""; 0]);
}

fn rename_onto_whiteout() {
    let stage = Stage::new(1);
    for name in ["a", "b", "c"] {
        write(&stage.lower(name), format!("lower {name}"));
    }
    let union = stage.mount();
    fs::remove_file(union.join("a")).unwrap();
    write(&union.join("new"), "new");
    fs::rename(union.join("new"), union.join("a")).unwrap();
    // A lower file onto a whiteout.
    fs::remove_file(union.join("b")).unwrap();
    fs::rename(union.join("c"), union.join("b")).unwrap();
    stage.survives(union);
    let union = stage.mount();
    assert_eq!(names(union.path()), ["a", "b"]);
    assert_eq!((read(&union.join("a")), read(&union.join("b"))), ("new".into(), "lower c".into()));
}

fn whiteout_like_names() {
    let stage = Stage::new(1);
    for name in ["foo", "bar", "dir"] {
        write(&stage.lower(name), name);
    }
    let union = stage.mount();
    write(&union.join(".wh.foo"), "a file");
    fs::create_dir(union.join(".wh.bar")).unwrap();
    symlink("x", union.join(".wh.dir")).unwrap();
    write(&union.join(".wh..wh..opq"), "a file");
    let all = [".wh..wh..opq", ".wh.bar", ".wh.dir", ".wh.foo", "bar", "dir", "foo"];
    assert_eq!(names(union.path()), all);
    stage.survives(union);
    assert_eq!(names(stage.mount().path()), all);
}

/// Two names of a file, `x` and `y`, in a lower.
fn linked() -> Stage {
    let stage = Stage::new(1);
    write(&stage.lower("x"), "old");
    fs::hard_link(stage.lower("x"), stage.lower("y")).unwrap();
    stage
}

fn hard_links_together() {
    let stage = linked();
    let union = stage.mount();
    let [x, y] = ["x", "y"].map(|name| union.join(name));
    let reader = File::open(&y).unwrap();
    write(&x, "new data");
    assert_eq!(read(&y), "new data");
    let mut seen = String::new();
    (&reader).read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "new data");
    assert_eq!(calls::ino(&x), calls::ino(&y));
    assert_eq!((calls::links(&x), calls::links(&y)), (2, 2));
    union.forget();
    assert_eq!(read(&y), "new data");
    // Through the other name, too.
    write(&y, "newer");
    mode(&y, 0o600);
    assert_eq!((read(&x), calls::mode_of(&x)), ("newer".into(), 0o600));
    fs::remove_file(&y).unwrap();
    assert_eq!(read(&x), "newer");
    assert_eq!(calls::links(&x), 1);
    drop(reader);
    stage.survives(union);
}

/// Whichever name is written through, and whichever goes: what was written is not lost with another name,
/// nor at the next mount.
fn hard_links_keep_writes() {
    for listed in [false, true] {
        for (written, removed) in [("x", "y"), ("y", "x"), ("x", ""), ("y", "")] {
            let what = format!("through {written}, listed: {listed}, removed: {removed:?}");
            let stage = linked();
            let union = stage.mount();
            if listed {
                assert_eq!(names(union.path()), ["x", "y"]);
            }
            write(&union.join(written), "new");
            if !removed.is_empty() {
                fs::remove_file(union.join(removed)).unwrap();
            }
            assert_eq!(read(&union.join(written)), "new", "{what}");
            union.unmount();
            let union = stage.mount();
            assert_eq!(read(&union.join(written)), "new", "{what}, mounted again");
            if !removed.is_empty() {
                assert_eq!(names(union.path()), [written], "{what}, mounted again");
            }
            assert_eq!(read(&stage.lower("x")), "old", "{what}");
            stage.survives(union);
        }
    }
}

fn new_links() {
    let stage = Stage::new(1);
    write(&stage.lower("old"), "lower");
    let union = stage.mount();
    let [old, new] = ["old", "new"].map(|name| union.join(name));
    let before = calls::ino(&old);
    let reader = File::open(&old).unwrap();
    fs::hard_link(&old, &new).unwrap();
    assert_eq!((calls::ino(&old), calls::ino(&new)), (before, before));
    assert_eq!((calls::links(&old), calls::links(&new)), (2, 2));
    File::options().append(true).open(&new).unwrap().write_all(b" and more").unwrap();
    assert_eq!(read(&old), "lower and more");
    drop(reader);
    stage.survives(union);
    let union = stage.mount();
    let [old, new] = ["old", "new"].map(|name| union.join(name));
    assert_eq!(calls::ino(&old), calls::ino(&new));
    assert_eq!((calls::links(&old), calls::links(&new)), (2, 2));
}

fn link_counts() {
    let stage = Stage::new(1);
    fs::create_dir(stage.lower("far")).unwrap();
    write(&stage.lower("low"), "low");
    fs::hard_link(stage.lower("low"), stage.lower("low2")).unwrap();
    fs::hard_link(stage.lower("low"), stage.lower("far/low3")).unwrap();
    let union = stage.mount();
    assert_eq!(calls::links(&union.join("low")), 3);
    fs::create_dir(union.join("away")).unwrap();
    write(&union.join("up"), "up");
    fs::hard_link(union.join("up"), union.join("away/up2")).unwrap();
    fs::hard_link(union.join("up"), union.join("away/up3")).unwrap();
    assert_eq!(calls::links(&union.join("up")), 3);
    stage.survives(union);
    let union = stage.mount();
    assert_eq!(calls::links(&union.join("up")), 3);
    fs::remove_file(union.join("away/up3")).unwrap();
    assert_eq!(calls::links(&union.join("up")), 2);
}

fn rename_flags() {
    let stage = Stage::new(1);
    for name in ["gone", "low"] {
        write(&stage.lower(name), format!("lower {name}"));
    }
    let union = stage.mount();
    fs::remove_file(union.join("gone")).unwrap();
    write(&union.join("new"), "new");
    calls::rename(&union.join("new"), &union.join("gone"), RenameFlags::NOREPLACE).unwrap();
    assert_eq!(read(&union.join("gone")), "new");
    calls::rename(&union.join("gone"), &union.join("low"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(read(&union.join("gone")), "lower low");
    assert_eq!(read(&union.join("low")), "new");
    stage.survives(union);
}

fn renamed_directories() {
    let stage = Stage::new(2);
    for (layer, lower) in stage.lowers.iter().enumerate() {
        fs::create_dir_all(lower.join("merged/sub")).unwrap();
        write(&lower.join(format!("merged/sub/{layer}")), "x");
        fs::create_dir(lower.join("place")).unwrap();
    }
    fs::create_dir_all(stage.lowers[1].join("only/deep/er")).unwrap();
    write(&stage.lowers[1].join("only/deep/er/f"), "f");
    let union = stage.mount();
    let inos = ["only", "merged", "merged/sub"].map(|name| calls::ino(&union.join(name)));
    fs::rename(union.join("only"), union.join("moved")).unwrap();
    fs::rename(union.join("merged"), union.join("place/merged")).unwrap();
    assert_eq!(names(union.path()), ["moved", "place"]);
    assert_eq!(read(&union.join("moved/deep/er/f")), "f");
    assert_eq!(names(&union.join("place/merged/sub")), ["0", "1"]);
    let moved = ["moved", "place/merged", "place/merged/sub"];
    assert_eq!(moved.map(|name| calls::ino(&union.join(name))), inos);
    // Twice, and one inside of it; and what it leaves is a name like any other.
    fs::rename(union.join("moved/deep"), union.join("place/deep")).unwrap();
    fs::rename(union.join("moved"), union.join("again")).unwrap();
    fs::create_dir(union.join("only")).unwrap();
    write(&union.join("place/deep/er/new"), "new");
    assert_eq!(names(&union.join("only")), [""; 0]);
    assert_eq!(names(&union.join("again")), [""; 0]);
    stage.survives(union);
}
