//! Several drafts of one target side by side: the same questions, one table, one page.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;
use tch::Kind;

use super::report::{self, AcceptanceReport};
use crate::checkpoint;
use crate::error::foreign;
use crate::html::{Bar, Line, bars, begin, chart, escape, section};
use crate::weights::WeightsFolder;

/// What was measured of one of several drafts.
#[derive(Debug, Clone, Serialize)]
pub struct Contender {
    /// What it is called beside the others.
    pub label: String,
    /// Numbers in its files, the target's own tables included where a file repeats them; none where it has no files.
    pub parameters: Option<u64>,
    /// Seconds of drafting for each verification.
    pub draft_seconds: f64,
    /// Seconds of the target's pass and choices for each verification.
    pub verify_seconds: f64,
    /// Everything else.
    #[serde(flatten)]
    pub report: AcceptanceReport,
}

/// Drafts in the order in which they were named.
#[derive(Debug, Clone, Serialize)]
pub struct Beside {
    /// One for each draft.
    pub drafts: Vec<Contender>,
}

impl Beside {
    /// Drafts, each called by the end of its path, and by its tree too where another one has that name.
    pub fn new(mut drafts: Vec<Contender>) -> Self {
        let names: Vec<String> = drafts.iter().map(Contender::name).collect();
        for (draft, name) in drafts.iter_mut().zip(&names) {
            let is_alone = names.iter().filter(|other| *other == name).count() == 1;
            draft.label = if is_alone { name.clone() } else { format!("{name} {}", draft.setting("tree")) };
        }
        Self { drafts }
    }
}

impl Contender {
    /// Of a draft by the place of its files.
    pub fn new(draft: Option<&Path>, report: AcceptanceReport) -> Self {
        let speed = report.all.drafted;
        let rounds = report.all.acceptance.rounds.max(1) as f64;
        let seconds = |share: f64| share * speed.decode_seconds / rounds;
        let (draft_seconds, verify_seconds) = (seconds(speed.draft_share), seconds(speed.verify_share));
        Self { label: String::new(), parameters: draft.and_then(parameters), draft_seconds, verify_seconds, report }
    }

    fn setting(&self, key: &str) -> String {
        self.report.settings.get(key).and_then(|value| value.as_str()).unwrap_or("-").to_owned()
    }

    /// The end of its path, which tells it from the others.
    fn name(&self) -> String {
        let draft = self.setting("draft");
        let words: Vec<&str> = draft.trim_end_matches('/').rsplit('/').take(2).collect();
        words.into_iter().rev().collect::<Vec<_>>().join("/")
    }

    /// Its columns, as they are shown.
    fn columns(&self) -> [String; 9] {
        let all = &self.report.all;
        let found = &self.report.lossless;
        let depths: Vec<String> =
            self.report.per_depth.iter().take(DEPTHS).map(|share| format!("{share:.2}")).collect();
        [
            self.label.clone(),
            self.setting("method"),
            self.parameters.map_or("-".to_owned(), |count| format!("{:.1} M", count as f64 / 1e6)),
            format!("{:.3}", all.acceptance.acceptance_length),
            depths.join(" "),
            format!("{:.2}", 1e3 * self.draft_seconds),
            format!("{:.2}", all.drafted.tokens_per_second),
            all.speedup.map_or("-".to_owned(), |speedup| format!("{speedup:.2}x")),
            match (found.promise, found.compared, found.faults) {
                ("exact", 0, _) => "not compared".to_owned(),
                ("exact", _, 0) => "yes".to_owned(),
                ("exact", _, faults) => format!("{faults} WRONG"),
                ("distribution", ..) => "in distribution".to_owned(),
                _ => "lossy".to_owned(),
            },
        ]
    }
}

/// Depths that a table shows.
const DEPTHS: usize = 6;

const HEADS: [&str; 9] = [
    "draft",
    "method",
    "parameters",
    "tau",
    "right at depth 1, 2, ...",
    "draft ms",
    "tokens/s",
    "speed-up",
    "lossless",
];

