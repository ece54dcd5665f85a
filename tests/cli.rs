//! The command line tool, as its users see it: exit codes, what is on which stream, what is left
//! behind. It is built with the feature `cli` alone.
//!
//! Only what mounts needs root; the stores are of whichever format this user gets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/layout.rs"]
mod layout;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_stratafs");

fn main() {
    let arguments = Arguments::from_args();
    // Owned by this very user, unlike /proc/self, which is root's when it may not be traced.
    let root = fs::metadata(tempfile::tempdir().unwrap().path()).unwrap().uid() == 0;
    let mut trials = vec![
        trial("help_and_version_are_no_failures", help_and_version_are_no_failures),
        trial("the_readme_has_the_exit_codes_of_the_help", readme_has_the_exit_codes),
        trial("a_wrong_command_line_is_exit_code_2", a_wrong_command_line),
        trial("what_is_not_there_is_exit_code_4_and_named", what_is_not_there),
        trial("without_a_store_only_writers_make_one", only_writers_make_a_store),
        trial("a_name_that_is_taken_is_exit_code_5", a_name_that_is_taken),
        trial("a_wrong_state_is_exit_code_6", a_wrong_state),
        trial("json_is_one_value_and_errors_are_objects", json_is_one_value),
        trial("snapshots_from_archive_to_archive", from_archive_to_archive),
        trial("diff_gives_names_in_their_bytes", diff_gives_bytes),
        trial("garbage_is_exit_code_3_and_leaves_nothing", garbage_leaves_nothing),
        trial("layer_apply_deletes_in_a_tree_and_marks_in_a_layer", layer_apply),
        trial("layer_diff_makes_one_tree_from_another", layer_diff),
        trial("diff_and_export_against_any_snapshot", against_any_snapshot),
        trial("images_in_and_out_by_file_directory_and_pipe", images_in_and_out),
        trial("an_image_with_its_blobs_kept_is_saved_as_it_came", an_image_saved_as_it_came),
        trial("an_images_name_stands_for_its_top_layer", an_images_name),
        trial("a_reader_that_goes_away_is_no_panic", a_reader_that_goes),
        trial("a_failed_export_leaves_the_old_file", a_failed_export),
        trial("a_signal_rolls_an_apply_back", a_signal_rolls_back),
        trial("a_signal_ends_waiting_for_a_silent_pipe", a_signal_while_waiting),
        trial("a_second_signal_ends_what_cannot_be_rolled_back", a_second_signal),
        trial("an_ignored_signal_stays_ignored", an_ignored_signal),
        trial("a_signal_ends_waiting_for_a_named_pipe", a_signal_at_a_named_pipe),
        trial("damage_is_found_by_check", damage_is_found),
        trial("a_copy_is_used_where_it_is", a_copy_in_place),
        trial("a_store_that_lost_its_metadata_is_not_an_empty_one", lost_metadata),
        trial("an_input_that_cannot_be_a_layer_is_named", inputs_are_named),
        trial("foreign_layers_are_adopted_and_told_of", foreign_layers),
        trial("settle_makes_a_layer_stand_on_its_own", settle),
    ];
    // As root it would be the machine's own store.
    let reason = if root { "not for root" } else { "" };
    trials.push(
        trial("the_default_root_is_the_users", the_default_root)
            .with_kind(reason)
            .with_ignored_flag(root),
    );
    let reason = if root { "" } else { "needs root" };
    trials.push(
        trial("mounts_until_umount", mounts_until_umount)
            .with_kind(reason)
            .with_ignored_flag(!root),
    );
    trials.push(
        trial("mounts_show_other_ids", mounts_show_other_ids)
            .with_kind(reason)
            .with_ignored_flag(!root),
    );
    let reason = no_fuse().unwrap_or_default();
    trials.push(
        trial("mounts_over_fuse_outlive_the_command", mounts_over_fuse)
            .with_kind(reason)
            .with_ignored_flag(!reason.is_empty()),
    );
    let reason = if root { "not for root" } else { "" };
    trials.push(
        trial("a_mount_without_the_right_is_exit_code_7", a_mount_without_the_right)
            .with_kind(reason)
            .with_ignored_flag(root),
    );
    trials.push(
        trial("a_read_only_store_is_refused_as_such", a_read_only_store)
            .with_kind(reason)
            .with_ignored_flag(!root),
    );
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: &str, test: fn()) -> Trial {
    Trial::test(name, move || {
        test();
        Ok::<(), Failed>(())
    })
}

fn settle() {
    let fixture = Fixture::new();
    fixture.ok(&["prepare", "a"]);
    assert!(fixture.ok(&["settle", "a"]).ends_with(", 1 inodes\n"));
    let usage: Value = serde_json::from_str(&fixture.ok(&["--json", "settle", "a"])).unwrap();
    assert_eq!(usage["inodes"], 1);

    // A layer in a directory, from which a lower one was renamed.
    for dir in ["lower/d", "upper/e", "work"] {
        fs::create_dir_all(fixture.path(dir)).unwrap();
    }
    fixture.file("lower/d/file", b"text");
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(fixture.path("upper/e"), "user.overlay.redirect", b"/d", flags).unwrap();
    let mut command = vec!["settle", "--lower", "lower", "--upper", "upper", "--work", "work"];
    command.extend(["--format", "overlay-user"]);
    if cfg!(not(feature = "fuse")) {
        fixture.run(&command).fails(2, &["feature", "fuse"]);
        return;
    }
    fixture.run(&[&command[..], &["--lower", "nothing"]].concat()).fails(4, &["nothing"]);
    let out = fixture.ok(&command);
    assert_eq!(out, "1 renamed directories, 0 files without data, 1 entries copied, 4 B\n");
    assert_eq!(fs::read(fixture.path("upper/e/file")).unwrap(), b"text");
    command.insert(0, "--json");
    let settled: Value = serde_json::from_str(&fixture.ok(&command)).unwrap();
    assert_eq!(settled, serde_json::json!({"directories": 0, "files": 0, "copied": 0, "bytes": 0}));
}

// --- the program -------------------------------------------------------------------------------

/// A directory with a store in it, or not yet.
struct Fixture(TempDir);

impl Fixture {
    /// Not in /tmp, which may be a tmpfs without user xattrs.
    fn new() -> Fixture {
        Fixture(tempfile::tempdir_in("/var/tmp").unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--root").arg(self.path("store")).args(arguments);
        // Files are named relative to the fixture.
        command.current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Run {
        Run::of(&mut self.command(arguments))
    }

    /// Runs it, and gives what it prints.
    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        self.run(arguments).ok()
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        let out = self.ok(&[&["--json"], arguments].concat());
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e} in {out}"))
    }

    fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Run {
        let mut command = self.command(arguments);
        let mut child = piped(&mut command);
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        // The program may end without having read it all.
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let run = Run::from(child.wait_with_output().unwrap());
        drop(writer.join().unwrap());
        run
    }

