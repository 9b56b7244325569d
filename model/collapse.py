"""The sign that a run has collapsed: all samples are mapped to almost one point."""

from configs.schema import Config


class CollapseError(Exception):
    """The projections have collapsed, and train.on_collapse is stop."""


def warning(projection_std: float, config: Config) -> str:
    """A sentence where the projections' spread is below train.collapse_std; "" otherwise, and where it is ignored.

    Args:
        projection_std: of the target's projections, averaged over dimensions and ranks (`step.collapse_gauges`).
        config: its projector_size D says what the spread over the whole sphere is: 1/sqrt(D).
    """
    spread = projection_std * config.model.projector_size**0.5
    if config.train.on_collapse == "ignore" or spread >= config.train.collapse_std:
        return ""
    return (
        f"collapse: the projections' standard deviation is {spread:.2g} of what a sphere's is, below "
        f"train.collapse_std={config.train.collapse_std:g}"
    )
