"""
Our weights under transformers' names, and the architecture of transformers that a ModelConfig is.

    hf_views(model)        {name: a view of our weight}: read them to export, copy into them to import
    hf_config(config)      ModelConfig -> what transformers' config.json says of the architecture
    config_from_hf(dict)   … and back

export.py, bench.py and the tests' oracles all take the names from here.
"""
import math

import torch

from configurator import check
from model import ModelConfig

# ---------------------------------------------------------------------------- weights


def qkv_rows(config):
    """Return the rows that q, k and v take in the fused matrix."""
    kv_rows = config.n_kv_heads * config.head_dim
    return [config.n_heads * config.head_dim, kv_rows, kv_rows]


def feed_forward_views(name, gate_up, down):
    """gate_up (2W, C), down (C, W) -> the three matrices that theirs are."""
    gate, up = gate_up.chunk(2)
    return {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}


def attention_views(name, attn, config):
    views = {f"{name}.o_proj.weight": attn.out.weight}
    q, k, v = attn.qkv.weight.split(qkv_rows(config))
    views.update({f"{name}.q_proj.weight": q, f"{name}.k_proj.weight": k, f"{name}.v_proj.weight": v})
    if config.qkv_bias:
        q, k, v = attn.qkv.bias.split(qkv_rows(config))
        views.update({f"{name}.q_proj.bias": q, f"{name}.k_proj.bias": k, f"{name}.v_proj.bias": v})
    if config.qk_norm:
        views[f"{name}.q_norm.weight"] = attn.q_norm.weight
        views[f"{name}.k_norm.weight"] = attn.k_norm.weight
    return views


def experts_views(name, moe):
    """A mixture of experts. Ours hold all experts in one tensor, input channels first; theirs are a Linear each."""
    views = {f"{name}.gate.weight": moe.router.weight, f"{name}.gate.e_score_correction_bias": moe.bias}
    for e in range(len(moe.gate_up)):
        views.update(feed_forward_views(f"{name}.experts.{e}", moe.gate_up[e].T, moe.down[e].T))
    if moe.shared is not None:
        shared_gate_up = moe.shared.gate_up.weight
        shared_down = moe.shared.down.weight
    else:
        # vLLM and llama.cpp know no mixture without a shared expert; one of zeros adds nothing (silu(0) * 0 = 0)
        E, C, two_W = moe.gate_up.shape
        shared_gate_up = torch.zeros(two_W, C)
        shared_down = torch.zeros(C, two_W // 2)
    views.update(feed_forward_views(f"{name}.shared_experts", shared_gate_up, shared_down))
    return views


def hf_views(model):
    """Return {name in transformers' files: tensor} of a Transformer, its fused matrices cut apart.

    The tensors are views of the model's own memory, so what is copied into them is loaded. Names and shapes are those
    of Llama, Qwen2, Qwen3 and Glm4Moe ForCausalLM.
    """
    config = model.config
    views = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if model.lm_head is not None or config.n_experts:
        # vLLM's Glm4Moe ignores tie_word_embeddings, so a mixture of experts always names its head
        views["lm_head.weight"] = model.head_weight
    for i, block in enumerate(model.blocks):
        name = f"model.layers.{i}"
        views[f"{name}.input_layernorm.weight"] = block.attn_norm.weight
        views.update(attention_views(f"{name}.self_attn", block.attn, config))
        views[f"{name}.post_attention_layernorm.weight"] = block.ffn_norm.weight
        if hasattr(block.ffn, "router"):
            views.update(experts_views(f"{name}.mlp", block.ffn))
        else:
            views.update(feed_forward_views(f"{name}.mlp", block.ffn.gate_up.weight, block.ffn.down.weight))
    return {name: tensor.detach() for name, tensor in views.items()}


# ---------------------------------------------------------------------------- architecture

# what a model is, in our words and in those of config.json; the same table is read in both directions
FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
EXPERT_FIELDS = {
    "n_experts": "n_routed_experts",
    "n_active_experts": "num_experts_per_tok",
    "n_shared_experts": "n_shared_experts",
    "expert_hidden_dim": "moe_intermediate_size",
    "first_dense": "first_k_dense_replace",
    "route_scale": "routed_scaling_factor",
}
# what config.json may say that our model cannot compute otherwise
ALWAYS = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "n_group": 1,               # all experts compete: there are no groups of which some are chosen first
}


def architecture(config):
    """Return (model_type, first part of the class's name) of the transformers model that this ModelConfig is."""
    if config.n_experts:
        return "glm4_moe", "Glm4Moe"    # not Dots1, which always norms q and k
    check(not (config.qk_norm and config.qkv_bias),
          "transformers has no dense architecture with both qkv_bias and qk_norm (Qwen2 has the one, Qwen3 the other)")
    if config.qk_norm:
        return "qwen3", "Qwen3"
    if config.qkv_bias:
        return "qwen2", "Qwen2"
    check(config.dim % config.n_heads == 0,
          f"transformers' Llama wants a dim that is a multiple of n_heads; this model has dim={config.dim} and "
          f"n_heads={config.n_heads} (Qwen3, that is qk_norm=True, has no such rule)")
    return "llama", "Llama"


