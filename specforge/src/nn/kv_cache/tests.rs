//! What a cache holds after writing, moving and going back, against one that was filled at once.

use super::*;

/// A cache of one layer whose row `r` holds `lengths[r]` tokens of value `100 * mark + r`.
fn cache(mark: f64, lengths: &[i64], capacity: i64) -> KvCache {
    let rows = lengths.len() as i64;
    let mut cache = KvCache::new(&[LayerCache::full(1, 2)], rows, capacity, (Kind::Double, Device::Cpu));
    let longest = lengths.iter().copied().max().unwrap();
    let values = Tensor::arange(rows, (Kind::Double, Device::Cpu)) + 100.0 * mark;
    let values = values.view([rows, 1, 1, 1]).expand([rows, 1, longest, 2], false);
    let _ = cache.write(0, &values, &values);
    cache.advance(lengths);
    cache
}

/// What each row holds: its length and its first number.
fn content(cache: &KvCache) -> Vec<(i64, f64)> {
    let row = |(row, &length): (usize, &i64)| {
        let [_, held] = cache.contents(0, row);
        assert_eq!(held.min().double_value(&[]), held.max().double_value(&[]));
        (length, held.min().double_value(&[]))
    };
    cache.lengths.iter().enumerate().map(row).collect()
}

#[test]
fn rows_are_appended_from_a_larger_cache_and_to_a_larger_one() {
    for (mine, theirs) in [(5, 20), (20, 5), (5, 500)] {
        let mut joined = cache(1.0, &[3, 5], mine);
        joined.append_rows(cache(2.0, &[4], theirs));
        assert_eq!(content(&joined), [(3, 100.0), (5, 101.0), (4, 200.0)]);
    }
}

#[test]
fn rows_change_places_and_those_that_do_not_stay_where_they_are() {
    for order in [vec![0, 1, 2, 3], vec![0, 3, 2], vec![3, 2, 1, 0], vec![1, 2], vec![2, 0, 3], vec![]] {
        let mut batch = cache(1.0, &[3, 5, 2, 70], 80);
        let before = content(&batch);
        batch.select_rows(&order);
        let want: Vec<_> = order.iter().map(|&row| before[row as usize]).collect();
        assert_eq!(content(&batch), want, "{order:?}");
    }
}

#[test]
fn rows_that_come_take_the_room_of_those_that_left_and_show_nothing_of_them() {
    let mut batch = cache(1.0, &[3, 60, 5], 80);
    batch.reserve_rows(4);
    let room = batch.stores().next().unwrap().data_ptr();
    for turn in 0..5 {
        // The last row takes the first place; what left was longer than what comes.
        batch.select_rows(&[batch.rows() - 1, 1]);
        batch.append_rows(cache(2.0 + f64::from(turn), &[4, 2], 9));
        assert_eq!(batch.stores().next().unwrap().data_ptr(), room, "the batch was copied");
        let new = Tensor::ones([4, 1, 1, 2], (Kind::Double, Device::Cpu)) * 5.0;
        let (key, _) = batch.write(0, &new, &new);
        for (row, &length) in batch.lengths.iter().enumerate() {
            let behind = key.get(row as i64).narrow(1, length + 1, key.size()[2] - length - 1);
            assert_eq!(behind.abs().sum(Kind::Double).double_value(&[]), 0.0, "row {row}, turn {turn}");
        }
        batch.pass = None;
        let want = 200.0 + 100.0 * f64::from(turn);
        assert_eq!(content(&batch)[1..], [(60, 101.0), (4, want), (2, want + 1.0)]);
    }
}

#[test]
fn slots_that_were_never_written_are_finite() {
    let batch = cache(1.0, &[3, 5], 64);
    assert!(batch.stores().next().unwrap().isfinite().all().int64_value(&[]) == 1);
}

const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Keys that say whose they are: row, then token. `[B, 1, T, 1]`
fn keys(rows: &[&[i64]]) -> Tensor {
    let values: Vec<f32> = rows.iter().flat_map(|row| row.iter().map(|&token| token as f32)).collect();
    Tensor::from_slice(&values).view([rows.len() as i64, 1, rows[0].len() as i64, 1])
}

