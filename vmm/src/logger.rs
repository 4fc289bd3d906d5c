//! Messages of the monitor, to a file, a FIFO or standard error.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use api_server::machine::{Level, Logger};
use tracing::Subscriber;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layered, SubscriberExt};
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer, Registry, reload};

use crate::output_file;

/// Why messages cannot go where they were to.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// The file cannot be opened.
    #[error("cannot open log {path}: {error}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// Something else in this process takes messages already.
    #[error("messages go somewhere else already")]
    Twice(#[from] TryInitError),
    /// What writes messages is gone.
    #[error("messages cannot be sent elsewhere: {0}")]
    Gone(#[from] reload::Error),
}

/// A filter that can be changed.
type Filter = reload::Layer<Targets, Registry>;
/// What a filter lets through.
type Filtered = Layered<Filter, Registry>;
/// A format that can be changed.
type Format = Box<dyn Layer<Filtered> + Send + Sync>;

/// Where messages go, and which. Without it they go nowhere.
pub struct Log {
    config: Logger,
    filter: reload::Handle<Targets, Registry>,
    format: reload::Handle<Format, Filtered>,
    output: Output,
}

impl Log {
    /// Sends this process's messages where `config` says, from now on.
    pub fn init(config: &Logger) -> Result<Log, LoggerError> {
        let (log, subscriber) = Log::new(config)?;
        subscriber.try_init()?;
        Ok(log)
    }

    /// A log, and the subscriber that writes it.
    fn new(config: &Logger) -> Result<(Log, impl Subscriber + Send + Sync + use<>), LoggerError> {
        let output = Output::default();
        let (filter, filter_handle) = reload::Layer::new(filter(config));
        let (format, format_handle) = reload::Layer::new(format(config, &output));
        let mut log =
            Log { config: Logger::default(), filter: filter_handle, format: format_handle, output };
        let subscriber = tracing_subscriber::registry().with(filter).with(format);
        log.configure(config)?;
        Ok((log, subscriber))
    }

    /// Changes what is given; everything else stays as it is. Where that fails, nothing changes.
    pub fn configure(&mut self, change: &Logger) -> Result<(), LoggerError> {
        if let Some(path) = &change.log_path {
            let file = output_file::open(path)
                .map_err(|error| LoggerError::Open { path: path.clone(), error })?;
            self.output.set(file);
        }
        let change = change.clone();
        let config = Logger {
            log_path: change.log_path.or_else(|| self.config.log_path.take()),
            level: change.level.or(self.config.level),
            show_level: change.show_level.or(self.config.show_level),
            show_log_origin: change.show_log_origin.or(self.config.show_log_origin),
            module: change.module.or_else(|| self.config.module.take()),
        };
        self.config = config;
        self.filter.reload(filter(&self.config))?;
        self.format.reload(format(&self.config, &self.output))?;
        Ok(())
    }

    /// All that was configured.
    pub fn config(&self) -> &Logger {
        &self.config
    }

    /// Messages that could not be written: a FIFO was full, a disk too.
    pub fn missed(&self) -> u64 {
        self.output.missed.load(Ordering::Relaxed)
    }
}

/// Lets messages through that are important enough, and of the module where one is named.
fn filter(config: &Logger) -> Targets {
    let level = match config.level.unwrap_or_default() {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warning => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    match &config.module {
        Some(module) => Targets::new().with_target(module.clone(), level),
        None => Targets::new().with_default(level),
    }
}

/// Writes a message as a line.
fn format(config: &Logger, output: &Output) -> Format {
    let origin = config.show_log_origin.unwrap_or_default();
    tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .with_level(config.show_level.unwrap_or_default())
        .with_file(origin)
        .with_line_number(origin)
        .with_writer(output.clone())
        .boxed()
}

/// A file, or standard error as long as there is none.
#[derive(Clone, Default)]
struct Output {
    file: Arc<Mutex<Option<File>>>,
    missed: Arc<AtomicU64>,
}

impl Output {
    fn set(&self, file: File) {
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    }
}

impl MakeWriter<'_> for Output {
    type Writer = Output;

    fn make_writer(&self) -> Output {
        self.clone()
    }
}

/// Never fails: there is nowhere to complain.
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let written = match &mut *file {
            None => io::stderr().write_all(bytes),
            Some(file) => file.write_all(bytes),
        };
        if written.is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::stat::Mode;

    use super::*;

    /// One test at a time: where one subscriber is all there are, tracing asks that of the thread
    /// which changes a filter whether a message is wanted. A process has one for all its threads.
    static TURN: Mutex<()> = Mutex::new(());

    /// What was written to a file while `act` ran.
    fn logged(config: Logger, act: impl FnOnce(&mut Log)) -> String {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let file = tempfile::NamedTempFile::new().unwrap();
        let config = Logger { log_path: Some(file.path().to_owned()), ..config };
        let (mut log, subscriber) = Log::new(&config).unwrap();
        tracing::subscriber::with_default(subscriber, || act(&mut log));
        std::fs::read_to_string(file.path()).unwrap()
    }

    /// The messages, without the time before each.
    fn messages(text: &str) -> Vec<&str> {
        text.lines().map(|line| line.split_once(' ').unwrap().1.trim()).collect()
    }

    fn change() -> Logger {
        Logger::default()
    }

    #[test]
    fn messages_of_importance_are_written_before_anything_is_configured() {
        let text = logged(change(), |_| {
            tracing::info!("one");
            tracing::debug!("two");
        });
        assert_eq!(messages(&text), ["one"]);
    }

    #[test]
    fn each_change_changes_only_what_it_gives() {
        let text = logged(change(), |log| {
            let level = Some(Level::Debug);
            log.configure(&Logger { level, ..change() }).unwrap();
            tracing::debug!("a");
            log.configure(&Logger { show_level: Some(true), ..change() }).unwrap();
            tracing::debug!("b");
            log.configure(&Logger { show_log_origin: Some(true), ..change() }).unwrap();
            tracing::debug!("c");
            let show_level = Some(false);
            log.configure(&Logger { show_level, ..change() }).unwrap();
            tracing::debug!("d");
            let (level, show_log_origin) = (Some(Level::Warning), Some(false));
            log.configure(&Logger { level, show_log_origin, ..change() }).unwrap();
            tracing::info!("e");
            tracing::warn!("f");
            assert_eq!(log.config().level, Some(Level::Warning));
            assert!(log.config().log_path.is_some());
        });
        let found = messages(&text);
        assert_eq!((found[0], found[1], found.len()), ("a", "DEBUG b", 5), "{text}");
        assert!(found[2].starts_with("DEBUG vmm/src/logger.rs:"), "{text}");
        assert!(found[3].starts_with("vmm/src/logger.rs:") && found[3].ends_with(": d"), "{text}");
        assert_eq!(found[4], "f");
    }

    #[test]
    fn a_module_shuts_the_others_out() {
        let text = logged(change(), |log| {
            let module = Some("vmm::logger".to_owned());
            log.configure(&Logger { module, ..change() }).unwrap();
            tracing::info!("ours");
            tracing::error!(target: "devices::virtio", "theirs");
        });
        assert_eq!(messages(&text), ["ours"]);
    }

    #[test]
    fn messages_go_to_another_file_from_one_moment_on() {
        let other = tempfile::NamedTempFile::new().unwrap();
        let text = logged(change(), |log| {
            tracing::info!("here");
            let missing = Some("/does/not/exist".into());
            assert!(log.configure(&Logger { log_path: missing, ..change() }).is_err());
            tracing::info!("still here");
            let log_path = Some(other.path().to_owned());
            log.configure(&Logger { log_path, ..change() }).unwrap();
            tracing::info!("there");
        });
        assert_eq!(messages(&text), ["here", "still here"]);
        let text = std::fs::read_to_string(other.path()).unwrap();
        assert_eq!(messages(&text), ["there"]);
    }

    #[test]
    fn a_fifo_without_a_reader_neither_blocks_nor_fails() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let config = Logger { log_path: Some(path.clone()), ..change() };
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (log, subscriber) = Log::new(&config).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("first");
            assert_eq!(log.missed(), 0);
            // More than it holds.
            for _ in 0..2000 {
                tracing::info!("{}", "x".repeat(100));
            }
        });
        assert!(log.missed() > 0);
        let mut beginning = [0; 100];
        let mut fifo = output_file::open(&path).unwrap();
        let count = fifo.read(&mut beginning).unwrap();
        assert!(String::from_utf8_lossy(&beginning[..count]).contains(" first\n"));
    }
}
