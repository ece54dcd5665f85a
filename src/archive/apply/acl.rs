//! POSIX access control lists, from the text that archives have to what the kernel takes.
//!
//! Text: `user::rwx,user:1000:r-x,group::r--,mask::rwx,other::r--`, in lines or with commas; star
//! adds the number as a fourth field where the second is a name. A name without a number cannot be
//! resolved: the image's user database is not ours to trust, and the host's does not fit.
//!
//! Sources: acl(5); star(1), "SCHILY.acl.access"; the kernel's `include/uapi/linux/posix_acl_xattr.h`.

/// Format version of the kernel's xattr.
const VERSION: u32 = 2;
/// The id of entries that have none.
const NO_ID: u32 = u32::MAX;

/// Who an entry is about; the order is the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
enum Tag {
    UserObj = 0x01,
    User = 0x02,
    GroupObj = 0x04,
    Group = 0x08,
    Mask = 0x10,
    Other = 0x20,
}

/// A list in the kernel's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Acl(Vec<(Tag, u32, u16)>);

impl Acl {
    /// Reads a list; none if it is malformed or names somebody without a number.
    pub(super) fn parse(text: &[u8]) -> Option<Acl> {
        let text = std::str::from_utf8(text).ok()?;
        let mut entries = Vec::new();
        for line in text.split([',', '\n']) {
            // What getfacl(1) adds.
            let line = line.split('#').next().unwrap_or_default().trim();
            if !line.is_empty() {
                entries.push(entry(line)?);
            }
        }
        if entries.is_empty() {
            return None;
        }
        entries.sort_unstable();
        Some(Acl(entries))
    }

    /// The value of `system.posix_acl_access` or `system.posix_acl_default`.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        for (tag, id, rights) in &self.0 {
            value.extend_from_slice(&(*tag as u16).to_le_bytes());
            value.extend_from_slice(&rights.to_le_bytes());
            value.extend_from_slice(&id.to_le_bytes());
        }
        value
    }
}

fn entry(line: &str) -> Option<(Tag, u32, u16)> {
    let fields: Vec<&str> = line.split(':').map(str::trim).collect();
    let (tag, who, text, number) = match *fields.as_slice() {
        [tag, text] => (tag, "", text, None),
        [tag, who, text] => (tag, who, text, None),
        [tag, who, text, number] => (tag, who, text, Some(number)),
        _ => return None,
    };
    let (tag, id) = match (tag, who.is_empty()) {
        ("user" | "u", true) => (Tag::UserObj, NO_ID),
        ("group" | "g", true) => (Tag::GroupObj, NO_ID),
        ("mask" | "m", true) => (Tag::Mask, NO_ID),
        ("other" | "o", true) => (Tag::Other, NO_ID),
        ("user" | "u", false) => (Tag::User, number.unwrap_or(who).parse().ok()?),
        ("group" | "g", false) => (Tag::Group, number.unwrap_or(who).parse().ok()?),
        _ => return None,
    };
    let mut rights = 0;
    for c in text.chars() {
        rights |= match c {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return None,
        };
    }
    Some((tag, id, rights))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_become_what_the_kernel_takes_in_its_order() {
        let text = b"other::r--\nuser::rwx\nuser:1000:r-x\t#effective:r--\ngroup::r--,mask::rwx";
        let acl = Acl::parse(text).unwrap();
        let encoded = acl.encode();
        assert_eq!(encoded.len(), 4 + 5 * 8);
        assert_eq!(encoded.get(..4), Some(&[2, 0, 0, 0][..]));
        let tags: Vec<u8> = encoded.iter().skip(4).step_by(8).copied().collect();
        assert_eq!(tags, [1, 2, 4, 0x10, 0x20]);
        let user = [2, 0, 5, 0, 0xe8, 3, 0, 0];
        assert_eq!(encoded.get(12..20), Some(&user[..]));
    }

    #[test]
    fn a_name_needs_its_number() {
        assert!(Acl::parse(b"user::rwx,user:lisa:r-x,group::r--,mask::rwx,other::r--").is_none());
        assert_eq!(Acl::parse(b"user:lisa:r-x:502"), Acl::parse(b"user:502:r-x"));
    }

    #[test]
    fn what_is_no_list_is_none() {
        for bad in ["", "#", "user", "user::rwz", "who::rwx", "mask:7:rwx", "a:b:c:d:e"] {
            assert!(Acl::parse(bad.as_bytes()).is_none(), "{bad:?}");
        }
    }
}
