//! `stratafs-fuse` in the place of the kernel's overlayfs (`overlay.mount_program`): images are built, run, changed,
//! compared and committed, by root with podman as on the kernel's, and by an ordinary user with buildah as on
//! fuse-overlayfs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod suite;
    pub mod union_mount;
}

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use support::suite;

fn main() {
    support::union_mount::enter_own_mount_namespace();
    let hindrance = suite::needs_root()
        .or_else(|| ["podman", "runc", "busybox"].into_iter().find_map(suite::needs_program))
        .or_else(|| (!is_static("busybox")).then(|| "needs busybox-static".to_owned()))
        .or_else(|| support::union_mount::Engine::Own.hindrance());
    suite::run_one_by_one(vec![
        suite::trial(
            "podman_has_the_same_as_with_the_kernel",
            hindrance.clone(),
            same_as_the_kernel,
        ),
        suite::trial("containers_run_side_by_side", hindrance.clone(), side_by_side),
        suite::trial(
            "podman_maps_ids_as_with_the_kernel",
            hindrance.clone(),
            mapped_as_by_the_kernel,
        ),
        suite::trial(
            "podman_maps_ids_as_with_fuse_overlayfs_on_a_union",
            hindrance.clone().or_else(|| suite::needs_program("fuse-overlayfs")),
            mapped_as_by_fuse_overlayfs,
        ),
        suite::trial("containers_with_different_maps_run_side_by_side", hindrance.clone(), maps),
        suite::trial(
            "an_upper_whose_server_is_about_to_end_is_waited_for",
            hindrance,
            about_to_end,
        ),
        suite::trial("buildah_has_the_same_as_with_fuse_overlayfs", rootless_hindrance(), rootless),
        suite::trial(
            "podman_keeps_the_users_id_as_with_fuse_overlayfs",
            rootless_hindrance()
                .or_else(|| ["podman", "runc"].into_iter().find_map(suite::needs_program)),
            keep_id,
        ),
    ]);
}

/// Why an ordinary user's buildah cannot be run here.
fn rootless_hindrance() -> Option<String> {
    let uid = rustix::process::getuid();
    if uid.is_root() {
        return Some("needs an ordinary user".to_owned());
    }
    let programs = ["buildah", "newuidmap", "fuse-overlayfs", "busybox"];
    programs
        .into_iter()
        .find_map(suite::needs_program)
        .or_else(|| (!is_static("busybox")).then(|| "needs busybox-static".to_owned()))
        .or_else(|| {
            let device = fs::File::options().read(true).write(true).open("/dev/fuse");
            device.is_err().then(|| "needs /dev/fuse".to_owned())
        })
        .or_else(|| {
            let id = Command::new("id").arg("-un").output().unwrap();
            let name = String::from_utf8(id.stdout).unwrap();
            let ranges = fs::read_to_string("/etc/subuid").unwrap_or_default();
            let mine = [format!("{}:", name.trim()), format!("{}:", uid.as_raw())];
            let has = ranges.lines().any(|line| mine.iter().any(|mine| line.starts_with(&**mine)));
            (!has).then(|| "needs a range of this user's in /etc/subuid".to_owned())
        })
}

fn is_static(program: &str) -> bool {
    let path = suite::find_program(program).unwrap();
    let linked = Command::new("ldd").arg(path).output().unwrap();
    !linked.status.success()
}

/// A storage of podman's.
struct Podman {
    dir: tempfile::TempDir,
    mount_program: Option<String>,
}

impl Podman {
    fn new(mount_program: Option<&str>) -> Podman {
        Podman::inside(suite::temp(), mount_program)
    }

