"""Run lm-evaluation-harness on our own programs, as the model "alignjax".

python -m alignjax.evals.adapter run --model alignjax --model_args run=runs/ppo --tasks gsm8k_cot

This is the harness's own command line with the model registered; `lm_eval` alone does not load
models from other packages. Add --apply_chat_template for a model that converses.
`alignjax.evaluate` uses the same model and knows the report's benchmarks.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from alignjax import config as configs
from alignjax import inference
from alignjax.config import UserError
from alignjax.data import chat_format, templates
from alignjax.evals.best_of import BestOf, kl_bound
from alignjax.evals.requests import Requests, ResponseSettings
from alignjax.machine import console, sharding
from alignjax.machine.compilation_cache import keep_programs

DEFAULT_SLOTS = 64
# The fields of a task's generation_kwargs that are supported.
GENERATION_FIELDS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


@register_model("alignjax")
class AlignJax(TemplateLM):
    """A language model: a run of stage lm, PPO's policy, or a Hugging Face checkpoint.

    A checkpoint is a directory or hf://ORG/NAME. The harness sees one process and one device; our
    programs lay rows out over the mesh.

    Args:
      batch_size: the number of responses decoded at once.
      tokens: the number of tokens read at once.
      tensor: the size of the mesh's axis of that name.
      best_of: above 1, the answer of a task in which the model writes is the best of so many.
      reward: the reward model that chooses it.
      device, max_batch_size: ignored; the harness passes them to every model, for torch.
    """

    def __init__(
        self,
        run: str | Path,
        batch_size: int | str = DEFAULT_SLOTS,
        dtype: str = "float32",
        tokens: int | str = 4096,
        tensor: int | str = 1,
        max_length: int | None = None,
        chat_template: str = "",
        max_gen_toks: int | str = 256,
        best_of: int | str = 1,
        reward: str = "",
        device: Any = None,
        max_batch_size: Any = None,
    ):
        super().__init__()
        mesh = sharding.make_mesh(configs.Mesh(tensor=int(tensor)))
        model = inference.load(
            run, dtype=dtype, mesh=mesh, max_length=max_length, chat_template=chat_template
        )
        if not model.ends:
            raise UserError(f"{run}: expected a language model, but this is a reward model")
        automatic = str(batch_size).startswith("auto")
        slots = DEFAULT_SLOTS if automatic else int(batch_size)
        self.run = str(run)
        self.max_length = model.max_length
        self.max_gen_toks = int(max_gen_toks)
        self.tokenizer = model.tokenizer
        self.requests = Requests(model, int(tokens), slots)
        # Rendered texts whose contents have control tokens, and what the tokenizer is to read.
        self.marked_texts: dict[str, str] = {}
        self.conversations: dict[str, list[dict[str, str]]] = {}  # by their rendered text
        self.reward = reward
        self.best_of = None
        if int(best_of) > 1:
            if not reward:
                raise UserError(f"best_of={best_of} needs a reward model: reward=RUN")
            scorer = inference.load(reward, dtype=dtype, mesh=mesh)
            self.best_of = BestOf(n=int(best_of), reward=scorer)

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text: the tokenizer's own, or else any end of a response."""
        end = self.tokenizer.eos_token_id
        return self.requests.model.ends[0] if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """Return the token that stands before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which the harness keeps rendered requests."""
        return self.run.replace("/", "__")

    def get_model_info(self) -> dict:
        """Return what results.json says about the model."""
        return {
            "run": self.run,
            "dtype": self.requests.model.architecture.dtype,
            "max_length": self.max_length,
            **self.best_of_info(),
        }

    def best_of_info(self) -> dict[str, Any]:
        """Return how answers are chosen, {} if there is one response to a request."""
        if self.best_of is None:
            return {}
        n = self.best_of.n
        return {"best_of": n, "reward": self.reward, "kl_at_most": kl_bound(n)}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the text of the tokenizer's chat template."""
        controls = chat_format.controls_of(self.tokenizer)
        text = self.render(chat_history, add_generation_prompt)
        if self.best_of:
            self.conversations[text] = chat_history
        shielded = controls.shield_messages(chat_history)
        if shielded != chat_history:
            marked = controls.with_secrets(self.render(shielded, add_generation_prompt))
            self.marked_texts[text] = marked
        return text

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Return what the chat template writes; otherwise the last message is to be continued."""
        return templates.render(
            self.tokenizer, messages, add_generation_prompt, not add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokenise a text; by default the tokenizer adds its special tokens.

        It does not add them to a text that already has the begin token. Control tokens in the
        contents of rendered messages are text.
        """
        if add_special_tokens is None:
            begin = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, begin)
        for text, marked in self.marked_texts.items():
            if string.startswith(text) or text.rstrip() == string:
                controls = chat_format.controls_of(self.tokenizer)
                rest = string[len(text) :]
                whole = marked + rest if string.startswith(text) else marked.rstrip()
                return controls.encode([whole], begin=add_special_tokens)[whole]
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Answer requests (texts or None, context tokens, continuation tokens).

        An answer is the log-probability and whether greedy decoding gives the continuation.
        Answers to requests with texts are cached at once.
        """
        results = [None] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        with progress_bar("log-likelihoods", len(requests), disable_tqdm) as progress:
            for number, likelihood in self.requests.loglikelihoods(pairs):
                results[number] = (likelihood.logprob, likelihood.is_greedy)
                texts = requests[number][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[number])
                progress.update()
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text, which is read in windows if it is long."""
        windows = []
        request_of_window = []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *make_disjoint_window(window)))
                request_of_window.append(number)
        totals = [0.0] * len(requests)
        likelihoods = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (logprob, _) in zip(request_of_window, likelihoods, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a response to each prompt; requests with equal settings are decoded together."""
        groups = defaultdict(list)
        for number, request in enumerate(requests):
            _, generation_kwargs = request.args
            groups[repr(sorted(generation_kwargs.items()))].append(number)
        results = [None] * len(requests)
        with progress_bar("responses", len(requests), disable_tqdm) as progress:
            for members in groups.values():
                prompts = [self.tok_encode(requests[number].args[0]) for number in members]
                settings = self.response_settings(requests[members[0]].args[1])
                texts = [requests[number].args[0] for number in members]
                for place, text in self.answers(texts, prompts, settings):
                    number = members[place]
                    results[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    progress.update()
        return results

    def answers(
        self, texts: list[str], prompts: list[list[int]], settings: ResponseSettings
    ) -> Iterator[tuple[int, str]]:
        """Yield the number of each prompt, given as text and as tokens, and the answer to it."""
        if self.best_of is None:
            yield from self.requests.responses(prompts, settings)
            return
        settings = self.best_of.settings(settings)
        for number, candidates in self.requests.candidates(prompts, settings):
            yield number, self.best_of.choose(self.prompt_of(texts[number]), candidates)

    def prompt_of(self, text: str) -> inference.Prompt:
        """Return a prompt as the reward model reads it: its messages, or text as a user's turn."""
        for rendered, messages in self.conversations.items():
            if text.startswith(rendered) or rendered.rstrip() == text:
                return messages
        return text

    def response_settings(self, generation_kwargs: dict) -> ResponseSettings:
        """Translate a task's generation_kwargs; raise UserError for what is not supported."""
        fields = normalize_gen_kwargs(generation_kwargs, self.max_gen_toks)
        unsupported = sorted(set(fields) - GENERATION_FIELDS)
        if unsupported:
            name = unsupported[0]
            raise UserError(
                f"generation_kwargs: {name}={fields[name]!r} is not supported; the supported "
                f"fields are {sorted(GENERATION_FIELDS)}"
            )
        end_string = self.tokenizer.decode([self.eot_token_id])
        return ResponseSettings(
            stop_strings=tuple(handle_stop_sequences(fields["until"], end_string)),
            max_tokens=fields["max_gen_toks"],
            temperature=fields.get("temperature", 0.0) if fields["do_sample"] else 0.0,
            top_p=fields.get("top_p", 1.0),
        )


def progress_bar(description: str, total: int, disabled: bool) -> tqdm:
    """Return a progress bar over requests."""
    return console.progress_bar(total, description, "request", enabled=not disabled)


def main() -> int:
    """Run the harness's command line; return 0, or 2 after a user error."""
    return console.run_command(run_harness)


def run_harness() -> None:
    """Run the harness's command line on the arguments of this process."""
    keep_programs()
    cli_evaluate()


if __name__ == "__main__":
    console.leave(main())
