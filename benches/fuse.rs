//! A FUSE mount at work, with the kernel's overlayfs and fuse-overlayfs beside it: what is served by the
//! kernel's caches, what takes requests, several clients at once, and many layers. Runs as root, or with
//! fusermount3: `cargo bench --bench fuse`. Nothing is asserted; `tests/fuse_requests.rs` holds how many
//! requests there are.
//!
//! What a request costs swings with the machine: with two processors it is mostly the time until the
//! other one wakes. So compare within one run only.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use support::for_figures;
use support::scratch::scratch;
use support::table::Table;
use support::unions::{Maker, Mounted, lowers, many};

fn main() {
    let (files, big) = if for_figures() { (4000, 64 << 20) } else { (200, 1 << 20) };
    let scratch = scratch();
    let layers = lowers(scratch.path(), files, big);
    let few = many(&scratch.path().join("few"), 2, files);
    let fifty = many(&scratch.path().join("fifty"), 50, files);
    let makers = Maker::all();
    let mut table = Table::new();
    for workload in WORKLOADS {
        for maker in &makers {
            run(&mut table, workload, *maker, &layers, scratch.path());
        }
    }
    for clients in [1, 2, 4] {
        for (name, work) in CLIENTS {
            let workload = Workload {
                name: &format!("{name}, {clients} clients"),
                before: |mnt| walk(mnt).map(drop),
                work: &|mnt| several(clients, mnt, work),
                on: On::Known,
            };
            for maker in &makers {
                run(&mut table, &workload, *maker, &layers, scratch.path());
            }
        }
    }
    for (name, layers) in [("walk 2 layers", &few), ("walk 50 layers", &fifty)] {
        let workload = Workload { name, before: |_| Ok(()), work: &walk, on: On::Fresh };
        for maker in &makers {
            run(&mut table, &workload, *maker, layers, scratch.path());
        }
    }
    table.finish();
}

/// What is measured.
struct Workload<'a> {
    name: &'a str,
    /// What is done first.
    before: fn(&Path) -> io::Result<()>,
    /// Gives the number of operations.
    work: &'a dyn Fn(&Path) -> io::Result<u64>,
    on: On,
}

/// What the work finds.
#[derive(PartialEq, Eq)]
enum On {
    /// A mount of which the kernel knows nothing but what `before` did; each time a new one.
    Fresh,
    /// A mount on which `before` and the work were done before.
    Known,
}

/// How many operations of a kind there are in a measurement.
const TIMES: u64 = 2000;

const WORKLOADS: &[Workload<'static>] = &[
    Workload { name: "one request", before: nothing, work: &ask, on: On::Known },
    Workload { name: "walk first", before: nothing, work: &walk, on: On::Fresh },
    Workload { name: "walk again", before: nothing, work: &walk, on: On::Known },
    Workload { name: "list again", before: nothing, work: &list, on: On::Known },
    Workload { name: "read all first", before: nothing, work: &read_all, on: On::Fresh },
    Workload { name: "read all again", before: nothing, work: &read_all, on: On::Known },
    Workload { name: "stat hot", before: nothing, work: &stat, on: On::Known },
    Workload { name: "open hot", before: nothing, work: &open, on: On::Known },
    Workload {
        name: "open, stat, read hot",
        before: nothing,
        work: &open_stat_read,
        on: On::Known,
    },
    Workload { name: "read large first", before: nothing, work: &read_large, on: On::Fresh },
    Workload { name: "read large again", before: nothing, work: &read_large, on: On::Known },
    Workload { name: "read 4k at random", before: nothing, work: &read_at_random, on: On::Known },
    Workload { name: "create 4k", before: nothing, work: &create, on: On::Fresh },
    Workload { name: "write large", before: nothing, work: &write_large, on: On::Fresh },
    Workload { name: "write 512 bytes", before: nothing, work: &write_small, on: On::Fresh },
    Workload { name: "remove from upper", before: created, work: &remove, on: On::Fresh },
    Workload { name: "remove from lower", before: nothing, work: &remove_lower, on: On::Fresh },
    Workload { name: "append 16k", before: nothing, work: &append, on: On::Fresh },
    Workload { name: "chmod 16k", before: nothing, work: &chmod, on: On::Fresh },
    Workload { name: "rename directories", before: nothing, work: &rename, on: On::Fresh },
];

