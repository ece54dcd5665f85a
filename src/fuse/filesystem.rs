//! The requests of the kernel: each is decoded, is one call of the union, and is answered.
//!
//! Opens, closes and flushes of files and directories are answered once with ENOSYS, after which the
//! kernel does them by itself: it keeps pages and listings, and what it asks for later it asks for by
//! the number of the file. A panic while a request is served is answered with EIO, and the next one is
//! served.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::convert;
use super::latch::Latch;
use super::reply::{reply_empty, reply_sized};
use super::requests::Operation;
use super::union_fs::UnionFs;
use crate::sys::errno::Code;
use crate::sys::file::Seek;
use crate::sys::xattr::OnPresence;
use crate::union::{Listed, NewFile, RenameMode, SetAttr};

/// The most that one write brings, in bytes.
pub(super) const MAX_WRITE: u32 = 1 << 20;

thread_local! {
    /// What is read goes through it: a new one for each request would have to be made of zeros.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for UnionFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if self.writeback {
            self.union.times_will_be_told();
        }
        self.granted.negotiate(config, &self.union, self.writeback, self.live);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if self.latch.is_asked_for(parent, name) {
            return reply.entry(&Duration::ZERO, &Latch::attr(), Generation(0));
        }
        let asked = self.asked(Operation::Lookup);
        let found = asked.serve(|| self.union.lookup(&self.node(parent)?, &convert::name(name)?));
        match found {
            Ok(Some(entry)) => self.reply_entry(Ok(entry), reply),
            Ok(None) => reply.entry(&self.ttl, &convert::no_attr(), Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn forget(&self, _: &Request, ino: INodeNo, lookups: u64) {
        let asked = self.asked(Operation::Forget);
        // Nobody waits for an answer.
        let _ = asked.serve(|| {
            self.union.forget(ino.0, lookups);
            Ok(())
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if Latch::is(ino) {
            return reply.attr(&Duration::ZERO, &Latch::attr());
        }
        let asked = self.asked(Operation::GetAttr);
        self.reply_attr(asked.serve(|| self.union.attr(&self.node(ino)?)), reply);
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let asked = self.asked(Operation::SetAttr);
        let set = SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: convert::set_time(atime),
            mtime: convert::set_time(mtime),
            ctime: ctime.is_some(),
            caller: convert::caller(request),
        };
        self.reply_attr(asked.serve(|| self.union.set_attr(&self.node(ino)?, &set)), reply);
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let asked = self.asked(Operation::ReadLink);
        match asked.serve(|| self.union.read_link(&self.node(ino)?)) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(e),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let asked = self.asked(Operation::MakeNode);
        let made = asked.serve(|| {
            let (major, minor) = convert::decode_device(rdev);
            let file = NewFile::special(convert::type_of_mode(mode), major, minor);
            self.make(request, (parent, name), (file.ok_or(Code::Invalid)?, mode, umask))
        });
        self.reply_entry(made, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let asked = self.asked(Operation::MakeDir);
        let made =
            asked.serve(|| self.make(request, (parent, name), (NewFile::Directory, mode, umask)));
        self.reply_entry(made, reply);
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &std::path::Path,
        reply: ReplyEntry,
    ) {
        let asked = self.asked(Operation::Symlink);
        let made = asked.serve(|| {
            let file = NewFile::Symlink(target.as_os_str().as_bytes().to_vec());
            self.make(request, (parent, name), (file, 0o777, 0))
        });
        self.reply_entry(made, reply);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let asked = self.asked(Operation::Create);
        let made =
            asked.serve(|| self.make(request, (parent, name), (NewFile::Regular, mode, umask)));
        match made {
            Ok(entry) => reply.created(
                &self.ttl,
                &convert::attr(&entry.attr),
                Generation(entry.node.generation()),
                FileHandle(0),
                FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
            ),
            Err(e) => reply.error(e),
        }
    }

    fn link(
        &self,
        _: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let asked = self.asked(Operation::Link);
        let made = asked.serve(|| {
            let (node, parent) = (self.node(ino)?, self.node(new_parent)?);
            self.union.link(&node, &parent, &convert::name(new_name)?)
        });
        self.reply_entry(made, reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let asked = self.asked(Operation::Unlink);
        let done = asked.serve(|| self.union.unlink(&self.node(parent)?, &convert::name(name)?));
        reply_empty(done, reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let asked = self.asked(Operation::RemoveDir);
        let done = asked.serve(|| self.union.rmdir(&self.node(parent)?, &convert::name(name)?));
        reply_empty(done, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let asked = self.asked(Operation::Rename);
        let done = asked.serve(|| {
            let mode = if flags.is_empty() {
                RenameMode::Replace
            } else if flags == RenameFlags::RENAME_NOREPLACE {
                RenameMode::NoReplace
            } else if flags == RenameFlags::RENAME_EXCHANGE {
                RenameMode::Exchange
            } else if flags == RenameFlags::RENAME_WHITEOUT {
                RenameMode::Whiteout
            } else {
                return Err(Code::Invalid.into());
            };
            self.union.rename(
                &self.node(parent)?,
                &convert::name(name)?,
                &self.node(new_parent)?,
                &convert::name(new_name)?,
                mode,
            )
        });
        reply_empty(done, reply);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let _asked = self.asked(Operation::Open);
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let _asked = self.asked(Operation::OpenDir);
        if self.live {
            // The kernel would keep listings for as long as the directory's time stays the same, which is
            // that of the topmost layer alone.
            return reply.opened(FileHandle(0), FopenFlags::empty());
        }
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let _asked = self.asked(Operation::Flush);
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let asked = self.asked(Operation::Read);
        BUFFER.with_borrow_mut(|buffer| {
            let read = asked.serve(|| {
                let size = usize::try_from(size).map_err(|_| Code::Invalid)?;
                if buffer.len() < size {
                    buffer.resize(size, 0);
                }
                let part = buffer.get_mut(..size).ok_or(Code::Invalid)?;
                self.union.read(&self.node(ino)?, offset, part)
            });
            match read {
                Ok(n) => reply.data(buffer.get(..n).unwrap_or_default()),
                Err(e) => reply.error(e),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let asked = self.asked(Operation::Write);
        let kill =
            flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID).then(|| convert::caller(request));
        let late = flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        match asked.serve(|| self.union.write(&self.node(ino)?, offset, data, kill, late)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(e) => reply.error(e),
        }
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let asked = self.asked(Operation::Fsync);
        let done = asked.serve(|| self.union.sync(&self.node(ino)?, data_only));
        reply_empty(done, reply);
    }

    fn fsyncdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let asked = self.asked(Operation::FsyncDir);
        let done = asked.serve(|| self.union.sync(&self.node(ino)?, data_only));
        reply_empty(done, reply);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let asked = self.asked(Operation::ReadDir);
        let listed = asked.serve(|| {
            let dir = self.node(ino)?;
            self.union.list(&dir, offset, |cookie, entry| {
                let (name, attr) = match &entry {
                    Listed::Dot => (OsStr::new("."), self.union.attr(&dir)?),
                    Listed::DotDot(above) => (OsStr::new(".."), self.union.attr(above)?),
                    Listed::Name(placed) => match self.union.lookup_listed(&dir, placed)? {
                        Some(entry) => {
                            self.union.forget(entry.attr.ino, 1);
                            (placed.name.as_os_str(), entry.attr)
                        }
                        None => return Ok(true),
                    },
                };
                let kind = convert::attr(&attr).kind;
                Ok(!reply.add(INodeNo(attr.ino), cookie, kind, name))
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let asked = self.asked(Operation::ReadDirPlus);
        let mut add = |cookie: u64, name: &OsStr, attr: &FileAttr, generation: u64| {
            let generation = Generation(generation);
            !reply.add(attr.ino, cookie, name, &self.ttl, attr, generation)
        };
        let listed = asked.serve(|| {
            let dir = self.node(ino)?;
            self.union.list(&dir, offset, |cookie, entry| match &entry {
                // Of these two the kernel takes the number only, and counts no lookup.
                Listed::Dot => {
                    let attr = convert::attr(&self.union.attr(&dir)?);
                    Ok(add(cookie, OsStr::new("."), &attr, 0))
                }
                Listed::DotDot(above) => {
                    let attr = convert::attr(&self.union.attr(above)?);
                    Ok(add(cookie, OsStr::new(".."), &attr, 0))
                }
                Listed::Name(placed) => match self.union.lookup_listed(&dir, placed)? {
                    None => Ok(true),
                    Some(entry) => {
                        let attr = convert::attr(&entry.attr);
                        let generation = entry.node.generation();
                        let fits = add(cookie, placed.name.as_os_str(), &attr, generation);
                        if !fits {
                            self.union.forget(entry.attr.ino, 1);
                        }
                        Ok(fits)
                    }
                },
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let asked = self.asked(Operation::StatFs);
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        match asked.serve(|| self.union.file_system()) {
            Ok(s) => reply.statfs(
                s.blocks,
                s.blocks_free,
                s.blocks_available,
                s.files,
                s.files_free,
                small(s.block_size),
                small(s.name_max),
                small(s.fragment_size),
            ),
            Err(e) => reply.error(e),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        key: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let asked = self.asked(Operation::SetXattr);
        let done = asked.serve(|| {
            let node = self.node(ino)?;
            let presence = OnPresence::from_raw(flags).ok_or(Code::Invalid)?;
            self.union.set_xattr(&node, key.as_bytes(), value, presence, convert::caller(request))
        });
        reply_empty(done, reply);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, key: &OsStr, size: u32, reply: ReplyXattr) {
        let asked = self.asked(Operation::GetXattr);
        let value = asked.serve(|| {
            self.union.xattr(&self.node(ino)?, key.as_bytes())?.ok_or_else(|| Code::NoData.into())
        });
        reply_sized(value, size, reply);
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let asked = self.asked(Operation::ListXattr);
        let keys = asked.serve(|| {
            let mut list = Vec::new();
            for key in self.union.xattrs(&self.node(ino)?)? {
                list.extend_from_slice(&key);
                list.push(0);
            }
            Ok(list)
        });
        reply_sized(keys, size, reply);
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, key: &OsStr, reply: ReplyEmpty) {
        let asked = self.asked(Operation::RemoveXattr);
        let done = asked.serve(|| {
            self.union.remove_xattr(&self.node(ino)?, key.as_bytes(), convert::caller(request))
        });
        reply_empty(done, reply);
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let asked = self.asked(Operation::Allocate);
        let done = asked.serve(|| {
            let mode = u32::try_from(mode).map_err(|_| Code::Invalid)?;
            self.union.allocate(&self.node(ino)?, mode, offset, len, convert::caller(request))
        });
        reply_empty(done, reply);
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let asked = self.asked(Operation::Seek);
        // The kernel does not write back first: what it holds would look like a hole.
        if self.writeback {
            return reply.error(Errno::ENOSYS);
        }
        let found = asked.serve(|| {
            let what = Seek::from_raw(whence).ok_or(Code::Invalid)?;
            let offset = u64::try_from(offset).map_err(|_| Code::Invalid)?;
            let at = self.union.seek(&self.node(ino)?, what, offset)?;
            i64::try_from(at).map_err(|_| Code::Overflow.into())
        });
        match found {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(e),
        }
    }

    fn ioctl(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        cmd: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        let asked = self.asked(Operation::Ioctl);
        let done = asked.serve(|| self.control(request, ino, cmd));
        match done {
            Ok(()) => reply.ioctl(0, &[]),
            Err(e) => reply.error(e),
        }
    }

    fn copy_file_range(
        &self,
        request: &Request,
        from: INodeNo,
        _: FileHandle,
        from_offset: u64,
        to: INodeNo,
        _: FileHandle,
        to_offset: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let asked = self.asked(Operation::CopyRange);
        let copied = asked.serve(|| {
            let (from, to) = (self.node(from)?, self.node(to)?);
            // What fits the answer.
            let len = len.min(1 << 30);
            let (from, to) = ((&from, from_offset), (&to, to_offset));
            let copied = self.union.copy_range(from, to, len, convert::caller(request))?;
            u32::try_from(copied).map_err(|_| Code::Overflow.into())
        });
        match copied {
            Ok(copied) => reply.written(copied),
            Err(e) => reply.error(e),
        }
    }
}
