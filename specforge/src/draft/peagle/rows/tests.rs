use super::*;
use crate::data::DocumentRef;
use crate::nn::noise;

fn batch(marks: &[&str], numbers: &[u64]) -> PackedBatch {
    let joined = marks.concat();
    let document = |(marks, &number): (&&str, &u64)| DocumentRef::new(*marks, number);
    PackedBatch {
        ids: (0..joined.len() as i64).map(|token| 100 + token).collect(),
        positions: marks.iter().flat_map(|marks| 0..marks.len() as i64).collect(),
        supervised: joined.chars().map(|mark| mark == 'x').collect(),
        lengths: marks.iter().map(|marks| marks.len() as i64).collect(),
        documents: marks.iter().zip(numbers).map(document).collect(),
    }
}

const KEY: StepKey = StepKey { seed: 3, step: 5, total: 9 };
const LAYOUTS: [Layout; 2] = [Layout::Chains, Layout::Depths];

fn numbers(tensor: &Tensor) -> Vec<i64> {
    Vec::try_from(tensor).unwrap()
}

/// Every trained row of a plan, as its anchor and its teacher, by depth.
fn trained(plan: &Chains) -> Vec<Vec<(i64, i64)>> {
    let mut rows = numbers(&plan.anchors).into_iter().zip(plan.teachers.iter().copied());
    plan.trained.iter().map(|&count| rows.by_ref().take(count).collect()).collect()
}

fn sampled(batch: &PackedBatch, key: StepKey, config: &PeagleConfig, layout: Layout) -> Chains {
    let plan = ChainPlan::sampled(batch, key, config, Shape { windows: &[None], layout }).unwrap();
    plan.upload(Device::Cpu).unwrap()
}

/// With everything kept, rows are those that decoding asks for.
#[test]
fn all_rows_are_those_of_supervision() {
    let config = PeagleConfig { num_depths: 4, down_sample_ratio: 1.0, ..PeagleConfig::default() };
    let batch = batch(&["..xxxx", ".xxx.", "x"], &[0, 1, 2]);
    for layout in LAYOUTS {
        let plan = sampled(&batch, KEY, &config, layout);
        let want: [&[(i64, i64)]; 4] =
            [&[(1, 2), (2, 3), (3, 4), (6, 7), (7, 8)], &[(1, 3), (2, 4), (6, 8)], &[(1, 4)], &[]];
        assert_eq!(trained(&plan), want.map(<[_]>::to_vec), "{layout:?}");
        assert_eq!(numbers(&plan.tokens), [101, 102, 103, 104, 105, 0, 107, 108, 109, 110, 0, 0]);
        assert_eq!(numbers(&plan.first), [1, 2, 3, 6, 7]);
        assert_eq!((numbers(&plan.first_positions), plan.rows()), (vec![1, 2, 3, 0, 1], 4));
    }
    let plan = sampled(&batch, KEY, &config, Layout::Chains);
    // One chain of two rows behind two of one.
    assert_eq!(numbers(&plan.chain_positions), [3, 1, 2, 3]);
    assert_eq!(numbers(&plan.chain_trained), [2, 0, 1, 3]);
    let lists: Vec<&[Run]> = plan
        .groups
        .iter()
        .map(|(_, group)| match group {
            Group::Chains { runs, .. } | Group::Depth { runs, .. } => runs[0].list(),
        })
        .collect();
    let run = |queries, keys, causal| Run { queries, keys, causal };
    assert_eq!(lists[0], [run(0..1, 0..3, true), run(1..2, 6..7, true)]);
    assert_eq!(lists[1], [run(0..2, 0..2, false)]);
}

