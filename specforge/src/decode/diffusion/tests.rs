//! What must hold of every decode, on tiny random models of both kinds, in float64.

use tch::{Kind, Tensor};

use super::tiny::{MASK, both, model, prompt};
use super::*;
use crate::error::Result;
use crate::models::TargetModel;
use crate::nn::KvCache;

/// Prompt and answer, where so many tokens of the answer are known.
fn text(length: usize, answer: usize, known: usize, key: u64) -> Text {
    let tokens = prompt(length + known, key).tokens.into_iter().map(i64::from);
    let ids: Vec<i64> = tokens.chain(std::iter::repeat_n(MASK, answer - known)).collect();
    Text { ids, prompt: length }
}

#[derive(Default, PartialEq, Debug)]
struct Record(Vec<(Step, Vec<i64>)>);

impl Watcher for Record {
    fn step(&mut self, step: &Step, ids: &[i64]) -> Result<()> {
        self.0.push((step.clone(), ids.to_vec()));
        Ok(())
    }
}

/// Decodes side by side with seed 7.
fn decode(model: &dyn TargetModel, options: &Options, prompts: &[Prompt]) -> (Vec<Answer>, Record) {
    let decoder = Decoder::new(Network::of(model).unwrap(), options.clone()).unwrap();
    let mut record = Record::default();
    let answers = decoder.decode(prompts, &mut Keyed { seed: 7 }, &mut record).unwrap();
    (answers, record)
}

fn skip(threshold: f64, outlier: f64) -> TokenSkip {
    TokenSkip { layer: 2, threshold, outlier, refresh: 0 }
}

/// Options of all kinds, for answers of 12 tokens in blocks of 4.
fn settings() -> Vec<Options> {
    let plain = Options::plain(12, 4);
    let rules = [Rule::Quota { steps: 4 }, Rule::Quota { steps: 3 }, Rule::Threshold(0.2), Rule::Factor(1.4)];
    let mut all = Vec::new();
    for rule in rules {
        for cache in [Cache::None, Cache::Prefix, Cache::Dual] {
            all.push(Options { rule, cache, ..plain.clone() });
        }
        let dual = Options { rule, cache: Cache::Dual, ..plain.clone() };
        all.push(Options { skip: Some(TokenSkip { refresh: 3, ..skip(0.5, -1.0) }), ..dual.clone() });
        all.push(Options { temperature: 0.8, skip: Some(skip(0.9, 0.5)), ..dual.clone() });
        all.push(Options { guidance: 0.7, ..dual.clone() });
        all.push(Options { guidance: 0.7, skip: Some(skip(0.9, 0.5)), ..dual });
        all.push(Options { temperature: 1.3, guidance: 0.4, ..plain.clone() });
        all.push(Options { remasking: Remasking::Random, rule, ..plain.clone() });
    }
    all
}

fn near(got: &Tensor, want: &Tensor) {
    assert_eq!(got.size(), want.size());
    let difference = (got - want).abs().max().double_value(&[]);
    assert!(difference < 1e-11, "differs by {difference:e}");
}

/// I-001-1: a view of a text that has not changed since the cache was filled gives what the whole pass gave, texts of
/// different lengths side by side.
#[test]
fn a_view_of_an_unchanged_text_is_the_whole_pass() {
    for model in both() {
        let network = Network::of(model.as_ref()).unwrap();
        let texts = [text(5, 12, 6, 1), text(9, 12, 4, 2)];
        let texts = [&texts[0], &texts[1]];
        for guided in [false, true] {
            let rows = Rows { texts: &texts, guided };
            for width in [4, 8] {
                let view = View::new(&rows, &[8, 12], width);
                let mut cache = network.new_cache(rows.count(), 21);
                let whole = network.whole(&rows, &view, Some(&mut cache), &mut |_, _| {}).unwrap();
                near(&network.view(&rows, &view, &mut cache).unwrap(), &whole);
            }
        }
        // The block and all behind it.
        let one = [texts[1]];
        let rows = Rows { texts: &one, guided: false };
        let view = View::new(&rows, &[12], 9);
        let mut cache = network.new_cache(1, 21);
        let whole = network.whole(&rows, &view, Some(&mut cache), &mut |_, _| {}).unwrap();
        near(&network.view(&rows, &view, &mut cache).unwrap(), &whole);
    }
}

