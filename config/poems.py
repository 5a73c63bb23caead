# The quickstart's base model: 1.7 M parameters. It reads 2.6 M of 15 M tokens: poems, idioms (twice), a novel, riddles.
#   python prepare.py poems && python pretrain.py config/poems.py
# 2 cores of an Intel Xeon with fast bf16: 2 minutes, held-out 2.200 bits per byte, recites 静夜思 (2026-11-29).
# Compared in 1,400 steps (on an H100; bits per byte): AdamW at lr 4e-3 2.261, with QK-norm 2.245; Muon at lr 1e-2 with
# QK-norm 2.215, also with momentum 0.9 instead of 0.95 2.196, also q, k, v as three matrices 2.183, momentum 0.8 2.174.
# Three seeds of these settings: 2.175, 2.185, 2.198; of AdamW: 2.261, 2.279, 2.285; of these settings in half the
# steps: 2.256, 2.262, 2.271. What did not help: docs/measurements.md.
data_dir = "data/poems"
out_dir = "out/poems"

dim = 128
n_layers = 4
n_heads = 2                # heads of 64 channels: a size that every inference engine supports
qk_norm = True
max_seq_len = 512          # for conversations later; pretraining reads rows of 128

seq_len = 128
batch_size = 16            # 2,048 tokens a step: on a CPU a small batch learns more in a minute than a large one
max_steps = 1_250
optimizer = "muon"
lr = 1e-2
min_lr = 3e-4
momentum = 0.8
warmup_steps = 50
decay_steps = 400          # lr stays the same, and falls linearly in the last 400 steps
weight_decay = 0.1

eval_every = 250
log_every = 25
sample_start = "床前明月光"
