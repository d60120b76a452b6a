//! Which tokens a draft should be able to name: those the target says most often.
//!
//! Order: tokens that must be there, then by count, the commonest first, then by id. So ties never depend on the order
//! of documents or of threads, and tokens that were never seen come in ascending order. SpecForge (`a6b6b02`,
//! `data/preprocessing.py`) breaks ties by which token was met first, and forces none.

use std::cmp::Reverse;

use serde::Serialize;

use super::VocabMap;

/// Tokens chosen from counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The tokens.
    pub map: VocabMap,
    /// How many had to be there.
    pub forced: usize,
    /// How many were neither forced nor seen, and only fill the map up.
    pub filled: usize,
    /// Share of the counted tokens that the map can name.
    pub coverage: f64,
}

/// What a map of some size would cover.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Coverage {
    /// Tokens in the map.
    pub size: usize,
    /// Share of the counted tokens that it can name.
    pub share: f64,
}

/// Chooses `size` tokens. `counts` has one entry for each token of the target; `forced` ids are always chosen.
pub fn choose(counts: &[u64], size: usize, forced: &[i64]) -> Result<Choice, String> {
    let (order, forced) = order(counts, forced)?;
    if !(1..=counts.len()).contains(&size) {
        return Err(format!("expected 1 to {} tokens, as many as the target has, got {size}", counts.len()));
    }
    if size < forced {
        return Err(format!(
            "expected at least {forced} tokens, got {size}: ends of turns and special tokens are always among them"
        ));
    }
    let filled = order[forced.min(size)..size].iter().filter(|&&id| counts[id] == 0).count();
    let mut target_ids: Vec<i64> = order[..size].iter().map(|&id| id as i64).collect();
    target_ids.sort_unstable();
    let map = VocabMap::new(target_ids, counts.len() as i64).map_err(|error| error.to_string())?;
    let coverage = coverage(counts, &map);
    Ok(Choice { map, forced, filled, coverage })
}

/// Share of the counted tokens that a map can name; 0 where nothing was counted.
pub fn coverage(counts: &[u64], map: &VocabMap) -> f64 {
    let named: u64 = map.target_ids().iter().filter_map(|&id| counts.get(id as usize)).sum();
    named as f64 / counts.iter().sum::<u64>().max(1) as f64
}

/// What maps of 1000, 2000, 4000, ... tokens would cover, of `chosen` tokens, and of all.
pub fn coverage_table(counts: &[u64], forced: &[i64], chosen: usize) -> Result<Vec<Coverage>, String> {
    let (order, forced) = order(counts, forced)?;
    let doubled = std::iter::successors(Some(1000), |size| Some(2 * size)).take_while(|&size| size < counts.len());
    let mut sizes: Vec<usize> = doubled.chain([chosen, counts.len()]).filter(|&size| size >= forced).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let total = counts.iter().sum::<u64>().max(1) as f64;
    let (mut covered, mut done) = (0, 0);
    let rows = sizes.into_iter().map(|size| {
        covered += order[done..size].iter().map(|&id| counts[id]).sum::<u64>();
        done = size;
        Coverage { size, share: covered as f64 / total }
    });
    Ok(rows.collect())
}

