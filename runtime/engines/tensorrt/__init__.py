"""Running TensorRT engines: which ones a bundle holds, whether one may be opened here, and running it."""
