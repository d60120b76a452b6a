use tch::{Kind, Tensor};

use super::*;
use crate::nn::noise::keyed_stream;

/// Numbers from 0 to 1.
fn uniform(seed: u64) -> impl FnMut() -> f64 {
    let mut next = keyed_stream(seed, 1);
    move || (next() >> 11) as f64 / (1u64 << 53) as f64
}

fn table(probes: &[(u64, f64)]) -> StepCosts {
    let (sample_batch_tokens, sample_steps_per_sec) = probes.iter().copied().unzip();
    let max_batch_tokens = probes[probes.len() - 1].0;
    StepCosts::Table(StepTable { sample_batch_tokens, sample_steps_per_sec, max_batch_tokens })
}

fn additive() -> Additive {
    Additive {
        bias_seconds: 0.004,
        bs_probes: vec![1, 4, 8],
        alpha_seconds: vec![0.001, 0.002, 0.005],
        m_probes: vec![1, 8, 16],
        theta_seconds: vec![0.001, 0.002, 0.006],
    }
}

/// Survivals of random chains: they never rise along one.
fn chains(requests: usize, drafted: usize, seed: u64) -> Vec<Vec<f32>> {
    let mut next = uniform(seed);
    let mut chain = || {
        let step = |survival: &mut f64, _| {
            *survival *= next();
            Some(*survival as f32)
        };
        (0..drafted).scan(1.0, step).collect()
    };
    (0..requests).map(|_| chain()).collect()
}

/// Raw confidences `[n, g]` and marks of what was accepted, with a probability of `sigmoid(raw / temperature)` at each slot.
fn samples(count: usize, temperatures: &[f64], seed: u64) -> (Tensor, Tensor) {
    let mut next = uniform(seed);
    let (mut raw, mut accepted) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let mut alive = true;
        for temperature in temperatures {
            let logit = 8.0 * next() - 3.0;
            alive = alive && next() < 1.0 / (1.0 + (-logit / temperature).exp());
            raw.push(logit);
            accepted.push(f64::from(u8::from(alive)));
        }
    }
    let shape = [count as i64, temperatures.len() as i64];
    (Tensor::from_slice(&raw).view(shape), Tensor::from_slice(&accepted).view(shape))
}

#[test]
fn calibrated_confidences_stay_calibrated() {
    let (raw, accepted) = samples(4000, &[1.0; 4], 3);
    let fitted = sts::fit(&raw, &accepted, "made up").unwrap();
    for (slot, (before, after)) in fitted.ece_before.iter().zip(&fitted.ece_after).enumerate() {
        assert!(*after <= *before + 1e-12 && *after < 0.02, "slot {slot}: {before} and {after}");
        assert!((0.7..1.5).contains(&fitted.temperatures[slot]), "{:?}", fitted.temperatures);
    }
}

#[test]
fn overconfident_ones_are_found_slot_by_slot() {
    let truth = [2.5, 1.0, 4.0];
    let (raw, accepted) = samples(6000, &truth, 4);
    let fitted = sts::fit(&raw, &accepted, "made up").unwrap();
    for (got, want) in fitted.temperatures.iter().zip(truth) {
        assert!((want / 1.5..want * 1.5).contains(got), "{:?}", fitted.temperatures);
    }
    let [before, after] = [&fitted.ece_before, &fitted.ece_after].map(|errors| errors.iter().sum::<f64>());
    assert!(after < 0.5 * before, "{before} and {after}");
}

#[test]
fn what_nothing_can_be_fitted_to_is_refused() {
    let none = Tensor::zeros([0, 3], (Kind::Float, tch::Device::Cpu));
    assert!(sts::fit(&none, &none, "").unwrap_err().to_string().contains("nothing to calibrate"));
    let broken = Tensor::from_slice(&[f32::NAN, 1.0]).view([1, 2]);
    assert!(sts::fit(&broken, &broken, "").unwrap_err().to_string().contains("not numbers"));
    let wide = Tensor::zeros([2, 3], (Kind::Float, tch::Device::Cpu));
    assert!(sts::fit(&wide, &wide.narrow(1, 0, 2), "").unwrap_err().to_string().contains("[2, 3]"));
}

