//! What the ranks of a run agree on: that they were started alike, where they start, and when they stop.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tch::Tensor;

use super::parts::Provenance;
use crate::checkpoint::inputs;
use crate::dist::{ProcessGroup, ReduceOp};
use crate::draft::Parameter;
use crate::error::{Error, Result};

/// Keys that say where files lie. A rank may have them elsewhere: what is in them is compared by its digest, or comes
/// from the first rank.
const PLACES: &[&str] = &[
    "target.path",
    "target.feature_store",
    "data.train",
    "data.eval",
    "data.cache_dir",
    "draft.vocab_map",
    "draft.init_from",
    "train.output_dir",
];

/// Refuses ranks that were started on something else than the first: another program, configuration, data or draft.
/// Every rank calls this, and every rank gets the same answer.
pub fn same_run(group: &ProcessGroup, provenance: &Provenance, parameters: &[Parameter]) -> Result<()> {
    if !group.is_distributed() {
        return Ok(());
    }
    let own = fingerprint(provenance, parameters);
    let all = group.all_gather_bytes(json!(own).to_string().as_bytes())?;
    let read = |bytes: &Vec<u8>| {
        let read: BTreeMap<String, String> = serde_json::from_slice(bytes)
            .map_err(|error| Error::Failed(format!("the ranks cannot compare what they were started on: {error}")))?;
        Ok(read)
    };
    let all = all.iter().map(read).collect::<Result<Vec<_>>>()?;
    let Some((first, others)) = all.split_first() else {
        return Ok(());
    };
    for (rank, other) in (1..).zip(others) {
        let Some((key, want, got)) = difference(first, other) else { continue };
        let show = |value: Option<&String>| value.map_or("nothing", String::as_str).to_owned();
        return Err(Error::Usage(format!(
            "rank {rank} was started on something else than rank 0: {key}: expected {}, got {}; start every rank with the \
             same program, configuration and data",
            show(want),
            show(got)
        )));
    }
    Ok(())
}

/// What must be the same on every rank, by name. Numbers before names keep the order: the program first, the draft last.
fn fingerprint(provenance: &Provenance, parameters: &[Parameter]) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    values.insert("1 version of specforge".to_owned(), provenance.versions.specforge.clone());
    values.insert("1 version of libtorch".to_owned(), provenance.versions.libtorch.clone());
    flatten("2 configuration, ", &provenance.configuration, &mut values);
    for (name, hash) in &provenance.data_hashes {
        values.insert(format!("3 digest of the data, {name}"), hash.clone());
    }
    // Where the draft starts is the first rank's business.
    for (name, digest) in provenance.inputs.iter().filter(|(name, _)| *name != inputs::STARTING_DRAFT.name) {
        values.insert(format!("3 digest of the {name}"), digest.clone());
    }
    for (index, Parameter { name, value, .. }) in parameters.iter().enumerate() {
        values.insert(format!("4 parameter {index:04}"), format!("{name} {:?} {:?}", value.kind(), value.size()));
    }
    values
}

/// Every leaf of a JSON value under its dotted key, but for [`PLACES`].
fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    let Some(object) = value.as_object() else {
        into.insert(prefix.trim_end_matches('.').to_owned(), value.to_string());
        return;
    };
    for (name, value) in object {
        let key = format!("{prefix}{name}");
        if !PLACES.iter().any(|place| key.ends_with(&format!(", {place}"))) {
            flatten(&format!("{key}."), value, into);
        }
    }
}

type Difference<'a> = (&'a str, Option<&'a String>, Option<&'a String>);

/// The first name whose values differ.
fn difference<'a>(want: &'a BTreeMap<String, String>, got: &'a BTreeMap<String, String>) -> Option<Difference<'a>> {
    let key = want.keys().chain(got.keys()).filter(|key| want.get(*key) != got.get(*key)).min()?;
    Some((key.get(2..).unwrap_or(key), want.get(key), got.get(key)))
}

/// Numbers of the first rank, on every rank.
pub fn numbers<const N: usize>(group: &ProcessGroup, own: [u64; N]) -> Result<[u64; N]> {
    let tensor = Tensor::from_slice(&own.map(|number| number as i64));
    group.broadcast(&tensor, 0)?;
    let mut numbers = [0; N];
    numbers.iter_mut().zip(Vec::<i64>::try_from(tensor)?).for_each(|(number, value)| *number = value as u64);
    Ok(numbers)
}

