"""common/loss.py: each function equals the plain formula that its docstring begins with, by hand and by a plain
loop."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import C, V, random_model
from small_runs import CPU

import common.loss as loss_file
from common.data import Split, pad, shift
from common.loss import answer_logps, cross_entropy, distillation_loss, score_answers, text_loss, token_logps
from model import ModelConfig, ScalarModel, Transformer


def largest(difference):
    return difference.abs().max().item()


def logits_of(model, ids):
    """ids (B, T) -> logits (B, T, V)."""
    return model.logits(model(ids))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_file, "chunk_size", lambda vocab_size, device: 7)


# ---------------------------------------------------------------------------- by hand


def small_model():
    torch.manual_seed(3)
    return Transformer(ModelConfig(vocab_size=320, dim=32, n_layers=1, n_heads=2, max_seq_len=32))


def text(n=315):
    tokens = np.random.default_rng(0).integers(0, 320, n).astype(np.uint16)
    return Split(tokens, None, None, None, {"bytes": 3 * n - 70})


def test_bits_per_byte_by_hand():
    """A model that knows nothing: ln V nats per token, so log2 V bits a token, over the bytes that a token stands
    for."""
    model = small_model()
    torch.nn.init.zeros_(model.embed.weight)
    val = text()
    nats, bits = text_loss(model, val, 32, 4, 10**6, CPU)
    assert nats == pytest.approx(math.log(320), rel=1e-6)
    assert bits == pytest.approx(math.log2(320) * len(val.tokens) / val.meta["bytes"], rel=1e-5)


# ---------------------------------------------------------------------------- the formulas of the docstrings


@pytest.mark.parametrize("rows", [1, 7, 20, 21])
def test_weighted_loss_and_its_gradients(small_chunks, rows):
    """cross_entropy with weights: sum(weights * F.cross_entropy(logits, targets, reduction="none"))."""
    x, weight = torch.randn(rows, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets = torch.randint(0, V, (rows,))
    targets[::3] = -1
    weights = torch.rand(rows) * (targets >= 0)
    nll = F.cross_entropy(x @ weight.T, targets, reduction="none", ignore_index=-1)
    wanted = (weights * nll).sum()
    wanted_grads = torch.autograd.grad(3 * wanted, (x, weight))
    loss = cross_entropy(x, weight, targets, weights)
    grads = torch.autograd.grad(3 * loss, (x, weight))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for got, want in zip(grads, wanted_grads):
        assert largest(got - want) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "llama_gqa"])  # tied and untied
def test_the_mean_loss_of_a_model_and_all_its_gradients(small_chunks, kind):
    """cross_entropy without weights: the mean over targets that are not -1, in chunks of 7 rows as in one."""
    model = random_model(kind, 2)
    ids, targets = torch.randint(0, V, (3, 11)), torch.randint(0, V, (3, 11))
    targets[0, :4] = targets[2] = -1
    wanted = F.cross_entropy(logits_of(model, ids).flatten(0, 1), targets.flatten(), ignore_index=-1)
    wanted_grads = torch.autograd.grad(wanted, list(model.parameters()))
    loss = cross_entropy(model(ids), model.head_weight, targets)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for got, want in zip(torch.autograd.grad(loss, list(model.parameters())), wanted_grads):
        assert largest(got - want) < 1e-5
    with torch.no_grad():
        assert cross_entropy(model(ids), model.head_weight, targets).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_log_softmax(small_chunks, temperature):
    """token_logps: log_softmax(logits / temperature) at the targets, 0 where the mask is 0; gradients, too."""
    x, weight = torch.randn(2, 13, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets, mask, advantage = torch.randint(0, V, (2, 13)), torch.rand(2, 13) < 0.6, torch.randn(2, 13)
    wanted = F.log_softmax(F.linear(x, weight) / temperature, dim=-1).gather(2, targets[:, :, None]).squeeze(2) * mask
    got = token_logps(x, weight, targets, mask, temperature)
    assert got.shape == (2, 13) and got.dtype == torch.float32 and largest(got - wanted) < 1e-5
    for a, b in zip(*(torch.autograd.grad((logps * advantage).sum(), (x, weight)) for logps in (got, wanted))):
        assert largest(a - b) < 2e-5


def some_answers():
    """Six documents of different lengths: prompt, answer, and what stands behind it."""
    generator = np.random.default_rng(4)
    documents = []
    for n in (5, 40, 12, 3, 33, 20):
        mask = np.zeros(n, np.uint8)
        mask[n // 2:n - n % 2] = 1
        documents.append((generator.integers(1, V, n), mask))
    return documents


@pytest.mark.parametrize("rows_a_group", [1, 2, 6])
def test_log_probs_of_answers_are_sums_over_their_tokens(monkeypatch, rows_a_group):
    """answer_logps: of each document what it has alone, its prompt and what stands behind left out, however rows are
    grouped by length; and the plain formula of the docstring on all rows at once."""
    monkeypatch.setattr(loss_file, "length_buckets", lambda lengths: lengths.argsort().split(rows_a_group))
    model = random_model("llama_gqa", 6)
    documents = some_answers()
    wanted = []
    for ids, mask in documents:
        ids = torch.from_numpy(ids)
        logps = logits_of(model, ids[None, :-1]).log_softmax(-1)[0]
        wanted.append((logps.gather(1, ids[1:, None])[:, 0] * torch.from_numpy(mask)[1:]).sum())
    ids, mask = pad(documents, 0)
    sums, lengths = answer_logps(model, model.head_weight, ids, mask)
    assert lengths.tolist() == [mask[1:].sum() for _, mask in documents]
    assert largest(sums - torch.stack(wanted)) < 2e-5
    inputs, targets, learned = shift(ids, mask)
    plain = token_logps(model(inputs), model.head_weight, targets, learned).sum(1)
    assert largest(sums - plain) < 2e-5
    for a, b in zip(*(torch.autograd.grad(x.sum(), list(model.parameters())) for x in (sums, torch.stack(wanted)))):
        assert largest(a - b) < 1e-4


@torch.no_grad()
def test_scores_are_read_at_the_last_learned_token():
    """score_answers: the scalar on <|im_end|>, not on padding, the newline behind it, or the token before."""
    documents = [([5, 6, 7, 8, 9], [0, 0, 1, 1, 0]), ([5, 6, 7], [0, 1, 1]), ([3, 4], [0, 1])]
    places = lambda ids: torch.arange(ids.size(1)).float().expand(ids.shape)  # noqa: E731
    assert score_answers(places, *pad(documents, 0)).tolist() == [3, 2, 1]
    model = ScalarModel(random_model("llama_gqa").config)
    scores = score_answers(model, *pad(some_answers(), 0))
    for score, (ids, mask) in zip(scores, some_answers()):
        last = np.flatnonzero(mask)[-1]
        assert largest(score - model(torch.from_numpy(ids[None, :last + 1]))[0, last]) < 1e-5


def test_distillation_loss_equals_a_plain_loop(monkeypatch):
    """distillation_loss: token by token sum p log(p / q), p the teacher's; gradients too; in chunks of 3 rows. From
    oneself there is nothing to learn."""
    monkeypatch.setattr(loss_file, "chunk_size", lambda vocab_size, device: 3)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    teacher_x, teacher_head = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    weights = torch.tensor([[0, 0.1, 0.2, 0, 0.3], [0.1, 0, 0, 0.3, 0]], dtype=torch.float64)
    got = distillation_loss(x, head, teacher_x, teacher_head, weights)
    want = 0
    for b in range(2):
        for t in range(5):
            q = (head @ x[b, t]).softmax(0)
            p = (teacher_head @ teacher_x[b, t]).softmax(0)
            want = want + weights[b, t] * (p * (p / q).log()).sum()
    assert abs(got - want) < 1e-5
    for a, b in zip(*(torch.autograd.grad(loss, (x, head)) for loss in (got, want))):
        assert largest(a - b) < 1e-5
    assert abs(distillation_loss(x, head, x, head, weights)) < 1e-5


# ---------------------------------------------------------------------------- loss of a text


@pytest.mark.parametrize("max_tokens", [10**6, 200, 5])
def test_the_loss_of_a_text_equals_a_plain_loop(max_tokens):
    model = small_model()
    with torch.no_grad():
        model.embed.weight.mul_(20)
    val = text()
    n = min(max_tokens, len(val.tokens) - 1)
    nats = 0.0
    for start in range(0, n, 32):
        ids = torch.from_numpy(val.tokens[start:min(start + 32, n) + 1].astype(np.int64))
        with torch.no_grad():
            nats += F.cross_entropy(logits_of(model, ids[None, :-1])[0], ids[1:], reduction="sum").item()
    loss, bits = text_loss(model, val, 32, 3, max_tokens, CPU)
    assert loss == pytest.approx(nats / n, rel=1e-5)
    assert bits == pytest.approx(nats / math.log(2) / (val.meta["bytes"] * n / len(val.tokens)), rel=1e-5)
