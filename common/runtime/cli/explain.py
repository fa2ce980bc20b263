"""Hydra's composition errors in one sentence each, with the nearest name; and the keys the configuration may hold."""

import inspect
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from common.errors import nearest


def words(value) -> str:
    """A configuration value in an error message: `'abc' (text)`, `true`, `3`, `a mapping with keys a, b`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"{value!r} (text)"
    if isinstance(value, dict):
        if "_target_" in value:
            return f"a {value['_target_']}"
        return f"a mapping with keys {', '.join(map(str, value)) or '(none)'}"
    return repr(value)


def nearest_below(name: str, node, path: str) -> str:
    """`"Closest: a.b.name. "` when no key beside `name` looks like it but one further down in `node` does."""
    found: dict[str, str] = {}

    def collect(inner, where: str) -> None:
        for key, value in inner.items() if isinstance(inner, dict) else ():
            if not str(key).startswith("_"):
                if where != path:  # keys beside `name` were looked at before
                    found.setdefault(str(key), f"{where}.{key}" if where else str(key))
                collect(value, f"{where}.{key}" if where else str(key))

    collect(node, path)
    close = get_close_matches(name, found, n=1, cutoff=0.75)
    return f"Closest: {found[close[0]]}. " if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# The keys a configuration may have


def read_schema(conf_dir, config_name: str = "config") -> dict:
    """The keys the composed configuration may have, as nested dicts for `check(schema=...)`.

    Read from the files, without composing (the primary config cannot be composed without an experiment): the primary
    config's own keys, and every group of its defaults list with the union of the keys of the group's options.
    Sections built by one `_target_` carry that key, so that `check` uses the signature instead.
    """
    conf_dir = Path(conf_dir)
    primary = _load(conf_dir / f"{config_name}.yaml")
    schema = {key: value for key, value in primary.items() if key != "defaults"}
    for group, package in _groups(primary.get("defaults", [])):
        if group.split("/")[0] == "hydra":
            continue
        merged: dict = {}
        for option in sorted((conf_dir / group).glob("*.yaml")):
            if "_global_" not in _package(option):
                content = {key: value for key, value in _load(option).items() if key != "defaults"}
                merged = _merge(merged, content)
        place = schema
        *parents, last = package.split(".")
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = _merge(place.get(last) or {}, merged) if merged else "<open>"
    return schema


def _load(path: Path) -> dict:
    from omegaconf import OmegaConf

    loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return loaded if isinstance(loaded, dict) else {}


def _package(path: Path) -> str:
    """The package of a `# @package x` header, or an empty string."""
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            break
        found = re.match(r"#\s*@package\s+(\S+)", line)
        if found:
            return found[1]
    return ""


def _groups(defaults):
    """(group folder, package) of each group in a defaults list."""
    for entry in defaults:
        if isinstance(entry, dict):
            for key in entry:
                name = str(key).removeprefix("override ").removeprefix("optional ").strip().lstrip("/")
                group, _, package = name.partition("@")
                yield group, package or group.replace("/", ".")


def _merge(left: dict, right: dict) -> dict:
    merged = dict(left)
    for key, value in right.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else (value if value is not None else merged.get(key))
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# Hydra's and OmegaConf's messages


def is_composition_error(error: BaseException) -> bool:
    """Whether Hydra, OmegaConf or the YAML reader raised `error` because of what the user wrote."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, HydraException | OmegaConfBaseException | yaml.YAMLError) or (
        isinstance(error, ValueError) and "Config group override" in str(error)
    )


def explain_hydra_error(
    error: BaseException, conf_dir=None, *, overrides: Sequence[str] | None = None, config_name: str = "config"
) -> str:
    """One sentence for an error Hydra or OmegaConf raised while composing or resolving.

    conf_dir   the conf/ folder; with it the nearest name is looked up among the options and keys that exist
    overrides  the command line's overrides (default: sys.argv[1:]); needed to compose without the wrong one
    An error of another kind gives its own first line.
    """
    given = list(sys.argv[1:] if overrides is None else overrides)
    conf_dir = Path(conf_dir) if conf_dir is not None else None
    text = _chain(error)
    for explain in (_missing_config, _group, _key, _syntax, _value):
        sentence = explain(error, text, conf_dir, given, config_name)
        if sentence:
            return sentence
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _chain(error: BaseException | None) -> str:
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__
    return "\n".join(parts)


def _missing_config(error, text, conf_dir, given, config_name) -> str | None:
    found = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if not found:
        return None
    group, _, name = found[1].rpartition("/")
    by = re.search(r"In '([^']+)'", text)
    within = f" (asked for by conf/{by[1]}.yaml)" if by and by[1] != config_name else ""
    options = _options(conf_dir, group) or [str(option) for option in getattr(error, "options", None) or []]
    if not group:
        return f"Config '{name}' does not exist{within}. {nearest(name, options)}".rstrip()
    head = f"Experiment '{name}' does not exist" if group == "experiment" else f"{group}={name} does not exist"
    if not options and conf_dir is not None and not (conf_dir / group).is_dir():
        return f"Config group '{group}' does not exist{within}. {nearest(group, _group_names(conf_dir))}".rstrip()
    listing = (
        f"List them with: ls conf/{group}"
        if len(options) > 12 or group == "experiment"
        else (f"Options: {', '.join(options)}.")
    )
    return f"{head}{within}. {nearest(name, options)}{listing}"


