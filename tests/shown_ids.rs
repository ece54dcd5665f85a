//! Other ids than files have, on every engine and every rung: what a container's user namespace sees, what it
//! may change, and whose that is on disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/suite.rs"]
#[allow(dead_code, reason = "each suite uses its part")]
mod suite;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

#[cfg(feature = "fuse")]
use stratafs::FuseDriver;
use stratafs::{
    ApplyOptions, CopyDriver, Driver, DriverChoice, ErrorKind, ExportOptions, IdRange, Labels,
    LayerFormat, Mount, MountOptions, MountRequest, OverlayDriver, ProbeTarget, Rung, ShownIds,
    Store, StoreOptions, UpperDir, ignore_progress,
};

const ACL: &str = "system.posix_acl_access";

fn main() {
    let root = || suite::needs_root().or_else(|| suite::needs_program("nsenter"));
    let mut trials = vec![
        suite::trial("what_is_no_mapping_is_refused", None, no_mapping),
        suite::trial("mounts_say_the_ids_as_plain_data", None, plain_data),
        suite::trial("in_place_there_are_no_other_ids", root(), in_place),
        suite::trial("the_probe_tells_of_ids", root(), probe),
        suite::trial("a_file_system_that_cannot_is_named", root(), cannot),
        suite::trial("an_upper_whose_owner_is_not_shown_is_refused", root(), owner_not_shown),
        suite::trial("an_upper_may_lie_anywhere_on_its_mount", root(), upper_anywhere),
        suite::trial("a_process_that_mounts_so_stays_as_it_is", root(), process_stays),
        suite::trial("many_layers_are_mapped", root(), many_layers),
    ];
    let mut container = |name: String, driver: fn() -> Box<dyn Driver>| {
        let test = move || as_a_container_sees_it(driver().as_ref());
        trials.push(suite::trial(format!("a_container_has_its_ids_by_{name}"), root(), test));
    };
    container("LayerDescriptors".into(), || on_rung(Rung::LayerDescriptors, false));
    container("LayerStrings".into(), || on_rung(Rung::LayerStrings, false));
    container("MountCall".into(), || on_rung(Rung::MountCall, false));
    container("LayerDescriptors_in_a_namespace".into(), || on_rung(Rung::LayerDescriptors, true));
    container("LayerStrings_in_a_namespace".into(), || on_rung(Rung::LayerStrings, true));
    container("copy".into(), || Box::new(CopyDriver::new()));
    #[cfg(feature = "fuse")]
    container("fuse".into(), || Box::new(FuseDriver::new()));
    for choice in [
        DriverChoice::Overlay,
        DriverChoice::Copy,
        #[cfg(feature = "fuse")]
        DriverChoice::Fuse,
    ] {
        let name = format!("a_layer_has_the_ids_of_the_container_by_{choice:?}");
        trials.push(suite::trial(name, root(), move || store(choice)));
    }
    suite::run_one_by_one(trials);
}

fn on_rung(rung: Rung, in_namespace: bool) -> Box<dyn Driver> {
    let driver = OverlayDriver::with_rung(rung);
    Box::new(if in_namespace { driver.with_layers_in_own_namespace() } else { driver })
}

/// What a user namespace of a container usually has: 65536 ids from 100000 on.
fn shifted() -> ShownIds {
    ShownIds::same(vec![IdRange { host: 0, shown: 100_000, len: 65_536 }])
}

