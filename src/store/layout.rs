//! The store's directory: what is where, and the file `format` that is read before anything else.
//!
//! ```text
//! <root>/                0700
//!   format               one line: version, compat=, ro-compat=, incompat= flags
//!   metadata.db          SQLite, with its -wal and -shm, or -journal
//!   snapshots/<id>/fs    the layer: upperdir or lowerdir                0755
//!   snapshots/<id>/work  overlay's workdir, of active snapshots         0700
//!     stratafs           in it, the union's own: temp, links, state     0700
//!   snapshots/<id>/tree  all that it shows, for engines that copy; and tree.stamp (`trees`)
//!   snapshots/<id>/record  of the archive that the layer was unpacked from
//!   staging/ trash/      being made; being removed
//!   blobs/sha256/<hex>   manifests, configurations; layers as they came, if they are kept
//!   reserve              given up first when the disk is full
//!   run/                 a row for each mount, unless the options put it elsewhere
//! ```
//!
//! An unknown incompat flag means: do not open. An unknown ro-compat flag means: do not write, which
//! for this version is the same. Unknown compat flags are ignored. The layer format is an incompat
//! flag, and so is that owners are in xattrs: then all that is opened below the root
//! [knows](crate::sys::owners). Whoever creates or opens a store holds a lock on the root directory for that moment.

use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::driver::own_work;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::LayerFormat;
use crate::path::Name;
use crate::sys::dir::{Dir, OnExisting};
use crate::sys::errno;
use crate::sys::lock::{self, Flock, Sharing};
use crate::sys::owners::Owners;
use crate::sys::userns::{self, user};
use crate::sys::xattr::{self, Of};

/// The incompat flag of stores that keep owners in xattrs.
const OWNERS_FLAG: &str = "owners-in-xattrs";
const MAGIC: &str = "stratafs";
const VERSION: &str = "1";
/// What is given up on a full disk, in bytes.
const RESERVE: u64 = 1 << 20;

/// The open directories of a store.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) path: PathBuf,
    pub(super) format: LayerFormat,
    pub(super) owners: Owners,
    pub(super) root: Dir,
    pub(super) snapshots: Dir,
    pub(super) staging: Dir,
    pub(super) trash: Dir,
    pub(super) blobs: Dir,
}

/// A file or directory in a snapshot's directory.
#[derive(Debug)]
pub(super) struct Below {
    /// The way to it.
    pub(super) names: Vec<Name>,
    /// As messages name it.
    pub(super) path: PathBuf,
}

/// A name that is known to be one.
pub(super) fn name(text: &str) -> Result<Name> {
    Name::new(text)
}

