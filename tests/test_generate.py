"""generate() against transformers' generate and logits processors, and against a plain loop over full forwards."""
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracles import KINDS, T, V, random_model, twin
from torch.utils._python_dispatch import TorchDispatchMode

import common.generate as generate_file
from common.generate import filter_logits, generate, pick
from common.loss import cross_entropy, token_logps

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]
ONE_BELOW = 1 - 2 ** -24  # the largest float32 under 1


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return random_model("llama_gqa", 3)


def plain_generate(model, prompt, n, seed, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Continue one prompt without cache, padding or batch: a full forward for each token, a sum for each draw."""
    ids, uniforms = list(prompt), torch.rand(n, generator=torch.Generator().manual_seed(seed))
    for u in uniforms.tolist():
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids]))[:, -1])
        seen = torch.zeros(1, V, dtype=torch.bool)
        seen[0, ids] = True
        logits = filter_logits(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty)
        total, token = 0.0, -1
        for token, p in enumerate(logits.double().softmax(-1)[0].tolist()):
            total += p
            if total > u:
                break
        ids.append(token)
    return ids[len(prompt):]


# ---------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers(kind):
    """One by one and as a left-padded batch, both give transformers' ids."""
    pytest.importorskip("transformers")
    ours = random_model(kind, 1)
    theirs = twin(ours, kind)
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        wanted.append(out[0, len(prompt):].tolist())
    assert [generate(ours, [p], 24, temperature=0)[0] for p in PROMPTS] == wanted
    assert generate(ours, PROMPTS, 24, temperature=0) == wanted
    assert len({tuple(w) for w in wanted}) == len(wanted) and len(set(sum(wanted, []))) > 7, "too easy a test"


def test_greedy_with_repetition_penalty_equals_transformers(model):
    pytest.importorskip("transformers")
    theirs = twin(model, "llama_gqa")
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                              repetition_penalty=1.4)
        wanted.append(out[0, len(prompt):].tolist())
    assert generate(model, PROMPTS, 24, temperature=0, repetition_penalty=1.4) == wanted
    assert generate(model, PROMPTS, 24, temperature=0) != wanted


def test_the_token_used_for_padding_does_not_matter(model):
    wanted = generate(model, PROMPTS, 20, temperature=0, repetition_penalty=1.3)
    for pad_id in (1, 44, V - 1):
        assert generate(model, PROMPTS, 20, temperature=0, repetition_penalty=1.3, pad_id=pad_id) == wanted


def test_up_to_the_last_position(model):
    """Prompt and answer may fill max_seq_len exactly; the last step still equals a full forward."""
    prompt = PROMPTS[1]
    new = generate(model, [prompt, [3]], T - len(prompt), temperature=0)
    ids = prompt + new[0]
    assert len(ids) == T
    with torch.no_grad():
        assert model.logits(model(torch.tensor([ids])))[0].argmax(-1)[len(prompt) - 1:-1].tolist() == new[0]


# ---------------------------------------------------------------------------- filters


def their_filters(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty):
    """transformers' processors in the order in which its generate() applies them."""
    from transformers.generation import logits_process as lp
    rows = []
    for row, was_seen in zip(logits, seen):
        ids, row = was_seen.nonzero().T, row[None]
        if repetition_penalty != 1.0 and ids.numel():
            row = lp.RepetitionPenaltyLogitsProcessor(repetition_penalty)(ids, row)
        row = lp.TemperatureLogitsWarper(temperature)(None, row)
        if top_k:
            row = lp.TopKLogitsWarper(top_k)(None, row)
        if top_p < 1.0:
            row = lp.TopPLogitsWarper(top_p)(None, row)
        if min_p:
            row = lp.MinPLogitsWarper(min_p)(None, row)
        rows.append(row)
    return torch.cat(rows)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 60), scale=st.sampled_from([0.1, 1.0, 5.0, 40.0]),
       ties=st.booleans(), temperature=st.floats(0.1, 3), top_k=st.integers(0, 65), top_p=st.floats(0.01, 1),
       min_p=st.sampled_from([0.0, 1e-4, 0.02, 0.3, 1.0]), penalty=st.sampled_from([1.0, 1.2, 3.0, 0.7]))
