//! The kernel engine, by doing: mounts in all ways that kernels take layers, and the errors.
//!
//! Most of it needs the right to mount; without it those tests are reported as ignored.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};
use stratafs::{
    Driver, Error, ErrorKind, IdRange, LayerFormat, MAX_LAYERS, Mount, MountRequest, MountState,
    OverlayDriver, ProbeTarget, Rung, ShownIds, UpperDir, Visibility, unmount_at,
};
use tempfile::TempDir;

/// The first argument of this program when it runs itself in a user namespace.
const IN_NAMESPACE: &str = "in-a-user-namespace";

fn main() {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|arg| arg == IN_NAMESPACE) {
        args.remove(1);
        let trials = vec![
            trial("user_xattr_layers_mount_on_every_rung", user_xattr_layers),
            trial("trusted_layers_are_refused", trusted_layers_are_refused),
            trial("ids_are_mapped_on_file_systems_of_the_namespace", ids_in_a_namespace),
        ];
        libtest_mimic::run(&Arguments::from_iter(args), trials).exit();
    }

    let mut mounting = vec![
        trial("the_limit_is_named_before_the_kernel_is_asked", limit),
        trial("odd_paths_mount_on_every_rung", odd_paths),
        trial("layers_beyond_path_max_mount", beyond_path_max),
        trial("every_rung_shows_the_same_tree", same_tree),
        trial("a_single_layer_with_marks_does_not_show_them", marks_stay_hidden),
        trial("views_without_union_are_bind_mounts", bind_mounts),
        trial("views_refuse_writes", views_refuse_writes),
        trial("restrictions_are_set_and_mounts_are_private", restrictions),
        trial("a_volatile_upper_is_refused_the_second_time", volatile),
        trial("targets_that_cannot_be_are_named", bad_targets),
        trial("refusals_say_why", refusals),
        trial("dropping_the_guard_unmounts", drop_unmounts),
        trial("a_busy_mount_stays_until_idle", busy),
        trial("a_mount_that_was_left_is_ended_by_its_identity", leave),
        trial("identities_tell_mounts_apart", identities),
        trial("another_namespace_is_not_this_one", other_namespace),
        trial("a_covered_mount_is_not_unmounted", covered),
        trial("the_probe_says_what_works", probe_works),
        trial("hidden_calls_lead_down_the_ladder", hidden_calls),
        trial("without_the_calls_that_map_ids_it_is_said", no_mapped_ids),
    ];
    for rung in Rung::ALL {
        for layers in [1, 2, 128, MAX_LAYERS] {
            let name = format!("{layers}_layers_by_{rung:?}");
            mounting.push(Trial::test(name, move || many(rung, layers)));
        }
    }
    let cannot = cannot_mount();
    let mut trials: Vec<Trial> = mounting
        .into_iter()
        .map(|trial| match &cannot {
            None => trial,
            Some(reason) => trial.with_kind(reason).with_ignored_flag(true),
        })
        .collect();
    trials.push(trial("aufs_layers_are_unsupported", aufs));
    trials.push(trial("mounts_are_plain_data", plain_data));
    trials.push(trial("without_rights_the_remedy_is_told", without_rights));
    let no_namespace = !Command::new("unshare")
        .args(["-Urm", "true"])
        .output()
        .is_ok_and(|out| out.status.success());
    let mut trial = trial("in_a_user_namespace", in_a_user_namespace);
    if no_namespace {
        trial = trial.with_kind("needs unshare -Urm").with_ignored_flag(true);
    }
    trials.push(trial);
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trial(name: &str, test: fn()) -> Trial {
    Trial::test(name, move || {
        test();
        Ok::<(), Failed>(())
    })
}

/// None if this process may mount.
fn cannot_mount() -> Option<String> {
    let stage = Stage::new();
    let request = MountRequest::new(LayerFormat::OverlayTrusted, stage.empty());
    match OverlayDriver::new().activate(&request, &stage.target()) {
        Ok(_guard) => None,
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Some("needs root".to_owned()),
        // Anything else is for the tests to find.
        Err(_) => None,
    }
}

/// A directory for layers, and a target.
struct Stage(TempDir);

