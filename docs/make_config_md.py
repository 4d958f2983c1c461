"""Print docs/config.md, the reference of every setting, from the dataclasses."""

import dataclasses
import inspect

from tinylm.config import Config

HEAD = """# Every setting

Written by `python docs/make_config_md.py > docs/config.md` from the dataclasses; a test
holds it to them. Any setting can be overridden: `--config.model.embed_dim=256`. A run is refused
when you resume it with another value of a setting that *decides its numbers*; the others may change
at any time.
"""


def table(section: object, prefix: str) -> str:
    """Return a row for each setting of a section."""
    rows = ["| setting | default | values | decides numbers | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        if field.metadata:
            texts = (
                repr(getattr(section, field.name)),
                str(field.metadata["bounds"]),
                field.metadata["doc"],
            )
            default, bounds, doc = (text.replace("|", "\\|") for text in texts)
            decides = "" if field.metadata["free"] else "yes"
            rows.append(f"| `{prefix}{field.name}` | `{default}` | {bounds} | {decides} | {doc} |")
    return "\n".join(rows)


def reference() -> str:
    """Return the whole page."""
    config = Config()
    parts = [HEAD, f"## Top\n\n{table(config, '')}\n"]
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            about = inspect.getdoc(type(section))
            parts.append(f"## `{field.name}`\n\n{about}\n\n{table(section, field.name + '.')}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
