"""The text of card.md: what a model is, what it was trained on, what was measured, how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_CLASSES_SHOWN = 20


def compose(
    config_dict: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    class_names: Sequence[str],
    facts: Mapping[str, Any],
    has_picture: bool,
) -> str:
    """Compose the card in Markdown.

    `facts` maps section titles to a text or to a mapping that becomes a two-column table; nothing is stated that was
    not passed in. Parameter counts come from the tensors.
    """
    name = str(config_dict.get("name", "model"))
    lines = [f"# {name}", ""]
    kind = "class-conditional image generator" if "generator" in tensors else "image tokenizer"
    lines += [f"An `ear_jax` {kind}{_classes(class_names)}{_image_side(config_dict)}.", ""]
    if has_picture:
        lines += ["![samples](samples.png)", ""]
    lines += ["## Parts", ""]
    lines += _table({part: f"{sum(v.size for v in named.values()):,} values" for part, named in tensors.items()})
    for title, fact in facts.items():
        lines += [f"## {title[:1].upper()}{title[1:]}", ""]
        lines += _table(fact) if isinstance(fact, Mapping) else [str(fact), ""]
    lines += ["## Classes", "", _class_list(class_names), ""]
    lines += ["## Load", "", "```python", *_loading("generator" in tensors), "```", ""]
    return "\n".join(lines)


def _image_side(config_dict: Mapping[str, Any]) -> str:
    data = config_dict.get("data")
    side = data.get("image_px") if isinstance(data, Mapping) else None
    return f" at {side} x {side} pixels" if side else ""


def _table(rows: Mapping[str, Any]) -> list[str]:
    cells = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return ["| | |", "|---|---|", *cells, ""]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _class_list(names: Sequence[str]) -> str:
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:_CLASSES_SHOWN]))
    rest = len(names) - _CLASSES_SHOWN
    return f"{shown}, and {rest} more in config.json" if rest > 0 else shown


def _loading(has_generator: bool) -> list[str]:
    lines = ["import ear_jax", "from ear_jax.folders.pictures import save_grid", 'model = ear_jax.load("THIS_FOLDER")']
    if has_generator:
        return [*lines, "images = model.sample(labels=[0, 0, 0, 0], seed=0)", 'save_grid("grid.png", images)']
    return [*lines, "tokens = model.encode(images)", 'save_grid("grid.png", model.decode(tokens))']


def _classes(class_names: Sequence[str]) -> str:
    return f" for {len(class_names)} classes" if class_names else ""
