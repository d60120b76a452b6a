//! What each query may look at. One convention everywhere: a boolean mask is `true` where the key is visible.

use tch::{Device, Kind, Tensor};

use crate::device;

/// The mask of a forward pass, as the caller thinks of it.
#[derive(Debug)]
pub enum AttentionMask {
    /// Every row is one sequence: query `i` of row `b` sees the first `len(b) + i + 1` slots of that row, where `len(b)`
    /// is the row's cache length before this pass.
    Causal,
    /// Row 0 is a pack of documents of these lengths, each causal and blind to the others. Without a cache.
    ///
    /// Lengths `[2, 3]` mean tokens `a0 a1 b0 b1 b2`: `b1` sees `b0 b1` and neither `a0` nor `a1`.
    Documents(Vec<i64>),
    /// `[B or 1, T, S]` booleans over the cache slots, the new tokens' own slots included.
    Visible(Tensor),
}

/// The same mask in the form the kernel takes, made once per pass and shared by all layers.
#[derive(Debug)]
pub enum PreparedMask {
    /// Nothing is hidden.
    Full,
    /// Plain causal from an empty cache: the kernel's own fast path.
    Causal,
    /// Causal inside consecutive slices of these lengths.
    Slices(Vec<i64>),
    /// `[B or 1, 1, T, S]` booleans.
    Dense(Tensor),
}

/// Packs of more documents than this take one dense mask on a GPU. A slice costs it a launch, tens of microseconds a
/// layer; a dense mask over `T` tokens costs all `T^2` scores and a slower kernel, which at 4096 tokens of Llama-3-8B is
/// worth dozens of launches.
const SLICES_ON_GPU: usize = 32;

impl AttentionMask {
    /// Turns the mask into kernel form for `tokens` new tokens a row on top of cached rows of length `past`
    /// (all zero without a cache).
    pub fn prepare(&self, past: &[i64], tokens: i64, device: Device) -> PreparedMask {
        match self {
            AttentionMask::Causal => causal(past, tokens, device),
            AttentionMask::Documents(lengths) => documents(lengths, device),
            AttentionMask::Visible(visible) => PreparedMask::Dense(visible.unsqueeze(1)), // [B, 1, T, S]
        }
    }
}

fn causal(past: &[i64], tokens: i64, device: Device) -> PreparedMask {
    let longest = past.iter().copied().max().unwrap_or(0);
    let ragged = past.iter().any(|&length| length != longest);
    if longest == 0 && tokens > 1 {
        return PreparedMask::Causal;
    }
    if tokens == 1 && !ragged {
        return PreparedMask::Full;
    }
    let slots = Tensor::arange(longest + tokens, (Kind::Int64, device)); // [S]
    let queries = Tensor::arange(tokens, (Kind::Int64, device)).view([1, 1, tokens, 1]);
    let lengths = device::send(&Tensor::from_slice(past), device).view([-1, 1, 1, 1]);
    PreparedMask::Dense(slots.le_tensor(&(queries + lengths))) // [B, 1, T, S]
}

fn documents(lengths: &[i64], device: Device) -> PreparedMask {
    let lengths: Vec<i64> = lengths.iter().copied().filter(|&length| length > 0).collect();
    match lengths.len() {
        0 | 1 => PreparedMask::Causal,
        count if device.is_cuda() && count > SLICES_ON_GPU => {
            PreparedMask::Dense(same_document_and_causal(&lengths, device))
        }
        _ => PreparedMask::Slices(lengths),
    }
}

fn same_document_and_causal(lengths: &[i64], device: Device) -> Tensor {
    let document: Vec<i64> =
        lengths.iter().enumerate().flat_map(|(index, &length)| vec![index as i64; length as usize]).collect();
    let document = device::send(&Tensor::from_slice(&document), device); // [T]
    let same = document.unsqueeze(1).eq_tensor(&document.unsqueeze(0)); // [T, T]
    same.tril(0).unsqueeze(0).unsqueeze(0) // [1, 1, T, T]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ragged_rows_see_their_own_past_only() {
        let PreparedMask::Dense(mask) = AttentionMask::Causal.prepare(&[3, 1], 2, Device::Cpu) else {
            panic!("ragged rows need a dense mask");
        };
        assert_eq!(mask.size(), [2, 1, 2, 5]);
        let rows: Vec<bool> = Vec::try_from(mask.view([-1])).unwrap();
        let visible = |text: &str| text.chars().map(|mark| mark == 'x').collect::<Vec<_>>();
        assert_eq!(rows, visible("xxxx.xxxxxxx...xxx.."));
    }

    #[test]
    fn packed_documents_are_blind_to_each_other() {
        let mask = same_document_and_causal(&[2, 3], Device::Cpu);
        let rows: Vec<bool> = Vec::try_from(mask.view([-1])).unwrap();
        let want = "x....xx.....x....xx...xxx";
        assert_eq!(rows, want.chars().map(|mark| mark == 'x').collect::<Vec<_>>());
    }

    #[test]
    fn empty_documents_leave_no_trace() {
        let prepare = |lengths: &[i64]| AttentionMask::Documents(lengths.to_vec()).prepare(&[0], 3, Device::Cpu);
        assert!(matches!(prepare(&[0, 3, 0]), PreparedMask::Causal));
        assert!(matches!(prepare(&[1, 0, 2]), PreparedMask::Slices(lengths) if lengths == [1, 2]));
    }
}
