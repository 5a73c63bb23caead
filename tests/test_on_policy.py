"""On-policy distillation (grpo.py --teacher): what its advantage is the gradient of, and a student that follows."""
import os

import pytest
import torch
from pairs import make_run, place, read_log, write_folder  # noqa: F401 - place is a fixture

import grpo
from common.checkpoint import load_checkpoint, save_checkpoint
from tokenizer import render_chat


def test_the_advantage_is_the_gradient_of_the_reverse_kl():
    """Summed over all answers by their chance, -(log q - log p) grad log p is grad KL(p || q)."""
    torch.manual_seed(0)
    student = torch.randn(6, requires_grad=True)
    teacher = torch.randn(6).log_softmax(0)
    logps = student.log_softmax(0)
    kl = (logps.exp() * (logps - teacher)).sum()
    wanted, = torch.autograd.grad(kl, student, retain_graph=True)
    # six answers of one token each; a chance is a weight on the advantage
    old = logps.detach()[:, None]
    advantages = (teacher[:, None] - old) * old.exp()
    loss, _ = grpo.policy_loss(logps[:, None], old, advantages, torch.ones(6, 1), grpo.Config())
    found, = torch.autograd.grad(loss, student)
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.fixture(scope="module")
def folders(place):  # noqa: F811
    root, tok = place
    if not os.path.exists(f"{root}/prompts"):
        prompts = [render_chat(tok, [{"role": "user", "content": f"{i}春"}], add_generation_prompt=True) for i in range(20)]
        write_folder(f"{root}/prompts", tok, "prompts", {"train": prompts, "val": prompts[:8]})
        make_run(f"{root}/teacher", tok, seed=2)
        # a random model finds all tokens nearly equally likely: this teacher has opinions
        checkpoint = load_checkpoint(f"{root}/teacher")
        for p in checkpoint["model"].values():
            p *= 5 if p.ndim > 1 else 1
        save_checkpoint(f"{root}/teacher/ckpt.pt", checkpoint)
    return root


def test_a_student_follows_its_teacher(folders, tmp_path):
    """The KL from the teacher falls to a part of what it was, and the first ratio is exactly 1."""
    cfg = grpo.Config(
        data_dir=f"{folders}/prompts", init_from=f"{folders}/base", out_dir=str(tmp_path), teacher=f"{folders}/teacher",
        group_size=1, batch_size=16, max_new_tokens=6, max_steps=40, lr=1e-2, min_lr=1e-3, warmup_steps=1, kl_coef=0,
        eval_every=40, device="cpu")
    grpo.main(cfg)
    first, *steps = read_log(str(tmp_path))
    assert all(record["first_ratio_error"] == 0 for record in steps)
    assert 0 <= steps[-1]["val_kl"] < 0.5 * first["val_kl"]
    assert steps[-1]["val_score"] > first["val_score"]


def test_a_reward_or_a_teacher(folders, tmp_path):
    cfg = grpo.Config(data_dir=f"{folders}/prompts", init_from=f"{folders}/base", out_dir=str(tmp_path),
                      teacher=f"{folders}/teacher", reward="recipes/sums.py:right")
    with pytest.raises(SystemExit, match="give one of"):
        grpo.main(cfg)