/// A user namespace with the ids from 100000 on, held by a process that sleeps.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let child = Command::new("unshare").args(["-U", "sleep", "1000"]).spawn().unwrap();
        let of = |what: &str| format!("/proc/{}/{what}", child.id());
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        while fs::read_link(of("ns/user")).unwrap() == own {
            std::thread::yield_now();
        }
        for map in ["uid_map", "gid_map"] {
            fs::write(of(map), "0 100000 65536").unwrap();
        }
        Namespace(child)
    }

    /// Runs a script as root of it, which must do well, and gives what it prints.
    #[track_caller]
    fn run(&self, dir: &Path, script: &str) -> String {
        let out = Command::new("nsenter")
            .args(["-U", "-t", &self.0.id().to_string(), "sh", "-euc", script])
            .current_dir(dir)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{script}: {said}");
        String::from_utf8(out.stdout).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Stage(tempfile::TempDir);

impl Stage {
    /// Layers of an image: of several owners, with a setuid program, xattrs and an ACL.
    fn new() -> Self {
        let stage = Stage(suite::temp());
        for name in ["empty", "target", "top", "low/dir", "low/again", "upper", "work"] {
            fs::create_dir_all(stage.path(name)).unwrap();
        }
        let file = |name: &str, owner: u32, mode: u32| {
            let path = stage.path(name);
            fs::write(&path, name).unwrap();
            chown(&path, Some(owner), Some(owner)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        file("low/root", 0, 0o644);
        file("low/gone", 33, 0o644);
        file("low/again/old", 0, 0o644);
        file("low/beyond", 70_000, 0o644);
        let program = file("low/program", 33, 0o4755);
        setxattr(&program, "user.note", b"kept");
        setxattr(&program, ACL, &acl(34));
        file("top/of-top", 65_535, 0o600);
        chown(stage.path("low/dir"), Some(33), Some(33)).unwrap();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn request(&self) -> MountRequest {
        let mut request = MountRequest::new(LayerFormat::OverlayTrusted, self.path("empty"));
        request.lower = vec![self.path("top"), self.path("low")];
        request.upper = Some(UpperDir { dir: self.path("upper"), work: self.path("work") });
        request.tree = Some(self.path("tree"));
        request.options.ids = shifted();
        request
    }
}

fn setxattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

fn getxattr(path: &Path, name: &str) -> Vec<u8> {
    let mut value = vec![0; 1024];
    let len = rustix::fs::getxattr(path, name, &mut value).unwrap();
    value.truncate(len);
    value
}

/// An ACL by which this user may write.
fn acl(user: u32) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    let none = u32::MAX;
    for (tag, rights, id) in
        [(1_u16, 7_u16, none), (2, 6, user), (4, 5, none), (0x10, 7, none), (0x20, 5, none)]
    {
        value.extend(tag.to_le_bytes());
        value.extend(rights.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

#[track_caller]
fn owner(path: impl AsRef<Path>) -> (u32, u32) {
    let meta = path.as_ref().symlink_metadata().unwrap();
    (meta.uid(), meta.gid())
}

fn as_a_container_sees_it(driver: &dyn Driver) {
    let stage = Stage::new();
    let request = stage.request();
    let copies = driver.name() == "copy";
    let on_disk = stage.path(if copies { "tree" } else { "upper" });
    let namespace = Namespace::new();
    let target = stage.path("target");
    let mut guard = driver.activate(&request, &target).unwrap();

    // From outside.
    for (name, id) in [("root", 100_000), ("dir", 100_033), ("of-top", 165_535), ("beyond", 65_534)]
    {
        assert_eq!(owner(target.join(name)), (id, id), "{name}");
    }
    assert_eq!(owner(&target), (100_000, 100_000));
    let program = target.join("program");
    assert_eq!(program.metadata().unwrap().mode() & 0o7777, 0o4775, "the mask of the ACL");
    assert_eq!(getxattr(&program, "user.note"), b"kept");
    assert_eq!(getxattr(&program, ACL), acl(100_034));
    // Who is not shown can own nothing here.
    let refused = fs::write(target.join("by-the-host"), "").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EOVERFLOW), "{refused}");

    // From inside.
    let seen = namespace.run(&target, "stat -c '%n %u %g' root dir of-top beyond");
    assert_eq!(seen, "root 0 0\ndir 33 33\nof-top 65535 65535\nbeyond 65534 65534\n");
    namespace.run(
        &target,
        "echo new > new; echo web > web; chown 33:34 web; chmod 2755 web
         rm gone; rm -r again; mkdir again; touch again/fresh
         touch -d @1 program; echo more >> dir/file; ln -s x link; chown -h 35:36 link
         mknod pipe p; mv root moved; ln moved hard",
    );
    for forbidden in ["echo x >> beyond", "chown 0 beyond", "chmod 777 beyond", "chown 70000 new"] {
        let script = format!("if {forbidden}; then echo it went well; fi");
        assert_eq!(namespace.run(&target, &script), "", "{forbidden}");
    }
    assert_eq!(owner(target.join("web")), (100_033, 100_034));
    guard.unmount().unwrap();
    drop(guard);

    // On disk.
    for (name, id) in [
        ("new", (0, 0)),
        ("web", (33, 34)),
        ("again/fresh", (0, 0)),
        ("program", (33, 33)),
        ("dir", (33, 33)),
        ("dir/file", (0, 0)),
        ("link", (35, 36)),
        ("pipe", (0, 0)),
        ("moved", (0, 0)),
        ("hard", (0, 0)),
    ] {
        assert_eq!(owner(on_disk.join(name)), id, "{name}");
    }
    assert_eq!(on_disk.join("web").metadata().unwrap().mode() & 0o7777, 0o2755);
    let program = on_disk.join("program");
    assert_eq!(program.metadata().unwrap().mode() & 0o7777, 0o4775);
    assert_eq!(getxattr(&program, "user.note"), b"kept");
    assert_eq!(getxattr(&program, ACL), acl(34));
    if copies {
        assert_eq!(owner(on_disk.join("beyond")), (70_000, 70_000));
    } else {
        assert!(on_disk.join("beyond").symlink_metadata().is_err());
        let whiteout = on_disk.join("gone").symlink_metadata().unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
        assert_eq!((whiteout.uid(), whiteout.gid()), (0, 0));
        assert_eq!(getxattr(&on_disk.join("again"), "trusted.overlay.opaque"), b"y");
    }

    // As it is, then as it was; in turns, on the same layers.
    let mut plain = request.clone();
    plain.options.ids = ShownIds::default();
    for (request, shift) in [(&plain, 0), (&request, 100_000)] {
        let mut guard = driver.activate(request, &target).unwrap();
        assert_eq!(owner(target.join("web")), (shift + 33, shift + 34));
        assert!(!target.join("gone").exists() && !target.join("again/old").exists());
        guard.unmount().unwrap();
    }
    // A view of one layer, which the kernel's engine binds; and one of two.
    for lower in [vec![stage.path("low")], request.lower.clone()] {
        let mut view = request.clone();
        (view.upper, view.lower, view.lower_has_marks) = (None, lower, false);
        let mut guard = driver.activate(&view, &target).unwrap();
        assert_eq!(owner(target.join("program")), (100_033, 100_033));
        let e = fs::write(target.join("new"), "").unwrap_err();
        assert!(matches!(e.raw_os_error(), Some(libc::EROFS | libc::EOVERFLOW)), "{e}");
        guard.unmount().unwrap();
    }
    // A snapshot without layers below.
    let mut alone = request;
    alone.lower.clear();
    for name in ["upper-2", "work-2"] {
        fs::create_dir(stage.path(name)).unwrap();
    }
    alone.upper = Some(UpperDir { dir: stage.path("upper-2"), work: stage.path("work-2") });
    let mut guard = driver.activate(&alone, &target).unwrap();
    namespace.run(&target, "echo x > alone; chown 5:6 alone");
    guard.unmount().unwrap();
    assert_eq!(owner(stage.path("upper-2/alone")), (5, 6));
}

/// Through a store, and out of it again.
fn store(choice: DriverChoice) {
    let dir = suite::temp();
    let mut options = StoreOptions::new();
    options.driver = choice;
    let store = Store::open(dir.path().join("store"), options).unwrap();
    let mut archive = tar::Builder::new(Vec::new());
    for (path, id) in [("etc/", 0), ("etc/www", 33), ("etc/old", 0)] {
        let mut header = tar::Header::new_gnu();
        let is_dir = path.ends_with('/');
        header.set_entry_type(match is_dir {
            true => tar::EntryType::Directory,
            false => tar::EntryType::Regular,
        });
        header.set_mode(if is_dir { 0o755 } else { 0o644 });
        header.set_uid(id);
        header.set_gid(id);
        header.set_size(0);
        archive.append_data(&mut header, path, std::io::empty()).unwrap();
    }
    let archive = archive.into_inner().unwrap();
    let mut from = archive.as_slice();
    let apply = ApplyOptions::default();
    store.apply("base", None, &mut from, &apply, Labels::new(), &mut ignore_progress).unwrap();
    store.prepare("a", Some("base"), Labels::new()).unwrap();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    let mut mount = MountOptions::default();
    mount.ids = shifted();
    let mut guard = store.activate("a", &target, &mount).unwrap();
    assert_eq!(owner(target.join("etc/www")), (100_033, 100_033));
    let namespace = Namespace::new();
    namespace.run(
        &target,
        "touch etc/new; chown 33:44 etc/new; chmod 600 etc/www; rm etc/old; echo > etc/own",
    );
    guard.unmount().unwrap();
    drop(guard);
    let changes: Vec<String> =
        store.changes("a", &mut ignore_progress).unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(changes, ["A /etc/new", "D /etc/old", "A /etc/own", "M /etc/www"]);
    let mut layer = Vec::new();
    store.export("a", &mut layer, &ExportOptions::new(), &mut ignore_progress).unwrap();
    let mut ids = Vec::new();
    for entry in tar::Archive::new(layer.as_slice()).entries().unwrap() {
        let entry = entry.unwrap();
        let header = entry.header();
        let path = entry.path().unwrap().display().to_string();
        ids.push(format!("{path} {} {}", header.uid().unwrap(), header.gid().unwrap()));
    }
    ids.sort();
    let expected =
        ["./ 0 0", "etc/ 0 0", "etc/.wh.old 0 0", "etc/new 33 44", "etc/own 0 0", "etc/www 33 33"];
    assert_eq!(ids, expected);
    assert!(store.check(&mut ignore_progress).unwrap().problems.is_empty());

    mount.ids.gids[0].len = 0;
    suite::fails(store.activate("a", &target, &mount), ErrorKind::InvalidArgument, "group ids");
    suite::fails(store.mounts("a", &mount), ErrorKind::InvalidArgument, "group ids");
}

fn drivers() -> Vec<Box<dyn Driver>> {
    vec![
        Box::new(OverlayDriver::new()),
        Box::new(CopyDriver::new()),
        #[cfg(feature = "fuse")]
        Box::new(FuseDriver::new()),
    ]
}

fn no_mapping() {
    let dir = suite::temp();
    let mut request = MountRequest::new(LayerFormat::OverlayUser, dir.path());
    request.lower = vec![dir.path().into()];
    request.tree = Some(dir.path().join("tree"));
    let range = |host, shown, len| IdRange { host, shown, len };
    for (ranges, naming) in [
        (vec![range(0, 0, 0)], "is empty"),
        (vec![range(0, 100, 10), range(9, 200, 1)], "in common"),
        (vec![range(0, 100, 10), range(10, 109, 1)], "in common"),
        (vec![range(1, 0, u32::MAX)], "largest id"),
    ] {
        request.options.ids = ShownIds { uids: ranges, gids: Vec::new() };
        for driver in drivers() {
            suite::fails(driver.mounts(&request), ErrorKind::InvalidArgument, naming);
        }
    }
}

fn plain_data() {
    let mut request = MountRequest::new(LayerFormat::OverlayUser, "/empty");
    request.lower = vec!["/a".into()];
    request.tree = Some("/tree".into());
    request.options.ids = shifted();
    request.options.ids.gids.push(IdRange { host: 70_000, shown: 5, len: 1 });
    let options = |driver: &dyn Driver, request: &MountRequest| -> Vec<String> {
        let mount = driver.mounts(request).unwrap().remove(0);
        mount.options().into_iter().map(|option| option.into_string().unwrap()).collect()
    };
    let overlay = options(&OverlayDriver::new(), &request);
    assert!(overlay.contains(&"uidmap=0:100000:65536".to_owned()), "{overlay:?}");
    assert!(overlay.contains(&r"gidmap=0:100000:65536\,70000:5:1".to_owned()), "{overlay:?}");
    let map = "X-mount.idmap=u:0:100000:65536 g:0:100000:65536 g:70000:5:1";
    assert_eq!(options(&CopyDriver::new(), &request), ["bind", "ro", map]);
    request.lower_has_marks = false;
    assert_eq!(options(&OverlayDriver::new(), &request), ["bind", "ro", map]);
    #[cfg(feature = "fuse")]
    {
        let fuse = options(&FuseDriver::new(), &request);
        assert!(fuse.contains(&"uidmapping=0:100000:65536".to_owned()), "{fuse:?}");
        assert!(fuse.contains(&"gidmapping=0:100000:65536:70000:5:1".to_owned()), "{fuse:?}");
    }
    let mount = OverlayDriver::new().mounts(&request).unwrap().remove(0);
    assert!(matches!(mount, Mount::Bind { ids, .. } if ids == request.options.ids));
}

fn in_place() {
    let stage = Stage::new();
    let e = CopyDriver::new().activate_in_place(&stage.request(), &stage.path("lease"));
    suite::fails(e, ErrorKind::Unsupported, "not mounted");
    assert!(!stage.path("tree").exists());
}

fn probe() {
    let stage = Stage::new();
    let target = ProbeTarget::new(stage.0.path(), LayerFormat::OverlayTrusted);
    let probe = OverlayDriver::new().probe(&target).unwrap();
    assert!(probe.to_string().contains("idmapped-layers: yes"), "{probe}");
    // Of a mounted overlay the kernel maps no ids.
    let mut request = stage.request();
    request.options.ids = ShownIds::default();
    let _guard = OverlayDriver::new().activate(&request, &stage.path("target")).unwrap();
    let target = ProbeTarget::new(stage.path("target"), LayerFormat::OverlayUser);
    let probe = OverlayDriver::new().probe(&target).unwrap();
    assert!(probe.to_string().contains("idmapped-layers: no"), "{probe}");
}

/// Layers on an overlay, and on FUSE: for the union of this crate they are good.
fn cannot() {
    let stage = Stage::new();
    let mut base = stage.request();
    (base.upper, base.options.ids) = (None, ShownIds::default());
    fs::create_dir(stage.path("other")).unwrap();
    for driver in drivers().into_iter().filter(|driver| driver.name() != "copy") {
        let guard = driver.activate(&base, &stage.path("target")).unwrap();
        let mut request = stage.request();
        request.upper = None;
        request.lower = vec![guard.target().to_owned(), stage.path("top")];
        let e = OverlayDriver::new().activate(&request, &stage.path("other"));
        suite::fails(e, ErrorKind::Unsupported, &format!("file system, {}", driver.name()));
        request.lower.truncate(1);
        request.lower_has_marks = false;
        let e = OverlayDriver::new().activate(&request, &stage.path("other"));
        suite::fails(e, ErrorKind::Unsupported, "driver fuse");
        #[cfg(feature = "fuse")]
        {
            let guard = FuseDriver::new().activate(&request, &stage.path("other")).unwrap();
            assert_eq!(owner(guard.target().join("program")), (100_033, 100_033));
        }
    }
}

fn owner_not_shown() {
    let stage = Stage::new();
    let mut request = stage.request();
    request.options.ids = ShownIds::same(vec![IdRange { host: 1000, shown: 100_000, len: 1000 }]);
    let e = OverlayDriver::new().activate(&request, &stage.path("target"));
    suite::fails(e, ErrorKind::InvalidArgument, "user 0");
    for name in ["upper", "work"] {
        chown(stage.path(name), Some(1001), Some(1002)).unwrap();
    }
    let guard = OverlayDriver::new().activate(&request, &stage.path("target")).unwrap();
    assert_eq!(owner(guard.target()), (100_001, 100_002));
    assert_eq!(owner(guard.target().join("root")), (65_534, 65_534));
    drop(guard);
    // Users alone.
    request.options.ids.gids.clear();
    let guard = OverlayDriver::new().activate(&request, &stage.path("target")).unwrap();
    assert_eq!(owner(guard.target()), (100_001, 1002));
}

fn upper_anywhere() {
    let stage = Stage::new();
    let mut request = stage.request();
    fs::create_dir_all(stage.path("a/b/upper")).unwrap();
    std::os::unix::fs::symlink("a/b", stage.path("link")).unwrap();
    fs::create_dir(stage.path("w")).unwrap();
    request.upper = Some(UpperDir { dir: stage.path("link/upper"), work: stage.path("w") });
    let guard = OverlayDriver::new().activate(&request, &stage.path("target")).unwrap();
    Namespace::new().run(guard.target(), "echo x > x");
    drop(guard);
    assert_eq!(owner(stage.path("a/b/upper/x")), (0, 0));

    let elsewhere = tempfile::tempdir_in("/var/tmp").unwrap();
    request.upper = Some(UpperDir { dir: stage.path("upper"), work: elsewhere.path().into() });
    let e = OverlayDriver::new().activate(&request, &stage.path("target"));
    suite::fails(e, ErrorKind::InvalidArgument, "on the same mount");
    let both = stage.path("upper");
    request.upper = Some(UpperDir { dir: both.clone(), work: both });
    let e = OverlayDriver::new().activate(&request, &stage.path("target"));
    suite::fails(e, ErrorKind::InvalidArgument, "must not be the same");
}

fn process_stays() {
    let stage = Stage::new();
    let look = || {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let kept = ["Uid", "Gid", "Cap", "SigBlk", "FDSize"];
        let lines = status.lines().filter(|line| kept.iter().any(|key| line.starts_with(key)));
        let namespaces =
            ["mnt", "user"].map(|ns| fs::read_link(format!("/proc/thread-self/ns/{ns}")));
        let namespaces = namespaces.map(Result::unwrap);
        let open = fs::read_dir("/proc/self/fd").unwrap().count();
        let children = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        let dumpable = rustix::process::dumpable_behavior().unwrap();
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let mounts = mounts.matches(stage.0.path().to_str().unwrap()).count();
        let lines: Vec<&str> = lines.collect();
        format!("{lines:?} {namespaces:?} {open} {children:?} {dumpable:?} {mounts}")
    };
    let (request, target) = (stage.request(), stage.path("target"));
    let before = look();
    for driver in [OverlayDriver::new(), OverlayDriver::new().with_layers_in_own_namespace()] {
        for _ in 0..3 {
            driver.activate(&request, &target).unwrap().unmount().unwrap();
            assert_eq!(look(), before);
        }
        let mut wrong = request.clone();
        wrong.lower.push(stage.path("none"));
        assert!(driver.activate(&wrong, &target).is_err());
        assert_eq!(look(), before);
    }
}

fn many_layers() {
    let stage = Stage::new();
    let mut request = stage.request();
    for i in 0..stratafs::MAX_LAYERS - 2 {
        let dir = stage.path(&format!("layer-{i}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(format!("of-{i}")), "").unwrap();
        request.lower.push(dir);
    }
    for driver in [
        on_rung(Rung::LayerDescriptors, false),
        on_rung(Rung::LayerDescriptors, true),
        on_rung(Rung::LayerStrings, false),
        on_rung(Rung::MountCall, false),
    ] {
        let guard = driver.activate(&request, &stage.path("target")).unwrap();
        assert_eq!(owner(guard.target().join("of-497")), (100_000, 100_000));
    }
}
