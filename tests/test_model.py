"""model.py: its parts by hand, and the whole against transformers, with the same random weights in both."""
import math

import pytest
import torch
import torch.nn.functional as F
from oracles import C, KINDS, T, V, config_of, random_model, twin

from common.loss import cross_entropy
from model import KVCache, ModelConfig, ScalarModel, Transformer, rope_table
from tools.hf_names import hf_config


def largest(difference):
    return difference.abs().max().item()


def logits_of(model, ids, docs=None):
    """ids (B, T) -> logits (B, T, V)."""
    return model.logits(model(ids, docs))


def loss_of(model, ids, targets, docs=None):
    return cross_entropy(model(ids, docs), model.head_weight, targets)


# ---------------------------------------------------------------------------- parts, by hand


def test_config_defaults_and_errors():
    c = ModelConfig(dim=512, n_heads=8)
    assert (c.n_kv_heads, c.head_dim, c.hidden_dim) == (8, 64, 1408)  # 8/3 * 512 = 1365.3, up to 22 * 64
    for changes, words in [(dict(n_heads=6, n_kv_heads=4, head_dim=8), "n_heads=6 must be a multiple of n_kv_heads=4"),
                           (dict(head_dim=7), "head_dim=7 must be even"),
                           (dict(rope_factor=4.0), "rope_factor=4.0 must be 1, or more with a rope_original_len")]:
        with pytest.raises(ValueError, match=words):
            ModelConfig(**changes)


@pytest.mark.parametrize("theta, length, factor", [(1e4, 128, 4.0), (1e6, 32768, 4.0), (5e5, 8192, 2.5)])
def test_yarn_equals_transformers(theta, length, factor):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(dim=128, n_heads=1, max_seq_len=4, rope_theta=theta, rope_original_len=length)
    cos, sin = rope_table(config)   # a factor of 1: plain, to the last bit
    plain = torch.outer(torch.arange(4.0), theta ** -(torch.arange(0, 128, 2).float() / 128))
    assert torch.equal(cos, plain.cos()) and torch.equal(sin, plain.sin())

    config.rope_factor = factor
    theirs = transformers.AutoConfig.for_model(**hf_config(config))
    frequency, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    cos, sin = rope_table(config)
    torch.testing.assert_close(torch.atan2(sin[1], cos[1]), frequency, rtol=1e-6, atol=0)
    torch.testing.assert_close(cos[0], torch.full((64,), scale))


# ---------------------------------------------------------------------------- the whole, against transformers


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, seed):
    pytest.importorskip("transformers")
    ours = random_model(kind, seed)
    ids = torch.randint(0, V, (2, T))
    with torch.no_grad():
        assert largest(logits_of(ours, ids) - twin(ours, kind)(ids).logits) < 1e-5


@pytest.mark.parametrize("kind", ["llama_gqa", "dots1"])
def test_gradients_equal_transformers(kind):
    pytest.importorskip("transformers")
    ours = random_model(kind, 5)
    theirs = twin(ours, kind)
    ids = torch.randint(1, V, (2, 20))  # token 0 pads: transformers gives its embedding no gradient
    loss_of(ours, ids[:, :-1], ids[:, 1:]).backward()
    theirs(ids, labels=ids).loss.backward()
    theirs = dict(theirs.named_parameters())
    assert largest(ours.embed.weight.grad - theirs["model.embed_tokens.weight"].grad) < 1e-5
    assert largest(ours.lm_head.weight.grad - theirs["lm_head.weight"].grad) < 1e-5
    q, theirs_q = ours.blocks[0].attn.qkv.weight.grad[:C], theirs["model.layers.0.self_attn.q_proj.weight"].grad
    assert largest(q - theirs_q) < 1e-5
    if kind == "dots1":
        for i in (1, 2):
            ffn, name = ours.blocks[i].ffn, f"model.layers.{i}.mlp"
            assert largest(ffn.router.weight.grad - theirs[f"{name}.gate.weight"].grad) < 1e-5
            assert largest(ffn.down.grad - theirs[f"{name}.experts.down_proj"].grad.transpose(1, 2)) < 1e-5


def test_tied_model_has_one_matrix():
    tied, untied = random_model("llama"), random_model("llama_gqa")
    assert tied.head_weight is tied.embed.weight and tied.lm_head is None
    assert untied.head_weight is untied.lm_head.weight
    assert len(set(tied.state_dict())) == len(tied.state_dict()) and "lm_head.weight" not in tied.state_dict()


def test_init():
    model = Transformer(config_of("qwen2", n_layers=8, dim=128, hidden_dim=256))
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for residual in (model.blocks[3].attn.out.weight, model.blocks[3].ffn.down.weight):
        assert residual.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8 layers) = 4
    assert not model.blocks[0].attn.qkv.bias.any()
    assert (model.norm.weight == 1).all()
    loss = loss_of(model, torch.randint(0, V, (4, T)), torch.randint(0, V, (4, T)))
    assert loss.item() == pytest.approx(math.log(V), abs=0.1)


