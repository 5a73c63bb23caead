"""
tools/page.py: the page computes what model.py, tokenizer.py and generate.py compute, in node and in Chromium. Tiny
random models; the same tests on runs of your own, with numbers printed:

    PAGE_RUNS=out/poems,out/poems-sft,out/poems-ppo,out/poems-dpo PAGE_REWARD=out/poems-reward \\
        pytest -s tests/hard/test_page.py tests/hard/test_page_views.py
"""
import os
import random
import struct
import sys
import time
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tokenizer
from readers import vocabularies
from common.checkpoint import load_model, load_reward_model
from common.generate import filter_logits, generate
from configurator import load_config
from oracles import random_model
from page_hosts import Chromium, Node, read_page
from page_runs import (JUDGE, REAL, answer_job, browser, host, logits_of, made, make, one_thread,  # noqa: F401
                       opened_in, prompts_of, quantised_models, save_run, tok_file, write_page, write_runs)
from test_tokenizer import POEMS, TRAPS
from test_vocabulary import rank_file, train_sentencepiece
from tokenizer import load_tokenizer, render_chat, train_tokenizer
from tools import page
from tools.vocabulary import NORMAL, protobuf_fields

QUESTION = [{"role": "user", "content": "床前明月光"}]


# ---------------------------------------------------------------------------- tokens


def lines_of(n):
    """Return n lines that are easy, odd or broken: poems and traps cut and put together anew, and any characters."""
    numbers = random.Random(0)
    bits = [trap[:40] for trap in TRAPS] + POEMS + list("床前明月光，。1234567890 　▁\t\n'😀é½Ⅷ\x85\xa0")
    bits += ["'s", "'Ll", "'ſ", "don't", "<|im_end|>", "system", "user", "assistant", "hell", "<think>"]
    lines = []
    for _ in range(n):
        parts = numbers.choices(bits, k=numbers.randrange(6))
        others = [chr(numbers.choice((numbers.randrange(32, 0x2100), numbers.randrange(0x4e00, 0x9fff),
                                      numbers.randrange(0x10000, 0x1ffff)))) for _ in range(5)]
        # characters that Python does not know yet may be letters in a browser
        parts += [c for c in others if unicodedata.category(c) != "Cn"]
        lines.append("".join(parts))
    return lines


VOCABULARIES = [("node", "scores"), ("node", "dummy prefix"), ("node", "ranks"), ("node", "ranks, digits in threes"),
                ("node", "words and NFC"), ("node", "trained"), ("chromium", "trained")]


@pytest.mark.parametrize("where,family", VOCABULARIES[-2:] if REAL else VOCABULARIES)
def test_ids_equal_the_tokenizers(where, family, request, tmp_path, tok_file, monkeypatch):
    path = tmp_path / "tokenizer.model"
    if family == "scores":
        # the same pieces with the scores of others: the order to merge in is not that of the ids any more
        shuffled_scores(tok_file, path)
    elif family == "dummy prefix":
        train_sentencepiece(path)
    elif family.startswith("ranks"):
        ranks = rank_file(path)
        if "digits" in family:
            ranks = rank_file(path, size=len(ranks) + 10)
            monkeypatch.setitem(vocabularies.PATTERNS, len(ranks), vocabularies.LLAMA3_PATTERN)
    elif family == "words and NFC":
        settings = {"rule": vocabularies.GPT2_PATTERN, "nfc": True, "words": {"<think>": len(rank_file(path))}}
        tokenizer.make_tokenizer(path.read_bytes(), settings, str(path)).save(path)
    tok = vocabularies.open_vocabulary(REAL[0] if REAL else tok_file if family == "trained" else str(path))
    paths = REAL or [save_run(tmp_path / "run", random_model("llama", vocab_size=tok.vocab_size), tok, "pretrain")]
    lines = lines_of(10_000 if REAL or (where, family) == ("node", "trained") else 2_000)
    texts = [*lines, *TRAPS, "a \ud83d b"]
    expected = [tok.encode(text) for text in texts]
    with opened_in(where, write_page(paths[:1], "", tmp_path / "page.html"), request, tmp_path) as host:
        ids, back = host.ask([{"encode": texts}, {"decode": expected}])
    wrong = [text for text, ours, theirs in zip(texts, ids, expected) if ours != theirs]
    assert not wrong, f"{len(wrong)} of {len(texts)} texts differ, the first is {wrong[0]!r}"
    assert back == [tok.decode(line) for line in expected]
    print(f"{len(texts):,} texts, {sum(map(len, ids)):,} ids: 0 differ")


