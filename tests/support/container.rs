//! Images with a shell, made here, and stores to run commands from.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use stratafs::{LayoutWriter, Platform, ignore_progress};

use super::{layout, suite};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_stratafs");

/// Why nobody can be given namespaces here.
pub fn no_namespaces() -> Option<String> {
    let tried = Command::new(PROGRAM).args(["unshare", "true"]).output().unwrap();
    let said = String::from_utf8_lossy(&tried.stderr);
    (!tried.status.success()).then(|| format!("needs namespaces: {}", said.trim()))
}

/// Why no container can be run.
pub fn no_containers() -> Option<String> {
    suite::needs_program("busybox")
        .or_else(|| {
            let path = suite::find_program("busybox").unwrap();
            let linked = Command::new("ldd").arg(path).output();
            let is_static = linked.is_ok_and(|output| !output.status.success());
            (!is_static).then(|| "needs busybox-static".to_owned())
        })
        .or_else(|| {
            let fixture = Fixture::with_image();
            let tried = fixture.run(&["run", "image", "true"]);
            let said = String::from_utf8_lossy(&tried.stderr).into_owned();
            (!tried.status.success()).then(|| format!("needs containers: {}", said.trim()))
        })
}

/// What an image has: a tar archive in the making.
pub struct Tree(tar::Builder<Vec<u8>>);

impl Tree {
    /// Nothing but a program.
    pub fn bare() -> Tree {
        let mut tree = Tree(tar::Builder::new(Vec::new()));
        let program = fs::read(suite::find_program("busybox").unwrap()).unwrap();
        tree.add("busybox", 0o755, tar::EntryType::Regular, &program);
        tree
    }

    /// A shell, and what is needed to change something.
    pub fn with_shell() -> Tree {
        let mut tree = Tree(tar::Builder::new(Vec::new()));
        for (dir, mode) in [("bin/", 0o755), ("etc/", 0o755), ("root/", 0o700), ("tmp/", 0o1777)] {
            tree.add(dir, mode, tar::EntryType::Directory, b"");
        }
        let program = fs::read(suite::find_program("busybox").unwrap()).unwrap();
        tree.add("bin/busybox", 0o755, tar::EntryType::Regular, &program);
        for applet in [
            "cat", "echo", "env", "grep", "head", "hostname", "id", "kill", "ls", "mkdir", "mknod",
            "mount", "printf", "readlink", "rm", "sh", "sleep", "tail", "touch", "tr", "true",
            "umount", "wc", "ps",
        ] {
            tree.link(&format!("bin/{applet}"), "busybox".as_ref());
        }
        tree.file("etc/motd", b"motd\n");
        tree.file("etc/kept", b"kept\n");
        tree.file("etc/passwd", b"root:x:0:0::/root:/bin/sh\nme:x:1000:1001::/home/me:/bin/sh\n");
        tree.add("bad", 0o755, tar::EntryType::Regular, b"no program\n\0");
        tree
    }

    pub fn file(&mut self, path: &str, contents: &[u8]) {
        self.add(path, 0o644, tar::EntryType::Regular, contents);
    }

    pub fn link(&mut self, path: &str, target: &Path) {
        let mut header = header(0o777, tar::EntryType::Symlink, 0);
        self.0.append_link(&mut header, path, target).unwrap();
    }

    fn add(&mut self, path: &str, mode: u32, kind: tar::EntryType, contents: &[u8]) {
        let mut header = header(mode, kind, contents.len() as u64);
        self.0.append_data(&mut header, path, contents).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        // Ends it: two empty blocks.
        [self.0.get_ref().as_slice(), &[0; 1024]].concat()
    }
}

fn header(mode: u32, kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_500_000_000);
    header
}

/// A directory with a store in it.
pub struct Fixture {
    dir: tempfile::TempDir,
    /// The store gives its files to the ids of the user's namespace.
    has_own_files: bool,
}

impl Fixture {
    /// On a disk: overlays may not be possible on what is in memory.
    pub fn new() -> Fixture {
        Fixture::of("any")
    }

