"""common/optim.py: the learning rate, AdamW and Muon, by hand and against an SVD."""
import math
from types import SimpleNamespace

import pytest
import torch
from oracles import random_model
from small_runs import CPU

from common.checkpoint import own
from common.optim import POLAR_EXPRESS, Muon, make_adamw, make_optimizers, orthogonalize, set_lr


# ---------------------------------------------------------------------------- AdamW


def settings(**changes):
    defaults = dict(optimizer="adamw", lr=1e-3, adam_lr=0.0, momentum=0.95, weight_decay=0.1)
    return SimpleNamespace(**{**defaults, **changes})


def names(model, params):
    of = {id(p): name for name, p in model.named_parameters()}
    return {of[id(p)] for p in params}


def test_one_adamw_step_by_hand():
    """Its first step is p (1 - lr wd) - lr g / |g|: both averages are the gradient's own, once corrected for their
    beginning at zero. Biases are not decayed."""
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    optimizer = make_adamw(layer.parameters(), 0.1, 0.5)
    layer.weight.grad = torch.tensor([[3.0, -4.0]])
    layer.bias.grad = torch.tensor([12.0])
    optimizer.step()
    assert layer.weight[0].tolist() == pytest.approx([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1], abs=1e-5)
    assert layer.bias.item() == pytest.approx(0.5 - 0.1, abs=1e-5)


def test_adamw_decays_matrices_only():
    for kind, rest in (("dots1", "norm"), ("qwen2", "blocks.0.attn.qkv.bias")):
        model = random_model(kind)
        (optimizer,) = make_optimizers(model, settings(), CPU)
        matrices, others = optimizer.param_groups
        assert (matrices["weight_decay"], others["weight_decay"], matrices["betas"]) == (0.1, 0.0, (0.9, 0.95))
        assert names(model, matrices["params"]) == {name for name, p in model.named_parameters() if p.ndim > 1}
        assert names(model, others["params"]) == {name for name, p in model.named_parameters() if p.ndim == 1}
        assert any(rest in name for name in names(model, others["params"]))


def test_frozen_parameters_are_left_out():
    model = random_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("blocks.1")
    for optimizer in ("adamw", "muon"):
        optimizers = make_optimizers(model, settings(optimizer=optimizer), CPU)
        taken = [name for o in optimizers for g in o.param_groups for name in names(model, g["params"])]
        assert taken and all(name.startswith("blocks.1") for name in taken)


# ---------------------------------------------------------------------------- Muon


def test_muon_takes_the_matrices_of_the_blocks():
    """Each at its own learning rate, which set_lr moves by a factor of the peak, not of the last value."""
    model = random_model("dots1")
    adam, muon = make_optimizers(model, settings(optimizer="muon", adam_lr=3e-3), CPU)
    taken = set().union(*(names(model, g["params"]) for g in muon.param_groups))
    assert taken == {name for name, p in model.named_parameters()
                     if p.ndim == 2 and name.startswith("blocks.") and "router" not in name}
    left = set().union(*(names(model, g["params"]) for g in adam.param_groups))
    assert left | taken == {name for name, _ in model.named_parameters()} and not left & taken
    for factor in (1.0, 0.5, 0.0, 1.0):
        set_lr([adam, muon], factor)
        assert {g["lr"] for g in adam.param_groups} == {3e-3 * factor}
        assert {g["lr"] for g in muon.param_groups} == {1e-3 * factor}
    adam, muon = make_optimizers(model, settings(optimizer="muon"), CPU)
    assert {g["peak_lr"] for g in adam.param_groups} == {1e-3}  # adam_lr 0: lr
    (adam,) = make_optimizers(model, settings(adam_lr=3e-3), CPU)
    assert {g["peak_lr"] for g in adam.param_groups} == {1e-3}  # adam_lr is for muon's neighbour alone


def with_singular_values(values, rows, columns):
    """A random matrix (rows, columns) with these singular values, and the U V' it belongs to."""
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return (u * values) @ vh, u @ vh