@example(seed=0, vocab=5, scale=1.0, ties=True, temperature=1.0, top_k=1, top_p=0.01, min_p=1.0, penalty=1.0)
@example(seed=0, vocab=5, scale=0.1, ties=True, temperature=1.0, top_k=5, top_p=0.2, min_p=0.0, penalty=1.0)
def test_filters_equal_transformers(seed, vocab, scale, ties, temperature, top_k, top_p, min_p, penalty):
    pytest.importorskip("transformers")
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, generator=g) * scale
    logits = logits.round() if ties else logits
    seen = torch.rand(3, vocab, generator=g) < 0.3
    wanted = their_filters(logits, seen, temperature, top_k, top_p, min_p, penalty)
    if min_p:  # where a token lies on the border to the last bit, both answers are right
        unfiltered = their_filters(logits, seen, temperature, top_k, top_p, 0.0, penalty).double()
        border = unfiltered - unfiltered.max(-1, keepdim=True).values - math.log(min_p)
        assume(min_p == 1.0 or (border.abs() > 1e-5 * (1 + unfiltered.abs().nan_to_num(posinf=0))).all())
    got = filter_logits(logits, seen, temperature, top_k, top_p, min_p, penalty)
    assert torch.equal(got.isinf(), wanted.isinf())
    kept = got.isfinite()
    assert torch.allclose(got[kept], wanted[kept], rtol=1e-6, atol=1e-6)
    assert kept.any(-1).all(), "a row must keep a token"


def test_filters_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[None]
    none = torch.zeros(1, 4, dtype=torch.bool)

    def kept(**options):
        options = {**dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0), **options}
        return filter_logits(logits, none, **options).isfinite()[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=4) == kept(top_k=9) == [True] * 4
    assert kept(top_p=0.4) == [True, False, False, False]     # the first alone reaches 0.4
    assert kept(top_p=0.6) == [True, True, False, False]      # 0.5 does not reach 0.6, 0.75 does
    assert kept(top_p=0.8) == [True, True, True, False]
    assert kept(top_p=1e-9) == [True, False, False, False]    # never none
    assert kept(min_p=0.25) == [True, True, True, False]      # 0.25 * 0.5 = 0.125
    assert kept(top_k=3, top_p=0.8) == [True, True, False, False]  # of 0.9: 0.83 reaches 0.8
    # temperature 2: square roots .707 .5 .387 .316, shares .370 .262 .203 .166
    assert kept(temperature=2.0, top_p=0.6) == [True, True, False, False]
    assert kept(temperature=2.0, top_p=0.7) == [True, True, True, False]
    assert kept(temperature=0.25, top_p=0.8) == [True, False, False, False]
    penal = filter_logits(torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[True, True, False]]), 1.0, 0, 1.0, 0.0, 2.0)
    assert penal.tolist() == [[1.0, -4.0, 3.0]]
    greedy = filter_logits(torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[False] * 3]), 0, 1, 0.1, 0.9, 1.0)
    assert greedy.isfinite().all()  # greedy looks at the largest only


