//! A whole Debian is made on a mount by mmdebstrap, gets a package more, and comes out of the store with the owners,
//! modes and links of one made by root on a plain file system: by an ordinary user in `stratafs unshare`, with
//! owners in xattrs and with owners in files, and by root.
//!
//! It takes the mirrors that apt is configured with on this machine. A long run: only under `STRATAFS_FULL`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod container;
    pub mod layout;
    pub mod suite;
}

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};

use support::container::{Fixture, PROGRAM, no_containers, no_namespaces};
use support::suite;

fn main() {
    rustix::process::umask(rustix::fs::Mode::from(0o022));
    let hindrance = std::env::var_os("STRATAFS_FULL")
        .is_none()
        .then(|| "needs STRATAFS_FULL".to_owned())
        .or_else(|| suite::needs_program("mmdebstrap"))
        .or_else(no_namespaces)
        .or_else(|| sources().err());
    let is_root = suite::needs_root().is_none();
    let as_root = hindrance.clone().or_else(suite::needs_root);
    let as_user = hindrance
        .or_else(|| is_root.then(|| "needs an ordinary user".to_owned()))
        .or_else(one_id)
        .or_else(no_containers);
    suite::run_one_by_one(vec![
        suite::trial("roots_debian_in_a_store_is_that_on_a_plain_file_system", as_root, root),
        suite::trial("an_ordinary_users_debian_has_its_owners_and_modes", as_user, ordinary_user),
    ]);
}

fn one_id() -> Option<String> {
    let mapping = stratafs::rootless::IdMapping::of_caller().unwrap();
    mapping.one_id().map(|why| format!("needs a range of ids: {why}"))
}

