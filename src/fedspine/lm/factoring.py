"""Low-rank factors: the best adapter for a dense change, a rank or a sub-model, and the singular
values of a device's change.

Section 3 of the reconstruction of FedSpine; randomised SVD after Halko et al. 2011.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedspine.core.message import Tensors
from fedspine.core.process import spread
from fedspine.lm.aggregate import Contribution, change_factors
from fedspine.lm.lora import a_name, b_name, fresh_a
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite
from fedspine.lm.structure import Structure, cut_adapter

EXACT_BELOW = 96  # matrices with a side up to this get a full SVD
OVERSAMPLING, POWER_STEPS = 10, 2
NEGLIGIBLE = 1e-6  # a singular value below this share of the largest counts as zero


def factor(
    layout: PrunableLayout, dense: Tensors, rank: int, before: Tensors, seed: int
) -> Tensors:
    """The best factors of `rank` for every dense change, with the singular values shared evenly
    between B and A.

    If the change has a lower rank, A gets fresh rows and B zeros, so that they can be trained.
    `before`, the previous factors, warm-starts the SVD. Source: section 3.1; randomised SVD after
    Halko et al. 2011.
    """
    rngs = np.random.default_rng(seed).spawn(len(layout.sites))

    def factors(part: tuple[PrunableSite, np.random.Generator]) -> Tensors:
        site, rng = part
        left, values, right = _truncated_svd(dense[site.path], rank, before[a_name(site.path)], rng)
        used = values > NEGLIGIBLE * values.max().clamp_min(1e-30)
        root = torch.where(used, values, 0.0).sqrt()
        a, b = torch.zeros(rank, site.columns), torch.zeros(site.rows, rank)
        a[: len(values)] = root[:, None] * right
        b[:, : len(values)] = left * root
        unused = torch.ones(rank, dtype=torch.bool)
        unused[: len(values)] = ~used
        a[unused] = fresh_a(rng, rank, site.columns)[unused]
        return {a_name(site.path): a, b_name(site.path): b}

    pairs = spread(factors, zip(layout.sites, rngs, strict=True))
    return {name: tensor for pair in pairs for name, tensor in pair.items()}


def hand_out(layout: PrunableLayout, adapter: Tensors, structure: Structure, rank: int) -> Tensors:
    """The best adapter of `rank` for the sub-model `structure`, from an adapter of higher rank
    (section 3.2).

    Thin decompositions of the cut factors give the SVD of their product at the cost of small square
    matrices. Nothing is lost if `rank` is at least the adapter's.
    """
    sliced = cut_adapter(adapter, layout.sites, structure)
    if rank >= sliced[a_name(layout.sites[0].path)].shape[0]:
        return sliced
    paths = [site.path for site in layout.sites]
    # all sites share the small dimension, so their cores are decomposed in one batch
    gram_b = torch.stack([(b := sliced[b_name(path)].double()).T @ b for path in paths])
    gram_a = torch.stack([(a := sliced[a_name(path)].double()) @ a.T for path in paths])
    root_b, inverse_b = _roots(gram_b)
    root_a, inverse_a = _roots(gram_a)
    left, values, right = torch.linalg.svd(root_b @ root_a)
    root = values[:, :rank].sqrt()
    to_b = inverse_b @ (left[:, :, :rank] * root[:, None, :])
    to_a = (root[:, :, None] * right[:, :rank]) @ inverse_a
    small: Tensors = {}
    for i, path in enumerate(paths):
        small[b_name(path)] = (sliced[b_name(path)].double() @ to_b[i]).float()
        small[a_name(path)] = (to_a[i] @ sliced[a_name(path)].double()).float()
        _revive(small, path, values[i, :rank], sliced[a_name(path)])
    return small


def change_spectra(layout: PrunableLayout, part: Contribution) -> Float[Tensor, "sites ranks"]:
    """Singular values of B'A' - BA for every site, largest first, without the scale."""
    gram_left, gram_right = [], []
    for site in layout.sites:
        left, right = change_factors(part, site)
        gram_left.append(left.double().T @ left.double())
        gram_right.append(right.double() @ right.double().T)
    root, _ = _roots(torch.stack(gram_left))
    squares = torch.linalg.eigvalsh(root @ torch.stack(gram_right) @ root)
    return squares.clamp_min(0).sqrt().flip(1).float()


def effective_rank(spectra: Float[Tensor, "sites ranks"]) -> float:
    """exp of the entropy of each site's energy shares, averaged over sites; 0 for no change."""
    energy = spectra.double().square()
    total = energy.sum(1)
    shares = energy[total > 0] / total[total > 0, None]
    if not len(shares):
        return 0.0
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(1)
    return float(entropy.exp().mean())


def _revive(
    small: Tensors, path: str, values: Float[Tensor, " rank"], rows: Float[Tensor, "wide columns"]
) -> None:
    """Fill zero directions with rows of the original adapter, so that they can be trained."""
    dead = values <= NEGLIGIBLE * values.max().clamp_min(1e-30)
    if dead.any():
        small[a_name(path)][dead] = (
            rows[: len(values)][dead] if values.max() == 0 else rows[-int(dead.sum()) :]
        )
        small[b_name(path)][:, dead] = 0.0


def _roots(gram: Float[Tensor, "sites n n"]) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of Gram matrices, and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    root = values.sqrt()
    alive = values > 1e-14 * values.amax(1, keepdim=True).clamp_min(1e-300)
    inverse = torch.where(alive, 1 / root.clamp_min(1e-150), 0.0)
    transposed = vectors.transpose(1, 2)
    return (vectors * root[:, None, :]) @ transposed, (vectors * inverse[:, None, :]) @ transposed


def _truncated_svd(
    matrix: Float[Tensor, "rows columns"],
    rank: int,
    guess: Float[Tensor, "rank columns"],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    if min(matrix.shape) <= EXACT_BELOW:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    extra = torch.from_numpy(
        rng.standard_normal((OVERSAMPLING, matrix.shape[1])).astype(np.float32)
    )
    basis = torch.linalg.qr(matrix @ torch.cat([guess, extra]).T).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    inner, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ inner[:, :rank], values[:rank], right[:rank]
