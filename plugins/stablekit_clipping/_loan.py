"""Changing entries of parameter groups for one update, and giving the old ones back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from stablekit.errors import AttachError

if TYPE_CHECKING:
    from stablekit import Session, Step


@final
class Loan:
    """Entries of the groups of the parameters a plugin acts on, and what they were before."""

    __slots__ = ("_lent",)

    def __init__(self) -> None:
        """Start with nothing lent."""
        self._lent: list[tuple[dict[str, Any], str, Any]] = []

    def scale_beta1(self, step: Step, factor: float) -> None:
        """Multiply the first of ``betas`` until :meth:`restore`.

        Raises:
            AttachError: The plugin is restricted to a part of a group.
        """
        for group in [] if factor == 1.0 else whole_groups(step, "beta1"):
            beta1, *others = group["betas"]
            self._lend(group, "betas", (beta1 * factor, *others))

    def scale_lr(self, step: Step, factor: float) -> None:
        """Multiply the learning rate until :meth:`restore`.

        Raises:
            AttachError: The plugin is restricted to a part of a group.
        """
        groups = whole_groups(step, "the learning rate")
        for group in [] if factor == 1.0 else groups:
            self._lend(group, "lr", group["lr"] * factor)

    def restore(self) -> None:
        """Give back what was lent."""
        for group, key, value in reversed(self._lent):
            group[key] = value
        self._lent = []

    def _lend(self, group: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401 - any option
        self._lent.append((group, key, group[key]))
        group[key] = value


def require_betas(session: Session, plugin: str) -> None:
    """Make sure that every group has betas.

    Raises:
        AttachError: One has none.
    """
    for optimizer in session.optimizers:
        if any("betas" not in group for group in optimizer.param_groups):
            raise AttachError(
                f"{plugin} was told to use beta1, but {type(optimizer).__name__} has no betas;"
                " leave out total_steps, and give gamma1 a value of its own"
            )


def whole_groups(step: Step, what: str) -> list[dict[str, Any]]:
    """Return the groups of the parameters a plugin acts on.

    Raises:
        AttachError: The plugin is restricted to a part of one.
    """
    groups = {id(group): group for group in step.groups}
    if sum(len(group["params"]) for group in groups.values()) != len(step.parameters):
        raise AttachError(
            f"{what} belongs to a whole parameter group, but the plugin is restricted to a part of"
            " one: restrict it by groups=..., or not at all"
        )
    return list(groups.values())