impl Stage {
    fn new() -> Self {
        let stage = Stage(tempfile::tempdir().unwrap());
        for name in ["empty", "target"] {
            stage.dir(name);
        }
        stage
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    fn dir(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A layer with one file.
    fn layer(&self, name: impl AsRef<Path>, file: &str) -> PathBuf {
        let dir = self.dir(name);
        fs::write(dir.join(file), file).unwrap();
        dir
    }

    fn upper(&self, name: &str) -> UpperDir {
        UpperDir { dir: self.dir(format!("{name}-upper")), work: self.dir(format!("{name}-work")) }
    }

    fn empty(&self) -> PathBuf {
        self.path("empty")
    }

    fn target(&self) -> PathBuf {
        self.path("target")
    }

    fn request(&self, lower: impl IntoIterator<Item = PathBuf>) -> MountRequest {
        let mut request = MountRequest::new(LayerFormat::OverlayTrusted, self.empty());
        request.lower = lower.into_iter().collect();
        request
    }
}

fn drivers() -> impl Iterator<Item = (Rung, OverlayDriver)> {
    Rung::ALL.into_iter().map(|rung| (rung, OverlayDriver::with_rung(rung)))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn is_mounted(target: &Path) -> bool {
    mountinfo(target).is_some()
}

/// The line of mountinfo of what is mounted there.
fn mountinfo(target: &Path) -> Option<String> {
    let target = target.to_str().unwrap();
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let line = table.lines().rfind(|l| l.split(' ').nth(4) == Some(target));
    line.map(str::to_owned)
}

fn assert_error(e: &Error, kind: ErrorKind, texts: &[&str]) {
    let text = e.to_string();
    assert_eq!(e.kind(), kind, "{text}");
    for part in texts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

fn whiteout(path: &Path) {
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, rustix::fs::Mode::empty(), 0).unwrap();
}

// Layers.

fn many(rung: Rung, count: usize) -> Result<(), Failed> {
    let stage = Stage::new();
    let lower: Vec<PathBuf> = (0..count)
        .map(|i| {
            let dir = stage.layer(i.to_string(), &format!("of-{i}"));
            fs::write(dir.join("all"), i.to_string()).unwrap();
            dir
        })
        .collect();
    let driver = OverlayDriver::with_rung(rung);
    let mut request = stage.request(lower);
    let expected = count + 1;

    let guard = driver.activate(&request, &stage.target())?;
    assert_eq!(names(guard.target()).len(), expected);
    assert_eq!(fs::read_to_string(guard.target().join("all"))?, "0");
    drop(guard);

    request.upper = Some(stage.upper("own"));
    let mut guard = driver.activate(&request, &stage.target())?;
    fs::write(guard.target().join("all"), "changed")?;
    fs::remove_file(guard.target().join(format!("of-{}", count - 1)))?;
    assert_eq!(names(guard.target()).len(), expected - 1);
    guard.unmount()?;
    assert_eq!(fs::read_to_string(stage.path("own-upper/all"))?, "changed");
    assert_eq!(fs::read_to_string(stage.path("0/all"))?, "0");
    Ok(())
}

fn limit() {
    let stage = Stage::new();
    // None of them exists: the answer comes before anything is opened.
    let request = stage.request((0..=MAX_LAYERS).map(|i| stage.path(format!("no-{i}"))));
    for (_, driver) in drivers() {
        let e = driver.activate(&request, &stage.target()).unwrap_err();
        assert_error(
            &e,
            ErrorKind::LimitExceeded,
            &["overlay refused 501 layers: the kernel's limit is 500"],
        );
    }
}

fn odd_paths() {
    let long = "l".repeat(250);
    let odd: Vec<PathBuf> = [
        b"co:lon".as_slice(),
        b"com,ma",
        br"back\slash\",
        br"\:\,",
        b" blanks \t",
        b"new\nline",
        b"not utf-8 \xff\xfe",
        b"::",
        b"quote\"s'",
    ]
    .iter()
    .map(|bytes| PathBuf::from(OsStr::from_bytes(bytes)))
    .chain([[long.as_str(); 15].iter().collect()])
    .collect();
    for (rung, driver) in drivers() {
        let stage = Stage::new();
        let lower: Vec<PathBuf> =
            odd.iter().enumerate().map(|(i, name)| stage.layer(name, &format!("of-{i}"))).collect();
        let target = stage.dir(OsStr::from_bytes(b"tar,get:\\\n\xff"));
        let mut request = stage.request(lower);
        request.upper = Some(UpperDir {
            dir: stage.dir(OsStr::from_bytes(b"up,per:\\ \xff")),
            work: stage.dir(OsStr::from_bytes(b"wo,rk:\\\n\xff")),
        });
        let mut guard =
            driver.activate(&request, &target).unwrap_or_else(|e| panic!("{rung:?}: {e}"));
        assert_eq!(names(&target).len(), odd.len(), "{rung:?}");
        fs::write(target.join("new"), "").unwrap();
        guard.unmount().unwrap();
        assert!(request.upper.unwrap().dir.join("new").exists());
    }
}

fn beyond_path_max() {
    use rustix::fs::{Mode, OFlags, mkdirat, openat};
    let stage = Stage::new();
    let mut path = stage.dir("deep");
    let mut dir = rustix::fs::open(&path, OFlags::PATH, Mode::empty()).unwrap();
    while path.as_os_str().len() < 6000 {
        let name = "d".repeat(200);
        mkdirat(&dir, &name, Mode::RWXU).unwrap();
        dir = openat(&dir, &name, OFlags::PATH, Mode::empty()).unwrap();
        path.push(name);
    }
    for name in ["lower", "upper", "work", "target"] {
        mkdirat(&dir, name, Mode::RWXU).unwrap();
    }
    let mut request = stage.request([path.join("lower"), stage.layer("short", "seen")]);
    request.upper = Some(UpperDir { dir: path.join("upper"), work: path.join("work") });
    let seen = |guard: &stratafs::Guard| {
        assert_eq!(guard.state().unwrap(), MountState::Mounted);
        let flags = OFlags::PATH;
        let target = openat(&dir, "target", flags, Mode::empty()).unwrap();
        rustix::fs::statat(&target, "seen", rustix::fs::AtFlags::empty()).is_ok()
    };
    for driver in [OverlayDriver::new(), OverlayDriver::with_rung(Rung::MountCall)] {
        let mut guard = driver.activate(&request, &path.join("target")).unwrap();
        assert!(seen(&guard));
        guard.unmount().unwrap();
        assert_eq!(guard.state().unwrap(), MountState::Gone);
    }
}

fn same_tree() {
    let stage = Stage::new();
    let [a, b, c] = ["a", "b", "c"].map(|name| stage.layer(name, &format!("only-{name}")));
    fs::create_dir(c.join("dir")).unwrap();
    fs::write(c.join("dir/hidden"), "x").unwrap();
    fs::write(c.join("gone"), "x").unwrap();
    whiteout(&b.join("gone"));
    fs::create_dir(b.join("dir")).unwrap();
    rustix::fs::setxattr(
        b.join("dir"),
        "trusted.overlay.opaque",
        b"y",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    fs::write(b.join("dir/shown"), "x").unwrap();
    symlink("only-c", a.join("link")).unwrap();
    fs::set_permissions(a.join("only-a"), fs::Permissions::from_mode(0o4711)).unwrap();
    let request = stage.request([a, b, c]);

    let trees: Vec<BTreeMap<PathBuf, String>> = drivers()
        .map(|(_, driver)| {
            let guard = driver.activate(&request, &stage.target()).unwrap();
            walkdir::WalkDir::new(guard.target())
                .into_iter()
                .map(|entry| {
                    let entry = entry.unwrap();
                    let m = entry.path().symlink_metadata().unwrap();
                    let told = format!("{:o} {} {} {}", m.mode(), m.ino(), m.size(), m.mtime());
                    let path = entry.path().strip_prefix(guard.target()).unwrap();
                    (path.to_owned(), told)
                })
                .collect()
        })
        .collect();
    let shown: Vec<&Path> = trees[0].keys().map(PathBuf::as_path).collect();
    let expected = ["", "dir", "dir/shown", "link", "only-a", "only-b", "only-c"];
    assert_eq!(shown, expected.map(Path::new));
    assert_eq!(trees[0], trees[1]);
    assert_eq!(trees[0], trees[2]);
}

fn marks_stay_hidden() {
    let stage = Stage::new();
    let lower = stage.layer("lower", "file");
    whiteout(&lower.join("gone"));
    let request = stage.request([lower]);
    for (_, driver) in drivers() {
        let guard = driver.activate(&request, &stage.target()).unwrap();
        assert_eq!(names(guard.target()), ["file"]);
    }
}

fn bind_mounts() {
    let stage = Stage::new();
    let driver = OverlayDriver::new();

    let mut single = stage.request([stage.layer("lower", "file")]);
    single.lower_has_marks = false;
    assert!(matches!(
        driver.mounts(&single).unwrap().as_slice(),
        [Mount::Bind { restrictions, .. }] if restrictions.read_only
    ));
    let guard = driver.activate(&single, &stage.target()).unwrap();
    assert_eq!(names(guard.target()), ["file"]);
    let refused = fs::write(guard.target().join("file"), "x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    drop(guard);

    let none = stage.request([]);
    let guard = driver.activate(&none, &stage.target()).unwrap();
    assert!(names(guard.target()).is_empty());
    assert!(fs::write(guard.target().join("file"), "x").is_err());
    drop(guard);

    let mut upper = stage.request([]);
    upper.upper = Some(stage.upper("own"));
    let guard = driver.activate(&upper, &stage.target()).unwrap();
    fs::write(guard.target().join("file"), "x").unwrap();
    drop(guard);
    assert!(names(&stage.target()).is_empty());
    assert_eq!(names(&stage.path("own-upper")), ["file"]);
}

fn views_refuse_writes() {
    let stage = Stage::new();
    let request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
    for (_, driver) in drivers() {
        let guard = driver.activate(&request, &stage.target()).unwrap();
        let refused = fs::write(guard.target().join("a"), "x").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        let refused = fs::create_dir(guard.target().join("new")).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }
}

fn restrictions() {
    let stage = Stage::new();
    let mut union = stage.request([stage.layer("a", "a")]);
    union.upper = Some(stage.upper("own"));
    let mut bind = stage.request([]);
    bind.upper = union.upper.clone();
    for (rung, driver) in drivers() {
        for request in [&union, &bind] {
            let guard = driver.activate(request, &stage.target()).unwrap();
            let line = mountinfo(guard.target()).unwrap();
            assert!(!line.contains("shared:"), "{line}");
            assert!(!line.contains("nosuid") && !line.contains("nodev"), "{line}");
            drop(guard);

            let mut request = request.clone();
            request.options.restrictions.nosuid = true;
            request.options.restrictions.nodev = true;
            request.options.restrictions.noexec = true;
            request.options.restrictions.read_only = true;
            let guard = driver.activate(&request, &stage.target()).unwrap();
            let line = mountinfo(guard.target()).unwrap();
            let own = line.split(' ').nth(5).unwrap();
            for word in ["ro", "nosuid", "nodev", "noexec"] {
                assert!(own.split(',').any(|w| w == word), "{rung:?}: {line}");
            }
        }
        let guard = driver.activate(&union, &stage.target()).unwrap();
        let line = mountinfo(guard.target()).unwrap();
        // What is off is not shown; what is on by a distribution's default would be.
        for word in ["metacopy=on", "index=on", "redirect_dir=on", "redirect_dir=follow"] {
            assert!(!line.contains(word), "{line}");
        }
    }
}

fn volatile() {
    for (rung, driver) in drivers() {
        let stage = Stage::new();
        let mut request = stage.request([stage.layer("a", "a")]);
        request.upper = Some(stage.upper("own"));
        request.options.volatile = true;
        let mut guard = driver.activate(&request, &stage.target()).unwrap();
        assert!(mountinfo(guard.target()).unwrap().contains("volatile"));
        guard.unmount().unwrap();

        let e = driver.activate(&request, &stage.target()).unwrap_err();
        assert_error(&e, ErrorKind::FailedPrecondition, &["volatile", "discard it"]);
        fs::remove_dir_all(stage.path("own-work/work/incompat/volatile")).unwrap();
        drop(
            driver.activate(&request, &stage.target()).unwrap_or_else(|e| panic!("{rung:?}: {e}")),
        );
    }
}

// Errors.

fn bad_targets() {
    let stage = Stage::new();
    let lower = [stage.layer("layers/a", "a"), stage.layer("layers/b", "b")];
    fs::create_dir(stage.path("layers/a/inside")).unwrap();
    symlink("target", stage.path("link")).unwrap();
    let request = stage.request(lower);
    let refused = |driver: &OverlayDriver, target: &str| {
        driver.activate(&request, &stage.path(target)).unwrap_err()
    };
    for (_, driver) in drivers() {
        let e = refused(&driver, "none");
        assert_error(&e, ErrorKind::NotFound, &["mount target", "none"]);
        let e = refused(&driver, "none/below");
        assert_error(&e, ErrorKind::NotFound, &["mount target", "none/below"]);
        for target in ["layers/a/a", "link", "link/"] {
            let e = refused(&driver, target);
            assert_error(&e, ErrorKind::InvalidArgument, &["not a directory"]);
        }
        let e = refused(&driver, "target/..");
        assert_error(&e, ErrorKind::InvalidArgument, &["end in a name"]);
        for target in ["layers/a", "layers/b", "layers/a/inside"] {
            let e = refused(&driver, target);
            assert_error(&e, ErrorKind::InvalidArgument, &["holds the mount target", target]);
        }
        let e = refused(&driver, "layers");
        assert_error(&e, ErrorKind::InvalidArgument, &["hidden below the mount target"]);
    }
    assert!(!is_mounted(&stage.target()));
}

fn refusals() {
    let stage = Stage::new();
    let a = stage.layer("a", "a");
    let inside = stage.layer("a/inside", "b");
    for (rung, driver) in drivers() {
        let refused = |request: &MountRequest| match driver.activate(request, &stage.target()) {
            Ok(_) => panic!("{rung:?}: mounted"),
            Err(e) => e,
        };
        let e = refused(&stage.request([a.clone(), inside.clone()]));
        assert_error(&e, ErrorKind::InvalidArgument, &["inside another"]);

        let e = refused(&stage.request([a.clone(), stage.path("none")]));
        assert_error(&e, ErrorKind::NotFound, &["cannot open layer", "none"]);

        let e = refused(&stage.request([a.clone(), a.join("a")]));
        assert_error(&e, ErrorKind::InvalidArgument, &["Not a directory", "a/a"]);

        let mut request = stage.request([a.clone()]);
        let both = stage.dir("both");
        request.upper = Some(UpperDir { dir: both.clone(), work: both });
        let e = refused(&request);
        assert_error(&e, ErrorKind::InvalidArgument, &["must not be the same"]);

        request.upper = Some(UpperDir { dir: stage.dir("upper"), work: "/proc".into() });
        let e = refused(&request);
        assert_error(&e, ErrorKind::InvalidArgument, &["upper"]);
        assert!(e.io_error().is_some());
    }
    // The third overlay on the second on the first.
    let driver = OverlayDriver::new();
    let mut guards = Vec::new();
    let mut lower = a;
    for i in 0..2 {
        let target = stage.dir(format!("stacked-{i}"));
        let request = stage.request([lower, stage.layer(format!("more-{i}"), "m")]);
        guards.push(driver.activate(&request, &target).unwrap());
        lower = target;
    }
    let e =
        driver.activate(&stage.request([lower, stage.dir("more")]), &stage.target()).unwrap_err();
    assert_error(&e, ErrorKind::InvalidArgument, &["stacks no more than two"]);
    while let Some(mut guard) = guards.pop() {
        guard.unmount().unwrap();
    }
}

fn aufs() {
    let mut request = MountRequest::new(LayerFormat::Aufs, "/empty");
    request.lower = vec!["/a".into(), "/b".into()];
    let e = OverlayDriver::new().activate(&request, Path::new("/target")).unwrap_err();
    assert_error(&e, ErrorKind::Unsupported, &["does not read", "aufs"]);
}

fn plain_data() {
    let mut request = MountRequest::new(LayerFormat::OverlayUser, "/empty");
    request.lower = vec!["/a".into()];
    request.upper = Some(UpperDir { dir: "/u".into(), work: "/w".into() });
    request.options.volatile = true;
    let mounts = OverlayDriver::new().mounts(&request).unwrap();
    let [mount] = mounts.as_slice() else { panic!("{mounts:?}") };
    assert_eq!(mount.fstype(), "overlay");
    assert_eq!(mount.source(), Path::new("overlay"));
    assert_eq!(
        mount.options().join(OsStr::new(",")),
        "lowerdir=/a,upperdir=/u,workdir=/w,redirect_dir=nofollow,metacopy=off,index=off,xino=auto,\
         userxattr,volatile,rw"
    );
}

// Guards and identities.

fn drop_unmounts() {
    let stage = Stage::new();
    let request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
    for (_, driver) in drivers() {
        let guard = driver.activate(&request, &stage.target()).unwrap();
        assert!(is_mounted(&stage.target()));
        assert_eq!(guard.visibility().unwrap(), Visibility::Caller);
        drop(guard);
        assert!(!is_mounted(&stage.target()));
    }
    // Relative targets, and gone already.
    let guard = OverlayDriver::new().activate(&request, &stage.target()).unwrap();
    unmount_at(&stage.target(), None).unwrap();
    assert_eq!(guard.state().unwrap(), MountState::Gone);
    drop(guard);
}

fn busy() {
    let stage = Stage::new();
    let mut request = stage.request([stage.layer("a", "a")]);
    request.upper = Some(stage.upper("own"));
    let driver = OverlayDriver::new();

    let mut guard = driver.activate(&request, &stage.target()).unwrap();
    let mut open = fs::File::create(guard.target().join("open")).unwrap();
    let e = guard.unmount().unwrap_err();
    assert_error(&e, ErrorKind::Busy, &["in use", "fuser"]);
    assert_eq!(guard.state().unwrap(), MountState::Mounted);
    drop(open);
    guard.unmount().unwrap();
    assert_eq!(guard.state().unwrap(), MountState::Gone);
    guard.unmount().unwrap();

    let guard = driver.activate(&request, &stage.target()).unwrap();
    open = fs::File::create(guard.target().join("open")).unwrap();
    drop(guard);
    assert!(!is_mounted(&stage.target()));
    open.write_all(b"still there").unwrap();
    drop(open);
    assert_eq!(fs::read(stage.path("own-upper/open")).unwrap(), b"still there");
}

fn leave() {
    let stage = Stage::new();
    let request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
    let target = stage.target();
    let driver = OverlayDriver::new();

    let first = driver.activate(&request, &target).unwrap().leave().unwrap();
    assert_eq!(first.state(&target).unwrap(), MountState::Mounted);
    unmount_at(&target, Some(&first)).unwrap();
    assert_eq!(first.state(&target).unwrap(), MountState::Gone);
    let e = unmount_at(&target, Some(&first)).unwrap_err();
    assert_error(&e, ErrorKind::FailedPrecondition, &["nothing is mounted"]);

    symlink("target", stage.path("link")).unwrap();
    let second = driver.activate(&request, &target).unwrap();
    let e = unmount_at(&stage.path("link"), None).unwrap_err();
    assert_error(&e, ErrorKind::FailedPrecondition, &["nothing is mounted"]);
    if first.unique_id().is_some() {
        let e = unmount_at(&target, Some(&first)).unwrap_err();
        assert_error(&e, ErrorKind::FailedPrecondition, &["but another"]);
    }
    assert_eq!(second.state().unwrap(), MountState::Mounted);
}

fn identities() {
    let stage = Stage::new();
    let request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
    let target = stage.target();
    for (_, driver) in drivers() {
        let guard = driver.activate(&request, &target).unwrap();
        let first = guard.identity().clone();
        let line = mountinfo(&target).unwrap();
        assert_eq!(line.split(' ').next(), Some(first.mount_id().to_string().as_str()));
        let json = serde_json::to_string(&first).unwrap();
        assert_eq!(serde_json::from_str::<stratafs::MountIdentity>(&json).unwrap(), first);

        // Of an earlier boot.
        let old = json.replace(first.boot_id(), "00000000-0000-0000-0000-000000000000");
        let old: stratafs::MountIdentity = serde_json::from_str(&old).unwrap();
        assert_eq!(old.state(&target).unwrap(), MountState::Gone);

        // As a kernel before 6.8 tells it.
        let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
        value["unique_id"] = serde_json::Value::Null;
        let plain: stratafs::MountIdentity = serde_json::from_value(value).unwrap();
        assert_eq!(plain.state(&target).unwrap(), MountState::Mounted);

        drop(guard);
        assert_eq!(first.state(&target).unwrap(), MountState::Gone);
        let second = driver.activate(&request, &target).unwrap();
        assert_eq!(second.state().unwrap(), MountState::Mounted);
        if first.unique_id().is_some() {
            assert_eq!(first.state(&target).unwrap(), MountState::Gone);
            assert_ne!(&first, second.identity());
        }
    }
}

fn other_namespace() {
    let stage = Stage::new();
    let request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
    let mut guard = OverlayDriver::new().activate(&request, &stage.target()).unwrap();
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: the thread shares no descriptor table that it would lose.
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
                    .unwrap();
                assert_eq!(guard.state().unwrap(), MountState::OtherNamespace);
                assert!(matches!(guard.visibility().unwrap(), Visibility::Namespace(_)));
                let e = guard.unmount().unwrap_err();
                assert_error(&e, ErrorKind::FailedPrecondition, &["another mount namespace"]);
            })
            .join()
            .unwrap();
    });
    assert_eq!(guard.state().unwrap(), MountState::Mounted);
}

fn covered() {
    let stage = Stage::new();
    let request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
    let driver = OverlayDriver::new();
    let mut below = driver.activate(&request, &stage.target()).unwrap();
    let mut above = driver.activate(&stage.request([]), &stage.target()).unwrap();
    let e = below.unmount().unwrap_err();
    assert_error(&e, ErrorKind::Busy, &["another mount lies over"]);
    assert_eq!(below.state().unwrap(), MountState::Mounted);
    above.unmount().unwrap();
    below.unmount().unwrap();
    assert!(!is_mounted(&stage.target()));
}

// Calls that a kernel lacks, probes, rights, user namespaces.

/// Makes the calling thread, and those it starts, get `errno` from these system calls: as on an older
/// kernel (ENOSYS), or in a container whose filter does not know them (EPERM).
fn hide(calls: &[libc::c_long], errno: i32) {
    let step =
        |code: u32, jump: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: jump, k };
    // Load the number of the call; for each hidden one, compare and return.
    let mut program = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for call in calls {
        program.push(step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, *call as u32));
        program.push(step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno as u32));
    }
    program.push(step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls concern this thread alone; the program lives until they return.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        assert_eq!(libc::syscall(libc::SYS_seccomp, mode, 0, &filter), 0);
    }
}

