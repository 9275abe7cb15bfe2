"""Whether a model can be loaded, what it is, and all that is wrong with it.

Every question is put to the function that loading asks, which is called here with a `refuse` that
notes a problem and goes on. So there is no second list of rules. Numbers are not read: that they
are finite, and that a stored copy of a tied head is one, is found out when the model is loaded.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from alignjax.algorithms.rewards import parent_tokenizer
from alignjax.config import Config, Model, UserError, one_line
from alignjax.data import chat_format, template_traits, tokenizer_files
from alignjax.data.template_traits import TemplateTraits
from alignjax.models import families
from alignjax.runs.lineage import check_parent
from alignjax.weights import hf, locations, peft_adapter, roles
from alignjax.weights.hf_layout import layout_of
from alignjax.weights.imported import ends_of
from alignjax.weights.safetensors import open_tensors
from alignjax.weights.score_place import ending_of

POLICY = "policy"
REWARD = "reward"
HEADS = {POLICY: "lm", REWARD: "scalar"}
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the headers of the files say."""

    tensors: int
    files: int
    dtypes: tuple[str, ...]  # in the format's names
    size: int  # bytes of all tensors
    has_tied_copy: bool  # a stored head beside the embeddings that it is tied to


@dataclass(frozen=True, kw_only=True)
class End:
    """A token that ends a reply."""

    token: int
    piece: str


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """The findings of a check; what could not be read is None or empty.

    Attributes:
        spec: how the user named the model.
        role: what it can be loaded as, "policy" or "reward".
        stage: of a run, "" for a Hugging Face checkpoint.
        architecture: its `config.Model`.
        parameters: how many it has, with its head.
        weights: what its files hold; None for a run.
        tokenizer: loaded.
        traits: what its template does.
        ends: the tokens that end a reply.
        ending: the tokens that a reward model reads behind a reply.
        problems: a line for each reason not to load it.
    """

    spec: str
    role: str
    stage: str = ""
    architecture: Model | None = None
    parameters: int = 0
    weights: Weights | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    traits: TemplateTraits | None = None
    ends: tuple[End, ...] = ()
    ending: tuple[End, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def loads(self) -> bool:
        """Return whether the model loads: no problem was found."""
        return not self.problems


@dataclass
class Problems:
    """The problems of a model, each once."""

    lines: dict[str, None] = field(default_factory=dict)

    def note(self, message: str) -> None:
        """Note a problem."""
        self.lines[one_line(message)] = None

    def attempt(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return what a function returns, or None after noting the UserError that it raises."""
        try:
            return function(*arguments)
        except UserError as error:
            self.note(str(error))
            return None


def check_model(
    spec: str, tokenizer: str = "", chat_template: str = "", directory: Path | None = None
) -> ModelCheck:
    """Check a model by all that is known without reading its parameters.

    Args:
      spec: a directory or a hub name, as a parent in a config.
      tokenizer: another one, as the field of a config.
      chat_template: as the field of a config.
      directory: where the model is, if not where `spec` says.
    """
    problems = Problems()
    directory = directory or problems.attempt(locations.local_directory, spec)
    stored = directory and problems.attempt(locations.read_config, directory)
    if stored is None:
        return ModelCheck(spec=spec, role=POLICY, problems=tuple(problems.lines))
    config = Config(stage="ppo", tokenizer=tokenizer, chat_template=chat_template)
    if locations.is_run_config(stored):
        findings = check_run(spec, directory, stored, config, problems)
    else:
        findings = check_checkpoint(spec, directory, stored, problems)
    loaded = problems.attempt(parent_tokenizer, config, directory)
    if loaded is not None:
        findings = check_tokenizer(findings, directory, loaded, stored, problems)
    return dataclasses.replace(findings, problems=tuple(problems.lines))


def check_run(
    spec: str, directory: Path, stored: dict[str, Any], config: Config, problems: Problems
) -> ModelCheck:
    """Check what is known of a training run without its parameters."""
    stage = stored["stage"]
    role = REWARD if stage == "ranking" else POLICY
    model = problems.attempt(locations.architecture, directory)
    if model is not None:
        config.model = model
        problems.attempt(check_parent, config, role, spec, directory)
    return ModelCheck(
        spec=spec,
        role=role,
        stage=stage,
        architecture=model,
        parameters=parameters_of(model, role, problems),
    )


def check_checkpoint(
    spec: str, directory: Path, stored: dict[str, Any], problems: Problems
) -> ModelCheck:
    """Check the config and the tensors of a Hugging Face checkpoint."""
    head = problems.attempt(hf.head_of, directory)
    role = REWARD if head == "scalar" else POLICY
    where = str(locations.base_directory(directory) / locations.CONFIG)
    model = problems.attempt(families.model_from_hf, stored, where, problems.note)
    weights = None
    if model is not None:
        problems.attempt(check_tensors, directory, role, problems)
        try:
            weights = weights_of(directory, model, HEADS[role])
        except UserError:
            pass  # it is among the problems
    return ModelCheck(
        spec=spec,
        role=role,
        architecture=model,
        parameters=parameters_of(model, role, problems),
        weights=weights,
    )


def check_tensors(directory: Path, role: str, problems: Problems) -> None:
    """Note what is wrong with the tensors of a checkpoint, and of its adapter."""
    views = roles.open_views(directory, HEADS[role], problems.note, reads=False)
    adapted = locations.adapted_model(directory)
    if role == REWARD and "head/kernel" not in views:
        model = locations.architecture(directory)
        if adapted is None or peft_adapter.open_adapter(adapted.adapter, model).score is None:
            raise roles.no_scores(directory)


def weights_of(directory: Path, model: Model, head: str) -> Weights:
    """Return what the headers of a checkpoint's files say."""
    tensors = hf.with_prefix(open_tensors(locations.base_directory(directory)), model)
    return Weights(
        tensors=len(tensors),
        files=len({tensor.path for tensor in tensors.values()}),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        size=sum(tensor.nbytes for tensor in tensors.values()),
        has_tied_copy=hf.has_tied_copy(tensors, model, head),
    )


def parameters_of(model: Model | None, role: str, problems: Problems) -> int:
    """Return how many parameters a model has, with its head."""
    layout = model and problems.attempt(layout_of, model, HEADS[role])
    return sum(map(math.prod, layout.shapes.values())) if layout else 0


def check_tokenizer(
    findings: ModelCheck,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    stored: dict[str, Any],
    problems: Problems,
) -> ModelCheck:
    """Return the findings with those of the tokenizer and its template."""
    model = findings.architecture
    if model is not None:
        problems.attempt(tokenizer_files.check_fits, tokenizer, model.vocab_size)
    traits = None
    if tokenizer.chat_template or findings.role == REWARD:
        # Without a template, a language model is one of plain text.
        if problems.attempt(chat_format.format_of, tokenizer) is not None:
            traits = problems.attempt(template_traits.traits_of, tokenizer)
    ends: tuple[int, ...] | None = ()
    ending: tuple[int, ...] | None = ()
    if findings.role == POLICY and model is not None:
        ends = problems.attempt(ends_of, directory, tokenizer, model.vocab_size)
    elif traits is not None:
        ending = problems.attempt(ending_of, directory, tokenizer)
    return dataclasses.replace(
        findings,
        tokenizer=tokenizer,
        traits=traits,
        ends=pieces_of(tokenizer, ends or ()),
        ending=pieces_of(tokenizer, ending or ()),
    )


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> tuple[End, ...]:
    """Return tokens with their texts."""
    return tuple(End(token=token, piece=tokenizer.decode([token])) for token in tokens)
