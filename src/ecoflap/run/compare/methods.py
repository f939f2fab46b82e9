"""Reads a method written as one word, ``IMPORTANCE+CRITERION[:NAME=VALUE,…]``, and turns it into recipe fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecoflap.errors import InvalidOption
from ecoflap.run.recipe import Recipe
from ecoflap.support.registry import number, unknown

# Fields that the grid sets itself.
AXES = frozenset(("sparsity", "seed"))
# Fields of a method: the names before the colon, and the options after it.
OF_METHOD = frozenset(("importance", "criterion", "importance_options", "criterion_options"))
# Fields that must be the same for all methods, so that their numbers can be compared.
SHARED = frozenset((
    "model", "allocation", "pruned", "calibration", "columns", "prompt", "objective", "image_folder", "classes",
    "class_prompts", "batch_size", "sequence_length", "window_start", "include", "exclude", "towers", "task",
    "task_options", "test", "test_columns", "test_prompt", "test_image_folder", "test_samples", "test_batch_size",
    "evaluations", "device", "dtype", "compute_dtype", "trust_remote_code", "baseline",
))  # fmt: skip
UPOP = "upop"  # the method that trains the model: no importance, no criterion
# Values that contradict no other field: a value is checked by itself first, and with its grid later.
_AGREEABLE: dict[str, Any] = {"sparsity": 0.0, "samples": 1 << 40}


@dataclass(frozen=True)
class Method:
    """One method of a grid.

    Attributes:
        importance: a registered measure, or an ``importance.json``.
        criterion: a registered local rule.
        fields: further fields of the recipe.
        importance_options, criterion_options: of the two.
    """

    importance: str
    criterion: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    importance_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    criterion_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def options(self) -> dict[str, Any]:
        """The part after the colon."""
        return {**self.fields, **self.importance_options, **self.criterion_options}

    @property
    def core(self) -> str:
        """The part before the colon: ``owl+wanda``, or the criterion alone for one sparsity in all layers."""
        return self.criterion if self.importance == "uniform" else f"{self.importance}+{self.criterion}"

    @property
    def name(self) -> str:
        """As the command line writes it, with options sorted by name, so that equal methods have equal names."""
        written = [f"{key}={_written(value)}" for key, value in sorted(self.options.items()) if not _is_mapping(value)]
        written += [
            f"{key}={inner}={_written(item)}"
            for key, value in sorted(self.options.items())
            if _is_mapping(value)
            for inner, item in value.items()
        ]
        return self.core + (":" + ",".join(written) if written else "")

    @property
    def title(self) -> str:
        """For headings: ``zeroth-order + wanda (granularity layer)``."""
        words = [key if value is True else f"{key} {_shown(value)}" for key, value in sorted(self.options.items())]
        core = self.criterion if self.importance == "uniform" else f"{Path(self.importance).name} + {self.criterion}"
        return core + (f" ({', '.join(words)})" if words else "")

    @property
    def citations(self) -> tuple[str, ...]:
        """Keys of the papers behind its parts, see :data:`ecoflap.run.citations.CITATIONS`."""
        from ecoflap.run.citations import citations

        named = (value for value in self.options.values() if isinstance(value, str))
        return tuple(paper.key for paper in citations(self.importance, self.criterion, *named))

    @property
    def trains(self) -> bool:
        """Whether the method trains the model, on the comparison's training data."""
        return self.criterion == UPOP

    def changes(self) -> dict[str, Any]:
        """The fields of a run's recipe that this method sets. A method that trains gets fields without calibration."""
        if self.trains:
            return {"importance": "uniform", "criterion": "magnitude"}
        named = {"importance_options": self.importance_options, "criterion_options": self.criterion_options}
        kept = {name: dict(value) for name, value in named.items() if value}
        return {"importance": self.importance, "criterion": self.criterion, **self.fields, **kept}


def split_methods(texts: Iterable[str]) -> list[str]:
    """The methods of one text, separated by commas.

    A part such as ``granularity=layer``, with "=" and no ":" before it, is one more option of the method before.
    """
    methods: list[str] = []
    for text in texts:
        for number_, part in enumerate(text.split(",")):
            head, equals, _ = part.partition("=")
            if number_ and equals and ":" not in head:
                methods[-1] += f",{part.strip()}"
            else:
                methods.append(part.strip())
    return methods


