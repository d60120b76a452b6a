"""SpecForge 0.2.0's side of the race: its EAGLE-3 strategy, optimizer and schedule over its own offline files, one document
a step as its recipes have it. Its trainer object wraps models in FSDP for GPUs; the loop around the step is this one, which does
no more than fetch a document, and the clock stands still while a checkpoint is written. Its loss is a Triton kernel, so its
own formula for the same stands in."""

import json
import os
import sys
import time
from pathlib import Path


def train(asked: dict) -> None:
    os.environ.setdefault("SPECFORGE_DEVICE", "cpu")
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from specforge.algorithms.eagle3 import model as eagle3
    from specforge.core.loss import _compute_loss
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.modeling.target.target_head import TargetHead
    from specforge.optimizer import BF16Optimizer
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.strategies.base import Eagle3TrainStrategy
    from transformers import LlamaConfig

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["seed"])
    eagle3.LogSoftmaxLoss = type("ReferenceLoss", (), {"apply": staticmethod(_compute_loss)})
    target, out = Path(asked["target"]), Path(asked["out"])
    shape = json.loads((target / "config.json").read_text())
    with safe_open(asked["vocab"], "pt") as file:
        d2t, t2d = file.get_tensor("d2t"), file.get_tensor("t2d").bool()
    with safe_open(target / "model.safetensors", "pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight").float()
        tied = "lm_head.weight" not in file.keys()
        projection = embedding if tied else file.get_tensor("lm_head.weight").float()
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps")
    keys += ("max_position_embeddings",)
    kept = {key: shape[key] for key in keys}
    rope = shape.get("rope_theta") or shape["rope_parameters"]["rope_theta"]
    config = LlamaConfig(
        **kept, rope_theta=rope, hidden_act="silu", num_hidden_layers=1, draft_vocab_size=len(d2t), pad_token_id=0,
        tie_word_embeddings=False,
    )
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa").float()
    draft.embed_tokens.weight.data.copy_(embedding)
    draft.freeze_embedding()
    draft.t2d.copy_(t2d)
    draft.d2t.copy_(d2t)
    head = TargetHead.__new__(TargetHead)
    torch.nn.Module.__init__(head)
    head.fc = torch.nn.Linear(shape["hidden_size"], shape["vocab_size"], bias=False)
    head.fc.weight.data.copy_(projection)
    head.freeze_weights()
    head.eval()
    model = eagle3.OnlineEagle3Model(draft, length=7, attention_backend="sdpa")
    strategy = Eagle3TrainStrategy(model, target_head=head)
    files = sorted(Path(asked["features"]).glob("*.ckpt"))
    dice = torch.Generator().manual_seed(asked["seed"])

    def batches():
        while True:
            for number in torch.randperm(len(files), generator=dice).tolist():
                raw = torch.load(files[number], weights_only=True)
                ids = raw["input_ids"][None]
                mask = raw["loss_mask"][None].clone()
                mask[0, -1] = 0
                yield TrainBatch(
                    tensors={
                        "input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": mask,
                        "hidden_state": raw["aux_hidden_state"], "target": raw["hidden_state"],
                    },
                    sample_ids=[files[number].name], strategy="eagle3", metadata={"target_repr": "hidden_state"},
                )

    def save(folder: Path) -> None:
        tensors = strategy.checkpoint_state_filter(model.state_dict())
        folder.mkdir(parents=True)
        save_file({name: each.contiguous().clone() for name, each in tensors.items()}, folder / "model.safetensors")
        said = config.to_dict() | {"architectures": ["LlamaForCausalLMEagle3"], "torch_dtype": "float32", "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(said, indent=1, default=str))

    marks, taken, steps, losses, each, done = list(asked["marks"]), 0.0, 0, [], [], []
    optimizer = BF16Optimizer(draft, lr=asked["rate"], total_steps=asked["steps"], max_grad_norm=0.5)
    for seconds, batch in timed(batches()):
        start = time.perf_counter()
        loss = strategy.forward_loss(batch).loss
        loss.backward()
        optimizer.step()
        each.append(seconds + time.perf_counter() - start)
        taken += each[-1]
        steps += 1
        losses.append(loss.item())
        if steps % 50 == 0:
            print(f"peer: step {steps} of {asked['steps']}, {taken:.0f} s, loss {sum(losses[-50:]) / 50:.3f}", file=sys.stderr)
        if marks and taken >= marks[0]:
            folder = out / f"{marks[0]:g}s"
            save(folder)
            done.append({"mark": marks.pop(0), "steps": steps, "seconds": taken, "draft": str(folder)})
        if steps == asked["pilot"] or not marks:
            break
    late = each[steps // 2 :]  # behind what is compiled and filled at the start
    print(json.dumps({
        "steps": steps, "seconds": taken, "a_step": sum(late) / len(late), "checkpoints": done, "losses": losses[-50:],
    }))


def timed(source):
    """What a source gives, with the seconds that it took to give it."""
    while True:
        start = time.perf_counter()
        batch = next(source)
        yield time.perf_counter() - start, batch
