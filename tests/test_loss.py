"""loss.py against F.cross_entropy, F.log_softmax, plain loops and numbers worked by hand."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import C, T, V, random_model
from torch.utils._python_dispatch import TorchDispatchMode

import common.loss as loss_file
from common.distributed import Env
from common.data import Split, collate
from common.loss import answer_logps, chunk_logps, chunk_size, cross_entropy, score_answers, text_loss, token_logps
from model import ModelConfig, ScalarModel, Transformer

ALONE = Env(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def largest(difference):
    return difference.abs().max().item()


def logits_of(model, ids, docs=None):
    """ids (B, T) -> logits (B, T, V)."""
    return model.logits(model(ids, docs))


def loss_of(model, ids, targets, weights=None):
    return cross_entropy(model(ids), model.head_weight, targets, weights)


# ---------------------------------------------------------------------------- cross entropy


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_file, "chunk_size", lambda vocab_size, device: 7)


def test_chunk_size_bounds_memory():
    for vocab_size in (100, 6400, 64832, 152064):
        rows = chunk_size(vocab_size, torch.device("cpu"))
        assert rows >= 128 and (rows == 128 or rows * vocab_size * 4 <= 2 ** 24)


def test_a_gpu_is_kept_busy_with_few_large_chunks():
    """16 rows of 1,024 tokens, 65,536 words: 4 products of the head on a GPU, of 1 GiB of logits each; not 128."""
    rows = chunk_size(65536, torch.device("cuda"))
    assert math.ceil(16 * 1024 / rows) == 4
    assert rows * 65536 * 4 == 2 ** 30
    assert math.ceil(16 * 1024 / chunk_size(65536, torch.device("cpu"))) == 128


def test_the_loss_asks_for_chunks_of_its_device(monkeypatch):
    asked = []

    def spy(vocab_size, device):
        asked.append((vocab_size, device.type))
        return 7

    monkeypatch.setattr(loss_file, "chunk_size", spy)
    model = random_model("llama_gqa")
    ids = torch.randint(0, V, (2, 9))
    loss_of(model, ids, ids)
    token_logps(model, ids, ids, torch.ones(2, 9))
    assert asked == [(V, "cpu")] * 2


@pytest.mark.parametrize("rows", [1, 7, 20, 21])
def test_chunked_loss_equals_cross_entropy(small_chunks, rows):
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
def test_model_loss_and_gradients(small_chunks, kind):
    """With chunks of 7 rows, loss and every parameter's gradient equal those of the whole logits at once."""
    model = random_model(kind, 2)
    ids, targets = torch.randint(0, V, (3, 11)), torch.randint(0, V, (3, 11))
    targets[0, :4] = targets[2] = -1

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    wanted_loss = F.cross_entropy(logits_of(model, ids).flatten(0, 1), targets.flatten(), ignore_index=-1)
    wanted = gradients(wanted_loss)
    loss = loss_of(model, ids, targets)
    got = gradients(loss)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-6)
    for name in wanted:
        assert largest(got[name] - wanted[name]) < 1e-5, name
    with torch.no_grad():
        assert loss_of(model, ids, targets).item() == pytest.approx(loss.item(), rel=1e-6)

    weights = torch.rand(3, 11) * (targets >= 0)
    nll = F.cross_entropy(logits_of(model, ids).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    wanted = gradients((nll * weights.flatten()).sum())
    got = gradients(loss_of(model, ids, targets, weights))
    for name in wanted:
        assert largest(got[name] - wanted[name]) < 1e-5, name


def test_the_compiled_loss_equals_the_plain_one(monkeypatch):
    """Loss and gradients, for any number of rows, and without compiling for each."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss_file.softmax_nll, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(loss_file, "compiled_softmax_nll", lambda: compiled)
    monkeypatch.setattr(loss_file, "chunk_size", lambda vocab_size, device: 20)
    for rows in (33, 20, 50, 47):
        results = []
        x = torch.randn(rows, C, requires_grad=True)
        weight = torch.randn(V, C, requires_grad=True)
        targets = torch.randint(-1, V, (rows,))
        for use in (False, True):
            loss = cross_entropy(x, weight, targets, compiled=use)
            results.append((loss, *torch.autograd.grad(loss, (x, weight))))
        for plain, fused in zip(*results):
            assert largest(plain - fused) < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["llama", "llama_gqa"])  # tied and untied
@pytest.mark.parametrize("how", ["mean", "weights", "logps"])
def test_loss_where_nothing_counts(kind, how):
    """Zero, and a gradient of zero for every parameter: DDP waits for all, also where a rank has padding alone."""
    model = random_model(kind)
    ids = torch.randint(0, V, (2, 5))
    if how == "mean":
        loss = loss_of(model, ids, torch.full((2, 5), -1))
    elif how == "weights":
        loss = loss_of(model, ids, ids, torch.zeros(2, 5))
    else:
        loss = token_logps(model, ids, ids, torch.zeros(2, 5)).sum()
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters())


def test_loss_of_extreme_logits_is_finite():
    x = torch.tensor([[1000.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for target, wanted in ((0, 0.0), (1, 2000.0)):
        assert cross_entropy(x, weight, torch.tensor([target]), torch.ones(1)).item() == wanted


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps(small_chunks, temperature):
    model = random_model("dots1", 3)
    ids, targets = torch.randint(0, V, (2, 13)), torch.randint(0, V, (2, 13))
    advantage, mask = torch.randn(2, 13), torch.rand(2, 13) < 0.6

    full = F.log_softmax(logits_of(model, ids) / temperature, dim=-1)
    wanted = full.gather(2, targets[:, :, None]).squeeze(2)
    wanted = wanted * mask
    (wanted * advantage).sum().backward()
    wanted_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logps = token_logps(model, ids, targets, mask, temperature)
    (logps * advantage).sum().backward()
    assert logps.shape == (2, 13) and logps.dtype == torch.float32
    assert largest(logps - wanted) < 1e-5
    assert token_logps(model, ids, targets, torch.zeros(2, 13)).tolist() == [[0.0] * 13] * 2
    for name, p in model.named_parameters():
        assert largest(p.grad - wanted_grads[name]) < 2e-5, name


def test_chunk_logps_by_hand():
    """Logits ln 1, ln 2, ln 5 at temperature 1: probabilities 1/8, 2/8, 5/8."""
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    logps = chunk_logps(torch.ones(2, 1), weight, torch.tensor([1, 2]), 1.0)
    assert logps.tolist() == pytest.approx([math.log(1 / 4), math.log(5 / 8)])


class Largest(TorchDispatchMode):
    """Context that notes the number of elements of the largest tensor made inside it."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_the_logits_never_exist_at_once(small_chunks):
    """Forward and backward of the loss and of logps make no tensor of rows * vocabulary elements."""
    model = random_model("llama_gqa", vocab_size=1000)
    ids, targets = torch.randint(0, V, (4, T)), torch.randint(0, V, (4, T))
    for run in (lambda: loss_of(model, ids, targets), lambda: token_logps(model, ids, targets, torch.ones(4, T)).sum()):
        with Largest() as largest_tensor:
            run().backward()
        assert largest_tensor.elements == 1000 * C, "the largest should be the head's gradient, not logits"
    with Largest() as largest_tensor:
        F.cross_entropy(logits_of(model, ids).flatten(0, 1), targets.flatten()).backward()
    assert largest_tensor.elements == 4 * T * 1000


# ---------------------------------------------------------------------------- fp16


@pytest.mark.parametrize("learned_tokens", [256, 2 ** 16, 2 ** 20])
def test_no_gradient_is_lost_in_fp16(learned_tokens):
    """256 rows of a step of so many learned tokens: each weighs 1/N, times probabilities of 1/8192: in fp16 that is 0.
    No row of the head's gradient may be; each must be what fp32 gives, as well as fp16 can say."""
    x = torch.randn(256, C) + 0.3  # a common direction, so that no row's parts cancel
    weight = 0.02 * torch.randn(8192, C)
    targets = torch.randint(0, 10, (256,))  # most tokens never are the target: their gradient is small
    weights = torch.full((256,), 1 / learned_tokens)

    def gradients(dtype):
        ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = cross_entropy(*ours, targets, weights)
        scale = 65536.0
        (loss * scale).backward()
        return [tensor.grad / scale for tensor in ours]

    wanted_x, wanted_head = gradients(torch.float32)
    x_grad, head_grad = gradients(torch.float16)
    assert (wanted_head != 0).any(1).all() and (wanted_x != 0).any(1).all()
    assert (head_grad == 0).all(1).float().mean() == 0, "share of the head's rows without any gradient"
    assert (x_grad == 0).all(1).float().mean() == 0, "share of the tokens without any gradient"
    assert (head_grad - wanted_head).norm() < 0.01 * wanted_head.norm()
    assert (x_grad - wanted_x).norm() < 0.01 * wanted_x.norm()
    rows = (head_grad - wanted_head).norm(dim=1) / wanted_head.norm(dim=1)
    assert rows.max() < 0.01


# ---------------------------------------------------------------------------- answers


def some_answers():
    """Six documents of different lengths (prompt, answer, and what stands behind it), collated."""
    generator = np.random.default_rng(4)
    documents = []
    for n in (5, 40, 12, 3, 33, 20):
        mask = np.zeros(n, np.uint8)
        mask[n // 2:n - n % 2] = 1
        documents.append((generator.integers(1, V, n), mask))
    return documents


@pytest.mark.parametrize("rows_a_group", [1, 2, 6])
def test_answer_logps_equal_a_loop_over_documents(monkeypatch, rows_a_group):
    """However rows are grouped by length: each answer's sum is that of the document alone."""
    monkeypatch.setattr(loss_file, "length_buckets", lambda ends: ends.argsort().split(rows_a_group))
    model = random_model("llama_gqa", 6)
    documents = some_answers()
    wanted = []
    for ids, mask in documents:
        ids = torch.from_numpy(ids)
        logps = logits_of(model, ids[None, :-1]).log_softmax(-1)[0]
        wanted.append((logps.gather(1, ids[1:, None])[:, 0] * torch.from_numpy(mask)[1:]).sum())
    sums, lengths = answer_logps(model, collate(documents, 0), ALONE)
    assert lengths.tolist() == [mask[1:].sum() for _, mask in documents]
    assert largest(sums - torch.stack(wanted)) < 2e-5
    sums.sum().backward()
    got = model.embed.weight.grad.clone()
    model.zero_grad()
    torch.stack(wanted).sum().backward()
    assert largest(got - model.embed.weight.grad) < 1e-4


@torch.no_grad()
def test_scores_are_read_at_the_last_learned_token():
    model = ScalarModel(random_model("llama_gqa").config)
    documents = some_answers()
    scores = score_answers(model, collate(documents, 0), ALONE)
    for score, (ids, mask) in zip(scores, documents):
        last = np.flatnonzero(mask)[-1]
        alone = model(torch.from_numpy(ids[None, :last + 1]))[0, last]
        assert largest(score - alone) < 1e-5


def test_length_buckets_limits_padding():
    ends = torch.tensor([3000, 5, 2500, 5, 1200, 1100, 900, 5000])
    groups = loss_file.length_buckets(ends)
    assert sorted(torch.cat(groups).tolist()) == list(range(8))
    for rows in groups:
        assert len(rows) == 1 or len(rows) * ends[rows].max() <= 4096
    assert len(groups) == 5  # 5 5 900 1100 together would be 4,400 tokens


# ---------------------------------------------------------------------------- loss of a text


def small_model():
    torch.manual_seed(3)
    return Transformer(ModelConfig(vocab_size=320, dim=32, n_layers=1, n_heads=2, max_seq_len=32))


def text(n=315):
    tokens = np.random.default_rng(0).integers(0, 320, n).astype(np.uint16)
    return Split(tokens, None, None, None, {"bytes": 3 * n - 70})


def test_bits_per_byte_by_hand():
    """A model that knows nothing: ln V nats a token, so log2 V bits a token, over the bytes that a token stands for."""
    model = small_model()
    torch.nn.init.zeros_(model.embed.weight)
    val = text()
    n = len(val.tokens)
    nats, bits = text_loss(model, val, 32, 4, 10**6, ALONE)
    assert nats == pytest.approx(math.log(320), rel=1e-6)
    assert bits == pytest.approx(math.log2(320) * n / val.meta["bytes"], rel=1e-5)  # n - 1 predicted, bytes of n
    assert model.training


@pytest.mark.parametrize("max_tokens", [10**6, 200, 5])
def test_the_loss_of_a_text_equals_a_plain_loop(max_tokens):
    model = small_model().eval()
    with torch.no_grad():
        model.embed.weight.mul_(20)
    val = text()
    n = min(max_tokens, len(val.tokens) - 1)
    nats = 0.0
    for start in range(0, n, 32):
        ids = torch.from_numpy(val.tokens[start:min(start + 32, n) + 1].astype(np.int64))
        with torch.no_grad():
            nats += F.cross_entropy(logits_of(model, ids[None, :-1])[0], ids[1:], reduction="sum").item()
    loss, bits = text_loss(model, val, 32, 3, max_tokens, ALONE)
    assert loss == pytest.approx(nats / n, rel=1e-5)
    assert bits == pytest.approx(nats / math.log(2) / (val.meta["bytes"] * n / len(val.tokens)), rel=1e-5)
    assert not model.training  # as it was


def test_the_loss_of_a_text_is_shared_among_processes(monkeypatch):
    model = small_model()
    val = text()
    whole = text_loss(model, val, 32, 3, 10**6, ALONE)
    parts = []
    monkeypatch.setattr(loss_file, "all_sum", lambda values, env: parts.append(values[0].item()) or [sum(parts)])
    for rank in range(3):
        loss, bits = text_loss(model, val, 32, 3, 10**6, Env(rank, 3, torch.device("cpu"), torch.float32))
    assert all(part > 0 for part in parts) and (loss, bits) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_equals_a_plain_loop(temperature, monkeypatch):
    """Token by token: T^2 * sum p log(p / q), p and q at temperature T; gradients too; in chunks of 3 rows."""
    monkeypatch.setattr(loss_file, "chunk_size", lambda vocab_size, device: 3)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=g, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 8, generator=g, dtype=torch.float64, requires_grad=True)
    teacher_x = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    teacher_head = torch.randn(11, 6, generator=g, dtype=torch.float64)
    weights = torch.tensor([[0, 0.1, 0.2, 0, 0.3], [0.1, 0, 0, 0.3, 0]], dtype=torch.float64)
    got = loss_file.distillation_loss(x, head, teacher_x, teacher_head, weights, temperature)
    want = 0
    for b in range(2):
        for t in range(5):
            q = (head @ x[b, t] / temperature).softmax(0)
            p = (teacher_head @ teacher_x[b, t] / temperature).softmax(0)
            want = want + weights[b, t] * temperature ** 2 * (p * (p / q).log()).sum()
    assert abs(got - want) < 1e-5
    ours = torch.autograd.grad(got, (x, head))
    theirs = torch.autograd.grad(want, (x, head))
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-5


def test_distillation_from_oneself_is_zero():
    x = torch.randn(4, 8)
    head = torch.randn(11, 8)
    assert abs(loss_file.distillation_loss(x, head, x, head, torch.ones(4), 2.0)) < 1e-5
