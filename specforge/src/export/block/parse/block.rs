//! Keys of the block: its rows, the target's layers that it reads, and what its own layers see.

use super::super::keys::Keys;
use super::super::method::{Layout, Method};
use super::MOST_ROWS;
use crate::draft::block::config::{BlockLayer, Convolution, LayerType, Layout as Rows};
use crate::models::limits;

/// Which token a row predicts.
pub(super) fn rows(method: Method, keys: &Keys) -> Result<Rows, String> {
    let said = [
        ("sample_from_anchor", keys.sample_from_anchor),
        ("dspark_bonus_anchor", keys.dspark_bonus_anchor.map(|bonus| !bonus)),
        ("shift_label", keys.shift_label),
    ];
    let mut found = said.iter().filter_map(|(key, value)| value.map(|value| (key, value)));
    let first = found.next();
    if let (Some((key, value)), Some((other, _))) =
        (first, found.find(|(_, value)| Some(*value) != first.map(|said| said.1)))
    {
        return Err(format!("`{other}` contradicts `{key}`, which says that rows {}", layout_words(value)));
    }
    let shifts = match (method, first) {
        (_, Some((_, shifts))) => shifts,
        (Method::Domino, None) => return Err("`shift_label`: expected true or false, got nothing".to_owned()),
        (_, None) => method.shifts(),
    };
    Ok(if shifts { Rows::Shift } else { Rows::FillIn })
}

fn layout_words(shifts: bool) -> &'static str {
    if shifts { "predict the token behind them" } else { "predict the token in their place" }
}

/// `B`
pub(super) fn block_size((layout, method): (Layout, Method), keys: &Keys, rows: Rows) -> Result<i64, String> {
    let said = [
        ("block_size", keys.block_size),
        ("xpress_block_size", keys.xpress_block_size),
        ("dspark_block_size", keys.dspark_block_size),
    ];
    let mut found = said.iter().filter_map(|(key, value)| value.map(|value| (key, value)));
    let Some((key, size)) = found.next() else {
        return Err("`block_size`: expected a number, got nothing".to_owned());
    };
    if let Some((other, got)) = found.find(|(_, other)| *other != size) {
        return Err(format!("`{other}`: expected {size} as `{key}` says, got {got}"));
    }
    limits::within(&[(key, size, MOST_ROWS)])?;
    // Engines count what DSpark drafts, in z-lab's layout: the anchor's row comes on top where it drafts nothing.
    let on_top = layout == Layout::Zlab && method == Method::Dspark && rows == Rows::FillIn;
    let size = size + i64::from(on_top);
    match rows == Rows::FillIn && size < 2 {
        true => Err(format!("`{key}`: expected at least 2 rows, got {size}: the anchor's row drafts nothing")),
        false => Ok(size),
    }
}

/// Target layers whose outputs are read, from 0.
pub(super) fn layer_ids(
    keys: &Keys,
    num_target_layers: Option<usize>,
    num_layers: usize,
    notes: &mut Vec<String>,
) -> Result<Vec<i64>, String> {
    let said = [
        ("target_layer_ids", &keys.target_layer_ids, 0),
        ("dspark_target_layer_ids", &keys.dspark_target_layer_ids, 0),
        ("layer_ids", &keys.layer_ids, 1),
        ("aux_hidden_state_layer_ids", &keys.aux_hidden_state_layer_ids, 1),
        ("eagle_aux_hidden_state_layer_ids", &keys.eagle_aux_hidden_state_layer_ids, 1),
    ];
    let outputs = |ids: &Vec<i64>, more: i64| ids.iter().map(|id| id.saturating_sub(more)).collect::<Vec<i64>>();
    let mut found = said.iter().filter_map(|(key, ids, more)| Some((*key, *more, ids.as_ref()?)));
    let Some((key, more, ids)) = found.next() else {
        let Some(layers) = num_target_layers else {
            return Err("`target_layer_ids`: expected layers of the target, got nothing".to_owned());
        };
        let ids = default_layers(layers, num_layers)
            .ok_or_else(|| format!("`target_layer_ids`: expected layers of the target's {layers}, got nothing"))?;
        notes.push(format!("config.json names no target layers: {ids:?}, as z-lab's code and SGLang choose them"));
        return Ok(ids);
    };
    let first = outputs(ids, more);
    if let Some((other, less, got)) = found.find(|(_, less, got)| outputs(got, *less) != first) {
        let words = |key: &str, ids: Vec<i64>| format!("`{key}` says the outputs of layers {ids:?}");
        return Err(format!("{}, {}", words(key, first), words(other, outputs(got, less))));
    }
    let ascending = !first.is_empty() && first.windows(2).all(|pair| pair[0] < pair[1]);
    let last = num_target_layers.map_or(limits::MOST_LAYERS, limits::signed) - 1;
    match ascending && first.iter().all(|id| (-1..=last).contains(id)) {
        true => Ok(first),
        false => {
            let most = num_target_layers.map_or(String::new(), |layers| format!(" to below {layers}"));
            Err(format!(
                "`{key}`: expected layers from -1, the embedding,{most}, low to high, as engines hand them over; got the outputs of {first:?}"
            ))
        }
    }
}

