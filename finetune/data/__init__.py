"""Raw rows to a mix to a corpus of tokens to packed rows. Installed as `koala_local.finetune.data`."""