/// Numbers of a checkpoint or of an export's files; none where there are none to be read.
fn parameters(draft: &Path) -> Option<u64> {
    if let Ok(found) = checkpoint::find(draft) {
        let tensors = found.tensors().ok()?;
        let own = tensors.iter().filter(|(_, tensor)| is_number(tensor.kind()));
        return Some(own.map(|(_, tensor)| tensor.numel() as u64).sum());
    }
    let files: Vec<_> = match draft.is_dir() {
        true => std::fs::read_dir(draft).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        false => vec![draft.to_path_buf()],
    };
    let is_weights = |path: &&std::path::PathBuf| {
        path.extension().is_some_and(|extension| extension == "safetensors" || extension == "gguf")
    };
    let counted = files.iter().filter(is_weights).map(|file| {
        let weights = WeightsFolder::open(file).ok()?;
        let own = weights.names().filter(|name| weights.kind(name).is_some_and(is_number));
        Some(own.filter_map(|name| weights.shape(name)).map(|shape| shape.iter().product::<i64>() as u64).sum::<u64>())
    });
    counted.collect::<Option<Vec<u64>>>().filter(|counts| !counts.is_empty()).map(|counts| counts.iter().sum())
}

/// Whether tensors of this kind hold weights and no names.
fn is_number(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double)
}

/// A table for people.
pub fn text(beside: &Beside) -> String {
    let rows: Vec<[String; 9]> = beside.drafts.iter().map(Contender::columns).collect();
    let heads = HEADS.map(str::to_owned);
    let width = |column: usize| {
        let all = rows.iter().chain([&heads]);
        all.map(|row| foreign::name(&row[column]).chars().count()).max().unwrap_or(0)
    };
    let line = |row: &[String; 9]| {
        let cell = |(column, text): (usize, &String)| {
            let (text, width) = (foreign::name(text), width(column));
            // Names stand on the left, figures on the right.
            if [0, 1, 4, 8].contains(&column) { format!("{text:<width$}") } else { format!("{text:>width$}") }
        };
        row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&heads)];
    lines.extend(rows.iter().map(line));
    for draft in &beside.drafts {
        let lossless = report::lossless(&draft.report.lossless);
        lines.push(format!("{}: tree {}; {lossless}", foreign::name(&draft.label), draft.setting("tree")));
    }
    lines.join("\n")
}

/// The length of a draft's bar, and what stands behind it.
type Measure = fn(&Contender) -> (f64, String);

/// The page.
pub fn page(beside: &Beside) -> String {
    let first = beside.drafts.first();
    let setting = |key: &str| first.map_or("-".to_owned(), |draft| draft.setting(key));
    let mut page = begin(&format!("{} drafts side by side", beside.drafts.len()));
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<p>target {}, policy {}, {} answers each</p>",
        escape(&setting("target")),
        escape(&setting("policy")),
        first.map_or(0, |draft| draft.report.all.answers)
    );
    table(&mut page, beside);
    let all = |of: Measure| {
        let bar = move |draft: &Contender| {
            let (value, shown) = of(draft);
            Bar { label: draft.label.clone(), value, shown }
        };
        beside.drafts.iter().map(bar).collect::<Vec<Bar>>()
    };
    let charts: [(&str, &str, Measure); 4] = [
        ("Acceptance length", "Tokens a verification, the target's own one included.", |draft| {
            let length = draft.report.all.acceptance.acceptance_length;
            (length, format!("{length:.3}"))
        }),
        ("Speed-up", "Against plain decoding of the same questions in turns.", |draft| {
            let speedup = draft.report.all.speedup.unwrap_or(0.0);
            (
                speedup,
                draft.report.all.speedup.map_or("not measured".to_owned(), |speedup| format!("{speedup:.2}\u{d7}")),
            )
        }),
        ("Tokens a second", "Prompts left out.", |draft| {
            let speed = draft.report.all.drafted.tokens_per_second;
            (speed, format!("{speed:.1}"))
        }),
        ("Drafting", "Milliseconds for each verification.", |draft| {
            let time = 1e3 * draft.draft_seconds;
            (time, format!("{time:.2} ms"))
        }),
    ];
    for (title, what, of) in charts {
        section(&mut page, title, what);
        let all = all(of);
        let most = all.iter().map(|bar| bar.value).fold(0.0, f64::max);
        bars(&mut page, all.into_iter(), most);
    }
    section(&mut page, "Guesses accepted at each depth", "Share of the verifications whose tree is that deep.");
    let lines: Vec<Line> = (beside.drafts.iter().enumerate())
        .map(|(colour, draft)| Line {
            name: draft.label.clone(),
            points: (1..).zip(&draft.report.per_depth).map(|(depth, &share)| (f64::from(depth), share)).collect(),
            colour,
            is_dashed: false,
        })
        .collect();
    chart(&mut page, "depth", &lines);
    for draft in &beside.drafts {
        section(&mut page, &draft.label, &format!("tree {}", draft.setting("tree")));
        let wrong = if draft.report.lossless.faults > 0 { " class=\"bad\"" } else { "" };
        let _ = write!(page, "<p{wrong}>{}</p>", escape(&report::lossless(&draft.report.lossless)));
        let settings = serde_json::to_string_pretty(&draft.report.settings).unwrap_or_default();
        let _ = write!(page, "<pre>{}</pre>", escape(&settings));
    }
    page.push_str("</html>");
    page
}

