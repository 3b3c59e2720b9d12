"""The forward process: clean tokens x0 -> noised tokens xt at time t."""

from .absorbing import alpha as alpha
from .absorbing import alpha_prime as alpha_prime
from .absorbing import elbo_weight as elbo_weight
from .absorbing import q_sample as q_sample
from .absorbing import sample_t as sample_t
