//! The command line and the list after `-o`: pure, over bytes.
//!
//! The list is cut at commas; a backslash keeps the character after it, so `\,` is a comma in a value.
//! Lists of directories are cut at colons in the same way. Numbers are decimal.

use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use stratafs::{FuseLayer, FuseMountOptions, IdRange, LayerFormat, Owners, UpperDir};

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Help,
    Version,
    Mount(Box<MountRequest>),
}

/// A mount to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountRequest {
    pub(crate) target: PathBuf,
    pub(crate) options: FuseMountOptions,
    pub(crate) of_containers_storage: bool,
    /// Nobody has asked for a format, and whoever reads the upper knows the marks of AUFS, too: it may get those,
    /// should its file system take no others.
    pub(crate) may_be_aufs: bool,
    /// `-f`: stay in the foreground.
    pub(crate) foreground: bool,
    /// `-d`: say what happens.
    pub(crate) debug: bool,
}

/// What the defaults depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    /// May read `trusted.*`: privileged in the initial user namespace.
    pub(crate) reads_trusted: bool,
    pub(crate) is_root: bool,
}

/// As typed.
#[derive(Default)]
struct Typed {
    lowers: Vec<OsString>,
    /// `br=`: directory, and whether it is `rw`.
    branches: Vec<(OsString, bool)>,
    upper: Option<OsString>,
    work: Option<OsString>,
    format: Option<LayerFormat>,
    allow_other: bool,
    /// Said, whatever it was.
    redirects: bool,
    metacopy: bool,
}

/// Flags that mount(8) and its like may pass, and that mean nothing to a FUSE mount, or are the default.
const WITHOUT_EFFECT: [&str; 35] = [
    "rw",
    "dev",
    "suid",
    "exec",
    "async",
    "sync",
    "dirsync",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "mand",
    "nomand",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "defaults",
    "silent",
    "loud",
    "default_permissions",
    "fast_ino",
    "ino32_t",
];

/// Reads the arguments, without the program's name.
///
/// # Errors
/// What is wrong, and with which argument.
pub(crate) fn parse(
    arguments: impl IntoIterator<Item = OsString>,
    caller: Caller,
) -> Result<Request, String> {
    let mut arguments = arguments.into_iter();
    let mut positional = Vec::new();
    let mut lists = Vec::new();
    let (mut foreground, mut debug) = (false, false);
    let mut only_positional = false;
    while let Some(argument) = arguments.next() {
        let bytes = argument.as_bytes();
        if only_positional || !bytes.starts_with(b"-") || bytes == b"-" {
            positional.push(argument);
            continue;
        }
        match bytes {
            b"--" => only_positional = true,
            b"-h" | b"--help" => return Ok(Request::Help),
            b"-V" | b"--version" => return Ok(Request::Version),
            b"-f" => foreground = true,
            b"-d" | b"--debug" => debug = true,
            // Of mount(8), for its helpers.
            b"-n" | b"-s" | b"-v" => {}
            b"-t" => {
                arguments.next().ok_or("-t needs a type after it")?;
            }
            b"-o" => lists.push(arguments.next().ok_or("-o needs options after it")?),
            _ => match bytes.strip_prefix(b"-o") {
                Some(list) => lists.push(OsStr::from_bytes(list).to_owned()),
                None => return Err(format!("unknown argument {argument:?}: see --help")),
            },
        }
    }
    let (source, target) = match positional.as_slice() {
        [target] => (None, target),
        [source, target] => (Some(source), target),
        [] => return Err("no mount point is given: see --help".to_owned()),
        [_, _, third, ..] => return Err(format!("one argument too many: {third:?}")),
    };
    // Replaced once the format is known.
    let mut options = FuseMountOptions::new(LayerFormat::OverlayUser);
    if let Some(source) = source {
        options.source.clone_from(source);
    }
    let mut typed = Typed::default();
    for list in &lists {
        for option in split(list.as_bytes(), b',', Escapes::OfSeparator) {
            if !option.is_empty() {
                apply(&option, &mut typed, &mut options, &mut debug)?;
            }
        }
    }
    let has_format = typed.format.is_some();
    complete(typed, &mut options, caller)?;
    let of_containers_storage = is_of_containers_storage(&options);
    let may_be_aufs = of_containers_storage && !has_format;
    let target = PathBuf::from(target);
    let request =
        MountRequest { target, options, of_containers_storage, may_be_aufs, foreground, debug };
    Ok(Request::Mount(Box::new(request)))
}

