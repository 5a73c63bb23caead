"""What holds for all stages on several processes: 1, 2 and 4 log the same 20 losses; and nothing is compiled twice."""
import dataclasses
import functools
import os

import pytest
import torch

import dpo
from common import loss
import ppo
import pretrain
import reward
import sft
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from model import ModelConfig, ScalarModel
from pairs import completions, forget_run, make_run, read_log, write_folder, write_pairs
from ranks import run_in_ranks
from tokenizer import render_chat, train_tokenizer

STEPS = 20
STAGES = {
    "sft": (sft, dict(data_dir="talks", batch_size=1, questions="")),
    "sft-lora": (sft, dict(data_dir="talks", batch_size=1, questions="", lora_rank=2)),
    "reward": (reward, dict(data_dir="pairs", batch_size=2)),
    "dpo": (dpo, dict(data_dir="pairs", batch_size=2)),
    "ppo": (ppo, dict(data_dir="prompts", batch_size=1, reward_from="reward", max_new_tokens=6, minibatches=1,
                      ppo_epochs=2, eval_prompts=4))}


@pytest.fixture(autouse=True)
def one_thread(repeatable):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with talks/, pairs/, prompts/, the run base/ and the reward run reward/."""
    root = str(tmp_path_factory.mktemp("ranks"))
    tok = train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], f"{root}/tok", 300, character_coverage=1.0)
    prompts = [completions(tok, i, 2 + i % 3) for i in range(30)]
    write_pairs(f"{root}/pairs", tok, {"train": prompts[:24], "val": prompts[24:]})
    talks = [prompt[0] for prompt in prompts]
    write_folder(f"{root}/talks", tok, "sft", {"train": talks[:24], "val": talks[24:]})
    questions = [render_chat(tok, [{"role": "user", "content": "春夜" * (1 + i % 3)}], add_generation_prompt=True)
                 for i in range(24)]
    write_folder(f"{root}/prompts", tok, "prompts", {"train": questions, "val": questions[:4]})
    make_run(f"{root}/base", tok)
    config = ModelConfig(**load_checkpoint(f"{root}/base")["model_config"])
    save_checkpoint(f"{root}/reward/ckpt.pt", {
        "stage": "reward", "model": ScalarModel(config).state_dict(), "model_config": dataclasses.asdict(config),
        "lora": None, "fingerprint": tok.fingerprint, "step": 1})
    return root


def config_of(root, name, out, **changes):
    stage, settings = STAGES[name]
    folders = {key: f"{root}/{value}" for key, value in settings.items() if key in ("data_dir", "reward_from")}
    common = dict(init_from=f"{root}/base", out_dir=f"{root}/{out}-{name}", grad_accum=4, max_steps=STEPS,
                  warmup_steps=2, lr=1e-3, eval_every=10, device="cpu")
    if stage is not ppo:
        common["dtype"] = "float32"
    if stage is sft:
        common["compile"] = False
    return stage.Config(**{**common, **settings, **folders, **changes})


@pytest.fixture(scope="module")
def alone(root):
    """The logs of every stage in one process."""
    logs = {}
    for name, (stage, _) in STAGES.items():
        cfg = config_of(root, name, "alone")
        stage.main(cfg)
        forget_run()
        logs[name] = read_log(cfg.out_dir)
    return logs


@pytest.fixture(scope="module")
def together(root):
    """A function: the logs of every stage, in so many processes; the last one is sft.py in shards."""
    done = {}

    def logs(processes):
        if processes not in done:
            runs = {name: config_of(root, name, processes) for name in STAGES}
            if processes == 2:
                for name in ("sft", "sft-lora"):
                    runs[f"{name} in shards"] = config_of(root, name, "shards", shard=True)
            stages = [(STAGES[name.split()[0]][0].__name__, dataclasses.asdict(cfg)) for name, cfg in runs.items()]
            run_in_ranks(processes, stages, f"{root}/runs.json")
            done[processes] = {name: read_log(cfg.out_dir) for name, cfg in runs.items()}
        return done[processes]

    return logs


@pytest.mark.parametrize("processes, name", [
    *((2, name) for name in STAGES), (2, "sft in shards"), (2, "sft-lora in shards"), *((4, name) for name in STAGES)])
def test_twenty_losses_are_those_of_one_process(alone, together, processes, name):
    """Pretraining is in test_pretrain.py. ppo.py samples its answers, so one other token would be another run."""
    records = alone[name.split()[0]]
    assert records[-1]["step"] == STEPS
    keys = [key for key in records[-1] if key.endswith("loss") or key in ("score", "kl")]
    assert keys
    for ours, theirs in zip(records, together(processes)[name], strict=True):
        for key in keys:
            assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-5), (ours["step"], key)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_nothing_is_compiled_after_the_second_step(root, tmp_path, monkeypatch, stage):
    """Training and measuring have a graph each; later steps use them as they are, whatever their rows hold."""
    talks = config_of(root, "sft", "compiled", max_steps=6, eval_every=2, compile=True)
    text = pretrain.Config(data_dir=f"{root}/text", out_dir=f"{root}/compiled-text", dim=32, n_layers=2, n_heads=2,
                           max_seq_len=32, batch_size=2, max_steps=6, eval_every=2, eval_tokens=200, device="cpu",
                           dtype="float32")
    if not os.path.exists(text.data_dir):
        splits = {"train": list(range(30)) * 40, "val": [5] * 200}
        write_folder(text.data_dir, load_model(f"{root}/base")[1], "text", splits)
    module, cfg = {"pretrain": (pretrain, text), "sft": (sft, talks)}[stage]
    # the compiler proper takes long, and does not decide what is compiled anew
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    loss.compiled_softmax_nll.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def save(*args, **extra):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    monkeypatch.setattr(module, "save", save)  # after every measurement
    module.main(cfg)
    forget_run()
    loss.compiled_softmax_nll.cache_clear()
    torch._dynamo.reset()
    assert len(graphs) >= 3 and 0 < graphs[0] == graphs[-1]
