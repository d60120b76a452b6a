//! The C++ shim (`csrc/`) from Rust: what libtorch can do and tch does not offer.
//!
//! Every unsafe call into the shim is here. Its functions catch C++ exceptions and hand their text back.

use std::ffi::{CStr, c_char, c_int};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::device::{self, CudaState};
use crate::error::{Error, Result};

unsafe extern "C" {
    fn specforge_fused_adamw(
        parameters: *const *const C_tensor,
        gradients: *const *const C_tensor,
        first_moments: *const *const C_tensor,
        second_moments: *const *const C_tensor,
        steps: *const *const C_tensor,
        count: i64,
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        epsilon: f64,
        gradient_scale: *const C_tensor,
        found_non_finite: *const C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_add_product(
        total: *const C_tensor,
        left: *const C_tensor,
        right: *const C_tensor,
        scale: f64,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_merged_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        own_key: *const C_tensor,
        own_value: *const C_tensor,
        hidden: *const C_tensor,
        runs: *const i64,
        run_count: i64,
        places: *const *const C_tensor,
        sizes: *const i64,
        scale: f64,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_packed_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        bounds: *const C_tensor,
        longest: i64,
        scale: f64,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_hard_losses(
        logits: *const C_tensor,
        labels: *const C_tensor,
        losses: *const C_tensor,
        ranks: *const C_tensor,
        with_slope: c_int,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_cross_entropy_rows(
        logits: *const C_tensor,
        labels: *const C_tensor,
        ranks: *const C_tensor,
        losses: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_teacher_rows(
        logits: *const C_tensor,
        vocabulary: *const *const C_tensor,
        into: *const *const C_tensor,
        with_entropy: c_int,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_soft_losses(
        logits: *const C_tensor,
        own: *const C_tensor,
        teacher: *const *const C_tensor,
        loss: i64,
        lambda_scale: f64,
        lambda_decay: f64,
        weights: *const C_tensor,
        parity: *const *const C_tensor,
        into: *const *const C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_bfloat16_pays() -> c_int;
    fn specforge_trained_linear(
        input: *const C_tensor,
        weight: *const C_tensor,
        mixed: c_int,
        mixed_backward: c_int,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_gated_linear(
        gate: *const C_tensor,
        up: *const C_tensor,
        down: *const C_tensor,
        mixed: c_int,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_normed_rows(
        rows: *const C_tensor,
        weight: *const C_tensor,
        epsilon: f64,
        cos: *const C_tensor,
        sin: *const C_tensor,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_onednn_linear(
        input: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_few_rows_linear(
        input: *const C_tensor,
        weights: *const *const C_tensor,
        count: usize,
        outputs: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_few_queries_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        mask: *const C_tensor,
        scale: f64,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_few_rows_pay() -> c_int;
    fn specforge_exact_float32_products(error: *mut c_char, error_size: usize) -> c_int;
    fn specforge_deterministic(wanted: c_int, error: *mut c_char, error_size: usize) -> c_int;
    fn specforge_libtorch_version() -> *const c_char;
    fn specforge_libtorch_build() -> *const c_char;
    fn specforge_cuda_memory(
        device: i32,
        current: *mut i64,
        peak: *mut i64,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_cuda_reset_peak(device: i32, error: *mut c_char, error_size: usize) -> c_int;
}

/// Longer messages are cut; the first line says what happened.
const MESSAGE_BYTES: usize = 4096;

/// Calls a shim function with a buffer for its message and turns a failure into an error.
pub(crate) fn checked(call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<()> {
    let mut message = [0u8; MESSAGE_BYTES];
    if call(message.as_mut_ptr().cast::<c_char>(), message.len()) == 0 {
        return Ok(());
    }
    let text = CStr::from_bytes_until_nul(&message).map(CStr::to_string_lossy).unwrap_or_default();
    Err(Error::Torch(text.into_owned()))
}

/// Constants of one AdamW step.
#[derive(Debug, Clone, Copy)]
pub struct AdamwConstants {
    /// Step size.
    pub learning_rate: f64,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

/// One AdamW step over many tensors in one kernel; all lists are equally long and in one order.
///
/// `steps` count the step being taken, from 1. Gradients are divided by `gradient_scale` **in place**. Nothing at all
/// changes when `found_non_finite` holds 1. Parameters that require gradients need a `no_grad` scope around the call.
pub fn fused_adamw(
    [parameters, gradients, first_moments, second_moments, steps]: [&[&Tensor]; 5],
    constants: AdamwConstants,
    gradient_scale: &Tensor,
    found_non_finite: &Tensor,
) -> Result<()> {
    let count = parameters.len();
    for list in [gradients, first_moments, second_moments, steps] {
        if list.len() != count {
            return Err(Error::Failed(format!(
                "fused AdamW: expected {count} tensors in every list, got {}",
                list.len()
            )));
        }
    }
    for index in 0..count {
        // The CPU kernel walks raw memory: it reads past the end of a smaller tensor and pairs up the wrong elements of
        // a transposed one, without a word.
        let layout = |tensor: &Tensor| (tensor.size(), tensor.kind(), tensor.device(), tensor.is_contiguous());
        let (size, kind, device, _) = layout(parameters[index]);
        for tensor in [parameters[index], gradients[index], first_moments[index], second_moments[index]] {
            let got = layout(tensor);
            if got != (size.clone(), kind, device, true) {
                return Err(Error::Failed(format!(
                    "fused AdamW: tensor {index}: expected contiguous {kind:?} {size:?} on {device:?}, got {got:?}"
                )));
            }
        }
    }
    let pointers = |list: &[&Tensor]| list.iter().map(|tensor| tensor.as_ptr()).collect::<Vec<_>>();
    let (parameters, gradients, steps) = (pointers(parameters), pointers(gradients), pointers(steps));
    let (first_moments, second_moments) = (pointers(first_moments), pointers(second_moments));
    // SAFETY: every pointer belongs to a live tensor borrowed above, and each list holds `count` of them.
    checked(|error, error_size| unsafe {
        specforge_fused_adamw(
            parameters.as_ptr(),
            gradients.as_ptr(),
            first_moments.as_ptr(),
            second_moments.as_ptr(),
            steps.as_ptr(),
            count as i64,
            constants.learning_rate,
            constants.betas.0,
            constants.betas.1,
            constants.weight_decay,
            constants.epsilon,
            gradient_scale.as_ptr(),
            found_non_finite.as_ptr(),
            error,
            error_size,
        )
    })
}

/// `total += scale * left right`, in place; needs a `no_grad` scope. `total` may be float32 where the factors are
/// narrower: nothing is rounded to the narrower type then, and on CUDA no product in between takes memory.
pub fn add_product(total: &mut Tensor, left: &Tensor, right: &Tensor, scale: f64) -> Result<()> {
    // SAFETY: three live tensors; libtorch checks types, shapes and devices.
    checked(|error, error_size| unsafe {
        specforge_add_product(total.as_ptr(), left.as_ptr(), right.as_ptr(), scale, error, error_size)
    })
}

/// A tensor that the shim made and hands over.
pub(crate) fn made(call: impl FnOnce(*mut *mut C_tensor, *mut c_char, usize) -> c_int) -> Result<Tensor> {
    let mut output = std::ptr::null_mut();
    checked(|error, error_size| call(&raw mut output, error, error_size))?;
    // SAFETY: without an error, the shim made this tensor for the caller.
    Ok(unsafe { Tensor::from_ptr(output) })
}

/// Attention of `nn::merged_attention`; `runs` holds five numbers a run, `packed` the places and sizes of one call for all of
/// them. The caller checks all sizes.
pub fn merged_attention(
    [query, key, value, own_key, own_value]: [&Tensor; 5],
    hidden: Option<&Tensor>,
    runs: &[i64],
    packed: Option<([&Tensor; 4], &[i64; 3])>,
    scale: f64,
) -> Result<Tensor> {
    let places = packed.map(|(places, _)| places.map(|place| place.as_ptr()));
    let sizes = packed.map_or(std::ptr::null(), |(_, sizes)| sizes.as_ptr());
    // SAFETY: live tensors, as many runs as the slice holds, and four places with three sizes, or neither.
    made(|output, error, error_size| unsafe {
        specforge_merged_attention(
            query.as_ptr(),
            key.as_ptr(),
            value.as_ptr(),
            own_key.as_ptr(),
            own_value.as_ptr(),
            hidden.map_or(std::ptr::null(), |hidden| hidden.as_ptr()),
            runs.as_ptr(),
            (runs.len() / 5) as i64,
            places.as_ref().map_or(std::ptr::null(), |places| places.as_ptr().cast()),
            sizes,
            scale,
            output,
            error,
            error_size,
        )
    })
}

/// Causal attention of documents that follow each other, on CUDA and without gradients: `query [T, N, D]`, `key` and
/// `value [T, G, D]`, `bounds` int32 where each begins and the last ends, `longest` tokens of one. Returns `[T, N, D]`.
pub fn packed_attention(
    [query, key, value]: [&Tensor; 3],
    bounds: &Tensor,
    longest: i64,
    scale: f64,
) -> Result<Tensor> {
    // SAFETY: four live tensors; libtorch checks types, shapes and devices.
    made(|output, error, error_size| unsafe {
        specforge_packed_attention(
            query.as_ptr(),
            key.as_ptr(),
            value.as_ptr(),
            bounds.as_ptr(),
            longest,
            scale,
            output,
            error,
            error_size,
        )
    })
}

/// Cross-entropy of `logits [m, V]` with `labels [m]`, in float32 on the CPU: `losses` and `ranks [m]` are written, and with
/// `with_slope`, `softmax - onehot` takes the place of the logits. See `csrc/vocabulary_loss.cpp`.
pub fn hard_losses([logits, labels, losses, ranks]: [&Tensor; 4], with_slope: bool) -> Result<()> {
    // SAFETY: four live tensors; the shim checks sizes, types, layout and labels.
    checked(|error, error_size| unsafe {
        specforge_hard_losses(
            logits.as_ptr(),
            labels.as_ptr(),
            losses.as_ptr(),
            ranks.as_ptr(),
            c_int::from(with_slope),
            error,
            error_size,
        )
    })
}

/// Cross-entropy `[m]` of `logits [m, V]` with `labels [m]`, in float32 on the CPU, with a graph to the logits that can be
/// followed once; `ranks [m]` are written. See `csrc/vocabulary_loss.cpp`.
pub fn cross_entropy_rows(logits: &Tensor, labels: &Tensor, ranks: &Tensor) -> Result<Tensor> {
    // SAFETY: three live tensors; the shim checks sizes, types, layout and labels.
    made(|losses, error, error_size| unsafe {
        specforge_cross_entropy_rows(logits.as_ptr(), labels.as_ptr(), ranks.as_ptr(), losses, error, error_size)
    })
}

/// What a target predicts, from its `logits [u, V]` in float32 on the CPU. `vocabulary` is the target ids of the draft's
/// tokens `[D]` and the draft ids of the target's `[V]`; `into` receives log p, p (`[u, D]`), the logarithm of what the draft
/// can name, the entropy's sum (`[u]`, where `with_entropy`), and the likeliest token (int64 `[u]`).
pub fn teacher_rows(
    logits: &Tensor,
    vocabulary: Option<[&Tensor; 2]>,
    into: [&Tensor; 5],
    with_entropy: bool,
) -> Result<()> {
    let vocabulary = vocabulary.map(|tables| tables.map(|table| table.as_ptr()));
    let into = into.map(|tensor| tensor.as_ptr());
    // SAFETY: live tensors, two of a vocabulary or none; the shim checks sizes, types, layout and ids.
    checked(|error, error_size| unsafe {
        specforge_teacher_rows(
            logits.as_ptr(),
            vocabulary.as_ref().map_or(std::ptr::null(), |tables| tables.as_ptr().cast()),
            into.as_ptr().cast(),
            c_int::from(with_entropy),
            error,
            error_size,
        )
    })
}

/// Losses of `logits [m, D]` in float32 on the CPU against what [`teacher_rows`] gave, at the positions `own [m]`. `loss` is
/// the place of the loss in its enum with the two constants of `lk_lambda`; `into` receives losses, acceptance (float32),
/// hits, covered (booleans) and weighted losses (float64), `[m]` each. With `weights [m]`, the gradient of the weighted losses
/// takes the place of the logits; `parity` holds two more numbers a row.
pub fn soft_losses(
    [logits, own]: [&Tensor; 2],
    teacher: [&Tensor; 5],
    (loss, lambda): (i64, (f64, f64)),
    weights: Option<&Tensor>,
    parity: Option<[&Tensor; 2]>,
    into: [&Tensor; 5],
) -> Result<()> {
    let teacher = teacher.map(|tensor| tensor.as_ptr());
    let parity = parity.map(|values| values.map(|tensor| tensor.as_ptr()));
    let into = into.map(|tensor| tensor.as_ptr());
    // SAFETY: live tensors, two of parity or none; the shim checks sizes, types, layout and positions.
    checked(|error, error_size| unsafe {
        specforge_soft_losses(
            logits.as_ptr(),
            own.as_ptr(),
            teacher.as_ptr().cast(),
            loss,
            lambda.0,
            lambda.1,
            weights.map_or(std::ptr::null(), |weights| weights.as_ptr()),
            parity.as_ref().map_or(std::ptr::null(), |values| values.as_ptr().cast()),
            into.as_ptr().cast(),
            error,
            error_size,
        )
    })
}

/// `input [.., in]` times the transpose of `weight [out, in]`, plus `bias [out]`, by oneDNN on the CPU; without gradients.
pub fn onednn_linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let bias = bias.map_or(std::ptr::null(), |bias| bias.as_ptr());
    // SAFETY: live tensors, or none where the shim takes none; libtorch checks types, shapes and devices.
    made(|output, error, error_size| unsafe {
        specforge_onednn_linear(input.as_ptr(), weight.as_ptr(), bias, output, error, error_size)
    })
}

/// The same for a few rows, without a bias (`csrc/few_rows.cpp`). Both have to be contiguous on the CPU, the rows of float32, the
/// weight of float32 or bfloat16.
pub fn few_rows_linear<const N: usize>(input: &Tensor, weights: [&Tensor; N]) -> Result<[Tensor; N]> {
    let weights = weights.map(|weight| weight.as_ptr());
    let mut outputs = [std::ptr::null_mut(); N];
    // SAFETY: live tensors, whose layout the shim checks, and as many places as there are weights.
    checked(|error, error_size| unsafe {
        specforge_few_rows_linear(input.as_ptr(), weights.as_ptr(), N, outputs.as_mut_ptr(), error, error_size)
    })?;
    // SAFETY: without an error, the shim made these tensors for the caller.
    Ok(outputs.map(|output| unsafe { Tensor::from_ptr(output) }))
}

/// Attention of a few new tokens, `query [B, N, T, D]`, on cached `key [B, G, S, D]` and `value [B, G, S, E]`: float32 on the
/// CPU, `D` and `E` multiples of 32, without gradients (`csrc/few_queries.cpp`). `mask [B or 1, 1, T, S]` is true where a key
/// is seen; a query that sees nothing gets zeros. Returns `[B, N, T, E]`.
pub fn few_queries_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    mask: Option<&Tensor>,
    scale: f64,
) -> Result<Tensor> {
    let mask = mask.map_or(std::ptr::null(), |mask| mask.as_ptr());
    // SAFETY: live tensors, or none for the mask; the shim checks their kinds, shapes and layout.
    made(|output, error, error_size| unsafe {
        specforge_few_queries_attention(
            query.as_ptr(),
            key.as_ptr(),
            value.as_ptr(),
            mask,
            scale,
            output,
            error,
            error_size,
        )
    })
}

/// Whether this processor has the vectors that make [`few_rows_linear`] and [`few_queries_attention`] worth it.
pub fn few_rows_pay() -> bool {
    // SAFETY: looks at the processor alone.
    unsafe { specforge_few_rows_pay() != 0 }
}

/// Whether this processor multiplies bfloat16 faster than float32.
pub fn bfloat16_pays() -> bool {
    // SAFETY: looks at the processor alone.
    unsafe { specforge_bfloat16_pays() != 0 }
}

/// Which products of a linear layer take bfloat16 factors, where all is float32 on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mixed {
    /// Its output.
    pub forward: bool,
    /// Gradients of its input and its weight.
    pub backward: bool,
}

/// `input [R, in]` times the transpose of `weight [out, in]`, with gradients. float32 on the CPU is multiplied by oneDNN
/// forwards and backwards, everything else by libtorch.
pub fn trained_linear(input: &Tensor, weight: &Tensor, mixed: Mixed) -> Result<Tensor> {
    let suits = is_float_on_cpu(input) && is_float_on_cpu(weight);
    let (forward, backward) = (suits && mixed.forward, suits && mixed.backward);
    // SAFETY: two live tensors; libtorch checks types, shapes and devices.
    made(|output, error, error_size| unsafe {
        specforge_trained_linear(
            input.as_ptr(),
            weight.as_ptr(),
            forward.into(),
            backward.into(),
            output,
            error,
            error_size,
        )
    })
}

/// `silu(gate) * up`, `[R, in]` both, times the transpose of `down [out, in]`, with gradients. float32 on the CPU keeps gate and
/// up alone for the way back, and is `mixed` both ways or not at all.
pub fn gated_linear(gate: &Tensor, up: &Tensor, down: &Tensor, mixed: bool) -> Result<Tensor> {
    if ![gate, up, down].into_iter().all(is_float_on_cpu) {
        return trained_linear(&(gate.silu() * up), down, Mixed::default());
    }
    // SAFETY: live float32 tensors on the CPU; shapes were checked by the products that made them, and are by this one.
    made(|output, error, error_size| unsafe {
        specforge_gated_linear(gate.as_ptr(), up.as_ptr(), down.as_ptr(), mixed.into(), output, error, error_size)
    })
}

/// Rows `[.., D]` divided by their root mean square (epsilon beside the weight) and multiplied with a weight `[D]`, where there
/// is one, then turned by rotary tables of cosines and sines, `[n, .., D]` for `n` times as many rows, where there are some: in
/// one pass each way, with gradients. Nothing where not all are of float32 on the CPU.
pub fn normed_rows(rows: &Tensor, norm: Option<(&Tensor, f64)>, tables: Option<[&Tensor; 2]>) -> Option<Tensor> {
    let others = norm.iter().map(|(weight, _)| *weight).chain(tables.into_iter().flatten());
    if !is_float_on_cpu(rows) || !others.into_iter().all(is_float_on_cpu) {
        return None;
    }
    let weight = norm.map_or(std::ptr::null(), |(weight, _)| weight.as_ptr());
    let [cos, sin] = tables.map_or([std::ptr::null(); 2], |tables| tables.map(|table| table.as_ptr()));
    let epsilon = norm.map_or(0.0, |(_, epsilon)| epsilon);
    // SAFETY: live float32 tensors on the CPU, or null; sizes are checked behind it.
    let made = made(|output, error, error_size| unsafe {
        specforge_normed_rows(rows.as_ptr(), weight, epsilon, cos, sin, output, error, error_size)
    });
    Some(made.unwrap_or_else(|error| panic!("norm: {error}")))
}

fn is_float_on_cpu(tensor: &Tensor) -> bool {
    tensor.kind() == Kind::Float && tensor.device() == Device::Cpu
}

/// Turns TF32 off for the whole process: products of float32 matrices are float32 to the end.
pub fn exact_float32_products() -> Result<()> {
    // SAFETY: the message buffer outlives the call.
    checked(|error, error_size| unsafe { specforge_exact_float32_products(error, error_size) })
}

/// Whether every operator of the process has to give the same bits for the same input, and to fail where it cannot. The
/// memory-saving attention, which adds up a gradient in whatever order its blocks finish, then takes one block at a time.
pub fn deterministic(wanted: bool) -> Result<()> {
    // SAFETY: the message buffer outlives the call.
    checked(|error, error_size| unsafe { specforge_deterministic(c_int::from(wanted), error, error_size) })
}

/// The libtorch this program was built for, such as `2.11.0`.
pub fn libtorch_version() -> String {
    // SAFETY: the shim returns a string literal.
    unsafe { CStr::from_ptr(specforge_libtorch_version()) }.to_string_lossy().into_owned()
}

/// libtorch's own description of how it was built: compiler, matrix library, settings.
pub fn libtorch_build() -> String {
    // SAFETY: the shim returns a string that lives as long as the process.
    unsafe { CStr::from_ptr(specforge_libtorch_build()) }.to_string_lossy().into_owned()
}

/// Bytes handed out by the caching allocator of a CUDA device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaMemory {
    /// Now.
    pub current: i64,
    /// At most since the start or the last [`reset_cuda_peak`].
    pub peak: i64,
}

/// How much memory of a CUDA device is in use. An error where there is no such device.
pub fn cuda_memory(device: usize) -> Result<CudaMemory> {
    let device = cuda_index(device)?;
    let mut memory = CudaMemory { current: 0, peak: 0 };
    // SAFETY: both numbers and the message buffer outlive the call.
    checked(|error, error_size| unsafe {
        specforge_cuda_memory(device, &raw mut memory.current, &raw mut memory.peak, error, error_size)
    })?;
    Ok(memory)
}

/// Starts a new peak measurement on a CUDA device. An error where there is no such device.
pub fn reset_cuda_peak(device: usize) -> Result<()> {
    let device = cuda_index(device)?;
    // SAFETY: the message buffer outlives the call.
    checked(|error, error_size| unsafe { specforge_cuda_reset_peak(device, error, error_size) })
}

/// libtorch looks devices up without a bounds check before CUDA is started.
fn cuda_index(device: usize) -> Result<i32> {
    let count = match device::cuda() {
        CudaState::Usable(count) => *count,
        CudaState::Unusable(_) => 0,
    };
    match i32::try_from(device) {
        Ok(index) if device < count => Ok(index),
        _ => Err(Error::Failed(format!("no CUDA device {device}: libtorch sees {count}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_libtorch_is_an_error_with_its_text() {
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let (small, large, turned) = (zeros(&[2]), zeros(&[3]), zeros(&[2, 3]).tr());
        let (scale, found, count) = (Tensor::from(1f32), Tensor::from(0f32), Tensor::from(1f32));
        let constants = AdamwConstants { learning_rate: 0.1, betas: (0.9, 0.999), weight_decay: 0.0, epsilon: 1e-8 };
        let step = |parameters: &[&Tensor], gradients: &[&Tensor]| {
            let lists = [parameters, gradients, parameters, parameters, &[&count]];
            fused_adamw(lists, constants, &scale, &found)
        };
        let integer = small.to_kind(Kind::Int64);
        let error = step(&[&integer], &[&integer]).unwrap_err().to_string();
        assert!(error.starts_with("libtorch: ") && error.contains("Long"), "{error}");
        for (parameters, gradients) in [(&small, &large), (&large, &small), (&small, &integer), (&turned, &turned)] {
            let error = step(&[parameters], &[gradients]).unwrap_err().to_string();
            assert!(error.contains("expected contiguous"), "{error}");
        }
        assert!(step(&[&small], &[]).is_err());
        step(&[&small], &[&small]).unwrap();
    }

    #[test]
    fn memory_of_an_absent_device_is_an_error() {
        assert!(cuda_memory(1 << 20).is_err());
        assert!(reset_cuda_peak(usize::MAX).is_err());
        if let CudaState::Usable(_) = device::cuda() {
            let held = Tensor::zeros([1 << 20], (Kind::Float, Device::Cuda(0)));
            reset_cuda_peak(0).unwrap();
            let memory = cuda_memory(0).unwrap();
            assert!(memory.current >= 4 << 20 && memory.peak >= memory.current, "{memory:?}");
            drop(held);
        } else {
            assert!(cuda_memory(0).is_err());
        }
    }

    #[test]
    fn a_product_is_added_in_every_pair_of_types() {
        let _guard = tch::no_grad_guard();
        let left = Tensor::from_slice2(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]]);
        let right = Tensor::from_slice2(&[[1f32, -1.0], [0.5, 2.0]]);
        let want = Tensor::from_slice2(&[[11f64, 11.5], [12.5, 12.5], [14.0, 13.5]]);
        for (wide, narrow) in [
            (Kind::Double, Kind::Double),
            (Kind::Float, Kind::Float),
            (Kind::Float, Kind::BFloat16),
            (Kind::Float, Kind::Half),
        ] {
            let mut total = Tensor::full([3, 2], 10.0, (wide, Device::Cpu));
            add_product(&mut total, &left.to_kind(narrow), &right.to_kind(narrow), 0.5).unwrap();
            assert_eq!(total.to_kind(Kind::Double), want, "{wide:?} {narrow:?}");
        }
        let mut total = Tensor::zeros([2, 2], (Kind::Float, Device::Cpu));
        assert!(add_product(&mut total, &left, &right, 1.0).is_err());
    }

    #[test]
    fn the_version_of_libtorch_is_a_version() {
        assert!(libtorch_version().starts_with("2."), "{}", libtorch_version());
    }
}