impl Layout {
    /// Opens the store at `path`; creates it if `create` and there is none. The lock is on the root
    /// directory; metadata is to be opened under it.
    pub(super) fn open(
        path: &Path,
        create: bool,
        (wanted, wanted_owners): (Option<LayerFormat>, Option<Owners>),
    ) -> Result<(Layout, Flock)> {
        let path = std::path::absolute(path).at("make absolute the path", path)?;
        if wanted_owners == Some(Owners::InSecurityXattrs) {
            let message =
                "a store keeps owners with its files or in user.* xattrs, not in security.*";
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(&path));
        }
        if create {
            make_private_dir(&path)?;
        }
        let root = Dir::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::new(ErrorKind::NotFound, "there is no store").with_path(&path)
            }
            std::io::ErrorKind::PermissionDenied => {
                let user = user();
                let why = match std::fs::metadata(&path) {
                    Ok(found) => {
                        format!("the store is user {}'s, and this is user {user}:", found.uid())
                    }
                    Err(_) => format!("a directory above the store is closed to user {user}:"),
                };
                Error::new(ErrorKind::PermissionDenied, why).with_path(&path).with_source(e)
            }
            _ => Error::io("open the store", &path, e),
        })?;
        let lock = root
            .reopen()
            .and_then(|dir| lock::lock(dir.into(), Sharing::Exclusive))
            .at("lock the store", &path)?;
        let recorded = read_format(&root, &path)?;
        if let (Some((_, recorded)), Some(wanted)) = (recorded, wanted_owners)
            && recorded != wanted
        {
            let has = |owners| match owners {
                Owners::OfFiles => "with its files",
                Owners::InXattrs | Owners::InSecurityXattrs => "in xattrs",
            };
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!("the store keeps owners {}, not {} as asked", has(recorded), has(wanted)),
            )
            .with_path(&path));
        }
        let (format, owners) = match (recorded, wanted) {
            (Some((recorded, _)), Some(wanted)) if recorded != wanted => {
                return Err(Error::new(
                    ErrorKind::Incompatible,
                    format!("the store has layers of format {recorded}, not {wanted} as asked"),
                )
                .with_path(&path));
            }
            (Some((format, owners)), _) => {
                marks_are_readable(&root, &path, format)?;
                if owners.are_in_xattrs() {
                    is_the_owners(&root, &path)?;
                }
                (format, owners)
            }
            (None, _) if !create => {
                return Err(Error::new(ErrorKind::NotFound, "there is no store").with_path(&path));
            }
            (None, wanted) => create_store(&root, &path, wanted, wanted_owners)?,
        };
        let root = root.with_owners(owners);
        let open = |text: &str| own_dir(&root, &path, text);
        let layout = Layout {
            format,
            owners,
            snapshots: open("snapshots")?,
            staging: open("staging")?,
            trash: open("trash")?,
            blobs: open("blobs")?
                .open_dir(&name("sha256")?)
                .at("open", path.join("blobs/sha256"))?,
            root,
            path,
        };
        if recorded.is_some() {
            layout.has_its_metadata()?;
        }
        Ok((layout, lock))
    }

    /// A store whose database was lost must not pass for an empty one: all its layers would be freed,
    /// as those of no snapshot. An interrupted creation has no snapshots yet.
    fn has_its_metadata(&self) -> Result<()> {
        let database = self.path.join("metadata.db");
        let there = match self.root.open_file(&name("metadata.db")?) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
            file => file.and_then(|file| file.metadata()).at("look at", &database)?.len() > 0,
        };
        if there || self.snapshots.entries().at("list", self.path.join("snapshots"))?.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Corrupt,
            "the store has snapshots, but has lost its metadata: restore that, or the whole store, \
             from a backup",
        )
        .with_path(database))
    }

    /// The path of a snapshot's directory `part`, as mounts name it.
    pub(super) fn snapshot_path(&self, id: i64, part: &str) -> PathBuf {
        self.path.join("snapshots").join(id.to_string()).join(part)
    }

    /// Where the union over FUSE says, in a snapshot's directory, what in its layer refers to layers
    /// below: a directory with a file for each kind.
    pub(super) fn union_state(&self, id: i64) -> Result<Below> {
        let names = vec![name("work")?, own_work()?, name("state")?];
        let mut path = self.path.join("snapshots").join(id.to_string());
        path.extend(names.iter().map(Name::as_os_str));
        Ok(Below { names, path })
    }

    /// A snapshot's own directory.
    pub(super) fn snapshot_dir(&self, id: i64) -> Result<Dir> {
        let dir = self.snapshots.open_dir(&name(&id.to_string())?);
        dir.at("open the snapshot's directory", self.path.join("snapshots").join(id.to_string()))
    }

    /// A snapshot's layer.
    pub(super) fn layer_dir(&self, id: i64) -> Result<Dir> {
        let dir = self.snapshot_dir(id)?.open_dir(&name("fs")?);
        dir.at("open the snapshot's layer", self.snapshot_path(id, "fs"))
    }

    /// Sets blocks aside for a full disk, unless they are.
    pub(super) fn fill_reserve(&self) -> Result<()> {
        let mut file = match self.root.open_or_create(&name("reserve")?, 0o600) {
            Err(e) if errno::is_full(&e) => return Ok(()),
            file => file.at("open", self.path.join("reserve"))?,
        };
        let fill = || -> std::io::Result<()> {
            if file.metadata()?.len() >= RESERVE {
                return Ok(());
            }
            // Bytes that no file system stores as a hole or compresses away.
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            let block: Vec<u8> = std::iter::repeat_with(|| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })
            .take(usize::try_from(RESERVE / 8).unwrap_or(0))
            .flatten()
            .collect();
            file.rewind()?;
            file.write_all(&block)
        };
        match { fill }() {
            // Then there is none to give up, which is no reason not to open.
            Err(e) if errno::is_full(&e) => self.release_reserve().map(drop),
            done => done.at("fill", self.path.join("reserve")),
        }
    }

    /// Gives the reserve up; whether there was any.
    pub(super) fn release_reserve(&self) -> Result<bool> {
        let file = match self.root.open_file_rw(&name("reserve")?) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            file => file.at("open", self.path.join("reserve"))?,
        };
        let had = file.metadata().at("look at", self.path.join("reserve"))?.len() > 0;
        // The blocks can be used again once the file system has written that they are free.
        file.set_len(0).and_then(|()| file.sync_all()).at("empty", self.path.join("reserve"))?;
        Ok(had)
    }
}