/// The more a token costs, the fewer are verified; where it costs nothing, all are.
#[test]
fn dearer_tokens_are_fewer() {
    for seed in 0..20 {
        let chains = chains(5, 6, seed);
        let likely = chains.iter().flatten().filter(|survival| **survival >= 1e-6).count();
        let of_price = |price: f64| {
            let costs = Additive { theta_seconds: vec![0.0, 40.0 * price], m_probes: vec![1, 41], ..additive() };
            choose_budget(&chains, &StepCosts::Additive(costs), Limits::default(), Stop::Best).tokens
        };
        let prices = [0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1];
        let budgets: Vec<usize> = prices.into_iter().map(of_price).collect();
        assert_eq!(budgets[0], likely, "seed {seed}");
        assert!(budgets.is_sorted_by(|a, b| a >= b), "seed {seed}: {budgets:?}");
        assert!(budgets[6] < likely);
    }
}

#[test]
fn lengths_sum_to_the_budget_and_grow_with_it() {
    for seed in 0..20 {
        let chains = chains(4, 5, 100 + seed);
        let likely = chains.iter().flatten().filter(|survival| **survival >= 1e-6).count();
        let mut before = vec![1; 4];
        for budget in 0..=24 {
            let lengths = verify_lengths(&chains, budget, Limits::default());
            assert_eq!(lengths.iter().sum::<usize>(), 4 + budget.min(likely));
            assert!(lengths.iter().zip(&before).all(|(now, before)| now >= before));
            assert!(lengths.iter().all(|length| (1..=6).contains(length)));
            before = lengths;
        }
    }
}

#[test]
fn ties_go_to_the_earlier_slot_then_to_the_earlier_request() {
    let chains = vec![vec![0.5, 0.5, 0.5], vec![0.5, 0.5], vec![0.5]];
    let lengths = |budget| verify_lengths(&chains, budget, Limits::default());
    assert_eq!(lengths(1), [2, 1, 1]);
    assert_eq!(lengths(3), [2, 2, 2]);
    assert_eq!(lengths(4), [3, 2, 2]);
    assert_eq!(lengths(6), [4, 3, 2]);
    assert_eq!(lengths(99), [4, 3, 2]);
    let bounded = Limits { min_verify_length: 2, max_verify_length: Some(3), ..Limits::default() };
    assert_eq!(verify_lengths(&chains, 4, bounded), [3, 3, 2]);
    // A tie between budgets is the smaller one's: 2 x 50 and (2 + 0.5 + ..) x 40.
    let even = vec![vec![0.5], vec![0.0]];
    assert_eq!(choose_budget(&even, &table(&[(2, 50.0), (3, 40.0)]), Limits::default(), Stop::Best).tokens, 0);
}

#[test]
fn one_probe_verifies_everything() {
    let budget = VerifyBudget::new(vec![1.0; 3], table(&[(1, 1.0)]), Limits::default()).unwrap();
    let (sure, unsure, short) = ([5.0, 5.0, 5.0], [-50.0, -50.0, -50.0], [0.0]);
    assert_eq!(budget.lengths(&[&sure, &unsure, &short, &[]], Stop::Best).unwrap(), [4, 4, 2, 1]);
    // The same chains where a second token is dear.
    let dear = VerifyBudget::new(vec![1.0; 3], table(&[(1, 10.0), (5, 1.0)]), Limits::default()).unwrap();
    assert_eq!(dear.lengths(&[&sure, &unsure, &short, &[]], Stop::Best).unwrap(), [1; 4]);
    let steps = VerifyBudget::new(vec![1.0; 3], table(&[(1, 10.0), (8, 1.0)]), Limits::default()).unwrap();
    assert_eq!(steps.lengths(&[&sure, &unsure, &short, &[]], Stop::Best).unwrap(), [4, 1, 1, 1]);
    assert!(dear.lengths(&[&[0.0; 4]], Stop::Best).is_err());
    assert!(dear.lengths(&[], Stop::Best).unwrap().is_empty());
}

