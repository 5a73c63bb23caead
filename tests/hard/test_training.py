"""Situations in which a run did not do what its settings say, or what it had learned was not where it was used."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from small_runs import CPU, MOE, make_run, place, refused, run, settings, write_folder  # noqa: F401 (fixtures)

import common.distributed
import dpo
import grpo
import prepare
import pretrain
import sample
import sft
from common.checkpoint import load_checkpoint, load_model
from common.data import Split
from common.distributed import Env
from common.generate import generate
from common.lora import LearnedRows, adapters_of, add_lora, merge_adapters
from configurator import load_config
from model import ModelConfig, Transformer
from tokenizer import render_chat
from tools import evaluate, export, page
from tools.engine import Engine


def tiny(**changes):
    return Transformer(ModelConfig(**{**dict(vocab_size=64, dim=32, n_layers=2, n_heads=4, max_seq_len=32), **changes}))


# ---------------------------------------------------------------------------- adapters: rows that no text has trained


@pytest.mark.parametrize("tie", [True, False])
def test_learned_rows_are_merged(tie):
    """LearnedRows: they begin as the base's, get gradients in embedding and head, and the merge puts them in."""
    model = tiny(tie_embeddings=tie)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 64, (2, 9))
    before = model.logits(model(ids))
    add_lora(model, 2, 4.0, "qkv", rows=[1, 5])
    assert torch.equal(model.logits(model(ids)), before)
    tables = [module for module in model.modules() if isinstance(module, LearnedRows)]
    assert len(tables) == (1 if tie else 2) and all(table.lora_rows.shape == (2, 32) for table in tables)
    model.logits(model(ids)).square().sum().backward()
    assert all(table.lora_rows.grad.abs().min() > 0 for table in tables[-1:])
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn_like(p)
    plain = tiny(tie_embeddings=tie)
    plain.load_state_dict(merge_adapters(weights, adapters_of(model), 2.0, [1, 5]))
    assert (plain.logits(plain(ids)) - model.logits(model(ids))).abs().max() < 1e-5
    assert not torch.equal(model.logits(model(ids)), before)


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_adapters_learn_to_end_over_a_base_whose_chat_tokens_are_one(place, tmp_path, stage):  # noqa: F811
    """As after pretraining: all tokens that no text holds have one row. Adapters alone cannot tell <|im_end|> from them."""
    root, tok = place
    base, _, checkpoint = load_model(f"{root}/base")
    rows = sorted(tok.special_names)
    checkpoint["model"]["embed.weight"][rows + list(range(430, 448))] = checkpoint["model"]["embed.weight"][rows[0]].clone()
    torch.save(checkpoint, f"{tmp_path}/ckpt.pt")
    tok.save(f"{tmp_path}/tokenizer.model")
    steps = 120 if stage == "sft" else 2
    cfg = settings(root, stage, str(tmp_path / "lora"), init_from=str(tmp_path), lora_rank=4, max_steps=steps, lr=1e-2,
                   **({"batch_size": 8} if stage == "sft" else {}))
    after, _ = run(cfg)
    assert after["lora"]["rows"] == rows and any("lora_rows" in name for name in after["model"])
    model, _, _ = load_model(cfg.out_dir)
    learned = model.embed.weight[rows]
    assert (learned - learned[0]).abs().max() > 1e-3  # no longer one
    others = [i for i in range(448) if i not in rows]
    assert torch.equal(model.embed.weight[others], checkpoint["model"]["embed.weight"][others])
    if stage == "sft":
        prompts = [render_chat(tok, [{"role": "user", "content": f"{i}你好"}], add_generation_prompt=True)[0] for i in range(6)]
        answers = generate(model, prompts, 60, temperature=0, stop_ids=[tok.im_end_id])
        assert all(answer[-1] == tok.im_end_id for answer in answers)


# ---------------------------------------------------------------------------- positions that were learned


