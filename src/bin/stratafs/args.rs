//! The command line as typed. What clap can refuse by itself is refused here; all else is the
//! commands' to validate.

#[cfg(feature = "fuse")]
mod containers;
mod directories;
mod mounts;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use stratafs::{DriverChoice, Filter, LayerFormat, Owners, Platform};

#[cfg(feature = "fuse")]
pub(crate) use containers::{Run, Unshare};
pub(crate) use directories::{Layer, LayerApply, LayerDiff};
pub(crate) use mounts::{Mount, Umount};

/// Part of `--help`, and of the README; `failure.rs` is where the codes come from.
const EXIT_CODES: &str = "\
Names:
  KEY, PARENT and NAME are those of snapshots. Where a snapshot is wanted and there is none
  of that name, an image's name stands for its topmost layer; but `stat`, `usage` and `rm`
  take the image itself.

JSON:
  With --json a command prints one JSON value on stdout, and if it fails, an object
  {\"error\":{\"kind\",\"message\"}} on stderr. A path is text in \"path\"; if it is not UTF-8, that
  text is approximate, and \"path_bytes\" has the bytes. Times are RFC 3339, in UTC.

Exit codes:
    0  done
    1  failed: I/O, damage (and `check` found problems)
    2  wrong usage: an argument, a name or a path that cannot be right
    3  invalid archive or image: damaged, ambiguous, hostile, or of another digest
    4  there is no such store, snapshot, image or file
    5  the name is taken
    6  busy, held, or not in the state that the command needs
    7  not possible here: a right is missing, or the kernel, file system or this build lacks it
    8  no room: the disk is full, or a limit is reached
  130  interrupted by SIGINT, SIGTERM or SIGHUP, and rolled back; twice: at once, left to `gc`
  141  whoever read the output has gone
`run` and `unshare` end as their command does; see there.

If only its output could not be written, what the command was to do has been done.";

/// Layered copy-on-write snapshots for container runtimes.
///
/// stratafs keeps layers as directories in a store, stacks them with overlayfs, gives each container
/// a writable layer on top, and reads and writes layer archives and OCI images.
#[derive(Debug, Parser)]
#[command(name = "stratafs", version, after_long_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Arguments {
    /// The store's directory. Default: $STRATAFS_ROOT; else /var/lib/stratafs for root, and for others
    /// $XDG_DATA_HOME/stratafs or ~/.local/share/stratafs
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Where the store keeps owners, modes and devices of files. Default for a new one: xattrs for ordinary
    /// users, also in their user namespaces, else files
    #[arg(long, global = true, value_enum, value_name = "WHERE")]
    pub(crate) owners: Option<OwnersName>,
    /// What shows snapshots
    #[arg(long, global = true, value_enum, value_name = "DRIVER", default_value = "auto")]
    pub(crate) driver: DriverName,
    /// Print JSON; logs are silent unless asked for by --verbose
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Log more on stderr; twice: even more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OwnersName {
    /// Where file systems do, so that the kernel's overlayfs shows them: needs root, or `unshare` and a range
    /// of ids
    Files,
    /// In xattrs of files that are all the user's own
    Xattrs,
}

impl OwnersName {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            OwnersName::Files => "files",
            OwnersName::Xattrs => "xattrs",
        }
    }

    pub(crate) fn owners(self) -> Owners {
        match self {
            OwnersName::Files => Owners::OfFiles,
            OwnersName::Xattrs => Owners::InXattrs,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DriverName {
    /// The best that works here: overlay, else fuse; copy only where neither ever can
    Auto,
    /// The kernel's overlayfs
    Overlay,
    /// The union of this program over FUSE; ordinary users need fusermount3
    #[cfg(feature = "fuse")]
    Fuse,
    /// A copy of everything, for each snapshot; needs no right to mount
    Copy,
}

impl DriverName {
    pub(crate) fn choice(self) -> DriverChoice {
        match self {
            DriverName::Auto => DriverChoice::Auto,
            DriverName::Overlay => DriverChoice::Overlay,
            #[cfg(feature = "fuse")]
            DriverName::Fuse => DriverChoice::Fuse,
            DriverName::Copy => DriverChoice::Copy,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show versions, the store's format, and what can be mounted here
    #[command(after_help = "Examples:
  stratafs info
  stratafs --json info | jq '.drivers[].mount'")]
    Info,

    /// Bring an image into the store
    ///
    /// OCI layouts are read, and the archives of `docker save`. Every digest is verified before anything
    /// is visible. Layers that the store has already are not unpacked again. An archive of a Docker
    /// before version 25 has no manifest: one is made up, with another digest than the registry's.
    #[command(after_help = "Examples:
  skopeo copy docker://docker.io/library/alpine:3 oci-archive:alpine.tar
  stratafs import alpine.tar --name alpine
  docker save alpine:3 | stratafs import - --name alpine
  stratafs import layout-dir --ref 3.20 --platform linux/arm64
  stratafs import - --name alpine < alpine.tar.gz")]
    Import(Import),

    /// Write an image as an OCI layout
    ///
    /// NAME may be a committed snapshot too: the image then has the configuration of the image that it
    /// was built on. An image imported with --keep-blobs is written as it came. Else layers that were
    /// imported are given back uncompressed byte for byte, and compressed anew: their digests in the
    /// configuration stay, those in the manifest change. `stat` says of which layers the store cannot
    /// do that; they are packed anew, as are all others.
    #[command(after_help = "Examples:
  stratafs save alpine -o alpine.tar
  stratafs save alpine -o layout-dir/ --compress zstd
  stratafs save alpine -o alpine.tar && skopeo copy oci-archive:alpine.tar docker-daemon:alpine:3")]
    Save(Save),

    /// Unpack a layer archive into a new committed snapshot
    ///
    /// The archive may be compressed by gzip or zstd; which, is found out.
    #[command(after_help = "Examples:
  stratafs apply base base.tar.gz
  zcat app.tar.gz | stratafs apply app --parent base")]
    Apply(Apply),

    /// Copy a layer directory that another program wrote into a new committed snapshot
    ///
    /// DIR is the directory of one layer, not the place where the union is mounted:
    ///
    ///   docker         /var/lib/docker/overlay2/ID/diff
    ///                  /var/lib/docker/aufs/diff/ID
    ///   podman, CRI-O  /var/lib/containers/storage/overlay/ID/diff
    ///                  ~/.local/share/containers/storage/overlay/ID/diff
    ///   containerd     /var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/N/fs
    ///
    /// Of docker, podman and CRI-O the file ID/lower names the layers below it, nearest first.
    ///
    /// Its marks become those of the store, and what was found is told. DIR is only read, and nothing
    /// may write to it meanwhile. Adopt the layers below it first, and name the top one as the parent.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:
  stratafs adopt base /var/lib/docker/overlay2/4f1c/diff --as overlay
  stratafs adopt app /var/lib/docker/overlay2/9a20/diff --as overlay --parent base
  stratafs adopt work ~/.local/share/containers/storage/overlay/77ab/diff --as fuse-overlayfs \\
      --override-stat honour
  stratafs adopt alone upper --as overlay --lower mid --lower base
  stratafs --json adopt old branch --as aufs | jq .report.whiteouts.count"
    )]
    Adopt(Adopt),

    /// Write a snapshot's layer as an uncompressed tar archive
    ///
    /// A layer that was unpacked from an archive comes back as that archive, byte for byte; `stat`
    /// says so, or why not. Any other is packed in the canonical form, which depends on nothing but
    /// what is in the layer.
    ///
    /// A snapshot that is still active may be exported too, as it is then. With --parent it is the
    /// layer that would make the snapshot from any other, whether or not that is below it.
    #[command(after_help = "Examples:
  stratafs export app -o app.tar
  stratafs export app | tar -tv
  stratafs export app --parent base -o all-since-base.tar
  stratafs export app | gzip > app.tar.gz")]
    Export(Export),

    /// Make a writable snapshot
    #[command(after_help = "Examples:
  stratafs prepare work
  stratafs prepare web-1 alpine --label team=web")]
    Prepare(Prepare),

    /// Make a read-only view of a committed snapshot
    #[command(after_help = "Examples:
  stratafs view look alpine")]
    View(Prepare),

    /// Show the mounts that would show a snapshot; mounts nothing
    ///
    /// A line a mount: its type, source and options as mount(8) takes them, with tabs between them.
    #[command(after_help = "Examples:
  stratafs mounts web-1
  stratafs --json mounts web-1 | jq -r '.[].options[]'")]
    Mounts(Key),

    /// Mount an active snapshot or view on a directory, until `umount`
    ///
    /// Mounting overlayfs takes root, or a user and mount namespace of one's own (`unshare -Urm`); over FUSE
    /// it takes the program fusermount3 alone, and a process serves the mount until `umount`. Without a
    /// directory no right is needed: the snapshot is copied to a plain directory, which is printed, and
    /// is to be used there until `umount` of that directory. Edits in it count as in any mount.
    ///
    /// With --uidmap files are shown as those of other users, and no file is changed for it: so a container
    /// with a user namespace uses an image as it is. What it makes has in the layer the ids that it has inside.
    #[command(after_help = "Examples:
  stratafs mount web-1 /mnt
  stratafs umount /mnt
  stratafs mount web-1 /mnt --uidmap 0:100000:65536
  stratafs mount web-1 /mnt --uidmap 0:1000:1 --uidmap 1:100000:65535 --gidmap 0:1000:1
  dir=$(stratafs mount web-1) && echo hello > \"$dir/hello\" && stratafs umount \"$dir\"")]
    Mount(Mount),

    /// Unmount what `mount` mounted, or end the use of the copy that it printed
    #[command(after_help = "Examples:
  stratafs umount /mnt")]
    Umount(Umount),

    /// Make the layer of an active snapshot stand on its own
    ///
    /// A directory that is renamed in a mount over FUSE leaves its contents in the layers below, where no
    /// other engine looks for them. Now they are copied, by sharing blocks where the file system can.
    /// `commit`, `diff`, `export` and other engines would do it; this does it beforehand. It may be
    /// interrupted and begun again. The snapshot must not be mounted.
    ///
    /// With --upper it settles a layer in plain directories, which `stratafs-fuse` mounted: name what that
    /// was given.
    #[command(after_help = "Examples:
  stratafs settle web-1
  stratafs settle --lower /layers/2 --lower /layers/1 --upper /upper --work /work")]
    Settle(Settle),

    /// Make an active snapshot immutable, under a name
    #[command(after_help = "Examples:
  stratafs commit web-1-done web-1
  stratafs commit app work --parent alpine")]
    Commit(Commit),

    /// Show what a snapshot changes against its parent, or against any other
    ///
    /// A line a path: A (added), M (modified) or D (deleted), a space, and the path, in the bytes that
    /// it has. Of a deleted directory only itself is shown.
    #[command(after_help = "Examples:
  stratafs diff web-1
  stratafs diff web-1 --parent web-2
  stratafs diff --null web-1 | xargs -0 -n 1 echo")]
    Diff(Diff),

    /// List snapshots and images
    ///
    /// Filters are containerd's: selectors on name, parent, kind and labels, joined by commas. Of
    /// several filters one must hold. With a filter no images are listed.
    #[command(after_help = "Examples:
  stratafs ls
  stratafs ls --filter kind==active
  stratafs ls --filter 'parent==base,labels.team~=^web' --filter kind==view")]
    Ls(Ls),

    /// Show all that the store knows of a snapshot or image
    #[command(after_help = "Examples:
  stratafs stat web-1
  stratafs --json stat alpine | jq -r '.layers[]'")]
    Stat(Key),

    /// Show what a snapshot takes on disk, its parents not counted; of an image: all its layers
    #[command(after_help = "Examples:
  stratafs usage web-1
  stratafs --json usage alpine | jq .bytes")]
    Usage(Key),

    /// Remove snapshots and images
    ///
    /// With an image go those of its layers that nothing else needs. Stops at the first that cannot
    /// be removed.
    #[command(after_help = "Examples:
  stratafs rm web-1
  stratafs rm web-1 web-2 alpine")]
    Rm(Rm),

    /// Free what interrupted and deferred work left
    #[command(after_help = "Examples:
  stratafs gc")]
    Gc,

    /// Look for damage; exit code 1 if there is any
    #[command(after_help = "Examples:
  stratafs check
  stratafs --json check | jq -r '.problems[].what'")]
    Check,

    #[cfg(feature = "fuse")]
    Run(Run),

    #[cfg(feature = "fuse")]
    Unshare(Unshare),

    /// Work on layers in plain directories, without a store
    #[command(subcommand)]
    Layer(Layer),
}

