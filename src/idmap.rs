//! User and group ids between the file systems that hold the layers and who looks through a mount.
//!
//! A mapping is a list of ranges, as user namespaces have them (user_namespaces(7)): what lies in none
//! of them is shown as the overflow id, and cannot be given to a file. A squashed side shows one id for
//! all files, whatever they have.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

/// The id that stands for all that are not mapped: the kernel's default of
/// /proc/sys/kernel/overflowuid.
#[cfg(feature = "fuse")]
pub(crate) const OVERFLOW: u32 = 65534;

/// The most ranges that a user namespace takes (`UID_GID_MAP_MAX_EXTENTS`).
const MAX_RANGES: usize = 340;

/// `len` ids: `host` and those that follow, which files have, are shown as `shown` and those that follow.
///
/// As text it is `HOST:SHOWN:COUNT`:
///
/// ```
/// let range: stratafs::IdRange = "0:100000:65536".parse()?;
/// assert_eq!((range.host, range.shown, range.len), (0, 100_000, 65_536));
/// assert_eq!(range.to_string(), "0:100000:65536");
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first of the ids that files in the layers have.
    pub host: u32,
    /// The first of the ids that are shown for them.
    pub shown: u32,
    /// How many.
    pub len: u32,
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.host, self.shown, self.len)
    }
}

impl FromStr for IdRange {
    type Err = Error;

    fn from_str(text: &str) -> Result<IdRange> {
        let wrong = || invalid(format!("a range of ids is HOST:SHOWN:COUNT, not {text:?}"));
        let numbers: Vec<u32> =
            text.split(':').map(|word| word.parse().map_err(|_| wrong())).collect::<Result<_>>()?;
        let [host, shown, len] = *numbers.as_slice() else { return Err(wrong()) };
        let range = IdRange { host, shown, len };
        check(&[range], "")?;
        Ok(range)
    }
}

/// As whose the files of a mount are shown, and with which ids what is made through it comes to lie in the
/// writable layer. The default changes nothing.
///
/// So a container with a user namespace gets an image without a change to any file. With the ids 0 to 65535
/// shown as 100000 and those that follow, and a user namespace that has these as 0 to 65535, it sees the
/// image as it is; and what it writes has, in the layer and in an archive of it, the ids that it has inside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShownIds {
    /// User ids; without any range they are as the files have them. Ids in no range are shown as 65534,
    /// cannot be given to a file, and their files cannot be changed.
    pub uids: Vec<IdRange>,
    /// Group ids, likewise.
    pub gids: Vec<IdRange>,
}

impl ShownIds {
    /// The same ranges for users and for groups.
    pub fn same(ranges: Vec<IdRange>) -> Self {
        ShownIds { uids: ranges.clone(), gids: ranges }
    }

    /// Whether all ids are shown as files have them.
    pub fn is_empty(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty()
    }

    /// Whether a mapping is one: every id in it has one other, and the other way round.
    pub(crate) fn check(&self) -> Result<()> {
        check(&self.uids, "user ")?;
        check(&self.gids, "group ")
    }
}

fn check(ranges: &[IdRange], of: &str) -> Result<()> {
    if ranges.len() > MAX_RANGES {
        let n = ranges.len();
        let text = format!("{n} ranges of {of}ids: the kernel's limit is {MAX_RANGES}");
        return Err(Error::new(ErrorKind::LimitExceeded, text));
    }
    for (i, range) in ranges.iter().enumerate() {
        if range.len == 0 {
            return Err(invalid(format!("the range {range} of {of}ids is empty")));
        }
        // The last number is no id: chown(2) takes it for "as it is".
        if range.host.max(range.shown).checked_add(range.len).is_none() {
            return Err(invalid(format!(
                "the range {range} of {of}ids goes beyond the largest id"
            )));
        }
        let meet = |a: u32, other: u32, len: u32| {
            u64::from(a) < u64::from(other) + u64::from(len)
                && u64::from(other) < u64::from(a) + u64::from(range.len)
        };
        let earlier = ranges.iter().take(i).find(|earlier| {
            meet(range.host, earlier.host, earlier.len)
                || meet(range.shown, earlier.shown, earlier.len)
        });
        if let Some(earlier) = earlier {
            let text = format!("the ranges {earlier} and {range} of {of}ids have some in common");
            return Err(invalid(text));
        }
    }
    Ok(())
}

