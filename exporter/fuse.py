"""Fusing what the trace spells out: norms and rotary embeddings become single ONNX operators, in place."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.fusion import _layer_norm, _rms_normalization, _rotary_embedding


def fuse(model: ir.Model) -> ir.Model:
    """Rewrite normalisation and rotary patterns of opset 23 in `model`. Attention is one operator since the trace."""
    rules = [
        *_rms_normalization.rms_normalization_ruleset.rules,
        *_layer_norm.layer_normalization_ruleset.rules,
        *_rotary_embedding.rotary_embedding_rules.rules,
    ]
    rewrite(model, rules)
    RemoveUnusedNodesPass()(model)
    return model
