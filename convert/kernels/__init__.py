"""Weights -> the bytes of ggml's types, many times faster than ggml.

choice.py      which function packs a tensor: a kernel, or ggml.py, the installed library
blocks.py      the kernels, one for each type: search.py finds scales, with the vectors of vectors.py
narrow.py      these three again, with vectors of half the width
cuda.py        the same text translated for a GPU, with threads.py in the place of vectors.py
"""

REGISTERS = 2  # of the processor in a vector: while the additions of one wait for each other, those of the other run
