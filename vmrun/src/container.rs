//! `vmrun ps` and `vmrun rm`.

use engine::container::{self, Listed};
use engine::paths::Paths;
use serde::Serialize;

use crate::command::{Format, PsArguments};
use crate::{Failure, output};

/// With Docker's names of the fields.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    #[serde(rename = "ID")]
    id: String,
    image: String,
    command: String,
    created_at: u64,
    state: &'static str,
    status: String,
    names: String,
}

impl Row {
    fn new(listed: &Listed) -> Row {
        let config = &listed.config;
        let (state, status) = match (&listed.status, listed.running) {
            (_, true) => ("running", "Up".to_owned()),
            (Some(status), false) => {
                let since = output::ago(status.finished);
                ("exited", format!("Exited ({}) {since}", status.exit_code))
            }
            (None, false) => ("dead", "Dead".to_owned()),
        };
        Row {
            id: container::short(&config.id).to_owned(),
            image: config.image.clone(),
            command: config.command.join(" "),
            created_at: config.created,
            state,
            status,
            names: config.name.clone(),
        }
    }
}

/// Lists containers.
pub fn ps(paths: &Paths, arguments: &PsArguments) -> Result<(), Failure> {
    let listed = container::list(paths)?;
    let shown = listed.iter().filter(|one| one.running || arguments.all).map(Row::new);
    if arguments.quiet {
        shown.for_each(|row| output::line(row.id));
        return Ok(());
    }
    if arguments.format == Format::Json {
        return shown.into_iter().try_for_each(|row| output::json(&row));
    }
    let rows: Vec<_> = shown
        .map(|row| {
            let command: String = row.command.chars().take(20).collect();
            [
                row.id,
                row.image,
                format!("{command:?}"),
                output::ago(row.created_at),
                row.status,
                row.names,
            ]
        })
        .collect();
    output::table(["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "NAMES"], &rows);
    Ok(())
}

/// Removes containers.
pub fn rm(paths: &Paths, containers: &[String]) -> Result<(), Failure> {
    for name in containers {
        container::remove(paths, name)?;
        output::line(name);
    }
    Ok(())
}
