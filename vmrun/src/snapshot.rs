//! `vmrun snapshot`.

use std::path::Path;

use engine::kernel::Kernels;
use engine::paths::Paths;
use engine::run::{self, WarmOptions};
use engine::snapshot::{self, Snapshot};
use engine::{spec, stdio};
use images::PullPolicy;
use serde::Serialize;

use crate::bars::Bars;
use crate::command::{Format, SnapshotCommand, SnapshotCreateArguments};
use crate::run::{cpus, disk, memory, network, pull_options, told};
use crate::{Failure, output, store};

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    name: String,
    image: String,
    command: String,
    created_at: u64,
    size: u64,
}

impl Row {
    fn new(snapshot: &Snapshot) -> Row {
        let manifest = &snapshot.manifest;
        Row {
            name: snapshot.name.clone(),
            image: manifest.image.clone(),
            command: manifest.main.as_ref().map_or(String::new(), |main| main.command.join(" ")),
            created_at: manifest.created,
            size: snapshot.disk_usage(),
        }
    }
}

/// Carries out a subcommand.
pub fn snapshot(
    paths: &Paths,
    policy: Option<&Path>,
    command: SnapshotCommand,
    debug: bool,
) -> Result<(), Failure> {
    match command {
        SnapshotCommand::Create(arguments) => {
            spec::check_name("the snapshot's name", &arguments.name)?;
            if arguments.warm {
                create_warm(paths, policy, &arguments, debug)?;
            } else {
                // Interrupted half-way, it would leave the container standing still.
                stdio::block_signals()?;
                snapshot::create(paths, &arguments.source, &arguments.name)?;
            }
            output::line(arguments.name);
        }
        SnapshotCommand::Ls { format } => {
            let snapshots = snapshot::list(paths)?;
            let rows = snapshots.iter().map(Row::new);
            if format == Format::Json {
                return rows.into_iter().try_for_each(|row| output::json(&row));
            }
            let rows: Vec<_> = rows
                .map(|row| {
                    let command: String = row.command.chars().take(20).collect();
                    let created = output::ago(row.created_at);
                    let command = if command.is_empty() { command } else { format!("{command:?}") };
                    [row.name, row.image, command, created, output::size(row.size)]
                })
                .collect();
            output::table(["NAME", "IMAGE", "COMMAND", "CREATED", "SIZE"], &rows);
        }
        SnapshotCommand::Rm { snapshots } => {
            for name in snapshots {
                snapshot::remove(paths, &name)?;
                output::line(name);
            }
        }
    }
    Ok(())
}

fn create_warm(
    paths: &Paths,
    policy: Option<&Path>,
    arguments: &SnapshotCreateArguments,
    debug: bool,
) -> Result<(), Failure> {
    let options = WarmOptions {
        image: arguments.source.clone(),
        memory: memory(arguments.memory.as_deref())?,
        cpus: cpus(arguments.cpus.as_deref())?,
        read_only: arguments.read_only,
        disk: disk(&arguments.storage_opt)?,
        network: network(arguments.network.as_deref())?,
        confinement: arguments.confinement.policy(),
        debug,
    };
    let kernel = Kernels::open(paths.state()).resolve(arguments.kernel.as_deref())?;
    let store = store::open(paths, policy, &arguments.confinement.unconfined)?;
    let bars = Bars::new(false);
    let image =
        store.obtain(&arguments.source, PullPolicy::Missing, &pull_options(false), &bars)?;
    let _lease = store.hold(&image)?;
    let device = store.root_device(&image, &bars)?;
    told(run::snapshot_warm(paths, &image, &device, &kernel, &options, &arguments.name))
}
