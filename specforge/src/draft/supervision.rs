//! Which rows are trained. One convention for every algorithm, and one place that shifts.
//!
//! Row `t` holds the target's hidden state of token `t`. The target itself predicts token `t + 1` from it; a draft's
//! prediction number `k` (from 0) is token `t + 2 + k`. While decoding, that prediction matters only if the tokens
//! before it in the chain were generated too, so `exact` trains row `t` for prediction `k` iff tokens
//! `t + 1 ..= t + 2 + k` are all supervised and in the row's document.
//!
//! ```text
//! token       u0  u1  a2  a3  a4  e5        u: prompt, a: answer, e: end of turn
//! supervised   .   .   x   x   x   x
//! k = 0 rows       x   x   x                predict a3, a4, e5
//! k = 1 rows       x   x                    predict a4, e5
//! ```

use serde::{Deserialize, Serialize};

use crate::data::PackedBatch;

/// Rule that says which rows are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskAlignment {
    /// The predicted token and all before it in the chain are supervised.
    #[default]
    Exact,
    /// The predicted token is supervised, as plain label masking does it (parity with the original Medusa).
    Label,
    /// Token `t + k` is supervised and the document has a token after the one it stands for: SpecForge `a6b6b02`. Misses
    /// the first row of every answer and trains two past its end.
    Specforge,
    /// Token `t + k` is supervised: SafeAILab/EAGLE `cb7e084`, whose data preparation shifts the mask beforehand. A row
    /// whose prediction lies past the end of the document is trained towards the uniform distribution.
    Official,
}

/// Rows trained for one prediction, with the tokens they predict.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TrainedRows {
    /// Row numbers within the batch, ascending.
    pub rows: Vec<i64>,
    /// Predicted token of each row.
    pub labels: Vec<i64>,
}

/// Rows of prediction `k` in a packed batch, with the tokens they predict; 0 past the end of a document.
pub fn trained_rows(batch: &PackedBatch, k: usize, alignment: MaskAlignment) -> TrainedRows {
    let rows = rows(batch, k, alignment);
    let mut trained = TrainedRows::default();
    let mut ends = batch.lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    let mut end = 0;
    for row in rows {
        while row >= end {
            end = ends.next().unwrap_or(i64::MAX);
        }
        let predicted = row + 2 + k as i64;
        trained.labels.push(if predicted < end { batch.ids[predicted as usize] } else { 0 });
        trained.rows.push(row);
    }
    trained
}

/// Rows of prediction `k` in a packed batch, ascending.
pub fn rows(batch: &PackedBatch, k: usize, alignment: MaskAlignment) -> Vec<i64> {
    let mut rows = Vec::new();
    let mut start = 0;
    for &length in &batch.lengths {
        let length = length as usize;
        let supervised = &batch.supervised[start..start + length];
        // How many supervised tokens in a row end at the one looked at.
        let mut run = 0;
        for (token, &mark) in supervised.iter().enumerate() {
            run = if mark { run + 1 } else { 0 };
            // The row that this token decides about, if it does.
            let row = match alignment {
                MaskAlignment::Exact if run >= k + 2 => token.checked_sub(k + 2),
                MaskAlignment::Label if mark => token.checked_sub(k + 2),
                MaskAlignment::Specforge if mark && token + 1 < length => token.checked_sub(k),
                MaskAlignment::Official if mark => token.checked_sub(k),
                _ => None,
            };
            rows.extend(row.map(|row| (start + row) as i64));
        }
        start += length;
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DocumentRef;

    fn batch(marks: &[&str]) -> PackedBatch {
        let joined: String = marks.concat();
        PackedBatch {
            ids: (0..joined.len() as i64).map(|token| 100 + token).collect(),
            positions: marks.iter().flat_map(|marks| 0..marks.len() as i64).collect(),
            supervised: joined.chars().map(|mark| mark == 'x').collect(),
            lengths: marks.iter().map(|marks| marks.len() as i64).collect(),
            documents: (0..).zip(marks).map(|(number, marks)| DocumentRef::new(*marks, number)).collect(),
        }
    }

    #[test]
    fn the_documented_example() {
        let batch = batch(&["..xxxx"]);
        let rows = |k| trained_rows(&batch, k, MaskAlignment::Exact);
        assert_eq!(rows(0), TrainedRows { rows: vec![1, 2, 3], labels: vec![103, 104, 105] });
        assert_eq!(rows(1), TrainedRows { rows: vec![1, 2], labels: vec![104, 105] });
        assert_eq!(rows(2), TrainedRows { rows: vec![1], labels: vec![105] });
        assert_eq!(rows(3), TrainedRows::default());
        let label = trained_rows(&batch, 0, MaskAlignment::Label);
        assert_eq!(label, TrainedRows { rows: vec![0, 1, 2, 3], labels: vec![102, 103, 104, 105] });
    }

    #[test]
    fn chains_stop_at_gaps_and_at_document_ends() {
        for k in 0..4 {
            let packed = trained_rows(&batch(&[".xx.xxx", "xxxx", ".xxxx"]), k, MaskAlignment::Exact);
            let (mut rows, mut labels, mut start) = (vec![], vec![], 0);
            for marks in [".xx.xxx", "xxxx", ".xxxx"] {
                let alone = trained_rows(&batch(&[marks]), k, MaskAlignment::Exact);
                rows.extend(alone.rows.iter().map(|row| row + start));
                labels.extend(alone.labels.iter().map(|label| label + start));
                start += marks.len() as i64;
            }
            assert_eq!(packed, TrainedRows { rows, labels }, "k {k}");
        }
    }

    /// What the references' loops do with a mask that they shift left once a step.
    #[test]
    fn parity_alignments_are_the_references_shifted_masks() {
        let marks = "x.xxx..xxx";
        for k in 0..4 {
            let shifted: Vec<i64> =
                (0..10).filter(|t| t + k < 10 && marks.as_bytes()[t + k] == b'x').map(|t| t as i64).collect();
            assert_eq!(rows(&batch(&[marks]), k, MaskAlignment::Official), shifted, "k {k}");
            let without_last: Vec<i64> = shifted.into_iter().filter(|t| (*t as usize) + k + 1 < 10).collect();
            assert_eq!(rows(&batch(&[marks]), k, MaskAlignment::Specforge), without_last, "k {k}");
        }
    }

    /// The definition, written as its formula.
    #[test]
    fn equals_the_conjunction_of_the_definition() {
        let marks = ".xx.xxxx..xxxxxxx.x";
        let supervised: Vec<bool> = marks.chars().map(|mark| mark == 'x').collect();
        for k in 0..5 {
            let want: Vec<i64> = (0..marks.len())
                .filter(|t| t + 2 + k < marks.len() && (t + 1..=t + 2 + k).all(|token| supervised[token]))
                .map(|t| t as i64)
                .collect();
            assert_eq!(trained_rows(&batch(&[marks]), k, MaskAlignment::Exact).rows, want, "k {k}");
        }
    }
}