/// What becomes of backslashes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Escapes {
    /// That before a separator goes, others stay for those who cut further.
    OfSeparator,
    /// All go, and what follows is kept as it is.
    All,
}

fn split(list: &[u8], separator: u8, escapes: Escapes) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    let mut part = Vec::new();
    let mut bytes = list.iter();
    while let Some(byte) = bytes.next() {
        if *byte == separator {
            parts.push(std::mem::take(&mut part));
        } else if *byte == b'\\' {
            let next = bytes.next();
            if escapes == Escapes::OfSeparator && next != Some(&separator) {
                part.push(b'\\');
            }
            part.extend(next);
        } else {
            part.push(*byte);
        }
    }
    parts.push(part);
    parts
}

/// Applies one option.
fn apply(
    option: &[u8],
    typed: &mut Typed,
    options: &mut FuseMountOptions,
    debug: &mut bool,
) -> Result<(), String> {
    let (key, value) = match option.iter().position(|b| *b == b'=') {
        Some(at) => {
            let (key, value) = option.split_at(at);
            (key, Some(value.get(1..).unwrap_or_default()))
        }
        None => (option, None),
    };
    let shown = OsStr::from_bytes(option);
    let key = std::str::from_utf8(key).map_err(|_| unknown(shown))?;
    let needed = || value.ok_or_else(|| format!("the option {key} needs a value: {key}=..."));
    let flag = |default: bool| -> Result<bool, String> {
        match value {
            None => Ok(default),
            Some(b"1" | b"on" | b"yes" | b"true") => Ok(true),
            Some(b"0" | b"off" | b"no" | b"false") => Ok(false),
            Some(_) => Err(format!("{shown:?}: {key} takes 0, 1, off or on")),
        }
    };
    match key {
        "lowerdir" => {
            let dirs = split(needed()?, b':', Escapes::All);
            if dirs.iter().any(Vec::is_empty) {
                return Err(format!("{shown:?} names an empty directory"));
            }
            typed.lowers.extend(dirs.into_iter().map(OsString::from_vec));
        }
        "upperdir" => typed.upper = Some(one_directory(needed()?, shown)?),
        "workdir" => typed.work = Some(one_directory(needed()?, shown)?),
        "br" | "dirs" => typed.branches.extend(branches(needed()?, shown)?),
        "format" => {
            let text = String::from_utf8_lossy(needed()?).into_owned();
            typed.format = Some(text.parse().map_err(|e: stratafs::Error| e.to_string())?);
        }
        "uidmapping" => options.uids.extend(id_ranges(needed()?, shown)?),
        "gidmapping" => options.gids.extend(id_ranges(needed()?, shown)?),
        "squash_to_root" => {
            if flag(true)? {
                (options.squash_uid, options.squash_gid) = (Some(0), Some(0));
            }
        }
        "squash_to_uid" => options.squash_uid = Some(number(needed()?, shown)?),
        "squash_to_gid" => options.squash_gid = Some(number(needed()?, shown)?),
        "timeout" => options.timeout = Some(seconds(needed()?, shown)?),
        "writeback" => options.writeback = flag(true)?,
        "volatile" => options.volatile = flag(true)?,
        "fsync" => options.volatile = !flag(true)?,
        "noacl" => options.no_acl = flag(true)?,
        "acl" => options.no_acl = !flag(true)?,
        "static_nlink" => options.static_nlink = flag(true)?,
        "redirect_dir" => {
            typed.redirects = true;
            match needed()? {
                b"on" => options.redirects = true,
                b"off" | b"follow" | b"nofollow" => options.redirects = false,
                _ => return Err(format!("{shown:?}: redirect_dir takes on or off")),
            }
        }
        "metacopy" => {
            typed.metacopy = true;
            match needed()? {
                b"on" => options.metacopy = true,
                b"off" => options.metacopy = false,
                _ => return Err(format!("{shown:?}: metacopy takes on or off")),
            }
        }
        // Numbers of files are unique and lasting in any case.
        "xino" => match needed()? {
            b"on" | b"off" | b"auto" => {}
            _ => return Err(format!("{shown:?}: xino takes on, off or auto")),
        },
        "threads" => {
            let threads =
                usize::try_from(number(needed()?, shown)?).ok().and_then(NonZeroUsize::new);
            match threads.filter(|threads| threads.get() <= 1024) {
                Some(threads) => options.threads = Some(threads),
                None => return Err(format!("{shown:?}: the number of threads is 1 to 1024")),
            }
        }
        "busy_poll" => match number(needed()?, shown)? {
            micros @ 0..=10_000 => options.busy_poll = Duration::from_micros(micros.into()),
            _ => return Err(format!("{shown:?}: busy_poll takes 0 to 10000 microseconds")),
        },
        "threaded" => {
            if !flag(true)? {
                options.threads = Some(NonZeroUsize::MIN);
            }
        }
        "ro" if value.is_none() => options.restrictions.read_only = true,
        "nosuid" if value.is_none() => options.restrictions.nosuid = true,
        "nodev" if value.is_none() => options.restrictions.nodev = true,
        "noexec" if value.is_none() => options.restrictions.noexec = true,
        "suid" if value.is_none() => options.restrictions.nosuid = false,
        "dev" if value.is_none() => options.restrictions.nodev = false,
        "exec" if value.is_none() => options.restrictions.noexec = false,
        "rw" if value.is_none() => options.restrictions.read_only = false,
        "allow_other" if value.is_none() => typed.allow_other = true,
        "auto_unmount" if value.is_none() => options.auto_unmount = true,
        "debug" if value.is_none() => *debug = true,
        "context" | "fscontext" | "defcontext" | "rootcontext" | "max_read" => {
            needed()?;
            options.kernel_options.push(shown.to_owned());
        }
        "fsname" => options.source = OsStr::from_bytes(needed()?).to_owned(),
        // The kernel is told the type that this program serves.
        "subtype" => drop(needed()?),
        "allow_root" => {
            return Err(
                "allow_root is not to be had: the kernel knows allow_other alone".to_owned()
            );
        }
        "xattr_permissions" => match value {
            Some(b"0") => options.owners = Owners::OfFiles,
            Some(b"2") => options.owners = Owners::InXattrs,
            Some(b"1") => options.owners = Owners::InSecurityXattrs,
            _ => return Err("xattr_permissions is 0, 1 or 2".to_owned()),
        },
        "noxattrs" | "plugins" | "blkdev" => {
            return Err(format!("the option {key} of other programs is not to be had here"));
        }
        "remount" | "bind" | "rbind" | "move" => {
            return Err(format!("{key}: unmount, and mount anew with the options wanted"));
        }
        key if value.is_none() && WITHOUT_EFFECT.contains(&key) => {}
        key if key.starts_with("x-") || key == "comment" => {}
        _ => return Err(unknown(shown)),
    }
    Ok(())
}