fn make_private_dir(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .at("create the store's directory", path)
}

fn read_format(root: &Dir, path: &Path) -> Result<Option<(LayerFormat, Owners)>> {
    let at = path.join("format");
    let mut text = String::new();
    match root.open_file(&name("format")?) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.and_then(|f| f.take(4096).read_to_string(&mut text)).at("read", &at)?,
    };
    parse_format(&text).map(Some).map_err(|e| e.with_path(at))
}

fn parse_format(text: &str) -> Result<(LayerFormat, Owners)> {
    let corrupt = || Error::new(ErrorKind::Corrupt, "not the format line of a stratafs store");
    let mut words = text.trim_end().split(' ');
    if words.next() != Some(MAGIC) {
        return Err(corrupt());
    }
    let version = words.next().ok_or_else(corrupt)?;
    if version != VERSION {
        return Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "the store has format version {version}, this build reads version {VERSION}: \
                 use the version of stratafs that wrote it, or a newer one"
            ),
        ));
    }
    let (mut format, mut owners) = (None, Owners::OfFiles);
    for word in words {
        let (class, flags) = word.split_once('=').ok_or_else(corrupt)?;
        for flag in flags.split(',').filter(|flag| !flag.is_empty()) {
            match (class, flag.strip_prefix("layers-").map(str::parse)) {
                ("compat", _) => {}
                ("incompat", None) if flag == OWNERS_FLAG => owners = Owners::InXattrs,
                ("incompat", Some(Ok(layers))) if format.is_none() => format = Some(layers),
                _ => {
                    return Err(Error::new(
                        ErrorKind::Incompatible,
                        format!(
                            "the store uses the feature {flag:?} ({class}), which this build does \
                             not know: use a newer version of stratafs"
                        ),
                    ));
                }
            }
        }
    }
    Ok((format.ok_or_else(corrupt)?, owners))
}

fn format_line(format: LayerFormat, owners: Owners) -> String {
    let owners = match owners {
        Owners::OfFiles => String::new(),
        Owners::InXattrs | Owners::InSecurityXattrs => format!(",{OWNERS_FLAG}"),
    };
    format!("{MAGIC} {VERSION} compat= ro-compat= incompat=layers-{format}{owners}\n")
}

/// Files that somebody else made would not be their owner's to change.
fn is_the_owners(root: &Dir, path: &Path) -> Result<()> {
    let owner = root.stat().at("look at the store", path)?.uid;
    match user() {
        user if user == owner => Ok(()),
        user => Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "the store keeps owners in xattrs of files that are all user {owner}'s, and this is user \
                 {user}: run as user {owner} what is to use"
            ),
        )
        .with_path(path)),
    }
}