fn hidden_calls() {
    let statmount = libc::SYS_mount_setattr - 442 + 457;
    let attributes = [libc::SYS_mount_setattr, statmount];
    let all = [libc::SYS_fsopen, libc::SYS_open_tree, libc::SYS_mount_setattr, statmount];
    let late = [libc::SYS_move_mount];
    for errno in [libc::ENOSYS, libc::EPERM] {
        for calls in [attributes.as_slice(), &all, &late] {
            let test = move || {
                let stage = Stage::new();
                hide(calls, errno);
                let driver = OverlayDriver::new();
                let mut union = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
                union.upper = Some(stage.upper("own"));
                let bind = stage.request([]);
                for request in [&union, &bind] {
                    let mut guard = driver.activate(request, &stage.target()).unwrap();
                    let line = mountinfo(guard.target()).unwrap();
                    assert!(!line.contains("shared:"), "{line}");
                    let own = line.split(' ').nth(5).unwrap();
                    let read_only = own.split(',').any(|word| word == "ro");
                    assert_eq!(read_only, request.upper.is_none(), "{line}");
                    assert_eq!(guard.state().unwrap(), MountState::Mounted);
                    guard.unmount().unwrap();
                    assert_eq!(guard.identity().state(guard.target()).unwrap(), MountState::Gone);
                }
                let mut guard = driver.activate(&union, &stage.target()).unwrap();
                let above = driver.activate(&bind, &stage.target()).unwrap();
                assert!(guard.unmount().is_err());
                drop(above);
                guard.unmount().unwrap();
            };
            std::thread::scope(|scope| scope.spawn(test).join().unwrap());
        }
    }
    // A rung that is asked for and lacking says so.
    std::thread::spawn(move || {
        let stage = Stage::new();
        hide(&all, libc::ENOSYS);
        let driver = OverlayDriver::with_rung(Rung::LayerStrings);
        let request = stage.request([stage.layer("a", "a")]);
        let e = driver.activate(&request, &stage.target()).unwrap_err();
        assert_error(&e, ErrorKind::Unsupported, &["not implemented"]);
        let target = ProbeTarget::new(stage.0.path(), LayerFormat::OverlayTrusted);
        let probe = OverlayDriver::new().probe(&target).unwrap();
        let rung = probe.features.iter().find(|f| f.name == "layers-by").unwrap();
        assert!(rung.reason.starts_with("mount(2)"), "{probe}");
        assert!(rung.reason.contains("not implemented"), "{probe}");
    })
    .join()
    .unwrap();
}

