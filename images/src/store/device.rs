//! An image's root device: its layers merged into one EROFS file.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::Store;
use super::lock::Mode;
use super::work::Work;
use crate::conversion::{ConversionError, LayerTask, Message, Task};
use crate::digest::Digest;
use crate::erofs;
use crate::error::Error;
use crate::image::Image;
use crate::progress::{Progress, Step};

/// Part of the file's name, raised when the same layers make another image.
const FORMAT: u32 = 2;

/// The name of the root device with this id.
pub(super) fn device_name(id: &Digest) -> String {
    format!("{}.v{FORMAT}.erofs", id.hex())
}

impl Store {
    /// The EROFS file of `image`, made if it is not there. Readable by anybody, writable by nobody.
    /// It stays for as long as the image does: hold the image while the file is used.
    ///
    /// # Errors
    /// Also an image that the signature policy does not accept, however it got into the store.
    pub fn root_device(&self, image: &Image, progress: &dyn Progress) -> Result<PathBuf, Error> {
        self.admit_image(image)?;
        let id = image.device_id();
        let path = self.root.join("erofs").join(device_name(&id));
        if fs::metadata(&path).is_ok_and(|m| m.is_file()) {
            return Ok(path);
        }
        let _lease = self.hold(image)?;
        let lock = self.root.join("locks").join(format!("{}.device", id.hex()));
        let lock = self.lock(&lock, Mode::Exclusive)?;
        if !fs::metadata(&path).is_ok_and(|m| m.is_file()) {
            self.convert(image, &path, progress)?;
        }
        drop(lock);
        Ok(path)
    }

    fn convert(&self, image: &Image, path: &PathBuf, progress: &dyn Progress) -> Result<(), Error> {
        let work = Work::begin(self)?;
        let output = work.temp_file()?;
        let inputs = image.layers.iter().map(|layer| {
            let blob = self.blob(&layer.digest);
            File::open(&blob).map_err(Error::io("read", &blob))
        });
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let layers = image.layers.iter().map(|layer| LayerTask {
            digest: layer.digest,
            diff_id: layer.diff_id,
            compression: layer.compression,
        });
        let task = Task::RootDevice {
            layers: layers.collect(),
            unpack: self.limits.clone(),
            tree: self.tree.clone(),
        };
        for layer in &image.layers {
            progress.begin(Step::Convert, &layer.digest.to_string(), layer.size);
        }
        let (mut size, mut reached) = (None, None);
        let result = self.converter.run(&task, inputs, output.as_file(), &mut |message| {
            let (layer, done) = match message {
                Message::Progress { layer, done } => (layer, done),
                Message::RootDevice(bytes) => return size = Some(bytes),
                _ => return,
            };
            let layer = usize::try_from(layer).ok().and_then(|layer| image.layers.get(layer));
            if let Some(layer) = layer {
                reached = Some(layer.digest);
                progress.advance(Step::Convert, &layer.digest.to_string(), done.min(layer.size));
            }
        });
        for layer in &image.layers {
            progress.finish(Step::Convert, &layer.digest.to_string());
        }
        result.map_err(|error| match error {
            ConversionError::Layer(error) => error.into(),
            ConversionError::Convert(error) => Error::Convert { image: image.title(), error },
            ConversionError::Archive(error) => error.into(),
            ConversionError::Process(reason) => {
                let at = reached.map(|layer| format!(" (at layer {layer})")).unwrap_or_default();
                Error::Converter { what: image.title(), reason: format!("{reason}{at}") }
            }
        })?;
        // Who made it may have been taken over by a layer: what is there is what counts.
        let checked = erofs::check(output.as_file(), task.output_limit());
        let wrong = match checked.map_err(Error::io("read", output.path()))? {
            Ok(found) if Some(found) == size => None,
            Ok(found) => Some(format!("the file has {found} bytes, {size:?} were announced")),
            Err(reason) => Some(reason.to_owned()),
        };
        if let Some(reason) = wrong {
            return Err(Error::Converter { what: image.title(), reason });
        }
        let finish = || -> io::Result<()> {
            output.as_file().set_permissions(Permissions::from_mode(0o444))?;
            output.as_file().sync_all()?;
            output.persist(path)?;
            Ok(())
        };
        finish().map_err(Error::io("write", path))?;
        self.sync_folder(&self.root.join("erofs"))
    }
}
