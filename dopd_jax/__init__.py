"""dopd_jax: Dual On-policy Distillation (arXiv 2606.30626) in JAX and Flax, for TPUs and GPUs."""

__version__ = '0.1.0'

REPOSITORY = 'https://github.com/dopd-jax/dopd_jax'