    fn file(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn names(&self, dir: &str) -> Vec<OsString> {
        let entries = fs::read_dir(self.path(dir)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    /// Nothing unfinished is in the store, and nothing is damaged.
    #[track_caller]
    fn is_clean(&self) {
        assert_eq!(self.names("store/staging"), [""; 0], "staging");
        assert_eq!(self.names("store/trash"), [""; 0], "trash");
        self.ok(&["check"]);
        assert_eq!(self.ok(&["gc"]), "", "nothing to free");
    }
}

fn piped(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

struct Run {
    code: Option<i32>,
    out: Vec<u8>,
    err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Run {
        assert_eq!(output.status.signal(), None, "{output:?}");
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(!err.contains("panicked"), "{err}");
        Run { code: output.status.code(), out: output.stdout, err }
    }
}

impl Run {
    fn of(command: &mut Command) -> Run {
        command.output().unwrap().into()
    }

    #[track_caller]
    fn ok(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""));
        String::from_utf8(self.out).unwrap()
    }

    /// It failed with this code, said so in one line that has these words, and printed nothing else.
    #[track_caller]
    fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}", self.err);
        assert_eq!(self.err.lines().count(), 1, "{}", self.err);
        assert!(self.err.starts_with("stratafs: "), "{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "{word} in {}", self.err);
        }
        assert_eq!(String::from_utf8_lossy(&self.out), "");
    }

    /// clap's refusals are longer than a line.
    #[track_caller]
    fn is_refused(&self, words: &[&str]) {
        assert_eq!(self.code, Some(2), "{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "{word} in {}", self.err);
        }
        assert_eq!(String::from_utf8_lossy(&self.out), "");
    }
}

// --- archives and images -----------------------------------------------------------------------

/// An archive of the user's own files; a path that ends in a slash is a directory.
fn archive(entries: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, contents) in entries {
        let mut header = tar::Header::new_gnu();
        if path.ends_with(b"/") {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
        } else {
            header.set_mode(0o644);
        }
        header.set_size(contents.len() as u64);
        archive.append_data(&mut header, OsStr::from_bytes(path), *contents).unwrap();
    }
    archive.into_inner().unwrap()
}

fn base() -> Vec<u8> {
    archive(&[(b"etc/", b""), (b"etc/motd", b"base"), (b"etc/old", b"old")])
}

fn app() -> Vec<u8> {
    archive(&[(b"app", b"new"), (b"etc/motd", b"app"), (b"etc/.wh.old", b"")])
}

/// A tar file with an image of these layers.
fn image(path: &Path, name: Option<&str>, layers: &[Vec<u8>]) {
    let mut layout = stratafs::LayoutWriter::to_tar_file(path, path.parent().unwrap()).unwrap();
    let mut blob = |media: &str, bytes: &[u8]| layout::blob(&mut layout, media, bytes);
    let layers: Vec<Value> = layers.iter().map(|layer| blob("layer.v1.tar", layer)).collect();
    let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
    let host = stratafs::Platform::host();
    let config = serde_json::json!({
        "architecture": host.architecture(), "os": host.os(),
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "layers": layers,
        "config": blob("config.v1+json", config.as_bytes()),
    })
    .to_string();
    layout.add_image(manifest.as_bytes(), config.as_bytes(), name).unwrap();
    layout.finish(&mut stratafs::ignore_progress).unwrap();
}

// --- the command line --------------------------------------------------------------------------

fn help_and_version_are_no_failures() {
    let fixture = Fixture::new();
    assert!(fixture.ok(&["--version"]).starts_with("stratafs "));
    let help = fixture.ok(&["--help"]);
    assert!(help.contains("Exit codes:"), "{help}");
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands: Vec<&str> = commands
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(commands.len() > 15, "{commands:?}");
    for command in commands.into_iter().filter(|name| !["help", "layer"].contains(name)) {
        let help = fixture.ok(&[command, "--help"]);
        assert!(help.contains("Examples:"), "{help}");
    }
}

fn readme_has_the_exit_codes() {
    let help = Fixture::new().ok(&["--help"]);
    let codes: Vec<(&str, &str)> = help
        .lines()
        .skip_while(|line| *line != "Exit codes:")
        .filter_map(|line| line.trim().split_once("  "))
        .filter(|(code, _)| code.parse::<u8>().is_ok())
        .collect();
    assert_eq!(codes.len(), 11, "{codes:?}");
    let readme =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    for (code, meaning) in codes {
        let row = format!("| {code} | {meaning} |");
        assert!(readme.contains(&row), "missing in the README: {row}");
    }
}

fn a_wrong_command_line() {
    let fixture = Fixture::new();
    fixture.run(&[]).is_refused(&["Usage:"]);
    fixture.run(&["unpack"]).is_refused(&["unpack"]);
    fixture.run(&["ls", "--filter", "name=base"]).is_refused(&["name=base"]);
    fixture.run(&["prepare", "a", "--label", "novalue"]).is_refused(&["novalue", "KEY=VALUE"]);
    fixture.run(&["import", "x", "--platform", "linux"]).is_refused(&["linux", "--platform"]);
    fixture.run(&["save", "x", "-o", "f", "--compress", "lz4"]).is_refused(&["lz4"]);
    fixture.run(&["--driver", "aufs", "info"]).is_refused(&["aufs"]);
    fixture.run(&["layer"]).is_refused(&["Usage:"]);
    for command in [
        "import", "save", "apply", "prepare", "view", "mounts", "mount", "umount", "commit",
        "diff", "stat", "usage", "rm", "export",
    ] {
        fixture.run(&[command]).is_refused(&["required"]);
    }
    fixture.run(&["settle"]).is_refused(&["required", "KEY"]);
    fixture.run(&["settle", "--upper", "u", "--work", "w"]).is_refused(&["--lower"]);
    fixture.run(&["settle", "--upper", "u", "--lower", "l"]).is_refused(&["--work"]);
    fixture.run(&["settle", "a", "--lower", "l"]).is_refused(&["--upper"]);
    let all = ["settle", "--lower", "l", "--upper", "u", "--work", "w", "--format", "zfs"];
    fixture.run(&all).is_refused(&["zfs", "overlay-user"]);
    let not_utf8 = OsStr::from_bytes(b"k\xff");
    let refused = Run::of(fixture.command(&["prepare"]).arg(not_utf8));
    refused.is_refused(&["UTF-8"]);
    assert!(!fixture.path("store").exists());

    fixture.run(&["prepare", "a/../b"]).fails(2, &["a/../b"]);
    fixture.run(&["prepare", ""]).fails(2, &["\"\""]);
    fixture.run(&["export", "a", "--json"]).fails_with_object("usage", 2, "-o");
}

