"""--shard=True: a model split among processes begins, learns, is saved and goes on as a whole one does (sharding.py)."""
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_in_ranks
from small_runs import read_log

import pretrain
from common.checkpoint import load_checkpoint, load_model
from common.distributed import Env, start
from common.loss import cross_entropy
from common.sharding import read_shards, shard_model
from model import ModelConfig, Transformer
from tokenizer import load_tokenizer, train_tokenizer
from tools import export

# what a run in shards must get right, each in one of three: tied embeddings, blocks computed again, Muon, experts
KINDS = {
    "dense": dict(checkpoint_blocks=True),
    "muon": dict(optimizer="muon", tie_embeddings=False, qkv_bias=True, qk_norm=True),
    "experts": dict(n_experts=4, n_active_experts=2, n_layers=2)}
STEPS = 6
HALF = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder of a few hundred random tokens."""
    folder = str(tmp_path_factory.mktemp("data"))
    tok = train_tokenizer(["春夜月好坏。0123456789\n"], f"{folder}/tokenizer", 300, character_coverage=1.0)
    tok.save(f"{folder}/tokenizer.model")
    rng = np.random.default_rng(0)
    meta = {"kind": "text", "dtype": "uint16", "fingerprint": load_tokenizer(folder).fingerprint}
    for split, n in (("train", 900), ("val", 200)):
        tokens = np.cumsum(rng.integers(0, 3, n)) % 290  # each follows closely on the one before: there is much to learn
        tokens.astype(np.uint16).tofile(f"{folder}/{split}.bin")
        meta[split] = {"tokens": n, "documents": 1, "bytes": 2 * n}
    with open(f"{folder}/meta.json", "w") as f:
        json.dump(meta, f)
    return folder


@pytest.fixture
def runs(data, tmp_path):
    """A function: of each kind the settings of a run in folder `name`. The learning rate is flat, so that three and
    three steps are six."""
    def make(name, max_steps, **changes):
        shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)
        how = dict(batch_size=2, grad_accum=8, decay_steps=1, warmup_steps=1, eval_every=HALF, eval_tokens=150)
        return {kind: pretrain.Config(**{**shape, **how, **KINDS[kind], **changes}, max_steps=max_steps, data_dir=data,
                                      device="cpu", dtype="float32", compile=False, out_dir=str(tmp_path / name / kind))
                for kind in KINDS}
    return make


def stages(runs):
    return [("pretrain", dataclasses.asdict(cfg)) for cfg in runs.values()]


def copies(runs, target):
    return [("copy", {"source": cfg.out_dir, "target": target[kind].out_dir}) for kind, cfg in runs.items()]


def test_shards_equal_one_process(runs, tmp_path, capsys):
    """Losses, norms and weights of a run in two shards, saved half-way, that goes on in four, in two, in one process
    or whole, are those of a run that was never cut; so are its averages, or the losses after that would differ."""
    whole = runs("whole", STEPS)
    for cfg in whole.values():
        pretrain.main(cfg)
    half = runs("half", HALF, shard=True)
    in_two = runs("two", STEPS, shard=True)
    in_four = runs("four", STEPS, shard=True)
    by_ddp = runs("ddp", STEPS)
    alone = runs("alone", STEPS, shard=True)
    run_in_ranks(2, [*stages(half), *copies(half, in_two), *copies(half, in_four), *copies(half, by_ddp),
                 *copies(half, alone), *stages(in_two), *stages(by_ddp)], f"{tmp_path}/jobs.json")
    run_in_ranks(4, stages(in_four), f"{tmp_path}/jobs.json")
    for cfg in alone.values():
        pretrain.main(cfg)
    assert capsys.readouterr().out.count("resuming") == len(KINDS)
    for kind, cfg in whole.items():
        expected = load_checkpoint(cfg.out_dir)["model"]
        for other in (in_two, in_four, by_ddp, alone):
            for ours, theirs in zip(read_log(cfg.out_dir), read_log(other[kind].out_dir), strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
            checkpoint = load_checkpoint(other[kind].out_dir, shards_too=True)
            in_shards = other in (in_two, in_four)
            assert bool(checkpoint["shards"]) == in_shards == (not checkpoint["model"])
            weights = read_shards(checkpoint["shards"]) if in_shards else checkpoint["model"]
            assert weights.keys() == expected.keys()
            for name, weight in expected.items():
                assert (weight - weights[name]).abs().max() < 1e-6, (kind, name)


def test_one_file_of_shards(runs, tmp_path, capsys):
    """A run in shards says what to do where it must be whole; tools.export makes one file of them, and no other
    checkpoint's shards stay on the disk."""
    cfg = runs("shards", HALF, shard=True)["muon"]
    run_in_ranks(2, stages({"muon": cfg}), f"{tmp_path}/jobs.json")
    os.makedirs(f"{cfg.out_dir}/ckpt-4")  # as a run leaves it that is killed before ckpt.pt names it
    longer = dataclasses.replace(cfg, max_steps=HALF + 1)
    out = run_in_ranks(2, stages({"muon": longer}), f"{tmp_path}/jobs.json")
    assert f"at step {HALF} of" in out
    assert sorted(name for name in os.listdir(cfg.out_dir) if "-" in name) == ["best-3", "ckpt-4"]
    with pytest.raises(SystemExit):
        load_model(cfg.out_dir)
    assert f"python -m tools.export {cfg.out_dir} --to=merged" in capsys.readouterr().err
    merged = str(tmp_path / "merged")
    export.main(export.Config(run=cfg.out_dir, to="merged", out=merged))
    model, _, _ = load_model(merged)
    weights = read_shards(f"{cfg.out_dir}/ckpt-4")
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    # a whole run cannot go on in shards, but a run in shards can begin with its weights
    begun = dataclasses.replace(cfg, max_steps=1, init_from=merged, out_dir=str(tmp_path / "begun"), lr=1e-9)
    run_in_ranks(2, stages({"muon": begun}), f"{tmp_path}/jobs.json")
    after = read_shards(f"{begun.out_dir}/ckpt-1")
    assert all((weight - after[name]).abs().max() < 1e-6 for name, weight in weights.items())


