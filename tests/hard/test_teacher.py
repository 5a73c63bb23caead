"""What grpo.py can also do: a teacher that judges each token (on-policy distillation), and adapters (LoRA)."""
import pytest
import torch
from small_runs import make_run, run, settings

import grpo
from common.checkpoint import load_checkpoint, load_model, save_checkpoint


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


@pytest.fixture
def teacher(place, tmp_path):
    """A model with opinions: a random one finds all tokens nearly equally likely."""
    folder = f"{tmp_path}/teacher"
    make_run(folder, place[1], seed=5)
    checkpoint = load_checkpoint(folder)
    for p in checkpoint["model"].values():
        p *= 5 if p.ndim > 1 else 1
    save_checkpoint(f"{folder}/ckpt.pt", checkpoint)
    return folder


def test_a_student_follows_its_teacher(place, teacher, tmp_path):
    """The KL from the teacher falls to a part of what it was, and the first ratio is exactly 1."""
    _, (first, *steps) = run(settings(
        place[0], "grpo", f"{tmp_path}/run", teacher=teacher, reward="", group_size=1, batch_size=64, grad_accum=1,
        max_new_tokens=4, max_steps=40, lr=2e-2, min_lr=2e-3, warmup_steps=1, kl_coef=0, eval_every=40, eval_prompts=8))
    assert all(record["first_ratio_error"] == 0 for record in steps)
    kl = [record["kl"] for record in steps]
    assert 0 < sum(kl[-5:]) < 0.6 * sum(kl[:5])
    assert steps[-1]["val_kl"] < first["val_kl"]


def test_adapters_learn_by_rl_over_a_frozen_base(place, tmp_path):
    """KL from the base is 0 before the first step, the first ratio 1; the checkpoint holds
    adapters alone, and what load_model() merges is another model."""
    cfg = settings(place[0], "grpo", f"{tmp_path}/run", lora_rank=2, lr=3e-2, max_new_tokens=6)
    checkpoint, (first, *steps) = run(cfg)
    assert first["val_kl"] == 0 and all(record["first_ratio_error"] == 0 for record in steps)
    assert checkpoint["lora"]["rank"] == 2 and all("lora_" in name for name in checkpoint["model"])
    base = load_model(cfg.init_from)[0].state_dict()
    learned = load_model(cfg.out_dir)[0].state_dict()
    assert not torch.equal(base["blocks.0.attn.qkv.weight"], learned["blocks.0.attn.qkv.weight"])
    # of the embedding, the rows of the chat tokens learn
    moved = (base["embed.weight"] != learned["embed.weight"]).any(dim=1).nonzero().flatten().tolist()
    assert moved and set(moved) <= set(place[1].special_names)
