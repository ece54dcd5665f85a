//! Archives that try to leave the root. Whatever they do, with an error or without, nothing beside
//! the root changes: not a byte, a mode, a time or a link count.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::test_archive::*;
use super::*;
use crate::progress::ignore_progress;

/// A root beside canaries: `outside/`, with files that archives go for.
struct Cage {
    tmp: tempfile::TempDir,
    root: PathBuf,
}

impl Cage {
    fn new() -> Cage {
        let tmp = scratch();
        let outside = tmp.path().join("outside");
        fs::create_dir_all(outside.join("dir/deep")).unwrap();
        fs::create_dir(tmp.path().join("a")).unwrap();
        for file in ["outside/secret", "outside/dir/file", "a/root-file", "canary"] {
            fs::write(tmp.path().join(file), file).unwrap();
        }
        symlink("secret", outside.join("link")).unwrap();
        let root = tmp.path().join("a/root");
        fs::create_dir(&root).unwrap();
        Cage { tmp, root }
    }

    /// All but the root, its parent's times included.
    fn canaries(&self) -> std::collections::BTreeMap<PathBuf, String> {
        let mut all = snapshot(self.tmp.path());
        all.retain(|path, _| !path.starts_with(&self.root));
        all
    }
}

/// Unpacks in all targets, and holds the cage to its promise.
fn hold(what: &str, bytes: &[u8]) -> Vec<Result<Applied>> {
    let mut targets = vec![LayerTarget::Tree];
    targets.extend(formats().into_iter().map(LayerTarget::Layer));
    let mut results = Vec::new();
    for target in targets {
        let cage = Cage::new();
        let before = cage.canaries();
        let root = &cage.root;
        results.push(apply_layer(bytes, root, target, &options(), &mut ignore_progress));
        assert_eq!(cage.canaries(), before, "{what} in {target:?}: {results:?}");
    }
    results
}

/// Where symlinks of an archive may point to: out by every way there is.
fn ways_out(cage: &Path) -> Vec<String> {
    let outside = cage.join("outside").to_str().unwrap().to_owned();
    vec![
        "../../outside".to_owned(),
        "../../../../../../../../../../outside".to_owned(),
        "./.././../outside/".to_owned(),
        outside,
        "/proc/self/cwd".to_owned(),
        "/proc/self/root".to_owned(),
        "..".to_owned(),
        "/".to_owned(),
        "/..".to_owned(),
        "//..//..//outside".to_owned(),
    ]
}

#[test]
fn symlinks_lead_nowhere_outside() {
    let cage = Cage::new();
    for out in ways_out(cage.tmp.path()) {
        let link = format!("l -> {out}");
        for entries in [
            &["l/secret"][..],
            &["l/new"],
            &["l/dir/"],
            &["l/dir/file"],
            &["l/.wh.secret"],
            &["l/.wh..wh..opq"],
            &["l/dir/.wh..wh..opq"],
            &["x = l/secret", "x"],
            &["x = l/link"],
            &["l/secret = f"],
            &["d -> l/dir", "d/file", "d/"],
            &["d/", "d/e -> ../l", "d/e/secret"],
            &["l/", "l/secret"],
            &[".wh.l", "l/secret"],
            &["l = f", "l"],
            &["l/l -> .", "l/l/l/secret"],
        ] {
            let mut all = vec!["f", link.as_str()];
            all.extend(entries);
            hold(&format!("{all:?}"), &archive(&all));
        }
    }
}

#[test]
fn a_directory_replaced_by_a_link_is_not_remembered() {
    for entries in [
        &["d/", "d/f", "d -> ../../outside", "d/secret"][..],
        &["d/e/f", "d -> ../../outside/", "d/dir/file", "d/e/f"],
        &["d/e/f", "d/e -> ../../../outside/dir", "d/e/file"],
        // The link that led here is replaced from here.
        &["d/s -> .", "d/s/s -> ../../../outside", "d/s/secret"],
        &["d/s -> .", "d/s/f", "d/s/s/", "d/s/secret"],
        &["l -> d", "d/", "l/f", "l -> ../../outside", "l/secret"],
        &["l -> d", "d/", "l/f", "d -> ../../outside", "l/secret"],
        &["d/f", "d = x", "d/secret"],
        &["x -> ../../outside", "d/f", "d = x", "d/secret"],
        &["d/f", ".wh.d", "d -> ../../outside", "d/secret", "d/.wh.link"],
    ] {
        hold(&format!("{entries:?}"), &archive(entries));
    }
}

#[test]
fn names_that_climb_are_refused() {
    for name in ["..", "../canary", "a/../../root-file", "a/..", "./../canary", "/../canary"] {
        for result in hold(name, &archive(&[name])) {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidArchive, "{name}");
        }
        let link = format!("x = {name}");
        for result in hold(&link, &archive(&[&link])) {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidArchive, "{link}");
        }
    }
    let mut empty = Archive::new();
    empty.file("", b"x");
    hold("the empty name", &empty.finish());
    hold("a file as the root", &archive(&["./."]));
    let mut slashed = Archive::new();
    slashed.header("f/", b'0', 0, "").header("l/", b'2', 0, "../../outside").file("l/secret", b"");
    hold("names that end in a slash", &slashed.finish());
}

#[test]
fn absolute_names_are_inside() {
    let tmp = scratch();
    let outside = tmp.path().join("canary");
    fs::write(&outside, "canary").unwrap();
    let name = outside.to_str().unwrap();
    let root = scratch();
    let link = format!("l = {name}");
    unpack(&archive(&[name, &link]), root.path(), LayerTarget::Tree).unwrap();
    assert_eq!(fs::read_to_string(&outside).unwrap(), "canary");
    assert_eq!(fs::read_to_string(root.path().join(&name[1..])).unwrap(), name);
}

#[test]
fn what_is_in_a_tree_already_leads_nowhere_either() {
    let cage = Cage::new();
    for (n, out) in ways_out(cage.tmp.path()).iter().enumerate() {
        symlink(out, cage.root.join(format!("l{n}"))).unwrap();
    }
    let before = cage.canaries();
    for n in 0..ways_out(cage.tmp.path()).len() {
        for entry in
            ["l/secret", "l/dir/", "l/.wh.secret", "l/.wh..wh..opq", "x = l/secret", ".wh.l"]
        {
            let entry = entry.replace('l', &format!("l{n}"));
            let result = unpack(&archive(&[&entry]), &cage.root, LayerTarget::Tree);
            assert_eq!(cage.canaries(), before, "{entry}: {result:?}");
        }
    }
}

#[test]
fn attributes_of_links_are_the_links_own() {
    let mut layer = Archive::new();
    layer.mode = 0o4777;
    layer.pax("SCHILY.xattr.user.k", b"v").symlink("l", "../../outside/secret");
    layer.link("h", "l");
    layer.mode = 0;
    layer.link("l", "h").symlink("d", "../../outside").dir("d/").dir("d");
    hold("attributes", &layer.finish());
}

#[test]
fn whiteouts_of_a_tree_remove_links_and_not_what_they_point_to() {
    let cage = Cage::new();
    symlink("../../outside", cage.root.join("l")).unwrap();
    fs::create_dir(cage.root.join("d")).unwrap();
    symlink("../../../outside", cage.root.join("d/l")).unwrap();
    let before = cage.canaries();
    unpack(&archive(&[".wh.l", "d/.wh..wh..opq"]), &cage.root, LayerTarget::Tree).unwrap();
    assert_eq!(cage.canaries(), before);
    assert_eq!(tree(&cage.root, None).len(), 1);
}
