//! Copies of file data: shared with the original where the file system can, else made by the kernel,
//! else by hand; holes stay holes in all three.
//!
//! FICLONE shares the blocks of a whole file and takes no time. Where it is refused, SEEK_DATA and
//! SEEK_HOLE tell what there is to copy: copy_file_range(2) does that without passing the data
//! through this process, and may share blocks or leave the work to a server; where it is refused
//! too, bytes are read and written. What a file system refused for a reason that will not go away is
//! not asked for again, for files from the same file system.
//!
//! Sources: ioctl_ficlonerange(2), copy_file_range(2), lseek(2).

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// How much one call copies, so that a copy can be given up soon.
const STEP: u64 = 16 << 20;
/// How much is read at once by hand.
const BUFFER: usize = 256 * 1024;

/// How the data of a file came to be in its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Means {
    /// The copy shares the blocks of the original.
    Shared,
    /// The kernel copied it.
    InKernel,
    /// Bytes were read and written.
    ByHand,
}

/// Called with the number of bytes copied since the last call; its error ends the copy.
pub(crate) type Copied<'a> = dyn FnMut(u64) -> io::Result<()> + 'a;

/// Copies files to one file system, and remembers what does not work on the way there.
#[derive(Debug, Default)]
pub(crate) struct Copier {
    /// File systems, by device number, whose blocks cannot be shared.
    unshared: HashSet<u64>,
    /// File systems from which the kernel does not copy.
    by_hand: HashSet<u64>,
    buffer: Vec<u8>,
    #[cfg(test)]
    at_least: Option<Means>,
}

impl Copier {
    pub(crate) fn new() -> Self {
        Copier::default()
    }

    /// One that leaves out the better means.
    #[cfg(test)]
    fn no_better_than(means: Means) -> Self {
        Copier { at_least: Some(means), ..Copier::default() }
    }

    /// Fills `to`, a new and empty file, with the `size` bytes of `from`, which is on the file system
    /// of number `device`. What `from` has lost meanwhile reads as zeros in the copy. The offsets of
    /// both descriptors are changed.
    pub(crate) fn copy(
        &mut self,
        from: &File,
        device: u64,
        size: u64,
        to: &File,
        copied: &mut Copied<'_>,
    ) -> io::Result<Means> {
        if size == 0 {
            return Ok(Means::Shared);
        }
        if self.may(Means::Shared) && !self.unshared.contains(&device) {
            match clone(from, to) {
                Ok(()) => {
                    copied(size)?;
                    return Ok(Means::Shared);
                }
                Err(e) => match Refused::of(e) {
                    Some(Refused::Always) => {
                        self.unshared.insert(device);
                    }
                    Some(Refused::ThisFile) => {}
                    None => return Err(e.into()),
                },
            }
        }
        // The holes, that at the end among them.
        to.set_len(size)?;
        let mut means = match self.may(Means::InKernel) && !self.by_hand.contains(&device) {
            true => Means::InKernel,
            false => Means::ByHand,
        };
        let mut at = 0;
        while let Some((start, end)) = next_data(from, at, size)? {
            at = start;
            while at < end {
                let step = STEP.min(end.saturating_sub(at));
                if means == Means::InKernel {
                    match copy_in_kernel(from, to, at, step) {
                        // It may be the end of the file, or a file that lies about its size.
                        Ok(0) => means = Means::ByHand,
                        Ok(n) => {
                            at = at.saturating_add(n);
                            copied(n)?;
                        }
                        Err(e) => {
                            match Refused::of(e) {
                                Some(Refused::Always) => {
                                    self.by_hand.insert(device);
                                }
                                Some(Refused::ThisFile) => {}
                                None => return Err(e.into()),
                            }
                            means = Means::ByHand;
                        }
                    }
                    continue;
                }
                match self.copy_by_hand(from, to, at, step)? {
                    // Somebody truncated it.
                    0 => return Ok(means),
                    n => {
                        at = at.saturating_add(n);
                        copied(n)?;
                    }
                }
            }
        }
        Ok(means)
    }

    #[cfg(test)]
    fn may(&self, means: Means) -> bool {
        self.at_least.is_none_or(|least| means >= least)
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self)]
    fn may(&self, _: Means) -> bool {
        true
    }

    /// Copies up to `len` bytes; how many.
    fn copy_by_hand(&mut self, from: &File, to: &File, at: u64, len: u64) -> io::Result<u64> {
        self.buffer.resize(BUFFER, 0);
        let len = usize::try_from(len).unwrap_or(BUFFER).min(BUFFER);
        let Some(buffer) = self.buffer.get_mut(..len) else { return Ok(0) };
        let n = loop {
            match from.read_at(buffer, at) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        to.write_all_at(buffer.get(..n).unwrap_or_default(), at)?;
        Ok(n as u64)
    }
}

/// Whether blocks can be shared between files of one directory's file system, found by doing it with
/// files that have no names.
pub(crate) fn can_share(dir: impl AsFd) -> io::Result<()> {
    let make = || super::fs_features::make_unnamed_file(&dir).map(File::from);
    let (from, to) = (make()?, make()?);
    from.write_all_at(&[1; 4096], 0)?;
    Ok(clone(&from, &to)?)
}

/// Why a call is no way to copy, while another may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    /// For no file of these file systems.
    Always,
    ThisFile,
}

