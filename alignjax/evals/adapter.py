"""lm-evaluation-harness' model interface on our own programs, as the model "alignjax".

python -m alignjax.evals.adapter run --model alignjax --model_args run=runs/ppo --tasks gsm8k_cot --apply_chat_template

is the harness' own command line, with the model registered. (`lm_eval` alone loads no models of others.) Also
`alignjax.evaluate`, which knows the report's benchmarks.
"""

import sys

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from alignjax import config as configs
from alignjax import inference
from alignjax.config import UserError
from alignjax.evals.requests import Requests
from alignjax.machine import console, sharding
from alignjax.machine.compilation_cache import keep_programs

GENERATION = {
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_p",
}  # what generation_kwargs may say


@register_model("alignjax")
class AlignJax(TemplateLM):
    """A language model of ours (a run of stage lm, or PPO's policy) or of Hugging Face (a directory, hf://ORG/NAME).

    The harness sees one process and one device: rows are laid out over the mesh by our programs. `batch_size` is how many
    responses are decoded at once, `tokens` how many tokens are read at once, `tensor` the mesh's axis of that name. `device` and
    `max_batch_size`, which the harness passes to any model, are torch's affairs.
    """

    def __init__(
        self,
        run,
        batch_size=64,
        dtype="float32",
        tokens=4096,
        tensor=1,
        max_length=None,
        chat_template="",
        max_gen_toks=256,
        device=None,
        max_batch_size=None,
    ):
        super().__init__()
        mesh = sharding.make_mesh(configs.Mesh(tensor=int(tensor)))
        model = inference.load(
            run, dtype=dtype, mesh=mesh, max_length=max_length, chat_template=chat_template
        )
        if not model.end_tokens:
            raise UserError(f"{run}: a language model is wanted, this is a reward model")
        slots = 64 if str(batch_size).startswith("auto") else int(batch_size)
        self.run, self.max_length, self.max_gen_toks = str(run), model.max_length, int(max_gen_toks)
        self.tokenizer, self.asked = model.tokenizer, Requests(model, int(tokens), slots)

    @property
    def eot_token_id(self) -> int:
        return self.asked.model.end_tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.run.replace("/", "__")

    def get_model_info(self) -> dict:
        """What results.json says of the model besides."""
        return {
            "run": self.run,
            "dtype": self.asked.model.architecture.dtype,
            "max_length": self.max_length,
        }

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            continue_final_message=not add_generation_prompt,
            add_generation_prompt=add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        """Tokens as the tokenizer has them by default, but for a text that has its begin token already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(
                string, self.tokenizer.decode(self.prefix_token_id)
            )
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests, disable_tqdm=False, **kwargs
    ) -> list[tuple[float, bool]]:
        found = [None] * len(requests)
        with progress("log-likelihoods", len(requests), disable_tqdm) as bar:

            def done(i, logprob, greedy):
                found[i] = (logprob, greedy)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                bar.update()

            self.asked.loglikelihoods([pair for _, *pair in requests], done)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        windows, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        found, groups = [None] * len(requests), {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        with progress("responses", len(requests), disable_tqdm) as bar:
            for members in groups.values():
                prompts = [self.tok_encode(requests[i].args[0]) for i in members]

                def done(k, text, members=members):
                    i = members[k]
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update()

                self.asked.responses(prompts, done, **self.settings(requests[members[0]].args[1]))
        return found

    def settings(self, asked: dict) -> dict:
        """What `Requests.responses` takes of a task's generation_kwargs; UserError for what it can't do."""
        asked = normalize_gen_kwargs(asked, self.max_gen_toks)
        if unknown := sorted(set(asked) - GENERATION):
            raise UserError(
                f"generation_kwargs: {unknown[0]}={asked[unknown[0]]!r} is not supported, only {sorted(GENERATION)}"
            )
        end = self.tokenizer.decode([self.eot_token_id])
        return dict(
            strings=tuple(handle_stop_sequences(asked["until"], end)),
            length=asked["max_gen_toks"],
            temperature=asked.get("temperature", 0.0) if asked["do_sample"] else 0.0,
            top_p=asked.get("top_p", 1.0),
        )


def progress(what: str, total: int, off: bool):
    return console.progress_bar(total, what, "request", enabled=not off)


def main() -> int:
    """The harness' command line; the exit code: 0, or 2 after a mistake of the user's."""
    try:
        keep_programs()
        cli_evaluate()
    except UserError as error:
        print(f"alignjax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
