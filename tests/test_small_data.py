"""A hundred conversations, a run of five steps, rewards of any size: settings that are shares of what there is."""
import json
import types

import pytest
import torch
from small_runs import play, place, run, settings, toy_models, write_folder  # noqa: F401 (fixtures)

import ppo
from common.optim import lr_at
from small_runs import CPU
from tokenizer import render_chat


@pytest.mark.parametrize("decay_steps", [0, 3, 400])
@pytest.mark.parametrize("max_steps", [1, 2, 5, 30, 2000])
def test_a_run_of_any_length_reaches_its_rate_and_comes_down(max_steps, decay_steps):
    """lr_at: the warmup is a tenth of the run, at most 100 steps; what is left is long enough to fall in."""
    cfg = types.SimpleNamespace(lr=1.0, min_lr=0.1, max_steps=max_steps, warmup_steps=0)
    rates = [lr_at(step, cfg, decay_steps) for step in range(max_steps)]
    assert max(rates) == 1.0 and rates.index(1.0) < max(1, max_steps / 5)
    falls = rates[rates.index(1.0):]
    assert falls == sorted(falls, reverse=True) and (max_steps < 30 or rates[-1] < 0.2 + 1 / 3)


def test_a_warmup_longer_than_the_run_is_said(place, tmp_path, capsys):
    """own: warmup_steps is obeyed where it was given, and what that means stands in the output."""
    run(settings(place[0], "sft", str(tmp_path / "a"), max_steps=2, warmup_steps=20))
    assert "warmup_steps=20, but the run ends after 2 steps and never reaches lr=0.001" in capsys.readouterr().out


def test_few_conversations_are_learned_with_the_defaults(place, tmp_path):
    """sft.py: five conversations fill one row, so two epochs would be two steps. It takes 100, no row twice in one."""
    root, tok = place
    talk = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是小智。"}]
    rows = [render_chat(tok, talk)] * 5
    write_folder(f"{tmp_path}/me", tok, "sft", {"train": rows, "val": rows[:1]})
    cfg = settings(root, "sft", str(tmp_path / "out"), data_dir=f"{tmp_path}/me", max_steps=0, batch_size=16,
                   warmup_steps=0, grad_accum=1, lr=1e-2)
    _, log = run(cfg)
    assert log[-1]["step"] == 100 and cfg.batch_size == 1
    assert log[-1]["val_loss"] < 0.2 < log[0]["loss"]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_critic_learns_rewards_of_any_size(play, scale):
    """ppo.py: under a rule the critic begins at the scale of its scores, and values are not clipped: after 60 updates it
    explains half of what the returns differ by, whatever their unit."""
    def count(documents):
        return scale * torch.tensor([float(sum(t < 4 for t, m in zip(ids, mask) if m)) for ids, mask in documents])

    _, log = play(ppo, toy_models(), scorer=count, max_steps=16, lr=1e-9, min_lr=1e-9, kl_coef=0.0)
    assert log[-1]["value_loss"] < 0.75 * log[1]["value_loss"]


def test_what_a_rule_is_given(place, tmp_path):
    """function_scorer: the prompt as texts without control tokens, the answer without the one that ends it."""
    root, tok = place
    with open(f"{tmp_path}/rule.py", "w", encoding="utf-8") as f:
        f.write("import json\ndef show(prompt, answer):\n    print(json.dumps([prompt, answer]), file=open('" + str(tmp_path)
                + "/seen', 'a'))\n    return 0\n")
    from common.rollout import function_scorer
    prompt, _ = render_chat(tok, [{"role": "user", "content": "春夜"}], add_generation_prompt=True)
    answers = [tok.encode("月") + [tok.im_end_id], tok.encode("月") + [tok.im_start_id] + tok.encode("好")]
    function_scorer(f"{tmp_path}/rule.py:show", tok, CPU)([(prompt + a, [0] * len(prompt) + [1] * len(a)) for a in answers])
    with open(f"{tmp_path}/seen") as f:
        seen = [json.loads(line) for line in f]
    assert seen == [["user\n春夜\nassistant\n", "月"], ["user\n春夜\nassistant\n", "月<|im_start|>好"]]