def test_published_sizes():
    """Llama 2 7B and 13B, Llama 3 8B and Qwen3 0.6B have the published numbers of parameters."""
    llama = dict(max_seq_len=16, tie_embeddings=False)
    with torch.device("meta"):
        for config, n in [(ModelConfig(32000, 4096, 32, 32, hidden_dim=11008, **llama), 6_738_415_616),
                          (ModelConfig(32000, 5120, 40, 40, hidden_dim=13824, **llama), 13_015_864_320),
                          (ModelConfig(128256, 4096, 32, 32, 8, hidden_dim=14336, **llama), 8_030_261_248),
                          (ModelConfig(151936, 1024, 28, 16, 8, head_dim=128, hidden_dim=3072, max_seq_len=16,
                                       qk_norm=True), 596_049_920)]:
            assert sum(p.numel() for p in Transformer(config).parameters()) == n


# ---------------------------------------------------------------------------- cache, padding, packing


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cache_and_left_padding_equal_full_forward(kind):
    """Prompts of 1, 4 and 9 tokens, left-padded, then 12 decoded one at a time: each logit as if the row were alone."""
    model = random_model(kind, 4)
    rows = [torch.randint(1, V, (n + 12,)) for n in (1, 4, 9)]
    pad = torch.tensor([9 - 1, 9 - 4, 0])
    batch = torch.stack([F.pad(row[:len(row) - 12], (9 - (len(row) - 12), 0)) for row in rows])
    cache = KVCache(model.config, pad, 9 + 12, torch.float32)
    steps = [model(batch, cache=cache)]
    for t in range(12):
        token = torch.stack([row[len(row) - 12 + t] for row in rows])
        steps.append(model(token[:, None], cache=cache))
    logits = model.logits(torch.cat(steps, dim=1))                                 # (3, 9 + 12, V)
    for i, row in enumerate(rows):
        assert largest(logits[i, pad[i]:] - logits_of(model, row[None])[0]) < 2e-5, f"row {i}"
    assert cache.length == 21


@pytest.mark.parametrize("kind", ["llama", "llama_gqa", "qwen3"])
@torch.no_grad()
def test_cache_without_padding(kind):
    """Token by token as all at once; a filled cache takes one at a time."""
    model = random_model(kind, 6)
    ids = torch.randint(0, V, (4, 20))
    cache = KVCache(model.config, torch.zeros(4, dtype=torch.long), 20, torch.float32)
    parts = [model(ids[:, :5], cache=cache)] + [model(ids[:, t:t + 1], cache=cache) for t in range(5, 20)]
    assert not cache.ragged
    assert largest(model.logits(torch.cat(parts, dim=1)) - logits_of(model, ids)) < 2e-5
    with pytest.raises(AssertionError, match="one token at a time, got 3"):
        model(ids[:, :3], cache=cache)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_equal_each_alone(kind):
    model = random_model(kind, 7)
    lengths = [[3, 1, 8, 5], [10, 6, 1]]
    rows = [[torch.randint(0, V, (n,)) for n in row] for row in lengths]
    ids = torch.stack([torch.cat(row) for row in rows])
    docs = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    packed = logits_of(model, ids, docs)
    for row, got in zip(rows, packed):
        alone = torch.cat([logits_of(model, document[None])[0] for document in row])
        assert largest(got - alone) < 2e-5
    assert largest(packed - logits_of(model, ids)) > 1e-2  # without docs they do see each other


@torch.no_grad()
def test_no_token_sees_the_future():
    for kind in KINDS:
        model = random_model(kind, 9)
        ids = torch.randint(0, V, (1, 20))
        other = ids.clone()
        other[0, 12:] = (other[0, 12:] + 1) % V
        a, b = logits_of(model, ids), logits_of(model, other)
        assert largest(a[0, :12] - b[0, :12]) < 1e-5 and largest(a[0, 12:] - b[0, 12:]) > 1e-2


@torch.no_grad()
def test_scalar_model():
    config = config_of("llama_gqa")
    scalar = ScalarModel(config)
    ids = torch.randint(0, V, (2, 9))
    scores = scalar(ids)
    assert scores.shape == (2, 9) and scores.dtype == torch.float32
    assert largest(scores - (scalar.trunk(ids) @ scalar.head.weight[0] + scalar.head.bias)) < 1e-5
    assert scalar.head.weight.std().item() == pytest.approx(1 / math.sqrt(C + 1), rel=0.3)
    # the trunk takes a Transformer's weights under their own names (but the head)
    weights = {k: v for k, v in random_model("llama_gqa").state_dict().items() if k != "lm_head.weight"}
    scalar.trunk.load_state_dict(weights, strict=True)
    alone = scalar(ids[:, :4])
    packed = scalar(torch.cat([ids[:, :4], ids[:, :4]], 1), docs=torch.tensor([[0] * 4 + [1] * 4] * 2))
    assert largest(packed - torch.cat([alone, alone], 1)) < 2e-5
