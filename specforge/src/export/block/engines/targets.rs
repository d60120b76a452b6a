//! Which targets an engine hands the hidden states of to a block drafter.
//!
//! vLLM and llama.cpp do it by what EAGLE-3 uses too; SGLang's classes have a method of its own for it,
//! `set_dflash_layers_to_capture` (0.5.23), which fewer of them have.

use crate::export::Engine;
use crate::export::eagle3::config::Target;
use crate::export::eagle3::targets;

/// Classes without the method, of those that this program loads targets of.
const WITHOUT: &[&str] = &[
    "Mistral3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "SmolLM3ForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "GraniteForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
];

/// Why an engine serves no block drafter of a target, whatever the drafter; nothing where it does, and where nothing is known.
pub(super) fn refusal(engine: Engine, target: Option<&Target>) -> Option<String> {
    if engine != Engine::Sglang {
        return targets::refusal(engine, target);
    }
    let class = target?.architectures().next()?;
    WITHOUT.contains(&class).then(|| {
        format!(
            "hands no draft the hidden states of a target of the class {class}: its class has no \
             set_dflash_layers_to_capture"
        )
    })
}
