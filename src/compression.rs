//! How a layer's tar is compressed: told by its first bytes, never by a name or a media type.
//!
//! - [`Decompressor`] reads whatever it is given: plain, gzip or zstd. Several gzip members or zstd
//!   frames in a row are one stream, zstd's skippable frames are skipped. A stream that ends early
//!   is an error, as is anything after its end, but for zeros after gzip, which tools that pad their
//!   output leave there and gzip(1) ignores. Memory is bounded: zstd windows above 128 MiB are
//!   refused, as `zstd -d` refuses them.
//! - [`Compressor`] writes the same bytes for the same input: no time, no name, no host in it.
//!
//! Damage is [`ErrorKind::InvalidArchive`]; a failure of the reader below passes through untouched,
//! so that a blob with the wrong digest is not reported as a damaged stream.
//!
//! Sources: RFC 1952 section 2.2 (members), RFC 8878 section 3.1 (frames, skippable frames).

use std::fmt;
use std::io::{self, BufRead, BufReader, Chain, Cursor, Read, Write};
use std::str::FromStr;

use flate2::bufread::GzDecoder;
use flate2::write::GzEncoder;

use crate::error::{Error, ErrorKind, Result};

/// The largest zstd window that is accepted: 2^27 bytes, 128 MiB.
#[cfg(feature = "zstd")]
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// How many bytes [`sniff`] and [`refuse_foreign`] look at.
const PREFIX: usize = 10;

/// The unit in which compressed input is read, in bytes.
const BUFFER: usize = 128 * 1024;

/// How a layer's tar is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, which every tool reads.
    #[default]
    Gzip,
    /// zstd: smaller and several times faster. It needs the crate's feature `zstd`; without it its
    /// use gives [`ErrorKind::Unsupported`].
    Zstd,
}

impl Compression {
    /// The name by which options spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [Compression::None, Compression::Gzip, Compression::Zstd]
            .into_iter()
            .find(|compression| compression.as_str() == s)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidArgument,
                    format!("{s:?} is not a compression: use none, gzip or zstd"),
                )
            })
    }
}

/// What a stream that begins with `prefix` is compressed with; an empty one with nothing.
pub(crate) fn sniff(prefix: &[u8]) -> Compression {
    match prefix {
        // The third byte is the method: deflate is the only one there is.
        [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        // A skippable frame, which pzstd begins with.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

/// Says so where a stream is compressed with what Docker once accepted and nobody should now.
fn refuse_foreign(prefix: &[u8]) -> Result<()> {
    let name = match prefix {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "xz",
        // The block's magic too: a plain tar begins with a file name, which may well be "BZh9".
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59] => "bzip2",
        _ => return Ok(()),
    };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("compression {name} is not supported: recompress with gzip or zstd"),
    ))
}

#[cfg(not(feature = "zstd"))]
fn without_zstd() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "zstd is not supported by this build: enable the feature zstd of stratafs, or use gzip",
    )
}

/// An error of the reader below a decoder, marked so that it is told from the decoder's own.
#[derive(Debug)]
struct FromBelow(io::Error);

impl fmt::Display for FromBelow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl std::error::Error for FromBelow {}

/// Marks the errors of a reader as [`FromBelow`].
#[derive(Debug)]
struct Marking<R>(R);

impl<R: Read> Read for Marking<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            return match self.0.read(buf) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(|e| io::Error::other(FromBelow(e))),
            };
        }
    }
}

/// The reader's own error as it was, or one that says that the stream is damaged.
fn unmark(e: io::Error, compression: Compression) -> io::Error {
    let e = match e.downcast::<FromBelow>() {
        Ok(FromBelow(e)) => return e,
        Err(e) => e,
    };
    let message = if e.kind() == io::ErrorKind::UnexpectedEof {
        format!("the {compression} stream ends too early")
    } else {
        format!("the {compression} stream is damaged")
    };
    Error::new(ErrorKind::InvalidArchive, message).with_source(e).into()
}

type Input<R> = BufReader<Chain<Cursor<Vec<u8>>, Marking<R>>>;

/// Reads the uncompressed bytes of a stream that is plain, gzip or zstd.
pub(crate) struct Decompressor<R: Read>(Decoder<R>);

