"""A model's check as text: a line for each fact, then the problems, then the verdict."""

from collections.abc import Iterator, Sequence

from alignjax.config import Model
from alignjax.data import chat
from alignjax.data.template_traits import TemplateTraits
from alignjax.models import layer_kinds
from alignjax.runs.model_check import POLICY, REWARD, End, ModelCheck, Weights

LABEL_WIDTH = 15
MOST_PROBLEMS = 30  # lines; thousands of tensors may be missing for one reason
TYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
NAMES = {POLICY: "policy", REWARD: "reward model"}


def format_check(check: ModelCheck) -> str:
    """Return the text of a check."""
    facts = [f"{label:{LABEL_WIDTH}}{text}" for label, text in facts_of(check)]
    return "\n".join([*facts, *problem_lines(check.problems), verdict(check)])


def facts_of(check: ModelCheck) -> Iterator[tuple[str, str]]:
    """Yield labels and facts."""
    if check.architecture is not None:
        yield from architecture_facts(check.architecture, check.parameters)
    if check.stage:
        yield "run", f"of stage {check.stage!r}"
    if check.weights is not None:
        yield "on disk", weights_text(check.weights)
    if check.tokenizer is not None:
        yield "tokenizer", f"{len(check.tokenizer):,} tokens"
        if not check.tokenizer.chat_template:
            yield "template", f"none: it loads for plain text only; {chatml_advice(check)}"
    if check.traits is not None:
        yield from template_facts(check.traits)
    if check.ends:
        yield "a reply ends", f"at {ends_text(check.ends)}"
    if check.ending:
        yield "a score", f"is read behind {ends_text(check.ending)}"


def architecture_facts(model: Model, parameters: int) -> Iterator[tuple[str, str]]:
    """Yield the facts of an architecture."""
    yield "family", f"{model.family}, {parameters:,} parameters"
    yield (
        "layers",
        f"{model.layers} of width {model.d_model}, {model.heads} heads of {model.head_size} "
        f"({model.kv_heads} for keys and values), {model.d_ff} within",
    )
    if model.experts:
        yield "experts", f"{model.experts} in each layer, {model.experts_per_token} for a token"
    tied = "tied" if model.tied else "not tied"
    yield "vocabulary", f"{model.vocab_size:,} tokens, embeddings {tied}"
    yield "context", f"{model.max_length:,} tokens, {window_text(model)}"
    yield "rope", rope_text(model)


def window_text(model: Model) -> str:
    """Return which layers see a window."""
    if not model.window:
        return "no window"
    windowed = sum(kind.windowed for kind in layer_kinds.of(model))
    return f"a window of {model.window:,} in {windowed} of {model.layers} layers"


def rope_text(model: Model) -> str:
    """Return how positions are rotated."""
    text = f"base {model.rope_theta:,.0f}"
    if model.rope_window_theta:
        text += f", {model.rope_window_theta:,.0f} in layers with a window"
    if model.rope_scaling:
        text += f", scaled by {model.rope_scaling!r} with factor {model.rope_factor:g}"
    return text


def weights_text(weights: Weights) -> str:
    """Return what the files hold."""
    types = ", ".join(TYPE_NAMES[dtype] for dtype in weights.dtypes)
    files = "1 file" if weights.files == 1 else f"{weights.files} files"
    text = f"{types}, {weights.tensors} tensors in {files}, {weights.size / 1e6:,.1f} MB"
    if weights.has_tied_copy:
        text += "; a copy of the tied head, which loading compares with the embeddings"
    return text


def chatml_advice(check: ModelCheck) -> str:
    """Return whether a tokenizer without a template can have ChatML."""
    vocabulary = check.tokenizer.get_vocab()
    absent = [token for token in (chat.START, chat.END) if token not in vocabulary]
    if absent:
        return f"no ChatML either, because {', '.join(absent)} is no token"
    return "chat_template=chatml gives it ChatML, whose tokens it has"


def template_facts(traits: TemplateTraits) -> Iterator[tuple[str, str]]:
    """Yield the facts of a chat template."""
    yield "system", traits.system
    if traits.preface:
        yield "", f"without a system message it writes {shown(traits.preface)}"
    if traits.user_twice:
        yield "turns", f"two of the user in a row are refused ({traits.user_twice})"
    prompt = shown(traits.generation_prompt) if traits.generation_prompt else "no text of its own"
    yield "prompt", f"asks for a reply with {prompt}"
    before = f"begins with {shown(traits.before_reply)}, then " if traits.before_reply else ""
    yield "reply", f"{before}as the tokenizer reads it: 'Yes' begins with {traits.first_piece!r}"
    after = f", and {shown(traits.after_end)} behind it" if traits.after_end else ""
    yield "", f"the template ends it with {traits.end!r} ({traits.end_id}){after}"
    if traits.think:
        yield "thoughts", traits.think
    if not traits.earlier_turns_stay:
        yield "", "earlier replies are written otherwise than the last one: each takes a sequence"
    if traits.writes_date:
        yield "date", "the template writes today's; a run keeps template_date"


def shown(text: str, most: int = 120) -> str:
    """Quote a text; cut it off after `most` characters."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


def ends_text(ends: Sequence[End]) -> str:
    """Return tokens with their ids."""
    return ", ".join(f"{end.piece!r} ({end.token})" for end in ends)


def problem_lines(problems: Sequence[str]) -> list[str]:
    """Return a line for each problem, and one for those that are too many to show."""
    lines = [f"refused: {problem}" for problem in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"refused: and {len(problems) - MOST_PROBLEMS} more problems")
    return lines


def verdict(check: ModelCheck) -> str:
    """Return whether the model can be loaded, and as what."""
    if not check.loads:
        count = len(check.problems)
        return f"{check.spec}: cannot be loaded, for {count} reason{'s' if count > 1 else ''}"
    name = NAMES[check.role]
    if check.role == POLICY and check.traits is None:
        name = "language model of plain text"
    note = ""
    if check.role == POLICY:
        note = " (it has no head for scores; a run of stage 'ranking' gives it one)"
    return f"{check.spec}: loads as a {name}{note}"