@pytest.mark.parametrize("processes", [2, 4])
def test_a_model_without_memory_begins_as_any_other(tmp_path, processes):
    """Made on the meta device, filled shard by shard: every weight and buffer is that of the plain start, to the bit."""
    run_in_ranks(processes, [("begin", changes) for changes in (
        dict(), dict(qkv_bias=True, qk_norm=True, tie_embeddings=False), dict(n_experts=3, n_layers=3))],
             f"{tmp_path}/jobs.json")


def begin(changes):
    """In each of several processes: compare a model in shards with a whole one."""
    env = start(pretrain.Config(device="cpu"), announce=False)
    config = ModelConfig(**{**dict(vocab_size=70, dim=24, n_layers=2, n_heads=2, max_seq_len=16), **changes})
    torch.manual_seed(5)
    whole = Transformer(config)
    torch.manual_seed(5)
    with torch.device("meta"):
        model = Transformer(config)
    shard_model(model, env)
    for (name, p), (other, expected) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other and p.requires_grad and p.to_local().numel() < expected.numel()
        assert torch.equal(p.full_tensor(), expected), name
    for (name, buffer), (_, expected) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    ids = torch.arange(32).view(2, 16)
    assert torch.allclose(model(ids), whole(ids), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # on a GPU autocast takes the norms' weights back to fp32
@pytest.mark.parametrize("changes", [dict(), dict(n_experts=4, tie_embeddings=False)])
def test_blocks_travel_in_the_dtype_of_matmuls(tmp_path, changes):
    """Under autocast in bf16: the loss and the gradients, in fp32, of a model that is whole."""
    env = Env(0, 1, torch.device("cpu"), torch.bfloat16)
    ids = torch.randint(0, 64, (2, 16))
    results = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    for shard in (False, True):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(vocab_size=64, dim=64, n_layers=2, n_heads=4, max_seq_len=16, **changes))
        if shard:
            model = shard_model(model, env)
            model.blocks[0].register_forward_pre_hook(
                lambda block, x: dtypes.update(p.dtype for p in block.parameters()))
        dtypes = set()
        with env.autocast():
            loss = cross_entropy(model(ids), model.head_weight, ids)
        loss.backward()
        grads = [getattr(p.grad, "full_tensor", lambda: p.grad)() for p in model.parameters()]
        results.append((loss.item(), grads))
    dist.destroy_process_group()
    assert dtypes == {torch.bfloat16}
    (whole, grads), (sharded, others) = results
    assert sharded == pytest.approx(whole, rel=1e-3)
    for ours, theirs in zip(grads, others, strict=True):
        assert theirs.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.02 * ours.norm()
