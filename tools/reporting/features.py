"""The report's parts about features: spectrum, maps and nearest neighbours."""

import numpy as np
import torch

from byolt.model.quality import spectrum
from byolt.pipelines.subset import spaced
from byolt.tools.reporting import figures, page
from byolt.tools.reporting.run import Sample

_NEIGHBOURS = 5
_QUERIES = 10
_TSNE_FROM = 10  # images


def features(sample: Sample, principal: spectrum.Principal, rank: float) -> str:
    """Spectrum and maps, as HTML."""
    samples, dimensions = sample.features.shape
    eigenvalues = principal.eigenvalues.numpy()
    if rank == 0:
        return page.note("All features are one point: the encoder has collapsed. There is nothing to draw.")
    shares = eigenvalues / eigenvalues.sum()
    drawing = page.figure(
        "Spectrum",
        figures.spectrum("Spectrum of the features", eigenvalues, rank),
        f"Eigenvalues λ of the covariance. Effective rank: exp(-Σ p ln p), p = λ/Σλ (Roy & Vetterli, EUSIPCO "
        f"2007, of the covariance): {rank:.1f} of at most {min(samples - 1, dimensions)}; 90 % of the variance is "
        f"in the first {int(np.searchsorted(shares.cumsum(), 0.9)) + 1} of them.",
    )
    colors, chosen = figures.colors_of(sample.labels)
    legend = {sample.name(label): color for label, color in chosen.items()}
    others = set(sample.labels.tolist()) - chosen.keys()
    coloured = "Coloured by class." if chosen else "There are no labels, so all points have one colour."
    if chosen and others:
        legend["others"] = figures.OTHER_COLOR
        coloured = (
            f"Coloured by class: {len(chosen)} of {len(chosen) + len(others - {-1})}, the most frequent."
        )
    drawings = [drawing]
    embedded, tsne = _tsne(sample)
    if dimensions > 1:
        axes = (_axis(1, shares), _axis(2, shares))
        svg = figures.scatter("PCA map", spectrum.project(sample.features, principal).numpy(), colors, axes)
        without = "" if embedded is not None else f" {tsne}"
        drawings.append(page.figure("Map: PCA", svg, f"The two largest axes. {coloured}{without}", legend))
    if embedded is not None:
        svg = figures.scatter("t-SNE map", embedded, colors)
        drawings.append(page.figure("Map: t-SNE", svg, f"{tsne} {coloured}", legend))
    return page.grid(drawings, small=len(drawings) == 3)


def _axis(number: int, shares: np.ndarray) -> str:
    return f"axis {number}, {100 * shares[number - 1]:.0f} % of the variance"


def _tsne(sample: Sample) -> tuple[np.ndarray | None, str]:
    """A t-SNE map (N, 2) and how it was made, or None and why there is none."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None, "There is no t-SNE map: scikit-learn is not installed (pip install 'byolt[report]')."
    if len(sample.features) < _TSNE_FROM:
        return None, f"There is no t-SNE map: it takes {_TSNE_FROM} images or more."
    perplexity = min(30.0, (len(sample.features) - 1) / 3)
    tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0)
    how = f"By scikit-learn, cosine, perplexity {perplexity:.0f}; distances between far groups mean nothing."
    return tsne.fit_transform(sample.features.numpy()), how


def neighbours(sample: Sample) -> str:
    """Queries and their nearest images."""
    indices, cosines = spectrum.nearest(sample.features, _NEIGHBOURS)
    known = sorted(set(sample.labels.tolist()) - {-1})
    if known:
        chosen = [known[i] for i in spaced(len(known), _QUERIES)]
        queries = [int(np.argmax(sample.labels == label)) for label in chosen]
        of = "each class" if len(chosen) == len(known) else f"{len(chosen)} of {len(known)} classes"
        which = f"the first image of {of}"
    else:
        queries = spaced(len(sample.labels), _QUERIES).tolist()
        which = "evenly spaced"
    rows = []
    for query in queries:
        label = int(sample.labels[query])
        row = [page.Picture(sample.thumbnails[query], sample.name(label))]
        for other, cosine in zip(indices[query].tolist(), cosines[query].tolist(), strict=True):
            theirs = int(sample.labels[other])
            verdict = "" if min(label, theirs) < 0 else "right" if label == theirs else "wrong"
            row.append(page.Picture(sample.thumbnails[other], f"{sample.name(theirs)} {cosine:.2f}", verdict))
        rows.append(row)
    intro = (
        f"The {_NEIGHBOURS} nearest of the same images by cosine (the number below each). "
        f"Queries, not picked: {which}."
    )
    half = (len(rows) + 1) // 2
    parts = [page.grid(page.sheet(part) for part in (rows[:half], rows[half:]) if part)]
    if known:
        right, chance = spectrum.neighbour_precision(torch.from_numpy(sample.labels), indices)
        intro += (
            f" Of all labelled images, {100 * right:.1f} % of these neighbours are of the image's class; chance is "
            f"{100 * chance:.1f} %. A neighbour of another class has a dashed red border and a cross."
        )
    else:
        parts.insert(0, page.note("There are no labels: which neighbours are wrong is for the eye to judge."))
    return page.section("Nearest neighbours", parts, intro)
