//! What a converter in another process is told, and what it says: frames of a length (32 bits,
//! little endian) and a postcard encoding. Whoever reads bounds the length.

use std::fs::File;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{ConversionError, Message, Task, perform};
use crate::archive::ArchiveError;
use crate::error::one_line;
use crate::layer::LayerError;
use crate::rootfs::ConvertError;

/// Bytes of a frame. The largest are an entry of an archive, whose name and target are at most as
/// long as its headers may be (1 MiB), each byte of which may have become a character of three.
const FRAME_MAX: u32 = 8 << 20;

/// What a converter says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Frame {
    /// Something on the way.
    Message(Message),
    /// The task is done.
    Done,
    /// The task cannot be done.
    Failed(Failure),
}

/// A [`ConversionError`] in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Failure {
    /// A layer's blob.
    Layer(String),
    /// A layer's entries.
    Convert(String),
    /// The output, with the system's number for the error where there is one.
    Write(Option<i32>, String),
    /// An archive.
    Archive(String),
    /// The process itself.
    Process(String),
}

impl Failure {
    fn of(error: &ConversionError) -> Failure {
        match error {
            ConversionError::Layer(error) => Failure::Layer(one_line(error)),
            ConversionError::Convert(ConvertError::Write(error)) => {
                Failure::Write(error.raw_os_error(), one_line(error))
            }
            ConversionError::Convert(error) => Failure::Convert(one_line(error)),
            ConversionError::Archive(error) => Failure::Archive(one_line(error)),
            ConversionError::Process(text) => Failure::Process(one_line(text)),
        }
    }
}

impl From<Failure> for ConversionError {
    /// As one line that cannot steer a terminal, whoever wrote it.
    fn from(failure: Failure) -> ConversionError {
        match failure {
            Failure::Layer(text) => ConversionError::Layer(LayerError::Reported(one_line(&text))),
            Failure::Convert(text) => {
                ConversionError::Convert(ConvertError::Reported(one_line(&text)))
            }
            Failure::Write(number, text) => {
                let error = match number {
                    Some(number) => io::Error::from_raw_os_error(number),
                    None => io::Error::other(one_line(&text)),
                };
                ConversionError::Convert(ConvertError::Write(error))
            }
            Failure::Archive(text) => {
                ConversionError::Archive(ArchiveError::Reported(one_line(&text)))
            }
            Failure::Process(text) => ConversionError::Process(one_line(&text)),
        }
    }
}

/// Why there is no further frame.
#[derive(Debug, thiserror::Error)]
enum FrameError {
    /// The other side has ended, or cannot be read from.
    #[error("it ended without a result")]
    Ended,
    /// Not a frame.
    #[error("what it said makes no sense")]
    Senseless,
}

fn write<T: Serialize>(to: &mut dyn Write, value: &T) -> io::Result<()> {
    let bytes = postcard::to_allocvec(value).map_err(io::Error::other)?;
    let length = u32::try_from(bytes.len()).ok().filter(|length| *length <= FRAME_MAX);
    let length = length.ok_or_else(|| io::Error::other("a frame is too long"))?;
    let frame = [&length.to_le_bytes()[..], &bytes].concat();
    to.write_all(&frame)?;
    to.flush()
}

fn read<T: DeserializeOwned>(from: &mut dyn Read) -> Result<T, FrameError> {
    let mut length = [0; 4];
    from.read_exact(&mut length).map_err(|_| FrameError::Ended)?;
    let length = u32::from_le_bytes(length);
    if length > FRAME_MAX {
        return Err(FrameError::Senseless);
    }
    let mut bytes = Vec::new();
    let read = from.take(u64::from(length)).read_to_end(&mut bytes);
    if read.map_err(|_| FrameError::Ended)? as u64 != u64::from(length) {
        return Err(FrameError::Ended);
    }
    match postcard::take_from_bytes(&bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(FrameError::Senseless),
    }
}

/// Has the converter at the other end of two pipes do a task; the other side of [`serve`]. Without
/// an error in `Err` it ended and did not say why.
pub fn ask(
    mut tasks: impl Write,
    said: &mut dyn Read,
    task: &Task,
    tell: &mut dyn FnMut(Message),
) -> Result<(), Option<ConversionError>> {
    // One that does not take its task has something to say, or has ended.
    let _ = write(&mut tasks, task);
    drop(tasks);
    loop {
        match read(said) {
            Ok(Frame::Message(message)) => tell(message),
            Ok(Frame::Done) => return Ok(()),
            Ok(Frame::Failed(failure)) => return Err(Some(failure.into())),
            Err(FrameError::Ended) => return Err(None),
            Err(error @ FrameError::Senseless) => {
                return Err(Some(ConversionError::Process(error.to_string())));
            }
        }
    }
}

/// What a converter says that has ended before it could have been given a task, if anything.
pub fn first_word(said: &mut dyn Read) -> Option<ConversionError> {
    match read(said) {
        Ok(Frame::Failed(failure)) => Some(failure.into()),
        _ => None,
    }
}

/// Says that the process cannot do its task, whatever it is.
pub fn refuse(to: &mut dyn Write, why: String) -> io::Result<()> {
    write(to, &Frame::Failed(Failure::Process(why)))
}

/// A converter's whole life: reads its task from `from`, does it with the files, and says to `to`
/// what there is to say.
pub fn serve(
    from: &mut dyn Read,
    to: &mut dyn Write,
    inputs: Vec<File>,
    output: File,
) -> io::Result<()> {
    let task = read::<Task>(from).map_err(io::Error::other)?;
    let mut broken = None;
    // Where nobody listens any more the task has no use; the rest of it is not worth an exit in the
    // middle, since whoever listened ends this process with itself.
    let mut tell = |message| broken = write(to, &Frame::Message(message)).err().or(broken.take());
    let result = perform(&task, inputs, output, &mut tell);
    if let Some(error) = broken {
        return Err(error);
    }
    write(to, &result.map_or_else(|error| Frame::Failed(Failure::of(&error)), |()| Frame::Done))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_are_read_as_they_are_written() {
        let frames = [
            Frame::Message(Message::Progress { layer: 3, done: 1 << 40 }),
            Frame::Message(Message::Entry("a/b".into(), crate::archive::Place::Link("c".into()))),
            Frame::Failed(Failure::Write(Some(28), "x".into())),
            Frame::Done,
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            write(&mut bytes, frame).unwrap();
        }
        let mut from = bytes.as_slice();
        for frame in frames {
            assert_eq!(read::<Frame>(&mut from).unwrap(), frame);
        }
        assert!(matches!(read::<Frame>(&mut from), Err(FrameError::Ended)));
    }

    #[test]
    fn what_a_process_says_is_bounded_and_printable() {
        let long = u32::MAX.to_le_bytes();
        assert!(matches!(read::<Frame>(&mut &long[..]), Err(FrameError::Senseless)));
        let text = "\x1b[2J\n".repeat(1000);
        let mut bytes = Vec::new();
        write(&mut bytes, &Frame::Failed(Failure::Layer(text))).unwrap();
        let Frame::Failed(failure) = read::<Frame>(&mut bytes.as_slice()).unwrap() else {
            panic!()
        };
        let ConversionError::Layer(error) = failure.into() else { panic!() };
        let text = error.to_string();
        assert!(text.len() <= 1000 && !text.contains(['\x1b', '\n']), "{text}");
    }

    proptest! {
        #[test]
        fn nothing_that_is_said_breaks_the_listener(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut frame = (bytes.len() as u32).to_le_bytes().to_vec();
            frame.extend(bytes);
            let _ = read::<Frame>(&mut frame.as_slice());
        }
    }
}
