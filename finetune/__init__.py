"""From raw web dialogue to a trained Koala. Installed as `koala_local.finetune`."""