/// Chains have no gaps, the shares are those asked for, and a document's rows depend on itself and the key alone.
#[test]
fn sampled_rows_are_nested_shares_of_each_document() {
    let long = ".".repeat(3) + &"x".repeat(900);
    let marks = [long.as_str(), ".xxxxxxxxxxxxx", "..xx.xxx"];
    let config = PeagleConfig { num_depths: 6, ..PeagleConfig::default() };
    let plan = sampled(&batch(&marks, &[7, 8, 9]), KEY, &config, Layout::Chains);
    let rows = trained(&plan);
    for depth in 1..6 {
        let above: Vec<i64> = rows[depth - 1].iter().map(|(anchor, _)| *anchor).collect();
        assert!(rows[depth].iter().all(|(anchor, _)| above.contains(anchor)));
        assert!(rows[depth].iter().all(|(anchor, teacher)| *teacher == anchor + 1 + depth as i64));
        let of_long = rows[depth].iter().filter(|(anchor, _)| *anchor < long.len() as i64).count() as f64;
        let want = (899.0 - depth as f64) * config.ratio(depth);
        assert!((of_long - want).abs() < 1.0, "depth {depth}: {of_long}, {want}");
        assert!(rows[depth].iter().any(|(anchor, _)| *anchor >= long.len() as i64), "a short answer has depth {depth}");
    }
    // Another order, other neighbours.
    let turned = sampled(&batch(&[marks[2], marks[0]], &[9, 7]), KEY, &config, Layout::Depths);
    let offset = marks[2].len() as i64;
    for (turned, rows) in trained(&turned).iter().zip(&rows) {
        let own: Vec<i64> =
            rows.iter().map(|(anchor, _)| *anchor).filter(|&anchor| anchor < long.len() as i64).collect();
        let got: Vec<i64> = turned.iter().map(|(anchor, _)| anchor - offset).filter(|&anchor| anchor >= 0).collect();
        assert_eq!(got, own);
    }
    let other = sampled(&batch(&marks, &[7, 8, 9]), StepKey { step: 6, ..KEY }, &config, Layout::Chains);
    assert_ne!(trained(&other), rows);
}

/// What each row sees, written out, however runs are joined.
#[test]
fn runs_say_what_rows_see() {
    let mut next = noise::keyed_stream(4, 4);
    let batch = batch(&["xxxxxxxxx", "xxxx", "xxxxxxxxxxxx"], &[0, 1, 2]);
    let starts = document_starts(&batch);
    for round in 0..200 {
        let window = [None, Some(1), Some(3), Some(6)][round % 4];
        let mut rows: Vec<(i64, usize)> =
            (0..1 + next() % 20).map(|_| ((next() % 25) as i64, (next() % 4) as usize)).collect();
        if round % 3 > 0 {
            rows.sort_by_key(
                |&(anchor, depth)| if round % 3 == 1 { (anchor, depth) } else { (depth as i64, anchor as usize) },
            );
        }
        let runs = runs_of(&rows, &starts, window);
        assert!(Runs::new(runs.clone(), 25, Device::Cpu).is_ok(), "{rows:?} {runs:?}");
        for run in &runs {
            for query in run.queries.clone() {
                let (anchor, depth) = rows[query as usize];
                let end = if run.causal { run.keys.end - (run.queries.end - 1 - query) } else { run.keys.end };
                let position = anchor + depth as i64;
                let seen =
                    |key: &i64| *key >= starts[anchor as usize] && window.is_none_or(|window| *key > position - window);
                let want: Vec<i64> = (0..=anchor).filter(seen).collect();
                assert_eq!((run.keys.start..end).collect::<Vec<_>>(), want, "{window:?}, {rows:?}");
            }
        }
    }
}

#[test]
fn chains_with_gaps_are_refused() {
    let batch = batch(&["xxxxx"], &[0]);
    let row = |anchor, depth| Row { anchor, depth, teacher: None };
    let shape = Shape { windows: &[None], layout: Layout::Chains };
    let plan = |rows: &[Row]| ChainPlan::of_rows(&batch, rows, 3, shape);
    assert!(plan(&[row(1, 0), row(1, 1), row(1, 2), row(3, 1)]).is_ok());
    for wrong in [&[row(1, 2)][..], &[row(1, 1), row(1, 1)], &[row(2, 3)], &[row(5, 0)], &[row(-1, 1)]] {
        assert!(plan(wrong).is_err(), "{wrong:?}");
    }
}