def hf_config(config):
    """Return the dict of config.json for this ModelConfig: all that decides what the weights compute."""
    model_type, class_name = architecture(config)
    theirs = {"model_type": model_type, "architectures": [f"{class_name}ForCausalLM"], **ALWAYS}
    for ours, name in FIELDS.items():
        theirs[name] = getattr(config, ours)
    theirs["tie_word_embeddings"] = config.tie_embeddings
    theirs["attention_bias"] = config.qkv_bias
    # transformers 5 reads the first name of each pair, transformers 4 the second
    theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    theirs["rope_theta"] = config.rope_theta
    if config.rope_factor > 1:
        # beta_fast=32, beta_slow=1 and attention_factor=0.1 ln(factor) + 1 are transformers' defaults, too
        theirs["rope_parameters"].update(rope_type="yarn", factor=config.rope_factor,
                                         original_max_position_embeddings=config.rope_original_len)
        theirs["rope_scaling"] = theirs["rope_parameters"]
    theirs["dtype"] = "float32"
    theirs["torch_dtype"] = "float32"
    if config.n_experts:
        for ours, name in EXPERT_FIELDS.items():
            theirs[name] = getattr(config, ours)
        theirs["tie_word_embeddings"] = False                               # see hf_views
        theirs["n_shared_experts"] = config.n_shared_experts or 1           # see experts_views
        theirs["use_qk_norm"] = config.qk_norm
        theirs["topk_group"] = 1
        theirs["norm_topk_prob"] = config.n_active_experts > 1      # as in MoE.forward
        theirs["num_nextn_predict_layers"] = 0      # no layer that guesses the token after the next
        # Glm4Moe turns only half of a head's channels unless it is told otherwise
        theirs["partial_rotary_factor"] = 1.0
        theirs["rope_parameters"]["partial_rotary_factor"] = 1.0
    return theirs


def config_from_hf(theirs):
    """Return the ModelConfig of a config.json (a dict), or exit naming what our model cannot compute."""
    kind = theirs.get("model_type")
    known = ("llama", "qwen2", "qwen3", "glm4_moe")
    check(kind in known, f"config.json says model_type={kind!r}; what can be imported is {', '.join(known)}")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}

    # refuse, by name, what would load and then compute something else
    wanted = dict(ALWAYS)
    found = {name: value if theirs.get(name) is None else theirs[name] for name, value in ALWAYS.items()}
    factor = 1.0
    original_len = 0
    wanted["rope_type"] = "default"
    found["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if found["rope_type"] == "yarn":
        factor = rope.get("factor")
        check(factor, "config.json says rope_type='yarn', but not by which factor")
        original_len = rope.get("original_max_position_embeddings") or theirs.get("max_position_embeddings")
        usual = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "attention_factor": 0.1 * math.log(factor) + 1,
                 "truncate": True, "mscale": None, "mscale_all_dim": None}
        wanted.update(usual)
        for name, value in usual.items():
            found[name] = value if rope.get(name) is None else rope[name]
    wanted["partial_rotary_factor"] = 1.0
    usual = 0.5 if kind == "glm4_moe" else 1.0
    found["partial_rotary_factor"] = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", usual))
    if kind == "glm4_moe":
        # the weights of several experts sum to 1, before routed_scaling_factor; that of a single one is its own
        wanted["norm_topk_prob"] = theirs.get("num_experts_per_tok") != 1
        found["norm_topk_prob"] = theirs.get("norm_topk_prob", True)
    for name, value in wanted.items():
        check(found[name] == value,
              f"config.json says {name}={found[name]!r}; our model computes {name}={value!r} alone")

    # the rest is a matter of names
    fields = {**FIELDS, **EXPERT_FIELDS} if kind == "glm4_moe" else FIELDS
    config = {ours: theirs.get(name) for ours, name in fields.items()}
    for name in ("n_kv_heads", "head_dim"):
        config[name] = config[name] or 0    # older files leave them out: as many as query heads, dim / n_heads
    missing = [fields[ours] for ours, value in config.items() if value is None]
    check(not missing, f"config.json does not say {', '.join(missing)}")
    # Qwen's files switch YaRN on and leave max_position_embeddings as it was
    config["max_seq_len"] = max(config["max_seq_len"], int(factor * original_len))
    return ModelConfig(
        **config,
        rope_factor=factor,
        rope_original_len=original_len,
        rope_theta=rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0,
        tie_embeddings=bool(theirs.get("tie_word_embeddings")),
        qkv_bias=kind == "qwen2" or bool(theirs.get("attention_bias")),
        qk_norm=kind == "qwen3" or bool(theirs.get("use_qk_norm")))