def test_the_longest_trained_length_travels_with_the_checkpoint(place, tmp_path, capsys, monkeypatch):  # noqa: F811
    """pretrain → sft → dpo: a model that sees 256 tokens and has learned from 32, then from the longest conversation."""
    root, _ = place
    cfg = settings(root, "pretrain", str(tmp_path / "p"), max_seq_len=256, seq_len=32, max_steps=1)
    assert run(cfg)[0]["trained_len"] == 32
    further = dict(init_from=cfg.out_dir, max_steps=1)
    longer = run(settings(root, "pretrain", str(tmp_path / "q"), seq_len=48, **{**further, "max_seq_len": 256}))[0]
    assert longer["trained_len"] == 48
    # YaRN: 32 tokens become 128, twice 64 of the same 32; and the next stage sees as many
    for start, changes, sees, learned in [("p", dict(rope_factor=4.0), 128, 128), ("p", dict(rope_factor=2.0), 64, 64),
                                          ("y2.0", dict(rope_factor=4.0, seq_len=96), 128, 96)]:
        stretched = settings(root, "pretrain", f"{tmp_path}/y{changes['rope_factor']}", resume=False, max_steps=1,
                             **{"max_seq_len": 512, "seq_len": 0, "init_from": f"{tmp_path}/{start}", **changes})
        found = run(stretched)[0]
        shape = found["model_config"]
        assert (shape["max_seq_len"], shape["rope_original_len"], found["trained_len"]) == (sees, 32, learned)
    assert "64 tokens, fewer than the 96" in refused(settings(
        root, "pretrain", f"{tmp_path}/z", max_seq_len=512, seq_len=0, init_from=stretched.out_dir, rope_factor=2.0))
    chat, _ = run(settings(root, "sft", str(tmp_path / "s"), **further))
    train = Split(None, None, np.fromfile(f"{root}/talks/train.idx", np.int64), None, {})
    fits = np.diff(train.idx)[np.diff(train.idx) <= 129] - 1
    assert chat["trained_len"] == max(32, fits.max())
    assert run(settings(root, "dpo", str(tmp_path / "d"), init_from=str(tmp_path / "s"), max_steps=1))[0][
        "trained_len"] == chat["trained_len"]
    capsys.readouterr()
    sample.main(sample.Config(out_dir=str(tmp_path / "p"), start="春夜", max_new_tokens=200, device="cpu"))
    assert "the model was trained on rows of up to 32 tokens" in capsys.readouterr().err
    # what serves it, shows it, and takes it to other programs and back
    model, tok, _ = load_model(cfg.out_dir)
    assert Engine(model, [], 1, 1, CPU).room == page.read_run(cfg.out_dir, None)[0]["config"]["max_seq_len"] == 32
    export.main(export.Config(run=cfg.out_dir, to="hf", out=str(tmp_path / "hf")))
    export.main(export.Config(from_=str(tmp_path / "hf"), out=str(tmp_path / "back")))
    assert load_model(str(tmp_path / "back"))[0].trained_len == 32
    run(settings(root, "grpo", str(tmp_path / "g"), init_from=str(tmp_path / "p"), max_steps=1, max_new_tokens=60))
    assert "more than the 32 tokens" in capsys.readouterr().out


