//! What a union notes for the next one.

use crate::union::recoded;

/// Notes. The first byte chooses of what the others are one: they are damaged, or the same when written again.
pub fn union_notes(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    if let Some(again) = recoded(data, choice & 1 == 0) {
        assert_eq!(again, data);
    }
}
