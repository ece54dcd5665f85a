//! A tree with one of everything, the changes that are made to it, and what is compared of it.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, RenameFlags};
use stratafs::LayerFormat;

use super::nest::Part;
use crate::support::calls::{self, mknod, rename, set_mtime, set_xattr};
use crate::support::union_mount::Engine;
use crate::support::whole_tree::xattrs;

/// The trees side by side: one is changed in the inner union, one in the outer, one when the inner has got
/// another layer.
pub const TREES: [&str; 3] = ["a", "b", "c"];

/// What can be done in a nest and in a plain directory alike.
#[derive(Clone, Copy, Debug)]
pub struct Can {
    /// By root in the initial user namespace: devices, `trusted.*`, capabilities.
    pub privileged: bool,
    /// Files can be given to others.
    pub owners: bool,
    /// Directories of lower layers can be renamed.
    pub dir_renames: bool,
    /// Lower files with several names stay one file.
    pub hard_links: bool,
    /// Copies are given to whom they belong before they get setuid and capabilities.
    pub copies_keep_privileges: bool,
    /// Character devices 0:0 can be made, which are no whiteouts then.
    pub zero_devices: bool,
}

impl Can {
    /// What each of these unions can do.
    pub fn all(rights: Rights, unions: &[(Engine, LayerFormat)], part: Part) -> Can {
        let own = unions.iter().all(|(engine, _)| *engine == Engine::Own);
        let renames = |(engine, format): &(Engine, LayerFormat)| match engine {
            Engine::Own => *format != LayerFormat::Aufs,
            _ => *format == LayerFormat::OverlayTrusted,
        };
        Can {
            privileged: rights == Rights::Initial,
            owners: rights != Rights::OneId,
            dir_renames: unions.iter().all(renames),
            hard_links: own,
            copies_keep_privileges: part == Part::Lower
                || !unions.windows(2).any(|pair| pair[1].0 == Engine::Kernel),
            zero_devices: own,
        }
    }
}

/// Who runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Root in the initial user namespace.
    Initial,
    /// Root in another, with many ids.
    ManyIds,
    /// Root in another, with one id.
    OneId,
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect()
}

/// Makes the trees in a plain directory.
pub fn make(root: &Path, can: Can) {
    for tree in TREES {
        let t = root.join(tree);
        for dir in ["d/sub", "whole/sub", "again/sub", "ren/deep", "was_dir", "marked", "kept"] {
            fs::create_dir_all(t.join(dir)).unwrap();
        }
        for file in [
            "file",
            "mode",
            "gone",
            "whole/x",
            "whole/sub/y",
            "again/old",
            "again/sub/old",
            "old",
            "ren/r",
            "ren/deep/q",
            "linked",
            "noted",
            "noted_before",
            "was_file",
            "was_dir/x",
            "long",
            "owner",
            "timed",
            "left",
            "right",
            "marked/x",
            "d/sub/s",
            "kept/k",
            "tool",
        ] {
            fs::write(t.join(file), file).unwrap();
        }
        for file in ["data", "short", "names"] {
            fs::write(t.join(file), pattern(70_000)).unwrap();
        }
        fs::hard_link(t.join("names"), t.join("d/names2")).unwrap();
        symlink("file", t.join("sym")).unwrap();
        mknod(&t.join("pipe"), FileType::Fifo, 0o644, 0).unwrap();
        for path in ["noted_before", "d", "kept/k"] {
            set_xattr(&t.join(path), "user.before", b"below").unwrap();
        }
        if can.privileged {
            mknod(&t.join("device"), FileType::CharacterDevice, 0o666, 0x103).unwrap();
            set_xattr(&t.join("noted"), "trusted.before", b"below").unwrap();
        }
        if can.owners {
            calls::chown(&t.join("kept/k"), 44, 55);
        }
        mode(&t.join("tool"), 0o4755);
        if can.privileged {
            set_xattr(&t.join("tool"), "security.capability", &calls::capability()).unwrap();
        }
    }
    let entries: Vec<_> =
        walkdir::WalkDir::new(root).min_depth(1).contents_first(true).into_iter().collect();
    for (n, entry) in entries.into_iter().enumerate() {
        set_mtime(entry.unwrap().path(), 1_000_000 + i64::try_from(n).unwrap(), 5);
    }
}