def _group(error, text, conf_dir, given, config_name) -> str | None:
    """Overrides of groups that are not in the defaults list, missing choices, doubled ones."""
    found = re.search(r"You must specify '([^']+)'", text)
    if found:
        options = _options(conf_dir, found[1])
        plusless = [override for override in given if override.startswith("experiment=")]
        if plusless:
            return f"An experiment is added with a plus. Write +{plusless[0]}"
        if not any("experiment=" in override for override in given):
            return (
                "No experiment given. Run: python -m projects.run +experiment=<name>. "
                "List them with: ls conf/experiment"
            )
        return f"No {found[1]} chosen. Give {found[1]}=<name>. Options: {', '.join(options)}."
    found = re.search(r"Did you mean to override ([^?\s]+)\?", text)
    if found and found[1] != "experiment@_global_":
        return f"That group has another package here. Did you mean {found[1]}=...?"
    found = re.search(
        r"Could not override '([^'@]+)(?:@([^']+))?'\.\s*(?:No match in the defaults list|Did you mean)", text
    )
    if found:
        group = found[1]
        name = next((o.partition("=")[2] for o in given if o.lstrip("+~").partition("=")[0] == group), "<name>")
        if conf_dir is None or (conf_dir / group).is_dir():
            return f"{group} is not in the defaults, so it is added with a plus. Write +{group}={name}"
        return f"Config group '{group}' does not exist. {nearest(group, _group_names(conf_dir))}".rstrip()
    if "Config group override must be a string" in text:
        wrong = [
            o
            for o in given
            if conf_dir
            and (conf_dir / o.lstrip("+~").partition("=")[0]).is_dir()
            and not (conf_dir / f"{o.lstrip('+~').replace('=', '/')}.yaml").is_file()
        ]
        return (
            f"{' or '.join(wrong) or 'An override'} is no option: a group needs the name of one of its files, and "
            f"this reads as a number or true/false."
        )
    found = re.search(r"Multiple values for ([\w/@.]+)\.", text)
    if found:
        return f"{found[1]} is given more than once. Keep one {found[1]}=... on the command line."
    found = re.search(r"config group '([^']+)' does not exist", text)
    if found:
        names = _group_names(conf_dir) if conf_dir else []
        return f"Config group '{found[1]}' does not exist. {nearest(found[1], names)}".rstrip()
    found = re.search(r"Could not delete (?:from config\. )?'([^'=]+)", text)
    if found:
        return f"~{found[1]} removes nothing: there is no such entry. Drop that override."
    return None


def _key(error, text, conf_dir, given, config_name) -> str | None:
    """A key on the command line that the composed config does not have, or that it has although it is added."""
    found = re.search(r"An item is already at '([^']+)'", text)
    if found:
        return f"{found[1]} exists already, so it is set without a plus. Write {found[1]}=..."
    found = (
        re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
        if "is not in struct" in text or "Could not override" in text
        else None
    )
    if not found:
        return None
    path = found[1]
    parent, _, last = path.rpartition(".")
    node = _compose_without(path, conf_dir, given, config_name)
    while parent and not isinstance(_select(node, parent), dict):
        parent, _, last = parent.rpartition(".")  # the first part of the path that is wrong
    place = node if not parent else _select(node, parent)
    options = [str(key) for key in place] if isinstance(place, dict) else []
    wrong = f"{parent}.{last}" if parent else last
    if wrong != path and last in options:
        return f"{wrong} is one value, not a section, so {path} cannot be set. Give {wrong}=..."
    accepted = _signature(place)
    if last in accepted:
        return f"{wrong} is left at the default of {place['_target_']}. To set it, add it with a plus: +{path}=..."
    options = accepted or options
    owner = f"an option of {_owner(place, parent)}" if parent else "a section of the configuration"
    close = nearest(last, options)
    if close and parent:
        close = close.replace("Closest: ", f"Closest: {parent}.")
    close = close or nearest_below(last, place, parent)
    listing = f"Options: {', '.join(o for o in options if o != '_target_')}." if options else ""
    return f"{wrong} is not {owner}. {close}{listing}".rstrip()


def _signature(place) -> list[str]:
    """The arguments of a node's `_target_`; [] without one."""
    from common.targets import resolve

    try:
        return [
            name for name in inspect.signature(resolve(place["_target_"])).parameters if name not in ("args", "kwargs")
        ]
    except (TypeError, KeyError, ValueError):
        return []


