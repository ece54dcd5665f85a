//! The house rules that a machine can check, over the text of `src/`:
//!
//! - imports point down only: to a lower tier of [`TIERS`], or within the own folder;
//! - system calls stay behind the fence, FUSE and SQLite in their rooms ([`ROOMS`]);
//! - processes are started in the files of [`STARTERS`] alone;
//! - a file has a head that says what it is for, a name that says it too, and at most 600 lines.
//!
//! Comments and strings do not count: the source is cut into tokens first. What macros expand to is
//! not seen.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of the crate root and their tiers. A file imports from lower tiers and from its own
/// folder; for the modules that are a single file, that folder is `src/`, so those of one tier may
/// use each other. `lib.rs`, which names them all, is outside.
const TIERS: &[(&str, u8)] = &[
    ("error", 0),
    ("digest", 0),
    ("path", 0),
    ("progress", 0),
    ("sys", 1),
    ("idmap", 2),
    ("compression", 2),
    ("layer", 3),
    ("changes", 4),
    ("archive", 5),
    ("union", 4),
    ("fuse", 5),
    // Above `changes`, by which it finds what a tree has beyond layers; below the engine that copies.
    ("tree", 5),
    // By the options of `archive`.
    ("adopt", 6),
    ("helper", 6),
    // Starts helpers.
    ("driver", 7),
    // Start helpers, too.
    ("rootless", 7),
    ("container", 7),
    ("store", 8),
    ("image", 9),
    ("fuzzing", 10),
    ("bin", 11),
];

/// The tiers whose modules are single files.
const FILE_TIERS: &[u8] = &[0, 2];

/// Crates, and the keyword `unsafe`, that only paths beginning so may use. In `error.rs` the errno
/// constants of libc are plain numbers, and let through.
const ROOMS: &[(&str, &str)] = &[
    ("unsafe", "sys/"),
    ("rustix", "sys/"),
    ("nix", "sys/"),
    ("libc", "sys/"),
    ("fuser", "fuse/"),
    ("rusqlite", "store/metadata"),
];

/// Where processes are started: helpers, those that enter namespaces and what they become, containers, the
/// program fusermount3, and the mount helper, which runs itself in the background. Tests may start others.
const STARTERS: &[&str] = &[
    "helper/spawn.rs",
    "helper/enter.rs",
    "rootless/mod.rs",
    "container/start.rs",
    "sys/namespace.rs",
    "sys/fuse.rs",
    "bin/stratafs-fuse/main.rs",
];

const MAX_LINES: usize = 600;

/// Names that say nothing of what is in a file or folder.
const EMPTY_NAMES: &[&str] = &["util", "utils", "helpers", "common", "misc"];

#[test]
fn the_source_keeps_the_house_rules() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    assert!(files.len() > 5, "found the source: {files:?}");
    let exports = exports(&fs::read_to_string(src.join("lib.rs")).unwrap());
    let mut report = String::new();
    for path in &files {
        let text = fs::read_to_string(path).unwrap();
        let name = path.strip_prefix(&src).unwrap().to_str().unwrap();
        for fault in faults(name, &text, &exports) {
            writeln!(report, "src/{name}:{fault}").unwrap();
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// What is wrong in the file `name`, relative to `src/`, each with its line.
fn faults(name: &str, text: &str, exports: &BTreeMap<String, String>) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.starts_with("//!") {
        faults.push("1: begin with a `//!` head: what the file is for, and its invariants".into());
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        faults.push(format!("{lines}: over {MAX_LINES} lines: part it by its ideas"));
    }
    let parts = || name.trim_end_matches(".rs").split('/');
    if let Some(part) = parts().find(|part| EMPTY_NAMES.contains(part)) {
        faults.push(format!("1: {part:?} says nothing: name it for its idea"));
    }

    let tokens = tokens(text);
    let paths = paths(&tokens);
    for Use { line, path } in outside(&tokens, &paths) {
        let found = ROOMS.iter().find(|(what, _)| *what == path[0]);
        if let Some((what, room)) = found
            && !name.starts_with(room)
            && !(name == "error.rs" && is_errno(&path))
        {
            faults.push(format!("{line}: {what:?} belongs in src/{room} alone"));
        }
    }

    for Use { line, path } in outside(&tokens, &paths) {
        let starts = path.windows(2).any(|pair| pair == ["process", "Command"]);
        if starts && !name.ends_with("tests.rs") && !STARTERS.contains(&name) {
            faults.push(format!("{line}: processes are started in {STARTERS:?} alone"));
        }
    }

    // The root names every module; a binary is a crate of its own.
    let mut module: Vec<&str> = parts().collect();
    let own = module[0].to_owned();
    if own == "lib" || own == "bin" {
        return faults;
    }
    let Some(own_tier) = tier(&own) else {
        faults.push(format!(
            "1: module {own:?} has no tier: add it to TIERS in tests/architecture.rs, and to \
             the tree in the design"
        ));
        return faults;
    };
    if module.last() == Some(&"mod") {
        module.pop();
    }
    for (line, target) in inside(&paths, &module) {
        let target = exports.get(&target).cloned().unwrap_or(target);
        let Some(target_tier) = tier(&target) else {
            faults.push(format!(
                "{line}: `crate::{target}` is neither a module with a tier nor a name that \
                 lib.rs exports: add a new module to TIERS in tests/architecture.rs"
            ));
            continue;
        };
        let neighbours = own_tier == target_tier && FILE_TIERS.contains(&own_tier);
        if target != own && target_tier >= own_tier && !neighbours {
            faults.push(format!(
                "{line}: {own} (tier {own_tier}) uses {target} (tier {target_tier}): imports \
                 point down only"
            ));
        }
    }
    faults
}

fn tier(module: &str) -> Option<u8> {
    let found = TIERS.iter().find(|(name, _)| *name == module);
    found.map(|(_, tier)| *tier)
}

/// `libc::E...`
fn is_errno(path: &[String]) -> bool {
    matches!(path, [root, name] if root == "libc"
        && name.starts_with('E')
        && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit()))
}

