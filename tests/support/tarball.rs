//! Tar archives written field by field, so that odd ones can be.

/// An archive in the making.
#[derive(Clone, Default)]
pub struct Tarball(pub Vec<u8>);

pub const USTAR: &[u8; 8] = b"ustar\x0000";
pub const GNU: &[u8; 8] = b"ustar  \0";
pub const V7: &[u8; 8] = &[0; 8];

/// A header with its checksum: mode 0644, owner 1000:1001, a time in 2017.
pub fn header(
    magic: &[u8; 8],
    name: &[u8],
    typeflag: u8,
    size: u64,
    change: impl FnOnce(&mut [u8]),
) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name);
    block[100..107].copy_from_slice(b"0000644");
    block[108..115].copy_from_slice(b"0001750");
    block[116..123].copy_from_slice(b"0001751");
    block[124..136].copy_from_slice(&number(size.into(), 12));
    block[136..147].copy_from_slice(b"13156052000");
    block[156] = typeflag;
    block[257..265].copy_from_slice(magic);
    change(&mut block);
    sum(&mut block);
    block
}

/// A numeric field: octal digits and a NUL, or base-256 for what has too many.
pub fn number(value: i128, len: usize) -> Vec<u8> {
    let octal = format!("{value:0width$o}", width = len - 1);
    if value >= 0 && octal.len() < len {
        return [octal.as_bytes(), b"\0"].concat();
    }
    let bytes = value.to_be_bytes();
    let mut field = bytes[bytes.len() - len..].to_vec();
    field[0] = if value < 0 { 0xff } else { 0x80 };
    field
}

/// Makes a header's checksum right.
pub fn sum(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

/// Whether a block is a header, by its checksum.
pub fn is_header(block: &[u8]) -> bool {
    let mut again = block.to_vec();
    sum(&mut again);
    block.len() == 512 && block[148..154] == again[148..154]
}

/// PAX records, as the body of a header.
pub fn records(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let len = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
        body.extend_from_slice(format!("{len} {key}=").as_bytes());
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    body
}

impl Tarball {
    pub fn new() -> Self {
        Tarball::default()
    }

    /// Adds bytes as they are.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds a header.
    pub fn header(
        self,
        magic: &[u8; 8],
        name: &[u8],
        typeflag: u8,
        size: u64,
        change: impl FnOnce(&mut [u8]),
    ) -> Self {
        self.raw(&header(magic, name, typeflag, size, change))
    }

    /// Adds content, padded.
    pub fn content(mut self, content: &[u8]) -> Self {
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// Adds a regular ustar file.
    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.header(USTAR, name.as_bytes(), b'0', content.len() as u64, |_| {}).content(content)
    }

    /// Adds a ustar entry without content.
    pub fn entry(self, name: &str, typeflag: u8, link: &str) -> Self {
        self.header(USTAR, name.as_bytes(), typeflag, 0, |b| {
            b[157..157 + link.len()].copy_from_slice(link.as_bytes());
        })
    }

    /// Adds an extended header with a body.
    pub fn extended(self, magic: &[u8; 8], name: &str, typeflag: u8, body: &[u8]) -> Self {
        self.header(magic, name.as_bytes(), typeflag, body.len() as u64, |_| {}).content(body)
    }

    /// Adds a PAX header.
    pub fn pax(self, list: &[(&str, &[u8])]) -> Self {
        self.extended(USTAR, "PaxHeaders/x", b'x', &records(list))
    }

    /// Adds GNU's long name (`L`) or long link (`K`).
    pub fn long(self, typeflag: u8, name: &str) -> Self {
        let body = [name.as_bytes(), b"\0"].concat();
        self.extended(GNU, "././@LongLink", typeflag, &body)
    }

    /// Adds the trailer.
    pub fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).0
    }
}
