"""common/lora.py: adapters by hand, against their merge, and against peft."""
import pytest
import torch
import torch.nn.functional as F

from common.lora import LoRALinear, adapters_of, add_lora, merge_adapters
from common.loss import cross_entropy
from model import ModelConfig, Transformer

TARGETS = "qkv|out|gate_up|down"


def tiny(**changes):
    return Transformer(ModelConfig(**{**dict(vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32,
                                             qkv_bias=True), **changes}))


def adapted(model, rank=4, alpha=8.0, targets=TARGETS):
    """Adapters with B different from zero, so that they do something."""
    add_lora(model, rank, alpha, targets)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def ids_and_targets():
    ids = torch.randint(0, 64, (3, 17))
    return ids[:, :-1], ids[:, 1:]


def loss_of(model, ids, targets):
    return cross_entropy(model(ids), model.head_weight, targets)


def test_an_adapter_by_hand():
    """W + alpha/rank * B A: with W = 2, A = (3, 4), B = 5 and alpha/rank = 1/2 the input (1, 1) gives 4 + 5 * 7 / 2."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data.fill_(2.0)
    adapter = LoRALinear(layer, rank=1, alpha=0.5)
    adapter.lora_a.data = torch.tensor([[3.0, 4.0]])
    assert adapter(torch.ones(2)).item() == 4.0  # B begins at zero
    adapter.lora_b.data.fill_(5.0)
    assert adapter(torch.ones(2)).item() == 4.0 + 0.5 * 5 * 7
    merged = merge_adapters({"x.weight": layer.weight}, {"x.lora_a": adapter.lora_a, "x.lora_b": adapter.lora_b}, 0.5)
    assert merged["x.weight"].tolist() == [[2.0 + 7.5, 2.0 + 10.0]]


def test_starts_as_the_base_and_only_adapters_get_gradients():
    model, (ids, targets) = tiny(), ids_and_targets()
    before = model(ids)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, 4, 8.0, TARGETS)
    assert torch.equal(before, model(ids))
    loss_of(model, ids, targets).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(adapters_of(model)) and len(grads) == 2 * 4 * 2  # a, b; layers; blocks
    assert all(grads[name].abs().max() > 0 for name in grads if "lora_b" in name)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_names_choose_the_layers():
    def layers(targets):
        return sorted({name.rsplit(".", 1)[0] for name in adapters_of(add_lora(tiny(), 2, 4.0, targets))})
    assert layers("qkv") == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert layers(r"blocks\.1\..*") == [f"blocks.1.{n}" for n in ("attn.out", "attn.qkv", "ffn.down", "ffn.gate_up")]
    with pytest.raises(SystemExit, match="q_proj.*down, gate_up, out, qkv"):
        layers("q_proj")
    with pytest.raises(SystemExit, match=r"lora_targets='\(' is no regular expression"):
        layers("(")


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
    merged = plain.state_dict()
    changed = {name.split(".", 2)[-1] for name in merged if not torch.equal(merged[name], weights[name])}
    assert changed == {"attn.qkv.weight", "attn.out.weight", "ffn.gate_up.weight", "ffn.down.weight"}


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
    reference = F.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    reference.backward()
    assert abs(loss - reference) <= 1e-5
    for mine, there in pairs:
        assert (mine.lora_b.grad - torch.cat([m.lora_B.default.weight.grad for m in there])).abs().max() <= 1e-5
        assert (mine.lora_a.grad - sum(m.lora_A.default.weight.grad for m in there)).abs().max() <= 1e-5
