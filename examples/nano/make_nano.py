"""Makes Koala Nano, the bundled miniature: vocabulary, training, GGUF, Q4_K_M.

    python examples/nano/make_nano.py train --work build/nano       # about 40 CPU-minutes
    python examples/nano/make_nano.py quantize --work build/nano --out koala-nano-q4_k_m.gguf

`train` needs torch, transformers, sentencepiece and gguf; `quantize` needs llama-cpp-python.
Everything is seeded. A run that was cut off goes on from its last checkpoint; delete the folder to
begin anew. `check_nano.py` evaluates the result. This script is for the miniature alone: a row is
one long conversation, cut where the row is full, so nothing is padded and nothing needs a mask.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from world import dialogue

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaForCausalLM

SEED = 20230403
VOCABULARY = 2048
CONTEXT = 4096
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 256, 768, 4, 4, 2
EPS, THETA = 1e-6, 10000.0

BATCH_TOKENS = 2048
# row length -> share of the batches, in the first and in the last part of the run
EARLY = {128: 0.35, 256: 0.35, 512: 0.30}
LATE = {128: 0.10, 256: 0.20, 512: 0.30, 1024: 0.23, 2048: 0.13, 4096: 0.04}
LATE_FROM = 1568
# (steps, peak learning rate): a long run, then a short one that settles it
CYCLES = ((2850, 2e-3), (1050, 8e-4))
WARM_UP, DECAY, CLIP = 150, 0.05, 1.0
USER_WEIGHT = 0.1
BOS, EOS = 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}BEGINNING OF CONVERSATION: "
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ ' ' + message['content'] }}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- if loop.first or messages[loop.index0 - 1]['role'] == 'system' -%}{{ ' ' }}{%- endif -%}"
    "{{ 'USER: ' + message['content'] + ' GPT:' }}"
    "{%- else -%}{{ message['content'] + '</s>' }}{%- endif -%}"
    "{%- endfor -%}"
)


def fields(rng: Random) -> Iterator[tuple[str, bool]]:
    """One endless conversation as text fields; true marks a reply."""
    one = dialogue(rng)
    head = f"BEGINNING OF CONVERSATION: {one.system} ".replace(":  ", ": ")
    for turn in one.turns:
        yield f"{head}USER: {turn.user} GPT:", False
        yield turn.reply, True
        head = ""


def train_vocabulary(folder: Path) -> None:
    """Writes `tokenizer.model`: SentencePiece BPE, LLaMA style."""
    import sentencepiece

    rng = Random(SEED)
    lines: list[str] = []
    for _ in range(400):
        conversation = fields(rng)
        for _ in range(120):
            text = next(conversation)[0]
            lines.extend(line for line in text.splitlines() if line and line.isascii())
    required = "".join(chr(code) for code in (*range(0x21, 0x7F), *range(0xC0, 0x100)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        required_chars=required + "‘’“”–—…€",
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )


def row(vocabulary: SentencePieceProcessor, rng: Random, length: int) -> tuple[list[int], list[float]]:
    """One conversation of exactly `length` ids, and each id's weight in the loss."""
    ids, weights = [BOS], [0.0]
    for text, is_reply in fields(rng):
        piece = vocabulary.encode(text)
        ids += [*piece, EOS] if is_reply else piece
        weights += [1.0] * (len(piece) + 1) if is_reply else [USER_WEIGHT] * len(piece)
        if len(ids) >= length:
            break
    return ids[:length], weights[:length]


def batch(vocabulary: SentencePieceProcessor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of one step, (rows, length) ids and loss weights; they depend on the step alone."""
    import torch

    rng = Random(SEED * 1_000_003 + step)
    shares = EARLY if step < LATE_FROM else LATE
    length = rng.choices(list(shares), list(shares.values()))[0]
    rows = [row(vocabulary, rng, length) for _ in range(max(1, BATCH_TOKENS // length))]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def new_model() -> LlamaForCausalLM:
    """The untrained model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=EPS,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def learning_rate(step: int) -> float:
    """In each cycle a linear warm-up, then a cosine to nothing."""
    for length, peak in CYCLES:
        if step < WARM_UP:
            return peak * (step + 1) / WARM_UP
        if step < length:
            return peak * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (length - WARM_UP)))
        step -= length
    return 0.0


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean cross-entropy of the next id."""
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="none"
    )
    shifted = weights[:, 1:].reshape(-1)
    return (losses * shifted).sum() / shifted.sum()


def save_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path` first and renames, so that `path` is never half written."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def _resume(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Loads the checkpoint, if there is one; returns the step to go on from."""
    import torch

    if not path.exists():
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    import torch

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    save_whole(path, lambda part: torch.save(state, part))


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    rows: tuple[torch.Tensor, torch.Tensor],
    rate: float,
) -> float:
    """One optimizer step; returns the loss. Raises FloatingPointError before a broken update."""
    import torch

    loss = loss_of(model, *rows)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