def test_a_chat_forgets_what_lies_beyond_what_was_learned(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    model, tok, _ = load_model(f"{place[0]}/base")
    model.trained_len = 40
    questions = iter(["春夜", "你是谁？", "你好", "/exit"])
    monkeypatch.setattr(sample, "read_line", lambda: next(questions))
    seen = []
    monkeypatch.setattr(sample, "stream", lambda model, tok, ids, n, *_: seen.append(len(ids) + n) or tok.encode("好" * 8))
    sample.chat(model, tok, sample.Config(), CPU)
    assert len(seen) == 3 and max(seen) <= 40
    assert "the model was trained on up to 40 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------------------- experts, teachers, rules


def test_padding_is_no_load():
    """MoE: only real tokens count, so padding (document 0) cannot fill an expert of its own."""
    torch.manual_seed(1)
    model = tiny(**{**MOE, "dim": 32, "n_active_experts": 1})
    ids = torch.randint(0, 64, (3, 20))
    docs = torch.ones_like(ids)
    docs[:, 11:] = 0
    model(ids, docs)
    loads = [block.ffn.load.clone() for block in model.blocks[1:]]
    for block in model.blocks[1:]:
        block.ffn.load.zero_()
    model(ids[:, :11])
    for block, load in zip(model.blocks[1:], loads):
        assert load.sum() == 33 and torch.equal(load, block.ffn.load)


def test_a_teacher_padded_otherwise(place, tmp_path):  # noqa: F811
    """Two models of one tokenizer, whose vocabularies were rounded up to 448 and 512: its own tokens are compared."""
    root, tok = place
    make_run(f"{tmp_path}/teacher", tok, seed=2, vocab_size=512)
    _, log = run(settings(root, "sft", str(tmp_path / "out"), teacher=f"{tmp_path}/teacher", teacher_weight=1.0, max_steps=2))
    assert all(math.isfinite(record["loss"]) for record in log)


def test_flat_groups_are_flat_under_rloo_too(place, tmp_path):  # noqa: F811
    """skip_flat_groups with rloo: the KL penalty makes all totals differ, yet the rewards are the same."""
    root, _ = place
    with open(f"{tmp_path}/same.py", "w") as f:
        f.write("def one(prompt, answer):\n    return 1\n")
    cfg = settings(root, "grpo", str(tmp_path / "out"), reward=f"{tmp_path}/same.py:one", advantage="rloo", kl_coef=0.5,
                   skip_flat_groups=True, no_eos_penalty=0.0, max_steps=2)
    base = load_checkpoint(f"{root}/base")["model"]
    after = run(cfg)[0]["model"]
    assert all(torch.equal(after[name], base[name]) for name in base)


def test_defaults_are_the_papers(place, tmp_path):  # noqa: F811
    """GSPO clips at 3e-4, SimPO asks for a lead of 0.56 nats a token; the others as before."""
    root, _ = place
    for stage, changes, name, value in [
            ("grpo", dict(ratio="sequence", minibatches=2), "clip", 3e-4), ("grpo", dict(minibatches=2), "clip", 0.2),
            ("dpo", dict(loss="simpo"), "beta", 2.5), ("dpo", {}, "beta", 0.1)]:
        checkpoint, _ = run(settings(root, stage, str(tmp_path / f"{stage}{value}"), max_steps=1, **changes))
        assert checkpoint["config"][name] == value
    assert dpo.Config().simpo_gamma / 2.5 == pytest.approx(0.56)


# ---------------------------------------------------------------------------- settings without effect


@pytest.mark.parametrize("stage, words, condition", [
    (pretrain, "--momentum=0.5", "optimizer == 'muon'"), (pretrain, "--first_dense=0", "n_experts"),
    (sft, "--epochs=3 --max_steps=5", "max_steps == 0"), (sft, "--lora_alpha=3", "lora_rank"),
    (sft, "--teacher=out/a --teacher_weight=0", "teacher_weight > 0"), (dpo, "--simpo_gamma=1", "loss == 'simpo'"),
    (grpo, "--surrogate=cispo", "ppo_epochs * minibatches > 1"), (grpo, "--clip_high=0.3", "ppo_epochs * minibatches > 1"),
    (prepare, "--vocab_size=400 --tokenizer=data/a", "not tokenizer"),
    (prepare, "--talk=a --input=b", "name == 'poems-sft'"),
    (evaluate, "--what=pairs --shots=5", "what in ('ceval', 'cmmlu')"),
    (sample, "--top_p=0.5 --temperature=0", "temperature > 0"), (sample, "--system=a", "chat")])
def test_a_setting_that_changes_nothing_is_refused(stage, words, condition, tmp_path):
    """NEEDS: on the command line and in a file; a file's setting may lose its sense by a word."""
    with pytest.raises(SystemExit) as left:
        load_config(stage.Config, words.split())
    assert f"changes nothing unless {condition}" in str(left.value)
    path = tmp_path / "config.py"
    path.write_text("".join(f"{key} = {value if value[0] in '0123456789' else repr(value)}\n" for key, value in
                            (word[2:].split("=") for word in words.split())))
    with pytest.raises(SystemExit, match="changes nothing unless"):
        load_config(stage.Config, [str(path)])


def test_a_words_choice_may_outdate_a_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("optimizer = 'muon'\nmomentum = 0.8\n")
    assert load_config(sft.Config, [str(path), "--optimizer=adamw"]).optimizer == "adamw"


def test_a_shape_beside_init_from_must_be_its_own(place, tmp_path):  # noqa: F811
    root, _ = place
    words = refused(settings(root, "pretrain", str(tmp_path / "out"), init_from="base", dim=64, max_seq_len=256, hidden_dim=0))
    assert "{'dim': 64" in words and "would change nothing" in words
    assert "is a reward model" in refused(settings(root, "pretrain", str(tmp_path / "out"), init_from="reward"))


def test_the_critic_may_not_warm_up_for_the_whole_run(place, tmp_path):  # noqa: F811
    assert "the actor would never learn" in refused(settings(place[0], "ppo", str(tmp_path), critic_warmup=8))


def test_another_dtype_is_named_when_a_run_goes_on(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    cfg = settings(place[0], "sft", str(tmp_path / "out"), max_steps=2, dtype="auto")
    monkeypatch.setattr(common.distributed, "bf16_is_fast", lambda: False)
    run(dataclasses.replace(cfg))
    monkeypatch.setattr(common.distributed, "bf16_is_fast", lambda: True)
    capsys.readouterr()
    run(dataclasses.replace(cfg, max_steps=3))
    assert "'dtype': 'bfloat16'" in capsys.readouterr().out


# ---------------------------------------------------------------------------- fp16, as far as a CPU can tell


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_a_run_in_fp16_learns_as_in_fp32(place, tmp_path, monkeypatch, stage):  # noqa: F811
    """Matmuls in fp16 and a GradScaler: the first steps' scale (65,536) overflows nothing here or is halved, and the
    losses are those of fp32 to the precision of fp16."""
    root, _ = place
    losses = {}
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(common.distributed, "choose_dtype", lambda *_: dtype)
        checkpoint, log = run(settings(root, stage, str(tmp_path / str(dtype)), max_steps=8, dtype="auto"))
        losses[dtype] = np.array([record["loss"] for record in log])
        assert all(weight.dtype == torch.float32 for weight in checkpoint["model"].values())
    assert checkpoint["scaler"]["scale"] >= 1
    if stage == "reward":
        # the first step's scale overflows here: the step is left out, and the second sees the same weights
        assert not np.isfinite(log[0]["norm"]) and checkpoint["scaler"]["scale"] < 65_536
        assert losses[torch.float16][0] == pytest.approx(losses[torch.float32][0], abs=0.01)
        assert losses[torch.float16][-1] < 0.2 * losses[torch.float16][0]
    else:
        assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=0.02, abs=0.01)


def test_a_step_that_overflows_in_fp16_is_left_out(place, tmp_path, monkeypatch):  # noqa: F811
    """A scale far too large: gradients overflow, the weights stay, and the scale comes down until a step is made."""
    monkeypatch.setattr(common.distributed, "choose_dtype", lambda *_: torch.float16)
    real = Env.__post_init__

    def large(self):
        real(self)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40, enabled=True)

    monkeypatch.setattr(Env, "__post_init__", large)
    cfg = settings(place[0], "pretrain", str(tmp_path), max_steps=30, eval_every=30)
    checkpoint, log = run(cfg)
    assert not math.isfinite(log[0]["norm"]) and math.isfinite(log[-1]["norm"])
    assert checkpoint["scaler"]["scale"] < 2.0 ** 40 and log[-1]["loss"] < log[0]["loss"]
