//! Seeing snapshots: `mounts`, `mount`, `umount`.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use serde::Serialize;
use stratafs::{Mount, MountOptions, Shown, ShownIds};

use super::{Context, Missing, Result};
use crate::args;
use crate::output::{JsonPath, Report};

pub(super) fn mounts(context: &Context, args: &args::Key) -> Result {
    let store = context.open(Missing::Refuse)?;
    let mounts = store.mounts(&args.key, &MountOptions::default())?;
    context.print(&Mounts(mounts.iter().map(Described::from).collect()))
}

pub(super) fn mount(context: &Context, args: &args::Mount) -> Result {
    let store = context.open(Missing::Refuse)?;
    let mut options = MountOptions::default();
    options.ids = match args.gidmap.is_empty() {
        true => ShownIds::same(args.uidmap.clone()),
        false => ShownIds { uids: args.uidmap.clone(), gids: args.gidmap.clone() },
    };
    let shown = if args.dir.is_some() { Shown::Mounted } else { Shown::InPlace };
    let mut reporter = context.reporter();
    store.make_ready(&args.key, shown, &mut |progress| reporter.step(progress))?;
    drop(reporter);
    let guard = match &args.dir {
        Some(dir) => store.activate(&args.key, dir, &options)?,
        None => store.activate_in_place(&args.key, &options)?,
    };
    let target = guard.target().to_owned();
    guard.leave()?;
    context.print(&MountPoint::new(&target, shown))
}

pub(super) fn umount(context: &Context, args: &args::Umount) -> Result {
    let store = context.open(Missing::Refuse)?;
    // As `mount` names it; when it is unmounted, what leads there may be gone with it.
    let target = args.dir.canonicalize();
    store.deactivate(&args.dir)?;
    context.print(&MountPoint::new(target.as_deref().unwrap_or(&args.dir), Shown::Mounted))
}

/// Where something is, or was, to be seen: in text there is nothing to say, unless it is where nobody
/// asked for it.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct MountPoint {
    path: JsonPath,
    #[serde(skip)]
    line: Option<Vec<u8>>,
}

impl MountPoint {
    fn new(path: &Path, shown: Shown) -> MountPoint {
        let bytes = path.as_os_str().as_bytes();
        let line = (shown == Shown::InPlace).then(|| [bytes, b"\n"].concat());
        MountPoint { path: JsonPath::new(bytes), line }
    }
}

impl Report for MountPoint {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(self.line.as_deref().unwrap_or_default())
    }
}

/// A mount as printed: for mount(8), `mount -t TYPE -o OPTIONS SOURCE DIR`.
#[derive(Debug, Serialize)]
struct Described {
    r#type: &'static str,
    source: String,
    options: Vec<String>,
    /// Only if one of them, or the source, is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    source_bytes: Option<Vec<u8>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    options_bytes: Option<Vec<Vec<u8>>>,
    #[serde(skip)]
    line: Vec<u8>,
}

impl From<&Mount> for Described {
    fn from(mount: &Mount) -> Described {
        let source = mount.source().as_os_str();
        let options = mount.options();
        let exact = source.to_str().is_some() && options.iter().all(|o| o.to_str().is_some());
        let lossy = |s: &OsStr| s.to_string_lossy().into_owned();
        let bytes = |s: &OsStr| s.as_bytes().to_vec();
        let joined = options.join(OsStr::new(","));
        Described {
            r#type: mount.fstype(),
            source: lossy(source),
            options: options.iter().map(|o| lossy(o)).collect(),
            source_bytes: (!exact).then(|| bytes(source)),
            options_bytes: (!exact).then(|| options.iter().map(|o| bytes(o)).collect()),
            line: [mount.fstype().as_bytes(), source.as_bytes(), joined.as_bytes()].join(&b'\t'),
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Mounts(Vec<Described>);

impl Report for Mounts {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for mount in &self.0 {
            out.write_all(&mount.line)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;

    use stratafs::Restrictions;

    use super::*;

    #[test]
    fn bytes_are_kept_in_text_and_beside_approximate_json() {
        let source = OsString::from_vec(b"/s\xff".to_vec());
        let mount = Mount::Bind {
            source: source.into(),
            ids: ShownIds::default(),
            restrictions: Restrictions::default(),
        };
        let mounts = Mounts(vec![Described::from(&mount)]);
        let mut text = Vec::new();
        mounts.text(&mut text).unwrap();
        assert_eq!(text, b"bind\t/s\xff\tbind,rw\n");
        assert_eq!(
            serde_json::to_value(&mounts).unwrap(),
            serde_json::json!([{
                "type": "bind", "source": "/s\u{fffd}", "options": ["bind", "rw"],
                "source_bytes": [47, 115, 255], "options_bytes": [b"bind", b"rw"],
            }])
        );
    }
}
