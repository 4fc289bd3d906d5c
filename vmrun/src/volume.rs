//! `vmrun volume`.

use std::path::PathBuf;

use engine::paths::Paths;
use engine::{spec, volume};
use serde::Serialize;

use crate::command::{Format, VolumeCommand};
use crate::{Failure, output};

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    name: String,
    driver: &'static str,
}

/// With Docker's names of the fields, and two of our own.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Details {
    name: String,
    driver: &'static str,
    /// The disk image: it is mounted in machines only.
    mountpoint: PathBuf,
    scope: &'static str,
    size: u64,
    used: u64,
}

/// Carries out a subcommand.
pub fn volume(paths: &Paths, command: VolumeCommand) -> Result<(), Failure> {
    match command {
        VolumeCommand::Create { name, size } => {
            spec::check_name("the volume's name", &name)?;
            volume::create(paths, &name, spec::parse_size("--size", &size)?)?;
            output::line(name);
        }
        VolumeCommand::Ls { format } => {
            let names = volume::list(paths)?;
            match format {
                Format::Json => {
                    for name in names {
                        output::json(&Row { name, driver: "local" })?;
                    }
                }
                Format::Table => {
                    let rows: Vec<_> =
                        names.into_iter().map(|name| ["local".to_owned(), name]).collect();
                    output::table(["DRIVER", "VOLUME NAME"], &rows);
                }
            }
        }
        VolumeCommand::Inspect { volumes } => {
            let inspect = |name: String| {
                let info = volume::inspect(paths, &name)?;
                Ok::<_, Failure>(Details {
                    name,
                    driver: "local",
                    mountpoint: info.path,
                    scope: "local",
                    size: info.size,
                    used: info.used,
                })
            };
            let all = volumes.into_iter().map(inspect).collect::<Result<Vec<_>, _>>()?;
            output::line(serde_json::to_string_pretty(&all)?);
        }
        VolumeCommand::Prune { force } => {
            if !force && !output::agreed_to_remove("all volumes that no container uses")? {
                return Ok(());
            }
            let (names, freed) = volume::prune(paths)?;
            names.into_iter().for_each(output::line);
            output::line(format!("Total reclaimed space: {}", output::size(freed)));
        }
        VolumeCommand::Rm { volumes } => {
            for name in volumes {
                volume::remove(paths, &name)?;
                output::line(name);
            }
        }
    }
    Ok(())
}
