//! File capabilities on their way out of a user namespace.
//!
//! Version 3 of the `security.capability` xattr is version 2 and the uid, in the initial user
//! namespace, of the root of the namespace that it counts in. That number means nothing on another
//! machine. Source: `include/uapi/linux/capability.h`, capabilities(7).

/// Revision and flags, then two sets of permitted and inheritable: little endian words of 4 bytes.
const LEN_2: usize = 20;
const LEN_3: usize = 24;
const REVISION_MASK: u32 = 0xff00_0000;
const REVISION_2: u32 = 0x0200_0000;
const REVISION_3: u32 = 0x0300_0000;

/// The same capabilities as version 2; what is not version 3 is given back as it is.
pub(super) fn to_version_2(value: Vec<u8>) -> Vec<u8> {
    let Some((head, rest)) = value.split_first_chunk::<4>() else { return value };
    let magic = u32::from_le_bytes(*head);
    if value.len() != LEN_3 || magic & REVISION_MASK != REVISION_3 {
        return value;
    }
    let magic = magic & !REVISION_MASK | REVISION_2;
    let sets = rest.get(..LEN_2 - 4).unwrap_or_default();
    [&magic.to_le_bytes(), sets].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_3_loses_its_root_and_keeps_its_sets_and_flags() {
        let mut three = vec![1, 0, 0, 3];
        three.extend(1..=16);
        let mut two = three.clone();
        two[3] = 2;
        three.extend([0xe8, 3, 0, 0]);
        assert_eq!(to_version_2(three), two);
        assert_eq!(to_version_2(two.clone()), two);
        for odd in [vec![], vec![1, 2], vec![0, 0, 0, 3], vec![9; 24]] {
            assert_eq!(to_version_2(odd.clone()), odd);
        }
    }
}
