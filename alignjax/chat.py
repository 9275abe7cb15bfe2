"""Talk to a checkpoint in the terminal: python -m alignjax.chat runs/ppo

Several models answer the same prompt in turn, for example those before and after PPO:

    python -m alignjax.chat runs/sft runs/ppo

A reply streams as it is decoded. It is followed by its score by the reward model (for a PPO run,
the one that it was trained with), and by its true score if the prompt belongs to the embedded
world. With --best_of N a reply is the best of N under the reward model, and is printed whole. Each
line is a prompt, except for these:

    /reset          forgets the conversation
    /system TEXT    forgets the conversation, and starts a new one with a system message
    /exit, Ctrl-D   leaves the chat

Ctrl-C stops a reply; where there is none to stop, it leaves the chat. Prompts may also be piped
in, one on each line.
"""

import argparse
import functools
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignjax import config as configs
from alignjax import inference
from alignjax.config import UserError
from alignjax.data import toy
from alignjax.evals import best_of
from alignjax.machine import sharding
from alignjax.machine.arguments import Parser
from alignjax.machine.compilation_cache import keep_programs
from alignjax.machine.console import leave, run_command, say
from alignjax.runs import lineage
from alignjax.weights import checkpoint, locations

COMMANDS = ("/reset", "/system", "/exit")
UNLIMITED = sys.maxsize  # earlier exchanges


class Speaker:
    """A model that answers, and what it remembers of the conversation.

    Attributes:
        turns: how many earlier exchanges it may see.
        messages: the conversation so far, without exchanges that had to be forgotten.
    """

    def __init__(self, name: str, model: inference.LoadedModel, turns: int):
        self.name = name
        self.model = model
        self.turns = turns
        self.messages: list[dict] = []

    def reset(self, system: str = "") -> None:
        """Forget the conversation, and start a new one with a system message if there is one."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def messages_for(self, line: str, max_tokens: int) -> list[dict]:
        """Return the messages to be answered: what is remembered, and the line.

        The oldest exchanges are left out if there are too many of them, or if they would leave no
        space for a reply of `max_tokens`. The latter is reported.
        """
        system = [message for message in self.messages if message["role"] == "system"]
        exchanges = self.messages[len(system) :]
        recent = exchanges[max(0, len(exchanges) - 2 * self.turns) :]
        prompt = {"role": "user", "content": line}
        kept = recent
        while kept and not self.has_space([*system, *kept, prompt], max_tokens):
            kept = kept[2:]
        if len(kept) < len(recent):
            say(
                f"[{self.name} forgets all but the last {len(kept) // 2} exchanges, because its "
                f"max_length is {self.model.max_length} tokens]"
            )
        return [*system, *kept, prompt]

    def has_space(self, messages: list[dict], max_tokens: int) -> bool:
        """Return whether the model can read these messages and a reply of `max_tokens`."""
        (tokens,) = self.model.encode([messages])
        return len(tokens) + max_tokens <= self.model.max_length


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat and return its exit code.

    It is 0, or one of `machine.failures`; an interrupt after the first prompt gives 0.
    """
    return run_command(functools.partial(run_chat, argv))