fn no_mapped_ids() {
    let hidden =
        |calls: &'static [libc::c_long], errno, test: fn(&OverlayDriver, [&MountRequest; 2])| {
            let test = move || {
                let stage = Stage::new();
                hide(calls, errno);
                let mut union = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
                union.upper = Some(stage.upper("own"));
                union.options.ids =
                    ShownIds::same(vec![IdRange { host: 0, shown: 100_000, len: 65_536 }]);
                let mut bind = union.clone();
                bind.lower.clear();
                test(&OverlayDriver::new(), [&union, &bind]);
            };
            std::thread::scope(|scope| scope.spawn(test).join().unwrap());
        };
    fn refused(driver: &OverlayDriver, request: &MountRequest) -> Error {
        let target = request.empty.with_file_name("target");
        let e = driver.activate(request, &target).unwrap_err();
        assert!(!is_mounted(&target));
        e
    }
    for calls in [&[libc::SYS_mount_setattr][..], &[libc::SYS_open_tree]] {
        hidden(calls, libc::ENOSYS, |driver, requests| {
            for request in requests {
                let e = refused(driver, request);
                assert_error(&e, ErrorKind::Unsupported, &["Linux 5.12", "the driver fuse"]);
            }
        });
        hidden(calls, libc::EPERM, |driver, requests| {
            for request in requests {
                let e = refused(driver, request);
                assert_error(&e, ErrorKind::PermissionDenied, &["CAP_SYS_ADMIN"]);
            }
        });
    }
    // What only leads down the ladder.
    hidden(&[libc::SYS_fsopen], libc::ENOSYS, |driver, requests| {
        for request in requests {
            let target = request.empty.with_file_name("target");
            let mut guard = driver.activate(request, &target).unwrap();
            assert_eq!(target.metadata().unwrap().uid(), 100_000);
            guard.unmount().unwrap();
        }
    });
    hidden(&[libc::SYS_move_mount], libc::ENOSYS, |driver, requests| {
        for request in requests {
            assert_error(&refused(driver, request), ErrorKind::Unsupported, &["not implemented"]);
        }
    });
    hidden(&[libc::SYS_clone], libc::EPERM, |driver, [_, request]| {
        assert_error(&refused(driver, request), ErrorKind::PermissionDenied, &["user namespace"]);
    });
}

