//! What is moved: a tree that is the same in every run, or a real one.

use std::env;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

/// The archives of one tree.
pub struct Archives {
    pub plain: PathBuf,
    pub gzip: PathBuf,
    /// None where the feature is off.
    pub zstd: Option<PathBuf>,
    pub bytes: u64,
    pub entries: u64,
}

impl Archives {
    /// Of `STRATAFS_BENCH_TAR` (an uncompressed archive), of `STRATAFS_BENCH_TREE` (a directory), or
    /// of `files` made-up files. Says which.
    pub fn new(scratch: &Path, files: usize) -> Archives {
        let plain = match (env::var_os("STRATAFS_BENCH_TAR"), env::var_os("STRATAFS_BENCH_TREE")) {
            (Some(archive), _) => PathBuf::from(archive),
            (None, Some(tree)) => pack(Path::new(&tree), &scratch.join("tree.tar")),
            (None, None) => made_up(&scratch.join("tree.tar"), files, 0),
        };
        let gzip = compress(&plain, &scratch.join("tree.tar.gz"), |out| {
            flate2::write::GzEncoder::new(out, flate2::Compression::default())
        });
        #[cfg(feature = "zstd")]
        let zstd = Some(compress(&plain, &scratch.join("tree.tar.zst"), |out| {
            zstd::Encoder::new(out, 3).expect("an encoder").auto_finish()
        }));
        #[cfg(not(feature = "zstd"))]
        let zstd = None;
        let bytes = fs::metadata(&plain).expect("the archive").len();
        let mut archive = tar::Archive::new(File::open(&plain).expect("the archive opens"));
        let entries = archive.entries_with_seek().expect("entries").count() as u64;
        println!("{plain:?}: {entries} entries, {} MB", bytes / 1_000_000);
        Archives { plain, gzip, zstd, bytes, entries }
    }
}

fn compress<W: Write>(from: &Path, to: &Path, encoder: impl FnOnce(File) -> W) -> PathBuf {
    let mut input = File::open(from).expect("the archive opens");
    let mut out = encoder(File::create(to).expect("a new file"));
    io::copy(&mut input, &mut out).expect("compressed");
    // Both encoders end the stream when they are dropped.
    drop(out);
    to.to_owned()
}

fn pack(tree: &Path, to: &Path) -> PathBuf {
    let mut archive = builder(to);
    archive.follow_symlinks(false);
    archive.append_dir_all(".", tree).expect("the tree is packed");
    archive.into_inner().and_then(|mut out| out.flush()).expect("written");
    to.to_owned()
}

fn builder(to: &Path) -> Builder<BufWriter<File>> {
    Builder::new(BufWriter::with_capacity(1 << 20, File::create(to).expect("a new file")))
}

/// Packages as distributions have them: directories of fifty, most files of some kilobytes and a few
/// large ones, of text that compresses about as well as programs do, with a symbolic link now and
/// then. The same `files` and `seed` give the same bytes.
pub fn made_up(to: &Path, files: usize, seed: u64) -> PathBuf {
    let mut archive = builder(to);
    let mut random = Random(seed + 1);
    let mut content = Vec::new();
    for i in 0..files {
        let dir = format!("usr/lib/package-{seed}-{}", i / 50);
        if i % 50 == 0 {
            append(&mut archive, EntryType::Directory, &dir, 0o755, b"");
        }
        let path = format!("{dir}/file-{i}.so");
        if i % 25 == 24 {
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::Symlink);
            header.set_size(0);
            let target = format!("file-{}.so", i - 1);
            archive.append_link(&mut header, path, target).expect("a link is packed");
            continue;
        }
        // One in sixteen of up to 256 KiB, the others of up to 16.
        let most = if random.next().is_multiple_of(16) { 256 << 10 } else { 16 << 10 };
        random.fill(&mut content, (random.clone().next() % most) as usize);
        append(&mut archive, EntryType::Regular, &path, 0o644, &content);
    }
    archive.into_inner().and_then(|mut out| out.flush()).expect("written");
    to.to_owned()
}

/// On top of [`made_up`] of these numbers: every tenth file anew, every hundredth deleted.
pub fn made_up_change(to: &Path, files: usize, seed: u64) -> PathBuf {
    let mut archive = builder(to);
    for i in (0..files).step_by(10) {
        let dir = format!("usr/lib/package-{seed}-{}", i / 50);
        if i % 100 == 0 {
            let path = format!("{dir}/.wh.file-{i}.so");
            append(&mut archive, EntryType::Regular, &path, 0o644, b"");
        } else {
            let path = format!("{dir}/file-{i}.so");
            append(&mut archive, EntryType::Regular, &path, 0o644, b"changed");
        }
    }
    archive.into_inner().and_then(|mut out| out.flush()).expect("written");
    to.to_owned()
}

/// Entries without content, for what an entry itself costs.
pub fn made_up_empty(to: &Path, entries: usize) -> PathBuf {
    let mut archive = builder(to);
    for i in 0..entries {
        let path = format!("usr/share/doc/package-{}/file-with-a-name-{i}", i / 50);
        append(&mut archive, EntryType::Regular, &path, 0o644, b"");
    }
    archive.into_inner().and_then(|mut out| out.flush()).expect("written");
    to.to_owned()
}

fn append<W: Write>(archive: &mut Builder<W>, kind: EntryType, path: &str, mode: u32, text: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(1_700_000_000);
    header.set_size(text.len() as u64);
    archive.append_data(&mut header, path, text).expect("an entry is packed");
}

/// Marsaglia's xorshift, which is the same everywhere.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 8
    }

    /// Half of it is noise, in short runs.
    fn fill(&mut self, out: &mut Vec<u8>, len: usize) {
        out.clear();
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes());
            out.extend_from_slice(b"function");
        }
        out.truncate(len);
    }
}