/// All token ids in the order in which a growing map takes them, and how many of them are forced.
fn order(counts: &[u64], forced: &[i64]) -> Result<(Vec<usize>, usize), String> {
    let mut is_forced = vec![false; counts.len()];
    for &id in forced {
        let place = usize::try_from(id).ok().and_then(|id| is_forced.get_mut(id));
        *place.ok_or_else(|| format!("token {id} must be in the map, but the target has {} tokens", counts.len()))? =
            true;
    }
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_unstable_by_key(|&id| (!is_forced[id], Reverse(counts[id]), id));
    let forced = is_forced.iter().filter(|&&forced| forced).count();
    Ok((order, forced))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(size: usize, seen: &[(usize, u64)]) -> Vec<u64> {
        let mut counts = vec![0; size];
        seen.iter().for_each(|&(id, count)| counts[id] = count);
        counts
    }

    /// Tables of the golden file `specforge/eagle3_summary.json`, made with SpecForge `a6b6b02`: 16 target tokens, counts
    /// in the order in which its counter met the tokens, nothing forced.
    #[test]
    fn specforges_tables_come_out_where_no_tie_is_cut() {
        // (counts, draft size, d2t, target ids that t2d marks)
        type Table = (&'static [(usize, u64)], usize, &'static [i64], &'static [i64]);
        let tables: [Table; 3] = [
            (&[(3, 5), (9, 5), (1, 2), (14, 7), (2, 1)], 4, &[1, 2, 7, 11], &[1, 3, 9, 14]),
            (&[(9, 5), (3, 5), (1, 2), (14, 7), (2, 5)], 3, &[3, 8, 12], &[3, 9, 14]),
            (&[(5, 3), (11, 2)], 6, &[0, 0, 0, 0, 1, 6], &[0, 1, 2, 3, 5, 11]),
        ];
        let ours = tables.map(|(seen, size, ..)| choose(&counts(16, seen), size, &[]).unwrap());
        for number in [0, 2] {
            assert_eq!(ours[number].map.d2t(), tables[number].2);
            assert_eq!(ours[number].map.target_ids(), tables[number].3);
        }
        // In the second, tokens 9, 3 and 2 were all seen five times and two of them fit: SpecForge takes those it met
        // first, which depends on the order of the documents. Ours are the lowest ids, and cover as much.
        assert_eq!(ours[1].map.target_ids(), [2, 3, 14]);
        let theirs = VocabMap::new(tables[1].3.to_vec(), 16).unwrap();
        assert_eq!(theirs.d2t(), tables[1].2);
        assert_eq!(ours[1].coverage, coverage(&counts(16, tables[1].0), &theirs));
        assert_eq!(ours.map(|choice| choice.filled), [0, 0, 4]);
    }

    #[test]
    fn forced_tokens_come_first_and_ties_go_to_the_lower_id() {
        let counts = counts(10, &[(2, 4), (5, 4), (7, 9), (8, 1)]);
        let choice = choose(&counts, 4, &[9, 8, 9]).unwrap();
        assert_eq!(choice.map.target_ids(), [2, 7, 8, 9]);
        assert_eq!((choice.forced, choice.filled), (2, 0));
        assert_eq!(choice.coverage, 14.0 / 18.0);
        // A forced token that was never seen fills nothing up; 0 and 1 do.
        let choice = choose(&counts, 7, &[9]).unwrap();
        assert_eq!(choice.map.target_ids(), [0, 1, 2, 5, 7, 8, 9]);
        assert_eq!((choice.forced, choice.filled, choice.coverage), (1, 2, 1.0));
        assert_eq!(choose(&counts, 10, &[9]).unwrap().map.target_ids(), (0..10).collect::<Vec<i64>>());
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let counts = counts(10, &[(2, 4)]);
        for (size, forced, expected) in [
            (0, vec![], "expected 1 to 10 tokens"),
            (11, vec![], "got 11"),
            (2, vec![1, 2, 3], "expected at least 3 tokens, got 2"),
            (2, vec![10], "token 10 must be in the map, but the target has 10 tokens"),
            (2, vec![-1], "token -1"),
        ] {
            let problem = choose(&counts, size, &forced).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        }
    }

    #[test]
    fn the_table_agrees_with_the_maps() {
        let counts: Vec<u64> = (0..5000).map(|id: u64| id * 7919 % 101).collect();
        let forced = [4999, 0];
        let table = coverage_table(&counts, &forced, 2500).unwrap();
        assert_eq!(table.iter().map(|row| row.size).collect::<Vec<_>>(), [1000, 2000, 2500, 4000, 5000]);
        for row in &table {
            assert_eq!(row.share, choose(&counts, row.size, &forced).unwrap().coverage, "{}", row.size);
        }
        assert_eq!(table[4].share, 1.0);
        assert_eq!(coverage_table(&[0; 8], &[], 3).unwrap()[0], Coverage { size: 3, share: 0.0 });
    }
}
