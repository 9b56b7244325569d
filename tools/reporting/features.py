"""Makes the report's sections about features: spectrum, maps and nearest neighbors."""

import numpy as np
import torch

from byolt.model.quality import spectrum
from byolt.pipelines.subset import spaced
from byolt.tools.reporting import figures
from byolt.tools.reporting.page import Figure, ReportSection, Thumbnail
from byolt.tools.reporting.run import ImageFeatures

_NEIGHBORS = 5
_QUERIES = 10
_TSNE_FROM = 10  # images
_NAME = 24  # characters of a file's name below an image


def features_section(images: ImageFeatures, principal: spectrum.Principal, rank: float) -> ReportSection:
    """The spectrum of the features, and their maps by PCA and t-SNE."""
    section = ReportSection("Features")
    if rank == 0:
        section.notes.append("All images have the same features: the encoder has collapsed.")
        return section
    samples, dimensions = images.features.shape
    eigenvalues = principal.eigenvalues.numpy()
    shares = eigenvalues / eigenvalues.sum()
    caption = (
        f"Eigenvalues λ of the covariance. Effective rank exp(-Σ p ln p), p = λ/Σλ (Roy & Vetterli, EUSIPCO 2007): "
        f"{rank:.1f} of at most {min(samples - 1, dimensions)}; 90 % of the variance is in the first "
        f"{int(np.searchsorted(shares.cumsum(), 0.9)) + 1} of them."
    )
    section.figures.append(Figure("Spectrum", figures.spectrum(eigenvalues, rank), caption))
    chosen = figures.marks_of_classes(images.labels)
    legend = [(mark, images.name(label)) for label, mark in chosen.items()]
    others = set(images.labels.tolist()) - chosen.keys()
    colored = "One color and marker per class."
    if not chosen:
        colored = "There are no labels, so all points look alike."
    elif others:
        legend.append((figures.OTHERS, "others"))
        colored = f"The {len(chosen)} most frequent of {len(chosen) + len(others - {-1})} classes are marked."
    rest = figures.OTHERS if chosen else figures.MARKS[0]
    marks = [chosen.get(label, rest) for label in images.labels.tolist()]
    embedded, tsne = _tsne(images)
    if dimensions > 1:
        axes = [f"axis {i + 1}, {100 * shares[i]:.0f} % of the variance" for i in range(2)]
        png = figures.scatter(spectrum.project(images.features, principal).numpy(), marks, axes)
        without = "" if embedded is not None else f" {tsne}"
        caption = f"The two axes of largest variance. {colored}{without}"
        section.figures.append(Figure("Map: PCA", png, caption, legend))
    if embedded is not None:
        png = figures.scatter(embedded, marks)
        section.figures.append(Figure("Map: t-SNE", png, f"{tsne} {colored}" if chosen else tsne, legend))
    return section


def _tsne(images: ImageFeatures) -> tuple[np.ndarray | None, str]:
    """A t-SNE map (N, 2) and a sentence about it, or None and the reason."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None, "There is no t-SNE map: scikit-learn is not installed (pip install -e '.[report]')."
    if len(images.features) < _TSNE_FROM:
        return None, f"There is no t-SNE map: it needs {_TSNE_FROM} images or more."
    perplexity = min(30.0, (len(images.features) - 1) / 3)
    tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0)
    how = f"By scikit-learn, cosine, perplexity {perplexity:.0f}; distances between distant groups have no meaning."
    return tsne.fit_transform(images.features.numpy()), how


def neighbors_section(images: ImageFeatures) -> ReportSection:
    """Some images and their nearest neighbors among the same images."""
    indices, cosines = spectrum.nearest(images.features, _NEIGHBORS)
    known = sorted(set(images.labels.tolist()) - {-1})
    if known:
        chosen = [known[i] for i in spaced(len(known), _QUERIES)]
        queries = [int(np.argmax(images.labels == label)) for label in chosen]
        of = "each class" if len(chosen) == len(known) else f"{len(chosen)} of {len(known)} classes"
        which = f"the first image of {of}"
    else:
        queries = spaced(len(images.labels), _QUERIES).tolist()
        which = "evenly spaced"
    section = ReportSection(
        "Nearest neighbors",
        f"The {_NEIGHBORS} nearest images by cosine similarity, which is the number below each, beside the class, or "
        "the file of an image without a label. Point at an image to see its file. "
        f"Queries are not picked by hand: {which}.",
    )
    rows = []
    for query in queries:
        label = int(images.labels[query])
        row = [_thumbnail(images, query)]
        for other, cosine in zip(indices[query].tolist(), cosines[query].tolist(), strict=True):
            theirs = int(images.labels[other])
            verdict = "" if min(label, theirs) < 0 else "right" if label == theirs else "wrong"
            row.append(_thumbnail(images, other, f" {cosine:.2f}", verdict))
        rows.append(row)
    half = (len(rows) + 1) // 2
    section.sheets = [part for part in (rows[:half], rows[half:]) if part]
    if known:
        right, chance = spectrum.neighbor_precision(torch.from_numpy(images.labels), indices)
        section.intro += (
            f" Over all labeled images, {100 * right:.1f} % of these neighbors have the image's class; chance is "
            f"{100 * chance:.1f} %. A neighbor of another class has a dashed red border and a cross."
        )
    else:
        section.notes.append("There are no labels, so wrong neighbors are not marked.")
    return section


def _thumbnail(images: ImageFeatures, i: int, cosine: str = "", verdict: str = "") -> Thumbnail:
    """One image with the name of its class below it, or of its file if it has no label."""
    file, label = images.file(i), int(images.labels[i])
    short = file.rpartition("/")[2]
    short = short if len(short) <= _NAME else "…\u2060" + short[1 - _NAME :]  # no break behind the ellipsis
    name = short if label < 0 else images.name(label)
    return Thumbnail(images.thumbnails[i], name + cosine, verdict, file)
