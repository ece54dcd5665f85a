//! How many requests the kernel has sent, by what it asked for.
//!
//! Speed over FUSE is a matter of requests that are not made. How long one takes swings with the machine;
//! how many there are does not, so that is what a test can hold.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! operations {
    ($($operation:ident $name:literal,)*) => {
        /// What the kernel asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Operation {
            $(#[doc = concat!("`", $name, "`.")] $operation,)*
        }

        impl Operation {
            const ALL: &[Operation] = &[$(Operation::$operation,)*];

            /// As in `linux/fuse.h`, without the `FUSE_`, in lower case.
            pub(super) fn name(self) -> &'static str {
                match self {
                    $(Operation::$operation => $name,)*
                }
            }
        }
    };
}

operations! {
    Lookup "lookup",
    Forget "forget",
    GetAttr "getattr",
    SetAttr "setattr",
    ReadLink "readlink",
    MakeNode "mknod",
    MakeDir "mkdir",
    Symlink "symlink",
    Create "create",
    Link "link",
    Unlink "unlink",
    RemoveDir "rmdir",
    Rename "rename",
    Open "open",
    OpenDir "opendir",
    Flush "flush",
    Read "read",
    Write "write",
    Fsync "fsync",
    FsyncDir "fsyncdir",
    ReadDir "readdir",
    ReadDirPlus "readdirplus",
    StatFs "statfs",
    SetXattr "setxattr",
    GetXattr "getxattr",
    ListXattr "listxattr",
    RemoveXattr "removexattr",
    Allocate "fallocate",
    Seek "lseek",
    CopyRange "copy_file_range",
    Ioctl "ioctl",
}

/// Counts of requests. What another thread counts may show late.
#[derive(Debug)]
pub(super) struct Requests {
    counts: [AtomicU64; Operation::ALL.len()],
}

impl Requests {
    pub(super) fn new() -> Requests {
        Requests { counts: [const { AtomicU64::new(0) }; Operation::ALL.len()] }
    }

    /// One more of this kind.
    pub(super) fn count(&self, operation: Operation) {
        if let Some(count) = self.counts.get(operation as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many there were of each kind of which there was one.
    pub(super) fn counted(&self) -> Vec<(&'static str, u64)> {
        let counts = Operation::ALL.iter().zip(&self.counts);
        counts
            .map(|(operation, count)| (operation.name(), count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count != 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_kind() {
        let requests = Requests::new();
        assert_eq!(requests.counted(), []);
        for operation in [Operation::CopyRange, Operation::Lookup, Operation::CopyRange] {
            requests.count(operation);
        }
        assert_eq!(requests.counted(), [("lookup", 1), ("copy_file_range", 2)]);
    }
}