fn what_is_not_there() {
    let fixture = Fixture::new();
    fixture.ok(&["prepare", "a"]);
    fixture.file("f", b"");
    for arguments in [
        &["mounts", "nobody"][..],
        &["mount", "nobody", "."],
        &["settle", "nobody"],
        &["commit", "name", "nobody"],
        &["commit", "name", "a", "--parent", "nobody"],
        &["prepare", "b", "nobody"],
        &["view", "b", "nobody"],
        &["diff", "nobody"],
        &["stat", "nobody"],
        &["usage", "nobody"],
        &["rm", "nobody"],
        &["export", "nobody", "-o", "out"],
        &["save", "nobody", "-o", "out"],
        &["apply", "b", "nobody"],
        &["import", "nobody"],
        &["umount", "nobody"],
        &["layer", "apply", "nobody"],
    ] {
        fixture.run(arguments).fails(4, &["nobody"]);
    }
    fixture.run_with_input(&["apply", "b", "--parent", "nobody"], &base()).fails(4, &["nobody"]);
    assert_eq!(fixture.names("."), ["f", "store"], "no output was made");
    assert_eq!(fixture.json(&["ls"])["snapshots"].as_array().unwrap().len(), 1);
    fixture.is_clean();
}

fn only_writers_make_a_store() {
    let fixture = Fixture::new();
    let root = fixture.path("store");
    for arguments in [
        &["ls"][..],
        &["check"],
        &["gc"],
        &["stat", "a"],
        &["usage", "a"],
        &["rm", "a"],
        &["mounts", "a"],
        &["diff", "a"],
        &["commit", "b", "a"],
        &["export", "a"],
        &["save", "a", "-o", "out"],
    ] {
        fixture.run(arguments).fails(4, &[root.to_str().unwrap()]);
    }
    let info = fixture.json(&["info"]);
    assert_eq!(info["format"], Value::Null);
    assert_eq!(info["root"]["path"], root.to_str().unwrap());
    assert_eq!(fixture.names("."), [""; 0]);

    fixture.ok(&["prepare", "a"]);
    let info = fixture.json(&["info"]);
    assert!(info["format"].as_str().unwrap().starts_with("overlay-"), "{info}");
    let drivers = info["drivers"].as_array().unwrap();
    let names: Vec<_> = drivers.iter().map(|driver| driver["driver"].as_str().unwrap()).collect();
    // The kernel's overlayfs does not read owners in xattrs, which an ordinary user's store has.
    let in_xattrs = info["owners"] == "in-xattrs";
    assert_eq!(in_xattrs, !rustix::process::geteuid().is_root());
    assert_eq!(names, if in_xattrs { &["fuse", "copy"][..] } else { &["overlay", "fuse", "copy"] });
    for feature in drivers.iter().flat_map(|driver| driver["features"].as_array().unwrap()) {
        assert!(feature["reason"].is_string() && feature["available"].is_boolean(), "{feature}");
    }
    // By copies it works for everybody.
    assert_eq!(drivers.last().unwrap()["mount"]["available"], true);
    let info = fixture.json(&["--driver", "copy", "info"]);
    assert_eq!(info["drivers"].as_array().unwrap().len(), 1);
}

fn a_name_that_is_taken() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "taken"], &base()).ok();
    fixture.ok(&["prepare", "a"]);
    fixture.run(&["prepare", "taken"]).fails(5, &["taken"]);
    fixture.run(&["view", "taken", "taken"]).fails(5, &["taken"]);
    fixture.run(&["commit", "taken", "a"]).fails(5, &["taken"]);
    fixture.run_with_input(&["apply", "taken"], &app()).fails(5, &["taken"]);
    fs::create_dir(fixture.path("full")).unwrap();
    fixture.file("full/f", b"");
    fixture.run(&["save", "taken", "-o", "full"]).fails(5, &["full"]);
    fixture.is_clean();
}

fn a_wrong_state() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    fixture.ok(&["prepare", "a", "base"]);
    fixture.run(&["rm", "base"]).fails(6, &["base"]);
    fixture.run(&["mounts", "base"]).fails(6, &["base"]);
    fixture.run(&["settle", "base"]).fails(6, &["base"]);
    fixture.run(&["commit", "b", "base"]).fails(6, &["base"]);
    fixture.run(&["save", "a", "-o", "out"]).fails(6, &["\"a\""]);
    // What went before the one that could not be removed is told.
    fixture.ok(&["prepare", "b"]);
    let run = fixture.run(&["rm", "b", "base", "a"]);
    assert_eq!((run.code, run.out.as_slice()), (Some(6), &b"b\n"[..]));
    fixture.ok(&["stat", "a"]);
}

impl Run {
    /// It failed with this code, and an object on stderr.
    #[track_caller]
    fn fails_with_object(&self, kind: &str, code: i32, word: &str) {
        assert_eq!(self.code, Some(code), "{}", self.err);
        let object: Value = serde_json::from_str(&self.err).unwrap();
        assert_eq!(object["error"]["kind"], kind, "{object}");
        assert!(object["error"]["message"].as_str().unwrap().contains(word), "{object}");
    }
}

fn json_is_one_value() {
    let fixture = Fixture::new();
    fixture.file("base.tar", &base());
    let applied = fixture.json(&["apply", "base", "base.tar", "--label", "k=v=w"]);
    assert_eq!(applied["entries"], 3);
    let prepared = fixture.json(&["prepare", "a", "base"]);
    assert_eq!((&prepared["kind"], &prepared["parent"]), (&"active".into(), &"base".into()));
    assert_eq!(fixture.json(&["view", "v", "base"])["kind"], "view");
    let engine =
        if rustix::process::geteuid().is_root() { "overlay" } else { "fuse.stratafs-fuse" };
    assert_eq!(fixture.json(&["mounts", "a"])[0]["type"], engine);
    assert_eq!(fixture.json(&["diff", "a"]), serde_json::json!([]));
    let committed = fixture.json(&["commit", "done", "a", "--label", "k=v"]);
    assert_eq!((&committed["kind"], &committed["labels"]["k"]), (&"committed".into(), &"v".into()));
    let stat = fixture.json(&["stat", "base"]);
    assert_eq!(stat["labels"]["k"], "v=w");
    assert_eq!(stat["diff_id"], applied["diff_id"]);
    let created = stat["created"].as_str().unwrap();
    assert!(created.starts_with("20") && created.ends_with('Z'), "{created}");
    assert_eq!(fixture.json(&["usage", "base"]), stat["usage"]);
    assert_eq!(fixture.json(&["export", "base", "-o", "out.tar"])["entries"], 3);
    let canonical = fixture.json(&["export", "base", "-o", "out.tar", "--canonical"]);
    assert_eq!(canonical["entries"], 4, "and the root");
    let saved = fixture.json(&["save", "base", "-o", "image.tar"]);
    let imported = fixture.json(&["import", "image.tar", "--name", "image"]);
    assert_eq!(imported["manifest"], saved["manifest"]);
    assert_eq!(fixture.json(&["stat", "image"]), imported);
    let filtered = fixture.json(&["ls", "--filter", "kind==view"]);
    assert_eq!(filtered["snapshots"][0]["key"], "v");
    assert_eq!(filtered["images"], serde_json::json!([]));
    assert_eq!(fixture.json(&["ls"])["images"][0], imported);
    assert_eq!(fixture.json(&["gc"])["staging"], 0);
    assert_eq!(fixture.json(&["check"])["problems"], serde_json::json!([]));
    assert_eq!(fixture.json(&["rm", "v"])["removed"], serde_json::json!(["v"]));
    fs::create_dir(fixture.path("tree")).unwrap();
    let run = fixture.run_with_input(&["--json", "layer", "apply", "tree"], &base());
    let unpacked: Value = serde_json::from_str(&run.ok()).unwrap();
    assert_eq!(unpacked["diff_id"], applied["diff_id"]);

    fixture.run(&["--json", "stat", "x"]).fails_with_object("not-found", 4, "\"x\"");
    fixture.run(&["stat", "--json"]).fails_with_object("usage", 2, "required");
}

