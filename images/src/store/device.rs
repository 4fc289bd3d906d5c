//! An image's root device: its layers merged into one EROFS file.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Store;
use super::lock::Mode;
use super::work::Work;
use crate::digest::Digest;
use crate::error::Error;
use crate::image::Image;
use crate::layer::{Layer, Shared};
use crate::progress::{Progress, Step};
use crate::rootfs::{self, ConvertError, LayerStream};

/// Part of the file's name, raised when the same layers make another image.
const FORMAT: u32 = 2;

/// The name of the root device of these layers.
pub(super) fn device_name(chain: &Digest) -> String {
    format!("{}.v{FORMAT}.erofs", chain.hex())
}

impl Store {
    /// The EROFS file of `image`, made if it is not there. Readable by anybody, writable by nobody.
    /// It stays for as long as the image does: hold the image while the file is used.
    ///
    /// # Errors
    /// Also an image that the signature policy does not accept, however it got into the store.
    pub fn root_device(&self, image: &Image, progress: &dyn Progress) -> Result<PathBuf, Error> {
        self.admit_image(image)?;
        let chain = image.chain_id();
        let path = self.root.join("erofs").join(device_name(&chain));
        if fs::metadata(&path).is_ok_and(|m| m.is_file()) {
            return Ok(path);
        }
        let _lease = self.hold(image)?;
        let lock = self.root.join("locks").join(format!("{}.device", chain.hex()));
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
        let mut outcomes: Vec<Shared> = Vec::new();
        let mut streams = Vec::new();
        let mut shares = Vec::new();
        for layer in &image.layers {
            // The reader is moved into the converter, the bar is drawn from here.
            let done = Arc::new(AtomicU64::new(0));
            let tell = done.clone();
            let (reader, outcome) = Layer::new(
                layer.digest,
                layer.diff_id,
                self.blob(&layer.digest),
                layer.compression,
                self.limits.clone(),
                Box::new(move |count| tell.store(count, Ordering::Relaxed)),
            );
            outcomes.push(outcome);
            shares.push((layer.digest.to_string(), layer.size, done));
            let digest = layer.digest.to_string();
            streams.push(LayerStream { digest, reader: Box::new(reader) });
        }
        let file = output.reopen().map_err(Error::io("open", output.path()))?;
        let result = watched(&shares, progress, || rootfs::convert(&mut streams, file, &self.tree));
        // The layer's own error says more than the tar reader's.
        let failed = outcomes.iter().find_map(|o| o.lock().ok().and_then(|mut o| o.error.take()));
        if let Some(error) = failed {
            return Err(error.into());
        }
        let unread = outcomes
            .iter()
            .zip(&image.layers)
            .find(|(outcome, _)| !outcome.lock().is_ok_and(|outcome| outcome.complete));
        let convert = |error| Error::Convert { image: image.title(), error };
        result.map_err(convert)?;
        if let Some((_, layer)) = unread {
            // The converter promises to read every byte; without that nothing was checked.
            let error = io::Error::other("the layer was not read to its end");
            let layer = layer.digest.to_string();
            return Err(convert(ConvertError::Read { layer, after: String::new(), error }));
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

/// Runs `work` in a thread of its own and tells `progress` from this one how far the layers are.
fn watched<T: Send>(
    layers: &[(String, u64, Arc<AtomicU64>)],
    progress: &dyn Progress,
    work: impl FnOnce() -> T + Send,
) -> T {
    std::thread::scope(|scope| {
        let main = std::thread::current();
        let thread = scope.spawn(move || {
            let result = work();
            main.unpark();
            result
        });
        for (digest, size, _) in layers {
            progress.begin(Step::Convert, digest, *size);
        }
        while !thread.is_finished() {
            for (digest, _, done) in layers {
                progress.advance(Step::Convert, digest, done.load(Ordering::Relaxed));
            }
            std::thread::park_timeout(std::time::Duration::from_millis(100));
        }
        for (digest, _, _) in layers {
            progress.finish(Step::Convert, digest);
        }
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