    fn inside(dir: tempfile::TempDir, mount_program: Option<&str>) -> Podman {
        let podman = Podman { dir, mount_program: mount_program.map(str::to_owned) };
        let context = podman.path("context");
        fs::create_dir_all(context.join("root/bin")).unwrap();
        fs::copy(suite::find_program("busybox").unwrap(), context.join("root/bin/busybox"))
            .unwrap();
        for applet in [
            "sh", "rm", "mkdir", "chmod", "chown", "mv", "ln", "cat", "find", "stat", "xargs",
            "sort",
        ] {
            symlink("busybox", context.join("root/bin").join(applet)).unwrap();
        }
        for path in ["gone/a", "remade/old", "kept/a", "file", "links/one", "etc/passwd", "tmp/x"] {
            let path = context.join("root").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, path.file_name().unwrap().as_encoded_bytes()).unwrap();
        }
        fs::hard_link(context.join("root/links/one"), context.join("root/links/two")).unwrap();
        fs::write(context.join("copied"), "copied").unwrap();
        let steps = "FROM scratch\n\
            COPY root /\n\
            RUN rm -r /gone /file && rm -r /remade && mkdir /remade && echo new > /remade/new\n\
            COPY copied /copied\n\
            RUN chmod 600 /copied && mv /kept /moved && echo more >> /etc/passwd\n";
        fs::write(context.join("Containerfile"), steps).unwrap();
        podman
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.path("storage")).arg("--runroot").arg(self.path("run"));
        command.args([
            "--runtime",
            "runc",
            "--cgroup-manager",
            "cgroupfs",
            "--storage-driver",
            "overlay",
        ]);
        if let Some(program) = &self.mount_program {
            command.arg("--storage-opt").arg(format!("overlay.mount_program={program}"));
        }
        command.args(arguments);
        command
    }

    fn start(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    #[track_caller]
    fn podman(&self, arguments: &[&str]) -> String {
        text(self.command(arguments).output().unwrap())
    }

    /// The arguments of `podman run` or `podman build` on machines that forbid much.
    fn confined<'a>(&self, verb: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let confined = [
            "--network",
            "none",
            "--ulimit",
            "nofile=20000:20000",
            "--ulimit",
            "nproc=10000:10000",
        ];
        [&[verb][..], &confined, more].concat()
    }

    fn build(&self) {
        let context = self.path("context");
        self.podman(&self.confined("build", &["-q", "-t", "built", context.to_str().unwrap()]));
    }

    #[track_caller]
    fn run(&self, more: &[&str]) -> String {
        self.podman(&self.confined("run", more))
    }

    /// All that a container of an image sees of its root file system, but times.
    fn tree(&self, image: &str) -> String {
        let look = "find / -xdev ! -path '/etc/h*' ! -path /etc/resolv.conf ! -path '/run*' | sort | xargs stat -c '%n %F %a %u:%g %h %s'; \
                    cat /links/one /links/two /remade/* /moved/* /copied";
        // Directories have sizes of the file system's own.
        let says = self.run(&["--rm", image, "sh", "-c", look]);
        let without_size = |line: &str| match line.split_once(" directory ") {
            Some((name, rest)) => {
                let words: Vec<_> = rest.split(' ').take(2).collect();
                format!("{name} directory {}", words.join(" "))
            }
            None => line.to_owned(),
        };
        says.lines().map(without_size).collect::<Vec<_>>().join("\n")
    }

    /// Nothing stays mounted, and no server runs on.
    fn end(self) {
        self.podman(&["rm", "-af"]);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let at = self.path("storage").join("overlay");
        let left: Vec<_> =
            mounts.lines().filter(|line| line.contains(&format!("{}/", at.display()))).collect();
        assert!(left.is_empty(), "{left:#?}");
        rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH).ok();
    }
}

