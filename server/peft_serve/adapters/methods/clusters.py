"""Methods that give each cluster of a weight's rows a term of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.fields import LAYERS, RANK, SEED, TARGETS, contradiction, disagreement
from peft_serve.adapters.methods.forms import is_low, num_factored, served_rank
from peft_serve.adapters.methods.sketch import svd_lowrank
from peft_serve.adapters.primitives import Affine, Dense, LowRank
from peft_serve.adapters.registry import Shape, Site, SiteLayout, Stored, Whole, compiles

NUM_ITERATIONS: Final = 10  # these three are fixed in peft
KMEANS_SEED: Final = 123456789
NUM_REFINEMENTS: Final = 2
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
    decomposed = (4 * NUM_REFINEMENTS + 4) * work.product(num_out, width, r)
    decomposed += work.singular_values(r, max(num_out, width))
    clustered = NUM_ITERATIONS * work.product(num_out, r, num_clusters)
    return SiteLayout(
        tensors=tensors,
        rank=served_rank(spec, total_rank),
        num_values=num_factored(spec, total_rank),
        work=decomposed + clustered + work.product(total_rank, r, width),
    )


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
    clusters = _clusters(site)
    shift = None
    if site.spec.has_bias:
        shift = torch.zeros(site.spec.out_features)
        for cluster in clusters:
            shift[cluster.rows] = cluster.b_OR @ cluster.a_RI[:, -1]
    width, total_rank = site.spec.in_features, sum(len(cluster.a_RI) for cluster in clusters)
    if not is_low(total_rank, site.spec.out_features, width):
        return Affine(maps=(_multiplied_out(clusters, site.spec.out_features, width),), shift=shift)
    b_OR, start = torch.zeros(site.spec.out_features, total_rank), 0
    for cluster in clusters:
        end = start + len(cluster.a_RI)
        b_OR[cluster.rows, start:end] = cluster.b_OR
        start = end
    return Affine(delta=LowRank(torch.cat([cluster.a_RI[:, :width] for cluster in clusters]), b_OR), shift=shift)


class _Cluster(NamedTuple):
    """Some rows of a weight, and the two factors of what is added to them."""

    rows: Tensor
    a_RI: Tensor
    b_OR: Tensor


def _clusters(site: Site) -> list[_Cluster]:
    basis = site.tensors["adamss_newB"]
    return [
        _Cluster(rows, site.tensors[f"adamss_A.{k}"] @ basis, site.tensors[f"adamss_B.{k}"])
        for k, rows in _members(site).items()
    ]


def _multiplied_out(clusters: list[_Cluster], num_out: int, width: int) -> Dense:
    """Cluster by cluster: as two factors they could be as wide as the weight has rows."""
    weight_OI = torch.zeros(num_out, width)
    for cluster in clusters:
        weight_OI[cluster.rows] = cluster.b_OR @ cluster.a_RI[:, :width]
    return Dense(weight_OI)


def _members(site: Site) -> Mapping[int, Tensor]:
    """The rows of each cluster, as peft finds them, checked against what the checkpoint shows of them.

    Singular vectors come with any sign, and close ones mixed, as rounding will have it. Clusters do not depend on
    that, so neither does the check: it is the space that the vectors span which must be the same.
    """
    basis, bias = site.tensors["adamss_newB"], site.bias_O
    matrix = site.weight_OI if bias is None else torch.cat([site.weight_OI, bias[:, None]], dim=1)
    u_OK, _, v_KI = svd_lowrank(matrix, basis.shape[0], niter=NUM_REFINEMENTS, seed=site.config.integer("random_seed"))
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
