import os
import re
import subprocess
import sys

import pytest
import torch

from common import lora
import sft
from common.checkpoint import load_checkpoint, load_model
from common.lora import adapters_of, merge_adapters
from configurator import load_config
from conftest import ROOT
from common.loss import cross_entropy
from model import ModelConfig, Transformer
from pairs import check_ten_and_ten, forget_run
from test_sft import check_resume, check_two_ranks, gradients, place, quick, run, settings  # noqa: F401 (fixtures)

TARGETS = "qkv|out|gate_up|down"


def tiny(**changes):
    return Transformer(ModelConfig(**{**dict(vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32,
                                             qkv_bias=True), **changes}))


def adapted(model, rank=4, alpha=8.0, targets=TARGETS):
    """Adapters with B different from zero, so that they do something."""
    lora.add_lora(model, rank, alpha, targets)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def ids_and_targets():
    ids = torch.randint(0, 64, (3, 17))
    return ids[:, :-1], ids[:, 1:]


def loss_of(model, ids, targets):
    return cross_entropy(model(ids), model.head_weight, targets)


def merged_by_layer(model):
    """The plain state dict of a model with adapters: layer by layer W += scale * B A, as a module would do it."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, lora.LoRALinear):
            weights[f"{name}.weight"] += module.scale * (module.lora_b @ module.lora_a)
    return weights


def test_starts_as_the_base_and_only_adapters_get_gradients():
    model, (ids, targets) = tiny(), ids_and_targets()
    before = model(ids)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora.add_lora(model, 4, 8.0, TARGETS)
    assert torch.equal(before, model(ids))
    loss_of(model, ids, targets).backward()
    grads = gradients(model)
    assert set(grads) == set(adapters_of(model)) and len(grads) == 2 * 4 * 2  # a, b; layers; blocks
    assert all(grads[name].abs().max() > 0 for name in grads if "lora_b" in name)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_a_is_drawn_as_kaiming_uniform():
    a = lora.add_lora(tiny(dim=128), 16, 8.0, "down").blocks[0].ffn.down.lora_a
    bound = a.size(1) ** -0.5  # kaiming_uniform with a = sqrt(5)
    assert 0.95 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)


def test_names_choose_the_layers():
    def layers(targets):
        return sorted({name.rsplit(".", 1)[0] for name in adapters_of(lora.add_lora(tiny(), 2, 4.0, targets))})
    assert layers("qkv") == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert layers(r"blocks\.1\..*") == [f"blocks.1.{n}" for n in ("attn.out", "attn.qkv", "ffn.down", "ffn.gate_up")]
    with pytest.raises(SystemExit, match="q_proj.*down, gate_up, out, qkv"):
        layers("q_proj")


def test_merged_equals_unmerged():
    model, (ids, _) = tiny(), ids_and_targets()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = model.logits(model(ids))
    adapted(model)
    unmerged = model.logits(model(ids))
    plain = tiny()
    plain.load_state_dict(merge_adapters(weights, adapters_of(model), 8.0 / 4))
    merged = plain.logits(plain(ids))
    assert (unmerged - base).abs().max() > 1e-3
    assert (unmerged - merged).abs().max() <= 1e-5
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())  # not merged in place


def test_merging_equals_the_merge_of_each_layer():
    model = tiny()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(model, rank=3, alpha=7.0, targets="qkv|down")
    merged = merge_adapters(weights, adapters_of(model), 7.0 / 3)
    by_layer = merged_by_layer(model)
    assert merged.keys() == by_layer.keys() == weights.keys()
    assert all(torch.equal(merged[name], by_layer[name]) for name in merged)
    assert {name.split(".", 3)[-1] for name in merged if not torch.equal(merged[name], weights[name])} == {
        "qkv.weight", "down.weight"}


def test_loss_and_gradients_equal_peft():
    peft = pytest.importorskip("peft", reason="the oracle is peft")
    ours, theirs, (ids, targets) = tiny(), tiny(), ids_and_targets()
    theirs.load_state_dict(ours.state_dict())
    adapted(ours)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.split("|")), theirs)
    mapped = {}
    for name, p in theirs.named_parameters():
        if ".lora_" in name:  # blocks.0.attn.qkv.lora_A.default.weight
            mapped[name] = name.replace("lora_A.default.weight", "lora_a").replace("lora_B.default.weight", "lora_b")
            p.data.copy_(ours.get_parameter(mapped[name]))
    assert sorted(mapped.values()) == sorted(adapters_of(ours))
    losses = [loss_of(m, ids, targets) for m in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0] - losses[1]) <= 1e-5
    for name, p in theirs.named_parameters():
        if name in mapped:
            assert (p.grad - ours.get_parameter(mapped[name]).grad).abs().max() <= 1e-6, name


def test_equals_peft_on_transformers_llama():
    """An independent model too, with q, k, v, gate, up apart: B is cut in pieces and the gradients of A add up."""
    peft = pytest.importorskip("peft", reason="the oracle is peft")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    ours, (ids, targets) = adapted(tiny(qkv_bias=False)), ids_and_targets()
    c = ours.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True, rope_theta=c.rope_theta, attn_implementation="eager"))
    parts = {"qkv": ["q_proj", "k_proj", "v_proj"], "out": ["o_proj"], "gate_up": ["gate_proj", "up_proj"],
             "down": ["down_proj"]}
    modules = sum(parts.values(), [])
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules), theirs)
    theirs.model.embed_tokens.weight.data.copy_(ours.embed.weight)
    pairs = []
    for block, layer in zip(ours.blocks, theirs.model.layers):
        for name, modules in parts.items():
            mine = getattr(block.attn if name in ("qkv", "out") else block.ffn, name)
            there = [getattr(layer.self_attn if name in ("qkv", "out") else layer.mlp, m) for m in modules]
            rows = [m.base_layer.out_features for m in there]
            for m, w, b in zip(there, mine.weight.split(rows), mine.lora_b.split(rows)):
                m.base_layer.weight.data.copy_(w)
                m.lora_A.default.weight.data.copy_(mine.lora_a)
                m.lora_B.default.weight.data.copy_(b)
            pairs.append((mine, there))
    loss = loss_of(ours, ids, targets)
    reference = torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    reference.backward()
    assert abs(loss - reference) <= 1e-5
    for mine, there in pairs:
        assert (mine.lora_b.grad - torch.cat([m.lora_B.default.weight.grad for m in there])).abs().max() <= 1e-5
        assert (mine.lora_a.grad - sum(m.lora_A.default.weight.grad for m in there)).abs().max() <= 1e-5


# ---------------------------------------------------------------------------- whole runs


def test_checkpoint_is_small_and_loads_over_its_base(place, tmp_path, monkeypatch):  # noqa: F811
    root, tok = place
    monkeypatch.chdir(root)
    cfg = settings(".", out_dir="small", lora_rank=2, max_steps=3, lr=1e-2)
    checkpoint = run(cfg)
    assert set(checkpoint["model"]) == {name for name in checkpoint["model"] if "lora_" in name}
    numbers = sum(t.numel() for t in checkpoint["model"].values())
    moments = sum(t.numel() for s in checkpoint["optimizers"][0]["state"].values() for t in s.values() if t.dim())
    assert moments == 2 * numbers  # of the adapters alone
    base = load_checkpoint("base")
    assert numbers < 0.2 * sum(t.numel() for t in base["model"].values())
    assert os.path.getsize("small/best.pt") < os.path.getsize("base/ckpt.pt")
    monkeypatch.chdir(tmp_path)  # the base is found from anywhere
    model, tokenizer, _ = load_model(f"{root}/small")
    assert tokenizer.fingerprint == tok.fingerprint and list(model.state_dict()) == list(base["model"])
    by_hand = Transformer(ModelConfig(**base["model_config"]))
    by_hand.load_state_dict(base["model"])
    lora.add_lora(by_hand, **checkpoint["lora"])
    assert adapters_of(by_hand).keys() == checkpoint["model"].keys()
    by_hand.load_state_dict(checkpoint["model"], strict=False)
    ids = torch.randint(0, 400, (2, 20))
    assert (model.logits(model(ids)) - by_hand.logits(by_hand(ids))).abs().max() <= 1e-5
    by_layer = merged_by_layer(by_hand)
    assert all(torch.equal(tensor, by_layer[name]) for name, tensor in model.state_dict().items())

    lora.main(lora.Config(f"{root}/small", f"{root}/merged"))
    merged, _, again = load_model(f"{root}/merged")
    assert again["lora"] is None and torch.equal(merged(ids), model(ids))
    over = run(settings(root, init_from=f"{root}/small", out_dir=f"{root}/twice", lora_rank=2, max_steps=1))
    assert over["lora"]["base"] == "../small"  # adapters over adapters
    load_model(f"{root}/twice")


def test_another_base_is_refused(place):  # noqa: F811
    root, _ = place
    run(settings(root, out_dir=f"{root}/adapters", lora_rank=2, max_steps=1))
    with pytest.raises(SystemExit, match="lora=.*'rank': 2.* there, None here"):
        sft.main(settings(root, out_dir=f"{root}/adapters"))
    forget_run()
    with pytest.raises(SystemExit, match="is of another run: lora=.*'rank': 2.* there, .*'rank': 4.* here"):
        sft.main(settings(root, out_dir=f"{root}/adapters", lora_rank=4))
    checkpoint = load_checkpoint(f"{root}/adapters")
    checkpoint["lora"]["base_hash"] = "0" * 64
    torch.save(checkpoint, f"{root}/adapters/ckpt.pt")
    with pytest.raises(SystemExit, match="has other weights now"):
        load_model(f"{root}/adapters")


def test_resume_bit_for_bit(place):  # noqa: F811
    assert set(check_resume(place[0], "lora-resume", lora_rank=2)["lora"]) == {"rank", "alpha", "targets", "base",
                                                                             "base_hash"}


def test_two_ranks_equal_one(place):  # noqa: F811
    check_two_ranks(place[0], "lora-ranks", lora_rank=2)


def test_ten_and_ten_steps_are_twenty(place):  # noqa: F811
    check_ten_and_ten(sft, settings(place[0], out_dir=f"{place[0]}/lora-ten", eval_every=10, lora_rank=2))


def test_a_file_to_start_from(place):  # noqa: F811
    """Adapters over a checkpoint file instead of a folder find it again."""
    root, _ = place
    first = run(settings(root, out_dir=f"{root}/first", max_steps=1))
    assert run(settings(root, init_from=f"{root}/first/best.pt", out_dir=f"{root}/over", lora_rank=2,
                        max_steps=1))["lora"]["base"] == "../first/best.pt"
    model, _, _ = load_model(f"{root}/over")
    assert torch.equal(model.embed.weight, first["model"]["embed.weight"])


# ---------------------------------------------------------------------------- python lora.py


def test_merging_is_refused_in_one_line(place):  # noqa: F811
    root, _ = place
    run(settings(root, out_dir=f"{root}/to-merge", lora_rank=2, max_steps=1))
    run(settings(root, out_dir=f"{root}/whole", max_steps=1))
    before = load_checkpoint(f"{root}/whole")
    errors = []
    for words, message in [
            ([f"{root}/to-merge"], "--out=out/poems-merged"),
            ([f"--out={root}/new"], "name the run"),
            ([f"{root}/to-merge", f"--out={root}/whole"], f"{root}/whole/ckpt.pt exists"),
            ([f"{root}/to-merge", f"--out={root}/to-merge"], f"{root}/to-merge/ckpt.pt exists"),
            ([f"{root}/whole", f"--out={root}/new"], "holds no adapters"),
            ([f"{root}/nowhere", f"--out={root}/new"], f"no checkpoint at '{root}/nowhere'")]:
        with pytest.raises(SystemExit, match=re.escape(message)) as error:
            lora.main(load_config(lora.Config, words, positional="run"))
        errors.append(str(error.value))
    assert all(error.startswith("error: ") and "\n" not in error for error in errors)
    assert not os.path.exists(f"{root}/new")
    after = load_checkpoint(f"{root}/whole")
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])


def test_the_command_itself(place):  # noqa: F811
    """Refused: one line and status 1. Else: a folder that is a run like any other."""
    root, _ = place
    run(settings(root, out_dir=f"{root}/command", lora_rank=2, max_steps=1))

    def call(*words):
        return subprocess.run([sys.executable, os.path.join(ROOT, "lora.py"), *words], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    refused = call(f"{root}/command")
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    done = call(f"{root}/command", f"--out={root}/command-merged")
    assert done.returncode == 0, done.stderr
    assert load_model(f"{root}/command-merged")[2]["lora"] is None


def test_targets_that_are_no_pattern_are_refused():
    with pytest.raises(SystemExit, match=r"lora_targets='\(' is no regular expression"):
        lora.add_lora(tiny(), 2, 4.0, "(")
