//! Chores of the project: `cargo xtask {build, test, lab, demo, kernel, bench, fuzz}`.

mod bench;
mod build;
mod command;
mod debian;
mod demo;
mod fuzz;
mod image;
mod kernel;
mod lab;
mod syscalls;
mod test;

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
