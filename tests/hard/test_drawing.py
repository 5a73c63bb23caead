"""Filters and draws on random input: against transformers' processors, by frequency, and where sums are rounded."""
import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracles import V, random_model

from common.generate import filter_logits, generate, pick

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]
ONE_BELOW = 1 - 2 ** -24  # the largest float32 under 1


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


def test_the_token_used_for_padding_does_not_matter():
    model = random_model("llama_gqa", 3)
    wanted = generate(model, PROMPTS, 20, temperature=0, repetition_penalty=1.3)
    for pad_id in (1, 44, V - 1):
        assert generate(model, PROMPTS, 20, temperature=0, repetition_penalty=1.3, pad_id=pad_id) == wanted
