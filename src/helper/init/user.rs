//! Who a container's command runs as: names are those of its own /etc/passwd and /etc/group.
//!
//! Sources: passwd(5), group(5); the field `User` of the OCI image specification's `config.md`.

use std::path::Path;

use crate::error::{Error, ErrorKind, IoContext, Result};

/// The longest such file that is read, in bytes.
const MAX: u64 = 16 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: Option<Vec<u8>>,
}

/// Finds the user in the root directory that this process has.
pub(super) fn find(wanted: &str) -> Result<User> {
    resolve(wanted, &read("/etc/passwd")?, &read("/etc/group")?)
}

/// Nothing if it is no file.
fn read(path: &str) -> Result<Vec<u8>> {
    use std::io::Read as _;
    if !Path::new(path).metadata().is_ok_and(|found| found.is_file()) {
        return Ok(Vec::new());
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).at("open the container's", path)?;
    file.take(MAX).read_to_end(&mut bytes).at("read the container's", path)?;
    Ok(bytes)
}

/// `USER`, `USER:GROUP`, each a name or a number. Nothing is root.
fn resolve(wanted: &str, users: &[u8], groups: &[u8]) -> Result<User> {
    let (user, group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (wanted, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = number_of(user.as_bytes());
    let entries = || lines(users, 7);
    let by_name = || entries().find(|fields| field(fields, 0) == user.as_bytes());
    let by_number = || number.and_then(|n| entries().find(|fields| id(fields, 2) == Some(n)));
    let entry = by_name().or_else(by_number);
    let uid = entry.as_ref().and_then(|fields| id(fields, 2)).or(number);
    let uid = uid.ok_or_else(|| unknown("user", user, "/etc/passwd"))?;
    let name = entry.as_ref().map(|fields| field(fields, 0));
    let gid = match group {
        None => entry.as_ref().and_then(|fields| id(fields, 3)).unwrap_or(0),
        Some(group) => lines(groups, 4)
            .find(|fields| field(fields, 0) == group.as_bytes())
            .and_then(|fields| id(&fields, 2))
            .or_else(|| number_of(group.as_bytes()))
            .ok_or_else(|| unknown("group", group, "/etc/group"))?,
    };
    // As Docker has it: further groups are those of a user who is known, and only without a group.
    let mut further = Vec::new();
    if let (Some(name), None) = (name, group) {
        let is_member =
            |fields: &Vec<&[u8]>| field(fields, 3).split(|b| *b == b',').any(|m| m == name);
        further.extend(lines(groups, 4).filter(is_member).filter_map(|fields| id(&fields, 2)));
        further.sort_unstable();
        further.dedup();
        further.retain(|further| *further != gid);
    }
    let home =
        entry.as_ref().map(|fields| field(fields, 5).to_vec()).filter(|home| !home.is_empty());
    Ok(User { uid, gid, groups: further, home })
}

fn unknown(what: &str, name: &str, file: &str) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        format!(
            "the container has no {what} {name:?} in {file}: give a number, or one that is there"
        ),
    )
}

/// The lines that have that many fields.
fn lines(file: &[u8], fields: usize) -> impl Iterator<Item = Vec<&[u8]>> {
    let lines = file.split(|b| *b == b'\n').map(|line| line.split(|b| *b == b':').collect());
    lines.filter(move |found: &Vec<&[u8]>| found.len() >= fields.min(4))
}

fn field<'a>(fields: &[&'a [u8]], number: usize) -> &'a [u8] {
    fields.get(number).copied().unwrap_or_default()
}

fn id(fields: &[&[u8]], number: usize) -> Option<u32> {
    number_of(field(fields, number))
}

/// -1 means no id to the kernel: whoever asked for it would stay who he is.
fn number_of(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok().filter(|id| *id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # comment\n\
        \xff:x:5:5::/:\n\
        huge:x:4294967295:1::/:\n\
        web:x:33:34::/srv:/bin/sh\n\
        77:x:78:79::/seven:/bin/sh\n";
    const GROUPS: &[u8] =
        b"root:x:0:\nlog:x:4:web,other\nwww:x:34:web\ndisk:x:6:webby\nlog2:x:4:web\n";

    #[test]
    fn names_and_numbers_are_found() {
        for (wanted, uid, gid, groups, home) in [
            ("", 0, 0, &[][..], Some("/root")),
            ("0", 0, 0, &[], Some("/root")),
            ("web", 33, 34, &[4], Some("/srv")),
            ("33", 33, 34, &[4], Some("/srv")),
            ("web:log", 33, 4, &[], Some("/srv")),
            ("web:9", 33, 9, &[], Some("/srv")),
            ("web:", 33, 34, &[4], Some("/srv")),
            ("1000", 1000, 0, &[], None),
            ("1000:1001", 1000, 1001, &[], None),
            // A name comes before a number.
            ("77", 78, 79, &[], Some("/seven")),
        ] {
            let user = resolve(wanted, USERS, GROUPS).unwrap();
            let home = home.map(|home| home.as_bytes().to_vec());
            assert_eq!(user, User { uid, gid, groups: groups.to_vec(), home }, "{wanted:?}");
        }
    }

    #[test]
    fn what_is_nowhere_is_named() {
        for (wanted, named) in [
            ("nobody", "user \"nobody\" in /etc/passwd"),
            ("huge", "user \"huge\""),
            ("-1", "user \"-1\""),
            ("4294967296", "user"),
            ("4294967295", "user"),
            ("0:4294967295", "group"),
            ("web:none", "group \"none\" in /etc/group"),
        ] {
            let e = resolve(wanted, USERS, GROUPS).unwrap_err();
            assert!(e.to_string().contains(named), "{wanted:?}: {e}");
        }
        assert!(resolve("web", b"", b"").is_err());
        assert_eq!(resolve("5", b"", b"").unwrap().gid, 0);
    }
}
