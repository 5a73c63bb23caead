"""Rows mixed in (PPO-ptx): text or conversations that a preference stage learns beside its answers, so as not to
forget."""
import numpy as np
import pytest
from small_runs import conversation, flat_gradient, gradient, mean_nll, run, settings, spy

import common.mixed
import dpo
import grpo
import ppo
from common.checkpoint import load_model
from common.data import open_data, shuffled
from common.mixed import PIECE
from tokenizer import render_chat

ONE_UPDATE = dict(ppo_epochs=1, minibatches=1)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "dpo"])
@pytest.mark.parametrize("kind", ["talks", "text"])
def test_rows_mixed_in_add_their_loss(place, tmp_path, stage, kind):
    """The gradient of an update = that without them + ptx_coef * that of the mean over their learned tokens, from a
    plain loop over whole logits, document by document."""
    root, tok = place
    changes = dict(grad_clip=0.0, max_steps=1, **(ONE_UPDATE if stage != "dpo" else {}))
    without, _ = run(settings(root, stage, f"{tmp_path}/none", **changes))
    mixed, log = run(settings(root, stage, f"{tmp_path}/one", **changes, ptx_dir=kind, ptx_coef=0.7, ptx_rows=6))
    if kind == "talks":
        documents = [render_chat(tok, conversation(i)) for i in shuffled(40, 0, 6, 1234)]
    else:
        text = open_data(f"{root}/text")[0].tokens
        starts = PIECE * shuffled((len(text) - 1) // PIECE, 0, 6, 1234)
        documents = [(text[i:i + PIECE].astype(np.int64), [1] * PIECE) for i in starts]
    model, _, _ = load_model(f"{root}/base")
    loss = mean_nll(model, documents)
    plain = flat_gradient(loss, model)
    assert plain.abs().max() > 0.01
    assert (gradient(mixed) - gradient(without) - 0.7 * plain).abs().max() <= 1e-6
    assert log[-1]["ptx_loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("stage", [ppo, grpo, dpo])
def test_every_update_mixes_in_the_next_rows(place, tmp_path, monkeypatch, stage):
    calls = spy(monkeypatch, common.mixed, "mixed_rows")
    changes = dict(ppo_epochs=3, minibatches=2) if stage is not dpo else {}
    run(settings(place[0], stage.STAGE, str(tmp_path), max_steps=2, ptx_dir="text,talks", ptx_coef=0.5, **changes))
    assert [args[1] for args, _ in calls] == list(range(2 if stage is dpo else 12))
