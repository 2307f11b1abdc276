"""Functions that ONNX lacks, against torch's own."""

import torch
from stageline.exporter.functions import erfinv


def test_the_inverse_error_function_is_torchs() -> None:
    x = torch.cat([torch.linspace(-1, 1, 4001), 1 - 10.0 ** -torch.arange(1, 8), torch.tensor([0.95 * 2 - 1])])
    ours, theirs = erfinv(x), torch.erfinv(x)
    assert torch.equal(ours.isinf(), theirs.isinf())
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=2e-6, atol=1e-7)