#[track_caller]
fn text(output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

const OURS: Option<&str> = Some(env!("CARGO_BIN_EXE_stratafs-fuse"));

/// What a container does, and is then committed.
const CHANGES: &str = "echo hi > /new; ln -f /new /new2; rm -f /tmp/x; chmod 700 /moved; mkdir -p /d/e; mv /d/e /d/f; \
                       rm -r /remade; mkdir /remade; echo x > /remade/newer; chmod 600 /etc/passwd";

fn same_as_the_kernel() {
    let outcome = |mount_program| {
        let podman = Podman::new(mount_program);
        podman.build();
        let built = podman.tree("built");
        if mount_program.is_some() {
            // Where the kernel makes two files of one.
            let write = "echo more >> /links/one; cat /links/two";
            assert_eq!(podman.run(&["--rm", "built", "sh", "-c", write]), "onemore\n");
        }
        podman.run(&["--name", "changed", "built", "sh", "-c", CHANGES]);
        let diff = podman.podman(&["diff", "changed"]);
        let mut diff: Vec<String> = diff.lines().map(str::to_owned).collect();
        diff.sort();
        podman.podman(&["commit", "-q", "changed", "committed"]);
        let committed = podman.tree("committed");
        // It is started again on the layer that it has.
        podman.podman(&["start", "-a", "changed"]);
        podman.end();
        (built, diff.join("\n"), committed)
    };
    let (ours, kernels) = (outcome(OURS), outcome(None));
    assert_eq!(ours.0, kernels.0, "as built");
    assert!(!ours.0.contains("/gone") && !ours.0.contains("/remade/old"), "{}", ours.0);
    // podman asks the mount, where of the kernel's it reads the layer, which says of a directory that was made
    // anew only that it hides all.
    let exact = [
        "A /d",
        "A /d/f",
        "A /new",
        "A /new2",
        "A /remade/newer",
        "C /etc",
        "C /etc/passwd",
        "C /moved",
        "C /remade",
        "C /tmp",
        "D /remade/new",
        "D /tmp/x",
    ];
    assert_eq!(ours.1.lines().collect::<Vec<_>>(), exact, "the difference");
    assert_eq!(ours.2, kernels.2, "as committed");
}

fn side_by_side() {
    let podman = Podman::new(OURS);
    podman.build();
    let start = |k: usize| -> Child {
        let script = format!(
            "for i in 1 2 3 4 5 6 7 8 9; do echo {k} > /file-$i; done; cat /file-9 /copied"
        );
        podman.start(&podman.confined("run", &["--rm", "built", "sh", "-c", &script]))
    };
    let running: Vec<_> = (0..4).map(start).collect();
    for (k, child) in running.into_iter().enumerate() {
        assert_eq!(text(child.wait_with_output().unwrap()), format!("{k}\ncopied"));
    }
    podman.end();
}

/// The same, of containers with ids of their own: what one sees and makes, the difference, and what is committed, as
/// it is seen without a map and with another.
fn outcome_with_ids(podman: &Podman) -> Vec<String> {
    let context = podman.path("context");
    let owners = "FROM scratch\n\
        COPY root /\n\
        RUN chown 5:6 /file && chown 33:44 /kept && chmod 4755 /file && chown 65535 /tmp/x\n\
        RUN chmod 755 / /bin /etc /gone /kept /links /remade /tmp\n";
    fs::write(context.join("Containerfile"), owners).unwrap();
    podman.build();
    let map = |first: u32| {
        let map = format!("0:{first}:65536");
        ["--uidmap".to_owned(), map.clone(), "--gidmap".to_owned(), map]
    };
    let look = "find / -xdev ! -path '/etc*' ! -path '/run*' ! -path '/dev*' ! -path '/proc*' ! -path '/sys*' \
                ! -type d | sort | xargs stat -c '%n %F %a %u:%g %h %s'; \
                stat -c '%n %a %u:%g' / /kept /tmp /etc /d";
    let change = format!(
        "cat /proc/self/uid_map; echo x > /new; mkdir /d; chown 7:8 /d; rm /tmp/x; chmod 600 /file; echo more >> /file; \
         ln /new /new2; mv /gone /d; chown 9 /remade/old; (umask 077; echo x > /d/closed; chown 10:11 /d/closed); {look}"
    );
    // podman does not always get rid of the shared memory of such a container in time to remove that.
    let run = |map: &[String], more: &[&str], script: &str| {
        let map = map.iter().map(String::as_str);
        let arguments: Vec<&str> = ["--ipc", "none"].into_iter().chain(map).collect();
        podman.run(&[&arguments, more, &["sh", "-c", script]].concat())
    };
    let changed = run(&map(100_000), &["--name", "changed", "built"], &change);
    let diff = podman.podman(&["diff", "changed"]);
    let mut diff: Vec<&str> = diff.lines().collect();
    diff.sort_unstable();
    podman.podman(&["commit", "-q", "changed", "committed"]);
    let committed = ["--rm", "committed"];
    let again = run(&map(300_000), &committed, look);
    vec![changed, diff.join("\n"), run(&[], &committed, look), again]
}

fn mapped_as_by_the_kernel() {
    let outcome = |mount_program| {
        let podman = Podman::new(mount_program);
        let outcome = outcome_with_ids(&podman);
        podman.end();
        outcome
    };
    let (ours, kernels) = (outcome(OURS), outcome(None));
    assert_eq!(ours, kernels);
    assert!(ours[0].contains("/file regular file 600 5:6") && ours[0].contains("/d 755 7:8"));
}

/// Where mounts cannot be idmapped podman leaves it to the program, to which it tells the map; here on an overlay,
/// as in a container without a volume, where there can be no whiteouts of the overlay formats, either.
fn mapped_as_by_fuse_overlayfs() {
    let outcome = |mount_program: Option<&str>| {
        // The kernel puts no upper on a union, nor one on a file system in memory everywhere.
        let disk = tempfile::tempdir_in("/var/tmp").unwrap();
        let [lower, upper, work, at] = ["lower", "upper", "work", "at"].map(|name| {
            let path = disk.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        });
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("overlay", &at, "overlay", flags, &*options).unwrap();
        let podman = Podman::inside(tempfile::tempdir_in(&at).unwrap(), mount_program);
        let outcome = outcome_with_ids(&podman);
        podman.end();
        rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH).unwrap();
        outcome
    };
    let theirs = suite::find_program("fuse-overlayfs").unwrap();
    let (ours, theirs) = (outcome(OURS), outcome(theirs.to_str()));
    assert_eq!(ours, theirs);
    // What is committed has the owners that were seen.
    assert!(ours[2].contains("/file regular file 600 5:6") && ours[2].contains("/d 755 7:8"));
}

