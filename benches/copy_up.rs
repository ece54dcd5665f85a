//! The first change of a file that is in a lower layer: by this library over FUSE, the kernel's overlayfs and
//! fuse-overlayfs, on tmpfs, and for root on ext4 and on XFS with reflink, in images that the bench makes.
//!
//! `cargo bench --bench copy_up`, with a part of a line's name after `--` for some of it: `-- "xfs 1 GiB"`.
//! Each figure is of one file; a mount for each run. Nothing is asserted.

mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use support::for_figures;
use support::scratch::{is_root, scratch};
use support::table::Table;
use support::unions::{Maker, Mounted};

/// Name, bytes, and how many files there are in a run.
type Size = (&'static str, u64, u32);

const SIZES: [Size; 5] = [
    ("4 KiB", 4 << 10, 200),
    ("64 KiB", 64 << 10, 100),
    ("1 MiB", 1 << 20, 20),
    ("64 MiB", 64 << 20, 2),
    ("1 GiB", 1 << 30, 1),
];

type Change = fn(&Path, u64) -> std::io::Result<()>;

const CHANGES: [(&str, Change); 9] = [
    ("append", |path, _| File::options().append(true).open(path)?.write_all(b"x")),
    ("write in the middle", |path, size| {
        File::options().write(true).open(path)?.write_all_at(b"x", size / 2)
    }),
    ("append, fsync", |path, _| {
        let mut file = File::options().append(true).open(path)?;
        file.write_all(b"x")?;
        file.sync_all()
    }),
    ("chmod", |path, _| fs::set_permissions(path, fs::Permissions::from_mode(0o600))),
    ("chown", |path, _| std::os::unix::fs::chown(path, None, Some(effective_group()))),
    ("rename", |path, _| fs::rename(path, path.with_extension("renamed"))),
    ("link", |path, _| fs::hard_link(path, path.with_extension("linked"))),
    ("truncate to 0", |path, _| File::options().write(true).open(path)?.set_len(0)),
    ("truncate to half", |path, size| File::options().write(true).open(path)?.set_len(size / 2)),
];

/// One that this user may give files to.
fn effective_group() -> u32 {
    if is_root() { 1 } else { rustix::process::getegid().as_raw() }
}

fn main() {
    let scratch = scratch();
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let sizes = if for_figures() { &SIZES[..] } else { &[("4 KiB", 4 << 10, 2)] };
    let mut disks = vec![("tmpfs", Disk::Directory(scratch.path().to_owned()))];
    if for_figures() && is_root() {
        for kind in ["ext4", "xfs"] {
            match Disk::image(scratch.path(), kind) {
                Ok(disk) => disks.push((kind, disk)),
                Err(why) => println!("skipped: {kind}: {why}"),
            }
        }
    }
    let makers = Maker::that_copy_up();
    let mut table = Table::new();
    for (kind, disk) in &disks {
        for size in sizes {
            for sparse in [false, true] {
                let named = format!("{kind} {}{}", size.0, if sparse { " sparse" } else { "" });
                let changes: Vec<_> = CHANGES
                    .iter()
                    .map(|(change, work)| (format!("{named} {change}"), *work))
                    .filter(|(what, _)| wanted.as_ref().is_none_or(|part| what.contains(part)))
                    .collect();
                if changes.is_empty() || (sparse && size.0 != "64 MiB") {
                    continue;
                }
                let lower = lower(disk.path(), *size, sparse);
                for (what, work) in changes {
                    for maker in &makers {
                        run(&mut table, &what, work, *maker, &lower, *size);
                    }
                }
                fs::remove_dir_all(&lower).expect("the lower layer is removed");
            }
        }
    }
    table.finish();
}

/// A layer with files of one size; of sparse ones a sixteenth is data.
fn lower(dir: &Path, (_, size, files): Size, sparse: bool) -> PathBuf {
    let lower = dir.join("lower");
    fs::create_dir_all(&lower).expect("a directory");
    let block: Vec<u8> =
        (0..1 << 16).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for i in 0..files {
        let file = File::create(lower.join(format!("file-{i}"))).expect("a file");
        file.set_len(size).expect("its length");
        for at in (0..size).step_by(block.len()).filter(|at| !sparse || at % (1 << 20) == 0) {
            let len = usize::try_from(size - at).unwrap_or(block.len()).min(block.len());
            file.write_all_at(&block[..len], at).expect("its data");
        }
    }
    rustix::fs::syncfs(File::open(&lower).expect("the layer")).expect("it is on disk");
    lower
}

fn run(
    table: &mut Table,
    what: &str,
    work: Change,
    maker: Maker,
    lower: &Path,
    (_, size, files): Size,
) {
    let runs = if for_figures() { 5 } else { 1 };
    let dir = lower.parent().expect("a directory");
    let mounted = std::cell::RefCell::new(None);
    let before = || {
        mounted.replace(None);
        let new = Mounted::new(maker, &[lower.to_owned()], dir)?;
        // Known to the kernel, as to a program that has looked around.
        fs::read_dir(new.path())
            .and_then(|mut entries| entries.try_for_each(|entry| entry?.metadata().map(drop)))
            .map_err(|e| e.to_string())?;
        mounted.replace(Some(new));
        Ok(())
    };
    let change = || {
        let mounted = mounted.borrow();
        let mounted = mounted.as_ref().ok_or("nothing is mounted")?;
        (0..files)
            .try_for_each(|i| work(&mounted.path().join(format!("file-{i}")), size))
            .map_err(|e| e.to_string())
    };
    table.measure_few(what, maker.name(), (runs, files), before, change);
    mounted.replace(None);
}

/// Where layers are.
enum Disk {
    Directory(PathBuf),
    /// A file system in a file, unmounted when dropped.
    Image(PathBuf),
}

impl Disk {
    fn image(dir: &Path, kind: &str) -> Result<Disk, String> {
        let (image, at) = (dir.join(format!("{kind}.img")), dir.join(kind));
        let file = File::create(&image).and_then(|file| file.set_len(6 << 30));
        file.and_then(|()| fs::create_dir(&at)).map_err(|e| e.to_string())?;
        command(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image))?;
        command(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at))?;
        Ok(Disk::Image(at))
    }

    fn path(&self) -> &Path {
        match self {
            Disk::Directory(path) | Disk::Image(path) => path,
        }
    }
}

fn command(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Disk::Image(at) = self
            && let Err(e) = command(Command::new("umount").arg(&*at))
        {
            println!("cannot unmount {}: {e}", at.display());
        }
    }
}