// --- layers ------------------------------------------------------------------------------------

fn from_archive_to_archive() {
    let fixture = Fixture::new();
    let mut gzip = Command::new("gzip");
    gzip.arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut gzip = gzip.spawn().unwrap();
    gzip.stdin.take().unwrap().write_all(&base()).unwrap();
    let compressed = gzip.wait_with_output().unwrap().stdout;
    fixture.run_with_input(&["apply", "base"], &compressed).ok();
    fixture.run_with_input(&["apply", "app", "--parent", "base", "-"], &app()).ok();
    assert_eq!(fixture.ok(&["diff", "app"]), "A /app\nM /etc/motd\nD /etc/old\n");

    let piped = fixture.run(&["export", "app"]);
    assert_eq!((piped.code, piped.err.as_str()), (Some(0), ""));
    fixture.ok(&["export", "app", "-o", "app.tar"]);
    assert!(piped.out == fs::read(fixture.path("app.tar")).unwrap());
    fixture.ok(&["apply", "again", "--parent", "base", "app.tar"]);
    assert_eq!(fixture.ok(&["diff", "again"]), fixture.ok(&["diff", "app"]));
    assert_eq!(fixture.names("."), ["app.tar", "store"], "nothing temporary");

    let listing = fixture.ok(&["ls"]);
    let lines: Vec<&str> = listing.lines().collect();
    assert_eq!(lines.len(), 4, "{listing}");
    assert!(lines[0].starts_with("KIND"), "{listing}");
    assert_eq!(fixture.ok(&["rm", "again", "app", "base"]), "again\napp\nbase\n");
    fixture.is_clean();
}

fn diff_gives_bytes() {
    let fixture = Fixture::new();
    let odd: &[(&[u8], &[u8])] = &[(b"a b", b""), (b"line\nfeed", b""), (b"not utf8 \xff", b"")];
    fixture.run_with_input(&["apply", "odd"], &archive(odd)).ok();
    let text = fixture.run(&["diff", "odd"]);
    assert_eq!(text.out, b"A /a b\nA /line\nfeed\nA /not utf8 \xff\n");
    let null = fixture.run(&["diff", "--null", "odd"]);
    assert_eq!(null.out, b"A /a b\0A /line\nfeed\0A /not utf8 \xff\0");
    let json = fixture.json(&["diff", "odd"]);
    assert_eq!(json[0], serde_json::json!({ "kind": "A", "path": "/a b" }));
    let bytes: Vec<u8> = serde_json::from_value(json[2]["path_bytes"].clone()).unwrap();
    assert_eq!(OsString::from_vec(bytes), OsStr::from_bytes(b"/not utf8 \xff"));
}

fn garbage_leaves_nothing() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("tree")).unwrap();
    let before = fs::metadata(fixture.path("tree")).unwrap();
    let garbage = b"this is no archive at all\n".repeat(100);
    let truncated = &base()[..700];
    let escaping = archive_with_raw_name(b"../escaped");
    for (bad, what) in [(&garbage[..], "garbage"), (&escaping, ".."), (truncated, "truncated")] {
        fixture.run_with_input(&["apply", "bad"], bad).fails(3, &[]);
        fixture.is_clean();
        fixture.run_with_input(&["layer", "apply", "tree"], bad).fails(3, &[]);
        fixture.run_with_input(&["layer", "apply", "--overlay", "tree"], bad).fails(3, &[]);
        fixture.file("bad.tar", bad);
        fixture.run(&["import", "bad.tar"]).fails(3, &["bad.tar"]);
        if what != "truncated" {
            assert_eq!(fixture.names("tree"), [""; 0], "{what}");
        }
    }
    assert_eq!(fs::metadata(fixture.path("tree")).unwrap().mode(), before.mode());
    assert_eq!(fixture.names("."), ["bad.tar", "store", "tree"]);
    assert_eq!(fixture.json(&["ls"])["snapshots"], serde_json::json!([]));
}

/// The `tar` crate does not write such names.
fn archive_with_raw_name(name: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_mode(0o644);
    header.set_size(0);
    header.set_cksum();
    let mut archive = tar::Builder::new(Vec::new());
    archive.append(&header, io::empty()).unwrap();
    archive.into_inner().unwrap()
}

fn layer_apply() {
    let fixture = Fixture::new();
    for dir in ["tree", "below", "layer"] {
        fs::create_dir(fixture.path(dir)).unwrap();
    }
    fixture.run_with_input(&["layer", "apply", "tree"], &base()).ok();
    fixture.run_with_input(&["layer", "apply", "below"], &base()).ok();
    fixture.run_with_input(&["layer", "apply", "tree"], &app()).ok();
    assert_eq!(fixture.names("tree/etc"), ["motd"], "the whiteout deletes");
    assert_eq!(fs::read(fixture.path("tree/etc/motd")).unwrap(), b"app");

    fs::set_permissions(
        fixture.path("below/etc"),
        std::os::unix::fs::PermissionsExt::from_mode(0o750),
    )
    .unwrap();
    let overlay = &["layer", "apply", "--overlay", "--parent", "below", "layer"];
    fixture.run_with_input(overlay, &app()).ok();
    let mark = fs::symlink_metadata(fixture.path("layer/etc/old")).unwrap();
    assert_eq!((mark.mode() & 0o170_000, mark.rdev()), (0o020_000, 0), "a whiteout device");
    let made = fs::metadata(fixture.path("layer/etc")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o750, "the missing parent is as it is below");
    assert!(!fixture.path("store").exists());
}

fn layer_diff() {
    let fixture = Fixture::new();
    for dir in ["old", "new"] {
        fs::create_dir(fixture.path(dir)).unwrap();
        fixture.run_with_input(&["layer", "apply", dir], &base()).ok();
    }
    fixture.run_with_input(&["layer", "apply", "new"], &app()).ok();
    let listed = "A /app\nM /etc/motd\nD /etc/old\n";
    assert_eq!(fixture.ok(&["layer", "diff", "--list", "old", "new"]), listed);
    let null = fixture.ok(&["layer", "diff", "--list", "-0", "old", "new"]);
    assert_eq!(null, listed.replace('\n', "\0"));
    let json = fixture.json(&["layer", "diff", "--list", "old", "new"]);
    assert_eq!(json[2], serde_json::json!({ "kind": "D", "path": "/etc/old" }));

    let piped = fixture.run(&["layer", "diff", "old", "new"]);
    assert_eq!((piped.code, piped.err.as_str()), (Some(0), ""));
    fixture.ok(&["layer", "diff", "old", "new", "-o", "layer.tar"]);
    assert!(piped.out == fs::read(fixture.path("layer.tar")).unwrap());
    fixture.run_with_input(&["layer", "apply", "old"], &piped.out).ok();
    assert_eq!(fixture.ok(&["layer", "diff", "--list", "old", "new"]), "");

    fixture.run(&["--json", "layer", "diff", "old", "new"]).fails_with_object("usage", 2, "-o");
    fixture.run(&["layer", "diff", "old", "none"]).fails(4, &["none"]);
    fixture.file("new/.wh.x", b"");
    fixture.run(&["layer", "diff", "old", "new", "-o", "layer.tar"]).fails(6, &[".wh.x"]);
    assert!(piped.out == fs::read(fixture.path("layer.tar")).unwrap(), "the old file is kept");
    assert_eq!(fixture.names("."), ["layer.tar", "new", "old"]);
}

