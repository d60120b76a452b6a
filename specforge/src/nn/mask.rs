//! What each query may look at. One convention everywhere: a boolean mask is `true` where the key is visible.
//!
//! A pass has one [`AttentionMask`]; its layers may see through windows of different widths, and all layers of one width
//! share what [`Masks`] makes for them. A window counts *positions*, and in a draft tree the slot of a key is not its
//! position: nodes side by side stand at one. Where layers have windows, the cache therefore keeps positions.

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use crate::device;

/// The mask of a forward pass, as the caller thinks of it.
#[derive(Debug)]
pub enum AttentionMask {
    /// Every row is one sequence: query `i` of row `b` sees the first `len(b) + i + 1` slots of that row, where `len(b)`
    /// is the row's cache length before this pass. A slot is its token's position.
    Causal,
    /// Row 0 is a pack of documents of these lengths, each causal and blind to the others. Without a cache.
    ///
    /// Lengths `[2, 3]` mean tokens `a0 a1 b0 b1 b2`: `b1` sees `b0 b1` and neither `a0` nor `a1`.
    Documents(Vec<i64>),
    /// New tokens are nodes of trees.
    Tree(TreeMask),
    /// `[B or 1, T, S]` booleans over the cache slots, the new tokens' own slots included.
    Visible(Tensor),
    /// Every token of row `b` sees the first so many slots of that row, those behind itself too: masked diffusion models.
    /// What a shorter row has behind its number is padding.
    Whole(Vec<i64>),
}

/// What nodes of trees see: everything their row has committed, and of the slots behind that what is named. Only the part
/// that is a tree is named, so that nothing of the length of a text is filled or sent by the host.
#[derive(Debug)]
pub struct TreeMask {
    /// Committed tokens of each row, `[B]`: all of them are seen.
    pub base: Vec<i64>,
    /// `[B, T, K]` booleans on the device: whether a new token sees each of the `K` slots behind its row's base, of which
    /// the last are the new tokens' own. Padding sees itself, so that its softmax is defined.
    pub seen: Tensor,
}

/// The same mask in the form the kernel takes.
#[derive(Debug)]
pub enum PreparedMask {
    /// Nothing is hidden.
    Full,
    /// Nothing is hidden of the last so many slots, and everything of those before.
    Recent(i64),
    /// Plain causal from an empty cache: the kernel's own fast path.
    Causal,
    /// Causal inside consecutive slices.
    Slices(Slices),
    /// The same through a window: a slice of `n` tokens that is longer than the window sees the first `n` rows and columns
    /// of the band, `[W', W']` booleans for the longest of them.
    Windowed {
        /// Lengths of the slices.
        lengths: Vec<i64>,
        /// Tokens of the window.
        window: i64,
        /// What a token sees of its slice.
        band: Tensor,
    },
    /// Any booleans.
    Dense(DenseMask),
}

/// Documents of a pack.
#[derive(Debug)]
pub struct Slices {
    /// Their lengths; none is empty.
    pub lengths: Vec<i64>,
    /// Where each begins and the last ends, int32 on a GPU, whose kernel takes all of them in one call. `None` on the CPU.
    pub bounds: Option<Tensor>,
}

impl Slices {
    fn new(lengths: Vec<i64>, device: Device) -> Self {
        let bounds = device.is_cuda().then(|| {
            let mut bounds = vec![0i32];
            lengths.iter().for_each(|&length| bounds.push(bounds[bounds.len() - 1] + length as i32));
            device::send(&Tensor::from_slice(&bounds), device)
        });
        Self { lengths, bounds }
    }
}

/// `[B or 1, 1, T, S]` booleans.
#[derive(Debug)]
pub struct DenseMask {
    /// `[B or 1, 1, T, S]`
    pub visible: Tensor,
    /// The same for every head of a group in turn, `[B or 1, 1, r T, S]`, once somebody asked.
    folded: RefCell<Option<(i64, Tensor)>>,
}

