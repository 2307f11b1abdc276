"""A classifier's logits as the scores that its checkpoint means."""

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.bundle.manifest import Activation
from stageline.runtime.engines.base import Array


def scores(logits: Array, activation: Activation) -> NDArray[np.float64]:
    """Scores [..., labels] of logits of that shape: probabilities that sum to one (softmax), a probability for each
    label (sigmoid), or the logits as they are (none)."""
    values = logits.astype(np.float64)
    if activation == "none":
        return values
    if activation == "sigmoid":
        result: NDArray[np.float64] = np.exp(-np.logaddexp(0, -values))
        return result
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    result = powers / powers.sum(axis=-1, keepdims=True)
    return result
