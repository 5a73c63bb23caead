"""Several processes compute what one does: every stage, and what is particular about each. And how torchrun ends."""
import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from ranks import run_in_ranks
from small_runs import MOE, assert_same, make_run, read_log, run, settings, write_pairs

from common.checkpoint import load_checkpoint
from common.data import shuffled
from configurator import changed
from tokenizer import render_chat

STEPS = 20
STAGES = {  # in 2 and in 4 processes, 20 steps
    "pretrain": ("pretrain", dict(batch_size=2)),
    "pretrain experts": ("pretrain", dict(MOE, batch_size=2, optimizer="muon")),
    "sft": ("sft", {}),
    "sft adapters": ("sft", dict(lora_rank=2)),
    "reward": ("reward", dict(batch_size=2)),
    "dpo": ("dpo", dict(batch_size=2)),
    "ppo": ("ppo", dict(batch_size=1, minibatches=1)),
    "grpo": ("grpo", dict(batch_size=1))}
CASES = {  # in 2 processes, a few steps
    "muon untied": ("pretrain", dict(optimizer="muon", tie_embeddings=False)),
    "experts": ("pretrain", MOE),
    "sft experts": ("sft", dict(init_from="experts")),
    "sft in shards": ("sft", dict(shard=True)),
    "sft adapters in shards": ("sft", dict(shard=True, lora_rank=2)),
    "reward uneven": ("reward", dict(data_dir="uneven", batch_size=40, max_steps=2, eval_every=2)),
    "dpo uneven": ("dpo", dict(data_dir="uneven", batch_size=40, max_steps=2, eval_every=2)),
    "dpo mixed": ("dpo", dict(ptx_dir="talks", ptx_coef=0.7, ptx_rows=6)),
    "ppo two answers": ("ppo", dict(batch_size=2, minibatches=2)),
    "ppo mixed": ("ppo", dict(ptx_dir="text", ptx_coef=0.7, ptx_rows=6)),
    "grpo variants": ("grpo", dict(advantage="rloo", skip_flat_groups=True, ratio="sequence", minibatches=2)),
    "grpo nothing to learn": ("grpo", dict(
        init_from="untied", batch_size=1, group_size=4, advantage="rloo", skip_flat_groups=True, minibatches=1,
        kl_coef=0.0, no_eos_penalty=0.0, reward="flat.py:three"))}


def write_uneven(folder, tok):
    """160 prompts, of which the 40 of the first micro-step have long answers, the others short ones: the first need
    several forward passes of 4,096 tokens, the others one. A rank must not wait for another one's passes."""
    long = set(shuffled(160, 0, 40, 1234).tolist())
    prompts = []
    for i in range(160):
        turns = [{"role": "user", "content": f"{i % 10}春"}]
        fill = "月" * (45 if i in long else 1)
        prompts.append([render_chat(tok, turns + [{"role": "assistant", "content": word + fill}]) for word in "好坏"])
    write_pairs(folder, tok, {"train": prompts, "val": prompts[:3]})


@pytest.fixture(scope="module")
def root(place):
    root, tok = place
    shutil.rmtree(f"{root}/uneven", ignore_errors=True)  # this fixture may be made twice
    write_uneven(f"{root}/uneven", tok)
    make_run(f"{root}/experts", tok, **MOE)
    make_run(f"{root}/untied", tok, tie_embeddings=False)
    with open(f"{root}/flat.py", "w", encoding="utf-8") as f:
        f.write("def three(prompt, answer):\n    return sum(map(ord, answer)) % 7 * (prompt.count('春夜') == 3)\n")
    return root


def config_of(root, name, out):
    stage, changes = {**STAGES, **CASES}[name]
    steps = dict(max_steps=STEPS, eval_every=10) if name in STAGES else dict(max_steps=4, eval_every=2)
    return settings(root, stage, f"{root}/{out}-{name}", **{**dict(steps, grad_accum=4, lr=1e-4), **changes})


