"""model.py against independent implementations: transformers, F.cross_entropy, and plain loops."""
import math

import pytest
import torch
import torch.nn.functional as F
from oracles import C, KINDS, T, V, config_of, random_model, twin

import model as model_file
from common.generate import generate
from common.loss import cross_entropy, token_logps
from model import KVCache, MoE, ModelConfig, ScalarModel, Transformer, document_positions


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def largest(difference):
    return difference.abs().max().item()


def logits_of(model, ids, docs=None):
    """ids (B, T) -> logits (B, T, V)."""
    return model.logits(model(ids, docs))


def loss_of(model, ids, targets, weights=None, docs=None):
    return cross_entropy(model(ids, docs), model.head_weight, targets, weights)


# ---------------------------------------------------------------------------- logits


@pytest.mark.parametrize("seed", range(3))
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


def test_the_oracle_sees_every_switch():
    """Each special feature must change the logits: otherwise the parity above would not notice that it is missing."""
    ids = torch.randint(0, V, (1, T))
    with torch.no_grad():
        for kind, spoil in [("qwen2", lambda m: m.blocks[0].attn.qkv.bias.zero_()),
                            ("qwen3", lambda m: m.blocks[0].attn.k_norm.weight.fill_(1)),
                            ("llama", lambda m: m.blocks[1].ffn_norm.weight.fill_(1)),
                            ("dots1", lambda m: m.blocks[1].ffn.bias.zero_()),
                            ("dots1", lambda m: setattr(m.blocks[1].ffn, "scale", 1.0)),
                            ("dots1", lambda m: setattr(m.blocks[1].ffn, "shared", None))]:
            ours = random_model(kind, 1)
            before = logits_of(ours, ids)
            spoil(ours)
            assert largest(logits_of(ours, ids) - before) > 1e-3, kind


def test_tied_model_has_one_matrix():
    tied, untied = random_model("llama"), random_model("llama_gqa")
    assert tied.head_weight is tied.embed.weight and tied.lm_head is None
    assert untied.head_weight is untied.lm_head.weight
    assert len(set(tied.state_dict())) == len(tied.state_dict()) and "lm_head.weight" not in tied.state_dict()


def test_config_defaults_and_errors():
    c = ModelConfig(dim=512, n_heads=8)
    assert (c.n_kv_heads, c.head_dim, c.hidden_dim) == (8, 64, 1408)  # 8/3 * 512 = 1365.3, up to 22 * 64
    with pytest.raises(ValueError, match="n_heads=6 must be a multiple of n_kv_heads=4"):
        ModelConfig(n_heads=6, n_kv_heads=4, head_dim=8)
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        ModelConfig(head_dim=7)


def test_default_expert_width_works():
    """The width that ModelConfig chooses for an expert must be one that the grouped product accepts: 128 / 3 is not."""
    c = config_of("llama", dim=40, n_heads=2, hidden_dim=0, n_experts=4, n_active_experts=2, n_shared_experts=1)
    assert (c.hidden_dim, c.expert_hidden_dim) == (128, 48)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(Transformer(c), torch.randint(0, V, (2, 8)), torch.randint(0, V, (2, 8)))
        loss.backward()
        assert loss.isfinite()
    with pytest.raises(ValueError, match="dim=40 and expert_hidden_dim=42 must be multiples of 8"):
        config_of("llama", dim=40, n_heads=2, n_experts=4, expert_hidden_dim=42)
    with pytest.raises(ValueError, match="n_active_experts=5 of only n_experts=4"):
        config_of("llama", n_experts=4, n_active_experts=5)


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


