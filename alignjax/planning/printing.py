"""Plans as text."""

from collections.abc import Callable
from dataclasses import dataclass

from alignjax.planning.cost import ProgramCost
from alignjax.planning.plans import Estimate, Plan


@dataclass(frozen=True)
class Column:
    """A column of a plan's table."""

    title: str
    width: int
    text: Callable[[ProgramCost], str]


COLUMNS = (
    Column("program", 22, lambda row: row.program),
    Column("calls", 6, lambda row: str(row.calls)),
    Column("arguments", 10, lambda row: f"{row.arguments:.2f}"),
    Column("temporaries", 12, lambda row: f"{row.temporaries:.2f}"),
    Column("peak", 8, lambda row: f"{row.peak:.2f}"),
    Column("TFLOP", 10, lambda row: f"{row.flops / 1e12:.4g}"),
    Column("GB moved", 10, lambda row: f"{row.moved / 1e9:.4g}"),
    Column("GB sent", 9, lambda row: f"{row.sent / 1e9:.4g}"),
    Column("floor, s", 10, lambda row: f"{row.floor:.3g}"),
    Column("bound by", 10, lambda row: row.bound),
    Column("compiled, s", 12, lambda row: f"{row.seconds:.0f}"),
)


def format_plan(plan: Plan) -> str:
    """Return a plan as text: a table of its programs, what is resident, and the verdict."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    if plan.rollout_tensor:
        mesh += f"; rollout over tensor {plan.rollout_tensor}"
    resident = " + ".join(f"{name} {size:.2f}" for name, size in plan.resident.items())
    logits = [f"{row.program} {row.logits}" for row in plan.rows if row.logits]
    head = format_cells([column.title for column in COLUMNS])
    rule = "-" * len(head)
    lines = [
        f"{plan.name} on {plan.devices} x {plan.kind} ({plan.topology}), mesh: {mesh}",
        f"remat {plan.remat}, microbatches of {plan.microbatch_tokens} tokens; "
        "every example as long as it may be",
        "GiB and GB of a device, TFLOP of all; calls in a step; "
        "floor of a call, at the chip's published rates",
        "",
        head,
        rule,
        *map(format_row, plan.rows),
        rule,
        f"resident: {resident} = {sum(plan.resident.values()):.2f} GiB; "
        f"a checkpoint: {plan.checkpoint:.1f} GiB in all",
        f"a step takes at least {plan.floor:.3g} s",
        f"arrays of tokens x vocabulary: {'; '.join(logits) or 'none'}",
        *([plan.remat_choice] if plan.remat_choice else []),
        *(f"not divided: {note}" for note in plan.notes),
        verdict(plan),
    ]
    return "\n".join(lines)


def format_row(row: ProgramCost) -> str:
    cells = format_cells([column.text(row) for column in COLUMNS])
    return cells if row.fits else f"{cells}  does not fit"


def format_cells(texts: list[str]) -> str:
    """Return the cells of one line, the first aligned on the left and the others on the right."""
    first, *others = COLUMNS
    cells = [f"{text:>{column.width}}" for text, column in zip(texts[1:], others, strict=True)]
    return f"{texts[0]:<{first.width}}" + "".join(cells)


def verdict(plan: Estimate) -> str:
    """Return in one line whether a run fits, and by how much."""
    spare = plan.memory - plan.peak
    if plan.fits:
        return f"fits: {spare:.1f} of {plan.memory:.1f} GiB to spare at the peak, {plan.peak_of}"
    return (
        f"does not fit: {plan.peak_of} needs {plan.peak:.1f} of {plan.memory:.1f} GiB, "
        f"{-spare:.1f} too much"
    )


def format_estimates(estimates: list[Estimate]) -> str:
    """Return one line for each layout that a search has tried, the best first."""
    return "\n".join(map(format_estimate, estimates))


def format_estimate(estimate: Estimate) -> str:
    sizes = " x ".join(map(str, estimate.mesh.values()))
    rollout = f", rollout_tensor {estimate.rollout_tensor}" if estimate.rollout_tensor else ""
    least = f"; at least {estimate.floor:.3g} s a step" if estimate.fits else ""
    return (
        f"{estimate.topology}, mesh {sizes}{rollout}, remat {estimate.remat}, "
        f"microbatches of {estimate.microbatch_tokens}: {verdict(estimate)}{least}"
    )
