//! Archives and marks: the codec, unpacking, and names.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::archive::entry::{Entry, EntryKind, EntryLimits, EntryReader, EntryWriter, Timestamp};
use crate::archive::{ApplyLimits, ApplyOptions, LayerTarget, apply_layer};
use crate::digest::{DiffId, Digest};
use crate::error::{Error, ErrorKind};
use crate::layer::LayerFormat;
use crate::layer::marks::{self as layer_marks, DotWh, Redirect};
use crate::path::{Name, RelPath};
use crate::progress::ignore_progress;

const BLOCK: usize = 512;

/// Makes the checksums of what may be headers right, which no mutation would.
pub(super) fn with_sums(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    let (blocks, _) = data.as_chunks_mut::<BLOCK>();
    for (n, block) in blocks.iter_mut().enumerate() {
        if n > 0 && block.get(257..262) != Some(b"ustar") {
            continue;
        }
        let mut put = |text: &[u8]| {
            let field = block.get_mut(148..156).expect("a block has this field");
            field.copy_from_slice(text);
        };
        put(b"        ");
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        let text = format!("{sum:06o}\0 ");
        let field = block.get_mut(148..156).expect("a block has this field");
        field.copy_from_slice(text.as_bytes());
    }
    data
}

/// The tar codec: any bytes are either entries or a refusal; an entry's content is as long as the
/// entry says; and an entry that is not sparse is the same after it was written and read again.
pub fn tar_entry(data: &[u8]) {
    let limits = EntryLimits { max_entries: 1000, ..EntryLimits::default() };
    let data = with_sums(data);
    let mut reader = EntryReader::new(&data[..], limits);
    loop {
        let entry = match reader.next() {
            Ok(Some(entry)) => entry,
            Ok(None) => return,
            Err(e) => return refused(&e),
        };
        let mut content = Vec::new();
        if let Err(e) = reader.content().read_to_end(&mut content) {
            return refused(&e.downcast().expect("the codec gives errors of its own"));
        }
        assert_eq!(content.len() as u64, entry.stored_size());
        if matches!(entry.kind, EntryKind::File { sparse: Some(_), .. }) {
            continue;
        }
        let mut writer = EntryWriter::new(Vec::new());
        writer.append(&entry, &mut &content[..]).expect("what was read can be written");
        let written = writer.finish().expect("an archive in memory can be finished");
        let mut again = EntryReader::new(&written[..], EntryLimits::default());
        assert_eq!(again.next().expect("what was written can be read"), Some(entry));
        let mut same = Vec::new();
        again.content().read_to_end(&mut same).expect("its content can be read");
        assert_eq!(same, content);
    }
}

fn refused(e: &Error) {
    assert!(matches!(e.kind(), ErrorKind::InvalidArchive | ErrorKind::LimitExceeded), "{e}");
}

/// Names of marks and redirects: a mark is that of the name it was made for, and a redirect loses nothing.
pub fn marks(data: &[u8]) {
    if let Ok(name) = Name::new(data) {
        match layer_marks::decode_name(&name) {
            DotWh::Whiteout(of) => assert_eq!(layer_marks::whiteout_name(&of), Some(name.clone())),
            DotWh::Plain => assert!(!data.starts_with(b".wh.")),
            DotWh::Opaque | DotWh::Internal | DotWh::Malformed => {
                assert!(data.starts_with(b".wh."));
            }
        }
        if let Some(mark) = layer_marks::whiteout_name(&name) {
            assert_eq!(layer_marks::decode_name(&mark), DotWh::Whiteout(name));
        }
    }
    match layer_marks::decode_redirect(data) {
        Some(Redirect::Sibling(name)) => assert_eq!(name.as_bytes(), data),
        Some(Redirect::Path(path)) => assert_eq!([b"/", path.as_bytes()].concat(), data),
        None => {}
    }
}

/// A directory to unpack into, and canaries around it.
pub(super) struct Cage {
    pub(super) top: PathBuf,
    pub(super) before: Vec<(PathBuf, String)>,
}

pub(super) static CAGE: LazyLock<Cage> = LazyLock::new(|| {
    let top = std::env::temp_dir().join(format!("stratafs-fuzz-{}", std::process::id()));
    fs::create_dir_all(top.join("outside/dir")).expect("the temporary directory is writable");
    fs::create_dir_all(top.join("in")).expect("the temporary directory is writable");
    for file in ["canary", "outside/secret", "outside/dir/file"] {
        fs::write(top.join(file), file).expect("a canary can be written");
    }
    symlink("secret", top.join("outside/link")).expect("a link can be made");
    let before = canaries(&top);
    Cage { top, before }
});

/// Everything that can be seen of the canaries.
pub(super) fn canaries(top: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut left = vec![top.join("outside"), top.join("canary")];
    while let Some(path) = left.pop() {
        let m = path.symlink_metadata().expect("a canary is there");
        let mut text = format!("{:o} {} {} {}", m.mode(), m.uid(), m.ino(), m.nlink());
        text += &format!(" {} {} {}", m.size(), m.mtime_nsec(), m.ctime_nsec());
        if m.is_dir() {
            for entry in fs::read_dir(&path).expect("a canary can be listed") {
                left.push(entry.expect("a canary can be listed").path());
            }
        } else if m.is_file() {
            text += &fs::read_to_string(&path).expect("a canary can be read");
        }
        found.push((path, text));
    }
    found.sort();
    found
}

