//! Which targets an engine hands the hidden states of to a draft: every class of models must do that by itself.
//!
//! The engine builds the target by `architectures` of its config.json. What was looked for: in vLLM 0.32.0 the interface
//! `SupportsEagle3` of the class (models without one of their own run through its transformers backend, which has it), in SGLang
//! 0.5.23 the method `set_eagle3_layers_to_capture`, in llama.cpp b11434 `t_layer_inp` in the graph of what the converter
//! makes of the class; without it, it aborts at the first token. A draft's own architecture is the same for all of them.

use super::config::Target;
use crate::export::Engine;

use Engine::{LlamaCpp, Sglang, Vllm};

/// Classes of targets, each with the engines that hand its states to a draft.
const TARGETS: &[(&str, &[Engine])] = &[
    ("LlamaForCausalLM", &[Sglang, Vllm, LlamaCpp]),
    ("MistralForCausalLM", &[Sglang, Vllm, LlamaCpp]),
    ("Mistral3ForConditionalGeneration", &[Vllm]),
    ("LlavaForConditionalGeneration", &[Vllm, LlamaCpp]),
    ("MixtralForCausalLM", &[LlamaCpp]),
    ("Qwen2ForCausalLM", &[Sglang, Vllm]),
    ("Qwen2MoeForCausalLM", &[Sglang]),
    ("Qwen2_5_VLForConditionalGeneration", &[Sglang, Vllm]),
    ("Qwen3ForCausalLM", &[Sglang, Vllm, LlamaCpp]),
    ("Qwen3MoeForCausalLM", &[Sglang, Vllm, LlamaCpp]),
    ("Qwen3VLForConditionalGeneration", &[Sglang, Vllm]),
    ("Phi3ForCausalLM", &[Sglang, Vllm]),
    ("SmolLM3ForCausalLM", &[Vllm]),
    ("Olmo2ForCausalLM", &[Vllm]),
    ("Olmo3ForCausalLM", &[Vllm]),
    ("GraniteForCausalLM", &[Vllm]),
    ("GemmaForCausalLM", &[]),
    ("Gemma2ForCausalLM", &[]),
    ("Gemma3ForCausalLM", &[Sglang]),
    ("Gemma3ForConditionalGeneration", &[Sglang]),
    ("GptOssForCausalLM", &[Sglang, Vllm, LlamaCpp]),
];

/// Why an engine serves no EAGLE-3 draft of a target, whatever the draft; nothing where it does, and where neither is known.
pub(in crate::export) fn refusal(engine: Engine, target: Option<&Target>) -> Option<String> {
    let class = target?.architectures().next()?;
    let (_, engines) = TARGETS.iter().find(|(name, _)| *name == class)?;
    let how = match engine {
        Sglang => "its class has no set_eagle3_layers_to_capture",
        Vllm => "its class lacks SupportsEagle3",
        LlamaCpp => "its graph keeps no inputs of layers, and the server aborts",
    };
    let problem = format!("hands no draft the hidden states of a target of the class {class}: {how}");
    (!engines.contains(&engine)).then_some(problem)
}
