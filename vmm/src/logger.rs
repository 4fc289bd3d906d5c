//! Messages of the monitor, to a file or standard error.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

use api_server::machine::{Level, Logger};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Why messages cannot go where they were to.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// The file cannot be opened.
    #[error("cannot open log {path}: {error}")]
    Open {
        /// The file.
        path: std::path::PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// Messages go somewhere already.
    #[error("the logger is configured already")]
    Twice(#[from] TryInitError),
}

/// Sends messages where `config` says, from now on. It can be done once.
pub fn init(config: &Logger) -> Result<(), LoggerError> {
    let output = match &config.log_path {
        None => Output::Stderr,
        Some(path) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                // A FIFO without a reader must not hang the machine.
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(path)
                .map_err(|error| LoggerError::Open { path: path.clone(), error })?;
            Output::File(Arc::new(Mutex::new(file)))
        }
    };
    let level = match config.level.unwrap_or_default() {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warning => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    let filter = match &config.module {
        Some(module) => Targets::new().with_target(module.clone(), level),
        None => Targets::new().with_default(level),
    };
    let format = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .with_level(config.show_level)
        .with_file(config.show_log_origin)
        .with_line_number(config.show_log_origin)
        .with_writer(output);
    tracing_subscriber::registry().with(filter).with(format).try_init()?;
    Ok(())
}

#[derive(Clone)]
enum Output {
    Stderr,
    File(Arc<Mutex<std::fs::File>>),
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Output;

    fn make_writer(&'a self) -> Output {
        self.clone()
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Output::Stderr => io::stderr().write(bytes),
            Output::File(file) => {
                file.lock().unwrap_or_else(std::sync::PoisonError::into_inner).write(bytes)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
