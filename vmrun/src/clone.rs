//! `vmrun clone`.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use engine::clones::{Clones, Event};
use engine::paths::Paths;
use engine::snapshot::Snapshot;
use engine::{container, stdio};

use crate::command::CloneArguments;
use crate::{FAILURE, Failure, output};

/// Runs clones until all have ended; the first failure's exit status.
pub fn clone(
    paths: &Paths,
    root: Option<&Path>,
    policy: Option<&Path>,
    arguments: CloneArguments,
) -> Result<u8, Failure> {
    let count = usize::from(arguments.count);
    // Said once, and not by each.
    Snapshot::open(paths, &arguments.snapshot)?;
    stdio::block_signals()?;
    let clones = Clones::start(count, &run_arguments(root, policy, &arguments))?;
    let (mut left, mut code, mut signal) = (count, 0, None);
    while left > 0 {
        match clones.next() {
            None => break,
            Some(Event::Runs(id)) => output::line(container::short(&id)),
            Some(Event::Line(index, stream, line)) => {
                let text = [format!("{}| ", index + 1).as_bytes(), &line, b"\n"].concat();
                // Where nobody listens they run on.
                let _ = match stream {
                    1 => std::io::stdout().write_all(&text),
                    _ => std::io::stderr().write_all(&text),
                };
            }
            Some(Event::Ended(_, status)) => {
                left -= 1;
                if code == 0 && signal.is_none() {
                    code = status.code().map_or(FAILURE, |code| code as u8);
                }
            }
            Some(Event::Signal(number)) => {
                signal = Some(number);
                clones.kill();
            }
        }
    }
    clones.wait_for_machines();
    // Those that were killed have left their containers, which listing removes.
    container::list(paths)?;
    Ok(signal.map_or(code, |signal| 128u8.wrapping_add(signal as u8)))
}

fn run_arguments(
    root: Option<&Path>,
    policy: Option<&Path>,
    arguments: &CloneArguments,
) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    if let Some(root) = root {
        words.extend(["--root".into(), root.into()]);
    }
    if let Some(policy) = policy {
        words.extend(["--signature-policy".into(), policy.into()]);
    }
    words.extend(["run".into(), "--rm".into(), "--from".into(), (&arguments.snapshot).into()]);
    for step in &arguments.confinement.unconfined {
        words.extend(["--unconfined".into(), step.name().into()]);
    }
    if let Some(parent) = &arguments.confinement.cgroup_parent {
        words.extend(["--cgroup-parent".into(), parent.into()]);
    }
    if arguments.confinement.core_scheduling {
        words.push("--core-scheduling".into());
    }
    for env in &arguments.env {
        words.extend(["--env".into(), env.into()]);
    }
    for label in &arguments.label {
        words.extend(["--label".into(), label.into()]);
    }
    words.push("--".into());
    words.extend(arguments.command.iter().map(OsString::from));
    words
}
