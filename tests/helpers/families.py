"""Tiny random models of each family."""

import copy

import torch
import transformers as hf

from hf_sparse_attn import mark_global_tokens

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 2, 4, 2, 8, 64
ONE_LAYER_OF_EACH = {"sliding_window": 14, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**ONE_LAYER_OF_EACH, "head_dim": HEAD_DIM, "query_pre_attn_scalar": 5, "tie_word_embeddings": False}
# batched_mm: the experts' default kernel does not take float64.
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": None}),
    "mistral-sliding": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 14}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
    "qwen2-mixed": (
        hf.Qwen2Config,
        hf.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 14, "max_window_layers": 1},
    ),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": HEAD_DIM}),
    "phi3": (
        hf.Phi3Config,
        hf.Phi3ForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-sliding": (hf.Phi3Config, hf.Phi3ForCausalLM, {"sliding_window": 14}),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {**GEMMA, "attn_logit_softcapping": 3.0}),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, GEMMA),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, EXPERTS),
    "gpt_oss": (
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        {**ONE_LAYER_OF_EACH, **EXPERTS, "head_dim": HEAD_DIM, "rope_parameters": YARN},
    ),
}
# Every part of the pattern is in play at 40 tokens: window, globals, routed keys, pages.
SPARSE = {
    "window_size": 5,
    "num_global_tokens": 2,
    "key_budget": 6,
    "min_weight": 0.03,
    "num_hash_bits": 2,
    "page_size": 4,
    "dense_below": 0,
}


def tiny_model(family="llama", implementation="sparse", dtype=torch.float64, **sparse):
    """A random model; the same weights for every attention implementation. `sparse` changes fields of SPARSE."""
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=NUM_HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=implementation,
        **copy.deepcopy(extra),
    )
    if implementation == "sparse":
        config.sparse_attention = {**SPARSE, **sparse}
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[0].normal_(0, 0.3)  # padding's is zero: no bucket of a zero query is best
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # as large as the scores' own logsumexp, so that they take half of the mass
                parameter.normal_(3.0)
            elif parameter.ndim == 1:  # biases start at zero and norms at one
                parameter.add_(0.3 * torch.randn_like(parameter))
    mark_global_tokens(model)
    return model.to(dtype).eval()


def move_queries_and_keys(model):
    """What training does to a fitted hash, by noise of half the weights' spread."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight += weight.std() / 2 * torch.randn(weight.shape, generator=generator)
