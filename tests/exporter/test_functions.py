"""Functions that ONNX lacks, against torch's own."""

import torch
from stageline.exporter.functions import complex_unsqueeze, erfinv, without_unknown


def test_the_inverse_error_function_is_torchs() -> None:
    x = torch.cat([torch.linspace(-1, 1, 4001), 1 - 10.0 ** -torch.arange(1, 8), torch.tensor([0.95 * 2 - 1])])
    ours, theirs = erfinv(x), torch.erfinv(x)
    assert torch.equal(ours.isinf(), theirs.isinf())
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=2e-6, atol=1e-7)


def test_a_dimension_more_of_complex_numbers_is_torchs() -> None:
    x = torch.randn(3, 5, dtype=torch.complex64)
    for dim in (0, 1, 2, -1, -2):
        assert torch.equal(complex_unsqueeze(x, dim), x.unsqueeze(dim))


def test_the_rotary_embeddings_of_llama_4_can_be_exported() -> None:
    class Rotary(torch.nn.Module):
        def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            turns = torch.polar(torch.ones_like(angles), angles)[:, :, None, :]
            return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(3)

    x, angles = torch.randn(2, 7, 3, 8), torch.randn(2, 7, 4)
    program = without_unknown(torch.export.export(Rotary(), (x, angles)))
    graph = torch.onnx.export(program, dynamo=True, verbose=False)
    assert graph is not None
    torch.testing.assert_close(torch.from_numpy(graph(x, angles)[0].numpy()), Rotary()(x, angles))
