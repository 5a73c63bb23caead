"""What machines need: decoding as it is recorded for a GPU, processes that do not see the same folder, settings of
kernels. What only a GPU can show is in runs/gpu_check.sh."""
import pytest
import torch

from common import decode_graph, generate as generate_file
from common.generate import generate
from oracles import KINDS, V, random_model

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]
HOW = [
    dict(temperature=0),
    dict(seed=3),
    dict(temperature=0.7, top_k=9, seed=4),
    dict(top_p=0.8, seed=5),
    dict(min_p=0.05, repetition_penalty=1.3, seed=6),
    dict(temperature=0, repetition_penalty=1.4),
    dict(seed=7, stop_ids=[3, 11, 17, 23, 31, 45]),
    dict(seed=8, group_size=3, stop_ids=range(0, V, 9)),
    dict(temperature=0, group_size=2, pad_id=44)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW, ids=lambda how: ",".join(how))
def test_recorded_steps_write_the_same_answers(kind, how, monkeypatch):
    """The steps that a GPU records, run as they are on a CPU, against generate(): cache of fixed shape and mask against
    a growing one, ended rows that go on unheard against rows that leave."""
    model = random_model(kind, 1)
    expected = generate(model, PROMPTS, 24, **how)
    shown = [[] for _ in expected]

    def on_token(ids):
        for row, token in zip(shown, ids, strict=True):
            row += [] if token is None else [token]

    monkeypatch.setattr(generate_file, "can_record", lambda model: True)
    assert generate(model, PROMPTS, 24, **how) == expected
    monkeypatch.setattr(decode_graph, "LOOK", 1)
    assert generate(model, PROMPTS, 24, on_token=on_token, **how) == expected == shown
