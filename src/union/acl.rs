//! Access control lists as xattrs hold them, and the ids in them.
//!
//! The value is a version, 2, of 4 bytes, and entries of 8 bytes: tag (2), permissions (2), id (4), all
//! little-endian. Only entries for a named user or group have an id. Source: the kernel's
//! `include/uapi/linux/posix_acl_xattr.h`.

use crate::idmap::{IdMap, OVERFLOW};

pub(super) const ACCESS: &[u8] = b"system.posix_acl_access";
pub(super) const DEFAULT: &[u8] = b"system.posix_acl_default";

const HEADER: usize = 4;
const ENTRY: usize = 8;
const TAG_USER: u16 = 0x02;
const TAG_GROUP_OWNER: u16 = 0x04;
const TAG_GROUP: u16 = 0x08;
const TAG_MASK: u16 = 0x10;
const TAG_OTHERS: u16 = 0x20;
const WRITE: u16 = 2;

/// Whether the key is that of an access control list.
pub(super) fn is_key(key: &[u8]) -> bool {
    key == ACCESS || key == DEFAULT
}

/// The list as it is shown of a file.
pub(super) fn shown(value: &[u8], uids: &IdMap, gids: &IdMap) -> Vec<u8> {
    map(value, |tag, id| match tag {
        TAG_USER => Some(uids.shown(id)),
        TAG_GROUP => Some(gids.shown(id)),
        _ => Some(id),
    })
    .unwrap_or_else(|| value.to_vec())
}

/// The list as a file gets it; none if it names somebody whom no file can have.
pub(super) fn host(value: &[u8], uids: &IdMap, gids: &IdMap) -> Option<Vec<u8>> {
    map(value, |tag, id| match tag {
        TAG_USER => uids.host(id).filter(|id| *id != OVERFLOW),
        TAG_GROUP => gids.host(id).filter(|id| *id != OVERFLOW),
        _ => Some(id),
    })
}

/// Whether a list lets somebody who is not the owner write. As `posix_acl_permission` of the kernel's
/// `fs/posix_acl.c`: a named user's entry decides alone; of groups any; else that for others.
pub(super) fn grants_write(
    value: &[u8],
    owning_group: u32,
    uid: u32,
    in_group: &dyn Fn(u32) -> bool,
) -> bool {
    let (mut mask, mut others, mut group) = (true, false, None);
    let mut named = None;
    for entry in value.get(HEADER..).unwrap_or_default().chunks(ENTRY) {
        let [t0, t1, p0, p1, a, b, c, d] = *entry else { return false };
        let (tag, id) = (u16::from_le_bytes([t0, t1]), u32::from_le_bytes([a, b, c, d]));
        let writes = u16::from_le_bytes([p0, p1]) & WRITE != 0;
        match tag {
            TAG_USER if id == uid => named = Some(writes),
            TAG_GROUP_OWNER if in_group(owning_group) => {
                group = Some(writes || group == Some(true))
            }
            TAG_GROUP if in_group(id) => group = Some(writes || group == Some(true)),
            TAG_MASK => mask = writes,
            TAG_OTHERS => others = writes,
            _ => {}
        }
    }
    match named.or(group) {
        Some(writes) => writes && mask,
        None => others,
    }
}

/// A value of another shape stays as it is: the file system refuses it.
fn map(value: &[u8], each: impl Fn(u16, u32) -> Option<u32>) -> Option<Vec<u8>> {
    let (header, entries) = value.split_at_checked(HEADER).unwrap_or((value, &[]));
    let mut mapped = header.to_vec();
    for entry in entries.chunks(ENTRY) {
        match *entry {
            [t0, t1, p0, p1, a, b, c, d] => {
                let tag = u16::from_le_bytes([t0, t1]);
                let id = each(tag, u32::from_le_bytes([a, b, c, d]))?;
                mapped.extend_from_slice(&[t0, t1, p0, p1]);
                mapped.extend_from_slice(&id.to_le_bytes());
            }
            _ => mapped.extend_from_slice(entry),
        }
    }
    Some(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idmap::IdRange;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut value = 2_u32.to_le_bytes().to_vec();
        for (tag, perm, id) in entries {
            value.extend_from_slice(&tag.to_le_bytes());
            value.extend_from_slice(&perm.to_le_bytes());
            value.extend_from_slice(&id.to_le_bytes());
        }
        value
    }

    #[test]
    fn only_named_users_and_groups_are_mapped() {
        let uids = IdMap::new(vec![IdRange { host: 1000, shown: 0, len: 10 }], None);
        let gids = IdMap::new(vec![IdRange { host: 2000, shown: 0, len: 10 }], None);
        let host_side = acl(&[(1, 7, u32::MAX), (2, 6, 1001), (8, 5, 2002), (0x20, 4, u32::MAX)]);
        let shown_side = acl(&[(1, 7, u32::MAX), (2, 6, 1), (8, 5, 2), (0x20, 4, u32::MAX)]);
        assert_eq!(shown(&host_side, &uids, &gids), shown_side);
        assert_eq!(host(&shown_side, &uids, &gids), Some(host_side));
        assert_eq!(host(&acl(&[(2, 6, 77)]), &uids, &gids), None);
    }

    #[test]
    fn a_value_of_another_shape_is_left_alone() {
        let map = IdMap::new(vec![IdRange { host: 1, shown: 0, len: 1 }], None);
        for odd in [&b""[..], b"x", b"\x02\0\0\0abc"] {
            assert_eq!(host(odd, &map, &map).as_deref(), Some(odd));
        }
    }

    #[test]
    fn a_list_lets_write_or_not() {
        let list = acl(&[
            (1, 6, 0),
            (2, 6, 5),
            (2, 4, 6),
            (4, 4, 0),
            (8, 6, 70),
            (0x10, 6, 0),
            (0x20, 0, 0),
        ]);
        let may = |uid, groups: &[u32]| grants_write(&list, 7, uid, &|gid| groups.contains(&gid));
        assert!(may(5, &[]) && !may(6, &[70]), "a named user's entry decides alone");
        assert!(may(9, &[7, 70]) && !may(9, &[7]) && !may(9, &[]));
        let masked = acl(&[(1, 6, 0), (2, 6, 5), (4, 6, 0), (0x10, 4, 0), (0x20, 6, 0)]);
        assert!(
            !grants_write(&masked, 7, 5, &|_| false) && grants_write(&masked, 7, 9, &|_| false)
        );
    }
}
