"""common/distributed.py: who computes which micro-step, sums over processes, devices and dtypes."""
import math

import pytest
import torch
from small_runs import CPU

import pretrain
from common.distributed import (
    Env, all_sum, batch_starts, check_finite, choose_device, choose_dtype, micro_steps, start)


def env_of(rank, world):
    return Env(rank, world, torch.device("cpu"), torch.float32)


def test_micro_steps_by_hand():
    """Four micro-steps of two processes: each its half, all of them once."""
    assert [list(micro_steps(4, env_of(rank, 2))) for rank in range(2)] == [[0, 2], [1, 3]]
    for world in (1, 3, 4):
        shares = [list(micro_steps(12, env_of(rank, world))) for rank in range(world)]
        assert sorted(sum(shares, [])) == list(range(12)) and {len(s) for s in shares} == {12 // world}
    with pytest.raises(SystemExit, match="grad_accum=3 must be a multiple of the 2 processes.*Try --grad_accum=2"):
        micro_steps(3, env_of(0, 2))


def test_batch_starts_by_hand():
    """10 rows in batches of 2 on 2 processes; padded, both make as many batches."""
    assert [list(batch_starts(10, 2, env_of(rank, 2))) for rank in range(2)] == [[0, 4, 8], [2, 6]]
    assert [list(batch_starts(10, 2, env_of(rank, 2), pad=True)) for rank in range(2)] == [[0, 4, 8], [2, 6, 10]]


def test_all_sum_alone():
    assert all_sum([torch.tensor(1.5), 2, True], CPU) == [1.5, 2.0, 1.0]


@pytest.mark.parametrize("device, dtype, words", [
    ("gpu", "auto", "device='gpu': known are auto, cpu, mps, cuda and cuda:N"),
    ("cpu", "bfloat16", "dtype=bfloat16 is for GPUs"), ("cpu", "float16", "dtype=float16 is for GPUs"),
    ("cuda", "auto", "device=cuda, but PyTorch sees 0 such devices"), ("mps", "auto", "device=mps, but PyTorch sees 0"),
    ("cuda:1", "auto", "device=cuda:1, but PyTorch sees 1 such devices")])
def test_a_machine_that_is_not_there_is_refused(monkeypatch, device, dtype, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(device == "cuda:1"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        choose_dtype(dtype, choose_device(device))
    assert words in str(left.value) and "\n" not in str(left.value)


@pytest.mark.parametrize("name, capability, dtype", [
    ("auto", (8, 0), torch.bfloat16), ("auto", (7, 5), torch.float16), ("", (8, 0), torch.bfloat16),
    ("", (7, 5), torch.float32), ("float32", (9, 0), torch.float32), ("float16", (9, 0), torch.float16)])
def test_dtypes_of_gpus(monkeypatch, name, capability, dtype):
    """bf16 where the GPU has it; before Ampere fp16, which needs a scaler, for those stages that have one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype(name, torch.device("cuda")) == dtype


def test_start_prints_what_was_changed(capsys):
    env = start(pretrain.Config(device="cpu", lr=0.5), "float32")
    out = capsys.readouterr().out
    assert env.is_main and env.world == 1 and env.dtype == torch.float32 and env.device.type == "cpu"
    assert "lr=0.5" in out and "device=cpu" in out and "weight_decay" not in out
    first = torch.rand(1)
    start(pretrain.Config(device="cpu"))
    assert torch.equal(first, torch.rand(1))  # seeded


def test_a_norm_that_is_not_finite_ends_the_run():
    """Under fp16 it only says that the scaler has made the gradient too large."""
    cfg = pretrain.Config(out_dir="out/here", lr=0.25)
    check_finite(1.0, cfg, CPU)
    check_finite(math.inf, cfg, Env(0, 1, CPU.device, torch.float16))
    for norm in (math.nan, math.inf):
        with pytest.raises(SystemExit, match=f"gradient's norm is {norm}. out/here/ckpt.pt is the last good .*0.25"):
            check_finite(norm, cfg, CPU)
