//! The life of a container's file system: layers in, mounted, changed, committed, and out again.
//!
//! ```sh
//! cargo run --release --example mount-layers                # two small layers of its own
//! cargo run --release --example mount-layers -- IMAGE.tar   # an OCI image
//! ```
//!
//! Everything happens in a temporary directory, which is removed at the end.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use stratafs::{
    ApplyOptions, CommitOptions, ErrorKind, ExportOptions, ImageLayout, ImportOptions, Labels,
    MountOptions, Owners, ProbeTarget, RelPath, Store, StoreOptions, ignore_progress, import_image,
};

fn main() -> ExitCode {
    let image = std::env::args_os().nth(1).map(PathBuf::from);
    match run(image.as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("mount-layers: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(image: Option<&Path>) -> Result<(), Box<dyn Error>> {
    // A store is a directory. It may be moved as a whole, and used by several processes at once.
    let temporary = tempfile::tempdir()?;
    let store = Store::open(temporary.path().join("store"), StoreOptions::new())?;
    println!("store at {} in format {}", store.root().display(), store.format());
    if store.owners() == Owners::InXattrs {
        // Who cannot give files away keeps owners in xattrs. Nothing else is different for him.
        println!("owners are kept in xattrs");
    }

    // What the drivers can do here is found out by trying; the store takes the first that works. One
    // that copies is left out: here something is to be mounted.
    let mut hindrances = Vec::new();
    let mut works = false;
    for driver in store.drivers().filter(|driver| driver.name() != "copy") {
        let mut target = ProbeTarget::new(store.root(), store.format());
        target.owners = store.owners();
        let probe = driver.probe(&target)?;
        if probe.usable() {
            println!("mounting by the driver {}", driver.name());
            works = true;
            break;
        }
        let why = if probe.mount.available { &probe.upper } else { &probe.mount };
        hindrances.push(format!("\nby the driver {}: {why}", driver.name()));
    }
    if !works {
        let text = "nothing can be mounted here: run this as root, or install the package fuse3 \
                    (snapshots as copies need neither: Store::activate_in_place)";
        return Err(format!("{text}{}", hindrances.concat()).into());
    }

    // Layers come in as archives, alone or in an image, and are committed: nobody changes them any
    // more. Each is the parent of the next.
    let top = match image {
        Some(path) => {
            let layout = ImageLayout::open(path)?;
            let options = ImportOptions::new();
            let image = import_image(&store, &layout, "image", &options, &mut ignore_progress)?;
            println!("imported {} layers", image.layers.len());
            image.layers.last().ok_or("the image has no layers")?.clone()
        }
        None => {
            let mut parent: Option<&str> = None;
            for (name, archive) in [("base", base_layer()?), ("app", app_layer()?)] {
                let applied = store.apply(
                    name,
                    parent,
                    &mut archive.as_slice(),
                    &ApplyOptions::default(),
                    Labels::new(),
                    &mut ignore_progress,
                )?;
                println!("applied {name}: {} entries, {}", applied.entries, applied.diff_id);
                parent = Some(name);
            }
            "app".to_owned()
        }
    };

    // A container gets a writable snapshot on top; mounted, it shows all layers as one tree.
    store.prepare("container", Some(&top), Labels::new())?;
    let root = temporary.path().join("root");
    fs::create_dir(&root)?;
    let mut guard = store.activate("container", &root, &MountOptions::default())?;

    println!("\nmounted; of which layer is what?");
    let mut seen = Vec::new();
    for entry in walkdir::WalkDir::new(&root).min_depth(1).sort_by_file_name() {
        let entry = entry?;
        if entry.file_type().is_file() {
            seen.push(RelPath::new(entry.path().strip_prefix(&root)?)?);
        }
        if seen.len() == 8 {
            break;
        }
    }
    for path in &seen {
        let layer = store.provenance("container", path)?.unwrap_or_default();
        println!("  /{}  {layer}", path.as_path().display());
    }

    // Write, delete, and replace a directory, as a container would.
    fs::write(root.join("written"), "by the container\n")?;
    if let Some(path) = seen.last() {
        fs::remove_file(root.join(path))?;
    }
    let replaced = root.join("etc");
    if replaced.is_dir() {
        fs::remove_dir_all(&replaced)?;
    }
    fs::create_dir(&replaced)?;
    fs::write(replaced.join("motd"), "all new\n")?;
    // Dropping the guard unmounts too; this way an error is seen.
    guard.unmount()?;

    println!("\nwhat the container changed:");
    let changes = store.changes("container", &mut ignore_progress)?;
    for change in changes.iter().take(20) {
        println!("  {change}");
    }
    if changes.len() > 20 {
        println!("  and {} more", changes.len() - 20);
    }

    // Committed, it is a layer like the others, and can be packed as one.
    let mut options = CommitOptions::new();
    options.labels.insert("example/made-by".to_owned(), "mount-layers".to_owned());
    store.commit("result", "container", options)?;
    let usage = store.usage("result")?;
    let mut archive = Vec::new();
    let exported =
        store.export("result", &mut archive, &ExportOptions::new(), &mut ignore_progress)?;
    println!("\ncommitted: {} bytes in {} inodes on disk", usage.bytes, usage.inodes);
    println!("exported: {} bytes, {}", exported.bytes, exported.diff_id);

    // The archive says it all: applied to the same parent, it makes the same changes.
    store.apply(
        "again",
        Some(&top),
        &mut archive.as_slice(),
        &ApplyOptions::default(),
        Labels::new(),
        &mut ignore_progress,
    )?;
    if store.changes("again", &mut ignore_progress)? != changes {
        return Err("the exported layer differs from what was committed".into());
    }
    println!("applied again: the same changes");

    // A layer that others need stays.
    match store.remove(&top) {
        Err(e) if e.kind() == ErrorKind::FailedPrecondition => println!("\nrefused: {e}"),
        Err(e) => return Err(e.into()),
        Ok(()) => return Err("a layer was removed that another needs".into()),
    }
    for name in ["again", "result"] {
        store.remove(name)?;
    }
    let report = store.check(&mut ignore_progress)?;
    println!("removed; problems in the store: {}", report.problems.len());
    Ok(())
}

/// Two directories with files.
fn base_layer() -> std::io::Result<Vec<u8>> {
    layer(&[
        ("etc/", ""),
        ("etc/motd", "welcome\n"),
        ("etc/old.conf", "deleted by the layer above\n"),
        ("var/cache/", ""),
        ("var/cache/stale", "hidden by the layer above\n"),
        ("var/log", "kept\n"),
    ])
}

/// On top of that: a new file, one that replaces another, a whiteout, which deletes one, and an opaque
/// directory, which hides all that was in it.
fn app_layer() -> std::io::Result<Vec<u8>> {
    layer(&[
        ("app", "new\n"),
        ("etc/motd", "welcome to the app\n"),
        ("etc/.wh.old.conf", ""),
        ("var/cache/.wh..wh..opq", ""),
        ("var/cache/fresh", "all that is in here\n"),
    ])
}

fn layer(entries: &[(&str, &str)]) -> std::io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, contents) in entries {
        let mut header = tar::Header::new_gnu();
        if path.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
        } else {
            header.set_mode(0o644);
        }
        header.set_size(contents.len() as u64);
        archive.append_data(&mut header, path, contents.as_bytes())?;
    }
    archive.into_inner()
}