def test_filters_on_a_large_vocabulary():
    """top-p and min-p by their definitions, in double precision, at 20 borders among 5,000 tokens."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * 3
    none = torch.zeros(1, 5000, dtype=torch.bool)
    p = logits.double().softmax(-1)[0]
    ordered = p.sort(descending=True).values
    for k in range(50, 2050, 100):  # borders halfway between the k-th and the next token
        min_p = ((ordered[k - 1] + ordered[k]) / 2 / ordered[0]).item()
        top_p = (ordered[:k].sum() - ordered[k - 1] / 2).item()
        for options in ((1.0, min_p), (top_p, 0.0)):
            kept = filter_logits(logits, none, 1.0, 0, *options, 1.0)
            assert kept.isfinite()[0].tolist() == (p >= ordered[k - 1]).tolist()


# ---------------------------------------------------------------------------- drawing


def test_draws_follow_the_distribution():
    """Chi-square of 400,000 draws after top-k, top-p and temperature: within 4 standard deviations of its mean."""
    n, torch_seed = 400_000, torch.Generator().manual_seed(3)
    logits = torch.randn(1, 40, generator=torch_seed) * 2
    none = torch.zeros(1, 40, dtype=torch.bool)
    for options in ((1.0, 0, 1.0, 0.0), (0.7, 20, 0.95, 0.0), (1.5, 0, 1.0, 0.05)):
        filtered = filter_logits(logits, none, *options, 1.0)
        p = filtered.double().softmax(-1)[0]
        ids = pick(filtered.expand(n, -1), torch.rand(n, generator=torch_seed), 1.0)
        counts = ids.bincount(minlength=40).double()
        assert not counts[p == 0].any()
        expected = (p * n)[p > 0]
        chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
        freedom = len(expected) - 1
        assert freedom > 3 and abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom), f"chi2 {chi2} of {freedom}"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 300), banned=st.floats(0, 1),
       scale=st.sampled_from([1.0, 30.0]),
       uniform=st.one_of(st.sampled_from([0.0, ONE_BELOW, 2 ** -24]), st.floats(0, ONE_BELOW, width=32)))
def test_a_token_of_probability_zero_is_never_drawn(seed, vocab, banned, scale, uniform):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, vocab, generator=g) * scale
    logits[torch.rand(8, vocab, generator=g) < banned] = -torch.inf
    logits[torch.arange(8), torch.randint(0, vocab, (8,), generator=g)] = 0.0  # one at least is allowed
    ids = pick(logits, torch.full((8,), uniform), 1.0)
    assert (ids < vocab).all()
    assert (logits.softmax(-1).gather(1, ids[:, None]) > 0).all()


def test_draws_at_both_ends():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf, 0.0, -torch.inf, -torch.inf]] * 5)
    uniforms = torch.tensor([0.0, 0.3, 0.34, 0.67, ONE_BELOW])
    assert pick(logits, uniforms, 1.0).tolist() == [1, 1, 2, 4, 4]


def test_a_sum_that_is_not_monotone_draws_no_forbidden_token(monkeypatch):
    """On a GPU sums are made in parallel, and a cdf may fall by a rounding where it should rest. The search then can
    land on a token at -inf; pick() must not return it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 400, generator=generator)
    banned = torch.rand(2000, 400, generator=generator) < 0.7
    banned[:, 0] = False
    logits[banned] = -torch.inf
    probs = logits.softmax(-1)
    cdf = probs.cumsum(-1)
    fault = 1e-6 * torch.randint(-2, 3, cdf.shape, generator=generator)
    fault[:, -1] = 0
    # draws close to the steps of the cdf, where a fault matters
    place = torch.randint(0, 400, (2000, 1), generator=generator)
    uniforms = (cdf.gather(1, place) - 1e-7).clamp(0, ONE_BELOW)
    landed = torch.searchsorted(cdf + fault, uniforms, right=True).clamp(max=399)
    assert (probs.gather(1, landed) == 0).sum() > 50, "the test must put the search on forbidden tokens"
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: cdf + fault)
    ids = pick(logits, uniforms.squeeze(1), 1.0)
    assert logits.gather(1, ids[:, None]).isfinite().all()


def test_temperature_zero_takes_the_first_of_equals():
    assert pick(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([0.9]), 0).tolist() == [1]


# ---------------------------------------------------------------------------- sampling with the model


OPTIONS = [dict(), dict(temperature=0.7, top_k=12), dict(top_p=0.8, repetition_penalty=1.3),
           dict(temperature=1.4, min_p=0.05, top_p=0.9)]


@pytest.mark.parametrize("options", OPTIONS)
def test_sampled_rows_equal_a_plain_loop(model, options):
    """A batch of unequal prompts, with cache, gives what a full forward for each token of each row alone gives."""
    got = generate(model, PROMPTS, 16, seed=100, **options)
    assert got == [plain_generate(model, p, 16, seed=100 + i, **options) for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("kind", ["qwen2", "dots1"])
def test_sampled_rows_do_not_depend_on_the_batch(kind):
    model = random_model(kind, 2)
    options = dict(temperature=0.9, top_p=0.9, top_k=30, repetition_penalty=1.1)
    batch = generate(model, PROMPTS, 20, seed=7, **options)
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 20, seed=7 + i, **options) == [batch[i]]
    assert generate(model, PROMPTS[:2], 20, seed=7, **options) == batch[:2]
    assert generate(model, PROMPTS, 9, seed=7, **options) == [row[:9] for row in batch]
    assert generate(model, PROMPTS, 20, seed=8, **options) != batch


