"""params.yaml, typed: load, merge the variants, validate, resolve.

A variant is a JSON Merge Patch (RFC 7396) of `input`, `model` and `train`. What comes out of here is either valid or a
`LabError` that lists every mistake with its place in the file.
"""

import difflib
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails

from ablation_lab import study_file
from ablation_lab.errors import LabError, shown, truth_hint
from ablation_lab.study_file import dotted, listed

PATCHED = ("input", "model", "train")
# Words that YAML 1.1 readers take for a boolean or nothing, so that a variant of this name would lose it somewhere.
MISREAD = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
SLUG = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
REPLICAS = 2  # of a mirrored training that names no number

# What no study needs more of; a larger number is a slip of the keyboard, and would end in a machine out of memory.
LONGEST_SIDE = 4096  # of a picture, in pixels; also of a kernel, a stride, a window
MOST_LAYERS = 1000  # of one network: convolutions, residual blocks, dense layers
MOST_SEEDS, MOST_VARIANTS = 1000, 500
MOST_CELLS = 10_000  # of a phase: DVC needs 30 ms and 30 KB for each, whatever it is asked
MOST_REPLICAS = 64
MOST_PLANS = 5000  # of the second phase: its variants, for each variant that may be selected
LONGEST_TEXT = 10_000
LARGEST_NUMBER = 2**63
MOST_MISTAKES = 30  # that are told at once

Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]  # of a layer: its filters or units
Repeats = Annotated[int, Field(ge=1, le=MOST_LAYERS)]