fn invalid(text: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, text)
}

/// Ranges as text.
pub(crate) fn joined(ranges: &[IdRange], by: &str) -> String {
    let texts: Vec<String> = ranges.iter().map(IdRange::to_string).collect();
    texts.join(by)
}

/// What is shown for an id that a file has, by ranges; without any, nothing is changed.
pub(crate) fn shown(ranges: &[IdRange], host: u32) -> Option<u32> {
    if ranges.is_empty() {
        return Some(host);
    }
    ranges.iter().find_map(|r| {
        let offset = host.checked_sub(r.host).filter(|offset| *offset < r.len)?;
        r.shown.checked_add(offset)
    })
}

/// One mapping, of users or of groups. The default changes nothing.
#[cfg(feature = "fuse")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IdMap {
    ranges: Vec<IdRange>,
    squash: Option<u32>,
}

#[cfg(feature = "fuse")]
impl IdMap {
    /// A mapping by ranges; without any, nothing is changed. `squash` is the one id to show.
    pub(crate) fn new(ranges: Vec<IdRange>, squash: Option<u32>) -> Self {
        IdMap { ranges, squash }
    }

    /// The ranges, and the one id to show.
    pub(crate) fn parts(&self) -> (&[IdRange], Option<u32>) {
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
        shown(&self.ranges, host).unwrap_or(OVERFLOW)
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
    fn ranges_that_are_no_mapping_are_refused() {
        let range = |host, shown, len| IdRange { host, shown, len };
        for (ranges, naming) in [
            (vec![range(0, 1, 0)], "is empty"),
            (vec![range(1, 0, u32::MAX)], "beyond the largest"),
            (vec![range(0, u32::MAX, 1)], "beyond the largest"),
            (vec![range(0, 0, 10), range(9, 100, 1)], "0:0:10 and 9:100:1"),
            (vec![range(100, 9, 5), range(0, 0, 10)], "in common"),
        ] {
            let e = ShownIds { uids: Vec::new(), gids: ranges }.check().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{e}");
            assert!(e.to_string().contains(naming), "{e}");
        }
        let many = (0..400).map(|i| range(2 * i, i, 1)).collect();
        assert_eq!(ShownIds::same(many).check().unwrap_err().kind(), ErrorKind::LimitExceeded);
        let ranges = vec![range(0, 0, 10), range(10, 100, 5), range(20, 10, u32::MAX - 20)];
        ShownIds { uids: ranges, gids: vec![range(0, 0, u32::MAX)] }.check().unwrap_err();
        ShownIds::same(vec![range(0, 0, 10), range(10, 100, 5)]).check().unwrap();
        for text in ["", "1", "0:0", "0:0:0", "0:0:1:1", "a:0:1", "-1:0:1", "0:4294967295:1"] {
            assert!(text.parse::<IdRange>().is_err(), "{text}");
        }
    }

    #[cfg(feature = "fuse")]
    #[test]
    fn ids_outside_of_all_ranges_are_shown_as_overflow_and_cannot_be_given() {
        let map = IdMap::new(
            vec![
                IdRange { host: 100_000, shown: 0, len: 1000 },
                IdRange { host: 5, shown: 2000, len: 1 },
            ],
            None,
        );
        assert_eq!((map.shown(100_000), map.shown(100_999), map.shown(5)), (0, 999, 2000));
        assert_eq!((map.shown(101_000), map.shown(0)), (OVERFLOW, OVERFLOW));
        assert_eq!((map.host(0), map.host(2000), map.host(1000)), (Some(100_000), Some(5), None));
        assert_eq!((map.host_of_maker(2000), map.host_of_maker(1000)), (Some(5), None));
        assert_eq!((IdMap::default().shown(7), IdMap::default().host(7)), (7, Some(7)));
        let without_root = IdMap::new(vec![IdRange { host: 0, shown: 100_000, len: 65_536 }], None);
        assert_eq!((without_root.host(0), without_root.host_of_maker(0)), (None, Some(OVERFLOW)));
        assert_eq!(without_root.host_of_maker(1), None);
    }

    #[cfg(feature = "fuse")]
    #[test]
    fn squashing_shows_one_id_and_gives_what_is_asked() {
        let map = IdMap::new(Vec::new(), Some(0));
        assert_eq!((map.shown(1000), map.host(1000)), (0, Some(1000)));
    }
}
