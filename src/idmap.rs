//! User and group ids between the file systems that hold the layers and who looks through a union.
//!
//! A mapping is a list of ranges, as user namespaces have them (user_namespaces(7)): what lies in none
//! of them is shown as the overflow id, and cannot be given to a file. A squashed side shows one id for
//! all files, whatever they have.

/// The id that stands for all that are not mapped: the kernel's default of
/// /proc/sys/kernel/overflowuid.
pub(crate) const OVERFLOW: u32 = 65534;

/// One mapping, of users or of groups. The default changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IdMap {
    ranges: Vec<Range>,
    squash: Option<u32>,
}

/// `len` ids from `host` on, shown from `shown` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) host: u32,
    pub(crate) shown: u32,
    pub(crate) len: u32,
}

impl IdMap {
    /// A mapping by ranges; without any, nothing is changed. `squash` is the one id to show.
    pub(crate) fn new(ranges: Vec<Range>, squash: Option<u32>) -> Self {
        IdMap { ranges, squash }
    }

    /// The ranges, and the one id to show.
    pub(crate) fn parts(&self) -> (&[Range], Option<u32>) {
        (&self.ranges, self.squash)
    }

    /// Whether all files are shown as this one's.
    pub(crate) fn squashes_to(&self, id: u32) -> bool {
        self.squash == Some(id)
    }

    /// What is shown for an id that a file has.
    pub(crate) fn shown(&self, host: u32) -> u32 {
        if let Some(id) = self.squash {
            return id;
        }
        if self.ranges.is_empty() {
            return host;
        }
        self.ranges
            .iter()
            .find_map(|r| {
                let offset = host.checked_sub(r.host).filter(|offset| *offset < r.len)?;
                r.shown.checked_add(offset)
            })
            .unwrap_or(OVERFLOW)
    }

    /// The id that a file gets for one that is shown; none if no file can have it.
    pub(crate) fn host(&self, shown: u32) -> Option<u32> {
        if self.ranges.is_empty() {
            return Some(shown);
        }
        self.ranges.iter().find_map(|r| {
            let offset = shown.checked_sub(r.shown).filter(|offset| *offset < r.len)?;
            r.host.checked_add(offset)
        })
    }

    /// The id that a file gets of whom makes it. Root is not stopped by having none here, since he prepares the
    /// mount for those who have: such files get the overflow id, as of fuse-overlayfs.
    pub(crate) fn host_of_maker(&self, shown: u32) -> Option<u32> {
        self.host(shown).or_else(|| (shown == 0).then_some(OVERFLOW))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_outside_of_all_ranges_are_shown_as_overflow_and_cannot_be_given() {
        let map = IdMap::new(
            vec![
                Range { host: 100_000, shown: 0, len: 1000 },
                Range { host: 5, shown: 2000, len: 1 },
            ],
            None,
        );
        assert_eq!((map.shown(100_000), map.shown(100_999), map.shown(5)), (0, 999, 2000));
        assert_eq!((map.shown(101_000), map.shown(0)), (OVERFLOW, OVERFLOW));
        assert_eq!((map.host(0), map.host(2000), map.host(1000)), (Some(100_000), Some(5), None));
        assert_eq!((map.host_of_maker(2000), map.host_of_maker(1000)), (Some(5), None));
        assert_eq!((IdMap::default().shown(7), IdMap::default().host(7)), (7, Some(7)));
        let without_root = IdMap::new(vec![Range { host: 0, shown: 100_000, len: 65_536 }], None);
        assert_eq!((without_root.host(0), without_root.host_of_maker(0)), (None, Some(OVERFLOW)));
        assert_eq!(without_root.host_of_maker(1), None);
    }

    #[test]
    fn squashing_shows_one_id_and_gives_what_is_asked() {
        let map = IdMap::new(Vec::new(), Some(0));
        assert_eq!((map.shown(1000), map.host(1000)), (0, Some(1000)));
    }
}
