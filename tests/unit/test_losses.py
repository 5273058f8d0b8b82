"""Losses of half-precision maps against float64."""

from __future__ import annotations

import pytest
import torch

from dmm_core.losses import score_loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_compared_without_copies(dtype):
    """The error and its gradient, against float64; what the backward pass keeps are the two maps themselves."""
    student, teacher = (torch.randn(3, 8, 5, 6).to(memory_format=torch.channels_last).to(dtype) for _ in range(2))
    kept = []
    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        told = score_loss(student, teacher)
    weights = torch.tensor([1.0, 1e-3, 300.0])
    (told * weights).sum().backward()
    exact = student.detach().double().requires_grad_()
    wanted = (exact - teacher.double()).square().flatten(1).mean(1)
    (wanted * weights.double()).sum().backward()
    assert told.dtype == torch.float32 and student.grad.dtype == dtype
    torch.testing.assert_close(told.double(), wanted, rtol=2e-3, atol=0)
    error = (student.grad.double() - exact.grad).flatten(1).norm(dim=1)
    assert (error < 1e-2 * exact.grad.flatten(1).norm(dim=1) + 1e-7).all()
    assert {x.data_ptr() for x in kept} == {student.data_ptr(), teacher.data_ptr()}
