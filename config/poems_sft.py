# Instruction tuning on poems-sft: poems to order, next lines, idioms, riddles, dialogues (39,565 conversations).
#   python prepare.py poems-sft
#   python sft.py config/poems_sft.py            (2 cores, fp32: 5 minutes)
# With adapters: --lora_rank=8 --lr=1e-3 --out_dir=out/poems-lora
data_dir = "data/poems-sft"
init_from = "out/poems"
out_dir = "out/poems-sft"

seq_len = 256              # 4.4 conversations a row
batch_size = 12            # 3,072 tokens a step
epochs = 0.9
lr = 2e-3
min_lr = 5e-5
warmup_steps = 20
weight_decay = 0.1

eval_every = 200


log_every = 20
questions = "你是谁？|写一首五言绝句，题目是《春夜》。|“床前明月光”的下一句是什么？|“守株待兔”是什么意思？|歇后语：猪鼻子插大葱——？"
