# The quickstart's base model: 1.7 M parameters, 2.6 M of 15 M tokens of poems, idioms (twice), a novel and riddles.
#   python prepare.py poems && python pretrain.py config/poems.py
# 2 cores of an Intel Xeon with fast bf16: 2 minutes, held-out 2.200 bits per byte, recites 静夜思 (2026-11-29).
# Compared at equal steps (1,400; an H100; bits per byte): AdamW at lr 4e-3 2.261, with QK-norm 2.245; Muon at lr 1e-2
# with QK-norm 2.215, with momentum 0.9 instead of 0.95 2.196, with q, k, v apart 2.183, with momentum 0.8 2.174. Three
# seeds of these settings: 2.175, 2.185, 2.198; of AdamW: 2.261, 2.279, 2.285; of half the steps: 2.256, 2.262, 2.271.
# What did not help stands in docs/measurements.md.
data_dir = "data/poems"
out_dir = "out/poems"

dim = 128
n_layers = 4
n_heads = 2                # heads of 64 channels, which every inference engine knows
qk_norm = True
max_seq_len = 512          # what chat will need; pretraining reads rows of 128

seq_len = 128
batch_size = 16            # 2,048 tokens a step: small batches learn more a minute here
max_steps = 1_250
optimizer = "muon"
lr = 1e-2
min_lr = 3e-4
momentum = 0.8
warmup_steps = 50
decay_steps = 400          # flat, then a linear fall
weight_decay = 0.1

eval_every = 250
log_every = 25
sample_start = "床前明月光"