def test_counts():
    """Llama 2 7B and 13B have the published numbers of parameters; a MoE counts its idle experts apart."""
    with torch.device("meta"):
        seven = Transformer(ModelConfig(32000, 4096, 32, 32, hidden_dim=11008, max_seq_len=16, tie_embeddings=False))
        thirteen = Transformer(ModelConfig(32000, 5120, 40, 40, hidden_dim=13824, max_seq_len=16, tie_embeddings=False))
        eight = Transformer(ModelConfig(128256, 4096, 32, 32, 8, hidden_dim=14336, max_seq_len=16,
                                        tie_embeddings=False))
        qwen3 = Transformer(ModelConfig(151936, 1024, 28, 16, 8, head_dim=128, hidden_dim=3072, max_seq_len=16,
                                        qk_norm=True))
    assert seven.count() == (6_738_415_616, 6_738_415_616 - 32000 * 4096)
    assert thirteen.count()[0] == 13_015_864_320
    assert eight.count()[0] == 8_030_261_248    # Llama 3 8B
    assert qwen3.count()[0] == 596_049_920      # Qwen3 0.6B
    assert seven.flops_per_token(100) == 6 * (6_738_415_616 - 32000 * 4096) + 6 * 32 * 4096 * 100
    moe = random_model("dots1")
    total, active = moe.count()
    expert = 3 * C * 16                          # gate, up, down
    assert total == sum(p.numel() for p in moe.parameters())
    assert total - active == V * C + 2 * (8 - 3) * expert  # input embedding; 5 of 8 experts idle in each of 2 layers


def test_rotation_at_far_positions():
    """The unit vector of pair i is turned by position * theta^(-2i/D), computed here in double precision."""
    config = ModelConfig(max_seq_len=32768, rope_theta=1e6, dim=64, n_heads=1)
    cos, sin = (table[:, None] for table in model_file.rope_table(config))         # (T, 1, ...)
    for i in (0, 5, 31):
        turned = model_file.rotate(F.one_hot(torch.tensor(i), 64).float().expand(1, 32768, 1, 64), cos, sin)
        for position in (0, 1, 1000, 32767):
            angle = position * 1e6 ** (-2 * i / 64)
            wanted = torch.zeros(64)
            wanted[i], wanted[i + 32] = math.cos(angle), math.sin(angle)
            assert largest(turned[0, position, 0] - wanted) < 4e-3


# ---------------------------------------------------------------------------- cache, padding, packing


def test_document_positions_by_hand():
    docs = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 4, 4, 4, 9, 9]])
    assert document_positions(docs).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]


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
    model = random_model(kind, 6)
    ids = torch.randint(0, V, (4, 20))
    cache = KVCache(model.config, torch.zeros(4, dtype=torch.long), 20, torch.float32)
    parts = [model(ids[:, :5], cache=cache)] + [model(ids[:, t:t + 1], cache=cache) for t in range(5, 20)]
    assert not cache.ragged
    assert largest(model.logits(torch.cat(parts, dim=1)) - logits_of(model, ids)) < 2e-5


def test_a_filled_cache_takes_one_token():
    model = random_model("llama")
    cache = KVCache(model.config, torch.zeros(1, dtype=torch.long), 20, torch.float32)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
        with pytest.raises(AssertionError, match="one token at a time, got 3"):
            model(torch.zeros(1, 3, dtype=torch.long), cache=cache)


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


def test_packed_loss_and_logps():
    model = random_model("llama_gqa", 8)
    a, b = torch.randint(0, V, (1, 9)), torch.randint(0, V, (1, 6))
    ids, targets = torch.cat([a[:, :-1], b[:, :-1]], 1), torch.cat([a[:, 1:], b[:, 1:]], 1)
    docs = torch.tensor([[0] * 8 + [1] * 5])
    with torch.no_grad():
        wanted = (8 * loss_of(model, a[:, :-1], a[:, 1:]) + 5 * loss_of(model, b[:, :-1], b[:, 1:])) / 13
        assert loss_of(model, ids, targets, docs=docs).item() == pytest.approx(wanted.item(), rel=1e-5)
        logps = token_logps(model, ids, targets, torch.ones(1, 13), docs=docs)
        assert -logps.mean().item() == pytest.approx(wanted.item(), rel=1e-5)


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


# ---------------------------------------------------------------------------- mixture of experts


def plain_moe(moe, x):
    """The same layer, token by token and expert by expert, from the paper (DeepSeek-V3, eq. 12-16)."""
    out = []
    for token in x.reshape(-1, x.size(-1)):
        scores = [torch.sigmoid(token @ moe.router.weight[e]) for e in range(len(moe.bias))]
        biased = [s.item() + moe.bias[e].item() for e, s in enumerate(scores)]
        best = sorted(range(len(scores)), key=lambda e: -biased[e])[:moe.k]
        total = sum(scores[e] for e in best)
        y = torch.zeros_like(token)
        for e in best:
            gate, up = (token @ moe.gate_up[e]).chunk(2)
            y = y + scores[e] / total * moe.scale * ((F.silu(gate) * up) @ moe.down[e])
        if moe.shared is not None:
            gate, up = (moe.shared.gate_up.weight @ token).chunk(2)
            y = y + moe.shared.down.weight @ (F.silu(gate) * up)
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, {"n_active_experts": 1}, {"n_active_experts": 8},
                                     {"n_experts": 64, "n_active_experts": 6}])
