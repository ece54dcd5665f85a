//! What a foreign file is, and giving it to the file that stands for it.
//!
//! Every xattr is either the file's own and copied, or known to be none of a layer's and counted; any
//! other is an error. The order of setting is that of [`archive`](crate::archive): owner, xattrs,
//! mode, access control lists, times.

use std::io;

use super::union::{Branch, decode_redirect, refuse};
use super::{Adoption, OtherMarks, OverrideStats};
use crate::archive::Ownership;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::foreign::{self, Key, VerityDigest};
use crate::layer::marks::Redirect;
use crate::path::RelPath;
use crate::sys::file::{Place, SetTime};
use crate::sys::override_stat::{self, OverrideStat};
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, Of};

/// What a file is, as the store will have it.
#[derive(Debug)]
pub(super) struct Attributes {
    /// Owner, mode, type, device and times; all else is of the file that was looked at.
    pub(super) stat: Stat,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Its data is in a lower layer, and may have to have a digest.
    pub(super) metacopy: Option<Option<VerityDigest>>,
    pub(super) redirect: Option<Redirect>,
}

impl Adoption<'_> {
    /// Reads what the file is. `layer` is the one it is in, and `path` where; `self.path` is where it
    /// is going to be.
    pub(super) fn read_attributes(
        &mut self,
        of: Of<'_>,
        stat: Stat,
        layer: usize,
        path: &RelPath,
    ) -> Result<Attributes> {
        let shown = self.stack.shown(layer, path);
        let mut attributes =
            Attributes { stat, xattrs: Vec::new(), metacopy: None, redirect: None };
        let (mut overridden, mut wanted) = (false, None);
        let keys = xattr::list(of).map_err(|e| Error::io("list the xattrs of", &shown, e))?;
        for key in keys {
            let get = || -> Result<Vec<u8>> {
                let value = xattr::get(of, &key);
                // Gone since it was listed: then something is changing it, which is found out later.
                let value = value.map_err(|e| Error::io("read an xattr of", &shown, e))?;
                Ok(value.unwrap_or_default())
            };
            let text = String::from_utf8_lossy(&key).into_owned();
            let branch = self.stack.branch(layer)?;
            match foreign::decode_key(branch.format, &key) {
                Key::Plain => attributes.xattrs.push((key.clone(), get()?)),
                Key::Escaped if self.keeps_escaped(branch) => {
                    attributes.xattrs.push((key.clone(), get()?));
                }
                Key::Redirect if stat.is_file() => {
                    let redirect = decode_redirect(&get()?).map_err(|e| e.with_path(&shown))?;
                    attributes.redirect = Some(redirect);
                    self.drop_xattr(text);
                }
                Key::Metacopy if stat.is_file() => {
                    let Some(digest) = foreign::decode_metacopy(&get()?) else {
                        let message = "its metacopy mark is malformed";
                        return Err(Error::new(ErrorKind::Corrupt, message).with_path(&shown));
                    };
                    attributes.metacopy = Some(digest);
                    self.drop_xattr(text);
                }
                // A directory's have been read when it was opened; nothing else has any.
                Key::Opaque | Key::Redirect | Key::Note | Key::Machine | Key::Escaped => {
                    self.drop_xattr(text);
                }
                // A layer of a store that keeps owners there: it has been looked at.
                Key::OverrideStat if branch.dir.owners().are_in_xattrs() => {}
                Key::OverrideStat => {
                    overridden = true;
                    let found = self.override_stat(&get()?, &text);
                    let found = found.map_err(|e| e.with_path(&shown))?;
                    if wanted.is_some() && wanted != found {
                        let message = "its xattrs name two different owners or modes";
                        return Err(refuse(message).with_path(&shown));
                    }
                    wanted = found;
                    self.drop_xattr(text);
                }
                Key::OtherUnion if branch.other_marks == OtherMarks::Plain => {
                    self.drop_xattr(text);
                }
                Key::OtherUnion => {
                    let message = format!(
                        "it has {text:?}, which is another union file system's than {}: state that \
                         one, or have such xattrs left out",
                        branch.format
                    );
                    return Err(refuse(message).with_path(&shown));
                }
                Key::Whiteout => {
                    let message = format!(
                        "it has {text:?}, but is no empty file in a directory that is marked to hold \
                         such whiteouts (opaque \"x\")"
                    );
                    return Err(refuse(message).with_path(&shown));
                }
                Key::Metacopy | Key::Unknown => {
                    let message = format!("it has {text:?}, whose meaning here is not known");
                    return Err(refuse(message).with_path(&shown));
                }
            }
        }
        let keep = self.options.report_paths;
        if overridden {
            self.report.override_stats.add(&self.path, keep);
        }
        if let Some(wanted) = wanted {
            attributes.stat = become_what(&stat, &wanted).map_err(|e| e.with_path(&shown))?;
            self.report.honoured_override_stats.add(&self.path, keep);
        }
        Ok(attributes)
    }

    /// Escaped marks are those of a union inside: shown with one `overlay.` less by a mount that has
    /// the same prefix, and not at all by any other.
    fn keeps_escaped(&self, branch: &Branch) -> bool {
        branch.format.overlay_prefix() == self.format.xattr_prefix()
    }

    fn drop_xattr(&mut self, key: String) {
        let keep = self.options.report_paths;
        self.report.dropped_xattrs.entry(key).or_default().add(&self.path, keep);
    }

    /// What the file should be; none if that is ignored.
    fn override_stat(&self, value: &[u8], key: &str) -> Result<Option<OverrideStat>> {
        match self.options.override_stats {
            OverrideStats::Ignore => Ok(None),
            OverrideStats::Honour => match override_stat::decode(value) {
                None => {
                    let value = String::from_utf8_lossy(value);
                    Err(refuse(format!("its {key:?} is {value:?}, and not uid:gid:mode:type")))
                }
                found => Ok(found),
            },
            OverrideStats::Refuse => Err(refuse(format!(
                "it has {key:?}, an owner and mode that any user may set on his own file: choose \
                 whether such are honoured, for a directory where no container could set them, or \
                 ignored"
            ))),
        }
    }

    /// Gives a new file what its attributes say.
    pub(super) fn give(&self, attributes: &Attributes, to: Place<'_>) -> Result<()> {
        let stat = &attributes.stat;
        let fail = |what: &'static str| move |e: io::Error| Error::io(what, &self.path, e);
        if self.options.ownership != Ownership::Ignore {
            let set = to.chown(Some(stat.uid), Some(stat.gid));
            set.map_err(fail("set owner of")).map_err(|e| match e.kind() {
                ErrorKind::PermissionDenied => {
                    e.context("owners need CAP_CHOWN: run with it, or adopt with Ownership::Ignore")
                }
                _ => e,
            })?;
        }
        let (lists, plain): (Vec<_>, Vec<_>) =
            attributes.xattrs.iter().partition(|(key, _)| key.starts_with(b"system."));
        self.set_xattrs(to.xattrs(), &plain)?;
        // A symlink has no mode of its own.
        if stat.file_type != FileType::Symlink {
            to.chmod(stat.mode).map_err(fail("set mode of"))?;
        }
        self.set_xattrs(to.xattrs(), &lists)?;
        let (atime, mtime) = (SetTime::To(stat.atime), SetTime::To(stat.mtime));
        to.set_times(atime, mtime).map_err(fail("set times of"))
    }

    fn set_xattrs(&self, of: Of<'_>, xattrs: &[&(Vec<u8>, Vec<u8>)]) -> Result<()> {
        for (key, value) in xattrs {
            xattr::set(of, key, value).map_err(|e| {
                let key = String::from_utf8_lossy(key);
                Error::io("set xattr of", &self.path, e)
                    .context(format!("xattr {key:?} cannot be kept"))
            })?;
        }
        Ok(())
    }
}

/// What a file is by its xattr.
fn become_what(stat: &Stat, wanted: &OverrideStat) -> Result<Stat> {
    let file_type = wanted.file_type.unwrap_or(stat.file_type);
    let stands_for_other = file_type != stat.file_type;
    if stands_for_other && (!stat.is_file() || stat.size != 0) {
        return Err(refuse(format!(
            "an xattr says that it is of type {file_type:?}, and only an empty file can stand for one"
        )));
    }
    if stands_for_other && matches!(file_type, FileType::Directory | FileType::Symlink) {
        return Err(refuse(format!("an xattr says that this file is of type {file_type:?}")));
    }
    let rdev = if stands_for_other { wanted.rdev } else { stat.rdev };
    Ok(Stat { uid: wanted.uid, gid: wanted.gid, mode: wanted.mode, file_type, rdev, ..*stat })
}
