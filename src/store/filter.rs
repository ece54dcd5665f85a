//! The filter language of snapshot walks: containerd's, so that a filter written for one of its
//! snapshotters means the same here.
//!
//! ```text
//! filter   := "" | selector ("," selector)*          all of them must hold; "" holds always
//! selector := path [operator value]                  without an operator: the field is present
//! path     := field ("." field)*
//! field    := [A-Za-z0-9_-]+ | quoted in "
//! operator := "==" | "!=" | "~="
//! value    := quoted in " | not a comma, white space or control character, and not beginning
//!             with one of , . = ! ~ / | "
//! ```
//!
//! After `~=`, a regular expression, `/` and `|` quote as well as `"`. Inside quotes the escapes
//! are Go's: `\a \b \f \n \r \t \v \\`, the quote itself, `\ooo`, `\xhh`, `\uhhhh`, `\Uhhhhhhhh`;
//! any other is an error, so a quoted expression has its backslashes doubled, a bare one has not.
//! White space may stand before a field, an operator and a value, not after a value.
//!
//! A missing field is never equal, always unequal, and matches as the empty string.
//!
//! Stricter than containerd in three things: an expression that does not compile is an error (there
//! it is logged and matches nothing), so are escapes that do not give UTF-8, and length and number
//! are bounded. Expressions are those of `regex-lite`: Go's, but without `\pL` and its like, and
//! ASCII alone folds case.
//!
//! The parser does not recurse, and reads each character a bounded number of times.
//!
//! Source: containerd, `pkg/filters` (`parser.go`, `scanner.go`, `quote.go`).

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use regex_lite::{Regex, RegexBuilder};

use crate::error::{Error, ErrorKind, Result};

/// The longest filter, in bytes.
const MAX_LEN: usize = 16 * 1024;
/// The most selectors in one filter.
const MAX_SELECTORS: usize = 128;
/// The largest compiled expression, in bytes.
const MAX_REGEX: usize = 64 * 1024;
/// The deepest nesting of groups in an expression.
const MAX_REGEX_NESTING: u32 = 50;

/// What a walk over snapshots shall show: containerd's filter language.
///
/// A filter is a list of selectors, separated by commas, all of which must hold. A selector is a
/// field alone (it is present), or a field, an operator and a value: `==`, `!=`, or `~=` with a
/// regular expression. The fields of a snapshot are `name`, `parent`, `kind` (`active`, `view` or
/// `committed`) and `labels.KEY`, or `labels."KEY"` where the key has other characters than letters,
/// digits, `-` and `_`. The empty filter shows everything.
///
/// Where a call takes several filters, a snapshot is shown if any of them holds, and all are shown
/// if there are none.
///
/// ```
/// use stratafs::Filter;
///
/// let filter = Filter::parse(r#"kind==active,labels."example.com/owner"~=^team-"#)?;
/// assert_eq!(filter.to_string(), r#"kind==active,labels."example.com/owner"~=^team-"#);
///
/// let e = Filter::parse("name=base").unwrap_err();
/// assert_eq!(e.kind(), stratafs::ErrorKind::InvalidArgument);
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Clone)]
pub struct Filter {
    text: String,
    selectors: Vec<Selector>,
}

#[derive(Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

/// Something that filters choose among.
pub(crate) trait Fields {
    /// The value of the field at `path`, whose parts are as written, unquoted; `None` if there is
    /// no such field. `path` is never empty, its parts may be.
    ///
    /// containerd joins the parts after `labels` by dots to get the key, and calls the parent of a
    /// snapshot without one present and empty.
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>>;
}

impl Filter {
    /// Reads a filter.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`], with the byte at which it stopped, if `text` is no filter,
    /// is longer than 16 KiB, has more than 128 selectors, or holds a regular expression that
    /// does not compile within 64 KiB.
    pub fn parse(text: &str) -> Result<Self> {
        let selectors = Parser::new(text).and_then(Parser::filter).map_err(|e| {
            // No more of a hostile text than a log line can bear.
            let shown: String = text.chars().take(200).collect();
            let cut = if shown.len() < text.len() { "..." } else { "" };
            let Problem { at, what } = e;
            Error::new(
                ErrorKind::InvalidArgument,
                format!("cannot read filter {shown:?}{cut}: {what} at byte {at}"),
            )
        })?;
        Ok(Filter { text: text.to_owned(), selectors })
    }

    /// Whether all selectors hold for `item`.
    pub(crate) fn matches(&self, item: &dyn Fields) -> bool {
        self.selectors.iter().all(|selector| selector.holds(item))
    }