/// Changes a tree that was not changed before.
#[track_caller]
pub fn change(t: &Path, can: Can) {
    append(&t.join("file"), b" more");
    let mut data = fs::File::options().write(true).open(t.join("data")).unwrap();
    data.seek(SeekFrom::Start(33_333)).unwrap();
    data.write_all(b"in the middle").unwrap();
    drop(data);
    mode(&t.join("mode"), 0o2640);
    set_xattr(&t.join("tool"), "user.note", b"above").unwrap();
    fs::remove_file(t.join("gone")).unwrap();
    fs::remove_dir_all(t.join("whole")).unwrap();
    fs::remove_dir_all(t.join("again")).unwrap();
    fs::create_dir(t.join("again")).unwrap();
    fs::write(t.join("again/new"), "new").unwrap();
    fs::rename(t.join("old"), t.join("d/renamed")).unwrap();
    if can.dir_renames {
        fs::rename(t.join("ren"), t.join("d/ren")).unwrap();
        fs::write(t.join("d/ren/deep/added"), "added").unwrap();
        fs::remove_file(t.join("d/ren/r")).unwrap();
    }
    fs::hard_link(t.join("linked"), t.join("d/link")).unwrap();
    append(&t.join("d/link"), b" by another name");
    if can.hard_links {
        let _known = known(&t.join("d/names2"));
        append(&t.join("names"), b" by the first name");
        mode(&t.join("d/names2"), 0o600);
    }
    set_xattr(&t.join("noted"), "user.note", b"above").unwrap();
    set_xattr(&t.join("kept"), "user.note", b"above").unwrap();
    rustix::fs::removexattr(t.join("noted_before"), "user.before").unwrap();
    fs::remove_file(t.join("sym")).unwrap();
    symlink("elsewhere", t.join("sym")).unwrap();
    fs::remove_file(t.join("was_file")).unwrap();
    fs::create_dir_all(t.join("was_file/sub")).unwrap();
    fs::write(t.join("was_file/sub/x"), "x").unwrap();
    fs::remove_dir_all(t.join("was_dir")).unwrap();
    fs::write(t.join("was_dir"), "a file").unwrap();
    set_length(&t.join("short"), 5_000);
    set_length(&t.join("long"), 5_000);
    fs::write(t.join("new"), pattern(10_000)).unwrap();
    fs::create_dir_all(t.join("new_dir/sub")).unwrap();
    fs::write(t.join("new_dir/sub/x"), "x").unwrap();
    mknod(&t.join("new_pipe"), FileType::Fifo, 0o600, 0).unwrap();
    rename(&t.join("left"), &t.join("right"), RenameFlags::EXCHANGE).unwrap();
    set_mtime(&t.join("timed"), 77, 88);
    nameless(t);
    if can.privileged {
        set_xattr(&t.join("noted"), "trusted.note", b"above").unwrap();
        mknod(&t.join("new_device"), FileType::BlockDevice, 0o640, 0x701).unwrap();
        fs::remove_file(t.join("device")).unwrap();
    }
    if can.owners {
        calls::chown(&t.join("owner"), 33, 44);
    }
}

/// Makes what would be marks in a layer; through a union these are files and attributes like any other.
#[track_caller]
pub fn mark(t: &Path, can: Can) {
    set_xattr(&t.join("marked"), "user.overlay.opaque", b"y").unwrap();
    set_xattr(&t.join("marked/x"), "user.overlay.metacopy", b"").unwrap();
    if can.privileged {
        set_xattr(&t.join("marked"), "trusted.overlay.opaque", b"y").unwrap();
        set_xattr(&t.join("marked"), "trusted.overlay.redirect", b"/a/whole").unwrap();
        set_xattr(&t.join("marked/x"), "trusted.overlay.metacopy", b"").unwrap();
    }
    if can.zero_devices {
        mknod(&t.join("zero"), FileType::CharacterDevice, 0o640, 0).unwrap();
        mknod(&t.join("d/sub/zero"), FileType::CharacterDevice, 0o600, 0).unwrap();
        fs::remove_file(t.join("d/sub/s")).unwrap();
        mknod(&t.join("d/sub/s"), FileType::CharacterDevice, 0o600, 0).unwrap();
    }
}

/// What the kernel's overlayfs loses with its upper on a FUSE mount: it gives its copies away when they have
/// their mode and capabilities, which a server of FUSE cannot tell from a chown(2), and that takes both away.
pub fn lose_privileges(t: &Path, can: Can) {
    if can.copies_keep_privileges {
        return;
    }
    mode(&t.join("tool"), 0o755);
    if can.privileged {
        rustix::fs::removexattr(t.join("tool"), "security.capability").unwrap();
    }
}

/// Changes a tree that was changed.
#[track_caller]
pub fn change_again(t: &Path, can: Can) {
    fs::remove_file(t.join("new")).unwrap();
    fs::write(t.join("gone"), "here again").unwrap();
    fs::create_dir(t.join("whole")).unwrap();
    fs::write(t.join("whole/x"), "another").unwrap();
    fs::remove_file(t.join("again/new")).unwrap();
    mode(&t.join("again"), 0o700);
    append(&t.join("data"), b" at the end");
    if can.hard_links {
        // A name that the kernel has forgotten, as it may, gets its link in the upper some other time.
        let _known = known(&t.join("d/link"));
        append(&t.join("linked"), b", and by the first");
    }
    fs::rename(t.join("d/renamed"), t.join("old")).unwrap();
    if can.dir_renames {
        fs::rename(t.join("d/ren"), t.join("back")).unwrap();
        append(&t.join("back/deep/q"), b" more");
    }
    fs::remove_dir_all(t.join("new_dir")).unwrap();
    fs::remove_dir_all(t.join("was_file")).unwrap();
    fs::write(t.join("was_file"), "a file again").unwrap();
    fs::remove_file(t.join("marked/x")).unwrap();
    if t.join("zero").exists() {
        fs::remove_file(t.join("zero")).unwrap();
        rename(&t.join("d/sub/s"), &t.join("d/s"), RenameFlags::empty()).unwrap();
    }
}

