//! What more data would give, by a run's own curve: a saturating power law through its held-out acceptance.
//!
//! `value(D) = ceiling - gap * (D / last)^-exponent`, where `last` is the run's own end, so that the gap is what was missing
//! there. For a given exponent the other two follow by least squares; the exponent is searched. An acceptance length cannot
//! be above the depth of the trees plus one: where that is known the ceiling is not above it either.
//!
//! Intervals are a bootstrap: residuals are dealt anew to the points, every deal is fitted, and nine of ten fits lie within.
//! They say how well the points fix the curve, not whether the curve is the right one: a learning rate that falls to nothing at
//! the end bends a run's curve, and a longer run would bend later.

use serde::Serialize;

use super::series::Series;

/// Fewest points that are fitted: three numbers are fixed by three, and two more say how well.
pub const FEWEST: usize = 5;

/// Exponents that are tried, from the first to the last, evenly by their logarithm.
const EXPONENTS: (f64, f64, usize) = (0.05, 4.0, 60);
/// Fits with residuals dealt anew.
const DEALS: usize = 200;
/// Share of these fits within an interval.
const WITHIN: f64 = 0.9;

/// A value after an amount of data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// Steps, tokens, or whatever grows.
    pub amount: f64,
    /// What was reached.
    pub value: f64,
}

/// A fitted law.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Law {
    /// What is approached and not reached.
    pub ceiling: f64,
    /// What was missing at the end.
    pub gap: f64,
    /// How fast it closes.
    pub exponent: f64,
    /// The end.
    pub last: f64,
    /// Root of the mean of the squared residuals.
    pub error: f64,
}

impl Law {
    /// The value after an amount.
    pub fn at(&self, amount: f64) -> f64 {
        self.ceiling - self.gap * (amount / self.last).powf(-self.exponent)
    }
}

/// A value that is expected, and its interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Expected {
    /// Times the run's own amount.
    pub times: f64,
    /// The value of the fitted law.
    pub value: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// A law and what follows from it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forecast {
    /// The metric.
    pub metric: String,
    /// What was fitted.
    pub points: Vec<Measured>,
    /// The law.
    pub law: Law,
    /// What it approaches, with its interval.
    pub ceiling: Expected,
    /// What it expects.
    pub expected: Vec<Expected>,
}

/// Fits a law to the points. `most` is what no value can be above.
pub fn fit(points: &[Measured], most: Option<f64>) -> Result<Law, String> {
    check(points)?;
    let law = best(points, most).ok_or("no curve goes through the points")?;
    match law.gap > 0.0 {
        true => Ok(law),
        false => Err("the points do not rise: there is nothing to go on with".to_owned()),
    }
}

fn check(points: &[Measured]) -> Result<(), String> {
    let good = |point: &Measured| point.amount > 0.0 && point.amount.is_finite() && point.value.is_finite();
    let mut amounts: Vec<f64> = points.iter().filter(|point| good(point)).map(|point| point.amount).collect();
    amounts.sort_by(f64::total_cmp);
    amounts.dedup();
    match amounts.len() {
        count if amounts.len() < FEWEST || count < points.len() => {
            Err(format!("expected at least {FEWEST} values after different amounts of data, got {count}"))
        }
        _ => Ok(()),
    }
}

/// The law with the least squared residuals.
fn best(points: &[Measured], most: Option<f64>) -> Option<Law> {
    let (first, end, count) = EXPONENTS;
    let exponent = |place: f64| first * (end / first).powf(place / (count - 1) as f64);
    let error = |place: f64| with_exponent(points, exponent(place), most);
    let laws = (0..count).filter_map(|place| Some((place, error(place as f64)?)));
    let (place, coarse) = laws.min_by(|(_, a), (_, b)| a.error.total_cmp(&b.error))?;
    // Between the neighbours of the best one.
    let (mut low, mut high) = (place.saturating_sub(1) as f64, (place + 1).min(count - 1) as f64);
    let mut found = coarse;
    for _ in 0..24 {
        let [left, right] = [1.0, 2.0].map(|third| low + third * (high - low) / 3.0);
        let (Some(a), Some(b)) = (error(left), error(right)) else { break };
        if a.error < b.error {
            high = right
        } else {
            low = left
        }
        found = [found, a, b].into_iter().min_by(|a, b| a.error.total_cmp(&b.error))?;
    }
    Some(found)
}

