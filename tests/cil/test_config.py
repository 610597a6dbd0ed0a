import dataclasses

import pytest

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.errors import RunError


def test_round_trip():
    config = SpaConfig(k=8, eps=0.05, solver="uniform")
    assert SpaConfig.from_dict(dataclasses.asdict(config)) == config


def test_unknown_key_gets_a_hint():
    with pytest.raises(RunError, match=r"unknown key 'epz'; did you mean 'eps'\?"):
        SpaConfig.from_dict({"epz": 0.1})


@pytest.mark.parametrize(("stored", "shrink"), [(True, "average"), (False, "none"), ("oas", "oas")])
def test_shrink_as_it_was_once_stored(stored, shrink):
    assert SpaConfig.from_dict({"shrink": stored}).shrink == shrink


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": float("inf")}, "eps"),
        ({"k": 0}, "k: expected at least 1 and finite, got 0"),
        ({"k": 2.5}, "k: expected a whole number"),
        ({"k": True}, "k: expected a whole number"),
        ({"tol": -1e-3}, "tol"),
        ({"max_iter": 0}, "max_iter"),
        ({"solver": "sinkhron"}, "solver: expected one of sinkhorn"),
        ({"patch_source": "somewhere"}, "patch_source"),
        ({"shrink": "ledoit-wolf"}, "did you mean 'ledoit_wolf'"),
        ({"shrink": "oas", "covariance": "diag"}, "shrink: 'oas' needs all covariances"),
        ({"lr": "fast"}, "lr: expected a number"),
        ({"class_conditional": 1}, "class_conditional"),
        ({"description_template": "{name}"}, "description_template"),
    ],
)
def test_values_out_of_range_name_the_field(values, message):
    with pytest.raises(RunError, match=message.replace(".", r"\.")):
        SpaConfig(**values)


def test_every_field_is_documented():
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(SpaConfig))).body[0].body
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    undocumented = [
        body[i].target.id
        for i in fields
        if not (isinstance(body[i + 1], ast.Expr) and isinstance(body[i + 1].value, ast.Constant))
    ]
    assert undocumented == []
