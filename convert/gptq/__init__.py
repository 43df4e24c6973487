"""A checkpoint -> a GPTQ folder, one decoder layer in memory at a time.

checkpoint.py  layer by layer, and on where it was stopped
matrix.py      GPTQ itself: a matrix and its inputs -> integer codes
pack.py        these codes in the layout of GPTQ checkpoints
folder.py      what stands beside the weights
"""