#[derive(Debug, Args)]
pub(crate) struct Key {
    /// The snapshot
    pub(crate) key: String,
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// An OCI layout or an archive of `docker save`: a directory, a tar file, which may be compressed, or
    /// - for one on standard input
    pub(crate) image: PathBuf,
    /// What to call it in the store. Default: the name in the layout, else the file's
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Which image is meant, by name, tag or digest, if there are several
    #[arg(long = "ref", value_name = "NAME")]
    pub(crate) reference: Option<String>,
    /// Which platform's, as linux/arm64/v8. Default: this machine's
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Option<Platform>,
    /// Keep the layers as they came too, so that `save` gives the very same image, by its digest
    #[arg(long)]
    pub(crate) keep_blobs: bool,
    /// How many layers to unpack at the same time. Default: as many as there are processors, at most 8
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
}

#[derive(Debug, Args)]
pub(crate) struct Save {
    /// The image, or a committed snapshot
    pub(crate) name: String,
    /// A tar file, - for standard output, or a directory if it is one or ends in a slash
    #[arg(short, long, value_name = "FILE|DIR")]
    pub(crate) output: PathBuf,
    /// How layers are compressed. Default: as they came, where `import --keep-blobs` kept them all; else
    /// gzip
    #[arg(long, value_enum)]
    pub(crate) compress: Option<CompressionName>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressionName {
    Gzip,
    Zstd,
    None,
}

#[derive(Debug, Args)]
pub(crate) struct Apply {
    /// What to call the snapshot
    pub(crate) name: String,
    /// The snapshot or image below it
    #[arg(long)]
    pub(crate) parent: Option<String>,
    #[command(flatten)]
    pub(crate) labels: Labels,
    /// The archive, or - for standard input
    #[arg(default_value = "-")]
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Adopt {
    /// What to call the snapshot
    pub(crate) name: String,
    /// The layer's directory
    pub(crate) dir: PathBuf,
    /// Which program wrote it
    #[arg(long = "as", value_enum, value_name = "FORMAT")]
    pub(crate) format: ForeignName,
    /// The snapshot or image below it
    #[arg(long)]
    pub(crate) parent: Option<String>,
    /// A layer directory that was below it, nearest first; may be repeated. It is where renamed
    /// directories (redirect_dir) and files without data (metacopy) have their contents. Default: the
    /// parent's layers
    #[arg(long = "lower", value_name = "DIR")]
    pub(crate) lowers: Vec<PathBuf>,
    /// What to do with owners and modes kept in xattrs (user.containers.override_stat), which any
    /// user may set on a file of his own
    #[arg(long, value_enum, value_name = "WHAT", default_value = "refuse")]
    pub(crate) override_stat: OverrideStatName,
    /// What to do with what would be a mark in another format
    #[arg(long, value_enum, value_name = "WHAT", default_value = "refuse")]
    pub(crate) other_marks: OtherMarksName,
    #[command(flatten)]
    pub(crate) labels: Labels,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ForeignName {
    /// The kernel's overlayfs, mounted by root: trusted.overlay.*
    Overlay,
    /// The kernel's overlayfs, mounted with userxattr, as rootless: user.overlay.*
    OverlayUser,
    /// fuse-overlayfs
    FuseOverlayfs,
    /// AUFS
    Aufs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OverrideStatName {
    /// Stop at the first one
    Refuse,
    /// Leave them out: files are what they are
    Ignore,
    /// Make files what they say; only for a directory where no container could set them
    Honour,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OtherMarksName {
    /// Stop at the first one
    Refuse,
    /// Names are files like any other, and xattrs are left out
    Plain,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// The snapshot
    pub(crate) name: String,
    /// Pack what makes it from this snapshot or image. Default: its own layer, as it is
    #[arg(long)]
    pub(crate) parent: Option<String>,
    /// Where to, or - for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub(crate) output: PathBuf,
    /// Pack it anew in the canonical form, though the archive that it was unpacked from could be given
    /// back
    #[arg(long)]
    pub(crate) canonical: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Prepare {
    /// What to call it
    pub(crate) key: String,
    /// The committed snapshot or image below it; none: an empty tree
    pub(crate) parent: Option<String>,
    #[command(flatten)]
    pub(crate) labels: Labels,
}

#[derive(Debug, Args)]
#[group(skip)]
pub(crate) struct Settle {
    /// The snapshot, which must be active
    #[arg(required_unless_present = "upper", conflicts_with = "upper")]
    pub(crate) key: Option<String>,
    /// A layer below, the topmost first; may be repeated
    #[arg(long = "lower", value_name = "DIR", requires = "upper")]
    pub(crate) lowers: Vec<PathBuf>,
    /// The layer to settle
    #[arg(long, value_name = "DIR", requires = "lowers", requires = "work")]
    pub(crate) upper: Option<PathBuf>,
    /// The work directory that it was mounted with
    #[arg(long, value_name = "DIR", requires = "upper")]
    pub(crate) work: Option<PathBuf>,
    /// The format of all these layers: overlay-trusted, overlay-user or aufs. Default: overlay-trusted
    /// where this process may use it, else overlay-user
    #[arg(long, requires = "upper")]
    pub(crate) format: Option<LayerFormat>,
}

#[derive(Debug, Args)]
pub(crate) struct Commit {
    /// What to call the committed snapshot
    pub(crate) name: String,
    /// The active snapshot
    pub(crate) key: String,
    /// Put it on top of this snapshot or image; only for one that was prepared without a parent
    #[arg(long)]
    pub(crate) parent: Option<String>,
    #[command(flatten)]
    pub(crate) labels: Labels,
}

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// The snapshot
    pub(crate) key: String,
    /// Compare with this snapshot or image. Default: with its own parent
    #[arg(long)]
    pub(crate) parent: Option<String>,
    /// End lines by NUL: names may have line feeds
    #[arg(short = '0', long)]
    pub(crate) null: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// Show only what this holds for; may be repeated
    #[arg(long = "filter", value_name = "FILTER", value_parser = Filter::parse)]
    pub(crate) filters: Vec<Filter>,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// Snapshots and images
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Labels {
    /// A label of the snapshot; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,
}

impl Labels {
    pub(crate) fn into_map(self) -> stratafs::Labels {
        self.labels.into_iter().collect()
    }
}

fn label(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE"),
    }
}

#[cfg(test)]
mod tests;