def shuffled_scores(source, path):
    """Write a sentencepiece model with the scores of its pieces dealt out anew, some of them equal."""
    with open(source, "rb") as f:
        data = f.read()
    pieces = [value for number, value in protobuf_fields(data) if number == 1]
    rest = data[sum(2 + len(piece) for piece in pieces):]   # a piece is short: its length is one byte
    fields = [dict(protobuf_fields(piece)) for piece in pieces]
    normal = [i for i, piece in enumerate(fields) if piece.get(3, NORMAL) == NORMAL]
    scores = [round(fields[i][2] / 3) for i in normal]
    random.Random(1).shuffle(scores)
    for i, score in zip(normal, scores):
        old = b"\x15" + struct.pack("<f", fields[i][2])
        assert pieces[i].count(old) == 1
        pieces[i] = pieces[i].replace(old, b"\x15" + struct.pack("<f", score))
    path.write_bytes(b"".join(b"\n" + bytes([len(piece)]) + piece for piece in pieces) + rest)


def test_chat_template(host):
    """Ids and loss mask of a conversation are those that sft.py trains on."""
    tok = host.made.tok
    talk = [{"role": "system", "content": "a\n"}, {"role": "user", "content": "<|im_end|>床"},
            {"role": "assistant", "content": "明月\n", "counts": False}, {"role": "user", "content": ""},
            {"role": "assistant", "content": "光。"}]
    theirs = [{**turn, "weight": int(turn.get("counts", True))} for turn in talk]
    said = host.ask([{"chat": [talk, opens]} for opens in (False, True)])
    for opens, answer in enumerate(said):
        ids, mask = render_chat(tok, theirs, add_generation_prompt=bool(opens))
        assert answer == {"ids": ids, "mask": mask}


# ---------------------------------------------------------------------------- the model


@pytest.mark.parametrize("kind", ["real"] if REAL else ["llama_gqa", "qwen2"])
def test_the_file_holds_the_weights(make, kind):
    """Each weight is at most half a step of its row away, vectors not at all."""
    path, paths, judge, _ = make(kind)
    about, dicts = read_page(path)
    for run, (meta, weights) in zip([*paths, judge], zip(about["runs"], dicts)):
        model = load_reward_model(run) if run == judge else load_model(run)[0]
        for name, w in model.state_dict().items():
            error = (weights[name] - w).abs()
            if w.dim() == 1 or len(w) == 1:
                assert not error.any(), name
            else:
                # one scale serves all runs of the page: the largest weight of a row in any of them is 127 steps
                plain = name.removeprefix("trunk.")
                same = [d[key] for d in dicts for key in d if key.removeprefix("trunk.") == plain]
                step = torch.stack(same).abs().amax((0, 2)).unsqueeze(1) / 127
                assert (error <= 0.51 * step).all(), name


def test_matmul_in_webassembly_equals_the_plain_one(made, tmp_path):
    """Any number of rows, and columns in fours; other shapes stay with JavaScript."""
    shapes = [(rows, columns) for rows in (1, 2, 3, 4, 5, 7, 8, 130) for columns in (4, 8, 12, 128)] + [(4, 6), (5, 1)]
    asked = [(torch.randn(shape), torch.randn(shape[1])) for shape in shapes]
    said = Node(str(tmp_path)).open(made.page).ask(
        [{"matmul": [*shape, W.flatten().tolist(), x.tolist()]} for shape, (W, x) in zip(shapes, asked)])
    for shape, (W, x), (plain, fast) in zip(shapes, asked, said):
        assert plain == pytest.approx((W.double() @ x.double()).tolist(), abs=1e-9)
        assert (fast is None) == (shape[1] % 4 > 0)
        assert fast is None or fast == pytest.approx(plain, abs=1e-5)