fn probe_works() {
    let stage = Stage::new();
    let target = ProbeTarget::new(stage.dir("room"), LayerFormat::OverlayTrusted);
    let probe = OverlayDriver::new().probe(&target).unwrap();
    assert!(probe.usable(), "{probe}");
    assert!(probe.features.iter().any(|f| f.name == "layers-by" && f.available));
    assert!(probe.to_string().contains("whiteout-device: yes"), "{probe}");
    let json = serde_json::to_value(&probe).unwrap();
    assert_eq!(json["upper"]["available"], true);
    assert!(names(&stage.path("room")).is_empty());

    let e = OverlayDriver::new()
        .probe(&ProbeTarget::new(stage.path("none"), LayerFormat::OverlayUser))
        .unwrap_err();
    assert_error(&e, ErrorKind::NotFound, &["directory for trials"]);

    // A file system that cannot hold an upper directory: an overlay's view of writable layers can
    // hold no trusted marks of another overlay.
    let mut request = stage.request([stage.layer("a", "a")]);
    request.upper = Some(stage.upper("own"));
    let guard = OverlayDriver::new().activate(&request, &stage.target()).unwrap();
    let target = ProbeTarget::new(guard.target(), LayerFormat::OverlayTrusted);
    let probe = OverlayDriver::new().probe(&target).unwrap();
    assert!(!probe.upper.available, "{probe}");
    assert!(probe.upper.reason.contains("overlay"), "{probe}");
}

