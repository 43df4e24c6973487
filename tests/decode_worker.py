"""Run as a program: for each path on standard input, load that model for real, decode a few tokens, and answer a line.

The answer is "decoded", or what llama.cpp refused. When a model makes llama.cpp abort, there is no answer.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp.llama_cpp as llama

_TEXT = "Hello the world, é 你 😀".encode()


def decode(path: str) -> str:
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        return "not loaded"
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 128, 1, 1
    context = llama.llama_init_from_model(model, settings)
    if not context:
        return "no context"
    result = _decode(model, context)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return result


def _decode(model: object, context: object) -> str:
    vocabulary = llama.llama_model_get_vocab(model)
    tokens = (llama.llama_token * 96)()
    count = llama.llama_tokenize(vocabulary, _TEXT, len(_TEXT), tokens, len(tokens), True, False)
    if count <= 0:
        return f"tokenized to {count}"
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, count)):
        return "prompt not decoded"
    next_token = (llama.llama_token * 1)(llama.llama_vocab_n_tokens(vocabulary) - 1)
    if llama.llama_decode(context, llama.llama_batch_get_one(next_token, 1)):
        return "token not decoded"
    for token in range(llama.llama_vocab_n_tokens(vocabulary)):
        piece = ctypes.create_string_buffer(256)
        llama.llama_token_to_piece(vocabulary, token, piece, len(piece), 0, True)
    return "decoded"


if __name__ == "__main__":
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p())
    for line in sys.stdin:
        print(decode(line.rstrip("\n")), flush=True)
