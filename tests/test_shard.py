"""--shard=True: a model split among processes (FSDP2) learns, is saved and goes on as a whole one does."""
import dataclasses
import os

import pytest
import torch

from common import load_checkpoint, load_model
from ranks import run_in_ranks
from test_pretrain import MOE, data, log_of, main, quiet_process, settings  # noqa: F401 (fixtures)

# what a run in shards must get right, each in one of three: tied embeddings, blocks computed again, Muon, experts
KINDS = {
    "dense": dict(checkpoint_blocks=True),
    "muon": dict(optimizer="muon", tie_embeddings=False),
    "experts": dict(MOE)}
STEPS = 8
HALF = 4


def close(a, b):
    """Compare the weights and the optimizers' state of two checkpoints."""
    assert list(a["model"]) == list(b["model"])
    for name, weight in a["model"].items():
        assert type(b["model"][name]) is torch.Tensor and b["model"][name].dtype == weight.dtype
        assert (weight - b["model"][name]).abs().max() < 1e-6, name
    for ours, theirs in zip(a["optimizers"], b["optimizers"], strict=True):
        assert ours["param_groups"] == theirs["param_groups"]
        for number, values in ours["state"].items():
            assert values.keys() == theirs["state"][number].keys()
            for key, value in values.items():
                assert (value - theirs["state"][number][key]).abs().max() < 1e-5, (number, key)


def same_losses(a, b):
    assert len(a) == len(b)
    for ours, theirs in zip(a, b):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5)


@pytest.mark.parametrize("processes", [2])
def test_shards_equal_one_process(settings, tmp_path, processes):  # noqa: F811
    """Losses, norms, weights and optimizer state of a run in shards; saved half-way, each goes on in another number of
    processes, sharded or not."""
    wholes = {}
    firsts = []
    for kind, changes in KINDS.items():
        whole = settings(**changes, max_steps=STEPS, eval_every=HALF, batch_size=2, grad_accum=8,
                         out_dir=str(tmp_path / kind))
        wholes[kind] = whole
        main(whole)
        sharded = dataclasses.replace(whole, shard=True, out_dir=f"{whole.out_dir}-shards")
        firsts.append(("pretrain", dataclasses.asdict(sharded)))
    run_in_ranks(2, firsts, tmp_path / "runs.json")
    for kind, whole in wholes.items():
        same_losses(log_of(whole.out_dir), log_of(f"{whole.out_dir}-shards"))
        close(load_checkpoint(whole.out_dir), load_checkpoint(f"{whole.out_dir}-shards"))
