"""Methods that give each cluster of a weight's rows a term of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods.fields import LAYERS, RANK, SEED, TARGETS, contradiction, disagreement
from peft_serve.adapters.methods.forms import low_rank_or_dense, served_rank
from peft_serve.adapters.methods.sketch import svd_lowrank
from peft_serve.adapters.primitives import Affine
from peft_serve.adapters.registry import Shape, Site, SiteLayout, Stored, Whole, compiles

NUM_ITERATIONS: Final = 10  # both fixed in peft
KMEANS_SEED: Final = 123456789
TOLERANCE: Final = 1e-2  # how far the stored basis may lie outside ours; that of another base lies mostly outside

ADAMSS: Final = ConfigSchema(
    required={"r": RANK, "num_subspaces": rules.integer(1, 4096), "random_seed": SEED},
    optional={"subspace_rank": RANK, **TARGETS, **LAYERS},
    inert=frozenset(
        {
            "init_weights",
            "use_asa",
            "asa_target_subspaces",
            "init_warmup",
            "final_warmup",
            "mask_interval",
            "asa_importance_beta",
            "asa_uncertainty_beta",
            "asa_schedule_exponent",
            "use_dynamic_rank",
            "svd_threshold",
        }
    ),
)


def _layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:
    """Sizes and ranks of the clusters are those stored; together they must cover the rows of the weight once."""
    num_out, width = spec.out_features, spec.in_features + spec.has_bias
    num_clusters, r = min(config.integer("num_subspaces"), num_out), min(config.integer("r"), num_out, width)
    tensors: dict[str, tuple[Shape, ...]] = {"adamss_newB": ((r, width),)}
    num_rows = total_rank = 0
    for k in range(num_clusters):
        rows, rank = _cluster_shape(stored, k, spec.path)
        tensors |= {f"adamss_A.{k}": ((rank, r),), f"adamss_B.{k}": ((rows, rank),)}
        num_rows, total_rank = num_rows + rows, total_rank + rank
    if num_rows != num_out:
        raise disagreement(spec.path, f"has {num_out} rows; the clusters of this checkpoint have {num_rows}")
    return SiteLayout(tensors=tensors, rank=served_rank(spec, total_rank))


def _cluster_shape(stored: Stored, k: int, path: str) -> Shape:
    """Rows and rank of a cluster: the shape of its B."""
    shape = stored.get(f"adamss_B.{k}", ())
    if len(shape) != 2 or shape[1] > shape[0]:
        reason = "is missing or is no [rows, rank] matrix with at most as many ranks as rows; save the adapter again"
        raise disagreement(f"{path}.adamss_B.{k}", reason)
    return shape


def _clustering(whole: Whole) -> Any:
    """scikit-learn's KMeans, which peft clusters with; loaded only when an adapter asks for it."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        reason = "is ADAMSS, which needs scikit-learn to find its clusters again; ask the operator to install"
        raise contradiction("peft_type", f"{reason} peft-serve[adamss]") from None
    num_clusters = whole.config.integer("num_subspaces")
    return lambda rows: KMeans(
        n_clusters=min(num_clusters, rows.shape[0]),
        init="random",
        n_init=1,
        max_iter=NUM_ITERATIONS,
        random_state=KMEANS_SEED,
    ).fit_predict(rows.numpy())


@compiles("ADAMSS", schema=ADAMSS, layout=_layout, kinds=frozenset({SiteKind.LINEAR}), prepare=_clustering)
def adamss(site: Site) -> Affine:
    """B_k A_k N on the rows of cluster k, N being the leading right singular vectors of [W b] (peft `AdamssLayer`).

    Which rows belong to which cluster is not in the file: as in peft, the left singular vectors are clustered
    again. The stored N and the sizes of the clusters must come out the same, or the checkpoint is refused. A bias
    counts as one more column of W, and its column of N gives a shift.
    """
    members = _members(site)
    tensors, num_clusters = site.tensors, len(members)
    ranks = [tensors[f"adamss_A.{k}"].shape[0] for k in range(num_clusters)]
    a_RI = torch.cat([tensors[f"adamss_A.{k}"] for k in range(num_clusters)]) @ tensors["adamss_newB"]
    b_OR = torch.zeros(site.spec.out_features, sum(ranks))
    for k, rows in members.items():
        start = sum(ranks[:k])
        b_OR[rows, start : start + ranks[k]] = tensors[f"adamss_B.{k}"]
    if not site.spec.has_bias:
        return Affine(**low_rank_or_dense(a_RI, b_OR))
    return Affine(**low_rank_or_dense(a_RI[:, :-1], b_OR), shift=b_OR @ a_RI[:, -1])


def _members(site: Site) -> Mapping[int, Tensor]:
    """The rows of each cluster, as peft finds them, checked against what the checkpoint shows of them.

    Singular vectors come with any sign, and close ones mixed, as rounding will have it. Clusters do not depend on
    that, so neither does the check: it is the space that the vectors span which must be the same.
    """
    basis, bias = site.tensors["adamss_newB"], site.bias_O
    matrix = site.weight_OI if bias is None else torch.cat([site.weight_OI, bias[:, None]], dim=1)
    u_OK, _, v_KI = svd_lowrank(matrix, basis.shape[0], niter=2, seed=site.config.integer("random_seed"))
    if float((basis - basis @ v_KI.T @ v_KI).abs().max()) > TOLERANCE:
        reason = "is not what this base's weight gives; serve the adapter on the very base it was trained on"
        raise disagreement(f"{site.spec.path}.adamss_newB", reason)
    labels = torch.from_numpy(site.prepared(u_OK)).long()
    num_clusters = sum(name.startswith("adamss_B.") for name in site.tensors)
    members = {k: torch.where(labels == k)[0] for k in range(num_clusters)}
    if any(len(rows) != site.tensors[f"adamss_B.{k}"].shape[0] for k, rows in members.items()):
        reason = "falls into clusters of other sizes than the checkpoint's, which was made by another scikit-learn"
        raise disagreement(site.spec.path, f"{reason} or on another base")
    return members
