"""From any LLaMA-family checkpoint to a quantized one. Installed as `koala_local.convert`.

command.py     the command line: `koala quantize`, `koala recover`; job.py does the first, from source to report
sources/       a checkpoint in any published format -> a configuration and named tensors, read lazily
vocabulary/    its tokenizer files -> a GGUF vocabulary that gives the same token ids
kernels/       weights -> the bytes of ggml's types, by own kernels or by ggml's functions
gguf/          a checkpoint -> a GGUF file
gptq/          a checkpoint -> a GPTQ folder
forward.py     a forward pass in little memory, with rotary.py; estimate.py: what it takes
calibration.py texts -> token ids for that pass: importance.py (for K-quants), gptq/, verify.py
verify.py      is the output still the model? proof.py asks its own engine
report.py      what is said of the output; outcome.py writes it, with a model card, and tells it
recover.py     Koala from its published difference and LLaMA; safetensors_writer.py
"""
