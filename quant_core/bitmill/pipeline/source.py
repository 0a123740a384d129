"""The source model of a job as its stages see it: a folder, and what is in it by digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitmill.io.atomic import read_json, write_json
from bitmill.io.companions import is_companion
from bitmill.io.safetensors import read_headers
from bitmill.plan.architectures import ARCHITECTURES
from bitmill.plan.config_json import CONFIG_FILE
from bitmill.plan.fingerprint import Fingerprint
from bitmill.plan.model_plan import Plan
from bitmill.plan.parameters import HEAD_WEIGHT

SOURCE_NAME = "source.json"


@dataclass(frozen=True)
class Model:
    """What a stage reads of the source: config.json and these tensors, by stored name."""

    folder: Path = field(compare=False)
    config: str
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """A folder of safetensors with hex SHA-256 of every tensor and of every other file, by name.

    digest: of the files that the job was given, all of them. It names the model in the ids of
    profiles and in records of learned parameters; what a stage depends on is told by `model`.
    """

    folder: Path
    digest: str
    tensors: Mapping[str, str]
    files: Mapping[str, str]

    def save(self, folder: Path) -> None:
        """Write all but the place."""
        named = {"digest": self.digest, "tensors": dict(self.tensors), "files": dict(self.files)}
        write_json(folder / SOURCE_NAME, named)

    @classmethod
    def load(cls, folder: Path, place: Path) -> Source:
        """What `save` wrote, of the source that lies at `place`."""
        return cls(place, **read_json(folder / SOURCE_NAME))

    @property
    def fingerprint(self) -> Fingerprint:
        """What model it is, wherever it came from."""
        return Fingerprint.of(read_headers(self.folder), self.tensors)

    @property
    def every(self) -> Model:
        """All tensors, those that no stage but the first reads too."""
        return self._model(self.tensors)

    def planned(self, plan: Plan) -> Model:
        """The tensors that the job needs."""
        return self._model(plan.stored)

    def without_head(self, plan: Plan) -> Model:
        """`planned` without an output head of its own, on which nothing before it depends."""
        modules = {tensor.module: tensor.source.tensor for tensor in plan.tensors}
        if ARCHITECTURES[plan.model_type].embedding not in modules:  # tied, under the head's name
            return self.planned(plan)
        return self._model({*plan.stored} - {modules.get(HEAD_WEIGHT)})

    def kept(self, plan: Plan) -> Model:
        """The tensors that a packed checkpoint takes over as they are."""
        return self._model({tensor.source.tensor for tensor in plan.tensors})

    @property
    def companions(self) -> Mapping[str, str]:
        """The files that travel with the weights: tokenizer, licence, chat template, ..."""
        return {path: digest for path, digest in self.files.items() if is_companion(path)}

    def _model(self, names: Iterable[str]) -> Model:
        tensors = {name: self.tensors[name] for name in sorted(names)}
        return Model(self.folder, self.files[CONFIG_FILE], tensors)