fn against_any_snapshot() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    fixture.run_with_input(&["apply", "app", "--parent", "base"], &app()).ok();
    let other = archive(&[(b"etc/motd", b"other"), (b"other", b"")]);
    fixture.run_with_input(&["apply", "other", "--parent", "base"], &other).ok();
    fixture.ok(&["prepare", "active", "other"]);
    let listed = "A /app\nM /etc/motd\nD /etc/old\nD /other\n";
    for from in ["other", "active"] {
        assert_eq!(fixture.ok(&["diff", "app", "--parent", from]), listed);
    }
    assert_eq!(fixture.ok(&["diff", "app", "--parent", "base"]), fixture.ok(&["diff", "app"]));
    assert_eq!(fixture.ok(&["diff", "app", "--parent", "app"]), "");
    let json = fixture.json(&["diff", "active", "--parent", "app"]);
    assert_eq!(json[0], serde_json::json!({ "kind": "D", "path": "/app" }));

    fixture.ok(&["export", "app", "--parent", "other", "-o", "layer.tar"]);
    fixture.ok(&["apply", "again", "--parent", "other", "layer.tar"]);
    assert_eq!(fixture.ok(&["diff", "again", "--parent", "app"]), "");
    fixture.run(&["diff", "app", "--parent", "nobody"]).fails(4, &["nobody"]);
    fixture.is_clean();
}

fn a_failed_export() {
    let fixture = Fixture::new();
    fixture.file("out.tar", b"old");
    // No archive can hold a file of this name.
    fixture.ok(&["prepare", "a"]);
    fs::write(fixture.path("store/snapshots/1/fs/.wh.gone"), "").unwrap();
    fixture.run(&["export", "a", "-o", "out.tar"]).fails(6, &[".wh.gone"]);
    assert_eq!(fs::read(fixture.path("out.tar")).unwrap(), b"old");
    assert_eq!(fixture.names("."), ["out.tar", "store"]);
    fixture.run(&["export", "a", "-o", "."]).fails(2, &["\".\""]);
    fixture.run(&["export", "a", "-o", "no/where"]).fails(4, &["no/where"]);
}

fn a_reader_that_goes() {
    let fixture = Fixture::new();
    let big = vec![7; 1 << 20];
    fixture.run_with_input(&["apply", "big"], &archive(&[(b"f", &big)])).ok();
    for arguments in [&["export", "big"][..], &["save", "big", "-o", "-", "--compress", "none"]] {
        let mut child = piped(&mut fixture.command(arguments));
        let mut first = [0; 512];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        let run = Run::from(child.wait_with_output().unwrap());
        assert_eq!((run.code, run.err.as_str()), (Some(141), ""), "{arguments:?}");
    }
    // Output that is written at once, when nobody has been there from the start.
    for arguments in [&["ls"][..], &["--help"], &["--json", "info"], &["diff", "big"]] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let run = Run::of(fixture.command(arguments).stdout(writer));
        // `output` pipes only what was not set.
        assert_eq!((run.code, run.err.as_str()), (Some(141), ""), "{arguments:?}");
    }
}

// --- images ------------------------------------------------------------------------------------

fn images_in_and_out() {
    let fixture = Fixture::new();
    image(&fixture.path("in.tar"), Some("name:tag"), &[base(), app()]);
    assert_eq!(fixture.ok(&["import", "in.tar"]), "name:tag\n");
    image(&fixture.path("nameless.oci.tar"), None, &[base()]);
    assert_eq!(fixture.ok(&["import", "nameless.oci.tar"]), "nameless.oci\n");
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zipped.write_all(&fs::read(fixture.path("nameless.oci.tar")).unwrap()).unwrap();
    fs::write(fixture.path("nameless.oci.tar.gz"), zipped.finish().unwrap()).unwrap();
    assert_eq!(fixture.ok(&["import", "nameless.oci.tar.gz"]), "nameless.oci\n");
    fs::remove_file(fixture.path("nameless.oci.tar.gz")).unwrap();
    assert_eq!(fixture.json(&["ls"])["snapshots"].as_array().unwrap().len(), 2, "shared");
    fixture.run(&["import", "in.tar", "--ref", "other"]).fails(4, &["other"]);
    fixture.run(&["import", "in.tar", "--platform", "plan9/z80"]).fails(4, &["plan9/z80"]);

    for output in ["nodir/x.tar", "nodir/x/"] {
        fixture.run(&["save", "name:tag", "-o", output]).fails(4, &["\"nodir\""]);
    }
    let saved = fixture.ok(&["save", "name:tag", "-o", "out.tar"]);
    assert_eq!(saved, fixture.ok(&["save", "name:tag", "-o", "dir/"]));
    let all = if cfg!(feature = "zstd") { &["none", "zstd"][..] } else { &["none"] };
    for compress in all {
        let run = fixture.run(&["save", "name:tag", "-o", "-", "--compress", compress]);
        assert_eq!((run.code, run.err.as_str()), (Some(0), ""));
        let name = format!("piped-{compress}");
        fixture.run_with_input(&["import", "-", "--name", &name], &run.out).ok();
    }
    assert_eq!(fixture.ok(&["import", "out.tar", "--name", "file"]), "file\n");
    assert_eq!(fixture.ok(&["import", "dir"]), "name:tag\n");
    let layers = |name| fixture.json(&["stat", name])["layers"].clone();
    let piped: Vec<String> = all.iter().map(|compress| format!("piped-{compress}")).collect();
    let mut images = vec!["file", "name:tag", "nameless.oci"];
    images.extend(piped.iter().map(String::as_str));
    for name in images.iter().filter(|name| **name != "nameless.oci") {
        assert_eq!(layers(name), layers("name:tag"), "{name}");
    }
    assert_eq!(fixture.names("."), ["dir", "in.tar", "nameless.oci.tar", "out.tar", "store"]);
    images.insert(0, "rm");
    fixture.ok(&images);
    // With the last image went the manifest of the first of that name, too.
    assert_eq!(fixture.names("store/blobs/sha256"), [""; 0]);
    fixture.is_clean();
    let left = fixture.json(&["ls"])["snapshots"].clone();
    assert_eq!(left.as_array().unwrap().len(), 0, "{left}");
}

