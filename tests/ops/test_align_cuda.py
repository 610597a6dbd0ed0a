"""What only a device can show: no host sync, one launch, CUDA graphs, other streams, a second device."""

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from spa_fast import SinkhornAlign

pytestmark = pytest.mark.gpu

GRADS = ["envelope", "implicit", "unroll"]


def arguments(device="cuda"):
    g = torch.Generator().manual_seed(0)
    patches, tokens = torch.randn(4, 16, 64, generator=g), torch.randn(10, 5, 64, generator=g)
    mask = torch.ones(10, 5, dtype=torch.bool)
    mask[3, 2:] = False
    return patches.to(device).requires_grad_(), tokens.to(device).requires_grad_(), mask.to(device)


@pytest.fixture
def inputs():
    return arguments()


def step(align, patches, tokens, mask):
    scores = align(patches, tokens, token_mask=mask)
    return scores, *torch.autograd.grad(scores.sum(), (patches, tokens))


@pytest.mark.parametrize("score", ["transport", "value"])
@pytest.mark.parametrize("grad", GRADS)
def test_no_host_sync(inputs, grad, score):
    align = SinkhornAlign(grad=grad, score=score)
    step(align, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(align, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ragged_classes_copy_offsets_without_waiting(inputs):
    patches, tokens, _ = inputs
    tokens = tokens.detach().flatten(0, 1)
    align = SinkhornAlign()
    expected = align(patches, tokens, cu_tokens=torch.tensor([0, 7, 7, 50], device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = align(patches, tokens, cu_tokens=(0, 7, 7, 50))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("grad", "similarity"), [("envelope", True), ("implicit", True), ("unroll", False)])
def test_each_direction_is_one_launch_of_one_kernel(grad, similarity):
    """All pairs in their layout: neither a transposed copy nor 1 - S is made beside the kernel."""
    from spa_fast.kernels import sinkhorn_bwd, sinkhorn_fwd

    S = torch.rand(4, 16, 10, 5, device="cuda")
    a, b = torch.full((1, 16), 1 / 16, device="cuda"), torch.full((1, 5), 0.2, device="cuda")
    ones = torch.ones(40, device="cuda")

    def run():
        out = sinkhorn_fwd(S, a, b, 0.1, 20, 1e-3, False, similarity)
        sinkhorn_bwd(ones, S, a, b, *out[1:4], 0.1, False, grad, similarity)
        torch.cuda.synchronize()

    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
    names = [e.name for e in trace.events() if e.device_type == DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    assert names == ["_sinkhorn_fwd_kernel", f"_sinkhorn_{grad}_kernel"]


def test_another_stream_gives_the_same_bits(inputs):
    align = SinkhornAlign()
    expected = step(align, *inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step(align, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("grad", GRADS)
def test_replayed_graph_follows_new_inputs(inputs, grad):
    patches, tokens, mask = inputs
    align = SinkhornAlign(grad=grad)
    # Kernels are compiled and loaded before the capture, on a stream of their own as torch asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(align, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(align, *inputs)
    with torch.no_grad():
        patches.copy_(torch.randn_like(patches))
        tokens.copy_(torch.randn_like(tokens))
    graph.replay()
    for x, y in zip(captured, step(align, patches, tokens, mask), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("grad", GRADS)
def test_a_device_that_is_not_current(inputs, grad):
    align = SinkhornAlign(grad=grad)
    expected, found = step(align, *inputs), step(align, *arguments("cuda:1"))
    assert torch.cuda.current_device() == 0
    for x, y in zip(expected, found, strict=True):
        assert y.device == torch.device("cuda:1")
        torch.testing.assert_close(x.cpu(), y.cpu())