/// Where a new store keeps owners, unless it is told: who cannot give files away keeps them in xattrs.
fn owners_of_new(root: &Dir, path: &Path, format: LayerFormat) -> Result<Owners> {
    if userns::may_give_files_away().at("look at the capabilities of", "this thread")? {
        return Ok(Owners::OfFiles);
    }
    match format {
        LayerFormat::OverlayTrusted => Ok(Owners::OfFiles),
        LayerFormat::OverlayUser => Ok(Owners::InXattrs),
        // Made for where there are no xattrs.
        LayerFormat::Aufs => match can_keep_owners(root, path) {
            Ok(()) => Ok(Owners::InXattrs),
            Err(e) if e.kind() == ErrorKind::Incompatible => Ok(Owners::OfFiles),
            Err(e) => Err(e),
        },
    }
}

fn can_keep_owners(root: &Dir, path: &Path) -> Result<()> {
    xattr_can_be_kept(root, path, "user.containers.", "owners in xattrs")
}

fn create_store(
    root: &Dir,
    path: &Path,
    wanted: Option<LayerFormat>,
    owners: Option<Owners>,
) -> Result<(LayerFormat, Owners)> {
    // What an interrupted creation leaves is fine; anything else is somebody's directory.
    const OURS: [&[u8]; 5] = [b"snapshots", b"staging", b"trash", b"blobs", b"format.new"];
    let entries = root.entries().at("list", path)?;
    if let Some(other) = entries.iter().find(|e| !OURS.contains(&e.name.as_bytes())) {
        return Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "not a store, and not empty (it holds {:?}): name an empty or absent directory",
                other.name
            ),
        )
        .with_path(path));
    }
    // Layers hold setuid programs: nobody else may reach them.
    root.chmod(0o700).at("set the mode of", path)?;
    let make = |dir: &Dir, text: &str| -> Result<()> {
        match dir.make_dir(&name(text)?, 0o700) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            done => done.at("create directory", path.join(text)),
        }
    };
    for text in ["snapshots", "staging", "trash", "blobs"] {
        make(root, text)?;
    }
    let blobs = root.open_dir(&name("blobs")?).at("open", path.join("blobs"))?;
    make(&blobs, "sha256")?;
    blobs.sync().at("sync", path.join("blobs"))?;
    let format = match wanted {
        Some(format) => {
            marks_are_readable(root, path, format)?;
            format
        }
        None => match marks_are_readable(root, path, LayerFormat::OverlayTrusted) {
            Ok(()) => LayerFormat::OverlayTrusted,
            Err(e) if e.kind() == ErrorKind::Incompatible => {
                marks_are_readable(root, path, LayerFormat::OverlayUser)?;
                LayerFormat::OverlayUser
            }
            Err(e) => return Err(e),
        },
    };
    let owners = match owners {
        Some(Owners::InXattrs) => can_keep_owners(root, path).map(|()| Owners::InXattrs)?,
        Some(owners) => owners,
        None => owners_of_new(root, path, format)?,
    };
    let (new, line) = (name("format.new")?, format_line(format, owners));
    let write = || -> std::io::Result<()> {
        let mut file = root.open_or_create(&new, 0o600)?;
        file.set_len(0)?;
        file.write_all(line.as_bytes())?;
        file.sync_all()
    };
    write().at("write", path.join("format.new"))?;
    root.rename(&new, root, &name("format")?, OnExisting::Replace)
        .and_then(|()| root.sync())
        .at("publish", path.join("format"))?;
    Ok((format, owners))
}

/// A directory that every store has.
fn own_dir(root: &Dir, path: &Path, text: &str) -> Result<Dir> {
    root.open_dir(&name(text)?).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::new(
            ErrorKind::Corrupt,
            "the store has lost a directory of its own: restore it from a backup",
        )
        .with_path(path.join(text)),
        _ => Error::io("open the store's directory", path.join(text), e),
    })
}

