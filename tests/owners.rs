//! Stores that keep owners, modes and devices in xattrs: nothing of what an archive says is lost, whoever unpacks
//! it, and nothing in the store is more than its user's own files.
//!
//! The same tests are run by root, who sees files through a mount with their true owners, and by an ordinary user,
//! who sees them as his own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support {
    #![allow(dead_code, reason = "each suite uses its part")]
    pub mod suite;
    pub mod tarball;
}

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;
use stratafs::{
    AdoptOptions, ApplyOptions, ArchiveForm, CommitOptions, DriverChoice, Durability, ErrorKind,
    ExportOptions, ForeignFormat, FuseLayer, FuseMount, FuseMountOptions, Guard, Labels,
    LayerFormat, LayerTarget, ListedEntry, MountOptions, OverrideStats, Owners, Ownership, Store,
    StoreOptions, UpperDir, apply_layer, diff_trees, ignore_progress, list_archive,
};
use support::suite::{self, fails};
use support::tarball::{Tarball, USTAR, number};

const KEY: &str = "user.containers.override_stat";

fn main() {
    let fuse = no_fuse();
    let administrator = fuse.clone().or_else(suite::needs_root);
    let not_root =
        rustix::process::geteuid().is_root().then(|| "needs an ordinary user".to_owned());
    suite::run_one_by_one(vec![
        suite::trial("an_archive_comes_back_byte_for_byte", None, byte_for_byte),
        suite::trial("all_is_packed_anew_with_its_owners", None, packed_anew),
        suite::trial("what_is_in_the_store_is_the_users_own", None, own_files),
        suite::trial("a_mount_shows_owners_and_takes_them", fuse.clone(), mounted),
        suite::trial("nobody_sets_the_xattr_through_a_mount", fuse, hidden_xattr),
        suite::trial("a_copy_keeps_owners_and_counts_edits", None, copied),
        suite::trial("the_kernels_overlayfs_does_not_show_it", None, no_overlay),
        suite::trial("a_store_says_where_it_keeps_owners", None, recorded),
        suite::trial("it_is_the_default_of_who_cannot_give_files_away", not_root, by_default),
        suite::trial("a_malformed_xattr_is_an_error", None, malformed),
        suite::trial("a_foreign_layer_is_taken_in_with_its_owners", None, adopted),
        suite::trial("a_plain_directory_keeps_them_too", None, plain_directory),
        suite::trial("an_administrator_keeps_them_in_security_xattrs", administrator, by_admin),
        suite::trial("another_user_is_told_to_whom_it_belongs", suite::needs_root(), another_user),
    ]);
}

