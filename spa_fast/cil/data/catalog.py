"""The data sets that presets know: classes, published splits, folders, label names, prompts, origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.json_input import read_json

_HERE = Path(__file__).parent
_DESCRIPTIONS = _HERE.parent / "descriptions"


@dataclass(frozen=True)
class DataSet:
    """Facts about one data set as class-incremental papers use it.

    Attributes:
        key: name in presets.
        aliases: other names, in lower case without separators; also tried as folders under a data root.
        classes: classes used.
        increment: classes of a task in both published settings.
        half: classes of the first task in the second setting.
        train: images of the published training split.
        test: images of the published test split.
        folder: where it is expected under a data root.
        example: a class folder of it.
        origin: where its makers publish it.
    """

    key: str
    aliases: tuple[str, ...]
    classes: int
    increment: int
    half: int
    train: int
    test: int
    folder: str
    example: str
    origin: str

    @property
    def presets(self) -> tuple[str, str]:
        """Both published settings."""
        return f"{self.key}_B0_Inc{self.increment}", f"{self.key}_B{self.half}_Inc{self.increment}"


_ALL = (
    DataSet(
        *("cifar224", ("cifar100", "cifar"), 100, 10, 50, 50_000, 10_000, "cifar-100-python", ""),
        origin="https://www.cs.toronto.edu/~kriz/cifar.html (the python version)",
    ),
    DataSet(
        *("cub", ("cub200",), 200, 20, 100, 9_430, 2_358, "cub", "001.Black_footed_Albatross"),
        origin="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    ),
    DataSet(
        *("imagenetr", ("imagenetr", "inr"), 200, 20, 100, 24_000, 6_000, "imagenet-r", "n01443537"),
        origin="https://github.com/hendrycks/imagenet-r",
    ),
    DataSet(
        *("objectnet", (), 200, 20, 100, 26_509, 6_628, "objectnet", "air_freshener"),
        origin="https://objectnet.dev",
    ),
    DataSet(
        *("cars", ("car", "stanfordcars"), 100, 10, 50, 4_135, 4_083, "cars", "AM General Hummer SUV 2000"),
        origin="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    ),
    DataSet(
        *("ucf101", ("ucf",), 100, 10, 50, 10_553, 2_639, "ucf", "ApplyEyeMakeup"),
        origin="https://www.crcv.ucf.edu/data/UCF101.php (videos; one frame of each as an image)",
    ),
    DataSet(
        *("aircraft", ("fgvcaircraft",), 100, 10, 50, 6_667, 3_333, "aircraft", "707-320"),
        origin="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    ),
    DataSet(
        *("sun", ("sun397",), 300, 30, 150, 72_870, 18_179, "sun", "abbey"),
        origin="https://vision.princeton.edu/projects/2010/SUN/",
    ),
    DataSet(
        *("food101", ("food",), 100, 10, 50, 79_988, 20_012, "food", "apple_pie"),
        origin="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    DataSet(
        *("caltech101", ("caltech",), 100, 10, 50, 2_100, 1_000, "caltech101", "accordion"),
        origin="https://data.caltech.edu/records/mzrjq-6wc02",
    ),
)
DATA_SETS = {data_set.key: data_set for data_set in _ALL}


def find_data_set(name: str, argument: str) -> DataSet:
    """The data set of any of its names: `cifar100`, `CUB-200`, `stanford_cars`.

    Raises:
        RunError: unknown name.
    """
    key = _plain(name)
    for data_set in _ALL:
        if key in (data_set.key, *data_set.aliases):
            return data_set
    hint = did_you_mean(key, DATA_SETS) or f"; known: {', '.join(DATA_SETS)}"
    raise RunError(f"{argument}: unknown data set {name!r}{hint}")


def find_folder(root: Path, data_set: DataSet) -> Path:
    """The data set's folder under a data root, by any of its names.

    Raises:
        RunError: none, with the expected tree and the makers' address; or more than one.
    """
    found = folders_of(root, data_set)
    if len(found) > 1:
        raise RunError(f"--data-root: {root}: {found[0].name} and {found[1].name} are both {data_set.key}")
    if not found:
        raise RunError(f"--data-root: no {data_set.key} in {root}: {expected_tree(root, data_set)}")
    return found[0]


def folders_of(root: Path, data_set: DataSet) -> list[Path]:
    """Folders under a data root that carry one of the data set's names.

    Raises:
        RunError: no such root.
    """
    if not root.is_dir():
        raise RunError(f"--data-root: no such folder: {root}")
    names = {_plain(data_set.folder), data_set.key, *data_set.aliases}
    return sorted(p for p in root.iterdir() if p.is_dir() and _plain(p.name) in names)


def expected_tree(root: Path, data_set: DataSet) -> str:
    """What has to lie where, and where to get it."""
    folder = root / data_set.folder
    if data_set.key == "cifar224":
        tree = f"expected {folder}/ with the files train, test and meta, as torchvision writes them"
    else:
        tree = (
            f"expected {folder}/train/{data_set.example}/* and {folder}/test/{data_set.example}/* (or val/)"
        )
    splits = f"{data_set.classes} classes, {data_set.train} + {data_set.test} images"
    note = "published figures use subsets and splits linked from the READMEs of LAMDA-CL's repositories"
    return f"{tree} ({splits}); published at {data_set.origin}; {note}; nothing is downloaded for you"


def label_names(data_set: DataSet, classes: int | None = None) -> tuple[str, ...]:
    """The first `classes` label names in folder-sorted order (default: those in use)."""
    document = read_json(description_file(data_set), "descriptions")
    assert isinstance(document, dict)
    names = tuple(entry["name"] for entry in document["classes"])
    return names[: data_set.classes if classes is None else classes]


def folder_names(data_set: DataSet) -> dict[str, str]:
    """{folder: label name} where the published folders do not carry the names; else empty."""
    maps = read_json(_HERE / "folder_names.json", "folder names")
    assert isinstance(maps, dict)
    names: dict[str, str] = maps.get(data_set.key, {})
    return names


def prompt_templates(data_set: DataSet) -> tuple[str, ...]:
    """The prompt set published for it with CLIP; training uses the first."""
    return read_templates(_HERE / "templates.json", data_set, "templates")


def read_templates(path: Path, data_set: DataSet | None, argument: str) -> tuple[str, ...]:
    """Prompt templates from a JSON file: a list, or {data set: list} as LAMDA's repositories have it.

    Args:
        path: the file.
        data_set: whose list is taken; None takes the only one.
        argument: how the user gave the file, for messages.

    Raises:
        RunError: no list for the data set, or something in it that is no text with `{}`.
    """
    texts, where = read_json(path, argument), f"{argument}: {path}"
    if isinstance(texts, dict):
        names = (data_set.key, *data_set.aliases) if data_set else ()
        found = [key for key in texts if not data_set or _plain(key) in names]
        if len(found) != 1:
            expected = f"one list for {data_set.key}" if data_set else "--preset, or a file of one data set"
            hint = did_you_mean(data_set.key, texts) if data_set else ""
            raise RunError(f"{where}: expected {expected}, got {', '.join(texts) or 'nothing'}{hint}")
        texts, where = texts[found[0]], f"{where}: {found[0]}"
    if not isinstance(texts, list) or not texts:
        raise RunError(f"{where}: expected a list of templates, got {texts!r:.60}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or "{}" not in text:
            raise RunError(f"{where}[{i}]: expected a text with {{}} for the class name, got {text!r:.60}")
    return tuple(texts)


def description_file(data_set: DataSet) -> Path:
    """Packaged class-wise descriptions."""
    return _DESCRIPTIONS / f"{data_set.key}.json"


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
