//! Whether the files give the logits of the training to the last bit: both are run on the same features, with two guesses
//! behind the last. Without a checkpoint, two loads of the files are compared.

use tch::{Kind, Tensor};

use super::{Eagle3, network};
use crate::doctor::case::Case;
use crate::doctor::finding::Findings;
use crate::doctor::folder::words;
use crate::draft::eagle3::Eagle3Shape;
use crate::draft::eagle3::layers::Network;
use crate::error::Result;
use crate::export;
use crate::nn::{AttentionMask, noise};

/// Tokens that are run.
const TOKENS: i64 = 24;
/// Guesses behind the last of them.
const GUESSES: i64 = 2;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(Eagle3 { imported: Ok(read), trained, .. }) = &case.eagle3 else { return Ok(()) };
    let Some((_, first)) = read.tensors.first() else { return Ok(()) };
    let kind = first.kind();
    let origin = case.origin.as_ref().and_then(|origin| origin.tensors.as_ref().zip(trained.as_ref()));
    let got = logits(case, &read.shape, &read.tensors);
    let (want, what) = match origin {
        Some((tensors, shape)) => {
            let rounded = |(name, tensor): &(String, Tensor)| Ok((name.clone(), tensor.f_to_kind(kind)?));
            let floats = tensors.iter().filter(|(_, tensor)| tensor.is_floating_point());
            let tensors: Vec<_> = floats.map(rounded).collect::<Result<_>>()?;
            (logits(case, shape, &tensors), "those of the checkpoint")
        }
        None => {
            let again = export::eagle3::read(&case.folder.path, Some(case.target.model.info().num_layers()))?;
            (logits(case, &again.shape, &again.tensors), "those of a second load")
        }
    };
    let (got, want) = match (got, want) {
        (Ok(got), Ok(want)) => (got, want),
        (Err(error), _) | (_, Err(error)) => {
            found.fault(format!("the draft cannot be run: {}", words(&error)), "mend what the other lines name");
            return Ok(());
        }
    };
    if got.size() == want.size() && got.equal(&want) {
        found.ok(format!("{} logits are {what}, bit for bit", got.numel()));
    } else if got.size() != want.size() {
        found.fault(format!("logits {:?}, {what} {:?}", got.size(), want.size()), "export the checkpoint again");
    } else {
        let most = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().max().double_value(&[]);
        found.fault(
            format!("logits differ from {what} by up to {most:.3e}"),
            "the lines above say which key or tensor is another; if none does, export the checkpoint again",
        );
    }
    Ok(())
}

/// Logits behind tokens and guesses, `[T + 2, DV]`.
fn logits(case: &Case<'_>, shape: &Eagle3Shape, tensors: &[(String, Tensor)]) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let target = case.target.model;
    let network: Network = network(shape, tensors, target)?;
    let (kind, device) = (target.kind(), target.device());
    let features = |stream: usize| {
        let values = noise::normal(&[TOKENS, shape.target_hidden_size], 1.0, 17, stream as u64);
        Ok(values.f_to_device(device)?.f_to_kind(kind)?) // [T, TH]
    };
    let captured: Vec<Tensor> = (0..shape.capture.len()).map(features).collect::<Result<_>>()?;
    let ids = |start: i64, count: i64| {
        let ids: Vec<i64> = (start..start + count).map(|place| (place * 7919 + 11) % shape.vocab_size).collect();
        let positions: Vec<i64> = (start..start + count).collect();
        [ids, positions].map(|values| Tensor::from_slice(&values).unsqueeze(0).to_device(device)) // [1, T]
    };
    let mut cache = network.new_cache(1, TOKENS + GUESSES);
    let mut features = network.project_hidden_states(&captured)?.unsqueeze(0); // [1, T, H]
    let mut rows = Vec::new();
    let (mut start, mut count) = (0, TOKENS);
    while start < TOKENS + GUESSES {
        let [tokens, positions] = ids(start, count);
        let hidden = network.forward_cached(&features, &tokens, &positions, &AttentionMask::Causal, &mut cache)?; // [1, T, H]
        cache.advance(&[count]);
        rows.push(network.logits(&hidden.squeeze_dim(0)));
        features = network.fed_back(&hidden.narrow(1, count - 1, 1)); // [1, 1, H]
        (start, count) = (start + count, 1);
    }
    Ok(Tensor::f_cat(&rows, 0)?.to_device(tch::Device::Cpu))
}
