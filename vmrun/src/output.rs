//! What is printed: tables, JSON lines, messages of the program.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use tracing_subscriber::filter::LevelFilter;

use crate::Failure;

/// Messages of the program go to standard error, warnings and worse unless more is wanted.
pub fn log_to_stderr(debug: bool) {
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(debug)
        .init();
}

/// A line on standard output; a reader that has gone ends the program quietly, as it does `cat`.
pub fn line(text: impl Display) {
    if writeln!(std::io::stdout(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// A JSON object on a line of its own.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    line(serde_json::to_string(value)?);
    Ok(())
}

/// Asks whether what a prune is about to remove may go; an error where nobody can answer.
pub fn agreed_to_remove(what: &str) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::new("prune asks before it removes; use --force where nobody answers"));
    }
    eprint!("This removes {what}. Go on? [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// A table with its columns aligned, as Docker prints them.
pub fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) {
    let mut widths = header.map(|title| title.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let print = |cells: [&str; N]| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            text.push_str(cell);
            let fill = width - cell.chars().count() + 3;
            text.extend(std::iter::repeat_n(' ', fill));
        }
        line(text.trim_end());
    };
    print(header);
    for row in rows {
        print(row.each_ref().map(String::as_str));
    }
}

/// Bytes in decimal units, as Docker prints them: 4.26MB.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB", "TB"] {
        if value < 1000.0 {
            let digits = if value >= 100.0 || unit == "B" {
                0
            } else if value >= 10.0 {
                1
            } else {
                2
            };
            return format!("{value:.digits$}{unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.0}PB")
}

/// How long ago, in words: `3 minutes ago`.
pub fn ago(seconds_since_1970: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs()).saturating_sub(seconds_since_1970);
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..172_800 => (seconds / 3600, "hour"),
        172_800..1_209_600 => (seconds / 86400, "day"),
        1_209_600..5_184_000 => (seconds / 604_800, "week"),
        5_184_000..63_072_000 => (seconds / 2_592_000, "month"),
        _ => (seconds / 31_536_000, "year"),
    };
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {unit}{plural} ago")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let shown: Vec<_> =
            [0, 999, 1000, 4_260_000, 77_800_000, 123_000_000_000].map(size).to_vec();
        assert_eq!(shown, ["0B", "999B", "1.00kB", "4.26MB", "77.8MB", "123GB"]);
    }
}
