"""How a config section declares its settings, and what holds for every value that gets into one.

Each room owns the dataclass of its section: a `Section` that has a field for each setting, written
with `setting`. The declaration says all there is to know about a setting: its default, a line of
help, which values it takes, what other programs call it, and whether it changes the numbers of a
run. The checks, `--help` and docs/config.md read it from there.

A value's type is checked, and converted where nothing can get lost, whenever it is set: by the
constructor, as an attribute, by an override on the command line, or from config.json. Its bounds
are checked by `check`, when the config is complete. A section that was resolved is frozen.
"""

import dataclasses
import difflib
import numbers
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

from tinylm.core.errors import UserError

T = TypeVar("T")
S = TypeVar("S", bound="Section")

_LARGEST_FLOAT32 = 3.4e38
_KINDS = {
    int: "a whole number (int)",
    float: "a number",
    bool: "True or False",
    str: "a text (str)",
}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Which values a setting takes: numbers within limits, one of some choices, or one of `also`.

    For a tuple, they hold for each of its entries.
    """

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    choices: tuple = ()
    also: tuple = ()

    def admits(self, value: Any) -> bool:
        """Say whether a value, or each entry of a tuple, is allowed."""
        if isinstance(value, tuple):
            return all(self.admits(entry) for entry in value)
        if value in self.also:
            return True
        if self.choices and value not in self.choices:
            return False
        # Each comparison is written so that NaN fails it.
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        """Return the bounds in words, such as "at least 2, or 0"; nothing where there are none."""
        if self.choices:
            within = f"one of {', '.join(map(str, self.choices))}"
        else:
            limits = (
                ("at least", self.least),
                ("above", self.above),
                ("below", self.below),
                ("at most", self.most),
            )
            within = " and ".join(
                f"{words} {_short(limit)}" for words, limit in limits if limit is not None
            )
        return ", or ".join([within, *map(_short, self.also)])


def _short(limit: float) -> str:
    """Return a limit as one would write it: 2^31 rather than 2147483648."""
    if isinstance(limit, float):
        return f"{limit:g}"
    is_large_power = limit >= 2**16 and limit.bit_count() == 1
    return f"2^{limit.bit_length() - 1}" if is_large_power else str(limit)


def setting(
    default: Any,
    doc: str,
    *,
    free: bool = False,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Sequence = (),
    also: Sequence = (),
    bounds: Bounds | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """Declare one config field.

    Args:
      default: the only default of the setting.
      doc: one line of help.
      free: whether a run may be resumed with another value. An *identity* setting (not free)
        changes what a run computes, so a run is never resumed with another value; mesh, cadences
        and writers may change.
      least: the smallest value allowed.
      above: the value must be larger than this.
      below: the value must be smaller than this.
      most: the largest value allowed.
      choices: the values allowed. For a tuple, bounds and choices hold for each entry.
      also: values allowed outside of the bounds, such as a 0 that turns something off.
      bounds: all of these in one, where another part of the program has the same bounds.
      aliases: what nanoGPT, transformers, MaxText and others call it; an error about such a name
        leads here.
    """
    if bounds is None:
        bounds = Bounds(least, above, below, most, tuple(choices), tuple(also))
    metadata = {"doc": doc, "free": free, "bounds": bounds, "aliases": tuple(aliases)}
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """A part of the config, whose fields are settings: the base of the dataclasses.

    Example:
        @dataclasses.dataclass
        class EvalConfig(Section, name="eval"):
            every_steps: int = setting(500, "steps between evaluations", free=True, least=0)
    """

    section_name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = ""):
        """Take the section's name in the config, which messages begin with.

        The whole config has none.
        """
        super().__init_subclass__()
        cls.section_name = name

    def __new__(cls, *_: Any, **values: Any):
        """Raise UserError for an argument that isn't a setting.

        `__init__` would refuse it with a TypeError.
        """
        for name in values:
            _check_name(cls, name)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a setting to a value of its type.

        Raises UserError for another type and for an unknown name.
        """
        _check_name(type(self), name)
        key = _key(type(self), name)
        if self.is_frozen:
            raise dataclasses.FrozenInstanceError(
                f"{key} can't change: this config is resolved; change the one it was resolved "
                "from, or an editable_copy() of it."
            )
        kind = _fields(type(self))[name].type
        object.__setattr__(self, name, _converted(key, value, kind))

    # A type checker would take any name for a setting.
    if not typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Name the nearest setting where one that doesn't exist is read."""
            key = _key(type(self), name)
            # Python and libraries ask for names such as __deepcopy__, which nobody has misspelt.
            hint = "" if name.startswith("_") else nearest_setting(key)
            raise AttributeError(f"{key} is not a setting{hint or '.'}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{_key(type(self), name)} can't be deleted.")

    @property
    def is_frozen(self) -> bool:
        """Whether the section was resolved, so that it can't change any more."""
        return self.__dict__.get("_frozen", False)

    def freeze(self) -> None:
        """Let neither this section nor those inside it change from here on."""
        for section in _sections_in(self).values():
            section.freeze()
        self.__dict__["_frozen"] = True

    def editable_copy(self: S) -> S:
        """Return a copy, down to the sections inside it, that can change."""
        inner = {name: section.editable_copy() for name, section in _sections_in(self).items()}
        return dataclasses.replace(self, **inner)  # type: ignore[type-var]

    def check(self) -> None:
        """Raise UserError for what can't work.

        A section with rules between its settings adds them.
        """
        self.check_bounds()
        for section in _sections_in(self).values():
            section.check()

    def check_bounds(self) -> None:
        """Raise UserError for a setting outside its bounds, or a number that float32 can't hold."""
        for name, field in _fields(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, Section):
                continue
            key = _key(type(self), name)
            # Written so that NaN is refused too.
            if isinstance(value, float) and not abs(value) <= _LARGEST_FLOAT32:
                raise UserError(f"{key}={value} must be a finite number that float32 can hold.")
            bounds = field.metadata["bounds"]
            if bounds.admits(value):
                continue
            hint = ""
            if isinstance(value, str):
                hint = nearest(value, bounds.choices)
            raise UserError(f"{key}={value!r} must be {bounds}{hint or '.'}")

    def changed(self, names: Sequence[str]) -> list[str]:
        """Return "section.name=value" of those of some settings that are not at their defaults."""
        found = []
        for name in names:
            value = getattr(self, name)
            if value != _fields(type(self))[name].default:
                found.append(f"{_key(type(self), name)}={value}")
        return found

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Raise UserError where one of some settings is not at its default, and what it is for is
        off: it would change nothing.

        Args:
          names: of the settings.
          why: goes on after the setting and its value: what it is for, and the remedy.
        """
        for one in self.changed(names):
            raise UserError(f"{one} {why}")


def settings_of(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield (dotted key, field, value) for every setting of a section and of the sections inside
    it.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def differing_settings(
    section: Any, other: Any, decisive: Sequence[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Return (key, value, other value) of the settings in which two sections of one type differ.

    Free settings count only where `decisive` names them.
    """
    differing = []
    for ours, theirs in zip(settings_of(section), settings_of(other), strict=True):
        key, field, value = ours
        _, _, other_value = theirs
        counts = key in decisive or not field.metadata["free"]
        if counts and value != other_value:
            differing.append((key, value, other_value))
    return differing