/// Debian's among the sources of apt on this machine, a line each, if they can be reached.
fn sources() -> Result<Vec<String>, String> {
    let mut list = Command::new("apt-get");
    list.args(["indextargets", "--format", "$(ORIGIN)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)"]);
    let output = list.arg("Created-By: Packages").output();
    let output = output.map_err(|e| format!("needs apt: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let debian = text.lines().filter_map(|line| line.strip_prefix("Debian|"));
    let mut lines: Vec<String> = debian.map(str::to_owned).collect();
    lines.sort();
    lines.dedup();
    let first = lines.first().ok_or("needs sources of Debian's that apt knows: apt-get update")?;
    let words: Vec<&str> = first.split(' ').collect();
    let release = format!("{}dists/{}/Release", words[1], words[2]);
    let mut fetch = Command::new("/usr/lib/apt/apt-helper");
    let into = tempfile::NamedTempFile::new().unwrap();
    fetch.args(["download-file", &release]).arg(into.path()).stdout(Stdio::null());
    match fetch.stderr(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(lines),
        _ => Err("needs the network".to_owned()),
    }
}

/// Makes it in `$at`, from the sources that are its arguments. What belongs to the machine is shown to it meanwhile.
const MAKE: &str = r#"
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 SOURCE_DATE_EPOCH=1500000000
    mmdebstrap --quiet --mode=root --variant=minbase '' "$at" "$@" </dev/null >&2
    mount --rbind /dev "$at/dev"
    mount --rbind /proc "$at/proc"
    chroot "$at" apt-get -q update >&2
    chroot "$at" apt-get -q -y --no-install-recommends install cron >&2
    chroot "$at" apt-get clean
    chroot "$at" dpkg --verify
    umount -l "$at/dev" "$at/proc"
"#;

/// The same on a snapshot, which is then committed and exported.
const IN_STORE: &str = r#"
    stratafs() { "$program" --driver "$driver" "$@"; }
    at=$PWD/mnt
    mkdir "$at"
    stratafs prepare none >/dev/null; stratafs commit empty none >/dev/null
    stratafs prepare work empty >/dev/null
    stratafs mount work "$at"
    grep -F " $at " /proc/self/mounts | cut -d ' ' -f 3
    (make "$@")
    stratafs umount "$at"
    stratafs diff work | grep -c .
    stratafs commit debian work >/dev/null
    stratafs export debian >debian.tar
"#;

/// Runs a script with the function `make`, as what `unshare` runs; what it prints.
fn run(
    fixture: &Fixture,
    options: &[&str],
    script: &str,
    (program, driver): (&str, &str),
) -> String {
    let script =
        format!("program={program} driver={driver}; make() {{ set -e; {MAKE} }}\n{script}");
    let mut command = fixture.command(options);
    command.args(["unshare", "--", "bash", "-euo", "pipefail", "-c", &script, "-"]);
    command.args(sources().unwrap()).env("HOME", fixture.dir()).env_remove("TMPDIR");
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// What an archive says of each path: its kind and mode, owners, and where a link leads.
type Entries = BTreeMap<String, String>;

fn entries(archive: &Path) -> Entries {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    let mut entries = Entries::new();
    let (mut first_names, mut links) = (BTreeMap::new(), Vec::new());
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let path = entry.path().unwrap();
        let path = path.to_str().unwrap().trim_start_matches("./").trim_end_matches('/').to_owned();
        let header = entry.header();
        let target = entry.link_name().unwrap();
        let target = target.map(|to| to.to_str().unwrap().trim_start_matches("./").to_owned());
        if header.entry_type() == tar::EntryType::Link {
            links.push((path, target.unwrap()));
            continue;
        }
        let (mode, uid, gid) =
            (header.mode().unwrap() & 0o7777, header.uid().unwrap(), header.gid().unwrap());
        let device = match header.entry_type() {
            tar::EntryType::Char | tar::EntryType::Block => {
                let number = |part: std::io::Result<Option<u32>>| part.unwrap().unwrap();
                format!("{}:{}", number(header.device_major()), number(header.device_minor()))
            }
            _ => String::new(),
        };
        let kind = header.entry_type();
        let mode = if kind == tar::EntryType::Symlink { 0 } else { mode };
        let target = target.unwrap_or_default();
        let told = format!("{kind:?} {mode:o} {uid}:{gid} {target}{device}");
        first_names.insert(path.clone(), told.clone());
        entries.insert(path, told);
    }
    // Which of its names a file comes by first is the archiver's affair.
    for (path, target) in links {
        let told = format!("{}, linked", first_names[&target]);
        entries.insert(target, told.clone());
        entries.insert(path, told);
    }
    // The root's own attributes are its maker's.
    entries.remove("");
    entries
}

/// The contents of a file in an archive.
fn contents(archive: &Path, path: &str) -> String {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    let mut entries = archive.entries().unwrap().map(Result::unwrap);
    let mut entry = entries.find(|entry| entry.path().unwrap().ends_with(path)).unwrap();
    let mut text = String::new();
    entry.read_to_string(&mut text).unwrap();
    text
}

#[track_caller]
fn same(one: &Entries, two: &Entries) {
    let lines = |one: &Entries, two: &Entries| -> Vec<String> {
        let differ = one.iter().filter(|(path, told)| two.get(*path) != Some(told));
        differ.map(|(path, told)| format!("{path} {told}")).collect()
    };
    let (missing, added) = (lines(one, two), lines(two, one));
    assert!(missing.is_empty() && added.is_empty(), "{missing:#?} against {added:#?}");
}

/// What the mount is, and how many changes there are.
#[track_caller]
fn check_words(said: &str, kind: &str) {
    let words: Vec<&str> = said.lines().collect();
    assert_eq!((words[0], words.len()), (kind, 2), "{said}");
    assert!(words[1].parse::<u32>().unwrap() > 5000, "{said}");
}

fn root() {
    let fixture = Fixture::new();
    let plain = "at=$PWD/plain; mkdir plain; (make \"$@\"); \
                 tar --numeric-owner -C plain -cf plain.tar .";
    assert_eq!(run(&fixture, &[], plain, (PROGRAM, "auto")), "");
    let expected = entries(&fixture.path("plain.tar"));
    assert!(expected["dev/null"].starts_with("Char 666 0:0 1:3"));
    for (driver, kind) in [("overlay", "overlay"), ("fuse", "fuse.stratafs")] {
        let fixture = Fixture::new();
        check_words(&run(&fixture, &[], IN_STORE, (PROGRAM, driver)), kind);
        same(&expected, &entries(&fixture.path("debian.tar")));
    }
}

fn ordinary_user() {
    let made = |owners, driver, kind| {
        let fixture = Fixture::new();
        let said = run(&fixture, &["--owners", owners], IN_STORE, (PROGRAM, driver));
        check_words(&said, kind);
        let archive = fixture.path("debian.tar");
        let entries = entries(&archive);
        let crontab = contents(&archive, "etc/group");
        let crontab = crontab.lines().find_map(|line| line.strip_prefix("crontab:x:")).unwrap();
        let crontab = crontab.trim_end_matches(':');
        for (path, told) in [
            ("root", "Directory 700 0:0 "),
            ("tmp", "Directory 1777 0:0 "),
            ("usr/bin/su", "Regular 4755 0:0 "),
            ("usr/bin/passwd", "Regular 4755 0:0 "),
            ("usr/bin/chage", "Regular 2755 0:42 "),
            ("usr/sbin/unix_chkpwd", "Regular 2755 0:42 "),
            ("etc/shadow", "Regular 640 0:42 "),
            ("var/mail", "Directory 2775 0:8 "),
            ("var/local", "Directory 2775 0:50 "),
            ("var/log/btmp", "Regular 660 0:43 "),
            ("var/lib/apt/lists/partial", "Directory 700 42:0 "),
            ("usr/bin/crontab", &format!("Regular 2755 0:{crontab} ")),
            ("var/spool/cron/crontabs", &format!("Directory 1730 0:{crontab} ")),
            ("bin", "Symlink 0 0:0 usr/bin"),
        ] {
            assert_eq!(entries[path], told, "{path}, {owners}");
        }
        // His own files, or those of his range.
        fixture.ok(&["unshare", "--", "rm", "-rf", fixture.path("store").to_str().unwrap()]);
        entries
    };
    let in_xattrs = made("xattrs", "fuse", "fuse.stratafs");
    same(&in_xattrs, &made("files", "fuse", "fuse.stratafs"));
    same(&in_xattrs, &made("files", "overlay", "overlay"));
}
