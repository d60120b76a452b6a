//! Where the time of a run goes. Every moment belongs to one activity, so that training is not charged for evaluations.
//!
//! Nothing waits for a device here. A CPU has done what it was told when the call returns; work of a GPU is queued, and the
//! clock that counts for it is that of the log lines, which wait for the device anyway: what they wait is an activity of
//! its own, and only the sum of a line's training is then the device's time, not its parts.

use std::time::Instant;

use serde::Serialize;

/// What a run spends time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activity {
    Data,
    Target,
    Draft,
    Communication,
    Waiting,
    Evaluation,
    Saving,
}

/// Wall time in seconds by activity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// Packing documents and counting their rows.
    #[serde(rename = "data_seconds")]
    pub data: f64,
    /// Waiting for hidden states of the training documents: for the target, or for a store that is read ahead.
    #[serde(rename = "target_seconds")]
    pub target: f64,
    /// Forward and backward pass of the draft, and its update.
    #[serde(rename = "draft_seconds")]
    pub draft: f64,
    /// Waiting for the sums of other ranks.
    #[serde(rename = "communication_seconds")]
    pub communication: f64,
    /// Waiting at log lines for what a GPU was told to do before.
    #[serde(rename = "waiting_seconds")]
    pub waiting: f64,
    /// Evaluations on held-out documents and decodes of held-out prompts.
    #[serde(rename = "evaluation_seconds")]
    pub evaluation: f64,
    /// Waiting for checkpoints: their copy in memory, and the one before where it is not on disk yet.
    #[serde(rename = "saving_seconds")]
    pub saving: f64,
}

impl Seconds {
    /// Time of training alone: neither evaluations nor checkpoints.
    pub fn training(&self) -> f64 {
        self.data + self.target + self.draft + self.communication + self.waiting
    }

    /// Name and seconds of each activity, in the order of a log line.
    pub fn parts(&self) -> [(&'static str, f64); 7] {
        [
            ("data", self.data),
            ("target", self.target),
            ("draft", self.draft),
            ("communication", self.communication),
            ("waiting", self.waiting),
            ("evaluation", self.evaluation),
            ("saving", self.saving),
        ]
    }

    /// `data 0.1, target 2.0, draft 1.3`, in seconds; what took no time is left out.
    pub fn listed(&self) -> String {
        let shown = self.parts().into_iter().filter(|(_, seconds)| *seconds >= 0.05);
        shown.map(|(name, seconds)| format!("{name} {seconds:.1}")).collect::<Vec<_>>().join(", ")
    }

    fn of(&mut self, activity: Activity) -> &mut f64 {
        match activity {
            Activity::Data => &mut self.data,
            Activity::Target => &mut self.target,
            Activity::Draft => &mut self.draft,
            Activity::Communication => &mut self.communication,
            Activity::Waiting => &mut self.waiting,
            Activity::Evaluation => &mut self.evaluation,
            Activity::Saving => &mut self.saving,
        }
    }
}

/// Time and tokens of some steps.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spent {
    pub(super) seconds: Seconds,
    pub(super) tokens: u64,
}

impl Spent {
    /// Tokens a second of training alone.
    pub(super) fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds.training().max(1e-9)
    }
}

/// Hands every moment to an activity.
#[derive(Debug)]
pub(super) struct Clock {
    last: Instant,
    /// Since the last log line.
    line: Spent,
    /// Since the process began to train.
    all: Spent,
    /// Of the last log line.
    rate: Option<f64>,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self { last: Instant::now(), line: Spent::default(), all: Spent::default(), rate: None }
    }

    /// What went by since the last call was this.
    pub(super) fn was(&mut self, activity: Activity) {
        let now = Instant::now();
        let seconds = (now - self.last).as_secs_f64();
        self.last = now;
        *self.line.seconds.of(activity) += seconds;
        *self.all.seconds.of(activity) += seconds;
    }

    /// A step was trained on so many tokens.
    pub(super) fn trained(&mut self, tokens: u64) {
        self.line.tokens += tokens;
        self.all.tokens += tokens;
    }

    /// What was spent since the last log line; a new one begins.
    pub(super) fn take_line(&mut self) -> Spent {
        let line = std::mem::take(&mut self.line);
        self.rate = Some(line.rate());
        line
    }

    /// What was spent so far.
    pub(super) fn all(&self) -> Spent {
        self.all
    }

    /// Tokens a second for the eye: those of the last log line, or of the steps so far where there was none.
    pub(super) fn rate(&self) -> f64 {
        self.rate.unwrap_or_else(|| self.line.rate())
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    #[test]
    fn evaluations_and_checkpoints_are_not_training() {
        let begin = Instant::now();
        let mut clock = Clock::start();
        let pass = |clock: &mut Clock, milliseconds, activity| {
            sleep(Duration::from_millis(milliseconds));
            clock.was(activity);
        };
        pass(&mut clock, 10, Activity::Evaluation);
        pass(&mut clock, 2, Activity::Data);
        pass(&mut clock, 4, Activity::Target);
        pass(&mut clock, 6, Activity::Draft);
        clock.trained(100);
        let first = clock.take_line();
        pass(&mut clock, 20, Activity::Saving);
        pass(&mut clock, 3, Activity::Draft);
        clock.trained(50);
        let (second, all, wall) = (clock.take_line(), clock.all(), begin.elapsed().as_secs_f64());
        let (one, two) = (first.seconds, second.seconds);
        assert!(one.data >= 0.002 && one.target >= 0.004 && one.draft >= 0.006 && one.evaluation >= 0.01, "{one:?}");
        assert_eq!((first.rate() * one.training()).round(), 100.0);
        assert!(one.training() <= one.data + one.target + one.draft + 1e-9);
        // What follows a log line is in the next one alone.
        assert!(two.saving >= 0.02 && two.draft >= 0.003 && two.evaluation == 0.0 && second.tokens == 50, "{two:?}");
        let sum = all.seconds.parts().iter().map(|(_, seconds)| seconds).sum::<f64>();
        assert!(all.tokens == 150 && sum <= wall && sum >= 0.045, "{sum} of {wall}");
    }
}
