//! Progress of pulls and conversions: bars on a terminal, nothing elsewhere but a line at the begin.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use images::{Progress, Step};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Bars on standard error.
pub struct Bars {
    all: MultiProgress,
    bars: Mutex<HashMap<(Step, String), ProgressBar>>,
    draw: bool,
    quiet: bool,
}

impl Bars {
    /// Bars where standard error is a terminal; not even messages where `quiet`.
    pub fn new(quiet: bool) -> Bars {
        let draw = !quiet && std::io::stderr().is_terminal();
        Bars { all: MultiProgress::new(), bars: Mutex::default(), draw, quiet }
    }
}

impl Progress for Bars {
    fn begin(&self, step: Step, digest: &str, total: u64) {
        if !self.draw {
            return;
        }
        let bar = self.all.add(ProgressBar::new(total));
        let template = "{msg:28} [{bar:30}] {bytes:>10} / {total_bytes}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        let word = match step {
            Step::Download => "pulling",
            Step::Load => "loading",
            Step::Convert => "converting",
        };
        let short = digest.trim_start_matches("sha256:").chars().take(12).collect::<String>();
        bar.set_message(format!("{word} {short}"));
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        bars.insert((step, digest.to_owned()), bar);
    }

    fn advance(&self, step: Step, digest: &str, done: u64) {
        let bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = bars.get(&(step, digest.to_owned())) {
            bar.set_position(done);
        }
    }

    fn finish(&self, step: Step, digest: &str) {
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = bars.remove(&(step, digest.to_owned())) {
            bar.finish_and_clear();
        }
    }

    fn message(&self, text: &str) {
        if self.draw {
            let _ = self.all.println(text);
        } else if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }
}
