//! Programs in namespaces and containers, as their users see them: `unshare`, `run`, and what `info` says of
//! what an ordinary user can have. As root it is the same without user namespaces.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod container;
    pub mod layout;
    pub mod suite;
}

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stratafs::helper::HelperCommand;
use stratafs::rootless::{self, IdMapping, Namespaces};

use support::container::{Fixture, PROGRAM, Tree, no_containers, no_namespaces};
use support::suite;

fn main() {
    let root = rustix::process::geteuid().is_root();
    let not_root = || root.then(|| "needs an ordinary user".to_owned());
    let unshare = no_namespaces();
    let ids = || unshare.clone().or_else(not_root);
    let run = unshare.clone().or_else(no_containers);
    // What needs users beside root in the container.
    let users = || run.clone().or_else(|| if root { None } else { one_id() });
    let mut trials = vec![
        suite::trial("all_ids_of_the_user_are_mapped", ids().or_else(one_id), all_ids),
        suite::trial("one_id_needs_nobody", ids(), one_id_alone),
        suite::trial("unshare_ends_as_its_command_or_says_why", unshare.clone(), exit_codes),
        suite::trial("forbidden_namespaces_are_125_and_explained", ids(), forbidden),
        suite::trial("unshare_keeps_the_store_and_its_mounts", ids(), same_store),
        suite::trial(
            "a_container_in_a_namespace_of_one_id",
            ids().or_else(no_containers),
            one_id_container,
        ),
        suite::trial("info_names_the_rungs", unshare.clone(), info),
        suite::trial(
            "a_container_is_killed_with_its_run_and_swept_by_the_next",
            run.clone(),
            killed_then_run,
        ),
        suite::trial("gc_sweeps_what_a_killed_run_left", run.clone(), killed_then_gc),
        suite::trial("signals_that_are_sent_reach_the_command", run.clone(), signals),
        suite::trial("what_cannot_be_run_is_named", run.clone(), wrong_input),
        suite::trial("arguments_are_bytes", run.clone(), arguments),
        suite::trial("orphans_are_reaped_and_end_with_the_command", run.clone(), orphans),
        suite::trial(
            "an_image_with_links_for_mount_points_touches_nothing",
            run.clone(),
            hostile_links,
        ),
        suite::trial("a_container_has_few_rights", run.clone(), few_rights),
        suite::trial("the_configuration_of_an_image_counts", users(), configuration),
        suite::trial("users_are_those_of_the_image", users(), users_of_the_image),
        suite::trial("volumes_and_a_read_only_root", run.clone(), volumes),
        suite::trial("an_active_snapshot_keeps_its_changes", run.clone(), active),
        suite::trial("json_is_the_last_line", run.clone(), json_report),
    ];
    for driver in ["overlay", "fuse"] {
        let hindrance = run.clone().or_else(|| Fixture::cannot_mount(driver));
        trials.push(suite::trial(
            format!("{driver}_output_exit_code_and_diff_are_the_commands"),
            hindrance.clone(),
            move || output_and_diff(driver),
        ));
        trials.push(suite::trial(
            format!("{driver}_no_descriptor_reaches_the_command"),
            hindrance.clone(),
            move || descriptors(driver),
        ));
        trials.push(suite::trial(
            format!("{driver}_commit_keeps_what_was_changed"),
            hindrance,
            move || commit(driver),
        ));
    }
    suite::run(trials);
}

fn one_id() -> Option<String> {
    let why = IdMapping::of_caller().unwrap().one_id().cloned();
    why.map(|why| format!("needs a range of ids: {why}"))
}

// --- namespaces --------------------------------------------------------------------------------

