//! Reads a layer's tar stream out of its blob: unpacks, bounds and checks it.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, Hasher};
use crate::document::Compression;

/// Bounds on what a compressed blob may unpack to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnpackLimits {
    /// Bytes a blob may unpack to.
    pub bytes: u64,
    /// How many times its size a blob may unpack to, once it is past `ratio_from`. gzip cannot pass
    /// about 1032; a Zstandard frame of a few bytes can announce anything.
    pub ratio: u64,
    /// Bytes up to which the ratio is not looked at.
    pub ratio_from: u64,
}

impl Default for UnpackLimits {
    fn default() -> UnpackLimits {
        UnpackLimits { bytes: 64 << 30, ratio: 1100, ratio_from: 1 << 30 }
    }
}

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The blob could not be read.
    #[error("layer {layer}: cannot read its blob: {error}")]
    Read {
        /// The blob's digest.
        layer: Digest,
        /// What the system said.
        error: io::Error,
    },
    /// The compressed stream is damaged, cut off or followed by something else.
    #[error("layer {layer}: its {compression:?} stream is damaged or cut off: {error}")]
    Damaged {
        /// The blob's digest.
        layer: Digest,
        /// How it is packed.
        compression: Compression,
        /// What the unpacker said.
        error: io::Error,
    },
    /// Packed otherwise than its media type says.
    #[error("layer {layer} is packed as {found:?}, its media type says {expected:?}")]
    Compression {
        /// The blob's digest.
        layer: Digest,
        /// By its first bytes.
        found: Compression,
        /// By its media type.
        expected: Compression,
    },
    /// More than [`UnpackLimits`] allow.
    #[error(
        "layer {layer} of {packed} bytes unpacks to more than {limit} bytes; it is refused as a bomb"
    )]
    Bomb {
        /// The blob's digest.
        layer: Digest,
        /// Its bytes.
        packed: u64,
        /// How many it may unpack to.
        limit: u64,
    },
    /// Not the stream that the configuration names.
    #[error("layer {layer} unpacks to {found}, the image's configuration says {expected}")]
    DiffId {
        /// The blob's digest.
        layer: Digest,
        /// The digest of the stream.
        found: Digest,
        /// The diff id.
        expected: Digest,
    },
    /// Any of these, in the words of the process that found it.
    #[error("{0}")]
    Reported(String),
}

/// What became of a [`Layer`], kept apart because readers in between lose an error's type.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// The stream was read to its end and had the right digest.
    pub complete: bool,
    /// Why it failed.
    pub error: Option<LayerError>,
}

/// A shared view on an [`Outcome`].
pub(crate) type Shared = Arc<Mutex<Outcome>>;

/// A layer's tar stream. The blob is first read when the stream is; the digest is checked at the end.
pub(crate) struct Layer<'a> {
    digest: Digest,
    diff_id: Digest,
    expected: Compression,
    limits: UnpackLimits,
    state: State,
    outcome: Shared,
    /// Told the bytes of the blob read so far.
    progress: Box<dyn FnMut(u64) + 'a>,
}

enum State {
    Closed(File),
    Open(Box<Stream>),
    Done,
}

struct Stream {
    unpacker: Unpacker,
    compression: Compression,
    packed: u64,
    out: u64,
    hasher: Hasher,
    reported: u64,
}

/// Counts the bytes taken from the blob, and remembers an error of the file itself.
struct Counted {
    file: File,
    count: u64,
    failed: Option<io::Error>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.file.read(buf) {
            Ok(read) => {
                self.count += read as u64;
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                self.failed = Some(io::Error::from(error.kind()));
                Err(error)
            }
        }
    }
}

type Packed = BufReader<Counted>;

enum Unpacker {
    None(Packed),
    Gzip(Box<flate2::bufread::MultiGzDecoder<Packed>>),
    Zstd(zstd::stream::read::Decoder<'static, Packed>),
}

impl Unpacker {
    fn new(compression: Compression, blob: Packed) -> io::Result<Unpacker> {
        Ok(match compression {
            Compression::None => Unpacker::None(blob),
            Compression::Gzip => {
                Unpacker::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(blob)))
            }
            // A window above 128 MiB is refused by the library.
            Compression::Zstd => Unpacker::Zstd(zstd::stream::read::Decoder::with_buffer(blob)?),
        })
    }

    fn blob(&mut self) -> &mut Counted {
        match self {
            Unpacker::None(blob) => blob.get_mut(),
            Unpacker::Gzip(gzip) => gzip.get_mut().get_mut(),
            Unpacker::Zstd(zstd) => zstd.get_mut().get_mut(),
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Unpacker::None(blob) => blob.read(buf),
            Unpacker::Gzip(gzip) => gzip.read(buf),
            Unpacker::Zstd(zstd) => zstd.read(buf),
        }
    }
}

