"""
A Transformer as a GGUF file, for llama.cpp and ollama: write_gguf(model, tok, stage, path, dtype).
"""
import os

from configurator import check
from tools.chat_template import PLAIN_TEMPLATE
from tools.hf_names import hf_views
from tools.to_hf import need
from tools.vocabulary import LLAMA_CPP_RULES, UNKNOWN, is_tiktoken, merges, unused, vocabulary

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def gguf_architecture(config):
    """Return which of llama.cpp's models computes what ours does. Its qwen3 norms q and k and turns the pairs of
    channels that we turn; its llama takes biases, but turns neighbours (see interleave)."""
    if config.n_experts:
        return "glm4moe"
    return "qwen3" if config.qk_norm else "llama"


def interleave(tensor, head_dim):
    """Reorder the rows of q or k within each head for llama.cpp's llama, which turns the pair of channels (2i, 2i + 1)
    where we turn (i, i + D/2)."""
    heads = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])                # (heads, 2, D/2[, C])
    return heads.transpose(1, 2).reshape(tensor.shape)


def gguf_tensors(model):
    """Yield (name in llama.cpp, tensor) for all weights of a Transformer."""
    config = model.config
    arch = gguf_architecture(config)
    for name, tensor in hf_views(model).items():
        stem, _, kind = name.rpartition(".")
        if stem in GGUF_NAMES:
            yield f"{GGUF_NAMES[stem]}.{kind}", tensor
            continue
        _, _, layer, part = stem.split(".", 3)      # model.layers.3.mlp.gate_proj
        if kind == "e_score_correction_bias":
            yield f"blk.{layer}.exp_probs_b.bias", tensor
        elif not part.startswith("mlp.experts."):
            theirs = GGUF_NAMES[part]
            if arch == "glm4moe" and theirs == "ffn_norm":
                theirs = "post_attention_norm"
            if arch == "llama" and theirs in ("attn_q", "attn_k"):
                tensor = interleave(tensor, config.head_dim)
            yield f"blk.{layer}.{theirs}.{kind}", tensor
    # the experts of a layer are one tensor, as ours are, with the input channels last
    for layer, block in enumerate(model.blocks):
        if hasattr(block.ffn, "router"):
            gate, up = block.ffn.gate_up.detach().transpose(1, 2).chunk(2, dim=1)   # (E, W, C)
            yield f"blk.{layer}.ffn_gate_exps.weight", gate
            yield f"blk.{layer}.ffn_up_exps.weight", up
            yield f"blk.{layer}.ffn_down_exps.weight", block.ffn.down.detach().transpose(1, 2)


def add_gguf_config(writer, config, trained_len, gguf):
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(trained_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_factor > 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_len)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.n_experts:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.n_active_experts)
        writer.add_expert_shared_count(config.n_shared_experts or 1)    # one of zeros, see hf_names.py
        writer.add_expert_feed_forward_length(config.expert_hidden_dim)
        writer.add_leading_dense_block_count(config.first_dense)
        writer.add_expert_weights_scale(config.route_scale)
        writer.add_expert_weights_norm(config.n_active_experts > 1)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def add_gguf_vocabulary(writer, tok, vocab_size, stage):
    pieces = vocabulary(tok)
    pieces += [unused(i) for i in range(len(pieces), vocab_size)]   # rows of the embedding that no token uses
    if is_tiktoken(tok):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(LLAMA_CPP_RULES[tok.rule])
        writer.add_token_merges([f"{left} {right}" for left, right in merges(pieces)])
    else:
        # llama.cpp merges by score, as sentencepiece does
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([piece.score for piece in pieces])
        writer.add_unk_token_id(next(i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN))
    writer.add_token_list([piece.text.encode() for piece in pieces])
    writer.add_token_types([piece.kind for piece in pieces])
    # both are on where a file does not say otherwise
    writer.add_add_space_prefix(tok.dummy_prefix)
    start = tok.start_ids if stage == "pretrain" else []    # what opens a text, as in sample.py
    check(len(start) < 2, "llama.cpp puts one token before a text, and this vocabulary's documents open with "
          f"{len(start)}: export it with --to=hf")
    writer.add_add_bos_token(bool(start))
    writer.add_add_eos_token(False)
    writer.add_bos_token_id(start[0] if start else tok.eot_id)
    writer.add_eos_token_id(tok.eot_id if stage == "pretrain" else tok.im_end_id)
    writer.add_pad_token_id(tok.pad_id)
    if not tok.dummy_prefix:
        writer.add_chat_template(PLAIN_TEMPLATE)


def write_gguf(model, tok, stage, path, dtype="f32"):
    """Write a Transformer as a file of llama.cpp, its matrices as dtype."""
    gguf = need("gguf", "writing GGUF files")
    matrices, file_type = {
        "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }[dtype]
    writer = gguf.GGUFWriter(path, gguf_architecture(model.config))
    writer.add_name("mingyue")
    writer.add_file_type(file_type)
    add_gguf_config(writer, model.config, model.trained_len, gguf)
    add_gguf_vocabulary(writer, tok, model.config.vocab_size, stage)
    for name, tensor in gguf_tensors(model):
        values = tensor.float().contiguous().numpy()
        # norm weights, biases and the router stay exact; q8_0 wants rows of whole blocks of 32
        exact = values.ndim == 1 or "ffn_gate_inp" in name or (dtype == "q8_0" and values.shape[-1] % 32)
        kind = gguf.GGMLQuantizationType.F32 if exact else matrices
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
