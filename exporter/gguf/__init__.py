"""A .gguf file as an export takes it: its config, its tensors and its tokenizer, each as its metadata says."""