def test_rows_with_the_same_prompt_differ(model):
    rows = generate(model, [PROMPTS[0]] * 8, 12, seed=1)
    assert len({tuple(row) for row in rows}) == 8


def test_without_a_seed_every_run_differs(model):
    torch.manual_seed(5)
    a = generate(model, [PROMPTS[0]], 20)
    torch.manual_seed(5)
    assert a != generate(model, [PROMPTS[0]], 20)


def test_sampling_does_not_touch_the_global_generator(model):
    torch.manual_seed(5)
    a = torch.rand(3)
    torch.manual_seed(5)
    generate(model, PROMPTS, 4, seed=1)
    assert torch.equal(a, torch.rand(3))


# ---------------------------------------------------------------------------- ending, streaming, errors


def test_stop_ids(model):
    """A row ends with the first of stop_ids; the others go on as they would have without."""
    free = generate(model, PROMPTS, 24, seed=5)
    stops = (free[0][3], free[2][7])
    stopped = generate(model, PROMPTS, 24, seed=5, stop_ids=stops)
    for row, got in zip(free, stopped):
        ends = [i + 1 for i, token in enumerate(row) if token in stops]
        assert got == row[:ends[0] if ends else None]
    assert len(stopped[0]) <= 4 and len({len(row) for row in stopped}) > 1


def test_rows_that_have_ended_leave_the_batch(model):
    """Each forward pass sees the rows alone that still go on, and what these say stays the same."""
    rows_seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: rows_seen.append(len(inputs[0])))
    free = generate(model, PROMPTS, 24, seed=5)
    assert rows_seen == [4] * 24
    stops = (free[0][3], free[2][7], free[1][5])
    rows_seen.clear()
    stopped = generate(model, PROMPTS, 24, seed=5, stop_ids=stops)
    hook.remove()
    lengths = [len(row) for row in stopped]
    assert len(set(lengths)) > 2, "too easy a test"
    # the first pass reads the prompts; pass n gives token n to the rows that have more than n
    assert rows_seen == [sum(length > n for length in lengths) for n in range(max(lengths))]
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 24, seed=5 + i, stop_ids=stops) == [stopped[i]]


@pytest.mark.parametrize("kind", ["llama_gqa", "dots1"])
@pytest.mark.parametrize("options", OPTIONS + [dict(temperature=0, repetition_penalty=1.3)])
def test_a_group_equals_its_prompt_given_so_often(kind, options):
    """group_size answers a prompt: the prompts are read once, and the answers are those to separate prompts."""
    model = random_model(kind, 3)
    rows_seen = []
    model.register_forward_pre_hook(lambda module, inputs: rows_seen.append(tuple(inputs[0].shape)))
    options = dict(seed=40, stop_ids=(3, 17, 40, 77), **options)
    separate = generate(model, [prompt for prompt in PROMPTS for _ in range(3)], 16, **options)
    assert rows_seen[0] == (12, 11)
    rows_seen.clear()
    assert generate(model, PROMPTS, 16, group_size=3, **options) == separate
    assert rows_seen[0] == (4, 11)


def test_it_ends_when_all_rows_have_ended(model):
    free = generate(model, PROMPTS, 24, seed=5)
    calls = []
    generate(model, PROMPTS, 24, seed=5, stop_ids=range(V), on_token=calls.append)
    assert calls == [[row[0] for row in free]]