fn an_image_saved_as_it_came() {
    let fixture = Fixture::new();
    image(&fixture.path("in.tar"), Some("name:tag"), &[base(), app()]);
    let import = &["import", "in.tar", "--keep-blobs", "--threads", "2"];
    let imported = fixture.json(import);
    let saved = fixture.json(&["save", "name:tag", "-o", "out.tar"]);
    assert_eq!(saved["manifest"], imported["manifest"]);
    let packed = fixture.json(&["save", "name:tag", "-o", "zip.tar", "--compress", "gzip"]);
    assert_ne!(packed["manifest"], imported["manifest"]);
    fixture.ok(&["rm", "name:tag"]);
    assert_eq!(fixture.names("store/blobs/sha256"), [""; 0]);
    fixture.run(&["import", "in.tar", "--threads", "0"]).is_refused(&["--threads"]);
}

fn an_images_name() {
    let fixture = Fixture::new();
    image(&fixture.path("in.tar"), Some("image"), &[base(), app()]);
    fixture.ok(&["import", "in.tar"]);
    let layers = fixture.json(&["stat", "image"])["layers"].clone();
    assert_eq!(fixture.json(&["prepare", "a", "image"])["parent"], layers[1]);
    assert_eq!(fixture.ok(&["diff", "image"]), "A /app\nM /etc/motd\nD /etc/old\n");
    fixture.ok(&["export", "image", "-o", "top.tar"]);
    let sum: u64 = [0, 1]
        .map(|i| fixture.json(&["usage", layers[i].as_str().unwrap()])["inodes"].as_u64().unwrap())
        .into_iter()
        .sum();
    assert_eq!(fixture.json(&["usage", "image"])["inodes"], sum, "of all layers");
    // A snapshot of the same name is meant first.
    fixture.ok(&["prepare", "image"]);
    assert_eq!(fixture.json(&["stat", "image"])["kind"], "active");
    assert_eq!(fixture.ok(&["rm", "image"]), "image\n");
    assert_eq!(fixture.json(&["stat", "image"])["kind"], "image");
    // `a` needs both layers.
    assert_eq!(fixture.ok(&["rm", "image"]), "image\n");

    image(&fixture.path("empty.tar"), Some("empty"), &[]);
    fixture.ok(&["import", "empty.tar"]);
    assert_eq!(fixture.json(&["prepare", "b", "empty"])["parent"], Value::Null);
    fixture.run(&["diff", "empty"]).fails(2, &["empty"]);
}

// --- signals -----------------------------------------------------------------------------------

fn interrupt(child: &Child) {
    signal(child, Signal::INT);
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn a_signal_rolls_back() {
    let fixture = Fixture::new();
    fixture.ok(&["prepare", "a"]);
    // More than all buffers on the way hold: once it is written, the layer is being unpacked.
    let part = archive(&[(b"f", &vec![7; 16 << 20])]);
    let mut child = piped(&mut fixture.command(&["apply", "big"]));
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&part[..8 << 20]).unwrap();
    assert_eq!(fixture.names("store/staging").len(), 1, "it is at it");
    interrupt(&child);
    // The pipe stays open: nothing but the signal ends it.
    Run::from(child.wait_with_output().unwrap()).fails(130, &["interrupted"]);
    drop(stdin);
    fixture.run(&["stat", "big"]).fails(4, &["big"]);
    fixture.is_clean();

    let many: Vec<_> = (0..100_000).map(|i| format!("d/{i}")).collect();
    let many: Vec<(&[u8], &[u8])> = many.iter().map(|name| (name.as_bytes(), &b""[..])).collect();
    image(&fixture.path("in.tar"), Some("image"), &[base(), archive(&many)]);
    let child = piped(&mut fixture.command(&["import", "in.tar"]));
    // Until the second layer has come some way; the rest takes very much longer than to see it.
    let staged = |dir: &Path| fs::read_dir(dir.join("fs/d")).is_ok_and(|d| d.count() > 100);
    while !fixture
        .names("store/staging")
        .iter()
        .any(|name| staged(&fixture.path("store/staging").join(name)))
    {
        std::thread::yield_now();
    }
    interrupt(&child);
    Run::from(child.wait_with_output().unwrap()).fails(130, &["interrupted"]);
    let listing = fixture.json(&["ls"]);
    assert_eq!(listing["snapshots"].as_array().unwrap().len(), 1, "{listing}");
    assert_eq!(listing["images"], serde_json::json!([]));
    fixture.is_clean();
}

fn a_signal_while_waiting() {
    let fixture = Fixture::new();
    fixture.ok(&["prepare", "a"]);
    let mut child = piped(&mut fixture.command(&["--verbose", "import", "-", "--name", "image"]));
    let mut stdin = child.stdin.take().unwrap();
    // Read, so the program is past taking signals over.
    stdin.write_all(&vec![0; 4 << 20]).unwrap();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    assert_eq!(output.status.code(), Some(130));
    fixture.is_clean();
}

fn a_second_signal() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "big"], &archive(&[(b"f", &vec![7; 1 << 20])])).ok();
    let mut child = piped(&mut fixture.command(&["export", "big"]));
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 512]).unwrap();
    // It waits for more to be read, which does not happen. Two of the same kind could become one.
    signal(&child, Signal::INT);
    signal(&child, Signal::TERM);
    let run = Run::from(child.wait_with_output().unwrap());
    assert_eq!((run.code, run.err.as_str()), (Some(130), ""));
    drop(stdout);
    fixture.is_clean();
}

fn an_ignored_signal() {
    let fixture = Fixture::new();
    // As nohup(1) does it.
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$0\" --root store apply base"]);
    let mut child = piped(shell.arg(PROGRAM).current_dir(fixture.0.path()));
    let mut stdin = child.stdin.take().unwrap();
    let (whole, padding) = (base(), vec![0; 4 << 20]);
    stdin.write_all(&whole).unwrap();
    // More than all buffers on the way hold: the program is past taking signals over.
    stdin.write_all(&padding).unwrap();
    signal(&child, Signal::HUP);
    drop(stdin);
    Run::from(child.wait_with_output().unwrap()).ok();
    fixture.ok(&["stat", "base"]);
    fixture.is_clean();
}

fn a_signal_at_a_named_pipe() {
    let fixture = Fixture::new();
    fixture.ok(&["prepare", "a"]);
    let pipe = fixture.path("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from(0o600),
        0,
    )
    .unwrap();
    let child = piped(&mut fixture.command(&["apply", "base", "pipe"]));
    let mut writer = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    // More than all buffers on the way hold, so it is being read; then nothing comes any more.
    writer.write_all(&archive(&[(b"f", &vec![7; 16 << 20])])[..8 << 20]).unwrap();
    interrupt(&child);
    Run::from(child.wait_with_output().unwrap()).fails(130, &["interrupted"]);
    drop(writer);
    fixture.is_clean();
}

// --- damage, roots, mounts ---------------------------------------------------------------------