/// What several clients do at once: client number, mount.
type ByClient = fn(usize, &Path) -> io::Result<u64>;

const CLIENTS: [(&str, ByClient); 3] = [
    ("stat", |_, mnt| stat(mnt)),
    ("open and read", |_, mnt| open_stat_read(mnt)),
    ("create", |client, mnt| create_in(&mnt.join(format!("by-{client}")))),
];

/// The same number of operations in all, whoever does them.
fn several(clients: usize, mnt: &Path, work: ByClient) -> io::Result<u64> {
    std::thread::scope(|scope| {
        let clients: Vec<_> =
            (0..clients).map(|client| scope.spawn(move || work(client, mnt))).collect();
        clients.into_iter().map(|client| client.join().expect("no panic")).sum()
    })
}

fn run(table: &mut Table, workload: &Workload<'_>, maker: Maker, layers: &[PathBuf], dir: &Path) {
    let mounted = std::cell::RefCell::new(None);
    let mount = || {
        mounted.replace(None);
        let new = Mounted::new(maker, layers, dir)?;
        (workload.before)(new.path()).map_err(|e| e.to_string())?;
        mounted.replace(Some(new));
        Ok::<_, String>(())
    };
    let work = || match &*mounted.borrow() {
        Some(mounted) => (workload.work)(mounted.path()).map_err(|e| e.to_string()),
        None => Err("nothing is mounted".to_owned()),
    };
    // Once for nothing, to see whether it can be done, and how many requests it takes.
    let once = || {
        mount()?;
        if workload.on == On::Known {
            work()?;
        }
        let requests = || mounted.borrow().as_ref().and_then(Mounted::requests);
        let before = requests();
        let operations = work()?;
        if let (Some(before), Some(after)) = (before, requests()) {
            let each = (after - before) as f64 / operations as f64;
            println!("{}: {operations} operations of {each:.2} requests", workload.name);
        }
        Ok::<_, String>(())
    };
    if let Err(why) = once() {
        println!("skipped: {} by {}: {why}", workload.name, maker.name());
        mounted.replace(None);
        return;
    }
    let before = || {
        if workload.on == On::Fresh {
            mount().expect("as the first time");
        }
    };
    table.measure(workload.name, maker.name(), before, || {
        work().expect("as the first time");
    });
    mounted.replace(None);
}

fn nothing(_: &Path) -> io::Result<()> {
    Ok(())
}

fn ask(mnt: &Path) -> io::Result<u64> {
    for _ in 0..TIMES {
        let how = AtFlags::STATX_FORCE_SYNC;
        rustix::fs::statx(CWD, mnt.join("t"), how, StatxFlags::BASIC_STATS)?;
    }
    Ok(TIMES)
}

fn walk(mnt: &Path) -> io::Result<u64> {
    each_file(mnt, |path| path.symlink_metadata().map(drop))
}

fn list(mnt: &Path) -> io::Result<u64> {
    each_file(mnt, |_| Ok(()))
}

fn read_all(mnt: &Path) -> io::Result<u64> {
    each_file(mnt, |path| fs::read(path).map(drop))
}

/// Every file in `t`.
fn each_file(mnt: &Path, mut visit: impl FnMut(&Path) -> io::Result<()>) -> io::Result<u64> {
    let mut files = 0;
    for dir in fs::read_dir(mnt.join("t"))? {
        for file in fs::read_dir(dir?.path())? {
            visit(&file?.path())?;
            files += 1;
        }
    }
    Ok(files)
}