enum Decoder<R: Read> {
    None(Input<R>),
    Gzip(Members<Input<R>>),
    #[cfg(feature = "zstd")]
    Zstd(zstd::stream::read::Decoder<'static, Input<R>>),
}

impl<R: Read> Decompressor<R> {
    /// Reads the first bytes of `raw` and decides by them.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for xz and bzip2, and for zstd in a build without it; else what
    /// `raw` failed with.
    pub(crate) fn new(raw: R) -> Result<Self> {
        let mut raw = Marking(raw);
        let mut prefix = Vec::with_capacity(PREFIX);
        Read::by_ref(&mut raw)
            .take(PREFIX as u64)
            .read_to_end(&mut prefix)
            .map_err(|e| failed(unmark(e, Compression::None)))?;
        refuse_foreign(&prefix)?;
        let compression = sniff(&prefix);
        let input = BufReader::with_capacity(BUFFER, Cursor::new(prefix).chain(raw));
        Ok(Decompressor(match compression {
            Compression::None => Decoder::None(input),
            Compression::Gzip => Decoder::Gzip(Members::new(input)),
            #[cfg(feature = "zstd")]
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)
                    .map_err(|e| failed(unmark(e, Compression::Zstd)))?;
                decoder
                    .window_log_max(ZSTD_WINDOW_LOG_MAX)
                    .map_err(|e| failed(unmark(e, Compression::Zstd)))?;
                Decoder::Zstd(decoder)
            }
            #[cfg(not(feature = "zstd"))]
            Compression::Zstd => return Err(without_zstd()),
        }))
    }

    /// What the stream turned out to be.
    pub(crate) fn compression(&self) -> Compression {
        match &self.0 {
            Decoder::None(_) => Compression::None,
            Decoder::Gzip(_) => Compression::Gzip,
            #[cfg(feature = "zstd")]
            Decoder::Zstd(_) => Compression::Zstd,
        }
    }
}

/// An error of the stream as this crate's.
fn failed(e: io::Error) -> Error {
    e.downcast::<Error>().unwrap_or_else(|e| {
        Error::new(ErrorKind::Io, "cannot read the compressed stream").with_source(e)
    })
}

impl<R: Read> Read for Decompressor<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Decoder::None(input) => input.read(buf),
            Decoder::Gzip(members) => members.read(buf),
            #[cfg(feature = "zstd")]
            Decoder::Zstd(decoder) => decoder.read(buf),
        }
        .map_err(|e| unmark(e, self.compression()))
    }
}

impl<R: Read> fmt::Debug for Decompressor<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Decompressor").field(&self.compression()).finish()
    }
}

/// The members of a gzip file as one stream, with zeros after the last one allowed.
enum Members<B: BufRead> {
    In(Box<GzDecoder<B>>),
    /// After a member: another, padding, or the end.
    Between(B),
    /// Only while one state is exchanged for the next, and after damage.
    Spent,
}

impl<B: BufRead> Members<B> {
    fn new(input: B) -> Self {
        Members::In(Box::new(GzDecoder::new(input)))
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            match self {
                Members::In(member) => {
                    let n = member.read(buf)?;
                    if n > 0 {
                        return Ok(n);
                    }
                }
                Members::Between(input) => match input.fill_buf()? {
                    [] => return Ok(0),
                    [0, ..] => {
                        skip_zeros(input)?;
                        return Ok(0);
                    }
                    _ => {}
                },
                Members::Spent => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "damaged before here"));
                }
            }
            *self = match std::mem::replace(self, Members::Spent) {
                Members::In(member) => Members::Between(member.into_inner()),
                Members::Between(input) => Members::In(Box::new(GzDecoder::new(input))),
                Members::Spent => Members::Spent,
            };
        }
    }
}

/// Reads the zeros after the last member to the end of the input.
fn skip_zeros(input: &mut impl BufRead) -> io::Result<()> {
    loop {
        let available = input.fill_buf()?;
        if available.is_empty() {
            return Ok(());
        }
        if available.iter().any(|b| *b != 0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "there is something after its end that is not padding",
            ));
        }
        let n = available.len();
        input.consume(n);
    }
}

/// Compresses what is written to it; the output depends on the input alone.
pub(crate) struct Compressor<W: Write>(Encoder<W>);

enum Encoder<W: Write> {
    None(W),
    Gzip(Box<GzEncoder<W>>),
    #[cfg(feature = "zstd")]
    Zstd(zstd::stream::write::Encoder<'static, W>),
}

impl<W: Write> Compressor<W> {
    /// The fastest that this build has: zstd at its fastest, else gzip.
    ///
    /// # Errors
    /// Those of zstd's start.
    pub(crate) fn fastest(output: W) -> Result<Self> {
        #[cfg(feature = "zstd")]
        return Ok(Compressor(Encoder::Zstd(zstd_encoder(output, 1)?)));
        #[cfg(not(feature = "zstd"))]
        Compressor::new(output, Compression::Gzip)
    }

