//! `report.html`: a run on one page that a person can send to a colleague. Everything but the samples comes from the run's
//! own `metrics.jsonl`, so a run that was resumed shows all of its parts.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::scale;
use super::series::{self, Point, Series};
use crate::error::Result;
use crate::html::{Bar, Line, bars, begin, chart, escape, figures, section, short};

/// Name of the page in a run's folder.
pub const PAGE_FILE: &str = "report.html";

/// What stands on the page beside the curves.
#[derive(Debug, Default)]
pub struct RunPage<'a> {
    /// The draft and its target, in words.
    pub title: String,
    /// The figures at the top: what is shown, and what it is.
    pub figures: Vec<(String, String)>,
    /// Answers that the trained draft guessed at.
    pub samples: &'a [SampleText],
    /// Versions, by name.
    pub versions: Vec<(String, String)>,
    /// The run's configuration.
    pub configuration: Value,
}

/// An answer to a held-out prompt, in pieces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SampleText {
    /// The end of the prompt.
    pub prompt: String,
    /// Text in order, and whether the draft had guessed it.
    pub pieces: Vec<(String, bool)>,
}

/// A chart: what it is called, what it shows, and which metrics by the last part of their names.
const CHARTS: [(&str, &str, &[&str]); 9] = [
    (
        "Acceptance length",
        "Tokens a verification on held-out prompts, decoded with the draft of that step; simulated lengths follow the text of the \
         documents instead.",
        &["acceptance_length", "simulated_acceptance_length"],
    ),
    ("Guesses accepted at each depth", "Decoded, of the verifications that are that deep.", &["accepted"]),
    ("Loss", "", &["loss"]),
    ("Accuracy", "Share of the supervised tokens that are the draft's first choice.", &["accuracy"]),
    (
        "Scales of pictures",
        "Share of maps in which draws from teacher and draft can agree everywhere, and how many scales in a row.",
        &["whole", "expected_scales"],
    ),
    ("Confidence", "", &["confidence_loss", "confidence_error"]),
    ("Learning rate", "", &["learning_rate"]),
    ("Norm of the gradient", "Before it is clipped.", &["gradient_norm"]),
    ("Tokens a second", "In training alone.", &["tokens_per_second"]),
];

/// The whole page of the run whose metrics are in `metrics`.
pub fn page(metrics: &Path, run: &RunPage<'_>) -> Result<String> {
    let series = series::read(metrics)?;
    let mut page = begin(&run.title);
    figures(&mut page, &run.figures);
    for (title, what, lasts) in CHARTS {
        let lines = lines_of(&series, lasts);
        if !lines.is_empty() {
            section(&mut page, title, what);
            chart(&mut page, "step", &lines);
        }
    }
    let over_time = over_time(&series);
    if !over_time.is_empty() {
        section(
            &mut page,
            "Acceptance over time",
            "Tokens a verification, decoded, by minutes since the first log line.",
        );
        chart(&mut page, "minutes", &over_time);
    }
    write_forecast(&mut page, &series);
    let seconds = seconds(&series);
    if !seconds.is_empty() {
        section(&mut page, "Where the time went", "Of all parts of the run, as it was logged.");
        let most = seconds.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
        let bar = |(name, value): (String, f64)| Bar { label: name, value, shown: format!("{} s", short(value)) };
        bars(&mut page, seconds.into_iter().map(bar), most);
    }
    if !run.samples.is_empty() {
        section(
            &mut page,
            "What the draft guesses",
            "Answers of the target to held-out prompts. Marked: tokens that the draft had guessed, and that cost no pass of their own.",
        );
        run.samples.iter().for_each(|sample| write_sample(&mut page, sample));
    }
    section(&mut page, "Versions", "");
    page.push_str("<table>");
    for (name, version) in &run.versions {
        // Writing to a string cannot fail.
        let _ = write!(page, "<tr><td>{}<td>{}</tr>", escape(name), escape(version));
    }
    page.push_str("</table>");
    section(&mut page, "Configuration", "");
    let configuration = serde_json::to_string_pretty(&run.configuration).unwrap_or_default();
    let _ = write!(page, "<pre>{}</pre></html>", escape(&configuration));
    Ok(page)
}

/// Metrics whose names end so, those of training broken and those that are held out whole, in one colour.
fn lines_of(series: &Series, lasts: &[&str]) -> Vec<Line> {
    let mut names: Vec<&str> = Vec::new();
    let mut lines = Vec::new();
    for (name, points) in series {
        let Some((prefix, rest)) = name.split_once('/') else { continue };
        if !lasts.contains(&rest.rsplit('/').next().unwrap_or(rest)) {
            continue;
        }
        let colour = names.iter().position(|known| *known == rest).unwrap_or_else(|| {
            names.push(rest);
            names.len() - 1
        });
        let points = points.iter().map(|point| (point.step, point.value)).collect();
        let name = if prefix == "eval" { format!("{rest}, held out") } else { rest.to_owned() };
        lines.push(Line { name, points, colour, is_dashed: prefix != "eval" });
    }
    lines
}