impl DenseMask {
    pub(super) fn new(visible: Tensor) -> Self {
        Self { visible, folded: RefCell::new(None) }
    }

    /// The mask of `times` heads one behind the other, `[B or 1, 1, times * T, S]`: made once for all layers.
    pub fn folded(&self, times: i64) -> Tensor {
        let mut folded = self.folded.borrow_mut();
        match folded.as_ref().filter(|(made, _)| *made == times) {
            Some((_, mask)) => mask.shallow_clone(),
            None => {
                let mask = self.visible.repeat([1, 1, times, 1]);
                *folded = Some((times, mask.shallow_clone()));
                mask
            }
        }
    }
}

/// The masks of one pass: one for each width of window that its layers have, made when it is asked for first.
#[derive(Debug)]
pub struct Masks<'a> {
    mask: &'a AttentionMask,
    /// Positions of the new tokens, `[B, T]`.
    queries: &'a Tensor,
    /// Positions of all slots, `[B, S]`, where slots are no positions.
    keys: Option<Tensor>,
    /// Cached tokens of each row.
    past: Vec<i64>,
    made: Vec<(Option<i64>, PreparedMask)>,
}

impl<'a> Masks<'a> {
    /// Those of a pass without a cache over tokens at `positions [B, T]`.
    pub fn new(mask: &'a AttentionMask, positions: &'a Tensor) -> Self {
        let rows = positions.size().first().copied().unwrap_or(0) as usize;
        Self { mask, queries: positions, keys: None, past: vec![0; rows], made: Vec::new() }
    }

    /// Those of a pass behind cached tokens. `keys [B, S]` are the positions of all slots, the new tokens' included; they
    /// are needed where layers have windows.
    pub fn behind(mask: &'a AttentionMask, positions: &'a Tensor, past: &[i64], keys: Option<Tensor>) -> Self {
        Self { mask, queries: positions, keys, past: past.to_vec(), made: Vec::new() }
    }

    /// What a layer sees through a window of so many tokens, the one that looks included; all layers without a window, and
    /// those whose window is wider than what there is, share one.
    pub fn of(&mut self, window: Option<i64>) -> &PreparedMask {
        let window = window.filter(|&window| window < self.reach());
        let index = match self.made.iter().position(|(made, _)| *made == window) {
            Some(index) => index,
            None => {
                let prepared = self.prepare(window);
                self.made.push((window, prepared));
                self.made.len() - 1
            }
        };
        &self.made[index].1
    }

    /// As many tokens as any query may see at most.
    fn reach(&self) -> i64 {
        match self.mask {
            AttentionMask::Documents(lengths) => lengths.iter().copied().max().unwrap_or(0),
            _ => self.past.iter().copied().max().unwrap_or(0) + self.tokens(),
        }
    }

    fn tokens(&self) -> i64 {
        self.queries.size()[1]
    }

    fn prepare(&self, window: Option<i64>) -> PreparedMask {
        let device = self.queries.device();
        let Some(window) = window else {
            return self.mask.prepare(&self.past, self.tokens(), device);
        };
        match self.mask {
            AttentionMask::Causal => causal(&self.past, self.tokens(), Some(window), device),
            AttentionMask::Documents(lengths) => documents(lengths, Some(window), device),
            AttentionMask::Tree(tree) => PreparedMask::Dense(self.through(&tree.visible(), window)),
            AttentionMask::Visible(visible) => PreparedMask::Dense(self.through(&visible.unsqueeze(1), window)),
            // What stands behind a token is within every window of this kind: windows end where tokens begin.
            AttentionMask::Whole(lengths) => {
                PreparedMask::Dense(self.through(&first_slots(lengths, self.tokens(), device), window))
            }
        }
    }