/// I-001-2: a threshold of 1 skips nothing, to the last bit.
#[test]
fn a_threshold_of_one_is_no_skip() {
    for model in both() {
        for rule in [Rule::Quota { steps: 4 }, Rule::Threshold(0.2)] {
            let dual = Options { rule, cache: Cache::Dual, ..Options::plain(12, 4) };
            let skipping = Options { skip: Some(skip(1.0, -1.0)), ..dual.clone() };
            let prompts = [prompt(5, 1), prompt(8, 2)];
            let (want, steps) = decode(model.as_ref(), &dual, &prompts);
            let (got, other) = decode(model.as_ref(), &skipping, &prompts);
            for (got, want) in got.iter().zip(&want) {
                assert_eq!((&got.text, got.work.evaluations), (&want.text, want.work.evaluations));
                assert_eq!(got.work.rows_skipped, [0; 4]);
            }
            for ((got, ids), (want, wanted)) in other.0.iter().zip(&steps.0) {
                assert_eq!((ids, &got.confidence, &got.tokens), (wanted, &want.confidence, &want.tokens));
                assert!(got.active.iter().flatten().all(|active| *active));
                assert!(got.cosines.iter().flatten().flatten().all(|cosine| *cosine <= 1.0));
            }
        }
    }
}

/// A state over the second block of two texts, and their cache.
fn state(network: &Network<'_>, rows: &Rows<'_>) -> (BlockState, KvCache) {
    let mut cache = network.new_cache(rows.count(), 21);
    let view = View::new(rows, &[9, 13], 4);
    (BlockState::whole(network, rows, view, 4, &mut cache).unwrap(), cache)
}

/// I-001-3, I-001-4 and I-001-5: with the same input all logits stay, whichever rows are skipped; and a row that was skipped is
/// computed in the next pass.
#[test]
fn skipping_rows_of_the_same_input_changes_nothing() {
    for model in both() {
        let network = Network::of(model.as_ref()).unwrap();
        let texts = [text(5, 12, 6, 1), text(9, 12, 5, 2)];
        let rows = [&texts[0], &texts[1]];
        let rows = Rows { texts: &rows, guided: false };
        let (mut kept, mut cache) = state(&network, &rows);
        let before = kept.logits().copy();
        let all = kept.step(&network, &rows, &skip(-2.0, -2.0), &mut cache).unwrap();
        assert_eq!(all.active.any().int64_value(&[]), 0);
        assert!(kept.logits().equal(&before));
        // Nobody is skipped twice.
        let none = kept.step(&network, &rows, &skip(-2.0, -2.0), &mut cache).unwrap();
        assert_eq!(none.active.all().int64_value(&[]), 1);
        near(kept.logits(), &before);
        // A token that has changed makes its row run, though its cosine would not.
        let mut changed = texts.clone();
        changed[0].ids[10] = (changed[0].ids[10] + 1) % MASK;
        changed[0].ids[11] = 4;
        changed[1].ids[16] = 5;
        let changed = [&changed[0], &changed[1]];
        let changed = Rows { texts: &changed, guided: false };
        let some = kept.step(&network, &changed, &skip(-2.0, -2.0), &mut cache).unwrap();
        let active: Vec<bool> = Vec::try_from(some.active.flatten(0, 1)).unwrap();
        assert_eq!(active, [false, true, true, false, false, false, false, true]);
        // Back to the same input, some rows are skipped: those computed give what the whole pass gave.
        let (mut kept, mut cache) = state(&network, &rows);
        let cosine = kept.step(&network, &rows, &skip(-2.0, -2.0), &mut cache).unwrap().cosines;
        assert_eq!(cosine.size(), [2, 2, 4]);
        let _ = kept.step(&network, &changed, &skip(-2.0, -2.0), &mut cache).unwrap();
        let refreshed = TokenSkip { refresh: 3, ..skip(-2.0, -2.0) };
        let third = kept.step(&network, &rows, &refreshed, &mut cache).unwrap();
        assert_eq!(third.active.all().int64_value(&[]), 1, "every third pass skips nothing");
    }
}