/// Whether a guess is verified must not depend on what lies behind it, if guesses are drawn.
#[test]
fn the_first_descent_looks_at_nothing_behind_a_guess() {
    let costs = table(&[(1, 100.0), (4, 80.0), (6, 75.0), (9, 40.0)]);
    let (mut seen, mut differs) = (0, false);
    for seed in 0..200 {
        let chains = chains(2, 4, 1000 + seed);
        let lengths = |chains: &[Vec<f32>], stop| {
            let budget = choose_budget(chains, &costs, Limits::default(), stop);
            verify_lengths(chains, budget.tokens, Limits::default())
        };
        let whole = lengths(&chains, Stop::FirstDescent);
        differs |= whole != lengths(&chains, Stop::Best);
        for slot in 0..4 {
            // Another future of the first request behind this slot.
            let mut other = chains.clone();
            let survival = other[0][slot];
            other[0][slot + 1..].iter_mut().for_each(|later| *later = survival * 0.97);
            let changed = lengths(&other, Stop::FirstDescent);
            assert_eq!(whole[0] > slot + 1, changed[0] > slot + 1, "seed {seed}, slot {slot}");
            seen += usize::from(changed != whole);
        }
    }
    assert!(seen > 0 && differs);
}

#[test]
fn costs_between_and_outside_probes() {
    let StepCosts::Table(steps) = table(&[(2, 50.0), (5, 20.0), (9, 10.0)]) else { unreachable!() };
    let got: Vec<f64> = [1, 2, 4, 5, 8, 9, 100].into_iter().map(|tokens| steps.steps_per_second(tokens)).collect();
    assert_eq!(got, [50.0, 50.0, 50.0, 20.0, 20.0, 10.0, 10.0]);
    let sum = additive();
    let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-15, "{got}, {want}");
    near(sum.seconds(1, 0), 0.006);
    near(sum.seconds(2, 0), 0.004 + 0.001 + 0.001 / 3.0 + 0.001 + 0.001 / 7.0);
    near(sum.seconds(8, 4), 0.004 + 0.005 + 0.004);
    near(sum.seconds(20, 400), 0.004 + 0.005 + 0.006);
}