    /// Hides of `visible [B or 1, 1, T, S]` what is `window` positions away and more.
    fn through(&self, visible: &Tensor, window: i64) -> DenseMask {
        let keys = self.keys.as_ref().unwrap_or(self.queries);
        let distance = self.queries.unsqueeze(-1) - keys.unsqueeze(1); // [B, T, S]
        DenseMask::new(visible.logical_and(&distance.lt(window).unsqueeze(1)))
    }
}

/// Packs of more documents than this, seen through a window, take one dense mask on a GPU. A slice costs it a launch, tens of microseconds a
/// layer; a dense mask over `T` tokens costs all `T^2` scores and a slower kernel, which at 4096 tokens of a model of 8B is
/// worth dozens of launches.
const SLICES_ON_GPU: usize = 32;

impl AttentionMask {
    /// Turns the mask into kernel form for `tokens` new tokens a row on top of cached rows of length `past`
    /// (all zero without a cache), for layers without a window.
    pub fn prepare(&self, past: &[i64], tokens: i64, device: Device) -> PreparedMask {
        match self {
            AttentionMask::Causal => causal(past, tokens, None, device),
            AttentionMask::Documents(lengths) => documents(lengths, None, device),
            AttentionMask::Tree(tree) => PreparedMask::Dense(DenseMask::new(tree.visible())),
            AttentionMask::Visible(visible) => PreparedMask::Dense(DenseMask::new(visible.unsqueeze(1))), // [B, 1, T, S]
            AttentionMask::Whole(lengths) => match lengths.iter().all(|length| *length == lengths[0]) {
                true => PreparedMask::Full,
                false => PreparedMask::Dense(DenseMask::new(first_slots(lengths, tokens, device))), // [B, 1, T, S]
            },
        }
    }

    /// The same mask on another device.
    pub fn on(&self, device: Device) -> Self {
        match self {
            AttentionMask::Causal => AttentionMask::Causal,
            AttentionMask::Documents(lengths) => AttentionMask::Documents(lengths.clone()),
            AttentionMask::Tree(TreeMask { base, seen }) => {
                AttentionMask::Tree(TreeMask { base: base.clone(), seen: device::moved(seen, device) })
            }
            AttentionMask::Visible(visible) => AttentionMask::Visible(device::moved(visible, device)),
            AttentionMask::Whole(lengths) => AttentionMask::Whole(lengths.clone()),
        }
    }

    /// Refuses a mask that is not one for `rows` of `tokens` new tokens behind `cached` ones.
    pub fn check(&self, (rows, tokens): (i64, i64), cached: Option<&[i64]>) -> Result<(), String> {
        match self {
            AttentionMask::Documents(lengths) if lengths.iter().sum::<i64>() != tokens => {
                let sum: i64 = lengths.iter().sum();
                Err(format!("the documents of a pack have {sum} tokens, the ids {tokens}"))
            }
            AttentionMask::Documents(_) if cached.is_some_and(|lengths| lengths.iter().any(|&length| length > 0)) => {
                Err("packed documents cannot follow cached tokens".to_owned())
            }
            AttentionMask::Tree(TreeMask { base, seen }) => {
                let longest = |lengths: &[i64]| lengths.iter().copied().max().unwrap_or(0);
                let named = longest(cached.unwrap_or(&[])) + tokens - longest(base);
                match seen.size() == [rows, tokens, named] && base.len() as i64 == rows {
                    true => Ok(()),
                    false => Err(format!(
                        "a tree behind {base:?} of {cached:?} cached tokens: expected [{rows}, {tokens}, {named}], got {:?}",
                        seen.size()
                    )),
                }
            }
            AttentionMask::Whole(lengths) => {
                let held = cached.and_then(|lengths| lengths.iter().copied().max()).filter(|&held| held > 0);
                let slots = held.unwrap_or(tokens);
                let longest = lengths.iter().copied().max().unwrap_or(0);
                match lengths.len() as i64 == rows && longest == slots && lengths.iter().all(|&length| length > 0) {
                    true => Ok(()),
                    false => Err(format!(
                        "rows that are seen whole: expected {rows} lengths from 1, the longest {slots}, got {lengths:?}"
                    )),
                }
            }
            _ => Ok(()),
        }
    }
}