/// Every rank's parameters become those of the first, whatever it built or read.
pub fn parameters(group: &ProcessGroup, parameters: &[Parameter]) -> Result<()> {
    parameters.iter().try_for_each(|parameter| group.broadcast(&parameter.value.detach(), 0))
}

/// The number of a signal that any rank was sent, 0 for none: the same on every rank, so that all stop after one step.
pub fn signal(group: &ProcessGroup, own: i32) -> Result<i32> {
    if !group.is_distributed() {
        return Ok(own);
    }
    let largest = Tensor::from_slice(&[i64::from(own)]);
    group.all_reduce(&largest, ReduceOp::Max)?;
    Ok(largest.int64_value(&[0]) as i32)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::checkpoint::Versions;
    use crate::dist::group::tests::on_ranks;
    use crate::draft::ParameterGroup;

    fn provenance(configuration: Value, hash: &str, target: &str) -> Provenance {
        let data_hashes = BTreeMap::from([("train".to_owned(), hash.to_owned())]);
        let inputs = BTreeMap::from([(inputs::TARGET_WEIGHTS.name.to_owned(), target.to_owned())]);
        Provenance { configuration, versions: Versions::current(), data_hashes, inputs }
    }

    fn configuration(rate: f64, place: usize) -> Value {
        json!({"optim": {"learning_rate": rate}, "train": {"output_dir": format!("run{place}"), "seed": 1}})
    }

    fn draft(shape: &[i64]) -> Vec<Parameter> {
        let value = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let group = ParameterGroup::of_shape(shape);
        vec![Parameter { name: "a.weight".to_owned(), value, group }]
    }

    #[test]
    fn every_rank_names_the_rank_and_the_key_that_differ() {
        let start = |change: fn(usize) -> (Provenance, Vec<Parameter>)| {
            on_ranks(3, |group| {
                let (provenance, parameters) = change(group.rank());
                same_run(group, &provenance, &parameters).map_err(|error| error.to_string())
            })
        };
        let equal = start(|rank| (provenance(configuration(0.1, rank), "x", "t"), draft(&[2, 3])));
        assert!(equal.iter().all(Result::is_ok), "places may differ: {equal:?}");
        let refused = [
            start(|rank| (provenance(configuration([0.1, 0.1, 0.2][rank], rank), "x", "t"), draft(&[2, 3]))),
            start(|rank| (provenance(configuration(0.1, rank), ["x", "x", "y"][rank], "t"), draft(&[2, 3]))),
            start(|rank| (provenance(configuration(0.1, rank), "x", ["t", "t", "u"][rank]), draft(&[2, 3]))),
            start(|rank| (provenance(configuration(0.1, rank), "x", "t"), draft(&[2, [3, 3, 4][rank]]))),
        ];
        let words = [
            ["optim.learning_rate", "expected 0.1, got 0.2"],
            ["digest of the data, train", "expected x, got y"],
            ["digest of the target's weights", "expected t, got u"],
            ["parameter 0000", "got a.weight Float [2, 4]"],
        ];
        for (answers, words) in refused.iter().zip(words) {
            let text = answers[0].as_ref().unwrap_err();
            assert!(text.contains("rank 2") && words.iter().all(|word| text.contains(word)), "{text}");
            assert!(answers.iter().all(|answer| answer == &answers[0]));
        }
    }

    #[test]
    fn the_first_rank_decides_where_to_start_and_any_rank_when_to_stop() {
        let all = on_ranks(3, |group| {
            let rank = group.rank();
            let own = draft(&[4]);
            drop(own[0].value.shallow_clone().fill_(rank as f64 + 7.0));
            parameters(group, &own).unwrap();
            let values = Vec::<f64>::try_from(own[0].value.to_kind(Kind::Double)).unwrap();
            let signal = signal(group, if rank == 1 { 15 } else { 0 }).unwrap();
            (values, numbers(group, [rank as u64 + 1, 5]).unwrap(), signal)
        });
        assert!(all.iter().all(|rank| *rank == (vec![7.0; 4], [1, 5], 15)), "{all:?}");
    }
}
