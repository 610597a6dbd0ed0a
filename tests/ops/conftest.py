"""The backends of the transport operator, each on a device it runs on."""

from __future__ import annotations

import pytest
import torch

from spa_fast._backends import available


def _cases() -> list[object]:
    cases = []
    for backend, reason in available().items():
        device = "cuda" if backend == "triton" else "cpu"
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if reason is not None:
            marks.append(pytest.mark.skip(reason=f"{backend}: {reason}"))
        cases.append(pytest.param((backend, device), id=backend, marks=marks))
    if torch.cuda.is_available():
        cases.append(pytest.param(("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu))
    return cases


@pytest.fixture(params=_cases())
def backend_device(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param
