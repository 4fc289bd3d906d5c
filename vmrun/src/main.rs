//! `vmrun`: container images as micro-VMs.

#![forbid(unsafe_code)]

mod bars;
mod clone;
mod command;
mod container;
mod doctor;
mod image;
mod kernel;
mod output;
mod run;
mod snapshot;
mod store;
mod volume;

use std::io::Write;
use std::process::ExitCode;

use command::{Command, Options};

/// Exit status of the command's own failures, as Docker has it.
const FAILURE: u8 = 125;

/// A failure to be told in one line, and the status to end with.
struct Failure {
    message: String,
    code: u8,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure { message: error.to_string(), code: FAILURE }
    }
}

impl Failure {
    fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), code: FAILURE }
    }
}

fn main() -> ExitCode {
    engine::converter::become_converter(std::env::args_os());
    let options = match command::parse(std::env::args_os().collect()) {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            // Help and the version are no failures.
            return ExitCode::from(if error.use_stderr() { FAILURE } else { 0 });
        }
    };
    output::log_to_stderr(options.debug);
    match dispatch(options) {
        Ok(code) => ExitCode::from(code),
        Err(Failure { message, code }) => {
            // Where nobody listens there is still the status.
            let _ = writeln!(std::io::stderr(), "vmrun: {message}");
            ExitCode::from(code)
        }
    }
}

fn dispatch(options: Options) -> Result<u8, Failure> {
    let paths = || Ok::<_, Failure>(engine::paths::Paths::open(options.root.as_deref())?);
    let policy = options.signature_policy.as_deref();
    match options.command {
        Command::Run(arguments) => run::run(&paths()?, policy, *arguments, options.debug),
        Command::Image(command) => image::image(&paths()?, policy, command).map(|()| 0),
        Command::Kernel(command) => kernel::kernel(&paths()?, command).map(|()| 0),
        Command::Volume(command) => volume::volume(&paths()?, command).map(|()| 0),
        Command::Snapshot(command) => {
            snapshot::snapshot(&paths()?, policy, command, options.debug).map(|()| 0)
        }
        Command::Clone(arguments) => {
            clone::clone(&paths()?, options.root.as_deref(), policy, *arguments)
        }
        Command::Ps(arguments) => container::ps(&paths()?, &arguments).map(|()| 0),
        Command::Rm { containers } => container::rm(&paths()?, &containers).map(|()| 0),
        Command::Doctor { format, production, confinement } => {
            let confinement = confinement.policy();
            doctor::doctor(options.root.as_deref(), &confinement, format, production)
        }
        Command::Completion { shell } => {
            command::completion(shell);
            Ok(0)
        }
        Command::Version => {
            output::line(format!("vmrun {}", env!("CARGO_PKG_VERSION")));
            Ok(0)
        }
    }
}
