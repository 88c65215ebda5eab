"""Write docs/reference/configuration.md from conf/: ``python docs/write_reference.py``."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs/reference/configuration.md"

INTRODUCTION = """\
# Configuration

<!-- written by python docs/write_reference.py -->

Every choice is a file in `conf/GROUP/`. `GROUP=CHOICE` on the command line selects it, `GROUP.FIELD=VALUE` changes
one of its fields. A `conf/` of your own adds to the groups: `--config-dir DIRECTORY`. `--cfg job` prints the composed
configuration.

The defaults below are those of the files. An experiment sets several groups and fields at once.
"""


def header_and_fields(path: Path) -> tuple[str, str]:
    """Return the comment at the head of a YAML file as prose, and the rest of the file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if not line.startswith("# @package")]
    end = next((i for i, line in enumerate(head) if not line.startswith("#")), len(head))
    said = [line.lstrip("# ").strip() for line in head[:end]]
    labelled = [re.match(r"([A-Z]\w+): +(.*)", line) for line in said]
    first = next((i for i, found in enumerate(labelled) if found), len(said))
    comment = " ".join(said[:first])
    for line, found in zip(said[first:], labelled[first:], strict=True):
        comment += f"\n- **{found[1]}**: {found[2]}" if found else f" {line}"
    return comment.replace("\n- ", "\n\n- ", 1), "\n".join(head[end:]).strip()


def section(path: Path, name: str) -> str:
    """Return a choice's section: its name, what it is, its fields."""
    comment, fields = header_and_fields(path)
    return f"### {name}\n\n{comment}\n" + (f"\n```yaml\n{fields}\n```\n" if fields else "")


def page() -> str:
    """Return the page's text."""
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "experiment"))
    parts = [INTRODUCTION]
    for root in ("train", "evaluate", "frontier"):
        parts.append(f"## {root}.yaml\n\n```yaml\n{(CONF / f'{root}.yaml').read_text(encoding='utf-8').strip()}\n```\n")
    for group in (*groups, CONF / "experiment"):
        parts.append(f"## {group.name}\n")
        parts += [section(path, f"{group.name}={path.stem}") for path in sorted(group.glob("*.yaml"))]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
