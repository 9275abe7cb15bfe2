"""The chat: replies and their scores, what is remembered and forgotten, and how it ends."""

import io
import shutil
import sys

import pytest
from runs import Crash

from alignjax import chat, inference
from alignjax.evals import best_of

PROMPT = "copy : cat box"


def session(capsys, monkeypatch, text, *arguments) -> list[str]:
    """Run a chat with this text on standard input, and return the lines that it prints."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert chat.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def calls(monkeypatch):
    """Replace every model's replies by "ok" in two pieces; return (prompt, settings) of each."""
    calls = []

    def stream(self, prompt, **settings):
        calls.append((prompt, settings))
        yield "o"
        if prompt != "a" and prompt[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield "k"
        tokens = self.encode(["ok"])[0][:2]
        return inference.Response("ok", tokens, len(calls) % 2 == 0)

    monkeypatch.setattr(inference.LoadedModel, "stream", stream)
    return calls


def test_before_and_after_ppo_with_scores(chain, capsys, monkeypatch):
    sft = chain.runs / "sft-tiny"
    ppo = chain.runs / "ppo-tiny"
    settings = ("--temperature", 0, "--max_tokens", 10)
    lines = session(capsys, monkeypatch, f"{PROMPT}\n", sft, ppo, *settings)
    assert lines[:4] == [
        f"sft-tiny: {sft}, each prompt on its own",
        f"ppo-tiny: {ppo}, each prompt on its own",
        f"score: by {chain.runs / 'rm-tiny'}",
        f"> {PROMPT}",
    ]
    reward = inference.load(chain.runs / "rm-tiny")
    for run in (sft, ppo):
        (reply,) = inference.load(run).generate([PROMPT], temperature=0.0, max_tokens=10)
        (score,) = reward.score([PROMPT], [reply.tokens])
        facts = f"score {score:.2f}, true score {chat.toy.true_score(PROMPT, reply.text):.2f}"
        if reply.truncated:
            facts += ", cut off at 10 tokens"
        # A reply may have any characters that end lines.
        expected = "\n".join(f"{run.name}: {reply.text}  [{facts}]".splitlines())
        assert f"\n{expected}\n" in "\n".join(lines)


def test_a_conversation_continues_until_it_is_too_long(chain, capsys, monkeypatch, calls):
    def count_messages(self, prompts, responses):
        return [len(prompts[0])]

    monkeypatch.setattr(inference.LoadedModel, "score", count_messages)
    words = " ".join(["cat"] * 9)
    text = "a\nb\n/nothing\n/reset\nc\n/system d\ne\nstop\n" + f"{words}\n" * 3 + "/exit\nnever\n"
    reward = chain.runs / "pmp-tiny"
    arguments = (chain.runs / "ppo-tiny", "--turns", 9, "--seed", 4, "--reward", reward)
    lines = session(capsys, monkeypatch, text, *arguments)
    # Each prompt as pairs of a role's first letter and the content.
    prompts = [[(turn["role"][0], turn["content"]) for turn in prompt] for prompt, _ in calls]
    system = ("s", "d")
    reply = ("a", "ok")
    long = ("u", words)
    assert prompts == [
        [("u", "a")],
        [("u", "a"), reply, ("u", "b")],
        [("u", "c")],
        [system, ("u", "e")],
        [system, ("u", "e"), reply, ("u", "stop")],
        [system, ("u", "e"), reply, long],
        [system, long, reply, long],
        [system, long, reply, long],
    ]
    assert [settings["number"] for _, settings in calls] == [0, 1, 4, 6, 7, 8, 9, 10]
    assert {settings["seed"] for _, settings in calls} == {4}
    assert f"score: by {reward}" in lines
    assert "ppo-tiny: o [stopped and forgotten]" in lines
    assert "/nothing: no such command; the commands are /reset, /system, /exit" in lines
    forgets = "[ppo-tiny forgets all but the last 1 exchanges, because its max_length is 64 tokens]"
    assert lines.count(forgets) == 2
    replies = [line for line in lines if line.startswith("ppo-tiny: ok")]
    scores = [line.removeprefix("ppo-tiny: ok  [")[:10] for line in replies]
    stopped = 4
    answered = [prompt for number, prompt in enumerate(prompts) if number != stopped]
    assert scores == [f"score {len(prompt)}.00" for prompt in answered]
    assert "> never" not in lines


def test_by_default_a_run_of_the_embedded_world_sees_each_prompt_on_its_own(
    chain, capsys, monkeypatch, calls
):
    long = "cat " * 60
    session(capsys, monkeypatch, f"a\n{long}\nb", chain.runs / "ppo-tiny")
    assert [len(prompt) for prompt, _ in calls] == [1, 1, 1]
    assert [prompt[0]["content"] for prompt, _ in calls] == ["a", long.strip(), "b"]


def test_incomplete_runs_and_missing_reward_models_are_reported(
    chain, capsys, monkeypatch, tmp_path, calls
):
    for name in ("lm-tiny", "sft-tiny", "ppo-tiny"):
        shutil.copytree(chain.runs / name, tmp_path / name)
    (tmp_path / "ppo-tiny" / "summary.json").unlink()
    lines = session(capsys, monkeypatch, "a\n", tmp_path / "ppo-tiny")
    assert lines[0].endswith(
        "ppo-tiny, not complete: the checkpoint after step 4, each prompt on its own"
    )
    assert lines[1].startswith("no scores: ")
    assert "rm-tiny: no config.json there" in lines[1]
    assert lines[3] == "ppo-tiny: ok"
    lines = session(capsys, monkeypatch, "", tmp_path / "sft-tiny")
    assert lines[1] == "no scores: name a reward model with --reward"
    session(capsys, monkeypatch, "a\n", tmp_path / "lm-tiny")
    last_prompt, _ = calls[-1]
    assert last_prompt == "a"  # plain text


def test_user_errors_are_reported_in_one_line(chain, capsys):
    for arguments, message in (
        ((chain.runs / "rm-tiny",), "rm-tiny: this is a reward model, but a language model"),
        (("nowhere",), "nowhere: no config.json there"),
        (("x", "--turns", "-1"), "--turns=-1"),
        (
            (chain.runs / "sft-tiny", "--reward", chain.runs / "lm-tiny"),
            "lm-tiny: this is a language model, but a reward model is needed",
        ),
        ((chain.runs / "sft-tiny", "--tensor", 3), "must make 8 devices"),
    ):
        assert chat.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("alignjax: ") and error.count("\n") == 1 and message in error


def test_a_prompt_that_is_too_long_is_reported_and_the_next_one_answered(
    chain, capsys, monkeypatch
):
    programs = []

    def run(self, program, *_, **__):
        programs.append(program)
        raise Crash

    monkeypatch.setattr(inference.LoadedModel, "run", run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat " * 60 + "\na\n"))
    with pytest.raises(Crash):
        chat.main([str(chain.runs / "sft-tiny")])
    assert "alignjax: prompt 0 has 6" in capsys.readouterr().out
    assert programs == [inference.BEGIN]


def test_the_best_of_several_replies(chain, capsys, monkeypatch):
    sft = chain.runs / "sft-tiny"
    rm = chain.runs / "rm-tiny"
    settings = ("--max_tokens", 10, "--best_of", 3, "--reward", rm)
    lines = session(capsys, monkeypatch, f"/reset\n{PROMPT}\n", sft, *settings)
    (best,) = best_of.generate(
        inference.load(sft), inference.load(rm), [PROMPT], n=3, max_tokens=10, seed=1
    )
    reply = f"\nsft-tiny: {best.response.text}  [score {best.score:.2f}, true score "
    assert "\n".join(reply.splitlines()) in "\n".join(lines)
    assert chat.main([str(sft), "--best_of", "3"]) == 2
    assert "--best_of=3 needs a reward model: --reward RUN" in capsys.readouterr().err
    assert chat.main([str(sft), "--best_of", "3", "--temperature", "0"]) == 2
    assert "best of 3: temperature=0.0 gives 3 times the same" in capsys.readouterr().err
