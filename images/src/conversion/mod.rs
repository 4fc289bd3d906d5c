//! What reads the bytes of layers and archives, which strangers made: unpacking, tar, EROFS. It is
//! a function of descriptors, so that it can run in a process that has nothing else.
//!
//! A [`Converter`] carries out a [`Task`]. [`InProcess`] does it here; the engine has one that does
//! it in a process which can open no file, see no other process and reach no network. What such a
//! process says is no more to be trusted than the image: [`wire`] bounds what is said, and the store
//! checks it.
//!
//! Diff ids are digests of unpacked bytes, so they are compared by whoever unpacks. A process that a
//! layer has taken over can say that they are right. So a root device is named by the digests of the
//! *blobs* too, which were compared where they were downloaded or copied, outside of that process:
//! a malicious image can have a malicious root device made of itself, but not of another one.

#[cfg(test)]
mod tests;
mod wire;

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use crate::archive::{self, ArchiveError, Place};
use crate::digest::Digest;
use crate::document::Compression;
use crate::layer::{Layer, LayerError, Shared, UnpackLimits};
use crate::rootfs::{self, ConvertError, LayerStream};

pub use wire::{ask, first_word, refuse, serve};

/// What a converter is to do with the files that it is handed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Task {
    /// Merge layers, whose blobs are the inputs, into one EROFS file, the output.
    RootDevice {
        /// The layers, lowest first.
        layers: Vec<LayerTask>,
        /// Bounds on what a layer unpacks to.
        unpack: UnpackLimits,
        /// Bounds on what is in the layers.
        tree: rootfs::Limits,
    },
    /// Say where in an archive, the only input, which file is. What is packed is unpacked to the
    /// output first, and the places are places in that.
    Archive {
        /// Its name for messages.
        name: String,
        /// Bounds on what it unpacks to.
        unpack: UnpackLimits,
    },
}

impl Task {
    /// Bytes that the output may have.
    pub fn output_limit(&self) -> u64 {
        match self {
            Task::RootDevice { tree, .. } => tree.output(),
            Task::Archive { unpack, .. } => unpack.bytes,
        }
    }
}

/// A layer of a [`Task`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerTask {
    /// Of the blob. It names the layer in messages and in the volume's UUID.
    pub digest: Digest,
    /// Of the tar stream in it.
    pub diff_id: Digest,
    /// How it is packed.
    pub compression: Compression,
}

/// What a converter says on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// So many bytes of the blob of this layer, counted from 0, have been read.
    Progress {
        /// Which layer.
        layer: u32,
        /// Bytes.
        done: u64,
    },
    /// The root device is complete and has so many bytes.
    RootDevice(u64),
    /// Whether the archive was packed, so that the places to come are in the output.
    Packed(bool),
    /// An entry of the archive.
    Entry(String, Place),
}

/// Why a task was not carried out.
#[derive(Debug)]
pub enum ConversionError {
    /// A layer's blob.
    Layer(LayerError),
    /// A layer's entries, or the output.
    Convert(ConvertError),
    /// An archive.
    Archive(ArchiveError),
    /// The process that was to do it: what became of it, for a user.
    Process(String),
}

/// Carries out tasks.
pub trait Converter: fmt::Debug + Send + Sync {
    /// Does it, and tells what there is to tell. On `Ok` all of it has been told, and nobody writes
    /// to the output any more. What was told is to be checked by the caller: who told it may have
    /// been taken over by the input.
    fn run(
        &self,
        task: &Task,
        inputs: Vec<File>,
        output: &File,
        tell: &mut dyn FnMut(Message),
    ) -> Result<(), ConversionError>;
}

/// Carries tasks out in the process of the caller, with all that it may do.
#[derive(Debug, Clone, Copy, Default)]
pub struct InProcess;

impl Converter for InProcess {
    fn run(
        &self,
        task: &Task,
        inputs: Vec<File>,
        output: &File,
        tell: &mut dyn FnMut(Message),
    ) -> Result<(), ConversionError> {
        let write = |error| ConversionError::Convert(ConvertError::Write(error));
        perform(task, inputs, output.try_clone().map_err(write)?, tell)
    }
}

/// Carries out a task. To be used where nothing else is at stake, or nothing else than this.
pub fn perform(
    task: &Task,
    inputs: Vec<File>,
    output: File,
    tell: &mut dyn FnMut(Message),
) -> Result<(), ConversionError> {
    match task {
        Task::RootDevice { layers, unpack, tree } => {
            root_device(layers, unpack, tree, inputs, output, tell)
        }
        Task::Archive { name, unpack } => {
            let path = name.as_ref();
            let [input] = <[File; 1]>::try_from(inputs).map_err(|_| senseless("inputs"))?;
            archive::scan(path, input, output, unpack, tell).map_err(ConversionError::Archive)
        }
    }
}

fn senseless(what: &str) -> ConversionError {
    ConversionError::Process(format!("the converter was handed the wrong {what}"))
}

fn root_device(
    layers: &[LayerTask],
    unpack: &UnpackLimits,
    tree: &rootfs::Limits,
    inputs: Vec<File>,
    output: File,
    tell: &mut dyn FnMut(Message),
) -> Result<(), ConversionError> {
    if inputs.len() != layers.len() {
        return Err(senseless("inputs"));
    }
    let tell = Rc::new(RefCell::new(tell));
    let mut outcomes: Vec<Shared> = Vec::new();
    let mut streams = Vec::new();
    for ((number, layer), file) in (0..).zip(layers).zip(inputs) {
        let tell = tell.clone();
        let progress = move |done| (tell.borrow_mut())(Message::Progress { layer: number, done });
        let (digest, packed) = (layer.digest, layer.compression);
        let (reader, outcome) =
            Layer::new(digest, layer.diff_id, file, packed, unpack.clone(), Box::new(progress));
        outcomes.push(outcome);
        let reader = Box::new(reader);
        streams.push(LayerStream { digest: digest.to_string(), reader });
    }
    let result = rootfs::convert(&mut streams, output, tree);
    drop(streams);
    // The layer's own error says more than the tar reader's.
    let failed = outcomes.iter().find_map(|o| o.lock().ok().and_then(|mut o| o.error.take()));
    if let Some(error) = failed {
        return Err(ConversionError::Layer(error));
    }
    let summary = result.map_err(ConversionError::Convert)?;
    let unread = outcomes
        .iter()
        .zip(layers)
        .find(|(outcome, _)| !outcome.lock().is_ok_and(|outcome| outcome.complete));
    if let Some((_, layer)) = unread {
        // The converter promises to read every byte; without that nothing was checked.
        let error = io::Error::other("the layer was not read to its end");
        let layer = layer.digest.to_string();
        let error = ConvertError::Read { layer, after: String::new(), error };
        return Err(ConversionError::Convert(error));
    }
    (tell.borrow_mut())(Message::RootDevice(summary.size));
    Ok(())
}