fn all_ids() {
    let mapping = IdMapping::of_caller().unwrap();
    for (file, ids) in [("uid_map", mapping.users()), ("gid_map", mapping.groups())] {
        let text = Fixture::new().ok(&["unshare", "cat", &format!("/proc/self/{file}")]);
        let found: Vec<Vec<u32>> = text
            .lines()
            .map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect())
            .collect();
        let expected: Vec<_> = ids.iter().map(|r| vec![r.inside, r.outside, r.count]).collect();
        assert_eq!(found, expected);
        assert!(found.len() > 1 && found[0][0] == 0 && found[0][2] == 1);
    }
    // They can be given to files, and taken again.
    let fixture = Fixture::new();
    let script =
        "umask 077; echo x > f && chown 5:6 f && stat -c %u:%g f && rm f && mkdir d && chown 7 d";
    assert_eq!(fixture.ok(&["unshare", "--", "sh", "-c", script]), "5:6\n");
    let own = fs::metadata(fixture.path("d")).unwrap().uid();
    assert_eq!(own, mapping.users()[1].outside + 6);
    fixture.ok(&["unshare", "--", "rmdir", "d"]);
}

fn one_id_alone() {
    let fixture = Fixture::new();
    let namespaces = Namespaces::UserAndMount(IdMapping::one());
    let run = |script: &str| {
        let helper = HelperCommand::Path(PROGRAM.into());
        let mut command = rootless::command(&helper, &namespaces, "sh");
        let output = command.args(["-c", script]).current_dir(fixture.dir()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let uid = rustix::process::geteuid().as_raw();
    let map = run("cat /proc/self/uid_map /proc/self/setgroups; id -u; echo x > f");
    let words: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(words, ["0", &uid.to_string(), "1", "deny", "0"]);
    assert_eq!(fs::metadata(fixture.path("f")).unwrap().uid(), uid);
    // The caller has gone nowhere, and a mount is not seen by him.
    run("mount -t tmpfs none . && touch \"$PWD/hidden\"");
    assert!(!fixture.path("hidden").exists() && fixture.mounts().is_empty());
}

fn exit_codes() {
    let fixture = Fixture::new();
    fs::write(fixture.path("plain"), "").unwrap();
    for (command, code, words) in [
        (&["true"][..], 0, &[][..]),
        (&["sh", "-c", "exit 7"], 7, &[]),
        (&["./plain"], 126, &["cannot run \"./plain\"", "denied"]),
        (&["no-such-program"], 127, &["cannot run \"no-such-program\""]),
    ] {
        let run = fixture.run(&[&["unshare", "--"], command].concat());
        assert_eq!(run.status.code(), Some(code), "{command:?}: {run:?}");
        let said = String::from_utf8(run.stderr).unwrap();
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert_eq!(said.lines().count(), usize::from(code >= 126), "{said}");
    }
    // It becomes its command, which so ends by the signal.
    let killed = fixture.run(&["unshare", "--", "sh", "-c", "kill -KILL $$"]);
    assert_eq!(killed.status.signal(), Some(9));
    let mut child = fixture
        .command(&["unshare", "sh", "-c", "echo $$"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(said, format!("{pid}\n"));
}

fn forbidden() {
    let fixture = Fixture::new();
    // The setting of one namespace holds for those in it.
    let script = format!(
        "echo 0 > /proc/sys/user/max_user_namespaces && \
         exec {PROGRAM} --stratafs-enter-namespaces user '0 0 1' '0 0 1' '' '' true"
    );
    let run = fixture.run(&["unshare", "--", "sh", "-c", &script]);
    let said = String::from_utf8(run.stderr).unwrap();
    assert_eq!(run.status.code(), Some(125), "{said}");
    assert!(said.contains("sysctl user.max_user_namespaces=15000"), "{said}");
    let malformed = Command::new(PROGRAM).arg("--stratafs-enter-namespaces").output().unwrap();
    assert_eq!(malformed.status.code(), Some(125));
}

fn same_store() {
    let fixture = Fixture::with_image();
    let script = format!(
        "{PROGRAM} prepare inside image > /dev/null && mkdir mnt && {PROGRAM} mount inside mnt && \
         echo x > mnt/made && {PROGRAM} umount mnt && {PROGRAM} diff inside"
    );
    assert_eq!(fixture.ok(&["unshare", "--", "sh", "-c", &script]), "A /made\n");
    assert_eq!(fixture.ok(&["diff", "inside"]), "A /made\n");
    // What stays mounted in it goes with it.
    let script = format!("{PROGRAM} --driver overlay mount inside mnt && [ -e mnt/made ]");
    let left = fixture.run(&["unshare", "--", "sh", "-c", &script]);
    if left.status.success() {
        fixture.ok(&["rm", "inside"]);
    }
    // A process that serves it ends when somebody else wants the snapshot, since nobody sees that mount.
    let fixture = Fixture::with_image();
    let script = format!(
        "{PROGRAM} prepare left image > /dev/null && mkdir mnt && {PROGRAM} --driver fuse mount left mnt && \
         echo x > mnt/made"
    );
    fixture.ok(&["unshare", "--", "sh", "-c", &script]);
    assert_eq!(fixture.ok(&["diff", "left"]), "A /made\n");
    fixture.ok(&["commit", "done", "left"]);
    fixture.ok(&["prepare", "left", "image"]);
    let script = format!("{PROGRAM} --driver fuse mount left mnt && [ -e mnt/etc/group ]");
    fixture.ok(&["unshare", "--", "sh", "-c", &script]);
    fixture.ok(&["rm", "left"]);
    fixture.ok(&["rm", "done"]);
    assert_eq!(fixture.ok(&["gc"]), "");
    let store = fixture.ok(&["unshare", "--", "sh", "-c", "echo $STRATAFS_ROOT"]);
    assert_eq!(store.trim_end(), fixture.path("store").to_str().unwrap());
    assert!(fixture.mounts().is_empty(), "{:?}", fixture.mounts());
}

fn one_id_container() {
    let fixture = Fixture::with_image();
    let helper = HelperCommand::Path(PROGRAM.into());
    let namespaces = Namespaces::UserAndMount(IdMapping::one());
    let mut command = rootless::command(&helper, &namespaces, PROGRAM);
    command.arg("--root").arg(fixture.path("store"));
    command.args(["run", "--diff", "image", "--", "sh", "-c", "id -u; touch /made"]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.as_str()), (Some(0), "A /made\n"));
    assert_eq!(output.stdout, b"0\n");
}

fn info() {
    let fixture = Fixture::new();
    let about: Value = serde_json::from_str(&fixture.ok(&["--json", "info"])).unwrap();
    let rootless = &about["rootless"];
    if rustix::process::geteuid().is_root() {
        assert_eq!(rootless["needed"], false);
        assert!(fixture.ok(&["info"]).contains("none is needed"));
        return;
    }
    let rungs = rootless["rungs"].as_array().unwrap();
    let names: Vec<&str> = rungs.iter().map(|rung| rung["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["overlay-in-user-namespace", "fuse-in-user-namespace", "fuse-by-fusermount"]
    );
    let seen_by: Vec<&str> = rungs.iter().map(|rung| rung["seen_by"].as_str().unwrap()).collect();
    assert_eq!(seen_by, ["one namespace", "one namespace", "the caller"]);
    for rung in rungs {
        let has_reason = !rung["reason"].as_str().unwrap().is_empty();
        assert_eq!(rung["available"].as_bool().unwrap(), !has_reason, "{rung}");
    }
    let ids = rootless["ids"].as_u64().unwrap();
    assert_eq!(ids == 1, rootless["one_id"].is_string(), "{rootless}");
    assert!(fixture.mounts().is_empty() && fs::read_dir(fixture.dir()).unwrap().next().is_none());
}

// --- containers --------------------------------------------------------------------------------

fn output_and_diff(driver: &str) {
    let fixture = Fixture::of(driver).and_image();
    let script = "echo out; echo err >&2; echo new > /etc/new; rm /etc/motd; mkdir /d; cat /etc/kept; exit 7";
    let run =
        fixture.run(&["--driver", driver, "run", "--diff", "image", "--", "sh", "-c", script]);
    assert_eq!(String::from_utf8_lossy(&run.stdout), "out\nkept\n");
    assert_eq!(String::from_utf8_lossy(&run.stderr), "err\nA /d\nD /etc/motd\nA /etc/new\n");
    assert_eq!(run.status.code(), Some(7));
    // Silent about it unless asked, for who is no terminal; and about the driver that is taken.
    assert_eq!(fixture.ok(&["run", "image", "true"]), "");
    let run = fixture.run(&["--driver", driver, "run", "image", "touch", "/x"]);
    assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
    // Standard input is the command's.
    let mut child = fixture.command(&["--driver", driver, "run", "image", "cat"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"through").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"through");
    // What only a mount point was needed for is not in the diff, in an image that has nothing else.
    fixture.layer("bare", &Tree::bare());
    let bare = fixture.run(&[
        "--driver",
        driver,
        "run",
        "--diff",
        "--workdir",
        "/made/for/it",
        "--volume",
        ".:/v/w",
        "bare",
        "/busybox",
        "sh",
        "-c",
        "/busybox mkdir /made/kept; exec /busybox true",
    ]);
    assert_eq!(String::from_utf8_lossy(&bare.stderr), "A /made\nA /made/kept\n", "{bare:?}");
    fixture.is_clean(&["bare", "image"]);
}

fn descriptors(driver: &str) {
    let fixture = Fixture::of(driver).and_image();
    let script = format!(
        "exec 9</etc/passwd; exec {PROGRAM} --root store --driver {driver} run image -- ls /proc/self/fd"
    );
    let run = Command::new("sh").args(["-c", &script]).current_dir(fixture.dir()).output().unwrap();
    // The last is that of the directory which is listed.
    assert_eq!(String::from_utf8_lossy(&run.stdout), "0\n1\n2\n3\n", "{run:?}");
    let script = script.replace("run image --", "unshare --");
    let run = Command::new("sh").args(["-c", &script]).current_dir(fixture.dir()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&run.stdout), "0\n1\n2\n3\n", "{run:?}");
}

fn commit(driver: &str) {
    let fixture = Fixture::of(driver).and_image();
    let with =
        |arguments: &[&str]| fixture.run(&[&["--driver", driver, "run"], arguments].concat());
    let run = with(&["--commit", "kept", "image", "sh", "-c", "echo 1 > /one; exit 3"]);
    assert_eq!(run.status.code(), Some(3));
    assert_eq!(fixture.ok(&["diff", "kept"]), "A /one\n");
    assert_eq!(with(&["kept", "cat", "/one"]).stdout, b"1\n");
    // A name that is taken: said, and nothing is left.
    let taken = with(&["--commit", "kept", "image", "echo", "run"]);
    assert!(taken.stdout.is_empty(), "{taken:?}");
    assert_eq!(taken.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&taken.stderr).contains("kept"), "{taken:?}");
    fixture.is_clean(&["image", "kept"]);
}

/// A run whose command is there, and its standard output.
fn started(
    fixture: &Fixture,
    script: &str,
) -> (std::process::Child, BufReader<std::process::ChildStdout>) {
    let mut command = fixture.command(&["run", "image", "--", "sh", "-c", script]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, out)
}

fn kill_one(fixture: &Fixture) {
    let (mut child, mut out) = started(fixture, "sleep 1000 & echo ready; exec sleep 1000");
    child.kill().unwrap();
    // All that have it open are gone.
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert_eq!(fixture.snapshots().len(), 2, "it is left");
    assert!(fixture.mounts().is_empty(), "{:?}", fixture.mounts());
}

fn killed_then_run() {
    let fixture = Fixture::with_image();
    let (mut living, out) = started(&fixture, "echo ready; sleep 1000; exit 0");
    let alone = fixture.snapshots();
    kill_one_beside(&fixture, alone.len());
    assert_eq!(fixture.ok(&["run", "image", "echo", "next"]), "next\n");
    // That of the dead one is gone, and that of the living is not.
    assert_eq!(fixture.snapshots(), alone);
    signal(&living, Signal::TERM);
    assert_eq!(living.wait().unwrap().code(), Some(143));
    drop(out);
    fixture.is_clean(&["image"]);
}

fn kill_one_beside(fixture: &Fixture, before: usize) {
    let (mut child, mut out) = started(fixture, "echo ready; exec sleep 1000");
    child.kill().unwrap();
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    child.wait().unwrap();
    assert_eq!(fixture.snapshots().len(), before + 1, "it is left");
}

fn killed_then_gc() {
    let fixture = Fixture::with_image();
    kill_one(&fixture);
    let said = fixture.ok(&["gc"]);
    assert!(said.contains("freed 1 snapshots of commands that are gone\n"), "{said}");
    fixture.is_clean(&["image"]);
}

fn signal(child: &std::process::Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn signals() {
    let fixture = Fixture::with_image();
    for (sent, name, number) in [
        (Signal::TERM, "TERM", 15),
        (Signal::INT, "INT", 2),
        (Signal::HUP, "HUP", 1),
        (Signal::QUIT, "QUIT", 3),
        (Signal::USR1, "USR1", 10),
    ] {
        let script =
            format!("trap 'echo got; exit 9' {name}; echo ready; while :; do sleep 0.05; done");
        let (mut child, mut out) = started(&fixture, &script);
        signal(&child, sent);
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("got\n", Some(9)), "{name}");
        // Not by a shell, which may have taken the signal when it becomes another program.
        let mut command = fixture.command(&["run", "image", "cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"ready\n").unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut String::new()).unwrap();
        signal(&child, sent);
        assert_eq!(child.wait().unwrap().code(), Some(128 + number), "{name}");
    }
    fixture.is_clean(&["image"]);
}

fn wrong_input() {
    let fixture = Fixture::with_image();
    fs::write(fixture.path("text"), "no archive").unwrap();
    fixture.ok(&["view", "look", "image"]);
    for (arguments, code, words) in [
        (&["nothing"][..], 125, &["nothing", "stratafs ls"][..]),
        (&["text"], 125, &["text"]),
        (&["look"], 125, &["look", "view"]),
        (&["image", "no-such-command"], 127, &["no-such-command"]),
        (&["image", "/no/such/command"], 127, &["/no/such/command"]),
        (&["image", "/etc/motd"], 126, &["/etc/motd", "denied"]),
        (&["image", "/etc"], 126, &["/etc"]),
        (&["image", "/bad"], 126, &["/bad", "format"]),
        (&["image", "/bin/busybox/sub"], 127, &["sub"]),
        (&["--user", "stranger", "image", "id"], 125, &["stranger", "/etc/passwd"]),
        (&["--user", "0:strangers", "image", "id"], 125, &["strangers", "/etc/group"]),
        (&["--user", "4294967295", "image", "id"], 125, &["4294967295"]),
        (&["--volume", "missing:/v", "image", "true"], 125, &["missing"]),
        (&["--volume", "text:/etc/motd/x", "image", "true"], 125, &["/etc/motd"]),
        (&["--volume", "text:/v/..", "image", "true"], 125, &["/v/.."]),
        (&["--workdir", "relative", "image", "true"], 125, &["relative", "absolute"]),
        (&["--workdir", "/etc/motd", "image", "true"], 126, &["/etc/motd"]),
        (&["--hostname", "x\ny".repeat(99).as_str(), "image", "true"], 125, &["host name"]),
        (&["--commit", "a/../b\u{0}", "image", "true"], 125, &[]),
    ] {
        let Some(arguments) = without_nul(arguments) else { continue };
        let run = fixture.run(&[&["run"], &arguments[..]].concat());
        let said = String::from_utf8(run.stderr).unwrap();
        assert_eq!(run.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(
            said.starts_with("stratafs: ") && said.lines().count() == 1,
            "{arguments:?}: {said}"
        );
        assert!(words.iter().all(|word| said.contains(word)), "{arguments:?}: {said}");
    }
    // Also as JSON.
    let run = fixture.run(&["--json", "run", "image", "no-such-command"]);
    let said: Value = serde_json::from_slice(&run.stderr).unwrap();
    assert_eq!((&said["error"]["kind"], run.status.code()), (&json!("not-started"), Some(127)));
    // The library's own refusals of a command line.
    for arguments in
        [&["run"][..], &["run", "--volume", "x", "image"], &["run", "--env", "=x", "image"]]
    {
        assert_eq!(fixture.run(arguments).status.code(), Some(2), "{arguments:?}");
    }
    fixture.is_clean(&["image", "look"]);
}

/// No process can be given arguments with a NUL.
fn without_nul<'a>(arguments: &[&'a str]) -> Option<Vec<&'a str>> {
    arguments.iter().all(|text| !text.contains('\0')).then(|| arguments.to_vec())
}

fn arguments() {
    let fixture = Fixture::with_image();
    let odd: [&[u8]; 5] = [b"a b", b"", b"\xff\xfe", b"--json", b"'\"$x\n"];
    let mut command =
        fixture.command(&["run", "image", "--", "sh", "-c", "printf '[%s]' \"$@\"", "sh"]);
    let output = command.args(odd.map(OsStr::from_bytes)).output().unwrap();
    let expected: Vec<u8> = odd.iter().flat_map(|text| [b"[", *text, b"]"].concat()).collect();
    assert_eq!(output.stdout, expected, "{output:?}");
    let mut command = fixture.command(&["unshare", "--", "printf", "[%s]"]);
    let output = command.args(odd.map(OsStr::from_bytes)).output().unwrap();
    assert_eq!(output.stdout, expected, "{output:?}");
}

fn orphans() {
    let fixture = Fixture::with_image();
    // None stays dead for long; and who lives on ends with the command.
    let script = "for i in 1 2 3; do (sh -c 'exec true' &); done; n=0; \
        while grep -q '^State:.Z' /proc/[0-9]*/status 2>/dev/null && [ $n -lt 1000 ]; do \
        n=$((n+1)); sleep 0.01; done; [ $n -lt 1000 ] && echo none; (sleep 1000 &)";
    assert_eq!(fixture.ok(&["run", "image", "--", "sh", "-c", script]), "none\n");
    fixture.is_clean(&["image"]);
}

fn hostile_links() {
    let fixture = Fixture::with_image();
    let outside = fixture.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "untouched").unwrap();
    let file = outside.join("file");
    let untouched = || {
        assert_eq!(fs::read(&file).unwrap(), b"untouched");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert!(fixture.mounts().is_empty());
    };
    for (n, (name, target)) in
        [("proc", outside.clone()), ("dev", outside.clone()), ("sys", "../../..".into())]
            .iter()
            .enumerate()
    {
        let mut tree = Tree::with_shell();
        tree.link(name, target);
        fixture.layer(&format!("bad{n}"), &tree);
        let run = fixture.run(&["run", &format!("bad{n}"), "true"]);
        let said = String::from_utf8(run.stderr).unwrap();
        assert_eq!(run.status.code(), Some(125), "{said}");
        assert!(said.contains(&format!("\"/{name}\"")) && said.contains("directory"), "{said}");
        untouched();
    }
    // What leads nowhere in the image stays as it is; what leads somewhere leads there in the image.
    let mut tree = Tree::with_shell();
    tree.link("etc/resolv.conf", &file);
    tree.link("etc/hosts", "../inside".as_ref());
    tree.file("inside", b"");
    tree.link("away", &outside);
    fixture.layer("links", &tree);
    let script = "cat /etc/resolv.conf 2>/dev/null; ls /away/v; [ -s /inside ] && echo bound";
    let volume = format!("{}:/away/v", fixture.path("text-dir").display());
    fs::create_dir(fixture.path("text-dir")).unwrap();
    fs::write(fixture.path("text-dir/seen"), "").unwrap();
    let refused = fixture.run(&["run", "--volume", &volume, "links", "true"]);
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
    untouched();
    let run = fixture.run(&[
        "run",
        "--diff",
        "links",
        "--",
        "sh",
        "-c",
        &script.replace("ls /away/v;", ""),
    ]);
    assert_eq!(String::from_utf8_lossy(&run.stdout), "bound\n", "{run:?}");
    assert!(run.stderr.is_empty(), "{run:?}");
    untouched();
    // Descriptors of the first process lead nowhere either.
    for dir in [
        "/proc/self/fd/3",
        "/proc/self/fd/4",
        "/proc/1/fd/3",
        "/proc/1/cwd/..",
        "/proc/self/root/..",
    ] {
        let run = fixture.run(&["run", "--workdir", dir, "image", "ls", "/proc/self/cwd/"]);
        assert_ne!(run.status.code(), Some(0), "{dir}: {run:?}");
    }
    fixture.is_clean(&["bad0", "bad1", "bad2", "image", "links"]);
}

fn few_rights() {
    let fixture = Fixture::with_image();
    let script = "grep -E '^(CapEff|CapBnd|NoNewPrivs):' /proc/self/status | tr '\\n' ' '; \
        echo x 2>/dev/null > /proc/sys/kernel/domainname || echo -n 'proc '; \
        touch /sys/x 2>/dev/null || echo -n 'sys '; head -c 1 /proc/kcore 2>/dev/null | wc -c; \
        mount -t tmpfs none /tmp 2>/dev/null || echo -n 'mount '; umount /proc 2>/dev/null || echo -n 'umount '; \
        cat /proc/1/environ >/dev/null 2>&1 || readlink /proc/1/exe || echo -n 'first '; kill -9 1; echo alive; hostname; \
        cat /proc/sys/kernel/hostname; umask; cat /dev/null; echo x > /dev/full || true";
    let run = fixture.run(&["run", "--hostname", "box", "image", "--", "sh", "-c", script]);
    let said = String::from_utf8_lossy(&run.stdout).replace('\t', " ");
    let expected = "CapEff: 00000000a80425fb CapBnd: 00000000a80425fb NoNewPrivs: 1 proc sys 0\n\
        mount umount first alive\nbox\nbox\n0022\n";
    assert_eq!(said, expected, "{run:?}");
    // A device that the image has, or that is made, is no way to the machine.
    let device = "mknod /tmp/d b 1 0 2>/dev/null || mknod /tmp/d c 1 3 2>/dev/null; cat /tmp/d 2>/dev/null \
        && echo opened; echo done";
    assert_eq!(fixture.ok(&["run", "image", "sh", "-c", device]), "done\n");
    // The host's other processes are not seen.
    let first =
        fixture.ok(&["run", "image", "--", "sh", "-c", "echo $$; ls -d /proc/[0-9]* | wc -l"]);
    let (pid, count) = first.trim().split_once('\n').unwrap();
    assert!(pid == "2" && count.parse::<u32>().unwrap() <= 4, "{first}");
}

fn configuration() {
    let fixture = Fixture::new();
    let config = json!({
        "Env": ["A=image", "B=b=c", "PATH=/bin"], "WorkingDir": "/work", "User": "me",
        "Entrypoint": ["/bin/sh", "-c", "echo \"$A $B $PATH $HOME $PWD $(id -u):$(id -g) [$*]\"", "entry"],
        "Cmd": ["c m", "d"],
    });
    let mut tree = Tree::with_shell();
    tree.file("etc/group", b"me:x:1001:\n");
    fixture.layout("layout", &tree, &config);
    // By path it is imported, by the name that it has.
    let expected = "image b=c /bin /home/me /work 1000:1001 [c m d]\n";
    let first = fixture.run(&["run", "layout"]);
    assert_eq!(String::from_utf8_lossy(&first.stdout), expected, "{first:?}");
    assert_eq!(String::from_utf8_lossy(&first.stderr), "imported \"layout\" as \"configured\"\n");
    assert_eq!(fixture.ok(&["run", "configured"]), expected);
    let with = |arguments: &[&str]| fixture.ok(&[&["run"], arguments].concat());
    let given = with(&["--env", "A=x=y", "-e", "HOME=/h", "configured", "--", "z"]);
    assert_eq!(given, "x=y b=c /bin /h /work 1000:1001 [z]\n");
    let other = with(&["--user", "0", "--workdir", "/", "configured"]);
    assert_eq!(other, "image b=c /bin /root / 0:0 [c m d]\n");
    assert_eq!(with(&["--entrypoint", "echo", "configured"]), "\n");
    assert_eq!(with(&["--entrypoint", "echo", "configured", "a"]), "a\n");
    assert_eq!(with(&["--entrypoint", "", "configured", "echo", "b"]), "b\n");
    let mut command =
        fixture.command(&["run", "-e", "FROM", "-e", "NONE", "--entrypoint", "", "configured"]);
    let output =
        command.env("FROM", "caller").env_remove("NONE").args(["--", "env"]).output().unwrap();
    let environment = String::from_utf8(output.stdout).unwrap();
    assert!(
        environment.contains("FROM=caller\n") && !environment.contains("NONE"),
        "{environment}"
    );
    assert!(
        environment.contains("container=stratafs\n") && !environment.contains("STRATAFS"),
        "{environment}"
    );
    // A snapshot on top of an image has its configuration.
    with(&["--commit", "derived", "--user", "0", "--entrypoint", "", "configured", "touch", "/x"]);
    assert_eq!(with(&["derived"]), expected);
    // The directory was made for the command, and is nobody's change.
    let run = fixture.run(&["run", "--diff", "configured"]);
    assert!(run.stderr.is_empty(), "{run:?}");
}

fn users_of_the_image() {
    let fixture = Fixture::with_image();
    for (user, ids) in [
        ("0", "0 0 0"),
        ("me", "1000 1001 1001 7"),
        ("1000", "1000 1001 1001 7"),
        ("me:7", "1000 7 7"),
        ("1234:56", "1234 56 56"),
        ("1234", "1234 0 0"),
    ] {
        let out = fixture.ok(&[
            "run",
            "--user",
            user,
            "image",
            "sh",
            "-c",
            "echo $(id -u) $(id -g) $(id -G)",
        ]);
        assert_eq!(out.trim_end(), ids, "{user}");
    }
    // Such a user has no capabilities.
    let out = fixture.ok(&["run", "--user", "me", "image", "grep", "CapEff", "/proc/self/status"]);
    assert_eq!(out, "CapEff:\t0000000000000000\n");
    let refused = fixture.run(&["run", "--user", "me", "image", "touch", "/etc/x"]);
    assert_eq!(refused.status.code(), Some(1));
}

fn volumes() {
    let fixture = Fixture::with_image();
    fs::create_dir(fixture.path("dir")).unwrap();
    fs::write(fixture.path("a file"), "text").unwrap();
    let script = "cat /f; echo x > /v/new; echo x > /ro/other || true; ls /ro";
    let run = fixture.run(&[
        "run",
        "--diff",
        "--volume",
        "dir:/v",
        "--volume",
        "dir:/ro:ro",
        "--volume",
        "a file:/f:ro",
        "image",
        "--",
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(String::from_utf8_lossy(&run.stdout), "textnew\n", "{run:?}");
    assert!(String::from_utf8_lossy(&run.stderr).contains("Read-only file system"), "{run:?}");
    assert_eq!(fs::read(fixture.path("dir/new")).unwrap(), b"x\n");
    let names = fs::read_dir(fixture.path("dir")).unwrap().count();
    assert_eq!(names, 1);
    let run =
        fixture.run(&["run", "--read-only", "image", "sh", "-c", "touch /x || touch /dev/shm/x"]);
    assert!(run.status.success(), "{run:?}");
    assert!(String::from_utf8_lossy(&run.stderr).contains("Read-only file system"), "{run:?}");
    fixture.is_clean(&["image"]);
}

fn active() {
    let fixture = Fixture::with_image();
    fixture.ok(&["prepare", "mine", "image"]);
    fixture.ok(&["run", "mine", "touch", "/one"]);
    fixture.ok(&["run", "mine", "sh", "-c", "[ -e /one ] && touch /two"]);
    assert_eq!(fixture.ok(&["diff", "mine"]), "A /one\nA /two\n");
    // Two at once are refused.
    let mut command = fixture.command(&["run", "mine", "--", "sh", "-c", "echo ready; exec cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let second = fixture.run(&["run", "mine", "true"]);
    assert_eq!(second.status.code(), Some(125), "{second:?}");
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use"), "{second:?}");
    drop(child.stdin.take());
    let ended = child.wait().unwrap();
    assert!(ended.success(), "{ended}");
    fixture.is_clean(&["image", "mine"]);
}

fn json_report() {
    let fixture = Fixture::with_image();
    let run = fixture.run(&[
        "--json",
        "run",
        "--commit",
        "kept",
        "image",
        "sh",
        "-c",
        "echo out; touch /x; exit 4",
    ]);
    let out = String::from_utf8(run.stdout).unwrap();
    let (said, report) = out.split_once('\n').unwrap();
    let report: Value = serde_json::from_str(report).unwrap();
    assert_eq!((said, run.status.code()), ("out", Some(4)));
    let changes = json!([{"kind": "A", "path": "/x"}]);
    assert_eq!(report, json!({"exit_code": 4, "committed": "kept", "changes": changes}));
}
