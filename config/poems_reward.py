# Reward model on poems-pairs: ranked poems (lists of 3 or 4) and idiom explanations (pairs), 14,000 prompts.
#   python prepare.py poems-pairs
#   python reward.py config/poems_reward.py      (2 cores: 4 minutes)
data_dir = "data/poems-pairs"
init_from = "out/poems-sft"
out_dir = "out/poems-reward"

batch_size = 32            # about 100 answers, 6,600 tokens
max_steps = 420
lr = 3e-4                  # at 8e-4 the model forgets what it knew about idioms
min_lr = 3e-5
warmup_steps = 20

eval_every = 210
eval_prompts = 600

log_every = 10
dtype = "float32"          # for CPUs: bf16 matmuls need time to prepare for every new shape, and shapes change here
