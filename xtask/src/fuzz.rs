//! `cargo xtask fuzz`: libFuzzer on each target for a bounded time.
//!
//! What the targets do is in `fuzz/targets`, whose tests try the seeds with any compiler; here they
//! run under libFuzzer and the address sanitizer, which need nightly.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::command::{output, root, run, target};

/// Targets with words of a dictionary to try.
const DICTIONARIES: [(&str, &str); 3] =
    [("api_request", "json.dict"), ("config_file", "json.dict"), ("mmds", "http.dict")];
/// MiB a target may take, and seconds an input may.
const MEMORY_MIB: u32 = 2048;
const TIMEOUT_S: u32 = 20;
/// Inputs of a target in a smoke run.
const SMOKE_RUNS: u32 = 20_000;

#[derive(clap::Args)]
pub struct Arguments {
    /// How long each target runs
    #[arg(long, default_value_t = 2.0, value_name = "N")]
    minutes: f64,
    /// A fixed number of inputs instead, the same each time
    #[arg(long, conflicts_with = "minutes")]
    smoke: bool,
    /// Only this input, of one target
    #[arg(long, value_name = "FILE", requires = "targets")]
    input: Option<PathBuf>,
    /// Only these targets
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

/// What came of a target.
#[derive(Debug, Default, PartialEq)]
struct Figures {
    executions: u64,
    seconds: u64,
    edges: u64,
    features: u64,
    inputs: u64,
}

/// Fuzzes, and prints a table. Fails where a target does.
pub fn fuzz(arguments: &Arguments) -> Result<()> {
    let all = targets()?;
    let unknown = arguments.targets.iter().find(|name| !all.contains(name));
    if let Some(name) = unknown {
        bail!("there is no target {name}; there are: {}", all.join(" "));
    }
    let wanted = if arguments.targets.is_empty() { &all } else { &arguments.targets };
    check_tools()?;
    let mut build = cargo_fuzz("build");
    // One target is not worth a build of all.
    if let [one] = wanted.as_slice() {
        build.arg(one);
    }
    run(&mut build)?;
    if let (Some(input), Some(name)) = (&arguments.input, wanted.first()) {
        let input = input.canonicalize().with_context(|| input.display().to_string())?;
        return run(cargo_fuzz("run").arg(name).arg(input));
    }
    let mut table = String::from("| target | executions | seconds | edges | features | corpus |\n");
    table.push_str("| --- | ---: | ---: | ---: | ---: | ---: |\n");
    let mut failed = Vec::new();
    for name in wanted {
        let (figures, is_good) = fuzz_target(name, arguments)?;
        let Figures { executions, seconds, edges, features, inputs } = figures;
        table.push_str(&format!(
            "| `{name}` | {executions} | {seconds} | {edges} | {features} | {inputs} |\n"
        ));
        if !is_good {
            failed.push(name.as_str());
        }
    }
    println!("{table}");
    ensure!(
        failed.is_empty(),
        "inputs were found that fail: see one again with  cargo xtask fuzz TARGET --input FILE  and \
         a file of {}/{{{}}}",
        folder("artifacts").display(),
        failed.join(",")
    );
    Ok(())
}

/// Where corpora and what fails are kept, apart from the sources.
fn folder(name: &str) -> PathBuf {
    target().join("fuzz").join(name)
}

/// The names of all targets.
fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root().join("fuzz/fuzz_targets"))? {
        let path = entry?.path();
        names.extend(path.file_stem().and_then(|name| name.to_str()).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Nightly must be there; cargo-fuzz is installed.
fn check_tools() -> Result<()> {
    let toolchains = output(Command::new("rustup").args(["toolchain", "list"]))
        .context("fuzzing needs a nightly compiler, and rustup to choose it")?;
    ensure!(
        toolchains.lines().any(|name| name.starts_with("nightly")),
        "fuzzing needs a nightly compiler: run  rustup toolchain install nightly  (the tests of \
         fuzz-targets try the seeds without: cargo test -p fuzz-targets)"
    );
    if output(nightly().args(["fuzz", "--version"])).is_err() {
        eprintln!("xtask: installing cargo-fuzz");
        run(nightly().args(["install", "cargo-fuzz", "--locked"]))?;
    }
    Ok(())
}

/// Nightly's Cargo.
fn nightly() -> Command {
    let mut cargo = Command::new("rustup");
    cargo.args(["run", "nightly", "cargo"]).current_dir(root());
    cargo
}

fn cargo_fuzz(task: &str) -> Command {
    let mut cargo = nightly();
    cargo.args(["fuzz", task, "--fuzz-dir", "fuzz"]);
    cargo.env("CARGO_TARGET_DIR", target().join("fuzz"));
    cargo
}

/// Runs one target: what came of it, and whether it found nothing.
fn fuzz_target(name: &str, arguments: &Arguments) -> Result<(Figures, bool)> {
    eprintln!("xtask: fuzzing {name}");
    let (corpus, artifacts) = (folder("corpus").join(name), folder("artifacts").join(name));
    // A smoke run is to be the same each time: it begins without what others found.
    if arguments.smoke {
        let _ = fs::remove_dir_all(folder("smoke").join(name));
    }
    let corpus = if arguments.smoke { folder("smoke").join(name) } else { corpus };
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&artifacts)?;
    let mut command = cargo_fuzz("run");
    command.arg(name).arg(&corpus).arg(root().join("fuzz/seeds").join(name)).arg("--");
    if arguments.smoke {
        command.arg(format!("-runs={SMOKE_RUNS}"));
    } else {
        command.arg(format!("-max_total_time={}", (arguments.minutes * 60.0).ceil()));
    }
    if let Some((_, words)) = DICTIONARIES.iter().find(|(target, _)| *target == name) {
        command.arg(format!("-dict={}", root().join("fuzz/dictionaries").join(words).display()));
    }
    command.args(["-seed=1", "-print_final_stats=1"]);
    command.arg(format!("-rss_limit_mb={MEMORY_MIB}"));
    command.arg(format!("-timeout={TIMEOUT_S}"));
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    let log = folder("logs").join(name);
    fs::create_dir_all(folder("logs"))?;
    let (figures, is_good) = follow(command.stderr(Stdio::piped()), &log)?;
    if !is_good {
        eprintln!("{}", tail(&log)?);
    }
    Ok((figures, is_good))
}

/// Runs a fuzzer and keeps what it says in a file.
fn follow(command: &mut Command, log: &Path) -> Result<(Figures, bool)> {
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let mut file = fs::File::create(log)?;
    let mut figures = Figures::default();
    for line in BufReader::new(child.stderr.take().context("no stderr")?).split(b'\n') {
        let line = line?;
        file.write_all(&line)?;
        file.write_all(b"\n")?;
        figures.read(&String::from_utf8_lossy(&line));
    }
    Ok((figures, child.wait()?.success()))
}

/// The end of a file.
fn tail(path: &Path) -> Result<String> {
    const LINES: usize = 40;
    let bytes = fs::read(path)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(LINES)..].join("\n"))
}

