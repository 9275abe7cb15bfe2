"""What the builders share: the schema, fetching files, and counting rows."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from alignjax.config import UserError
from alignjax.data.preferences.rows import Row, read_rows


class Source(NamedTuple):
    """A published file."""

    url: str
    sha256: str = ""  # as the publisher states it; "" if the publisher doesn't


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One comparison."""

    id: str
    prompt: list[dict]  # messages
    chosen: str
    rejected: str
    ratio: float = 0.0  # SHP's score_ratio


@dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
    """A set with its options, which the name of the directory that holds it spells out."""

    dataset: str = ""
    options: Any = None


class Comparisons(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A public set of comparisons.

    A family says which files a split has, and makes comparisons of their rows.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "python -m alignjax.data.prepare says which files go where."
    Options: type  # a dataclass: each option with its default
    # `download` compares checksums; TFDS's own table of them needs importlib_resources.
    url_infos = None
    HOMEPAGE = ""

    def sources(self) -> dict[str, dict[str, Source]]:
        """Return {split: {path below the manual directory: where it is published}}."""
        raise NotImplementedError

    def files(self) -> dict[str, Source]:
        """Return the sources of all splits."""
        return {name: source for split in self.sources().values() for name, source in split.items()}

    def of_split(self, row: Row, split: str) -> bool:
        """Return whether a row belongs to a split; for files that hold several."""
        return True

    def compare(self, rows: Iterator[Row], split: str, dropped: Counter) -> Iterator[Pair]:
        """Yield the comparisons in rows, and count the rows that give none by the reason."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict(
            {
                "id": text,
                "dataset": text,
                "prompt": tfds.features.Sequence({"role": text, "content": text}),
                "chosen": text,
                "rejected": text,
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

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        sources = self.files()
        paths = self.manual(dl_manager, sources) or self.download(dl_manager, sources)
        # TFDS would show three bars at once; the reader of rows has one that knows the total.
        tfds.disable_progress_bar()
        digests = {name: [digest(path), sources[name].sha256] for name, path in paths.items()}
        self.info.metadata.update(files=digests, splits={})
        return {
            split: self._generate_examples(split, {name: paths[name] for name in names})
            for split, names in self.sources().items()
        }

    def _generate_examples(
        self, split: str, paths: dict[str, Path]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        dataset = self.builder_config.dataset
        counts = Counter()
        dropped = Counter()
        rows = self._rows_of_split(split, paths, counts)
        for pair in self.compare(rows, split, dropped):
            counts["pairs"] += 1
            example = {
                "id": pair.id,
                "dataset": dataset,
                "prompt": pair.prompt,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "margin": 0.0,
                "ratio": pair.ratio,
            }
            yield pair.id, example
        report = {
            "rows": counts["rows"],
            "pairs": counts["pairs"],
            "dropped": dict(dropped.most_common()),
        }
        if not report["pairs"]:
            raise UserError(f"{dataset}: nothing is left of {split}: {report}")
        self.info.metadata["splits"][split] = report

    def _rows_of_split(self, split: str, paths: dict[str, Path], counts: Counter) -> Iterator[Row]:
        """Yield the rows of a split, and count them."""
        for row in read_rows(paths, f"{self.builder_config.dataset}/{split}"):
            if self.of_split(row, split):
                counts["rows"] += 1
                yield row

    def manual(
        self, dl_manager: tfds.download.DownloadManager, sources: dict[str, Source]
    ) -> dict[str, Path] | None:
        """Return the files of the manual directory, or None if it lacks any."""
        try:
            directory = Path(dl_manager.manual_dir)
        except AssertionError:  # TFDS's sign that there is no such directory, or an empty one
            return None
        paths = {name: directory / name for name in sources}
        return paths if all(path.is_file() for path in paths.values()) else None

    def download(
        self, dl_manager: tfds.download.DownloadManager, sources: dict[str, Source]
    ) -> dict[str, Path]:
        """Fetch files, and compare each with its published checksum; they are kept for later calls.

        Raises:
          UserError: a file cannot be fetched, or its checksum is another.
        """
        try:
            paths = dl_manager.download({name: source.url for name, source in sources.items()})
        except (OSError, tfds.core.download.DownloadError) as error:
            # An error of requests holds what urllib3 found.
            cause = next(iter(error.args), None)
            reason = getattr(cause, "reason", error)
            raise UserError(
                f"{self.builder_config.dataset}: the download failed: {reason}\n"
                f"try again, or {instructions(sources)}"
            ) from None
        for name, path in paths.items():
            published = sources[name].sha256
            downloaded = digest(path)
            if published and downloaded != published:
                path.unlink()
                raise UserError(
                    f"{sources[name].url}: expected sha256 {published}, downloaded {downloaded}; "
                    "try again"
                )
        return {name: Path(path) for name, path in paths.items()}


def instructions(sources: dict[str, Source]) -> str:
    """Return what a user does to fill a manual directory, one line for each file."""
    width = max(map(len, sources))
    lines = [f"  DIR/{name:{width}}  from {source.url}" for name, source in sorted(sources.items())]
    return "\n".join(["put these files into a directory DIR and give --manual_dir DIR:", *lines])


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
