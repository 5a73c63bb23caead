# The quickstart's base model: 1.7 M parameters, 2.9 M of 12.3 M tokens of poems, idioms, a novel and riddles.
#   python prepare.py poems && python pretrain.py config/poems.py
# 2 cores of an AMD EPYC (Zen 3, fp32): 5½ minutes, held-out 2.278 bits a byte, recites 静夜思 (2026-11-25).
# Runs of equal time (runs/equal_time.py, held-out bits a byte). Zen 3, 140 s: dim 128 at lr 4e-3 2.450, dim 160 2.457,
# dim 192 2.470. Zen 4 with products in bf16, 70 s, dim 192: cosine 2.521, wsd 2.511, wsd at lr 5e-3 2.518, Muon with
# wsd 2.513: its steps are a quarter fewer and cost that much more; without fast bf16 it crawls. Before (110 s, longer
# tokens): 8 rows a step 2.670 against 2.688 with 16.
data_dir = "data/poems"
out_dir = "out/poems"

dim = 128
n_layers = 4
n_heads = 4
max_seq_len = 512          # what chat will need; pretraining reads rows of 128
seq_len = 128
batch_size = 16            # 2,048 tokens a step: small batches learn more a minute here
max_steps = 1_400
lr = 4e-3
min_lr = 3e-4
warmup_steps = 50

decay_steps = 450
weight_decay = 0.1

anneal_dir = "data/poems-famous"  # 37 famous quatrains to know by heart: 4 of 16 rows in the last 250 steps
anneal_steps = 250
anneal_rows = 4

eval_every = 250

log_every = 25

sample_start = "床前明月光"