fn foreign_layers() {
    let fixture = Fixture::new();
    for dir in ["branch/d", "branch/.wh..wh.plnk"] {
        fs::create_dir_all(fixture.path(dir)).unwrap();
    }
    for file in ["branch/.wh.gone", "branch/d/.wh..wh..opq", "branch/d/f"] {
        fixture.file(file, b"");
    }
    fs::write(fixture.path("branch").join(OsStr::from_bytes(b".wh.\xff")), "").unwrap();

    fixture.run(&["adopt", "a", "branch"]).is_refused(&["--as"]);
    fixture.run(&["adopt", "a", "branch", "--as", "auto"]).is_refused(&["fuse-overlayfs"]);
    fixture.run(&["adopt", "a", "none", "--as", "aufs"]).fails(4, &["none"]);
    fixture.run(&["adopt", "a", "store", "--as", "aufs"]).fails(2, &["store itself"]);
    fixture.run(&["adopt", "a", "branch", "--as", "overlay-user"]).fails(6, &[".wh.", "state"]);
    fixture.run(&["adopt", "a", "branch", "--as", "aufs", "--lower", "b"]).fails(2, &["parent"]);

    let out = fixture.ok(&["adopt", "a", "branch", "--as", "aufs", "--label", "from=aufs"]);
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("3 entries, "), "{out}");
    assert_eq!(lines[1], "whiteouts: 2 (\"gone\", ...)");
    assert_eq!(lines[2], "opaque directories: 1 (\"d\")");
    let out = fixture.json(&["adopt", "b", "branch", "--as", "aufs", "--parent", "a"]);
    assert_eq!(out["report"]["format"], "aufs");
    assert_eq!(out["report"]["whiteouts"]["count"], 2);
    let paths = &out["report"]["whiteouts"]["paths"];
    assert_eq!(paths[0], serde_json::json!({"path": "/gone"}));
    assert_eq!(paths[1]["path_bytes"], serde_json::json!([47, 255]));
    assert_eq!(fixture.json(&["stat", "b"])["parent"], "a");
    fixture.is_clean();
}

fn damage_is_found() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    fixture.is_clean();
    let snapshots = fixture.path("store/snapshots");
    let only = fs::read_dir(&snapshots).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(only.join("fs/etc/old")).unwrap();
    let run = fixture.run(&["check"]);
    assert_eq!(run.code, Some(1), "{}", run.err);
    assert_eq!(run.err, "stratafs: the store has a problem\n");
    assert!(
        String::from_utf8(run.out).unwrap().starts_with("snapshot \"base\": "),
        "names the snapshot"
    );
    let run = fixture.run(&["--json", "check"]);
    run.fails_with_object("corrupt", 1, "problem");
    let report: Value = serde_json::from_slice(&run.out).unwrap();
    assert_eq!(report["problems"][0]["object"], "snapshot \"base\"");
}

fn lost_metadata() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    let database = fixture.path("store/metadata.db");
    let whole = fs::read(&database).unwrap();
    fs::remove_file(&database).unwrap();
    let snapshots = fixture.names("store/snapshots");
    for emptied in [false, true] {
        if emptied {
            fs::write(&database, "").unwrap();
        }
        // `gc` above all would free every layer, as those of no snapshot.
        for arguments in [&["ls"][..], &["prepare", "a"], &["gc"], &["check"]] {
            fixture.run(arguments).fails(1, &["metadata.db", "restore"]);
        }
        assert_eq!(database.exists(), emptied, "none is made");
        assert_eq!(fixture.names("store/snapshots"), snapshots);
    }
    fs::write(&database, whole).unwrap();
    for lost in ["snapshots", "staging", "trash", "blobs"] {
        let at = fixture.path("store").join(lost);
        fs::rename(&at, fixture.path("away")).unwrap();
        fixture.run(&["gc"]).fails(1, &[lost, "restore"]);
        fs::rename(fixture.path("away"), &at).unwrap();
    }
    fixture.ok(&["stat", "base"]);
    fixture.is_clean();
}

fn inputs_are_named() {
    let fixture = Fixture::new();
    fixture.ok(&["prepare", "a"]);
    fs::create_dir(fixture.path("dir")).unwrap();
    fixture.run(&["apply", "base", "dir"]).fails(2, &["\"dir\"", "directory"]);
    fixture.file("cut.tar", &base()[..700]);
    fixture.run(&["apply", "base", "cut.tar"]).fails(3, &["\"cut.tar\"", "\"etc/\""]);
    fixture.run_with_input(&["apply", "base"], &base()[..700]).fails(3, &["standard input"]);
    // What a producer that failed leaves at the other end of the pipe.
    fixture.file("empty.tar", b"");
    fixture.run(&["apply", "base", "empty.tar"]).fails(3, &["\"empty.tar\"", "empty"]);
    fixture.run_with_input(&["apply", "base"], b"").fails(3, &["standard input", "empty"]);
    fixture.run_with_input(&["layer", "apply", "dir"], b"").fails(3, &["standard input", "empty"]);
    // Of what is not about the archive, the archive is not accused.
    let taken = fixture.run_with_input(&["apply", "a"], &base());
    taken.fails(5, &["\"a\""]);
    assert!(!taken.err.contains("standard input"), "{}", taken.err);
    // Nobody can read a refusal that repeats a hundred thousand letters.
    let long = "k".repeat(100_000);
    let refused = fixture.run(&["prepare", &long]);
    refused.fails(2, &["100000 bytes"]);
    assert!(refused.err.len() < 500, "{} bytes", refused.err.len());
    fixture.is_clean();
}

fn a_read_only_store() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    // In a mount namespace of its own, which takes the mount with it.
    let mut shell = Command::new("unshare");
    shell.args(["-m", "sh", "-euc"]).arg(
        "mount --bind store store; mount -o remount,ro,bind store; exec \"$0\" --root store ls",
    );
    let run = Run::of(shell.arg(PROGRAM).current_dir(fixture.0.path()));
    run.fails(7, &["store is on a read-only file system", "remount"]);
    fixture.is_clean();
}

fn the_default_root() {
    let fixture = Fixture::new();
    let run = |variables: &[(&str, &OsStr)]| {
        let mut command = Command::new(PROGRAM);
        command.args(["prepare", "a"]).env_remove("HOME").env_remove("XDG_DATA_HOME");
        command.envs(variables.iter().copied());
        Run::of(&mut command)
    };
    let (data, home) = (fixture.path("data"), fixture.path("home"));
    for dir in [&data, &home.join(".local/share")] {
        fs::create_dir_all(dir).unwrap();
    }
    run(&[("XDG_DATA_HOME", data.as_os_str()), ("HOME", home.as_os_str())]).ok();
    assert!(data.join("stratafs/format").exists());
    run(&[("XDG_DATA_HOME", OsStr::new("relative")), ("HOME", home.as_os_str())]).ok();
    assert!(home.join(".local/share/stratafs/format").exists());
    run(&[]).fails(2, &["--root"]);
}

