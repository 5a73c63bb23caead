"""What grpo.py can also do: a teacher that judges each token (on-policy distillation), and adapters (LoRA)."""
import os

import pytest
import torch
from pairs import check_ten_and_ten, make_run, place, read_log, write_folder  # noqa: F401 - place is a fixture

import grpo
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from common.lora import WithoutAdapters, add_lora
from model import ModelConfig, Transformer
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


def test_without_its_adapters_a_model_is_its_base():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, max_seq_len=32))
    ids = torch.randint(0, 64, (2, 9))
    base = model(ids)
    add_lora(model, 4, 8.0, "qkv|out|gate_up|down")
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.1)
    adapted = model(ids)
    assert torch.equal(WithoutAdapters(model)(ids), base) and not torch.allclose(adapted, base)
    assert torch.equal(model(ids), adapted)


def test_adapters_learn_by_rl_over_a_frozen_base(folders, tmp_path):
    """One model is policy and reference: KL is 0 before the first step, the first ratio 1; the checkpoint holds adapters
    alone, and what load_model() merges is another model. 10 + 10 steps are 20."""
    rule = tmp_path / "rule.py"
    rule.write_text("def score(prompt, answer):\n    return answer.count('月')\n")
    cfg = grpo.Config(
        data_dir=f"{folders}/prompts", init_from=f"{folders}/base", out_dir=f"{tmp_path}/run", reward=f"{rule}:score",
        group_size=4, batch_size=4, max_new_tokens=6, lora_rank=2, lr=3e-2, min_lr=3e-2, warmup_steps=1, eval_every=10,
        device="cpu")
    check_ten_and_ten(grpo, cfg)
    first, *steps = read_log(cfg.out_dir)
    assert first["val_kl"] == 0 and all(record["first_ratio_error"] == 0 for record in steps)
    checkpoint = load_checkpoint(cfg.out_dir)
    assert checkpoint["lora"]["rank"] == 2 and all("lora_" in name for name in checkpoint["model"])
    base = load_model(cfg.init_from)[0].state_dict()
    learned = load_model(cfg.out_dir)[0].state_dict()
    assert not torch.equal(base["blocks.0.attn.qkv.weight"], learned["blocks.0.attn.qkv.weight"])
    assert torch.equal(base["embed.weight"], learned["embed.weight"])
