//! The command line and the list after `-o`: pure, over bytes.
//!
//! The list is cut at commas; a backslash keeps the character after it, so `\,` is a comma in a value.
//! Lists of directories are cut at colons in the same way. Numbers are decimal.

use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
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
    complete(typed, &mut options, caller)?;
    let target = PathBuf::from(target);
    Ok(Request::Mount(Box::new(MountRequest { target, options, foreground, debug })))
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
            Some(b"1") => {
                return Err("xattr_permissions=1, owners in security.*, is not to be had here: use 2, which \
                            needs no right"
                    .to_owned());
            }
            _ => return Err("xattr_permissions is 0 or 2".to_owned()),
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
    let numbers = value
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
    if options.upper.as_ref().is_some_and(|upper| stratafs::is_of_containers_storage(&upper.dir)) {
        // Another program may mount the container next time, and knows nothing of either.
        options.redirects &= typed.redirects;
        options.metacopy &= typed.metacopy;
    }
    options.lowers = lowers.into_iter().map(|dir| FuseLayer { dir: dir.into(), format }).collect();
    if options.lowers.is_empty() && options.upper.is_none() {
        return Err("no layer is given: lowerdir=DIR[:DIR...]".to_owned());
    }
    options.allow_other = allow_other || caller.is_root;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDINARY: Caller = Caller { reads_trusted: false, is_root: false };

    fn mount(arguments: &[&str]) -> Result<MountRequest, String> {
        let arguments = arguments.iter().map(OsString::from);
        match parse(arguments, ORDINARY)? {
            Request::Mount(request) => Ok(*request),
            other => Err(format!("{other:?}")),
        }
    }

    fn dirs(layers: &[FuseLayer]) -> Vec<&str> {
        layers.iter().map(|layer| layer.dir.to_str().unwrap()).collect()
    }

    #[test]
    fn uppers_of_containers_storage_refer_to_nothing_unless_asked_to() {
        let tmp = tempfile::tempdir().unwrap();
        let layer = tmp.path().join("0123/diff");
        std::fs::create_dir_all(&layer).unwrap();
        let refers = |more: &str| {
            let list = format!("lowerdir=/l,upperdir={},workdir=/w{more}", layer.display());
            let options = mount(&["/mnt", "-o", &list]).unwrap().options;
            (options.redirects, options.metacopy)
        };
        assert_eq!(refers(""), (true, true));
        std::fs::write(tmp.path().join("0123/link"), "SHORT").unwrap();
        assert_eq!(refers(""), (false, false));
        assert_eq!(refers(",metacopy=on,redirect_dir=on"), (true, true));
        assert_eq!(refers(",metacopy=off,redirect_dir=on"), (true, false));
    }

    #[test]
    fn directories_are_lists_with_escapes() {
        let list = r"lowerdir=/a\:b:/c\,d:/e\\f,upperdir=/u:v,workdir=/w";
        let request = mount(&["src", "/mnt", "-o", list, "-f"]).unwrap();
        assert_eq!(dirs(&request.options.lowers), ["/a:b", "/c,d", r"/e\f"]);
        let upper = request.options.upper.unwrap();
        assert_eq!((upper.dir, upper.work), ("/u:v".into(), "/w".into()));
        assert_eq!(request.options.source, "src");
        assert_eq!(request.options.format, LayerFormat::OverlayUser);
        assert!(request.foreground && !request.debug && !request.options.allow_other);
    }

    #[test]
    fn what_a_mount_prints_is_read_back() {
        use stratafs::Mount;
        let mut lower = vec![PathBuf::from("/plain")];
        for odd in [r"/a:b", r"/a,b", r"/a\b", r"/a\:,b\\", "/ü b"] {
            lower.push(odd.into());
        }
        lower.push(PathBuf::from(OsStr::from_bytes(b"/\xff")));
        let mut request = stratafs::MountRequest::new(LayerFormat::OverlayUser, "/empty");
        request.lower.clone_from(&lower);
        request.upper = Some(UpperDir { dir: r"/u\,:".into(), work: r"/w,\".into() });
        let Ok(mounts) = stratafs::Driver::mounts(&stratafs::FuseDriver::new(), &request) else {
            // Not here.
            return;
        };
        let [mount @ Mount::Fuse { .. }] = mounts.as_slice() else {
            panic!("{mounts:?}");
        };
        let list = mount.options().join(OsStr::new(","));
        let arguments = ["-o".into(), list, "/mnt".into()];
        let Ok(Request::Mount(read)) = parse(arguments, ORDINARY) else { panic!() };
        let read: Vec<_> = read.options.lowers.into_iter().map(|layer| layer.dir).collect();
        assert_eq!(read, lower);
    }

    #[test]
    fn aufs_branches() {
        let request = mount(&["/m", "-o", "br=/a=rw:/b=ro+wh:/c=rr:/d"]).unwrap();
        assert_eq!(dirs(&request.options.lowers), ["/b", "/c", "/d"]);
        let upper = request.options.upper.unwrap();
        assert_eq!((upper.dir, upper.work), ("/a".into(), "/a.stratafs-work".into()));
        assert_eq!(request.options.format, LayerFormat::Aufs);
        let request = mount(&["/m", "-o", "dirs=/b=ro:/c=rr"]).unwrap();
        assert!(request.options.upper.is_none());
        assert!(mount(&["/m", "-o", "br=/b=ro:/c=rw"]).unwrap_err().contains("/c"));
        assert!(mount(&["/m", "-o", "br=/b=wo"]).unwrap_err().contains("wo"));
    }

    #[test]
    fn ids_times_and_flags() {
        let list = "lowerdir=/l,uidmapping=100000:0:65536:7:70000:1,squash_to_gid=5,timeout=0.5,\
                    writeback=off,fsync=0,noacl,redirect_dir=off,metacopy=off,threads=3,busy_poll=70,nosuid,suid,nodev,noatime,\
                    x-systemd.automount,_netdev,context=system_u:object_r:x,fsname=n";
        let options = mount(&["/m", "-o", list]).unwrap().options;
        assert_eq!(
            options.uids,
            [
                IdRange { host: 100_000, shown: 0, len: 65536 },
                IdRange { host: 7, shown: 70_000, len: 1 }
            ]
        );
        assert_eq!(options.squash_gid, Some(5));
        assert_eq!(options.timeout, Some(Duration::from_millis(500)));
        assert!(
            options.volatile
                && options.no_acl
                && !options.redirects
                && !options.metacopy
                && !options.writeback
        );
        assert_eq!(options.threads.map(NonZeroUsize::get), Some(3));
        assert_eq!(options.busy_poll, Duration::from_micros(70));
        assert!(options.restrictions.nodev && !options.restrictions.nosuid);
        assert_eq!(options.kernel_options, ["context=system_u:object_r:x"]);
        assert_eq!(options.source, "n");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |list: &str| mount(&["/m", "-o", list]).unwrap_err();
        for (list, named) in [
            ("lowerdir=/l,frobnicate", "frobnicate"),
            ("lowerdir=/l,frob=1", "frob=1"),
            ("lowerdir=/l::/k", "empty"),
            ("lowerdir", "lowerdir="),
            ("upperdir=/u,workdir=/w,timeout=x", "timeout=x"),
            ("upperdir=/u", "workdir="),
            ("lowerdir=/l,workdir=/w", "upperdir="),
            ("lowerdir=/l,threads=0", "threads=0"),
            ("lowerdir=/l,busy_poll=10001", "busy_poll=10001"),
            ("lowerdir=/l,uidmapping=1:2", "uidmapping=1:2"),
            ("lowerdir=/l,uidmapping=4294967295:0:2", "largest"),
            ("lowerdir=/l,format=zfs", "zfs"),
            ("lowerdir=/l,writeback=maybe", "writeback=maybe"),
            ("lowerdir=/l,plugins=x", "plugins"),
            ("lowerdir=/l,timeout=-1", "timeout=-1"),
            ("br=/a=rw,upperdir=/u,workdir=/w", "br="),
            ("ro", "lowerdir="),
        ] {
            let message = with(list);
            assert!(message.contains(named), "{list}: {message}");
        }
        assert!(mount(&["-o", "lowerdir=/l"]).unwrap_err().contains("mount point"));
        assert!(mount(&["a", "b", "c"]).unwrap_err().contains("\"c\""));
        assert!(mount(&["--frob", "/m"]).unwrap_err().contains("--frob"));
        assert!(mount(&["/m", "-o"]).unwrap_err().contains("-o"));
    }
}
