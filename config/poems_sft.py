# Instruction tuning on poems-sft: write a poem, say the next line, explain an idiom, riddles, dialogues. Who it is and
# the famous quatrains are repeated (recipes/poems.py).
#   python prepare.py poems-sft
#   python sft.py config/poems_sft.py            (2 cores with fast bf16: 2½ minutes)
# With adapters: --lora_rank=32 --lora_alpha=32 --optimizer=adamw --lr=3e-3 --out_dir=out/poems-lora
data_dir = "data/poems-sft"
init_from = "out/poems"
out_dir = "out/poems-sft"

seq_len = 256              # 4 conversations a row
batch_size = 12            # 3,072 tokens a step
epochs = 0.65
optimizer = "muon"
lr = 3e-3
min_lr = 1e-4
adam_lr = 2e-3
momentum = 0.8
warmup_steps = 20
decay_steps = 330          # lr stays the same, and falls linearly in the last 330 steps

eval_every = 400
log_every = 20
questions = "你是谁？|写一首五言绝句，题目是《春夜》。|“床前明月光”的下一句是什么？"
questions += "|“守株待兔”是什么意思？|背诵《静夜思》"
