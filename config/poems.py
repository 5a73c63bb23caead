# The quickstart's base model: 3 M parameters, 3.0 M of 12.3 M tokens of poems, idioms, a novel and riddles.
#   python prepare.py poems && python pretrain.py config/poems.py
# 2 cores (AMX, products in bf16): 4.3 minutes, held-out 2.22 bits a byte, recites 静夜思. Not timed in fp32 on two cores.
# Runs of equal time (runs/equal_time.py, 110 s on one thread, uncompiled, with an earlier vocabulary of longer tokens),
# held-out bits a byte: lr 3e-3 2.688, lr 6e-3 2.711, 8 rows a step 2.670, dim 128 2.641. The narrower model is ahead so
# early; 192 was kept for the later stages. Muon was not compared.
data_dir = "data/poems"
out_dir = "out/poems"

dim = 192
n_layers = 4
n_heads = 6
max_seq_len = 512          # what chat will need; pretraining reads rows of 128
seq_len = 128
batch_size = 16            # 2,048 tokens a step: small batches learn more a minute here
max_steps = 1_450
lr = 3e-3
min_lr = 3e-4
warmup_steps = 50
schedule = "wsd"
decay_steps = 450
weight_decay = 0.1

anneal_dir = "data/poems-famous"  # 37 famous quatrains to know by heart: 4 of 16 rows in the last 250 steps
anneal_steps = 250
anneal_rows = 4

eval_every = 250
save_every = 250
log_every = 25
sample_every = 500
sample_start = "床前明月光"