/// Some of the files in `t`, over and over.
fn some_file(mnt: &Path, n: u64) -> PathBuf {
    let n = n % 50;
    let name = mnt.join(format!("t/0/file-{n}.txt"));
    // In the layers of `many`.
    if n == 0 && !name.exists() { mnt.join("t/0/file-0") } else { name }
}

fn stat(mnt: &Path) -> io::Result<u64> {
    for n in 0..TIMES {
        fs::symlink_metadata(some_file(mnt, n))?;
    }
    Ok(TIMES)
}

fn open(mnt: &Path) -> io::Result<u64> {
    for n in 0..TIMES {
        File::open(some_file(mnt, n))?.read_exact(&mut [0; 100])?;
    }
    Ok(TIMES)
}

fn open_stat_read(mnt: &Path) -> io::Result<u64> {
    for n in 0..TIMES {
        fs::read(some_file(mnt, n))?;
    }
    Ok(TIMES)
}

fn read_large(mnt: &Path) -> io::Result<u64> {
    let mut file = File::open(mnt.join("big"))?;
    let mut buffer = vec![0; 1 << 17];
    let mut parts = 0;
    while file.read(&mut buffer)? > 0 {
        parts += 1;
    }
    Ok(parts)
}

fn read_at_random(mnt: &Path) -> io::Result<u64> {
    let file = File::open(mnt.join("big"))?;
    let pages = file.metadata()?.len() >> 12;
    for n in 0..TIMES {
        let page = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % pages;
        file.read_exact_at(&mut [0; 4096], page << 12)?;
    }
    Ok(TIMES)
}

fn create(mnt: &Path) -> io::Result<u64> {
    create_in(&mnt.join("new"))
}

fn created(mnt: &Path) -> io::Result<()> {
    create(mnt).map(drop)
}

fn create_in(dir: &Path) -> io::Result<u64> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir(dir)?;
    let files = TIMES / 4;
    for n in 0..files {
        fs::write(dir.join(format!("file-{n}")), [b'n'; 4096])?;
    }
    Ok(files)
}

fn remove(mnt: &Path) -> io::Result<u64> {
    let files = TIMES / 4;
    for n in 0..files {
        fs::remove_file(mnt.join(format!("new/file-{n}")))?;
    }
    Ok(files)
}

fn remove_lower(mnt: &Path) -> io::Result<u64> {
    let mut names = Vec::new();
    for file in fs::read_dir(mnt.join("t/0"))? {
        names.push(file?.path());
    }
    names.iter().try_for_each(fs::remove_file)?;
    Ok(names.len() as u64)
}

fn write_large(mnt: &Path) -> io::Result<u64> {
    let mut file = File::create(mnt.join("large"))?;
    let data = vec![b'n'; 1 << 17];
    for _ in 0..512 {
        file.write_all(&data)?;
    }
    Ok(512)
}

fn write_small(mnt: &Path) -> io::Result<u64> {
    let mut file = File::create(mnt.join("small"))?;
    for _ in 0..TIMES {
        file.write_all(&[b'n'; 512])?;
    }
    Ok(TIMES)
}

fn each_to_copy(mnt: &Path, mut visit: impl FnMut(&Path) -> io::Result<()>) -> io::Result<u64> {
    let mut files = 0;
    for file in fs::read_dir(mnt.join("cu"))? {
        visit(&file?.path())?;
        files += 1;
    }
    Ok(files)
}

fn append(mnt: &Path) -> io::Result<u64> {
    each_to_copy(mnt, |path| OpenOptions::new().append(true).open(path)?.write_all(b"x"))
}

fn chmod(mnt: &Path) -> io::Result<u64> {
    each_to_copy(mnt, |path| fs::set_permissions(path, fs::Permissions::from_mode(0o600)))
}

fn rename(mnt: &Path) -> io::Result<u64> {
    let mut names = Vec::new();
    for dir in fs::read_dir(mnt.join("ren"))? {
        names.push(dir?.path());
    }
    for name in &names {
        fs::rename(name, name.with_extension("renamed"))?;
    }
    Ok(names.len() as u64)
}
