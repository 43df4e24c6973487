"""A checkpoint in any published format -> a configuration and named tensors, read lazily.

checkpoint.py       which format it is
architecture.py     what a format gives: `Checkpoint`
huggingface.py      safetensors_file.py or pickled.py, in shards
meta.py             pickled.py, each file a part of every tensor
easylm.py           one stream, indexed by msgpack_index.py
gguf.py             llama.cpp's file, dequantized; gguf_names.py: what it calls the tensors
layout.py           which tensors there must be; stored.py: a tensor that lies in a file
"""