fn write(cache: &mut KvCache, rows: &[&[i64]]) -> Vec<f32> {
    let new = keys(rows);
    let (key, value) = cache.write(0, &new, &new.neg());
    assert!(key.equal(&value.neg()));
    Vec::try_from(key.flatten(0, -1)).unwrap()
}

#[test]
fn tokens_lie_behind_their_own_row_and_nothing_else_does() {
    let mut cache = KvCache::new(&[LayerCache::full(1, 1)], 2, 1, OPTIONS);
    assert_eq!(write(&mut cache, &[&[11, 12, 13], &[21, 99, 99]]), [11.0, 12.0, 13.0, 21.0, 99.0, 99.0]);
    cache.advance(&[3, 1]);
    assert_eq!(write(&mut cache, &[&[14], &[22]]), [11.0, 12.0, 13.0, 14.0, 21.0, 22.0, 0.0, 0.0]);
    cache.advance(&[1, 1]);
    assert_eq!((cache.lengths(), cache.len(), cache.rows(), cache.is_empty()), ([4, 2].as_slice(), 4, 2, false));
    // Not advanced: the next pass takes its place.
    write(&mut cache, &[&[77, 77, 77], &[77, 77, 77]]);
    let want = [11.0, 12.0, 13.0, 14.0, 15.0, 21.0, 22.0, 23.0, 0.0, 0.0];
    assert_eq!(write(&mut cache, &[&[15], &[23]]), want);
}

#[test]
fn what_came_true_of_several_passes_stays() {
    let mut cache = KvCache::new(&[LayerCache::full(1, 1)], 2, 1, OPTIONS);
    write(&mut cache, &[&[11, 12], &[21, 99]]);
    cache.advance(&[2, 1]);
    let base = cache.lengths().to_vec();
    for (first, second) in [([1, 2], [3, 4]), ([5, 6], [7, 8])] {
        write(&mut cache, &[&first, &second]);
        cache.advance(&[2, 2]);
    }
    cache.keep_behind(&base, &[vec![1, 2], vec![3]]);
    assert_eq!(cache.lengths(), [4, 2]);
    let want = [11.0, 12.0, 2.0, 5.0, 13.0, 21.0, 8.0, 22.0, 0.0, 0.0];
    assert_eq!(write(&mut cache, &[&[13], &[22]]), want);
}

#[test]
fn growth_keeps_everything() {
    let mut cache = KvCache::new(&[LayerCache::full(1, 1)], 1, 0, OPTIONS);
    let mut want = Vec::new();
    for token in 0..200 {
        want.push(token as f32);
        assert_eq!(write(&mut cache, &[&[token]]), want);
        cache.advance(&[1]);
    }
    cache.truncate(&[3]);
    assert_eq!(write(&mut cache, &[&[8, 9]]), [0.0, 1.0, 2.0, 8.0, 9.0]);
}

#[test]
#[should_panic(expected = "would show slots that hold nothing")]
fn a_row_cannot_be_truncated_to_more_than_it_holds() {
    KvCache::new(&[LayerCache::full(1, 1)], 2, 8, OPTIONS).truncate(&[0, 1]);
}

#[test]
#[should_panic(expected = "2 were written")]
fn a_row_cannot_advance_over_what_was_not_written() {
    let mut cache = KvCache::new(&[LayerCache::full(1, 1)], 1, 8, OPTIONS);
    write(&mut cache, &[&[1, 2]]);
    cache.advance(&[3]);
}

/// Two windows, full attention with keys wider than values, and a state.
fn kinds() -> Vec<LayerCache> {
    vec![
        LayerCache::Attention { groups: 2, key_dim: 3, value_dim: 3, window: Some(4) },
        LayerCache::State { shape: vec![2, 2] },
        LayerCache::Attention { groups: 1, key_dim: 5, value_dim: 2, window: None },
    ]
}

/// A pass over tokens, given as each row's list of (token, position): what layers keep says whose it is.
fn pass(cache: &mut KvCache, rows: &[Vec<(i64, i64)>]) {
    let (count, tokens) = (rows.len() as i64, rows[0].len() as i64);
    let column = |values: Vec<i64>| Tensor::from_slice(&values).view([count, tokens]);
    let ids = column(rows.iter().flatten().map(|token| token.0).collect());
    let positions = column(rows.iter().flatten().map(|token| token.1).collect());
    let _ = cache.masks(&AttentionMask::Causal, &positions);
    let of = |groups: i64, dim: i64, layer: f64| {
        let ids = ids.to_kind(Kind::Double).view([count, 1, tokens, 1]) + layer;
        ids.expand([count, groups, tokens, dim], false)
    };
    let _ = cache.write(0, &of(2, 3, 0.1), &of(2, 3, 0.2));
    cache.write_states(1, &of(2, 2, 0.3).permute([0, 2, 1, 3]).contiguous());
    let _ = cache.write(2, &of(1, 5, 0.4), &of(1, 2, 0.5));
}