fn table(page: &mut String, beside: &Beside) {
    let cells =
        |tag: &str, row: &[String]| row.iter().map(|text| format!("<{tag}>{}", escape(text))).collect::<String>();
    let _ = write!(page, "<table><tr>{}</tr>", cells("th", &HEADS.map(str::to_owned)));
    for draft in &beside.drafts {
        let _ = write!(page, "<tr>{}</tr>", cells("td", &draft.columns()));
    }
    page.push_str("</table>");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Measured;
    use super::*;
    use crate::weights::writer;

    fn contender(draft: &str) -> Contender {
        let settings = json!({"draft": draft, "method": "a <b>", "tree": "chain:2", "target": "t", "policy": "keyed"});
        let measured = Measured { groups: Vec::new(), divergences: Vec::new(), processes: 1, seconds: 1.0 };
        let mut report = AcceptanceReport::new(settings, "exact", measured);
        report.all.acceptance.rounds = 10;
        report.all.drafted.decode_seconds = 2.0;
        report.all.drafted.draft_share = 0.25;
        report.per_depth = vec![0.5, 0.25];
        Contender::new(None, report)
    }

    #[test]
    fn drafts_stand_side_by_side_in_text_and_on_the_page() {
        let beside = Beside::new(vec![contender("runs/one/export"), contender("runs/two/export")]);
        assert_eq!(beside.drafts[0].draft_seconds, 0.05);
        let text = text(&beside);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("draft") && lines[0].ends_with("lossless"), "{text}");
        assert!(lines[1].starts_with("one/export") && lines[2].starts_with("two/export"), "{text}");
        assert!(lines[1].contains("0.50 0.25") && lines[1].contains("50.00"), "{text}");
        let page = page(&beside);
        assert!(page.contains("a &lt;b&gt;") && !page.contains("a <b>") && !page.contains("NaN"), "{page}");
        assert_eq!(page.matches("<polyline").count(), 2, "{page}");
        assert!(!page.contains("http"), "{page}");
        let same = Beside::new(vec![contender("runs/one/export"), contender("runs/one/export")]);
        assert_eq!(same.drafts[1].label, "one/export chain:2");
        let value = serde_json::to_value(&beside).unwrap();
        assert_eq!(value["drafts"][1]["settings"]["draft"], "runs/two/export");
        assert_eq!(value["drafts"][1]["parameters"], json!(null));
    }

    #[test]
    fn weights_are_counted_and_names_are_not() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(parameters(folder.path()), None);
        let tensor = |shape: &[i64], kind| tch::Tensor::zeros(shape, (kind, tch::Device::Cpu));
        let tensors = [
            ("a".to_owned(), tensor(&[3, 4], Kind::Float)),
            ("b".to_owned(), tensor(&[5], Kind::BFloat16)),
            ("d2t".to_owned(), tensor(&[9], Kind::Int64)),
        ];
        writer::write_tensors(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        assert_eq!(parameters(folder.path()), Some(17));
    }
}
