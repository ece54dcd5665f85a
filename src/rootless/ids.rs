//! The ids that a user can have in a user namespace: his own, which is root there, and the ranges that the
//! administrator has given him.
//!
//! A line of /etc/subuid is `USER:FIRST:COUNT`, the user by name or number. Whether a line counts is for
//! newuidmap(1) to say, which maps them: lines that it would refuse are not asked for.
//!
//! Sources: subuid(5), newuidmap(1), user_namespaces(7).

use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};
use crate::sys::{namespace, xattr};

/// Where programs of the system are, whatever PATH says.
const PLACES: [&str; 3] = ["/usr/bin", "/usr/sbin", "/bin"];
/// The most lines that a mapping has: user_namespaces(7).
const MAX_LINES: usize = 340;

/// A range of ids in a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MappedIds {
    /// The first, as it is inside.
    pub inside: u32,
    /// The first, as it is outside.
    pub outside: u32,
    /// How many there are.
    pub count: u32,
}

/// Which ids a user namespace has.
///
/// ```
/// use stratafs::rootless::IdMapping;
///
/// let mapping = IdMapping::of_caller()?;
/// let ids: u64 = mapping.users().iter().map(|ids| u64::from(ids.count)).sum();
/// match mapping.one_id() {
///     Some(why) => println!("one id: {why}"),
///     None => println!("{ids} ids"),
/// }
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMapping {
    users: Vec<MappedIds>,
    groups: Vec<MappedIds>,
    by: By,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum By {
    /// newuidmap and newgidmap
    Programs([PathBuf; 2]),
    Oneself(OneId),
}

/// Why a user has but one id to give to files.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OneId {
    /// It was [asked for](IdMapping::one).
    Chosen,
    /// The file of that name has no range of this user.
    NoRange {
        /// /etc/subuid or /etc/subgid.
        file: &'static str,
        /// The user, by name if he has one.
        user: String,
    },
    /// The program that maps ids is not there.
    NoProgram(&'static str),
    /// It has no right to.
    NoRight(PathBuf),
}

impl fmt::Display for OneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OneId::Chosen => f.write_str("more were not asked for"),
            OneId::NoRange { file, user } => write!(
                f,
                "{file} has no range of ids for {user}: as root, `usermod --add-subuids 100000-165535 \
                 --add-subgids 100000-165535 {user}`, with ranges that nobody else has"
            ),
            OneId::NoProgram(program) => {
                write!(f, "the program {program} is not there: install the package uidmap")
            }
            OneId::NoRight(program) => write!(
                f,
                "{program:?} is neither setuid root nor has the capability to map ids: install the package \
                 uidmap again, or as root, `chmod u+s {}`",
                program.display()
            ),
        }
    }
}

impl IdMapping {
    /// All ids that the caller can have.
    ///
    /// # Errors
    /// If /etc/subuid, /etc/subgid or the user database cannot be read. That there are none is no error:
    /// then the mapping is of [one id](IdMapping::one_id).
    pub fn of_caller() -> Result<IdMapping> {
        let (uid, gid) = namespace::ids();
        let name = namespace::user_name(uid).at("find the name of", format!("user {uid}"))?;
        let one = |why| Ok(one(uid, gid, why));
        let mut programs = Vec::new();
        for name in ["newuidmap", "newgidmap"] {
            let mut places = PLACES.iter().map(|place| Path::new(place).join(name));
            let Some(program) = places.find(|path| path.is_file()) else {
                return one(OneId::NoProgram(name));
            };
            if !may_map(&program) {
                return one(OneId::NoRight(program));
            }
            programs.push(program);
        }
        let mut maps = Vec::new();
        for (file, own) in [("/etc/subuid", uid), ("/etc/subgid", gid)] {
            let text = match fs::read(file) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
                text => text.at("read", file)?,
            };
            let map = mapping(own, &ranges(&text, name.as_deref(), uid));
            if map.len() == 1 {
                let user = name.unwrap_or_else(|| uid.to_string());
                return one(OneId::NoRange { file, user });
            }
            maps.push(map);
        }
        match (maps.pop(), maps.pop(), <[PathBuf; 2]>::try_from(programs)) {
            (Some(groups), Some(users), Ok(programs)) => {
                Ok(IdMapping { users, groups, by: By::Programs(programs) })
            }
            _ => one(OneId::NoProgram("newuidmap")),
        }
    }

    /// The caller's own id alone, as root.
    pub fn one() -> IdMapping {
        let (uid, gid) = namespace::ids();
        one(uid, gid, OneId::Chosen)
    }

    /// The users, in the order of what they are inside.
    pub fn users(&self) -> &[MappedIds] {
        &self.users
    }

    /// The groups, likewise.
    pub fn groups(&self) -> &[MappedIds] {
        &self.groups
    }

    /// Why there is but one id, if that is so.
    pub fn one_id(&self) -> Option<&OneId> {
        match &self.by {
            By::Oneself(why) => Some(why),
            By::Programs(_) => None,
        }
    }

    /// Who maps them; none if the process itself does.
    pub(super) fn programs(&self) -> Option<[&Path; 2]> {
        match &self.by {
            By::Programs(programs) => Some(programs.each_ref().map(PathBuf::as_path)),
            By::Oneself(_) => None,
        }
    }
}

fn one(uid: u32, gid: u32, why: OneId) -> IdMapping {
    let only = |outside| vec![MappedIds { inside: 0, outside, count: 1 }];
    IdMapping { users: only(uid), groups: only(gid), by: By::Oneself(why) }
}