fn unknown(option: &OsStr) -> String {
    format!("unknown option {option:?}: see --help")
}

fn one_directory(value: &[u8], shown: &OsStr) -> Result<OsString, String> {
    // No list: a colon is part of the name.
    let value: Vec<u8> = split(value, 0, Escapes::All).into_iter().next().unwrap_or_default();
    if value.is_empty() {
        return Err(format!("{shown:?} names no directory"));
    }
    Ok(OsString::from_vec(value))
}

/// AUFS's branches: `DIR=rw:DIR=ro+wh:DIR=rr`. Marks are honoured in all of them.
fn branches(value: &[u8], shown: &OsStr) -> Result<Vec<(OsString, bool)>, String> {
    let mut branches = Vec::new();
    for branch in split(value, b':', Escapes::All) {
        let (dir, permission) = match branch.iter().rposition(|b| *b == b'=') {
            Some(at) => {
                let (dir, permission) = branch.split_at(at);
                (dir.to_vec(), permission.get(1..).unwrap_or_default().to_vec())
            }
            // As AUFS has it: the first is writable.
            None if branches.is_empty() => (branch, b"rw".to_vec()),
            None => (branch, b"ro".to_vec()),
        };
        if dir.is_empty() {
            return Err(format!("{shown:?} names an empty directory"));
        }
        let writable = match permission.split(|b| *b == b'+').next() {
            Some(b"rw") => true,
            Some(b"ro" | b"rr") => false,
            _ => {
                let permission = OsStr::from_bytes(&permission);
                return Err(format!("{shown:?}: a branch is rw, ro or rr, not {permission:?}"));
            }
        };
        branches.push((OsString::from_vec(dir), writable));
    }
    Ok(branches)
}