// Tokens: identifiers, `::`, and single characters; comments, strings, characters and lifetimes
// are left out.

#[derive(Clone, Debug, PartialEq)]
struct Token {
    line: usize,
    text: String,
}

fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c == '_' || c.is_alphanumeric();
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut i = 0;
    while i < chars.len() {
        let start = i;
        let mut text = None;
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                while i < chars.len() {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            '"' => i = string_end(&chars, i),
            '\'' if at(i + 1) == '\\' => {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            '\'' if at(i + 2) == '\'' => i += 3,
            // A lifetime: the word goes with it.
            '\'' => {
                i += 1;
                while is_word(at(i)) {
                    i += 1;
                }
            }
            c if is_word(c) => {
                while is_word(at(i)) {
                    i += 1;
                }
                let word: String = chars[start..i].iter().collect();
                let raw = matches!(word.as_str(), "r" | "br" | "cr");
                let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
                if raw && at(i + hashes) == '"' {
                    i = raw_string_end(&chars, i + hashes + 1, hashes);
                } else if raw && hashes == 1 {
                    // A raw identifier: its word is the next token.
                    i += 1;
                } else {
                    // The b of b"..." and b'.' stays behind as a word, which harms nothing.
                    text = Some(word);
                }
            }
            ':' if at(i + 1) == ':' => {
                i += 2;
                text = Some("::".to_owned());
            }
            c => {
                i += 1;
                text = (!c.is_whitespace()).then(|| c.to_string());
            }
        }
        let end = i.min(chars.len());
        tokens.extend(text.map(|text| Token { line, text }));
        line += chars[start..end].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

fn string_end(chars: &[char], quote: usize) -> usize {
    let mut i = quote + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn raw_string_end(chars: &[char], mut i: usize, hashes: usize) -> usize {
    while i < chars.len() {
        let closes = chars[i] == '"' && chars[i + 1..].iter().take(hashes).all(|c| *c == '#');
        i += 1;
        if closes {
            return i + hashes;
        }
    }
    i
}

// Paths: every `a::b::c` of the source, and every leaf of a `use` tree written out.

#[derive(Clone, Debug, PartialEq)]
struct Use {
    line: usize,
    path: Vec<String>,
}

/// A path and where it stands.
struct Placed {
    used: Use,
    /// In a `use` or `extern crate`, so that a single name is a crate, too.
    imported: bool,
    /// How many inline modules (`mod tests { .. }`) it is in.
    inline: usize,
}

fn paths(tokens: &[Token]) -> Vec<Placed> {
    let mut found = Vec::new();
    let mut depth = 0;
    let mut modules: Vec<usize> = Vec::new();
    let word = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let mut i = 0;
    while i < tokens.len() {
        let mut uses = Vec::new();
        let mut imported = false;
        match (word(i), word(i + 1)) {
            ("{", _) => {
                depth += 1;
                if i >= 2 && word(i - 2) == "mod" {
                    modules.push(depth);
                }
                i += 1;
            }
            ("}", _) => {
                modules.pop_if(|opened| *opened == depth);
                depth -= 1;
                i += 1;
            }
            // The `use<'a>` of an `impl` type imports nothing.
            ("use", next) if next != "<" => {
                imported = true;
                i = use_tree(tokens, i + 1, &[], &mut uses);
            }
            ("extern", "crate") => {
                imported = true;
                i = use_tree(tokens, i + 2, &[], &mut uses);
            }
            (w, _) if is_identifier(w) || w == "::" => i = use_tree(tokens, i, &[], &mut uses),
            _ => i += 1,
        }
        let inline = modules.len();
        found.extend(uses.into_iter().map(|used| Placed { used, imported, inline }));
    }
    found
}

fn is_identifier(word: &str) -> bool {
    word.starts_with(|c: char| c == '_' || c.is_alphabetic())
}

/// Reads a use tree, or a plain path, from `i`; gives where it ends.
fn use_tree(tokens: &[Token], mut i: usize, prefix: &[String], found: &mut Vec<Use>) -> usize {
    let word = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let mut path = prefix.to_vec();
    let line = tokens.get(i).map_or(0, |t| t.line);
    if word(i) == "::" {
        i += 1;
    }
    loop {
        match word(i) {
            "{" => {
                i += 1;
                while !matches!(word(i), "}" | "") {
                    let before = i;
                    i = use_tree(tokens, i, &path, found);
                    if word(i) == "as" {
                        i += 2;
                    }
                    if word(i) == "," || i == before {
                        i += 1;
                    }
                }
                return i + 1;
            }
            "*" => {
                path.push("*".to_owned());
                i += 1;
            }
            w if is_identifier(w) => {
                path.push(w.to_owned());
                i += 1;
            }
            _ => {}
        }
        if word(i) != "::"
            || !(word(i + 1) == "{" || word(i + 1) == "*" || is_identifier(word(i + 1)))
        {
            break;
        }
        i += 1;
    }
    found.push(Use { line, path });
    i
}

/// The paths that may lead to another crate, and each `unsafe`.
fn outside(tokens: &[Token], paths: &[Placed]) -> Vec<Use> {
    let crates = paths.iter().filter(|p| p.imported || p.used.path.len() > 1);
    let crates = crates.map(|placed| placed.used.clone());
    let keyword = tokens.iter().filter(|token| token.text == "unsafe");
    let keyword = keyword.map(|token| Use { line: token.line, path: vec![token.text.clone()] });
    let mut all: Vec<Use> = crates.chain(keyword).collect();
    all.sort_by_key(|used| used.line);
    all
}

/// The lines and names, in the crate root, of what paths by `crate::` and `super::` lead to.
fn inside(paths: &[Placed], module: &[&str]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for Placed { used, inline, .. } in paths {
        let supers = used.path.iter().take_while(|part| *part == "super").count();
        let from_root = match used.path[..] {
            [ref first, ..] if first == "crate" => 1,
            _ if supers > 0 && supers == module.len() + inline => supers,
            _ => continue,
        };
        if let Some(name) = used.path.get(from_root) {
            found.push((used.line, name.clone()));
        }
    }
    found
}

/// What `lib.rs` exports, and from which module.
fn exports(lib: &str) -> BTreeMap<String, String> {
    let exported = paths(&tokens(lib)).into_iter().map(|placed| placed.used.path);
    exported
        .filter(|path| path.len() > 1 && tier(&path[0]).is_some())
        .map(|path| (path[path.len() - 1].clone(), path[0].clone()))
        .collect()
}

// The check itself can fail.

fn check(name: &str, text: &str) -> Vec<String> {
    let lib = "pub use path::{Name, RelPath}; pub use store::Store;";
    faults(name, &format!("//! head\n{text}"), &exports(lib))
}

#[test]
fn imports_upward_and_sideways_are_found() {
    for (name, text) in [
        ("layer/marks.rs", "use crate::store::Store;"),
        ("layer/marks.rs", "use crate::{error::Error, Store};"),
        ("layer/marks.rs", "fn f() -> crate::Store { x }"),
        ("layer/mod.rs", "use super::store::Store;"),
        ("layer/marks.rs", "use super::super::store;"),
        ("layer/marks.rs", "mod tests { use super::super::super::store; }"),
        ("changes/walk.rs", "use crate::{\n  error::{Error, Result},\n  archive as tar};"),
        ("changes/walk.rs", "pub(in crate::archive) fn f() {}"),
        ("error.rs", "use crate::sys::dir;"),
        ("digest.rs", "fn f() { crate::image::f(b'\"', '\\'', \"\\\"\", r#\"\"\"#) }"),
        ("store/gc.rs", "macro_rules! m { () => { $crate::image::f() } }"),
    ] {
        let faults = check(name, text);
        assert_eq!(faults.len(), 1, "{name}: {text}: {faults:?}");
        assert!(faults[0].contains("point down only"), "{faults:?}");
    }
}

#[test]
fn imports_downward_and_within_the_folder_are_not() {
    for (name, text) in [
        ("store/gc.rs", "use crate::{error::*, sys::dir::{self, Dir}, Name, RelPath as P};"),
        ("store/gc.rs", "use super::lock; use self::x; use crate::store::diff;"),
        ("store/mount/mod.rs", "use super::super::layer; mod tests { use super::*; }"),
        ("digest.rs", "use crate::error::{Error}; use super::path;"),
        ("idmap.rs", "use crate::compression::Stat;"),
        ("error.rs", "/// [`crate::store`]\n/* /* crate::store */ crate::image */ // crate::store"),
        ("error.rs", "fn f<'a>(x: &'a str) { g(\"crate::store\", r##\"\"# crate::store\"##) }"),
        ("bin/stratafs/main.rs", "use crate::args; use stratafs::Store;"),
        ("fuzzing.rs", "use crate::store::Filter;"),
        ("path.rs", "pub(crate) fn f() -> impl Fn() + use<'a> { x }"),
    ] {
        assert_eq!(check(name, text), Vec::<String>::new(), "{name}: {text}");
    }
}

#[test]
fn what_leaves_its_room_is_found() {
    for (name, text, lines) in [
        ("store/gc.rs", "use rustix::fs;\nuse ::nix;\nfn f() { libc::sync() }", &[2, 3, 4][..]),
        ("store/gc.rs", "unsafe fn f() {}\nuse {std::io, libc::c_int};", &[2, 3]),
        ("store/gc.rs", "use fuser as f;\nextern crate rusqlite;\n", &[2, 3]),
        ("fuse/session.rs", "use fuser::Session; use rustix::fs;", &[2]),
        ("store/metadata/rows.rs", "use rusqlite::Row;", &[]),
        ("store/metadata.rs", "use rusqlite::Row;", &[]),
        ("sys/mount.rs", "use rustix::mount; fn f() { unsafe { libc::sync() } }", &[]),
        ("error.rs", "fn f() -> i32 { libc::ENOENT }", &[]),
        ("error.rs", "fn f() { libc::getpid() }", &[2]),
        ("driver/union.rs", "use std::process::{Child, Command};", &[2]),
        ("store/gc.rs", "use std::process; fn f() { process::Command::new(x) }", &[2]),
        ("helper/spawn.rs", "use std::process::{Child, Command};", &[]),
        ("path.rs", "#![deny(unsafe_code)] fn nix() { x.nix(); a::nix::b }", &[]),
    ] {
        let found = check(name, text);
        let expected: Vec<String> = lines.iter().map(|line| format!("{line}: ")).collect();
        let right = found.len() == lines.len()
            && found.iter().zip(&expected).all(|(f, e)| f.starts_with(e) && f.contains("alone"));
        assert!(right, "{name}: {text}: {found:?}");
    }
}

#[test]
fn unknown_modules_names_heads_and_length_are_found() {
    let one = |faults: Vec<String>, what: &str| {
        assert!(matches!(&faults[..], [fault] if fault.contains(what)), "{faults:?}");
    };
    one(check("quota/mod.rs", ""), "add it to TIERS");
    one(check("store/gc.rs", "use crate::quota::Q;"), "add a new module to TIERS");
    one(check("store/gc.rs", "use crate::*;"), "neither a module");
    one(check("store/utils.rs", ""), "says nothing");
    one(check("store/common/lock.rs", ""), "says nothing");
    one(check("store/gc.rs", &"\n".repeat(600)), "over 600 lines");
    one(faults("path.rs", "use std::io;", &BTreeMap::new()), "head");
    assert!(check("helper/protocol.rs", &"\n".repeat(599)).is_empty());
}
