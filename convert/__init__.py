"""From any LLaMA-family checkpoint to a quantized one. Installed as `koala_local.convert`."""
