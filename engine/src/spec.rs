//! What a container runs: the image's configuration and the user's wishes, merged as Docker does.

use agent_protocol::{Mount, MountSource, Process, Rlimit, Stream, WindowSize};
use oci_spec::image::Config;

/// What a user may say about the process, beside the image.
#[derive(Clone, Debug, Default)]
pub struct ProcessOptions {
    /// In place of the image's CMD; empty for that.
    pub command: Vec<String>,
    /// In place of the image's ENTRYPOINT; `Some("")` for none at all.
    pub entrypoint: Option<String>,
    /// `NAME=value`, or `NAME` for the caller's own value; later ones win.
    pub env: Vec<String>,
    /// In place of the image's working directory.
    pub workdir: Option<String>,
    /// `USER[:GROUP]`, in place of the image's.
    pub user: Option<String>,
    /// Supplementary groups.
    pub groups: Vec<String>,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// A terminal of this size.
    pub terminal: Option<WindowSize>,
    /// Standard input is forwarded.
    pub interactive: bool,
}

/// Why there is nothing to run.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Neither image nor user says what.
    #[error("no command specified: the image has none; name a program after the image")]
    NoCommand,
    /// Not an absolute path.
    #[error("the working directory {0:?} is invalid, it needs to be an absolute path")]
    Workdir(String),
    /// Not a value of a flag.
    #[error("invalid value {value:?} for {flag}: {reason}")]
    Value {
        /// Which flag.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

fn wrong(flag: &'static str, value: &str, reason: impl Into<String>) -> SpecError {
    SpecError::Value { flag, value: value.to_owned(), reason: reason.into() }
}

/// The environment that every container has.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The main process of a container of an image with this configuration.
pub fn process(
    image: Option<&Config>,
    options: &ProcessOptions,
    hostname: &str,
) -> Result<Process, SpecError> {
    let of_image = |get: fn(&Config) -> &Option<Vec<String>>| {
        image.and_then(|image| get(image).clone()).unwrap_or_default()
    };
    let (entrypoint, default_command) = match &options.entrypoint {
        None => (of_image(Config::entrypoint), of_image(Config::cmd)),
        // An entrypoint of one's own drops the image's CMD, which was meant for the other.
        Some(program) if program.is_empty() => (Vec::new(), Vec::new()),
        Some(program) => (vec![program.clone()], Vec::new()),
    };
    let command =
        if options.command.is_empty() { default_command } else { options.command.clone() };
    let argv: Vec<String> = entrypoint.into_iter().chain(command).collect();
    if argv.first().is_none_or(String::is_empty) {
        return Err(SpecError::NoCommand);
    }
    let text = |get: fn(&Config) -> &Option<String>| {
        image.and_then(|image| get(image).clone()).filter(|text| !text.is_empty())
    };
    let cwd = options.workdir.clone().or_else(|| text(Config::working_dir)).unwrap_or("/".into());
    if !cwd.starts_with('/') {
        return Err(SpecError::Workdir(cwd));
    }
    let user = options.user.clone().or_else(|| text(Config::user)).unwrap_or_default();

    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if options.terminal.is_some() {
        env.push("TERM=xterm".to_owned());
    }
    // A name alone would be filled with the caller's own value: an image must not ask for it.
    for entry in of_image(Config::env).iter().filter(|entry| entry.contains('=')) {
        set(&mut env, entry);
    }
    for entry in &options.env {
        set(&mut env, entry);
    }
    let mut streams = Vec::new();
    if options.interactive {
        streams.push(Stream::Stdin);
    }
    streams.push(Stream::Stdout);
    if options.terminal.is_none() {
        streams.push(Stream::Stderr);
    }
    Ok(Process {
        id: 0,
        argv,
        env,
        cwd,
        user,
        groups: options.groups.clone(),
        terminal: options.terminal,
        streams,
        rlimits: options.rlimits.clone(),
    })
}

/// Adds `NAME=value`, in place of an earlier one of that name. `NAME` alone takes the caller's
/// value, and removes the name where the caller has none.
fn set(env: &mut Vec<String>, entry: &str) {
    let (name, value) = match entry.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (entry, std::env::var(entry).ok()),
    };
    let same = |other: &String| other.split_once('=').is_some_and(|(other, _)| other == name);
    let new = value.map(|value| format!("{name}={value}"));
    match (env.iter_mut().find(|other| same(other)), new) {
        (Some(old), Some(new)) => *old = new,
        (None, Some(new)) => env.push(new),
        (_, None) => env.retain(|other| !same(other)),
    }
}

/// The lines of an `--env-file`.
pub fn parse_env_file(text: &str) -> Result<Vec<String>, SpecError> {
    let mut entries = Vec::new();
    for line in text.trim_start_matches('\u{feff}').lines() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split_once('=').map_or(line, |(name, _)| name);
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(wrong(
                "--env-file",
                line,
                "a variable's name has no white space and is not empty",
            ));
        }
        entries.push(line.to_owned());
    }
    Ok(entries)
}

