# A base model that has read sums: 0.5 M parameters, 12,000 documents of ten sums each.
#   python -m recipes.sums
#   python prepare.py sums --input=data/raw/sums/text.jsonl --tokenizer=data/raw/sums/tokenizer.model
#   python pretrain.py config/sums.py
data_dir = "data/sums"
out_dir = "out/sums"

dim = 96
n_layers = 4
n_heads = 3
qk_norm = True
max_seq_len = 256

seq_len = 128
batch_size = 16            # 2,048 tokens a step
max_steps = 400
optimizer = "muon"
lr = 1e-2
min_lr = 3e-4
momentum = 0.8
warmup_steps = 50
decay_steps = 200

eval_every = 250
compile = False            # it would take longer than it saves
log_every = 50
sample_start = "347+"
