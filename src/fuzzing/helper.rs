//! What helpers are told and tell.

use crate::error::ErrorKind;
use crate::helper::protocol::{MAX_MESSAGE, decode, encode, length};

/// The protocol of helpers: any bytes are either a message, which encoded again gives the same bytes, or
/// refused as of another version or as none.
pub fn helper_protocol(data: &[u8]) {
    match decode(data) {
        Ok(message) => {
            let again = encode(&message).expect("what was decoded is no longer than it was");
            let (head, body) = again.split_first_chunk::<4>().expect("a length comes first");
            assert_eq!(body, data);
            assert_eq!(length(*head).expect("the length is right"), data.len());
        }
        Err(e) => assert_eq!(e.kind(), ErrorKind::Incompatible, "{e}"),
    }
    if let Some((head, _)) = data.split_first_chunk::<4>()
        && let Ok(length) = length(*head)
    {
        assert!(length <= MAX_MESSAGE as usize);
    }
}