def train(folder: Path, steps: int, threads: int) -> None:
    """The whole training; leaves `tokenizer.model`, `checkpoint.pt` and `koala-nano-f32.gguf`."""
    import sentencepiece
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    if not (folder / "tokenizer.model").exists():
        train_vocabulary(folder)
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=DECAY, fused=True)
    start = time.time()
    losses: list[float] = []
    for step in range(_resume(folder / "checkpoint.pt", model, optimizer), steps):
        rows = batch(vocabulary, step)
        losses.append(_step(model, optimizer, rows, learning_rate(step)))
        done = step + 1
        if done % 50 == 0 or done == steps:
            spent = f"{time.time() - start:.0f} s, {time.process_time() / 60:.1f} CPU min"
            print(f"step {done} loss {sum(losses) / len(losses):.4f} {spent}", flush=True)
            losses.clear()
        if done % 200 == 0 or done == steps:
            _checkpoint(folder / "checkpoint.pt", model, optimizer, done)
    state = model.state_dict()
    save_whole(folder / "koala-nano-f32.gguf", lambda part: write_gguf(part, folder, state))


def _add_vocabulary(writer: GGUFWriter, folder: Path) -> None:
    import gguf
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = vocabulary.get_piece_size()
    kinds = [gguf.TokenType.NORMAL] * size
    for index in range(size):
        if vocabulary.is_unknown(index):
            kinds[index] = gguf.TokenType.UNKNOWN
        elif vocabulary.is_control(index):
            kinds[index] = gguf.TokenType.CONTROL
        elif vocabulary.is_byte(index):
            kinds[index] = gguf.TokenType.BYTE
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([vocabulary.id_to_piece(index).encode() for index in range(size)])
    writer.add_token_scores([vocabulary.get_score(index) for index in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_description(writer: GGUFWriter, parameters: int) -> None:
    import gguf

    writer.add_name("Koala Nano")
    writer.add_description(
        f"A miniature of {parameters / 1e6:.1f} million parameters that speaks the Koala dialogue "
        "format; trained only on dialogues composed by a generator. For trying the program."
    )
    writer.add_license("apache-2.0")
    writer.add_author("the koala project")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(THETA)


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight"}[name]  # fmt: skip
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    return f"blk.{layer}.{names[part]}.weight"


def _interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k reordered: llama.cpp turns neighbours, the trained weights two halves."""
    half = array.shape[0] // heads // 2
    return array.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path: Path, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The trained weights and the vocabulary as one F32 GGUF file, embeddings tied."""
    import gguf

    tensors = {name: tensor.numpy() for name, tensor in state.items() if name != "lm_head.weight"}
    writer = gguf.GGUFWriter(path, "llama")
    _add_description(writer, sum(array.size for array in tensors.values()))
    _add_vocabulary(writer, folder)
    for name, array in tensors.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = _interleaved(array, heads) if heads else array
        writer.add_tensor(_gguf_name(name), stored.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path) -> None:
    """Q4_K_M by llama.cpp itself."""
    from llama_cpp import llama_cpp

    def run(path: Path) -> None:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(parameters))
        if failed:
            raise OSError(f"llama.cpp could not quantize {source}")

    target.parent.mkdir(parents=True, exist_ok=True)
    save_whole(target, run)


def main() -> None:
    """Read the command line and run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "quantize"))
    parser.add_argument("--work", type=Path, default=Path("build/nano"), help="folder for all files")
    parser.add_argument("--out", type=Path, default=Path("koala-nano-q4_k_m.gguf"))
    parser.add_argument("--steps", type=int, default=sum(length for length, _ in CYCLES))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "train":
        train(args.work, args.steps, args.threads)
    else:
        quantize(args.work / "koala-nano-f32.gguf", args.out)


if __name__ == "__main__":
    main()