fn maps() {
    let podman = Podman::new(OURS);
    podman.build();
    let start = |k: usize| -> Child {
        let map = format!("0:{}:65536", 100_000 * (k + 1));
        let script = "cat /proc/self/uid_map; for i in 1 2 3 4 5; do echo $i > /f-$i; chown $i /f-$i; done; \
                      stat -c %u:%g /f-* /bin/busybox; cat /copied";
        let mut more = vec!["--rm"];
        if k > 0 {
            more.extend(["--uidmap", &map, "--gidmap", &map]);
        }
        more.extend(["built", "sh", "-c", script]);
        podman.start(&podman.confined("run", &more))
    };
    let running: Vec<_> = (0..4).map(start).collect();
    for (k, child) in running.into_iter().enumerate() {
        let said = text(child.wait_with_output().unwrap());
        let (map, rest) = said.split_once('\n').unwrap();
        let first = map.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap();
        assert_eq!(first, if k > 0 { 100_000 * (k + 1) } else { 0 });
        assert_eq!(rest, "1:0\n2:0\n3:0\n4:0\n5:0\n0:0\ncopied", "{k}");
    }
    podman.end();
}

/// The namespace of a container that has ended keeps its mount for a moment, with the server.
fn about_to_end() {
    let dir = suite::temp();
    let path = |name: &str| dir.path().join(name);
    for made in ["lower", "diff", "work", "merged"] {
        fs::create_dir(path(made)).unwrap();
    }
    fs::write(path("link"), "SHORT").unwrap();
    let root = dir.path().display();
    let options = format!("lowerdir={root}/lower,upperdir={root}/diff,workdir={root}/work");
    let mount = || {
        let mut command = Command::new(OURS.unwrap());
        command.arg("-o").arg(&options).arg(path("merged")).stderr(Stdio::piped()).spawn().unwrap()
    };
    text(mount().wait_with_output().unwrap());
    let mut container = Command::new("unshare");
    container.args(["--mount", "sh", "-c", "echo there; exec cat"]);
    let mut container = container.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut there = [0; 6];
    container.stdout.as_mut().unwrap().read_exact(&mut there).unwrap();
    rustix::mount::unmount(path("merged"), rustix::mount::UnmountFlags::DETACH).unwrap();
    let lock = path("work/stratafs/lock");
    let refused = || fs::metadata(&lock).unwrap().modified().unwrap();
    let before = refused();
    let mut again = mount();
    // The first server says so that somebody sees its mount.
    while refused() == before {
        assert!(again.try_wait().unwrap().is_none(), "it has not asked");
        std::thread::yield_now();
    }
    drop(container.stdin.take());
    container.wait().unwrap();
    text(again.wait_with_output().unwrap());
    rustix::mount::unmount(path("merged"), rustix::mount::UnmountFlags::empty()).unwrap();
}