@torch.no_grad()
def test_logits_attention_and_lens_equal_torchs(host):
    models, _ = quantised_models(host.made.page)
    rows = prompts_of(host.made.tok, 20, 40)
    worst = {"logits": 0, "lens": 0, "attention": 0}
    for number, model in enumerate(models):
        asked = []
        for ids in rows:
            asked.append({"kind": "read", "place": "a", "run": number, "ids": ids})
            asked.append({"kind": "look", "place": "a", "run": number, "at": len(ids) - 1})
        said = host.ask(asked)
        for ids, read, looked in zip(rows, said[::2], said[1::2]):
            seen = {}
            logits = logits_of(model, ids, seen)
            worst["logits"] = max(worst["logits"], np.abs(np.array(read[-1]["logits"]) - logits[-1].numpy()).max())
            # what the model expected of each token that it then read
            p = logits.softmax(-1)
            for at, stat in enumerate(read[-1]["stats"][1:], 1):
                assert stat["p"] == pytest.approx(p[at - 1, ids[at]].item(), rel=1e-3, abs=1e-9)
                assert stat["bits"] == pytest.approx(-p[at - 1, ids[at]].log2().item(), abs=1e-3)
                ahead = logits[at - 1] - logits[at - 1, ids[at]]
                assert int((ahead > 1e-4).sum()) < stat["rank"] <= 1 + int((ahead > -1e-4).sum())
            for (guesses, stream) in zip(looked[0]["lens"], seen["streams"], strict=True):
                lens = model.logits(model.norm(stream[0, -1])).softmax(-1)
                for id, share in guesses:
                    worst["lens"] = max(worst["lens"], abs(lens[id].item() - share))
            ours = np.array(looked[0]["attention"])
            worst["attention"] = max(worst["attention"], np.abs(ours - seen["attention"].numpy()).max())
    print({name: f"{value:.1e}" for name, value in worst.items()})
    assert worst["logits"] < 1e-4 and worst["lens"] < 1e-4 and worst["attention"] < 1e-4


def test_greedy_answers_equal_torchs(host):
    models, _ = quantised_models(host.made.page)
    tok = host.made.tok
    prompts = prompts_of(tok, 50 if REAL else 10, 20)
    same = []
    for number, model in enumerate(models):
        said = host.ask([answer_job(number, prompt) for prompt in prompts])
        ours = [[part["id"] for part in parts if "id" in part] for parts in said]
        n = min(64, model.config.max_seq_len - max(map(len, prompts)))
        theirs = generate(model, prompts, n, temperature=0, stop_ids=[tok.eot_id, tok.im_end_id], pad_id=tok.pad_id)
        same.append(sum(a[:n] == b for a, b in zip(ours, theirs)))
    print(f"greedy answers equal to torch's, of {len(prompts)} prompts a run: {same}")
    assert same == [len(prompts)] * len(models)


@torch.no_grad()
def test_answers_are_compared_and_scored(host):
    """Under an answer: each token's probability here and in the SFT model, and the reward model's number."""
    models, scorer = quantised_models(host.made.page)
    tok = host.made.tok
    prompt = render_chat(tok, QUESTION, add_generation_prompt=True)[0]
    job = answer_job(0, prompt, runs=list(range(len(models))), temperature=1, most=30, judge=len(models), reference=1)
    parts, = host.ask([job])
    for number, model in enumerate(models):
        answer = [part["id"] for part in parts if part["number"] == number and "id" in part]
        done, = (part for part in parts if part["number"] == number and "done" in part)
        last, = (part for part in parts if part["number"] == number and "own" in part)
        assert done["ended"] == (answer[-1] in (tok.im_end_id, tok.eot_id)) and 1 <= len(answer) <= 30
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        for who, said in ((model, last["own"]), (models[1], [stat["p"] for stat in last["theirs"]])):
            p = logits_of(who, prompt + answer).softmax(-1)[places, answer]
            assert said == pytest.approx(p.tolist(), rel=1e-3, abs=1e-9)
        if scorer is None:
            assert last["score"] is None
            continue
        whole = prompt + answer[:len(answer) - done["ended"]] + [tok.im_end_id]
        expected = scorer(torch.tensor([whole]))[0, -1].item()
        assert last["score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("temperature,top_k,top_p", [
    (0, 0, 1), (0.8, 0, 0.9), (1, 5, 1), (1.3, 20, 0.8), (1, 0, 0.05), (2, 3, 0.5), (1, 1000, 0.5)])
def test_filters_are_those_of_generate(made, tmp_path, temperature, top_k, top_p):
    logits = 3 * torch.randn(2, 60, dtype=torch.double)
    logits[1] = logits[1].round()  # many are equal
    settings = {"temperature": temperature, "topK": top_k, "topP": top_p}
    said = Node(str(tmp_path)).open(made.page).ask([{"filter": [row.tolist(), settings]} for row in logits])
    for row, ours in zip(logits, said):
        if temperature == 0:
            assert ours[row.argmax()] == 1 and sum(ours) == 1
            continue
        theirs = filter_logits(row[None], torch.zeros(1, 60), temperature, top_k, top_p, 0.0, 1.0).softmax(-1)[0]
        if row is logits[0] or top_p == 1:  # of equal ones, either may go
            assert ours == pytest.approx(theirs.tolist(), abs=1e-9)
        assert sum(ours) == pytest.approx(1)