/// Whether this process can read and write the marks of `format` in the store: found out by doing,
/// since capabilities, user namespaces and file systems all have a say.
fn marks_are_readable(root: &Dir, path: &Path, format: LayerFormat) -> Result<()> {
    match format.xattr_prefix() {
        None => Ok(()),
        Some(prefix) => {
            xattr_can_be_kept(root, path, prefix, &format!("layers of format {format}"))
        }
    }
}

/// Whether this process can read and write xattrs in the store, which `what` needs.
fn xattr_can_be_kept(root: &Dir, path: &Path, prefix: &str, what: &str) -> Result<()> {
    let staging = own_dir(root, path, "staging")?;
    // Set on a directory that is there, and left: that works on a full disk, and for two at once.
    let key = format!("{prefix}probe");
    let of = Of::dir(&staging);
    let tried = xattr::set(of, key.as_bytes(), b"y").and_then(|()| xattr::get(of, key.as_bytes()));
    let found = match tried {
        Ok(Some(value)) if value == b"y" => Ok(()),
        Ok(_) => Err(Error::new(
            ErrorKind::Incompatible,
            format!("{what} need {prefix}* xattrs, which cannot be read back here"),
        )),
        // It would be allowed.
        Err(e) if errno::is_full(&e) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "{what} need {prefix}* xattrs, which this process may not use: \
                 run it with CAP_SYS_ADMIN in the initial user namespace, or use a store of format \
                 overlay-user"
            ),
        )
        .with_source(e)),
        Err(e) if e.kind() == std::io::ErrorKind::Unsupported => Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "{what} need {prefix}* xattrs, which the file system of the store \
                 does not keep: put the store on another one"
            ),
        )
        .with_source(e)),
        Err(e) if e.kind() == std::io::ErrorKind::ReadOnlyFilesystem => Err(Error::new(
            ErrorKind::ReadOnly,
            "the store is on a read-only file system: remount it to be written to",
        )),
        Err(e) => Err(Error::io(format!("set a {prefix}* xattr in"), path.join("staging"), e)),
    };
    found.map_err(|e| e.with_path_if_none(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_line_reads_back_and_unknown_features_are_refused() {
        for (format, owners) in [
            (LayerFormat::OverlayTrusted, Owners::OfFiles),
            (LayerFormat::OverlayUser, Owners::InXattrs),
            (LayerFormat::Aufs, Owners::OfFiles),
        ] {
            assert_eq!(parse_format(&format_line(format, owners)).unwrap(), (format, owners));
        }
        for (line, kind) in [
            ("", ErrorKind::Corrupt),
            ("stratafs", ErrorKind::Corrupt),
            ("other 1", ErrorKind::Corrupt),
            ("stratafs 1", ErrorKind::Corrupt),
            ("stratafs 2 compat= ro-compat= incompat=layers-aufs", ErrorKind::Incompatible),
            ("stratafs 1 incompat=layers-aufs,chunks", ErrorKind::Incompatible),
            ("stratafs 1 ro-compat=quota incompat=layers-aufs", ErrorKind::Incompatible),
            ("stratafs 1 incompat=layers-tar", ErrorKind::Incompatible),
        ] {
            assert_eq!(parse_format(line).unwrap_err().kind(), kind, "{line:?}");
        }
        let future = "stratafs 1 compat=hints ro-compat= incompat=layers-overlay-user";
        assert_eq!(parse_format(future).unwrap(), (LayerFormat::OverlayUser, Owners::OfFiles));
    }

    #[test]
    fn a_directory_with_other_things_is_not_made_a_store() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("thesis.tex"), "").unwrap();
        let e = Layout::open(tmp.path(), true, (None, None)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
        assert!(e.to_string().contains("thesis.tex"), "{e}");
    }
}
