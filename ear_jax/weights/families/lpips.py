"""Arrays of LPIPS v0.1 with VGG16 in its public forms, and the names that the project's distance takes.

The forms: the whole model as the `lpips` package saves it, whose names are ours; and torchvision's VGG16 with the
package's five linear layers, which are two public files. Layouts are the published ones throughout.
"""

from collections.abc import Iterable

from ear_jax.weights.entries import Entry, same

# Convolutions of each of the five slices, by their index among VGG16's features.
_SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def entries(names: Iterable[str]) -> list[Entry]:
    """Return the entries of the form that arrays of these names have: torchvision's if it has `features.0.weight`.

    What the forms hold besides (VGG16's classifier, copies of the linear layers, the input scaling) has no entry.
    """
    prefix = "features" if "features.0.weight" in set(names) else None
    matched = []
    for number, indices in enumerate(_SLICES, start=1):
        for index in indices:
            ours = f"net.slice{number}.{index}"
            theirs = f"{prefix}.{index}" if prefix else ours
            matched += [same(f"{theirs}.weight", f"{ours}.weight"), same(f"{theirs}.bias", f"{ours}.bias")]
        linear = f"lin{number - 1}.model.1.weight"
        matched.append(same(linear, linear))
    return matched