fn no_fuse() -> Option<String> {
    let device = fs::File::options().read(true).write(true).open("/dev/fuse");
    if device.is_err() {
        return Some("needs /dev/fuse".to_owned());
    }
    suite::needs_root().and_then(|_| suite::needs_program("fusermount3"))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A layer in which nothing is its user's own.
fn archive() -> Vec<u8> {
    let entry =
        |tar: Tarball, name: &str, kind: u8, mode: &str, ids: (u32, u32), link: &str, dev| {
            let (major, minor): (i128, i128) = dev;
            tar.header(USTAR, name.as_bytes(), kind, 0, |b| {
                b[100..100 + mode.len()].copy_from_slice(mode.as_bytes());
                b[108..116].copy_from_slice(&number(ids.0.into(), 8));
                b[116..124].copy_from_slice(&number(ids.1.into(), 8));
                b[157..157 + link.len()].copy_from_slice(link.as_bytes());
                b[329..337].copy_from_slice(&number(major, 8));
                b[337..345].copy_from_slice(&number(minor, 8));
            })
        };
    let mut tar = Tarball::new();
    for (name, kind, mode, ids, link, dev) in [
        ("./", b'5', "0000755", (0, 0), "", (0, 0)),
        ("bin/", b'5', "0000755", (0, 0), "", (0, 0)),
        ("bin/plain", b'0', "0000755", (0, 0), "", (0, 0)),
        ("bin/su", b'0', "0004755", (0, 0), "", (0, 0)),
        ("bin/wall", b'0', "0002755", (0, 5), "", (0, 0)),
        ("shadow", b'0', "0000000", (0, 42), "", (0, 0)),
        ("readonly", b'0', "0000444", (33, 33), "", (0, 0)),
        ("big", b'0', "0000600", (70_000, 2_000_000), "", (0, 0)),
        ("tmp/", b'5', "0001777", (0, 0), "", (0, 0)),
        ("mail/", b'5', "0002770", (8, 8), "", (0, 0)),
        ("closed/", b'5', "0000111", (3, 4), "", (0, 0)),
        ("closed/in", b'0', "0000644", (3, 4), "", (0, 0)),
        ("dev/", b'5', "0000755", (0, 0), "", (0, 0)),
        ("dev/null", b'3', "0000666", (0, 0), "", (1, 3)),
        ("dev/sda", b'4', "0000660", (0, 6), "", (8, 0)),
        ("dev/pipe", b'6', "0000640", (1, 2), "", (0, 0)),
        ("link", b'2', "0000777", (0, 0), "bin/plain", (0, 0)),
        ("his", b'2', "0000777", (33, 34), "readonly", (0, 0)),
        ("big2", b'1', "0000600", (70_000, 2_000_000), "big", (0, 0)),
        ("his2", b'1', "0000777", (33, 34), "his", (0, 0)),
        ("null2", b'1', "0000666", (0, 0), "dev/null", (0, 0)),
        (".wh.gone", b'0', "0000600", (0, 0), "", (0, 0)),
    ] {
        tar = entry(tar, name, kind, mode, ids, link, dev);
    }
    tar.end()
}

/// What an archive says of its entries, but the times.
fn said(tar: &[u8]) -> BTreeMap<String, String> {
    let line = |e: &ListedEntry| {
        let link = String::from_utf8_lossy(&e.link).into_owned();
        format!("{} {:04o} {}:{} {link} {:?}", e.kind, e.mode, e.uid, e.gid, e.device)
    };
    let name = |e: &ListedEntry| String::from_utf8_lossy(&e.path).into_owned();
    list_archive(tar).unwrap().iter().map(|e| (name(e), line(e))).collect()
}

struct Stage {
    tmp: tempfile::TempDir,
    store: Store,
}

impl Stage {
    fn with(driver: DriverChoice) -> Stage {
        let tmp = suite::temp();
        fs::create_dir(tmp.path().join("mnt")).unwrap();
        let mut options = StoreOptions::new();
        options.format = Some(LayerFormat::OverlayUser);
        options.owners = Some(Owners::InXattrs);
        options.durability = Durability::None;
        options.driver = driver;
        let store = Store::open(tmp.path().join("store"), options).unwrap();
        let stage = Stage { tmp, store };
        stage.apply("base", None, &archive());
        stage
    }

    fn new() -> Stage {
        Stage::with(DriverChoice::Auto)
    }

    fn apply(&self, name: &str, parent: Option<&str>, mut tar: &[u8]) {
        let (options, labels) = (ApplyOptions::default(), Labels::new());
        let stop = &mut ignore_progress;
        let applied = self.store.apply(name, parent, &mut tar, &options, labels, stop).unwrap();
        assert_eq!((applied.skipped_devices, applied.skipped_xattrs), (0, 0));
    }

    fn exported(&self, name: &str, canonical: bool) -> Vec<u8> {
        let mut options = ExportOptions::default();
        if canonical {
            options.form = ArchiveForm::Canonical;
        }
        let mut tar = Vec::new();
        self.store.export(name, &mut tar, &options, &mut ignore_progress).unwrap();
        tar
    }

    fn changes(&self, key: &str) -> Vec<String> {
        let changes = self.store.changes(key, &mut ignore_progress).unwrap();
        changes.iter().map(ToString::to_string).collect()
    }

    fn mount(&self, key: &str) -> (Guard, PathBuf) {
        let target = self.tmp.path().join("mnt");
        (self.store.activate(key, &target, &MountOptions::default()).unwrap(), target)
    }

    /// The layer of the snapshot that was made as the `n`th.
    fn layer(&self, n: u32) -> PathBuf {
        self.tmp.path().join(format!("store/snapshots/{n}/fs"))
    }
}

fn get(path: &Path, key: &str) -> Option<Vec<u8>> {
    let mut value = [0; 256];
    match rustix::fs::lgetxattr(path, key, &mut value[..]) {
        Ok(n) => Some(value[..n].to_vec()),
        Err(rustix::io::Errno::NODATA) => None,
        Err(e) => panic!("{path:?}: {e}"),
    }
}

fn set(path: &Path, key: &str, value: &[u8]) -> rustix::io::Result<()> {
    rustix::fs::lsetxattr(path, key, value, XattrFlags::empty())
}

fn byte_for_byte() {
    let stage = Stage::new();
    assert!(stage.exported("base", false) == archive());
    // The same from a layer over it that changes nothing but an owner.
    stage.store.prepare("a", Some("base"), Labels::new()).unwrap();
    stage.store.commit("empty", "a", CommitOptions::new()).unwrap();
    assert!(stage.exported("base", false) == archive());
    let report = stage.store.check(&mut ignore_progress).unwrap();
    assert_eq!((report.problems.len(), report.records), (0, 1), "{:?}", report.problems);
}

fn packed_anew() {
    let stage = Stage::new();
    let mut expected = said(&archive());
    let anew = stage.exported("base", true);
    // Of several names any may be the first.
    let one_of = |said: &mut BTreeMap<String, String>, a: &str, b: &str| {
        let (a, b) = (said.remove(a).unwrap(), said.remove(b).unwrap());
        if a.starts_with('1') { b } else { a }
    };
    let mut found = said(&anew);
    for (a, b) in [("big", "big2"), ("his", "his2"), ("dev/null", "null2")] {
        let wanted = one_of(&mut expected, a, b);
        assert_eq!(one_of(&mut found, a, b), wanted, "{a} and {b}");
    }
    // Nothing is below that it could hide.
    expected.remove(".wh.gone").unwrap();
    assert_eq!(found, expected);
    // And once more.
    stage.apply("again", None, &anew);
    assert!(stage.exported("again", true) == anew);
    assert_eq!(stage.changes("again").len(), said(&anew).len() - 1, "all but the root");
}

fn own_files() {
    let stage = Stage::new();
    let user = rustix::process::geteuid().as_raw();
    let mut dirs = vec![stage.layer(1)];
    let mut seen = 0;
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let kind = meta.file_type();
            seen += 1;
            assert_eq!(meta.uid(), user, "{path:?}");
            if path.ends_with("gone") {
                assert!(kind.is_char_device() && meta.rdev() == 0);
                continue;
            }
            assert!(kind.is_file() || kind.is_dir() || kind.is_symlink(), "{path:?}: {kind:?}");
            if !kind.is_symlink() {
                let least = if kind.is_dir() { 0o700 } else { 0o600 };
                assert_eq!(meta.mode() & (0o7000 | least), least, "{path:?}: {:o}", meta.mode());
            }
            if kind.is_dir() {
                dirs.push(path);
            }
        }
    }
    assert_eq!(seen, 21);
    let layer = stage.layer(1);
    assert_eq!(get(&layer.join("bin/plain"), KEY), None, "it is root's, and of a usual mode");
    let told = |path: &str| String::from_utf8(get(&layer.join(path), KEY).unwrap()).unwrap();
    for (path, value) in [
        ("bin/su", "0:0:4755:file"),
        ("shadow", "0:42:0000:file"),
        ("big", "70000:2000000:0600:file"),
        ("tmp", "0:0:1777:dir"),
        ("dev/null", "0:0:0666:char-1-3"),
        ("dev/sda", "0:6:0660:block-8-0"),
        ("dev/pipe", "1:2:0640:pipe"),
        ("his", "33:34:0777:symlink"),
    ] {
        assert_eq!(told(path), value, "{path}");
    }
    assert_eq!(fs::read_link(layer.join("link")).unwrap(), Path::new("bin/plain"));
}

