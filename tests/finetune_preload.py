"""Everything that a training run imports, for a process that others are forked from."""

import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
