//! Chores of the project: `cargo xtask {build, test, lab, demo, kernel, bench, fuzz, miri, reproduce, supply, sbom}`.

mod bench;
mod build;
mod command;
mod debian;
mod demo;
mod fuzz;
#[cfg(test)]
mod hostile;
mod image;
mod kernel;
mod lab;
mod miri;
mod reproduce;
#[cfg(test)]
mod sources;
mod supply;
mod syscalls;
mod test;
#[cfg(test)]
mod unsafety;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the project.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Options {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the programs, statically linked, into target/dist
    Build,
    /// Run all tests: format, lints, unit, then end to end in the lab
    Test(test::Arguments),
    /// Run a command as root on a Linux with working KVM
    Lab(lab::Arguments),
    /// Run a real image as a micro-VM, from nothing
    Demo,
    /// Build the micro-VM guest kernel, or the lab's
    Kernel(kernel::Arguments),
    /// Fuzz the parsers and devices, for a bounded time
    Fuzz(fuzz::Arguments),
    /// Run unit tests under Miri
    Miri,
    /// Build twice in different places and compare the programs
    Reproduce,
    /// Check licences, duplicates, sources, advisories, and what programs must not link
    Supply,
    /// Write what each program is made of (CycloneDX) into target/dist
    Sbom,
    /// Run the benchmarks
    Bench(bench::Arguments),
    /// What the benchmarks run inside the lab
    #[command(hide = true)]
    Measure(bench::MeasureArguments),
    /// What the lab's machine keeps in the background
    #[command(hide = true)]
    KeepVm,
}

fn main() -> ExitCode {
    let result = match Options::parse().task {
        Task::Build => build::build().map(|()| 0),
        Task::Test(arguments) => test::test(&arguments).map(|()| 0),
        Task::Lab(arguments) => lab::run(&arguments),
        Task::Demo => demo::demo().map(|()| 0),
        Task::Kernel(arguments) => kernel::build(&arguments).map(|path| {
            println!("{}", path.display());
            0
        }),
        Task::Fuzz(arguments) => fuzz::fuzz(&arguments).map(|()| 0),
        Task::Miri => miri::miri().map(|()| 0),
        Task::Reproduce => reproduce::reproduce().map(|()| 0),
        Task::Supply => supply::check().map(|()| 0),
        Task::Sbom => supply::write_sbom().map(|()| 0),
        Task::Bench(arguments) => bench::bench(&arguments).map(|()| 0),
        Task::Measure(arguments) => bench::measure(&arguments).map(|()| 0),
        Task::KeepVm => lab::keep_vm().map(|()| 0),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(lab::FAILURE)
        }
    }
}
