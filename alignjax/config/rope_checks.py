"""The rules of rotary positions: factors of longrope, lengths that change frequencies."""

import math

from alignjax.config.errors import rule
from alignjax.config.fields import Model


def check_rope(model: Model) -> None:
    """Check the share of heads that is rotated, and the factors of longrope."""
    size = model.rotary_size
    rule(
        0 < model.rope_share <= 1 and size % 2 == 0 and size > 0,
        f"model.rope_share={model.rope_share} of model.head_size={model.head_size} must be an even "
        "number of at least 2",
    )
    rule(
        model.rope_scaling != "dynamic" or size > 2,
        f"model.rope_scaling='dynamic' needs more than {size} rotated numbers of a head",
    )
    count = size // 2 if model.rope_scaling == "longrope" else 0
    for name in ("rope_short_factors", "rope_long_factors"):
        text = getattr(model, name)
        rule(
            is_list_of_positive(text, count),
            f"model.{name}={text!r} must be {count} numbers above 0 with commas between them, for "
            f"model.rope_scaling={model.rope_scaling!r}",
        )


def is_list_of_positive(text: str, count: int) -> bool:
    """Return whether a text lists so many finite numbers above 0, with commas between them."""
    words = text.split(",") if text else []
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return False
    return len(numbers) == count and all(0 < number < math.inf for number in numbers)


def check_extendable(model: Model) -> None:
    """Check that a sequence keeps its frequencies when tokens are added to it.

    With longrope and dynamic scaling, one token more than `rope_original_length` changes how all
    tokens before it are rotated, in all layers. So what is known of them cannot be kept.
    """
    original = model.rope_original_length
    rule(
        not model.rope_varies,
        f"model.max_length={model.max_length}: with model.rope_scaling={model.rope_scaling!r} a "
        f"sequence of more than model.rope_original_length={original} tokens rotates all of them "
        f"otherwise, so tokens cannot be added to it; set max_length to at most {original}",
    )
