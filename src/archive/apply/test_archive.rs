//! Archives for tests, written byte by byte so that hostile ones can be.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::*;
use crate::sys::xattr::{self, Of};

/// An archive in the making.
#[derive(Clone, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    pax: Vec<u8>,
    /// For the entries to come.
    pub(super) ids: (u32, u32),
    pub(super) mode: u32,
    pub(super) mtime: u64,
}

impl Archive {
    pub(super) fn new() -> Self {
        Archive { mode: 0o644, mtime: 1_000_000_000, ..Archive::default() }
    }

    pub(super) fn header(&mut self, path: &str, kind: u8, size: usize, link: &str) -> &mut Self {
        self.header_with_device(path, kind, size, link, (0, 0))
    }

    pub(super) fn header_with_device(
        &mut self,
        path: &str,
        kind: u8,
        size: usize,
        link: &str,
        device: (u32, u32),
    ) -> &mut Self {
        if !self.pax.is_empty() && kind != b'x' {
            let pax = std::mem::take(&mut self.pax);
            self.header("pax", b'x', pax.len(), "").content(&pax);
        }
        let mut block = [0; 512];
        let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
        put(0, path.as_bytes());
        put(100, format!("{:07o}\0", self.mode).as_bytes());
        put(108, format!("{:07o}\0", self.ids.0).as_bytes());
        put(116, format!("{:07o}\0", self.ids.1).as_bytes());
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, format!("{:011o}\0", self.mtime).as_bytes());
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}\0", device.0).as_bytes());
        put(337, format!("{:07o}\0", device.1).as_bytes());
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
        self
    }

    fn content(&mut self, content: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// Puts a PAX record before the next entry.
    pub(super) fn pax(&mut self, key: &str, value: &[u8]) -> &mut Self {
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        self.pax.extend_from_slice(format!("{len} {key}=").as_bytes());
        self.pax.extend_from_slice(value);
        self.pax.push(b'\n');
        self
    }

    pub(super) fn file(&mut self, path: &str, content: &[u8]) -> &mut Self {
        self.header(path, b'0', content.len(), "").content(content)
    }

    pub(super) fn dir(&mut self, path: &str) -> &mut Self {
        let mode = std::mem::replace(&mut self.mode, 0o755);
        self.header(path, b'5', 0, "");
        self.mode = mode;
        self
    }

    pub(super) fn dir_mode(&mut self, path: &str, mode: u32) -> &mut Self {
        let before = std::mem::replace(&mut self.mode, mode);
        self.header(path, b'5', 0, "");
        self.mode = before;
        self
    }

    pub(super) fn symlink(&mut self, path: &str, to: &str) -> &mut Self {
        self.header(path, b'2', 0, to)
    }

    pub(super) fn link(&mut self, path: &str, to: &str) -> &mut Self {
        self.header(path, b'1', 0, to)
    }

    /// An entry from a short text: `a/` is a directory, `a -> b` a symlink, `a = b` a hard link, and
    /// all else a file, which holds its own name; marks are empty.
    pub(super) fn entry(&mut self, text: &str) -> &mut Self {
        if let Some((path, to)) = text.split_once(" -> ") {
            self.symlink(path, to)
        } else if let Some((path, to)) = text.split_once(" = ") {
            self.link(path, to)
        } else if text.ends_with('/') {
            self.dir(text)
        } else if text.rsplit('/').next().unwrap().starts_with(".wh.") {
            self.file(text, b"")
        } else {
            self.file(text, text.as_bytes())
        }
    }

    pub(super) fn finish(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.extend_from_slice(&[0; 1024]);
        bytes
    }
}

/// An archive of short texts.
pub(super) fn archive(entries: &[&str]) -> Vec<u8> {
    let mut archive = Archive::new();
    for entry in entries {
        archive.entry(entry);
    }
    archive.finish()
}

/// A directory on a file system that takes user xattrs.
pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

/// Whether this process may set owners and make devices, by whom its files belong to.
pub(super) fn is_root() -> bool {
    static ROOT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ROOT.get_or_init(|| scratch().path().metadata().unwrap().uid() == 0)
}

