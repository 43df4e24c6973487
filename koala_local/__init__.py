"""Koala on your own hardware: fine-tune, quantize and talk to a dialogue model."""

__version__ = "0.1.0"
