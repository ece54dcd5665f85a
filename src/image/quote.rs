//! Quoting in messages what others wrote: little of it, and nothing that a terminal would obey.

/// How much is quoted, in characters.
const MAX: usize = 160;

/// In quotation marks.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", brief(text))
}

/// Without quotation marks: for what is a message or a digest already.
pub(super) fn brief(text: &str) -> String {
    let mut brief = String::new();
    for (n, c) in text.chars().enumerate() {
        if n == MAX {
            brief.push_str("...");
            break;
        }
        match c {
            // These alone would be escaped for no reason of a terminal's.
            '"' | '\'' => brief.push(c),
            c => brief.extend(c.escape_debug()),
        }
    }
    brief
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_is_cut_and_what_moves_the_cursor_is_escaped() {
        assert_eq!(quoted("a b"), "\"a b\"");
        assert_eq!(brief("it's \"x\"\u{1b}[1m"), "it's \"x\"\\u{1b}[1m");
        assert_eq!(brief(&"ß".repeat(1000)), "ß".repeat(MAX) + "...");
    }
}
