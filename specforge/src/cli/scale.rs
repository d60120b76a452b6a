//! `specforge scale`

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::{Output, numbers};
use crate::error::{Error, Result, foreign};
use crate::html::short;
use crate::tracking::METRICS_FILE;
use crate::tracking::scale::{self, Expected, Forecast, Measured};
use crate::tracking::series::{self, Series};

#[derive(Debug, Clone, Args)]
pub(super) struct ScaleArgs {
    /// Folders of training runs, each with its metrics.jsonl.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Held-out metric; without it eval/acceptance_length, or eval/simulated_acceptance_length where that is missing.
    #[arg(long, value_name = "NAME")]
    metric: Option<String>,
    /// How many times a run's own data and compute.
    #[arg(long, value_name = "X,X,...", default_value = "2,4,10", value_delimiter = ',', allow_hyphen_values = true, value_parser = numbers::any)]
    times: Vec<f64>,
    /// One curve through the ends of all runs, which had different amounts of data, instead of a curve for each.
    #[arg(long)]
    ends: bool,
}

/// What is printed.
#[derive(Serialize)]
struct Report {
    curves: Vec<Curve>,
}

/// One curve, and what it says.
#[derive(Serialize)]
struct Curve {
    runs: Vec<PathBuf>,
    /// What its amounts count: `steps` or `tokens`.
    unit: &'static str,
    /// At the curve's end.
    spent: Spent,
    #[serde(flatten)]
    forecast: Forecast,
}

/// What a run has used up to its end.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Spent {
    steps: f64,
    /// Tokens that were trained, where they were logged.
    tokens: Option<f64>,
    /// Of training alone, where they were logged.
    seconds: Option<f64>,
}

pub(super) fn run(args: &ScaleArgs, output: &Output) -> Result<()> {
    if let Some(times) = args.times.iter().find(|times| !(times.is_finite() && **times > 0.0)) {
        return Err(Error::Usage(format!("--times: expected numbers above 0, got {times}")));
    }
    let read = |run: &PathBuf| {
        let path = run.join(METRICS_FILE);
        if !path.is_file() {
            return Err(Error::bad_file(run, format!("holds no {METRICS_FILE}"))
                .with_hint("name the output folder of a training run"));
        }
        Ok((run.clone(), series::read(&path)?))
    };
    let runs = args.runs.iter().map(read).collect::<Result<Vec<_>>>()?;
    let curves = match args.ends {
        true => vec![of_ends(args, &runs)?],
        false => runs.iter().map(|(run, series)| of_run(args, run, series)).collect::<Result<_>>()?,
    };
    let report = Report { curves };
    output.result(&report, || text(&report));
    Ok(())
}

/// The metric that was asked for, or the run's own.
fn metric(args: &ScaleArgs, run: &Path, series: &Series) -> Result<String> {
    if let Some(metric) = &args.metric {
        if series.contains_key(metric) {
            return Ok(metric.clone());
        }
        let held_out: Vec<&str> = series.keys().filter(|name| name.starts_with("eval/")).map(String::as_str).collect();
        let problem = format!("has no metric `{metric}`; held-out ones are {}", held_out.join(", "));
        return Err(Error::bad_file(run.join(METRICS_FILE), problem));
    }
    let own = scale::metric_of(series).map(str::to_owned);
    own.ok_or_else(|| {
        Error::bad_file(run.join(METRICS_FILE), "holds no held-out acceptance")
            .with_hint("train with eval.every, or with held-out documents and train.eval_every")
    })
}

/// The curve of a run by itself.
fn of_run(args: &ScaleArgs, run: &Path, series: &Series) -> Result<Curve> {
    let metric = metric(args, run, series)?;
    let points = scale::points_of(series, &metric);
    let forecast =
        scale::forecast(&metric, points, scale::most_of(series, &metric), &args.times).map_err(|problem| {
            Error::bad_file(run.join(METRICS_FILE), format!("`{metric}`: {problem}"))
                .with_hint("evaluate more often (eval.every, train.eval_every), or train longer")
        })?;
    let spent = spent(series, forecast.law.last);
    Ok(Curve { runs: vec![run.to_path_buf()], unit: "steps", spent, forecast })
}

