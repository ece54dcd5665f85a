//! The union by itself, without a mount: what unprivileged tests and those of locks can show. The rest
//! is tested through mounts.
//!
//! Here are the hooks, and the layers that the tests work on.

mod changes;
mod disturbed;
mod faults;
mod lasting;
mod metacopy;
mod settling;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::*;
use crate::path::Name;
use crate::sys::file::SetTime;
use crate::sys::stat::Time;
use crate::sys::xattr::OnPresence;

/// Where tests stop the union.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    /// Set: copying waits until it is reset.
    hold: Mutex<bool>,
    free: Condvar,
    held: AtomicBool,
    /// Copying panics, in the place of a kill.
    dies: AtomicBool,
}

impl Hooks {
    pub(super) fn copying(&self) {
        assert!(!self.dies.load(Ordering::SeqCst), "killed");
        let mut hold = self.hold.lock();
        while *hold {
            self.held.store(true, Ordering::SeqCst);
            self.free.wait(&mut hold);
        }
    }

    fn hold(&self) {
        *self.hold.lock() = true;
    }

    fn die_copying(&self) {
        self.dies.store(true, Ordering::SeqCst);
    }

    fn release(&self) {
        *self.hold.lock() = false;
        self.free.notify_all();
    }
}

/// Two lower layers and an upper, in directories.
struct Fixture {
    tmp: tempfile::TempDir,
    format: LayerFormat,
    owners: Owners,
    options: UnionOptions,
}

const FORMATS: [LayerFormat; 2] = [LayerFormat::OverlayUser, LayerFormat::Aufs];

impl Fixture {
    fn new(format: LayerFormat) -> Fixture {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        for dir in ["top", "bottom", "upper", "work"] {
            fs::create_dir(tmp.path().join(dir)).unwrap();
        }
        Fixture { tmp, format, owners: Owners::OfFiles, options: UnionOptions::default() }
    }

    /// Of layers that keep owners so.
    fn keeping(format: LayerFormat, owners: Owners) -> Fixture {
        Fixture { owners, ..Fixture::new(format) }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.tmp.path().join(path)
    }

    /// A file of a layer, whose contents are its path.
    fn file(&self, path: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), path).unwrap();
    }

    fn open(&self) -> Union {
        Union::open(self.spec()).unwrap()
    }

    fn spec(&self) -> UnionSpec {
        let dir = |name: &str| Dir::open_with(self.path(name), self.owners).unwrap();
        let lower =
            |name: &str| Lower { dir: Arc::new(dir(name)), format: self.format, dot_wh: false };
        UnionSpec {
            lowers: vec![lower("top"), lower("bottom")],
            upper: Some(Upper {
                dir: Arc::new(dir("upper")),
                format: self.format,
                work: dir("work"),
                lock: None,
            }),
            options: self.options.clone(),
        }
    }

    fn upper_names(&self, dir: &str) -> Vec<String> {
        names(&self.path("upper").join(dir))
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn name(s: &str) -> Name {
    Name::new(s).unwrap()
}

impl Union {
    fn walk(&self, path: &str) -> Option<Arc<Node>> {
        let mut node = Arc::clone(self.root());
        for part in path.split('/').filter(|part| !part.is_empty()) {
            node = self.lookup(&node, &name(part)).unwrap()?.node;
        }
        Some(node)
    }

    fn parent_of<'a>(&self, path: &'a str) -> (Arc<Node>, Name) {
        let (dir, last): (&'a str, &'a str) = path.rsplit_once('/').unwrap_or(("", path));
        (self.walk(dir).unwrap(), name(last))
    }

    fn bytes(&self, node: &Arc<Node>, offset: u64, size: usize) -> Vec<u8> {
        let mut buffer = vec![0; size];
        let n = self.read(node, offset, &mut buffer).unwrap();
        buffer.truncate(n);
        buffer
    }

    fn text(&self, path: &str) -> Option<String> {
        let node = self.walk(path)?;
        Some(String::from_utf8(self.bytes(&node, 0, 4096)).unwrap())
    }

    fn put(&self, path: &str, file: NewFile) -> io::Result<Arc<Node>> {
        let (parent, name) = self.parent_of(path);
        // As whoever runs the test.
        let own = self.attr(self.root()).unwrap();
        let make = Make { file, mode: 0o755, umask: 0o022, uid: own.uid, gid: own.gid };
        Ok(self.make(&parent, &name, &make)?.node)
    }

    fn rm(&self, path: &str) -> io::Result<()> {
        let (parent, name) = self.parent_of(path);
        self.unlink(&parent, &name)
    }

    fn rm_dir(&self, path: &str) -> io::Result<()> {
        let (parent, name) = self.parent_of(path);
        self.rmdir(&parent, &name)
    }

    fn mv(&self, from: &str, to: &str, mode: RenameMode) -> io::Result<()> {
        let ((parent, name), (new_parent, new_name)) = (self.parent_of(from), self.parent_of(to));
        self.rename(&parent, &name, &new_parent, &new_name, mode)
    }

    fn ls(&self, path: &str) -> Vec<String> {
        let mut names = Vec::new();
        let dir = self.walk(path).unwrap();
        self.list(&dir, 0, |_, entry| {
            if let Listed::Name(placed) = entry {
                names.push(placed.name.as_os_str().to_str().unwrap().to_owned());
            }
            Ok(true)
        })
        .unwrap();
        names.sort();
        names
    }
}