    /// # Errors
    /// [`ErrorKind::Unsupported`] for zstd in a build without it.
    pub(crate) fn new(output: W, compression: Compression) -> Result<Self> {
        Ok(Compressor(match compression {
            Compression::None => Encoder::None(output),
            // No name, time 0, system "unknown" (255): nothing of the host is in the header.
            Compression::Gzip => Encoder::Gzip(Box::new(
                flate2::GzBuilder::new()
                    .mtime(0)
                    .operating_system(255)
                    .write(output, flate2::Compression::default()),
            )),
            #[cfg(feature = "zstd")]
            // Level 0 is zstd's own default.
            Compression::Zstd => Encoder::Zstd(zstd_encoder(output, 0)?),
            #[cfg(not(feature = "zstd"))]
            Compression::Zstd => return Err(without_zstd()),
        }))
    }

    /// Writes the end of the stream, without which it is damaged, and gives the output back.
    pub(crate) fn finish(self) -> io::Result<W> {
        match self.0 {
            Encoder::None(mut output) => output.flush().map(|()| output),
            Encoder::Gzip(encoder) => encoder.finish(),
            #[cfg(feature = "zstd")]
            Encoder::Zstd(encoder) => encoder.finish(),
        }
    }
}

/// One thread: the output must not depend on how many.
#[cfg(feature = "zstd")]
fn zstd_encoder<W: Write>(
    output: W,
    level: i32,
) -> Result<zstd::stream::write::Encoder<'static, W>> {
    let start = || -> io::Result<_> {
        let mut encoder = zstd::stream::write::Encoder::new(output, level)?;
        encoder.include_checksum(true)?;
        Ok(encoder)
    };
    start().map_err(|e| Error::new(ErrorKind::Io, "cannot start zstd compression").with_source(e))
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Encoder::None(output) => output.write(buf),
            Encoder::Gzip(encoder) => encoder.write(buf),
            #[cfg(feature = "zstd")]
            Encoder::Zstd(encoder) => encoder.write(buf),
        }
    }

    /// Writes out what was compressed so far. It makes the output larger: not needed before
    /// [`finish`](Self::finish).
    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Encoder::None(output) => output.flush(),
            Encoder::Gzip(encoder) => encoder.flush(),
            #[cfg(feature = "zstd")]
            Encoder::Zstd(encoder) => encoder.flush(),
        }
    }
}