def test_moe_equals_plain_loop(changes):
    moe = random_model("dots1", 10, **changes).blocks[1].ffn
    x = torch.randn(3, 7, C, requires_grad=True)
    mix = torch.randn(3, 7, C)
    wanted = plain_moe(moe, x)
    params = dict(moe.named_parameters(), x=x)
    wanted_grads = torch.autograd.grad((wanted * mix).sum(), params.values())
    got = moe(x)
    assert largest(got - wanted) < 1e-5
    for name, a, b in zip(params, torch.autograd.grad((got * mix).sum(), params.values()), wanted_grads):
        assert largest(a - b) < 2e-5, name


def test_first_dense_layers():
    model = Transformer(config_of("dots1", n_layers=4, first_dense=2))
    assert [isinstance(block.ffn, MoE) for block in model.blocks] == [False, False, True, True]


def test_router_bias_has_no_gradient_and_is_saved():
    model = random_model("dots1")
    assert not any(name.endswith("ffn.bias") for name, _ in model.named_parameters())
    assert "blocks.1.ffn.bias" in model.state_dict() and "blocks.1.ffn.load" not in model.state_dict()
    loss_of(model, torch.randint(0, V, (2, 8)), torch.randint(0, V, (2, 8))).backward()
    assert not model.blocks[1].ffn.bias.requires_grad and model.blocks[1].ffn.bias.grad is None


def test_load_is_counted_in_training_only():
    model = random_model("dots1")
    ids = torch.randint(0, V, (2, 8))
    moe = model.blocks[1].ffn
    model(ids)
    generate(model, [[1, 2]], 3)
    assert moe.load.sum() == 0
    before = moe.bias.clone()
    model.update_router_bias(0.1)   # nothing was counted, so nothing moves: frozen
    assert torch.equal(moe.bias, before)
    model.train()
    model(ids)
    model(ids)
    assert moe.load.sum() == 2 * 16 * 3  # two passes, 16 tokens, 3 experts each


def test_router_bias_goes_against_the_load():
    model = random_model("dots1").train()
    moe = model.blocks[1].ffn
    before = moe.bias.clone()
    moe.load.copy_(torch.tensor([9.0, 1, 4, 4, 4, 6, 2, 2]))  # mean 4
    other = model.blocks[2].ffn
    other.load.fill_(4)
    model.update_router_bias(0.25)
    assert largest(moe.bias - before - 0.25 * torch.tensor([-1.0, 1, 0, 0, 0, -1, 1, 1])) < 1e-6
    assert moe.load.sum() == 0 and other.load.sum() == 0


def test_router_bias_uses_the_load_of_all_processes():
    model = random_model("dots1").train()
    moe = model.blocks[1].ffn
    before = moe.bias.clone()
    moe.load.copy_(torch.tensor([8.0] + [0.0] * 7))

    def all_reduce(load):  # the other process sent all its tokens elsewhere
        load += torch.tensor([0.0] + [9.0] * 7) if load.sum() else 0

    model.update_router_bias(0.5, all_reduce)
    assert (moe.bias - before).sign().tolist() == [1.0] + [-1.0] * 7


