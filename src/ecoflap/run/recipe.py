"""Defines the recipe: one validated object from options, Python or YAML, written back to YAML in full.

Over 350 lines, because options, help, YAML and documentation are all read from this one table of fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ecoflap.data.class_names import is_file_entry
from ecoflap.errors import EcoflapError, InvalidOption
from ecoflap.evaluation.registry import TASKS
from ecoflap.importance.registry import AUTO, IMPORTANCES, named, own_rule
from ecoflap.pruning.registry import BEFORE_ADMM, CRITERIA, DEFAULT, is_global, refuse_with_global, tokens_of
from ecoflap.run.evaluations import Evaluation
from ecoflap.run.trust import refuse_code
from ecoflap.statistics.choice import EXPERT_TOKENS, TokenChoice
from ecoflap.support.reading import read_yaml
from ecoflap.support.registry import unknown
from ecoflap.support.text import cut

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on; read by type checkers alone

    from ecoflap.search.method import Method

FILE_ONLY = ("evaluations", "pruned")  # fields without an option of ``prune``
_FLAGS = {"task_options": "--task-option"}  # options that are not named as their field
OPTIONS = "options"  # the source of a recipe that was given on the command line: messages name the flags


def flag_of(field: str) -> str:
    """The command line's name of a recipe's field."""
    return _FLAGS.get(field, "--" + field.replace("_", "-"))


_SHARES = (
    "sparsity", "max_sparsity", "min_sparsity", "granularity", "aggregate", "budget", "tower_sparsity", "rule",
    "spread",
)  # fmt: skip
_METHOD = (
    "importance", "importance_options", "importance_samples", "importance_error", "criterion", "criterion_options",
    "compare", "offload_activations", "allocation", "search", "search_options", "recover", "recover_options",
)  # fmt: skip
_DECIDE_ZEROS = (
    *_SHARES, "importance", "importance_options", "importance_error", "criterion", "criterion_options", "compare",
    "pattern", "allocation", "search", "search_options",
)  # fmt: skip


def idle_fields(recipe: Mapping[str, Any]) -> frozenset[str]:
    """Fields that had no effect: those of the criterion, if another model gave the zeros."""
    return frozenset(_DECIDE_ZEROS) - {"sparsity", "max_sparsity"} if recipe.get("pruned") else frozenset()


class Recipe(BaseModel):
    """All fields that decide the result of a run. The same recipe, model and versions give the same sparse model."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str | None = Field(None, description="Hub id, folder or GGUF file. Default: the embedded model.")
    sparsity: float = Field(0.5, ge=0.0, lt=1.0, description="Fraction of the prunable weights to set to zero.")
    max_sparsity: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="Highest sparsity of a group. Default: sparsity (or the tower's own) + 0.1; none for rules with a "
        "spread (linear).",
    )
    min_sparsity: float = Field(0.0, ge=0.0, le=1.0, description="Lowest sparsity of a group.")
    importance: str = Field(
        "auto",
        description="auto (gradient-norm where the model can be differentiated, else zeroth-order), "
        f"{', '.join(IMPORTANCES.own())}, or a file: the importance.json of a run.",
    )
    importance_options: dict[str, float | int | bool | str] = Field(
        default_factory=dict,
        description="Options of the importance: epsilon, draws, variant, multiple, scope, tail, levels.",
    )
    granularity: Literal["block", "expert", "layer", "tower"] = Field(
        "block", description="Layers that share one sparsity."
    )
    aggregate: Literal["sum", "mean", "layer-mean"] | None = Field(
        None,
        description="How the scores of a group's layers are combined. Default: the rule's own (proportional: sum).",
    )
    budget: Literal["global", "tower"] = Field(
        "global", description="'tower': each tower meets the sparsity by itself."
    )
    tower_sparsity: dict[str, float] = Field(
        default_factory=dict, description="Sparsity of single towers or modalities."
    )
    rule: str | None = Field(
        None,
        description="How scores become sparsities: proportional, linear, linear-relative, curves (importance "
        "sensitivity alone). Default: the importance's own.",
    )
    spread: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="How much sparsities may differ between groups. Default: the importance's own.",
    )
    search: bool | None = Field(
        None, description="Improve the allocation by measuring the pruned model. Default: with importance sensitivity."
    )
    search_options: dict[str, float | int | bool | str] = Field(
        default_factory=dict,
        description="Options of the search: by, granularity, metric, rounds, tolerance, samples, swaps.",
    )
    allocation: str | None = Field(None, description="An allocation.json to use instead of stage 1.")
    criterion: str = Field(
        DEFAULT,
        description=f"{', '.join(name for name in CRITERIA.own() if not is_global(name))}; over the whole model, "
        f"without importance: {', '.join(name for name in CRITERIA.own() if is_global(name))}.",
    )
    criterion_options: dict[str, float | int | bool | str] = Field(
        default_factory=dict,
        description="Options of the criterion: order (wanda, sparsegpt, admm); damping, slab (sparsegpt); damping, "
        "iterations, polish, targets, mask (admm); rounds.",
    )
    recover: bool = Field(
        False,
        description="Keep the criterion's zeros, and fit the other weights to the dense model's outputs.",
    )
    recover_options: dict[str, float | int | bool | str] = Field(
        default_factory=dict, description="Options of recover: steps, damping."
    )
    pruned: str | None = Field(
        None, description="A model that was pruned from this one, whose zeros are kept ('ecoflap recover')."
    )
    pattern: str = Field("unstructured", description="unstructured, or N:M such as 2:4 (N of M kept).")
    compare: Literal["row", "matrix"] | None = Field(
        None, description="Weights whose scores are compared. Default: the criterion's own (row for Wanda)."
    )
    tokens: str | None = Field(
        None,
        description="Tokens that count in the statistics of towers that read text and images: all, text, balanced, "
        "weighted, text+top, text+attended or atv. Default: balanced with admm, else all.",
    )
    top_tokens: float | None = Field(
        None,
        description="For weighted: weight of the visual tokens, for text+top and text+attended: share of them, default "
        "0.2; for balanced and atv: their factor, default 1.",
    )
    expert_tokens: int | None = Field(
        None,
        description="Lowest number of tokens in the statistics of an expert; missing ones are replaced by average "
        "tokens of the mixture's input. Default: 128; 0 for none.",
    )
    calibration: str | None = Field(None, description="Calibration data: file, folder or dataset id.")
    columns: dict[str, str] = Field(default_factory=dict, description="Columns of the data: image, question, answer...")
    prompt: str | None = Field(None, description="Template of the prompt, with {question}.")
    objective: str | None = Field(
        None,
        description="The loss: lm, seq2seq, contrastive, zero-shot, itm-itc, classification, supervised-contrastive, "
        "model, or your own module:function. Default: by the model's class.",
    )
    image_folder: str | None = Field(None, description="Folder with the images of an annotation file.")
    classes: tuple[str, ...] | None = Field(
        None, description="Class names of zero-shot classification: a text file with one per line, or the names."
    )
    class_prompts: tuple[str, ...] | None = Field(
        None, description="Templates with {} for the class name, or a text file of them. Default: a photo of a {}."
    )
    samples: int = Field(128, ge=1, description="Number of calibration samples for stage 2.")
    importance_samples: int = Field(32, ge=1, description="Number of calibration samples for stage 1 (the first ones).")
    importance_error: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Sample a layer only until its standard error is this share of its score: 0.1. At most samples × "
        "draws.",
    )
    batch_size: int = Field(8, ge=1, lt=2**31, description="Samples in a batch.")
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a sample of plain text. Default: a length that fits model, machine and text."
    )
    window_start: Literal["each", "once"] = Field(
        "each",
        description="Samples of plain text begin with the tokenizer's special tokens (BOS): each, or once the whole "
        "text, as in the code of SparseGPT and Wanda.",
    )
    include: tuple[str, ...] = Field((), description="Layers or towers to prune that are dense by default.")
    exclude: tuple[str, ...] = Field((), description="Layers or towers to keep dense.")
    towers: tuple[str, ...] | None = Field(None, description="Paths of the module lists that are towers.")
    task: tuple[str, ...] | None = Field(
        None,
        description=f"Tasks to evaluate before and after: {', '.join(TASKS.own())}, or lm_eval:NAME for a suite of "
        "lm-eval.",
    )
    task_options: dict[str, float | int | bool | str] = Field(
        default_factory=dict, description="Options of the tasks: rule=exact, shots=5."
    )
    test: str | None = Field(None, description="Test data of the task. Default: the bundled data.")
    test_columns: dict[str, str] = Field(default_factory=dict, description="Columns of the test data.")
    test_prompt: str | None = Field(None, description="Template of the test's prompt, with {question}.")
    test_image_folder: str | None = Field(None, description="Folder with the images of the test data.")
    test_samples: int | None = Field(None, ge=1, description="Number of test samples. Default: all.")
    test_batch_size: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="Samples in a batch of the evaluation. Default: the batch size, or 32 (embedded model).",
    )
    evaluations: tuple[Evaluation, ...] | None = Field(
        None, description="Several tests, only in a recipe file: name, task, test, columns, ... of each."
    )
    baseline: bool | None = Field(
        None,
        description="Also evaluate the criterion with one sparsity for all layers. Default: on the embedded model.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the choice of samples and of the noise.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    device_map: str | None = Field(
        None,
        description="For a model larger than the memory: disk (the weights of a block are read when it runs), or auto, "
        "balanced, sequential: GPUs first, then memory, then disk.",
    )
    max_memory: dict[str, str] = Field(
        default_factory=dict, description="Memory that device-map auto may use, by GPU number or cpu: 0=20GiB."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: the checkpoint's own.")
    compute_dtype: Literal["auto", "native", "float32"] = Field(
        "auto",
        description="Dtype to compute in where weights are half precision: native, that of the weights; float32, block "
        "by block; auto: float32 on a CPU that is slow in half precision. Saved weights keep their dtype.",
    )
    offload_activations: Literal["none", "cpu", "disk"] = Field(
        "none", description="Keep block inputs in CPU memory (cpu) or in a file (disk) between blocks."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the checkpoint.")

    @field_validator("include", "exclude", "towers", "task", "classes", "class_prompts", mode="before")
    @classmethod
    def _wrap_single(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("offload_activations", mode="before")
    @classmethod
    def _yes_is_cpu(cls, value: Any) -> Any:
        return {True: "cpu", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, name: str) -> str:
        return CRITERIA.check(name)

    @field_validator("importance")
    @classmethod
    def _known_importance(cls, name: str) -> str:
        if name.endswith(".json") or name == AUTO:
            return name
        if name not in IMPORTANCES and Path(name).exists():
            raise InvalidOption(f"importance '{name}' is no JSON file: give the importance.json of a run")
        return IMPORTANCES.check(name)

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str | None) -> str | None:
        from ecoflap.allocation import RULES

        return rule and RULES.check(rule)

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        from ecoflap.allocation.patterns import parse_pattern

        parse_pattern(pattern)
        return pattern

    @model_validator(mode="after")
    def _known_tasks(self) -> Recipe:
        if self.evaluations is None:
            if self.task is not None:
                for name in self.task:
                    TASKS.check(name)
            return self
        names = [entry.name for entry in self.evaluations]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InvalidOption(f"evaluations: '{twice}' appears twice: give each its own name")
        for field in ("test", "test_columns", "test_prompt", "test_image_folder"):
            if getattr(self, field):
                raise InvalidOption(f"{field} and evaluations are both given: set it in the entries of evaluations")
        for name in self.task or ():
            if name not in names:
                raise unknown("evaluation of this recipe", name, names)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self.token_choice()
        if self.max_sparsity is not None and self.max_sparsity < self.sparsity:
            raise InvalidOption(
                f"max_sparsity {self.max_sparsity:g} is below sparsity {self.sparsity:g}: "
                f"raise the cap to at least {self.sparsity:g} or lower the sparsity"
            )
        if self.importance_samples > self.samples and "importance_samples" in self.model_fields_set:
            raise InvalidOption(
                f"importance_samples {self.importance_samples} is more than samples {self.samples}: "
                "stage 1 uses the first samples of stage 2"
            )
        return self

    def token_choice(self) -> TokenChoice:
        """The tokens that enter the statistics of stage 2. Raises InvalidOption, UnknownName."""
        least = EXPERT_TOKENS if self.expert_tokens is None else self.expert_tokens
        return tokens_of(self.criterion, self.tokens, self.top_tokens, least)

    def shares(self) -> dict[str, Any]:
        """The options of the allocation, as :func:`ecoflap.allocate` takes them."""
        return {name: getattr(self, name) for name in _SHARES}

    def method(self) -> Method:
        """One choice for each step of the method, of a resolved recipe.

        Raises:
            InvalidOption, UnknownName: an option is unknown or contradicts another one.
        """
        from ecoflap.search.method import make_method

        options = {name: getattr(self, name) for name in (*_SHARES, *_METHOD)}
        return make_method(**options, pattern=self.pattern, tokens=self.token_choice())

    def resolved(self) -> Recipe:
        """The same recipe with open fields filled in that follow from other fields.

        Raises:
            InvalidOption: an N:M pattern is given with another sparsity or with an importance; an allocation can't be
                read, or is given with another sparsity; a global criterion is given with options that it decides.
        """
        if self.pruned is not None:
            return self._of_pruned()
        changes: dict[str, Any] = self._fixed_by_criterion() if is_global(self.criterion) else {}
        changes |= self._fixed_by_allocation()
        if self.importance_samples > self.samples:
            changes["importance_samples"] = self.samples
        if self.pattern != "unstructured" and self.allocation is None:
            changes |= self._fixed_by_pattern()
        if "importance" not in changes and self.importance != named(self.importance, self.importance_options):
            changes["importance"] = named(self.importance, self.importance_options)
        importance = changes.get("importance", self.importance)
        changes["search"] = self._searches(importance)
        if importance == "sensitivity" and self.criterion == "magnitude" and "order" not in self.importance_options:
            changes["importance_options"] = {**self.importance_options, "order": "magnitude"}
        changes["baseline"] = self._has_baseline(importance, bool(changes["search"]))
        sparsity = changes.get("sparsity", self.sparsity)
        # A tower with its own target has its own cap: its target plus the rule's margin.
        alike = not self.tower_sparsity
        if self.max_sparsity is None and "max_sparsity" not in changes and not changes["search"] and alike:
            changes["max_sparsity"] = self._own_cap(sparsity, importance)
        return self.model_copy(update=changes)

    def _has_baseline(self, importance: str, search: bool) -> bool:
        """Whether the uniform baseline is evaluated: by default on the embedded model, never if the run is uniform."""
        uniform = self.pattern != "unstructured" or (importance == "uniform" and not search and self.allocation is None)
        wanted = self.model is None if self.baseline is None else self.baseline
        return wanted and not uniform and not is_global(self.criterion)

    def _searches(self, importance: str) -> bool | None:
        """Whether the allocation is searched: by default only if stage 1 measures curves for it."""
        obstacle = (
            f"criterion '{self.criterion}' decides every layer's sparsity itself"
            if is_global(self.criterion)
            else f"pattern {self.pattern} fixes every layer's sparsity"
            if self.pattern != "unstructured"
            else f"allocation {self.allocation} is given"
            if self.allocation is not None
            else None
        )
        if self.search and obstacle is not None:
            raise InvalidOption(f"search: {obstacle}, so there is nothing to search")
        if self.search is None and importance == "sensitivity" and obstacle is None:
            return True
        return self.search

    def _own_cap(self, sparsity: float, importance: str) -> float | None:
        """The rule's default cap on a group's sparsity, for the run's record."""
        from ecoflap.allocation import RULES
        from ecoflap.support.reading import read_json

        rule = self.rule or own_rule(importance)
        if self.rule is None and importance.endswith(".json"):
            with suppress(EcoflapError):  # raised again where the file is read
                data = read_json(importance, "the importance")
                settings = data.get("settings") if isinstance(data, dict) else None
                rule = str(settings.get("rule", rule)) if isinstance(settings, dict) else rule
        margin = None if rule not in RULES else RULES.get(rule)(None).margin
        return None if margin is None else min(1.0, round(sparsity + float(margin), 10))

    def _fixed_by_criterion(self) -> dict[str, Any]:
        """A global criterion decides each layer's sparsity, so there is neither importance nor cap."""
        refuse_with_global(self.criterion, {name: getattr(self, name) for name in sorted(self.model_fields_set)})
        return {"importance": "uniform", "importance_options": {}, "max_sparsity": 1.0}

    def _of_pruned(self) -> Recipe:
        """Fields of a recipe that keeps the zeros of another model: none may choose zeros."""
        recorded = self.recover and self.importance == "uniform"  # a run's own recipe, given again
        for name in () if recorded else sorted(self.model_fields_set.intersection(_DECIDE_ZEROS)):
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise InvalidOption(
                    f"{name} would choose zeros, but recover keeps those of {self.pruned}: leave it out"
                )
        few = min(self.samples, self.importance_samples)
        return self.model_copy(
            update={"recover": True, "importance": "uniform", "importance_options": {}, "importance_samples": few}
        )

    def _fixed_by_allocation(self) -> dict[str, Any]:
        """Open fields filled in from the allocation file, for the run's record."""
        if self.allocation is None:
            return {}
        from ecoflap.allocation.parts import read_allocation

        found = read_allocation(self.allocation)
        exact = found.zeros / found.total_weights
        named = round(exact, 6)
        if "sparsity" in self.model_fields_set and abs(self.sparsity - exact) > 1e-4:
            raise InvalidOption(
                f"allocation {self.allocation} makes a sparsity of {named:g}, not {self.sparsity:g}: "
                "leave out the sparsity, or make another allocation with 'ecoflap allocate'"
            )
        sparsity = self.sparsity if "sparsity" in self.model_fields_set else named
        return {"sparsity": sparsity, "max_sparsity": max(self.max_sparsity or found.max_sparsity, sparsity)}

    def _fixed_by_pattern(self) -> dict[str, Any]:
        from ecoflap.allocation.patterns import parse_pattern, sparsity_of_pattern

        exact = sparsity_of_pattern(parse_pattern(self.pattern))
        assert exact is not None
        ratio = float(exact)
        if "sparsity" in self.model_fields_set and self.sparsity != ratio:
            raise InvalidOption(
                f"pattern {self.pattern} fixes the sparsity at {ratio:g}: leave out sparsity {self.sparsity:g}"
            )
        if "importance" in self.model_fields_set and self.importance != "uniform":
            raise InvalidOption(
                f"pattern {self.pattern} fixes every layer's sparsity at {ratio:g}, so importance "
                f"'{self.importance}' could change nothing: leave it out or use 'uniform'"
            )
        return {"sparsity": ratio, "importance": "uniform", "importance_options": {}}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain YAML and JSON types."""
        return self.model_dump(mode="json")

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "recipe") -> Self:
        """A recipe from plain values; error messages name their ``source``.

        Raises:
            InvalidOption: a value is not allowed; the message names field and value.
            UnknownName: an unknown name; the message names similar ones.
        """
        for name in values:
            if name not in cls.model_fields:
                near = get_close_matches(str(name), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean '{near[0]}'?" if near else "'ecoflap prune --help' lists them"
                raise InvalidOption(f"{source}: unknown field '{name}': {hint}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise InvalidOption(_complaint(error, source)) from error
        except EcoflapError as error:
            if source == OPTIONS:
                raise
            raise type(error)(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: str | Path | Sequence[str | Path], changes: dict[str, Any] | None = None) -> Self:
        """Read a recipe from YAML. A run's ``recipe.yaml`` is accepted, too.

        Files of class names and class prompts are looked for in the current folder, then beside the recipe.

        Args:
            path: a file, or several; a field of a later file replaces the same field of earlier ones.
            changes: fields from elsewhere, such as the command line; they replace those of the files.

        Raises:
            InvalidOption: the file is unreadable, no mapping, has an unknown field or a value out of range, or asks to
                run code (``trust_remote_code``, an objective ``module:function``) that ``changes`` does not ask for.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        data: dict[str, Any] = {}
        for file in paths:
            found = _read(Path(file))
            data |= found
            # Check each file alone, to name the one with the fault; a file that adds to others may be incomplete.
            cls.parse(data if len(paths) > 1 else found, f"recipe {file}")
            refuse_code(found, changes or {}, f"recipe {file}")
        if not changes:
            return cls.parse(data, " + ".join(f"recipe {file}" for file in paths))
        return cls.parse({**data, **changes}, OPTIONS)


def _read(path: Path) -> dict[str, Any]:
    data = read_yaml(path, "the recipe")
    if not isinstance(data, dict):
        raise InvalidOption(f"recipe {path}: lines of 'field: value' are expected, such as 'sparsity: 0.5'")
    if "versions" in data and "importance" in data:  # written by a run of prune
        data.setdefault("criterion", BEFORE_ADMM)
    for added in ("versions", "fingerprint"):  # what a run writes beside the recipe
        data.pop(added, None)
    entries = data.get("evaluations")
    for holder in (data, *(entries if isinstance(entries, list) else ())):
        if isinstance(holder, dict):
            _resolve_beside(holder, path.parent)
    return data


def _resolve_beside(holder: dict[str, Any], folder: Path) -> None:
    """Make the files that come with a recipe relative to its folder."""
    for field in ("classes", "class_prompts"):
        value = holder.get(field)
        entries = [value] if isinstance(value, str) else value
        if not (isinstance(entries, list) and is_file_entry(entries, prompts=field == "class_prompts")):
            continue
        if not Path(entries[0]).exists() and (folder / entries[0]).is_file():
            holder[field] = str(folder / entries[0])


def _complaint(error: ValidationError, source: str) -> str:
    """The first error as one line: the field, its value, and what is expected."""
    first = error.errors()[0]
    field, *inner = (str(part) for part in first["loc"])
    name = flag_of(field) if source == OPTIONS else f"{source}: {field}"
    where = " ".join((name, *inner))
    if first["type"] in ("float_parsing", "int_parsing", "float_type", "int_type", "int_from_float"):
        wanted = "a whole number" if first["type"].startswith("int") else "a number"
        return f"{where}: {cut(repr(first['input']))} is not {wanted}"
    if first["type"] == "dict_type":
        return f"{where}: {first['input']!r} should be a mapping, such as {{vision: 0.4}} for tower_sparsity"
    shown = str(first["input"]) if isinstance(first["input"], str | int | float) else repr(first["input"])
    return f"{where}: {cut(shown) or 'nothing'} {first['msg'].removeprefix('Input ')}"
