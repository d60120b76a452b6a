#!/usr/bin/env python3
"""Makes golden files of block drafters' training: what speculators and Model-Optimizer compute on tiny random models.

    pip install torch==2.11.0 transformers==5.8.1 safetensors
    pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0 nvidia-modelopt==0.48.0rc1   # and what they import
    python scripts/golden/blocks.py OUT_DIR [CASE ...]
    python scripts/golden/blocks.py tests/data/goldens SMALL

The second makes those that are committed, of fewer numbers. Each file holds its settings as metadata, `in.*`, weights
`w.*` under the trainer's names, the trainer's random choices `sample.*`, `mid.*` on the way, `out.*`, and gradients of
`out.loss`, `grad.*`. Everything is float32 on the CPU, with eager attention and losses. `tests/goldens/block_*.rs` check
such files:

    SPECFORGE_GOLDENS=OUT_DIR ./scripts/test goldens
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

PLAIN = dict(
    vocab_size=30, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0,
    attention_bias=False,
)
# What the committed cases have less of, and which they are.
SMALL = dict(
    vocab_size=14, hidden_size=16, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
)
COMMITTED = ["sp_dflash_shift", "sp_dflash_short_window", "sp_dspark_vocab", "mo_dflash2_lambda"]

BLOCK = 5
COMPOUND = '{"ce": 0.1, "tv": 0.9}'
DPACE = dict(loss_fn="ce", per_position_loss_weight="dpace", dpace_alpha=0.3)
SELECTOR = dict(conv_kernel_size=2, conv_group_size=8, selector_rank=6, selector_top_k=4)
REFINER = dict(xpress_rank=6, xpress_mlp_ratio=2)
LATTICE = dict(
    lilicorr_candidate_topk=4, lilicorr_hidden_size=24, lilicorr_factor_dim=10, lilicorr_num_layers=1,
    lilicorr_num_heads=3, lilicorr_mlp_ratio=2.0, lilicorr_logit_scale=8.0, lilicorr_vector_eps=1e-4,
)


def windows(*kinds, size=6):
    return dict(layer_types=[f"{kind}_attention" for kind in kinds], sliding_window=size, use_sliding_window=True)


def lattice_terms(ce, margin, penalty, calibration):
    values = dict(w_ce=ce, w_margin=margin, w_pen=penalty, w_cal=calibration, margin=2.0)
    return {f"dflash_lilicorr_{name}": value for name, value in values.items()}


# Name: algorithm, keys of its configuration, of the training call, of the layers, tokens that the draft knows.
SPECULATORS = {
    "sp_dflash_rkl": ("dflash", {}, dict(loss_fn="rkl", gamma=7.0), {}, None),
    "sp_dflash_nla": ("dflash", {}, dict(loss_fn="nla"), windows("sliding", "full"), None),
    "sp_dflash_shift": ("dflash", dict(sample_from_anchor=True), DPACE, windows("sliding", "full"), None),
    "sp_dflash_short_window": ("dflash", {}, dict(loss_fn="jsd"), windows("sliding", "full", size=3), None),
    "sp_dflash_vocab": ("dflash", {}, DPACE, {}, 17),
    "sp_dflash2_ce_tv": ("dflash2", SELECTOR, dict(loss_fn=COMPOUND, selector_loss_alpha=0.5), {}, None),
    "sp_dflash2_shift": ("dflash2", dict(SELECTOR, sample_from_anchor=True), dict(loss_fn="lk_hybrid"), {}, None),
    "sp_dspark_gated": ("dspark", dict(markov_rank=6, markov_head_type="gated"), dict(loss_fn=COMPOUND), {}, None),
    "sp_dspark_vocab": (
        "dspark", dict(markov_rank=6, markov_head_type="rnn", sample_from_anchor=False), dict(loss_fn=COMPOUND), {}, 9),
    "sp_dspark_plain_confidence": (
        "dspark", dict(markov_rank=6, confidence_head_with_markov=False), dict(confidence_head_alpha=0.5), {}, None),
    "sp_xpress_shift": ("xpress", dict(REFINER, sample_from_anchor=True), dict(loss_fn=COMPOUND), {}, None),
    "sp_xpress_data": ("xpress", REFINER, dict(loss_fn=COMPOUND, ce_from_data=True, consistency_passes=2), {}, None),
    "sp_xpress_full_base": ("xpress", REFINER, dict(loss_fn="kl_div", base_anchor_full_weight=True), {}, None),
}
# Name: keys of the draft's architecture, and of its training.
MODELOPT = {
    "mo_dflash2_tv": (SELECTOR, dict(dflash_lk_loss_type="tv")),
    "mo_dflash2_lambda": (SELECTOR, dict(dflash_lk_loss_type="lambda", dflash_lk_ce_scale=0.8, dflash_lk_ce_decay=2.0)),
    "mo_dflash2_dpace": (SELECTOR, dict(dflash_loss_objective="dpace", dflash_dpace_alpha=0.3)),
    "mo_dflash2_distilled": (SELECTOR, dict(dflash_self_logit_distillation=True, dflash_swa_window_size=6)),
    "mo_lilicorr_calibrated": (LATTICE, lattice_terms(0.25, 0.125, 0.25, 0.5)),
    "mo_lilicorr_wide": (dict(LATTICE, lilicorr_hidden_size=40, lilicorr_num_heads=4), lattice_terms(0.5, 0, 0.25, 0)),
}


def randomise(module):
    """Every parameter at random, norms and biases included, in sizes at which no output is all of one kind."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_()
            if name.endswith("base_kernel"):
                weight.mul_(0.3)[:, 0] += 1
            elif "norm" in name and name.endswith("weight"):
                weight.mul_(0.3).add_(1)
            elif weight.dim() < 2 or "mix_l" in name:
                weight.mul_(0.3)
            elif "embed" not in name and "codebook" not in name and "markov_w" not in name:
                weight.mul_((0.4 if "kernel_projection" in name else 1.2) / math.sqrt(weight.shape[-1]))