impl TreeMask {
    /// All slots, `[B, 1, T, S]`: made on the device.
    fn visible(&self) -> Tensor {
        let (rows, tokens, named) = self.seen.size3().expect("a tree's mask is [B, T, K]");
        let device = self.seen.device();
        let longest = self.base.iter().copied().max().unwrap_or(0);
        if self.base.iter().all(|&base| base == longest) {
            let committed = Tensor::ones([1, 1, 1], (Kind::Bool, device)).expand([rows, tokens, longest], false);
            return Tensor::cat(&[&committed, &self.seen], 2).unsqueeze(1); // [B, 1, T, S]
        }
        let base = device::send(&Tensor::from_slice(&self.base), device).unsqueeze(1); // [B, 1]
        let behind = Tensor::arange(longest + named, (Kind::Int64, device)).unsqueeze(0) - base; // [B, S]
        let place = behind.clamp(0, named - 1).unsqueeze(1).expand([-1, tokens, -1], false); // [B, T, S]
        let seen = self.seen.gather(2, &place, false).logical_and(&behind.lt(named).unsqueeze(1));
        seen.logical_or(&behind.lt(0).unsqueeze(1)).unsqueeze(1)
    }
}

fn causal(past: &[i64], tokens: i64, window: Option<i64>, device: Device) -> PreparedMask {
    let longest = past.iter().copied().max().unwrap_or(0);
    let ragged = past.iter().any(|&length| length != longest);
    match window {
        None if longest == 0 && tokens > 1 => return PreparedMask::Causal,
        None if tokens == 1 && !ragged => return PreparedMask::Full,
        // One token sees its window and nothing else: the keys before it need not be read.
        Some(window) if tokens == 1 && !ragged => return PreparedMask::Recent(window),
        Some(window) if longest == 0 => {
            return PreparedMask::Dense(DenseMask::new(band(tokens, window, device).view([1, 1, tokens, tokens])));
        }
        _ => {}
    }
    let slots = Tensor::arange(longest + tokens, (Kind::Int64, device)); // [S]
    let queries = Tensor::arange(tokens, (Kind::Int64, device)).view([1, 1, tokens, 1]);
    let lengths = device::send(&Tensor::from_slice(past), device).view([-1, 1, 1, 1]);
    let queries = queries + lengths; // [B, 1, T, 1]
    let visible = slots.le_tensor(&queries); // [B, 1, T, S]
    PreparedMask::Dense(DenseMask::new(match window {
        None => visible,
        Some(window) => visible.logical_and(&slots.gt_tensor(&(queries - window))),
    }))
}

/// `[B, 1, T, S]`: every token sees the first so many slots of its row.
fn first_slots(lengths: &[i64], tokens: i64, device: Device) -> Tensor {
    let (rows, longest) = (lengths.len() as i64, lengths.iter().copied().max().unwrap_or(0));
    let slots = Tensor::arange(longest, (Kind::Int64, device)); // [S]
    let ends = device::send(&Tensor::from_slice(lengths), device).view([-1, 1, 1, 1]);
    slots.lt_tensor(&ends).expand([rows, 1, tokens, longest], false)
}

/// `[n, n]`: each token sees the last `window` up to itself.
fn band(tokens: i64, window: i64, device: Device) -> Tensor {
    Tensor::ones([tokens, tokens], (Kind::Bool, device)).tril(0).triu(1 - window)
}

