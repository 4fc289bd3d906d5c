//! Downloads a layer: resumable, checked, by one process at a time.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::Duration;

use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};
use tokio::time::Instant;

use super::client::{Client, Request};
use super::error::RegistryError;
use crate::digest::Hasher;
use crate::error::Error;
use crate::progress::{Progress, Step};
use crate::reference::Reference;
use crate::store::{Expected, Work};

/// Failures are counted anew after this many bytes.
const PROGRESS: u64 = 1 << 20;
/// How often to look whether another process is done.
const POLL: Duration = Duration::from_millis(100);

/// Brings a layer into the store.
pub(super) async fn layer(
    work: &Work<'_>,
    client: &Client<'_>,
    reference: &Reference,
    wanted: Expected,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let shown = wanted.digest.to_string();
    let what = format!("layer {shown} of {}", reference.familiar_name());
    progress.begin(Step::Download, &shown, wanted.size);
    let mut waited = false;
    loop {
        if work.has(&wanted)? {
            progress.finish(Step::Download, &shown);
            return Ok(());
        }
        if let Some(partial) = work.partial(&wanted.digest)? {
            let told = |done| progress.advance(Step::Download, &shown, done);
            let mut download = Download { client, what: &what, wanted, told: &told };
            // Somebody may have finished it between the two questions.
            if !work.has(&wanted)? {
                download.run(partial.file(), partial.path()).await?;
                partial.keep(work)?;
            }
            progress.finish(Step::Download, &shown);
            return Ok(());
        }
        if !waited {
            waited = true;
            progress.message(&format!("{what}: waiting for another process that downloads it"));
        }
        tokio::time::sleep(POLL).await;
    }
}

struct Download<'d> {
    client: &'d Client<'d>,
    what: &'d str,
    wanted: Expected,
    told: &'d dyn Fn(u64),
}

/// What is there so far.
struct State<'f> {
    file: &'f File,
    hasher: Hasher,
    done: u64,
}

impl State<'_> {
    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hasher = Hasher::default();
        self.done = 0;
        Ok(())
    }
}

impl Download<'_> {
    /// Completes `file` and checks it.
    async fn run(&mut self, file: &File, path: &std::path::Path) -> Result<(), Error> {
        let write = |error| Error::io("write", path)(error);
        let mut state = State { file, hasher: Hasher::default(), done: 0 };
        let mut old = self.resume(&mut state).map_err(Error::io("read", path))?;
        let (mut failures, mut mark) = (0u32, state.done);
        loop {
            (self.told)(state.done);
            match self.attempt(&mut state).await {
                Ok(()) => {
                    let found = state.hasher.clone().finish();
                    if found == self.wanted.digest {
                        return Ok(());
                    }
                    state.restart().map_err(write)?;
                    if !old {
                        let (what, expected) = (self.client.name(self.what), self.wanted.digest);
                        return Err(Error::WrongDigest { what, found, expected });
                    }
                    // What an earlier download left may have been damaged by a power cut.
                    old = false;
                }
                Err(Failure::Write(error)) => return Err(write(error)),
                Err(Failure::Registry(error)) => {
                    if state.done >= mark.saturating_add(PROGRESS) {
                        failures = 0;
                    }
                    mark = state.done;
                    failures += 1;
                    if matches!(error, RegistryError::Status { status: 416, .. }) {
                        state.restart().map_err(write)?;
                        (old, mark) = (false, 0);
                    }
                    self.client.pause(error, failures).await?;
                }
            }
        }
    }

    /// Reads what an earlier download left; whether there is anything.
    fn resume(&self, state: &mut State<'_>) -> io::Result<bool> {
        let length = state.file.metadata()?.len();
        if length > self.wanted.size {
            state.restart()?;
            return Ok(false);
        }
        let mut file = state.file;
        file.seek(SeekFrom::Start(0))?;
        let mut buffer = vec![0u8; 1 << 18];
        while state.done < length {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => {
                    state.hasher.update(buffer.get(..read).unwrap_or_default());
                    state.done += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(state.done > 0)
    }

    /// One request for what is missing.
    async fn attempt(&self, state: &mut State<'_>) -> Result<(), Failure> {
        if state.done == self.wanted.size {
            return Ok(());
        }
        let path = format!("blobs/{}", self.wanted.digest);
        let from = (state.done > 0).then_some(state.done);
        let request = Request { what: self.what, path: &path, accept: None, from };
        let limit = self.client.network().answer;
        let broken = |response: Option<&Response>, reason: String| {
            let host = response.and_then(|r| r.url().host_str()).unwrap_or_default().to_owned();
            Failure::Registry(RegistryError::Broken { what: self.what.to_owned(), host, reason })
        };
        let response = match tokio::time::timeout(limit, self.client.get(&request)).await {
            Ok(response) => response?,
            Err(_) => return Err(broken(None, "no answer in time".into())),
        };
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
            if range.and_then(range_start) != Some(state.done) || from.is_none() {
                // It sends something else than was asked for.
                state.restart()?;
                return Err(broken(Some(&response), "it sends another range".into()));
            }
        } else if state.done > 0 {
            // It ignores ranges and starts at the beginning.
            state.restart()?;
        }
        let missing = self.wanted.size.saturating_sub(state.done);
        if let Some(announced) = response.content_length()
            && announced != missing
        {
            return Err(Failure::Registry(RegistryError::Length {
                what: self.what.to_owned(),
                host: response.url().host_str().unwrap_or_default().to_owned(),
                announced,
                expected: missing,
            }));
        }
        self.body(state, response).await
    }

    async fn body(&self, state: &mut State<'_>, mut response: Response) -> Result<(), Failure> {
        let host = response.url().host_str().unwrap_or_default().to_owned();
        let broken = |reason: String| {
            let (what, host) = (self.what.to_owned(), host.clone());
            Failure::Registry(RegistryError::Broken { what, host, reason })
        };
        let network = self.client.network();
        let (mut since, mut before) = (Instant::now(), state.done);
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) if state.done == self.wanted.size => return Ok(()),
                Ok(None) => {
                    let (done, size) = (state.done, self.wanted.size);
                    return Err(broken(format!("it ended after {done} of {size} bytes")));
                }
                Err(error) => {
                    let reason =
                        if error.is_timeout() { "it takes too long" } else { "it hung up" };
                    let (done, size) = (state.done, self.wanted.size);
                    return Err(broken(format!("{reason} after {done} of {size} bytes")));
                }
            };
            let done = state.done.saturating_add(chunk.len() as u64);
            if done > self.wanted.size {
                let (what, limit) = (self.what.to_owned(), self.wanted.size);
                return Err(Failure::Registry(RegistryError::TooLarge { what, host, limit }));
            }
            let mut file = state.file;
            file.write_all(&chunk)?;
            state.hasher.update(&chunk);
            state.done = done;
            (self.told)(done);
            if since.elapsed() >= network.window {
                if done - before < network.slowest {
                    return Err(broken("it is too slow".to_owned()));
                }
                (since, before) = (Instant::now(), done);
            }
        }
    }
}

enum Failure {
    Registry(RegistryError),
    Write(io::Error),
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Failure {
        Failure::Registry(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Write(error)
    }
}

/// The first byte of a `Content-Range: bytes FIRST-LAST/SIZE`.
fn range_start(header: &str) -> Option<u64> {
    header.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}