def save(folder, name, tensors, metadata):
    values = {key: torch.as_tensor(value).detach().clone().contiguous() for key, value in tensors.items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file(values, folder / f"{name}.safetensors", texts)
    print(f"{name}: loss {values['out.loss'].item():.4f}")


def gradients(module):
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    empty = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    return {f"grad.{name}": empty[name] if weight.grad is None else weight.grad for name, weight in weights.items()}


def packed(sizes, features):
    """Two documents and padding in one row."""
    lengths, padding, hidden = (15, 13), 6, sizes["hidden_size"]
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    documents = torch.tensor([numbers + [-1] * padding])
    real = documents >= 0
    places = torch.tensor([[place for length in (*lengths, 0) for place in range(length)] + [0] * padding])
    return {
        "in.input_ids": torch.randint(sizes["vocab_size"] - 1, documents.shape) * real,
        "in.document_ids": documents,
        "in.position_ids": places,
        "in.loss_mask": (torch.rand(documents.shape) < 0.8).long() * real,
        "in.hidden_states": torch.randn(1, documents.shape[1], features * hidden) * real[..., None],
        "in.verifier_last_hidden_states": torch.randn(1, documents.shape[1], hidden) * real[..., None],
    }


def speculators(folder, name, seed, sizes):
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import core
    from speculators.models.dflash2.core import DFlash2DraftModel
    from speculators.models.dspark.core import DSparkDraftModel
    from speculators.models.xpress.core import XPressDraftModel

    torch._dynamo.config.disable = True
    algorithm, own, call, layers, known = SPECULATORS[name]
    models = dict(dflash2=DFlash2DraftModel, dspark=DSparkDraftModel, xpress=XPressDraftModel)
    kind = models.get(algorithm, core.DFlashDraftModel)
    layers = {**sizes, **layers}
    spec = dict(block_size=BLOCK, aux_hidden_state_layer_ids=[2, 5], mask_token_id=sizes["vocab_size"] - 1, **own)
    call = {"loss_fn": "kl_div", "max_anchors": 6, "gamma": 4.0, **call}
    qwen = Qwen3Config(**layers)
    qwen._attn_implementation = "eager"
    vocabulary = sizes["vocab_size"]
    model = kind(kind.config_class(transformer_layer_config=qwen, draft_vocab_size=known or vocabulary, **spec))
    model._create_mask_fn = lambda *given, **more: core.create_float_mask(*given, **{**more, "dtype": torch.float32})
    randomise(model)
    model.lm_head.weight.data.copy_(model.verifier_lm_head.weight)
    if known:
        ids = torch.randperm(vocabulary)[:known].sort().values
        model.load_vocab_mappings(torch.zeros(vocabulary).index_fill(0, ids, 1).bool(), ids - torch.arange(known))

    tensors = packed(sizes, features=2)
    select, forward = core.select_anchors, model._backbone_forward

    def selected(*given):
        tensors["sample.anchors"], tensors["sample.valid"] = select(*given)
        return tensors["sample.anchors"], tensors["sample.valid"]

    def backbone(*given, **more):
        result = forward(*given, **more)
        names = ["hidden", "base_logits", "target_logits", "loss_mask"]
        tensors.update({f"mid.{key}": value for key, value in zip(names, result)})
        return result

    core.select_anchors, model._backbone_forward = selected, backbone
    inputs = {key.removeprefix("in."): value for key, value in tensors.items()}
    settings = {key: value for key, value in call.items() if key != "loss_fn"}
    if algorithm in ("dflash2", "dspark"):
        settings["tv_loss_fn"] = resolve_loss_config("tv", "eager")["tv"][0]
    _, loss, metrics = model(**inputs, loss_config=resolve_loss_config(call["loss_fn"], "eager"), **settings)
    core.select_anchors = select
    loss.backward()
    tensors.update({f"w.{key}": value for key, value in model.state_dict().items()}, **gradients(model))
    tensors.update({f"out.{key}": value for key, value in metrics.items()}, **{"out.loss": loss})
    save(folder, name, tensors, {
        "source": f"PyPI speculators 0.9.0, {kind.__module__}.{kind.__name__}, eager attention and losses, CPU float32",
        "kind": f"sp_{algorithm}", "seed": str(seed), "spec": spec, "call": call, "transformer_layer_config": layers,
    })


def drafted(draft, head, embedding, algorithm, tensors, place):
    """What the draft makes of one block in decoding; its rows are those of training."""
    row, block = place
    anchor = tensors["sample.anchors"][row, block]
    hidden = tensors["mid.hidden"].unflatten(1, (-1, BLOCK))[row, block][None]
    logits = head(hidden[:, 1:])
    values = {"row": row, "block": block, "anchor": anchor, "hidden": hidden, "backbone_tokens": logits.argmax(-1)[0]}
    if algorithm == "dflash2":
        selector = draft.candidate_selector
        unary, ids = logits.topk(selector.top_k, -1)
        before, path = tensors["in.input_ids"][row, anchor].view(1, 1), []
        for slot in range(BLOCK - 1):
            here = slice(slot, slot + 1)
            scores = selector.score_candidates(ids[:, here], unary[:, here], hidden[:, 1:][:, here], before)
            before = ids[:, slot].gather(-1, scores[:, 0].argmax(-1, keepdim=True))
            path.append(before[0, 0])
        return {**values, "candidate_ids": ids, "unary": unary, "tokens": torch.stack(path)}
    unary, ids = logits.topk(draft.lilicorr.candidate_topk, -1)
    likely = unary - logits.logsumexp(-1, keepdim=True)
    start, pair = draft.score_lattice(
        candidate_token_ids=ids[None], candidate_log_probs=likely[None], pass_hidden=hidden[:, None, 1:],
        embed_tokens=embedding, target_hidden=tensors["in.hidden_states"][row][None],
        anchor_positions=anchor.view(1, 1),
    )
    start, pair = draft.lilicorr.compose_log_factors(start_scores=start, pair_scores=pair)
    start, pair = start[0], pair[0]
    path = [start[0].argmax()]
    for scores in pair[0]:
        path.append(scores[path[-1]].argmax())
    path = torch.stack(path)
    values.update(candidate_ids=ids, candidate_log_probs=likely, log_start=start, log_pair=pair, path=path)
    return {**values, "tokens": ids[0].gather(1, path[:, None])[:, 0]}


def modelopt(folder, name, seed, sizes):
    import modelopt.torch.speculative as speculative

    own, training = MODELOPT[name]
    algorithm = name.split("_")[1]
    keys = ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
            "rms_norm_eps", "max_position_embeddings"]
    config = {
        "dflash_block_size": BLOCK, "dflash_mask_token_id": sizes["vocab_size"] - 1, "dflash_num_anchors": 6,
        "dflash_self_logit_distillation": False, "dflash_loss_objective": "decay", "dflash_loss_decay_factor": 7.0,
        **training,
        "dflash_architecture_config": {**{key: sizes[key] for key in keys}, "projector_type": algorithm, **own},
    }
    base = dict(sizes, num_hidden_layers=10, tie_word_embeddings=False)
    model = Qwen3ForCausalLM(Qwen3Config(**base)).float()
    model.config.num_orig_hidden_layers = base["num_hidden_layers"]
    speculative.convert(model, [("dflash", dict(config, dflash_offline=True, dflash_use_torch_compile=False))])
    draft, head, embedding = model.dflash_module, model.lm_head, model.model.embed_tokens
    for module in (draft, head, embedding):
        randomise(module)
    head.weight.data.mul_(1.6 / 1.2)
    embedding.weight.data.normal_()

    shape, vocabulary, features = (2, 5 * BLOCK), sizes["vocab_size"], len(model.target_layer_ids)
    tensors = {
        "in.input_ids": torch.randint(vocabulary - 1, shape),
        "in.loss_mask": (torch.rand(shape) < 0.85).long(),
        "in.hidden_states": torch.randn(*shape, features * sizes["hidden_size"]),
        "in.target_logits": torch.randn(*shape, vocabulary) * 2,
    }
    if vocabulary > sizes["hidden_size"]:  # logits at random would be those of no state
        raise ValueError("expected a vocabulary that is not larger than the hidden size")
    sample = model._sample_anchor_positions

    def sampled(*given):
        tensors["sample.anchors"], tensors["sample.keep"] = sample(*given)
        return tensors["sample.anchors"], tensors["sample.keep"]

    model._sample_anchor_positions = sampled
    hook = draft.register_forward_hook(lambda _, __, hidden: tensors.update({"mid.hidden": hidden}))
    states = {"aux_hidden_states": tensors["in.hidden_states"], "base_model_logits": tensors["in.target_logits"]}
    ids, mask = tensors["in.input_ids"], tensors["in.loss_mask"].float()
    output = model.train()(
        input_ids=ids, attention_mask=torch.ones_like(ids), loss_mask=mask, base_model_outputs=states)
    hook.remove()
    output.loss.backward()
    tensors["mid.base_logits"] = head(tensors["mid.hidden"])
    tensors.update(gradients(draft), **{f"w.{key}": value for key, value in draft.named_parameters()})
    tensors.update({"w.target_embed.weight": embedding.weight, "w.target_head.weight": head.weight})
    tensors.update({"out.loss": output.loss, "out.accuracy": float(torch.tensor(output.train_acc).flatten()[0])})
    for group in ("selector_metrics", "lilicorr_metrics"):
        tensors.update({f"out.metric.{key}": float(value) for key, value in (output.get(group) or {}).items()})
    with torch.no_grad():
        block = drafted(draft, head, embedding, algorithm, tensors, (0, int(tensors["sample.keep"][0].sum() > 1)))
    tensors.update({f"infer.{key}": value for key, value in block.items()})
    kind = type(model)
    save(folder, name, tensors, {
        "source": f"PyPI nvidia-modelopt 0.48.0rc1, {kind.__name__}, offline forward, CPU float32",
        "kind": f"mo_{algorithm}", "seed": str(seed), "config": config, "base_config": base,
        "target_layer_ids": model.target_layer_ids,
    })


def main():
    folder, asked = Path(sys.argv[1]), sys.argv[2:]
    small = asked == ["SMALL"]
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed, name in enumerate([*SPECULATORS, *MODELOPT], 1):
        if name in COMMITTED if small else not asked or name in asked:
            torch.manual_seed(seed)
            make = speculators if name in SPECULATORS else modelopt
            make(folder, name, seed, {**PLAIN, **SMALL} if small else PLAIN)


if __name__ == "__main__":
    main()
