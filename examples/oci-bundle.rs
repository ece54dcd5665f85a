//! What a runtime does for a container: an image becomes a bundle of the OCI runtime specification, and runc
//! runs it.
//!
//! ```sh
//! cargo run --release --example oci-bundle                            # a root directory with busybox alone
//! cargo run --release --example oci-bundle -- alpine.tar              # an OCI archive, and its command
//! cargo run --release --example oci-bundle -- --userns alpine.tar id  # another command, in a user namespace
//! cargo run --release --example oci-bundle -- --store DIR alpine.tar  # keeps the image and what came of it
//! ```
//!
//! Run it as root: runc makes cgroups. Without `--store` all is in a temporary directory, which is removed.

use std::error::Error;
use std::fs::{self, Permissions};
use std::io::{self, IsTerminal as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use serde_json::{Value, json};
use stratafs::oci_spec::image::{Config, ConfigBuilder};
use stratafs::{
    ApplyOptions, CommitOptions, ErrorKind, IdRange, Image, ImageLayout, ImportOptions, Labels,
    MountOptions, ShownIds, Store, StoreOptions, ignore_progress, import_image,
};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The users and groups of a container with a user namespace: 0 in it, and on disk, is 100000 on the host.
const IDS: IdRange = IdRange { host: 0, shown: 100_000, len: 65_536 };

/// Docker's.
const CAPABILITIES: &str = "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW \
                            SETFCAP SETGID SETPCAP SETUID SYS_CHROOT";

fn main() -> ExitCode {
    match Asked::by(std::env::args().skip(1)).and_then(|asked| run(&asked)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("oci-bundle: {e}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
struct Asked {
    userns: bool,
    store: Option<PathBuf>,
    image: Option<PathBuf>,
    command: Vec<String>,
}

impl Asked {
    fn by(mut arguments: impl Iterator<Item = String>) -> Result<Asked> {
        let mut asked = Asked::default();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--userns" => asked.userns = true,
                "--store" => {
                    asked.store = Some(arguments.next().ok_or("--store takes a directory")?.into());
                }
                option if option.starts_with('-') => {
                    return Err(format!("there is no option {option}").into());
                }
                _ => {
                    asked.image = Some(argument.into());
                    asked.command = arguments.by_ref().collect();
                }
            }
        }
        Ok(asked)
    }
}

fn run(asked: &Asked) -> Result<()> {
    runc(&["--version"]).map_err(|e| format!("this example needs the program runc: {e}"))?;
    let temporary = tempfile::tempdir()?;
    // Root of a user namespace is a stranger out here: he must get as far as the bundle.
    fs::set_permissions(temporary.path(), Permissions::from_mode(0o711))?;
    let root = asked.store.clone().unwrap_or_else(|| temporary.path().join("store"));
    let store = Store::open(&root, StoreOptions::new())?;
    println!("store at {}", store.root().display());
    let (top, config) = match &asked.image {
        Some(path) => imported(&store, path)?,
        None => busybox(&store)?,
    };

    // The writable layer of the container. Whatever fails from here on, it is not left behind.
    let id = format!("oci-bundle-{}", std::process::id());
    let snapshot = Snapshot { store: &store, key: format!("{id}-running") };
    store.prepare(&snapshot.key, Some(&top), Labels::new())?;
    let bundle = temporary.path().join("bundle");
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs)?;
    let mut options = MountOptions::default();
    if asked.userns {
        // No file changes its owner for the user namespace: the mount shows other ids.
        options.ids = ShownIds::same(vec![IDS]);
    }
    let mut guard = store.activate(&snapshot.key, &rootfs, &options)?;
    println!("mounted {} on {}", snapshot.key, rootfs.display());

    let command = command(&config, &asked.command);
    let specification = specification(&config, &command, asked.userns)?;
    fs::write(bundle.join("config.json"), serde_json::to_vec_pretty(&specification)?)?;
    println!("runc run {id}: {command:?}\n");
    let ended = Command::new("runc").arg("run").arg("--bundle").arg(&bundle).arg(&id).status();
    // Should runc have been killed, the container runs on. One that has ended is not known any more.
    runc(&["delete", "--force", &id])?;
    let ended = ended?;
    // Dropping the guard unmounts, too; this way an error is seen.
    guard.unmount()?;

    println!("\nwhat the container changed:");
    for change in store.changes(&snapshot.key, &mut ignore_progress)? {
        println!("  {change}");
    }
    if !ended.success() {
        return Err(format!("runc ended with {ended}: see what it, or the command, says").into());
    }
    store.commit(&id, &snapshot.key, CommitOptions::new())?;
    println!("committed as {id}, {} bytes on {top}", store.usage(&id)?.bytes);
    Ok(())
}

/// Removed when it is dropped, unless it was committed.
struct Snapshot<'a> {
    store: &'a Store,
    key: String,
}