/// A file that is made without a name, where that is possible.
#[track_caller]
fn nameless(t: &Path) {
    use rustix::fs::{AtFlags, Mode, OFlags};
    let named = t.join("named_later");
    match rustix::fs::open(t, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from(0o640)) {
        Ok(file) => {
            rustix::io::write(&file, b"nameless").unwrap();
            rustix::fs::linkat(&file, "", CWD, &named, AtFlags::EMPTY_PATH)
                .or_else(|_| {
                    use std::os::fd::AsRawFd as _;
                    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
                    rustix::fs::linkat(CWD, link, CWD, &named, AtFlags::SYMLINK_FOLLOW)
                })
                .unwrap();
        }
        // On ours: one of the known differences.
        Err(rustix::io::Errno::OPNOTSUPP) => {
            fs::write(&named, b"nameless").unwrap();
            mode(&named, 0o640);
        }
        Err(e) => panic!("{}: {e}", t.display()),
    }
}

#[track_caller]
fn append(path: &Path, bytes: &[u8]) {
    let mut file = fs::File::options().append(true).open(path).unwrap();
    file.write_all(bytes).unwrap();
}

#[track_caller]
fn set_length(path: &Path, length: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

/// A file that the kernel does not forget as long as it is held.
#[track_caller]
fn known(path: &Path) -> std::os::fd::OwnedFd {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .unwrap()
}

#[track_caller]
fn mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A line for each path, with all but the times of now, which differ from one tree to the next.
pub fn lines(root: &Path) -> Vec<String> {
    walk(root, |meta, path| {
        let links = if meta.is_dir() { 0 } else { meta.nlink() };
        let time = match meta.mtime() {
            long_ago @ ..10_000_000 => format!("{long_ago}.{}", meta.mtime_nsec()),
            _ => "now".to_owned(),
        };
        format!("{links} {time} {}", xattrs(path).join(" "))
    })
}

/// What an upper holds: a line for each path, with all marks but those that name inodes of other file
/// systems.
pub fn marks(upper: &Path) -> Vec<String> {
    const OF_INODES: [&str; 5] = ["origin", "uuid", "impure", "nlink", "uppercap"];
    walk(upper, |meta, path| {
        // Whiteouts share an inode, or do not.
        let links = if meta.is_file() { meta.nlink() } else { 0 };
        let mut kept = xattrs(path);
        kept.retain(|xattr| {
            let key = xattr.split('=').next().unwrap_or_default();
            !OF_INODES.iter().any(|last| key.ends_with(&format!("overlay.{last}")))
                && !key.ends_with("stratafs.origin")
        });
        format!("{links} {}", kept.join(" "))
    })
}

fn walk(root: &Path, more: impl Fn(&fs::Metadata, &Path) -> String) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in walkdir::WalkDir::new(root).min_depth(1).sort_by_file_name() {
        let entry = entry.unwrap();
        let path = entry.path();
        let meta = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let kind = meta.file_type();
        let content = if kind.is_file() {
            let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert_eq!(bytes.len() as u64, meta.len(), "{}: what is read", path.display());
            runs(&bytes)
        } else if kind.is_symlink() {
            format!("-> {}", fs::read_link(path).unwrap().display())
        } else if kind.is_char_device() || kind.is_block_device() {
            format!("{:x}", meta.rdev())
        } else {
            String::new()
        };
        // The mode of a whiteout says nothing.
        let is_whiteout = (kind.is_char_device() && meta.rdev() == 0)
            || entry.file_name().as_bytes().starts_with(b".wh.");
        let mode = if is_whiteout { meta.mode() & 0o170_000 } else { meta.mode() };
        lines.push(format!(
            "/{} {mode:o} {}:{} {content:?} {}",
            path.strip_prefix(root).unwrap().as_os_str().as_bytes().escape_ascii(),
            meta.uid(),
            meta.gid(),
            more(&meta, path),
        ));
    }
    lines
}

fn runs(bytes: &[u8]) -> String {
    use std::hash::{Hash as _, Hasher as _};
    if bytes.len() < 64 {
        return bytes.escape_ascii().to_string();
    }
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{} bytes {:x}", bytes.len(), hasher.finish())
}