/// Runs as an ordinary user: by giving up root in a thread of its own.
fn as_nobody(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                if rustix::process::geteuid().is_root() {
                    let id = 65534;
                    // SAFETY: the plain system call, unlike the C library's, changes this thread
                    // alone, which ends with the test.
                    let done = unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) };
                    assert_eq!(done, 0);
                }
                test();
            })
            .join()
            .unwrap();
    });
}

fn without_rights() {
    let stage = Stage::new();
    let lower = [stage.layer("a", "a"), stage.layer("b", "b")];
    let room = stage.dir("room");
    for dir in [stage.0.path(), &room] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
    }
    as_nobody(|| {
        let union = stage.request(lower);
        let bind = stage.request([]);
        for driver in drivers().map(|(_, driver)| driver).chain([OverlayDriver::new()]) {
            for request in [&union, &bind] {
                let e = driver.activate(request, &stage.target()).unwrap_err();
                assert_error(&e, ErrorKind::PermissionDenied, &["CAP_SYS_ADMIN", "unshare -Urm"]);
            }
        }
        let target = ProbeTarget::new(&room, LayerFormat::OverlayUser);
        let probe = OverlayDriver::new().probe(&target).unwrap();
        assert!(!probe.usable());
        assert!(probe.mount.reason.contains("CAP_SYS_ADMIN"), "{probe}");
        assert!(names(&room).is_empty());
    });
}