/// What this process can do.
pub(super) fn options() -> ApplyOptions {
    if is_root() { ApplyOptions::default() } else { ApplyOptions::unprivileged() }
}

/// The formats that this process can read and write.
pub(super) fn formats() -> Vec<LayerFormat> {
    let mut formats = vec![LayerFormat::OverlayUser, LayerFormat::Aufs];
    if is_root() {
        formats.push(LayerFormat::OverlayTrusted);
    }
    formats
}

pub(super) fn unpack(bytes: &[u8], root: &Path, target: LayerTarget) -> Result<Applied> {
    let mut progress = crate::progress::ignore_progress;
    let applied = apply_layer(bytes, root, target, &options(), &mut progress)?;
    // However it was counted.
    let walked = usage::count(&Dir::open(root).unwrap(), &mut || Ok(())).unwrap();
    assert_eq!(applied.usage, walked);
    Ok(applied)
}

/// A tree as text: each path with what it is, in order.
pub(super) fn tree(root: &Path, format: Option<LayerFormat>) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in walkdir::WalkDir::new(root).min_depth(1) {
        let entry = entry.unwrap();
        let mut path = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        let parent = Dir::open(entry.path().parent().unwrap()).unwrap();
        let name = Name::new(entry.file_name().as_bytes()).unwrap();
        let stat = parent.stat_at(&name).unwrap();
        let mark = format.map_or(marks::Mark::None, |f| marks::decode(f, &name, &stat));
        let what = match mark {
            marks::Mark::Whiteout(of) => {
                path = Path::new(&path).with_file_name(of.as_os_str()).to_str().unwrap().to_owned();
                "deleted".to_owned()
            }
            // Told with its directory.
            marks::Mark::Opaque => continue,
            marks::Mark::Internal => "internal".to_owned(),
            marks::Mark::None if stat.is_dir() => {
                let dir = parent.open_dir(&name).unwrap();
                match format {
                    Some(f) if marks::is_opaque(f, &dir).unwrap() => "opaque".to_owned(),
                    _ => "dir".to_owned(),
                }
            }
            marks::Mark::None if stat.is_file() => std::fs::read_to_string(entry.path()).unwrap(),
            marks::Mark::None => match entry.path().read_link() {
                Ok(to) => format!("-> {}", to.display()),
                Err(_) => format!("{:?}", stat.file_type),
            },
        };
        assert_eq!(found.insert(path.clone(), what), None, "{path} twice");
    }
    found
}

/// Everything of a tree that can be seen, to tell whether it was touched.
pub(super) fn snapshot(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in walkdir::WalkDir::new(root) {
        let entry = entry.unwrap();
        let m = entry.path().symlink_metadata().unwrap();
        let mut text = format!(
            "{:o} {}:{} {} {:?} {:?} {} {}",
            m.mode(),
            m.uid(),
            m.gid(),
            m.size(),
            (m.mtime(), m.mtime_nsec()),
            (m.ctime(), m.ctime_nsec()),
            m.nlink(),
            m.ino(),
        );
        if m.is_file() {
            text.push_str(&format!(" {:?}", std::fs::read(entry.path()).unwrap()));
        } else if m.is_symlink() {
            text.push_str(&format!(" {:?}", entry.path().read_link().unwrap()));
        }
        if let (Some(parent), Some(name)) = (entry.path().parent(), entry.path().file_name()) {
            let dir = Dir::open(parent).unwrap();
            let name = Name::new(name.as_bytes()).unwrap();
            for key in xattr::list(Of::Child(&dir, &name)).unwrap() {
                let value = xattr::get(Of::Child(&dir, &name), &key).unwrap();
                text.push_str(&format!(" {key:?}={value:?}"));
            }
        }
        found.insert(entry.path().to_owned(), text);
    }
    found
}

/// Every order of some things.
pub(super) fn orders<'a>(things: &[&'a str]) -> Vec<Vec<&'a str>> {
    if things.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (i, first) in things.iter().enumerate() {
        let mut rest = things.to_vec();
        rest.remove(i);
        for mut order in orders(&rest) {
            order.insert(0, first);
            all.push(order);
        }
    }
    all
}