/// The best law of an exponent: two unknowns, by least squares.
fn with_exponent(points: &[Measured], exponent: f64, most: Option<f64>) -> Option<Law> {
    let last = points.iter().map(|point| point.amount).fold(0.0, f64::max);
    let missing = |point: &Measured| (point.amount / last).powf(-exponent);
    let count = points.len() as f64;
    let mean = |of: &dyn Fn(&Measured) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (mean_missing, mean_value) = (mean(&missing), mean(&|point| point.value));
    let spread = mean(&|point| (missing(point) - mean_missing).powi(2));
    let together = mean(&|point| (missing(point) - mean_missing) * (point.value - mean_value));
    if spread <= 0.0 {
        return None;
    }
    let mut gap = -together / spread;
    let mut ceiling = mean_value + gap * mean_missing;
    if let Some(most) = most.filter(|most| ceiling > *most) {
        ceiling = most;
        gap = mean(&|point| missing(point) * (most - point.value)) / mean(&|point| missing(point).powi(2));
    }
    let law = Law { ceiling, gap, exponent, last, error: 0.0 };
    let error = mean(&|point| (point.value - law.at(point.amount)).powi(2)).sqrt();
    error.is_finite().then_some(Law { error, ..law })
}

/// What is expected at `times` the run's own amount.
pub fn forecast(metric: &str, points: Vec<Measured>, most: Option<f64>, times: &[f64]) -> Result<Forecast, String> {
    let law = fit(&points, most)?;
    let dealt = dealt(&points, &law, most);
    let interval = |times: f64, of: &dyn Fn(&Law) -> f64| {
        let mut values: Vec<f64> = dealt.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values.get((share * (values.len().max(1) - 1) as f64).round() as usize).copied();
        let value = of(&law);
        let (low, high) = (at((1.0 - WITHIN) / 2.0).unwrap_or(value), at((1.0 + WITHIN) / 2.0).unwrap_or(value));
        Expected { times, value, low: low.min(value), high: high.max(value) }
    };
    let expected = times.iter().map(|&times| interval(times, &|one: &Law| one.at(times * one.last))).collect();
    let ceiling = interval(f64::INFINITY, &|law: &Law| law.ceiling);
    Ok(Forecast { metric: metric.to_owned(), points, law, ceiling, expected })
}

/// Laws of the same points with the residuals dealt anew. The same every time.
fn dealt(points: &[Measured], law: &Law, most: Option<f64>) -> Vec<Law> {
    let count = points.len();
    // Three numbers were fitted to the residuals, which are smaller for it.
    let wider = (count as f64 / (count as f64 - 3.0)).sqrt();
    let residuals: Vec<f64> = points.iter().map(|point| wider * (point.value - law.at(point.amount))).collect();
    let mut state = 0x5eed_u64;
    let mut dice = || {
        // SplitMix64 (Steele, Lea and Flood 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % count as u64) as usize
    };
    let deals = (0..DEALS).filter_map(|_| {
        let deal = |point: &Measured| Measured { value: law.at(point.amount) + residuals[dice()], ..*point };
        let dealt: Vec<Measured> = points.iter().map(deal).collect();
        best(&dealt, most)
    });
    deals.collect()
}

/// Held-out values of a run by what they were reached with: its optimizer steps.
pub fn points_of(series: &Series, metric: &str) -> Vec<Measured> {
    let all = series.get(metric).map_or(&[][..], Vec::as_slice);
    // Before the first step there is no amount.
    let good = all.iter().filter(|point| point.step > 0.0 && point.value.is_finite());
    good.map(|point| Measured { amount: point.step, value: point.value }).collect()
}

/// The held-out metric that a run's forecast is of: acceptance that was decoded, else simulated acceptance.
pub fn metric_of(series: &Series) -> Option<&'static str> {
    const METRICS: [&str; 2] = ["eval/acceptance_length", "eval/simulated_acceptance_length"];
    let logged = METRICS.into_iter().filter(|metric| !points_of(series, metric).is_empty());
    // Where neither has points enough, the message is about the first one.
    let enough = logged.clone().find(|metric| points_of(series, metric).len() >= FEWEST);
    enough.or(logged.clone().next())
}

