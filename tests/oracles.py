"""
What the tests compare with: random models of every kind, and the same weights in transformers' classes.
The names come from tools/hf_names.py, which export.py uses too.

Not a test file; needs transformers only inside twin().
"""
import torch

from model import ModelConfig, Transformer
from tools.hf_names import hf_config, hf_views

V, C, T = 96, 32, 48  # vocabulary, channels and longest sequence of the models below

# one configuration for each kind of model that ModelConfig can say
KINDS = {
    "llama": dict(),
    "llama_gqa": dict(n_heads=8, n_kv_heads=2, tie_embeddings=False, rope_theta=500000.0, norm_eps=1e-6),
    "qwen2": dict(n_kv_heads=2, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen3": dict(n_kv_heads=2, qk_norm=True, head_dim=16, norm_eps=1e-6),
    "yarn": dict(n_kv_heads=2, qk_norm=True, head_dim=16, rope_theta=100.0, rope_factor=4.0, rope_original_len=24),
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


def twin(model, kind):
    """Return transformers' model of the same kind with our weights: Dots1 for "dots1", else the class export names."""
    import transformers
    config = hf_config(model.config)
    if kind == "dots1":     # the same weights under the same names, in a class of other authors
        config.update(model_type="dots1", architectures=["Dots1ForCausalLM"], sliding_window=None)
    config = transformers.AutoConfig.for_model(**config, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    theirs, report = getattr(transformers, config.architectures[0]).from_pretrained(
        None, config=config, state_dict=their_names(model), attn_implementation="eager", output_loading_info=True)
    wrong = {name: found for name, found in report.items() if found}
    assert not wrong, f"not the same tensors: {wrong}"
    return theirs.float().eval()


def their_names(model):
    """Return copies of our weights under transformers' names."""
    return {name: tensor.clone() for name, tensor in hf_views(model).items()}
