"""The mixture of experts: against a plain loop, how its load is counted and balanced, and its odd sizes."""
import pytest
import torch
import torch.nn.functional as F
from oracles import C, V, config_of, random_model
from small_runs import MOE, run, settings

from common.generate import generate
from common.loss import cross_entropy
from model import MoE, Transformer


def largest(difference):
    return difference.abs().max().item()


def loss_of(model, ids, targets):
    return cross_entropy(model(ids), model.head_weight, targets)


def test_router_by_hand():
    """8 tokens, 8 experts, one active; the router is the identity, so a token of direction i goes to expert i."""
    moe = Transformer(config_of("dots1", dim=8, n_experts=8, n_active_experts=1)).blocks[1].ffn
    moe.router.weight.data = torch.eye(8)
    moe(5 * torch.eye(8)[[0, 0, 0, 2, 7, 7, 0, 2]])
    assert moe.load.tolist() == [4, 0, 2, 0, 0, 0, 0, 2]


def plain_moe(moe, x):
    """The same layer, token by token and expert by expert, from the paper (DeepSeek-V3, eq. 12-16)."""
    out = []
    for token in x.reshape(-1, x.size(-1)):
        scores = [torch.sigmoid(token @ moe.router.weight[e]) for e in range(len(moe.bias))]
        biased = [s.item() + moe.bias[e].item() for e, s in enumerate(scores)]
        best = sorted(range(len(scores)), key=lambda e: -biased[e])[:moe.k]
        # one expert's weight is its score: of w / w the router would get no gradient
        total = sum(scores[e] for e in best) if moe.k > 1 else 1.0
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
    # padding does not count in the balance, but is computed as any other token
    got = moe(x, real=(torch.arange(7) < 5).expand(3, 7))
    assert largest(got - wanted) < 1e-5 and moe.load.sum() == 3 * 5 * moe.k
    for name, a, b in zip(params, torch.autograd.grad((got * mix).sum(), params.values()), wanted_grads):
        assert largest(a - b) < 2e-5, name


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


def test_first_dense_layers():
    model = Transformer(config_of("dots1", n_layers=4, first_dense=2))
    assert [isinstance(block.ffn, MoE) for block in model.blocks] == [False, False, True, True]


def test_router_bias_has_no_gradient_and_is_saved():
    model = random_model("dots1")
    assert not any(name.endswith("ffn.bias") for name, _ in model.named_parameters())
    assert "blocks.1.ffn.bias" in model.state_dict() and "blocks.1.ffn.load" not in model.state_dict()
    loss_of(model, torch.randint(0, V, (2, 8)), torch.randint(0, V, (2, 8))).backward()
    assert not model.blocks[1].ffn.bias.requires_grad and model.blocks[1].ffn.bias.grad is None


def test_load_is_counted_where_gradients_are():
    model = random_model("dots1")
    ids = torch.randint(0, V, (2, 8))
    moe = model.blocks[1].ffn
    with torch.no_grad():
        model(ids)
    generate(model, [[1, 2]], 3)
    assert moe.load.sum() == 0
    before = moe.bias.clone()
    model.update_router_bias(0.1)   # nothing was counted, so nothing moves
    assert torch.equal(moe.bias, before)
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


def test_stages_balance_the_load_in_full_tuning_alone(place, tmp_path):
    """Under adapters the router stays as it was, and so does its bias."""
    root = place[0]
    moe, _ = run(settings(root, "pretrain", f"{tmp_path}/moe", max_steps=2, max_seq_len=128, **MOE))
    assert moe["model"]["blocks.1.ffn.bias"].any()
    lora, _ = run(settings(root, "sft", f"{tmp_path}/lora", init_from=f"{tmp_path}/moe", max_steps=1, lora_rank=2))
    assert "blocks.1.ffn.shared.down.lora_a" in lora["model"]
    assert not any("router" in name or "bias" in name for name in lora["model"])
