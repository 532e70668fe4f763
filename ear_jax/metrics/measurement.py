"""One measured number with everything needed to read it: spread, interval, how many images, and what to beware of."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A metric's value and its caveats; `to_dict` is what a result file stores beside the protocol.

    Attributes:
        name: What was measured, such as "fid".
        value: The number.
        std: Standard deviation over splits or subsets, where the metric has them.
        interval: 95 % confidence interval of the value, where the metric gives one.
        count: Generated images that went in.
        reference_count: Real images that went in; None where the reference does not say.
        notes: Reasons to distrust the number, as sentences; empty when there are none.
    """

    name: str
    value: float
    std: float | None = None
    interval: tuple[float, float] | None = None
    count: int | None = None
    reference_count: int | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        fields = dataclasses.asdict(self)
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {name: value for name, value in lists.items() if value is not None and value != []}
