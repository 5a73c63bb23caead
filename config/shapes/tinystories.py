# Short stories: 44 M parameters (6 layers x 512, vocabulary 6-7 thousand), for a corpus like TinyStories in Chinese.
#   python prepare.py tinystories --input=YOUR_STORIES --vocab_size=6400
#   torchrun --standalone --nproc_per_node=1 pretrain.py config/shapes/tinystories.py
# Not trained to its end by us yet.
data_dir = "data/tinystories"
out_dir = "out/tinystories"

dim = 512
n_layers = 6
n_heads = 8
hidden_dim = 3392          # a wide feed-forward layer, so that six layers come to 44 M
tie_embeddings = False
max_seq_len = 512

batch_size = 64
grad_accum = 4             # 4 * 64 * 512 = 131,072 tokens a step
max_steps = 10_000
lr = 1e-3
min_lr = 1e-4
warmup_steps = 300
eval_every = 500

sample_start = "从前"
