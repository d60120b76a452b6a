//! The draft's own vocabulary: `d2t` and `t2d` against each other, the target, the projection and the training.

use serde_json::Value;
use tch::{Kind, Tensor};

use crate::doctor::case::Case;
use crate::doctor::finding::Findings;
use crate::error::Result;

const AGAIN: &str = "export the checkpoint again: engines read d2t as what is added to a draft id";

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(own) = &case.eagle3 else { return Ok(()) };
    let rows = case.target.model.info().vocab_size;
    let number = |key: &str| own.values.get(key).and_then(Value::as_i64);
    let own_size = number("draft_vocab_size").unwrap_or(rows);
    let tensors = &case.folder.tensors;
    let (d2t, t2d) = (tensors.get("d2t"), tensors.get("t2d"));
    let head_rows = tensors.get("lm_head.weight").and_then(|head| head.size().first().copied());
    if let Some(got) = head_rows.filter(|&got| got != own_size) {
        found.fault(
            format!("`lm_head.weight` has {got} rows, config.json says {own_size} tokens (draft_vocab_size)"),
            "write the draft's own number; a projection that was padded needs its padding cut off",
        );
    }
    let Some(d2t) = d2t else {
        match own_size < rows {
            true => found.fault(
                format!(
                    "the draft names {own_size} of {rows} tokens and has no `d2t`: its ids are taken for the target's"
                ),
                AGAIN,
            ),
            false => found.ok(format!("all {rows} tokens")),
        }
        return Ok(());
    };
    if own_size >= rows {
        found.fault(
            format!("`d2t` is there, but the draft names all {rows} tokens (draft_vocab_size): an engine takes one or the other"),
            "remove d2t and t2d, or write the draft's own draft_vocab_size",
        );
        return Ok(());
    }
    if d2t.kind() != Kind::Int64 || d2t.size() != [own_size] {
        found.fault(
            format!("`d2t`: expected {own_size} numbers of int64, got {:?} of {:?}", d2t.size(), d2t.kind()),
            AGAIN,
        );
        return Ok(());
    }
    let offsets = Vec::<i64>::try_from(d2t)?;
    let ids: Vec<i64> = (0..).zip(&offsets).map(|(draft, offset): (i64, &i64)| draft.saturating_add(*offset)).collect();
    let named = named(t2d, rows, found)?;
    let ascending = |ids: &[i64]| ids.windows(2).all(|pair| pair[0] < pair[1]);
    let fits = |ids: &[i64]| {
        let is_named = |id: &i64| named.as_ref().is_none_or(|named| named.get(*id as usize) == Some(&true));
        ascending(ids) && ids.iter().all(|id| (0..rows).contains(id) && is_named(id))
    };
    let trained = trained(case)?;
    if !fits(&ids) && ascending(&offsets) && fits(&offsets) {
        found.fault("`d2t` holds the target's ids themselves; engines add the draft's id to each", AGAIN);
    } else if offsets.iter().all(|&offset| offset == 0) && !fits(&ids) {
        found.fault(format!("`d2t` is zero everywhere: it names the first {own_size} tokens, `t2d` others"), AGAIN);
    } else if let Some(draft) = ids.iter().position(|id| !(0..rows).contains(id)) {
        let text = format!("`d2t[{draft}]` leads to token {}; the target has 0 to {}", ids[draft], rows - 1);
        found.fault(text, AGAIN);
    } else if let Some(place) = ids.windows(2).position(|pair| pair[0] >= pair[1]) {
        let text = format!("`d2t[{}]` leads to token {}, the one before to {}", place + 1, ids[place + 1], ids[place]);
        found.fault(format!("{text}: expected ascending tokens, each once"), AGAIN);
    } else if let Some(named) = &named
        && let Some(&id) = ids.iter().find(|&&id| !named[id as usize])
    {
        found.fault(format!("`d2t` leads to token {id}, which `t2d` says the draft cannot name"), AGAIN);
    } else if let Some(count) =
        named.as_ref().map(|named| named.iter().filter(|&&is| is).count() as i64).filter(|&count| count != own_size)
    {
        found.fault(format!("`t2d` names {count} tokens, `d2t` {own_size}"), AGAIN);
    }
    if let Some(trained) = trained.filter(|trained| *trained != offsets) {
        let differ = trained.iter().zip(&offsets).filter(|(left, right)| left != right).count();
        found.fault(format!("`d2t` is another than in training: {differ} of {} places differ", trained.len()), AGAIN);
    } else if found.is_sound() && offsets.iter().all(|&offset| offset == 0) {
        found.warning(
            format!(
                "`d2t` is zero everywhere: the draft names the first {own_size} tokens, which hardly anybody chooses"
            ),
            "look whether the map of the training reached the export",
        );
    }
    ends(case, &ids, found);
    if found.is_sound() {
        found.ok(format!("{own_size} of {rows} tokens, d2t and t2d agree, ends of turns among them"));
    }
    Ok(())
}

/// `t2d` as truths, where it is as long as the target's vocabulary.
fn named(t2d: Option<&Tensor>, rows: i64, found: &mut Findings) -> Result<Option<Vec<bool>>> {
    match t2d {
        None => {
            found.warning(
                "there is no `t2d`",
                "engines need d2t alone, trainers read both: export the checkpoint again",
            );
            Ok(None)
        }
        Some(t2d) if t2d.size() != [rows] => {
            found.fault(format!("`t2d` has {:?} entries, the target {rows} tokens", t2d.size()), AGAIN);
            Ok(None)
        }
        Some(t2d) => Ok(Some(Vec::<bool>::try_from(t2d.to_kind(Kind::Bool))?)),
    }
}

/// The offsets of the training, where they are known.
fn trained(case: &Case<'_>) -> Result<Option<Vec<i64>>> {
    let tensor = case.origin.as_ref().and_then(|origin| origin.tensor("d2t"));
    Ok(tensor.map(Vec::<i64>::try_from).transpose()?)
}

/// Whether the draft can name what ends a turn.
fn ends(case: &Case<'_>, ids: &[i64], found: &mut Findings) {
    let Ok(tokenizer) = &case.target.tokenizer else { return };
    let missing: Vec<u32> =
        tokenizer.eos_token_ids().iter().copied().filter(|id| !ids.contains(&i64::from(*id))).collect();
    if !missing.is_empty() && found.is_sound() {
        found.warning(
            format!("the draft cannot name {missing:?}, which ends a turn: every last guess fails"),
            "make the map with `specforge vocab`, which keeps them",
        );
    }
}