/// The curve through the last values of several runs.
fn of_ends(args: &ScaleArgs, runs: &[(PathBuf, Series)]) -> Result<Curve> {
    let (first, series) = &runs[0];
    let metric = metric(args, first, series)?;
    let (mut points, mut most, mut whole) = (Vec::new(), None::<f64>, Spent::default());
    for (run, series) in runs {
        let last = scale::points_of(series, &metric).pop();
        let last =
            last.ok_or_else(|| Error::bad_file(run.join(METRICS_FILE), format!("has no value of `{metric}`")))?;
        let spent = spent(series, last.amount);
        let tokens = spent.tokens.ok_or_else(|| {
            Error::bad_file(run.join(METRICS_FILE), "does not say how many tokens were trained (train/tokens)")
        })?;
        points.push(Measured { amount: tokens, value: last.value });
        most = match (most, scale::most_of(series, &metric)) {
            (Some(known), Some(own)) => Some(known.max(own)),
            (known, own) => known.or(own),
        };
        if whole.tokens.is_none_or(|known| known < tokens) {
            whole = spent;
        }
    }
    let forecast = scale::forecast(&metric, points, most, &args.times)
        .map_err(|problem| Error::Failed(format!("the ends of {} runs, `{metric}`: {problem}", runs.len())))?;
    let runs = runs.iter().map(|(run, _)| run.clone()).collect();
    Ok(Curve { runs, unit: "tokens", spent: whole, forecast })
}

/// What a run had used up after so many steps.
fn spent(series: &Series, steps: f64) -> Spent {
    let until = |name: &str| series.get(name).map(|points| points.iter().filter(move |point| point.step <= steps));
    let tokens = until("train/tokens").and_then(|points| points.map(|point| point.value).reduce(f64::max));
    const TRAINING: [&str; 5] = ["data", "target", "draft", "communication", "waiting"];
    let seconds = TRAINING.iter().filter_map(|part| until(&format!("train/{part}_seconds")));
    let seconds: Vec<f64> =
        seconds.map(|points| points.map(|point| point.value).filter(|value| value.is_finite()).sum()).collect();
    let seconds = (!seconds.is_empty()).then(|| seconds.iter().sum());
    Spent { steps, tokens, seconds }
}

fn text(report: &Report) -> String {
    report.curves.iter().map(of_curve).collect::<Vec<_>>().join("\n\n")
}

fn of_curve(curve: &Curve) -> String {
    let Curve { runs, spent, forecast, unit } = curve;
    let names: Vec<String> = runs.iter().map(|run| foreign::path(run).to_string()).collect();
    let Forecast { metric, points, law, ceiling, expected } = forecast;
    let reached = points.last().map_or(f64::NAN, |point| point.value);
    let mut lines = vec![
        format!(
            "{}: {} values of {}, the last {}",
            names.join(", "),
            points.len(),
            foreign::name(metric),
            short(reached)
        ),
        format!(
            "fit: {} - {} x ({unit} / {})^-{}, off by {} on average; it approaches {} ({} to {})",
            short(law.ceiling),
            short(law.gap),
            short(law.last),
            short(law.exponent),
            short(law.error),
            short(ceiling.value),
            short(ceiling.low),
            short(ceiling.high),
        ),
        format!(
            "{:>6}  {:>9}  {:>9}  {:>8}  {:>8}  {:>8}  {:>8}",
            "times", "steps", "tokens", "hours", "expected", "from", "to"
        ),
    ];
    let optional = |value: Option<f64>, times: f64| value.map_or("-".to_owned(), |value| counted(value * times));
    for Expected { times, value, low, high } in expected {
        lines.push(format!(
            "{times:>6}  {:>9}  {:>9}  {:>8}  {:>8}  {:>8}  {:>8}",
            counted(spent.steps * times),
            optional(spent.tokens, *times),
            spent.seconds.map_or("-".to_owned(), |seconds| format!("{:.2}", seconds * times / 3600.0)),
            short(*value),
            short(*low),
            short(*high),
        ));
    }
    lines.join("\n")
}

/// A large number in thousands, millions or milliards.
fn counted(value: f64) -> String {
    match value {
        value if value >= 1e9 => format!("{:.2} G", value / 1e9),
        value if value >= 1e6 => format!("{:.2} M", value / 1e6),
        value if value >= 1e4 => format!("{:.1} k", value / 1e3),
        value => format!("{value:.0}"),
    }
}
