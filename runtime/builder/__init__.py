"""TensorRT: stages lowered, built into engines for chosen GPUs, kept in the bundle, checked before they are loaded."""