class Section(BaseModel):
    """A mapping of params.yaml: unknown keys and wrong types are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Study(Section):
    """What the study is called and where it comes from; never a reason to train.

    `quick` marks a study that ran on a sliver of data (`ablab quick`): every table and picture says so. While `test` is
    `sealed`, nothing is scored on the test part: a search compares its trials on the validation part, and the test part
    is looked at once, for the one that was selected. `smooth` is the number of epochs of the moving mean that the
    report draws its curves with, 1 for none; null smooths the curves of long trainings only.
    """

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=100)
    title: str = ""
    baseline: str
    source: str | None = None
    notes: str | None = None
    quick: bool = False
    test: Literal["scored", "sealed"] = "scored"
    smooth: Positive | None = None


class Split(Section):
    """Fractions of all pictures, or `test: given` for a data set that comes with a test part (then `validation` is a
    fraction of the rest). The split is stratified by class and depends on `seed` alone."""

    validation: float = Field(default=0.1, gt=0, lt=1)
    test: Literal["given"] | Annotated[float, Field(gt=0, lt=1)] = "given"
    seed: int = Field(default=0, ge=0, lt=2**32)


class Data(Section):
    """The pictures. `image_size` is [height, width] in pixels and `color` the channels; null keeps the data set's own.
    `limit` keeps at most so many pictures of each class in each part, for trying things out. `unreadable` says whether
    a picture that can't be decoded ends the stage or is left out. `pictures` is the number of pictures of each class
    that an `image_folder` must hold: a study that says so can be planned without its data."""

    dataset: Literal["digits", "fashion_mnist", "cifar10", "image_folder"]
    path: str | None
    image_size: Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None
    color: Literal["rgb", "grayscale"] | None = None
    resize: Literal["stretch", "pad", "crop"] = "stretch"
    split: Split = Split()
    limit: Positive | None = None
    unreadable: Literal["error", "skip"] = "error"
    pictures: Annotated[dict[str, Annotated[int, Field(ge=1, le=10**9)]], Field(min_length=2)] | None = None


class Input(Section):
    """What a network is fed. `rescale` maps 0-255 to [0, 1] (`unit`), to [-1, 1] (`symmetric`), to what a ready-made
    backbone was trained on (`backbone`, the default of `transfer`) or leaves it (`none`), inside the network.
    `fraction` of the training part is used, the same pictures in every cell. `augment` maps Keras'
    names of augmentation layers to their arguments."""

    rescale: Literal["unit", "symmetric", "none", "backbone"] = "unit"
    fraction: float = Field(default=1.0, gt=0, le=1)
    augment: dict[str, dict[str, Any]] = {}


class BlockSettings(Section):
    """Settings that a block has, or takes from `model` where it sets none. Sizes in pixels, `pool: 1` pools nothing."""

    convolution: Literal["standard", "separable", "depthwise", "transpose"] | None = None
    convolutions: Repeats | None = None
    filters: Width | None = None
    kernel: Pixels | None = None
    stride: Pixels | None = None
    padding: Literal["valid", "same"] | None = None
    activation: str | None = None
    normalization: Literal["none", "batch", "layer"] | None = None
    pool: Pixels | None = None
    pool_type: Literal["max", "average"] | None = None
    dropout: Rate | None = None


class DenseSettings(Section):
    """A dense layer of the head; `units` and `dropout` come from `model.head_units` and `model.head_dropout` where they
    are not set."""

    units: Width | None = None
    activation: str | None = None
    normalization: Literal["none", "batch", "layer"] | None = None
    dropout: Rate | None = None


class Network(Section):
    """What all builders share: hidden dense layers in `head` (their order counts) and how they are initialised.

    `activation` is the one of every hidden layer, `l2` the L2 penalty of every convolution and dense kernel, `head_l2`
    that of the dense ones and the output layer where it differs. `output` is what is trained: a probability
    a class, two classes' one probability (`sigmoid`), or numbers before the softmax; predictions are a probability a
    class in any case.
    """

    builder: str
    activation: str = "relu"
    initializer: str = "glorot_uniform"
    l2: float = Field(default=0.0, ge=0)
    head: dict[str, DenseSettings] = {}
    head_units: Width | None = None
    head_dropout: Rate = 0.0
    head_l2: float | None = Field(default=None, ge=0)
    output: Literal["softmax", "sigmoid", "logits"] = "softmax"

    def resolved(self) -> dict[str, Any]:
        """The settings with all defaults pushed down into the layers, so that equal networks have equal settings."""
        settings = self.model_dump()
        head_dropout = settings.pop("head_dropout")
        shared = {"activation": settings["activation"], "normalization": "none", "dropout": head_dropout}
        shared["units"] = settings.pop("head_units")
        settings["head_l2"] = self.l2 if self.head_l2 is None else self.head_l2
        settings["head"] = [_with_defaults(name, layer, shared) for name, layer in settings["head"].items()]
        del settings["activation"]
        return settings


class Mlp(Network):
    """Flatten, then the dense layers of `head`, then one output per class."""

    builder: Literal["mlp"]


class Cnn(Network):
    """Blocks of convolutions, each with normalisation, activation, pooling and dropout; then the head.

    `head_from` says how the last block becomes a vector, `features_dropout` drops from that vector. `any_size` makes a
    network for pictures of any height and width; it needs global pooling.
    """

    builder: Literal["cnn"]
    blocks: dict[str, BlockSettings] = Field(min_length=1)
    convolution: Literal["standard", "separable", "depthwise", "transpose"] = "standard"
    convolutions: Repeats = 1
    filters: Width | None = None
    kernel: Pixels = 3
    stride: Pixels = 1
    padding: Literal["valid", "same"] = "valid"
    normalization: Literal["none", "batch", "layer"] = "none"
    pool: Pixels = 2
    pool_type: Literal["max", "average"] = "max"
    dropout: Rate = 0.0
    head_from: Literal["flatten", "global_average", "global_max"] = "flatten"
    features_dropout: Rate = 0.0
    any_size: bool = False

    def resolved(self) -> dict[str, Any]:
        shared = {key: getattr(self, key) for key in BlockSettings.model_fields}
        settings = super().resolved()
        settings["blocks"] = [_with_defaults(name, block, shared) for name, block in settings["blocks"].items()]
        for block in settings["blocks"]:
            if block["convolution"] == "depthwise":
                block["filters"] = None  # a depthwise convolution has as many as it is given
        return {key: value for key, value in settings.items() if key not in shared}


class Stem(Section):
    """What a residual network starts with: one convolution, normalised, and max pooling (`pool: 1` pools nothing)."""

    filters: Width = 64
    kernel: Pixels = 7
    stride: Pixels = 2
    pool: Pixels = 1
    pool_stride: Pixels = 2


class Stage(Section):
    """So many residual blocks of two 3×3 convolutions; the first block has the stride, and a 1×1 projection beside it
    where the stride or the number of filters changes the shape."""

    filters: Width
    blocks: Repeats = 2
    stride: Pixels = 1


class Resnet(Network):
    """A residual network. `features_pool` averages over windows before `head_from` makes the vector for the head."""

    builder: Literal["resnet"]
    stem: Stem = Stem()
    stages: dict[str, Stage] = Field(min_length=1)
    features_pool: Pixels = 1
    head_from: Literal["flatten", "global_average", "global_max"] = "global_average"
    features_dropout: Rate = 0.0
    any_size: bool = False

    def resolved(self) -> dict[str, Any]:
        settings = super().resolved() | {"activation": self.activation}
        settings["stages"] = [{"name": name} | stage.model_dump() for name, stage in self.stages.items()]
        return settings


class Extent(Section):
    """Some of a backbone's layers, with weights or without: the `last` so many, or those from number `from_layer` on,
    in Keras' order, which counts from 0."""

    last: Positive | None = None
    from_layer: int | None = Field(default=None, ge=0)


class Transfer(Network):
    """A ready-made backbone without its top, one vector of features, dense layers.

    `weights` are `imagenet`, a file, or none, which is random; `trainable` says which layers of the backbone are
    trained, the others stay as they are, batch normalisation in inference mode.
    """

    builder: Literal["transfer"]
    backbone: str
    weights: str | None = None
    trainable: Annotated[
        Annotated[Literal["none", "all"], Tag("<word>")] | Annotated[Extent, Tag("<extent>")],
        Discriminator(lambda value: "<extent>" if isinstance(value, dict | Extent) else "<word>"),
    ] = "none"
    head_from: Literal["flatten", "global_average", "global_max"] = "global_average"
    features_dropout: Rate = 0.0
    any_size: bool = False