/// I-001-4: the input is the same, and some rows are computed among others that are not, in each text other ones.
#[test]
fn rows_that_run_among_skipped_ones_give_what_they_gave() {
    for model in both() {
        let network = Network::of(model.as_ref()).unwrap();
        let texts = [text(5, 12, 6, 1), text(9, 12, 5, 2)];
        let rows = [&texts[0], &texts[1]];
        let rows = Rows { texts: &rows, guided: false };
        let (mut kept, mut cache) = state(&network, &rows);
        let want = kept.logits().copy();
        let hidden: Vec<Tensor> = kept.outputs().layers().iter().map(Tensor::copy).collect();
        for skipped in [
            [true, false, false, true, false, true, false, false],
            [false, true, true, true, false, false, false, false],
        ] {
            // Who was skipped runs now.
            let before = Tensor::from_slice(&skipped).view([2, 4]);
            kept.pretend_skipped(&before);
            let stepped = kept.step(&network, &rows, &skip(-2.0, -2.0), &mut cache).unwrap();
            assert!(stepped.active.equal(&before));
            near(kept.logits(), &want);
            for (got, want) in kept.outputs().layers().iter().zip(&hidden) {
                near(got, want);
            }
        }
    }
}

/// Every number of a cache, by layer: keys and values of each row.
fn numbers(cache: &KvCache, layers: usize) -> Vec<Vec<[Tensor; 2]>> {
    let rows = cache.rows() as usize;
    (0..layers).map(|layer| (0..rows).map(|row| cache.contents(layer, row).map(|all| all.copy())).collect()).collect()
}

/// I-001-6: a pass writes the positions and the layers that it runs, and no other number changes.
#[test]
fn passes_write_what_they_run_and_nothing_else() {
    for model in both() {
        let network = Network::of(model.as_ref()).unwrap();
        let mut texts = [text(5, 12, 6, 1), text(9, 12, 5, 2)];
        let (mut kept, mut cache) = {
            let rows = [&texts[0], &texts[1]];
            state(&network, &Rows { texts: &rows, guided: false })
        };
        let before = numbers(&cache, 4);
        texts[0].ids[10] = (texts[0].ids[10] + 1) % MASK;
        texts[1].ids[13] = (texts[1].ids[13] + 1) % MASK;
        texts[1].ids[14] = 5;
        let rows = [&texts[0], &texts[1]];
        let stepped =
            kept.step(&network, &Rows { texts: &rows, guided: false }, &skip(-2.0, -2.0), &mut cache).unwrap();
        let after = numbers(&cache, 4);
        for (layer, (before, after)) in before.iter().zip(&after).enumerate() {
            for (row, origin) in [9i64, 13].into_iter().enumerate() {
                for slot in 0..rows[row].ids.len() as i64 {
                    let inside = (origin..origin + 4).contains(&slot);
                    let ran = inside && (layer < 2 || stepped.active.int64_value(&[row as i64, slot - origin]) == 1);
                    // What the first layer writes depends on the token alone.
                    let changes = layer > 0 || [(0, 10), (1, 13), (1, 14)].contains(&(row, slot));
                    for (before, after) in before[row].iter().zip(&after[row]) {
                        let same = before.select(1, slot).equal(&after.select(1, slot));
                        assert!(ran || same, "layer {layer}, row {row}, slot {slot} was written");
                        assert!(!(ran && changes && same), "layer {layer}, row {row}, slot {slot} was not written");
                    }
                }
            }
        }
    }
}