fn a_copy_in_place() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    fixture.ok(&["prepare", "a", "base"]);
    for driver in ["auto", "copy"] {
        let printed = fixture.ok(&["--driver", driver, "mount", "a"]);
        let tree = printed.strip_suffix('\n').unwrap();
        fs::write(Path::new(tree).join(driver), "").unwrap();
        fixture.run(&["mount", "a"]).fails(6, &["\"a\"", tree]);
        fixture.run(&["rm", "a"]).fails(6, &["\"a\"", tree]);
        assert_eq!(fixture.ok(&["umount", tree]), "");
        fixture.run(&["umount", tree]).fails(4, &[tree]);
    }
    assert_eq!(fixture.ok(&["diff", "a"]), "A /auto\nA /copy\n");
    let tree = &fixture.json(&["mount", "a"])["path"];
    fixture.ok(&["umount", tree.as_str().unwrap()]);
    fixture.run(&["--driver", "overlay", "mount", "a"]).fails(7, &["driver copy"]);
    fixture.ok(&["commit", "b", "a"]);
    assert_eq!(fixture.ok(&["diff", "b"]), "A /auto\nA /copy\n");
    fixture.is_clean();
}

fn a_mount_without_the_right() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    fixture.ok(&["prepare", "a", "base"]);
    fs::create_dir(fixture.path("mnt")).unwrap();
    let run = fixture.run(&["--driver", "copy", "mount", "a", "mnt"]);
    run.fails(7, &["stratafs mount KEY", "in place"]);
    fixture.run(&["--driver", "overlay", "mount", "a", "mnt"]).fails(7, &["owners", "driver fuse"]);
    let run = fixture.run(&["--driver", "auto", "mount", "a", "mnt"]);
    match no_fuse() {
        Some(_) => run.fails(7, &["stratafs mount KEY", "in place"]),
        None => {
            run.ok();
            fixture.ok(&["umount", "mnt"]);
        }
    }
    fixture.is_clean();
}

/// Why nothing can be mounted over FUSE, if it cannot.
fn no_fuse() -> Option<&'static str> {
    let root = rustix::process::geteuid().is_root();
    if !Path::new("/dev/fuse").exists() {
        return Some("needs /dev/fuse");
    }
    let missing = std::process::Command::new("fusermount3").arg("--version").output().is_err();
    (!root && missing).then_some("needs root, or fusermount3")
}

fn mounts_over_fuse() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    fixture.ok(&["prepare", "a", "base"]);
    fs::create_dir(fixture.path("mnt")).unwrap();
    let mount = ["--driver", "fuse", "mount", "a", "mnt"];
    fixture.ok(&mount);
    fixture.run(&mount).fails(6, &["\"a\""]);
    fs::write(fixture.path("mnt/new"), "x").unwrap();
    fixture.ok(&["umount", "mnt"]);
    assert!(!fixture.path("mnt/new").exists());
    assert!(fixture.ok(&["diff", "a"]).contains("A /new\n"));
    // The server of this mount, and of no other.
    fixture.ok(&mount);
    let root = fixture.path("").canonicalize().unwrap();
    let mut killed = 0;
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let name = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let Ok(open) = fs::read_dir(process.path().join("fd")) else { continue };
        let mut open = open.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        if name.starts_with(b"stratafs-helper\0") && open.any(|file| file.starts_with(&root)) {
            let pid = process.file_name().to_str().unwrap().parse().unwrap();
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            let flags = rustix::process::PidfdFlags::empty();
            let ending = rustix::process::pidfd_open(pid, flags).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            // With the end of its last thread its descriptors are closed.
            let mut end = [rustix::event::PollFd::new(&ending, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut end, None).unwrap();
            killed += 1;
        }
    }
    assert_eq!(killed, 1);
    assert!(fs::read_dir(fixture.path("mnt")).is_err());
    let again = fixture.run(&mount);
    assert_eq!(again.code, Some(0), "{}", again.err);
    assert!(again.err.contains("has died"), "{}", again.err);
    assert!(fixture.path("mnt/new").exists());
    fixture.ok(&["umount", "mnt"]);
    assert!(!fixture.path("mnt/new").exists());
    fixture.is_clean();
}

fn mounts_show_other_ids() {
    use std::os::unix::fs::MetadataExt as _;
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    fixture.ok(&["prepare", "a", "base"]);
    fs::create_dir(fixture.path("mnt")).unwrap();
    let map = ["--uidmap", "0:1000:1", "--uidmap", "1:100000:65535"];
    for (gids, gid) in [(&[][..], 1000), (&["--gidmap", "0:7:1"], 7)] {
        let mount = [&["mount", "a", "mnt"][..], &map, gids].concat();
        fixture.ok(&mount);
        let etc = fs::metadata(fixture.path("mnt/etc")).unwrap();
        fixture.ok(&["umount", "mnt"]);
        assert_eq!((etc.uid(), etc.gid()), (1000, gid));
    }
    for (wrong, naming) in [
        (&["mnt", "--uidmap", "0:1:0"][..], "is empty"),
        (&["mnt", "--gidmap", "0:1"], "HOST:SHOWN:COUNT"),
        (&["--uidmap", "0:1:5"], "DIR"),
    ] {
        let refused = fixture.run(&[&["mount", "a"][..], wrong].concat());
        assert_eq!(refused.code, Some(2));
        assert!(refused.err.contains(naming), "{}", refused.err);
    }
    let twice = ["mount", "a", "mnt", "--uidmap", "0:1:5", "--uidmap", "4:9:1"];
    fixture.run(&twice).fails(2, &["0:1:5 and 4:9:1"]);
    fixture.is_clean();
}

fn mounts_until_umount() {
    let fixture = Fixture::new();
    fixture.run_with_input(&["apply", "base"], &base()).ok();
    fixture.ok(&["prepare", "a", "base"]);
    fs::create_dir(fixture.path("mnt")).unwrap();
    fixture.run(&["umount", "mnt"]).fails(4, &["mnt"]);
    fixture.ok(&["mount", "a", "mnt"]);
    let unmount = Unmount(&fixture);
    // By other processes: a file that is open in this one is, for a moment, open in what the tests
    // beside this one start, too.
    let inside = |script: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-euc", script]).current_dir(fixture.path("mnt"));
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let output = inside("cat etc/motd; rm etc/old; : > new").wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"base"[..]));
    fixture.run(&["mount", "a", "mnt"]).fails(6, &["\"a\""]);
    fixture.ok(&["view", "v", "base"]);
    fs::create_dir(fixture.path("other")).unwrap();
    let mounted = fixture.json(&["mount", "v", "other"]);
    assert_eq!(fixture.json(&["umount", "other"]), mounted, "the same path");
    fixture.run(&["rm", "a"]).fails(6, &["\"a\""]);
    let mut user = inside("echo here; read line");
    user.stdout.take().unwrap().read_exact(&mut [0; 5]).unwrap();
    fixture.run(&["umount", "mnt"]).fails(6, &["mnt"]);
    drop(user.stdin.take());
    user.wait().unwrap();
    drop(unmount);
    assert!(!fixture.path("mnt/etc").exists());
    assert_eq!(fixture.ok(&["diff", "a"]), "D /etc/old\nA /new\n");
    fixture.ok(&["rm", "a", "v"]);
    fixture.is_clean();
}

/// So that a failed assertion leaves no mount.
struct Unmount<'a>(&'a Fixture);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let run = self.0.run(&["umount", "mnt"]);
        assert!(run.code == Some(0) || std::thread::panicking(), "{}", run.err);
    }
}
