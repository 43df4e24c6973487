"""A checkpoint -> a GGUF file in one pass.

write.py       read, permute, quantize, write, on all cores
layout.py      tensor names, shapes and types, and the metadata keys
kquants.py     which type each tensor gets
"""
