//! Foreign layer directories, made by hand, and stores to adopt them into.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use stratafs::{
    AdoptOptions, Adopted, Durability, ForeignFormat, Labels, LayerFormat, Owners, Store,
    StoreOptions, ignore_progress,
};
use tempfile::TempDir;

/// A store, and room for foreign directories beside it.
pub struct Bench {
    pub tmp: TempDir,
    pub store: Store,
}

impl Bench {
    pub fn new(format: LayerFormat) -> Bench {
        let tmp = super::suite::temp();
        let mut options = StoreOptions::new();
        // The layers are looked at as they are.
        options.owners = Some(Owners::OfFiles);
        options.format = Some(format);
        options.durability = Durability::None;
        let store = Store::open(tmp.path().join("store"), options).unwrap();
        Bench { tmp, store }
    }

    /// A directory to write a layer into.
    pub fn layer(&self, name: &str) -> Layer {
        let path = self.tmp.path().join(name);
        fs::create_dir(&path).unwrap();
        Layer(path)
    }

    pub fn adopt(&self, name: &str, layer: &Layer, format: ForeignFormat) -> Adopted {
        self.adopt_with(name, None, layer, &AdoptOptions::new(format)).unwrap()
    }

    pub fn adopt_with(
        &self,
        name: &str,
        parent: Option<&str>,
        layer: &Layer,
        options: &AdoptOptions,
    ) -> stratafs::Result<Adopted> {
        self.store.adopt(name, parent, &layer.0, options, Labels::new(), &mut ignore_progress)
    }

    /// Where the layer of the snapshot that was made last is.
    pub fn last(&self) -> Layer {
        let snapshots = self.store.root().join("snapshots");
        let ids = fs::read_dir(&snapshots)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse::<u64>().unwrap());
        Layer(snapshots.join(ids.max().unwrap().to_string()).join("fs"))
    }

    /// Nothing of a failed adoption is left.
    #[track_caller]
    pub fn has_only(&self, snapshots: usize) {
        for (name, count) in [("snapshots", snapshots), ("staging", 0), ("trash", 0)] {
            let found = fs::read_dir(self.store.root().join(name)).unwrap().count();
            assert_eq!(found, count, "{name}");
        }
    }
}

/// A layer directory.
pub struct Layer(pub PathBuf);

impl Layer {
    pub fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    pub fn dir(&self, path: &str) -> &Layer {
        fs::create_dir_all(self.path(path)).unwrap();
        self
    }

    pub fn file(&self, path: &str, content: impl AsRef<[u8]>) -> &Layer {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    /// The device 0:0.
    pub fn whiteout(&self, path: &str) -> &Layer {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        self
    }

    pub fn xattr(&self, path: &str, key: &str, value: impl AsRef<[u8]>) -> &Layer {
        let path = self.path(path);
        rustix::fs::lsetxattr(&path, key, value.as_ref(), XattrFlags::empty()).unwrap();
        self
    }

    pub fn hard_link(&self, old: &str, new: &str) -> &Layer {
        let new = self.path(new);
        fs::create_dir_all(new.parent().unwrap()).unwrap();
        fs::hard_link(self.path(old), new).unwrap();
        self
    }

    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    pub fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(self.path(path)).is_ok()
    }

    pub fn is_whiteout(&self, path: &str) -> bool {
        fs::symlink_metadata(self.path(path))
            .is_ok_and(|meta| meta.file_type().is_char_device() && meta.rdev() == 0)
    }

    pub fn get(&self, path: &str, key: &str) -> Option<Vec<u8>> {
        get_xattr(&self.path(path), key.as_bytes())
    }
}

fn get_xattr(path: &Path, key: &[u8]) -> Option<Vec<u8>> {
    let mut value = vec![0; 4096];
    let length = rustix::fs::lgetxattr(path, key, value.as_mut_slice()).ok()?;
    value.truncate(length);
    Some(value)
}

/// All xattrs below a directory that are not a union file system's: `path key=value`, sorted.
pub fn xattrs(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in walkdir::WalkDir::new(root) {
        let entry = entry.unwrap();
        let mut keys = vec![0; 4096];
        let length = rustix::fs::llistxattr(entry.path(), keys.as_mut_slice()).unwrap_or(0);
        for key in keys[..length].split(|b| *b == 0).filter(|key| !key.is_empty()) {
            let value = get_xattr(entry.path(), key);
            let path = entry.path().strip_prefix(root).unwrap().as_os_str().as_bytes();
            lines.push(format!(
                "{} {} {:?}",
                String::from_utf8_lossy(path),
                String::from_utf8_lossy(key),
                value
            ));
        }
    }
    lines.sort();
    lines
}
