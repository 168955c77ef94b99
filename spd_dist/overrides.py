"""From YAML files and `key=value` words to a `Config`: merged left to right by OmegaConf, then checked field by field.

Every fault names the dotted key, its value, the rule and the remedy, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from spd_dist.arms import RANK_RULES, Arm, check_changes, check_on_policy, chosen, swept
from spd_dist.config import Config, Experiment, Project, check_across_fields
from spd_dist.errors import ConfigError
from spd_dist.redaction import keep_secret, redacted_data
from spd_dist.types import Json, record_of
from spd_dist.yaml_files import load_yaml

OF_SEVERAL_LINES = ("data.system", "generate.command", "calibrate.mask")
"""Settings whose text may hold line ends; of any other, they would end up in job scripts, file names and tables."""
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
SHIPPED = "package:"
"""Before the name of a config that comes with the package, as in `--config package:quickstart`."""


def load_config(paths: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """The config of YAML files, later ones over earlier ones, and `section.key=value` words over all of them.

    Raises:
        ConfigError: an unreadable file, an unknown key, a wrong type, or a value out of bounds.
    """
    config: Config = _build(Config, _merged(paths, overrides), "")
    arms = swept(config.evaluate.arms, config.evaluate.temperatures)
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, arms=arms))
    _check(config)
    return config


def load_experiment(paths: Iterable[str | Path], overrides: Iterable[str] = ()) -> Experiment:
    """The experiment of YAML files and `key=value` words; a word with a key of a run is taken as one of `run`.

    Raises:
        ConfigError: as of `load_config`; fewer than two seeds, or one twice; a key of `run` that the experiment sets.
    """
    own = {item.name for item in dataclasses.fields(Experiment)}
    words = [word if word.partition("=")[0].partition(".")[0] in own else f"run.{word}" for word in overrides]
    experiment = _build(Experiment, _merged(paths, words), "")
    run, default = experiment.run, Config()
    of_each_run = {
        ("run.seed", "seeds"): (run.seed, default.seed),
        ("run.run_dir", "folder"): (run.run_dir, default.run_dir),
        ("run.evaluate.arms", "arms"): (run.evaluate.arms, default.evaluate.arms),
    }
    for (key, instead), (value, unset) in of_each_run.items():
        if value != unset:
            raise ConfigError(f"{key}: {_shown(value)} is not valid in an experiment of a run a seed; set {instead}")
    if len(set(experiment.seeds)) < max(2, len(experiment.seeds)):
        raise ConfigError(
            f"seeds: {list(experiment.seeds)} is not valid; name at least two, each once, or use launchers/spd.py"
        )
    arms = swept(experiment.arms, experiment.run.evaluate.temperatures)
    experiment = dataclasses.replace(experiment, arms=arms)
    _check(experiment.config_of(experiment.seeds[0]))
    return experiment


def split_words(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The config files and the overrides among `words`; argparse gives --config every word that follows it."""
    given = [word for word in words if word != "--config"]
    return [word for word in given if "=" not in word], [word for word in given if "=" in word]


def _merged(paths: Iterable[str | Path], overrides: Iterable[str]) -> Mapping[str, Json]:
    merged: Any = OmegaConf.create()
    for source, values in [*map(_read_file, paths), *map(_read_override, overrides)]:
        try:
            merged = OmegaConf.merge(merged, values)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ConfigError(f"{source} does not merge with what stands before it: {_first_line(error)}") from error
    written: Any = OmegaConf.to_container(merged)
    for section in (written, written.get("run")):
        if isinstance(section, dict) and isinstance(section.get("generate"), dict):
            keep_secret(str(section["generate"].get("command")))
    try:
        resolved: Any = OmegaConf.to_container(merged, resolve=True)
        return resolved
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: an interpolation does not resolve: {_first_line(error)}") from error


def _check(config: Config) -> None:
    check_across_fields(config)
    for arm in chosen(config.evaluate.arms):
        config_of_arm(config, arm)


def config_of_arm(config: Config, arm: Arm) -> Config:
    """The run's config with the settings that the arm has for its own.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of bounds, or a change that has no effect on the arm.
    """
    if not arm.settings:
        return config
    merged = OmegaConf.create(dataclasses.asdict(config))
    rule = arm.own("project.rank_rule")
    for key, of_rule in RANK_RULES.items():
        if rule is not None and rule != of_rule:  # what the run sets of another rule is none of the arm's
            merged.project[key] = vars(Project)[key]
    for word in arm.settings:
        merged = OmegaConf.merge(merged, _read_override(word)[1])
    own = _build(Config, OmegaConf.to_container(merged, resolve=True), "")
    check_changes(arm, own)
    alone = dataclasses.replace(own.evaluate, arms=(arm.made_as.partition("@")[0],))  # its settings are in `own`
    check_across_fields(dataclasses.replace(own, evaluate=alone))
    if arm.is_on_policy:
        check_on_policy(arm, own)
    if not arm.is_last_iteration:  # nobody reads the merged weights of an iteration that is not the last
        own = dataclasses.replace(own, finetune=dataclasses.replace(own.finetune, merge=False))
    return own


def to_yaml(config: Config | Experiment) -> str:
    """Every field of `config`, as YAML that can be read back."""
    return OmegaConf.to_yaml(OmegaConf.create(redacted_data(dataclasses.asdict(config))))


