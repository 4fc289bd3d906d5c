//! `vmrun kernel`.

use engine::kernel::Kernels;
use engine::paths::Paths;
use serde::Serialize;

use crate::command::{Format, KernelCommand};
use crate::{Failure, output};

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row<'a> {
    name: &'a str,
    default: bool,
}

/// Carries out a subcommand.
pub fn kernel(paths: &Paths, command: KernelCommand) -> Result<(), Failure> {
    let kernels = Kernels::open(paths.state());
    match command {
        KernelCommand::Import { file, default } => {
            let kernel = kernels.import(&file)?;
            if default {
                kernels.set_default(&kernel.name)?;
            }
            output::line(kernel.name);
        }
        KernelCommand::Ls { format } => {
            let names = kernels.list()?;
            let default = kernels.default_name();
            let mut rows =
                names.iter().map(|name| Row { name, default: default.as_deref() == Some(name) });
            match format {
                Format::Json => rows.try_for_each(|row| output::json(&row))?,
                Format::Table => {
                    let mark = |row: Row<'_>| {
                        [row.name.to_owned(), if row.default { "*" } else { "" }.to_owned()]
                    };
                    let rows: Vec<_> = rows.map(mark).collect();
                    output::table(["NAME", "DEFAULT"], &rows);
                }
            }
        }
        KernelCommand::Default { name: Some(name) } => kernels.set_default(&name)?,
        KernelCommand::Default { name: None } => output::line(kernels.resolve(None)?.name),
        KernelCommand::Rm { name } => {
            kernels.remove(&name)?;
            output::line(name);
        }
    }
    Ok(())
}