fn in_a_user_namespace() {
    let out = Command::new("unshare")
        .arg("-Urm")
        .arg(std::env::current_exe().unwrap())
        .arg(IN_NAMESPACE)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}");
    assert!(text.contains("3 passed"), "{text}");
}

fn user_xattr_layers() {
    for (rung, driver) in drivers() {
        let stage = Stage::new();
        let mut request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
        request.format = LayerFormat::OverlayUser;
        request.upper = Some(stage.upper("own"));
        let mut guard =
            driver.activate(&request, &stage.target()).unwrap_or_else(|e| panic!("{rung:?}: {e}"));
        fs::remove_file(guard.target().join("b")).unwrap();
        guard.unmount().unwrap();
        let mark = stage.path("own-upper/b").symlink_metadata().unwrap();
        assert!(mark.file_type().is_char_device() && mark.rdev() == 0);
    }
    let stage = Stage::new();
    let target = ProbeTarget::new(stage.0.path(), LayerFormat::OverlayUser);
    let probe = OverlayDriver::new().probe(&target).unwrap();
    assert!(probe.usable(), "{probe}");
    let trusted = probe.features.iter().find(|f| f.name == "overlay-trusted");
    assert!(!trusted.unwrap().available, "{probe}");
}

fn trusted_layers_are_refused() {
    let stage = Stage::new();
    let request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
    let e = OverlayDriver::new().activate(&request, &stage.target()).unwrap_err();
    assert_error(&e, ErrorKind::PermissionDenied, &["overlay-user"]);
}