// --- without root --------------------------------------------------------------------------------

/// A storage of buildah's, and what it says at the end.
fn rootless() {
    assert_eq!(built_without_root(OURS.unwrap()), built_without_root("fuse-overlayfs"));
}

/// Where the program is, a directory for all that such a storage needs, and in it what an image is built of.
fn without_root(mount_program: &str, steps: &str) -> (PathBuf, tempfile::TempDir, PathBuf) {
    let mount_program = suite::find_program(mount_program).unwrap_or_else(|| mount_program.into());
    let dir = suite::temp();
    for made in ["run", "home", "context"] {
        fs::create_dir(dir.path().join(made)).unwrap();
    }
    let context = dir.path().join("context");
    fs::copy(suite::find_program("busybox").unwrap(), context.join("busybox")).unwrap();
    fs::write(context.join("Containerfile"), steps).unwrap();
    (mount_program, dir, context)
}

/// What is in an image that was built in steps, run, mounted and committed.
fn built_without_root(mount_program: &str) -> String {
    let steps = "FROM scratch\n\
        COPY busybox /bin/busybox\n\
        COPY busybox /bin/sh\n\
        RUN busybox --install -s /bin; mkdir -p /gone/x /kept/a; chown 33:44 /kept; echo x > /own; chown 5:6 /own\n\
        COPY copied /copied\n\
        RUN rm -r /gone && mv /kept /moved && chmod 4755 /copied && chown 7:8 /moved/a\n";
    let (mount_program, dir, context) = without_root(mount_program, steps);
    fs::write(context.join("copied"), "copied").unwrap();
    let buildah = |arguments: &[&str]| {
        let mut command = Command::new("buildah");
        command.env("HOME", dir.path().join("home")).env("XDG_RUNTIME_DIR", dir.path().join("run"));
        command.arg("--root").arg(dir.path().join("storage"));
        command.arg("--runroot").arg(dir.path().join("run/storage"));
        command.args(["--storage-driver", "overlay", "--storage-opt"]);
        command.arg(format!("overlay.mount_program={}", mount_program.display()));
        text(command.args(arguments).output().unwrap()).trim().to_owned()
    };
    let chroot = ["--isolation", "chroot"];
    buildah(&[&["build"], &chroot[..], &["-q", "-t", "built", context.to_str().unwrap()]].concat());
    let container = buildah(&["from", "--pull-never", "localhost/built"]);
    let change = "rm /own; echo new > /new; chown 9:9 /new; mkdir /moved/b; cat /copied";
    let said = buildah(&[&["run"], &chroot[..], &[&container, "sh", "-c", change]].concat());
    assert_eq!(said, "copied");
    // Nobody unmounts it: it is left to its server, alone in the mount namespace.
    let storage = format!(
        "buildah --root {0}/storage --runroot {0}/run/storage --storage-driver overlay --storage-opt \
         overlay.mount_program={1}",
        dir.path().display(),
        mount_program.display()
    );
    let write = format!("echo seen > $({storage} mount {container})/mounted");
    buildah(&["unshare", "sh", "-c", &write]);
    buildah(&["commit", "-q", &container, "committed"]);
    let container = buildah(&["from", "--pull-never", "localhost/committed"]);
    let look = "find / -xdev ! -path '/etc*' ! -path '/run*' ! -path '/dev*' ! -path '/sys*' ! -path '/proc*' \
                | sort | xargs stat -c '%n %F %a %u:%g'; cat /new /mounted";
    let tree = buildah(&[&["run"], &chroot[..], &[&container, "sh", "-c", look]].concat());
    buildah(&["rm", "-a"]);
    // What belongs to others in the user namespace can only be removed there.
    buildah(&["rmi", "-af"]);
    buildah(&["unshare", "rm", "-rf", dir.path().join("storage").to_str().unwrap()]);
    tree
}

