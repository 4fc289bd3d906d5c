//! Where what is counted goes: Firecracker's JSON lines, and Prometheus's text.
//!
//! Devices, processors and the API server count, each for itself; here are only what the process
//! as a whole counts, and the way out. A JSON line has of each count how much it grew since the
//! line before, as Firecracker's lines do. What it was then is remembered here, so that the text has
//! counts from the beginning of the process.

mod line;
mod prometheus;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api_server::machine::requests::RequestMetrics;
use api_server::machine::{MachineRequest, Metrics, SnapshotType};
use nix::time::{ClockId, clock_gettime};
use telemetry::Readings;

use crate::logger::Log;
use crate::machine::lock;
use crate::output_file;
use line::Previous;

telemetry::metrics! {
    /// How long the process took to be of use.
    pub struct StartMetrics("api_server", Microseconds) {
        /// Time from the start of the process until it served the API, or had no need to.
        process_startup_time_us,
        /// Time on a processor until then.
        process_startup_time_cpu_us,
    }
}

telemetry::metrics! {
    /// How long the latest of each of these took: for the client, from the moment its request was
    /// understood, and in the machine, from the moment it was looked at.
    pub struct LatencyMetrics("latencies_us", Microseconds) {
        /// Time for a client of a full snapshot.
        full_create_snapshot,
        /// Time for a client of a diff snapshot.
        diff_create_snapshot,
        /// Time for a client of loading a snapshot.
        load_snapshot,
        /// Time for a client of pausing the machine.
        pause_vm,
        /// Time for a client of resuming the machine.
        resume_vm,
        /// Time in the machine of a full snapshot.
        vmm_full_create_snapshot,
        /// Time in the machine of a diff snapshot.
        vmm_diff_create_snapshot,
        /// Time in the machine of loading a snapshot.
        vmm_load_snapshot,
        /// Time in the machine of pausing it.
        vmm_pause_vm,
        /// Time in the machine of resuming it.
        vmm_resume_vm,
    }
}

telemetry::metrics! {
    /// What happened to messages and to metrics.
    pub struct LoggerMetrics("logger", Counter) {
        /// Lines of metrics that were not written: the FIFO was full, or the disk.
        missed_metrics_count,
        /// Requests for a line of metrics that failed.
        metrics_fails,
        /// Messages that were not written.
        missed_log_count,
    }
}

telemetry::metrics! {
    /// What the event loop has done.
    pub struct LoopMetrics("vmm", Counter) {
        /// Events of devices, timers, signals and requests that were served.
        device_events,
    }
}

/// Why metrics cannot go where they are to.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// They go somewhere already.
    #[error(
        "Cannot initialize the metrics system due to bad user input: Reinitialization of metrics \
         not allowed."
    )]
    Twice,
    /// The file cannot be opened.
    #[error("Cannot initialize the metrics system due to bad user input: {path}: {error}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// A line could not be written.
    #[error("Failed to write metrics: {0}")]
    Write(io::Error),
}

/// Numbers of one thing, and its name where there may be several of its kind.
#[derive(Clone, Debug)]
pub struct Sample {
    /// An API id, or a processor's number.
    pub name: Option<String>,
    /// The numbers.
    pub readings: Readings,
}

impl From<Readings> for Sample {
    fn from(readings: Readings) -> Sample {
        Sample { name: None, readings }
    }
}

/// A request whose duration is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timed {
    FullSnapshot,
    DiffSnapshot,
    Load,
    Pause,
    Resume,
}

/// A measurement that has begun.
pub struct Timing {
    what: Timed,
    received: Instant,
    begun: Instant,
}

/// What the process counts, and where lines of metrics go.
pub struct Collector {
    id: String,
    start: StartMetrics,
    latencies: LatencyMetrics,
    logger: LoggerMetrics,
    event_loop: LoopMetrics,
    /// Counted by the API server.
    pub requests: Arc<Mutex<RequestMetrics>>,
    output: Option<Output>,
    /// What each count was in the last line.
    previous: Previous,
}

impl Collector {
    /// A collector for the machine of this name, that writes nowhere yet.
    pub fn new(id: &str) -> Collector {
        Collector {
            id: id.to_owned(),
            start: StartMetrics::default(),
            latencies: LatencyMetrics::default(),
            logger: LoggerMetrics::default(),
            event_loop: LoopMetrics::default(),
            requests: Arc::default(),
            output: None,
            previous: BTreeMap::new(),
        }
    }

    /// Has lines written to a file or FIFO from now on. It can be done once.
    pub fn configure(&mut self, config: &Metrics) -> Result<(), MetricsError> {
        if self.output.is_some() {
            return Err(MetricsError::Twice);
        }
        let path = &config.metrics_path;
        let file = output_file::open(path)
            .map_err(|error| MetricsError::Open { path: path.clone(), error })?;
        self.output = Some(Output { config: config.clone(), file, rest: Vec::new() });
        Ok(())
    }

