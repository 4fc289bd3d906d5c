//! The command line. Every flag is documented here, once; `docs/run.md` says what becomes of each.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use engine::confinement::{Policy, Step};

/// Run container images as micro-VMs, each with its own kernel.
///
/// `vmrun IMAGE [COMMAND...]` is short for `vmrun run IMAGE [COMMAND...]`; images, pull, rmi, tag,
/// load and save are short for the commands of `vmrun image`.
#[derive(Parser)]
#[command(name = "vmrun", version, disable_help_subcommand = true)]
pub struct Options {
    /// Keep all state below this folder
    #[arg(long, global = true, env = "VMRUN_ROOT", value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Which images are accepted, and who must have signed them: a policy.json of containers(5)
    #[arg(long, global = true, env = "VMRUN_SIGNATURE_POLICY", value_name = "FILE")]
    pub signature_policy: Option<PathBuf>,
    /// Log what vmrun does to standard error
    #[arg(short = 'D', long, global = true)]
    pub debug: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run a command in a new micro-VM
    #[command(disable_help_flag = true)]
    Run(Box<RunArguments>),
    /// Manage images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Manage guest kernels
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Manage volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Manage snapshots
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Run many machines of a snapshot at once, until they end or this command does
    Clone(Box<CloneArguments>),
    /// List containers
    Ps(PsArguments),
    /// Remove containers that do not run
    Rm {
        /// Names, or the first digits of ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Say what this host has and lacks, with the fix for each
    Doctor {
        /// How to print
        #[arg(long, default_value = "table")]
        format: Format,
        /// Go through the checklist of a host on which strangers' machines run, instead
        #[arg(long)]
        production: bool,
        #[command(flatten)]
        confinement: ConfinementArguments,
    },
    /// Print a script that completes commands in a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
}

/// How to print a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// A JSON object a line
    Json,
}

/// Whether to pull an image before it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// Each time
    Always,
    /// When it is not there
    Missing,
    /// Never
    Never,
}

/// How VMMs are confined.
#[derive(Args)]
pub struct ConfinementArguments {
    /// Go on where a part of the jail of the VMM and of the image's converter is not possible on
    /// this host: cgroup, namespaces, landlock or seccomp. Each takes away a wall between the guest
    /// and the host
    #[arg(long, value_name = "PART", env = "VMRUN_UNCONFINED", value_delimiter = ',')]
    pub unconfined: Vec<Step>,
    /// Make the VMM's cgroup below this one which, without a slash in front, begins for others than root
    /// above the caller's own [default: vmrun]
    #[arg(long, value_name = "PATH", env = "VMRUN_CGROUP_PARENT")]
    pub cgroup_parent: Option<PathBuf>,
    /// Let no other process share a processor core with the VMM, which could listen in
    #[arg(long, env = "VMRUN_CORE_SCHEDULING")]
    pub core_scheduling: bool,
}

impl ConfinementArguments {
    /// As the engine has it.
    pub fn policy(&self) -> Policy {
        Policy {
            unconfined: self.unconfined.clone(),
            cgroup_parent: self.cgroup_parent.clone(),
            core_scheduling: self.core_scheduling,
        }
    }
}

/// How the process that converts images is confined.
#[derive(Args)]
pub struct ConverterArguments {
    /// Go on where a part of the jail of the image's converter is not possible on this host:
    /// namespaces, landlock or seccomp. Each takes away a wall between the image and the host
    #[arg(long, value_name = "PART", env = "VMRUN_UNCONFINED", value_delimiter = ',')]
    pub unconfined: Vec<Step>,
}

