"""Methods of quantisation, each in a module of its own: which tensors hold a weight, and which values they mean."""
