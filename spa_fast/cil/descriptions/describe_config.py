"""Settings of `spa-fast describe`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from spa_fast.cil.config import check_range
from spa_fast.cil.descriptions.select import Selection
from spa_fast.cil.errors import RunError
from spa_fast.cil.presets import BACKBONE

# True of whatever the class is: the offline stand-in for what a model would see.
TEMPLATE = (
    "its characteristic overall shape",
    "its typical colours",
    "its typical surface texture",
    "its most distinctive part",
    "its typical markings",
    "its typical proportions",
)


@dataclass(frozen=True)
class DescribeConfig:
    """What to describe, by whom and for how much."""

    data: Path
    """Folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*) images."""
    model: str = ""
    """Model to ask, for example gpt-5; its key is read from OPENAI_API_KEY."""
    base_url: str = ""
    """Address of a server that speaks the chat-completions API; default the SDK's, OpenAI."""
    from_template: bool = False
    """Ask no model: the same general texts for every class."""
    out: Path | None = None
    """File to write, or to go on with; default NAME_descriptions.json."""
    classnames: Path | None = None
    """As for train."""
    n_descriptions: int = 6
    """Descriptions per class; from a template at most 6."""
    exemplars: int = 5
    """Images shown per class; 0 sends class names only."""
    exemplar_selection: Selection = "representative_diverse"
    """How they are chosen beside the one nearest the class mean."""
    backbone: str = BACKBONE
    """Encoder by whose features they are chosen, as for train."""
    device: str = "cpu"
    """cpu or cuda: where it runs."""
    cache: Path | None = None
    """Folder of extracted features; default `feature_cache` beside the file written."""
    allow_upload: Annotated[bool, arg(aliases=["--yes"])] = False
    """Send images and class names to the model; without it only the estimate is printed."""
    parallel: int = 4
    """Classes asked for at a time; 1 asks for one after another."""
    prices: tuple[float, float] | None = None
    """USD per million tokens sent and answered, for estimates and --max-cost."""
    max_cost: float | None = None
    """USD at which to stop; needs --prices."""

    def __post_init__(self) -> None:
        check_range(self, "n_descriptions", 1, len(TEMPLATE) + 1 if self.from_template else 51)
        check_range(self, "exemplars", 0, 51)
        check_range(self, "parallel", 1, 65)
        if bool(self.model) == self.from_template:
            raise RunError("describe: expected --model NAME or --from-template")
        for number in (*(self.prices or ()), self.max_cost or 0.0):
            if not 0 <= number < math.inf:
                raise RunError(f"--prices, --max-cost: expected finite numbers of at least 0, got {number}")
        if self.max_cost is not None and self.prices is None:
            raise RunError("--max-cost: needs --prices, USD per million tokens sent and answered")
