"""Names of quantization mixes: in file names, in GGUF headers, and which of them `koala pull` would rather take."""

from __future__ import annotations

import re

# llama.cpp's `general.file_type`
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip

# Best first. Q6_K leads: its perplexity is within 0.05 % of 16 bits; what is larger only costs memory and speed, so it
# comes last, for repositories that have nothing else.
PREFERENCE = (
    *("Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0"),
    *("Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S"),
    *("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
    *("Q8_0", "BF16", "F16", "F32"),
)
_IN_NAME = re.compile(
    r"(?<![A-Z0-9])(IQ[1-4]_[A-Z]+|Q[2-8]_K(?:_[A-Z]+)?|Q[458]_[01]|TQ[12]_0|MXFP4(?:_MOE)?|BF16|FP?16|FP?32)(?![A-Z0-9_])"
)
_SPELLED = {"FP16": "F16", "FP32": "F32"}


def type_in_name(file_name: str) -> str:
    """The type that a file name such as `koala-13B-HF.Q4_K_M.gguf` ends with, "" where it names none."""
    found: list[str] = _IN_NAME.findall(file_name.upper())
    return _SPELLED.get(found[-1], found[-1]) if found else ""


def rank(type_name: str) -> int:
    """The place in PREFERENCE; unknown types come after all."""
    return PREFERENCE.index(type_name) if type_name in PREFERENCE else len(PREFERENCE)