    /// With a store that this driver shows, also of an ordinary user.
    pub fn of(driver: &str) -> Fixture {
        let is_root = rustix::process::geteuid().is_root();
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        Fixture { dir, has_own_files: driver == "overlay" && !is_root }
    }

    /// With the snapshot `image`, which has a shell.
    pub fn with_image() -> Fixture {
        Fixture::new().and_image()
    }

    pub fn and_image(self) -> Fixture {
        let fixture = self;
        let mut tree = Tree::with_shell();
        tree.file("etc/group", b"root:x:0:\nme:x:1001:\nmore:x:7:me\n");
        fixture.layer("image", &tree);
        fixture
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub fn layer(&self, name: &str, tree: &Tree) {
        let file = self.path(&format!("{name}.tar"));
        fs::write(&file, tree.bytes()).unwrap();
        let apply = ["apply", name, file.to_str().unwrap()];
        if self.has_own_files {
            let inside = [&["unshare", "--", PROGRAM, "--owners", "files"], &apply[..]].concat();
            self.ok(&inside);
        } else {
            self.ok(&apply);
        }
        fs::remove_file(file).unwrap();
    }

    /// Writes a layout with the image `configured`.
    pub fn layout(&self, dir: &str, tree: &Tree, config: &Value) {
        let mut layout = LayoutWriter::to_directory(self.path(dir)).unwrap();
        let mut blob = |media: &str, bytes: &[u8]| layout::blob(&mut layout, media, bytes);
        let layer = blob("layer.v1.tar", &tree.bytes());
        let host = Platform::host();
        let config = serde_json::json!({
            "architecture": host.architecture(), "os": host.os(), "config": config,
            "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
        })
        .to_string();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "layers": [layer],
            "config": blob("config.v1+json", config.as_bytes()),
        })
        .to_string();
        layout.add_image(manifest.as_bytes(), config.as_bytes(), Some("configured")).unwrap();
        layout.finish(&mut ignore_progress).unwrap();
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--root").arg(self.path("store")).args(arguments);
        // Files are named relative to the fixture.
        command.current_dir(self.dir()).stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
        output
    }

    /// Runs it, and gives what it prints.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), said.as_ref()), (Some(0), ""), "{arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Why this driver cannot be used in the namespaces of `run`.
    pub fn cannot_mount(driver: &str) -> Option<String> {
        let fixture = Fixture::of(driver);
        fixture.layer("image", &Tree::bare());
        let tried = fixture.run(&["--driver", driver, "run", "image", "/busybox", "true"]);
        let said = String::from_utf8_lossy(&tried.stderr).into_owned();
        (!tried.status.success()).then(|| format!("needs the driver {driver}: {}", said.trim()))
    }

    pub fn snapshots(&self) -> Vec<String> {
        let listing: Value = serde_json::from_str(&self.ok(&["--json", "ls"])).unwrap();
        let snapshots = listing["snapshots"].as_array().unwrap();
        let mut keys: Vec<String> =
            snapshots.iter().map(|info| info["key"].as_str().unwrap().to_owned()).collect();
        keys.sort();
        keys
    }

    /// What is mounted in it, as this process sees it.
    pub fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir().to_str().unwrap();
        table.lines().filter(|line| line.contains(dir)).map(str::to_owned).collect()
    }

    /// Only these snapshots are left, nothing unfinished or damaged, and nothing is mounted.
    #[track_caller]
    pub fn is_clean(&self, snapshots: &[&str]) {
        assert_eq!(self.snapshots(), snapshots);
        for dir in ["store/staging", "store/trash", "store/run/mounts"] {
            let left: Vec<OsString> = fs::read_dir(self.path(dir))
                .map(|entries| entries.map(|entry| entry.unwrap().file_name()).collect())
                .unwrap_or_default();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
        self.ok(&["check"]);
        assert_eq!(self.ok(&["gc"]), "", "nothing to free");
        assert_eq!(self.mounts(), [""; 0]);
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if self.has_own_files {
            // Only there are they this user's to remove.
            let store = self.path("store");
            self.run(&["unshare", "--", "rm", "-rf", store.to_str().unwrap()]);
        }
    }
}
