"""What the builders share: the schema, where files come from, reading them, checking fields, counting rows."""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from alignjax.config import UserError, nearest
from alignjax.data import files
from alignjax.machine import jsonl

WANTED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class Source(NamedTuple):
    """A published file: where it can be fetched, and its sha256 where the publisher states it ("" where not)."""

    url: str
    sha256: str = ""


class Row(NamedTuple):
    """One line of a source: `id` is the file and the line without the file's endings, `where` the same for errors."""

    id: str
    where: str
    value: dict


@dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
    """A set with its options, spelt in the name of the directory that holds it."""

    dataset: str = ""
    options: Any = None


class Comparisons(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A public set of comparisons. A family says which files a split has, and makes comparisons of their rows."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "python -m alignjax.data.prepare says which files go where."
    Options: type  # a dataclass: each option with its default
    url_infos = (
        None  # `download` compares checksums; TFDS's own table of them wants importlib_resources
    )
    HOMEPAGE = ""

    def sources(self) -> dict[str, dict[str, Source]]:
        """{split: {path below the manual directory: where it is published}}."""
        raise NotImplementedError

    def files(self) -> dict[str, Source]:
        """The sources of all splits."""
        return {name: source for split in self.sources().values() for name, source in split.items()}

    def of_split(self, row: Row, split: str) -> bool:
        """Whether a row belongs to the split, for files that hold several."""
        return True

    def compare(self, rows, split: str, dropped: Counter):
        """(id, prompt, chosen, rejected, ratio) of each comparison; a row that gives none is counted by its reason."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "dataset": tfds.features.Text(),
                "prompt": tfds.features.Sequence(
                    {"role": tfds.features.Text(), "content": tfds.features.Text()}
                ),
                "chosen": tfds.features.Text(),
                "rejected": tfds.features.Text(),
                "margin": np.float32,  # 0: none of these sets gives one
                "ratio": np.float32,  # SHP's score_ratio, 0 elsewhere
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            description=type(self).__doc__,
            homepage=self.HOMEPAGE,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        sources = self.files()
        paths = self.manual(dl_manager, sources) or self.download(dl_manager, sources)
        tfds.disable_progress_bar()  # three at once, from here on; `read` has one that knows how much there is
        self.info.metadata.update(
            files={name: [digest(path), sources[name].sha256] for name, path in paths.items()},
            splits={},
        )
        return {
            split: self._generate_examples(split, {name: paths[name] for name in names})
            for split, names in self.sources().items()
        }

    def _generate_examples(self, split: str, paths: dict[str, Path]):
        rows, pairs, dropped = Counter(), 0, Counter()

        def mine():
            for row in read(paths, f"{self.builder_config.dataset}/{split}"):
                if self.of_split(row, split):
                    rows["read"] += 1
                    yield row

        for key, prompt, chosen, rejected, ratio in self.compare(mine(), split, dropped):
            pairs += 1
            yield (
                key,
                {
                    "id": key,
                    "dataset": self.builder_config.dataset,
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": rejected,
                    "margin": 0.0,
                    "ratio": ratio,
                },
            )
        counts = {"rows": rows["read"], "pairs": pairs, "dropped": dict(dropped.most_common())}
        if not pairs:
            raise UserError(f"{self.builder_config.dataset}: nothing is left of {split}: {counts}")
        self.info.metadata["splits"][split] = counts

    def manual(self, dl_manager, sources: dict[str, Source]) -> dict[str, Path] | None:
        """The files of the manual directory, if it has them all."""
        try:
            directory = Path(dl_manager.manual_dir)
        except AssertionError:  # there is none, or it's empty
            return None
        paths = {name: directory / name for name in sources}
        return paths if all(path.is_file() for path in paths.values()) else None

    def download(self, dl_manager, sources: dict[str, Source]) -> dict[str, Path]:
        """Fetched files, each compared with its published checksum; kept from call to call. UserError if one can't be."""
        try:
            paths = dl_manager.download({name: source.url for name, source in sources.items()})
        except (OSError, tfds.core.download.DownloadError) as error:
            reason = getattr(
                next(iter(error.args), None), "reason", error
            )  # of requests' error, what urllib3 found
            raise UserError(
                f"{self.builder_config.dataset}: the download failed: {reason}\n"
                f"try again, or {instructions(sources)}"
            ) from None
        for name, path in paths.items():
            published, found = sources[name].sha256, digest(path)
            if published and found != published:
                path.unlink()
                raise UserError(
                    f"{sources[name].url}: sha256 {published} wanted, {found} downloaded; try again"
                )
        return {name: Path(path) for name, path in paths.items()}


def instructions(sources: dict[str, Source]) -> str:
    """What a user does to fill a manual directory: one line for each file."""
    width = max(map(len, sources))
    lines = [f"  DIR/{name:{width}}  from {source.url}" for name, source in sorted(sources.items())]
    return "\n".join(["put these files into a directory DIR and give --manual_dir DIR:", *lines])


def digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(paths: dict[str, Path], what: str):
    """The rows of files of JSON lines, gzipped if so named, with a bar over their bytes."""
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    before = 0
    with tqdm(
        total=sum(sizes.values()),
        desc=what,
        unit="B",
        unit_scale=True,
        leave=False,
        mininterval=0.5,
    ) as bar:
        for name, path in paths.items():
            with open(path, "rb") as raw:
                if raw.read(20).startswith(b"version https://git"):
                    raise UserError(
                        f"{path}: a pointer of Git LFS, not the file: fetch the file itself"
                    )

            def progress(read: int, before: int = before) -> None:
                bar.update(before + read - bar.n)

            for line in jsonl.lines(path, gzipped=name.endswith(".gz"), progress=progress):
                yield row(line.text, f"{name.partition('.')[0]}/{line.number}", line.where)
            before += sizes[name]


def row(line: str, key: str, where: str) -> Row:
    value = jsonl.parse(line, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: an object wanted, {files.found(value)}")
    return Row(key, where, value)


def field(row: Row, path: str, kind: type, optional: bool = False):
    """The value at a dotted path of a row, numbers being places in lists; None where it is optional and null or absent.

    Raises UserError naming file, line and path, with what was found and wanted.
    """
    value, passed = row.value, []
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        elif optional and isinstance(value, dict):
            return None
        elif isinstance(value, dict):
            raise UserError(
                f"{row.where}: a field {'.'.join([*passed, part])!r} wanted{nearest(part, sorted(value))}"
            )
        else:
            below = ".".join(passed)
            raise UserError(
                f"{row.where}: {below}: {path.removeprefix(below)[1:]!r} in it wanted, {files.found(value)}"
            )
        passed.append(part)
    if value is None and optional:
        return None
    right = (
        isinstance(value, int | float) and math.isfinite(value)
        if kind is float
        else isinstance(value, kind)
    )
    if not right or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{row.where}: {path}: {WANTED[kind]} wanted, {files.found(value)}")
    return value


def fault(chosen: str, rejected: str) -> str:
    """Why two replies are no comparison, or ""."""
    if chosen == rejected:
        return "two equal replies"
    return "" if chosen.strip() and rejected.strip() else "an empty reply"
