"""generate(): rows that end, what streams, groups of answers, and what it refuses."""
import pytest
import torch
import torch.nn.functional as F
from oracles import random_model
from test_generate import OPTIONS, PROMPTS, model  # noqa: F401 (fixture)

import common.generate as generate_file
from common.generate import filter_logits, generate
from common.loss import token_logps


def test_stop_ids(model):
    """A row ends with the first of stop_ids; the others go on as they would have without."""
    free = generate(model, PROMPTS, 24, seed=5)
    stops = (free[0][3], free[2][7])
    stopped = generate(model, PROMPTS, 24, seed=5, stop_ids=stops)
    for row, got in zip(free, stopped):
        ends = [i + 1 for i, token in enumerate(row) if token in stops]
        assert got == row[:ends[0] if ends else None]
    assert len(stopped[0]) <= 4 and len({len(row) for row in stopped}) > 1


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


@pytest.mark.parametrize("kind", ["llama_gqa", "dots1"])
@pytest.mark.parametrize("options", OPTIONS + [dict(temperature=0, repetition_penalty=1.3)])
def test_equal_prompts_are_read_once(kind, options):
    """A prompt that stands there three times goes through the model once, and is answered as by itself."""
    model = random_model(kind, 3)
    rows_seen = []
    model.register_forward_pre_hook(lambda module, inputs: rows_seen.append(tuple(inputs[0].shape)))
    options = dict(seed=40, stop_ids=(3, 17, 40, 77), **options)
    separate = []
    for row in range(12):
        separate += generate(model, [PROMPTS[row // 3]], 16, **{**options, "seed": 40 + row})
    rows_seen.clear()
    assert generate(model, [prompt for prompt in PROMPTS for _ in range(3)], 16, **options) == separate
    assert rows_seen[0] == (4, 11)


@pytest.mark.parametrize("kind", ["llama_gqa", "dots1"])
@pytest.mark.parametrize("temperature", [0, 0.6])
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
            mask = torch.ones(1, ids.size(1) - 1)
            wanted = token_logps(model(ids[:, :-1]), model.head_weight, ids[:, 1:], mask, temperature or 1.0)
        assert len(got) == len(row)
        assert (wanted[0, len(prompt) - 1:] - torch.tensor(got)).abs().max() < 2e-5