fn id_ranges(value: &[u8], shown: &OsStr) -> Result<Vec<IdRange>, String> {
    // containers/storage begins with a colon, and fuse-overlayfs takes no notice of it.
    let numbers = value
        .strip_prefix(b":")
        .unwrap_or(value)
        .split(|b| *b == b':')
        .map(|id| number(id, shown))
        .collect::<Result<Vec<u32>, String>>()?;
    let mut ranges = Vec::new();
    for triple in numbers.chunks(3) {
        match *triple {
            [host, shown_id, len] if len > 0 => {
                let ends =
                    host.checked_add(len - 1).is_some() && shown_id.checked_add(len - 1).is_some();
                if !ends {
                    return Err(format!("{shown:?}: a range goes beyond the largest id"));
                }
                ranges.push(IdRange { host, shown: shown_id, len });
            }
            _ => {
                return Err(format!(
                    "{shown:?}: a mapping is HOST:SHOWN:COUNT, several of them joined by colons"
                ));
            }
        }
    }
    Ok(ranges)
}

fn number(value: &[u8], shown: &OsStr) -> Result<u32, String> {
    let text = std::str::from_utf8(value).ok();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| format!("{shown:?}: {:?} is not a number", OsStr::from_bytes(value)))
}

fn seconds(value: &[u8], shown: &OsStr) -> Result<Duration, String> {
    let text = std::str::from_utf8(value).ok();
    let number = text.and_then(|text| text.parse::<f64>().ok());
    number
        .and_then(|secs| Duration::try_from_secs_f64(secs).ok())
        // What the kernel takes for ever is as good.
        .map(|time| time.min(Duration::from_secs(1_000_000_000)))
        .ok_or_else(|| format!("{shown:?}: a time is a number of seconds, such as 1 or 0.5"))
}

/// Puts together what several options say, and fills in the defaults.
fn complete(typed: Typed, options: &mut FuseMountOptions, caller: Caller) -> Result<(), String> {
    let Typed { mut lowers, branches, mut upper, mut work, format, allow_other, .. } = typed;
    let mut default_format = match caller.reads_trusted {
        true => LayerFormat::OverlayTrusted,
        false => LayerFormat::OverlayUser,
    };
    if !branches.is_empty() {
        if !lowers.is_empty() || upper.is_some() {
            return Err("br= goes without lowerdir= and upperdir=".to_owned());
        }
        default_format = LayerFormat::Aufs;
        for (index, (dir, writable)) in branches.into_iter().enumerate() {
            match (index, writable) {
                (0, true) => upper = Some(dir),
                (_, false) => lowers.push(dir),
                (_, true) => {
                    return Err(format!("only the first branch can be rw, and {dir:?} is not"));
                }
            }
        }
        if let (Some(upper), None) = (&upper, &work) {
            // AUFS has none: beside the branch, on the same file system.
            let mut beside = PathBuf::from(upper).into_os_string();
            beside.push(".stratafs-work");
            work = Some(beside);
        }
    }
    let format = format.unwrap_or(default_format);
    options.format = format;
    options.upper = match (upper, work) {
        (None, None) => None,
        (Some(dir), Some(work)) => Some(UpperDir { dir: dir.into(), work: work.into() }),
        (Some(_), None) => {
            return Err(
                "upperdir= needs workdir=, an empty directory on the same file system".to_owned()
            );
        }
        (None, Some(_)) => return Err("workdir= has no use without upperdir=".to_owned()),
    };
    if is_of_containers_storage(options) {
        // Another program may mount the container next time, and knows nothing of either.
        options.redirects &= typed.redirects;
        options.metacopy &= typed.metacopy;
    }
    if options.upper.as_ref().is_some_and(|upper| are_mapped_already(upper, &lowers)) {
        (options.uids, options.gids) = (Vec::new(), Vec::new());
    }
    options.lowers = lowers.into_iter().map(|dir| FuseLayer { dir: dir.into(), format }).collect();
    if options.lowers.is_empty() && options.upper.is_none() {
        return Err("no layer is given: lowerdir=DIR[:DIR...]".to_owned());
    }
    options.allow_other = allow_other || caller.is_root;
    Ok(())
}

fn is_of_containers_storage(options: &FuseMountOptions) -> bool {
    options.upper.as_ref().is_some_and(|upper| stratafs::is_of_containers_storage(&upper.dir))
}

/// Whether the lowers are what containers/storage makes of layers, beside the upper, for a container with ids of its
/// own where the file system can be mounted idmapped: they show the container's ids already. It tells the mapping
/// nevertheless. The upper has ids as they are written, then, as with the kernel's overlayfs.
fn are_mapped_already(upper: &UpperDir, lowers: &[OsString]) -> bool {
    let Some(container) = upper.dir.parent() else { return false };
    let mapped = container.join("mapped");
    !lowers.is_empty() && lowers.iter().all(|lower| Path::new(lower).starts_with(&mapped))
}

#[cfg(test)]
mod tests;
