"""JSON lines, and what JSON can say of numbers that are not finite."""

import json
import math


def json_lines(rows: list[dict]) -> str:
    """Rows as JSON lines, the last one without its end."""
    return "\n".join(json.dumps(null(row), allow_nan=False) for row in rows)


def null(x):
    """What JSON can say of x: None for a number that is not finite."""
    if isinstance(x, dict):
        return {k: null(v) for k, v in x.items()}
    if isinstance(x, list):
        return [null(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
