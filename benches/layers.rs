//! What moving layers costs: unpacking archives into a store, packing them again, what a layer
//! changes, importing an image; and beside it, where they are installed, what others need for the
//! same. Runs as anybody. Nothing is asserted; a table of ratios is printed at the end.
//!
//! ```sh
//! cargo bench --bench layers                                       # a small tree, some minutes
//! STRATAFS_BENCH_TREE=/usr/share cargo bench --bench layers        # for figures
//! STRATAFS_BENCH_TAR=layer.tar cargo bench --bench layers -- apply # one that is there; some of it
//! ```
//!
//! Figures are worth something only as ratios from one run, on a machine that does nothing else, as
//! root (so that all restore owners) and on a tmpfs, where the disk has no say; room for ten times the
//! tree is needed. `STRATAFS_BENCH_SCRATCH` names another place for it.
//!
//! What is compared is not quite the same: ours computes the digests of the archive, compressed and
//! not, and records the layer in a database; GNU tar and bsdtar do neither, and trust the archive's
//! paths more. umoci verifies digests, too. Nobody waits for a disk.

mod support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::Path;

use stratafs::{
    ApplyOptions, ArchiveForm, Durability, ExportOptions, ImageLayout, ImportOptions, Labels,
    LayerFormat, LayerTarget, LayoutWriter, Owners, SaveOptions, Store, StoreOptions, apply_layer,
    diff_trees, ignore_progress, import_image, save_image,
};

use support::peers::{self, Peer};
use support::scratch::{clear, empty, is_root, scratch};
use support::table::{OURS, Table};
use support::tree::{Archives, made_up, made_up_change};
use support::{apply, apply_options, for_figures, store};

const FILES: usize = 5_000;

fn main() {
    let files = if for_figures() { FILES } else { 100 };
    let scratch = scratch();
    let dir = scratch.path();
    let archives = Archives::new(dir, files);
    let peers = Peers::find();
    let store = store(&dir.join("store"));
    let mut table = Table::new();
    unpacking(&mut table, dir, &store, &archives, &peers);
    keeping_owners(&mut table, dir, files);
    packing(&mut table, dir, &store, &archives, &peers);
    changes(&mut table, dir, &store, files);
    images(&mut table, dir, &store, files, &peers);
    table.finish();
}

struct Peers {
    tar: Option<Peer>,
    bsdtar: Option<Peer>,
    pigz: Option<Peer>,
    umoci: Option<Peer>,
}

impl Peers {
    fn find() -> Peers {
        Peers {
            tar: peers::find("tar"),
            bsdtar: peers::find("bsdtar"),
            pigz: peers::find("pigz"),
            umoci: peers::find("umoci"),
        }
    }
}

fn unpacking(table: &mut Table, dir: &Path, store: &Store, archives: &Archives, peers: &Peers) {
    let target = dir.join("unpacked");
    let fresh = || empty(&target);
    let remove = || drop(store.remove("layer"));
    let mut all = vec![("apply tar", &archives.plain), ("apply tar.gz", &archives.gzip)];
    all.extend(archives.zstd.as_ref().map(|path| ("apply tar.zst", path)));
    for (what, archive) in all {
        table.measure(what, OURS, remove, || apply(store, "layer", None, archive));
        table.measure(what, "stratafs, no store", fresh, || unpack(archive, &target));
        if let Some(tar) = &peers.tar {
            table.compare(what, "GNU tar", fresh, || tar.run(&[&"-xpf", archive, &"-C", &target]));
        }
        if let Some(bsdtar) = &peers.bsdtar {
            let run = || bsdtar.run(&[&"-xpf", archive, &"-C", &target]);
            table.compare(what, "bsdtar", fresh, run);
        }
        if what == "apply tar.gz"
            && let (Some(pigz), Some(tar)) = (&peers.pigz, &peers.tar)
        {
            let run = || pigz.pipe(&[&"-dc", archive], tar, &[&"-xpf-", &"-C", &target]);
            table.compare(what, "pigz | GNU tar", fresh, run);
        }
    }
    clear(&target);
    remove();
}

/// Small files that are all somebody else's, into a store that keeps owners in xattrs, and as root into one that
/// keeps them with the files.
fn keeping_owners(table: &mut Table, dir: &Path, files: usize) {
    let archive = dir.join("owned.tar");
    owned(&archive, files).expect("an archive");
    let mut contenders = vec![(OURS, Owners::InXattrs)];
    if is_root() {
        contenders.push(("with the files", Owners::OfFiles));
    }
    let mut contenders: Vec<_> = contenders
        .into_iter()
        .map(|(who, owners)| {
            let mut options = StoreOptions::new();
            options.durability = Durability::None;
            options.format = Some(LayerFormat::OverlayUser);
            options.owners = Some(owners);
            let store = Store::open(dir.join(who), options).expect("the store opens");
            let archive = archive.clone();
            let mut n = 0;
            (who, move || {
                n += 1;
                let mut input = File::open(&archive).map_err(|e| e.to_string())?;
                let (options, stop) = (ApplyOptions::default(), &mut ignore_progress);
                let key = format!("layer {n}");
                let done = store.apply(&key, None, &mut input, &options, Labels::new(), stop);
                done.map(drop).map_err(|e| e.to_string())
            })
        })
        .collect();
    let rounds = if for_figures() { 7 } else { 1 };
    table.in_turn("apply, owners in xattrs", rounds, &mut contenders);
}

