"""The configuration of one run: a frozen dataclass, made from layers of settings, every problem told at once."""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import yaml

# A file with more than this is none of settings. Aliases of aliases make billions of values out of a few lines.
MOST_BYTES = 4 * 2**20
MOST_VALUES = 100_000

# Exit codes: of a bug, or of a check of `eva doctor` that failed; of a user's mistake; and as shells report a program
# that SIGINT ended.
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """A mistake of the user's: one line (or one a problem) that names the thing, its value and what would be right.

    The command line prints the message without a traceback and exits with code 2.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM came: as Ctrl-C, but the machine may be gone in seconds."""


class Failure(RuntimeError):
    """A bug, told in one line; the traceback lies where the line says. The command line exits with code 1."""


@contextlib.contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Adds the message of a `UserError` to `problems` instead of raising it, so that others can be told with it."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def unknown_name(kind: str, name: str, known: Iterable[str], shown: Iterable[str] = ()) -> str:
    """Returns one line saying that `name` is no known `kind`, with the nearest known name and all, or `shown`."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"unknown {kind} {name!r:.200}{hint}; known: {', '.join(shown or names)}"


def option(default: Any, help: str, *, unit: str = "") -> Any:
    """Returns a dataclass field with its help text and its unit.

    A type as the default is called for each instance: mutable defaults are not shared.
    """
    metadata = {"help": help, "unit": unit}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that one run depends on. Every field is a flag of the command line and a key of a YAML file.

    Rates and weights are per optimizer step; epochs count passes over the training images; accuracies are fractions.
    """

    __pydantic_config__: ClassVar[dict[str, bool]] = {"allow_inf_nan": False}

    recipe: str | None = option(None, "named recipe that the settings start from")

    # data
    data: str = option("cifar10", "cifar10, digits, or folder:PATH (PATH/train/CLASS/*, PATH/test/CLASS/*)")
    data_dir: str = option("data", "folder for downloads and for the cache of decoded images")
    val_fraction: float = option(
        0.1, "share of train held out for choosing; 0 trains on all of it and watches test", unit="fraction"
    )
    train_limit: int | None = option(None, "train on so many images, a fixed stratified subset", unit="images")
    policy: str = option("crop_flip_cutout", "augmentation policy by name, or an Albumentations YAML/JSON file")
    policy_options: dict[str, int | float] = option(dict, "options of the policy, e.g. policy_options.cutout=16")
    augmentation: Literal["auto", "batched", "albumentations"] = option(
        "auto",
        "batched: as tensor operations on the device; albumentations: by image; auto: batched if all of it can be",
    )
    workers: int | None = option(
        None,
        "data loading processes, not used where augmentation is batched; default: 0 on a CPU, up to 8 beside a GPU",
        unit="processes",
    )

    # model
    model: str = option("resnet18", "resnet18, resnet9, speednet, or torchvision/NAME")
    init: Literal["default", "identity", "whitened"] = option(
        "default", "first weights; identity: filters that pass maps on; whitened: the same, and a frozen first layer"
    )
    norm: Literal["batch", "ghost", "group", "layer", "instance", "none"] = option("batch", "normalization layers")
    sync_batchnorm: bool = option(False, "in several processes: batch norm by the whole batch, not by each one's share")
    ghost_splits: int = option(4, "slices of the batch that ghost norm takes its statistics over", unit="slices")
    norm_groups: int = option(32, "channel groups of group norm", unit="groups")
    dropout: float = option(0.0, "dropout probability", unit="probability")
    stage_strides: tuple[int, ...] = option((1, 2, 2, 2), "strides of the four stages of resnet18")

    # optimizer and loss
    optimizer: Literal["sgd", "adamw", "muon"] = option("sgd", "optimizer; muon: for filters, SGD for all else")
    linear_lr: float | None = option(None, "Muon: highest learning rate of linear layers; default: lr_max")
    bias_lr: float | None = option(None, "Muon: highest learning rate of norms and biases; default: lr_max")
    sgd_momentum: float = option(0.85, "Muon: momentum of linear layers, norms and biases")
    first_bias_epochs: float = option(3.0, "Muon: when the bias of a frozen first layer is frozen too", unit="epochs")
    momentum: float = option(0.9, "SGD's momentum; AdamW's beta 1")
    momentum_min: float | None = option(None, "momentum at lr_max, for schedules that cycle it; default: no cycling")
    nesterov: bool = option(True, "Nesterov momentum (SGD)")
    weight_decay: float = option(5e-4, "L2 penalty (SGD) or decoupled decay (AdamW)")
    l1: float = option(0.0, "L1 penalty on the sum of absolute weights")
    decay_norm_and_bias: bool = option(True, "whether L1 and L2 act on norms and biases too")
    label_smoothing: float = option(0.0, "label smoothing", unit="probability")
    grad_clip: float | None = option(None, "largest norm of the whole gradient")
    ema_decay: float | None = option(None, "decay of the weights' moving average, which is then evaluated")

    # schedule
    schedule: Literal["onecycle", "cosine_onecycle", "cosine", "constant", "step", "plateau", "triangular"] = option(
        "onecycle", "learning rate over the steps"
    )
    lr_min: float | Literal["find"] = option(0.01, "lowest learning rate, or find: by the range test")
    lr_max: float | Literal["find"] = option(0.1, "highest learning rate, or find: by the range test")
    peak_epoch: float = option(5.0, "when one cycle reaches lr_max", unit="epochs")
    lr_factor: float = option(0.1, "what step and plateau multiply the rate by")
    lr_steps: tuple[float, ...] = option((), "when step drops the rate", unit="epochs")
    patience: int = option(5, "epochs without a better loss before plateau drops the rate", unit="epochs")
    cycle_epochs: float = option(2.0, "half a cycle of triangular", unit="epochs")

    # length
    epochs: int = option(20, "passes over the training images", unit="epochs")
    batch_size: int = option(128, "images in a training batch", unit="images")
    max_steps: int | None = option(None, "stop after so many steps, whatever epochs says", unit="steps")

    # range test
    find_lr_start: float = option(1e-4, "first learning rate of the range test")
    find_lr_end: float = option(10.0, "last learning rate of the range test")
    find_lr_steps: int = option(100, "steps of the range test", unit="steps")

    # evaluation
    evaluate: bool = option(True, "evaluate the best weights at the end: predictions, galleries, tables")
    split: Literal["test", "val", "train"] = option("test", "split that is evaluated at the end")
    tta: Literal["none", "flip", "flip_shift"] = option(
        "none", "test-time augmentation: mean logits of image and mirror image, and of those moved by a pixel"
    )
    gallery_size: int = option(25, "images in a gallery", unit="images")
    gradcam_layers: tuple[str, ...] = option((), "layers of Grad-CAM, the last for galleries; default: the last four")
    table_rows: int = option(500, "rows of W&B's table of misclassified images, the highest losses", unit="rows")

    # hardware
    device: str = option("auto", "auto, cpu, cuda, or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: the fastest that this hardware is good at"
    )
    channels_last: bool | None = option(None, "memory format of images and weights; default: where the hardware gains")
    compile: bool = option(False, "compile the model with torch.compile")
    seed: int = option(0, "seed of weights, order, augmentation and dropout")
    deterministic: bool = option(False, "only deterministic kernels; slower on a GPU")

    # output and tracking
    out: str | None = option(None, "run folder; default: runs/RUN_ID")
    save_steps: int | None = option(None, "save the state every so many steps, beside every epoch's end", unit="steps")
    tracking: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "W&B mode; auto: online with an account, else offline"
    )
    tracking_timeout: float = option(30.0, "longest wait for W&B at a run's beginning, and at its end", unit="seconds")
    wandb_dir: str | None = option(
        None, "folder of W&B's own: its runs, staging, cache, artifacts; default: the run folder"
    )
    project: str | None = option(None, "W&B project; default: WANDB_PROJECT, or eva")
    entity: str | None = option(None, "W&B entity (user or team)")
    group: str | None = option(None, "W&B group")
    name: str | None = option(None, "W&B display name")
    tags: tuple[str, ...] = option((), "W&B tags")


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(RunConfig)}
TYPES: dict[str, Any] = get_type_hints(RunConfig)