impl Figures {
    /// Takes in a line of libFuzzer's, such as `#8192 pulse cov: 12 ft: 34 corp: 5/67b ...`.
    fn read(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let number = |word: Option<&str>| word?.split('/').next()?.parse().ok();
        let Some(first) = words.next() else { return };
        if let Some(count) = first.strip_prefix('#').and_then(|count| count.parse().ok()) {
            self.executions = self.executions.max(count);
            while let Some(word) = words.next() {
                let field = match word {
                    "cov:" => &mut self.edges,
                    "ft:" => &mut self.features,
                    "corp:" => &mut self.inputs,
                    _ => continue,
                };
                *field = number(words.next()).unwrap_or(*field);
            }
        } else if first == "Done" {
            // `Done 20000 runs in 5 second(s)`
            self.executions = number(words.next()).unwrap_or(self.executions);
            self.seconds = number(words.nth(2)).unwrap_or(self.seconds);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_what_libfuzzer_says() {
        let mut figures = Figures::default();
        for line in [
            "INFO: Running with entropic power schedule (0xFF, 100).",
            "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 30Mb",
            "#20000\tDONE   cov: 531 ft: 1200 corp: 88/9Kb lim: 4096 exec/s: 4000 rss: 60Mb",
            "Done 20000 runs in 5 second(s)",
            "stat::number_of_executed_units: 20000",
        ] {
            figures.read(line);
        }
        let wanted =
            Figures { executions: 20_000, seconds: 5, edges: 531, features: 1200, inputs: 88 };
        assert_eq!(figures, wanted);
    }
}
