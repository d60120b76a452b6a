//! Progress of long work: a bar on a terminal, now and then a plain line elsewhere.
//!
//! Everything goes to stderr, so stdout stays for results.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, WeakProgressBar};

use crate::error::foreign;

/// Time between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Times a second that a bar is drawn, at most.
const DRAWS_PER_SECOND: u8 = 10;

/// Whether this process says nothing about what it does.
static SILENT: AtomicBool = AtomicBool::new(false);

/// From now on this process shows no progress: of several that work on one thing, one speaks.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Whether [`silence`] was called.
pub fn is_silent() -> bool {
    SILENT.load(Ordering::Relaxed)
}

/// The bar on the terminal, so that a line of somebody else does not tear it apart.
static BAR: Mutex<Option<WeakProgressBar>> = Mutex::new(None);

/// Writes a line to stderr, above a bar where there is one; nothing where this process is silent.
pub fn say(line: &str) {
    if is_silent() {
        return;
    }
    let line = &foreign::message(line);
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(WeakProgressBar::upgrade);
    match bar.filter(|bar| !bar.is_finished()) {
        Some(bar) => bar.println(line),
        // A closed stderr must not end the work.
        None => drop(writeln!(std::io::stderr(), "{line}")),
    }
}

/// Progress of one piece of work.
pub struct Progress {
    label: String,
    total: u64,
    unit: String,
    /// What was done before this process began, which does not count towards its speed.
    initial: u64,
    started: Instant,
    output: Output,
}

enum Output {
    Bar(ProgressBar),
    Lines(Mutex<Lines>),
    Nothing,
}

struct Lines {
    sink: Box<dyn Write + Send>,
    interval: Duration,
    last: Instant,
    done: u64,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Progress {{ label: {:?}, total: {}, unit: {:?} }}", self.label, self.total, self.unit)
    }
}

impl Progress {
    /// Starts at nothing. `unit` is what is counted, in the plural: `tokens`, `steps`.
    pub fn new(label: &str, total: u64, unit: &str) -> Self {
        Self::resumed(label, total, unit, 0)
    }

    /// Starts with `done` units done by an earlier process.
    pub fn resumed(label: &str, total: u64, unit: &str, done: u64) -> Self {
        if is_silent() {
            return Self::with_output(label, total, unit, done, Output::Nothing);
        }
        if !std::io::stderr().is_terminal() {
            return Self::with_lines(label, total, unit, done, Box::new(std::io::stderr()), LINE_INTERVAL);
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
        bar.set_style(bar_style(unit));
        bar.set_prefix(label.to_owned());
        bar.set_position(done);
        bar.reset_eta();
        *BAR.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.downgrade());
        Self::with_output(label, total, unit, done, Output::Bar(bar))
    }

    fn with_lines(
        label: &str,
        total: u64,
        unit: &str,
        done: u64,
        sink: Box<dyn Write + Send>,
        interval: Duration,
    ) -> Self {
        let lines = Lines { sink, interval, last: Instant::now(), done };
        let progress = Self::with_output(label, total, unit, done, Output::Lines(Mutex::new(lines)));
        progress.say(&progress.line(done, Duration::ZERO, "starts"));
        progress
    }

    fn with_output(label: &str, total: u64, unit: &str, initial: u64, output: Output) -> Self {
        let (label, unit) = (label.to_owned(), unit.to_owned());
        Self { label, total, unit, initial, started: Instant::now(), output }
    }

    /// How much is done now, and what is worth saying about it.
    pub fn set(&self, done: u64, message: &str) {
        match &self.output {
            Output::Bar(bar) => {
                bar.set_message(message.to_owned());
                bar.set_position(done);
            }
            Output::Lines(lines) => {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                lines.done = done;
                if lines.last.elapsed() >= lines.interval {
                    lines.last = Instant::now();
                    lines.write(&self.line(done, self.started.elapsed(), message));
                }
            }
            Output::Nothing => {}
        }
    }

    /// Ends with a last message; the bar stays where it is.
    pub fn finish(&self, message: &str) {
        match &self.output {
            Output::Bar(bar) => bar.abandon_with_message(message.to_owned()),
            Output::Lines(lines) => {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                let line = self.line(lines.done, self.started.elapsed(), message);
                lines.write(&line);
            }
            Output::Nothing => {}
        }
    }

    /// Writes a line of its own to stderr without breaking the bar.
    pub fn println(&self, text: &str) {
        let text = foreign::message(text);
        match &self.output {
            Output::Bar(bar) => bar.println(text),
            Output::Lines(_) | Output::Nothing => self.say(&text),
        }
    }

    fn say(&self, text: &str) {
        if let Output::Lines(lines) = &self.output {
            lines.lock().unwrap_or_else(PoisonError::into_inner).write(text);
        }
    }