/// Bytes of `512m`, `1g`, `1.5G`, `1073741824`, `64MiB`: powers of 1024, as Docker reads them.
pub fn parse_size(flag: &'static str, text: &str) -> Result<u64, SpecError> {
    let bad = || wrong(flag, text, "a size is a number with a unit b, k, m or g, for example 512m");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    let number: f64 = number.parse().map_err(|_| bad())?;
    let bytes = number * (1u64 << shift) as f64;
    // Beyond what a file or a memory can have; also where the number is none.
    if !(0.0..=(1u64 << 60) as f64).contains(&bytes) {
        return Err(bad());
    }
    Ok(bytes as u64)
}

/// `PATH[:OPTION,...]` of `--tmpfs`.
pub fn parse_tmpfs(text: &str) -> Result<Mount, SpecError> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    if !target.starts_with('/') || target.trim_matches('/').is_empty() {
        return Err(wrong("--tmpfs", text, "the path must be absolute and not /"));
    }
    let (mut size, mut mode, mut no_exec, mut read_only) = (0, 0o1777, true, false);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("size", value) => size = parse_size("--tmpfs", value)?,
            ("mode", value) => {
                mode = u32::from_str_radix(value, 8)
                    .ok()
                    .filter(|mode| *mode <= 0o7777)
                    .ok_or_else(|| wrong("--tmpfs", text, "mode is an octal number"))?;
            }
            ("exec", "") => no_exec = false,
            ("noexec", "") => no_exec = true,
            ("ro", "") => read_only = true,
            ("rw" | "nosuid" | "nodev", "") => {}
            _ => return Err(wrong("--tmpfs", text, format!("option {option:?} is not supported"))),
        }
    }
    let source = MountSource::Tmpfs { size, mode, no_exec };
    Ok(Mount { source, target: target.to_owned(), read_only })
}

/// `TYPE=SOFT[:HARD]` of `--ulimit`.
pub fn parse_ulimit(text: &str) -> Result<Rlimit, SpecError> {
    // Names and numbers of Linux on x86_64.
    const NAMES: [&str; 16] = [
        "cpu",
        "fsize",
        "data",
        "stack",
        "core",
        "rss",
        "nproc",
        "nofile",
        "memlock",
        "as",
        "locks",
        "sigpending",
        "msgqueue",
        "nice",
        "rtprio",
        "rttime",
    ];
    let bad = |reason: &str| wrong("--ulimit", text, reason);
    let (name, value) = text.split_once('=').ok_or_else(|| bad("it is NAME=SOFT[:HARD]"))?;
    let resource = NAMES
        .iter()
        .position(|known| *known == name)
        .ok_or_else(|| bad("there is no limit of this name"))?;
    let number = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        text => text.parse().map_err(|_| bad("a limit is a number or -1")),
    };
    let (soft, hard) = value.split_once(':').unwrap_or((value, value));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        return Err(bad("the soft limit is above the hard one"));
    }
    Ok(Rlimit { resource: resource as u32, soft, hard })
}

/// What `-v` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeArgument {
    /// A volume's name, or the path of a disk image.
    pub source: String,
    /// Where it is mounted.
    pub target: String,
    /// Read-only.
    pub read_only: bool,
}

impl VolumeArgument {
    /// Whether the source is a path on the host.
    pub fn is_path(&self) -> bool {
        self.source.starts_with(['/', '.', '~'])
    }
}

/// `SOURCE:TARGET[:ro|rw]` of `-v`.
pub fn parse_volume(text: &str) -> Result<VolumeArgument, SpecError> {
    let bad = |reason: &str| wrong("--volume", text, reason);
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts.as_slice() {
        [target] if target.starts_with('/') => {
            return Err(bad("anonymous volumes are not supported; give it a name: NAME:/path"));
        }
        [source, target] => (*source, *target, ""),
        [source, target, options] => (*source, *target, *options),
        _ => return Err(bad("it is NAME:/path[:ro] or DISK.img:/path[:ro]")),
    };
    if !target.starts_with('/') || target.trim_matches('/').is_empty() {
        return Err(bad("the path in the container must be absolute and not /"));
    }
    let read_only = match options {
        "" | "rw" => false,
        "ro" => true,
        _ => return Err(bad("the only options are ro and rw")),
    };
    let volume = VolumeArgument { source: source.to_owned(), target: target.to_owned(), read_only };
    if !volume.is_path() {
        check_name("--volume", source)?;
    }
    Ok(volume)
}

