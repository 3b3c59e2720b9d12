"""The forward process: clean tokens x0 -> noised tokens xt at time t."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .absorbing import alpha as alpha
    from .absorbing import alpha_prime as alpha_prime
    from .absorbing import elbo_weight as elbo_weight
    from .absorbing import q_sample as q_sample
    from .absorbing import sample_t as sample_t

__all__ = ("alpha", "alpha_prime", "elbo_weight", "q_sample", "sample_t")


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'adapt.noise' has no attribute {name!r}")
    return getattr(import_module(".absorbing", __name__), name)  # on first use: `schedules` needs no torch
