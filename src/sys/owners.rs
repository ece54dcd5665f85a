//! Owners, modes and devices for who has one id to give to files: kept in an xattr, as containers/storage
//! keeps them ([`override_stat`]), while the file itself is the caller's.
//!
//! A [`Dir`] knows where its tree keeps them ([`Owners`]), and hands that on to what is opened below it, so that
//! nobody above this fence needs to ask. In a tree that keeps them in xattrs:
//!
//! - a file or directory without the xattr is root's, and has the mode that it has
//!   ([`Owners::InSecurityXattrs`]: has the owner that it has, too);
//! - one with it is what the xattr says. The file's own mode has no setuid, setgid or sticky bit, and always lets
//!   its owner read and write (and search), since he could not reach the xattr otherwise;
//! - fifos, sockets and devices are empty files with the xattr. The character device 0:0 is one: it is a mark, and
//!   root's;
//! - a symlink can have no such xattr. It is root's; one of somebody else's is a file with the xattr that holds
//!   its target.
//!
//! The xattr is honoured in such trees alone. Whoever may write to them can make anything of any file there; so
//! their owner must be the only one, and what shows them to others must keep the xattr from them.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::Mode;
use rustix::io::Errno;

use super::dir::{Dir, Node, proc_path};
use super::override_stat::{self, OverrideStat};
use super::stat::{self, FileType, Stat};
use super::xattr::{self, Of};

/// Where a tree of files keeps owners, modes and devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Owners {
    /// Where file systems do: to give files to others takes CAP_CHOWN.
    #[default]
    OfFiles,
    /// In an xattr of each file, `user.containers.override_stat`, as containers/storage does; the files
    /// themselves are all one user's, who needs no right for that. Only this crate's engines show such trees as
    /// they are.
    InXattrs,
    /// Likewise in `security.fuseoverlayfs.override_stat`, which takes CAP_SYS_ADMIN: for who has that and still
    /// cannot give files away, such as root on a network file system. Files without it have the owner that they
    /// have. For mounts of directories over FUSE, not for stores.
    InSecurityXattrs,
}

/// The xattr in which a tree keeps them.
#[derive(Debug)]
pub(crate) struct OwnersXattr {
    pub(crate) key: &'static [u8],
    /// What is without it is root's.
    else_roots: bool,
}

static OF_USER: OwnersXattr = OwnersXattr { key: override_stat::KEY, else_roots: true };
static OF_ADMIN: OwnersXattr = OwnersXattr { key: override_stat::SECURITY_KEY, else_roots: false };

impl Owners {
    /// None where they are with the files.
    pub(crate) fn xattr(self) -> Option<&'static OwnersXattr> {
        match self {
            Owners::OfFiles => None,
            Owners::InXattrs => Some(&OF_USER),
            Owners::InSecurityXattrs => Some(&OF_ADMIN),
        }
    }

    pub(crate) fn are_in_xattrs(self) -> bool {
        self.xattr().is_some()
    }
}

const SPECIAL: u32 = 0o7000;
const SETUID: u32 = 0o4000;
pub(super) const SETGID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;

/// What a file's own mode has at least.
pub(super) fn least_mode(is_dir: bool) -> u32 {
    if is_dir { 0o700 } else { 0o600 }
}

/// What a file is, and what it is by its xattr.
struct Kept {
    xattr: &'static OwnersXattr,
    own: Stat,
    told: Option<OverrideStat>,
}

impl Kept {
    fn stat(&self) -> Stat {
        match &self.told {
            None if self.xattr.else_roots => Stat { uid: 0, gid: 0, ..self.own },
            None => self.own,
            Some(OverrideStat { uid, gid, mode, file_type, rdev }) => {
                let file_type = file_type.unwrap_or(self.own.file_type);
                Stat { uid: *uid, gid: *gid, mode: *mode, file_type, rdev: *rdev, ..self.own }
            }
        }
    }

    /// Whether a file with this owner, mode and type needs no xattr.
    fn is_plain(&self, stat: &Stat) -> bool {
        let without = Kept { told: None, ..*self }.stat();
        let least = least_mode(self.own.is_dir());
        (stat.uid, stat.gid, stat.file_type) == (without.uid, without.gid, without.file_type)
            && stat.mode & SPECIAL == 0
            && stat.mode & least == least
    }

