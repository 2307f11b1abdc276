"""Stages as plain ONNX models with samples, for tools that know nothing of bundles: Polygraphy, trtexec, Netron."""