/// I-001-7: no mask is left, each block is complete before the next begins, what is known stays, prompts are untouched.
/// I-001-8: transfers and rows of all passes sum to the totals, and two runs are the same to the last bit.
#[test]
fn decodes_end_without_masks_and_count_what_they_do() {
    for model in both() {
        for options in settings() {
            let prompts = [prompt(5, 1), prompt(8, 2), prompt(5, 3)];
            let (answers, record) = decode(model.as_ref(), &options, &prompts);
            for (number, (answer, prompt)) in answers.iter().zip(&prompts).enumerate() {
                let start = prompt.tokens.len();
                let mut ids: Vec<i64> = prompt.tokens.iter().map(|&token| i64::from(token)).collect();
                assert_eq!(answer.text.ids[..start], ids, "{options:?}");
                assert!(!answer.text.ids.contains(&MASK), "{options:?}: {:?}", answer.text.ids);
                ids.resize(start + 12, MASK);
                let mut work = Work::none(4);
                let mut last = (0, 0);
                for (step, after) in record.0.iter().filter(|(step, _)| step.text == number) {
                    assert!((step.block, step.step) >= last && !step.transferred.is_empty());
                    assert!(
                        !ids[start..step.start].contains(&MASK),
                        "a block began before the one before it was known"
                    );
                    assert_eq!(step.start, start + 4 * step.block);
                    for at in 0..ids.len() {
                        let known = step.transferred.contains(&at);
                        assert_eq!(ids[at] != after[at], known, "{options:?}");
                        assert!(!known || (ids[at] == MASK && (step.start..step.start + 4).contains(&at)));
                    }
                    ids.clone_from(after);
                    last = (step.block, step.step);
                    let sides = if options.guidance > 0.0 { 2 } else { 1 };
                    match (&step.active, sides) {
                        (Some(active), 1) => {
                            let ran = active.iter().filter(|active| **active).count();
                            work.skipping((active.len(), ran), 2);
                        }
                        _ => work.pass(sides * step.view.1),
                    }
                    work.whole_passes += usize::from(step.view.0 == 0 && step.view.1 == start + 12);
                    work.steps += 1;
                }
                assert_eq!(ids, answer.text.ids);
                if options.guidance == 0.0 || options.skip.is_none() {
                    assert_eq!(work, answer.work, "{options:?}");
                }
                assert_eq!(work.evaluations, answer.work.evaluations);
            }
            assert_eq!(decode(model.as_ref(), &options, &prompts), (answers, record));
        }
    }
}

/// I-001-9: states of other positions are not compared.
#[test]
fn states_of_other_positions_are_refused() {
    let model = model(false, 3);
    let network = Network::of(model.as_ref()).unwrap();
    let one = text(5, 12, 6, 1);
    let texts = [&one];
    let rows = Rows { texts: &texts, guided: false };
    let of = |origin: i64, width: i64| {
        let mut cache = network.new_cache(1, 17);
        BlockState::whole(&network, &rows, View::new(&rows, &[origin], width), width, &mut cache).unwrap()
    };
    let state = of(9, 4);
    assert!(state.outputs().similarity(of(9, 4).outputs(), 2).unwrap().ge(1.0 - 1e-12).all().int64_value(&[]) == 1);
    for other in [of(5, 4), of(9, 3)] {
        let problem = state.outputs().similarity(other.outputs(), 2).unwrap_err().to_string();
        assert!(problem.contains("different positions") && problem.contains("4 rows from [9]"), "{problem}");
    }
    // bfloat16 has no number between 0.996 and 1: cosines are float64's, whatever the states are.
    assert_eq!(state.outputs().similarity(state.outputs(), 2).unwrap().kind(), Kind::Double);
}

/// Each text of a batch is what it is alone.
#[test]
fn a_batch_is_its_texts_alone() {
    for model in both() {
        for options in settings() {
            let prompts = [prompt(5, 1), prompt(9, 2), prompt(2, 3)];
            let (together, _) = decode(model.as_ref(), &options, &prompts);
            for (prompt, together) in prompts.iter().zip(together) {
                let (alone, _) = decode(model.as_ref(), &options, std::slice::from_ref(prompt));
                assert_eq!(alone[0], together, "{options:?}");
            }
        }
    }
}