/// An archive of files of 3,000 bytes, 100 in a directory, of user and group 33.
fn owned(archive: &Path, files: usize) -> std::io::Result<()> {
    let mut tar = tar::Builder::new(File::create(archive)?);
    let mut header = tar::Header::new_ustar();
    header.set_uid(33);
    header.set_gid(33);
    header.set_mtime(1_000_000_000);
    for n in 0..files {
        if n % 100 == 0 {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
            header.set_size(0);
            tar.append_data(&mut header, format!("{}/", n / 100), std::io::empty())?;
        }
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(3000);
        tar.append_data(&mut header, format!("{}/{n}", n / 100), &[7; 3000][..])?;
    }
    tar.finish()
}

/// Into a plain tree, as the archivers do.
fn unpack(archive: &Path, target: &Path) {
    let options: ApplyOptions = apply_options();
    let input = File::open(archive).expect("the archive opens");
    apply_layer(input, target, LayerTarget::Tree, &options, &mut ignore_progress)
        .expect("unpacked");
}

fn packing(table: &mut Table, dir: &Path, store: &Store, archives: &Archives, peers: &Peers) {
    apply(store, "layer", None, &archives.plain);
    let (tree, out) = (dir.join("tree"), dir.join("packed.tar"));
    empty(&tree);
    unpack(&archives.plain, &tree);
    // Into a file: GNU tar does not even read what it packs for /dev/null.
    let fresh = || drop(fs::remove_file(&out));
    let export = |form| {
        let mut out = File::create(&out).expect("a new file");
        let mut options = ExportOptions::default();
        options.form = form;
        store.export("layer", &mut out, &options, &mut ignore_progress).expect("packed");
    };
    let again = "stratafs, as imported";
    table.measure("export", OURS, fresh, || export(ArchiveForm::Canonical));
    // The archive that the layer came in, byte for byte, from its record.
    table.measure("export", again, fresh, || export(ArchiveForm::AsImported));
    if let Some(tar) = &peers.tar {
        table.compare("export", "GNU tar", fresh, || tar.run(&[&"-cf", &out, &"-C", &tree, &"."]));
    }
    if let Some(bsdtar) = &peers.bsdtar {
        let run = || bsdtar.run(&[&"-cf", &out, &"-C", &tree, &"."]);
        table.compare("export", "bsdtar", fresh, run);
    }
    fresh();
    clear(&tree);
}

/// Always of the made-up tree, since what is changed must be known: by the layer on top, by two
/// snapshots of a store, and by two directories that share nothing.
fn changes(table: &mut Table, dir: &Path, store: &Store, files: usize) {
    let below = made_up(&dir.join("below.tar"), files, 0);
    let above = made_up_change(&dir.join("above.tar"), files, 0);
    apply(store, "below", None, &below);
    apply(store, "above", Some("below"), &above);
    table.measure(
        "changes of a layer",
        OURS,
        || (),
        || {
            store.changes("above", &mut ignore_progress).expect("changes");
        },
    );
    table.measure(
        "changes of snapshots",
        OURS,
        || (),
        || {
            store.changes_between("above", Some("below"), &mut ignore_progress).expect("changes");
        },
    );
    let [lower, upper] = ["lower", "upper"].map(|name| dir.join(name));
    for (tree, archives) in [(&lower, &[&below][..]), (&upper, &[&below, &above])] {
        empty(tree);
        archives.iter().for_each(|archive| unpack(archive, tree));
    }
    let what = "changes of directories";
    table.measure(
        what,
        OURS,
        || (),
        || {
            diff_trees(&lower, &upper, &mut ignore_progress).expect("changes");
        },
    );
}

/// Four made-up layers, compressed with gzip.
fn images(table: &mut Table, dir: &Path, store: &Store, files: usize, peers: &Peers) {
    let mut parent = None;
    for seed in 0..4 {
        let (name, archive) = (format!("base{seed}"), dir.join(format!("base{seed}.tar")));
        apply(store, &name, parent.as_deref(), &made_up(&archive, files / 4, seed));
        parent = Some(name);
    }
    let (file, layout, bundle) = (dir.join("image.tar"), dir.join("image"), dir.join("bundle"));
    let save = |out| {
        let mut options = SaveOptions::new();
        options.reference = Some("image".to_owned());
        save_image(store, "base3", out, &options, &mut ignore_progress).expect("saved");
    };
    save(LayoutWriter::to_tar_file(&file, dir).expect("a layout"));
    save(LayoutWriter::to_directory(&layout).expect("a layout"));
    let what = "import 4 layers";
    let mut options = ImportOptions::new();
    options.apply = apply_options();
    table.measure(
        what,
        OURS,
        || drop(store.remove_image("image")),
        || {
            let layout = ImageLayout::open(&file).expect("the layout opens");
            import_image(store, &layout, "image", &options, &mut ignore_progress)
                .expect("imported");
        },
    );
    if let Some(umoci) = &peers.umoci {
        let image = format!("{}:image", layout.display());
        let fresh = || clear(&bundle);
        for (who, words) in
            [("umoci unpack", &["unpack"][..]), ("umoci raw unpack", &["raw", "unpack"])]
        {
            let mut arguments: Vec<&dyn AsRef<OsStr>> = Vec::new();
            arguments.extend(words.iter().map(|word| word as &dyn AsRef<OsStr>));
            if !is_root() {
                arguments.push(&"--rootless");
            }
            arguments.extend([&"--image" as &dyn AsRef<OsStr>, &image, &bundle]);
            table.compare(what, who, fresh, || umoci.run(&arguments));
        }
    }
}