def run_chat(argv: Sequence[str] | None) -> None:
    """Load the models and talk to them."""
    arguments = parse_arguments(argv)
    keep_programs()
    speakers = load_speakers(arguments)
    reward = load_reward(arguments)
    if arguments.best_of > 1 and reward is None:
        raise UserError(f"--best_of={arguments.best_of} needs a reward model: --reward RUN")
    talk(speakers, reward, arguments)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="python -m alignjax.chat",
        description="Talk to checkpoints, with a reward model's score beside each reply.",
    )
    parser.add_argument(
        "run", nargs="+", help="language models: runs, Hugging Face directories or hf://ORG/NAME"
    )
    parser.add_argument(
        "--reward",
        metavar="RUN",
        help="a reward model; default: the one of the first PPO run, at its original place",
    )
    parser.add_argument(
        "--best_of",
        type=int,
        default=1,
        metavar="N",
        help="print the best of N replies under the reward model, once all of them are complete; "
        "default: 1",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default: 1")
    parser.add_argument("--top_p", type=float, default=0.9, help="default: 0.9")
    parser.add_argument(
        "--max_tokens",
        type=int,
        help="most tokens of a reply; default: 256, or a quarter of the model's max_length",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same prompts get the same replies; default: 0"
    )
    parser.add_argument(
        "--turns",
        type=int,
        help="how many earlier exchanges a model sees, fewer if they do not fit; default: all, "
        "but none for a run in the embedded world, where every conversation has one turn",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=configs.CHOICES["model.dtype"],
        help="type of the computation; default: float32",
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
        help="template for a checkpoint that has none; default: the checkpoint's own",
    )
    arguments = parser.parse_args(argv)
    if arguments.turns is not None and arguments.turns < 0:
        raise UserError(f"--turns={arguments.turns} must not be below 0")
    best_of.check(arguments.best_of, arguments.temperature)
    return arguments


def load_speakers(arguments: argparse.Namespace) -> list[Speaker]:
    """Load the language models, and report each."""
    names = [Path(run).name for run in arguments.run]
    speakers = []
    for run, name in zip(arguments.run, names, strict=True):
        is_unique = names.count(name) == 1
        speakers.append(load_speaker(run, name if is_unique else run, arguments))
    return speakers


def load_speaker(run: str, name: str, arguments: argparse.Namespace) -> Speaker:
    """Load one language model, and report it."""
    model = load_model(run, arguments)
    if not model.ends:
        raise UserError(
            f"{run}: this is a reward model, but a language model is needed; use it with --reward"
        )
    turns = remembered_turns(run, model, arguments)
    say(f"{name}: {run}{progress_of(run)}" + ("" if turns else ", each prompt on its own"))
    return Speaker(name, model, turns if model.uses_chat_template else 0)


def remembered_turns(run: str, model: inference.LoadedModel, arguments: argparse.Namespace) -> int:
    """Return how many earlier exchanges a model may see."""
    if arguments.turns is not None:
        return arguments.turns
    stored = locations.read_config(locations.local_directory(run))
    is_embedded_world = stored.get("data.train", "").startswith("toy/")
    has_one_turn = is_embedded_world or not model.uses_chat_template
    return 0 if has_one_turn else UNLIMITED


def load_model(run: str, arguments: argparse.Namespace) -> inference.LoadedModel:
    """Load a model, which may belong to a run that is not complete."""
    return inference.load(
        run,
        dtype=arguments.dtype,
        mesh=sharding.make_mesh(configs.Mesh(tensor=arguments.tensor)),
        chat_template=arguments.chat_template,
        unfinished=True,
    )


def progress_of(run: str) -> str:
    """Return what to report of a run that is not complete; empty for any other model."""
    directory = locations.local_directory(run)
    if not locations.is_run(directory) or (directory / "summary.json").exists():
        return ""
    return f", not complete: the checkpoint after step {checkpoint.newest(directory).name}"


def load_reward(arguments: argparse.Namespace) -> inference.LoadedModel | None:
    """Load the reward model, and report it; return None if there is none."""
    run = arguments.reward
    try:
        if run is None:
            run = trained_with(arguments.run)
        model = load_model(run, arguments) if run else None
    except UserError as error:
        if arguments.reward:
            raise
        say(f"no scores: {error}")
        return None
    if model is None:
        say("no scores: name a reward model with --reward")
        return None
    if model.ends:
        raise UserError(f"--reward {run}: this is a language model, but a reward model is needed")
    say(f"score: by {run}{progress_of(run)}")
    return model


def trained_with(runs: list[str]) -> str | None:
    """Return the reward model of the first PPO run that has one."""
    for run in runs:
        directory = locations.local_directory(run)
        if locations.read_config(directory).get("stage") != "ppo":
            continue
        parent = lineage.parent_of(directory, "reward")
        if parent:
            return str(parent)
    return None


def talk(
    speakers: list[Speaker], reward: inference.LoadedModel | None, arguments: argparse.Namespace
) -> None:
    """Read prompts and print replies, until there are no more prompts."""
    if importlib.util.find_spec("readline"):
        # This gives input() a history and the keys of a shell.
        importlib.import_module("readline")
    for number, line in enumerate(read_lines()):
        command = line.split(" ", 1)[0]
        text = line[len(command) + 1 :]
        if command == "/exit":
            return
        if command in COMMANDS:
            for speaker in speakers:
                speaker.reset(system=text if command == "/system" else "")
        elif line.startswith("/"):
            say(f"{command}: no such command; the commands are {', '.join(COMMANDS)}")
        elif line:
            try:
                answer(speakers, reward, line, number, arguments)
            except KeyboardInterrupt:
                say(" [stopped and forgotten]")
            except UserError as error:
                say(f"alignjax: {error}")


def read_lines() -> Iterator[str]:
    """Yield the lines that are typed or piped in, until the input ends or is interrupted.

    A line that is not UTF-8 is reported and left out.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        # One such line would otherwise end the chat, and take the lines behind it along.
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not sys.stdin.isatty():
            print(line)  # so the output looks as if it had been typed
        if is_unicode(line):
            yield line.strip()
        else:
            say("[this line is not UTF-8, and was not sent]")


def is_unicode(text: str) -> bool:
    """Return whether a text is without halves of surrogate pairs, which stand for odd bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def answer(
    speakers: list[Speaker],
    reward: inference.LoadedModel | None,
    line: str,
    number: int,
    arguments: argparse.Namespace,
) -> None:
    """Let all models answer a line; they remember it only after all of them have answered."""
    conversations = []
    for speaker in speakers:
        max_tokens = arguments.max_tokens or speaker.model.max_tokens
        messages = speaker.messages_for(line, max_tokens)
        print(f"{speaker.name}: ", end="", flush=True)
        prompt = messages if speaker.model.uses_chat_template else line
        if arguments.best_of == 1:
            reply = stream_reply(speaker.model, prompt, number, arguments)
        else:
            reply = best_reply(speaker.model, reward, prompt, number, arguments)
        print(describe(speaker, reward, messages, reply), flush=True)
        conversations.append([*messages, {"role": "assistant", "content": reply.text}])
    for speaker, messages in zip(speakers, conversations, strict=True):
        speaker.messages = messages


def stream_reply(
    model: inference.LoadedModel,
    prompt: inference.Prompt,
    number: int,
    arguments: argparse.Namespace,
) -> inference.Response:
    """Print the reply to the prompt of this number as it is decoded, and return it."""
    pieces = model.stream(
        prompt,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        number=number,
    )
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value


def best_reply(
    model: inference.LoadedModel,
    reward: inference.LoadedModel,
    prompt: inference.Prompt,
    number: int,
    arguments: argparse.Namespace,
) -> inference.Response:
    """Print the best of several replies under the reward model, and return it."""
    (best,) = best_of.generate(
        model,
        reward,
        [prompt],
        n=arguments.best_of,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed + number,
    )
    print(best.response.text, end="", flush=True)
    return best.response


def describe(
    speaker: Speaker,
    reward: inference.LoadedModel | None,
    messages: list[dict],
    reply: inference.Response,
) -> str:
    """Return what is printed after a reply: its scores, and whether it was cut off."""
    facts = []
    if reward:
        facts.append(describe_score(speaker.model, reward, messages, reply))
    prompt = messages[-1]["content"]
    if toy.answer(prompt):
        facts.append(f"true score {toy.true_score(prompt, reply.text):.2f}")
    if reply.truncated:
        facts.append(f"cut off at {len(reply.tokens)} tokens")
    return f"  [{', '.join(facts)}]" if facts else ""


def describe_score(
    model: inference.LoadedModel,
    reward: inference.LoadedModel,
    messages: list[dict],
    reply: inference.Response,
) -> str:
    """Return the reward model's score of a reply as text, or why there is none."""
    response = best_of.as_read_by(reward, model, reply)
    try:
        (score,) = reward.score([messages], [response])
    except UserError as error:
        return f"no {error}"
    return f"score {score:.2f}"


if __name__ == "__main__":
    leave(main())