class Custom(Section):
    """A network that a function of the user's builds, `package.module:function`; every other key but `any_size` is an
    argument of that function."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    builder: str
    any_size: bool = False

    def resolved(self) -> dict[str, Any]:
        """The settings as they are: only the function knows their meaning."""
        return self.model_dump()


BUILDERS: dict[str, type[Network]] = {"cnn": Cnn, "mlp": Mlp, "resnet": Resnet, "transfer": Transfer}


class Schedule(Section):
    """A Keras learning-rate schedule by its own name; every other key is an argument of its constructor. It counts in
    steps, not epochs."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    name: str


class Optimizer(Section):
    """A Keras optimizer by its own name; every other key is an argument of its constructor."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    name: Annotated[str, AfterValidator(str.lower)] = "adam"
    learning_rate: Annotated[
        Annotated[float, Field(gt=0), Tag("<number>")] | Annotated[Schedule, Tag("<schedule>")],
        Discriminator(lambda value: "<schedule>" if isinstance(value, dict | Schedule) else "<number>"),
    ] = 0.001


class EarlyStopping(Section):
    """Stop when the monitored value has not improved by `min_delta` for `patience` epochs."""

    monitor: Literal["val_accuracy", "val_loss"] = "val_loss"
    patience: int = Field(default=5, ge=0)
    min_delta: float = Field(default=0.0, ge=0)


class ReduceLearningRate(Section):
    """Multiply the learning rate by `factor` after `patience` epochs without improvement; not below `min_lr`."""

    monitor: Literal["val_accuracy", "val_loss"] = "val_loss"
    factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=10, ge=0)
    min_delta: float = Field(default=0.0001, ge=0)
    cooldown: int = Field(default=0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)


class Train(Section):
    """How a network is trained. `keep: best` takes the weights of the epoch with the best `monitor` on the validation
    part, `last` those of the last epoch. `steps_per_epoch: null` is one pass over the training part. `class_weights`
    weigh the training pictures' losses by class, `balanced` so that all classes weigh the same. `threads` is the
    number of CPU threads of a cell: results depend on it.

    With `strategy: mirrored` one cell is trained on `replicas` devices (2), each batch shared out among them.
    `precision` is what layers compute in, `xla` whether steps are compiled with XLA (`auto` leaves it to Keras on a
    GPU, and never does on the CPU), `data_on` where the pictures or features are that steps are fed with (`auto` is the
    device for a GPU with room for them)."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    steps_per_epoch: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    optimizer: Optimizer = Optimizer()
    loss: str = "categorical_crossentropy"
    label_smoothing: Rate = 0.0
    monitor: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    keep: Literal["best", "last"] = "best"
    early_stopping: EarlyStopping | None = None
    reduce_lr: ReduceLearningRate | None = None
    class_weights: (
        Annotated[
            Annotated[Literal["balanced"], Tag("<word>")]
            | Annotated[dict[str, Annotated[float, Field(gt=0)]], Tag("<weights>")],
            Discriminator(lambda value: "<weights>" if isinstance(value, dict) else "<word>"),
        ]
        | None
    ) = None
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    strategy: Literal["single", "mirrored"] = "single"
    replicas: Annotated[int, Field(ge=1, le=MOST_REPLICAS)] | None = None
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    xla: Literal["auto"] | bool = "auto"
    data_on: Literal["auto", "device", "host"] = "auto"

    def resolved(self) -> dict[str, Any]:
        """The settings with the number of replicas that is meant where none is given."""
        replicas = (self.replicas or REPLICAS) if self.strategy == "mirrored" else None
        return self.model_dump() | {"replicas": replicas}


class Reported(Section):
    """Figures that a study's authors published, printed beside the reproduced ones. Accuracies in [0, 1]."""

    train_accuracy: float | None = Field(default=None, ge=0, le=1)
    validation_accuracy: float | None = Field(default=None, ge=0, le=1)
    test_accuracy: float | None = Field(default=None, ge=0, le=1)
    test_loss: float | None = None
    macro_f1: float | None = Field(default=None, ge=0, le=1)
    epochs: Positive | None = None
    best_epoch: Positive | None = None
    seconds: float | None = Field(default=None, gt=0)


class Patch(Section):
    """A variant as it is written: the reserved keys, and patches that are checked once they are merged."""

    note: str | None = None
    reported: Reported = Reported()
    compared_with: str | None = None
    input: dict[str, Any] = {}
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}


class Select(Section):
    """Which phase-one variant goes on into phase two: the best by a validation result, among all or the named ones."""

    by: Literal["validation_accuracy"] = "validation_accuracy"
    among: Literal["all"] | list[str] = "all"


class Finetune(Section):
    """The second phase: what is done with the selected variant, each a patch of it as variants are of the base."""

    select: Select = Select()
    variants: Annotated[dict[str, Any], Field(max_length=MOST_VARIANTS)] = {}


Seed = Annotated[int, Field(ge=0, lt=2**31)]