/// Exact parallel decoding gives the tokens of the decoder without a cache, step for step, whatever it guesses.
#[test]
fn exact_parallel_decoding_is_the_decoder_without_a_cache() {
    let mut fewer = [0usize; 2];
    for model in both() {
        // Each rule with a kind of choice: all pairs would take minutes without optimisation.
        let rules = [Rule::Quota { steps: 4 }, Rule::Quota { steps: 3 }, Rule::Threshold(0.2), Rule::Factor(1.4)];
        let choices = [
            (0.0, 0.0, Remasking::Confidence),
            (0.5, 0.3, Remasking::Random),
            (0.9, 0.0, Remasking::Confidence),
            (0.0, 0.6, Remasking::Confidence),
        ];
        for (rule, (temperature, guidance, remasking)) in rules.into_iter().zip(choices) {
            let plain = Options { rule, temperature, guidance, remasking, ..Options::plain(12, 4) };
            let prompts = [prompt(5, 1), prompt(8, 2)];
            let (want, steps) = decode(model.as_ref(), &plain, &prompts);
            for (states, guess) in [(1, Guess::Cache), (2, Guess::Cache), (5, Guess::Cache), (3, Guess::Order)] {
                let options = Options { parallel: Some(Parallel { states, guess }), ..plain.clone() };
                assert!(options.is_lossless());
                let (got, other) = decode(model.as_ref(), &options, &prompts);
                for (got, want) in got.iter().zip(&want) {
                    assert_eq!(got.text, want.text, "{options:?}");
                    assert_eq!(got.work.steps, want.work.steps);
                    assert!(got.work.whole_passes <= want.work.whole_passes);
                    if states > 1 {
                        fewer[usize::from(guess == Guess::Order)] += want.work.whole_passes - got.work.whole_passes;
                    } else {
                        assert_eq!(got.work.whole_passes, want.work.whole_passes);
                    }
                }
                // The same steps in the same order for each text.
                for text in 0..2 {
                    let of = |record: &Record| {
                        let steps = record.0.iter().filter(|(step, _)| step.text == text);
                        steps.map(|(step, ids)| (step.transferred.clone(), ids.clone())).collect::<Vec<_>>()
                    };
                    assert_eq!(of(&other), of(&steps), "{options:?}");
                }
            }
        }
    }
    assert!(fewer.iter().all(|&fewer| fewer > 0), "guesses never came true: {fewer:?}");
}

/// A text ends with the block that holds a stop token, and its answer with the token.
#[test]
fn no_block_begins_behind_a_stop_token() {
    let model = model(false, 3);
    let plain = Options::plain(12, 4);
    let (whole, _) = decode(model.as_ref(), &plain, &[prompt(5, 1)]);
    let stop = whole[0].tokens[5];
    let first = whole[0].tokens.iter().position(|&token| token == stop).unwrap();
    for parallel in [None, Some(Parallel { states: 3, guess: Guess::Cache })] {
        let options = Options { stop_tokens: vec![stop], parallel, ..plain.clone() };
        let (answers, record) = decode(model.as_ref(), &options, &[prompt(5, 1), prompt(4, 9)]);
        assert_eq!(answers[0].tokens, whole[0].tokens[..=first]);
        assert_eq!(answers[0].finish, crate::data::Finish::Stop);
        let blocks = record.0.iter().filter(|(step, _)| step.text == 0).map(|(step, _)| step.block).max();
        assert_eq!(blocks, Some(first / 4));
    }
}

#[test]
fn what_means_nothing_is_refused_by_its_name() {
    let model = model(true, 3);
    let network = Network::of(model.as_ref()).unwrap();
    let plain = Options::plain(12, 4);
    let dual = Options { cache: Cache::Dual, ..plain.clone() };
    for (options, word) in [
        (Options { block: 5, ..plain.clone() }, "--block-length"),
        (Options { rule: Rule::Quota { steps: 5 }, ..plain.clone() }, "--steps"),
        (Options { temperature: -1.0, ..plain.clone() }, "--temperature"),
        (Options { guidance: f64::NAN, ..plain.clone() }, "--cfg"),
        (Options { skip: Some(skip(0.9, 0.5)), ..plain.clone() }, "--token-skip"),
        (Options { skip: Some(TokenSkip { layer: 4, ..skip(0.9, 0.5) }), ..dual.clone() }, "1 to 3"),
        (Options { parallel: Some(Parallel { states: 0, guess: Guess::Order }), ..plain.clone() }, "--exact-parallel"),
        (Options { parallel: Some(Parallel { states: 2, guess: Guess::Order }), ..dual }, "--exact-parallel"),
    ] {
        let problem = Decoder::new(network, options).err().unwrap().to_string();
        assert!(problem.contains(word), "{problem}");
    }
    let decoder = Decoder::new(network, plain).unwrap();
    let answer = |tokens: Vec<u32>| {
        let prompts = [Prompt { tokens, key: 0 }];
        decoder.decode(&prompts, &mut Keyed { seed: 0 }, &mut Unwatched).unwrap_err().to_string()
    };
    assert!(answer(vec![1; 90]).contains("context 96"));
    assert!(answer(vec![]).contains("empty"));
    assert!(answer(vec![MASK as u32]).contains("mask token 39"));
    assert!(answer(vec![77]).contains("index"), "{}", answer(vec![77]));
}
