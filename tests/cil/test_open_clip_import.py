"""The repair of open_clip's import acts on one error only and tries once."""

from types import ModuleType, SimpleNamespace

import pytest

from spa_fast.cil import open_clip_import

_ERROR = "operator torchvision::nms does not exist"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for the importer, for sys.modules and for torch.library; `failures` are raised in turn."""
    state = SimpleNamespace(failures=[], schemas=[], libraries=[], module=ModuleType("open_clip"))
    names = [
        "torch",
        "torchvision",
        "torchvision.ops",
        "torchvision_extra",
        "open_clip",
        "timm.models",
        "numpy",
    ]
    state.modules = dict.fromkeys(names)

    def import_module(name: str) -> ModuleType:
        assert name == "open_clip"
        if state.failures:
            raise state.failures.pop(0)
        return state.module

    def library(name: str, kind: str) -> SimpleNamespace:
        state.libraries.append((name, kind))
        return SimpleNamespace(define=state.schemas.append)

    monkeypatch.setattr(open_clip_import, "_library", None)
    monkeypatch.setattr(open_clip_import, "importlib", SimpleNamespace(import_module=import_module))
    monkeypatch.setattr(open_clip_import, "sys", SimpleNamespace(modules=state.modules))
    monkeypatch.setattr(open_clip_import, "torch", SimpleNamespace(library=SimpleNamespace(Library=library)))
    return state


def test_import_without_failure_repairs_nothing(world: SimpleNamespace) -> None:
    assert open_clip_import.import_open_clip() is world.module
    assert world.libraries == []
    assert len(world.modules) == 7


def test_missing_operator_is_declared_and_the_import_retried(world: SimpleNamespace) -> None:
    world.failures = [RuntimeError(_ERROR)]
    assert open_clip_import.import_open_clip() is world.module
    assert world.libraries == [("torchvision", "FRAGMENT")]
    assert [schema.partition("(")[0] for schema in world.schemas] == ["nms", "qnms"]
    assert set(world.modules) == {"torch", "torchvision_extra", "numpy"}
    assert open_clip_import._library is not None


def test_the_repair_is_tried_once(world: SimpleNamespace) -> None:
    world.failures = [RuntimeError(_ERROR), RuntimeError(_ERROR)]
    with pytest.raises(RuntimeError, match="nms"):
        open_clip_import.import_open_clip()
    world.failures = [RuntimeError(_ERROR)]
    with pytest.raises(RuntimeError, match="nms"):
        open_clip_import.import_open_clip()
    assert len(world.libraries) == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::roi_align does not exist"),
        RuntimeError(f"{_ERROR}, and more"),
        ImportError("no module named open_clip"),
    ],
)
def test_other_errors_pass_unchanged(world: SimpleNamespace, error: Exception) -> None:
    world.failures = [error]
    with pytest.raises(type(error)) as caught:
        open_clip_import.import_open_clip()
    assert caught.value is error
    assert world.libraries == []


def test_open_clip_imports_here() -> None:
    module = open_clip_import.import_open_clip()
    assert module is open_clip_import.import_open_clip()
    assert hasattr(module, "create_model_and_transforms")