# ---------------------------------------------------------------------------- what is refused


def test_runs_that_the_page_cannot_show(tmp_path, tok_file, monkeypatch):
    tok = load_tokenizer(tok_file)
    paths, judge = write_runs(tmp_path, tok, "llama")
    experts = save_run(tmp_path / "experts", random_model("dots1", vocab_size=tok.vocab_size), tok, "pretrain")
    other = train_tokenizer(["abc def 春夜 user assistant system\n"], str(tmp_path / "other.model"), 300, 1.0)
    foreign = save_run(tmp_path / "foreign", random_model("llama", vocab_size=other.vocab_size), other, "sft")

    def refused(runs, judge=""):
        with pytest.raises(SystemExit) as error:
            page.main(page.Config(runs=",".join(runs), reward_from=judge, out=str(tmp_path / "x.html")))
        return str(error.value)

    assert "experts is a mixture of experts" in refused([experts])
    with monkeypatch.context() as patch:
        patch.setattr(page, "LARGEST", 1e4)
        assert "poems has 0 M parameters" in refused(paths)
    assert "foreign has another vocabulary" in refused([paths[0], foreign])
    said = refused([paths[0], str(tmp_path / "absent"), str(tmp_path / "gone")], judge)
    assert "absent" in said and "gone" in said and paths[0] + "," not in said
    assert "wanted one of reward.py" in refused(paths, paths[0])
    assert "--reward_from" in refused([paths[0], judge])
    assert not os.path.exists(tmp_path / "x.html")


def test_the_quickstarts_runs_are_found(tmp_path, tok_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no run of the quickstart"):
        page.main(page.Config())
    write_runs(tmp_path / "out", load_tokenizer(tok_file), "qwen3")
    monkeypatch.setattr(sys, "argv", ["page"])
    page.main(load_config(page.Config, positional="runs"))
    about, _ = read_page("out/page.html")
    assert [meta["name"] for meta in about["runs"]] == ["poems", "poems-sft", "poems-ppo", "poems-reward"]
    # the SFT run is whole, and the others are differences from it wherever they can be
    assert about["base"] == 1
    for meta in about["runs"]:
        kinds = {rest[1] for _, _, *rest in meta["tensors"] if rest}
        assert kinds == {meta["stage"] != "sft"}


# ---------------------------------------------------------------------------- numbers, of real runs alone


@pytest.mark.skipif(not REAL, reason="numbers of trained runs: PAGE_RUNS=out/poems,out/poems-sft,…")
@torch.no_grad()
def test_real_bits_speed_and_size(made, browser):
    path, paths, judge, tok = made
    print(f"\n{os.path.getsize(path) / 1e6:.2f} MB")
    models, _ = quantised_models(path)
    data = os.environ.get("PAGE_DATA", "data/poems")
    held_out = np.fromfile(os.path.join(data, "val.bin"), "<u2").astype(np.int64)
    rows = torch.from_numpy(held_out[:min(400, (len(held_out) - 1) // 128) * 128 + 1])
    for run, model in zip(paths, models):
        exact = load_model(run)[0]
        bits = []
        for side in (exact, model):
            x, y = rows[:-1].view(-1, 128), rows[1:].view(-1, 128)
            loss = F.cross_entropy(side.logits(side(x)).flatten(0, 1), y.flatten(), reduction="sum").item()
            bits.append(loss / np.log(2) / len(tok.decode_bytes(rows[1:].tolist())))
        change = bits[1] / bits[0] - 1
        print(f"{run}: bits per byte fp32 {bits[0]:.4f}, int8 {bits[1]:.4f}, {100 * change:+.3f} %")
        assert abs(change) < 0.002
    host = Chromium(browser)
    host.open(path)
    speeds = []
    for _ in range(5):
        job = answer_job(0, [tok.eot_id], runs=[0], temperature=1, most=200)
        parts, = host.ask([job])
        speeds += [part["speed"] for part in parts if "speed" in part]
    host.close()
    model = load_model(paths[0])[0]
    theirs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(3):
            began = time.perf_counter()
            n = len(generate(model, [[tok.eot_id]], 200)[0])
            theirs.append(n / (time.perf_counter() - began))
    print("tokens/s, page:", [round(x) for x in speeds], "generate.py, 1 and 2 threads:", [round(x) for x in theirs])