fn documents(lengths: &[i64], window: Option<i64>, device: Device) -> PreparedMask {
    let lengths: Vec<i64> = lengths.iter().copied().filter(|&length| length > 0).collect();
    match window {
        None if lengths.len() <= 1 => PreparedMask::Causal,
        None => PreparedMask::Slices(Slices::new(lengths, device)),
        Some(window) if device.is_cuda() && lengths.len() > SLICES_ON_GPU => {
            // Inside a document, places are as far from each other as positions.
            PreparedMask::Dense(DenseMask::new(same_document_and_causal(&lengths, device).triu(1 - window)))
        }
        Some(window) => {
            let longest = lengths.iter().copied().max().unwrap_or(0);
            PreparedMask::Windowed { band: band(longest, window, device), lengths, window }
        }
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

    fn marks(mask: &Tensor) -> String {
        let seen: Vec<bool> = Vec::try_from(mask.reshape([-1])).unwrap();
        seen.into_iter().map(|seen| if seen { 'x' } else { '.' }).collect()
    }

    fn dense(mask: &PreparedMask) -> &Tensor {
        let PreparedMask::Dense(mask) = mask else { panic!("{mask:?} is not dense") };
        &mask.visible
    }

    fn positions(first: &[i64], tokens: i64) -> Tensor {
        Tensor::from_slice(first).unsqueeze(1) + Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).unsqueeze(0)
    }

    #[test]
    fn ragged_rows_see_their_own_past_only() {
        let mask = AttentionMask::Causal.prepare(&[3, 1], 2, Device::Cpu);
        assert_eq!(dense(&mask).size(), [2, 1, 2, 5]);
        assert_eq!(marks(dense(&mask)), "xxxx.xxxxxxx...xxx..");
        let queries = positions(&[3, 1], 2);
        let causal = AttentionMask::Causal;
        let mut masks = Masks::behind(&causal, &queries, &[3, 1], None);
        assert_eq!(marks(dense(masks.of(Some(2)))), "..xx....xxxx....xx..");
    }

    #[test]
    fn rows_that_are_seen_whole_end_where_they_end() {
        let whole = AttentionMask::Whole(vec![3, 1]);
        assert_eq!(marks(dense(&whole.prepare(&[0, 0], 2, Device::Cpu))), "xxxxxxx..x..");
        assert!(matches!(AttentionMask::Whole(vec![3, 3]).prepare(&[0, 0], 3, Device::Cpu), PreparedMask::Full));
        assert!(whole.check((2, 3), None).is_ok() && whole.check((2, 1), Some(&[3, 1])).is_ok());
        for (tokens, cached) in [((2, 2), None), ((1, 3), None), ((2, 1), Some(&[4, 1][..]))] {
            assert!(whole.check(tokens, cached).unwrap_err().contains("seen whole"));
        }
    }

    #[test]
    fn packed_documents_are_blind_to_each_other() {
        let mask = same_document_and_causal(&[2, 3], Device::Cpu);
        assert_eq!(marks(&mask), "x....xx.....x....xx...xxx");
    }

    #[test]
    fn empty_documents_leave_no_trace() {
        let prepare = |lengths: &[i64]| AttentionMask::Documents(lengths.to_vec()).prepare(&[0], 3, Device::Cpu);
        assert!(matches!(prepare(&[0, 3, 0]), PreparedMask::Causal));
        assert!(matches!(prepare(&[1, 0, 2]), PreparedMask::Slices(slices) if slices.lengths == [1, 2]));
    }

    #[test]
    fn layers_of_one_window_share_a_mask_and_wide_windows_are_none() {
        let queries = positions(&[0], 5);
        let mask = AttentionMask::Causal;
        let mut masks = Masks::new(&mask, &queries);
        for window in [None, Some(2), Some(5), Some(3), None, Some(2), Some(100)] {
            masks.of(window);
        }
        let made: Vec<Option<i64>> = masks.made.iter().map(|(window, _)| *window).collect();
        assert_eq!(made, [None, Some(2), Some(3)]);
        assert!(matches!(masks.of(Some(5)), PreparedMask::Causal));
        assert_eq!(marks(dense(masks.of(Some(2)))), "x....xx....xx....xx....xx");
        // A window looks at documents one by one.
        let (mask, queries) = (AttentionMask::Documents(vec![2, 3]), positions(&[0], 5));
        let mut masks = Masks::new(&mask, &queries);
        assert!(matches!(masks.of(Some(3)), PreparedMask::Slices(_)));
        let PreparedMask::Windowed { band, .. } = masks.of(Some(2)) else { panic!() };
        assert_eq!(marks(band), "x..xx..xx");
    }

    #[test]
    fn one_token_reads_its_window_alone() {
        let queries = positions(&[7, 7], 1);
        let mask = AttentionMask::Causal;
        let mut masks = Masks::behind(&mask, &queries, &[7, 7], None);
        assert!(matches!(masks.of(Some(4)), PreparedMask::Recent(4)));
        assert!(matches!(masks.of(Some(8)), PreparedMask::Full));
    }

    /// Behind 3 tokens of one row and 1 of another: a root, two children side by side, and a child of the second.
    #[test]
    fn a_tree_sees_what_is_committed_and_its_ancestors_and_windows_count_positions() {
        let one =
            [true, false, false, false, true, true, false, false, true, false, true, false, true, false, true, true];
        let two = [one, one].concat();
        let seen = Tensor::from_slice(&two).view([2, 4, 4]);
        let mask = AttentionMask::Tree(TreeMask { base: vec![3, 1], seen: seen.shallow_clone() });
        let rows = ["xxxx...xxxxx..xxxx.x.xxxx.xx", "xx.....xxx....xx.x...xx.xx.."];
        let prepared = mask.prepare(&[3, 1], 4, Device::Cpu);
        assert_eq!(marks(dense(&prepared)), rows.concat());
        // Equal lengths go another way.
        let even = AttentionMask::Tree(TreeMask { base: vec![3, 3], seen }).prepare(&[3, 3], 4, Device::Cpu);
        assert_eq!(marks(dense(&even)), [rows[0], rows[0]].concat());

        let queries = Tensor::from_slice2(&[[3i64, 4, 4, 5], [1, 2, 2, 3]]);
        let keys = Tensor::from_slice2(&[[0i64, 1, 2, 3, 4, 4, 5], [0, 1, 2, 2, 3, 9, 9]]);
        let mut masks = Masks::behind(&mask, &queries, &[3, 1], Some(keys));
        // Position 5 sees 3, 4 and 5; position 3 of the short row sees 1, 2 and 3.
        let want = [".xxx.....xxx....xx.x....x.xx", "xx.....xxx....xx.x....x.xx.."];
        assert_eq!(marks(dense(masks.of(Some(3)))), want.concat());
    }

    #[test]
    fn masks_of_another_pass_are_refused() {
        let tree = |base: &[i64], size: [i64; 3]| {
            AttentionMask::Tree(TreeMask { base: base.to_vec(), seen: Tensor::ones(size, (Kind::Bool, Device::Cpu)) })
        };
        assert!(tree(&[3, 1], [2, 4, 4]).check((2, 4), Some(&[3, 1])).is_ok());
        for (base, size, cached) in [
            (&[4, 1][..], [2, 4, 4], &[3, 1][..]),
            (&[3], [2, 4, 4], &[3, 1]),
            (&[3, 1], [1, 4, 4], &[3, 1]),
            (&[3, 1], [2, 3, 4], &[3, 1]),
        ] {
            assert!(tree(base, size).check((2, 4), Some(cached)).is_err(), "{base:?} {size:?}");
        }
        let documents = AttentionMask::Documents(vec![2, 3]);
        assert!(documents.check((1, 5), None).is_ok() && documents.check((1, 6), None).is_err());
        assert!(documents.check((1, 5), Some(&[1])).is_err());
    }
}