def test_orthogonalize_many_at_once_and_nothing():
    x = torch.randn(5, 24, 8)
    together = orthogonalize(x)
    assert together.shape == (5, 24, 8)
    for one, of_all in zip(x, together):
        assert (orthogonalize(one[None])[0] - of_all).abs().max() < 1e-5
    assert not orthogonalize(torch.zeros(2, 4, 4)).any()  # no gradient, no step, no NaN


def polynomial(x):
    """What the five steps make of one singular value, in double precision."""
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x ** 3 + c * x ** 5
    return x


def test_muon_steps_by_hand():
    """Two steps on matrices whose singular values are all the same, so that orthogonalising is one number's affair:
    p <- p (1 - lr wd) - lr 0.2 sqrt(max(rows, columns)) f(Nesterov momentum)."""
    directions = with_singular_values(torch.ones(3), 3, 7)[1]
    p = torch.nn.Parameter(torch.randn(3, 7))
    start = p.detach().clone()
    optimizer = Muon([p], lr=0.1, weight_decay=0.5, momentum=0.9)
    momentum = 0.0
    wanted = start.double()
    for size in (4.0, -1.5, 0.25):
        p.grad = size * directions
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * size
        update = 0.1 * size + 0.9 * momentum
        # all three singular values of the update are |update|; its norm is sqrt(3) times that
        value = polynomial(abs(update) / (1.02 * math.sqrt(3) * abs(update) + 1e-6))
        step = 0.1 * 0.2 * math.sqrt(7) * math.copysign(value, update)
        wanted = wanted * (1 - 0.1 * 0.5) - step * directions.double()
        assert (p.detach() - wanted).abs().max() < 1e-5
        assert (optimizer.state[p]["momentum"] - momentum * directions).abs().max() < 1e-6


def test_muon_treats_every_matrix_as_if_alone():
    """Also those of one shape, which are made orthogonal together, and those that lie in one parameter, as q, k and
    v."""
    shapes = [(8, 16), (16, 8), (8, 16), (8, 8), (8, 16)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    fused = torch.nn.Parameter(torch.cat([torch.randn(rows, 6) for rows in (8, 4, 4)]))
    alone = [torch.nn.Parameter(p.detach().clone()) for p in [*together, *fused.split([8, 4, 4])]]
    optimizers = [Muon([{"params": together}, {"params": [fused], "parts": (8, 4, 4)}], lr=0.1, weight_decay=0.1)]
    optimizers += [Muon([p], lr=0.1, weight_decay=0.1) for p in alone]
    for step in range(3):
        for p in [*together, fused]:
            p.grad = torch.randn_like(p)
        for p, grad in zip(alone, [*(p.grad for p in together), *fused.grad.split([8, 4, 4])]):
            p.grad = grad.clone()
        together[3].grad = alone[3].grad = None  # without a gradient: no step, no decay
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip([*together, *fused.split([8, 4, 4])], alone, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_muon_knows_which_matrices_lie_in_one_parameter():
    """By the shapes of the model: 8 query heads and 2 key heads of 4 channels, a feed-forward layer 80 wide."""
    model = random_model("llama_gqa")
    muon = make_optimizers(model, settings(optimizer="muon", momentum=0.8), CPU)[1]
    found = {}
    for group in muon.param_groups:
        assert group["momentum"] == 0.8
        for name in names(model, group["params"]):
            found[name.removeprefix("blocks.1.")] = list(group["parts"])
    assert found["attn.qkv.weight"] == [32, 8, 8] and found["ffn.gate_up.weight"] == [80, 80]
    assert found["attn.out.weight"] == [32] and found["ffn.down.weight"] == [32]


def test_a_rate_that_would_rise_is_refused(tmp_path):
    """min_lr above lr: the schedule would end higher than its peak."""
    cfg = SimpleNamespace(lr=1e-5, min_lr=1e-4, out_dir=str(tmp_path), warmup_steps=0, max_steps=10)
    with pytest.raises(SystemExit, match="min_lr=0.0001 exceeds lr=1e-05"):
        own(cfg, SimpleNamespace(is_main=False))