/// Whether a program may map ids of others: it is setuid, or has file capabilities.
fn may_map(program: &Path) -> bool {
    let is_setuid = program.metadata().is_ok_and(|found| found.permissions().mode() & 0o4000 != 0);
    let capability = || {
        let program = fs::File::open(program)?;
        xattr::get(xattr::Of::Fd(program.as_fd()), b"security.capability")
    };
    is_setuid || capability().is_ok_and(|value| value.is_some())
}

/// The ranges that a file has for a user; what is malformed is passed over.
fn ranges(file: &[u8], name: Option<&str>, uid: u32) -> Vec<(u32, u32)> {
    let number = uid.to_string();
    let mut found = Vec::new();
    for line in file.split(|b| *b == b'\n') {
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let mut fields = line.split(|b| *b == b':');
        let user = fields.next().unwrap_or_default();
        let is_of_user =
            user == number.as_bytes() || name.is_some_and(|name| name.as_bytes() == user);
        if !is_of_user {
            continue;
        }
        let id = |field: &[u8]| std::str::from_utf8(field).ok()?.trim().parse::<u32>().ok();
        let range = match (fields.next(), fields.next(), fields.next()) {
            (Some(first), Some(count), None) => id(first).zip(id(count)),
            _ => None,
        };
        // The last id of all is none to the kernel.
        let range = range.filter(|(first, count)| {
            let last = count.checked_sub(1).and_then(|further| first.checked_add(further));
            last.is_some_and(|last| last != u32::MAX)
        });
        match range {
            Some(range) => found.push(range),
            None => tracing::debug!(line = ?String::from_utf8_lossy(line), "no range of ids"),
        }
    }
    found
}

/// The caller first, then what he has besides; no id outside twice.
fn mapping(own: u32, ranges: &[(u32, u32)]) -> Vec<MappedIds> {
    let mut map = vec![MappedIds { inside: 0, outside: own, count: 1 }];
    let mut inside: u32 = 1;
    for (first, count) in ranges {
        let end = u64::from(*first) + u64::from(*count);
        let is_taken = |ids: &MappedIds| {
            u64::from(ids.outside) < end
                && u64::from(*first) < u64::from(ids.outside) + u64::from(ids.count)
        };
        if map.len() == MAX_LINES || map.iter().any(is_taken) {
            tracing::debug!(first, count, "a range of ids overlaps another, or is one too many");
            continue;
        }
        let Some(next) = inside.checked_add(*count).filter(|next| *next < u32::MAX) else {
            tracing::debug!(first, count, "more ids than there are");
            continue;
        };
        map.push(MappedIds { inside, outside: *first, count: *count });
        inside = next;
    }
    map
}

/// As a helper is told: see `helper::enter`.
pub(super) fn to_text(map: &[MappedIds]) -> String {
    let mut text = String::new();
    for MappedIds { inside, outside, count } in map {
        let comma = if text.is_empty() { "" } else { "," };
        // Writing to a string does not fail.
        let _ = write!(text, "{comma}{inside} {outside} {count}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_by_name_and_by_number_count_and_others_do_not() {
        let file =
            b"# me:1:1\nme:100000:65536\nother:200000:5\n1000:300000:10\nmeme:1:1\n\xff:7:7\n";
        assert_eq!(ranges(file, Some("me"), 1000), [(100_000, 65536), (300_000, 10)]);
        assert_eq!(ranges(file, None, 1000), [(300_000, 10)]);
        assert_eq!(ranges(b"", Some("me"), 1000), []);
    }

    #[test]
    fn malformed_lines_are_passed_over() {
        for line in [
            "me",
            "me:",
            "me:1",
            "me:1:",
            "me::1",
            "me:1:0",
            "me:-1:5",
            "me:1:2:3",
            "me:x:5",
            "me:4294967295:1",
            "me:4294967290:100",
            "me:4294967296:1",
            "me:0:4294967295:",
            "me:1:\u{661}",
        ] {
            let text = format!("{line}\nme:5:5\n");
            assert_eq!(ranges(text.as_bytes(), Some("me"), 1000), [(5, 5)], "{line:?}");
        }
        assert_eq!(ranges(b"me:1:\xff\nme:5:5", Some("me"), 1000), [(5, 5)]);
    }

    #[test]
    fn no_id_is_mapped_twice() {
        let text = |ranges: &[(u32, u32)]| to_text(&mapping(1000, ranges));
        assert_eq!(text(&[(100_000, 65536), (7, 3)]), "0 1000 1,1 100000 65536,65537 7 3");
        // The caller's own id.
        assert_eq!(text(&[(999, 2), (1001, 5)]), "0 1000 1,1 1001 5");
        assert_eq!(text(&[(10, 10), (19, 5), (20, 5), (5, 100)]), "0 1000 1,1 10 10,11 20 5");
        assert_eq!(
            text(&[(0, 999), (2000, u32::MAX - 2000)]),
            "0 1000 1,1 0 999,1000 2000 4294965295"
        );
        let many: Vec<(u32, u32)> = (0..400).map(|n| (10_000 + 2 * n, 1)).collect();
        assert_eq!(mapping(1000, &many).len(), MAX_LINES);
    }

    #[test]
    fn why_there_is_one_id_is_said_with_a_remedy() {
        let none = OneId::NoRange { file: "/etc/subuid", user: "me".to_owned() };
        assert!(none.to_string().contains("--add-subgids 100000-165535 me"), "{none}");
        assert!(OneId::NoProgram("newuidmap").to_string().contains("package uidmap"));
        assert_eq!(IdMapping::one().one_id(), Some(&OneId::Chosen));
    }
}