impl<W: Write> fmt::Debug for Compressor<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Encoder::None(_) => "Compressor(None)",
            Encoder::Gzip(_) => "Compressor(Gzip)",
            #[cfg(feature = "zstd")]
            Encoder::Zstd(_) => "Compressor(Zstd)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &[Compression] = &[
        Compression::None,
        Compression::Gzip,
        #[cfg(feature = "zstd")]
        Compression::Zstd,
    ];

    fn text(n: u32) -> Vec<u8> {
        (0..n).flat_map(|i| i.to_string().into_bytes()).collect()
    }

    fn compress(compression: Compression, bytes: &[u8]) -> Vec<u8> {
        let mut c = Compressor::new(Vec::new(), compression).unwrap();
        c.write_all(bytes).unwrap();
        c.finish().unwrap()
    }

    fn decompress(bytes: &[u8]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        Decompressor::new(bytes)?.read_to_end(&mut out).map_err(failed)?;
        Ok(out)
    }

    /// Hands out one byte a call, and fails at the end if told to.
    struct Trickle<'a>(&'a [u8], Option<ErrorKind>);

    impl Read for Trickle<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let (Some((first, rest)), Some(to)) = (self.0.split_first(), buf.first_mut()) else {
                return self.1.map_or(Ok(0), |kind| Err(Error::new(kind, "from below").into()));
            };
            (*to, self.0) = (*first, rest);
            Ok(1)
        }
    }

    #[test]
    fn what_is_compressed_comes_back_the_same() {
        let plain = text(50_000);
        for compression in ALL.iter().copied() {
            let packed = compress(compression, &plain);
            assert_eq!(packed, compress(compression, &plain), "deterministic");
            assert_eq!(Decompressor::new(&packed[..]).unwrap().compression(), compression);
            assert_eq!(decompress(&packed).unwrap(), plain);
            let mut out = Vec::new();
            Decompressor::new(Trickle(&packed, None)).unwrap().read_to_end(&mut out).unwrap();
            assert_eq!(out, plain, "in small reads");
            assert!(compression == Compression::None || packed.len() < plain.len());
        }
    }

    #[test]
    fn nothing_is_a_plain_stream_of_nothing() {
        let d = Decompressor::new(&b""[..]).unwrap();
        assert_eq!(d.compression(), Compression::None);
        assert_eq!(decompress(b"").unwrap(), b"");
        for compression in ALL.iter().copied() {
            assert_eq!(decompress(&compress(compression, b"")).unwrap(), b"");
        }
    }

    #[test]
    fn the_gzip_header_says_nothing_of_time_or_host() {
        let packed = compress(Compression::Gzip, b"x");
        assert_eq!(packed[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
    }

    #[test]
    fn concatenated_members_and_frames_are_one_stream() {
        for compression in ALL.iter().copied() {
            let mut packed = compress(compression, b"one ");
            packed.extend(compress(compression, b""));
            packed.extend(compress(compression, b"two"));
            assert_eq!(decompress(&packed).unwrap(), b"one two", "{compression}");
        }
    }

    #[test]
    fn a_stream_cut_anywhere_is_an_error() {
        let plain = text(300);
        for compression in ALL.iter().copied().filter(|c| *c != Compression::None) {
            let packed = compress(compression, &plain);
            // Below 4 bytes there is no telling what it is.
            for end in 4..packed.len() {
                let e = decompress(&packed[..end]).unwrap_err();
                assert_eq!(e.kind(), ErrorKind::InvalidArchive, "{compression} {end}");
            }
            let mut second = packed.clone();
            second.extend(&packed[..packed.len() - 1]);
            assert!(decompress(&second).is_err(), "{compression}");
        }
    }

    #[test]
    fn a_changed_byte_is_an_error_or_changes_nothing() {
        let plain = text(300);
        for compression in ALL.iter().copied().filter(|c| *c != Compression::None) {
            let packed = compress(compression, &plain);
            for at in 4..packed.len() {
                let mut damaged = packed.clone();
                damaged[at] ^= 0x10;
                if let Ok(out) = decompress(&damaged) {
                    assert_eq!(out, plain, "{compression} {at}");
                }
            }
        }
    }

    #[test]
    fn only_zeros_may_follow_a_gzip_stream() {
        let mut packed = compress(Compression::Gzip, b"x");
        packed.extend([0; 700]);
        assert_eq!(decompress(&packed).unwrap(), b"x");
        packed.push(1);
        let mut d = Decompressor::new(&packed[..]).unwrap();
        let mut out = Vec::new();
        assert!(d.read_to_end(&mut out).is_err());
        assert!(d.read(&mut [0; 8]).is_err(), "and stays so");
        let mut packed = compress(Compression::Gzip, b"x");
        packed.extend(b"trailing");
        assert_eq!(decompress(&packed).unwrap_err().kind(), ErrorKind::InvalidArchive);
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn zstd_skips_skippable_frames_and_refuses_what_else_follows() {
        let skippable = [0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        let mut packed = skippable.to_vec();
        packed.extend(compress(Compression::Zstd, b"x"));
        packed.extend(skippable);
        assert_eq!(decompress(&packed).unwrap(), b"x");
        packed.push(0);
        assert_eq!(decompress(&packed).unwrap_err().kind(), ErrorKind::InvalidArchive);
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn zstd_windows_above_the_bound_are_refused() {
        // Magic; no single segment, no size; window log 10 + (18 << 3 >> 3) = 28; an empty raw block.
        let frame = |log: u8| [0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3, 1, 0, 0];
        assert_eq!(decompress(&frame(27)).unwrap(), b"");
        let e = decompress(&frame(28)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArchive);
    }

    #[test]
    fn xz_and_bzip2_are_named() {
        for (bytes, name) in [(&b"\xfd7zXZ\0\0\x04\xe6\xd6"[..], "xz"), (b"BZh91AY&SY\0", "bzip2")]
        {
            let e = Decompressor::new(bytes).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            assert!(e.to_string().contains(name), "{e}");
        }
        assert_eq!(decompress(b"BZh9 is a file").unwrap(), b"BZh9 is a file");
    }

    #[test]
    fn a_failure_below_is_not_called_damage() {
        for compression in ALL.iter().copied() {
            let packed = compress(compression, &text(100));
            let cut = &packed[..packed.len() - 1];
            let below = Trickle(cut, Some(ErrorKind::DigestMismatch));
            let mut d = Decompressor::new(below).unwrap();
            let e = failed(d.read_to_end(&mut Vec::new()).unwrap_err());
            assert_eq!(e.kind(), ErrorKind::DigestMismatch, "{compression}");
        }
        let e = Decompressor::new(Trickle(b"", Some(ErrorKind::NoSpace))).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSpace);
    }

    #[test]
    fn names_read_back() {
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            assert_eq!(compression.to_string().parse::<Compression>().unwrap(), compression);
        }
        assert!("lz4".parse::<Compression>().is_err());
    }
}