    /// Whether any of `filters` holds for `item`, or there are none.
    pub(crate) fn any_matches(filters: &[Filter], item: &dyn Fields) -> bool {
        filters.is_empty() || filters.iter().any(|filter| filter.matches(item))
    }
}

impl FromStr for Filter {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Filter::parse(s)
    }
}

impl fmt::Display for Filter {
    /// The text that was parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Filter").field(&self.text).finish()
    }
}

impl Selector {
    fn holds(&self, item: &dyn Fields) -> bool {
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        let value = item.field(&path);
        let value = value.as_deref();
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(unwanted) => value != Some(unwanted),
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

/// Why a text is no filter, and the byte at which that showed.
struct Problem {
    at: usize,
    what: Cow<'static, str>,
}

fn problem<T>(at: usize, what: impl Into<Cow<'static, str>>) -> Result<T, Problem> {
    let what = what.into();
    Err(Problem { at, what })
}

/// Which quotes a token may bear.
#[derive(Clone, Copy)]
enum Quotes {
    Double,
    /// `/` and `|` too, so that an expression full of `"` stays legible.
    Any,
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Result<Self, Problem> {
        if text.len() > MAX_LEN {
            return problem(MAX_LEN, format!("longer than {MAX_LEN} bytes"));
        }
        Ok(Parser { text, at: 0 })
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    /// Takes characters for as long as they are `wanted`.
    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let len = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.at += len;
        rest.get(..len).unwrap_or_default()
    }

    fn skip_space(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn filter(mut self) -> Result<Vec<Selector>, Problem> {
        let mut selectors = Vec::new();
        if self.text.is_empty() {
            return Ok(selectors);
        }
        loop {
            if selectors.len() == MAX_SELECTORS {
                return problem(self.at, format!("more than {MAX_SELECTORS} selectors"));
            }
            selectors.push(self.selector()?);
            let at = self.at;
            match self.next() {
                None => return Ok(selectors),
                Some(',') => {}
                Some(c) => return problem(at, format!("expected a comma or the end, not {c:?}")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, Problem> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.at += 1;
            path.push(self.field()?);
        }
        let test = match self.peek() {
            None | Some(',') => Test::Present,
            Some(_) => self.test()?,
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, Problem> {
        self.skip_space();
        if self.peek() == Some('"') {
            return self.quoted('"');
        }
        match self.take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')) {
            "" => problem(self.at, "expected a field: a name, or one in double quotes"),
            name => Ok(name.to_owned()),
        }
    }

    fn test(&mut self) -> Result<Test, Problem> {
        self.skip_space();
        let at = self.at;
        match self.take_while(|c| matches!(c, '=' | '!' | '~')) {
            "==" => Ok(Test::Equal(self.value(Quotes::Double)?)),
            "!=" => Ok(Test::NotEqual(self.value(Quotes::Double)?)),
            "~=" => {
                self.skip_space();
                let at = self.at;
                let expression = self.value(Quotes::Any)?;
                RegexBuilder::new(&expression)
                    .size_limit(MAX_REGEX)
                    .nest_limit(MAX_REGEX_NESTING)
                    .build()
                    .map(Test::Matches)
                    .or_else(|e| problem(at, format!("bad regular expression ({e})")))
            }
            "" => problem(at, "expected an operator: ==, != or ~="),
            other => problem(at, format!("unknown operator {other}: use ==, != or ~=")),
        }
    }

    fn value(&mut self, quotes: Quotes) -> Result<String, Problem> {
        self.skip_space();
        let at = self.at;
        match (self.peek(), quotes) {
            (Some('"'), _) => self.quoted('"'),
            (Some(c @ ('/' | '|')), Quotes::Any) => self.quoted(c),
            (Some('/' | '|'), Quotes::Double) => {
                problem(at, "a value that begins with / or | must stand in double quotes")
            }
            (Some('.' | '=' | '!' | '~'), _) => {
                problem(at, "a value that begins with one of . = ! ~ must stand in double quotes")
            }
            _ => match self.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control()) {
                "" => problem(at, "expected a value"),
                value => Ok(value.to_owned()),
            },
        }
    }

    /// Reads from the opening `quote` to the closing one. Go's escapes stand for bytes, hence the
    /// buffer of bytes.
    fn quoted(&mut self, quote: char) -> Result<String, Problem> {
        let start = self.at;
        self.next();
        let mut bytes = Vec::new();
        loop {
            let at = self.at;
            match self.next() {
                Some(c) if c == quote => break,
                Some('\\') => self.escape(at, quote, &mut bytes)?,
                Some('\0') => return problem(at, "null character"),
                None | Some('\n') => return problem(start, format!("{quote} without its end")),
                Some(c) => push(&mut bytes, c),
            }
        }
        String::from_utf8(bytes).or_else(|_| problem(start, "the escapes do not give UTF-8"))
    }

    /// Reads what follows a backslash that stood `at`.
    fn escape(&mut self, at: usize, quote: char, bytes: &mut Vec<u8>) -> Result<(), Problem> {
        let byte = match self.next() {
            Some('a') => 0x07,
            Some('b') => 0x08,
            Some('t') => b'\t',
            Some('n') => b'\n',
            Some('v') => 0x0b,
            Some('f') => 0x0c,
            Some('r') => b'\r',
            Some('\\') => b'\\',
            Some(c) if c == quote => {
                push(bytes, c);
                return Ok(());
            }
            Some(c @ '0'..='7') => {
                self.at -= c.len_utf8();
                let value = self.digits(at, 8, 3)?;
                match u8::try_from(value) {
                    Ok(byte) => byte,
                    Err(_) => return problem(at, "an octal escape is at most \\377"),
                }
            }
            Some('x') => self.digits(at, 16, 2)? as u8,
            Some(c @ ('u' | 'U')) => {
                let value = self.digits(at, 16, if c == 'u' { 4 } else { 8 })?;
                match char::from_u32(value) {
                    Some(c) => push(bytes, c),
                    None => return problem(at, format!("no character has the number {value:#x}")),
                }
                return Ok(());
            }
            Some(_) | None => {
                return problem(at, "unknown escape: a backslash in quotes is written \\\\");
            }
        };
        bytes.push(byte);
        Ok(())
    }

    /// Reads exactly `count` digits, at most eight, of an escape that began `at`.
    fn digits(&mut self, at: usize, radix: u32, count: usize) -> Result<u32, Problem> {
        let mut value = 0u32;
        for _ in 0..count {
            match self.next().and_then(|c| c.to_digit(radix)) {
                Some(digit) => value = value.wrapping_mul(radix) | digit,
                None => return problem(at, format!("this escape takes {count} digits")),
            }
        }
        Ok(value)
    }
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A snapshot as containerd's own adaptor shows one.
    struct Snapshot;

    const LABELS: [(&str, &str); 4] =
        [("tier", "gold"), ("empty", ""), ("example.com/owner", "team-a"), ("odd\t\"|/é", "x,y z")];

    impl Fields for Snapshot {
        fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
            match path {
                ["name"] => Some("sha256:base/1".into()),
                ["parent"] => Some("".into()),
                ["kind"] => Some("active".into()),
                ["labels", key @ ..] => {
                    let key = key.join(".");
                    let (_, value) = LABELS.iter().find(|(k, _)| *k == key)?;
                    Some((*value).into())
                }
                _ => None,
            }
        }
    }

    fn holds(filter: &str) -> bool {
        Filter::parse(filter).unwrap().matches(&Snapshot)
    }

    fn refusal(filter: &str) -> String {
        let e = Filter::parse(filter).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{filter:?}");
        e.to_string()
    }

    #[test]
    fn each_operator_decides_as_containerd_does() {
        for (filter, expected) in [
            ("", true),
            ("name", true),
            ("parent", true),
            ("size", false),
            ("kind==active", true),
            ("kind==view", false),
            ("kind!=view", true),
            ("kind!=active", false),
            ("name==sha256:base/1", true),
            ("name~=^sha256:base/[0-9]$", true),
            (r"name~=\d$", true),
            ("name~=base", true),
            ("name~=^base", false),
            ("labels.tier", true),
            ("labels.tier==gold", true),
            ("labels.none", false),
            ("labels.empty", true),
            (r#"labels.empty=="""#, true),
            ("labels", false),
            // A missing field is never equal, always unequal, and matches as the empty string.
            (r#"labels.none=="""#, false),
            (r#"labels.none!="""#, true),
            ("labels.none!=x", true),
            ("labels.none~=^$", true),
            ("labels.none~=/./", false),
        ] {
            assert_eq!(holds(filter), expected, "{filter:?}");
        }
    }

    #[test]
    fn quotes_and_escapes_are_gos() {
        for filter in [
            r#"labels."example.com/owner"==team-a"#,
            r#""labels"."example"."com/owner"=="team-a""#,
            r#"labels."example.com/owner"~=/^team-\x61$/"#,
            r#"labels."example.com/owner"~=|^team-[a-c]$|"#,
            r#"labels."example.com/owner"~="^team""#,
            r#"labels."odd\t\"|/é"=="x,y z""#,
            r#"labels."odd\u0009\U00000022|/\xc3\251"~=/x,\\w z/"#,
            r#"name~=/base\/1/"#,
            r#"name~=|base/1|"#,
            r#"name!="\a\b\f\n\r\t\v\\""#,
            // Quotes in the middle of a bare value, and single ones, are characters.
            r#"name!=a"b/c|d"#,
            "name!='a'",
            "labels.tier!=é—ß",
        ] {
            assert!(holds(filter), "{filter:?}");
        }
    }

    #[test]
    fn white_space_may_stand_before_a_token() {
        assert!(holds(" kind == active, labels. tier\t~=\n gold"));
        assert!(refusal("kind==active ").contains("at byte 12"));
        assert!(refusal("kind==active ,name").contains("at byte 12"));
        assert!(refusal("labels .tier").contains("expected an operator"));
    }

    #[test]
    fn selectors_are_anded_and_filters_ored() {
        let all = |texts: &[&str]| -> Vec<Filter> {
            texts.iter().map(|t| Filter::parse(t).unwrap()).collect()
        };
        assert!(holds("kind==active,labels.tier==gold,name"));
        assert!(!holds("kind==active,labels.tier==tin,name"));
        assert!(Filter::any_matches(&[], &Snapshot));
        assert!(Filter::any_matches(&all(&["kind==view", "kind==active"]), &Snapshot));
        assert!(Filter::any_matches(&all(&["kind==view", ""]), &Snapshot));
        assert!(!Filter::any_matches(&all(&["kind==view", "size"]), &Snapshot));
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        for (filter, at, what) in [
            (" ", 1, "expected a field"),
            (",", 0, "expected a field"),
            ("name,", 5, "expected a field"),
            (".name", 0, "expected a field"),
            ("labels.", 7, "expected a field"),
            ("labels..a", 7, "expected a field"),
            ("naïve", 2, "expected an operator"),
            ("/name/==x", 0, "expected a field"),
            ("name ", 5, "expected an operator"),
            ("name x", 5, "expected an operator"),
            ("labels.\"a\"b", 10, "expected an operator"),
            ("name=x", 4, "unknown operator ="),
            ("name===x", 4, "unknown operator ==="),
            ("name==", 6, "expected a value"),
            ("name==,kind", 6, "expected a value"),
            ("name==\0", 6, "expected a value"),
            ("name==/x/", 6, "must stand in double quotes"),
            ("name==.x", 6, "must stand in double quotes"),
            ("name== =x", 7, "must stand in double quotes"),
            ("name==a b", 7, "expected a comma or the end"),
            ("name==\"a\"b", 9, "expected a comma or the end"),
            ("name==\"a", 6, "\" without its end"),
            ("name==\"a\n\"", 6, "\" without its end"),
            ("name~=/a", 6, "/ without its end"),
            ("name~=|a\\", 8, "unknown escape"),
            ("name==\"\0\"", 7, "null character"),
            (r#"name=="\.""#, 7, "unknown escape"),
            (r#"name=="\/""#, 7, "unknown escape"),
            (r#"name=="\x1""#, 7, "takes 2 digits"),
            (r#"name=="\08""#, 7, "takes 3 digits"),
            (r#"name=="\400""#, 7, "at most \\377"),
            (r#"name=="\ud800""#, 7, "no character"),
            (r#"name=="\UFFFFFFFF""#, 7, "no character"),
            (r#"name=="\xff""#, 6, "do not give UTF-8"),
            ("name~=(", 6, "bad regular expression"),
            ("kind,name~= /[/", 12, "bad regular expression"),
        ] {
            let message = refusal(filter);
            assert!(message.contains(what), "{filter:?}: {message}");
            assert!(message.ends_with(&format!("at byte {at}")), "{filter:?}: {message}");
        }
    }

    #[test]
    fn hostile_filters_are_refused_in_short_messages() {
        let nested = format!("name~={}{}", "(".repeat(2000), ")".repeat(2000));
        for filter in [
            "x".repeat(MAX_LEN + 1),
            "a,".repeat(MAX_SELECTORS) + "a",
            nested,
            "name~=((((x{100}){100}){100}){100}){100}".to_owned(),
            "name==\"".to_owned() + &"\\".repeat(MAX_LEN - 7),
            "\u{1f980}".repeat(2000),
        ] {
            let message = refusal(&filter);
            assert!(message.len() < 5000, "{} bytes", message.len());
        }
        // As many parts as fit are no harm: nothing recurses.
        assert!(!holds(&vec!["a"; MAX_LEN / 2].join(".")));
        assert!(holds(&vec!["name"; MAX_SELECTORS].join(",")));
    }

    #[test]
    fn keeps_its_text() {
        let text = r#"labels."a b"==c, kind~=/x/"#;
        let filter: Filter = text.parse().unwrap();
        assert_eq!(filter.to_string(), text);
        assert_eq!(format!("{filter:?}"), format!("Filter({text:?})"));
    }
}