class File(Section):
    """The whole file before the variants are merged."""

    study: Study
    data: Data
    input: dict[str, Any] = {}
    model: dict[str, Any]
    train: dict[str, Any] = {}
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MOST_SEEDS)]
    finetune: Finetune = Finetune()
    variants: dict[str, Any] = Field(min_length=1, max_length=MOST_VARIANTS)


@dataclass(frozen=True)
class Variant:
    """One named network with its input and training, merged and valid."""

    name: str
    note: str | None
    reported: dict[str, float]
    compared_with: str | None
    input: Input
    model: Network | Custom
    train: Train

    def settings(self) -> dict[str, Any]:
        """Input, model and train in the user's terms, defaults filled in."""
        return {name: getattr(self, name).model_dump(exclude_none=True) for name in PATCHED}

    def resolved(self) -> dict[str, Any]:
        """What fixes the result, in canonical form: equal trainings have equal JSON."""
        return {"input": self.input.model_dump(), "model": self.model.resolved(), "train": self.train.resolved()}


@dataclass(frozen=True)
class Params:
    """A valid study. `variants` is in the order of the file, which `file` names in messages; `text` is what it holds.

    `second` holds the second phase, if there is one: for each variant that may be selected, what its variants are then.
    """

    study: Study
    data: Data
    seeds: list[int]
    variants: dict[str, Variant]
    second: dict[str, dict[str, Variant]]
    file: str = "params.yaml"
    text: str = ""

    @property
    def baseline(self) -> Variant:
        return self.variants[self.study.baseline]

    @property
    def cells(self) -> list[tuple[str, int]]:
        return [(name, seed) for name in self.variants for seed in self.seeds]

    @property
    def second_names(self) -> list[str]:
        """Names of the second phase's variants, whatever is selected."""
        return list(next(iter(self.second.values()), {}))

    def with_second(self, selected: str) -> "Params":
        """Both phases as one study, once a variant of the first is selected."""
        return replace(self, variants=self.variants | self.second[selected])

    def located(self, errors: Mapping[str, LabError], selected: str | None = None) -> list[str]:
        """The messages of mistakes in variants' settings, each once, with the line and the key that the user wrote.

        A setting comes from the variant's patch, in phase two from the patch of the `selected` variant, or from the
        base; a block or a dense layer may have it from `model`. Where it doesn't come from the variant's own patch, a
        message names the variants, unless all of the first phase have the mistake.

        Args:
            errors: by the name of the variant, of the second phase where a variant is `selected`.
        """
        found: dict[tuple[tuple, str], list[str]] = {}
        elsewhere: dict[str, list[str]] = {}  # what the text has no key for
        phase = ("finetune", "variants") if selected else ("variants",)
        for name, error in errors.items():
            if whole := self._written(error.place, [(*phase, name), *([("variants", selected)] if selected else [])]):
                found.setdefault((whole, error.text), []).append(name)
            else:
                elsewhere.setdefault(str(error), []).append(name)
        told = []
        for (whole, text), names in found.items():
            own = whole[: len(phase) + 1] == (*phase, names[0])
            every = own or (not selected and len(names) == len(self.variants))
            among = "" if every else f" (in {dotted(phase)}.{listed(names)})"
            told.append(f"{self.file}, line {self._lines.of(whole)}: {dotted(whole)}{among}: {text}")
        return told + [f"{self.file}: {dotted(phase)}.{', '.join(names)}: {text}" for text, names in elsewhere.items()]

    def _written(self, place: tuple, patches: list[tuple]) -> tuple | None:
        """Where the text has a setting: in the first of the patches that has it, or in the base."""
        for one in [place, _inherited_from(place)]:
            for patch in [*patches, ()] if one else ():
                if self._lines.has((*patch, *one)):
                    return (*patch, *one)
        return None

    @cached_property
    def _lines(self) -> study_file.Lines:
        return study_file.find_lines(self.text)


def load(path: Path = Path("params.yaml")) -> Params:
    """Read, merge and validate a study.

    Raises:
        LabError: with one line of place, expectation and finding for every mistake in the file.
    """
    raw, text = read(path)
    return validate(raw, str(path), text)


def read(path: Path) -> tuple[Any, str]:
    """A study's file parsed but not checked, and its text.

    Raises:
        LabError: when it is missing, or no YAML.
    """
    try:
        if path.exists() and not path.is_file():
            raise LabError(f"{path}: Expected the parameters of a study. Found: no file.")
        if path.stat().st_size > 4 * study_file.MOST_BYTES:
            raise LabError(f"{path}: Expected the parameters of a study. Found: {path.stat().st_size:,} bytes.")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise LabError(
            f"{path}: Expected the parameters of a study. Found: no such file. "
            "Go to the folder that holds dvc.yaml, or make one current with `ablab use STUDY`."
        ) from None
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError, as is what isn't UTF-8
        raise LabError(f"{path}: Expected a text file in UTF-8. Found: {error}.") from None
    return study_file.parse(text, str(path)), text


