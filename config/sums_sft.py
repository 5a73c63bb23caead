# 1,000 conversations about sums, 400 of which think first: the model learns how to think, but does not always do it.
#   python prepare.py sums-sft --input=data/raw/sums/sft.jsonl --kind=sft --tokenizer=data/sums --val_fraction=0.05
#   python sft.py config/sums_sft.py
data_dir = "data/sums-sft"
init_from = "out/sums"
out_dir = "out/sums-sft"

seq_len = 128
batch_size = 16
epochs = 8
optimizer = "muon"
lr = 3e-3
min_lr = 1e-4
adam_lr = 2e-3
momentum = 0.8
warmup_steps = 10
decay_steps = 60

eval_every = 200
compile = False
log_every = 20
questions = "4713+2586=?|9504-8759=?"
