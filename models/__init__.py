"""Reading checkpoints: config, tensor index, tokenizer; the catalogue of reference checkpoints; synthetic ones."""