def _owner(place, parent: str) -> str:
    return str(place["_target_"]) if isinstance(place, dict) and "_target_" in place else parent


def _syntax(error, text, conf_dir, given, config_name) -> str | None:
    override = getattr(error, "override", None)
    if override is not None and type(error).__name__ == "OverrideParseException":
        if "=" not in override and not override.startswith("~"):
            return f"'{override}' is not an override. Write key=value, for instance trainer.max_steps=10"
        key = override.partition("=")[0]
        return (
            f"The value in '{override}' cannot be read. Quote it twice if it holds , : [ ] {{ }} = or spaces: "
            f"'{key}=\"...\"'"
        )
    found = re.search(r"Sweep parameters '([^']+)' requires --multirun", text) or re.search(
        r"Ambiguous value for argument '([^']+)'", text
    )
    if found:
        return f"'{found[1]}' lists several values: that is a sweep. Add -m, or quote the value."
    return None


def _value(error, text, conf_dir, given, config_name) -> str | None:
    """Missing values, interpolations, wrong types of structured nodes."""
    key = getattr(error, "full_key", None) or ""
    if not key:
        found = re.search(r"full_key: (\S+)", text)
        key = found[1] if found else ""
    found = re.search(r"Missing mandatory value: (\S+)", text)
    if found or type(error).__name__ == "MissingMandatoryValue":
        key = key or (found[1] if found else "a value")  # the message has the last part of the path only
        return f"{key} is not set. Give it: {key}=..."
    found = re.search(r"Interpolation key '([^']+)' not found", text)
    if found:
        return f"{key or 'A value'} refers to ${{{found[1]}}}, which does not exist. Correct the name or set {key}=..."
    found = re.search(r"Environment variable '([^']+)' not found", text)
    if found:
        return f"{key or 'A value'} needs the environment variable {found[1]}. Set it, or give {key}=..."
    found = re.search(r"Unsupported interpolation type (\S+)", text)
    if found:
        return f"{key or 'A value'} uses the unknown resolver ${{{found[1]}:...}}."
    found = re.search(r"Error merging override (\S+)", text)
    if found:
        cause = str(error.__cause__).splitlines()[0] if error.__cause__ else "it does not fit"
        return f"'{found[1]}' cannot be used: {cause.rstrip('.')}."
    found = re.search(
        r"(while (?:parsing|scanning)[^\n]*|mapping values are not allowed here|"
        r"found [^\n]*|could not find expected[^\n]*)",
        text,
    )
    mark = re.search(r'in "([^"]+)", line (\d+)', text)
    if mark:
        path = Path(mark[1])
        name = f"conf/{path.relative_to(conf_dir)}" if conf_dir and path.is_relative_to(conf_dir) else path.name
        return f"{name}, line {mark[2]}, is not valid YAML: {found[1] if found else 'see that line'}."
    return None


def _options(conf_dir, group: str) -> list[str]:
    if conf_dir is None:
        return []
    return sorted(path.stem for path in (conf_dir / group).glob("*.yaml"))


def _group_names(conf_dir: Path) -> list[str]:
    folders = {path.parent.relative_to(conf_dir).as_posix() for path in conf_dir.rglob("*.yaml")}
    return sorted(folders - {"."})


def _compose_without(path: str, conf_dir, given: Sequence[str], config_name: str) -> dict:
    """The composed configuration as a plain unresolved dict, leaving out the overrides that name `path` and, should
    that not compose either, every override but the choices of groups. {} when nothing composes."""
    if conf_dir is None:
        return {}
    overrides = [o for o in given if "=" in o and not o.startswith("-")]
    groups = [o for o in overrides if (conf_dir / re.split("[@=]", o.lstrip("+~"))[0]).is_dir()]
    kept = [o for o in overrides if o.lstrip("+~").partition("=")[0] != path]
    for attempt in (kept, groups, []):
        try:
            return _compose(conf_dir, config_name, [_first_choice(o) for o in attempt])
        except Exception:
            continue
    return {}


def _first_choice(override: str) -> str:
    """Sweep overrides `key=a,b` reduced to `key=a`, so that one configuration can be composed."""
    key, _, value = override.partition("=")
    return f"{key}={value.split(',')[0]}" if "," in value and not re.search(r"[\[\]{}'\"(]", value) else override


def _compose(conf_dir: Path, config_name: str, overrides: list[str]) -> dict:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    # not hydra.compose: this runs inside Hydra's main, whose global state must stay as it is
    loader = ConfigLoaderImpl(config_search_path=create_config_search_path(str(conf_dir.resolve())))
    config = loader.load_configuration(config_name=config_name, overrides=overrides, run_mode=RunMode.RUN)
    with open_dict(config):
        config.pop("hydra", None)
    composed = OmegaConf.to_container(config, resolve=False)
    return composed if isinstance(composed, dict) else {}


def _select(node, path: str):
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node