#[test]
fn files_come_back_and_wrong_ones_name_path_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let (sts, sps) = (folder.path().join(STS_FILE), folder.path().join(SPS_FILE));
    let calibration = Calibration {
        temperatures: vec![f64::from(2.818_383_f32), 1.0],
        dataset: "questions".to_owned(),
        num_samples: 12,
        ece_before: vec![0.25, 0.5],
        ece_after: vec![0.125, 0.1],
    };
    calibration.write(&sts).unwrap();
    assert_eq!(Calibration::read(&sts, Some(2)).unwrap(), calibration);
    for costs in [table(&[(1, 10.0), (3, 7.5)]), StepCosts::Additive(additive())] {
        costs.write(&sps).unwrap();
        assert_eq!(StepCosts::read(&sps).unwrap(), costs);
    }
    assert_eq!(VerifyBudget::read(folder.path()).unwrap().slots(), 2);
    // What SGLang leaves out is not missed.
    std::fs::write(&sts, r#"{"temperatures": [1.5]}"#).unwrap();
    assert_eq!(Calibration::read(&sts, Some(1)).unwrap().temperatures, [1.5]);

    let refused = |path: &Path, text: &str| {
        std::fs::write(path, text).unwrap();
        let error = match path == sts {
            true => Calibration::read(path, Some(2)).unwrap_err(),
            false => StepCosts::read(path).unwrap_err(),
        };
        assert!(error.to_string().contains(path.to_str().unwrap()) && error.hint().is_some(), "{error}");
        error.to_string()
    };
    for (text, key) in [
        (r#"{"temperatures": [1.0, 2.0], "temperature": 3}"#, "temperature"),
        (r#"{"temperatures": [1.0, 2.0, 3.0]}"#, "`temperatures`: expected 2"),
        (r#"{"temperatures": []}"#, "`temperatures`"),
        (r#"{"temperatures": [1.0, -2.0]}"#, "`temperatures[1]`"),
        (r#"{"temperatures": [1.0, 1e-60]}"#, "`temperatures[1]`"),
        (r#"{"temperatures": [1.0, "2"]}"#, "temperatures[1]"),
        (r#"{"temperatures": [1.0, 2.0], "ece_after": [0.1]}"#, "`ece_after`: expected 2"),
        (r#"{"temperatures": [1.0, 2.0], "temperatures": [1.0, 2.0]}"#, "twice"),
        ("[]", "expected"),
        ("", "EOF"),
    ] {
        let problem = refused(&sts, text);
        assert!(problem.contains(key), "{text}: {problem}");
    }
    for (text, key) in [
        (
            r#"{"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [2.0], "max_batch_tokens": 2}"#,
            "sample_steps_per_sec",
        ),
        (
            r#"{"sample_batch_tokens": [2, 2], "sample_steps_per_sec": [2.0, 1.0], "max_batch_tokens": 2}"#,
            "`sample_batch_tokens[1]`",
        ),
        (
            r#"{"sample_batch_tokens": [0, 2], "sample_steps_per_sec": [2.0, 1.0], "max_batch_tokens": 2}"#,
            "`sample_batch_tokens[0]`",
        ),
        (
            r#"{"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [2.0, 0.0], "max_batch_tokens": 2}"#,
            "`sample_steps_per_sec[1]`",
        ),
        (
            r#"{"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [2.0, 1.0], "max_batch_tokens": 1}"#,
            "`max_batch_tokens`",
        ),
        (r#"{"sample_batch_tokens": [], "sample_steps_per_sec": [], "max_batch_tokens": 1}"#, "`sample_batch_tokens`"),
        (r#"{"sample_batch_tokens": [1], "sample_steps_per_sec": [2.0], "max_batch_tokens": 1, "more": 1}"#, "more"),
        (
            r#"{"sample_batch_tokens": [1.5], "sample_steps_per_sec": [2.0], "max_batch_tokens": 1}"#,
            "sample_batch_tokens[0]",
        ),
        (
            r#"{"bias_seconds": 0, "bs_probes": [1], "alpha_seconds": [0], "m_probes": [1], "theta_seconds": [0]}"#,
            "`bias_seconds`",
        ),
        (
            r#"{"bias_seconds": 1, "bs_probes": [1, 1], "alpha_seconds": [0, 1], "m_probes": [1], "theta_seconds": [0]}"#,
            "`bs_probes[1]`",
        ),
        (
            r#"{"bias_seconds": 1, "bs_probes": [1], "alpha_seconds": [0], "m_probes": [1], "theta_seconds": [0, 1]}"#,
            "`theta_seconds`",
        ),
        (
            r#"{"bias_seconds": 1, "bs_probes": [1], "alpha_seconds": [-2], "m_probes": [1], "theta_seconds": [0]}"#,
            "more than 0 s",
        ),
        (r#"{"bias_seconds": 1, "bs_probes": [1], "alpha_seconds": [0], "m_probes": [1]}"#, "theta_seconds"),
    ] {
        let problem = refused(&sps, text);
        assert!(problem.contains(key), "{text}: {problem}");
    }
    assert!(calibration.write(&folder.path().join("there")).is_ok());
    let wrong = Calibration { temperatures: vec![0.0], ..calibration };
    assert!(wrong.write(&folder.path().join("not")).is_err() && !folder.path().join("not").exists());
}

#[test]
fn budgets_that_mean_nothing_are_refused() {
    let new = |temperatures: &[f64], limits| VerifyBudget::new(temperatures.to_vec(), table(&[(1, 1.0)]), limits);
    assert!(new(&[], Limits::default()).is_err());
    assert!(new(&[1.0, f64::NAN], Limits::default()).is_err());
    assert!(new(&[1.0], Limits { min_verify_length: 3, max_verify_length: Some(2), ..Limits::default() }).is_err());
    assert!(new(&[1.0], Limits { survival_eps: f32::NAN, ..Limits::default() }).is_err());
    assert!(new(&[1.0], Limits::default()).is_ok());
}

/// Equal confidences tie wherever they stand, as the rule for ties wants it.
#[test]
fn equally_sure_chains_are_served_in_order() {
    let steps = table(&[(1, 10.0), (20, 9.9), (21, 0.1)]);
    let budget = VerifyBudget::new(vec![0.7, 1.3, 2.0], steps, Limits::default()).unwrap();
    for requests in 7..17 {
        let lengths = budget.lengths(&vec![&[0.4, 1.1, -0.3][..]; requests], Stop::Best).unwrap();
        assert_eq!(lengths.iter().sum::<usize>(), 20, "{lengths:?}");
        assert!(lengths.is_sorted_by(|a, b| a >= b), "{lengths:?}");
    }
    let sure = survivals(&confidences(&[1e9, f32::NEG_INFINITY, 1.0, f32::NAN], &[1.0; 4]));
    assert_eq!(sure[..3], [1.0, 0.0, 0.0]);
    assert!(sure[3].is_nan());
    assert_eq!(verify_lengths(&[sure], 9, Limits::default()), [2]);
}
