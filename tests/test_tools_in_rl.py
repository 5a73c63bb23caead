"""Tools while a policy learns (rollout.py): replies are read and never learned, and log-probs stay exact."""
import types

import pytest
import torch
from small_runs import CPU, run, settings

from common import generate as generation
from common.checkpoint import load_model
from common.data import pad, shift
from common.loss import token_logps
from common.rollout import rollout
from tokenizer import render_chat

CFG = types.SimpleNamespace(max_new_tokens=8, temperature=1.0, turns=3)


def reply_to(text):
    """A tool for models that say nothing sensible: every turn of an even length calls it."""
    return "好" * (1 + len(text) % 3) if len(text) % 2 == 0 else None


@pytest.fixture
def talker(place):
    """A random model that ends its turns often, its tokenizer, and prompts of different lengths."""
    root, tok = place
    model, _, _ = load_model(f"{root}/base")
    with torch.no_grad():
        model.embed.weight[tok.im_end_id] *= 100  # tied: a likely next token, or a very unlikely one
    prompts = []
    for length in (1, 4, 2):
        turns = [{"role": "user", "content": "春" * length}]
        prompts += [render_chat(tok, turns, add_generation_prompt=True)[0]] * 4
    return model, tok, prompts


def test_turns_and_masks(talker):
    """Each document is what the chat template makes of its turns; 1 stands on the model's words alone."""
    model, tok, prompts = talker
    documents = rollout(model, prompts, CFG, tok, 5, CPU, reply_to)
    turns = []
    for number, (ids, mask) in enumerate(documents):
        assert ids[:len(prompts[number])] == prompts[number] and len(ids) == len(mask)
        # the learned stretches, and what stands between them
        starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        ends = [i for i in range(1, len(ids) + 1) if mask[i - 1] and (i == len(ids) or not mask[i])]
        turns.append(len(starts))
        for end, start in zip(ends, starts[1:]):
            said = tok.decode(ids[starts[ends.index(end)]:end], skip_special=True)
            tool = [{"role": "tool", "content": reply_to(said)}]
            assert ids[end:start] == tok.encode("\n") + render_chat(tok, tool, add_generation_prompt=True)[0]
            assert ids[end - 1] == tok.im_end_id
        last = tok.decode(ids[starts[-1]:], skip_special=True)
        assert len(starts) == 3 or reply_to(last) is None or ids[-1] != tok.im_end_id
    assert set(turns) == {1, 2, 3}


def test_a_row_says_the_same_whoever_else_goes_on(talker):
    model, tok, prompts = talker
    together = rollout(model, prompts, CFG, tok, 5, CPU, reply_to)
    alone = rollout(model, prompts[:4], CFG, tok, 5, CPU, reply_to)
    assert together[:4] == alone


def test_log_probs_are_those_of_sampling(talker, monkeypatch):
    """The training forward gives every sampled token of every turn the log-prob it was drawn with."""
    model, tok, prompts = talker
    drawn = {}
    real = generation.pick

    def pick(logits, uniforms, temperature):
        ids = real(logits, uniforms, temperature)
        for uniform, token, row in zip(uniforms.tolist(), ids.tolist(), logits.log_softmax(-1)):
            drawn[uniform, token] = row[token].item()
        return ids

    monkeypatch.setattr(generation, "pick", pick)
    documents = rollout(model, prompts, CFG, tok, 5, CPU, reply_to)
    ids, targets, mask = shift(*pad(documents, tok.pad_id))
    with torch.no_grad():
        logps = token_logps(model(ids), model.head_weight, targets, mask, 1.0)
    trained = sorted(logps[mask > 0].tolist())
    assert len(trained) == len(drawn)
    assert torch.allclose(torch.tensor(trained), torch.tensor(sorted(drawn.values())), atol=1e-4)


def test_the_first_ratio_is_one(place, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def tool(text):\n    return '好' if len(text) % 2 else None\n\n\n"
                    "def score(prompt, answer):\n    return answer.count('tool')\n")
    _, (_, *steps) = run(settings(place[0], "grpo", f"{tmp_path}/run", reward=f"{rule}:score",
                                  environment=f"{rule}:tool", turns=3))
    assert {record["first_ratio_error"] for record in steps} == {0}
