//! `vmrun volume`.

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
        VolumeCommand::Rm { volumes } => {
            for name in volumes {
                volume::remove(paths, &name)?;
                output::line(name);
            }
        }
    }
    Ok(())
}
