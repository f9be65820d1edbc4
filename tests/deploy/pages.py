"""A page of /metrics, read as a scraper reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Page:
    """Every sample by its series name."""

    text: str
    types: Mapping[str, str]  # of each series name, its family's type
    samples: Mapping[str, tuple[tuple[Mapping[str, str], float], ...]]

    @classmethod
    def read(cls, text: str) -> Page:
        types: dict[str, str] = {}
        samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                types[sample.name] = family.type
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return cls(text, types, {name: tuple(each) for name, each in samples.items()})

    def labels(self, name: str) -> set[str]:
        """The labels that a scraped series of the name has; Prometheus puts on the first two."""
        return {"instance", "job"} | {label for labels, _ in self.samples[name] for label in labels}

    def values(self, name: str, label: str) -> set[str]:
        return {labels.get(label, "") for labels, _ in self.samples[name]}

    def total(self, name: str, **labels: str) -> float:
        """Over the series with these labels."""
        return sum(value for _, value in self.having(name, **labels))

    def having(self, name: str, **labels: str) -> Iterator[tuple[Mapping[str, str], float]]:
        for each, value in self.samples.get(name, ()):
            if labels.items() <= dict(each).items():
                yield each, value