impl<'a> Layer<'a> {
    /// The stream of the blob `digest` in `file`, which must unpack to `diff_id`.
    pub(crate) fn new(
        digest: Digest,
        diff_id: Digest,
        file: File,
        expected: Compression,
        limits: UnpackLimits,
        progress: Box<dyn FnMut(u64) + 'a>,
    ) -> (Layer<'a>, Shared) {
        let outcome = Shared::default();
        let shared = outcome.clone();
        let state = State::Closed(file);
        (Layer { digest, diff_id, expected, limits, state, outcome, progress }, shared)
    }

    fn open(&self, mut file: File) -> Result<Stream, LayerError> {
        let layer = self.digest;
        let read = |error| LayerError::Read { layer, error };
        let packed = file.metadata().map_err(read)?.len();
        let compression = sniff(&mut file).map_err(read)?;
        if compression != self.expected {
            let (found, expected) = (compression, self.expected);
            return Err(LayerError::Compression { layer, found, expected });
        }
        let blob = BufReader::with_capacity(1 << 18, Counted { file, count: 0, failed: None });
        let unpacker = Unpacker::new(compression, blob).map_err(read)?;
        let hasher = Hasher::default();
        Ok(Stream { unpacker, compression, packed, out: 0, hasher, reported: 0 })
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<usize, LayerError> {
        if buf.is_empty() {
            return Ok(0);
        }
        if let State::Closed(_) = self.state
            && let State::Closed(file) = std::mem::replace(&mut self.state, State::Done)
        {
            (self.progress)(0);
            self.state = State::Open(Box::new(self.open(file)?));
        }
        let State::Open(stream) = &mut self.state else { return Ok(0) };
        let layer = self.digest;
        let read = loop {
            match stream.unpacker.read(buf) {
                Ok(read) => break read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(match stream.unpacker.blob().failed.take() {
                        Some(error) => LayerError::Read { layer, error },
                        None => {
                            let compression = stream.compression;
                            LayerError::Damaged { layer, compression, error }
                        }
                    });
                }
            }
        };
        stream.hasher.update(buf.get(..read).unwrap_or_default());
        stream.out = stream.out.saturating_add(read as u64);
        let limit = limit(&self.limits, stream.packed);
        if stream.out > limit {
            return Err(LayerError::Bomb { layer, packed: stream.packed, limit });
        }
        let count = stream.unpacker.blob().count;
        if read == 0 || count - stream.reported >= 1 << 20 {
            stream.reported = count;
            (self.progress)(count);
        }
        if read == 0 {
            let found = stream.hasher.clone().finish();
            if found != self.diff_id {
                return Err(LayerError::DiffId { layer, found, expected: self.diff_id });
            }
            self.state = State::Done;
            if let Ok(mut outcome) = self.outcome.lock() {
                outcome.complete = true;
            }
        }
        Ok(read)
    }
}

impl Read for Layer<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.fill(buf).map_err(|error| {
            let shown = io::Error::other(error.to_string());
            self.state = State::Done;
            if let Ok(mut outcome) = self.outcome.lock() {
                outcome.error = Some(error);
            }
            shown
        })
    }
}

fn limit(limits: &UnpackLimits, packed: u64) -> u64 {
    limits.bytes.min(packed.saturating_mul(limits.ratio).max(limits.ratio_from))
}

/// How a file is packed, by its first bytes; leaves it at its start.
fn sniff(file: &mut File) -> io::Result<Compression> {
    use std::os::unix::fs::FileExt;
    let mut start = [0u8; 4];
    let mut have = 0;
    while let Some(rest) = start.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, have as u64) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Compression::of(start.get(..have).unwrap_or_default()))
}

/// Unpacks a whole archive file (a `docker save` piped through gzip or zstd) into `output`, within
/// `limits`; the file itself if it is not packed, and nothing was written.
pub(crate) fn unpack_archive(
    path: &Path,
    mut file: File,
    output: &mut dyn io::Write,
    limits: &UnpackLimits,
) -> io::Result<Option<File>> {
    let compression = sniff(&mut file)?;
    if compression == Compression::None {
        return Ok(Some(file));
    }
    let packed = file.metadata()?.len();
    let limit = limit(limits, packed);
    let blob = BufReader::with_capacity(1 << 18, Counted { file, count: 0, failed: None });
    let mut unpacker = Unpacker::new(compression, blob)?;
    let mut buffer = vec![0u8; 1 << 17];
    let mut out = 0u64;
    loop {
        let read = match unpacker.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        out = out.saturating_add(read as u64);
        if out > limit {
            let path = path.display();
            return Err(io::Error::other(format!(
                "{path} of {packed} bytes unpacks to more than {limit} bytes; it is refused as a bomb"
            )));
        }
        output.write_all(buffer.get(..read).unwrap_or_default())?;
    }
}