/// Everything a row holds.
fn held(cache: &KvCache, row: usize) -> Vec<Tensor> {
    let [keys, values] = cache.contents(0, row);
    let [others, more] = cache.contents(2, row);
    let state = cache.state(1).get(row as i64);
    vec![keys, values, others, more, state, cache.positions(row).unwrap()]
}

#[track_caller]
fn is_fresh(cache: &KvCache, row: usize, tokens: &[i64]) {
    let mut fresh = KvCache::new(&kinds(), 1, 0, (Kind::Double, Device::Cpu));
    pass(&mut fresh, &[tokens.iter().copied().zip(0..).collect()]);
    fresh.advance(&[tokens.len() as i64]);
    for (got, want) in held(cache, row).iter().zip(held(&fresh, 0)) {
        assert!(got.equal(&want), "row {row}: {got} and not {want}");
    }
}

/// After a padded prefill, a tree of each row, rows that leave, join and take another's place: what is held is what a
/// fresh prefill of the same tokens holds, of every kind of layer.
#[test]
fn every_kind_of_layer_is_rolled_back_to_a_fresh_prefill() {
    let mut cache = KvCache::new(&kinds(), 2, 3, (Kind::Double, Device::Cpu));
    let texts = [vec![11, 12, 13, 14, 15], vec![21, 22]];
    let padded = |row: &[i64]| (0..5).map(|place| (row.get(place).copied().unwrap_or(0), place as i64)).collect();
    pass(&mut cache, &[padded(&texts[0]), padded(&texts[1])]);
    cache.advance(&[5, 2]);
    is_fresh(&cache, 0, &texts[0]);
    is_fresh(&cache, 1, &texts[1]);
    // A root, two guesses side by side, and one behind the second.
    let tree = |first: i64, at: i64| vec![(first, at), (first + 1, at + 1), (first + 2, at + 1), (first + 3, at + 2)];
    pass(&mut cache, &[tree(30, 5), tree(40, 2)]);
    cache.keep(&[vec![0, 2, 3], vec![0]]);
    is_fresh(&cache, 0, &[11, 12, 13, 14, 15, 30, 32, 33]);
    is_fresh(&cache, 1, &[21, 22, 40]);
    // A pass that nobody keeps leaves nothing.
    pass(&mut cache, &[tree(70, 8), tree(80, 3)]);
    pass(&mut cache, &[vec![(50, 8)], vec![(60, 3)]]);
    cache.advance(&[1, 0]);
    is_fresh(&cache, 0, &[11, 12, 13, 14, 15, 30, 32, 33, 50]);
    is_fresh(&cache, 1, &[21, 22, 40]);
    let joining = |tokens: &[i64]| {
        let mut new = KvCache::new(&kinds(), 1, 1, (Kind::Double, Device::Cpu));
        pass(&mut new, &[tokens.iter().copied().zip(0..).collect()]);
        new.advance(&[tokens.len() as i64]);
        new
    };
    cache.append_rows(joining(&[7, 8, 9]));
    cache.select_rows(&[2, 1]);
    is_fresh(&cache, 0, &[7, 8, 9]);
    // The room of the row that left takes the next one in.
    cache.append_rows(joining(&[1, 2, 3, 4]));
    is_fresh(&cache, 0, &[7, 8, 9]);
    is_fresh(&cache, 1, &[21, 22, 40]);
    is_fresh(&cache, 2, &[1, 2, 3, 4]);
    cache.select_rows(&[2, 0]);
    is_fresh(&cache, 0, &[1, 2, 3, 4]);
    is_fresh(&cache, 1, &[7, 8, 9]);
}