#[derive(Args)]
pub struct RunArguments {
    #[command(flatten)]
    pub confinement: ConfinementArguments,
    /// Set an environment variable: NAME=value, or NAME for this shell's value
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Add groups to the process
    #[arg(long, value_name = "GROUP")]
    pub group_add: Vec<String>,
    /// Run this program in place of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Name of the container
    #[arg(long)]
    pub name: Option<String>,
    /// Host name in the container
    #[arg(short = 'h', long)]
    pub hostname: Option<String>,
    /// Print help
    #[arg(long, action = clap::ArgAction::Help)]
    pub help: Option<bool>,
    /// Keep standard input open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,
    /// Memory of the machine, for example 1g
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Number of CPUs of the machine
    #[arg(long, value_name = "N")]
    pub cpus: Option<String>,
    /// Make the root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Mount a tmpfs
    #[arg(long, value_name = "DIR[:OPTIONS]")]
    pub tmpfs: Vec<String>,
    /// Mount a volume (NAME:/dir) or an ext4 disk image (./disk.img:/dir)
    #[arg(short, long, value_name = "SOURCE:DIR[:ro]")]
    pub volume: Vec<String>,
    /// Options of the writable layer: size=SIZE
    #[arg(long, value_name = "size=SIZE")]
    pub storage_opt: Vec<String>,
    /// Network: default, or none
    #[arg(long, alias = "net", value_name = "NETWORK")]
    pub network: Option<String>,
    /// Name servers
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<String>,
    /// Domains in which names are sought
    #[arg(long, value_name = "DOMAIN")]
    pub dns_search: Vec<String>,
    /// Options of the resolver
    #[arg(long, value_name = "OPTION")]
    pub dns_option: Vec<String>,
    /// Add a line to /etc/hosts
    #[arg(long, value_name = "NAME:ADDRESS")]
    pub add_host: Vec<String>,
    /// IPv4 address of the machine
    #[arg(long, value_name = "ADDRESS")]
    pub ip: Option<Ipv4Addr>,
    /// Guest kernel: the name of an imported one, or a file
    #[arg(long, value_name = "NAME|FILE")]
    pub kernel: Option<String>,
    /// Whether to pull the image
    #[arg(long, default_value = "missing")]
    pub pull: Pull,
    /// Platform of the image; only linux/amd64
    #[arg(long)]
    pub platform: Option<String>,
    /// Do not show the progress of a pull
    #[arg(short, long)]
    pub quiet: bool,
    /// Resource limits of the process
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub ulimit: Vec<String>,
    /// Set a label of the container
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub label: Vec<String>,
    /// Write the container's id to a file
    #[arg(long, value_name = "FILE")]
    pub cidfile: Option<PathBuf>,
    /// Forward signals to the process
    #[arg(long, default_value_t = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub sig_proxy: bool,
    /// Pull over plain HTTP
    #[arg(long)]
    pub plain_http: bool,
    /// Run in the background. Not supported yet
    #[arg(short, long, hide = true)]
    pub detach: bool,
    /// Publish a port. Not supported yet
    #[arg(short, long, hide = true, value_name = "PORT")]
    pub publish: Vec<String>,
    /// Share a directory. Not supported yet
    #[arg(long, hide = true, value_name = "MOUNT")]
    pub mount: Vec<String>,
    /// Restore a snapshot; what follows is the command, where none runs in it
    #[arg(long, value_name = "SNAPSHOT")]
    pub from: Option<String>,
    /// The image: a name, or docker-archive:FILE, oci-archive:FILE, oci:DIR
    #[arg(required_unless_present = "from")]
    pub image: Option<String>,
    /// The command, in place of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Subcommand)]
pub enum SnapshotCommand {
    /// Make a snapshot of a running container, or of a machine that waits for a command
    Create(Box<SnapshotCreateArguments>),
    /// List snapshots
    Ls {
        /// How to print
        #[arg(long, default_value = "table")]
        format: Format,
    },
    /// Remove snapshots
    Rm {
        /// Their names
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
}

#[derive(Args)]
pub struct SnapshotCreateArguments {
    #[command(flatten)]
    pub confinement: ConfinementArguments,
    /// Boot a machine of an image, and stop it before it runs a command
    #[arg(long)]
    pub warm: bool,
    /// Memory of the machine, for example 1g
    #[arg(short, long, value_name = "SIZE", requires = "warm")]
    pub memory: Option<String>,
    /// Number of CPUs of the machine
    #[arg(long, value_name = "N", requires = "warm")]
    pub cpus: Option<String>,
    /// Make the root file system read-only
    #[arg(long, requires = "warm")]
    pub read_only: bool,
    /// Options of the writable layer: size=SIZE
    #[arg(long, value_name = "size=SIZE", requires = "warm")]
    pub storage_opt: Vec<String>,
    /// Network: default, or none
    #[arg(long, alias = "net", value_name = "NETWORK", requires = "warm")]
    pub network: Option<String>,
    /// Guest kernel: the name of an imported one, or a file
    #[arg(long, value_name = "NAME|FILE", requires = "warm")]
    pub kernel: Option<String>,
    /// The container, by name or the first digits of its id; with --warm, the image
    #[arg(value_name = "CONTAINER|IMAGE")]
    pub source: String,
    /// Name of the snapshot
    pub name: String,
}

#[derive(Args)]
pub struct CloneArguments {
    #[command(flatten)]
    pub confinement: ConfinementArguments,
    /// How many
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub count: u16,
    /// Set an environment variable: NAME=value, or NAME for this shell's value
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Set a label of each container
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub label: Vec<String>,
    /// The snapshot
    pub snapshot: String,
    /// The command, where none runs in the snapshot
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Subcommand)]
pub enum ImageCommand {
    /// Pull an image from a registry or an archive
    Pull {
        /// A name, or docker-archive:FILE, oci-archive:FILE, oci:DIR
        source: String,
        /// Only print the image's name
        #[arg(short, long)]
        quiet: bool,
        /// Use plain HTTP
        #[arg(long)]
        plain_http: bool,
        #[command(flatten)]
        converter: ConverterArguments,
    },
    /// List images
    Ls {
        /// How to print
        #[arg(long, default_value = "table")]
        format: Format,
        /// Only print ids
        #[arg(short, long)]
        quiet: bool,
    },
    /// Print all that is known of images, as JSON
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Give an image another name
    Tag {
        /// Its name or id
        image: String,
        /// The new name
        name: String,
    },
    /// Remove images, or names of them
    Rm {
        /// Names or ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
        /// Also where containers were made of it, or several names
        #[arg(short, long)]
        force: bool,
    },
    /// Load images from an archive
    Load {
        /// The archive; standard input where it is not given
        #[arg(short, long, value_name = "FILE")]
        input: Option<PathBuf>,
        /// Print only the names
        #[arg(short, long)]
        quiet: bool,
        #[command(flatten)]
        converter: ConverterArguments,
    },
    /// Save images to an archive
    Save {
        /// The archive; standard output where it is not given
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// docker-archive (which is an OCI layout too) or oci-archive
        #[arg(long, default_value = "docker-archive")]
        format: ArchiveFormat,
        /// Names or ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Remove what nothing uses
    Prune {
        /// Also images that have a name and no container
        #[arg(short, long)]
        all: bool,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
}

/// Formats of `image save`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ArchiveFormat {
    /// What docker save writes
    DockerArchive,
    /// An OCI layout in a tar file
    OciArchive,
}

#[derive(Subcommand)]
pub enum KernelCommand {
    /// Import a vmlinux, a bzImage or a linux-image package
    Import {
        /// The file
        file: PathBuf,
        /// Use it when no other is asked for
        #[arg(long)]
        default: bool,
    },
    /// List kernels
    Ls {
        /// How to print
        #[arg(long, default_value = "table")]
        format: Format,
    },
    /// Print the kernel used when none is asked for, or choose another
    Default {
        /// The kernel to use
        name: Option<String>,
    },
    /// Remove a kernel
    Rm {
        /// Its name
        name: String,
    },
}

#[derive(Subcommand)]
pub enum VolumeCommand {
    /// Make a volume
    Create {
        /// Its name
        name: String,
        /// What it may grow to
        #[arg(long, default_value = "10g")]
        size: String,
    },
    /// List volumes
    Ls {
        /// How to print
        #[arg(long, default_value = "table")]
        format: Format,
    },
    /// Print all that is known of volumes, as JSON
    Inspect {
        /// Their names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
    },
    /// Remove the volumes that no container uses
    Prune {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
    /// Remove volumes
    Rm {
        /// Their names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
    },
}

#[derive(Args)]
pub struct PsArguments {
    /// Also those that have ended
    #[arg(short, long)]
    pub all: bool,
    /// Only print ids
    #[arg(short, long)]
    pub quiet: bool,
    /// How to print
    #[arg(long, default_value = "table")]
    pub format: Format,
}

/// Words that mean a command to users of Docker. Nobody who types one wants an image of that name
/// to be pulled and run.
const DOCKERS: [&str; 26] = [
    "attach",
    "build",
    "commit",
    "compose",
    "container",
    "cp",
    "create",
    "diff",
    "events",
    "exec",
    "info",
    "inspect",
    "kill",
    "login",
    "logout",
    "logs",
    "network",
    "pause",
    "port",
    "push",
    "restart",
    "search",
    "start",
    "stop",
    "system",
    "top",
];

/// Reads the command line; `run` may be left out before an image or flags of it.
pub fn parse(mut arguments: Vec<OsString>) -> Result<Options, clap::Error> {
    if let Some(at) = first_word(&arguments) {
        let definition = Options::command();
        let word = arguments.get(at).and_then(|word| word.to_str()).unwrap_or_default();
        let ours = definition.get_subcommands().any(|command| command.get_name() == word);
        match word {
            _ if ours || word == "help" => {}
            "images" => drop(arguments.splice(at..=at, ["image".into(), "ls".into()])),
            "rmi" => drop(arguments.splice(at..=at, ["image".into(), "rm".into()])),
            "pull" | "tag" | "load" | "save" => arguments.insert(at, "image".into()),
            _ if DOCKERS.contains(&word) => {
                let message = format!(
                    "vmrun has no command {word:?} yet; if an image is meant: vmrun run {word}\n"
                );
                return Err(clap::Error::raw(ErrorKind::InvalidSubcommand, message));
            }
            // An image, or a flag of run's.
            _ => arguments.insert(at, "run".into()),
        }
    }
    Options::try_parse_from(arguments)
}

/// The first argument that is not a flag of vmrun's own; `None` where there is none, or where help
/// or the version is asked for.
fn first_word(arguments: &[OsString]) -> Option<usize> {
    let mut at = 1;
    loop {
        match arguments.get(at)?.to_str().unwrap_or_default() {
            "-h" | "--help" | "-V" | "--version" => return None,
            "-D" | "--debug" => at += 1,
            "--root" | "--signature-policy" => at += 2,
            word if word.starts_with("--root=") => at += 1,
            word if word.starts_with("--signature-policy=") => at += 1,
            _ => return Some(at),
        }
    }
}

/// Prints a completion script.
pub fn completion(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Options::command(), "vmrun", &mut script);
    crate::output::line(String::from_utf8_lossy(&script).trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn run(line: &str) -> RunArguments {
        match parse(words(line)).unwrap_or_else(|error| panic!("{line}: {error}")).command {
            Command::Run(arguments) => *arguments,
            _ => panic!("{line}: not a run"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn run_may_be_left_out() {
        for line in [
            "vmrun alpine echo -n x",
            "vmrun run alpine echo -n x",
            "vmrun --root /r alpine echo -n x",
            "vmrun --signature-policy p --root=/r alpine echo -n x",
            "vmrun --signature-policy=p alpine echo -n x",
        ] {
            let run = run(line);
            assert_eq!(run.image.as_deref(), Some("alpine"));
            assert_eq!(run.command, ["echo", "-n", "x"], "{line}");
        }
        let flags = run("vmrun --rm -it -e A=1 alpine sh");
        assert!(flags.rm && flags.interactive && flags.tty);
        assert_eq!(flags.env, ["A=1"]);
        assert_eq!(flags.image.as_deref(), Some("alpine"));
        assert!(parse(words("vmrun")).is_err());
        assert!(matches!(parse(words("vmrun image ls")).unwrap().command, Command::Image(_)));
        assert!(parse(words("vmrun --no-such alpine")).is_err());
        // As Docker's run has it.
        assert_eq!(run("vmrun run -h web alpine").hostname.as_deref(), Some("web"));
        assert!(parse(words("vmrun -h web")).is_err_and(|error| !error.use_stderr()));
    }

    #[test]
    fn dockers_words_mean_what_they_mean_there() {
        let image = |line: &str| match parse(words(line)).unwrap().command {
            Command::Image(command) => command,
            _ => panic!("{line}"),
        };
        assert!(matches!(image("vmrun images -q"), ImageCommand::Ls { quiet: true, .. }));
        assert!(matches!(image("vmrun pull alpine"), ImageCommand::Pull { .. }));
        assert!(matches!(image("vmrun -D rmi -f alpine"), ImageCommand::Rm { force: true, .. }));
        for word in DOCKERS {
            let error = parse(words(&format!("vmrun {word} x"))).err().unwrap();
            assert!(error.to_string().contains(&format!("vmrun run {word}")), "{error}");
            assert_eq!(run(&format!("vmrun run {word}")).image.as_deref(), Some(word));
        }
    }

    #[test]
    fn a_snapshot_takes_the_place_of_an_image() {
        let arguments = run("vmrun run --rm --from warm echo -n x");
        assert_eq!(arguments.from.as_deref(), Some("warm"));
        assert_eq!(arguments.image.as_deref(), Some("echo"));
        assert_eq!(arguments.command, ["-n", "x"]);
        assert!(run("vmrun --from warm").image.is_none());
        let clone = parse(words("vmrun clone -n 3 warm sh -c x")).unwrap().command;
        let Command::Clone(clone) = clone else { panic!() };
        assert_eq!((clone.count, clone.snapshot.as_str()), (3, "warm"));
        assert_eq!(clone.command, ["sh", "-c", "x"]);
        assert!(parse(words("vmrun clone -n 0 warm")).is_err());
        assert!(parse(words("vmrun snapshot create -m 1g container name")).is_err());
        assert!(parse(words("vmrun snapshot create --warm -m 1g alpine name")).is_ok());
    }

    #[test]
    fn every_flag_of_run_is_in_the_document() {
        let document = include_str!("../../docs/run.md");
        let definition = Options::command();
        let run = definition.find_subcommand("run").unwrap();
        for argument in run.get_arguments().filter(|argument| argument.get_long().is_some()) {
            let flag = format!("`--{}`", argument.get_long().unwrap());
            assert!(document.contains(&flag), "{flag} is not in docs/run.md");
        }
    }
}