impl Refused {
    /// None for errors that another way would meet as well.
    fn of(e: Errno) -> Option<Refused> {
        match e {
            Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::XDEV => Some(Refused::Always),
            // EINVAL: checksums or alignment differ; ETXTBSY: a swap file; EPERM: also what filters
            // answer; EBADF, EISDIR: file systems that know these files only otherwise.
            Errno::INVAL
            | Errno::TXTBSY
            | Errno::PERM
            | Errno::ACCESS
            | Errno::BADF
            | Errno::ISDIR
            | Errno::OVERFLOW
            | Errno::NOMEM => Some(Refused::ThisFile),
            _ => None,
        }
    }
}

fn clone(from: &File, to: &File) -> Result<(), Errno> {
    loop {
        match rustix::fs::ioctl_ficlone(to, from) {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

fn copy_in_kernel(from: &File, to: &File, at: u64, len: u64) -> Result<u64, Errno> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    loop {
        let (mut read_at, mut write_at) = (at, at);
        let done =
            rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), len);
        match done {
            Err(Errno::INTR) => {}
            done => return Ok(done? as u64),
        }
    }
}

/// The next stretch of data from `at` on, as its start and end; none where only a hole follows.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system that knows no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, size))),
        Err(e) => return Err(e.into()),
    };
    if start >= size {
        return Ok(None);
    }
    let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
        Ok(end) if end > start => end.min(size),
        // It was truncated, or filled, between the two calls: what is read will tell.
        Ok(_) | Err(Errno::NXIO) => size,
        Err(e) => return Err(e.into()),
    };
    Ok(Some((start, end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    const MEANS: [Means; 3] = [Means::Shared, Means::InKernel, Means::ByHand];
    const PLACES: [&str; 2] = ["/dev/shm", "/var/tmp"];

    /// Data, a hole of a megabyte, data, and a hole at the end.
    fn holey(path: &Path) -> (File, Vec<u8>) {
        let file = File::create_new(path).unwrap();
        let data: Vec<u8> = (0..70_000_u32).map(|i| (i % 251) as u8 + 1).collect();
        file.write_all_at(&data, 0).unwrap();
        file.write_all_at(&data, 1 << 20).unwrap();
        file.set_len(3 << 20).unwrap();
        (File::open(path).unwrap(), std::fs::read(path).unwrap())
    }

    #[test]
    fn contents_and_holes_are_those_of_the_original() {
        for place in PLACES {
            for means in MEANS {
                let tmp = tempfile::tempdir_in(place).unwrap();
                let (from, contents) = holey(&tmp.path().join("from"));
                let meta = from.metadata().unwrap();
                let to = File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(tmp.path().join("to"))
                    .unwrap();
                let mut told = 0;
                let mut copied = |n| {
                    told += n;
                    Ok(())
                };
                let used = Copier::no_better_than(means)
                    .copy(&from, meta.dev(), meta.len(), &to, &mut copied)
                    .unwrap();
                assert!(used >= means, "{used:?}");
                assert_eq!(std::fs::read(tmp.path().join("to")).unwrap(), contents, "{means:?}");
                to.sync_all().unwrap();
                let blocks = to.metadata().unwrap().blocks();
                assert!(blocks < 1024, "{place} {means:?}: {blocks} blocks: holes were filled");
                assert!(told > 140_000 && told <= 3 << 20, "{told}");
            }
        }
    }

    #[test]
    fn copies_between_file_systems() {
        let (one, other) =
            (tempfile::tempdir_in(PLACES[0]).unwrap(), tempfile::tempdir_in(PLACES[1]).unwrap());
        let (from, contents) = holey(&one.path().join("from"));
        let meta = from.metadata().unwrap();
        let path = other.path().join("to");
        let to = File::create_new(&path).unwrap();
        let mut copier = Copier::new();
        copier.copy(&from, meta.dev(), meta.len(), &to, &mut |_| Ok(())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), contents);
        if std::fs::metadata(other.path()).unwrap().dev() != meta.dev() {
            assert!(copier.unshared.contains(&meta.dev()), "it is asked for only once");
        }
    }

    #[test]
    fn a_file_that_has_shrunk_is_filled_up_with_zeros() {
        for means in [Means::InKernel, Means::ByHand] {
            let tmp = tempfile::tempdir().unwrap();
            let path = tmp.path().join("from");
            std::fs::write(&path, "12345").unwrap();
            let (from, to) =
                (File::open(&path).unwrap(), File::create_new(tmp.path().join("to")).unwrap());
            Copier::no_better_than(means).copy(&from, 0, 9, &to, &mut |_| Ok(())).unwrap();
            assert_eq!(std::fs::read(tmp.path().join("to")).unwrap(), b"12345\0\0\0\0");
        }
    }

    #[test]
    fn an_error_of_the_callback_ends_the_copy() {
        let tmp = tempfile::tempdir().unwrap();
        let (from, _) = holey(&tmp.path().join("from"));
        let to = File::create_new(tmp.path().join("to")).unwrap();
        let mut stop = |_| Err(io::ErrorKind::Interrupted.into());
        let e = Copier::new().copy(&from, 0, 3 << 20, &to, &mut stop).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::Interrupted);
    }

    #[test]
    fn a_full_disk_is_no_reason_to_try_another_way() {
        assert_eq!(Refused::of(Errno::NOSPC), None);
        assert_eq!(Refused::of(Errno::DQUOT), None);
        assert_eq!(Refused::of(Errno::IO), None);
        assert_eq!(Refused::of(Errno::XDEV), Some(Refused::Always));
        assert_eq!(Refused::of(Errno::INVAL), Some(Refused::ThisFile));
    }
}