/// Changes that only root can make, or see.
fn as_root(root: &Path) {
    let meta = |path: &str| root.join(path).symlink_metadata().unwrap();
    let is = |path: &str| {
        let meta = meta(path);
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    assert_eq!(is("bin/su"), (0, 0, 0o4755));
    assert_eq!(is("big"), (70_000, 2_000_000, 0o600));
    assert_eq!(is("his"), (33, 34, 0o777));
    assert_eq!(fs::read_link(root.join("his2")).unwrap(), Path::new("readonly"));
    assert!(meta("dev/null").file_type().is_char_device());
    assert_eq!(meta("dev/null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!((meta("dev/null").nlink(), meta("his").nlink()), (2, 2));

    let at = |path: &str| root.join(path);
    std::os::unix::fs::chown(at("bin/su"), Some(12), Some(13)).unwrap();
    assert_eq!(is("bin/su"), (12, 13, 0o755), "as chown(2)");
    std::os::unix::fs::lchown(at("link"), Some(9), Some(9)).unwrap();
    assert_eq!(is("link"), (9, 9, 0o777));
    assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("bin/plain"));
    symlink("x", at("new-link")).unwrap();
    std::os::unix::fs::lchown(at("new-link"), Some(1), None).unwrap();
    fs::write(at("mail/new"), "new").unwrap();
    assert_eq!(is("mail/new").1, 8, "the group is handed down");
    fs::create_dir(at("mail/dir")).unwrap();
    assert_eq!(is("mail/dir").2 & 0o2000, 0o2000);
    let path = |path: &str| CString::new(at(path).as_os_str().as_bytes()).unwrap();
    nix::sys::stat::mknod(
        path("dev/zero").as_c_str(),
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::from_bits_truncate(0o666),
        nix::sys::stat::makedev(1, 5),
    )
    .unwrap();
    fs::remove_file(at("dev/pipe")).unwrap();
    fs::set_permissions(at("shadow"), Permissions::from_mode(0o4040)).unwrap();
    fs::rename(at("dev/sda"), at("dev/sdb")).unwrap();
}

fn mounted() {
    let stage = Stage::with(DriverChoice::Fuse);
    stage.store.prepare("a", Some("base"), Labels::new()).unwrap();
    let (mut guard, root) = stage.mount("a");
    if is_root() {
        as_root(&root);
        guard.unmount().unwrap();
        let mut changes = stage.changes("a");
        changes.sort();
        assert_eq!(
            changes,
            [
                "A /dev/sdb",
                "A /dev/zero",
                "A /mail/dir",
                "A /mail/new",
                "A /new-link",
                "D /dev/pipe",
                "D /dev/sda",
                "M /bin/su",
                "M /link",
                "M /shadow",
            ]
        );
        let said = said(&stage.exported("a", false));
        for (path, line) in [
            ("bin/su", "0 0755 12:13  (0, 0)"),
            ("link", "2 0777 9:9 bin/plain (0, 0)"),
            ("new-link", "2 0777 1:0 x (0, 0)"),
            ("dev/zero", "3 0644 0:0  (1, 5)"),
            ("dev/sdb", "4 0660 0:6  (8, 0)"),
            ("shadow", "0 4040 0:42  (0, 0)"),
        ] {
            assert_eq!(said[path], line, "{path}");
        }
        // What is mounted again is the same.
        let (mut guard, root) = stage.mount("a");
        let meta = root.join("link").symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.file_type().is_symlink()), (9, true));
        return guard.unmount().unwrap();
    }
    let user = rustix::process::geteuid().as_raw();
    let mut owners: Vec<u32> = ["bin/su", "big", "his", "tmp", "closed"]
        .iter()
        .map(|path| root.join(path).symlink_metadata().unwrap().uid())
        .collect();
    owners.dedup();
    assert_eq!(owners, [user], "all is shown as the user's own");
    fs::write(root.join("bin/su"), "edited").unwrap();
    fs::write(root.join("mine"), "mine").unwrap();
    fs::set_permissions(root.join("readonly"), Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(root.join("big"), Some(user), None).unwrap();
    guard.unmount().unwrap();
    let mut changes = stage.changes("a");
    changes.sort();
    assert_eq!(changes, ["A /mine", "M /bin/su", "M /readonly"]);
    let said = said(&stage.exported("a", false));
    assert_eq!(said["mine"], "0 0644 0:0  (0, 0)", "what is made is root's");
    assert_eq!(said["readonly"], "0 0640 33:33  (0, 0)", "what is changed stays whose it is");
}

fn hidden_xattr() {
    let stage = Stage::with(DriverChoice::Fuse);
    stage.store.prepare("a", Some("base"), Labels::new()).unwrap();
    let (mut guard, root) = stage.mount("a");
    fs::write(root.join("mine"), "").unwrap();
    for path in ["bin/su", "tmp", "mine"].map(|path| root.join(path)) {
        assert_eq!(get(&path, KEY), None);
        let mut keys = [0; 1024];
        let n = rustix::fs::llistxattr(&path, &mut keys[..]).unwrap();
        assert!(!keys[..n].windows(KEY.len()).any(|key| key == KEY.as_bytes()));
        let e = set(&path, KEY, b"0:0:4755:file").unwrap_err();
        assert_eq!(e, rustix::io::Errno::PERM);
        set(&path, "user.other", b"x").unwrap();
        assert_eq!(get(&path, "user.other").unwrap(), b"x");
    }
    // Lists of access rights would name this machine's users.
    let e = set(&root.join("mine"), "system.posix_acl_access", &[2, 0, 0, 0]).unwrap_err();
    assert_eq!(e, rustix::io::Errno::OPNOTSUPP);
    guard.unmount().unwrap();
}

fn copied() {
    let stage = Stage::with(DriverChoice::Copy);
    stage.store.prepare("a", Some("base"), Labels::new()).unwrap();
    let mut guard = stage.store.activate_in_place("a", &MountOptions::default()).unwrap();
    let root = guard.target().to_owned();
    assert_eq!(stage.changes("a"), [""; 0], "a copy is no change");
    fs::write(root.join("bin/su"), "edited").unwrap();
    fs::write(root.join("mine"), "mine").unwrap();
    fs::set_permissions(root.join("bin/plain"), Permissions::from_mode(0o700)).unwrap();
    fs::remove_file(root.join("dev/null")).unwrap();
    guard.unmount().unwrap();
    let mut changes = stage.changes("a");
    changes.sort();
    assert_eq!(changes, ["A /mine", "D /dev/null", "M /bin/plain", "M /bin/su"]);
    stage.store.commit("edited", "a", CommitOptions::new()).unwrap();
    let said = said(&stage.exported("edited", false));
    assert_eq!(said["bin/su"], "0 4755 0:0  (0, 0)");
    assert_eq!(said["mine"].split(' ').nth(2), Some("0:0"));
    assert_eq!(said["dev/.wh.null"].split(' ').next(), Some("0"));
}

fn no_overlay() {
    let stage = Stage::with(DriverChoice::Overlay);
    stage.store.prepare("a", Some("base"), Labels::new()).unwrap();
    let target = stage.tmp.path().join("mnt");
    let options = MountOptions::default();
    fails(stage.store.activate("a", &target, &options), ErrorKind::Unsupported, "driver fuse");
    fails(stage.store.mounts("a", &options), ErrorKind::Unsupported, "driver fuse");
}

fn recorded() {
    let stage = Stage::new();
    let root = stage.store.root().to_owned();
    assert_eq!(stage.store.owners(), Owners::InXattrs);
    drop(stage.store);
    let line = fs::read_to_string(root.join("format")).unwrap();
    assert!(line.contains("incompat=layers-overlay-user,owners-in-xattrs"), "{line}");
    let open = |owners| {
        let mut options = StoreOptions::new();
        options.owners = owners;
        Store::open(&root, options)
    };
    assert_eq!(open(None).unwrap().owners(), Owners::InXattrs);
    fails(open(Some(Owners::OfFiles)), ErrorKind::Incompatible, "in xattrs");
}

fn by_default() {
    let tmp = suite::temp();
    let store = Store::open(tmp.path().join("store"), StoreOptions::new()).unwrap();
    assert_eq!((store.format(), store.owners()), (LayerFormat::OverlayUser, Owners::InXattrs));
}

fn malformed() {
    let stage = Stage::new();
    stage.store.prepare("a", Some("base"), Labels::new()).unwrap();
    let file = stage.layer(2).join("f");
    fs::write(&file, "").unwrap();
    for value in ["root:root:0644", "0:0:0644:dir", "0:0:0644:char-0-0", ""] {
        set(&file, KEY, value.as_bytes()).unwrap();
        let changes = stage.store.changes("a", &mut ignore_progress);
        fails(changes, ErrorKind::Io, "\"f\"");
    }
    set(&file, KEY, b"5:6:0640:file").unwrap();
    assert_eq!(stage.changes("a"), ["A /f"]);
}

fn adopted() {
    let stage = Stage::new();
    let foreign = stage.tmp.path().join("foreign");
    fs::create_dir_all(foreign.join("d")).unwrap();
    fs::write(foreign.join("d/f"), "f").unwrap();
    fs::write(foreign.join("null"), "").unwrap();
    set(&foreign.join("d"), KEY, b"5:6:1777:dir").unwrap();
    set(&foreign.join("d/f"), KEY, b"7:8:4711:file").unwrap();
    set(&foreign.join("null"), KEY, b"0:0:0666:char-1-3").unwrap();
    let mut options = AdoptOptions::new(ForeignFormat::FuseOverlayfs);
    options.override_stats = OverrideStats::Honour;
    let (labels, stop) = (Labels::new(), &mut ignore_progress);
    let adopted = stage.store.adopt("b", Some("base"), &foreign, &options, labels, stop).unwrap();
    assert_eq!(adopted.report.honoured_override_stats.count, 3);
    let said = said(&stage.exported("b", false));
    assert_eq!(said["d"], "5 1777 5:6  (0, 0)");
    assert_eq!(said["d/f"], "0 4711 7:8  (0, 0)");
    assert_eq!(said["null"], "3 0666 0:0  (1, 3)");
}

fn plain_directory() {
    let tmp = suite::temp();
    let mut options = ApplyOptions::default();
    options.ownership = Ownership::InXattrs;
    let tar = archive();
    let stop = &mut ignore_progress;
    apply_layer(&tar[..], tmp.path(), LayerTarget::Tree, &options, stop).unwrap();
    assert_eq!(get(&tmp.path().join("bin/su"), KEY).unwrap(), b"0:0:4755:file");
    assert_eq!(get(&tmp.path().join("dev/sda"), KEY).unwrap(), b"0:6:0660:block-8-0");
    // Two such trees differ in nothing.
    let other = suite::temp();
    apply_layer(&tar[..], other.path(), LayerTarget::Tree, &options, stop).unwrap();
    assert_eq!(diff_trees(tmp.path(), other.path(), stop).unwrap().len(), 0);
}

fn another_user() {
    // Root, of the store of somebody else.
    let stage = Stage::new();
    let root = stage.store.root().to_owned();
    drop(stage.store);
    std::os::unix::fs::chown(&root, Some(12_345), None).unwrap();
    let opened = Store::open(&root, StoreOptions::new());
    fails(opened, ErrorKind::FailedPrecondition, "user 12345");
}

/// As fuse-overlayfs with `xattr_permissions=1`.
fn by_admin() {
    const KEY: &str = "security.fuseoverlayfs.override_stat";
    let tmp = suite::temp();
    let dir = |name: &str| tmp.path().join(name);
    for name in ["lower", "upper", "work", "mnt"] {
        fs::create_dir(dir(name)).unwrap();
    }
    for (name, value) in
        [("su", "0:33:4755"), ("dev", "0:6:660:block-8-0"), ("link", "7:7:0777:symlink")]
    {
        fs::write(dir("lower").join(name), "to").unwrap();
        set(&dir("lower").join(name), KEY, value.as_bytes()).unwrap();
    }
    fs::write(dir("lower/squashed"), "").unwrap();
    std::os::unix::fs::chown(dir("lower/squashed"), Some(65_534), Some(65_534)).unwrap();
    // Who may not write to security.* gains nothing by the other.
    fs::write(dir("lower/claims"), "").unwrap();
    set(&dir("lower/claims"), self::KEY, b"0:0:4755:file").unwrap();
    std::os::unix::fs::chown(dir("lower/claims"), Some(1000), None).unwrap();

    let format = LayerFormat::OverlayTrusted;
    let mut options = FuseMountOptions::new(format);
    options.lowers = vec![FuseLayer { dir: dir("lower"), format }];
    options.upper = Some(UpperDir { dir: dir("upper"), work: dir("work") });
    options.owners = Owners::InSecurityXattrs;
    // Setgid of a directory counts without the xattr, too.
    fs::create_dir(dir("upper/mail")).unwrap();
    std::os::unix::fs::chown(dir("upper/mail"), None, Some(8)).unwrap();
    fs::set_permissions(dir("upper/mail"), Permissions::from_mode(0o2775)).unwrap();
    let mut mount = FuseMount::new(&dir("mnt"), &options).unwrap();
    let meta = |path: &str| dir("mnt").join(path).symlink_metadata().unwrap();
    let is = |path: &str| {
        let meta = meta(path);
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    assert_eq!(is("su"), (0, 33, 0o4755));
    assert_eq!((is("dev"), meta("dev").rdev()), ((0, 6, 0o660), rustix::fs::makedev(8, 0)));
    assert!(meta("dev").file_type().is_block_device());
    assert_eq!(fs::read_link(dir("mnt/link")).unwrap(), Path::new("to"));
    assert_eq!(is("squashed").0, 65_534, "without it a file is whose it is");
    assert_eq!((is("claims").0, is("claims").2 & 0o4000), (1000, 0));
    for key in [KEY, self::KEY] {
        let hidden = key == KEY;
        assert_eq!(get(&dir("mnt/claims"), key).is_none(), hidden, "{key}");
        assert_eq!(set(&dir("mnt/squashed"), key, b"0:0:4755:file").is_err(), hidden, "{key}");
    }

    fs::write(dir("mnt/mail/new"), "").unwrap();
    assert_eq!((is("mail").1, is("mail/new").1), (8, 8));
    fs::write(dir("mnt/new"), "").unwrap();
    std::os::unix::fs::chown(dir("mnt/new"), Some(5), Some(6)).unwrap();
    fs::set_permissions(dir("mnt/su"), Permissions::from_mode(0o2711)).unwrap();
    symlink("there", dir("mnt/l")).unwrap();
    std::os::unix::fs::lchown(dir("mnt/l"), Some(8), Some(9)).unwrap();
    assert_eq!(
        (is("new").0, is("new").1, is("su"), is("l")),
        (5, 6, (0, 33, 0o2711), (8, 9, 0o777))
    );
    mount.unmount(false).unwrap();
    for (name, value) in
        [("new", "5:6:0644:file"), ("su", "0:33:2711:file"), ("l", "8:9:0777:symlink")]
    {
        let path = dir("upper").join(name);
        assert_eq!(String::from_utf8(get(&path, KEY).unwrap()).unwrap(), value);
        let meta = path.symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7000), (0, 0), "{name} itself");
    }
    // A store would be of no use to anybody else.
    let mut options = StoreOptions::new();
    options.owners = Some(Owners::InSecurityXattrs);
    fails(Store::open(dir("store"), options.clone()), ErrorKind::InvalidArgument, "security");
    assert!(!dir("store").exists());
    // Nor one that is there.
    drop(Store::open(dir("store"), StoreOptions::new()).unwrap());
    fails(Store::open(dir("store"), options), ErrorKind::InvalidArgument, "security");
}
