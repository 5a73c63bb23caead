"""sample.py: the same seed says the same, which run speaks, and which turns of a long chat are forgotten."""
import os

import pytest
from small_runs import make_run

from common.checkpoint import load_model
from sample import Config, fit, main
from tokenizer import render_chat


@pytest.fixture
def runs(place, tmp_path, monkeypatch):
    """A function that makes the run out/NAME, `age` seconds older than the newest."""
    monkeypatch.chdir(tmp_path)

    def make(name, stage, age):
        make_run(f"out/{name}", place[1], stage=stage)
        os.utime(f"out/{name}/ckpt.pt", (1e9 - age, 1e9 - age))
    return make


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def sampled(root, capsys, **settings):
    main(Config(**{**dict(out_dir=f"{root}/base", max_new_tokens=8, device="cpu", start="春夜月"), **settings}))
    return capsys.readouterr().out


def test_seeds_greedy_and_num_samples(place, capsys):
    root = place[0]
    one = sampled(root, capsys, seed=1)
    assert one == sampled(root, capsys, seed=1) and one != sampled(root, capsys, seed=2)
    assert sampled(root, capsys, temperature=0, seed=1) == sampled(root, capsys, temperature=0, seed=2)
    five = sampled(root, capsys, seed=1, num_samples=5)
    assert five.startswith(one + "\n") and five.count(one) == 1 and five.count("春夜月") == 5
    assert five == sampled(root, capsys, seed=1, num_samples=5, batch_size=2)  # a sample depends on its number alone


def test_a_long_prompt_takes_no_room_from_the_others_of_its_batch(place, tmp_path, capsys):
    root, tok = place
    room = load_model(f"{root}/base")[0].trained_len
    lines = ["春夜", "月" * (room - 4)]
    assert room - 3 <= len(tok.encode_start(lines[1])) < room
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    alone = sampled(root, capsys, start=lines[0], num_samples=2)
    both = sampled(root, capsys, start="", prompts=str(tmp_path / "lines.txt"))
    assert both.startswith(alone.split("\n\n")[0])


def test_newest_run_of_the_right_kind(runs, capsys):
    """Texts are continued by the newest pretrained run, however many stages came after; chat by the newest chat run."""
    words = {False: "pretrain", True: "sft or ppo or grpo or dpo"}
    for talks in (False, True):
        with pytest.raises(SystemExit, match=f"no {words[talks]} run under 'out/'. Train one first"):
            main(Config(start="春", device="cpu", chat=talks))
    # from old to new: as the quickstart leaves them, and a second pretrained run older than the first
    for age, name in enumerate(("dpo", "grpo", "ppo", "reward", "sft", "pretrain", "pretrain-before")):
        runs(name, name.partition("-")[0], age)
    for chats, named in ((False, "out/pretrain: pretrain"), (True, "out/dpo: dpo")):
        main(Config(start="春", device="cpu", max_new_tokens=2, chat=chats))
        said = capsys.readouterr().err
        assert named in said and "--out_dir=" in said
    for gone, stage in (("dpo", "grpo"), ("grpo", "ppo"), ("ppo", "sft")):
        os.remove(f"out/{gone}/ckpt.pt")
        main(Config(start="春", device="cpu", max_new_tokens=2, chat=True))
        assert f"out/{stage}: {stage}" in capsys.readouterr().err
    main(Config(out_dir="out/pretrain-before", start="春", device="cpu", max_new_tokens=2, chat=True))  # if one insists
    said = capsys.readouterr().err
    assert "out/pretrain-before: pretrain" in said and "has learned to go on with a text, not to answer" in said
    with pytest.raises(SystemExit, match="reward model"):
        main(Config(out_dir="out/reward", start="春", device="cpu"))


def test_fit_drops_whole_oldest_turns(place):
    tok, system = place[1], [{"role": "system", "content": "好"}]
    history = system + turns("春" * 9, "夜", "月", "霜" * 5, "坏")
    size = {k: len(render_chat(tok, system + history[k:], add_generation_prompt=True)[0]) for k in (1, 3, 5)}
    for room, first in ((size[1], 1), (size[1] - 1, 3), (size[3] - 1, 5), (size[5] - 1, 5)):
        kept, ids = fit(history, tok, room)
        assert (kept, ids) == (system + history[first:], render_chat(tok, kept, add_generation_prompt=True)[0])
    assert fit(history[1:], tok, 1)[0] == turns("坏")
