"""What only a device can show: no host sync, CUDA graphs, other streams."""

import pytest
import torch

from spa_fast import SinkhornAlign

pytestmark = pytest.mark.gpu


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    patches, tokens = torch.randn(4, 16, 64, generator=g), torch.randn(10, 5, 64, generator=g)
    mask = torch.ones(10, 5, dtype=torch.bool)
    mask[3, 2:] = False
    return patches.cuda().requires_grad_(), tokens.cuda().requires_grad_(), mask.cuda()


def step(align, patches, tokens, mask):
    scores = align(patches, tokens, token_mask=mask)
    return scores, *torch.autograd.grad(scores.sum(), (patches, tokens))


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unroll"])
def test_no_host_sync(inputs, grad):
    align = SinkhornAlign(grad=grad)
    step(align, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(align, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_gives_the_same_bits(inputs):
    align = SinkhornAlign()
    expected = step(align, *inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step(align, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_replayed_graph_follows_new_inputs(inputs):
    patches, tokens, mask = (x.detach() for x in inputs)
    align = SinkhornAlign()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        align(patches, tokens, token_mask=mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = align(patches, tokens, token_mask=mask)
    patches.copy_(torch.randn_like(patches))
    graph.replay()
    assert torch.equal(scores, align(patches, tokens, token_mask=mask))
