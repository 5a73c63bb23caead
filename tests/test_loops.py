"""The loop of every stage: it stands in main(), clips as it says, resumes bit for bit, and 1 micro-step of 8 rows
is 2 of 4."""
import ast
import dataclasses
import os

import pytest
from conftest import ROOT
from small_runs import STAGES, assert_same, gradient, read_log, run, settings

LOOP = ["DistributedDataParallel", "autocast", "backward", "clip_grad_norm_", "step", "zero_grad", "save"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_whole_loop_stands_in_main(stage):
    """Who reads main() sees how a model is trained: no helper hides a part of it."""
    with open(os.path.join(ROOT, f"{stage}.py"), encoding="utf-8") as f:
        main = next(node for node in ast.parse(f.read()).body if getattr(node, "name", "") == "main")
    calls = [ast.unparse(node.func).split(".")[-1] for node in ast.walk(main) if isinstance(node, ast.Call)]
    wanted = LOOP + ["compile"] * (stage in ("pretrain", "sft"))
    assert not [word for word in wanted if word not in calls]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("clip", [0.01, 1e9, 0.0])
def test_clipping_limits_the_norm_of_the_gradient(place, tmp_path, stage, clip):
    """AdamW's first moment is a tenth of the gradient that it saw; the log has the norm before clipping; 0 is no
    limit."""
    one_update = dict(minibatches=1, ppo_epochs=1) if stage in ("ppo", "grpo") else {}
    checkpoint, log = run(settings(place[0], stage, str(tmp_path), max_steps=1, grad_clip=clip, **one_update))
    norm = log[-1]["norm"]
    assert norm > 0.011
    assert gradient(checkpoint).norm().item() == pytest.approx(min(norm, clip or norm), rel=1e-3)


@pytest.mark.parametrize("stage, changes", [
    *((stage, {}) for stage in STAGES), ("sft", dict(lora_rank=2)), ("reward", dict(lora_rank=2)),
    ("grpo", dict(advantage="rloo"))])
def test_ten_and_ten_steps_are_twenty(place, tmp_path, stage, changes):
    """A run that went on from its checkpoint is, to the last bit, the run that nobody stopped; its log, too."""
    flat = dict(min_lr=1e-3, eval_every=10)  # a learning rate that does not depend on max_steps
    whole = settings(place[0], stage, f"{tmp_path}/whole", **{**flat, **changes}, max_steps=20)
    parts = dataclasses.replace(whole, out_dir=f"{tmp_path}/parts", max_steps=10)
    first, _ = run(whole)
    assert run(parts)[0]["step"] == 10
    second, log = run(dataclasses.replace(parts, max_steps=20))
    assert_same(first, second)
    assert log == read_log(whole.out_dir) and log[-1]["step"] == 20


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_how_rows_are_shared_out_to_micro_steps_does_not_matter(place, tmp_path, stage):
    """2 micro-steps of 4 rows, 4 of 2 and 1 of 8: the same losses and gradient norms."""
    logs = []
    for batch_size, grad_accum in ((4, 2), (2, 4), (8, 1)):
        cfg = settings(place[0], stage, f"{tmp_path}/{batch_size}", max_steps=3, batch_size=batch_size,
                       grad_accum=grad_accum)
        logs.append([[record["loss"], record["norm"]] for record in run(cfg)[1]])
    for other in logs[1:]:
        for ours, theirs in zip(logs[0], other, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
