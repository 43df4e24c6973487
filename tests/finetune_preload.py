"""Everything that a training run imports, for a process that others are forked from."""

# ruff: noqa: F401
import bitsandbytes
import koala_local.finetune.worker
import peft.tuners.lora.bnb
import torch._dynamo
import torch.utils.tensorboard