def parse_method(text: str) -> Method:
    """Read ``IMPORTANCE+CRITERION[:NAME=VALUE,…]``.

    A criterion alone gives every layer the same sparsity; an importance alone uses the default criterion. A NAME is a
    field of the recipe, else an option of the importance, else one of the criterion.

    Raises:
        UnknownName: there is no such importance, criterion or option.
        InvalidOption: the text is malformed, or a value is out of range.
    """
    core, colon, rest = text.partition(":")
    importance, criterion = _parts(core.strip(), text)
    method = Method(importance, criterion)
    if colon and not rest.strip():
        raise InvalidOption(f"method '{text}': NAME=VALUE is missing after the colon")
    for pair in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise InvalidOption(f"method '{text}': '{pair.strip()}' is no NAME=VALUE")
        method = _with_option(method, key, value, text)
    Recipe.parse(_AGREEABLE | method.changes(), f"method '{text}'")
    return method


def _parts(core: str, text: str) -> tuple[str, str]:
    from ecoflap.importance.registry import IMPORTANCES
    from ecoflap.pruning.registry import CRITERIA, DEFAULT

    importance, plus, criterion = (part.strip() for part in core.rpartition("+"))
    if criterion == UPOP and not plus:
        return "uniform", UPOP
    if plus:
        if importance in CRITERIA and criterion in IMPORTANCES:
            raise InvalidOption(f"method '{text}': the importance comes first: {criterion}+{importance}")
        CRITERIA.check(criterion)
        return importance if importance.endswith(".json") else IMPORTANCES.check(importance), criterion
    if criterion in CRITERIA:
        return "uniform", criterion
    if criterion in IMPORTANCES or criterion.endswith(".json"):
        return criterion, DEFAULT
    if not criterion:
        raise InvalidOption(f"method '{text}': write IMPORTANCE+CRITERION, such as zeroth-order+wanda")
    raise unknown("method", criterion, list(dict.fromkeys([*CRITERIA, *IMPORTANCES, UPOP])))


def _with_option(method: Method, key: str, value: str, text: str) -> Method:
    if key in AXES:
        raise InvalidOption(f"method '{text}': {key} is the grid's: give --sparsities or --seeds")
    if key in SHARED:
        raise InvalidOption(f"method '{text}': {key} must be the same for all methods: give it as an option")
    if key in OF_METHOD:
        raise InvalidOption(f"method '{text}': write IMPORTANCE+CRITERION:NAME=VALUE, {key} is no NAME")
    if method.trains:
        return dataclasses.replace(method, fields={**method.fields, key: _of_training(key, value, text)})
    own, of_importance, of_criterion = dict(method.fields), *_options_of(method)
    if key in Recipe.model_fields:
        if _is_mapping(Recipe.model_fields[key].get_default(call_default_factory=True)):
            inner, equals, item = value.partition("=")
            if not equals:
                raise InvalidOption(f"method '{text}': write {key}=NAME=VALUE")
            own[key] = {**own.get(key, {}), inner: number(item)}
        else:
            own[key] = _plain(key, value, text)
        return dataclasses.replace(method, fields=own)
    if key in of_importance:
        return dataclasses.replace(method, importance_options={**method.importance_options, key: number(value)})
    if key in of_criterion:
        return dataclasses.replace(method, criterion_options={**method.criterion_options, key: number(value)})
    fields = [name for name in Recipe.model_fields if name not in SHARED | AXES | OF_METHOD]
    raise unknown(f"option of method '{method.core}'", key, [*of_importance, *of_criterion, *fields])


def _of_training(key: str, value: str, text: str) -> Any:
    """An option of the training, converted to its type."""
    from ecoflap.run.finetune.upop_recipe import OF_METHOD, UPop

    if key not in OF_METHOD:
        raise unknown(f"option of method '{UPOP}'", key, sorted(OF_METHOD))
    return getattr(UPop.parse({key: value}, f"method '{text}'"), key)


def _options_of(method: Method) -> tuple[list[str], list[str]]:
    """Names of the options that the importance and the criterion have."""
    from ecoflap.importance.registry import IMPORTANCES
    from ecoflap.pruning.registry import CRITERIA

    measure: Any = IMPORTANCES.get(method.importance) if method.importance in IMPORTANCES else None
    rule: Any = CRITERIA.get(method.criterion)
    return _field_names(measure), _field_names(rule)


def _field_names(factory: Any) -> list[str]:
    """Options of a measure or criterion: its fields."""
    return [f.name for f in dataclasses.fields(factory)] if dataclasses.is_dataclass(factory) else []


def _plain(key: str, value: str, text: str) -> Any:
    """The value in the type of its recipe field, so that 0.50 and 0.5 are the same method."""
    return getattr(Recipe.parse(_AGREEABLE | {key: value}, f"method '{text}'"), key)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return " ".join(f"{k}={_written(v)}" for k, v in value.items()) if _is_mapping(value) else _written(value)