    /// The process is of use: it was started then.
    pub fn started(&mut self, since: Instant) {
        let on_cpu = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from);
        self.start = StartMetrics {
            process_startup_time_us: microseconds(since.elapsed()),
            process_startup_time_cpu_us: microseconds(on_cpu.unwrap_or_default()),
        };
    }

    /// So many events were served.
    pub fn served_events(&mut self, count: usize) {
        self.event_loop.device_events += count as u64;
    }

    /// A request is begun that was received then; `None` where nobody measures it.
    pub fn begin(&self, request: &MachineRequest, received: Instant) -> Option<Timing> {
        let what = match request {
            MachineRequest::CreateSnapshot(create) => match create.snapshot_type {
                SnapshotType::Full => Timed::FullSnapshot,
                SnapshotType::Diff => Timed::DiffSnapshot,
            },
            MachineRequest::LoadSnapshot(_) => Timed::Load,
            MachineRequest::Pause => Timed::Pause,
            MachineRequest::Resume => Timed::Resume,
            _ => return None,
        };
        Some(Timing { what, received, begun: Instant::now() })
    }

    /// A request was carried out.
    pub fn end(&mut self, timing: &Timing) {
        let all = &mut self.latencies;
        let (client, machine) = match timing.what {
            Timed::FullSnapshot => {
                (&mut all.full_create_snapshot, &mut all.vmm_full_create_snapshot)
            }
            Timed::DiffSnapshot => {
                (&mut all.diff_create_snapshot, &mut all.vmm_diff_create_snapshot)
            }
            Timed::Load => (&mut all.load_snapshot, &mut all.vmm_load_snapshot),
            Timed::Pause => (&mut all.pause_vm, &mut all.vmm_pause_vm),
            Timed::Resume => (&mut all.resume_vm, &mut all.vmm_resume_vm),
        };
        *client = microseconds(timing.received.elapsed());
        *machine = microseconds(timing.begun.elapsed());
    }

    /// The numbers of the process itself.
    fn own(&self, log: Option<&Log>) -> Vec<Sample> {
        let logger = LoggerMetrics { missed_log_count: log.map_or(0, Log::missed), ..self.logger };
        let requests = lock(&self.requests).readings();
        let own = [
            self.start.readings(),
            self.latencies.readings(),
            logger.readings(),
            self.event_loop.readings(),
        ];
        own.into_iter().chain(requests).map(Sample::from).collect()
    }

    /// All numbers, with those of the machine, in Prometheus's text format.
    pub fn text(&self, machine: Vec<Sample>, log: Option<&Log>) -> String {
        let mut samples = self.own(log);
        samples.extend(machine);
        prometheus::text(&samples)
    }

    /// Writes a line, if it is known where to. One that cannot be written is missed; what it would
    /// have said is in the next.
    pub fn write(&mut self, machine: Vec<Sample>, log: Option<&Log>) -> Result<(), MetricsError> {
        if self.output.is_none() {
            return Ok(());
        }
        let mut samples = self.own(log);
        samples.extend(machine);
        let (groups, previous) = line::groups(&samples, &self.previous);
        let Some(output) = &mut self.output else { return Ok(()) };
        let id = output.config.emit_id.then_some(self.id.as_str());
        let written =
            line::line(id, &output.config.properties, &groups).and_then(|line| output.write(&line));
        if let Err(error) = written {
            self.logger.missed_metrics_count += 1;
            return Err(MetricsError::Write(error));
        }
        self.previous = previous;
        Ok(())
    }

    /// [`write`](Collector::write) at the request of a client.
    pub fn flush(&mut self, machine: Vec<Sample>, log: Option<&Log>) -> Result<(), MetricsError> {
        self.write(machine, log).inspect_err(|_| self.logger.metrics_fails += 1)
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A file or FIFO that lines go to.
struct Output {
    config: Metrics,
    file: File,
    /// What a full FIFO did not take of a line: it goes before the next.
    rest: Vec<u8>,
}

impl Output {
    /// Writes a line, at least in part. A part that is written commits to the rest.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let rest = std::mem::take(&mut self.rest);
        let written = write_some(&mut self.file, &rest);
        self.rest = rest.get(*written.as_ref().unwrap_or(&0)..).unwrap_or_default().to_vec();
        written?;
        if !self.rest.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let written = write_some(&mut self.file, line)?;
        self.rest = line.get(written..).unwrap_or_default().to_vec();
        Ok(())
    }
}

/// Writes as much as is taken; an error only where that is nothing.
fn write_some(file: &mut File, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while let Some(left @ [_, ..]) = bytes.get(written..) {
        match file.write(left) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if written == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(written)
}
