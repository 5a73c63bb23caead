# A base model for sums: 0.9 M parameters; it reads 20,000 documents of ten sums each.
#   python -m recipes.sums
#   python prepare.py sums --input=data/raw/sums/text.jsonl --tokenizer=data/raw/sums/tokenizer.model
#   python pretrain.py config/sums.py
data_dir = "data/sums"
out_dir = "out/sums"

dim = 128
n_layers = 4
n_heads = 4
qk_norm = True
max_seq_len = 256

seq_len = 128
batch_size = 32            # 4,096 tokens a step
max_steps = 800
optimizer = "muon"
lr = 1e-2
min_lr = 3e-4
momentum = 0.8
warmup_steps = 50
decay_steps = 300

eval_every = 400
log_every = 50
sample_start = "347+"