/// What more of the same would give, where the run has points enough to tell.
fn write_forecast(page: &mut String, series: &Series) {
    /// Times the run's own steps.
    const TIMES: [f64; 3] = [2.0, 4.0, 10.0];
    let Some(metric) = scale::metric_of(series) else { return };
    let points = scale::points_of(series, metric);
    let Ok(forecast) = scale::forecast(metric, points, scale::most_of(series, metric), &TIMES) else { return };
    section(
        page,
        "What more data would give",
        "A saturating power law through this run's own held-out values, and nine of ten fits with its residuals dealt anew. \
         It holds for a run like this one: `specforge scale` has the whole of it.",
    );
    page.push_str("<table><tr><th>times this run<th>expected<th>from<th>to</tr>");
    for one in &forecast.expected {
        let [value, low, high] = [one.value, one.low, one.high].map(short);
        let _ = write!(page, "<tr><td>{}<td>{value}<td>{low}<td>{high}</tr>", one.times);
    }
    page.push_str("</table>");
}

fn over_time(series: &Series) -> Vec<Line> {
    let begun = series.values().flatten().map(|point| point.time).fold(f64::INFINITY, f64::min);
    let points = series.get("eval/acceptance_length").filter(|points| points.len() > 1);
    let line = |points: &Vec<Point>| Line {
        name: "acceptance_length".to_owned(),
        points: points.iter().map(|point| ((point.time - begun) / 60.0, point.value)).collect(),
        colour: 0,
        is_dashed: false,
    };
    points.map(line).into_iter().collect()
}

/// Seconds by activity, those that are there.
fn seconds(series: &Series) -> Vec<(String, f64)> {
    let total =
        |points: &[Point]| points.iter().map(|point| point.value).filter(|value| value.is_finite()).sum::<f64>();
    let named = series.iter().filter_map(|(name, points)| {
        let activity = name.strip_prefix("train/")?.strip_suffix("_seconds")?;
        Some((activity.to_owned(), total(points)))
    });
    named.filter(|(_, seconds)| *seconds > 0.0).collect()
}

fn write_sample(page: &mut String, sample: &SampleText) {
    let _ = write!(page, "<div class=\"text\"><span class=\"quiet\">{}</span>", escape(&sample.prompt));
    for (text, guessed) in &sample.pieces {
        let text = escape(text);
        let _ = match guessed {
            true => write!(page, "<mark>{text}</mark>"),
            false => write!(page, "{text}"),
        };
    }
    page.push_str("</div><p></p>");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_of(rows: &str) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, rows).unwrap();
        let piece = |text: &str, guessed| (text.to_owned(), guessed);
        let samples =
            [SampleText { prompt: "1 < 2?".to_owned(), pieces: vec![piece("ye", false), piece("s & no", true)] }];
        page(&path, &RunPage { title: "a <draft>".to_owned(), samples: &samples, ..RunPage::default() })
    }

    #[test]
    fn curves_times_and_samples_are_on_the_page() {
        let rows = [
            r#"{"step":0,"time":100,"eval/loss":5.0,"eval/acceptance_length":1.0}"#,
            r#"{"step":1,"time":130,"train/loss":4.0,"train/draft_seconds":2.5,"train/learning_rate":0.001}"#,
            r#"{"step":2,"time":160,"train/loss":null,"train/draft_seconds":2.5,"train/learning_rate":0.002}"#,
            r#"{"step":2,"time":220,"eval/loss":3.0,"eval/acceptance_length":1.5,"eval/depth1/accepted":0.5}"#,
        ];
        let page = page_of(&rows.join("\n")).unwrap();
        for text in [
            "a &lt;draft&gt;",
            "acceptance_length, held out",
            "Acceptance over time",
            "1 &lt; 2?",
            "ye<mark>s &amp; no</mark>",
            ">5.000 s</text>",
            "depth1/accepted, held out",
        ] {
            assert!(page.contains(text), "{text} is not in\n{page}");
        }
        assert!(!page.contains("NaN") && !page.contains("<h2>Accuracy"), "{page}");
        // Held-out loss has a line of two points; that of training has one point that is finite.
        let loss = page.split("<h2>Loss").nth(1).unwrap().split("<h2>").next().unwrap();
        assert_eq!((loss.matches("<polyline").count(), loss.matches("<circle").count()), (1, 1), "{loss}");
    }

    #[test]
    fn a_run_that_logged_nothing_has_a_page_and_a_broken_line_is_named() {
        assert!(page_of("").unwrap().contains("What the draft guesses"));
        let error = page_of("{\"step\":1}\nhello").unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:2:"), "{error}");
    }
}