# What may be asked of an evaluation: nothing that changes which network the weights belong to.
EVALUATION_SETTINGS = (
    *("data", "data_dir", "split", "tta", "gallery_size", "gradcam_layers", "table_rows"),
    *("device", "precision", "channels_last", "workers"),
    *("out", "tracking", "tracking_timeout", "wandb_dir", "project", "entity", "group", "name", "tags"),
)

# Settings that only some trainings read: the setting that decides, and its values with which they do.
READ_ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "sync_batchnorm": ("norm", ("batch",)),
    "ghost_splits": ("norm", ("ghost",)),
    "norm_groups": ("norm", ("group",)),
    "nesterov": ("optimizer", ("sgd",)),
    "linear_lr": ("optimizer", ("muon",)),
    "bias_lr": ("optimizer", ("muon",)),
    "sgd_momentum": ("optimizer", ("muon",)),
    "first_bias_epochs": ("optimizer", ("muon",)),
    "momentum_min": ("schedule", ("onecycle", "cosine_onecycle", "triangular")),
    "lr_min": ("schedule", ("onecycle", "cosine_onecycle", "cosine", "plateau", "triangular")),
    "peak_epoch": ("schedule", ("onecycle", "cosine_onecycle")),
    "lr_factor": ("schedule", ("step", "plateau")),
    "lr_steps": ("schedule", ("step",)),
    "patience": ("schedule", ("plateau",)),
    "cycle_epochs": ("schedule", ("triangular",)),
}