/// What no value of a metric can be above: all guesses accepted, and the target's own token. Nothing for other metrics.
pub fn most_of(series: &Series, metric: &str) -> Option<f64> {
    let (prefix, last) = metric.split_once('/')?;
    let column = match last {
        "acceptance_length" => "accepted",
        _ => return None,
    };
    let depth = |name: &String| {
        let rest = name.strip_prefix(prefix)?.strip_prefix("/depth")?;
        rest.strip_suffix(column)?.strip_suffix('/')?.parse::<u32>().ok()
    };
    series.keys().filter_map(depth).max().map(|depth| f64::from(depth) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracking::series::Point;

    fn law(ceiling: f64, gap: f64, exponent: f64) -> impl Fn(f64) -> f64 {
        move |amount| ceiling - gap * (amount / 4000.0).powf(-exponent)
    }

    fn points(amounts: &[f64], value: impl Fn(f64) -> f64) -> Vec<Measured> {
        amounts.iter().map(|&amount| Measured { amount, value: value(amount) }).collect()
    }

    const AMOUNTS: [f64; 8] = [125.0, 250.0, 500.0, 1000.0, 1500.0, 2000.0, 3000.0, 4000.0];

    #[test]
    fn a_law_is_found_again() {
        for (ceiling, gap, exponent) in [(3.2, 0.4, 0.5), (2.0, 0.1, 1.2), (4.5, 1.5, 0.2)] {
            let truth = law(ceiling, gap, exponent);
            let found = fit(&points(&AMOUNTS, &truth), None).unwrap();
            assert!((found.exponent - exponent).abs() < 1e-3 * exponent.max(1.0), "{found:?}");
            assert!((found.ceiling - ceiling).abs() < 1e-2 && found.error < 1e-5, "{found:?}");
            for times in [2.0, 4.0, 10.0] {
                let want = truth(times * 4000.0);
                assert!((found.at(times * 4000.0) - want).abs() < 2e-3, "{found:?}: {want}");
            }
        }
    }

    #[test]
    fn another_exponent_fits_and_foretells_worse() {
        let truth = law(3.2, 0.4, 0.5);
        let points = points(&AMOUNTS, &truth);
        let right = fit(&points, None).unwrap();
        for wrong in [0.2, 1.0, 2.0] {
            let wrong = with_exponent(&points, wrong, None).unwrap();
            assert!(wrong.error > 0.01 && wrong.error > 100.0 * right.error, "{wrong:?}");
            assert!((wrong.at(40_000.0) - truth(40_000.0)).abs() > 0.04, "{wrong:?}");
        }
    }

    #[test]
    fn intervals_hold_the_truth_and_grow_with_the_distance() {
        let truth = law(3.0, 0.5, 0.4);
        let mut held = 0;
        for run in 0..8 {
            let noise = |amount: f64| 0.02 * (amount * 0.37 + f64::from(run) * 2.1).sin();
            let points = points(&AMOUNTS, |amount| truth(amount) + noise(amount));
            let forecast = forecast("eval/acceptance_length", points, Some(5.0), &[2.0, 4.0, 10.0]).unwrap();
            let widths: Vec<f64> = forecast.expected.iter().map(|one| one.high - one.low).collect();
            assert!(widths[0] > 0.0 && widths.is_sorted(), "{widths:?}");
            assert!(forecast.ceiling.high <= 5.0 + 1e-9);
            let Expected { times, low, high, .. } = forecast.expected[1];
            held += usize::from((low..=high).contains(&truth(times * 4000.0)));
        }
        assert!(held >= 5, "the truth lies within {held} of 8 intervals");
    }

    #[test]
    fn a_ceiling_is_not_above_what_is_possible() {
        let points = points(&AMOUNTS, law(9.0, 6.5, 0.1));
        assert!(fit(&points, None).unwrap().ceiling > 6.0);
        let bounded = fit(&points, Some(4.0)).unwrap();
        assert!(bounded.ceiling <= 4.0 && bounded.at(1e9) < 4.0, "{bounded:?}");
    }

    #[test]
    fn what_cannot_be_foretold_is_refused() {
        let few = points(&AMOUNTS[..4], law(3.0, 0.5, 0.4));
        assert!(fit(&few, None).unwrap_err().contains("at least 5 values after different amounts of data, got 4"));
        let same = points(&[7.0; 6], law(3.0, 0.5, 0.4));
        assert!(fit(&same, None).unwrap_err().contains("got 1"));
        let falling = points(&AMOUNTS, |amount| 2.0 - amount * 1e-4);
        assert!(fit(&falling, None).unwrap_err().contains("do not rise"));
    }

    #[test]
    fn points_and_bounds_are_those_of_the_run() {
        let point = |step: f64, value: f64| Point { step, time: 0.0, value };
        let mut series = Series::new();
        let simulated = (0..6).map(|step| point(f64::from(step), 1.0)).collect();
        series.insert("eval/simulated_acceptance_length".to_owned(), simulated);
        assert_eq!(metric_of(&series), Some("eval/simulated_acceptance_length"));
        series
            .insert("eval/acceptance_length".to_owned(), vec![point(0.0, 1.0), point(5.0, f64::NAN), point(9.0, 2.0)]);
        // Decoded acceptance is there but seldom.
        assert_eq!(metric_of(&series), Some("eval/simulated_acceptance_length"));
        assert_eq!(points_of(&series, "eval/acceptance_length"), [Measured { amount: 9.0, value: 2.0 }]);
        for depth in [1, 2, 10] {
            series.insert(format!("eval/depth{depth}/accepted"), vec![point(9.0, 0.5)]);
        }
        assert_eq!(most_of(&series, "eval/acceptance_length"), Some(11.0));
        assert_eq!(most_of(&series, "eval/simulated_acceptance_length"), None);
        assert_eq!(metric_of(&Series::new()), None);
    }
}
