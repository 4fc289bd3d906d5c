//! How far an operation is, for bars that the caller draws.

/// What is being done to a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Fetched from a registry.
    Download,
    /// Copied from an archive.
    Load,
    /// Read while the root device is made.
    Convert,
}

/// Is told how far an operation is. Called from the thread that runs the operation; calls for
/// different blobs are interleaved, those for one blob come in order.
pub trait Progress: Sync {
    /// `step` starts for the blob `digest` (an entry's name, where the digest is not known yet),
    /// which has `total` bytes.
    fn begin(&self, step: Step, digest: &str, total: u64);
    /// It has come to `done` bytes of the total. May go back when a download starts again.
    fn advance(&self, step: Step, digest: &str, done: u64);
    /// It is done, or was not necessary.
    fn finish(&self, step: Step, digest: &str);
    /// Something worth a line, such as a retry. One line, without a newline.
    fn message(&self, text: &str);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: Step, _: &str, _: u64) {}
    fn advance(&self, _: Step, _: &str, _: u64) {}
    fn finish(&self, _: Step, _: &str) {}
    fn message(&self, _: &str) {}
}