def validate(raw: Any, file: str = "params.yaml", text: str = "") -> Params:
    """Check a study that is already parsed; `text` is its source, for line numbers in messages."""
    problems = _Problems(file, text)
    if not isinstance(raw, dict):
        problems.add((), "a mapping with the keys study, data, model, seeds, variants", raw)
        problems.raise_if_any()
    whole = problems.check(File, raw, ())
    _check_names(raw, problems)
    base = {name: raw.get(name, {}) for name in PATCHED}
    if all(isinstance(section, dict) for section in base.values()):
        _sections(base, problems, lambda loc: loc)
    if whole and isinstance(whole.data.split.test, float) and whole.data.split.validation + whole.data.split.test >= 1:
        expected = "validation + test below 1, so that something is left to train with"
        problems.add(("data", "split"), expected, raw["data"]["split"])
    if whole and whole.data.path is not None and whole.data.dataset != "image_folder":
        expected = f"null, as {whole.data.dataset} does not come from a path (image_folder does)"
        problems.add(("data", "path"), expected, whole.data.path)
    if whole and whole.data.pictures and whole.data.dataset != "image_folder":
        expected = "nothing, since only an image_folder can hold others than are expected"
        problems.add(("data", "pictures"), expected, whole.data.pictures)
    _check_plain(raw, (), problems)
    problems.raise_if_any()  # variants are checked once the base is right: its mistakes are theirs too
    assert whole is not None

    variants, second = {}, {}
    for name, written in raw["variants"].items():
        variant = _variant(name, written, base, ("variants", name), raw, problems)
        if variant:
            variants[name] = variant
    problems.raise_if_any()  # nor is the second phase checked before the first is right
    candidates = _candidates(whole, problems)
    if len(candidates) * len(whole.finetune.variants) > MOST_PLANS:
        expected = f"at most {MOST_PLANS:,} plans, a variant of it for each one that may be selected"
        found = len(candidates) * len(whole.finetune.variants)
        problems.add(("finetune", "variants"), expected, found)
        problems.raise_if_any()
    for name in candidates:
        selected = {key: merge_patch(base[key], (raw["variants"][name] or {}).get(key, {})) for key in PATCHED}
        second[name] = {
            one: variant
            for one, written in whole.finetune.variants.items()
            if (variant := _variant(one, written, selected, ("finetune", "variants", one), raw, problems, name))
        }
    if len(set(raw["seeds"])) < len(raw["seeds"]):
        problems.add(("seeds",), "each seed once", raw["seeds"])
    cells = len(whole.seeds) * max(len(variants), len(whole.finetune.variants))
    if cells > MOST_CELLS:
        problems.add(("seeds",), f"at most {MOST_CELLS:,} cells of a phase, a variant with a seed each", cells)
    problems.raise_if_any()
    return Params(whole.study, whole.data, whole.seeds, variants, second, file, text)


def _candidates(whole: File, problems: "_Problems") -> list[str]:
    """The variants that may go on into the second phase; none where there is no second phase."""
    known = list(whole.variants)
    among = known if whole.finetune.select.among == "all" else whole.finetune.select.among
    for name in among:
        if name not in known:
            problems.add(("finetune", "select", "among"), f"some of the variants: {listed(known)}", name, known)
    if not among:
        problems.add(("finetune", "select", "among"), "one variant at least", [])
    return [name for name in among if name in known] if whole.finetune.variants else []


def merge_patch(target: Any, patch: Any) -> Any:
    """Apply a JSON Merge Patch (RFC 7396); keys keep their place, new ones go to the end."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def differences(baseline: Variant, variant: Variant) -> list[dict[str, Any]]:
    """The settings in which two variants differ, as `{"path", "baseline", "variant"}` in the user's terms.

    A component that only one of them has is one difference; null stands for the one without.
    """
    left, right = baseline.settings(), variant.settings()
    found = []
    for one in _differences(left, right, ()):
        for side, settings in (("baseline", left), ("variant", right)):
            if one[side] is None:
                one[side] = _inherited(settings, one["path"])
        if one["baseline"] != one["variant"]:
            found.append(one)
    return found


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces that depend on anything, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def digest(text: str) -> str:
    """The sha256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _with_defaults(name: str, layer: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name} | {key: shared.get(key) if value is None else value for key, value in layer.items()}


