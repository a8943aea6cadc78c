"""ASGLD, ASG, AGLD: descent that adds noise, or takes a longer step, where the gradient says that it may be at a saddle."""

from __future__ import annotations

from typing import Any, Literal

from torch.optim import Optimizer

Mode = Literal["gated", "smooth", "annealed", "constant"]
Gate = Literal["norm", "ema", "cross", "snr"]
NoiseShape = Literal["gaussian", "sphere", "ball"]
NoiseScale = Literal["energy", "relative", "coordinate"]
LowPrecision = Literal["stochastic", "master", "nearest"]


class ASGLD(Optimizer):
    """Adaptive stochastic gradient Langevin dynamics:  x <- x - lr psi_t u_t + r phi_t zeta_t,  E||zeta||^2 = 1.

    u_t is the gradient, or its momentum buffer (which the noise never enters). A step fires when S_t <= grad_threshold and
    more than `escape_steps` steps have passed since the last fire. psi_t is `step_boost` in the `boost_steps` steps after a
    fire and 1 otherwise; phi_t depends on the mode.

    Args:
      params: tensors, groups or (name, tensor) pairs. Names key the noise; without them the position does.
      lr: step size; every hyperparameter may differ between groups and be scheduled.
      grad_threshold: g_thres, needed by the modes gated and smooth (not by gate="snr"); "auto" is 0.1 x running median of S.
      noise_radius: r. None means lr * grad_threshold, so that it follows the learning rate. 0 takes a group out of the noise.
      escape_steps: t_thres. None means ceil((4 + 0.5 ln d) / ln 1.1).
      mode: gated (phi = 1 on a fire), smooth (max(0, 1 - (S/g_thres)^2)), annealed ((1+t)^(-anneal_power/2)), constant (1).
      gate: what S_t is. norm: ||g||. ema: norm of the bias-corrected gradient average. cross: an unbiased estimate of
        ||grad f|| from two half-batches (`observe_half`) or data-parallel ranks. snr: the same over its own standard error.
      noise: gaussian; sphere (norm exactly r); ball (uniform in the ball of radius r).
      noise_scale: energy (E||noise||^2 = r^2 over all groups), relative (the same, shared out by squared norm of each tensor),
        coordinate (each coordinate has standard deviation r).
      low_precision: for float16 and bfloat16 parameters: stochastic rounding of the sum, float32 masters, or nearest.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        grad_threshold: float | Literal["auto"] | None = None,
        noise_radius: float | None = None,
        escape_steps: int | None = None,
        mode: Mode = "gated",
        gate: Gate = "norm",
        gate_beta: float = 0.9,
        noise: NoiseShape = "gaussian",
        noise_scale: NoiseScale = "energy",
        step_boost: float = 1.0,
        boost_steps: int = 1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        anneal_power: float = 0.55,
        noise_steps: int | None = None,
        reset_momentum: bool = False,
        low_precision: LowPrecision = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        raise NotImplementedError

    # Also: ASG(params, lr, step_boost=10.0, ...): no noise arguments.  AGLD(params, lr, ...): full gradients, as ASGLD.
    # SGLD(params, lr, *, temperature, seed=0, weight_decay=0, ...); SGLD.from_posterior(params, step_size, num_data, ...).
    # PSGLD(params, lr, *, temperature, alpha=0.99, eps=1e-5, correction=True, ...).
    # PerturbedGD(params, lr, *, grad_threshold, noise_radius, escape_steps, loss_drop): `.converged` after step(closure).
    # PerturbedSGD(params, lr, *, noise_radius): x - lr (g + N(0, r^2/d I)).  NoisySGD(params, lr, *, noise_radius=1.0): sphere.
    # All: opt.stats() -> dict(statistic, fires, steps_since_fire, noise_norm, boosted_next), tensors.
    # All gated ones: cls.from_constants(params, *, L, rho, eps, delta, delta_f, c=1.0, d=None, **kwargs).
    # Perturb(optimizer, *, the noise arguments of ASGLD).
    # Import from limbeck.optim.