def to_dict(section: Any) -> dict[str, Any]:
    """Return a section as nested plain values, ready for JSON."""
    return dataclasses.asdict(section)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Return a section of type `cls` from nested plain values, as config.json holds them.

    Raises UserError for a key that it doesn't have, or a value of another type than the setting's.
    """
    if not isinstance(values, dict):
        raise UserError(f"config.json: {cls.__name__} is {values!r:.60}, not an object.")
    # A name that isn't a setting goes to the constructor as well, which refuses it.
    arguments = dict(values)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        is_section = field.default_factory is not dataclasses.MISSING
        if is_section and field.name in values:
            section = typing.cast(type, field.type)
            arguments[field.name] = from_dict(section, values[field.name])
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"config.json: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name nearest to `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def nearest_setting(key: str) -> str:
    """Return "; did you mean X?" for the setting that a wrong key such as `train.max_iters` means,
    or nothing.
    """
    meant = meant_setting(key)
    if meant:
        return f"; did you mean {meant!r}?"
    section_names = [section.section_name for section in _all_sections()]
    return nearest(key, _all_keys() + section_names)


def meant_setting(key: str) -> str:
    """Return the setting that a wrong key means, or "".

    That is one of the same name in another section, or one that another program calls so.
    """
    section_name, _, name = key.rpartition(".")
    elsewhere = [known for known in _all_keys() if known.rpartition(".")[2] == name]
    if elsewhere and section_name:
        # Of several sections that have it, the one with the most similar name.
        return difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.0)[0]
    if elsewhere:
        return elsewhere[0]
    for section in _all_sections():
        for own_name, field in _fields(section).items():
            if name in field.metadata.get("aliases", ()):
                return _key(section, own_name)
    return ""


def _all_keys() -> list[str]:
    """Return the dotted keys of all settings."""
    keys = []
    for section in _all_sections():
        for name, field in _fields(section).items():
            if not dataclasses.is_dataclass(field.type):
                keys.append(_key(section, name))
    return keys


def _all_sections() -> list[type[Section]]:
    """Return the types of all sections, that of the whole config too."""
    return [cls for cls in Section.__subclasses__() if dataclasses.is_dataclass(cls)]


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    """Return the fields of a dataclass by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def _sections_in(section: Any) -> dict[str, Section]:
    """Return the sections inside a section, by name."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {name: value for name, value in values.items() if isinstance(value, Section)}


def _key(cls: type[Section], name: str) -> str:
    """Return the dotted key of a setting, as users type it after --config."""
    return f"{cls.section_name}.{name}" if cls.section_name else name


def _check_name(cls: type[Section], name: str) -> None:
    """Raise UserError for a name that isn't a setting, with the one that may be meant."""
    if name not in _fields(cls):
        key = _key(cls, name)
        raise UserError(f"{key} is not a setting{nearest_setting(key) or '.'}")