@pytest.fixture(scope="module")
def together(root):
    """A function: the configs of all runs in so many processes; 1: in this one."""
    done = {}

    def configs(processes):
        if processes not in done:
            names = [*STAGES, *CASES] if processes < 4 else STAGES
            done[processes] = {name: config_of(root, name, processes) for name in names}
            if processes == 1:
                for cfg in done[1].values():
                    run(cfg)
            else:
                runs = [(type(cfg).__module__, dataclasses.asdict(cfg)) for cfg in done[processes].values()]
                run_in_ranks(processes, runs, f"{root}/runs.json")
        return done[processes]

    return configs


@pytest.mark.parametrize("processes, name", [
    *((2, name) for name in [*STAGES, *CASES]), *((4, name) for name in STAGES)])
def test_processes_compute_what_one_does(together, processes, name):
    """Losses, norms, scores of every step, and the weights at the end. What a micro-step generates depends on
    (seed, step, micro-step), not on who generates it; experts count the load of all processes; sums are not means
    of one rank's part."""
    one, several = together(1)[name], together(processes)[name]
    records = read_log(one.out_dir)
    assert records[-1]["step"] == one.max_steps
    assert_same(records, read_log(several.out_dir), atol=1e-4 if "uneven" in name else 2e-5)
    a, b = load_checkpoint(one.out_dir), load_checkpoint(several.out_dir, shards_too=True)
    if "shards" not in name:
        assert_same(dict(a["model"]), dict(b["model"]), atol=1e-5)
    assert a.get("best_val", 0) == pytest.approx(b.get("best_val", 0), abs=1e-4)
    if "experts" in name:
        assert a["model"]["blocks.1.ffn.bias"].any()
    if name == "grpo nothing to learn":
        # in some steps one process has flat groups alone, and the other does not
        three = [bool(i % 3 == 2) for i in shuffled(24, 0, 16, 1234)]
        mine = {(any(three[i:i + 4:2]), any(three[i + 1:i + 4:2])) for i in range(0, 16, 4)}
        assert mine & {(True, False), (False, True)}
        assert sum(record["norm"] > 0 for record in records[1:]) > 1


# ---------------------------------------------------------------------------- torchrun


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain.py"]
    return subprocess.Popen([*command, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_an_error_under_torchrun_is_said_once(tmp_path):
    """Both processes come to the same error; a user reads one line of it, and no traceback of ours."""
    done = torchrun(f"--data_dir={tmp_path}/none", "--device=cpu", "--dtype=float32", "--grad_accum=2")
    lines = done.communicate(timeout=110)[0].splitlines()
    assert done.returncode == 1
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1 and f"no data in '{tmp_path}/none'" in errors[0]
    frames = [line for line in lines if 'File "' in line]
    assert not [line for line in frames if "site-packages" not in line and "frozen" not in line], frames


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes of torchrun in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others_and_is_named(place, tmp_path, rank):
    """kill -9 of one of two processes: no other waits for it for ever, torchrun says which one it was, and what was
    saved before is whole."""
    cfg = settings(place[0], "pretrain", str(tmp_path / "two"), max_steps=1_000_000, eval_every=2)
    done = torchrun(*(f"--{k}={v}" for k, v in changed(cfg).items()))
    for line in done.stdout:
        if line.startswith("step 5/"):
            break
    with open(f"/proc/{done.pid}/task/{done.pid}/children") as f:
        for pid in f.read().split():
            with open(f"/proc/{pid}/environ") as environ:
                if f"RANK={rank}" in environ.read().split("\0"):
                    os.kill(int(pid), signal.SIGKILL)
    said = done.communicate(timeout=60)[0]
    assert done.returncode == 1
    cause = said.split("Root Cause")[1]
    assert f"rank      : {rank} (local_rank: {rank})" in cause and "(SIGKILL)" in cause
    assert load_checkpoint(cfg.out_dir)["step"] >= 4
