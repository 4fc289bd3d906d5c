//! Length-prefixed postcard frames over any byte stream.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

/// Largest body of a frame, in bytes. A start request with Linux's largest environment fits.
pub const MAX_FRAME: u32 = 4 << 20;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed, or ended inside a frame.
    #[error("connection to the agent: {0}")]
    Io(#[from] io::Error),
    /// The peer announces more than [`MAX_FRAME`] bytes.
    #[error("frame of {0} bytes announced, at most {MAX_FRAME} are allowed")]
    TooLarge(u64),
    /// The body is not what was expected.
    #[error("frame does not decode: {0}")]
    Malformed(postcard::Error),
}

/// Reads one frame; `None` where the peer closed before a new one began.
///
/// Memory is taken as bytes arrive, never on the peer's word alone.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut length = [0; 4];
    let mut have = 0;
    while have < length.len() {
        match from.read(&mut length[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => have += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_FRAME {
        return Err(FrameError::TooLarge(length.into()));
    }
    let mut body = Vec::new();
    from.by_ref().take(length.into()).read_to_end(&mut body)?;
    if body.len() != length as usize {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    postcard::from_bytes(&body).map(Some).map_err(FrameError::Malformed)
}

/// Writes one frame with a single write.
pub fn write_frame<T: Serialize>(to: &mut impl Write, value: &T) -> Result<(), FrameError> {
    let body = postcard::to_allocvec(value).map_err(FrameError::Malformed)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|length| *length <= MAX_FRAME)
        .ok_or(FrameError::TooLarge(body.len() as u64))?;
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    to.write_all(&frame)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Hello, Purpose, Stream, VERSION};

    fn hello() -> Hello {
        let purpose = Purpose::Stream { process: 7, stream: Stream::Stderr };
        Hello { version: VERSION, purpose }
    }

    #[test]
    fn a_frame_survives_the_round_trip_and_the_end_is_told_from_a_cut() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &hello()).unwrap();
        let mut from = wire.as_slice();
        assert_eq!(read_frame(&mut from).unwrap(), Some(hello()));
        assert_eq!(read_frame::<Hello>(&mut from).unwrap(), None);
        for cut in 1..wire.len() {
            let error = read_frame::<Hello>(&mut &wire[..cut]).unwrap_err();
            assert!(matches!(error, FrameError::Io(_)), "cut at {cut}: {error}");
        }
    }

    /// docs/hostile.md 15: a frame of 4 GiB announced.
    #[test]
    fn hostile_15_an_announced_giant_is_refused_before_memory_is_taken() {
        let mut wire = u32::MAX.to_le_bytes().to_vec();
        wire.extend_from_slice(&[0; 64]);
        let error = read_frame::<Hello>(&mut wire.as_slice()).unwrap_err();
        assert!(matches!(error, FrameError::TooLarge(4_294_967_295)));
    }

    /// docs/hostile.md 15: replies of any content.
    #[test]
    fn hostile_15_garbage_is_an_error() {
        for byte in 0..=255u8 {
            let mut wire = 16u32.to_le_bytes().to_vec();
            wire.extend_from_slice(&[byte; 16]);
            // Some garbage decodes; what matters is that none of it panics.
            let _ = read_frame::<crate::Message>(&mut wire.as_slice());
            let _ = read_frame::<crate::Request>(&mut wire.as_slice());
        }
    }
}