@dataclass(frozen=True)
class Layer:
    """Settings from one place: `source` names it ("recipe x", "file y.yaml", "command line")."""

    source: str
    values: Mapping[str, Any]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Returns the default of a `RunConfig` field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def merge(layers: Iterable[Layer]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Lays settings over each other, later wins; mappings are merged key by key, dotted keys set one key.

    Returns:
        The raw values by field, the source of each, and the problems (unknown keys), a line each.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for layer in layers:
        for key, value in layer.values.items():
            name, _, inner = str(key).partition(".")
            if name not in FIELDS or (inner and get_origin(TYPES[name]) is not dict):
                problems.append(f"{layer.source}: {unknown_setting(str(key))}")
                continue
            value = {inner: value} if inner else _structure(value, TYPES[name])
            if isinstance(value, Mapping) and isinstance(values.get(name), Mapping):
                value = {**values[name], **value}
            values[name] = value
            sources[name] = layer.source
    return values, sources, problems


# Flags of the command line that are no settings: one that is misspelt arrives as an unknown setting.
COMMAND_FLAGS = ("config", "list", "resume", "show_policy", "show_schedule")


def unknown_setting(key: str) -> str:
    """Returns one line that names an unknown setting and the nearest known one."""
    name = key.partition(".")[0].replace("-", "_")
    nearest = difflib.get_close_matches(name, (*FIELDS, *COMMAND_FLAGS), n=1, cutoff=0.6)
    if name in COMMAND_FLAGS:
        return f"this command has no flag --{name}"
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "; eva train --help lists the settings"
    return f"unknown setting {key!r:.200}{hint}"


def _structure(value: Any, hint: Any) -> Any:
    """Reads text that stands for nothing, a list or a mapping; other text is left to the field's own type.

    A W&B agent passes `None`, `[1, 2]` and `{'a': 1}` as Python writes them, which YAML's flow style reads too.
    """
    if not isinstance(value, str):
        return value
    if stands_for_none(value) and type(None) in get_args(hint):
        return None
    if get_origin(hint) not in (tuple, dict):
        return value
    if get_origin(hint) is tuple and not value.startswith("["):
        return [part.strip() for part in value.split(",")] if value else []
    try:
        # Words and numbers inside stay text, for the type of the list or mapping to judge: YAML takes 1e-5 for a word.
        return load_yaml(value, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return value


def stands_for_none(value: Any) -> bool:
    """Tells whether a raw value means nothing: None, or how Python and YAML write it."""
    return value is None or (isinstance(value, str) and value in ("None", "none", "null"))


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter  # here, so that `eva --help` needs no pydantic

    return TypeAdapter(RunConfig)


def resolve(layers: Iterable[Layer]) -> tuple[RunConfig, dict[str, str]]:
    """Makes a checked `RunConfig` of layers of settings.

    Args:
        layers: In rising order of precedence. Values may be text as a command line gives it.

    Returns:
        The configuration, and the source of each setting that some layer gave.

    Raises:
        UserError: All problems at once, a line each: unknown settings, wrong types, impossible values.
    """
    config, sources, wrong, problems = _typed(layers)
    # Impossible values are looked for among the well-typed ones, so that all problems are told at once.
    problems.extend(value_problems(config, wrong))
    if problems:
        raise UserError("\n".join(problems))
    return config, sources


def typed(layer: Layer) -> RunConfig:
    """Returns settings with their types, on top of the defaults, whether or not they make sense with these.

    Raises:
        UserError: All problems at once, a line each: unknown settings, wrong types.
    """
    config, _, _, problems = _typed([layer])
    if problems:
        raise UserError("\n".join(problems))
    return config


def _typed(layers: Iterable[Layer]) -> tuple[RunConfig, dict[str, str], set[str], list[str]]:
    """Returns the configuration of what is well-typed, the sources, the names of what is not, and what to say of it."""
    values, sources, problems = merge(layers)
    wrong = _ill_typed(values)
    for name in sorted(wrong):
        problems.append(f"{sources[name]}: {name} must be {describe_type(name)}, but got {values[name]!r:.200}")
    config: RunConfig = _adapter().validate_python({name: values[name] for name in values if name not in wrong})
    return config, sources, wrong, problems


def _ill_typed(values: Mapping[str, Any]) -> set[str]:
    """Returns the names of the raw values that their field's type does not take."""
    from pydantic import ValidationError

    # pydantic takes true for the number 1, YAML's binaries for text, and its sets, which have no order, for lists.
    wrong = {
        name
        for name, value in values.items()
        if isinstance(value, bool) and bool not in (TYPES[name], *get_args(TYPES[name]))
    }
    wrong |= {name for name, value in values.items() if any(isinstance(part, (bytes, set)) for part in _parts(value))}
    try:
        _adapter().validate_python(values)
    except ValidationError as error:
        wrong |= {str(line["loc"][0]) for line in error.errors()}
    return wrong


def _parts(value: Any) -> Iterable[Any]:
    """Returns a value, and those in it if it is a list or a mapping."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [value, *inner]


def describe_type(name: str) -> str:
    """Returns the type of a setting in words, e.g. "a number or find", "one of: sgd, adamw"."""
    return _words(TYPES[name])


def _words(hint: Any) -> str:
    plain = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "none",
    }
    if hint in plain:
        return plain[hint]
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return arguments[0] if len(arguments) == 1 else "one of: " + ", ".join(arguments)
    if get_origin(hint) is tuple:
        return f"a list, each {_words(arguments[0])}"
    if get_origin(hint) is dict:
        return f"a mapping, each value {_words(arguments[1])}"
    return " or ".join(_words(argument) for argument in arguments)


def value_problems(config: RunConfig, unknown: Container[str] = ()) -> list[str]:
    """Returns what is impossible about a well-typed configuration, a line each; an empty list if nothing is.

    Names of recipes, policies and models are checked where they are looked up. Rules about a setting in `unknown`,
    whose value in `config` is not the user's, are left out.
    """
    problems = []

    def need(holds: bool, rule: str, *names: str) -> None:
        if not holds and not any(name in unknown for name in names):
            got = ", ".join(f"{name}={getattr(config, name)!r:.200}" for name in names)
            problems.append(f"{rule}, but got {got}")

    for name in FIELDS:
        value = getattr(config, name)
        texts = [text for text in (value if isinstance(value, tuple) else [value]) if isinstance(text, str)]
        # Control characters break lines and paths; bytes that are no UTF-8 arrive as lone surrogates (Cs).
        broken = {"Cc", "Cs"} & set(map(unicodedata.category, "".join(texts)))
        need(not broken, f"{name} must hold no control characters and be UTF-8", name)
        if name != "seed" and isinstance(value, int):  # larger ones are no floats, nor what C takes for a count
            need(abs(value) < 2**31, f"{name} must be below 2**31", name)
    for name in ("epochs", "batch_size", "ghost_splits", "norm_groups", "patience"):
        need(getattr(config, name) >= 1, f"{name} must be at least 1", name)
    need(config.find_lr_steps >= 5, "find_lr_steps must be at least 5", "find_lr_steps")
    need(0 <= config.gallery_size <= 400, "gallery_size must be in [0, 400]", "gallery_size")
    # W&B takes no more rows in a logged table.
    need(0 <= config.table_rows <= 10_000, "table_rows must be in [0, 10000]", "table_rows")
    need(config.split != "val" or config.val_fraction > 0, "split=val needs a val_fraction above 0", "val_fraction")
    for name in ("max_steps", "train_limit", "save_steps"):
        value = getattr(config, name)
        need(value is None or value >= 1, f"{name} must be at least 1 or none", name)
    for name in ("weight_decay", "l1"):
        need(getattr(config, name) >= 0, f"{name} must not be negative", name)
    for name in ("linear_lr", "bias_lr"):
        value = getattr(config, name)
        need(value is None or value > 0, f"{name} must be above 0 or none", name)
    need(config.first_bias_epochs > 0, "first_bias_epochs must be above 0", "first_bias_epochs")
    for name in ("dropout", "label_smoothing", "momentum", "sgd_momentum", "val_fraction"):
        need(0 <= getattr(config, name) < 1, f"{name} must be in [0, 1)", name)
    need(config.workers is None or config.workers >= 0, "workers must not be negative", "workers")
    need(0 <= config.seed < 2**63, "seed must be in [0, 2**63)", "seed")
    need(0 < config.lr_factor < 1, "lr_factor must be in (0, 1)", "lr_factor")
    need(config.grad_clip is None or config.grad_clip > 0, "grad_clip must be above 0 or none", "grad_clip")
    need(
        config.ema_decay is None or 0 < config.ema_decay < 1,
        "ema_decay must be in (0, 1) or none",
        "ema_decay",
    )
    low = config.momentum_min
    rule = "momentum_min must be in [0, momentum] or none"
    need(low is None or 0 <= low <= config.momentum, rule, "momentum_min", "momentum")
    need(config.cycle_epochs > 0, "cycle_epochs must be above 0", "cycle_epochs")
    need(config.tracking_timeout > 0, "tracking_timeout must be above 0", "tracking_timeout")
    lr_min, lr_max = config.lr_min, config.lr_max
    need(lr_min == "find" or lr_min >= 0, "lr_min must not be negative", "lr_min")
    need(lr_max == "find" or lr_max > 0, "lr_max must be above 0", "lr_max")
    if lr_min != "find" and lr_max != "find":
        need(lr_min <= lr_max, "lr_min must not be above lr_max", "lr_min", "lr_max")
    if config.schedule in ("onecycle", "cosine_onecycle"):
        rule = "peak_epoch must be in [0, epochs)"
        need(0 <= config.peak_epoch < config.epochs, rule, "peak_epoch", "epochs")
    if config.schedule == "step":
        need(len(config.lr_steps) > 0, "schedule=step needs lr_steps, e.g. lr_steps=[10,15]", "lr_steps")
    need(
        list(config.lr_steps) == sorted(config.lr_steps) and all(epoch > 0 for epoch in config.lr_steps),
        "lr_steps must be above 0 and rise",
        "lr_steps",
    )
    need(
        0 < config.find_lr_start < config.find_lr_end,
        "find_lr_start must be above 0 and below find_lr_end",
        "find_lr_start",
        "find_lr_end",
    )
    need(
        len(config.stage_strides) == 4 and all(stride in (1, 2) for stride in config.stage_strides),
        "stage_strides must be four strides of 1 or 2",
        "stage_strides",
    )
    # W&B refuses others, but only once the data are loaded.
    need(
        config.project is None or (len(config.project) <= 128 and not set(config.project) & set("/\\#?%:")),
        "project must have at most 128 characters, and none of / \\ # ? % :",
        "project",
    )
    need(all(1 <= len(tag) <= 64 for tag in config.tags), "tags must have 1 to 64 characters each", "tags")
    return problems


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as plain values (tuples as lists) that YAML and JSON can hold."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader]) -> Any:
    """Returns what a YAML text holds.

    Raises:
        yaml.YAMLError: It is not YAML, an alias stands inside of what it is an alias of, or there are too many values.
        Exception: PyYAML lets through whatever int(), date() and its own slips raise, RecursionError among them.
    """
    loading = loader(text)
    try:
        root = loading.get_single_node()
        if root is None:
            return None
        check_size(root)
        return loading.construct_document(root)
    finally:
        loading.dispose()


def check_size(root: yaml.Node) -> None:
    """Checks that a YAML text does not hold too much, before values are made of its nodes.

    Raises:
        yaml.YAMLError: It holds more than `MOST_VALUES` values, aliases followed, or an alias goes in a circle.
    """
    sizes: dict[int, int] = {}  # values of each node, aliases followed, by its id; 0 while it is being looked at

    def visit(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                mark = node.start_mark
                raise yaml.MarkedYAMLError(
                    problem="an alias (*) stands inside of what it is an alias of", problem_mark=mark
                )
            return sizes[id(node)]
        sizes[id(node)] = 0
        inner: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            inner = itertools.chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        sizes[id(node)] = 1 + sum(map(visit, inner))
        return sizes[id(node)]

    if visit(root) > MOST_VALUES:
        problem = f"there must be at most {MOST_VALUES} values, aliases followed"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=root.start_mark)


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """Returns what a file of settings holds, line ends as they are in Python.

    Raises:
        UserError: It is larger than any such file.
        OSError: It cannot be read.
        ValueError: It is not text.
    """
    with open(path, "rb") as file:  # no matter what its size is said to be: a device has none, and no end either
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{str(path)!r} must have at most {MOST_BYTES:,} bytes, but has more")
    return io.StringIO(content.decode(encoding), newline=None).read()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping that a YAML file holds.

    Raises:
        UserError: The file is missing or unreadable, is not YAML, or holds something else than a mapping.
    """
    try:
        text = read_text(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = load_yaml(text, _Loader)
    except Exception as error:  # PyYAML lets through whatever int(), date() and its own slips raise
        raise UserError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} must hold a mapping of settings, but got {type(values).__name__}")
    return values
