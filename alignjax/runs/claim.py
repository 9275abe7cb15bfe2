"""A work directory belongs to one run: check it, claim it, and let its run be made longer."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
from transformers import PreTrainedTokenizerBase

from alignjax import config as configs
from alignjax.algorithms.stage import RunInputs
from alignjax.config import Config, UserError
from alignjax.machine import lock, marker, outputs, processes
from alignjax.machine import workdir as workdirs
from alignjax.weights import bases, checkpoint, locations, roles
from alignjax.weights.imported import IMPORTED_FILE

# What a run that was interrupted while it claimed a directory leaves: it may be claimed anew.
CLAIM_FILES = {marker.NAME, lock.NAME, "tokenizer", IMPORTED_FILE}
# Fields that may change on a resume.
FREE_FIELDS = ("mesh.", "keep_checkpoints", "max_skipped", "ppo.eval_")
# Fields that need not be repeated on a resume: unless they are set, the run's own values count.
KEPT_FIELDS = ("template_date", "special_tokens_in_content")
# What other commands make of a complete run, in its directory.
RESULTS = ("evaluation.json", "calibration.png", "benchmarks", "report.html")


def check_workdir(
    config: Config, workdir: Path, ignore: tuple[str, ...] = (), may_grow: bool = False
) -> None:
    """Check that a work directory is free or holds this run: nothing is overwritten.

    Args:
      config: of the run.
      workdir: its directory.
      ignore: beginnings of further fields that may differ.
      may_grow: whether the config may ask for more steps than the run had.

    Raises:
      UserError: if the directory holds something else; it names what differs.
    """
    if not (workdir / "config.json").exists():
        if workdirs.is_local(workdir):
            lock.check_ours(workdir)
        elif workdir.exists() and {path.name for path in workdir.iterdir()} - CLAIM_FILES:
            raise UserError(
                f"{workdir} is not empty and has no config.json; name another --workdir"
            )
        return
    lock.check_ours(workdir)
    stored = locations.read_config(workdir)
    if may_grow and "steps" in stored and config.steps != stored["steps"]:
        check_longer(config, workdir, stored["steps"])
        ignore = (*ignore, "steps")
    unset = tuple(name for name in KEPT_FIELDS if not getattr(config, name))
    if config.model.remat == "auto":  # the run's own level counts
        unset = (*unset, "model.remat")
    differences = configs.difference(config, stored, (*FREE_FIELDS, *unset, *ignore))
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differences)}); "
            "name another --workdir"
        )


def check_longer(config: Config, workdir: Path, stored_steps: int) -> None:
    """Raise UserError unless the config asks for more steps than the run in `workdir` has."""
    steps = checkpoint.final_step(workdir) or stored_steps
    if config.steps <= steps or not steps:
        held = f"{steps} steps" if steps else "steps=0 (one pass)"
        raise UserError(
            f"{workdir} holds a run of {held}, and steps={config.steps} is not more; a run can be "
            "made longer, not shorter: name another --workdir"
        )


def is_complete(config: Config, workdir: Path) -> bool:
    """Return whether a directory holds a complete run with as many steps as the config has."""
    if not (workdir / "summary.json").exists():
        return False
    return marker.read_object(workdir / "config.json").get("steps") == config.steps


def claim_workdir(config: Config, inputs: RunInputs, workdir: Path) -> None:
    """Claim a new directory for a run: its marker, what it begins with, and config.json.

    One process writes. A directory that the run has claimed before gets only what an older
    version did not write.
    """
    if jax.process_index() == 0:
        is_new = not (workdir / "config.json").exists()
        entries = marker.read(workdir) or lock.new_run()
        if is_new:
            entries["parents"] = ends_of(inputs.parents)
            if config.lora.rank:
                heads = roles.trained_heads(config.stage)
                entries[bases.BASES] = bases.record(config, workdir, inputs.parents, heads)
        elif "run" not in marker.read(workdir):
            entries |= stored_id(workdir)
        if entries != marker.read(workdir):
            outputs.write_text(workdir / marker.NAME, marker.dumps(entries))
        if is_new:
            save_tokenizer(inputs.tokenizer, workdir)
            imported = inputs.imported
            if imported.config or imported.generation:
                outputs.write_text(workdir / IMPORTED_FILE, imported.to_json())
            outputs.write_text(workdir / "config.json", configs.to_json(config))
    processes.wait_for_all("claim")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, workdir: Path) -> None:
    """Write the tokenizer to a work directory that is claimed, all of it or nothing."""
    target = workdir / "tokenizer"
    if not workdirs.is_local(workdir):
        with workdirs.staging(target) as staging:
            tokenizer.save_pretrained(staging.local)
        return
    temporary = outputs.temporary_beside(target)
    with outputs.writing(target):
        try:
            tokenizer.save_pretrained(temporary)
            # The directory was claimed before, so a tokenizer in it is an interrupted claim's.
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def stored_id(workdir: Path) -> dict[str, str]:
    """Return the id in the newest checkpoint of a run that has lost its marker, {} if none."""
    steps = (workdir / "checkpoints").glob("*") if (workdir / "checkpoints").exists() else ()
    numbered = sorted((path for path in steps if path.name.isdecimal()), key=lambda p: int(p.name))
    if not numbered:
        return {}
    run = checkpoint.read_checksums(numbered[-1]).get(checkpoint.ORIGIN, {}).get("run")
    return {"run": run} if run else {}


# --------------------------------------------------------------------------------------- parents


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """The last checkpoint of a run: what a child of the run has started from."""

    step: int
    contents: str  # a hash of its arrays


def ends_of(parents: dict[str, Path]) -> dict[str, dict]:
    """Return {role: `End` as a dictionary} of the parents that are runs."""
    return {
        role: dataclasses.asdict(end_of(directory))
        for role, directory in parents.items()
        if locations.is_run(directory)
    }


def end_of(run: Path) -> End:
    """Return the end of a run that is complete."""
    path = checkpoint.newest(run)
    return End(step=int(path.name), contents=checkpoint.contents_id(path))


def check_same_parents(workdir: Path, parents: dict[str, Path]) -> None:
    """Raise UserError if a run began from other parents than those that are there now.

    A resume reads some parents anew, so it would not continue the same run.
    """
    recorded = marker.read(workdir).get("parents", {})
    for role, end in ends_of(parents).items():
        parent = f"{configs.field_of_role(role)}={parents[role]}"
        before = recorded.get(role, end)
        if before["step"] != end["step"]:
            raise UserError(
                f"{workdir} began from step {before['step']} of {parent}, "
                f"which has {end['step']} steps now; name another --workdir"
            )
        if before != end:
            raise UserError(
                f"{workdir} began from other parameters than {parent} has "
                "now; name another --workdir"
            )


# ---------------------------------------------------------------------------------- longer runs


def prolong(config: Config, workdir: Path, say: Callable[[str], object]) -> None:
    """Let a run go on to the steps that the config asks for, if it was to have fewer.

    Its summary and its responses are removed: the run is not complete any more, and writes them
    anew at its new end. What else was made of its earlier end is named.
    """
    stored = marker.read_object(workdir / "config.json")
    if stored.get("steps", config.steps) == config.steps:
        return
    steps = checkpoint.final_step(workdir)
    if steps is not None:
        say(f"{config.name}: {workdir} has {steps} steps and goes on to {config.steps}")
        report_results(config, workdir, steps, say)
    if "cosine" in (config.optimiser.schedule, config.value_optimiser.schedule):
        say(
            f"{config.name}: from here on the learning rate follows a cosine over {config.steps} "
            "steps, so it is higher than at the end of the shorter one"
        )
    if jax.process_index() == 0:
        for name in ("summary.json", "responses.jsonl"):
            with outputs.writing(workdir / name):
                (workdir / name).unlink(missing_ok=True)
        changed = stored | {"steps": config.steps}
        outputs.write_text(workdir / "config.json", json.dumps(changed, indent=1))
    processes.wait_for_all("prolong")


def report_results(config: Config, workdir: Path, steps: int, say: Callable[[str], object]) -> None:
    """Name the files and the runs that were made of a run's end at `steps`."""
    names = [name for name in RESULTS if (workdir / name).exists()]
    names += [str(child) for child in children(workdir)]
    if names:
        say(f"{config.name}: made of its {steps} steps, and not changed: {', '.join(names)}")


def children(workdir: Path) -> list[Path]:
    """Return the runs beside a local run that began from its end."""
    if not workdirs.is_local(workdir):
        return []
    end = dataclasses.asdict(end_of(workdir))
    made = []
    for path in sorted(workdir.absolute().parent.glob(f"*/{marker.NAME}")):
        parents = marker.read(path.parent).get("parents", {})
        if path.parent != workdir.absolute() and end in parents.values():
            made.append(path.parent)
    return made