    /// `train: 120/2000 steps (6 %), 3.4 steps/s, 9m 13s left, loss 2.5`
    fn line(&self, done: u64, elapsed: Duration, message: &str) -> String {
        let (label, total, unit) = (&self.label, self.total, &self.unit);
        let percent = if total == 0 { 100 } else { u128::from(done) * 100 / u128::from(total) };
        let mut line = format!("{label}: {done}/{total} {unit} ({percent} %)");
        let rate = done.saturating_sub(self.initial) as f64 / elapsed.as_secs_f64();
        if rate.is_finite() && rate > 0.0 {
            line.push_str(&format!(", {} {unit}/s", rounded(rate)));
            if done < total {
                line.push_str(&format!(", {} left", clock((total - done) as f64 / rate)));
            }
        }
        if !message.is_empty() {
            line.push_str(&format!(", {message}"));
        }
        line
    }
}

impl Lines {
    /// A closed stderr must not end the work.
    fn write(&mut self, line: &str) {
        let _ = writeln!(self.sink, "{line}").and_then(|()| self.sink.flush());
    }
}

fn bar_template(unit: &str) -> String {
    let unit = unit.replace(['{', '}'], "");
    format!("{{prefix}} [{{bar:24}}] {{pos}}/{{len}} {unit}, {{speed}} {unit}/s, {{eta}} left, {{wide_msg}}")
}

fn bar_style(unit: &str) -> ProgressStyle {
    ProgressStyle::with_template(&bar_template(unit))
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
        .with_key("speed", |state: &indicatif::ProgressState, text: &mut dyn std::fmt::Write| {
            let _ = text.write_str(&rounded(state.per_sec()));
        })
}

/// Three digits at least, no false precision.
fn rounded(rate: f64) -> String {
    let digits = match rate {
        rate if rate >= 100.0 => 0,
        rate if rate >= 1.0 => 1,
        _ => 3,
    };
    format!("{rate:.digits$}")
}

/// `45s`, `9m 13s`, `27h 5m`
fn clock(seconds: f64) -> String {
    // A rate near zero gives times beyond all meaning; `as` stops at the largest number.
    let seconds = seconds.ceil() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m {seconds}s"),
        (hours, minutes, _) => format!("{hours}h {minutes}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn text(shared: &Shared) -> String {
        String::from_utf8(shared.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        let progress = Progress::with_lines("train", 2000, "steps", 0, Box::new(std::io::sink()), LINE_INTERVAL);
        let line = progress.line(120, Duration::from_secs(40), "loss 2.5");
        assert_eq!(line, "train: 120/2000 steps (6 %), 3.0 steps/s, 10m 27s left, loss 2.5");
        assert_eq!(progress.line(2000, Duration::from_secs(4), ""), "train: 2000/2000 steps (100 %), 500 steps/s");
        assert_eq!(progress.line(0, Duration::from_secs(4), ""), "train: 0/2000 steps (0 %)");
        // What an earlier process did says nothing about the speed of this one.
        let resumed = Progress::with_lines("train", 2000, "steps", 100, Box::new(std::io::sink()), LINE_INTERVAL);
        let line = resumed.line(120, Duration::from_secs(40), "");
        assert_eq!(line, "train: 120/2000 steps (6 %), 0.500 steps/s, 1h 2m left");
        let empty = Progress::with_lines("pack", 0, "rows", 0, Box::new(std::io::sink()), LINE_INTERVAL);
        assert_eq!(empty.line(0, Duration::ZERO, ""), "pack: 0/0 rows (100 %)");
    }

    #[test]
    fn lines_come_at_the_start_at_intervals_and_at_the_end() {
        let shared = Shared::default();
        let progress = Progress::with_lines("a", 4, "rows", 0, Box::new(shared.clone()), Duration::from_secs(3600));
        progress.set(1, "quick");
        progress.set(2, "quick");
        progress.println("a word in between");
        progress.finish("done");
        let lines = text(&shared);
        let lines: Vec<&str> = lines.lines().collect();
        assert_eq!(lines[..2], ["a: 0/4 rows (0 %), starts", "a word in between"]);
        assert!(lines[2].starts_with("a: 2/4 rows (50 %)") && lines[2].ends_with(", done"), "{lines:?}");
        assert_eq!(lines.len(), 3);

        let shared = Shared::default();
        let progress = Progress::with_lines("a", 4, "rows", 0, Box::new(shared.clone()), Duration::ZERO);
        progress.set(1, "one");
        progress.set(2, "two");
        assert_eq!(text(&shared).lines().count(), 3);
    }

    #[test]
    fn the_bar_accepts_every_unit() {
        for unit in ["tokens", "{rows}", ""] {
            assert!(ProgressStyle::with_template(&bar_template(unit)).is_ok(), "{unit}");
        }
        let bar = ProgressBar::with_draw_target(Some(10), ProgressDrawTarget::hidden()).with_style(bar_style("tokens"));
        let progress = Progress::with_output("x", 10, "tokens", 0, Output::Bar(bar));
        progress.set(3, "loss 1");
        progress.println("line");
        progress.finish("done");
    }
}