/// Names of containers and volumes, by Docker's rule.
pub fn check_name(flag: &'static str, name: &str) -> Result<(), SpecError> {
    let first = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let rest = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if !first || !rest || name.len() < 2 || name.len() > 200 {
        return Err(wrong(
            flag,
            name,
            "only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, two characters or more",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use oci_spec::image::ConfigBuilder;

    use super::*;

    fn image() -> Config {
        ConfigBuilder::default()
            .entrypoint(["/entry".to_owned(), "-x".to_owned()])
            .cmd(["default".to_owned()])
            .env(["A=image".to_owned(), "PATH=/image".to_owned()])
            .working_dir("/work".to_owned())
            .user("app".to_owned())
            .build()
            .unwrap()
    }

    fn argv(entrypoint: Option<&str>, command: &[&str]) -> Result<Vec<String>, SpecError> {
        let options = ProcessOptions {
            entrypoint: entrypoint.map(str::to_owned),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            ..Default::default()
        };
        process(Some(&image()), &options, "h").map(|process| process.argv)
    }

    #[test]
    fn entrypoint_and_command_combine_as_docker_has_them() {
        assert_eq!(argv(None, &[]).unwrap(), ["/entry", "-x", "default"]);
        assert_eq!(argv(None, &["a", "b"]).unwrap(), ["/entry", "-x", "a", "b"]);
        assert_eq!(argv(Some("/own"), &[]).unwrap(), ["/own"]);
        assert_eq!(argv(Some("/own"), &["a"]).unwrap(), ["/own", "a"]);
        assert_eq!(argv(Some(""), &["a"]).unwrap(), ["a"]);
        assert_eq!(argv(Some(""), &[]), Err(SpecError::NoCommand));
        let none = process(None, &ProcessOptions::default(), "h");
        assert_eq!(none, Err(SpecError::NoCommand));
    }

    #[test]
    fn the_users_words_come_before_the_images() {
        let options = ProcessOptions {
            env: vec!["A=mine".into(), "B=2".into(), "B=3".into(), "NOT_SET_ANYWHERE".into()],
            ..Default::default()
        };
        let made = process(Some(&image()), &options, "h").unwrap();
        assert_eq!(made.env, ["PATH=/image", "HOSTNAME=h", "A=mine", "B=3"]);
        assert_eq!((made.cwd.as_str(), made.user.as_str()), ("/work", "app"));
        assert_eq!(made.streams, [Stream::Stdout, Stream::Stderr]);
        let relative = ProcessOptions { workdir: Some("x".into()), ..Default::default() };
        assert!(process(Some(&image()), &relative, "h").is_err());
    }

    /// An image names a variable and gives no value: the caller's secrets are not for it.
    #[test]
    fn hostile_20_an_image_does_not_get_the_callers_variables() {
        let name = std::env::vars().map(|(name, _)| name).find(|name| name != "PATH").unwrap();
        let image = ConfigBuilder::default()
            .cmd(["x".to_owned()])
            .env([name.clone(), "B=image".to_owned()])
            .build()
            .unwrap();
        let made = process(Some(&image), &ProcessOptions::default(), "h").unwrap();
        assert_eq!(made.env, [PATH, "HOSTNAME=h", "B=image"]);
        let asked = ProcessOptions { env: vec![name.clone()], ..Default::default() };
        let made = process(Some(&image), &asked, "h").unwrap();
        let value = std::env::var(&name).unwrap();
        assert!(made.env.contains(&format!("{name}={value}")), "{:?}", made.env);
    }

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        let size = |text| parse_size("--memory", text).ok();
        assert_eq!(size("512m"), Some(512 << 20));
        assert_eq!(size("1.5G"), Some(3 << 29));
        assert_eq!(size("4096"), Some(4096));
        assert_eq!(size("64MiB"), Some(64 << 20));
        for bad in ["", "m", "-1", "1x", "1e9999", "99999999999999t", "nan", "1.2.3"] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }

    #[test]
    fn mounts_limits_and_names_are_checked() {
        let tmpfs = parse_tmpfs("/run:size=64k,mode=700,exec").unwrap();
        assert_eq!(tmpfs.source, MountSource::Tmpfs { size: 65536, mode: 0o700, no_exec: false });
        for bad in ["run", "/", "//:size=1m", "/run:size=", "/run:mode=9", "/run:uid=5"] {
            assert!(parse_tmpfs(bad).is_err(), "{bad}");
        }
        let limit = parse_ulimit("nofile=1024:4096").unwrap();
        assert_eq!((limit.resource, limit.soft, limit.hard), (7, 1024, 4096));
        assert_eq!(parse_ulimit("core=-1").unwrap().soft, u64::MAX);
        for bad in ["nofile", "files=1", "nofile=2:1", "nofile=x"] {
            assert!(parse_ulimit(bad).is_err(), "{bad}");
        }
        let volume = parse_volume("data:/var/lib:ro").unwrap();
        assert!(volume.read_only && !volume.is_path());
        assert!(parse_volume("./disk.img:/d").unwrap().is_path());
        for bad in ["/data", "a:b", "data:/", "data:/x:z", "a:b:c:d", "..:/x:q", "-x:/y", "x:/y"] {
            assert!(parse_volume(bad).is_err(), "{bad}");
        }
        let env = parse_env_file("# c\n\nA=1=2\n  B\n").unwrap();
        assert_eq!(env, ["A=1=2", "B"]);
        assert!(parse_env_file("A B=1").is_err());
    }
}