    /// Makes the file what `stat` has of owner, mode and type.
    fn become_of(&self, of: Of<'_>, stat: &Stat) -> io::Result<()> {
        let own = &self.own;
        if !matches!(own.file_type, FileType::Regular | FileType::Directory) {
            // A mark, or a symlink.
            let without = self.stat();
            return match (stat.uid, stat.gid) == (without.uid, without.gid) {
                true => Ok(()),
                false => Err(Errno::PERM.into()),
            };
        }
        let least = least_mode(own.is_dir());
        // The xattr first: it is what counts.
        if !self.is_plain(stat) || self.told.is_some() {
            if own.mode & least != least {
                // Past all this its owner has closed it to himself.
                chmod_itself(of, own.mode | least)?;
            }
            let told = OverrideStat {
                uid: stat.uid,
                gid: stat.gid,
                mode: stat.mode,
                file_type: Some(stat.file_type),
                rdev: stat.rdev,
            };
            xattr::set(of, self.xattr.key, &override_stat::encode(&told))?;
        }
        let mode = stat.mode & !SPECIAL | least;
        if own.mode == mode && own.mode & least == least { Ok(()) } else { chmod_itself(of, mode) }
    }
}

impl OwnersXattr {
    fn kept(&'static self, of: Of<'_>, own: Stat) -> io::Result<Kept> {
        // Nothing else can have it.
        let value = match own.file_type {
            FileType::Regular | FileType::Directory => match xattr::get(of, self.key) {
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                    self.get_closed(of, &own, e)?
                }
                value => value?,
            },
            _ => None,
        };
        let told = match value {
            None => None,
            Some(value) => Some(override_stat::decode(&value).ok_or_else(|| self.malformed())?),
        };
        let kept = Kept { xattr: self, own, told };
        let stat = kept.stat();
        let is_mark = stat.file_type == FileType::CharDevice && stat.rdev == (0, 0);
        match stat.is_dir() == own.is_dir() && !(is_mark && told.is_some()) {
            true => Ok(kept),
            false => Err(self.malformed()),
        }
    }

    /// Of a file that its owner has closed to himself, past all this: it is open to him for that one moment.
    fn get_closed(&self, of: Of<'_>, own: &Stat, e: io::Error) -> io::Result<Option<Vec<u8>>> {
        if own.mode & 0o400 != 0 || chmod_itself(of, own.mode | 0o400).is_err() {
            return Err(e);
        }
        let value = xattr::get(of, self.key);
        chmod_itself(of, own.mode)?;
        value
    }

    fn malformed(&self) -> io::Error {
        let key = String::from_utf8_lossy(self.key);
        io::Error::new(io::ErrorKind::InvalidData, format!("its xattr {key:?} is malformed"))
    }

    /// What a file with these attributes of its own is.
    pub(super) fn shown(&'static self, of: Of<'_>, own: Stat) -> io::Result<Stat> {
        Ok(self.kept(of, own)?.stat())
    }

    /// As chown(2), which takes setuid and setgid away from what is no directory.
    pub(super) fn chown(
        &'static self,
        of: Of<'_>,
        own: Stat,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> io::Result<()> {
        let kept = self.kept(of, own)?;
        let mut stat = kept.stat();
        (stat.uid, stat.gid) = (uid.unwrap_or(stat.uid), gid.unwrap_or(stat.gid));
        if !stat.is_dir() {
            stat.mode &= !SETUID;
            if stat.mode & GROUP_EXECUTE != 0 {
                stat.mode &= !SETGID;
            }
        }
        kept.become_of(of, &stat)
    }

    /// Owner, group and mode at once, of what has just been made and had its look at.
    pub(super) fn assign(
        &'static self,
        of: Of<'_>,
        own: Stat,
        (uid, gid, mode): (u32, u32, u32),
    ) -> io::Result<()> {
        let kept = self.kept(of, own)?;
        let stat = Stat { uid, gid, mode: mode & 0o7777, ..kept.stat() };
        kept.become_of(of, &stat)
    }

    /// As chmod(2).
    pub(super) fn chmod(&'static self, of: Of<'_>, own: Stat, mode: u32) -> io::Result<()> {
        let kept = self.kept(of, own)?;
        let stat = Stat { mode: mode & 0o7777, ..kept.stat() };
        kept.become_of(of, &stat)
    }

    /// Completes what was just made for this mode, before the umask, in a directory: gives it the mode, and the
    /// group that is handed down.
    pub(super) fn made(
        &'static self,
        of: Of<'_>,
        own: Stat,
        dir: &Dir,
        mode: u32,
    ) -> io::Result<()> {
        // The umask has taken away what `own` has not; the least of modes was added for it.
        self.complete(of, own, dir, Stat { mode: own.mode & mode | mode & SPECIAL, ..own })
    }

    /// As [`OwnersXattr::made`], of an empty file that stands for something else.
    pub(super) fn made_special(
        &'static self,
        of: Of<'_>,
        own: Stat,
        dir: &Dir,
        node: Node,
        mode: u32,
    ) -> io::Result<()> {
        let (file_type, rdev) = match node {
            Node::Fifo => (FileType::Fifo, (0, 0)),
            Node::Socket => (FileType::Socket, (0, 0)),
            Node::Char { major, minor } => (FileType::CharDevice, (major, minor)),
            Node::Block { major, minor } => (FileType::BlockDevice, (major, minor)),
        };
        let mode = own.mode & mode | mode & SPECIAL;
        self.complete(of, own, dir, Stat { file_type, rdev, mode, ..own })
    }

    fn complete(&'static self, of: Of<'_>, own: Stat, dir: &Dir, stat: Stat) -> io::Result<()> {
        let handed_down = self.group_handed_down(dir)?;
        let setgid = if handed_down.is_some() && own.is_dir() { SETGID } else { 0 };
        let stat = Stat { uid: 0, gid: handed_down.unwrap_or(0), mode: stat.mode | setgid, ..stat };
        let kept = Kept { xattr: self, own, told: None };
        match kept.is_plain(&stat) && own.mode == stat.mode {
            true => Ok(()),
            false => kept.become_of(of, &stat),
        }
    }

    /// The group that a directory hands down to what is made in it.
    pub(super) fn group_handed_down(&self, dir: &Dir) -> io::Result<Option<u32>> {
        match xattr::get(Of::dir(dir), self.key)?.as_deref().map(override_stat::decode) {
            Some(Some(told)) => Ok((told.mode & SETGID != 0).then_some(told.gid)),
            Some(None) => Err(self.malformed()),
            // Only by the xattr can it have setgid.
            None if self.else_roots => Ok(None),
            None => {
                let own = stat::fstat(dir)?;
                Ok((own.mode & SETGID != 0).then_some(own.gid))
            }
        }
    }
}