fn ids_in_a_namespace() {
    let stage = Stage::new();
    let try_in = |dir: &str| {
        let mut request =
            stage.request(["a", "b"].map(|name| stage.layer(format!("{dir}/{name}"), name)));
        request.format = LayerFormat::OverlayUser;
        request.upper = Some(stage.upper(&format!("{dir}/own")));
        // The one id that there is.
        request.options.ids.uids = vec![IdRange { host: 0, shown: 0, len: 1 }];
        let mut guard = OverlayDriver::new().activate(&request, &stage.target())?;
        fs::write(guard.target().join("a"), "changed").unwrap();
        fs::remove_file(guard.target().join("b")).unwrap();
        guard.unmount()
    };
    let e = try_in("outside").unwrap_err();
    assert_error(&e, ErrorKind::PermissionDenied, &["file system", "the driver fuse"]);
    let inside = stage.dir("inside");
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &inside, "tmpfs", flags, None).unwrap();
    let tried = try_in("inside");
    rustix::mount::unmount(&inside, rustix::mount::UnmountFlags::DETACH).unwrap();
    tried.unwrap();
    // An id that the namespace has not.
    let mut request = stage.request([stage.layer("a", "a"), stage.layer("b", "b")]);
    request.format = LayerFormat::OverlayUser;
    request.options.ids.uids = vec![IdRange { host: 0, shown: 1, len: 1 }];
    let e = OverlayDriver::new().activate(&request, &stage.target()).unwrap_err();
    assert_error(&e, ErrorKind::PermissionDenied, &["all these ids"]);
}
