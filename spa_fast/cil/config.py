"""The method's settings: one frozen dataclass, every choice that the paper leaves open in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spa_fast.bank import Covariance, GaussianBank, Shrink
from spa_fast.cil.backbone import PatchSource
from spa_fast.cil.descriptions.select import Selection
from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.projectors import Aggregate, Form


@dataclass(frozen=True)
class SpaConfig:
    """Settings of SPA, reconstructed from the abstract of arXiv 2605.13835 and its group's public methods."""

    # Texts and the images they are written from
    exemplar_selection: Selection = "representative_diverse"
    """How the diverse images of a class are chosen for whoever writes its descriptions."""
    exemplars: int = 5
    """Images per class shown to the writer of descriptions: one nearest the mean, the rest diverse."""
    n_descriptions: int = 6
    """Descriptions used per class; fewer where a class has fewer."""
    description_template: str = "{name} with {description}"
    """How class name and lower-cased description are joined for the text encoder."""
    long_descriptions: Literal["cut", "split"] = "cut"
    """Descriptions that the text encoder cannot take whole: cut, or split into pieces that are
    descriptions of their own, beyond n_descriptions where need be."""
    semantic_tokens: Literal["sentence_eos", "token_level"] = "sentence_eos"
    """One token per description (its end-of-text feature) or its word tokens."""
    word_limit: int = 16
    """Word tokens kept per description when semantic_tokens is token_level."""

    # Patches
    patch_source: PatchSource = "value_path"
    """Where patch tokens leave the image tower."""
    patch_score: Literal["max", "mean", "softmax"] = "max"
    """How a patch's similarities to a class's tokens become one score."""
    k: int = 16
    """Patches kept per image and class."""
    class_conditional: bool = True
    """Choose patches for every candidate class, or once per image."""
    selection_space: Literal["frozen", "projected"] = "frozen"
    """Features in which patches are chosen: as the encoder gives them, or projected."""

    # Transport
    solver: Literal["sinkhorn", "uniform", "double_softmax", "max_mean"] = "sinkhorn"
    """The plan between kept patches and descriptions; the last three are ablations without transport."""
    eps: float = 0.1
    """Entropic regularisation, in units of cost (1 - cosine)."""
    max_iter: int = 100
    """Most Sinkhorn iterations."""
    tol: float = 1e-3
    """L1 error of the row marginals at which a problem stops."""
    grad: Literal["envelope", "implicit", "unroll"] = "envelope"
    """Gradient of the transport score."""
    marginals: Literal["uniform", "score_softmax"] = "uniform"
    """Weights of the kept patches: equal, or a softmax of their selection scores over eps."""
    backend: Literal["auto", "triton", "native", "reference"] = "auto"
    """Who computes selection and transport: compiled code where there is any, or a named one."""

    # Projectors
    projector: Form = "residual_zero"
    """Form and initialisation of a task's projector."""
    projector_bias: bool = True
    """Whether projectors have a bias."""
    projector_aggregate: Aggregate = "sum"
    """How the projectors of all tasks combine."""
    project_patches: Literal["shared", "separate", "none"] = "shared"
    """Local branch: the global branch's projectors, its own, or frozen features."""
    decay_old_projectors: bool = False
    """Let weight decay keep shrinking the newest frozen projector, as torch < 2.0 did unasked."""

    # Fusion and loss
    fusion_weight: float = 0.3
    """Weight of the local logits beside the global ones at inference (lambda_ot)."""
    local_loss_weight: float = 0.3
    """Weight of the local cross-entropy (lambda_1). Both weights 0 switch the local branch off."""
    description_loss_weight: float = 0.0
    """Weight of a contrast of class prompts against their descriptions (lambda_2)."""
    loss: Literal["separate", "joint"] = "separate"
    """Cross-entropy on each branch, or one on the fused logits (drawn features stay global then)."""
    logit_scale_mode: Literal["exp", "raw"] = "exp"
    """Factor of the cosine logits: the backbone's exp(logit_scale), 100 for CLIP, or logit_scale itself."""

    # Gaussian pseudo-features
    statistics: Literal["raw", "normalized"] = "raw"
    """Space in which class Gaussians are fitted: joint features as they are, or at norm 1."""
    covariance: Covariance = "full"
    """Form of the class covariances."""
    shrink: Shrink = "none"
    """Shrinkage of the class covariances: none, average (adds the mean variance to the diagonal and the mean
    covariance to the rest), or the estimators of Ledoit and Wolf or OAS."""
    ridge: float = 1e-4
    """Constant added to the diagonal of every covariance."""
    pseudo_per_class: int = 4
    """Global pseudo-features per replayed class and batch; 0 switches global replay off."""
    pseudo_classes: int = 0
    """Old classes replayed per batch, drawn at random; 0 means all of them."""
    pseudo_form: Literal["gaussian", "isotropic"] = "gaussian"
    """Draw from the class Gaussian, or the class mean plus isotropic_std times noise."""
    isotropic_std: float = 0.25
    """Standard deviation of isotropic pseudo-features, relative to the mean feature norm of the class."""
    local_replay: Literal["none", "mean", "patches"] = "mean"
    """Local pseudo-features: none, the mean of an image's kept patches, or k patches."""
    local_pseudo_per_class: int = 4
    """Local pseudo-features per replayed class and batch."""

    # Optimisation
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW; fresh for every task."""
    epochs: int = 10
    """Passes over a task's images."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 0.05
    """Initial learning rate."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Per epoch: cosine to 0 over a task, or a tenth after 40 % and again after 75 % of its epochs."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 0.05
    """Weight decay of the trained projectors."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("exemplars", "n_descriptions", "word_limit", "k", "max_iter", "epochs", "batch_size"):
            check_range(self, name, 1)
        for name in ("pseudo_per_class", "pseudo_classes", "local_pseudo_per_class", "tol", "fusion_weight"):
            check_range(self, name, 0)
        for name in ("local_loss_weight", "description_loss_weight", "weight_decay"):
            check_range(self, name, 0)
        check_range(self, "momentum", 0, 1)
        for name in ("eps", "lr", "ridge", "isotropic_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RunError(f"{name}: expected a positive number, got {getattr(self, name)}")
        try:
            GaussianBank(covariance=self.covariance, ridge=self.ridge, shrink=self.shrink)
        except ValueError as error:
            raise RunError(str(error)) from error
        if "{description}" not in self.description_template:
            got = self.description_template
            raise RunError(f"description_template: expected '{{description}}' in it, got {got!r}")
        if self.loss == "joint" and (self.fusion_weight == 0 or self.project_patches == "none"):
            raise RunError("loss: 'joint' needs a fusion_weight above 0 and projected patches")

    @property
    def local_branch(self) -> bool:
        """Whether patches are used at all."""
        return self.fusion_weight > 0 or self.local_loss_weight > 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpaConfig:
        """Build from a mapping, for example a run's stored config; `shrink` was once True or False.

        Raises:
            RunError: unknown key, wrong type or value out of range.
        """
        check_keys(cls, values)
        if isinstance(values.get("shrink"), bool):
            values = {**values, "shrink": "average" if values["shrink"] else "none"}
        return cls(**values)


def check_keys(cls: Any, values: Mapping[str, Any]) -> None:
    """Refuse keys that are no field of the dataclass `cls`."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise RunError(f"config: unknown key {key!r}{did_you_mean(key, known)}")


def check_types(config: Any) -> None:
    """Refuse values of a dataclass that are not of their field's type or choices."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _check_type(field.name, getattr(config, field.name), hints[field.name])


def check_range(config: Any, name: str, least: float, below: float = float("inf")) -> None:
    """Refuse a field outside least <= value < below."""
    value = getattr(config, name)
    if not least <= value < below:
        limit = " and finite" if below == float("inf") else f" and below {below:g}"
        raise RunError(f"{name}: expected at least {least:g}{limit}, got {value}")


def _check_type(name: str, value: object, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            hint_text = did_you_mean(str(value), get_args(hint))
            raise RunError(f"{name}: expected one of {', '.join(get_args(hint))}, got {value!r}{hint_text}")
        return
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
            raise RunError(f"{name}: expected texts, got {value!r}")
        return
    allowed = {float: (int, float), int: (int,)}.get(hint, hint)
    number = hint in (float, int)
    if not isinstance(value, allowed) or (number and isinstance(value, bool)) or value != value:
        kind = {float: "a number", int: "a whole number", bool: "True or False"}.get(hint, str(hint))
        raise RunError(f"{name}: expected {kind}, got {value!r}")