/// A container in which the user has the id that it has outside, with the files of the image root's.
fn keep_id() {
    assert_eq!(with_kept_id(OURS.unwrap()), with_kept_id("fuse-overlayfs"));
}

/// What such containers say, and what comes of it.
fn with_kept_id(mount_program: &str) -> String {
    let steps = "FROM scratch\n\
        COPY busybox /bin/busybox\n\
        COPY busybox /bin/sh\n\
        RUN busybox --install -s /bin; mkdir -m 1777 /tmp; echo x > /a; chown 33:44 /a; echo y > /own; chmod 600 /own\n";
    let (mount_program, dir, context) = without_root(mount_program, steps);
    let command = |arguments: &[&str]| {
        let mut command = Command::new("podman");
        command.env("HOME", dir.path().join("home")).env("XDG_RUNTIME_DIR", dir.path().join("run"));
        command.arg("--root").arg(dir.path().join("storage"));
        command.arg("--runroot").arg(dir.path().join("run/storage"));
        command.args(["--runtime", "runc", "--cgroup-manager", "cgroupfs"]);
        command.args(["--storage-driver", "overlay", "--storage-opt"]);
        command.arg(format!("overlay.mount_program={}", mount_program.display()));
        command.args(arguments).stdin(Stdio::null());
        command
    };
    let podman = |arguments: &[&str]| text(command(arguments).output().unwrap());
    let built = ["build", "--isolation", "chroot", "-q", "-t", "built", context.to_str().unwrap()];
    podman(&built);
    let run = ["run", "--network", "none"];
    let kept = |more: &[&'static str]| [&run[..], &["--userns", "keep-id"], more].concat();
    let change = "id -u; cat /proc/self/uid_map; stat -c '%n %a %u:%g' / /bin /a /own; cat /own; \
                  echo mine > /tmp/mine; mkdir /tmp/dir; rm /a; chown 0 /tmp/mine; \
                  stat -c '%n %a %u:%g' /tmp/mine";
    // What is forbidden to it, it is told of.
    let change = format!("{change} 2>&1; true");
    let mut said =
        podman(&[&kept(&["--name", "one", "built", "sh", "-c"])[..], &[&change]].concat());
    said += &podman(&kept(&[
        "--name",
        "two",
        "--user",
        "0",
        "built",
        "sh",
        "-c",
        "rm /a; echo z > /b",
    ]));
    for name in ["one", "two"] {
        let mut changes: Vec<String> = podman(&["diff", name]).lines().map(str::to_owned).collect();
        changes.sort();
        said += &changes.join("\n");
        podman(&["commit", "-q", name, name]);
        let look = "stat -c '%n %a %u:%g' /tmp/* /own /a /b 2>&1; true";
        said += &podman(&[&run[..], &["--rm", name, "sh", "-c", look]].concat());
    }
    // Two at once, of one image, each with its own ids.
    let start = |more: &[&str]| {
        let arguments = [
            &run[..],
            more,
            &["--rm", "built", "sh", "-c", "stat -c %u:%g /a; cat /bin/busybox | wc -c"],
        ]
        .concat();
        command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let both = [start(&["--userns", "keep-id"]), start(&[])];
    both.into_iter().for_each(|child| said += &text(child.wait_with_output().unwrap()));
    podman(&["rm", "-af"]);
    podman(&["rmi", "-af"]);
    // The process that keeps its namespace open for it, and what is mounted there.
    podman(&["system", "migrate"]);
    let storage = dir.path().join("storage");
    text(Command::new("buildah").args(["unshare", "rm", "-rf"]).arg(storage).output().unwrap());
    said
}
