//! `vmrun image`.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use engine::paths::Paths;
use images::{PruneOptions, Removed, SaveFormat, Source, Store};

use crate::bars::Bars;
use crate::command::{ArchiveFormat, Format, ImageCommand};
use crate::run::pull_options;
use crate::{Failure, output, store};

/// Carries out a subcommand.
pub fn image(paths: &Paths, policy: Option<&Path>, command: ImageCommand) -> Result<(), Failure> {
    // What takes no image in asks no policy, so that one that is wrong is in nobody's way.
    let store = Store::open(&paths.images())?;
    match command {
        ImageCommand::Pull { source, quiet, plain_http, converter } => {
            let source: Source = source.parse()?;
            let bars = Bars::new(quiet);
            let store = store::open(paths, policy, &converter.unconfined)?;
            let image = store.pull(&source, &pull_options(plain_http), &bars)?;
            // What a first run would wait for.
            store.root_device(&image, &bars)?;
            output::line(image.title());
        }
        ImageCommand::Ls { format, quiet } => list(&store, format, quiet)?,
        ImageCommand::Inspect { images } => {
            let all =
                images.iter().map(|name| store.inspect(name)).collect::<Result<Vec<_>, _>>()?;
            output::line(serde_json::to_string_pretty(&all)?);
        }
        ImageCommand::Tag { image, name } => store.tag(&image, &name)?,
        ImageCommand::Rm { images, force } => {
            for name in &images {
                if !force {
                    refuse_used(paths, &store, name)?;
                }
                for removed in store.remove(name, force)? {
                    print_removed(&removed);
                }
            }
        }
        ImageCommand::Load { input, quiet, converter } => {
            let bars = Bars::new(quiet);
            let store = store::open(paths, policy, &converter.unconfined)?;
            let images = match input {
                Some(path) => store.load(&path, &bars)?,
                None if io::stdin().is_terminal() => {
                    return Err(Failure::new(
                        "nothing to load: give --input FILE, or an archive on standard input",
                    ));
                }
                None => store.load_stream(&mut io::stdin().lock(), &bars)?,
            };
            for image in images {
                output::line(format!("Loaded image: {}", image.title()));
            }
        }
        ImageCommand::Save { output, format, images } => {
            let format = match format {
                ArchiveFormat::DockerArchive => SaveFormat::DockerArchive,
                ArchiveFormat::OciArchive => SaveFormat::OciArchive,
            };
            save(&store, output, format, &images)?;
        }
        ImageCommand::Prune { all, force } => prune(paths, &store, all, force)?,
    }
    Ok(())
}

fn list(store: &Store, format: Format, quiet: bool) -> Result<(), Failure> {
    let images = store.list()?;
    if quiet {
        for image in &images {
            output::line(image.id.short());
        }
        return Ok(());
    }
    if format == Format::Json {
        return images.iter().try_for_each(output::json);
    }
    let mut rows = Vec::new();
    for image in &images {
        let none = ["<none>:<none>".to_owned()];
        let names = if image.repo_tags.is_empty() { &none[..] } else { &image.repo_tags };
        for name in names {
            let (repository, tag) = name.rsplit_once(':').unwrap_or((name, ""));
            rows.push([
                repository.to_owned(),
                tag.to_owned(),
                image.id.short(),
                output::ago(u64::try_from(image.created).unwrap_or(0)),
                output::size(image.size),
            ]);
        }
    }
    output::table(["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"], &rows);
    Ok(())
}

/// An image of which a container is left is needed to know what that container is.
fn refuse_used(paths: &Paths, store: &Store, name: &str) -> Result<(), Failure> {
    let Some(image) = store.find(name)? else { return Ok(()) };
    // Taking away one name of several harms nobody.
    if image.names.len() > 1 {
        return Ok(());
    }
    let id = image.id().to_string();
    let containers = engine::container::list(paths)?;
    match containers.iter().find(|container| container.config.image_id == id) {
        None => Ok(()),
        Some(container) => Err(Failure::new(format!(
            "cannot remove {name}: container {} was made of it; remove that first (vmrun rm {}), or use --force",
            container.config.name, container.config.name
        ))),
    }
}

fn print_removed(removed: &Removed) {
    match removed {
        Removed::Untagged(name) => output::line(format!("Untagged: {name}")),
        Removed::Deleted(digest) => output::line(format!("Deleted: {digest}")),
    }
}

fn save(
    store: &Store,
    path: Option<std::path::PathBuf>,
    format: SaveFormat,
    images: &[String],
) -> Result<(), Failure> {
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    match path {
        Some(path) => {
            // Whole or not at all.
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let failed = |error: io::Error| Failure::new(format!("{}: {error}", path.display()));
            let mut file =
                tempfile::NamedTempFile::new_in(folder.unwrap_or(".".as_ref())).map_err(failed)?;
            store.save(&images, format, &mut file)?;
            file.persist(&path).map_err(|error| failed(error.error))?;
            Ok(())
        }
        None if io::stdout().is_terminal() => {
            Err(Failure::new("an archive is not for a terminal: give --output FILE, or redirect"))
        }
        None => {
            let mut stdout = io::stdout().lock();
            store.save(&images, format, &mut stdout)?;
            Ok(stdout.flush()?)
        }
    }
}

fn prune(paths: &Paths, store: &Store, all: bool, force: bool) -> Result<(), Failure> {
    if !force {
        let what = if all { "all images without a container" } else { "images without a name" };
        if !output::agreed_to_remove(what)? {
            return Ok(());
        }
    }
    let mut keep = engine::container::image_ids(paths)?;
    keep.extend(engine::snapshot::image_ids(paths)?);
    let keep = keep.iter().filter_map(|id| id.parse().ok()).collect();
    let report = store.prune(&PruneOptions { all, keep })?;
    report.images_deleted.iter().for_each(print_removed);
    output::line(format!("Total reclaimed space: {}", output::size(report.space_reclaimed)));
    Ok(())
}