def test_the_stream_is_the_result(model):
    for stops in ((), (3, 17, 40, 41, 42, 77)):
        rows, calls = [[] for _ in PROMPTS], []

        def on_token(ids):
            assert len(ids) == len(PROMPTS)
            calls.append(ids)
            for row, token in zip(rows, ids):
                if token is not None:
                    assert type(token) is int
                    row.append(token)

        result = generate(model, PROMPTS, 24, seed=9, stop_ids=stops, on_token=on_token)
        assert rows == result
        assert len(calls) == max(map(len, result))
    assert len({len(row) for row in rows}) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0])
def test_logps_while_generating_equal_the_training_forward(kind, temperature, monkeypatch):
    """Log-probs at generation's temperature and before the filters are those of token_logps on the whole row."""
    model = random_model(kind, 5)
    stops = (2, 9, 33, 60, 61)
    unfiltered = []

    def spy(logits, *options):
        unfiltered.append(logits)
        return filter_logits(logits, *options)

    logps = [[] for _ in PROMPTS]

    def on_token(ids):
        alive = [row for row, token in enumerate(ids) if token is not None]
        for logits, row in zip(unfiltered[-1], alive, strict=True):
            logps[row].append(F.log_softmax(logits / (temperature or 1.0), dim=-1)[ids[row]].item())

    monkeypatch.setattr(generate_file, "filter_logits", spy)
    new = generate(model, PROMPTS, 20, temperature=temperature, top_k=10, top_p=0.9, repetition_penalty=1.2, seed=3,
                   stop_ids=stops, on_token=on_token)
    for prompt, row, got in zip(PROMPTS, new, logps):
        ids = torch.tensor([prompt + row])
        with torch.no_grad():
            wanted = token_logps(model, ids[:, :-1], ids[:, 1:], torch.ones(1, ids.size(1) - 1), temperature or 1.0)
        assert len(got) == len(row)
        assert (wanted[0, len(prompt) - 1:] - torch.tensor(got)).abs().max() < 2e-5


def test_errors_and_edges(model):
    with pytest.raises(ValueError, match=f"prompt of 11 tokens \\+ max_new_tokens={T - 10} exceed .* max_seq_len={T}"):
        generate(model, PROMPTS, T - 10)
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one prompt, and one token in each"):
            generate(model, prompts, 4)
    assert generate(model, PROMPTS, 0) == [[]] * 4
    assert [len(row) for row in generate(model, PROMPTS, 1)] == [1] * 4


def test_training_goes_on_after_generating():
    """generate() records no gradients; nothing of that may stay behind in the model."""
    model = random_model("dots1").train()
    model.eval()
    generate(model, PROMPTS, 3)
    model.train()
    hidden = model(torch.randint(0, V, (2, 8)))
    cross_entropy(hidden, model.head_weight, torch.randint(0, V, (2, 8))).backward()
    model.update_router_bias(0.1)
    assert model.embed.weight.grad.abs().sum() > 0


def test_generate_in_bfloat16_autocast(model):
    """The cache takes the autocast dtype; nearly all greedy tokens agree with fp32."""
    prompts = torch.randint(0, V, (64, 6)).tolist()
    wanted = generate(model, prompts, 1, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        got = generate(model, prompts, 2, temperature=0)
    assert sum(a[0] == b[0] for a, b in zip(wanted, got)) >= 56


def count_weight_casts(model, run):
    """Run, and return how many times each parameter was cast to another dtype."""
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    counts = Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in names:
                counts[names[args[0].data_ptr()]] += 1
            return func(*args, **(kwargs or {}))

    with Casts():
        run()
    return counts


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen2"])  # of a mixture the experts are cast each time
def test_weights_are_cast_once_not_once_a_token(kind):
    """Under no_grad autocast keeps the weights it has cast; a token more must not cost another cast of the model."""
    model = random_model(kind, 3)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, PROMPTS, 12, temperature=0)

    counts = count_weight_casts(model, run)
    assert counts["blocks.0.attn.qkv.weight"] == counts["blocks.0.ffn.down.weight"] == 1, counts
    assert max(counts.values()) == 1, counts


def test_softmax_of_huge_logits():
    logits = torch.tensor([[1e30, -1e30, 0.0]])
    assert pick(logits, torch.tensor([0.5]), 1.0).tolist() == [0]
    assert F.softmax(logits, -1).tolist() == [[1.0, 0.0, 0.0]]
