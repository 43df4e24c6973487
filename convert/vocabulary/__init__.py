"""A checkpoint's tokenizer files -> a GGUF vocabulary that gives the same token ids.

read.py             `Vocabulary`, from sentencepiece_model.py or from a tokenizer.json, split as pretokenizers.py finds
from_gguf.py        the vocabulary of a GGUF source
tokenizer_files.py  their JSON, read with bounds
"""