/// The layers of a target that are captured where nobody says which.
fn default_layers(num_target_layers: usize, count: usize) -> Option<Vec<i64>> {
    if count == 1 {
        return (num_target_layers > 0).then(|| vec![limits::signed(num_target_layers / 2)]);
    }
    let span = num_target_layers.checked_sub(4)? as f64;
    let place = |index: usize| (1.0 + index as f64 * span / (count - 1) as f64).round_ties_even() as i64;
    (count > 0).then(|| (0..count).map(place).collect())
}

/// What each layer of the backbone sees.
pub(super) fn layers(
    (layout, method): (Layout, Method),
    keys: &Keys,
    count: usize,
    notes: &mut Vec<String>,
) -> Result<Vec<BlockLayer>, String> {
    let mut types = keys.layer_types.clone().unwrap_or_else(|| vec![LayerType::FullAttention; count]);
    if types.len() != count {
        return Err(format!("`layer_types`: expected one for each of {count} layers, got {}", types.len()));
    }
    if keys.use_swa == Some(true) && !types.contains(&LayerType::SlidingAttention) {
        notes.push("`use_swa` makes every layer a sliding one, whatever `layer_types` says".to_owned());
        types.fill(LayerType::SlidingAttention);
    }
    let window = match (keys.swa_window_size, keys.sliding_window) {
        (Some(one), Some(other)) if one != other => {
            return Err(format!("`swa_window_size`: expected {other} as `sliding_window` says, got {one}"));
        }
        (one, other) => one.or(other),
    };
    let slides = types.contains(&LayerType::SlidingAttention);
    let window = match window {
        Some(window) if window < 1 && slides => {
            return Err(format!("`sliding_window`: expected at least 1, got {window}"));
        }
        None if slides => return Err("`sliding_window`: expected a number for the sliding layers".to_owned()),
        window => window,
    };
    if let (Some(all), Some(nested)) = (keys.is_causal, keys.causal)
        && all != nested
    {
        return Err(format!("`is_causal`: {all}, but `dflash_config.causal` is {nested}: expected the same"));
    }
    let sliding = |kind: &LayerType| *kind == LayerType::SlidingAttention;
    let causal = |kind: &LayerType| match layout {
        Layout::Zlab => keys.is_causal.or(keys.causal).unwrap_or(sliding(kind)),
        // Full layers are never causal there.
        Layout::Speculators => sliding(kind) && !keys.sliding_window_non_causal.unwrap_or(method == Method::Dflash2),
    };
    let layers: Vec<BlockLayer> = types
        .iter()
        .map(|kind| BlockLayer { window: window.filter(|_| sliding(kind)), causal: causal(kind) })
        .collect();
    if layout == Layout::Speculators {
        if let Some(said) = keys.is_causal
            && layers.iter().any(|layer| layer.causal != said)
        {
            return Err(format!(
                "`is_causal`: {said}, but `sliding_window_non_causal` and `layer_types` make the layers causal as \
                 {:?}",
                layers.iter().map(|layer| layer.causal).collect::<Vec<_>>()
            ));
        }
        if slides {
            notes.push(
                "speculators trains with a window that begins at the same token for every row of a block; engines, and \
                 this program, let it slide with the row"
                    .to_owned(),
            );
        }
    }
    Ok(layers)
}

/// Taps and channels of a group.
pub(super) fn convolution(keys: &Keys, hidden_size: i64) -> Result<Option<Convolution>, String> {
    let set = |size: Option<i64>| size.filter(|size| *size != 0);
    match (set(keys.conv_kernel_size), set(keys.conv_group_size)) {
        (None, None) => Ok(None),
        (Some(kernel_size), Some(group_size)) => {
            limits::within(&[
                ("conv_kernel_size", kernel_size, MOST_ROWS),
                ("conv_group_size", group_size, hidden_size),
            ])?;
            match hidden_size % group_size {
                0 => Ok(Some(Convolution { kernel_size, group_size })),
                _ => Err(format!(
                    "`conv_group_size`: expected a divisor of `hidden_size` {hidden_size}, got {group_size}"
                )),
            }
        }
        (Some(_), None) => Err("`conv_group_size`: expected a number beside `conv_kernel_size`".to_owned()),
        (None, Some(_)) => Err("`conv_kernel_size`: expected a number beside `conv_group_size`".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_spread_as_by_the_published_code() {
        assert_eq!(default_layers(36, 5), Some(vec![1, 9, 17, 25, 33]));
        assert_eq!(default_layers(36, 1), Some(vec![18]));
        // A half goes to the even neighbour, as in Python: 1 + 3 / 2 = 2.5.
        assert_eq!(default_layers(7, 3), Some(vec![1, 2, 4]));
        assert_eq!(default_layers(3, 2), None);
        assert_eq!(default_layers(0, 1), None);
    }
}
