"""Several adapters that answer one question: their scores as one. Pure functions; knows no request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peft_serve.api.served import Served


def pooled(members: Sequence[Mapping[str, float]], by: str) -> dict[str, float]:
    """The score of each label, best first: the mean of the members' scores, or each label's share of the votes.

    Every member has a score for every label. Labels with as many votes are ordered by their mean score.
    """
    means = {label: sum(member[label] for member in members) / len(members) for label in members[0]}
    if by == "mean":
        return dict(sorted(means.items(), key=lambda item: -item[1]))
    votes = Counter(max(member, key=lambda label: member[label]) for member in members)
    order = sorted(means, key=lambda label: (-votes[label], -means[label]))
    return {label: votes[label] / len(members) for label in order}


def describe_members(members: Sequence[Served]) -> dict[str, Any]:
    """The `adapter` member of an ensemble's answer."""
    return {
        "name": ",".join(member.name for member in members),
        "version": None,
        "digest": None,
        "peft_type": None,
        "members": [member.describe() for member in members],
    }
