//! A diagnosis for people.

use super::{Diagnosis, Verdict};

/// Lines of text: every check, what to do about what is not well, and how to start the engines.
pub fn text(diagnosis: &Diagnosis) -> String {
    let mut lines = Vec::new();
    for finding in &diagnosis.findings {
        lines.push(format!("{:<8} {:<11} {}", finding.verdict.name(), finding.check, finding.found));
        if let Some(advice) = finding.advice.as_ref().filter(|_| finding.verdict != Verdict::Ok) {
            lines.push(format!("{:<20} -> {advice}", ""));
        }
    }
    let count = |verdict: Verdict| diagnosis.findings.iter().filter(|finding| finding.verdict == verdict).count();
    let plural = |count: usize, word: &str| if count == 1 { format!("1 {word}") } else { format!("{count} {word}s") };
    lines.push(String::new());
    lines.push(format!("{}, {}", plural(count(Verdict::Fault), "fault"), plural(count(Verdict::Warning), "warning")));
    if let Some(prices) = diagnosis.prices.as_ref().filter(|_| !diagnosis.launch.is_empty()) {
        let (guesses, speed) = prices.best();
        lines.push(String::new());
        lines.push(format!(
            "launch with {} a verification (from {}: a guess costs {:.2} verifications, about {speed:.2} times plain decoding \
             here)",
            if guesses == 1 { "1 guess".to_owned() } else { format!("{guesses} guesses") },
            prices.source,
            prices.guess
        ));
        for launch in &diagnosis.launch {
            let note = launch.note.as_ref().map_or(String::new(), |note| format!("  ({note})"));
            lines.push(format!("{}{note}", launch.engine));
            lines.extend(launch.commands.iter().map(|command| format!("  {command}")));
        }
    }
    lines.join("\n")
}