def test_balancing_lowers_the_load_of_the_busiest_expert():
    """Train two models alike whose tokens look alike and favour one expert; with balancing that expert gets less."""
    shares = {}
    for rate in (0.0, 0.01):
        torch.manual_seed(1)
        model = random_model("dots1", 11).train()
        with torch.no_grad():
            model.embed.weight += 0.1
            for block in model.blocks[1:]:
                block.ffn.bias.zero_()
                block.ffn.router.weight[0] += 0.1
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        shares[rate] = []
        for step in range(80):
            ids = torch.randint(0, V, (8, 17))
            loss_of(model, ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
            loads = [block.ffn.load for block in model.blocks[1:]]
            shares[rate].append(max((load.max() / load.mean()).item() for load in loads))
            model.update_router_bias(rate)
    first, last = sum(shares[0.01][:5]) / 5, sum(shares[0.01][-10:]) / 10
    without = sum(shares[0.0][-10:]) / 10
    assert first > 2, f"the test must begin unbalanced, got {first:.2f} times the mean"
    assert last < 0.75 * first and last < 0.7 * without, f"{first:.2f} to {last:.2f}, without balancing {without:.2f}"


@torch.no_grad()
def test_router_by_hand():
    """8 tokens, 8 experts, one active; the router is the identity, so a token of direction i goes to expert i."""
    moe = Transformer(config_of("dots1", dim=8, n_experts=8, n_active_experts=1)).blocks[1].ffn.train()
    moe.router.weight.copy_(torch.eye(8))
    moe(5 * torch.eye(8)[[0, 0, 0, 2, 7, 7, 0, 2]])
    assert moe.load.tolist() == [4, 0, 2, 0, 0, 0, 0, 2]


@torch.no_grad()
def test_router_ignores_autocast():
    """Which experts a token goes to is decided in fp32, also where products run in bf16."""
    moe = random_model("dots1", 12).blocks[1].ffn.train()
    x = torch.randn(400, C)
    moe(x)
    wanted = moe.load.clone()
    moe.load.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert torch.equal(moe.load, wanted)
    assert largest(y.float() - moe(x)) < 0.2


# ---------------------------------------------------------------------------- blocks computed twice


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_blocks_keeps_less_and_gives_the_same_gradients(kind):
    ids = torch.randint(0, V, (2, T))
    kept = {}
    gradients = {}
    for twice in (False, True):
        model = random_model(kind, 14, n_layers=4).train()
        model.checkpoint_blocks = twice
        kept[twice] = 0

        def pack(x):
            kept[twice] += 0 if isinstance(x, torch.nn.Parameter) else x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = loss_of(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients[twice] = {name: p.grad for name, p in model.named_parameters()}
    assert kept[True] < kept[False] / 4
    for name, wanted in gradients[False].items():
        assert largest(gradients[True][name] - wanted) < 1e-6, name
    # nothing to compute again where no gradients are wanted, and the cache works as ever
    with torch.no_grad():
        model.eval()
        wanted = generate(random_model(kind, 14, n_layers=4), [[1, 2, 3]], 5, temperature=0)
        assert generate(model, [[1, 2, 3]], 5, temperature=0) == wanted


# ---------------------------------------------------------------------------- on a GPU, where there is one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu(kind):
    model = random_model(kind, 13)
    ids = torch.randint(0, V, (2, 33))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    logits, greedy = logits_of(model, ids).detach(), generate(model, prompts, 20, temperature=0)
    loss = loss_of(model, ids[:, :-1], ids[:, 1:])
    loss.backward()
    gradient = model.blocks[1].ffn.down.grad if kind == "dots1" else model.blocks[1].ffn.down.weight.grad
    cuda = random_model(kind, 13).cuda()
    gpu_ids = ids.cuda()
    assert largest(logits_of(cuda, gpu_ids).detach().cpu() - logits) < 1e-4
    assert generate(cuda, prompts, 20, temperature=0) == greedy
    gpu_loss = loss_of(cuda, gpu_ids[:, :-1], gpu_ids[:, 1:])
    gpu_loss.backward()
    there = cuda.blocks[1].ffn.down.grad if kind == "dots1" else cuda.blocks[1].ffn.down.weight.grad
    assert gpu_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert largest(there.cpu() - gradient) < 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        half = loss_of(cuda, gpu_ids[:, :-1], gpu_ids[:, 1:])
        half.backward()
    assert half.item() == pytest.approx(loss.item(), abs=0.05)


def test_attention_on_cpus_is_in_fp32_under_autocast(monkeypatch):
    """Autocast would round q, k and v to bf16 again, in which attention takes three times as long there."""
    results = []
    real = model_file.attend

    def spy(*args):
        results.append(real(*args))
        return results[-1]

    monkeypatch.setattr(model_file, "attend", spy)
    model = random_model("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(0, model.config.vocab_size, (2, 8)))
    assert len(results) == model.config.n_layers and all(y.dtype == torch.float32 for y in results)
