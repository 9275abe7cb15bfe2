"""The chat: what is printed of replies and their scores, what is remembered and forgotten, and how it ends."""

import io
import shutil
import sys

import pytest

from alignjax import chat, inference

PROMPT = "copy : cat box"


def session(capsys, monkeypatch, text, *arguments) -> list[str]:
    """The lines that a chat prints, given these on standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert chat.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def heard(monkeypatch):
    """What the models are asked, by a stand-in that says "ok" in two pieces."""
    asked = []

    def stream(self, prompt, **settings):
        asked.append((prompt, settings))
        yield "o"
        if prompt != "a" and prompt[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield "k"
        return inference.Response("ok", self.encode(["ok"])[0][:2], len(asked) % 2 == 0)

    monkeypatch.setattr(inference.LoadedModel, "stream", stream)
    return asked


def test_before_and_after_ppo_with_scores(chain, capsys, monkeypatch):
    sft, ppo = (chain[0] / name for name in ("sft-tiny", "ppo-tiny"))
    how = "--temperature", 0, "--max_tokens", 10
    found = session(capsys, monkeypatch, f"{PROMPT}\n", sft, ppo, *how)
    assert found[:4] == [
        f"sft-tiny: {sft}, each prompt by itself",
        f"ppo-tiny: {ppo}, each prompt by itself",
        f"score: by {chain[0] / 'rm-tiny'}",
        f"> {PROMPT}",
    ]
    reward = inference.load(chain[0] / "rm-tiny")
    for run in (sft, ppo):
        (reply,) = inference.load(run).generate([PROMPT], temperature=0.0, max_tokens=10)
        (score,) = reward.score([PROMPT], [reply.tokens])
        figures = f"score {score:.2f}, true score {chat.toy.true_score(PROMPT, reply.text):.2f}"
        figures += ", cut off at 10 tokens" if reply.truncated else ""
        assert f"\n{run.name}: {reply.text}  [{figures}]\n" in "\n".join(found)


def test_a_conversation_goes_on_until_it_is_too_long(chain, capsys, monkeypatch, heard):
    ppo, words = chain[0] / "ppo-tiny", " ".join(["cat"] * 9)
    monkeypatch.setattr(
        inference.LoadedModel, "score", lambda self, prompts, responses: [len(prompts[0])]
    )
    text = "a\nb\n/nothing\n/reset\nc\n/system d\ne\nstop\n" + f"{words}\n" * 3 + "/exit\nnever\n"
    found = session(
        capsys, monkeypatch, text, ppo, "--turns", 9, "--seed", 4, "--reward", chain[0] / "pmp-tiny"
    )
    said = [[(m["role"][0], m["content"]) for m in prompt] for prompt, _ in heard]
    ok, long = ("a", "ok"), ("u", words)
    assert said[:5] == [
        [("u", "a")],
        [("u", "a"), ok, ("u", "b")],
        [("u", "c")],
        [("s", "d"), ("u", "e")],
        [("s", "d"), ("u", "e"), ok, ("u", "stop")],
    ]
    assert said[5:] == [
        [("s", "d"), ("u", "e"), ok, long],
        [("s", "d"), long, ok, long],
        [("s", "d"), long, ok, long],
    ]
    assert [settings["number"] for _, settings in heard] == [0, 1, 4, 6, 7, 8, 9, 10]
    assert {settings["seed"] for _, settings in heard} == {4}
    assert (
        f"score: by {chain[0] / 'pmp-tiny'}" in found
        and "ppo-tiny: o [stopped, and forgotten]" in found
    )
    assert "/nothing: no such command; there are /reset, /system, /exit" in found
    assert (
        found.count("[ppo-tiny has forgotten all but the last 1 exchanges: it may read 64 tokens]")
        == 2
    )
    scores = [
        line.removeprefix("ppo-tiny: ok  [")[:10]
        for line in found
        if line.startswith("ppo-tiny: ok")
    ]
    assert (
        scores == [f"score {len(prompt)}.00" for i, prompt in enumerate(said) if i != 4]
        and "> never" not in found
    )
    heard.clear()
    found = session(capsys, monkeypatch, "a\n" + "cat " * 60 + "\nb", ppo)
    assert [prompt[0]["content"] for prompt, _ in heard] == [
        "a",
        ("cat " * 60).strip(),
        "b",
    ]  # each by itself


def test_what_is_amiss_is_said(chain, capsys, monkeypatch, tmp_path, heard):
    for name in ("lm-tiny", "sft-tiny", "ppo-tiny"):
        shutil.copytree(chain[0] / name, tmp_path / name)
    (tmp_path / "ppo-tiny" / "summary.json").unlink()
    found = session(capsys, monkeypatch, "a\n", tmp_path / "ppo-tiny")
    assert found[0].endswith(
        "ppo-tiny, not complete: as it was after step 4, each prompt by itself"
    )
    assert (
        found[1].startswith("no scores: ")
        and "rm-tiny: no config.json there" in found[1]
        and found[3] == "ppo-tiny: ok"
    )
    assert (
        session(capsys, monkeypatch, "", tmp_path / "sft-tiny")[1]
        == "no scores: --reward names a reward model"
    )
    session(capsys, monkeypatch, "a\n", tmp_path / "lm-tiny")
    assert heard[-1][0] == "a"  # plain text
    for arguments, message in (
        ((chain[0] / "rm-tiny",), "rm-tiny: a language model is wanted, this is a reward model"),
        (("nowhere",), "nowhere: no config.json there"),
        (("x", "--turns", "-1"), "--turns=-1"),
        ((chain[0] / "sft-tiny", "--reward", chain[0] / "lm-tiny"), "a reward model is wanted"),
        ((chain[0] / "sft-tiny", "--tensor", 3), "must make 8 devices"),
    ):
        assert chat.main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert error.startswith("alignjax: ") and error.count("\n") == 1 and message in error


def test_a_prompt_that_is_too_long_is_said_and_the_next_answered(chain, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        inference.LoadedModel, "run", lambda self, program, *_, **__: asked.append(program) or 1 / 0
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat " * 60 + "\na\n"))
    with pytest.raises(ZeroDivisionError):
        chat.main([str(chain[0] / "sft-tiny")])
    assert "alignjax: prompt 0 has 6" in capsys.readouterr().out and asked == [inference.BEGIN]