impl Drop for Snapshot<'_> {
    fn drop(&mut self) {
        match self.store.remove(&self.key) {
            Err(e) if e.kind() != ErrorKind::NotFound => eprintln!("oci-bundle: {e}"),
            _ => {}
        }
    }
}

fn runc(arguments: &[&str]) -> Result<()> {
    let output = Command::new("runc").args(arguments).stdin(Stdio::null()).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned().into()),
    }
}

/// The topmost layer of an image, and its configuration.
fn imported(store: &Store, path: &Path) -> Result<(String, Config)> {
    let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("image");
    let options = ImportOptions::new();
    let layout = ImageLayout::open(path)?;
    // What the store has already is not unpacked again.
    let record = import_image(store, &layout, name, &options, &mut ignore_progress)?;
    println!("image {name}: {} layers", record.layers.len());
    let image = Image::from_json(&store.blob(&record.manifest)?, &store.blob(&record.config)?)?;
    let config = image.configuration()?.config().clone().unwrap_or_default();
    Ok((record.layers.last().ok_or("the image has no layers")?.clone(), config))
}

/// A layer with busybox and nothing else; it must need no libraries, and so name no loader at its beginning.
fn busybox(store: &Store) -> Result<(String, Config)> {
    let is_static = |program: &Vec<u8>| !program.windows(4).take(4096).any(|name| name == b"/ld-");
    let places = ["/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox"];
    let program = places.iter().find_map(|place| fs::read(place).ok().filter(is_static)).ok_or(
        "name an OCI archive to run; or install a static busybox (Debian: busybox-static), of which a \
         root directory is made",
    )?;
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(program.len() as u64);
    archive.append_data(&mut header, "bin/busybox", program.as_slice())?;
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    for name in ["sh", "id", "ls", "cat", "rm"] {
        archive.append_link(&mut header, format!("bin/{name}"), "busybox")?;
    }
    let archive = archive.into_inner()?;
    let (from, options) = (&mut archive.as_slice(), ApplyOptions::default());
    match store.apply("busybox", None, from, &options, Labels::new(), &mut ignore_progress) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e.into()),
        _ => println!("a layer with busybox"),
    }
    let script = "id && ls -ln / && echo hello > /hello";
    let command = ["sh", "-c", script].map(str::to_owned);
    Ok(("busybox".to_owned(), ConfigBuilder::default().cmd(command).build()?))
}

/// As docker puts it together.
fn command(config: &Config, given: &[String]) -> Vec<String> {
    let mut command = config.entrypoint().clone().unwrap_or_default();
    match given {
        [] => command.extend(config.cmd().clone().unwrap_or_default()),
        given => command.extend_from_slice(given),
    }
    if command.is_empty() { vec!["/bin/sh".to_owned()] } else { command }
}

/// config.json. No rlimits: to raise one takes a right that a container may lack.
fn specification(config: &Config, command: &[String], userns: bool) -> Result<Value> {
    let user = config.user().clone().unwrap_or_default();
    let (uid, gid) = user.split_once(':').unwrap_or((&user, "0"));
    let number = |text: &str| match text {
        "" => Ok(0),
        _ => text.parse::<u32>().map_err(|_| format!("the image's user, {user:?}, is no number")),
    };
    let (uid, gid) = (number(uid)?, number(gid)?);
    let environment = config.env().clone();
    let directory = config.working_dir().clone().filter(|dir| !dir.is_empty());
    let capabilities: Vec<String> =
        CAPABILITIES.split_whitespace().map(|name| format!("CAP_{name}")).collect();
    let mount = |target: &str, kind: &str, options: &str| {
        let options: Vec<&str> = options.split(',').collect();
        json!({ "destination": target, "type": kind, "source": kind, "options": options })
    };
    let mut namespaces = vec!["pid", "network", "ipc", "uts", "mount"];
    let mut map = Vec::new();
    if userns {
        namespaces.push("user");
        map.push(json!({ "containerID": IDS.host, "hostID": IDS.shown, "size": IDS.len }));
    }
    let namespaces: Vec<Value> = namespaces.iter().map(|kind| json!({ "type": kind })).collect();
    Ok(json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "hostname": "container",
        "process": {
            "terminal": io::stdin().is_terminal() && io::stdout().is_terminal(),
            "user": { "uid": uid, "gid": gid },
            "args": command,
            "env": environment.unwrap_or_else(|| vec![PATH.to_owned()]),
            "cwd": directory.unwrap_or_else(|| "/".to_owned()),
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
        },
        "mounts": [
            mount("/proc", "proc", "nosuid,noexec,nodev"),
            mount("/dev", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
            mount("/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620"),
            mount("/dev/shm", "tmpfs", "nosuid,noexec,nodev,mode=1777,size=65536k"),
            mount("/sys", "sysfs", "nosuid,noexec,nodev,ro"),
        ],
        "linux": {
            "namespaces": namespaces,
            "uidMappings": map,
            "gidMappings": map,
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }))
}