def _converted(key: str, value: Any, kind: Any) -> Any:
    """Return a value as a setting of type `kind` holds it.

    Raises UserError where the value is of another type.

    A whole number serves as a float, NumPy's numbers as Python's, a list as a tuple, and a single
    value as a tuple of one (so that a text never counts as a list of its letters, and the command
    line and Python agree). Nothing that could lose a part of the value is converted.
    """
    if typing.get_origin(kind) is tuple:
        entry_kind = typing.get_args(kind)[0]
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(_converted(key, entry, entry_kind) for entry in entries)

    found = _as_kind(value, kind)
    if found is None:
        raise _wrong_type(key, value, kind)
    return found


def _wrong_type(key: str, value: Any, kind: type) -> UserError:
    """Return the error for a value of another type than the setting's."""
    required = _KINDS.get(kind) or f"a {kind.__name__}"
    hint = ""
    if kind is int and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value)}"
    return UserError(f"{key}={value!r:.60} must be {required}, not {type(value).__name__}{hint}.")


def _as_kind(value: Any, kind: type) -> Any:
    """Return a value as one of type `kind`, or None where it isn't one."""
    if isinstance(value, bool):
        # True and False are numbers to Python, but not to us.
        return value if kind is bool else None
    if kind is float and isinstance(value, numbers.Real):
        # An infinite float may come here, which `check` refuses.
        return None if _is_huge(value) else float(value)
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is str or issubclass(kind, Section):
        return value if isinstance(value, kind) else None
    return None


def _is_huge(value: Any) -> bool:
    """Say whether a value is a whole number that no float can hold."""
    return isinstance(value, numbers.Integral) and abs(int(value)).bit_length() > 1000