def _differences(left: Any, right: Any, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            yield from _differences(left.get(key), right.get(key), (*path, str(key)))
        shared = [key for key in left if key in right]
        if path[-1:] in (("blocks",), ("head",), ("stages",)) and shared != [key for key in right if key in left]:
            yield {"path": ".".join((*path, "order")), "baseline": list(left), "variant": list(right)}
    elif left != right:
        yield {"path": ".".join(path), "baseline": left, "variant": right}


def _inherited(settings: dict[str, Any], path: str) -> Any:
    """What a layer takes from `model` where it sets nothing itself."""
    place = _inherited_from(tuple(path.split(".")))
    return settings["model"].get(place[-1]) if place else None


def _inherited_from(place: tuple) -> tuple:
    """The place below `model` that a layer takes a setting from where it sets none itself, or nothing."""
    match place:
        case ("model", "blocks", _, key):
            return "model", key
        case ("model", "head", _, key):
            return "model", f"head_{key}" if key in ("dropout", "units") else key
    return ()


def _variant(
    name: str, written: Any, base: dict, here: tuple, raw: dict, problems: "_Problems", selected: str | None = None
) -> Variant | None:
    """A variant of `base`; one of the second phase is compared with the `selected` one that it starts from."""
    patch = problems.check(Patch, {} if written is None else written, here)
    if patch is None:
        return None
    changes = {key: getattr(patch, key) for key in PATCHED}
    if (selected or name != raw["study"]["baseline"]) and not any(changes.values()):
        kept = "" if selected else " (only the baseline changes nothing)"
        problems.add(here, f"a change of input, model or train{kept}", written)
        return None
    others = [*raw["variants"], *(raw["finetune"]["variants"] if selected else ())]
    if patch.compared_with is not None and (patch.compared_with not in others or patch.compared_with == name):
        others.remove(name)
        problems.add((*here, "compared_with"), f"another variant: {listed(others)}", patch.compared_with, others)
    for section in PATCHED:
        _check_removals(base[section], changes[section], (*here, section), problems)
    merged = {key: merge_patch(base[key], changes[key]) for key in PATCHED}

    sections = _sections(merged, problems, lambda loc: (*here, *loc))
    if sections is None:
        return None
    reported = {key: value for key, value in patch.reported.model_dump().items() if value is not None}
    return Variant(name, patch.note, reported, patch.compared_with or selected, *sections)


def _check_removals(base: Any, patch: Any, here: tuple, problems: "_Problems") -> None:
    # A null that removes nothing is a mistyped name: the baseline would train under the ablation's name.
    for key, value in patch.items():
        inside = base.get(key) if isinstance(base, dict) else None
        if value is None and inside is None:
            known = list(base) if isinstance(base, dict) else []
            problems.add((*here, key), f"something to remove: {listed(known) or 'nothing'}", key, known)
        elif isinstance(value, dict):
            _check_removals(inside, value, (*here, key), problems)


def _sections(merged: dict, problems: "_Problems", place) -> tuple[Input, Network | Custom, Train] | None:
    name = merged["model"].get("builder") if isinstance(merged["model"], dict) else None
    builder: type[Section] | None = BUILDERS.get(name) if isinstance(name, str) else None
    if isinstance(name, str) and FUNCTION.fullmatch(name):
        builder = Custom
    if builder is None:
        expected = f"one of {', '.join(BUILDERS)}, or a network of your own as networks.example:build"
        problems.add(place(("model", "builder")), expected, name, list(BUILDERS))
        return None
    fed = merged["input"]
    if builder is Transfer and isinstance(fed, dict):
        fed = {"rescale": "backbone"} | fed
    checked_input = problems.check(Input, fed, ("input",), place)
    if checked_input is not None and checked_input.rescale == "backbone" and builder is not Transfer:
        problems.add(place(("input", "rescale")), "unit, symmetric or none, as there is no backbone", "backbone")
    network = problems.check(builder, _without_nulls(merged["model"]), ("model",), place)
    train = problems.check(Train, merged["train"], ("train",), place)
    if isinstance(network, Cnn):
        for key, block in network.blocks.items():
            kind = block.convolution or network.convolution
            if kind != "depthwise" and not (block.filters or network.filters):
                problems.add(place(("model", "blocks", key, "filters")), "the number of filters", None)
    if isinstance(network, Network):
        for key, layer in network.head.items():
            if not (layer.units or network.head_units):
                problems.add(place(("model", "head", key, "units")), "the number of units", None)
    if train is not None and train.reduce_lr and isinstance(train.optimizer.learning_rate, Schedule):
        expected = "no reduce_lr beside a schedule of the learning rate, or a learning rate that is a number"
        problems.add(place(("train", "reduce_lr")), expected, train.reduce_lr.model_dump())
    if train is not None and train.reduce_lr and not isinstance(train.optimizer.learning_rate, Schedule):
        rate = train.optimizer.learning_rate
        if train.reduce_lr.min_lr >= rate:
            expected = f"a value less than the learning rate, {rate}, which could not be reduced else"
            problems.add(place(("train", "reduce_lr", "min_lr")), expected, train.reduce_lr.min_lr)
    if train is not None:
        _check_devices(train, place, problems)
    if getattr(network, "any_size", False) and getattr(network, "head_from", "") == "flatten":
        problems.add(place(("model", "head_from")), "global_average or global_max, as any_size is set", "flatten")
    if isinstance(network, Transfer) and isinstance(network.trainable, Extent):
        given = network.trainable.model_dump(exclude_none=True)
        if len(given) != 1:
            problems.add(
                place(("model", "trainable")), "one of last and from_layer (null drops an inherited one)", given
            )
    if train is not None and getattr(network, "output", "") == "sigmoid" and "categorical" in train.loss.lower():
        expected = "a loss of one probability, such as binary_crossentropy, as model.output is sigmoid"
        problems.add(place(("train", "loss")), expected, train.loss)
    layers = 0
    for part in ("blocks", "head", "stages") if isinstance(network, Network) else ():
        for key, layer in getattr(network, part, {}).items():
            layers += _repeats(network, layer)
            if not SLUG.fullmatch(str(key)):
                expected = "a layer's name of letters, digits, - and _, a letter first"
                problems.add(place(("model", part, key)), expected, key)
    if layers > MOST_LAYERS:
        problems.add(place(("model",)), f"a network of at most {MOST_LAYERS:,} layers with weights", layers)
    if checked_input is None or network is None or train is None:
        return None
    _check_sizes(checked_input.augment, ("input", "augment"), place, problems)
    return checked_input, network, train


def _check_devices(train: Train, place, problems: "_Problems") -> None:
    # What means nothing for the strategy is a mistake: somebody would think that it had been done.
    settings = train.optimizer.model_dump()
    if train.precision == "mixed_float16" and settings.get("loss_scale_factor"):
        expected = "none, as mixed_float16 finds the loss's scale itself"
        problems.add(place(("train", "optimizer", "loss_scale_factor")), expected, settings["loss_scale_factor"])
    if train.strategy == "single":
        if train.replicas is not None:
            expected = "none, as train.strategy is single (a variant drops an inherited one with null)"
            problems.add(place(("train", "replicas")), expected, train.replicas)
        return
    replicas = train.resolved()["replicas"]
    if train.batch_size % replicas:
        expected = f"a multiple of {replicas}, the number of train.replicas, as they share each batch"
        problems.add(place(("train", "batch_size")), expected, train.batch_size)
    for name in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
        if settings.get(name):
            expected = "none, as train.strategy is mirrored, for which TensorFlow has no such steps"
            problems.add(place(("train", "optimizer", name)), expected, settings[name])
    if train.xla is True:
        problems.add(place(("train", "xla")), "auto or false, as train.strategy is mirrored", train.xla)
    if train.data_on == "device":
        problems.add(place(("train", "data_on")), "auto or host, as train.strategy is mirrored", train.data_on)


def _repeats(network: Network | Custom | None, layer: Any) -> int:
    """How many layers with weights a component stands for."""
    if isinstance(network, Cnn) and isinstance(layer, BlockSettings):
        return layer.convolutions or network.convolutions
    return 2 * layer.blocks if isinstance(layer, Stage) else 1


def _check_sizes(value: Any, here: tuple, place, problems: "_Problems") -> None:
    # An argument of an augmentation is a share, a brightness, or a number of pixels.
    if isinstance(value, dict):
        for key, inside in value.items():
            if key != "seed":
                _check_sizes(inside, (*here, key), place, problems)
    elif isinstance(value, list):
        for number, inside in enumerate(value):
            _check_sizes(inside, (*here, number), place, problems)
    elif isinstance(value, int | float) and abs(value) > LONGEST_SIDE:
        problems.add(place(here), f"a number of at most {LONGEST_SIDE}", value)


def _check_plain(value: Any, here: tuple, problems: "_Problems") -> None:
    """Whether a value can be written down as JSON and come back: what YAML knows beyond that is no setting, and
    nobody's numbers are without end."""
    if here in problems.places:
        return
    match value:
        case None | bool():
            return
        case str() if len(value) > LONGEST_TEXT:
            problems.add(here, f"a text of at most {LONGEST_TEXT:,} characters", f"{len(value):,} of them")
        case str() if unfit := _control_characters(value):
            problems.add(here, "a text without control characters", unfit[0])
        case int() if abs(value) >= LARGEST_NUMBER:
            problems.add(here, "a whole number of at most 64 bits", value)
        case float() if not math.isfinite(value):
            problems.add(here, "a finite number", value)
        case str() | int() | float():
            return
        case dict():
            for key, inside in value.items():
                if isinstance(key, str):
                    _check_plain(key, (*here, key), problems)
                else:
                    problems.add((*here, key), "a text as the name, in quotes", key)
                _check_plain(inside, (*here, key), problems)
        case list():
            for number, inside in enumerate(value):
                _check_plain(inside, (*here, number), problems)
        case _:
            expected = "a text (a date in quotes), a number, true, false, null, a list or a mapping"
            problems.add(here, expected, value)


def _control_characters(text: str) -> list[str]:
    """What would move a terminal's cursor, or can't be written as UTF-8; line ends and tabs may stand in a text."""
    return [one for one in text if unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t"]


def _without_nulls(value: Any) -> Any:
    """A base may say `dropout: null` for 'not set'; RFC 7396 has no such value."""
    if isinstance(value, dict):
        return {key: _without_nulls(inside) for key, inside in value.items() if inside is not None}
    return value


def _check_names(raw: dict, problems: "_Problems") -> None:
    variants = raw.get("variants")
    if not isinstance(variants, dict):
        return
    finetune = raw.get("finetune")
    second = finetune.get("variants") if isinstance(finetune, dict) else None
    places: list[tuple] = [("variants", name) for name in variants]
    places += [("finetune", "variants", name) for name in second] if isinstance(second, dict) else []
    seen: dict[str, str] = {}
    for place in places:
        name = place[-1]
        if not isinstance(name, str) or not SLUG.fullmatch(name) or name.lower() in MISREAD:
            expected = (
                "a variant's name of letters, digits, - and _, a letter first, that YAML does not take for a value"
            )
            problems.add(place, expected, name)
        elif name.lower() in seen:
            same = "names that differ in more than case" if seen[name.lower()] != name else "names that occur once"
            problems.add(place, f"{same} (there is {seen[name.lower()]})", name)
        else:
            seen[name.lower()] = name
    baseline = raw["study"].get("baseline") if isinstance(raw.get("study"), dict) else None
    if isinstance(baseline, str) and baseline not in variants:
        problems.add(("study", "baseline"), f"one of the variants: {listed(variants)}", baseline, list(variants))


class _Problems:
    """Collects mistakes with their place, so that a user sees all of them at once."""

    def __init__(self, file: str, text: str):
        self.file, self.text = file, text
        self.lines: dict[str, None] = {}
        self.places: set[tuple] = set()

    def add(self, loc: tuple, expected: str, found: Any, valid: list | None = None, truth: bool = False) -> None:
        known = {str(one).lower(): one for one in valid or []}
        near = difflib.get_close_matches(str(found)[:100].lower(), known, n=1, cutoff=0.5)
        meant = known[near[0]] if near else found
        hint = f" Did you mean {dotted((meant,))}?" if meant != found else truth_hint(found) if truth else ""
        where = f"{self.file}{self._line(loc)}: {dotted(loc)}"
        self.places.add(loc)
        self.lines[f"{where}: Expected {expected}. Found: {shown(found)}.{hint}"] = None

    def check(self, kind: type[Section], value: Any, here: tuple, place=lambda loc: loc):
        """The section, or None with its mistakes noted. `place` maps a place in the merged settings to the file's."""
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            alternatives: dict[tuple, list[ErrorDetails]] = {}
            for detail in error.errors(include_url=False):
                loc = _in_file(detail["loc"], value, detail["type"] == "missing")
                alternatives.setdefault(loc, []).append(detail)
            for loc, details in alternatives.items():
                self._add_details(kind, loc, details, place((*here, *loc)))
            return None

    def _add_details(self, kind: type[Section], loc: tuple, details: list[ErrorDetails], where: tuple) -> None:
        if details[0]["type"] == "extra_forbidden":
            valid = list(_section_at(kind, loc[:-1]).model_fields)
            inherited = " (a variant drops an inherited key with null)" if where[0] == "variants" else ""
            self.add(where, f"one of the keys {', '.join(valid)}{inherited}", loc[-1], valid)
        elif details[0]["type"] == "missing":
            self.add(where, "a value", None)
        else:
            messages = [_expectation(detail["msg"]) for detail in details]
            options = re.findall(r"'([^']+)'", " ".join(messages))
            truth = any(detail["type"] == "bool_type" for detail in details)
            self.add(where, " or ".join(dict.fromkeys(messages)), details[0]["input"], options, truth)

    def raise_if_any(self) -> None:
        if self.lines:
            told = list(self.lines)[:MOST_MISTAKES]
            more = len(self.lines) - len(told)
            raise LabError("\n       ".join(told + ([f"{self.file}: and {more:,} more like these"] if more else [])))

    def _line(self, loc: tuple) -> str:
        line = self._places.of(loc)
        return "" if line is None else f", line {line}"

    @cached_property
    def _places(self) -> study_file.Lines:
        return study_file.find_lines(self.text)


def _expectation(message: str) -> str:
    message = re.sub(r"^Input should (be|have) (?=greater|less)", "a value ", message)
    message = re.sub(r"^Input should (be|have) ", "", message)
    message = re.sub(r"^(Dictionary|List) should have (at \w+ \d+ items?).*", r"\2", message)
    return re.sub(r"valid dictionary.*", "mapping of names to values", message)


def _in_file(loc: tuple, value: Any, missing: bool) -> tuple:
    """A place without what pydantic puts into it: the kinds of union members (`constrained-float`, `<word>`), `[key]`.

    Args:
        value: what was checked; all that the user wrote is in there.
        missing: whether the last part is a key that should be there.
    """
    kept = []
    for position, key in enumerate(loc):
        there = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if key in there:
            value = value[key]
        elif not (missing and position == len(loc) - 1):
            continue
        kept.append(key)
    return tuple(kept)


def _section_at(kind: type[Section], loc: tuple) -> type[Section]:
    """The section that is found at a place below another one."""
    for key in loc:
        field = kind.model_fields.get(str(key))
        if field is None:  # a named component: the mapping's own name has led to its section already
            continue
        inside = _section_in(field.annotation)
        if inside is None:
            break
        kind = inside
    return kind


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for one in get_args(annotation) if (found := _section_in(one))), None)