def shipped_config(name: str) -> Path:
    """The file of a config that comes with the package: `quickstart` -> `configs/quickstart.yaml`.

    Raises:
        ConfigError: there is none of this name.
    """
    folder = Path(__file__).with_name("configs")
    known = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
    if name not in known:
        raise ConfigError(f"--config {SHIPPED}{name}: no such config comes with spd_dist; choose {', '.join(known)}")
    return folder / f"{name}.yaml"


def _read_file(path: str | Path) -> tuple[str, Any]:
    if str(path).startswith(SHIPPED):
        path = shipped_config(str(path).removeprefix(SHIPPED))
    if Path(path).is_dir():
        raise ConfigError(f"--config {path}: is a folder; name a YAML file in it")
    if not Path(path).is_file():
        raise ConfigError(
            f"{path}: no such file (from {Path.cwd()}), and no override, which is written section.key=value; name a "
            f"YAML file, or {SHIPPED}quickstart"
        )
    try:
        values = load_yaml(path)
    except (OSError, RecursionError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"--config {path}: must be a mapping of sections, as in configs/quickstart.yaml")
    return f"--config {path}", values


def _read_override(word: str) -> tuple[str, Any]:
    if "=" not in word or word.startswith("="):
        raise ConfigError(f"{_shown(word)} is not an override: write section.key=value, as in finetune.num_epochs=3")
    try:
        return word, OmegaConf.from_dotlist([word])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{_shown(word)} is not an override: {' '.join(str(error).split())}") from error


def _shown(value: Any) -> str:
    """A value for an error: as Python writes it, but short."""
    return re.sub(r"(?s)^(.{200}).+$", r"\1...", repr(value))


def _first_line(error: Exception) -> str:
    """What OmegaConf says, without the lines on where in its own objects."""
    return str(error).partition("\n")[0]


def _build(section: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}: {_shown(values)} is not a section; its keys are {_names(section)}")
    hints = typing.get_type_hints(section)
    fields = {item.name: item for item in dataclasses.fields(section)}
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"{prefix}{name}: unknown key (value {_shown(values[name])}); {_nearest(prefix, str(name), section)}"
            )
    built = {}
    for name, value in values.items():
        hint, key = hints[name], f"{prefix}{name}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            built[name] = _build(hint, value, f"{key}.")
        else:
            built[name] = _convert(value, hint, key)
            _check_bounds(built[name], fields[name].metadata, key)
    return record_of(section, built)


def _nearest(prefix: str, name: str, section: type) -> str:
    known = [f"{prefix}{item.name}" for item in dataclasses.fields(section)]
    anywhere = known + [
        f"{outer.name}.{item.name}"
        for outer in dataclasses.fields(Config)
        if dataclasses.is_dataclass(hint := typing.get_type_hints(Config)[outer.name])
        for item in dataclasses.fields(hint)
    ]
    same_name = [key for key in anywhere if key.rpartition(".")[2] == name]
    initials = [key for key in known if "".join(word[0] for word in key.rpartition(".")[2].split("_")) == name]
    close = (
        same_name
        or ([" or ".join(initials)] if initials else [])
        or difflib.get_close_matches(prefix + name, known, 1)
        or difflib.get_close_matches(prefix + name, anywhere, 1, 0)
    )
    return f"the nearest valid key is {close[0]}"


def _names(section: type) -> str:
    return ", ".join(item.name for item in dataclasses.fields(section))


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type that the field declares; an int becomes a float, `1e3` an int, and a list a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, Union):
        return _convert_to_one_of(value, arguments, hint, key)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if origin is Literal:
        value = "off" if value is False and "off" in arguments else value  # what YAML makes of the bare word
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
    elif origin is dict:
        fits = isinstance(value, dict)
    else:
        fits = origin is None and type(value) is hint
    is_line = hint is str and key.removeprefix("run.") not in OF_SEVERAL_LINES
    if fits and is_line and isinstance(value, str) and _CONTROL.search(value):
        raise ConfigError(
            f"{key}: {_shown(value)} is not valid; it must be text of one line, without control characters"
        )
    if fits:
        return value
    raise ConfigError(f"{key}: {_shown(value)} is not valid; it must be {_describe(hint)}")


def _convert_to_one_of(value: Any, choices: tuple[Any, ...], hint: Any, key: str) -> Any:
    if isinstance(value, str) and str in choices:
        return _convert(value, str, key)
    for choice in choices:
        try:
            return _convert(value, choice, key)
        except ConfigError:
            continue
    raise ConfigError(f"{key}: {_shown(value)} is not valid; it must be {_describe(hint)}")


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin in (types.UnionType, Union):
        return " or ".join(map(_describe, arguments))
    if origin is tuple:
        return f"a list, each {_describe(arguments[0])}"
    names: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    names[types.NoneType] = "null"
    return names.get(hint, "a mapping")


def _check_bounds(value: Any, metadata: Mapping[str, Any], key: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    rules = {
        "at_least": lambda bound: value >= bound,
        "at_most": lambda bound: value <= bound,
        "above": lambda bound: value > bound,
    }
    for rule, holds in rules.items():
        if rule in metadata and not holds(metadata[rule]):
            raise ConfigError(
                f"{key}: {_shown(value)} is out of bounds; it must be {rule.replace('_', ' ')} {metadata[rule]}"
            )
