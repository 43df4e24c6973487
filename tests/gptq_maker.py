"""Tiny GPTQ folders with random codes: today's, and those of 2023."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from koala_local.convert.gptq.pack import QuantizedMatrix, pack
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.checkpoint_maker import tokenizer_model

CONTEXT = 512
ROWS = 352  # of the embedding; the tokenizer has 340 tokens


@dataclass(frozen=True)
class Made:
    """A GPTQ folder, and the same model in float32 as transformers runs it."""

    folder: Path
    model: Any

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = self.model(torch.tensor([ids])).logits[0, -1]
        return found


def make_gptq(
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    of_2023: bool = False,
    shards: int = 1,
    config: dict[str, Any] | None = None,
    seed: int = 0,
) -> Made:
    """Random codes and scales. `of_2023`: quantize_config.json only, zeros of any kind, groups in any order, desc_act,
    a bias of zeros, and the old spelling of config.json."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": ROWS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **(config or {}),
    }
    model: Any
    if "sliding_window" in common:
        model = MistralForCausalLM(MistralConfig(**common))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    model.eval()
    tensors: dict[str, torch.Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            matrix = random_matrix(module.out_features, module.in_features, bits, group_size, any_order=of_2023)
            module.weight.data = matrix.dequantized().contiguous()
            tensors |= {f"{name}.{part}": tensor for part, tensor in pack(matrix, bits).items()}
            if of_2023:
                tensors[f"{name}.bias"] = torch.zeros(module.out_features).half()
    for name, parameter in model.named_parameters():
        if "_proj" not in name:
            parameter.data = (parameter.data * (20 if "norm" not in name else 1)).half().float()
            tensors[name] = parameter.data.half()
    folder.mkdir(parents=True)
    write_tensors(folder, tensors, shards, "gptq_model-4bit-32g" if of_2023 else "model")
    quantization = {"bits": bits, "group_size": group_size, "desc_act": of_2023, "sym": not of_2023}
    written = {**common, "architectures": [type(model).__name__], "bos_token_id": 1, "eos_token_id": 2}
    if of_2023:
        written |= {"torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": 1}
    else:
        written |= {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq", **quantization}}
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return Made(folder, model)


def random_matrix(outputs: int, inputs: int, bits: int, size: int, *, any_order: bool) -> QuantizedMatrix:
    groups = 1 if size == -1 else -(-inputs // size)
    index = torch.arange(inputs, dtype=torch.int32) // (inputs if size == -1 else size)
    zeros = torch.full((groups, outputs), 1 << (bits - 1), dtype=torch.int16)
    if any_order:
        index = index[torch.randperm(inputs)]
        zeros = torch.randint(1, (1 << bits) + 1, (groups, outputs), dtype=torch.int16)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    scales = (0.6 + torch.rand(groups, outputs)) / (1 << bits)
    return QuantizedMatrix(codes, zeros, scales.half(), index)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int, stem: str) -> None:
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return
    names, where = list(tensors), dict[str, str]()
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
