"""
What the tests compare with: random models of every kind, and the same weights in transformers' classes.

Not a test file; needs transformers only inside twin().
"""
import torch

from model import ModelConfig, Transformer

V, C, T = 96, 32, 48  # vocabulary, channels and longest sequence of the models below

# one configuration for each kind of model that ModelConfig can say
KINDS = {
    "llama": dict(),
    "llama_gqa": dict(n_heads=8, n_kv_heads=2, tie_embeddings=False, rope_theta=500000.0, norm_eps=1e-6),
    "qwen2": dict(n_kv_heads=2, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen3": dict(n_kv_heads=2, qk_norm=True, head_dim=16, norm_eps=1e-6),
    "dots1": dict(n_kv_heads=2, qk_norm=True, tie_embeddings=False, n_layers=3, n_experts=8, n_active_experts=3,
                  n_shared_experts=2, expert_hidden_dim=16, first_dense=1, route_scale=2.5),
}


def config_of(kind, **changes):
    """Return the small ModelConfig of KINDS[kind]."""
    return ModelConfig(**{**dict(vocab_size=V, dim=C, n_layers=2, n_heads=4, hidden_dim=80, max_seq_len=T),
                          **KINDS[kind], **changes})


@torch.no_grad()
def random_model(kind, seed=0, **changes):
    """Return a Transformer whose every parameter is random: gains, biases, router and its balancing bias as well."""
    g = torch.Generator().manual_seed(seed)
    model = Transformer(config_of(kind, **changes))
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if name.endswith("norm.weight"):
            p.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            p.copy_(0.5 * noise)
        elif p.dim() == 3:  # experts (E, in, out)
            p.copy_(0.6 * noise / p.size(1) ** 0.5)
        else:
            p.copy_(noise / C ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=g))
    return model.eval()


@torch.no_grad()
def twin(model, kind):
    """Return transformers' model of the same kind with our weights copied in, name by name."""
    import transformers
    c = model.config
    common = dict(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, use_cache=True,
                  num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
                  max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
                  rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, pad_token_id=0,
                  bos_token_id=None, eos_token_id=None, attn_implementation="eager")
    if kind.startswith("llama"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, head_dim=c.head_dim))
    elif kind == "qwen2":
        theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    elif kind == "qwen3":
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, head_dim=c.head_dim))
    else:
        theirs = transformers.Dots1ForCausalLM(transformers.Dots1Config(
            **common, head_dim=c.head_dim, moe_intermediate_size=c.expert_hidden_dim, n_routed_experts=c.n_experts,
            n_shared_experts=c.n_shared_experts, num_experts_per_tok=c.n_active_experts, norm_topk_prob=True,
            first_k_dense_replace=c.first_dense, routed_scaling_factor=c.route_scale, sliding_window=None))
    theirs.load_state_dict(their_names(model), strict=False)
    unused = theirs.state_dict().keys() - their_names(model).keys()
    assert unused <= ({"lm_head.weight"} if c.tie_embeddings else set()), f"not copied: {sorted(unused)}"
    return theirs.float().eval()


def their_names(model):
    """Return our weights under transformers' names, fused matrices cut apart."""
    c, out = model.config, {}
    rows = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]

    def feed_forward(ffn, name):
        gate, up = ffn.gate_up.weight.chunk(2)
        out.update({f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up,
                    f"{name}.down_proj.weight": ffn.down.weight})

    out["model.embed_tokens.weight"] = model.embed.weight
    out["model.norm.weight"] = model.norm.weight
    if model.lm_head is not None:
        out["lm_head.weight"] = model.lm_head.weight
    for i, block in enumerate(model.blocks):
        name = f"model.layers.{i}"
        out[f"{name}.input_layernorm.weight"] = block.attn_norm.weight
        out[f"{name}.post_attention_layernorm.weight"] = block.ffn_norm.weight
        out[f"{name}.self_attn.o_proj.weight"] = block.attn.out.weight
        for letter, part in zip("qkv", block.attn.qkv.weight.split(rows)):
            out[f"{name}.self_attn.{letter}_proj.weight"] = part
        if c.qkv_bias:
            for letter, part in zip("qkv", block.attn.qkv.bias.split(rows)):
                out[f"{name}.self_attn.{letter}_proj.bias"] = part
        if c.qk_norm:
            out[f"{name}.self_attn.q_norm.weight"] = block.attn.q_norm.weight
            out[f"{name}.self_attn.k_norm.weight"] = block.attn.k_norm.weight
        if not hasattr(block.ffn, "router"):
            feed_forward(block.ffn, f"{name}.mlp")
            continue
        out[f"{name}.mlp.gate.weight"] = block.ffn.router.weight
        out[f"{name}.mlp.gate.e_score_correction_bias"] = block.ffn.bias
        out[f"{name}.mlp.experts.gate_up_proj"] = block.ffn.gate_up.transpose(1, 2)  # theirs are (E, out, in)
        out[f"{name}.mlp.experts.down_proj"] = block.ffn.down.transpose(1, 2)
        if block.ffn.shared is not None:
            feed_forward(block.ffn.shared, f"{name}.mlp.shared_experts")
    return {k: v.detach().clone().contiguous() for k, v in out.items()}
