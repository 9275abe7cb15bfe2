"""Talk to a checkpoint in the terminal: python -m alignjax.chat runs/ppo

Several answer the same prompt in turn, as before and after PPO: python -m alignjax.chat runs/sft runs/ppo

A reply streams as it is decoded; behind it stand its score by the reward model, of a PPO run the one that it was trained
with, and the true score of a prompt of the embedded world. A line is a prompt; /reset forgets what was said, /system TEXT
does too and begins with a system message, /exit or Ctrl-D leaves; Ctrl-C stops a reply, and leaves where none is given. Prompts may
be piped in, one a line.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from alignjax import config as configs
from alignjax import inference, train
from alignjax.algorithms import rewards
from alignjax.config import UserError
from alignjax.data import toy
from alignjax.machine import sharding
from alignjax.machine.compilation_cache import keep_programs
from alignjax.machine.console import say
from alignjax.weights import checkpoint, locations

COMMANDS = "/reset", "/system", "/exit"


class Speaker(NamedTuple):
    """One that answers, with what it remembers."""

    name: str
    model: inference.LoadedModel
    turns: int  # how many earlier exchanges it may see
    messages: list[dict]


def main(argv=None) -> int:
    """The exit code: 0; 2 after a mistake of the user's; 130 after an interrupt before the first prompt."""
    try:
        arguments = parse(argv)
        keep_programs()
        talk(speakers(arguments), judge(arguments), arguments)
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alignjax: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m alignjax.chat",
        allow_abbrev=False,
        description="Talk to checkpoints, with a reward model's score beside each reply.",
    )
    parser.add_argument(
        "run", nargs="+", help="language models: runs, Hugging Face directories or hf://ORG/NAME"
    )
    parser.add_argument(
        "--reward",
        metavar="RUN",
        help="a reward model; default: that of the first PPO run, where it was",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default: 1")
    parser.add_argument("--top_p", type=float, default=0.9, help="default: 0.9")
    parser.add_argument(
        "--max_tokens",
        type=int,
        help="of a reply; default: 256, or a quarter of what the model may read",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same prompts get the same replies; default: 0"
    )
    parser.add_argument(
        "--turns",
        type=int,
        help="how many earlier exchanges are remembered, the oldest go where they don't "
        "fit; default: all, of a run in the embedded world, whose conversations have one turn, none",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=configs.CHOICES["model.dtype"],
        help="default: float32",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        help="devices along the mesh's axis of that name; default: 1",
    )
    parser.add_argument(
        "--chat_template",
        default="",
        choices=configs.CHOICES["chat_template"],
        help="of a checkpoint that has none; default: its own",
    )
    arguments = parser.parse_args(argv)
    if (arguments.turns or 0) < 0:
        raise UserError(f"--turns={arguments.turns} must not be below 0")
    return arguments


def loaded(run: str, arguments) -> inference.LoadedModel:
    mesh = sharding.make_mesh(configs.Mesh(tensor=arguments.tensor))
    return inference.load(
        run,
        dtype=arguments.dtype,
        mesh=mesh,
        chat_template=arguments.chat_template,
        unfinished=True,
    )


def speakers(arguments) -> list[Speaker]:
    """The models that are asked, each said."""
    names = [Path(run).name for run in arguments.run]
    out = []
    for run, name in zip(arguments.run, names, strict=True):
        name = name if names.count(name) == 1 else run
        model, stored = (
            loaded(run, arguments),
            locations.read_config(locations.local_directory(run)),
        )
        if not model.end_tokens:
            raise UserError(
                f"{run}: a language model is wanted, this is a reward model, for --reward"
            )
        alone = not model.uses_chat_template or stored.get("data.train", "").startswith("toy/")
        turns = arguments.turns if arguments.turns is not None else 0 if alone else sys.maxsize
        out.append(Speaker(name, model, turns if model.uses_chat_template else 0, []))
        say(f"{name}: {run}{state(run)}" + ("" if turns else ", each prompt by itself"))
    return out


def state(run: str) -> str:
    """What is to be said of a run that isn't complete."""
    directory = locations.local_directory(run)
    if not locations.is_run(directory) or (directory / "summary.json").exists():
        return ""
    return f", not complete: as it was after step {checkpoint.newest(directory).name}"


def judge(arguments) -> inference.LoadedModel | None:
    """The reward model, said; none is needed."""
    run = arguments.reward
    try:
        for spec in arguments.run if run is None else ():
            directory = locations.local_directory(spec)
            if (
                run is None
                and locations.read_config(directory).get("stage") == "ppo"
                and train.parent_of(directory, "reward")
            ):
                run = str(train.parent_of(directory, "reward"))
        model = loaded(run, arguments) if run else None
    except UserError as error:
        if arguments.reward:
            raise
        say(f"no scores: {error}")
        return None
    if model and model.end_tokens:
        raise UserError(f"--reward {run}: a reward model is wanted, this is a language model")
    say(f"score: by {run}{state(run)}" if model else "no scores: --reward names a reward model")
    return model


def talk(asked: list[Speaker], reward: inference.LoadedModel | None, arguments) -> None:
    """Prompts and replies, until there are no more prompts."""
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # input() then has a history, and the keys of a shell
    for number, line in enumerate(lines()):
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command in COMMANDS:
            for speaker in asked:
                speaker.messages[:] = (
                    [{"role": "system", "content": rest}] if command == "/system" and rest else []
                )
        elif line.startswith("/"):
            say(f"{command}: no such command; there are {', '.join(COMMANDS)}")
        elif line:
            try:
                answered(asked, reward, line, number, arguments)
            except KeyboardInterrupt:
                say(" [stopped, and forgotten]")
            except UserError as error:
                say(f"alignjax: {error}")


def lines() -> Iterator[str]:
    """What is typed, or piped in, until it ends or is interrupted."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not sys.stdin.isatty():
            print(line)  # so that it reads as if it had been typed
        yield line.strip()


def answered(
    asked: list[Speaker], reward: inference.LoadedModel | None, line: str, number: int, arguments
) -> None:
    """All answer a line, and remember it once all have."""
    seen, replies = [], []
    for speaker in asked:
        seen.append(fitting(speaker, line, arguments.max_tokens or speaker.model.max_tokens))
        print(f"{speaker.name}: ", end="", flush=True)
        prompt = seen[-1] if speaker.model.uses_chat_template else line
        pieces = speaker.model.stream(
            prompt,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            max_tokens=arguments.max_tokens,
            seed=arguments.seed,
            number=number,
        )
        replies.append(shown(pieces))
        print(figures(speaker, reward, seen[-1], replies[-1]), flush=True)
    for speaker, messages, reply in zip(asked, seen, replies, strict=True):
        speaker.messages[:] = [*messages, {"role": "assistant", "content": reply.text}]


def shown(pieces) -> inference.Response:
    """Print a reply as it comes."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value


def fitting(speaker: Speaker, line: str, room: int) -> list[dict]:
    """The messages that a line is answered by: without the oldest exchanges where they are too many or too long."""
    system = [m for m in speaker.messages if m["role"] == "system"]
    said = speaker.messages[len(system) :]
    kept, last = said[max(0, len(said) - 2 * speaker.turns) :], {"role": "user", "content": line}
    fit, model = len(kept), speaker.model
    while kept and len(model.encode([[*system, *kept, last]])[0]) + room > model.max_length:
        kept = kept[2:]
    if len(kept) < fit:
        say(
            f"[{speaker.name} has forgotten all but the last {len(kept) // 2} exchanges: it may read {model.max_length} tokens]"
        )
    return [*system, *kept, last]


def figures(
    speaker: Speaker,
    reward: inference.LoadedModel | None,
    messages: list[dict],
    reply: inference.Response,
) -> str:
    """What is told behind a reply."""
    out, prompt = [], messages[-1]["content"]
    if reward:
        same = speaker.model.uses_chat_template and rewards.same_tokens(
            speaker.model.tokenizer, reward.tokenizer
        )
        try:
            (score,) = reward.score([messages], [reply.tokens if same else reply.text])
            out.append(f"score {score:.2f}")
        except UserError as error:
            out.append(f"no {error}")
    if toy.answer(prompt):
        out.append(f"true score {toy.true_score(prompt, reply.text):.2f}")
    if reply.truncated:
        out.append(f"cut off at {len(reply.tokens)} tokens")
    return f"  [{', '.join(out)}]" if out else ""


if __name__ == "__main__":
    sys.exit(main())
