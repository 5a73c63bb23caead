"""common/data.py: the order of rows, and documents side by side in a batch."""
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import Split, get_prompts, pad, shift, shuffled
from common.mixed import mixed_rows
from common.distributed import Env


# ---------------------------------------------------------------------------- batches


def test_pad_by_hand():
    """pad: rows to the length of the longest, padding on the right, 0 in the mask there."""
    documents = [(np.array([7, 8, 9, 4]), np.array([0, 0, 1, 1])), (np.array([5, 6]), np.array([0, 1]))]
    ids, mask = pad(documents, pad_id=3)
    assert ids.tolist() == [[7, 8, 9, 4], [5, 6, 3, 3]] and ids.dtype == torch.int64
    assert mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]] and mask.dtype == torch.float32


def test_shift_by_hand():
    """shift: what follows a token is its target, and the mask speaks of targets."""
    inputs, targets, mask = shift(torch.tensor([[7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1]]))
    assert inputs.tolist() == [[7, 8, 9]] and targets.tolist() == [[8, 9, 4]] and mask.tolist() == [[0, 1, 1]]


@pytest.fixture
def ranked():
    """Five answers to two prompts, three to the first; ids and masks tell which is which."""
    documents = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11], [12, 13, 14]]
    masks = [[0, 1, 1], [0, 1], [0, 0, 1, 1], [0, 1], [0, 0, 1]]
    idx = np.cumsum([0] + [len(ids) for ids in documents])
    return Split(np.concatenate(documents).astype(np.uint16), np.concatenate(masks).astype(np.uint8), idx,
                 np.array([0, 0, 0, 1, 1], np.int32), {})


def test_prompt_bounds(ranked):
    assert ranked.prompt_bounds().tolist() == [0, 3, 5]
    numbered_otherwise = Split(ranked.tokens, ranked.mask, ranked.idx, np.array([7, 7, 9, 9, 9], np.int32), {})
    assert numbered_otherwise.prompt_bounds().tolist() == [0, 2, 5]
    assert ranked.prompt_bounds().tolist() == [0, 3, 5]  # remembered for each split by itself


def test_get_prompts_by_hand(ranked):
    """All answers to prompts 1 and 0, each with its mask, and how many answers a prompt has."""
    (ids, mask), sizes = get_prompts(ranked, [1, 0], 0, "cpu")
    assert sizes == [2, 3]
    assert ids.tolist() == [[10, 11, 0, 0], [12, 13, 14, 0], [1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]]
    assert mask.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]]


# ---------------------------------------------------------------------------- order


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_every_epoch_visits_every_row_once(n, seed):
    order = shuffled(n, 0, 3 * n, seed)
    for epoch in range(3):
        assert sorted(order[epoch * n:(epoch + 1) * n]) == list(range(n))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=st.integers(1, 100), first=st.integers(0, 1000), count=st.integers(1, 50), seed=st.integers(0, 1000))
def test_the_order_depends_on_the_place_alone(n, first, count, seed):
    """Any stretch, taken in one piece or several, from anywhere, is the same piece of one endless sequence."""
    assert shuffled(n, first, count, seed).tolist() == shuffled(n, 0, first + count, seed)[first:].tolist()


def test_the_order_changes_with_epoch_and_seed():
    epochs = shuffled(1000, 0, 3000, 1).reshape(3, 1000)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], shuffled(1000, 0, 1000, 2))
    assert shuffled(10**6, 5, 3, 0).dtype == np.int64


def test_every_order_of_an_epoch_is_as_likely():
    """A real permutation: each of the 24 orders of four rows comes up, about as often as any other."""
    counts = Counter(tuple(shuffled(4, 0, 4, seed).tolist()) for seed in range(2400))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert all(55 < n < 150 for n in counts.values()), counts  # 100 each, standard deviation 10


# ---------------------------------------------------------------------------- rows mixed in


def env_of(rank=0, world=1):
    return Env(rank, world, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_mixed_conversations_are_shared_among_processes(ranked, world):
    """Together the processes hold the rows that one would, and their weights are one mean over the learned tokens."""
    seen = []
    for rank in range(world):
        ids, targets, weights = mixed_rows([ranked], 3, 4, 9, 0, env_of(rank, world))
        assert len(ids) == 4 // world
        for row in range(len(ids)):
            learned = weights[row] > 0
            seen.append((ids[row, 0].item(), targets[row][learned].tolist(), weights[row].sum().item()))
    wanted = [ranked.document(i) for i in shuffled(5, 12, 4, 9)]
    n_learned = sum(mask.sum() for _, mask in wanted)
    assert sorted(s[:2] for s in seen) == sorted((ids[0], ids[mask > 0].tolist()) for ids, mask in wanted)
    assert sum(s[2] for s in seen) == pytest.approx(1)
    for first, targets, weight in seen:
        assert weight == pytest.approx(len(targets) / n_learned)


def test_mixed_text_is_cut_into_pieces():
    text = Split(np.arange(128 * 5 + 1, dtype=np.uint16), None, np.arange(0, 128 * 5 + 1, 128), None, {})
    starts = []
    for number in range(5):
        ids, targets, weights = mixed_rows([text], number, 2, 1, 0, env_of())
        assert ids.shape == (2, 127) and torch.equal(targets, ids + 1)
        assert torch.allclose(weights, torch.tensor(1 / 254))
        starts += ids[:, 0].tolist()
    assert sorted(starts) == sorted([0, 128, 256, 384, 512] * 2)  # two epochs
