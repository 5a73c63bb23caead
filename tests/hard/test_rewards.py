"""Reward functions that fail, return odd things or are not there, and prompts that do not fit."""
import math

import pytest
from small_runs import read_log, refused, run, settings, spy

import ppo


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
@pytest.mark.parametrize("body, words", [
    ("return None", "failed (TypeError"), ("return float('nan')", "returned [nan], no finite number"),
    ("return 'a'", "failed (ValueError"), ("return 1 / 0", "failed (ZeroDivision")])
def test_a_reward_that_is_no_number_ends_the_run(place, tmp_path, capsys, stage, body, words):
    """It names the answer; nothing is learned from such a step, and nothing is lost."""
    rule = tmp_path / "rule.py"
    rule.write_text(f"def bad(prompt, answer):\n    {body}\n")
    cfg = settings(place[0], stage, str(tmp_path / "run"), reward=f"{rule}:bad", eval_prompts=0)
    with pytest.raises(SystemExit) as left:
        run(cfg)
    said = capsys.readouterr()
    assert left.value.code == 3 and f"error: {rule}:bad {words}" in said.err and "春夜" in said.err
    assert "step 0, stopped by a reward function that failed on an answer" in said.out
    assert [record["step"] for record in read_log(cfg.out_dir)] == [0]


def test_a_rule_that_is_not_there(place, tmp_path):
    for spec, words in (("rule.py", "is not FILE.py:FUNCTION"), ("none.py:f", "is not FILE.py:FUNCTION"),
                        ("rule.py:none", "defines no function 'none'")):
        assert words in refused(settings(place[0], "grpo", str(tmp_path), reward=spec))


def test_only_watched_scores_never_end_a_run(place, tmp_path):
    (tmp_path / "rule.py").write_text("def bad(prompt, answer):\n    return None\n")
    _, log = run(settings(place[0], "ppo", str(tmp_path / "run"), watch=f"{tmp_path}/rule.py:bad", max_steps=1))
    assert math.isfinite(log[-1]["watched"]) and log[-1]["step"] == 1


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_prompts_too_long_and_too_few_answers(place, tmp_path, stage):
    root = place[0]
    words = refused(settings(root, stage, str(tmp_path), max_new_tokens=250))
    assert "max_new_tokens=250 that exceeds the 256 tokens the models can see" in words
    answers = 4 if stage == "ppo" else 8
    words = refused(settings(root, stage, str(tmp_path), minibatches=9))
    assert f"minibatches=9 of only {answers} answers in a micro-step: lower --minibatches" in words
    _, log = run(settings(root, stage, str(tmp_path), max_steps=1, eval_prompts=0))
    assert not any("val_score" in record for record in log)


def test_a_new_kl_coef_is_obeyed(place, tmp_path, monkeypatch):
    calls = spy(monkeypatch, ppo, "token_rewards")
    run(settings(place[0], "ppo", str(tmp_path), max_steps=1))
    run(settings(place[0], "ppo", str(tmp_path), max_steps=2, kl_coef=0.3))
    assert [args[4] for args, _ in calls] == [ppo.Config().kl_coef, 0.3]
    _, log = run(settings(place[0], "ppo", str(tmp_path), max_steps=1, resume=False))
    assert [record["step"] for record in log] == [0, 1]  # a new run has a new log