/// The value for a symlink.
pub(super) fn symlink_of(uid: u32, gid: u32) -> Vec<u8> {
    let file_type = Some(FileType::Symlink);
    override_stat::encode(&OverrideStat { uid, gid, mode: 0o777, file_type, rdev: (0, 0) })
}

/// Sets the file's own mode.
fn chmod_itself(of: Of<'_>, mode: u32) -> io::Result<()> {
    match of {
        Of::Child(dir, name) => dir.chmod_itself_at(name, mode),
        Of::Fd(fd) => {
            let mode = Mode::from_raw_mode(mode);
            match rustix::fs::fchmod(fd.as_fd(), mode) {
                Err(Errno::BADF) => Ok(rustix::fs::chmod(proc_path(fd, None), mode)?),
                done => Ok(done?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::Path;

    use super::*;
    use crate::path::Name;
    use crate::sys::dir::OnExisting;
    use crate::sys::file::Place;
    use crate::sys::stat::Time;

    fn name(s: &str) -> Name {
        Name::new(s).unwrap()
    }

    fn tree() -> (tempfile::TempDir, Dir) {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Dir::open_with(tmp.path(), Owners::InXattrs).unwrap();
        (tmp, dir)
    }

    fn is(dir: &Dir, n: &str) -> (u32, u32, u32, FileType) {
        let stat = dir.stat_at(&name(n)).unwrap();
        (stat.uid, stat.gid, stat.mode, stat.file_type)
    }

    fn own_mode(tmp: &Path, n: &str) -> u32 {
        tmp.join(n).symlink_metadata().unwrap().mode()
    }

    const KEY: &[u8] = override_stat::KEY;

    fn told(tmp: &Path, n: &str) -> Option<String> {
        let dir = Dir::open(tmp).unwrap();
        let value = xattr::get(Of::Child(&dir, &name(n)), KEY).unwrap();
        value.map(|value| String::from_utf8(value).unwrap())
    }

    #[test]
    fn what_is_plain_needs_no_xattr_and_is_roots() {
        let (tmp, dir) = tree();
        drop(dir.create_file(&name("f"), 0o644).unwrap());
        dir.make_dir(&name("d"), 0o755).unwrap();
        dir.symlink(b"to", &name("l")).unwrap();
        dir.make_node(&name("w"), Node::Char { major: 0, minor: 0 }, 0).unwrap();
        dir.chmod_at(&name("f"), 0o755).unwrap();
        dir.chown_at(&name("f"), 0, 0).unwrap();
        dir.chown_at(&name("l"), 0, 0).unwrap();
        assert_eq!(is(&dir, "f"), (0, 0, 0o755, FileType::Regular));
        assert_eq!(is(&dir, "d").3, FileType::Directory);
        assert_eq!(is(&dir, "l"), (0, 0, 0o777, FileType::Symlink));
        assert_eq!(is(&dir, "w").3, FileType::CharDevice);
        for n in ["f", "d"] {
            assert_eq!(told(tmp.path(), n), None, "{n}");
        }
        // The same tree by a directory that does not look.
        let plain = Dir::open(tmp.path()).unwrap();
        assert_eq!(plain.stat_at(&name("w")).unwrap().rdev, (0, 0));
    }

    #[test]
    fn what_is_not_is_told_by_the_xattr_and_stays_open_to_its_owner() {
        let (tmp, dir) = tree();
        let file = dir.create_file(&name("f"), 0o644).unwrap();
        let open = Place::Open(file.as_fd(), Owners::InXattrs);
        open.chown(Some(33), None).unwrap();
        open.chmod(0o4000).unwrap();
        assert_eq!(is(&dir, "f"), (33, 0, 0o4000, FileType::Regular));
        assert_eq!(told(tmp.path(), "f").unwrap(), "33:0:4000:file");
        assert_eq!(own_mode(tmp.path(), "f"), 0o100_600);
        open.chmod(0o6711).unwrap();
        // As chown(2) does.
        dir.chown_at(&name("f"), 34, 12).unwrap();
        assert_eq!(is(&dir, "f"), (34, 12, 0o711, FileType::Regular));
        assert_eq!(own_mode(tmp.path(), "f"), 0o100_711);
        assert_eq!(dir.stat_of(&file).unwrap().uid, 34);

        drop(dir.create_file(&name("closed"), 0o040).unwrap());
        assert_eq!(is(&dir, "closed").2, 0o040);
        assert_eq!(own_mode(tmp.path(), "closed"), 0o100_640);
        dir.make_dir(&name("d"), 0o1500).unwrap();
        assert_eq!(is(&dir, "d").2, 0o1500);
        assert_eq!(own_mode(tmp.path(), "d"), 0o040_700);
        assert_eq!(told(tmp.path(), "d").unwrap(), "0:0:1500:dir");
        let d = dir.open_dir(&name("d")).unwrap();
        assert_eq!(d.owners(), Owners::InXattrs);
        assert_eq!(d.stat().unwrap().mode, 0o1500);
    }

    #[test]
    fn devices_fifos_and_sockets_are_files_that_stand_for_them() {
        let (tmp, dir) = tree();
        let device = Node::Char { major: 1, minor: 3 };
        for (n, node, told_as, kind) in [
            ("c", device, "char-1-3", FileType::CharDevice),
            ("b", Node::Block { major: 8, minor: 0 }, "block-8-0", FileType::BlockDevice),
            ("p", Node::Fifo, "pipe", FileType::Fifo),
            ("s", Node::Socket, "socket", FileType::Socket),
        ] {
            dir.make_node(&name(n), node, 0o640).unwrap();
            assert_eq!(is(&dir, n), (0, 0, 0o640, kind));
            assert_eq!(told(tmp.path(), n).unwrap(), format!("0:0:0640:{told_as}"));
            assert!(dir.open_file(&name(n)).is_err(), "{n} is no file");
            assert!(dir.make_node(&name(n), node, 0o640).is_err(), "{n} is there");
        }
        assert_eq!(dir.stat_at(&name("c")).unwrap().rdev, (1, 3));
        dir.chown_at(&name("c"), 0, 6).unwrap();
        assert_eq!(told(tmp.path(), "c").unwrap(), "0:6:0640:char-1-3");
        // Of a listing nothing can be told of such.
        let entries = dir.entries().unwrap();
        assert!(entries.iter().all(|entry| entry.file_type == FileType::Unknown));
    }

    #[test]
    fn a_symlink_of_somebody_is_a_file_with_its_target() {
        let (tmp, dir) = tree();
        dir.symlink(b"to/there", &name("l")).unwrap();
        let time = Time { secs: 5, nanos: 6 };
        dir.set_times_at(&name("l"), time, time).unwrap();
        dir.chown_at(&name("l"), 1, 2).unwrap();
        assert_eq!(is(&dir, "l"), (1, 2, 0o777, FileType::Symlink));
        assert_eq!(dir.stat_at(&name("l")).unwrap().size, 8);
        assert_eq!(dir.stat_at(&name("l")).unwrap().mtime, time);
        assert_eq!(dir.read_link(&name("l")).unwrap(), b"to/there");
        assert_eq!(told(tmp.path(), "l").unwrap(), "1:2:0777:symlink");
        let pinned = Place::Child(&dir, &name("l")).pin().unwrap();
        let pinned = Place::Open(pinned.as_fd(), Owners::InXattrs);
        assert_eq!(pinned.read_link().unwrap(), b"to/there");
        dir.chown_at(&name("l"), 0, 0).unwrap();
        assert_eq!(is(&dir, "l"), (0, 0, 0o777, FileType::Symlink));
        // Its user can read it whatever the umask was.
        crate::sys::umask::set_on_this_thread(0o777).unwrap();
        dir.symlink(b"closed", &name("c")).unwrap();
        dir.chown_at(&name("c"), 3, 3).unwrap();
        assert_eq!(own_mode(tmp.path(), "c"), 0o100_600);
        dir.unlink(&name("c")).unwrap();
        assert!(dir.chmod_at(&name("l"), 0o700).is_err(), "no symlink has a mode");
        assert_eq!(dir.entries().unwrap().len(), 1, "nothing is left beside it");
    }

    #[test]
    fn the_group_of_a_setgid_directory_is_handed_down() {
        let (_tmp, dir) = tree();
        dir.make_dir(&name("d"), 0o755).unwrap();
        dir.chown_at(&name("d"), 5, 7).unwrap();
        dir.chmod_at(&name("d"), 0o2775).unwrap();
        let d = dir.open_dir(&name("d")).unwrap();
        drop(d.create_file(&name("f"), 0o644).unwrap());
        d.make_dir(&name("d"), 0o755).unwrap();
        d.make_node(&name("p"), Node::Fifo, 0o600).unwrap();
        let nameless = d.create_nameless(0o600).unwrap();
        d.symlink(b"x", &name("l")).unwrap();
        assert_eq!(is(&d, "f"), (0, 7, 0o644, FileType::Regular));
        assert_eq!(is(&d, "d"), (0, 7, 0o2755, FileType::Directory));
        assert_eq!(is(&d, "p"), (0, 7, 0o600, FileType::Fifo));
        assert_eq!(is(&d, "l"), (0, 7, 0o777, FileType::Symlink));
        assert_eq!(d.stat_of(&nameless).unwrap().gid, 7);
        d.rename(&name("f"), &dir, &name("moved"), OnExisting::Fail).unwrap();
        assert_eq!(is(&dir, "moved").1, 7);
    }

    #[test]
    fn what_its_owner_has_closed_to_himself_is_looked_at_and_changed() {
        let (tmp, dir) = tree();
        for (n, told) in [("plain", None), ("told", Some("7:8:0640:file"))] {
            let path = tmp.path().join(n);
            std::fs::write(&path, "x").unwrap();
            if let Some(value) = told {
                xattr::set(Of::Child(&dir, &name(n)), KEY, value.as_bytes()).unwrap();
            }
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).unwrap();
            let expected = if told.is_some() { (7, 8, 0o640) } else { (0, 0, 0) };
            let (uid, gid, mode, _) = is(&dir, n);
            assert_eq!((uid, gid, mode), expected, "{n}");
            drop(dir.open_file_of_mode(&name(n), mode).unwrap());
            assert_eq!(own_mode(tmp.path(), n) & 0o777, 0, "as it was");
            dir.chown_at(&name(n), 1, 2).unwrap();
            assert_eq!(is(&dir, n), (1, 2, expected.2, FileType::Regular));
        }
    }

    #[test]
    fn what_cannot_be_meant_is_an_error() {
        let (tmp, dir) = tree();
        for (n, value) in [
            ("word", "root"),
            ("mark", "0:0:0600:char-0-0"),
            ("dir", "0:0:0600:dir"),
            ("more", "0:0:0600:file:x"),
        ] {
            std::fs::write(tmp.path().join(n), "").unwrap();
            xattr::set(Of::Child(&dir, &name(n)), KEY, value.as_bytes()).unwrap();
            let e = dir.stat_at(&name(n)).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::InvalidData, "{n}: {e}");
        }
        std::fs::create_dir(tmp.path().join("d")).unwrap();
        xattr::set(Of::Child(&dir, &name("d")), KEY, b"0:0:0600:file").unwrap();
        assert!(dir.stat_at(&name("d")).is_err());
        // Without the xattr nothing stands for anything.
        std::fs::set_permissions(tmp.path().join("d"), PermissionsExt::from_mode(0o700)).unwrap();
        assert!(Dir::open(tmp.path()).unwrap().stat_at(&name("mark")).unwrap().is_file());
    }
}