/// Unpacking: whatever an archive has, nothing outside of the directory changes, and in a tree or a
/// layer of overlay no name of a mark is left. The first byte chooses target and form: bytes as they
/// are, or as a script of entries with names that collide.
pub fn tar_apply(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let cage = &*CAGE;
    let target = match choice >> 1 & 3 {
        0 => LayerTarget::Layer(LayerFormat::Aufs),
        1 => LayerTarget::Tree,
        _ => LayerTarget::Layer(LayerFormat::OverlayUser),
    };
    let scripted = choice & 1 == 1;
    let archive = if scripted { script(data, &cage.top) } else { with_sums(data) };

    static RUNS: AtomicU64 = AtomicU64::new(0);
    let root = cage.top.join(format!("in/{}", RUNS.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir(&root).expect("a root can be made");
    let mut options = ApplyOptions::unprivileged();
    options.limits =
        ApplyLimits { max_entries: 500, max_unpacked_bytes: 1 << 20, ..ApplyLimits::default() };
    let done = apply_layer(&archive[..], &root, target, &options, &mut ignore_progress);
    assert_eq!(canaries(&cage.top), cage.before);
    match done {
        Ok(applied) => {
            assert_eq!(applied.blob, Digest::of(&archive));
            if applied.unpacked_bytes == applied.blob_bytes {
                assert_eq!(applied.diff_id, DiffId::from(applied.blob));
            }
            if target != LayerTarget::Layer(LayerFormat::Aufs) {
                assert_no_marks(&root);
            }
        }
        Err(e) if scripted => refused(&e),
        Err(_) => {}
    }
    let dir = crate::sys::dir::Dir::open(cage.top.join("in")).expect("the roots are there");
    let name = root.file_name().expect("a root has a name").as_encoded_bytes();
    let name = Name::new(name).expect("a root's name is one");
    crate::sys::remove::remove_tree(&dir, &name, &mut || Ok(())).expect("a root can be removed");
}

fn assert_no_marks(dir: &Path) {
    let entries = match fs::read_dir(dir) {
        // Closed to its owner by the archive.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return,
        entries => entries.expect("what was unpacked can be listed"),
    };
    for entry in entries {
        let entry = entry.expect("what was unpacked can be listed");
        let name = entry.file_name();
        assert!(!name.as_encoded_bytes().starts_with(b".wh."), "{:?}", entry.path());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            assert_no_marks(&entry.path());
        }
    }
}

const NAMES: [&str; 8] =
    ["a", "b", "l", ".wh.a", ".wh.l", ".wh..wh..opq", ".wh..wh.plnk", "secret"];

/// An archive from a script: four bytes an entry, which are its kind, two halves of a path, and what
/// a link points to.
pub(super) fn script(data: &[u8], top: &Path) -> Vec<u8> {
    let outside = top.join("outside");
    let outside = outside.as_os_str().as_encoded_bytes();
    let targets: [&[u8]; 8] =
        [b"../../outside", b"../../../outside", outside, b"..", b".", b"/", b"a/b", b"l"];
    let mut writer = EntryWriter::new(Vec::new());
    for (content, [kind, first, second, to]) in
        (b'a'..).zip(data.as_chunks::<4>().0.iter().take(100))
    {
        let path = scripted_path(*first, *second);
        let kind = match kind % 8 {
            0 | 1 => EntryKind::File { size: u64::from(kind >> 3 & 1), sparse: None },
            2 | 3 => EntryKind::Directory,
            4 | 5 => {
                let target = targets.get(usize::from(to % 8)).copied().unwrap_or_default();
                EntryKind::Symlink { target: target.to_vec() }
            }
            6 => EntryKind::HardLink { target: scripted_path(*to, *second >> 4) },
            _ => EntryKind::Fifo,
        };
        let size = if let EntryKind::File { size, .. } = kind { size } else { 0 };
        let entry = Entry {
            path,
            kind,
            mode: u32::from(*to) << 1,
            uid: 0,
            gid: 0,
            mtime: Timestamp { secs: i64::from(*first), nanos: 0 },
            atime: None,
            xattrs: Default::default(),
            acl_access: None,
            acl_default: None,
        };
        // A link to the root, say: no archive can hold it.
        if writer.append(&entry, &mut io::repeat(content).take(size)).is_err() {
            continue;
        }
    }
    writer.finish().expect("an archive in memory can be finished")
}

fn scripted_path(first: u8, second: u8) -> RelPath {
    let mut path = RelPath::ROOT;
    let depth = first >> 6;
    for index in [first & 7, first >> 3 & 7, second & 7].iter().take(usize::from(depth)) {
        let name = NAMES.get(usize::from(*index)).copied().unwrap_or("a");
        path.push(&Name::new(name).expect("these are names"));
    }
    path
}
