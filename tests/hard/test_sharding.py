"""--shard=True: a model split among processes begins, learns, is saved and goes on as a whole one does (sharding.py).

    torchrun --standalone --nproc_per_node=2 tests/hard/test_sharding.py JOBS.json      what the tests start
"""
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pretrain
from common.checkpoint import load_checkpoint, load_model
from common.distributed import Env, start
from common.loss import cross_entropy
from common.sharding import read_shards, shard_model
from model import ModelConfig, Transformer
from tokenizer import load_tokenizer, train_tokenizer
from tools import export

ROOT = os.path.abspath(f"{__file__}/../../..")
# what a run in shards must get right, each in one of three: tied embeddings, blocks computed again, Muon, experts
KINDS = {
    "dense": dict(checkpoint_blocks=True),
    "muon": dict(optimizer="muon", tie_embeddings=False, qkv_bias=True, qk_norm=True),
    "experts": dict(n_experts=4, n_active_experts=2, n_layers=2)}
# models that are made without memory, and compared with whole ones
BEGIN = [("begin", changes) for changes in (
    dict(), dict(qkv_bias=True, qk_norm=True, tie_embeddings=False), dict(n_experts=3, n_layers=3))]
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


def in_ranks(processes, jobs, file):
    """Do jobs, [(what, settings), …], in so many processes of torchrun; return what they printed."""
    with open(file, "w") as f:
        json.dump(jobs, f)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*command, "tests/hard/test_sharding.py", str(file)], cwd=ROOT, capture_output=True, text=True,
                          timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def stages(runs):
    return [("pretrain", dataclasses.asdict(cfg)) for cfg in runs.values()]


def copies(runs, target):
    return [("copy", {"source": cfg.out_dir, "target": target[kind].out_dir}) for kind, cfg in runs.items()]


def log_of(cfg):
    """The numbers of a run's log, without its speed."""
    with open(f"{cfg.out_dir}/log.jsonl") as f:
        records = [json.loads(line) for line in f]
    return [{name: value for name, value in r.items() if name not in ("tok/s", "seconds")} for r in records]


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
    in_ranks(2, [*BEGIN, *stages(half), *copies(half, in_two), *copies(half, in_four), *copies(half, by_ddp),
                 *copies(half, alone), *stages(in_two), *stages(by_ddp)], tmp_path / "jobs.json")
    in_ranks(4, [*BEGIN, *stages(in_four)], tmp_path / "jobs.json")
    for cfg in alone.values():
        pretrain.main(cfg)
    assert capsys.readouterr().out.count("resuming") == len(KINDS)
    for kind, cfg in whole.items():
        expected = load_checkpoint(cfg.out_dir)["model"]
        for other in (in_two, in_four, by_ddp, alone):
            for ours, theirs in zip(log_of(cfg), log_of(other[kind]), strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5), (kind, ours["step"])
            checkpoint = load_checkpoint(other[kind].out_dir, shards_too=True)
            in_shards = other in (in_two, in_four)
            assert bool(checkpoint["shards"]) == in_shards == (not checkpoint["model"])
            weights = read_shards(checkpoint["shards"]) if in_shards else checkpoint["model"]
            assert weights.keys() == expected.keys()
            for name, weight in expected.items():
                assert (weight - weights[name]).abs().max() < 1e-6, (kind, name)


def test_one_file_of_shards(runs, tmp_path):
    """A run in shards says what to do where it must be whole; tools.export makes one file of them, and no other
    checkpoint's shards stay on the disk."""
    cfg = runs("shards", HALF, shard=True)["muon"]
    longer = dataclasses.replace(cfg, max_steps=HALF + 1)
    merged = str(tmp_path / "merged")
    begun = dataclasses.replace(cfg, max_steps=1, init_from=merged, out_dir=str(tmp_path / "begun"), lr=1e-9,
                                min_lr=0.0)
    orphan = f"{cfg.out_dir}/ckpt-4/left_by_a_kill"  # before ckpt.pt names its folder
    out = in_ranks(2, [*stages({"": cfg}), ("make", orphan), *stages({"": longer}),
                       ("merge", dict(run=cfg.out_dir, out=merged)), *stages({"": begun})], tmp_path / "jobs.json")
    assert f"resuming {cfg.out_dir}/ckpt.pt at step {HALF} of" in out
    folders = [name for name in os.listdir(cfg.out_dir) if "-" in name]
    assert sorted(name.split("-")[0] for name in folders) == ["best", "ckpt"] and "ckpt-4" in folders
    with pytest.raises(SystemExit, match=f"python -m tools.export {cfg.out_dir} --to=merged"):
        load_model(cfg.out_dir)
    model, _, _ = load_model(merged)
    weights = read_shards(f"{cfg.out_dir}/ckpt-4")
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    # a run in shards has begun with them
    after = read_shards(f"{begun.out_dir}/ckpt-1")
    assert all((weight - after[name]).abs().max() < 1e-6 for name, weight in weights.items())


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


def begin(changes):
    """In each of several processes: a model made on the meta device and filled shard by shard has every weight and
    buffer of the plain start, to the bit."""
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


def main(path):
    def stay(cfg, env, step, hint=""):
        # finish() would end this process, and there are more runs to come
        if env.lock:
            env.lock.close()
        dist.barrier()

    pretrain.finish = stay
    with open(path) as f:
        jobs = json.load(f)
    for what, settings in jobs:
        if what == "pretrain":
            pretrain.main(pretrain.Config(**settings))
        elif what == "begin":
            begin(settings)
        elif dist.get_rank() > 0:
            continue
        elif what == "make":
            os.makedirs(settings)
        elif what == "merge":
            export.main(export.Config(**settings, to="merged"))
        else:
            shutil.copytree(settings["source"], settings["target"])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
