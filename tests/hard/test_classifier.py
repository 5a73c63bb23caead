"""Rewards that see all answers at once: recipes/classifier.py, asked for our own exported reward model."""
import types

import pytest
import torch

from common.checkpoint import load_reward_model, save_checkpoint
from common.distributed import Env
from common.rollout import function_scorer, model_scorer
from model import ModelConfig, ScalarModel
from recipes import classifier
from tokenizer import render_chat, train_tokenizer
from tools import export

CPU = Env(0, 1, torch.device("cpu"), torch.float32)


def test_prompts_are_taken_apart_by_role():
    assert classifier.messages_of("system\nBe brief.\nuser\n1+1=?\n2+2=?\nassistant\n2\nuser\nand 3+3=?\nassistant\n") == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1=?\n2+2=?"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": "and 3+3=?"}]


def test_our_reward_model_scores_alike_through_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="pip install transformers")
    tok = train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], str(tmp_path / "tok"), 300)
    torch.manual_seed(0)
    model = ScalarModel(ModelConfig(vocab_size=320, dim=32, n_layers=2, n_heads=4, max_seq_len=64))
    model.head.bias.data.fill_(0.75)
    save_checkpoint(f"{tmp_path}/run/ckpt.pt", {
        "stage": "reward", "step": 1, "model": model.state_dict(), "model_config": vars(model.config), "config": {},
        "lora": None, "fingerprint": tok.fingerprint, "best_val": 1.0})
    tok.save(f"{tmp_path}/run/tokenizer.model")
    export.main(export.Config(f"{tmp_path}/run", out=f"{tmp_path}/exported"))
    documents = []
    for number, answer in enumerate(["好月", "坏" * 9, "", "春。夜\n好"] * 5):  # more than one batch, unequally long
        turns = [{"role": "user", "content": f"{number}春夜"}]
        prompt, _ = render_chat(tok, turns, add_generation_prompt=True)
        ids = tok.encode(answer) + [tok.im_end_id]
        documents.append((prompt + ids, [0] * len(prompt) + [1] * len(ids)))
    ours = model_scorer(load_reward_model(f"{tmp_path}/run"), tok.pad_id, CPU)(documents)
    monkeypatch.setenv("CLASSIFIER", f"{tmp_path}/exported")
    theirs = function_scorer("recipes/classifier.py:score", tok, CPU)(documents)
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert ours.unique().numel() == 20


@pytest.mark.parametrize("body, scores", [
    ("[len(a) for a in answers]", [1.0, 2.0]),
    ("[0.5]", None),                              # one score for two answers
    ("[1, float('nan')]", None),
    ("1 / 0", None)])
def test_a_function_of_prompts_and_answers_is_called_once(tmp_path, capsys, body, scores):
    rule = tmp_path / "rule.py"
    rule.write_text(f"calls = []\n\n\ndef good(prompts, answers):\n    calls.append(prompts)\n    assert len(calls) == 1\n"
                    f"    return {body}\n")
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special=False: "春" * len(ids), im_end_id=-1, eot_id=-2)
    result = function_scorer(f"{rule}:good", tokenizer, CPU)([([1, 2], [0, 1]), ([1, 2, 3], [0, 1, 1])])
    if scores:
        assert result.tolist() == scores
    else:
        assert result.isnan().all() and "error: " in capsys.readouterr().err