#[test]
#[should_panic(expected = "states of tokens before the last are not kept")]
fn a_state_cannot_go_back() {
    let mut cache = KvCache::new(&kinds(), 1, 3, (Kind::Double, Device::Cpu));
    pass(&mut cache, &[vec![(1, 0), (2, 1)]]);
    cache.advance(&[2]);
    cache.truncate(&[1]);
}

/// Slots named are written, all others stay to the last bit, and padding is seen by nobody.
#[test]
fn a_pass_over_what_is_held_touches_the_slots_it_names() {
    let mut cache = cache(1.0, &[4, 2], 4);
    let before = [0, 1].map(|row| cache.contents(0, row)[0].copy());
    let slots = Tensor::from_slice2(&[[2i64, 0], [1, 4]]);
    cache.overwrite(&slots);
    let new = Tensor::from_slice(&[7.0, 8.0, 9.0, f64::NAN]).view([2, 1, 2, 1]).expand([2, 1, 2, 2], false);
    let (keys, _) = cache.write(0, &new, &new);
    assert_eq!(keys.size(), [2, 1, 4, 2]);
    let firsts = |row: usize| Vec::<f64>::try_from(cache.contents(0, row)[0].get(0).select(1, 0)).unwrap();
    assert_eq!((firsts(0), firsts(1)), (vec![8.0, 100.0, 7.0, 100.0], vec![101.0, 9.0]));
    assert!(before[0].get(0).get(1).equal(&cache.contents(0, 0)[0].get(0).get(1)));
    assert_eq!(cache.lengths(), [4, 2]);
    // The next token shows what padding left behind to nobody.
    let new = Tensor::ones([2, 1, 1, 2], (Kind::Double, Device::Cpu));
    let (keys, _) = cache.write(0, &new, &new);
    assert!(keys.size() == [2, 1, 5, 2] && !bool::try_from(keys.isnan().any()).unwrap());
}

#[test]
fn a_shrunk_cache_holds_the_same_in_less_room_and_grows_again() {
    let window = LayerCache::Attention { groups: 1, key_dim: 1, value_dim: 1, window: Some(2) };
    let layers = [LayerCache::full(1, 1), window, LayerCache::State { shape: vec![3] }];
    let mut cache = KvCache::new(&layers, 2, 100, OPTIONS);
    cache.reserve_rows(5);
    let pass = |cache: &mut KvCache, rows: &[&[i64]], first: i64| {
        let tokens = rows[0].len() as i64;
        let positions = (Tensor::arange(tokens, (Kind::Int64, Device::Cpu)) + first).expand([2, tokens], false);
        let _ = cache.masks(&AttentionMask::Causal, &positions);
        for layer in 0..2 {
            let _ = cache.write(layer, &keys(rows), &keys(rows));
        }
        cache.write_states(2, &keys(rows).view([2, -1, 1]).expand([2, tokens, 3], false));
    };
    pass(&mut cache, &[&[11, 12, 13], &[21, 99, 99]], 0);
    cache.advance(&[3, 1]);
    let held = |cache: &KvCache| {
        let contents = (0..2).flat_map(|layer| (0..2).flat_map(move |row| cache.contents(layer, row)));
        let mut held: Vec<Tensor> = contents.map(|part| part.copy()).collect();
        held.extend((0..2).map(|row| cache.positions(row).unwrap().copy()));
        held.push(cache.state(2).copy());
        held
    };
    let (before, bytes) = (held(&cache), cache.bytes());
    // Keys and values of two layers, positions, and a state: of 5 rows with 100 slots.
    assert_eq!(bytes, 5 * (100 * (2 * 2 * 4 + 8) + 3 * 4));
    cache.shrink();
    assert_eq!((cache.rows(), cache.room(), cache.capacity()), (2, 2, 3));
    assert_eq!(cache.bytes(), 2 * (3 * (2 * 2 * 4 + 8) + 3 * 4));
    assert!(held(&cache).iter().zip(&before).all(|(got, want)| got.equal(want)));
    cache.shrink();
    pass(&mut cache, &[&[14], &[22]], 3);
    cache.advance(&[1, 1]);
    assert_eq!(Vec::<f32>::try_from(cache.contents(0, 1)[0].flatten(0, -1)).unwrap(), [21.0, 22.0]);
    assert_eq!(Vec::<f32>::try_from(cache.state(2).flatten(0, -1)).unwrap(), [14.0, 14.0, 14.0, 22.0, 22.0, 22.0]);
}
