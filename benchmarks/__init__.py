"""Side-by-side measurements that anyone can run: `python -m benchmarks`, or `make bench`.

    decode.py    tokens per second and Python time per token, against a bare loop over llama.cpp
    turns.py     time to the first token at turn 2 and turn 30, against evaluating the whole history
    resume.py    going on with a saved conversation, against evaluating it
    overflow.py  what a full context costs, by the share of it that is kept; how far a shifted cache is off
    finetune.py  training tokens per second, against transformers' Trainer with padding and with packing
    startup.py   `koala --help`, and from the command to the prompt

The models are the bundled miniature and a LLaMA of 160M random weights that models.py makes once. peers.py holds what
is measured against, talk.py conversations of a given length, table.py how results are shown and written.
"""

# First of all, before anything else loads OpenMP: peers and program are measured with the program's settings of it.
from koala_local.engine import bindings as _bindings  # noqa: F401
