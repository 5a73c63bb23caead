"""common/generate.py: filters by hand, and generate() against transformers' and against a plain loop over full
forwards."""
import pytest
import torch
from oracles import KINDS, T, V, random_model, twin

from common.generate import filter_logits, generate, pick

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]


@pytest.fixture(scope="module")
def model():
    return random_model("llama_gqa", 3)


# ---------------------------------------------------------------------------- by hand


def test_draws_by_hand():
    """pick: the first token whose cumulated probability exceeds the draw; at temperature 0 the first of the largest."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf, 0.0, -torch.inf, -torch.inf]] * 5)
    uniforms = torch.tensor([0.0, 0.3, 0.34, 0.67, 1 - 2 ** -24])  # the last: the largest float32 under 1
    assert pick(logits, uniforms, 1.0).tolist() == [1, 1, 2, 4, 4]
    assert pick(torch.tensor([[1e30, -1e30, 0.0]]), torch.tensor([0.5]), 1.0).tolist() == [0]
    assert pick(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([0.9]), 0).tolist() == [1]


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


def test_up_to_the_last_position(model):
    """Prompt and answer may fill max_seq_len exactly; the last step still equals a full forward."""
    prompt = PROMPTS[1]
    new = generate(model, [prompt, [3]], T - len(prompt), temperature=0)
    ids = prompt + new[0]
    assert len(ids) == T
    with torch.no_grad():
        assert model.logits(model(torch.tensor([ids])))[0].argmax(-1)[len(prompt) - 1:-1].tolist() == new[0]


# ---------------------------------------------------------------------------- sampling


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


def test_seeds(model):
    """Rows with one prompt differ; without a seed every run does; and the global generator is left alone."""
    assert len({tuple(row) for row in generate(model, [PROMPTS[0]] * 8, 12, seed=1)}) == 8
    torch.manual_seed(5)
    first, uniform = generate(model, [PROMPTS[0]], 20), torch.rand(3)
    torch.manual_seed(5)
    assert first != generate(model, [PROMPTS[0]], 20) and torch.equal(uniform, torch.rand(3))


# ---------------------------------------------------------------------------- ending, streaming, errors


def test_errors_and_edges(model):
    with pytest.raises(ValueError, match=f"prompt of 11 tokens \\+ max_new_tokens={T - 10} exceed .* max_seq_len={T}"):
        generate(model, PROMPTS, T - 10)
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one prompt, and one token in each"):
            generate(model, prompts, 4)
    assert generate(model, PROMPTS, 0) == [[]] * 4
    assert [len(row) for row in generate(model, PROMPTS, 1)] == [1] * 4
    calls = []
    generate(model, PROMPTS, 24, stop_ids=range(V), on_token=calls.append)
    assert len(calls) == 1  # it ends when all rows have ended
